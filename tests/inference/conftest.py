"""Random quantized layers, and tiny Llama checkpoints made of them, written without any exporter."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from auto_round.inference.backends import BACKENDS
from auto_round.inference.layer import LayerSpec, QuantizedLinear
from auto_round.layouts import LAYOUTS
from auto_round.schemes import QuantizationScheme
from auto_round.tensors import QuantizedTensor, group_count

PACKING = {"gptq": "auto_round:auto_gptq", "gptq_zp": "auto_round", "awq": "auto_round:auto_awq"}


def random_weight(scheme: QuantizationScheme, rows: int, width: int, seed: int = 0) -> QuantizedTensor:
    rng = torch.Generator().manual_seed(seed)
    shape = (rows, group_count(width, scheme.group_size))
    top = 2**scheme.bits
    codes = torch.randint(0, top, (rows, width), generator=rng, dtype=torch.uint8)
    scale = (torch.randn(shape, generator=rng) * 0.1 / top).half().float()
    zero = None if scheme.sym else torch.randint(1, top, shape, generator=rng, dtype=torch.uint8)
    return QuantizedTensor(codes, scale, zero, scheme)


@dataclasses.dataclass
class Case:
    """A layer whose tensors are loaded but not settled, and the weight and bias it stands for."""

    layer: QuantizedLinear
    weight: Tensor
    bias: Tensor | None

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
        return Case(layer, dense, bias)

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

    `schemes(name)` gives a layer's scheme or None; `edit(tensors)` may change what is stored.
    """

    def make(
        quantization_config: dict[str, Any],
        schemes: Callable[[str], QuantizationScheme | None],
        layout: str = "gptq",
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
            values, packed = weight.dequantize(), LAYOUTS[layout].pack(weight)
            if shuffled:
                values, packed = shuffle(weight, layout)
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
        scheme = QuantizationScheme(**fields)
        return lambda name: scheme if ".layers." in name else None

    return make


@pytest.fixture(scope="session")
def write_config() -> Callable[..., dict[str, Any]]:
    """Returns the quantization_config that auto-round writes for a layout and scheme fields."""

    def make(layout: str = "gptq", **fields: Any) -> dict[str, Any]:
        base = {"quant_method": "auto-round", "packing_format": PACKING[layout], "data_type": "int"}
        scheme = {"bits": 4, "group_size": 128, "sym": True}
        return {**base, **scheme, "block_name_to_quantize": "model.layers", **fields}

    return make


@pytest.fixture
def run_interpreted() -> Callable[[str], int]:
    """Returns run(file) -> how many tests of a file pass in a process of their own with Triton's interpreter.

    Triton decides about interpretation when it is imported, so it cannot be switched on here.
    """

    def run(file: str) -> int:
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", file]
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
        return int(re.search(r"(\d+) passed", done.stdout)[1])

    return run
