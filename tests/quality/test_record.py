import json
import math

import pytest
import torch

from auto_round import pipeline
from auto_round.formats import EXPORTERS, FormatTarget
from auto_round.quality.record import finite, loss_curve, model_name, record


def record_of(finished, tmp_path, format="auto_round", measured=None):
    target = FormatTarget(EXPORTERS[format], tmp_path / "out")
    pipeline.write(finished.session, target, finished.store)
    summaries = {name: finished.store.load(name).summary() for name in finished.store.finished()}
    measured = measured or pipeline.measure_quality(finished.session, finished.store)
    return record(finished.session, target, summaries, measured)


def test_a_record_is_json_and_has_the_keys_of_its_version(finish, tmp_path):
    found = record_of(finish(), tmp_path)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert list(found) == ["version", "model", "run", "text", "predictions", "size", "blocks", "layers", "missing"]
    assert found["version"] == 1
    assert found["run"]["scheme"] == "int3 g32 sym"
    assert found["run"]["options"]["iters"] == 3
    assert found["missing"] == []
    assert set(found["predictions"]) == {
        "positions", "perplexity", "quantized_perplexity", "kl_mean", "kl_error", "kl_median", "kl_p99", "kl_max",
        "top1",
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3_moe"])
def test_every_weight_counts_once(kind, finish, tmp_path):
    finished = finish(kind)
    found = record_of(finished, tmp_path)
    parameters = sum(parameter.numel() for parameter in finished.model.parameters())
    assert found["model"]["parameters"] == parameters
    assert sum(own["weights"] for own in found["size"]["types"]) == parameters
    assert found["size"]["bytes_16bit"] == 2 * parameters
    assert sum(layer["bytes"] for layer in found["layers"]) == found["size"]["bytes"]
    names = [layer["name"] for layer in found["layers"]]
    assert len(names) == len(set(names))
    assert {entry.layer.name for entry in finished.session.plan.quantized().values()} <= set(names)


def test_bits_are_those_of_codes_and_scales_by_hand(finish, tmp_path):
    """3 bits, and for each group of 32 a float16 scale and a zero point of 3 bits, which the layout stores."""
    finished = finish()
    layer = next(one for one in record_of(finished, tmp_path)["layers"] if one["name"].endswith("up_proj"))
    entry = finished.session.plan.quantized()[layer["name"] + ".weight"]
    assert layer["shape"] == [128, 64]
    assert layer["bits_per_weight"] == pytest.approx(entry.stored_bits, abs=1e-4)
    assert layer["bits_per_weight"] == round(3 + 19 / 32, 4)
    assert layer["bytes"] == math.ceil(128 * 64 * entry.stored_bits / 8)
    assert layer["type"] == "int3 g32 sym"


def test_unquantized_weights_have_the_bits_they_are_written_in(finish, tmp_path):
    found = record_of(finish(), tmp_path)
    embedding = next(layer for layer in found["layers"] if layer["name"] == "model.embed_tokens")
    assert (embedding["type"], embedding["bytes"]) == ("32-bit", 4 * 96 * 64)
    halved = record_of(finish(model_dtype="bf16"), tmp_path)
    assert next(one for one in halved["layers"] if one["name"] == "model.embed_tokens")["type"] == "16-bit"


def test_files_have_the_size_that_they_have(finish, tmp_path):
    finished = finish()
    found = record_of(finished, tmp_path)
    assert found["size"]["file_bytes"] == sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    fake = record_of(finished, tmp_path, "fake")
    assert fake["run"]["format"] == "fake"
    assert fake["size"]["file_bytes"] > found["size"]["file_bytes"]


@pytest.mark.parametrize("tied", [False, True])
def test_an_output_layer_that_quantization_unties_is_a_layer_of_its_own(tied, finish, make_model, tmp_path):
    finished = finish(model=make_model(tie_word_embeddings=tied), quant_lm_head=True)
    found = record_of(finished, tmp_path)
    heads = [layer for layer in found["layers"] if layer["name"] == "lm_head"]
    assert [head["type"] for head in heads] == ["int3 g32 sym"]
    plain = finish(model=make_model(tie_word_embeddings=tied))
    heads = [layer for layer in record_of(plain, tmp_path)["layers"] if layer["name"] == "lm_head"]
    assert len(heads) == (0 if tied else 1)


def test_losses_of_each_step_are_told(finish, tmp_path):
    finished = finish(iters=7)
    block = record_of(finished, tmp_path)["blocks"][0]
    result = finished.store.load("model.layers.0")
    assert block["steps"] == 7
    assert block["loss_curve"] == pytest.approx(list(result.losses))
    assert block["loss_before"] == result.first_loss
    assert block["output_error"] == block["own_error"] > 0


def test_a_run_without_tuning_has_no_losses(finish, tmp_path):
    block = record_of(finish(iters=0), tmp_path)["blocks"][0]
    assert (block["loss_before"], block["loss_after"], block["steps"], block["loss_curve"]) == (None, None, 0, [])


def test_two_runs_have_the_same_record(finish, tmp_path):
    assert record_of(finish(), tmp_path) == record_of(finish(), tmp_path)


def test_a_curve_has_means_of_as_many_steps_as_it_takes():
    assert loss_curve([4.0, 2.0]) == (1, [4.0, 2.0])
    step, points = loss_curve([float(number) for number in range(120)])
    assert step == 3
    assert points[:2] == [1.0, 4.0]
    assert len(points) == 40
    assert loss_curve([1.0] * 101)[1][-1] == 1.0
    assert loss_curve([]) == (1, [])


def test_numbers_that_json_does_not_know_are_null():
    assert finite({"a": [math.inf, 1.0], "b": (math.nan, "x", None)}) == {"a": [None, 1.0], "b": [None, "x", None]}


def test_a_model_goes_by_its_hub_name_or_the_end_of_its_path(make_model, tmp_path):
    (tmp_path / "private" / "qwen").mkdir(parents=True)
    assert model_name("Qwen/Qwen3-0.6B", None) == "Qwen/Qwen3-0.6B"
    assert model_name(str(tmp_path / "private" / "qwen"), None) == "qwen"
    assert model_name(tmp_path / "private" / "qwen" / "..", None) == "private"
    model = make_model()
    assert model_name(model, model) == "LlamaForCausalLM"
    model.config.name_or_path = str(tmp_path / "private" / "qwen")
    assert model_name(model, model) == "qwen"
    assert model_name(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)) == "Linear"
