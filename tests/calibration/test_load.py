import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from auto_round.calibration import CalibrationSet, load_calibration
from auto_round.calibration.load import share_budget
from auto_round.errors import CalibrationError, ConfigError

EOS, PAD, SYSTEM, USER = 1000, 1001, 1004, 1005
SHARED = Path(__file__).parents[3] / "shared"


@pytest.fixture
def text_file(tmp_path, count_text):
    """100 tokens: 0..99."""
    path = tmp_path / "count.txt"
    path.write_text(count_text(0, 100))
    return path


@pytest.fixture
def documents_file(tmp_path):
    """Documents of 3, 1, 5 and 2 tokens."""
    path = tmp_path / "documents.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in ["1 2 3", "4", "5 6 7 8 9", "10 11"]))
    return path


def permutation(n, nsamples, seed):
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:nsamples]


def test_windows_of_a_text_are_chosen_by_the_contract(text_file, tokenizer):
    samples = load_calibration(str(text_file), tokenizer, nsamples=4, seqlen=8, seed=7)
    windows = torch.arange(96).view(12, 8)
    assert torch.equal(samples.input_ids, windows[permutation(12, 4, 7)])
    assert samples.attention_mask is None
    assert samples.n_tokens == 32


def test_a_path_object_is_a_file(text_file, tokenizer):
    by_name = load_calibration(str(text_file), tokenizer, nsamples=4, seqlen=8)
    assert torch.equal(load_calibration(text_file, tokenizer, nsamples=4, seqlen=8).input_ids, by_name.input_ids)


def test_the_same_seed_gives_the_same_samples_and_another_does_not(text_file, tokenizer):
    first, again, other = (
        load_calibration(str(text_file), tokenizer, nsamples=4, seqlen=8, seed=seed).input_ids for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_documents_are_joined_by_default(documents_file, tokenizer):
    samples = load_calibration(str(documents_file), tokenizer, nsamples=4, seqlen=14)
    assert samples.input_ids.tolist() == [[1, 2, 3, EOS, 4, EOS, 5, 6, 7, 8, 9, EOS, 10, 11]]


def test_documents_can_be_padded_instead(documents_file, tokenizer):
    samples = load_calibration(f"{documents_file}:concat=False", tokenizer, nsamples=4, seqlen=4, seed=0)
    rows = torch.tensor([[1, 2, 3, PAD], [5, 6, 7, 8], [10, 11, PAD, PAD]])
    order = permutation(3, 4, 0)
    assert torch.equal(samples.input_ids, rows[order])
    assert torch.equal(samples.attention_mask, (rows != PAD)[order])
    assert samples.n_tokens == 9


def test_several_datasets_share_the_samples_in_order(text_file, tmp_path, tokenizer, count_text):
    other = tmp_path / "other.txt"
    other.write_text(count_text(500, 600))
    samples = load_calibration(f"{text_file}, {other}", tokenizer, nsamples=5, seqlen=10, seed=3)
    first = torch.arange(100).view(10, 10)[permutation(10, 3, 3)]
    second = torch.arange(500, 600).view(10, 10)[permutation(10, 2, 3)]
    assert torch.equal(samples.input_ids, torch.cat([first, second]))


def test_num_sets_the_share_of_a_dataset(text_file, tmp_path, tokenizer, count_text):
    other = tmp_path / "other.txt"
    other.write_text(count_text(500, 600))
    samples = load_calibration(f"{text_file}:num=1,{other}", tokenizer, nsamples=5, seqlen=10)
    assert (samples.input_ids[:, 0] >= 500).tolist() == [False, True, True, True, True]


def test_a_short_dataset_beside_a_long_one_is_padded(text_file, tmp_path, tokenizer):
    short = tmp_path / "short.txt"
    short.write_text("7 8 9")
    samples = load_calibration(f"{text_file},{short}", tokenizer, nsamples=4, seqlen=10)
    assert len(samples) == 3
    assert samples.input_ids[2].tolist() == [7, 8, 9, *[PAD] * 7]
    assert samples.attention_mask.sum(dim=1).tolist() == [10, 10, 3]


@pytest.mark.parametrize(
    ("nums", "nsamples", "shares"),
    [
        ([None], 128, [128]),
        ([None, None, None], 128, [43, 43, 42]),
        ([None, 256, None], 512, [128, 256, 128]),
        ([10, 20], 128, [10, 20]),
        ([256], 128, [128]),
        ([None, 256, None], 128, [43, 43, 42]),
        ([100, 5, None], 90, [43, 5, 42]),
        ([1, 1], 2, [1, 1]),
    ],
)
def test_shares_of_the_samples(nums, nsamples, shares):
    assert share_budget(nums, nsamples) == shares


def test_fewer_samples_than_datasets_is_an_error():
    with pytest.raises(ConfigError, match="nsamples=2 is fewer than the 3 datasets"):
        share_budget([None] * 3, 2)


def test_chat_template_and_system_prompt(tmp_path, chat_tokenizer):
    (tmp_path / "chat.json").write_text(json.dumps([{"messages": [{"role": "user", "content": "5"}]}]))
    samples = load_calibration(f'{tmp_path}/chat.json:system_prompt="1, 2"', chat_tokenizer, nsamples=1, seqlen=6)
    unknown_1_comma = 1002
    assert samples.input_ids.tolist() == [[SYSTEM, unknown_1_comma, 2, EOS, USER, 5]]


def test_texts_are_joined(tokenizer):
    assert load_calibration(["1 2", "3"], tokenizer, nsamples=1, seqlen=4).input_ids.tolist() == [[1, 2, EOS, 3]]


def test_token_ids_need_no_tokenizer_and_follow_the_same_choice():
    windows = torch.arange(80).view(10, 8)
    expected = windows[permutation(10, 4, 42)]
    for dataset in (windows, list(windows), windows.tolist(), {"input_ids": windows}, torch.arange(83)):
        assert torch.equal(load_calibration(dataset, nsamples=4, seqlen=8).input_ids, expected)


def test_rows_of_token_ids_are_cut_and_padded():
    samples = load_calibration([[1, 2, 3, 4, 5], [6, 7]], nsamples=2, seqlen=3, seed=0)
    order = permutation(2, 2, 0)
    assert torch.equal(samples.input_ids, torch.tensor([[1, 2, 3], [6, 7, 0]])[order])
    assert torch.equal(samples.attention_mask, torch.tensor([[True] * 3, [True, True, False]])[order])


def test_a_loader_gives_its_first_samples():
    loader = DataLoader(torch.arange(80).view(10, 8), batch_size=2)
    samples = load_calibration(loader, nsamples=4, seqlen=8)
    assert sorted(samples.input_ids[:, 0].tolist()) == [0, 8, 16, 24]


def test_a_set_is_returned_as_it_is(caplog):
    given = CalibrationSet(torch.ones(2, 3, dtype=torch.int64))
    with caplog.at_level(logging.INFO):
        assert load_calibration(given, nsamples=1, seqlen=2) is given
    assert "2 samples with 6 tokens" in caplog.text


def test_the_effective_numbers_are_logged(text_file, tokenizer, caplog):
    with caplog.at_level(logging.INFO):
        load_calibration(str(text_file), tokenizer, nsamples=4, seqlen=10)
    assert [record.getMessage() for record in caplog.records] == ["calibration: 4 samples with 40 tokens"]


def test_too_few_samples_are_a_warning(text_file, tokenizer, caplog):
    assert len(load_calibration(str(text_file), tokenizer, nsamples=128, seqlen=10)) == 10
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "only 10 of nsamples=128 samples (100 tokens)" in warning.getMessage()


def test_unusable_samples_are_counted_in_a_warning(caplog):
    load_calibration([[1, 2], [3], torch.ones(0, dtype=torch.int64)], nsamples=1, seqlen=2)
    assert "2 samples have under two tokens" in caplog.text


def test_less_than_one_window_is_an_error(text_file, tokenizer):
    message = r"has 100 tokens, one sample takes seqlen=101.*lower --seqlen to at most 100.*concat=False"
    with pytest.raises(CalibrationError, match=message):
        load_calibration(str(text_file), tokenizer, seqlen=101)
    with pytest.raises(CalibrationError, match=r"has 3 tokens.*giving token ids"):
        load_calibration(["1 2 3"], tokenizer, seqlen=4)


@pytest.mark.parametrize(
    ("dataset", "error", "message"),
    [
        (
            "pile-10",
            ConfigError,
            r"'pile-10' is no known name and no file. Did you mean 'pile-10k'\? Known: BAAI.*\.jsonl",
        ),
        ("none.json", ConfigError, "none.json does not exist"),
        ("{tmp}", ConfigError, "is a directory"),
        ("{tmp}/data.csv", ConfigError, "ends in '.csv'"),
        ("{tmp}/blank.txt:split=test", ConfigError, "is a local file, it has no split test"),
        ("{tmp}/blank.txt", CalibrationError, "blank.txt has only 0 tokens"),
        ("{tmp}/blank.txt:concat=False", CalibrationError, "has no sample of two tokens"),
        ("{tmp}/one.txt:apply_chat_template", ConfigError, "this tokenizer has none"),
        ("{tmp}/one.txt,none.json", ConfigError, "none.json does not exist"),
    ],
)
def test_bad_datasets_say_what_is_wrong(tmp_path, tokenizer, dataset, error, message):
    for name, content in (("data.csv", "1"), ("blank.txt", " \n"), ("one.txt", "1")):
        (tmp_path / name).write_text(content)
    with pytest.raises(error, match=message):
        load_calibration(dataset.format(tmp=tmp_path), tokenizer, seqlen=4)


def test_the_only_split_of_a_local_file_is_train(text_file, tokenizer):
    assert len(load_calibration(f"{text_file}:train", tokenizer, nsamples=2, seqlen=4)) == 2


@pytest.mark.parametrize("options", [{"nsamples": 0}, {"seqlen": 1}])
def test_bad_numbers_are_refused(options):
    with pytest.raises(ConfigError, match="nsamples of at least 1 and seqlen of at least 2"):
        load_calibration([[1, 2]], **options)


def test_text_needs_a_tokenizer(text_file):
    for dataset in (str(text_file), ["1 2 3"]):
        with pytest.raises(ConfigError, match="calibration text needs a tokenizer"):
            load_calibration(dataset, seqlen=2)


def test_importing_calibration_is_light():
    code = (
        "import sys, auto_round.calibration;"
        "print({'transformers', 'datasets', 'huggingface_hub', 'jinja2'} & set(sys.modules))"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.stdout == "set()\n", done.stderr


@pytest.mark.skipif(not (SHARED / "text/tinystories.txt").is_file(), reason="needs ../shared")
def test_a_real_text_gives_the_ids_of_the_tokenizer():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(SHARED / "models/lm-6m")
    path = SHARED / "text/tinystories.txt"
    stream = torch.tensor(tokenizer(path.read_text(encoding="utf-8"), verbose=False).input_ids)
    windows = stream[: len(stream) // 128 * 128].view(-1, 128)
    samples = load_calibration(str(path), tokenizer, nsamples=16, seqlen=128)
    assert torch.equal(samples.input_ids, windows[permutation(len(windows), 16, 42)])


def test_windows_that_follow_in_the_permutation_are_held_out(text_file, tokenizer):
    samples = load_calibration(str(text_file), tokenizer, nsamples=4, seqlen=8, seed=7, held_out=3)
    windows = torch.arange(96).view(12, 8)
    assert torch.equal(samples.input_ids, windows[permutation(12, 4, 7)])
    assert torch.equal(samples.held_out.input_ids, windows[permutation(12, 7, 7)[4:]])


def test_no_more_is_held_out_than_is_left(text_file, tokenizer):
    assert len(load_calibration(str(text_file), tokenizer, nsamples=10, seqlen=8, held_out=5).held_out) == 2
    assert load_calibration(str(text_file), tokenizer, nsamples=12, seqlen=8, held_out=5).held_out is None


def test_documents_are_held_out_as_they_are_drawn(tokenizer):
    rows = [torch.arange(start, start + 4 + start % 3) for start in range(9)]
    samples = load_calibration(rows, tokenizer, nsamples=3, seqlen=16, seed=5, held_out=2)
    order = permutation(9, 5, 5).tolist()
    found = [ids[mask].tolist() for ids, mask in zip(*_padded(samples.held_out), strict=True)]
    assert found == [rows[index].tolist() for index in order[3:]]


def test_datasets_share_what_is_held_out(text_file, documents_file, tokenizer):
    samples = load_calibration(
        f"{text_file},{documents_file}:concat=False", tokenizer, nsamples=4, seqlen=8, held_out=2
    )
    assert len(samples) == 4
    assert len(samples.held_out) == 2


def _padded(samples):
    mask = samples.attention_mask
    return samples.input_ids, torch.ones_like(samples.input_ids, dtype=torch.bool) if mask is None else mask
