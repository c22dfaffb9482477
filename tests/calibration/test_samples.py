import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from auto_round.calibration.base import ReadLimit
from auto_round.calibration.samples import is_stream, read_samples
from auto_round.errors import ConfigError

CHAT = [{"role": "user", "content": "1"}]
ROWS = [[1, 2], [3, 4]]


def read(dataset, nsamples=100, limit=ReadLimit(n_documents=100, n_chars=0)):  # noqa: B008  frozen
    return read_samples(dataset, nsamples=nsamples, text_limit=limit)


def read_rows(dataset, **options):
    rows = read(dataset, **options).rows
    assert all(row.dtype == torch.int64 and row.dim() == 1 for row in rows)
    return [row.tolist() for row in rows]


@pytest.mark.parametrize(
    "dataset",
    [
        pytest.param(ROWS, id="lists"),
        pytest.param(tuple(ROWS), id="tuple"),
        pytest.param(torch.tensor(ROWS), id="2-D tensor"),
        pytest.param(np.array(ROWS, dtype=np.uint16), id="array"),
        pytest.param([torch.tensor([1, 2]), torch.tensor([3, 4])], id="1-D tensors"),
        pytest.param([torch.tensor([[1, 2]], dtype=torch.int32), torch.tensor([[3, 4]])], id="2-D tensors"),
        pytest.param([{"input_ids": [1, 2]}, {"input_ids": torch.tensor([3, 4])}], id="dicts"),
        pytest.param({"input_ids": torch.tensor(ROWS)}, id="one batch"),
        pytest.param({"input_ids": ROWS}, id="one batch of lists"),
        pytest.param([{"input_ids": [1, 2, 0], "attention_mask": [1, 1, 0]}, [3, 4]], id="right padding"),
        pytest.param(
            {"input_ids": torch.tensor([[0, 1, 2], [0, 3, 4]]), "attention_mask": torch.tensor([[0, 1, 1]] * 2).bool()},
            id="left padding",
        ),
        pytest.param(DataLoader(torch.tensor(ROWS), batch_size=2), id="loader of tensors"),
        pytest.param(DataLoader(TensorDataset(torch.tensor(ROWS)), batch_size=1), id="loader of one-tensor tuples"),
        pytest.param(
            DataLoader([{"input_ids": torch.tensor(row)} for row in ROWS], batch_size=2), id="loader of dicts"
        ),
        pytest.param(DataLoader(ROWS, batch_size=2, collate_fn=list), id="loader of lists"),
        pytest.param((row for row in ROWS), id="generator"),
    ],
)
def test_token_ids_of_many_kinds(dataset):
    assert read_rows(dataset) == ROWS


@pytest.mark.parametrize(
    "dataset", [[1, 2, 3], torch.tensor([1, 2, 3]), np.array([1, 2, 3])], ids=["list", "tensor", "np"]
)
def test_a_flat_sequence_is_one_row(dataset):
    assert is_stream(dataset)
    assert read_rows(dataset) == [[1, 2, 3]]


@pytest.mark.parametrize("dataset", [ROWS, torch.tensor(ROWS), [], ["1"], [True], "12"])
def test_what_is_not_flat(dataset):
    assert not is_stream(dataset)


@pytest.mark.parametrize(
    ("dataset", "documents"),
    [
        pytest.param(["1", "2"], ["1", "2"], id="strings"),
        pytest.param([{"text": "1"}, {"text": "2", "id": 3}], ["1", "2"], id="text dicts"),
        pytest.param([{"messages": CHAT}, CHAT], [CHAT, CHAT], id="conversations"),
        pytest.param(DataLoader(["1", "2"], batch_size=2), ["1", "2"], id="loader of strings"),
        pytest.param(DataLoader([{"text": "1"}, {"text": "2"}], batch_size=2), ["1", "2"], id="loader of dicts"),
        pytest.param(iter(["1", "2"]), ["1", "2"], id="iterator"),
    ],
)
def test_texts_of_many_kinds(dataset, documents):
    assert read(dataset).documents == documents


def test_an_endless_iterable_of_ids_is_read_up_to_nsamples():
    def endless():
        while True:
            yield torch.tensor(ROWS)

    assert read_rows(endless(), nsamples=3) == ROWS * 2


def test_an_endless_iterable_of_texts_is_read_up_to_the_limit():
    def endless():
        while True:
            yield "12345"

    assert read(endless(), limit=ReadLimit(n_documents=1, n_chars=12)).documents == ["12345"] * 3


def test_a_list_is_read_whole():
    assert len(read(["1"] * 300).documents) == 300
    assert len(read_rows([[1, 2]] * 300)) == 300


class _MapStyle:
    def __getitem__(self, index):
        return ROWS[index]


def test_a_map_style_dataset_is_read():
    assert read_rows(_MapStyle()) == ROWS


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        pytest.param(5, "cannot be a int. Give strings, token ids", id="number"),
        pytest.param(None, "cannot be a NoneType", id="none"),
        pytest.param([], "is empty", id="empty"),
        pytest.param([object()], "item 0 of the calibration dataset is a object", id="object"),
        pytest.param([[1, 2], "3"], "mixes text and token ids", id="mixed"),
        pytest.param([[1, 2], [0.5]], "item 1 .*torch.float32; it must hold integers", id="float list"),
        pytest.param(torch.ones(2, 3), "torch.float32; it must hold integers", id="float tensor"),
        pytest.param([torch.tensor([True, False])], "torch.bool; token ids are integers", id="bool tensor"),
        pytest.param([[1, -100]], "holds -100; token ids are not negative", id="negative"),
        pytest.param(torch.ones(2, 2, 2, dtype=torch.int64), "has 3 dimensions", id="3-D"),
        pytest.param([[1, "a"]], "is no list or tensor of integers", id="string in ids"),
        pytest.param([{"ids": [1], "x": 2}], "needs a key input_ids, text or messages; keys seen: ids, x", id="keys"),
        pytest.param([{"text": 5}], "item 0 .* is a int", id="text is no string"),
        pytest.param(
            [{"input_ids": [1, 2], "attention_mask": [1]}], "attention_mask has another shape", id="mask shape"
        ),
        pytest.param([{"input_ids": [1, 2], "attention_mask": [1, 2]}], "must hold only 0 and 1", id="mask values"),
        pytest.param(
            DataLoader(TensorDataset(torch.tensor(ROWS), torch.tensor(ROWS))), "rows or columns", id="ids and labels"
        ),
        pytest.param(DataLoader([[1, 2, 3]] * 2, batch_size=2), "rows or columns", id="collated lists"),
        pytest.param(
            DataLoader([{"input_ids": [1, 2, 3]}] * 2, batch_size=2),
            r"rows or columns.*set_format",
            id="collated dicts",
        ),
    ],
)
def test_bad_objects_say_what_is_wrong(dataset, message):
    with pytest.raises(ConfigError, match=message):
        read(dataset)
