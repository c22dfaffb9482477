"""Quantization of a layer's input at run time, as tuning saw it."""

from __future__ import annotations

from torch import Tensor, nn

from auto_round.data_types.activations import quantize_activation
from auto_round.elements import largest_level
from auto_round.inference.layer import LayerSpec, QuantizedLinear
from auto_round.layouts.float_scaled import NVFP4_RANGE
from auto_round.schemes import STATIC_GLOBAL_SCALE

# Tensors of a checkpoint that hold calibrated ranges of a layer's input.
RANGE_TENSORS = {"input_scale", "input_global_scale"}


class QuantizedInput(nn.Module):
    """A kernel that quantizes and dequantizes the input of the layer in plain PyTorch, and leaves the rest to another.

    Args:
        kernel: what computes the layer.
    """

    def __init__(self, kernel: nn.Module) -> None:
        super().__init__()
        self.kernel = kernel

    def forward(self, layer: QuantizedLinear, x: Tensor) -> Tensor:
        """Returns (..., O) in x's dtype."""
        activation = layer.spec.scheme.activation
        assert activation is not None
        return self.kernel(layer, quantize_activation(x, activation, calibrated_peak(layer)))


def calibrated_peak(layer: QuantizedLinear) -> Tensor | None:
    """Returns () float32, the largest magnitude of the input that the checkpoint's calibrated range stands for."""
    activation = layer.spec.scheme.activation
    if activation is None or not activation.needs_calibration:
        return None
    if activation.data_type == STATIC_GLOBAL_SCALE:
        return NVFP4_RANGE / layer.input_global_scale.reshape(())
    return layer.input_scale.float().reshape(()) * largest_level(activation.data_type, activation.bits)


def why_no_range(spec: LayerSpec) -> str | None:
    """Returns why the input of a layer cannot be quantized: its calibrated range is not in the checkpoint; or None."""
    activation = spec.scheme.activation
    if activation is None or not activation.needs_calibration or RANGE_TENSORS & set(spec.specs()):
        return None
    return f"calibrated ranges of activations ({activation})"
