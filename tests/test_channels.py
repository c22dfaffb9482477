import torch
from torch import nn

from auto_round.channels import ChannelMeans


def test_means_are_over_all_rows_of_all_calls_and_hooks_are_gone_afterwards():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    model.idle = nn.Linear(2, 2)
    with ChannelMeans(model, ["0.weight", "idle.weight"]) as means:
        model[0](torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]))
        model[0](torch.tensor([[5.0, 0.0]]))
    model[0](torch.tensor([[100.0, 100.0]]))
    assert means.values().keys() == {"0.weight"}  # a layer that never ran is missing
    torch.testing.assert_close(means.values()["0.weight"], torch.tensor([35.0 / 3, 20.0 / 3]))
    assert not model[0]._forward_pre_hooks
