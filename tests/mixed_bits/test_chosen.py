"""The stage through the pipeline: plans, budgets, recipes, resuming, sizes of files."""

from __future__ import annotations

import json
import logging
import math

import pytest
import torch

from auto_round import AutoRound, AutoScheme, pipeline
from auto_round.calibration import CalibrationSet
from auto_round.errors import ResumeMismatchError
from auto_round.formats import EXPORTERS
from auto_round.mixed_bits import chosen as chosen_module
from auto_round.mixed_bits.choices import find_choices
from auto_round.mixed_bits.chosen import some_of
from auto_round.plan import FUSED_GROUPS
from auto_round.recipes import recipe_options

from .conftest import THREE


def schemes_of(plan):
    return {entry.layer.name: entry.scheme for entry in plan.entries}


@pytest.mark.parametrize("target", [2.7, 3.5, 5.0])
def test_the_plan_keeps_the_budget_and_joined_layers_alike(target, open_mixed, tmp_path):
    plan = pipeline.settled(open_mixed(target_bits=target), tmp_path).plan
    assert target - 1.1 < plan.average_bits() <= target
    assert not plan.warnings
    found = schemes_of(plan)
    assert len({scheme.bits for scheme in found.values()}) > 2  # 16 of the output layer counted
    for name, scheme in found.items():
        stem, _, leaf = name.rpartition(".")
        for members in FUSED_GROUPS:
            if leaf in members:
                assert {found[f"{stem}.{member}"] for member in members} == {scheme}


def test_all_experts_of_a_block_get_one_option(open_mixed, tmp_path):
    session = pipeline.settled(open_mixed("qwen3_moe"), tmp_path)
    experts = {n: s for n, s in schemes_of(session.plan).items() if ".mlp.experts." in n}
    for block in ("model.layers.0.", "model.layers.1."):
        assert len({scheme for name, scheme in experts.items() if name.startswith(block)}) == 1
    assert session.plan.average_bits() <= 3.5


def test_the_recipe_beside_the_result_gives_the_same_plan_without_measuring(open_mixed, tmp_path, monkeypatch):
    session = open_mixed("qwen3_moe", layer_config={"o_proj": 8}, fp_layers="layers.1.self_attn.q_proj", target_bits=5)
    result = pipeline.run(session)
    file = result.folders[0] / pipeline.RECIPE_FILE
    plan = pipeline.settled(session, tmp_path / "again").plan
    monkeypatch.setattr(chosen_module, "sensitivities", None)
    options = recipe_options(file)
    repeated = open_mixed("qwen3_moe", **options, options="", target_bits=None)
    assert repeated.is_settled
    assert schemes_of(repeated.plan) == schemes_of(plan)
    assert not (tmp_path / "out" / pipeline.WORK_FOLDER).exists()


@pytest.mark.parametrize("format_", ["auto_round", "auto_gptq", "auto_round:gptqmodel"])
def test_the_files_of_weights_are_not_larger_than_asked(format_, open_mixed, tmp_path):
    choices = find_choices(open_mixed(target_size="1GB", format=format_), [EXPORTERS[format_]])
    costs = [list(group.costs.values()) for group in choices.groups]
    least, most = (choices.fixed + sum(of(own) for own in costs) for of in (min, max))
    for bits in (least, (least + most) / 2, most):
        size, folder = math.ceil(bits / 8), tmp_path / str(int(bits))
        pipeline.run(open_mixed(target_size=str(size), format=format_, output_dir=str(folder)))
        written = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        assert 0.85 * size < written <= size


def test_an_interrupted_run_goes_on_with_what_it_chose(open_mixed, make_model, tmp_path, monkeypatch, caplog):
    model = make_model()
    first = pipeline.settled(open_mixed(model=model), tmp_path)
    pipeline.quantize(first, tmp_path)
    monkeypatch.setattr(chosen_module, "sensitivities", None)
    with caplog.at_level(logging.INFO):
        again = pipeline.settled(open_mixed(model=model, resume=True), tmp_path)
    assert "as the interrupted run chose" in caplog.text
    assert schemes_of(again.plan) == schemes_of(first.plan)
    pipeline.quantize(again, tmp_path)


def test_another_budget_is_measured_anew_and_does_not_go_on_with_old_blocks(open_mixed, make_model, tmp_path):
    model = make_model()
    pipeline.quantize(pipeline.settled(open_mixed(model=model), tmp_path), tmp_path)
    other = pipeline.settled(open_mixed(model=model, resume=True, target_bits=6.0), tmp_path)
    with pytest.raises(ResumeMismatchError, match="belongs to a run with other options"):
        pipeline.quantize(other, tmp_path)


def test_the_table_names_each_group_and_adds_up(open_mixed, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        session = pipeline.settled(open_mixed(), tmp_path)
    assert "KL W2A16G32" in caplog.text
    assert f"mixed bits: {session.plan.average_bits():.3f} bits a weight" in caplog.text
    record = json.loads((tmp_path / "mixed_bits.json").read_text())
    total = sum(row[index] for row, index in zip(record["losses"], record["options"], strict=True))
    assert f"expected divergence {total:.5f}" in caplog.text


def test_a_script_with_auto_scheme_works(make_model, token_ids, tmp_path):
    scheme = AutoScheme(avg_bits=3.5, options=THREE.split(","), nsamples=4)
    data = CalibrationSet(token_ids(6, 12))
    rounder = AutoRound(make_model(), scheme=scheme, dataset=data, iters=0, device="cpu", batch_size=4)
    _, folders = rounder.quantize_and_save(str(tmp_path / "o"), format="auto_round")
    assert rounder.plan.average_bits() <= 3.5
    assert recipe_options(folders[0] / pipeline.RECIPE_FILE)["scheme"] == "W2A16G32"


def test_samples_are_spread_over_the_text_and_cut(monkeypatch):
    monkeypatch.setattr(chosen_module, "LONGEST", 4)
    ids = torch.arange(50).view(10, 5)
    assert some_of(CalibrationSet(ids), 3).input_ids[:, 0].tolist() == [0, 20, 45]
    assert some_of(CalibrationSet(ids), 99).input_ids.shape == (10, 4)
    mask = torch.ones(10, 5, dtype=torch.bool)
    mask[3, :4] = False  # nothing of it would be left
    assert some_of(CalibrationSet(ids, mask), 99).input_ids.shape == (10, 5)
