"""Random quantized layers, and tiny Llama checkpoints made of them, written without any exporter."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from auto_round.data_types.activations import quantize_activation
from auto_round.elements import ELEMENTS
from auto_round.inference.backends import BACKENDS
from auto_round.inference.layer import LayerSpec, QuantizedLinear
from auto_round.layouts import LAYOUTS
from auto_round.schemes import QuantizationScheme
from auto_round.tensors import QuantizedTensor, group_count

PACKING = {
    "gptq": "auto_round:auto_gptq",
    "gptq_zp": "auto_round",
    "awq": "auto_round:auto_awq",
    "fp8_flat": "auto_round:fp8_static",
    "mxint4": "auto_round",
}


def random_weight(scheme: QuantizationScheme, rows: int, width: int, seed: int = 0) -> QuantizedTensor:
    rng = torch.Generator().manual_seed(seed)
    if scheme.data_type != "int":
        return random_float_weight(scheme, rows, width, rng)
    shape = (rows, group_count(width, scheme.group_size))
    top = 2**scheme.bits
    codes = torch.randint(0, top, (rows, width), generator=rng, dtype=torch.uint8)
    scale = (torch.randn(shape, generator=rng) * 0.1 / top).half().float()
    zero = None if scheme.sym else torch.randint(1, top, shape, generator=rng, dtype=torch.uint8)
    return QuantizedTensor(codes, scale, zero, scheme, input_peak=random_peak(scheme))


def random_float_weight(scheme: QuantizationScheme, rows: int, width: int, rng: torch.Generator) -> QuantizedTensor:
    """Returns every code that is a number, under scales of the kind of the data type; weights of about 0.1."""
    element = ELEMENTS[scheme.data_type, scheme.bits]
    numbers = element.decode(torch.arange(2**scheme.bits, dtype=torch.uint8))
    valid = torch.nonzero(numbers.abs() <= element.largest).flatten().to(torch.uint8)
    codes = valid[torch.randint(0, len(valid), (rows, width), generator=rng)]
    size = scheme.group_size
    shared = {0: rows}.get(size, 1) if isinstance(size, int) else size[0]
    shape = (-(-rows // shared), group_count(width, size))
    exponent = torch.randint(-5, -2, shape, generator=rng).float()
    scale = torch.exp2(exponent - element.max_exponent)
    if not scheme.data_type.startswith("mx"):
        scale = scale * (1 + torch.randint(0, 8, shape, generator=rng) / 8)
    scale = scale.repeat_interleave(shared, dim=0)[:rows]
    whole = torch.tensor(2.0**12 + 3) if scheme.data_type == "nv_fp" else None
    scale = scale if whole is None else scale * 2.0**12
    return QuantizedTensor(codes, scale, None, scheme, global_scale=whole, input_peak=random_peak(scheme))


def random_peak(scheme: QuantizationScheme) -> Tensor | None:
    """Returns a calibrated range whose stored form is exact."""
    if scheme.activation is None or not scheme.activation.needs_calibration:
        return None
    return torch.tensor(127 / 64 if scheme.activation.data_type == "int" else 1.75)


def input_quantizer(weight: QuantizedTensor) -> Callable[[Tensor], Tensor]:
    activation, peak = weight.scheme.activation, weight.input_peak
    return lambda x: x if activation is None else quantize_activation(x, activation, peak)


@dataclasses.dataclass
class Case:
    """A layer whose tensors are loaded but not settled, its weight and bias, and what its input passes through."""

    layer: QuantizedLinear
    weight: Tensor
    bias: Tensor | None
    quantize_input: Callable[[Tensor], Tensor]

    def ready(self) -> Case:
        self.layer.settle()
        self.layer.prepare()
        return self


@pytest.fixture(scope="session")
def make_case() -> Callable[..., Case]:
    def make(spec: LayerSpec, backend: str = "torch", shuffled: bool = False) -> Case:
        weight = random_weight(spec.scheme, *spec.shape)
        layer = QuantizedLinear(spec, BACKENDS[backend].prepare)
        dense, tensors = weight.dequantize(), LAYOUTS[spec.layout].pack(weight)
        if shuffled:
            dense, tensors = shuffle(weight, spec.layout)
        for name, tensor in tensors.items():
            setattr(layer, name, tensor)
        bias = torch.randn(spec.out_features).to(spec.dtype) if spec.bias else None
        layer.bias = bias
        return Case(layer, dense, bias, input_quantizer(weight))

    return make


def shuffle(weight: QuantizedTensor, layout: str, seed: int = 1) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the weight with its input features in another order than its groups, dense and packed with g_idx."""
    width = weight.shape[1]
    order = torch.randperm(width, generator=torch.Generator().manual_seed(seed))
    shuffled = dataclasses.replace(weight, codes=weight.codes[:, order])
    g_idx = (order // weight.scheme.group_size).to(torch.int32)
    return weight.dequantize()[:, order], {**LAYOUTS[layout].pack(shuffled), "g_idx": g_idx}


@dataclasses.dataclass
class Checkpoint:
    """A folder, and the same model with its weights dequantized."""

    folder: Path
    dense: LlamaForCausalLM
    ids: Tensor


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> Callable[..., Checkpoint]:
    """Writes a Llama of odd widths (172 and 352 features).

    `schemes(name)` gives a layer's scheme or None; `layout` is a name or gives one for a scheme; `edit(tensors)` may
    change what is stored. Inputs of layers in `dense` are quantized as their schemes say.
    """

    def make(
        quantization_config: dict[str, Any],
        schemes: Callable[[str], QuantizationScheme | None],
        layout: str | Callable[[QuantizationScheme], str] = "gptq",
        shuffled: bool = False,
        edit: Callable[[dict[str, Tensor]], Any] | None = None,
        **config: Any,
    ) -> Checkpoint:
        torch.manual_seed(0)
        sizes = {"hidden_size": 172, "intermediate_size": 352, "head_dim": 16, "num_hidden_layers": 2, "vocab_size": 64}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
        llama = LlamaConfig(**{**sizes, **heads, "dtype": "float32", **config})
        dense = LlamaForCausalLM(llama).eval()
        tensors = dense.state_dict()
        for name, module in dense.named_modules():
            scheme = schemes(name) if isinstance(module, nn.Linear) else None
            if scheme is None:
                continue
            weight = random_weight(scheme, *module.weight.shape, seed=len(tensors))
            name_of_layout = layout if isinstance(layout, str) else layout(scheme)
            values, packed = weight.dequantize(), LAYOUTS[name_of_layout].pack(weight)
            if shuffled:
                values, packed = shuffle(weight, name_of_layout)
            quantize = input_quantizer(weight)
            module.register_forward_pre_hook(lambda _, inputs, quantize=quantize: quantize(*inputs))
            module.weight.data = values.contiguous()
            del tensors[f"{name}.weight"]
            tensors |= {f"{name}.{local}": tensor for local, tensor in packed.items()}
        if edit is not None:
            edit(tensors)
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, tmp_path / "model.safetensors")
        written = {**llama.to_dict(), "architectures": ["LlamaForCausalLM"]}
        (tmp_path / "config.json").write_text(json.dumps({**written, "quantization_config": quantization_config}))
        return Checkpoint(tmp_path, dense, torch.arange(1, 21)[None] * 3)

    return make


@pytest.fixture(scope="session")
def block_scheme() -> Callable[..., Callable[[str], QuantizationScheme | None]]:
    """Returns, for scheme fields, the function that gives that scheme to each layer of the blocks."""

    def make(**fields: Any) -> Callable[[str], QuantizationScheme | None]:
        scheme = QuantizationScheme.from_dict(fields)
        return lambda name: scheme if ".layers." in name else None

    return make


@pytest.fixture(scope="session")
def write_config() -> Callable[..., dict[str, Any]]:
    """Returns the quantization_config that auto-round writes for a layout and scheme fields."""

    def make(layout: str = "gptq", **fields: Any) -> dict[str, Any]:
        packing = PACKING.get(layout, "auto_round:llm_compressor")
        base = {"quant_method": "auto-round", "packing_format": packing, "data_type": "int"}
        scheme = {"bits": 4, "group_size": 128, "sym": True}
        return {**base, **scheme, "block_name_to_quantize": "model.layers", **fields}

    return make
