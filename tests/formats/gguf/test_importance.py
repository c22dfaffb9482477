"""Importance matrices in place of calibration text: of llama-imatrix, and those written here."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess

import pytest
import torch
from transformers import AutoModelForCausalLM

from auto_round.calibration.imatrix import ImportanceEntry, ImportanceMatrix, read_imatrix, write_imatrix
from auto_round.checkpoint import CheckpointSource
from auto_round.config import RunConfig
from auto_round.errors import CalibrationError, ConfigError
from auto_round.formats.gguf.contents import contents_of
from auto_round.formats.gguf.importance import importance_of_tensors, mean_rows
from auto_round.session import open_session
from auto_round.tuning import round_searched

pytest.importorskip("gguf")
IDS = [[3 + (7 * row + 11 * place * place) % 300 for place in range(32)] for row in range(8)]
SEARCHED = {"iters": 0, "disable_opt_rtn": False}
CALIBRATED = {**SEARCHED, "dataset": IDS, "nsamples": 8, "seqlen": 32, "batch_size": 4}


@pytest.fixture
def measured(export_gguf, tmp_path):
    """Returns make(family, suffix) -> the file that a run wrote, and its export."""

    def make(family="llama", suffix=".gguf", **options):
        file = tmp_path / f"measured{suffix}"
        return file, export_gguf("q4_k_s", family, write_imatrix=str(file), **{**CALIBRATED, **options})

    return make


def input_squares(folder, module):
    """Returns the sums of squares that a layer sees when Transformers runs the model."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    seen = []
    model.get_submodule(module).register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        model(torch.tensor(IDS))
    return torch.cat(seen).square().sum(0)


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj", "model.layers.2.mlp.down_proj", "lm_head"])
def test_what_is_written_is_what_the_layers_see(measured, name):
    file, exported = measured()
    names = {"model.layers.0.self_attn.q_proj": "blk.0.attn_q", "model.layers.2.mlp.down_proj": "blk.2.ffn_down"}
    matrix = read_imatrix(file)
    entry = matrix.entries[f"{names.get(name, 'output')}.weight"]
    assert (matrix.chunks, matrix.chunk_size) == (8, 32)
    assert entry.counts.tolist() == [8 * 32]
    torch.testing.assert_close(entry.sums[0], input_squares(exported.original, name), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3-moe", "phi3", "deepseek-v2"])
@pytest.mark.parametrize("suffix", [".gguf", ".dat"])
def test_what_is_written_can_be_given(measured, export_gguf, family, suffix):
    file, first = measured(family, suffix)
    given = export_gguf("q3_k_s", family, folder=first.original, imatrix=str(file), dataset="not/there", **SEARCHED)
    assert given.plan.quantized()


def test_scales_are_searched_under_the_matrix_that_is_given(measured, export_gguf):
    file, first = measured()
    given = export_gguf("q4_k_s", folder=first.original, imatrix=str(file), dataset="not/there", **SEARCHED)
    source, matrix = CheckpointSource(first.original), read_imatrix(file)
    places = {"model.layers.1.mlp.up_proj.weight": "blk.1.ffn_up.weight", "lm_head.weight": "output.weight"}
    for parameter, name in places.items():
        weight = source.tensors(parameter.removesuffix(".weight"))[parameter].float()
        scheme = given.plan.quantized()[parameter].scheme
        expected = round_searched(weight, scheme, matrix.entries[name].means()[0])
        assert torch.equal(expected.dequantize(), given.weights[parameter].dequantize())
        assert not torch.equal(round_searched(weight, scheme, None).dequantize(), expected.dequantize())


def test_tuning_starts_from_the_search_under_the_matrix(measured, export_gguf):
    file, first = measured()
    options = {**CALIBRATED, "iters": 1, "lr": 1e-9, "folder": first.original}
    given = export_gguf("q4_k_s", imatrix=str(file), **options)
    parameter = "model.layers.0.mlp.down_proj.weight"
    weight = CheckpointSource(first.original).tensors("model.layers.0.mlp.down_proj")[parameter].float()
    means = read_imatrix(file).entries["blk.0.ffn_down.weight"].means()[0]
    expected = round_searched(weight, given.plan.quantized()[parameter].scheme, means)
    assert torch.equal(expected.scale, given.weights[parameter].scale)


def test_each_expert_has_its_own_row(measured):
    file, exported = measured("qwen3-moe")
    entry = read_imatrix(file).entries["blk.0.ffn_down_exps.weight"]
    assert entry.sums.shape == (4, 256)
    assert int(entry.counts.sum()) == 8 * 32 * 2  # two experts for each token
    options = {"format": "gguf:q4_k_s", "imatrix": str(file), "device": "cpu", **SEARCHED}
    session = open_session(RunConfig.from_options(model=str(exported.original), **options))
    for index in range(4):
        found = session.importance[f"model.layers.0.mlp.experts.{index}.down_proj.weight"]
        assert torch.equal(found, entry.means()[index])


def test_a_tensor_that_is_rearranged_finds_its_rows(save_model, tmp_path):
    source = CheckpointSource(save_model("deepseek-v2"))
    session = open_session(RunConfig.from_options(model=str(source.folder), format="gguf:q4_k_s", device="cpu"))
    tensor = next(t for t in contents_of(source, session.plan.structure).tensors if t.name == "blk.0.attn_v_b.weight")
    heads, _, width = tensor.shape
    file = tmp_path / "m.dat"
    for rows in (1, heads):
        entry = ImportanceEntry(torch.rand(rows, width) + 0.1, torch.ones(rows))
        write_imatrix(file, ImportanceMatrix({tensor.name: entry}))
        os.utime(file, (rows, rows))  # so that it is read anew
        assert importance_of_tensors(file)(tensor).shape == (rows, width)
    write_imatrix(file, ImportanceMatrix({tensor.name: ImportanceEntry(torch.ones(1, width + 1), torch.ones(1))}))
    assert importance_of_tensors(file)(tensor) is None
    assert importance_of_tensors(None)(tensor) is None


def test_a_matrix_of_another_model_is_refused_with_everything_that_is_wrong(measured, save_model):
    file, exported = measured()
    matrix = read_imatrix(file)
    entries = {name: entry for name, entry in matrix.entries.items() if "ffn_up" not in name}
    entries["blk.0.attn_k.weight"] = ImportanceEntry(torch.ones(1, 96), torch.ones(1))
    write_imatrix(file, ImportanceMatrix(entries))
    options = {"model": str(exported.original), "format": "gguf:q4_k_s", "imatrix": str(file), "device": "cpu"}
    with pytest.raises(CalibrationError) as error:
        open_session(RunConfig.from_options(**options, **SEARCHED))
    assert "no entry for 3 tensors, e.g. blk.0.ffn_up.weight (model.layers.0.mlp.up_proj.weight)" in str(error.value)
    assert "blk.0.attn_k.weight has 96 channels (the model: 256)" in str(error.value)


def test_embedding_and_output_may_be_missing(measured, export_gguf):
    file, first = measured()
    matrix = read_imatrix(file)
    blocks = {name: entry for name, entry in matrix.entries.items() if name.startswith("blk.")}
    write_imatrix(file, ImportanceMatrix(blocks))
    assert len(blocks) == len(matrix.entries) - 1
    export_gguf("q4_k_s", folder=first.original, imatrix=str(file), dataset="not/there", **SEARCHED)


def test_other_formats_take_it_too(measured):
    file, exported = measured()
    options = {"model": str(exported.original), "format": "auto_round", "bits": 4, "group_size": 32, "device": "cpu"}
    session = open_session(RunConfig.from_options(**options, imatrix=str(file), **SEARCHED))
    assert not session.needs_calibration
    assert set(session.importance) == set(session.plan.quantized())


def test_a_file_that_is_not_there_is_refused(save_model):
    options = {"model": str(save_model()), "format": "gguf:q4_0", "imatrix": "not/there.gguf", "device": "cpu"}
    with pytest.raises(CalibrationError, match="no such file"):
        open_session(RunConfig.from_options(**options, **SEARCHED))


def test_it_contradicts_rounding_without_a_search():
    with pytest.raises(ConfigError, match="disable_opt_rtn"):
        RunConfig.from_options(imatrix="m.gguf", iters=0, disable_opt_rtn=True)


def test_rows_of_the_older_form_lie_end_to_end():
    entry = ImportanceEntry(torch.arange(1.0, 7.0)[None], torch.ones(1))
    assert mean_rows(entry, 2).tolist() == [[1, 2, 3], [4, 5, 6]]


@pytest.mark.parametrize("suffix", [".gguf", ".dat"])
def test_llama_cpp_takes_what_is_written_and_gives_what_can_be_read(measured, export_gguf, tmp_path, suffix):
    """llama-quantize with our matrix; llama-imatrix's own against ours, on a text of the same tokens."""
    quantize, imatrix = shutil.which("llama-quantize"), shutil.which("llama-imatrix")
    if not quantize or not imatrix:
        pytest.skip("llama.cpp's tools are not in PATH")
    file, first = measured("llama", suffix)
    whole = export_gguf("bf16", folder=first.original).files[0]
    command = [quantize, "--imatrix", str(file), str(whole), str(tmp_path / "small.gguf"), "Q2_K_S", "1"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"have importance matrix data with {len(read_imatrix(file).entries)} entries" in run.stdout + run.stderr
    text, own = tmp_path / "text.txt", tmp_path / f"own{suffix}"
    text.write_text("the rain in there " * 200)
    form = {".gguf": "gguf", ".dat": "dat"}[suffix]
    command = [imatrix, "-m", str(whole), "-f", str(text), "-o", str(own), "--output-format", form, "-c", "64"]
    subprocess.run([*command, "-t", "1"], capture_output=True, check=True)
    export_gguf("q4_k_s", folder=first.original, imatrix=str(own), dataset="not/there", **SEARCHED)


def test_a_damaged_file_is_refused(save_model, tmp_path):
    (tmp_path / "m.dat").write_bytes(struct.pack("<ii", 1, 100) + b"short")
    options = {"model": str(save_model()), "format": "gguf:q4_0", "imatrix": str(tmp_path / "m.dat"), "device": "cpu"}
    with pytest.raises(CalibrationError, match="cut off"):
        open_session(RunConfig.from_options(**options, **SEARCHED))
