import dataclasses

import pytest
import torch

from auto_round.config import TuneConfig
from auto_round.data_types import DATA_TYPES
from auto_round.schemes import QuantizationScheme, to_scheme
from auto_round.tensors import TENSOR_FIELDS
from auto_round.tuning import PlainRounding, SearchedRounding, SignRound, round_plain, round_searched, rtn, tuner_for

SCHEMES = {
    "w2": QuantizationScheme(bits=2, group_size=32),
    "w3asym": QuantizationScheme(bits=3, group_size=32, sym=False),
    "w4": QuantizationScheme(bits=4, group_size=32),
    "w4row": QuantizationScheme(bits=4, group_size=-1, sym=False),
    "w8": QuantizationScheme(bits=8, group_size=32),
}


def weight_of(rows=16, columns=64):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))


def test_a_group_worked_by_hand_symmetric():
    """Largest magnitude is -4: scale 4 / 8 = 0.5, code 0 for it; 1.2 -> 2.4 -> 2, 3.9 would be 7.8 but 7 is the end."""
    weight = torch.tensor([[-4.0, 1.2, 3.9, 0.0]])
    found = round_plain(weight, QuantizationScheme(bits=4, group_size=4))
    assert float(found.scale) == 0.5
    assert found.codes.tolist() == [[0, 10, 15, 8]]
    assert found.dequantize().tolist() == [[-4.0, 1.0, 3.5, 0.0]]


def test_a_positive_extreme_makes_the_scale_negative():
    found = round_plain(torch.tensor([[4.0, -1.0, 0.0, 0.5]]), QuantizationScheme(bits=4, group_size=4))
    assert float(found.scale) == -0.5
    assert found.dequantize().tolist() == [[4.0, -1.0, 0.0, 0.5]]


def test_a_group_worked_by_hand_asymmetric():
    """From -1 to 2 in 3 steps of 1, zero point 1."""
    found = round_plain(torch.tensor([[-1.0, 2.0, 0.4, 0.6]]), QuantizationScheme(bits=2, group_size=4, sym=False))
    assert (float(found.scale), int(found.zero_point)) == (1.0, 1)
    assert found.codes.tolist() == [[0, 3, 1, 2]]


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_plain_rounding_is_within_half_a_step(scheme):
    weight = weight_of()
    found = round_plain(weight, scheme)
    size = scheme.group_size if scheme.group_size > 0 else 64
    step = found.scale.abs().repeat_interleave(size, dim=1)
    # Half a step, or a whole one at the short end of a symmetric grid and where the float16 scale moved that end.
    far = (found.dequantize() - weight).abs() > step * 0.502
    ends = (found.codes == 0) | (found.codes == 2**scheme.bits - 1)
    assert not (far & ~ends).any()
    assert ((found.dequantize() - weight).abs() <= step * 1.01).all()


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("weighted", [False, True], ids=["unweighted", "weighted"])
def test_searched_scales_have_no_larger_weighted_error(scheme, weighted):
    weight = weight_of()
    importance = torch.rand(64, generator=torch.Generator().manual_seed(2)) ** 4 if weighted else None
    factor = importance if weighted else torch.ones(64)

    def error(found):
        return (factor * (found.dequantize() - weight).square()).sum(1)

    searched, plain = error(round_searched(weight, scheme, importance)), error(round_plain(weight, scheme))
    assert (searched <= plain * (1 + 1e-5)).all()
    if scheme.bits < 8:
        assert searched.sum() < plain.sum()


def test_rounding_of_a_block_rounds_each_weight_by_itself(make_task):
    scheme = SCHEMES["w4"]
    task = make_task(scheme)
    result = PlainRounding()(task, TuneConfig(iters=0))
    for name, weight in result.weights.items():
        assert torch.equal(weight.codes, round_plain(task.block.tensors[name], scheme).codes)
    assert result.first_loss is None


def test_transposed_weights_are_rounded_along_their_inputs(make_task, make_model):
    """GPT-2 stores (in, out): a scale belongs to one output and 32 inputs."""
    model = make_model("gpt2")
    result = PlainRounding()(make_task(SCHEMES["w4"], model=model), TuneConfig(iters=0))
    found = result.weights["transformer.h.0.mlp.c_fc.weight"]
    assert found.shape == (256, 64)
    expected = round_plain(model.transformer.h[0].mlp.c_fc.weight.detach().t().contiguous(), SCHEMES["w4"])
    assert torch.equal(found.codes, expected.codes)


def test_searched_rounding_of_a_block_uses_the_importance_of_its_inputs(make_task):
    task = make_task(SCHEMES["w2"], names=("q_proj", "o_proj"))
    result = SearchedRounding()(task, TuneConfig(iters=0))
    norm = task.block.modules[0].input_layernorm
    with torch.no_grad():
        groups = norm(task.inputs).flatten(0, 1).unflatten(1, (-1, SCHEMES["w2"].group_size))
        seen = torch.einsum("rgk,rgl->gkl", groups, groups) / groups.shape[0]
    name = "model.layers.0.self_attn.q_proj.weight"
    expected = round_searched(task.block.tensors[name], SCHEMES["w2"], seen)
    # The importance differs by the order of float32 sums only, so hardly a code may differ.
    assert (result.weights[name].codes != expected.codes).float().mean() < 0.01
    assert result.note == ""


def test_layers_that_calibration_never_reached_are_named(make_task):
    task = make_task(SCHEMES["w4"], names=("o_proj",))
    layer = task.block.modules[0]
    layer.idle = torch.nn.Linear(64, 64, bias=False)
    name = "model.layers.0.idle.weight"
    weight = layer.idle.weight.detach()
    task.block.tensors[name] = weight
    task.schemes[name] = SCHEMES["w4"]
    result = SearchedRounding()(task, TuneConfig(iters=0))
    assert result.note == f"calibration never reached {name}; unweighted search there"
    assert torch.equal(result.weights[name].codes, round_searched(weight, SCHEMES["w4"], None).codes)


@pytest.mark.parametrize(
    ("options", "tuner"),
    [
        ({"iters": 1}, SignRound),
        ({"iters": 0}, SearchedRounding),
        ({"iters": 0, "disable_opt_rtn": True}, PlainRounding),
        ({"iters": 1, "disable_opt_rtn": True}, SignRound),
    ],
    ids=["steps", "searched", "plain", "steps-win"],
)
def test_the_tuner_follows_the_options(options, tuner):
    assert type(tuner_for(TuneConfig(**options))) is tuner


@pytest.mark.parametrize(
    "scheme",
    [
        *SCHEMES.values(),
        QuantizationScheme(bits=4, group_size=0),
        QuantizationScheme.from_dict({"data_type": "fp", "group_size": (5, 32)}),
        QuantizationScheme.from_dict({"data_type": "fp", "group_size": 0}),
        *map(to_scheme, ("MXFP4", "MXFP8", "NVFP4", "gguf:q4_k", "gguf:q4_1")),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rounding_some_rows_at_a_time_changes_nothing(monkeypatch, scheme, dtype):
    weight = weight_of(23, 256).to(dtype)
    data_type = DATA_TYPES[scheme.data_type]
    range_ = data_type.minmax_range(weight, scheme)
    whole = data_type.encode(weight, scheme, range_, data_type.trainable(weight, scheme))
    monkeypatch.setitem(rtn.ELEMENTS_AT_A_TIME, "cpu", 3 * 256)
    found = round_plain(weight, scheme)
    assert found.scheme == scheme
    for field in dataclasses.fields(whole):
        if field.name in TENSOR_FIELDS:
            one, other = getattr(found, field.name), getattr(whole, field.name)
            assert (one is None) == (other is None)
            assert one is None or torch.equal(one, other)
