"""Checkpoints written by auto-round 0.16.1: the same codes, scales and zero points give the same files here.

The codes are read by an unpacker of its own (numpy, bits and nibbles); what it finds is put into the store of a run and
exported. Every tensor must then have the same name, dtype and bytes. Deviations that are meant are listed in DIFFERENT.
"""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from auto_round.config import RunConfig
from auto_round.formats import EXPORTERS, export
from auto_round.formats.export import HEAD_BLOCK
from auto_round.session import open_session
from auto_round.store import RunStore
from auto_round.tensors import BlockResult, QuantizedTensor

CASES = [
    ("ar_w4g128_sym", "auto_round"),
    ("ar_w4g128_sym", "auto_round:auto_gptq"),
    ("ar_w3g128_sym", "auto_round"),
    ("ar_w4g128_asym", "auto_round"),
    ("ar_w4g128_asym", "auto_round:auto_awq"),
    ("ar_mixed_4_8_16", "auto_round"),
    ("ar_w2g32_asym", "auto_round:gptqmodel"),
    ("gptq_w4g128_sym", "auto_gptq"),
    ("gptq_w3g128_sym", "auto_gptq"),
    ("awq_w4g128_asym", "auto_awq"),
]
# Of the reference's packing "auto_round" only the tensors are alike: that name means too little to engines.
DIFFERENT = {"autoround_version"}
DIFFERENT_IN = {"ar_w2g32_asym": {"packing_format"}}


def bits_of_words(words, bits, count):
    """Codes of each row of int32 words, read as one string of bits from the lowest on."""
    as_bits = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=1, bitorder="little")
    return (as_bits[:, : count * bits].reshape(-1, count, bits) << np.arange(bits)).sum(-1)


def awq_columns(words):
    """The low nibbles of a word's four bytes are columns 0 4 1 5 of its eight, the high nibbles 2 6 3 7."""
    parts = np.ascontiguousarray(words).view(np.uint8).reshape(*words.shape, 4)
    columns = np.empty((*words.shape, 8), dtype=np.int64)
    columns[..., [0, 4, 1, 5]], columns[..., [2, 6, 3, 7]] = parts & 15, parts >> 4
    return columns.reshape(words.shape[0], -1)


def codes_and_zeros(tensors, config, name, scheme):
    """Returns (O, I) codes and (O, G) zero points of one layer."""
    packing = config.get("packing_format", config["quant_method"])
    scales = tensors[f"{name}.scales"]
    if "mlx" in config.get("mode", packing):
        codes = bits_of_words(tensors[f"{name}.weight"].numpy(), scheme.bits, scales.shape[1] * scheme.group_size)
        return codes, -(tensors[f"{name}.biases"].float() / scales.float()).round().numpy()
    words, zeros = (tensors[f"{name}.{part}"].numpy() for part in ("qweight", "qzeros"))
    if "awq" in packing:
        return awq_columns(words).T, awq_columns(zeros).T
    width, rows = words.shape[0] * 32 // scheme.bits, scales.shape[1]
    shift = 0 if packing in ("auto_round", "auto_round:gptqmodel") else 1
    return bits_of_words(words.T, scheme.bits, width), bits_of_words(zeros, scheme.bits, rows).T + shift


def layer_rules(config):
    """Returns layer_config as the checkpoint's own keys tell it."""
    rules = dict(config.get("extra_config", {}))
    rules |= {name: {"bits": 16} for name in config.get("modules_to_not_convert", ()) if name != "lm_head"}
    for pattern, values in config.get("dynamic", {}).items():
        rules[f"re:{pattern[2:]}"] = values or {"bits": 16}
    return {name: {key: value[key] for key in value if key != "data_type"} for name, value in rules.items()}


def written_again(golden: Path, source: Path, name: str, folder: Path) -> Path:
    """Returns a folder with what the exporter `name` makes of the codes, scales and zero points of a checkpoint."""
    config = json.loads((golden / "config.json").read_text())["quantization_config"]
    tensors = load_file(golden / "model.safetensors")
    options = {key: config[key] for key in ("bits", "group_size", "sym", "iters") if key in config}
    settings = RunConfig.from_options(
        model=str(source),
        output_dir=str(folder),
        format=name,
        device="cpu",
        layer_config=layer_rules(config),
        **options,
    )
    session = open_session(settings)
    results: dict[str, dict[str, QuantizedTensor]] = {block: {} for block in session.plan.structure.blocks}
    for parameter, entry in session.plan.quantized().items():
        codes, zeros = codes_and_zeros(tensors, config, entry.layer.name, entry.scheme)
        scale = tensors[f"{entry.layer.name}.scales"].float()
        scale = (scale if "mlx" in name else scale.t()).contiguous()
        if entry.scheme.sym:
            assert (zeros == 2 ** (entry.scheme.bits - 1)).all()
        zero = None if entry.scheme.sym else torch.from_numpy(zeros.astype(np.uint8))
        codes = torch.from_numpy(codes.astype(np.uint8))
        block = HEAD_BLOCK if entry.layer.block is None else session.plan.structure.blocks[entry.layer.block]
        results.setdefault(block, {})[parameter] = QuantizedTensor(codes, scale, zero, entry.scheme)
    store = RunStore(folder / "store", {}, resume=False)
    for block, weights in results.items():
        store.save(block, BlockResult(weights))
    export(EXPORTERS[name], folder / "out", session.plan, session.source, store, settings, None)
    return folder / "out"


def differing_tensors(first: Path, second: Path) -> dict[str, str]:
    """Returns tensor name -> how it differs between two checkpoints, in presence, dtype, shape or bytes."""
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (first, second))
    found = {name: "in one only" for name in set(ours) ^ set(theirs)}
    for name in set(ours) & set(theirs):
        left, right = ours[name], theirs[name]
        if (left.dtype, left.shape) != (right.dtype, right.shape):
            found[name] = f"{left.dtype} {tuple(left.shape)} != {right.dtype} {tuple(right.shape)}"
        elif (
            left.contiguous().view(torch.uint8).numpy().tobytes()
            != right.contiguous().view(torch.uint8).numpy().tobytes()
        ):
            found[name] = "bytes"
    return found


@pytest.mark.parametrize(("golden", "name"), CASES, ids=[f"{golden}-{name}" for golden, name in CASES])
def test_the_files_of_the_reference_are_written_again(shared, tmp_path, golden, name):
    folders = sorted((shared / "golden" / golden).glob("*/config.json"))
    if not folders:
        pytest.skip(f"{golden} is not there")
    reference = folders[0].parent
    ours = written_again(reference, shared / "golden" / "tiny-llama", name, tmp_path)
    differing = differing_tensors(ours, reference)
    if golden == "ar_w2g32_asym":
        differing = {key: how for key, how in differing.items() if not key.endswith(".g_idx")}
    assert differing == {}
    theirs = json.loads((reference / "config.json").read_text())
    written = json.loads((ours / "config.json").read_text())
    config, wanted = written.pop("quantization_config"), theirs.pop("quantization_config")
    meant = DIFFERENT | DIFFERENT_IN.get(golden, set())
    assert {key: config[key] for key in config if key not in meant} == {
        key: wanted[key] for key in wanted if key not in meant
    }
    assert json.loads((ours / "quantization_config.json").read_text()) == config
    # The reference says float16 where its own tensors are bfloat16; here the dtype of the original stays.
    original = json.loads((shared / "golden" / "tiny-llama" / "config.json").read_text())
    assert written["dtype"] == original["dtype"] == "bfloat16"
    keys = set(theirs) - {"torch_dtype", "dtype", "transformers_version"}
    assert {key: written[key] for key in keys} == {key: theirs[key] for key in keys}


def test_unpacking_by_hand():
    """The oracle itself: eight 4-bit codes 0 ... 7 in one word, plain and in AWQ's order."""
    word = np.array([[0x76543210]], dtype=np.int32)
    assert bits_of_words(word, 4, 8).tolist() == [list(range(8))]
    assert awq_columns(word).tolist() == [[0, 4, 1, 5, 2, 6, 3, 7]]
    assert re.fullmatch(r"model\.layers\.\d+", "model.layers.12")
