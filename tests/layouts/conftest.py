"""An unpacker of golden checkpoints that shares nothing with the code under test: numpy, by bits and nibbles."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from auto_round.schemes import QuantizationScheme
from auto_round.tensors import QuantizedTensor, group_count


@dataclass(frozen=True)
class GoldenLayer:
    """One quantized layer of a checkpoint that the reference wrote."""

    name: str
    bits: int
    group_size: int
    sym: bool
    tensors: dict[str, np.ndarray]

    @property
    def scheme(self) -> QuantizationScheme:
        return QuantizationScheme(bits=self.bits, group_size=self.group_size, sym=self.sym)

    def quantized(self, codes_OI: np.ndarray, zeros_OG: np.ndarray) -> QuantizedTensor:
        """Returns the layer as data; `zeros_OG` of a symmetric layer must be the constant one."""
        scale_OG = torch.from_numpy(self.tensors["scales"].astype(np.float32).T.copy())
        zero_OG = torch.from_numpy(zeros_OG.astype(np.uint8))
        if self.sym:
            assert (zeros_OG == 2 ** (self.bits - 1)).all()
        codes_OI = torch.from_numpy(codes_OI.astype(np.uint8))
        return QuantizedTensor(codes_OI, scale_OG, None if self.sym else zero_OG, self.scheme)

    def check_same_bytes(self, packed: dict[str, torch.Tensor]) -> None:
        """Asserts that packed tensors equal the stored ones in shape, dtype and every byte."""
        assert set(packed) == {"qweight", "qzeros", "scales"}
        for name, tensor in packed.items():
            stored = self.tensors[name]
            assert (tensor.shape, tensor.numpy().dtype) == (stored.shape, stored.dtype), (self.name, name)
            assert tensor.numpy().tobytes() == stored.tobytes(), (self.name, name)


def _golden_layers(folder: Path) -> Iterator[GoldenLayer]:
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    with safe_open(folder / "model.safetensors", framework="np") as handle:
        keys = sorted(handle.keys())
        for key in keys:
            if not key.endswith(".qweight"):
                continue
            name = key.removesuffix(".qweight")
            said = {**config, **config.get("extra_config", {}).get(name, {})}
            tensors = {part: handle.get_tensor(f"{name}.{part}") for part in ("qweight", "qzeros", "scales")}
            yield GoldenLayer(name, said["bits"], said["group_size"], said["sym"], tensors)


@pytest.fixture(scope="session")
def golden_layers(shared: Path) -> Callable[[str], list[GoldenLayer]]:
    """Returns the quantized layers of a golden checkpoint by its name."""

    def read(name: str) -> list[GoldenLayer]:
        (folder,) = (shared / "golden" / name).iterdir()
        layers = list(_golden_layers(folder))
        assert len(layers) > 20
        return layers

    return read


def bits_to_codes(words_RW: np.ndarray, bits: int) -> np.ndarray:
    """Returns (R, W * 32 // bits): each row's words as one string of bits, lowest first, cut into codes."""
    string = np.unpackbits(np.ascontiguousarray(words_RW, dtype="<i4").view(np.uint8), axis=1, bitorder="little")
    weights = 2 ** np.arange(bits)
    return (string.reshape(string.shape[0], -1, bits) * weights).sum(-1)


@pytest.fixture(scope="session")
def unpack_bit_string() -> Callable[[np.ndarray, int], np.ndarray]:
    return bits_to_codes


@pytest.fixture(scope="session")
def make_weight() -> Callable[..., QuantizedTensor]:
    """Returns random quantized weights whose scales are float16 numbers of both signs."""

    def make(rows: int, width: int, *, bits: int, group_size: int, sym: bool, seed: int = 0) -> QuantizedTensor:
        generator = torch.Generator().manual_seed(seed)
        groups = group_count(width, group_size)
        codes = torch.randint(0, 2**bits, (rows, width), generator=generator).to(torch.uint8)
        scale = torch.randn(rows, groups, generator=generator).half().float()
        zero = None if sym else torch.randint(1, 2**bits, (rows, groups), generator=generator).to(torch.uint8)
        return QuantizedTensor(codes, scale, zero, QuantizationScheme(bits=bits, group_size=group_size, sym=sym))

    return make


@pytest.fixture(scope="session")
def check_same_weight() -> Callable[[QuantizedTensor, QuantizedTensor], None]:
    """Returns an assertion that two weights are the same in codes, scales, zero points and scheme."""

    def check(first: QuantizedTensor, second: QuantizedTensor) -> None:
        assert first.scheme == second.scheme
        assert torch.equal(first.codes, second.codes)
        assert torch.equal(first.scale, second.scale)
        assert torch.equal(first.zero_points(), second.zero_points())

    return check


@pytest.fixture(scope="session")
def check_near_original(shared: Path) -> Callable[[GoldenLayer, QuantizedTensor], None]:
    """Returns an assertion that a golden layer, dequantized, is the original weight but for rounding.

    Every weight that was not cut at an end of the grid is within 1.05 steps: 0.5 from rounding, and at most 0.55 from
    the offsets, which move by 1/10 in each of the reference's 10 steps, decaying linearly to 0 (1 + 0.9 + ... + 0.1 =
    5.5 tenths). Zero points off by one, or rows in another order, leave a third of these weights or more outside.
    """
    file = shared / "golden" / "tiny-llama" / "model.safetensors"

    def check(golden: GoldenLayer, weight: QuantizedTensor) -> None:
        with safe_open(file, framework="pt") as handle:
            original = handle.get_tensor(f"{golden.name}.weight").float()
        assert tuple(original.shape) == weight.shape
        step = weight.scale.abs().repeat_interleave(golden.group_size, dim=1)
        inner = (weight.codes > 0) & (weight.codes < 2**golden.bits - 1)
        assert inner.float().mean() > 0.3, golden.name
        assert ((weight.dequantize() - original).abs() / step)[inner].max() <= 1.05, golden.name

    return check
