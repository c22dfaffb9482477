"""One suite for all registered formats: what one declares is written and reads back, what it does not is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoRoundConfig

from auto_round.config import SchemeConfig
from auto_round.errors import UnsupportedError
from auto_round.formats import EXPORTERS
from auto_round.formats.base import FileExporter
from auto_round.formats.capability import ALL_BITS, BOTH
from auto_round.models import discover
from auto_round.plan import resolve
from auto_round.schemes import PRESET_SCHEMES

# Formats that are files of their own kind have suites of their own.
FORMATS = {
    name: exporter
    for name, exporter in EXPORTERS.items()
    if name == exporter.name and not isinstance(exporter, FileExporter)
}
INTEGER_SETS = [
    (name, schemes)
    for name, exporter in FORMATS.items()
    for schemes in exporter.capability.schemes
    if "int" in (schemes.data_types or {"int"}) and 16 in (schemes.act_bits or {16})
]
CASES = [
    pytest.param(name, bits, sym, schemes, id=f"{name}-w{bits}-{'sym' if sym else 'asym'}")
    for name, schemes in INTEGER_SETS
    for bits in sorted(schemes.bits or ALL_BITS)
    for sym in sorted(schemes.sym or BOTH, reverse=True)
]


# Presets whose weights are no integers, or whose activations are quantized, in the formats that declare them.
PRESETS = [
    pytest.param(name, preset, id=f"{name}-{preset}")
    for name, exporter in FORMATS.items()
    for preset, scheme in PRESET_SCHEMES.items()
    if scheme.data_type != "int" or scheme.quantizes_activations
    if any(not schemes.mismatches(scheme, 128) for schemes in exporter.capability.schemes)
]


@pytest.mark.parametrize(("name", "preset"), PRESETS)
def test_declared_presets_are_written_and_read_back(export_model, name, preset):
    data = {"dataset": [list(range(1, 9)), list(range(9, 17))], "nsamples": 2, "seqlen": 8}
    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}  # whole blocks of FP8_BLOCK
    check_written(export_model(name, scheme=preset, group_size=None, model=sizes, **data), EXPORTERS[name])


@pytest.mark.parametrize(("name", "bits", "sym", "schemes"), CASES)
def test_what_is_declared_is_written_and_reads_back(export_model, name, bits, sym, schemes):
    size = 32 if schemes.group_sizes is None or 32 in schemes.group_sizes else -1
    exported = export_model(name, bits=bits, sym=sym, group_size=size, model={"attention_bias": True})
    check_written(exported, EXPORTERS[name])


def check_written(exported, exporter) -> None:
    """Asserts that the folder holds each weight in the form that the format declares, and copies of all else."""
    tensors = load_file(exported.folder / "model.safetensors")
    original = load_file(exported.original / "model.safetensors")
    left = dict(tensors)
    for parameter, weight in exported.weights.items():
        layout = exporter.layout_for(weight.scheme, exported.plan)
        if layout is None:
            assert torch.equal(left.pop(parameter), weight.dequantize(original[parameter].dtype))
            continue
        specs = layout.specs(weight.scheme, weight.shape)
        layer = parameter.removesuffix(".weight")
        packed = {local: left.pop(f"{layer}.{local}") for local in specs}
        found = {local: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for local, t in packed.items()}
        assert found == specs
        read = layout.unpack(packed, weight.scheme, weight.shape)
        assert torch.equal(read.codes, weight.codes)
        assert torch.equal(read.scale, weight.scale)
        if weight.scheme.data_type == "int":
            assert torch.equal(read.zero_points(), weight.zero_points())
        assert torch.equal(read.dequantize(), weight.dequantize())
    assert left.keys() == original.keys() - exported.weights.keys()
    for key, tensor in left.items():
        assert torch.equal(tensor.float(), original[key].float()), key
        own = exporter.container.bias_dtype if key.endswith("_proj.bias") else None
        assert str(tensor.dtype).removeprefix("torch.") == (own or "bfloat16"), key


@pytest.mark.parametrize("name", FORMATS)
def test_the_quantization_config_is_where_the_format_says(export_model, name):
    container = EXPORTERS[name].container
    folder = export_model(name, bits=4).folder
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    if name == "fake":
        assert not {"quantization_config", "quantization"} & set(config)
        return
    for key in container.config_keys:
        groups = config[key].get("config_groups")
        described = groups["group_0"]["weights"] if groups else config[key]
        assert described["num_bits" if groups else "bits"] == 4
        assert described["group_size"] == 32
    written = {file.name for file in folder.glob("quant*_config.json")}
    assert written == set(container.config_files)
    for file in written:
        assert json.loads((folder / file).read_text()) == config["quantization_config"]


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_not_declared_is_refused_with_a_way_out(make_model, name):
    structure = discover(make_model())
    own = [schemes for other, schemes in INTEGER_SETS if other == name]
    for bits in ALL_BITS:
        plan = resolve(structure, SchemeConfig(bits=bits, group_size=32))
        reasons = EXPORTERS[name].refusals(plan)
        if any(schemes.bits is None or bits in schemes.bits for schemes in own):
            assert reasons == []
        else:
            assert any(
                f"bits={bits} (only " in reason and ("Use --bits" in reason or "--scheme" in reason)
                for reason in reasons
            )


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_describes_itself(name):
    cells = FORMATS[name].capability.describe()
    assert all(cells.values())
    assert FORMATS[name].summary


@pytest.mark.parametrize("head", [False, True], ids=["tied", "quantized head"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("name", FORMATS)
def test_tied_and_transposed_weights_load_in_every_format_that_can_hold_them(name, kind, head, export_model, token_ids):
    """GPT-2's layers are Conv1D, which hold (in, out). A quantized output layer is untied from the embedding."""
    capability = EXPORTERS[name].capability
    options = {"bits": 4, "quant_lm_head": head, "model": {"tie_word_embeddings": True}, "verify": True}
    if (kind == "gpt2" and not capability.transposed) or (head and not capability.head):
        with pytest.raises(UnsupportedError, match=f"{name}: cannot store"):
            export_model(name, kind, **options)
        return
    exported = export_model(name, kind, **options)
    assert ("lm_head.weight" in exported.weights) is head
    if not capability.loads_here:
        return
    if name == "llm_compressor":
        pytest.importorskip("compressed_tensors")
    own = {"quantization_config": AutoRoundConfig(backend="torch")} if name.startswith("auto_") else {}
    with torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained(exported.folder, dtype=torch.float32, **own).eval()
        found = loaded(token_ids(2)).logits
        wanted = exported.dequantized_model()(token_ids(2)).logits
    rounded = 2**-6 if name == "fake" else 1e-5  # weights are written in bfloat16
    torch.testing.assert_close(found, wanted, rtol=0, atol=rounded * float(wanted.abs().max()))
