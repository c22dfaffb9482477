import pytest
import torch

from auto_round.calibration.base import CalibrationSet, ReadLimit, document_of, is_messages, merge_sets
from auto_round.errors import ConfigError


def test_a_set_counts_samples_and_real_tokens():
    ids = torch.tensor([[1, 2, 3], [4, 5, 0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    assert len(CalibrationSet(ids)) == 2
    assert CalibrationSet(ids).n_tokens == 6
    assert CalibrationSet(ids, mask).n_tokens == 5


def test_a_mask_that_hides_nothing_is_dropped():
    samples = CalibrationSet(torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3, dtype=torch.bool))
    assert samples.attention_mask is None


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        pytest.param(torch.ones(3, dtype=torch.int64), r"\(3,\) torch.int64", id="one dimension"),
        pytest.param(torch.ones(2, 3, dtype=torch.int32), "torch.int32", id="int32"),
        pytest.param(torch.ones(2, 3), "torch.float32", id="float"),
        pytest.param(torch.ones(0, 3, dtype=torch.int64), r"\(0, 3\)", id="no sample"),
        pytest.param(torch.ones(2, 3, dtype=torch.int64, device="meta"), "on meta", id="device"),
        pytest.param(torch.tensor([[1, -7]]), "holds -7", id="negative"),
    ],
)
def test_bad_ids_are_refused(ids, message):
    with pytest.raises(ConfigError, match=message):
        CalibrationSet(ids)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        pytest.param(torch.ones(2, 2, dtype=torch.bool), r"shape \(2, 3\), not \(2, 2\)", id="shape"),
        pytest.param(torch.ones(2, 3, dtype=torch.int64), "not .* torch.int64", id="dtype"),
        pytest.param(torch.tensor([[True] * 3, [False] * 3]), "hides every token", id="empty sample"),
    ],
)
def test_bad_masks_are_refused(mask, message):
    with pytest.raises(ConfigError, match=message):
        CalibrationSet(torch.ones(2, 3, dtype=torch.int64), mask)


def test_merging_keeps_the_order_and_pads_to_the_widest():
    merged = merge_sets([CalibrationSet(torch.tensor([[1, 2]])), CalibrationSet(torch.tensor([[3, 4, 5]]))], pad_id=9)
    assert merged.input_ids.tolist() == [[1, 2, 9], [3, 4, 5]]
    assert merged.attention_mask.tolist() == [[True, True, False], [True, True, True]]


def test_merging_equal_widths_has_no_mask():
    merged = merge_sets([CalibrationSet(torch.tensor([[1, 2]])), CalibrationSet(torch.tensor([[3, 4]]))], pad_id=9)
    assert merged.input_ids.tolist() == [[1, 2], [3, 4]]
    assert merged.attention_mask is None


def test_merging_keeps_masks():
    masked = CalibrationSet(torch.tensor([[1, 9]]), torch.tensor([[True, False]]))
    merged = merge_sets([masked, CalibrationSet(torch.tensor([[3, 4]]))], pad_id=9)
    assert merged.attention_mask.tolist() == [[True, False], [True, True]]


def test_read_limits_offer_four_times_what_is_drawn():
    assert ReadLimit.to_join(2, 10) == ReadLimit(n_documents=1, n_chars=2 * 10 * 4 * 4)
    assert ReadLimit.to_pad(2) == ReadLimit(n_documents=8, n_chars=0)


def test_messages_need_role_and_content():
    assert is_messages([{"role": "user", "content": "1"}])
    assert not is_messages([{"role": "user"}])
    assert not is_messages([])


@pytest.mark.parametrize(
    ("record", "document"),
    [
        ({"text": "1", "id": 5}, "1"),
        ({"body": "1"}, "1"),
        ({"messages": [{"role": "user", "content": "1"}], "id": 5}, [{"role": "user", "content": "1"}]),
        ({"text": None, "messages": [{"role": "user", "content": "1"}]}, [{"role": "user", "content": "1"}]),
        ({"body": "1", "id": 5}, None),
        ({"text": 5}, None),
        ({}, None),
    ],
)
def test_the_document_of_a_record(record, document):
    assert document_of(record) == document
