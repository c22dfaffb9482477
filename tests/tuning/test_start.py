"""Experts tuned as one weight for each projection, against each tuned by itself."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from auto_round.config import TuneConfig
from auto_round.conversion import unfuse
from auto_round.schemes import PRESET_SCHEMES, QuantizationScheme
from auto_round.tensors import TENSOR_FIELDS
from auto_round.tuning import SignRound
from auto_round.tuning.base import tuned_together
from auto_round.tuning.sign_round import _BlockRun
from auto_round.tuning.start import starting_weights
from auto_round.tuning.tuned_weight import TunedWeight

W2A = QuantizationScheme(bits=2, group_size=32, sym=False)
STEM = "model.layers.0.mlp.experts"


@pytest.fixture
def moe_task(make_model, make_task):
    """Returns make(scheme, **config) -> the task of a block with four experts."""

    def make(scheme: QuantizationScheme, kind: str = "qwen3_moe"):
        return make_task(scheme, model=unfuse(make_model(kind)).model)

    return make


def config_of(**changes) -> TuneConfig:
    return TuneConfig(**{"iters": 6, "batch_size": 4, **changes})


def one_by_one(task):
    """Returns the task with experts as single weights."""
    tensors = {name: tensor for name, tensor in task.block.tensors.items() if name not in task.block.stacks}
    return dataclasses.replace(task, block=dataclasses.replace(task.block, stacks={}, tensors=tensors))


def test_a_projection_of_all_experts_is_one_weight(moe_task):
    task = moe_task(W2A)
    units = tuned_together(task)
    parts = tuple(f"{STEM}.{index}.up_proj.weight" for index in range(4))
    assert units[f"{STEM}.stack_of_up_proj"] == parts
    assert units["model.layers.0.self_attn.q_proj.weight"] == ("model.layers.0.self_attn.q_proj.weight",)
    assert sorted(name for names in units.values() for name in names) == sorted(task.schemes)
    assert len(units) == 3 + len([name for name in task.schemes if "self_attn" in name])
    weight = starting_weights(task, config_of())[f"{STEM}.stack_of_up_proj"]
    assert weight.parts == 4
    assert torch.equal(weight.weight, torch.cat([task.block.tensors[part] for part in parts]))


@pytest.mark.parametrize(
    "other", [dataclasses.replace(W2A, bits=4), None, dataclasses.replace(W2A, group_size=0)], ids=str
)
def test_experts_that_differ_are_tuned_one_by_one(other, moe_task):
    task, name = moe_task(W2A), f"{STEM}.2.up_proj.weight"
    if other is not None and other.group_size == 0:
        schemes = dict.fromkeys(task.schemes, other)
    else:
        schemes = {key: other if key == name else scheme for key, scheme in task.schemes.items()}
        schemes = {key: scheme for key, scheme in schemes.items() if scheme is not None}
    units = tuned_together(dataclasses.replace(task, schemes=schemes))
    assert f"{STEM}.0.up_proj.weight" in units
    assert f"{STEM}.stack_of_up_proj" not in units


@pytest.mark.parametrize(
    ("scheme", "options"),
    [
        pytest.param(W2A, {}, id="w2"),
        pytest.param(W2A, {"enable_alg_ext": True}, id="w2 with curvature"),
        pytest.param(dataclasses.replace(W2A, bits=4, sym=True), {"enable_alg_ext": True}, id="w4 symmetric"),
        pytest.param(W2A, {"gradient_accumulate_steps": 2}, id="accumulated"),
        pytest.param(W2A, {"enable_norm_bias_tuning": True}, id="norms"),
        pytest.param(PRESET_SCHEMES["MXFP4"], {"enable_alg_ext": True}, id="mxfp4 with its activations"),
        pytest.param(PRESET_SCHEMES["NVFP4"], {}, id="nvfp4, a scale for each expert"),
    ],
)
@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_experts_tuned_together_are_what_each_tuned_alone_is(kind, scheme, options, moe_task):
    """All sums are taken expert by expert; a sign that hangs on the order of one may differ on other machines."""
    task = moe_task(scheme, kind)
    together, alone = (SignRound()(t, config_of(**options)) for t in (task, one_by_one(task)))
    assert together.weights.keys() == alone.weights.keys() == task.schemes.keys()
    assert together.best_loss == pytest.approx(alone.best_loss, rel=1e-3)
    differing = total = 0
    for name, weight in together.weights.items():
        other = alone.weights[name]
        assert weight.shape == other.shape
        differing += int((weight.codes != other.codes).sum())
        total += weight.codes.numel()
        assert [f for f in TENSOR_FIELDS if getattr(weight, f) is None] == [
            f for f in TENSOR_FIELDS if getattr(other, f) is None
        ]
        if weight.global_scale is not None:
            assert torch.equal(weight.global_scale, other.global_scale)
    assert differing <= total * 1e-3


def test_experts_that_no_token_reaches_keep_their_rounding_beside_others(make_model, make_task):
    """Also with curvature, which alone would move them."""
    model = make_model("qwen3_moe")
    model.model.layers[0].mlp.gate.forward = lambda hidden: (
        torch.zeros(len(hidden), 4),
        torch.full((len(hidden), 2), 0.5),
        torch.tensor([[0, 2]]).expand(len(hidden), 2),
    )
    run = _BlockRun(make_task(W2A, model=unfuse(model).model), config_of(enable_alg_ext=True))
    before = run.encoded()
    run.descend()
    after = run.encoded()
    changed = [
        not torch.equal(before[name].codes, after[name].codes)
        for name in (f"{STEM}.{index}.down_proj.weight" for index in range(4))
    ]
    assert changed == [True, False, True, False]


def test_pieces_of_joined_weights_are_whole_parts_or_rows_of_one(moe_task, monkeypatch):
    task = moe_task(W2A)
    weight = starting_weights(task, config_of(enable_alg_ext=True))[f"{STEM}.stack_of_up_proj"]
    gradient = torch.randn(weight.weight.shape)
    whole, encoded = weight.gradients(gradient), weight.encoded()
    assert weight.weight.shape == (4 * 32, 64)
    for size, expected in {70: [70 // 64] * 3, 32 * 64: [32] * 4, 64 * 70: [64] * 2}.items():
        monkeypatch.setattr("auto_round.tuning.tuned_weight.PIECE_ELEMENTS", {True: size, False: size})
        pieces = weight.pieces()
        assert [cut.stop - cut.start for cut, _ in pieces][: len(expected)] == expected
        assert [row for cut, _ in pieces for row in range(cut.start, cut.stop)] == list(range(128))
        for cut, piece in pieces:
            for name, tensor in piece.gradients(gradient[cut]).items():
                torch.testing.assert_close(tensor, whole[name][cut])
        assert torch.equal(weight.encoded().codes, encoded.codes)
        assert torch.equal(weight.encoded().scale, encoded.scale)


def test_rows_of_a_single_weight_are_cut_to_pieces(make_task, monkeypatch):
    weight: TunedWeight = next(iter(starting_weights(make_task(W2A), config_of()).values()))
    rows, width = weight.weight.shape
    monkeypatch.setattr("auto_round.tuning.tuned_weight.PIECE_ELEMENTS", {True: 5 * width, False: 5 * width})
    cuts = [cut for cut, _ in weight.pieces()]
    assert [row for cut in cuts for row in range(cut.start, cut.stop)] == list(range(rows))
    assert {cut.stop - cut.start for cut in cuts[:-1]} == {5}
