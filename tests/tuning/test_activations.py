"""Calibrated activation ranges, and blocks that run with quantized activations."""

import dataclasses

import pytest
import torch
from torch import nn

from auto_round.block import Block
from auto_round.calibration import CalibrationSet
from auto_round.calls import BlockCalls
from auto_round.config import TuneConfig
from auto_round.data_types.activations import quantize_activation, stored_peak
from auto_round.schemes import PRESET_SCHEMES
from auto_round.tuning import TuningTask, tune
from auto_round.tuning.activations import calibrated_peaks, input_quantizers, with_input_quantizers, with_peaks
from auto_round.tuning.rtn import PlainRounding

STATIC = PRESET_SCHEMES["FP8_STATIC"]
INT8_STATIC = PRESET_SCHEMES["INT8_W8A8"].replace(act_group_size=0, act_dynamic=False)
NVFP4 = PRESET_SCHEMES["NVFP4"]


class Gated(nn.Module):
    """Two layers in a row, one that no token reaches, one that sees zeros only."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.idle, self.dark = nn.Linear(16, 16), nn.Linear(16, 16, bias=False)

    def forward(self, hidden):
        return hidden + self.down(torch.tanh(self.up(hidden))) + self.dark(torch.zeros_like(hidden))


def gated_task(scheme, *, mask=None, seen=("up", "down", "idle", "dark")) -> TuningTask:
    torch.manual_seed(0)
    module = Gated()
    tensors = {f"b.{name}": parameter.detach() for name, parameter in module.named_parameters()}
    _, spec = torch.utils._pytree.tree_flatten(((), {}))
    block = Block(("b",), (module,), (BlockCalls((), {}, spec),), tensors, torch.device("cpu"), torch.float32)
    inputs = torch.randn(6, 4, 16) * 3
    return TuningTask(
        block=block, schemes={f"b.{name}.weight": scheme for name in seen}, transposed=frozenset(), inputs=inputs,
        original_inputs=inputs, targets=block.forward(inputs, torch.arange(6)), mask=mask,
        batches=[slice(0, 4), slice(4, 6)], seed=0,
    )  # fmt: skip


@pytest.mark.parametrize("scheme", [STATIC, INT8_STATIC, NVFP4], ids=["fp8", "int8", "nvfp4"])
def test_ranges_are_the_largest_inputs_of_each_layer(scheme):
    task = gated_task(scheme, seen=("up", "down"))
    found = calibrated_peaks(task)
    hidden = torch.tanh(task.block.modules[0].up(task.inputs)).detach()
    expected = {"b.up.weight": task.inputs.abs().amax(), "b.down.weight": hidden.abs().amax()}
    assert set(found) == set(expected)
    for name, peak in expected.items():
        assert torch.equal(found[name], stored_peak(peak, scheme)), name
        assert (found[name].dtype, found[name].shape) == (torch.float32, ())


def test_ranges_are_measured_with_the_inputs_that_the_quantized_blocks_before_give():
    task = gated_task(NVFP4, seen=("up",))
    task = dataclasses.replace(task, inputs=task.inputs * 2)
    assert calibrated_peaks(task)["b.up.weight"] == task.original_inputs.abs().amax() * 2


def test_padding_is_in_no_range():
    task = gated_task(NVFP4, seen=("up",))
    mask = torch.ones(6, 4, dtype=torch.bool)
    largest = int(task.inputs.abs().amax(-1).argmax())
    mask.view(-1)[largest] = False
    found = calibrated_peaks(dataclasses.replace(task, mask=mask))["b.up.weight"]
    assert found == task.inputs[mask].abs().amax()
    assert found < task.inputs.abs().amax()


def test_layers_without_tokens_get_the_largest_range_of_the_block():
    task = gated_task(NVFP4)
    found = calibrated_peaks(task)
    assert set(found) == set(task.schemes)
    assert found["b.idle.weight"] == found["b.dark.weight"] == task.inputs.abs().amax()


def test_a_block_of_which_nothing_is_known_has_ranges_too():
    task = gated_task(NVFP4, seen=("idle", "dark"))
    assert {name: float(peak) for name, peak in calibrated_peaks(task).items()} == {
        "b.idle.weight": 1.0, "b.dark.weight": 1.0,
    }  # fmt: skip


@pytest.mark.parametrize("preset", ["W4A16", "FP8_DYNAMIC", "MXFP4", "INT8_W8A8", "NVFP4A16"])
def test_nothing_is_measured_where_nothing_is_stored(preset):
    assert calibrated_peaks(gated_task(PRESET_SCHEMES[preset])) == {}


@pytest.mark.parametrize("preset", ["FP8_STATIC", "NVFP4"])
def test_layers_that_serving_engines_join_have_one_range(preset, make_task):
    found = calibrated_peaks(make_task(PRESET_SCHEMES[preset]))
    by_leaf = {name.split(".")[-2]: float(peak) for name, peak in found.items()}
    assert by_leaf["q_proj"] == by_leaf["k_proj"] == by_leaf["v_proj"]
    assert by_leaf["gate_proj"] == by_leaf["up_proj"]
    assert len(set(by_leaf.values())) == 4


@pytest.mark.parametrize("preset", ["INT8_W8A8", "FP8_STATIC", "MXFP8"])
def test_a_block_with_quantized_inputs_computes_what_is_worked_by_hand(preset):
    scheme = PRESET_SCHEMES[preset]
    task = gated_task(scheme, seen=("up", "down"))
    peaks = calibrated_peaks(task)
    block = with_input_quantizers(task.block, input_quantizers(task.schemes, peaks))

    def through(name, x):
        return quantize_activation(x, scheme.activation, peaks.get(f"b.{name}.weight"))

    module = task.block.modules[0]
    with torch.no_grad():
        hidden = torch.tanh(module.up(through("up", task.inputs)))
        expected = task.inputs + module.down(through("down", hidden))
        assert torch.equal(block.forward(task.inputs, torch.arange(6)), expected)
        assert not torch.equal(expected, task.targets)
        # The block it was made from is as before, and no hook stays on the module.
        assert torch.equal(task.block.forward(task.inputs, torch.arange(6)), task.targets)
    assert not any(part._forward_pre_hooks for part in module.modules())


def test_a_block_without_quantized_inputs_is_the_same_block():
    task = gated_task(PRESET_SCHEMES["W4A16"])
    assert with_input_quantizers(task.block, input_quantizers(task.schemes, {})) is task.block


def test_results_carry_the_ranges_of_their_inputs():
    task = gated_task(STATIC, seen=("up", "down"))
    plain = PlainRounding()(task, TuneConfig(iters=0))
    result = with_peaks(plain, {"b.up.weight": torch.tensor(3.0)})
    assert result.weights["b.up.weight"].input_peak == 3.0
    assert result.weights["b.down.weight"].input_peak is None
    assert torch.equal(result.weights["b.up.weight"].codes, plain.weights["b.up.weight"].codes)


@pytest.mark.parametrize("iters", [0, 4])
@pytest.mark.parametrize("preset", ["FP8_STATIC", "NVFP4", "W4A8", "MXFP4"])
def test_tuning_measures_the_loss_of_quantized_activations(preset, iters, make_task):
    scheme = PRESET_SCHEMES[preset]
    scheme = scheme.replace(group_size=32) if scheme.data_type == "int" else scheme
    task = make_task(scheme)
    result = tune(task, TuneConfig(iters=iters, batch_size=4))
    assert set(result.weights) == set(task.schemes)
    calibrated = scheme.activation.needs_calibration
    assert all((weight.input_peak is not None) == calibrated for weight in result.weights.values())
    if not iters:
        return
    assert result.best_loss <= result.first_loss
    # The reported loss is that of the dequantized weights, run with their inputs quantized.
    peaks = {name: weight.input_peak for name, weight in result.weights.items() if calibrated}
    block = with_input_quantizers(task.block, input_quantizers(task.schemes, peaks))
    dense = {name: weight.dequantize() for name, weight in result.weights.items()}
    with torch.no_grad():
        error = (block.forward(task.inputs, torch.arange(8), dense) - task.targets).square().mean()
    assert float(error) == pytest.approx(result.best_loss, rel=1e-5)


def test_padded_samples_are_tuned_under_ranges_of_real_tokens(make_task, token_ids):
    ids = token_ids(8, 16)
    mask = torch.ones(8, 16, dtype=torch.bool)
    mask[:, 12:] = False
    task = make_task(NVFP4, data=CalibrationSet(ids, attention_mask=mask))
    peak = calibrated_peaks(task)["model.layers.0.self_attn.q_proj.weight"]
    normed = task.block.modules[0].input_layernorm(task.inputs)
    assert peak == normed[mask].abs().amax()
