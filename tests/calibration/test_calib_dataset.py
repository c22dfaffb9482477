import torch

from auto_round.calib_dataset import CALIB_DATASETS, get_dataloader, get_dataset
from auto_round.calibration import load_calibration


def test_the_dataset_is_a_list_of_dicts(tokenizer, count_text):
    text = [count_text(0, 100)]
    samples = get_dataset(tokenizer, 10, text, seed=1, nsamples=4)
    expected = load_calibration(text, tokenizer, nsamples=4, seqlen=10, seed=1).input_ids
    assert [sample["input_ids"].tolist() for sample in samples] == expected.tolist()
    assert all(sample["attention_mask"].tolist() == [1] * 10 for sample in samples)


def test_padding_shows_in_the_mask(tokenizer):
    samples = get_dataset(tokenizer, 10, [[1, 2, 3], [4, 5]], nsamples=2)
    assert sorted(sample["attention_mask"].tolist() for sample in samples) == [[1, 1, 0], [1, 1, 1]]


def test_the_loader_keeps_the_order_in_batches(tokenizer, count_text):
    text = [count_text(0, 100)]
    batches = list(get_dataloader(tokenizer, seqlen=10, dataset_name=text, bs=3, nsamples=4))
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(3, 10), (1, 10)]
    flat = torch.cat([batch["input_ids"] for batch in batches])
    assert torch.equal(flat, load_calibration(text, tokenizer, nsamples=4, seqlen=10).input_ids)


def test_the_known_names_are_those_of_the_registry():
    assert "NeelNanda/pile-10k" in CALIB_DATASETS
