"""Float layouts of compressed-tensors, which vLLM and SGLang load: FP8, MXFP8, MXFP4, NVFP4.

FP8 and MXFP8 weights are stored as float8 tensors, FP4 as two codes in a byte, the even input in the low half. MX
scales are bytes exponent + 127 (E8M0). Calibrated activation ranges go along: `input_scale` of FP8 is what activations
are divided by, `input_global_scale` of NVFP4 what block scales are multiplied by. Source: compressed-tensors 0.20;
golden checkpoints in the tests.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from auto_round.elements import E2M1, E4M3, floor_log2, power_of_two
from auto_round.layouts.base import LAYOUTS, Specs, input_scale_specs, pack_input_scale, unpack_input_peak
from auto_round.layouts.bit_pack import pack_bits
from auto_round.schemes import QuantizationScheme
from auto_round.tensors import QuantizedTensor, group_count

E8M0_BIAS = 127
NVFP4_RANGE = E4M3.largest * E2M1.largest  # largest block scale times largest element
FLOAT8 = {"fp": torch.float8_e4m3fn, "fp_e5m2": torch.float8_e5m2, "mx_fp": torch.float8_e4m3fn}


@dataclasses.dataclass(frozen=True, slots=True)
class Fp8Layout:
    """weight float8 (O, I); weight_scale (O, 1) per row, (1,) per tensor or (O/rows, I/columns) of blocks;
    input_scale (1,) where activation ranges are calibrated. Scales are in the scheme's scale dtype."""

    name: str = "fp8"

    def refuses(self, scheme: QuantizationScheme, shape: tuple[int, int]) -> str | None:  # noqa: ARG002
        """Returns why a weight cannot be held, or None."""
        if scheme.data_type not in ("fp", "fp_e5m2"):
            return f"data_type={scheme.data_type} (only fp, fp_e5m2)"
        if isinstance(scheme.group_size, int) and scheme.group_size > 0:
            return f"group_size={scheme.group_size} (only -1 per row, 0 per tensor, or blocks)"
        return None

    def specs(self, scheme: QuantizationScheme, shape: tuple[int, int]) -> Specs:
        """Returns tensor name -> (shape, dtype name)."""
        dtype = str(FLOAT8[scheme.data_type]).removeprefix("torch.")
        found: Specs = {"weight": (shape, dtype), "weight_scale": (_scale_shape(scheme, shape), scheme.scale_dtype)}
        return found | input_scale_specs(scheme)

    def pack(self, weight: QuantizedTensor) -> dict[str, Tensor]:
        """Returns weight, weight_scale and, where it is known, input_scale = peak / largest number of the input."""
        scheme, dtype = weight.scheme, getattr(torch, weight.scheme.scale_dtype)
        step = scheme.group_size[0] if isinstance(scheme.group_size, tuple) else 1
        step = weight.shape[0] if scheme.group_size == 0 else step
        scale = weight.scale[::step].to(dtype)
        tensors = {
            "weight": weight.codes.contiguous().view(FLOAT8[scheme.data_type]),
            "weight_scale": scale.reshape(_scale_shape(scheme, weight.shape)).contiguous(),
        }
        return tensors | pack_input_scale(weight)

    def unpack(
        self, tensors: Mapping[str, Tensor], scheme: QuantizationScheme, shape: tuple[int, int]
    ) -> QuantizedTensor:
        """Returns the weight that `pack` was given."""
        rows = shape[0]
        scale = tensors["weight_scale"].float()
        if isinstance(scheme.group_size, tuple):
            scale = scale.repeat_interleave(scheme.group_size[0], dim=0)[:rows]
        else:
            scale = scale.reshape(-1, 1).expand(rows, 1)
        peak = unpack_input_peak(tensors, scheme)
        codes = tensors["weight"].contiguous().view(torch.uint8)
        return QuantizedTensor(codes, scale.contiguous(), None, scheme, input_peak=peak)


@dataclasses.dataclass(frozen=True, slots=True)
class MxLayout:
    """weight_packed uint8 (O, I/2) for FP4, or weight float8 (O, I) for FP8; weight_scale uint8 (O, I/32)."""

    name: str
    bits: int

    def refuses(self, scheme: QuantizationScheme, shape: tuple[int, int]) -> str | None:
        """Returns why a weight cannot be held, or None."""
        if (scheme.data_type, scheme.bits) != ("mx_fp", self.bits):
            return f"data_type={scheme.data_type} bits={scheme.bits} (only mx_fp with {self.bits})"
        return f"groups of 32 in {shape[1]} inputs (only whole groups)" if shape[1] % 32 else None

    def specs(self, scheme: QuantizationScheme, shape: tuple[int, int]) -> Specs:
        """Returns tensor name -> (shape, dtype name)."""
        rows, width = shape
        codes: Specs = {"weight_packed": ((rows, width // 2), "uint8")}
        if self.bits == 8:
            codes = {"weight": (shape, "float8_e4m3fn")}
        return codes | {"weight_scale": ((rows, group_count(width, scheme.group_size)), "uint8")}

    def pack(self, weight: QuantizedTensor) -> dict[str, Tensor]:
        """Returns the codes and the exponents of the scales."""
        scale = to_exponents(weight.scale)
        if self.bits == 8:
            return {"weight": weight.codes.contiguous().view(torch.float8_e4m3fn), "weight_scale": scale}
        return {"weight_packed": _pack_pairs(weight.codes), "weight_scale": scale}

    def unpack(
        self,
        tensors: Mapping[str, Tensor],
        scheme: QuantizationScheme,
        shape: tuple[int, int],  # noqa: ARG002
    ) -> QuantizedTensor:
        """Returns the weight that `pack` was given."""
        scale = from_exponents(tensors["weight_scale"])
        if self.bits == 8:
            return QuantizedTensor(tensors["weight"].contiguous().view(torch.uint8), scale, None, scheme)
        return QuantizedTensor(_unpack_pairs(tensors["weight_packed"]), scale, None, scheme)


@dataclasses.dataclass(frozen=True, slots=True)
class NvFp4Layout:
    """weight_packed uint8 (O, I/2), weight_scale float8_e4m3fn (O, I/16), weight_global_scale (1,) float32;
    input_global_scale (1,) float32 where activations are quantized."""

    name: str = "nvfp4"

    def refuses(self, scheme: QuantizationScheme, shape: tuple[int, int]) -> str | None:
        """Returns why a weight cannot be held, or None."""
        if scheme.data_type != "nv_fp":
            return f"data_type={scheme.data_type} (only nv_fp)"
        return f"groups of 16 in {shape[1]} inputs (only whole groups)" if shape[1] % 16 else None

    def specs(self, scheme: QuantizationScheme, shape: tuple[int, int]) -> Specs:
        """Returns tensor name -> (shape, dtype name)."""
        rows, width = shape
        found: Specs = {
            "weight_packed": ((rows, width // 2), "uint8"),
            "weight_scale": ((rows, width // 16), "float8_e4m3fn"),
            "weight_global_scale": ((1,), "float32"),
        }
        if scheme.activation is not None and scheme.activation.needs_calibration:
            found["input_global_scale"] = ((1,), "float32")
        return found

    def pack(self, weight: QuantizedTensor) -> dict[str, Tensor]:
        """Returns codes, block scales, the global scale and, where it is known, input_global_scale = 2688 / peak."""
        assert weight.global_scale is not None
        tensors = {
            "weight_packed": _pack_pairs(weight.codes),
            "weight_scale": weight.scale.to(torch.float8_e4m3fn).contiguous(),
            "weight_global_scale": weight.global_scale.reshape(1),
        }
        if weight.input_peak is not None:
            tensors["input_global_scale"] = (NVFP4_RANGE / weight.input_peak).float().reshape(1)
        return tensors

    def unpack(
        self,
        tensors: Mapping[str, Tensor],
        scheme: QuantizationScheme,
        shape: tuple[int, int],  # noqa: ARG002
    ) -> QuantizedTensor:
        """Returns the weight that `pack` was given."""
        peak = None
        if "input_global_scale" in tensors:
            peak = NVFP4_RANGE / tensors["input_global_scale"].double().reshape(())
        return QuantizedTensor(
            _unpack_pairs(tensors["weight_packed"]),
            tensors["weight_scale"].float().contiguous(),
            None,
            scheme,
            global_scale=tensors["weight_global_scale"].float().reshape(()),
            input_peak=peak,
        )


def to_exponents(scale: Tensor) -> Tensor:
    """Returns powers of two as bytes exponent + 127 (E8M0)."""
    return (floor_log2(scale) + E8M0_BIAS).to(torch.uint8).contiguous()


def from_exponents(bytes_: Tensor) -> Tensor:
    """Returns the float32 powers of two of E8M0 bytes."""
    return power_of_two(bytes_.to(torch.int32) - E8M0_BIAS)


def _scale_shape(scheme: QuantizationScheme, shape: tuple[int, int]) -> tuple[int, ...]:
    rows, width = shape
    if isinstance(scheme.group_size, tuple):
        return (-(-rows // scheme.group_size[0]), group_count(width, scheme.group_size))
    return (1,) if scheme.group_size == 0 else (rows, 1)


def _pack_pairs(codes_OI: Tensor) -> Tensor:
    """Returns (O, I/2) bytes of two 4-bit codes, the even input in the low half."""
    return pack_bits(codes_OI, 4).view(torch.uint8)


def _unpack_pairs(bytes_OW: Tensor) -> Tensor:
    return torch.stack([bytes_OW & 15, bytes_OW >> 4], dim=-1).flatten(1)


LAYOUTS.register("fp8")(Fp8Layout())
LAYOUTS.register("mxfp4")(MxLayout("mxfp4", 4))
LAYOUTS.register("mxfp8")(MxLayout("mxfp8", 8))
LAYOUTS.register("nvfp4")(NvFp4Layout())
