"""The stage after the blocks, through the pipeline, on tiny models."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch

from auto_round import blockwise, end_to_end, pipeline
from auto_round import session as session_module
from auto_round.blocks import BlockStream
from auto_round.calibration import CalibrationSet
from auto_round.config import RunConfig
from auto_round.end_to_end import split_samples
from auto_round.errors import CalibrationError, UnsupportedError
from auto_round.store import RunStore
from auto_round.tuning.divergence import QuantizedModel

BASE = {"iters": 0, "batch_size": 8, "bits": 2, "group_size": 32, "device": "cpu", "e2e_lr": 2e-3}
STEPS = 12


@pytest.fixture
def ids(token_ids):
    return CalibrationSet(token_ids(32, 16))


def open_session(model, output, **options):
    given = {name: value for name, value in {**BASE, **options}.items() if value is not None}
    return session_module.open_session(RunConfig.from_options(model=model, output_dir=str(output), **given))


def quantize(model, work, **options):
    session = open_session(model, work, **options)
    return pipeline.quantize(session, work), session


def weights_of(store):
    return {name: weight for block in store.finished() for name, weight in store.load(block).weights.items()}


def stored_scale_is_storable(weight):
    return torch.equal(weight.scale, weight.scale.to(getattr(torch, weight.scheme.scale_dtype)).float())


@pytest.mark.parametrize(
    "options",
    [{}, {"sym": False}, {"bits": 3, "group_size": -1}, {"quant_lm_head": True}, {"scheme": "W4A8", "bits": None}],
    ids=["symmetric", "asymmetric", "per row", "output layer", "activations"],
)
def test_scales_move_and_the_held_out_divergence_falls_while_codes_stay(options, make_model, ids, tmp_path):
    model = make_model()
    before, _ = quantize(model, tmp_path / "a", dataset=ids, **options)
    after, session = quantize(model, tmp_path / "b", dataset=ids, e2e_steps=STEPS, **options)
    summary = after.scales_record()["summary"]
    assert summary["best"] < summary["first"]
    assert 0 < summary["kept_step"] <= STEPS
    first, second = weights_of(before), weights_of(after)
    assert first.keys() == second.keys() == session.plan.quantized().keys()
    for name, weight in first.items():
        assert torch.equal(weight.codes, second[name].codes)
        assert torch.equal(weight.zero_points(), second[name].zero_points())
        assert not torch.equal(weight.scale, second[name].scale), name
        assert torch.equal(weight.scale.sign(), second[name].scale.sign())
        assert stored_scale_is_storable(second[name])


def measured(model, store, session, data, samples):
    """Returns the divergence of what a store holds, by a model made from it anew."""
    stream = blockwise.open_stream(session, data, quantized_chain=False)
    return QuantizedModel(stream, store.load, None, frozenset()).divergence(samples, {})


def test_what_is_stored_has_the_divergence_that_was_reported(make_model, ids, tmp_path):
    model = make_model()
    store, session = quantize(model, tmp_path, dataset=ids, e2e_steps=STEPS)
    seed = blockwise.block_seed(session.config.tune.seed, "end_to_end")
    _, held_out = split_samples(len(ids), torch.Generator().manual_seed(seed))
    summary = store.scales_record()["summary"]
    assert measured(model, store, session, ids, held_out) == pytest.approx(summary["best"], rel=1e-6)
    store.drop_scales()
    assert measured(model, store, session, ids, held_out) == pytest.approx(summary["first"], rel=1e-6)


def test_only_the_scale_of_the_tensor_moves_in_nvfp4_and_joined_weights_keep_one(make_model, ids, tmp_path):
    options = {"scheme": "NVFP4", "bits": 4, "group_size": 16, "dataset": ids}
    before = weights_of(quantize(make_model(), tmp_path / "a", **options)[0])
    store, _ = quantize(make_model(), tmp_path / "b", e2e_steps=STEPS, **options)
    after = weights_of(store)
    assert store.scales_record()["summary"]["kept_step"] > 0
    for name, weight in before.items():
        assert torch.equal(weight.codes, after[name].codes)
        assert torch.equal(weight.scale, after[name].scale)
        assert not torch.equal(weight.global_scale, after[name].global_scale)
        assert torch.equal(weight.input_peak, after[name].input_peak)
    attention = "model.layers.1.self_attn"
    assert len({float(after[f"{attention}.{leaf}_proj.weight"].global_scale) for leaf in "qkv"}) == 1


@pytest.mark.parametrize("format_", ["auto_round", "auto_round:gptqmodel", "fake", "auto_round:llm_compressor"])
def test_what_is_written_is_verified_with_the_new_scales(format_, make_model, ids, tmp_path):
    options = {"dataset": ids, "format": format_, "bits": 4, "e2e_steps": 4, "work_dir": str(tmp_path / "w")}
    pipeline.run(open_session(make_model(), tmp_path / "out", **options))
    assert RunStore.existing(tmp_path / "w").scales_record()["summary"]["kept_step"] > 0


@pytest.mark.parametrize("scheme", ["gguf:q2_k", "gguf:q3_k", "gguf:q4_1"])
def test_the_scales_of_gguf_move_and_their_codes_stay(scheme, make_model, ids, tmp_path):
    options = {"dataset": ids, "scheme": scheme, "bits": None, "group_size": None}
    model = make_model(hidden_size=256, intermediate_size=256)
    before = weights_of(quantize(model, tmp_path / "a", **options)[0])
    store, _ = quantize(model, tmp_path / "b", e2e_steps=STEPS, **options)
    assert store.scales_record()["summary"]["kept_step"] > 0
    for name, weight in weights_of(store).items():
        assert torch.equal(weight.codes, before[name].codes)
        assert not torch.equal(weight.dequantize(), before[name].dequantize())
        assert (weight.super_scale is None) == (before[name].super_scale is None)
        if weight.super_scale is not None:
            assert not torch.equal(weight.super_scale, before[name].super_scale)


@pytest.mark.parametrize("kind", ["gpt2", "gemma3", "opt", "qwen3_moe"])
def test_every_kind_of_model_has_the_stage(kind, make_model, ids, tmp_path):
    store, _ = quantize(make_model(kind), tmp_path, dataset=ids, e2e_steps=STEPS, nblocks=2)
    assert store.scales_record()["summary"]["kept_step"] > 0


def test_a_tuned_norm_is_part_of_what_the_stage_sees(make_model, ids, tmp_path):
    options = {"dataset": ids, "iters": 4, "enable_norm_bias_tuning": True}
    store, session = quantize(make_model(), tmp_path, e2e_steps=STEPS, **options)
    assert store.load("model.layers.0").plain
    first = store.scales_record()["summary"]["first"]
    seed = blockwise.block_seed(session.config.tune.seed, "end_to_end")
    _, held_out = split_samples(len(ids), torch.Generator().manual_seed(seed))
    store.drop_scales()
    assert measured(make_model(), store, session, ids, held_out) == pytest.approx(first, rel=1e-6)


def test_plain_rounding_can_be_followed_by_the_stage(make_model, ids, tmp_path):
    options = {"dataset": ids, "disable_opt_rtn": True}
    before = weights_of(quantize(make_model(), tmp_path / "a", **options)[0])
    store, _ = quantize(make_model(), tmp_path / "b", e2e_steps=STEPS, **options)
    assert all(torch.equal(weight.codes, before[name].codes) for name, weight in weights_of(store).items())
    assert store.scales_record()["summary"]["kept_step"] > 0


def test_nothing_is_kept_where_no_step_helps(make_model, ids, tmp_path, caplog):
    before, _ = quantize(make_model(), tmp_path / "a", dataset=ids)
    with caplog.at_level("INFO"):
        after, _ = quantize(make_model(), tmp_path / "b", dataset=ids, e2e_steps=STEPS, e2e_lr=3.0)
    summary = after.scales_record()["summary"]
    assert summary["kept_step"] == 0
    assert summary["best"] == summary["first"]
    assert "scales stay" in caplog.text
    for name, weight in weights_of(before).items():
        assert torch.equal(weight.scale, weights_of(after)[name].scale)


def test_the_line_of_progress_has_step_training_and_held_out_divergence(make_model, ids, tmp_path, caplog):
    with caplog.at_level("INFO"):
        quantize(make_model(), tmp_path, dataset=ids, e2e_steps=16)
    lines = re.findall(r"end to end: step (\d+)/16, KL [\d.]+, held out [\d.]+, [\d.]+ s", caplog.text)
    assert lines == ["2", "4", "6", "8", "10", "12", "14", "16"]


# --- interruption and resuming ----------------------------------------------------------------------------------


class InterruptedRunError(Exception):
    """Stands for a kill."""


@pytest.mark.parametrize("where", ["in the steps", "before the result is stored"])
def test_a_run_interrupted_in_the_stage_repeats_the_stage_only(where, make_model, ids, tmp_path, monkeypatch):
    options = {"dataset": ids, "iters": 2, "e2e_steps": STEPS}
    whole, _ = quantize(make_model(), tmp_path / "whole", **options)

    def interrupt(*_args, **_kwargs):
        raise InterruptedRunError

    owner, name = (QuantizedModel, "gradients") if where == "in the steps" else (RunStore, "save_scales")
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupt)
        with pytest.raises(InterruptedRunError):
            quantize(make_model(), tmp_path / "cut", **options)
    saved = []
    monkeypatch.setattr(RunStore, "save", lambda _self, block, _result: saved.append(block))
    resumed, _ = quantize(make_model(), tmp_path / "cut", resume=True, **options)
    assert not saved
    whole_record, record = whole.scales_record(), resumed.scales_record()
    assert {**whole_record["summary"], "seconds": 0} == {**record["summary"], "seconds": 0}
    again = weights_of(resumed)
    for key, weight in weights_of(whole).items():
        assert torch.equal(weight.codes, again[key].codes)
        assert torch.equal(weight.scale, again[key].scale)


def test_a_finished_stage_is_not_repeated(make_model, ids, tmp_path, monkeypatch):
    options = {"dataset": ids, "e2e_steps": STEPS}
    first = weights_of(quantize(make_model(), tmp_path, **options)[0])
    monkeypatch.setattr(end_to_end, "run_steps", None)
    second = weights_of(quantize(make_model(), tmp_path, resume=True, **options)[0])
    assert all(torch.equal(weight.scale, second[name].scale) for name, weight in first.items())


def test_other_steps_take_finished_blocks_and_no_steps_take_their_own_scales(make_model, ids, tmp_path, monkeypatch):
    plain = weights_of(quantize(make_model(), tmp_path / "plain", dataset=ids)[0])
    eight = weights_of(quantize(make_model(), tmp_path / "eight", dataset=ids, e2e_steps=8)[0])
    quantize(make_model(), tmp_path / "w", dataset=ids, e2e_steps=4)
    monkeypatch.setattr(RunStore, "save", None)
    for steps, expected in ((8, eight), (0, plain)):
        found = weights_of(quantize(make_model(), tmp_path / "w", resume=True, dataset=ids, e2e_steps=steps)[0])
        assert all(torch.equal(weight.scale, found[name].scale) for name, weight in expected.items())


def test_a_block_that_is_redone_repeats_the_stage(make_model, ids, tmp_path):
    options = {"dataset": ids, "e2e_steps": STEPS}
    store, _ = quantize(make_model(), tmp_path, **options)
    first = weights_of(store)
    (tmp_path / "blocks" / "model.layers.1.safetensors").unlink()
    second = weights_of(quantize(make_model(), tmp_path, resume=True, **options)[0])
    assert all(torch.equal(weight.scale, second[name].scale) for name, weight in first.items())


# --- samples ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "held_out"), [(2, 1), (8, 1), (16, 2), (128, 16)])
def test_samples_are_split_and_none_is_lost(count, held_out):
    training, rest = split_samples(count, torch.Generator().manual_seed(0))
    assert len(rest) == held_out
    assert sorted([*training.tolist(), *rest.tolist()]) == list(range(count))


def test_samples_depend_on_the_seed_alone(make_model, ids, tmp_path, monkeypatch):
    """Neither on what was drawn before, nor on blocks that were tuned before."""
    drawn = []
    gradients = QuantizedModel.gradients
    monkeypatch.setattr(
        QuantizedModel,
        "gradients",
        lambda self, samples, sigmas: drawn.append(samples.tolist()) or gradients(self, samples, sigmas),
    )
    options = {"dataset": ids, "e2e_steps": 6}
    quantize(make_model(), tmp_path / "a", **options)
    first, drawn[:] = list(drawn), []
    torch.manual_seed(123)
    torch.rand(7)
    quantize(make_model(), tmp_path / "b", iters=2, nblocks=2, **options)
    assert drawn == first
    drawn[:] = []
    quantize(make_model(), tmp_path / "c", seed=1, **options)
    assert drawn != first


def test_held_out_samples_are_never_stepped_on(make_model, ids, tmp_path, monkeypatch):
    stepped, looked_at = set(), set()
    gradients, look = QuantizedModel.gradients, QuantizedModel.divergence
    monkeypatch.setattr(
        QuantizedModel,
        "gradients",
        lambda self, samples, sigmas: stepped.update(samples.tolist()) or gradients(self, samples, sigmas),
    )
    monkeypatch.setattr(
        QuantizedModel,
        "divergence",
        lambda self, samples, sigmas: looked_at.update(samples.tolist()) or look(self, samples, sigmas),
    )
    quantize(make_model(), tmp_path, dataset=ids, e2e_steps=STEPS)
    assert len(looked_at) == 4
    assert stepped | looked_at == set(range(32))
    assert not stepped & looked_at


# --- how many steps ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"bits": 2, "iters": 200}, 50),
        ({"bits": 3, "iters": 1000}, 250),
        ({"bits": 2, "iters": 3}, 3),
        ({"bits": 2, "iters": 0}, 0),
        ({"bits": 4, "iters": 200}, 0),
        ({"scheme": "MXFP4", "iters": 200}, 0),
        ({"bits": 2, "iters": 200, "layer_config": {"mlp": {"bits": 8}}}, 0),
        ({"bits": 2, "iters": 200, "layer_config": {"k_proj": {"bits": 8}}}, 50),
        ({"bits": 2, "iters": 200, "e2e_steps": 0}, 0),
        ({"bits": 4, "iters": 200, "e2e_steps": 7}, 7),
    ],
)
def test_steps_are_taken_at_few_bits_unless_said_otherwise(options, steps, make_model, tmp_path):
    config = RunConfig.from_options(model=make_model(), output_dir=str(tmp_path), group_size=32, **options)
    session = session_module.open_session(config)
    assert end_to_end.steps_of(session.config, session.plan) == steps


def test_steps_by_default_are_left_out_where_they_cannot_be_taken(make_model, token_ids, ids, tmp_path, caplog):
    options = {"iters": 2, "bits": 2, "e2e_steps": None}
    with caplog.at_level("INFO"):
        one = quantize(make_model(), tmp_path / "one", dataset=CalibrationSet(token_ids(1, 16)), nsamples=1, **options)
        headless = quantize(make_model().model, tmp_path / "headless", dataset=ids, **options)
        done = quantize(make_model(), tmp_path / "done", dataset=ids, **options)
    assert not one[0].scales_record()
    assert not headless[0].scales_record()
    assert done[0].scales_record()["options"]["e2e_steps"] is None
    assert "left out; it needs at least 2 calibration samples" in caplog.text


def test_running_out_of_memory_keeps_the_blocks_unless_steps_were_asked_for(
    make_model, ids, tmp_path, monkeypatch, caplog
):
    def full(*_arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(end_to_end, "run_steps", full)
    store, session = quantize(make_model(), tmp_path / "a", dataset=ids, iters=2, bits=2, e2e_steps=None)
    assert list(store.finished()) == [group[0] for group in session.plan.groups]
    assert not store.scales_record()
    assert "memory does not suffice" in caplog.text
    with pytest.raises(torch.OutOfMemoryError):
        quantize(make_model(), tmp_path / "b", dataset=ids, iters=2, bits=2, e2e_steps=3)


# --- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["MXFP4", "MXFP8", "MXINT4"])
def test_schemes_without_tunable_scales_are_refused_before_any_work(scheme, make_model, tmp_path):
    config = RunConfig.from_options(model=make_model(), output_dir=str(tmp_path / "out"), scheme=scheme, e2e_steps=5)
    with pytest.raises(UnsupportedError, match=r"powers of two.*--e2e_steps"):
        session_module.open_session(config)
    assert not (tmp_path / "out").exists()


def test_a_plan_that_is_tunable_in_part_is_tuned_there(make_model, ids, tmp_path):
    layers = {"mlp": {"data_type": "mx_fp", "bits": 4, "group_size": 32}}
    before = weights_of(quantize(make_model(), tmp_path / "a", dataset=ids, layer_config=layers)[0])
    store, _ = quantize(make_model(), tmp_path / "b", dataset=ids, layer_config=layers, e2e_steps=STEPS)
    for name, weight in weights_of(store).items():
        assert torch.equal(weight.scale, before[name].scale) == ("mlp" in name)


def test_a_plan_that_quantizes_nothing_is_refused(make_model, tmp_path):
    """Formats can prescribe one (GGUF F16)."""
    session = open_session(make_model(), tmp_path, e2e_steps=5)
    with pytest.raises(UnsupportedError, match="nothing is quantized"):
        end_to_end.check(session.config, dataclasses.replace(session.plan, entries=()))


def test_a_model_without_an_output_layer_is_refused(make_model, tmp_path):
    config = RunConfig.from_options(model=make_model().model, output_dir=str(tmp_path), bits=2, e2e_steps=5)
    with pytest.raises(UnsupportedError, match="no output layer"):
        session_module.open_session(config)


def test_a_single_sample_is_refused_before_blocks_are_tuned(make_model, token_ids, tmp_path):
    options = {"dataset": CalibrationSet(token_ids(1, 16)), "nsamples": 1, "e2e_steps": 5}
    with pytest.raises(CalibrationError, match="at least 2"):
        quantize(make_model(), tmp_path, **options)
    assert not list(RunStore.existing(tmp_path).finished())


def test_a_model_that_changes_hidden_states_between_blocks_is_refused(make_model, ids, tmp_path, monkeypatch):
    monkeypatch.setattr(BlockStream, "changes_between_blocks", property(lambda _self: True))
    with pytest.raises(UnsupportedError, match="between its blocks"):
        quantize(make_model(), tmp_path, dataset=ids, e2e_steps=5)
    assert not list(RunStore.existing(tmp_path).finished())


def test_predictions_that_are_not_finite_keep_the_start(make_model, ids, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(QuantizedModel, "divergence", lambda _self, _samples, _sigmas: float("nan"))
    store, session = quantize(make_model(), tmp_path, dataset=ids, e2e_steps=STEPS)
    assert store.scales_record()["summary"]["kept_step"] == 0
    assert "not finite" in caplog.text
    assert dataclasses.asdict(session.config.end_to_end) == store.scales_record()["options"]
