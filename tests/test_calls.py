import pytest
import torch
from torch import nn

from auto_round.calls import (
    IndexedOutputError,
    ReachedError,
    Recorder,
    Replay,
    SampleAxis,
    Trace,
    merge_calls,
    replaced_modules,
    sample_axes,
)
from auto_round.errors import UnsupportedError

CPU = torch.device("cpu")


def recorded(*calls):
    """Returns a recorder that was called with hidden states of so many samples and these keyword arguments."""
    recorder = Recorder("b", Trace(), as_tuple=False)
    for count, arguments in calls:
        recorder.trace.begin()
        recorder(torch.zeros(count, 3, 4), **arguments)
    return recorder


def rotary(count):
    """As Qwen2-VL's tables: three axes first, then samples."""
    return torch.arange(3.0)[:, None, None] + torch.arange(float(count))[None, :, None] * 10 + torch.zeros(1, 1, 5)


@pytest.mark.parametrize("axis", [SampleAxis(), SampleAxis(1), SampleAxis(0, 2), SampleAxis(1, 3)])
def test_joining_undoes_splitting(axis):
    tensor = torch.arange(6 * 6 * 2).reshape(6, 6, 2)
    front = axis.split(tensor)
    assert len(front) == 6 // axis.rows
    assert torch.equal(axis.join(front), tensor)


def test_the_dimension_of_samples_is_found_by_calling_with_one_and_with_two():
    axes = sample_axes(
        recorded((1, {"mask": torch.ones(1, 3), "rotary": rotary(1), "tiles": torch.ones(4, 2), "flag": True})),
        recorded((2, {"mask": torch.ones(2, 3), "rotary": rotary(2), "tiles": torch.ones(8, 2), "flag": True})),
    )
    assert axes == [SampleAxis(0), SampleAxis(1), SampleAxis(0, 4), None]


def test_arguments_of_chosen_samples_are_given_back_as_the_model_gave_them():
    """Three samples in batches of two and one; batch and axes of the table are both three in the probe's place."""
    tiles = torch.arange(12.0).reshape(12, 1)
    recorder = recorded(
        (2, {"rotary": rotary(3)[:, :2], "tiles": tiles[:8]}), (1, {"rotary": rotary(3)[:, 2:], "tiles": tiles[8:]})
    )
    calls = merge_calls(recorder, [SampleAxis(1), SampleAxis(0, 4)], 0, {}, joins_equal=True)
    _, arguments = calls.for_samples(torch.tensor([2, 0]), CPU, torch.float32)
    assert torch.equal(arguments["rotary"], rotary(3)[:, [2, 0]])
    assert torch.equal(arguments["tiles"], torch.cat([tiles[8:], tiles[:4]]))


def test_samples_that_do_not_fit_side_by_side_are_refused():
    recorder = recorded((1, {"states": torch.ones(1, 4, 2)}), (1, {"states": torch.ones(1, 5, 2)}))
    with pytest.raises(UnsupportedError, match="different sizes"):
        merge_calls(recorder, [SampleAxis()], 0, {}, joins_equal=False)


class Model(nn.Module):
    """Three blocks; what is done between them is given."""

    def __init__(self, between):
        super().__init__()
        self.layers = nn.ModuleList([nn.Identity() for _ in range(3)])
        self.between = between

    def forward(self, hidden):
        for layer in self.layers:
            hidden = self.between(layer(hidden))
        return hidden


def add_in_place(hidden):
    hidden[:, 0] += 1
    return hidden


@pytest.mark.parametrize(
    ("between", "changed"),
    [(lambda h: h, set()), (lambda h: h + 0, {"layers.1", "layers.2"}), (add_in_place, {"layers.1", "layers.2"})],
    ids=["nothing", "a new tensor", "in place"],
)
def test_changes_between_blocks_are_noticed(between, changed):
    model, trace = Model(between), Trace()
    names = ["layers.0", "layers.1", "layers.2"]
    with torch.no_grad(), replaced_modules(model, names, lambda name: Recorder(name, trace, as_tuple=False)):
        for _ in range(2):
            trace.begin()
            model(torch.zeros(1, 2, 4))
    assert trace.changed == changed
    assert all(type(layer) is nn.Identity for layer in model.layers)


def test_a_model_that_takes_the_first_element_is_noticed_and_gets_a_tuple():
    model, trace = Model(lambda given: given[0]), Trace()
    names = ["layers.0", "layers.1"]
    with pytest.raises(IndexedOutputError):
        with replaced_modules(model, names, lambda name: Recorder(name, trace, as_tuple=False)):
            model(torch.zeros(2, 2, 4))
    trace.begin()
    with replaced_modules(model, [*names, "layers.2"], lambda name: Recorder(name, trace, as_tuple=True)):
        assert model(torch.zeros(2, 2, 4)).shape == (2, 2, 4)
    assert not trace.changed


def test_a_replay_gives_activations_and_ends_the_pass_where_it_is_told():
    model, collected = Model(lambda hidden: hidden * 2), []
    names = ["layers.0", "layers.1", "layers.2"]

    def stand_in(name):
        return Replay(collected if name == "layers.1" else None, stops=name == "layers.1")

    with replaced_modules(model, names, stand_in):
        model.layers[0].output = torch.ones(1, 1, 1)
        with pytest.raises(ReachedError):
            model(torch.zeros(1, 1, 1))
    assert [hidden.item() for hidden in collected] == [2]
