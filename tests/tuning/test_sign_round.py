import copy
import dataclasses
import math

import pytest
import torch

from auto_round import AutoRound
from auto_round.block import Block
from auto_round.calibration import CalibrationSet
from auto_round.config import TuneConfig
from auto_round.data_types import DATA_TYPES
from auto_round.layouts import LAYOUTS
from auto_round.schemes import QuantizationScheme, to_scheme
from auto_round.tensors import BlockResult, to_groups
from auto_round.tuning import PlainRounding, SearchedRounding, SignRound, round_searched
from auto_round.tuning.sign_round import _BlockRun, _decay
from auto_round.tuning.statistics import channel_importance
from auto_round.tuning.tuned_weight import CLIP_BOUNDS

W2 = QuantizationScheme(bits=2, group_size=32)
W2A = QuantizationScheme(bits=2, group_size=32, sym=False)
W4 = QuantizationScheme(bits=4, group_size=32)
BLOCK_TYPES = ("q2_k", "q3_k", "q4_k", "q5_1")


def config_of(**changes):
    return TuneConfig(**{"iters": 20, "batch_size": 4, **changes})


def tune(task, **changes):
    return SignRound()(task, config_of(**changes))


def output_error(task, result, samples=None):
    """Returns the mean squared error of the block's output, in double precision sums, over some or all samples."""
    replaced = {n: task.as_parameter(n, w.dequantize()) for n, w in result.weights.items()} | dict(result.plain)
    samples = torch.arange(len(task.inputs)) if samples is None else samples
    with torch.no_grad():
        output = task.block.forward(task.inputs[samples], samples, replaced)
    return float((output - task.targets[samples]).double().square().mean())


def assert_same_weights(one, other):
    assert one.weights.keys() == other.weights.keys()
    for name, weight in one.weights.items():
        assert torch.equal(weight.codes, other.weights[name].codes), name
        assert torch.equal(weight.scale, other.weights[name].scale), name
        if weight.zero_point is not None:
            assert torch.equal(weight.zero_point, other.weights[name].zero_point), name


def share_of_other_codes(one, other):
    differing = sum(int((w.codes != other.weights[n].codes).sum()) for n, w in one.weights.items())
    return differing / sum(w.codes.numel() for w in one.weights.values())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("scheme", [W2, W2A, W4], ids=["w2", "w2asym", "w4"])
def test_tuning_ends_below_rounding_to_nearest(kind, scheme, make_task, make_model):
    task = make_task(scheme, model=make_model(kind))
    result = tune(task, iters=40)
    assert result.best_loss < result.first_loss
    plain, searched = PlainRounding()(task, config_of()), SearchedRounding()(task, config_of())
    assert output_error(task, result) < min(output_error(task, plain), output_error(task, searched))


@pytest.mark.parametrize(
    ("kind", "changes"),
    [(kind, changes) for kind in BLOCK_TYPES for changes in ({}, {"enable_alg_ext": False})]
    + [("q2_k", {"adam": True})],
)
def test_blocks_of_gguf_are_tuned_on_the_grid_that_a_file_holds(kind, changes, make_task, make_model):
    model = make_model(hidden_size=256, intermediate_size=256)
    task = make_task(to_scheme(f"gguf:{kind}"), model=model, names=("q_proj", "v_proj", "down_proj"))
    result = tune(task, iters=12, **changes)
    assert output_error(task, result) < 0.9 * output_error(task, start_of(task))
    layout = LAYOUTS[f"gguf_{kind}"]
    for weight in result.weights.values():
        assert layout.refuses(weight.scheme, weight.shape) is None
        back = layout.unpack(layout.pack(weight), weight.scheme, weight.shape)
        assert torch.equal(back.dequantize(), weight.dequantize())


def start_of(task) -> BlockResult:
    """Returns where tuning starts: scales searched under the mean squares of input channels."""
    importance = channel_importance(task.block, task.inputs, task.batches, list(task.schemes), mask_NT=task.mask)
    return BlockResult(
        {name: round_searched(task.weight(name), scheme, importance[name]) for name, scheme in task.schemes.items()}
    )


def test_losses_are_the_block_error_on_the_first_two_batches(make_task):
    task = make_task(W2)
    result = tune(task, batch_size=2)
    samples = torch.arange(4)
    # float32 sums of 4096 squares against float64: relative error well below 4096 * 2**-24
    assert result.best_loss == pytest.approx(output_error(task, result, samples), rel=2e-4)
    assert result.first_loss == pytest.approx(output_error(task, start_of(task), samples), rel=2e-4)


def test_the_same_seed_gives_the_same_bits_and_another_other_codes(make_task):
    first, again, other = (tune(make_task(W2, seed=seed), batch_size=2) for seed in (1, 1, 2))
    assert_same_weights(first, again)
    assert share_of_other_codes(first, other) > 0


def test_the_task_is_not_changed(make_task):
    task = make_task(W2)
    kept = {name: tensor.clone() for name, tensor in task.block.tensors.items()}
    modules = [(id(m), len(m._forward_hooks), sorted(vars(m))) for m in task.block.modules[0].modules()]
    inputs, targets = task.inputs.clone(), task.targets.clone()
    tune(task, iters=3, enable_norm_bias_tuning=True)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in task.block.tensors.items())
    assert modules == [(id(m), len(m._forward_hooks), sorted(vars(m))) for m in task.block.modules[0].modules()]
    assert all(p.grad is None for p in task.block.modules[0].parameters())
    assert torch.equal(task.inputs, inputs)
    assert torch.equal(task.targets, targets)


def test_accumulated_batches_see_the_samples_and_gradients_of_one_large_batch(make_task):
    """The same four samples a step, and equal up to the order of float32 sums: matrix products over two samples at a
    time are added, so neither losses nor gradients can be the same bits. Signs of gradients near zero may then differ,
    which is why codes are not compared."""
    task = make_task(W2)
    one, two = config_of(batch_size=4), config_of(batch_size=2, gradient_accumulate_steps=2)
    samples = torch.tensor([6, 1, 3, 0])
    runs = [_BlockRun(task, config) for config in (one, two)]
    (loss, gradients), (loss_two, gradients_two) = (
        run.loss_and_gradients(samples, run.dequantized(requires_grad=True)) for run in runs
    )
    # 4 samples x 16 tokens are summed: relative error of a sum is below n * 2**-24 of its absolute terms
    assert float(loss_two) == pytest.approx(float(loss), rel=1e-5)
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, gradients_two[name], rtol=0, atol=1e-5 * float(gradient.abs().max())), name


@pytest.mark.parametrize("split", [(4, 1), (2, 2), (1, 4)], ids=["4x1", "2x2", "1x4"])
def test_loss_and_gradients_are_those_of_the_mean_squared_error(split, make_task):
    """Oracle: autograd through the whole output of the four samples at once, in one formula."""
    task = make_task(W2A)
    run = _BlockRun(task, config_of(batch_size=split[0], gradient_accumulate_steps=split[1]))
    samples = torch.tensor([5, 2, 7, 4])
    loss, gradients = run.loss_and_gradients(samples, run.dequantized(requires_grad=True))
    leaves = run.dequantized(requires_grad=True)
    expected = (task.block.forward(task.inputs[samples], samples, leaves) - task.targets[samples]).square().mean()
    expected.backward()
    assert float(loss) == pytest.approx(float(expected.detach()), rel=1e-5)
    for name, leaf in leaves.items():
        assert torch.allclose(gradients[name], leaf.grad, rtol=0, atol=1e-5 * float(leaf.grad.abs().max())), name


def dequantized_now(run):
    return {name: tuned.dequantized().clone() for name, tuned in run.weights.items()}


def losses_seen(monkeypatch):
    """Records the loss of every step and the rounding offsets that gave it."""
    seen = []
    original = _BlockRun._note_loss

    def note(self, loss):
        seen.append((float(loss), dequantized_now(self)))
        original(self, loss)

    monkeypatch.setattr(_BlockRun, "_note_loss", note)
    return seen


def test_the_parameters_of_the_least_loss_are_kept(make_task, monkeypatch):
    seen = losses_seen(monkeypatch)
    task = make_task(W2)
    run = _BlockRun(task, config_of(batch_size=2, lr=0.2, iters=15, not_use_best_mse=False))
    kept = run.descend()
    least = min(range(15), key=lambda step: seen[step][0])
    assert kept == least
    assert all(torch.equal(weight.dequantize(), seen[least][1][name]) for name, weight in run.encoded().items())


def test_the_last_step_is_kept_if_not_told_otherwise(make_task, monkeypatch):
    seen = losses_seen(monkeypatch)
    task = make_task(W2)
    run = _BlockRun(task, config_of(batch_size=2, lr=0.2, iters=15))
    assert run.descend() == 15
    assert len(seen) == 15
    last = dequantized_now(run)
    assert all(torch.equal(weight.dequantize(), last[name]) for name, weight in run.encoded().items())
    assert not any(torch.equal(last[name], before) for name, before in seen[-1][1].items())
    assert tune(task, iters=15).best_step == 15


def test_dynamic_max_gap_stops_after_so_many_steps_without_a_better_loss(make_task, monkeypatch):
    seen = losses_seen(monkeypatch)
    run = _BlockRun(make_task(W4), config_of(iters=200, lr=0.5, lr_scheduler="constant", dynamic_max_gap=3))
    best = run.descend()
    losses = [loss for loss, _ in seen]
    assert len(losses) < 200
    assert best == losses.index(min(losses))
    assert len(losses) == best + 3 + 1


@pytest.mark.parametrize("extra", [{}, {"adam": True}, {"enable_alg_ext": False}], ids=["curved", "adam", "plain"])
def test_without_minmax_tuning_the_clip_factors_stay_one(extra, make_task):
    run = _BlockRun(make_task(W2A), config_of(enable_minmax_tuning=False, not_use_best_mse=True, **extra))
    run.descend()
    for tuned in run.weights.values():
        assert torch.equal(tuned.params["max_scale"], torch.ones_like(tuned.params["max_scale"]))
        assert torch.equal(tuned.params["min_scale"], torch.ones_like(tuned.params["min_scale"]))
        assert tuned.params["rounding"].abs().max() > 0


def test_parameters_stay_in_their_bounds(make_task):
    run = _BlockRun(make_task(W2A), config_of(lr=5.0, minmax_lr=5.0, iters=3, enable_alg_ext=False))
    run.descend()
    for tuned in run.weights.values():
        assert float(tuned.params["rounding"].abs().max()) == 0.5
        clips = torch.cat([tuned.params["max_scale"], tuned.params["min_scale"]])
        assert (float(clips.min()), float(clips.max())) == CLIP_BOUNDS


def test_curvature_lets_offsets_travel_a_whole_step_up_to_three_bits(make_task):
    for scheme, reach in ((W2, 1.0), (W4, 0.5)):
        run = _BlockRun(make_task(scheme), config_of(lr=5.0, iters=3))
        run.descend()
        assert {float(tuned.params["rounding"].abs().max()) for tuned in run.weights.values()} == {reach}


def test_the_first_step_moves_every_offset_by_lr_against_its_gradient(make_task):
    """Worked by hand: at zero offsets the straight-through gradient of an offset is scale * dL/dW inside the grid."""
    task = make_task(W2, names=("down_proj",))
    run = _BlockRun(task, config_of(iters=10, enable_alg_ext=False))
    run.decay.fill_(1.0)
    _, gradients = run.loss_and_gradients(torch.arange(4), run.dequantized(requires_grad=True))
    (tuned,) = run.weights.values()
    state = tuned.data_type.rounding_state(tuned.weight, tuned.scheme, tuned.range_, tuned.params)
    (gradient,) = gradients.values()
    expected = -0.1 * torch.sign(state.scale * to_groups(gradient, 32)) * state.in_range
    run.step(torch.arange(4))
    assert torch.equal(tuned.params["rounding"], expected)


def test_the_step_size_decays_as_the_schedule_says():
    decay = {
        kind: [_decay(config_of(iters=4, lr_scheduler=kind), step) for step in range(4)]
        for kind in ("linear", "cosine", "constant")
    }
    assert decay["linear"] == [1.0, 0.75, 0.5, 0.25]
    assert decay["cosine"] == pytest.approx([1.0, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125)])
    assert decay["constant"] == [1.0] * 4


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_norm_and_bias_tuning_returns_plain_tensors(kind, make_task, make_model):
    model = make_model(kind)
    task = make_task(W2, model=model)
    result = tune(task, enable_norm_bias_tuning=True, minmax_lr=0.05)
    layer = task.block.modules[0]
    one_dimensional = {f"{task.block.names[0]}.{n}" for n, p in layer.named_parameters() if p.ndim == 1}
    assert set(result.plain) == one_dimensional
    assert one_dimensional
    for name, tensor in result.plain.items():
        original = model.get_parameter(name)
        assert (tensor.shape, tensor.dtype, tensor.requires_grad) == (original.shape, original.dtype, False)
        assert not tensor.data_ptr() == original.data_ptr()
    norms = [name for name in result.plain if "norm" in name and name.endswith("weight")]
    assert any(not torch.equal(result.plain[name], model.get_parameter(name)) for name in norms)
    # The plain tensors belong to the kept step: together with the weights they give the reported loss.
    assert result.best_loss == pytest.approx(output_error(task, result), rel=2e-4)
    assert tune(task).plain == {}


def test_adam_lowers_the_loss_another_way(make_task):
    task = make_task(W2)
    adam, sign = tune(task, adam=True), tune(task)
    assert adam.best_loss < adam.first_loss
    assert share_of_other_codes(adam, sign) > 0


def test_curvature_is_better_than_plain_sign_steps_on_average(make_task):
    gains = []
    for seed in range(3):
        task = make_task(W2A, seed=seed)
        plain, extended = tune(task, iters=40, enable_alg_ext=False), tune(task, iters=40)
        gains.append(math.log(output_error(task, plain) / output_error(task, extended)))
    assert sum(gains) / len(gains) > 0


def test_curvature_pulls_an_offset_to_the_nearest_level(make_task):
    """Formula of the module's docstring, evaluated for one weight at a time with plain numbers."""
    task = make_task(W2, names=("o_proj",))
    run = _BlockRun(task, config_of())
    (tuned,) = run.weights.values()
    tuned.params["rounding"].uniform_(-0.4, 0.4, generator=torch.Generator().manual_seed(0))
    found = tuned.gradients(torch.zeros_like(tuned.weight, dtype=torch.float32))["rounding"]
    scale, curvature = tuned.range_["scale"], tuned.curvature
    for o, g, k in [(0, 0, 0), (5, 1, 31), (63, 0, 7), (31, 1, 2)]:
        s = float(scale[o, g, 0].to(torch.float16))
        latent = float(tuned.weight[o, g * 32 + k]) / s + float(tuned.params["rounding"][o, g, k])
        inside = 0 <= round(latent) + 2 <= 3
        diagonal = float(curvature.outputs[o] * curvature.inputs[g * 32 + k])
        expected = 0.5 * s * s * diagonal * (latent - round(latent)) * inside
        assert float(found[o, g, k]) == pytest.approx(expected, rel=1e-4, abs=1e-12)


def test_working_on_pieces_of_a_weight_changes_nothing(make_task, monkeypatch):
    task = make_task(W2)
    whole = tune(task, iters=4)
    monkeypatch.setattr("auto_round.tuning.tuned_weight.PIECE_ELEMENTS", {False: 640, True: 640})
    pieces = tune(task, iters=4)
    for name, weight in whole.weights.items():
        assert torch.equal(weight.codes, pieces.weights[name].codes)
        assert torch.equal(weight.scale, pieces.weights[name].scale)


@pytest.mark.parametrize("disable_opt_rtn", [False, True], ids=["searched", "plain"])
def test_a_loss_that_is_not_finite_falls_back_to_rounding_with_a_note(disable_opt_rtn, make_task):
    task = make_task(W4)
    task.targets[3, 0, 0] = math.nan
    result = tune(task, disable_opt_rtn=disable_opt_rtn, iters=3, batch_size=8)
    assert result.note == "losses are not finite; rounded to nearest instead"
    rounding = PlainRounding() if disable_opt_rtn else SearchedRounding()
    assert_same_weights(result, rounding(task, config_of()))
    assert result.first_loss is None
    assert result.plain == {}


def test_a_loss_that_is_not_finite_only_in_a_step_falls_back_too(make_task):
    """Sample 7 is not among those of the reported loss."""
    task = make_task(W4)
    task.targets[7] = math.inf
    assert tune(task, iters=6, batch_size=2).note


@pytest.mark.parametrize("extra", [{}, {"enable_alg_ext": False}], ids=["curved", "plain"])
def test_padded_tokens_do_not_count(extra, make_task, token_ids):
    """Neither what a block sees at padding nor what it should give there changes a code."""
    mask = torch.ones(8, 16, dtype=torch.bool)
    mask[:, 10:] = False
    task = make_task(W2, data=CalibrationSet(token_ids(8, 16), mask))
    inputs = torch.where(mask[..., None], task.inputs, task.inputs * 3)
    targets = torch.where(mask[..., None], task.targets, task.targets + 1000)
    other = dataclasses.replace(task, inputs=inputs, original_inputs=inputs, targets=targets)
    assert_same_weights(tune(task, **extra), tune(other, **extra))
    assert tune(task, **extra).best_loss == tune(other, **extra).best_loss < 10


def test_the_loss_is_a_mean_over_real_tokens(make_task, token_ids):
    mask = torch.ones(8, 16, dtype=torch.bool)
    mask[:, 10:] = False
    task = make_task(W2, data=CalibrationSet(token_ids(8, 16), mask))
    result = tune(task, iters=1)
    replaced = {name: weight.dequantize() for name, weight in start_of(task).weights.items()}
    with torch.no_grad():
        error = task.block.forward(task.inputs, torch.arange(8), replaced) - task.targets
    assert result.first_loss == pytest.approx(float(error[mask].square().mean()), rel=1e-4)


def test_two_blocks_are_tuned_together_on_the_output_of_the_second(make_task):
    task = make_task(W2, nblocks=2)
    assert {name.split(".")[2] for name in task.schemes} == {"0", "1"}
    result = tune(task, iters=40)
    assert result.weights.keys() == task.schemes.keys()
    assert result.best_loss < result.first_loss
    assert output_error(task, result) < output_error(task, SearchedRounding()(task, config_of()))


def test_bits_scales_and_zero_points_are_on_the_stored_grid(make_task):
    for weight in tune(make_task(W2A), iters=5).weights.values():
        assert int(weight.codes.max()) <= 3
        assert int(weight.zero_point.min()) >= 1
        assert torch.equal(weight.scale, weight.scale.half().float())


def test_the_encoded_weights_are_those_of_the_kept_step(make_task):
    """What the loss was measured with is what is stored, bit for bit."""
    run = _BlockRun(make_task(W2A), config_of())
    run.descend()
    kept = run.kept()
    assert kept.keys() == run.encoded().keys()
    for name, weight in run.encoded().items():
        assert torch.equal(weight.dequantize(), kept[name])


def test_a_block_with_experts_that_see_no_token_is_tuned(make_task):
    """A linear layer beside the path of the tokens has no gradient and keeps its rounding."""
    task = make_task(W4)
    layer = copy.deepcopy(task.block.modules[0])
    layer.idle = torch.nn.Linear(64, 64, bias=False)
    name = f"{task.block.names[0]}.idle.weight"
    weight = layer.idle.weight.detach()
    block = Block(
        task.block.names, (layer,), task.block.calls, {**task.block.tensors, name: weight},
        task.block.device, task.block.dtype,
    )  # fmt: skip
    result = tune(dataclasses.replace(task, block=block, schemes={**task.schemes, name: W4}), iters=3)
    int_type = DATA_TYPES["int"]
    expected = int_type.encode(weight, W4, int_type.search_range(weight, W4, None), int_type.trainable(weight, W4))
    assert torch.equal(result.weights[name].codes, expected.codes)


@pytest.mark.parametrize("extra", [{}, {"enable_alg_ext": False}, {"enable_norm_bias_tuning": True}])
def test_moving_weights_during_the_backward_pass_changes_nothing(extra, make_task, monkeypatch):
    task = make_task(W2A)
    early = tune(task, iters=5, **extra)
    monkeypatch.setattr(_BlockRun, "_step_in_backward", lambda *_args: pytest.fail("moved during the backward pass"))
    monkeypatch.setattr(_BlockRun, "_may_be_captured", lambda _self: True)
    monkeypatch.setattr("auto_round.tuning.sign_round.repeat_on_device", lambda step, _may_capture: step)
    late = tune(task, iters=5, **extra)
    for name, weight in early.weights.items():
        assert torch.equal(weight.codes, late.weights[name].codes)
        assert torch.equal(weight.scale, late.weights[name].scale)


def test_gradients_of_a_float16_block_do_not_vanish(make_task):
    """Scaled before the backward pass; the mean over 8 x 2048 x 4096 outputs would be below float16's numbers."""
    task = make_task(W4)
    was = task.block
    block = Block(was.names, was.modules, was.calls, was.tensors, was.device, torch.float16)
    run = _BlockRun(dataclasses.replace(task, block=block, inputs=task.inputs.half()), config_of())
    factors = [run._backward_factor(elements) for elements in (1, 8 * 2048 * 4096)]
    assert factors == [2.0**-6, 2.0**-6]
    assert _BlockRun(task, config_of())._backward_factor(1000) == 1 / 1000


@pytest.mark.parametrize("extra", [{}, {"enable_norm_bias_tuning": True}], ids=["plain", "norms"])
def test_steps_that_only_raise_the_loss_are_taken_back(extra, make_task):
    task = make_task(W4)
    result = tune(task, iters=3, lr=2.0, lr_scheduler="constant", **extra)
    assert result.best_loss == result.first_loss
    assert result.best_step == 0
    assert result.note == "steps did not lower the loss; kept the searched rounding"
    assert_same_weights(result, start_of(task))
    assert all(torch.equal(value, task.block.tensors[name]) for name, value in result.plain.items())


def test_all_blocks_share_what_is_compiled_once(make_model, token_ids, monkeypatch):
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: compiler(function, backend=backend))
    torch._dynamo.reset()
    model = make_model()
    count = model.config.num_hidden_layers
    options = {"bits": 4, "group_size": 32, "iters": 2, "batch_size": 4, "device": "cpu", "seqlen": 16, "nsamples": 8}
    quantizer = AutoRound(model, None, dataset=list(token_ids(8, 16)), enable_torch_compile=True, **options)
    quantizer.quantize()
    assert count > 1
    assert len(graphs) == 1
