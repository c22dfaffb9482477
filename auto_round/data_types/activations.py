"""Quantization of activations: what engines do to the input of a linear layer, as quantize-dequantize in torch.

Tuning runs blocks with it, so that weights are chosen for the activations they will meet; the torch backend runs it
where there is no kernel. Gradients pass straight through the rounding, and through the range, which is not trained.

Ranges are measured at run time over a token (-1), a group of neighbouring features, or the tensor (0); or they are
calibrated: `peak` is then the largest magnitude seen on calibration text.

The arithmetic is that of the engines' kernels, in float32. compressed-tensors, which runs such checkpoints in
Transformers, computes in the model's precision, and its integer scale is peak / 127.5 where kernels take peak / 127.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from auto_round.data_types import mxfp, nvfp4
from auto_round.data_types.mxfp import ROUNDS_UP_FROM, covering_scale, rounded_scale, shared_scale
from auto_round.data_types.nvfp4 import global_scale
from auto_round.elements import E2M1, E4M3, ELEMENTS, Element, largest_level
from auto_round.registry import Registry
from auto_round.schemes import STATIC_GLOBAL_SCALE, ActivationScheme, QuantizationScheme

SMALLEST = 1e-10  # of a range: a token of zeros stays zeros

Quantizer = Callable[[Tensor, ActivationScheme, Tensor | None], Tensor]
ACTIVATIONS: Registry[Quantizer] = Registry("activation data type")


def quantize_activation(x: Tensor, scheme: ActivationScheme, peak: Tensor | None = None) -> Tensor:
    """Returns x (..., I) rounded to what the scheme can hold, in x's dtype; the gradient passes unchanged.

    Args:
        peak: () float32, the calibrated largest magnitude; needed where `scheme.needs_calibration`.
    """
    if not x.numel():  # an expert that no token went to
        return x
    with torch.no_grad():
        rounded = ACTIVATIONS[scheme.data_type](x.detach().float(), scheme, peak).to(x.dtype)
    return x + (rounded - x).detach() if x.requires_grad else rounded


def stored_peak(peak: Tensor, scheme: QuantizationScheme) -> Tensor:
    """Returns the calibrated peak that a checkpoint stands for: its scale is stored in the scheme's scale dtype."""
    assert scheme.activation is not None
    if scheme.activation.data_type == STATIC_GLOBAL_SCALE:
        return peak.float()  # stored in float32
    largest = largest_level(scheme.activation.data_type, scheme.activation.bits)
    dtype = getattr(torch, scheme.scale_dtype)
    return (peak.float() / largest).to(dtype).float() * largest


def why_not_activation(scheme: ActivationScheme) -> str | None:
    """Returns why activations cannot be quantized so, or None."""
    name, bits, group_size = scheme.data_type, scheme.bits, scheme.group_size
    if name not in ACTIVATIONS:
        return f"act_data_type={name} (only {', '.join(sorted(ACTIVATIONS))})"
    if name == "int":
        widths: set[int] = {4, 8}
    elif name in ("nv_fp", STATIC_GLOBAL_SCALE):
        widths = {4}
    else:
        widths = {width for known, width in ELEMENTS if known == name.removesuffix("_rceil")}
    if bits not in widths:
        return f"act_bits={bits} with act_data_type={name} (only {', '.join(map(str, sorted(widths)))})"
    fixed = {"nv_fp": nvfp4.GROUP_SIZE, STATIC_GLOBAL_SCALE: nvfp4.GROUP_SIZE}.get(name)
    fixed = mxfp.GROUP_SIZE if name.startswith("mx_") else fixed
    if fixed is not None and group_size != fixed:
        return f"act_group_size={group_size} with act_data_type={name} (only {fixed})"
    if not scheme.dynamic and name in ("int", "fp", "fp_e5m2") and group_size != 0:
        return f"act_group_size={group_size} with calibrated ranges (only 0: one for the tensor)"
    if not scheme.dynamic and name.startswith("mx_"):
        return f"calibrated ranges with act_data_type={name} (MX scales are computed at run time)"
    return None


@ACTIVATIONS.register("int")
def _integers(x: Tensor, scheme: ActivationScheme, peak: Tensor | None) -> Tensor:
    grouped = _grouped(x, scheme.group_size)
    top = 2 ** (scheme.bits - 1) - 1
    if scheme.sym or peak is not None:
        scale = (_peak(grouped, peak) / top).clamp(min=SMALLEST)
        levels = (grouped / scale).round().clamp(-top - 1, top)
        return _ungrouped(scale * levels, x)
    low = grouped.amin(-1, keepdim=True).clamp(max=0)
    scale = ((grouped.amax(-1, keepdim=True).clamp(min=0) - low) / (2 * top + 1)).clamp(min=SMALLEST)
    zero = (-low / scale).round()
    codes = ((grouped / scale).round() + zero).clamp(0, 2 * top + 1)
    return _ungrouped(scale * (codes - zero), x)


@ACTIVATIONS.register("fp", "fp_e5m2")
def _floats(x: Tensor, scheme: ActivationScheme, peak: Tensor | None) -> Tensor:
    element = ELEMENTS[scheme.data_type, scheme.bits]
    grouped = _grouped(x, scheme.group_size)
    scale = (_peak(grouped, peak) / element.largest).clamp(min=SMALLEST)
    return _ungrouped(scale * element.round(grouped / scale), x)


@ACTIVATIONS.register("mx_fp", "mx_fp_e3m2", "mx_fp_e5m2", "mx_int")
def _microscaled(x: Tensor, scheme: ActivationScheme, peak: Tensor | None) -> Tensor:  # noqa: ARG001
    element: Element = ELEMENTS[scheme.data_type, scheme.bits]
    grouped = _grouped(x, scheme.group_size)
    scale_of = rounded_scale if element.name in ROUNDS_UP_FROM else shared_scale
    scale = scale_of(grouped.abs().amax(-1, keepdim=True), element)
    return _ungrouped(scale * element.round(grouped / scale), x)


@ACTIVATIONS.register("mx_fp_rceil")
def _microscaled_unsaturated(x: Tensor, scheme: ActivationScheme, peak: Tensor | None) -> Tensor:  # noqa: ARG001
    element: Element = ELEMENTS["mx_fp", scheme.bits]
    grouped = _grouped(x, scheme.group_size)
    scale = covering_scale(grouped.abs().amax(-1, keepdim=True), element)
    return _ungrouped(scale * element.round(grouped / scale), x)


@ACTIVATIONS.register("nv_fp", STATIC_GLOBAL_SCALE)
def _nvfp4(x: Tensor, scheme: ActivationScheme, peak: Tensor | None) -> Tensor:
    grouped = _grouped(x, scheme.group_size)
    whole = global_scale(x.abs().amax() if peak is None else peak.to(x.device))
    stored = E4M3.round(grouped.abs().amax(-1, keepdim=True) / E2M1.largest * whole)
    scale = stored.clamp(min=SMALLEST) / whole
    # A group too small for the E4M3 scale to be anything but zero becomes zeros, as in the kernels.
    return _ungrouped(torch.where(stored > 0, scale * E2M1.round(grouped / scale), 0.0), x)


def _grouped(x: Tensor, group_size: int) -> Tensor:
    """Returns x with the values that share a range along the last dimension; short groups are padded with zeros."""
    if group_size == 0:
        return x.reshape(1, -1)
    if group_size == -1:
        return x
    padded = torch.nn.functional.pad(x, (0, -x.shape[-1] % group_size))
    return padded.unflatten(-1, (-1, group_size))


def _ungrouped(grouped: Tensor, like: Tensor) -> Tensor:
    """Returns what `_grouped` cut, in the shape of `like`."""
    if grouped.ndim == like.ndim + 1:
        return grouped.flatten(-2)[..., : like.shape[-1]]
    return grouped.reshape(like.shape)


def _peak(grouped: Tensor, calibrated: Tensor | None) -> Tensor:
    return grouped.abs().amax(-1, keepdim=True) if calibrated is None else calibrated.to(grouped.device)
