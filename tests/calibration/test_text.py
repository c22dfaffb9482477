import pytest
import torch

from auto_round.calibration.text import choose_windows, drop_short, join_windows, pad_documents, tokenize_documents

EOS, BOS, USER = 1000, 1003, 1005


def as_lists(tensors):
    return [tensor.tolist() for tensor in tensors]


def ids(*values):
    return torch.tensor(values, dtype=torch.int64)


def test_ids_are_those_of_the_tokenizer(tokenizer):
    documents = tokenize_documents(["1 2 3", "4"], tokenizer)
    assert as_lists(documents) == [[1, 2, 3], [4]]
    assert all(document.dtype == torch.int64 for document in documents)


def test_special_tokens_of_the_tokenizer_are_kept(make_tokenizer):
    assert as_lists(tokenize_documents(["1 2"], make_tokenizer(adds_bos=True))) == [[BOS, 1, 2]]


def test_blank_documents_are_left_out(make_tokenizer):
    assert as_lists(tokenize_documents(["1", "", " \n"], make_tokenizer(adds_bos=True))) == [[BOS, 1]]


def test_a_templated_text_gets_no_more_special_tokens(chat_tokenizer):
    documents = tokenize_documents(["1", [{"role": "user", "content": "2"}], "3"], chat_tokenizer)
    assert as_lists(documents) == [[BOS, 1], [USER, 2, EOS], [BOS, 3]]


def test_documents_keep_their_order_over_tokenizer_batches(tokenizer):
    documents = tokenize_documents([str(number) for number in range(600)], tokenizer)
    assert as_lists(documents) == [[number] for number in range(600)]


def test_no_warning_about_long_texts(tokenizer, caplog):
    tokenizer.model_max_length = 4
    tokenize_documents(["1 2 3 4 5 6"], tokenizer)
    assert not caplog.records


@pytest.mark.parametrize(
    ("documents", "windows"),
    [
        pytest.param([ids(1, 2, 3, 4)], [[1, 2], [3, 4]], id="one document gets no eos"),
        pytest.param([ids(1, 2, 3), ids(4, 5)], [[1, 2], [3, EOS], [4, 5]], id="eos between"),
        pytest.param([ids(1, EOS), ids(4, 5)], [[1, EOS], [4, 5]], id="no second eos"),
        pytest.param([ids(1, 2, 3)], [[1, 2]], id="tail dropped"),
        pytest.param([ids(1)], [[1]], id="only a tail"),
        pytest.param([ids(), ids(1), ids()], [[1]], id="empty documents"),
        pytest.param([], [], id="nothing"),
    ],
)
def test_joining_and_cutting(documents, windows):
    assert join_windows(documents, 2, eos_id=EOS).tolist() == windows


def test_without_an_eos_documents_touch():
    assert join_windows([ids(1), ids(2, 3, 4)], 2, eos_id=None).tolist() == [[1, 2], [3, 4]]


def test_padding_keeps_each_document_apart():
    samples = pad_documents([ids(1, 2, 3, 4), ids(5, 6)], 3, pad_id=9)
    assert samples.input_ids.tolist() == [[1, 2, 3], [5, 6, 9]]
    assert samples.attention_mask.tolist() == [[True, True, True], [True, True, False]]


def test_padding_goes_to_the_longest_document_only():
    samples = pad_documents([ids(1, 2), ids(5, 6)], 100, pad_id=9)
    assert samples.input_ids.tolist() == [[1, 2], [5, 6]]
    assert samples.attention_mask is None


def test_only_documents_under_two_tokens_are_dropped():
    assert as_lists(drop_short([ids(), ids(1), ids(1, 2)])) == [[1, 2]]


def test_the_choice_is_the_head_of_a_seeded_permutation():
    expected = torch.randperm(10, generator=torch.Generator().manual_seed(42))[:4]
    assert choose_windows(10, 4, 42).tolist() == expected.tolist()


def test_the_choice_has_no_window_twice_and_at_most_all():
    assert sorted(choose_windows(5, 128, 0).tolist()) == [0, 1, 2, 3, 4]


def test_the_choice_leaves_the_global_generator_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    choose_windows(5, 3, 0)
    assert torch.equal(torch.get_rng_state(), before)
