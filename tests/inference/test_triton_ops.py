import pytest
import torch

pytest.importorskip("triton")

from auto_round.inference import triton_ops
from auto_round.inference.bit_unpack import AWQ_SHIFTS
from auto_round.inference.triton_ops import Packing, grid_table, tile_for


def test_the_grid_holds_scale_zero_point_and_position_of_each_group():
    scale = torch.tensor([[0.5, -2.0, 1.0]]).half()
    zero = torch.tensor([[3], [255], [0]], dtype=torch.uint8)
    awq = grid_table(scale, zero, Packing(4, 32, True, torch.float16))
    assert awq.shape == (1, 3)
    assert awq.dtype == torch.int32
    halves = torch.tensor([0x3800, 0xC000, 0x3C00])  # 0.5, -2, 1 in float16
    assert torch.equal(awq[0] & 0xFFFF, halves.int())
    assert (awq[0] >> 16 & 255).tolist() == [3, 255, 0]
    assert (awq[0] >> 24).tolist() == list(AWQ_SHIFTS[:3])
    gptq = grid_table(scale, None, Packing(8, 32, False, torch.bfloat16))
    assert (gptq[0] >> 16).tolist() == [128, 128, 128]
    assert (gptq[0] & 0xFFFF).tolist() == [0x3F00, 0xC000, 0x3F80]  # the same in bfloat16


@pytest.mark.parametrize("out_features", [1024, 14336])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("awq", [False, True])
def test_tiles_hold_their_tokens_and_fit_shared_memory(bits, out_features, awq):
    packing = Packing(bits, 128, awq, torch.float16)
    tiles = {tokens: tile_for(tokens, out_features, packing) for tokens in (1, 8, 9, 16, 17, 64, 65)}
    for tokens, tile in tiles.items():
        if tile is None:
            continue
        assert tile.tokens >= min(tokens, 32)
        # Words, activations and the grid, each as often as steps are loaded ahead.
        step = tile.rows * tile.columns * bits / 8 + tile.tokens * tile.columns * 2 + 4 * tile.rows * tile.columns / 32
        assert step * tile.slices * (tile.stages - 1) <= 99 * 1024
    assert [tokens for tokens, tile in tiles.items() if tile is None] == ([17, 64, 65] if bits == 3 else [65])


class Recorder:
    """Stands for a Triton kernel, and for what it compiles to."""

    def __init__(self, name, calls):
        self.name, self.calls = name, calls

    def __getitem__(self, programs):
        def launch(*arguments, **options):
            self.calls.append((self.name, programs, arguments, options))
            return Recorder("compiled", self.calls)

        return launch


def test_a_launch_compiles_once_and_again_for_tensors_of_other_alignment(monkeypatch):
    monkeypatch.setattr(triton_ops, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    calls = []
    launch = triton_ops._Launch(Recorder("kernel", calls), torch.device("cuda:0"), ("constant",), num_warps=4)
    aligned = torch.empty(64, dtype=torch.int32)
    for tensor in (aligned, aligned, aligned[1:], aligned):
        launch((1, 2, 3), (tensor, None), (7,))
    assert [name for name, *_ in calls] == ["kernel", "compiled", "kernel", "compiled"]
    assert all(programs == (1, 2, 3) for _, programs, _, _ in calls)
    assert all(arguments[1:] == (None, 7, "constant") for _, _, arguments, _ in calls)
    assert calls[0][3] == {"num_warps": 4}
    assert calls[1][3] == {}


def test_the_shape_function_needs_no_kernel():
    x = torch.empty(2, 3, 64, dtype=torch.bfloat16, device="meta")
    grid = torch.empty(2, 48, dtype=torch.int32, device="meta")
    with torch._subclasses.FakeTensorMode() as mode:
        fake = [mode.from_tensor(torch.empty(shape, dtype=dtype)) for shape, dtype in (
            ((2, 3, 64), torch.bfloat16), ((8, 48), torch.int32), ((2, 48), torch.int32),
        )]  # fmt: skip
        y = torch.ops.auto_round.packed_linear(*fake, None, 4, 32, False, torch.float16)
    assert (y.shape, y.dtype) == ((2, 3, 48), torch.bfloat16)
    assert triton_ops._shape(x, None, grid).shape == (2, 3, 48)
