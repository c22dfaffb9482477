import dataclasses

import pytest
import torch

from auto_round.calibration import CalibrationSet
from auto_round.config import TuneConfig
from auto_round.schemes import QuantizationScheme
from auto_round.tuning import SignRound
from auto_round.tuning.block_error import BlockError, GradientSums
from auto_round.tuning.feed import Feed, FeedAhead

W2 = QuantizationScheme(bits=2, group_size=32)
SAMPLES = torch.tensor([5, 2, 7, 4])


def leaves(task):
    """Returns the block's weights, rounded to one digit, as tensors that gradients reach."""
    return {name: task.block.tensors[name].mul(10).round().div(10).requires_grad_() for name in task.schemes}


def expected(task, weights):
    """Returns mean squared error over real tokens and its gradients, by one formula for all samples at once."""
    error = (task.block.forward(task.inputs[SAMPLES], SAMPLES, weights) - task.targets[SAMPLES]).square()
    loss = error.mean() if task.mask is None else error[task.mask[SAMPLES]].mean()
    return loss.detach(), dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))


@pytest.fixture(params=["whole", "padded"])
def task(request, make_task, token_ids):
    mask = None
    if request.param == "padded":
        mask = torch.ones(8, 16, dtype=torch.bool)
        mask[2, 5:] = False
    return make_task(W2, data=CalibrationSet(token_ids(8, 16), mask))


@pytest.mark.parametrize("micro_batch", [4, 3, 2, 1])
@pytest.mark.parametrize("way", ["returned", "given"])
def test_micro_batches_have_the_gradients_of_the_mean_over_all_samples(way, micro_batch, task):
    error, weights, seen = BlockError(task, micro_batch), leaves(task), []
    if way == "returned":
        loss, gradients = error.gradients(SAMPLES, weights)
    else:
        gradients = {}

        def complete(name, gradient, unit):
            assert len(seen) == 1, "a weight moves before the loss of the step is known"
            assert name not in gradients
            gradients[name] = gradient.float() * unit

        error.give_gradients(SAMPLES, weights, seen.append, complete)
        (loss,) = seen
        assert all(weight.grad is None for weight in weights.values())
    wanted_loss, wanted = expected(task, weights)
    assert gradients.keys() == wanted.keys()
    assert float(loss) == pytest.approx(float(wanted_loss), rel=1e-5)
    for name, gradient in wanted.items():
        assert torch.allclose(gradients[name], gradient, rtol=0, atol=1e-5 * float(gradient.abs().max())), name


@pytest.mark.parametrize("micro_batch", [8, 3, 1])
def test_the_mean_is_over_real_tokens_of_all_samples(micro_batch, task):
    weights = leaves(task)
    found = BlockError(task, micro_batch).mean(SAMPLES, weights)
    assert found == pytest.approx(float(expected(task, weights)[0]), rel=1e-5)


def test_a_step_in_micro_batches_is_the_step_of_accumulated_batches(make_task):
    """The same sums in the same order, so the same bits: only the statistics before the steps see other batches."""
    whole = make_task(W2)
    micro = dataclasses.replace(whole, micro_batch=2)
    options = {"iters": 8, "gradient_accumulate_steps": 1, "enable_alg_ext": False}
    accumulated = SignRound()(whole, TuneConfig(**{**options, "batch_size": 2, "gradient_accumulate_steps": 2}))
    split = SignRound()(micro, TuneConfig(**options, batch_size=4))
    for name, weight in accumulated.weights.items():
        assert torch.equal(weight.codes, split.weights[name].codes)
        assert torch.equal(weight.scale, split.weights[name].scale)


def test_steps_are_the_same_on_activations_that_are_copied_ahead(make_task, monkeypatch):
    task = dataclasses.replace(make_task(W2), micro_batch=2)
    config = TuneConfig(iters=8, batch_size=4)
    indexed = SignRound()(task, config)
    fed = []
    monkeypatch.setattr("auto_round.tuning.block_error.feed_of", lambda *args: fed.append(FeedAhead(*args)) or fed[0])
    monkeypatch.setattr(Feed, "take", _refuse_batches_out_of_order(Feed.take))
    ahead = SignRound()(task, config)
    assert len(fed) == 1
    for name, weight in indexed.weights.items():
        assert torch.equal(weight.codes, ahead.weights[name].codes)


def _refuse_batches_out_of_order(take):
    def checked(self, samples):
        assert not (isinstance(self, FeedAhead) and self._coming is not None), "a step's batch was not copied ahead"
        return take(self, samples)

    return checked


def test_sums_of_what_the_last_pass_does_not_reach_are_given_at_the_end():
    often, once = torch.ones(2, requires_grad=True), torch.ones(2, dtype=torch.bfloat16, requires_grad=True)
    given = {}
    sums = GradientSums({"often": often, "once": once}, given.__setitem__)
    (often.sum() + 2 * once.sum()).backward()
    assert not given
    sums.are_last = True
    (3 * often.sum()).backward()
    assert {name: gradient.tolist() for name, gradient in given.items()} == {"often": [4.0, 4.0]}
    sums.give_rest()
    assert given["once"].tolist() == [2.0, 2.0]
    assert given["once"].dtype == torch.float32


def test_a_single_pass_gives_gradients_in_their_own_precision():
    weight, given = torch.ones(2, dtype=torch.bfloat16, requires_grad=True), {}
    sums = GradientSums({"weight": weight}, given.__setitem__)
    sums.are_last = True
    weight.sum().backward()
    assert given["weight"].dtype == torch.bfloat16
    assert weight.grad is None
