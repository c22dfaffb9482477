"""Sensitivities against measured divergences of small errors, in float64 where the second order is all there is."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from auto_round import blockwise
from auto_round.calibration import CalibrationSet
from auto_round.config import RunConfig
from auto_round.errors import UnsupportedError
from auto_round.mixed_bits import sensitivity
from auto_round.mixed_bits.choices import find_choices
from auto_round.mixed_bits.chosen import _parts
from auto_round.mixed_bits.sensitivity import sensitivities
from auto_round.session import open_session

PROBES = 60
STEP = 1e-3


def opened(model, data, options="W2A16G32,W4A16G32"):
    """Returns a session and a stream in float64 for it."""
    given = {"dataset": data, "options": options, "target_bits": 8.0, "iters": 0, "batch_size": 4, "device": "cpu"}
    session = open_session(RunConfig.from_options(model=model, format="fake", **given))
    stream = blockwise.open_stream(session, data, quantized_chain=False)
    stream.dtype = torch.float64
    stream.original = stream.original.double()
    return session, stream


def recorded(monkeypatch):
    """Returns a list that gets what each block's options do, in the order in which blocks are visited."""
    found, original = [], sensitivity._errors

    def record(*args):
        found.append(original(*args))
        return found[-1]

    monkeypatch.setattr(sensitivity, "_errors", record)
    return found


@torch.no_grad()
def measured(stream, errors, weights, option):
    """Returns KL(original || with STEP times an option's errors) / STEP^2, mean over real tokens."""
    hidden = changed = stream.original
    samples, mask = torch.arange(len(hidden)), stream.data.attention_mask
    for index in range(len(stream.groups)):
        block = stream.load(index)
        own = [name for name in weights if name in block.tensors]
        shapes = {name: block.tensors[name].shape for name in own}
        changes = {name: errors.weights[name][option].view(shape) for name, shape in shapes.items()}
        replaced = {name: block.tensors[name].double() + STEP * change for name, change in changes.items()}
        quantizers = {
            name: lambda x, q=errors.quantizers[option][name]: x + STEP * (q(x) - x)
            for name in own
            if name in errors.quantizers[option]
        }
        hidden = block.forward(hidden, samples)
        changed = dataclasses.replace(block, input_quantizers=quantizers).forward(changed, samples, replaced)
    wanted, predicted = stream.logits(hidden, samples), stream.logits(changed, samples)
    tokens = mask.sum() if mask is not None else stream.data.input_ids.numel()
    kl = torch.nn.functional.kl_div(
        predicted.log_softmax(-1), wanted.log_softmax(-1), reduction="none", log_target=True
    ).sum(-1)
    return float((kl if mask is None else kl[mask]).sum() / tokens / STEP**2)


def padded(ids):
    mask = torch.ones(ids.shape, dtype=torch.bool)
    mask[1, 7:] = False
    mask[4, 9:] = False
    return CalibrationSet(ids, mask)


@pytest.mark.parametrize(
    ("kind", "options", "changes"),
    [
        ("llama", "W2A16G32,W4A16G32", {}),
        ("gpt2", "W2A16G32,W4A16G32", {}),
        ("qwen3_moe", "W2A16G32,W4A16G32", {}),
        ("llama", "MXFP4,NVFP4", {}),
        ("llama", "W2A16G32,W4A16G32", {"padded": True}),
    ],
    ids=["plain", "transposed", "experts", "activations", "padding"],
)
def test_a_sensitivity_is_the_divergence_of_a_small_error(kind, options, changes, make_model, token_ids, monkeypatch):
    ids = token_ids(5, 10)
    data = padded(ids) if changes.get("padded") else CalibrationSet(ids)
    session, stream = opened(make_model(kind), data, options)
    choices = find_choices(session, [])
    found = recorded(monkeypatch)
    transposed = frozenset(e.layer.parameter for e in session.plan.entries if e.layer.transposed)
    losses = sensitivities(stream, _parts(choices), transposed, torch.Generator().manual_seed(3), probes=PROBES)
    errors = list(reversed(found))
    for group, row in zip(choices.groups, losses, strict=True):
        weights = [f"{layer}.weight" for layer in group.layers]
        for option, loss in enumerate(row):
            # 300 squares of normal numbers of about equal size: a standard error of 8 %.
            wanted = measured(stream, errors[group.block], weights, option)
            assert loss == pytest.approx(wanted, rel=0.3), group.name


def test_probes_have_the_covariance_of_the_softmax():
    logits = torch.randn(1, 1, 5, generator=torch.Generator().manual_seed(0))
    p = logits.softmax(-1)[0, 0]
    drawn = torch.cat(list(sensitivity._probes(logits, 20000, torch.Generator().manual_seed(1))))[:, 0]
    wanted = torch.diag(p) - torch.outer(p, p)
    assert torch.allclose(drawn.T @ drawn / len(drawn), wanted, atol=0.01)
    assert torch.allclose(drawn.sum(-1), torch.zeros(len(drawn)), atol=1e-5)


def test_probes_of_a_sample_do_not_depend_on_who_works_on_the_others(make_model, token_ids):
    _, stream = opened(make_model(), CalibrationSet(token_ids(3, 8)))
    hidden = stream.original
    every = sensitivity._at_head(stream, hidden, range(3), 2, torch.Generator().manual_seed(0))
    one = sensitivity._at_head(stream, hidden, range(2, 3), 2, torch.Generator().manual_seed(0))
    assert torch.equal(every[2], one[2])


def test_what_is_no_option_is_infinitely_bad(make_model, token_ids):
    session, stream = opened(make_model(), CalibrationSet(token_ids(3, 8)))
    parts = _parts(find_choices(session, []))
    parts[0] = dataclasses.replace(parts[0], schemes=(None, parts[0].schemes[1]))
    losses = sensitivities(stream, parts, frozenset(), torch.Generator().manual_seed(0), probes=1)
    assert losses[0][0] == float("inf")
    assert 0 < losses[0][1] < losses[1][0] < float("inf")


def test_a_model_that_changes_hidden_states_between_blocks_is_refused(make_model, token_ids, monkeypatch):
    session, stream = opened(make_model(), CalibrationSet(token_ids(3, 8)))
    monkeypatch.setattr(type(stream), "changes_between_blocks", property(lambda _self: True))
    with pytest.raises(UnsupportedError, match="changes hidden states between its blocks"):
        sensitivities(stream, _parts(find_choices(session, [])), frozenset(), torch.Generator())
