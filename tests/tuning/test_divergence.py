"""The streamed divergence and its gradients against the whole model and autograd."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.func import functional_call

from auto_round.blocks import BlockStream
from auto_round.calibration import CalibrationSet
from auto_round.checkpoint import ModuleSource
from auto_round.models import discover
from auto_round.schemes import preset_name_to_scheme
from auto_round.tensors import BlockResult
from auto_round.tuning import divergence, round_plain
from auto_round.tuning.divergence import QuantizedModel, sigma_keys, summed_divergence

CPU = torch.device("cpu")
W2 = preset_name_to_scheme("W2A16G32")


def quantized_weights(model, scheme, *, head=False):
    """Returns name -> weight rounded by itself, of the model's blocks and, if asked for, its output layer."""
    structure = discover(model)
    weights = {}
    for linear in structure.linears:
        if not linear.kept and (linear.block is not None or (head and linear.name == structure.head)):
            weight = model.get_parameter(linear.parameter).detach()
            weights[linear.parameter] = round_plain(weight.t() if linear.transposed else weight, scheme)
    return weights


def streamed(model, weights, data, *, batch_size=3, fixed=frozenset()):
    structure = discover(model)
    groups = [(name,) for name in structure.blocks]
    stream = BlockStream(
        ModuleSource(model), groups, data, device=CPU, dtype=torch.float32, storage=CPU, batch_size=batch_size,
        quantized_chain=False,
    )  # fmt: skip
    head = f"{structure.head}.weight"

    def load(block):
        return BlockResult({name: weight for name, weight in weights.items() if name.startswith(block + ".")})

    transposed = frozenset(linear.parameter for linear in structure.linears if linear.transposed)
    return QuantizedModel(stream, load, (head, weights[head]) if head in weights else None, transposed, fixed)


def whole_divergence(model, dense, data, samples):
    """Returns the mean divergence between a model and itself with other weights, by one plain forward pass each."""
    ids, mask = data.input_ids[samples], data.attention_mask
    arguments = {"input_ids": ids} | ({} if mask is None else {"attention_mask": mask[samples].long()})
    wanted = model(**arguments).logits.detach().log_softmax(-1)
    untied = copy.deepcopy(model)
    head = discover(model).head
    if f"{head}.weight" in dense and discover(model).tied_head:
        untied.get_submodule(head).weight = torch.nn.Parameter(model.get_submodule(head).weight.detach().clone())
    predicted = functional_call(untied, dense, (), arguments).logits.log_softmax(-1)
    kl_NT = (wanted.exp() * (wanted - predicted)).sum(-1)
    return kl_NT.mean() if mask is None else kl_NT[mask[samples]].mean()


def dense_by_sigma(weights, sigmas, keys, transposed):
    """Returns parameters as smooth functions of sigma: W_hat * exp(sigma), nothing rounded."""
    dense = {}
    for name, weight in weights.items():
        factor = sigmas[keys[name]].exp()
        if factor.ndim:
            factor = factor.repeat_interleave(weight.scheme.group_size, dim=1)[:, : weight.shape[1]]
        value = weight.dequantize() * factor
        dense[name] = value.t() if name in transposed else value
    return dense


@pytest.fixture
def data(token_ids):
    return CalibrationSet(token_ids(5, 12))


@pytest.fixture
def padded(token_ids):
    mask = torch.ones(5, 12, dtype=torch.bool)
    mask[1, 7:] = False
    mask[4, 9:] = False
    return CalibrationSet(token_ids(5, 12), mask)


CASES = [
    pytest.param("llama", W2, {}, id="llama"),
    pytest.param("gpt2", W2, {}, id="transposed"),
    pytest.param("gemma3", W2, {"final_logit_softcapping": 5.0}, id="soft cap of logits"),
    pytest.param("opt", W2, {}, id="biases"),
    pytest.param("qwen3_moe", W2, {}, id="experts"),
    pytest.param("llama", preset_name_to_scheme("NVFP4A16"), {}, id="scale of the tensor"),
]


@pytest.mark.parametrize(("kind", "scheme", "changes"), CASES)
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "padded"])
def test_divergence_and_gradients_are_those_of_the_whole_model(kind, scheme, changes, masked, make_model, data, padded):
    data = padded if masked else data
    model = make_model(kind, **changes)
    weights = quantized_weights(model, scheme)
    quantized = streamed(model, weights, data)
    samples = torch.tensor([0, 1, 3, 4])
    sigmas = {key: sigma.requires_grad_() for key, sigma in quantized.start().items()}
    dense = dense_by_sigma(weights, sigmas, quantized.keys, quantized.blocks[0].transposed)
    expected = whole_divergence(model, dense, data, samples)
    wanted = torch.autograd.grad(expected, list(sigmas.values()), allow_unused=True)
    fixed = {key: sigma.detach() for key, sigma in sigmas.items()}
    kl, gradients = quantized.gradients(samples, fixed)
    # Float32 sums in another order: 1e-5 of the value.
    assert float(expected.detach()) > 1e-3
    torch.testing.assert_close(kl, expected.detach(), rtol=1e-5, atol=1e-7)
    assert quantized.divergence(samples, fixed) == pytest.approx(float(expected.detach()), rel=1e-5)
    for (key, gradient), by_autograd in zip(gradients.items(), wanted, strict=True):
        by_autograd = torch.zeros_like(gradient) if by_autograd is None else by_autograd
        torch.testing.assert_close(gradient, by_autograd, rtol=1e-3, atol=1e-6, msg=lambda text, key=key: key + text)


@pytest.mark.parametrize("tied", [False, True], ids=["own weight", "tied"])
def test_the_quantized_output_layer_is_part_of_it(tied, make_model, data):
    model = make_model(tie_word_embeddings=tied)
    weights = quantized_weights(model, W2, head=True)
    quantized = streamed(model, weights, data)
    samples = torch.arange(5)
    sigmas = {key: sigma.requires_grad_() for key, sigma in quantized.start().items()}
    expected = whole_divergence(model, dense_by_sigma(weights, sigmas, quantized.keys, ()), data, samples)
    (wanted,) = torch.autograd.grad(expected, [sigmas["lm_head.weight"]])
    kl, gradients = quantized.gradients(samples, {key: sigma.detach() for key, sigma in sigmas.items()})
    torch.testing.assert_close(kl, expected.detach(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(gradients["lm_head.weight"], wanted, rtol=1e-3, atol=1e-6)


def test_a_fixed_weight_is_seen_and_not_tuned(make_model, data):
    model, samples = make_model(), torch.arange(5)
    weights = quantized_weights(model, W2, head=True)
    tuned, fixed = streamed(model, weights, data), streamed(model, weights, data, fixed=frozenset({"lm_head.weight"}))
    assert set(tuned.start()) - set(fixed.start()) == {"lm_head.weight"}
    assert tuned.divergence(samples, {}) == fixed.divergence(samples, {})
    _, gradients = fixed.gradients(samples, fixed.start())
    assert set(gradients) == set(fixed.start())


def test_a_model_that_is_not_changed_by_rounding_does_not_diverge(make_model, data):
    model = make_model()
    weights = quantized_weights(model, W2)
    with torch.no_grad():
        for name, weight in weights.items():
            model.get_parameter(name).copy_(weight.dequantize())
    assert abs(streamed(model, weights, data).divergence(torch.arange(5), {})) < 1e-6


def test_quantized_activations_are_part_of_it(make_model, data):
    model = make_model()
    samples = torch.arange(5)
    alone = streamed(model, quantized_weights(model, preset_name_to_scheme("INT8_W8A8").replace(act_bits=16)), data)
    both = streamed(model, quantized_weights(model, preset_name_to_scheme("INT8_W8A8").replace(act_bits=4)), data)
    assert both.divergence(samples, {}) > 10 * alone.divergence(samples, {})
    _, gradients = both.gradients(samples, both.start())
    assert all(gradient.abs().sum() > 0 for gradient in gradients.values())


def test_batches_and_pieces_at_the_output_layer_change_nothing_but_the_order_of_sums(make_model, data, monkeypatch):
    model = make_model()
    weights = quantized_weights(model, W2)
    samples = torch.arange(5)
    one = streamed(model, weights, data, batch_size=5)
    kl, gradients = one.gradients(samples, one.start())
    monkeypatch.setattr(divergence, "LOGITS_AT_A_TIME", 1)
    other = streamed(model, weights, data, batch_size=2)
    kl_other, gradients_other = other.gradients(samples, other.start())
    torch.testing.assert_close(kl, kl_other, rtol=1e-5, atol=1e-7)
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, gradients_other[key], rtol=1e-3, atol=1e-7)


def test_no_module_is_changed_and_no_hook_stays(make_model, data):
    model = make_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    quantized = streamed(model, quantized_weights(model, preset_name_to_scheme("W4A8")), data)
    quantized.gradients(torch.arange(5), quantized.start())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_divergence_is_worked_by_hand():
    wanted = torch.tensor([[[0.5, 0.5], [0.25, 0.75]]]).log()
    predicted = torch.tensor([[[0.25, 0.75], [0.25, 0.75]]]).log()
    by_hand = 0.5 * torch.log(torch.tensor(0.5 / 0.25)) + 0.5 * torch.log(torch.tensor(0.5 / 0.75))
    torch.testing.assert_close(summed_divergence(predicted, wanted, None), by_hand)
    assert float(summed_divergence(predicted, wanted, torch.tensor([[False, True]]))) == pytest.approx(0, abs=1e-7)


def test_joined_weights_share_what_is_tuned_where_they_share_a_scale(make_model):
    model = make_model()
    layer = "model.layers.1"
    keys = sigma_keys(quantized_weights(model, preset_name_to_scheme("NVFP4A16")))
    joined = [f"{layer}.self_attn.{leaf}_proj.weight" for leaf in "qkv"]
    assert {keys[name] for name in joined} == {joined[0]}
    assert keys[f"{layer}.mlp.up_proj.weight"] == f"{layer}.mlp.gate_proj.weight"
    assert keys[f"{layer}.mlp.down_proj.weight"] == f"{layer}.mlp.down_proj.weight"
    integers = sigma_keys(quantized_weights(model, W2))
    assert all(name == key for name, key in integers.items())


def test_weights_whose_scales_cannot_be_tuned_are_left_alone(make_model, data):
    model = make_model()
    weights = quantized_weights(model, preset_name_to_scheme("MXFP4A16"))
    tunable = quantized_weights(model, W2)
    weights |= {name: weight for name, weight in tunable.items() if "mlp" in name}
    quantized = streamed(model, weights, data)
    assert set(quantized.start()) == {name for name in weights if "mlp" in name}
    kl, gradients = quantized.gradients(torch.arange(5), quantized.start())
    assert float(kl) > 0
    assert set(gradients) == {name for name in weights if "mlp" in name}
