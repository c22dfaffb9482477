import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from auto_round.schemes import QuantizationScheme
from auto_round.tensors import (
    BlockResult,
    QuantizedTensor,
    effective_group_size,
    expand_groups,
    from_groups,
    group_count,
    join_rows,
    rows_of,
    to_groups,
)


@pytest.mark.parametrize(
    ("group_size", "in_features", "size", "count"),
    [
        pytest.param(32, 128, 32, 4, id="divides"),
        pytest.param(32, 100, 32, 4, id="shorter last group"),
        pytest.param(-1, 100, 100, 1, id="per row"),
        pytest.param(0, 100, 100, 1, id="per tensor"),
        pytest.param(128, 100, 128, 1, id="larger than the row"),
        pytest.param(1, 7, 1, 7, id="one weight per group"),
    ],
)
def test_group_arithmetic(group_size, in_features, size, count):
    assert effective_group_size(group_size, in_features) == size
    assert group_count(in_features, group_size) == count


def test_a_shorter_last_group_is_padded_with_zeros():
    weight_OI = torch.tensor([[1.0, 2, 3, 4, 5], [6, 7, 8, 9, 10]])
    expected = torch.tensor([[[1.0, 2, 3], [4, 5, 0]], [[6, 7, 8], [9, 10, 0]]])
    assert torch.equal(to_groups(weight_OI, 3), expected)
    assert torch.equal(from_groups(expected, 5), weight_OI)


@given(rows=st.integers(1, 5), width=st.integers(1, 70), group_size=st.sampled_from([-1, 0, 1, 3, 16, 32, 64]))
def test_from_groups_undoes_to_groups(rows, width, group_size):
    weight_OI = torch.arange(rows * width, dtype=torch.float32).reshape(rows, width)
    grouped_OGK = to_groups(weight_OI, group_size)
    assert grouped_OGK.shape[:2] == (rows, group_count(width, group_size))
    assert torch.equal(from_groups(grouped_OGK, width), weight_OI)


def test_expand_groups_gives_each_weight_the_value_of_its_group():
    per_group_OG = torch.tensor([[10, 20], [30, 40]])
    expected = torch.tensor([[10, 10, 10, 20, 20], [30, 30, 30, 40, 40]])
    assert torch.equal(expand_groups(per_group_OG, 3, 5), expected)


@given(rows=st.integers(1, 4), width=st.integers(1, 70), group_size=st.sampled_from([-1, 0, 1, 3, 16, 64]))
def test_expand_groups_agrees_with_grouped_form(rows, width, group_size):
    groups = group_count(width, group_size)
    per_group_OG = torch.arange(rows * groups).reshape(rows, groups)
    size = effective_group_size(group_size, width)
    grouped_OGK = per_group_OG[..., None].expand(rows, groups, size)
    assert torch.equal(expand_groups(per_group_OG, group_size, width), from_groups(grouped_OGK, width))


def codes_of(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.uint8)


def test_dequantize_symmetric_by_hand():
    # 3 bits: zero point 4. Row 0: 0.5 * (0-4, 7-4) and -2 * (4-4, 5-4); row 1: 1 * (3-4, 4-4) and 0.25 * (0-4, 7-4).
    weight = QuantizedTensor(
        codes_of([0, 7, 4, 5], [3, 4, 0, 7]),
        torch.tensor([[0.5, -2.0], [1.0, 0.25]]),
        None,
        QuantizationScheme(bits=3, group_size=2),
    )
    assert weight.shape == (2, 4)
    assert torch.equal(weight.dequantize(), torch.tensor([[-2.0, 1.5, 0, -2], [-1, 0, -1, 0.75]]))
    assert torch.equal(weight.zero_points(), torch.full((2, 2), 4, dtype=torch.uint8))


def test_dequantize_asymmetric_with_a_shorter_last_group_by_hand():
    # 2 bits, groups of 2, 3 inputs. 0.5 * (0-1, 3-1) = -0.5, 1 and 0.25 * (0-3) = -0.75.
    weight = QuantizedTensor(
        codes_of([0, 3, 0]),
        torch.tensor([[0.5, 0.25]]),
        torch.tensor([[1, 3]], dtype=torch.uint8),
        QuantizationScheme(bits=2, group_size=2, sym=False),
    )
    assert torch.equal(weight.dequantize(), torch.tensor([[-0.5, 1.0, -0.75]]))


def test_dequantize_rounds_once_to_the_wanted_dtype():
    # 3 * 1.0009765625 = 3.0029296875 lies between the bfloat16 numbers 3 and 3.015625.
    scale = torch.tensor([[1 + 2.0**-10]])
    weight = QuantizedTensor(codes_of([7]), scale, None, QuantizationScheme(bits=3, group_size=-1))
    assert weight.dequantize().item() == 3.0029296875
    out = weight.dequantize(torch.bfloat16)
    assert out.dtype == torch.bfloat16
    assert out.item() == 3.0


def test_eight_bit_codes_do_not_overflow():
    scale = torch.tensor([[1.0]])
    weight = QuantizedTensor(codes_of([0, 255]), scale, None, QuantizationScheme(bits=8, group_size=-1))
    assert weight.dequantize().tolist() == [[-128.0, 127.0]]


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"codes": torch.zeros(2, 4, dtype=torch.int32)}, id="codes not uint8"),
        pytest.param({"scale": torch.zeros(2, 3)}, id="wrong number of groups"),
        pytest.param({"scale": torch.zeros(2, 2, dtype=torch.float16)}, id="scale not float32"),
        pytest.param({"zero_point": torch.zeros(2, 2, dtype=torch.uint8)}, id="zero point though symmetric"),
        pytest.param({"scheme": QuantizationScheme(group_size=2, sym=False)}, id="no zero point though asymmetric"),
    ],
)
def test_a_quantized_tensor_checks_itself(change):
    good = {
        "codes": torch.zeros(2, 4, dtype=torch.uint8),
        "scale": torch.ones(2, 2),
        "zero_point": None,
        "scheme": QuantizationScheme(group_size=2),
    }
    QuantizedTensor(**good)
    with pytest.raises(AssertionError):
        QuantizedTensor(**{**good, **change})


def test_to_keeps_everything():
    scheme = QuantizationScheme(bits=2, group_size=2, sym=False)
    weight = QuantizedTensor(codes_of([1, 2]), torch.ones(1, 1), torch.ones(1, 1, dtype=torch.uint8), scheme)
    moved = weight.to("cpu")
    assert torch.equal(moved.codes, weight.codes)
    assert torch.equal(moved.zero_point, weight.zero_point)
    assert moved.scheme == scheme


def test_a_block_result_sums_up_without_tensors():
    tokens = {"mlp.experts": [3, 0]}
    result = BlockResult(
        {}, first_loss=2.0, best_loss=1.0, best_step=7, note="x", expert_tokens=tokens, losses=(3.0, 1.5)
    )
    expected = {"first_loss": 2.0, "best_loss": 1.0, "best_step": 7, "note": "x", "expert_tokens": tokens}
    expected["losses"] = [3.0, 1.5]
    assert result.summary() == expected


def test_joined_rows_are_those_of_the_pieces():
    scheme = QuantizationScheme(bits=4, group_size=2, sym=False)
    pieces = [
        QuantizedTensor(
            torch.full((rows, 4), rows, dtype=torch.uint8), torch.full((rows, 2), float(rows)),
            torch.full((rows, 2), rows, dtype=torch.uint8), scheme,
        )
        for rows in (1, 2)
    ]  # fmt: skip
    joined = join_rows([(slice(0, 1), pieces[0]), (slice(1, 3), pieces[1])], 3)
    assert joined.codes.tolist() == [[1] * 4, [2] * 4, [2] * 4]
    assert joined.scale.tolist() == [[1.0, 1.0], [2.0, 2.0], [2.0, 2.0]]
    assert joined.zero_point.tolist() == [[1, 1], [2, 2], [2, 2]]


def test_rows_of_a_weight_join_to_it_again():
    """What all rows share stays as it is."""
    groups = (6, 2)
    weight = QuantizedTensor(
        torch.randint(0, 4, (6, 8), dtype=torch.uint8), torch.rand(groups),
        torch.randint(1, 4, groups, dtype=torch.uint8), QuantizationScheme(bits=2, group_size=4, sym=False),
        input_peak=torch.tensor(3.0), offset=torch.rand(groups),
    )  # fmt: skip
    pieces = [rows_of(weight, slice(0, 1)), rows_of(weight, slice(1, 6))]
    assert [piece.shape for piece in pieces] == [(1, 8), (5, 8)]
    joined = join_rows(zip((slice(0, 1), slice(1, 6)), pieces, strict=True), 6)
    for field in ("codes", "scale", "zero_point", "offset", "input_peak"):
        assert torch.equal(getattr(joined, field), getattr(weight, field))
    assert joined.global_scale is None
    assert torch.equal(torch.cat([piece.dequantize() for piece in pieces]), weight.dequantize())
