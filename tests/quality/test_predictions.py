import math

import pytest
import torch

from auto_round.quality.predictions import compared, summarized


def test_two_words_are_compared_by_hand():
    """Probabilities 3/4 and 1/4 against 1/2 each; the next token is the first word, then the second."""
    wanted = torch.tensor([[[3.0, 1.0], [3.0, 1.0], [1.0, 1.0]]]).log()
    found = torch.tensor([[[2.0, 2.0], [1.0, 3.0], [1.0, 1.0]]]).log()
    loss, quantized, kl, agree = compared(wanted, found, torch.tensor([[1, 0, 1]]))
    assert loss.tolist() == [pytest.approx([math.log(4 / 3), math.log(4)])]
    assert quantized.tolist() == [pytest.approx([math.log(2), math.log(4 / 3)])]
    first = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert kl.tolist() == [pytest.approx([first, 0.5 * math.log(3)])]
    assert agree.tolist() == [[1, 0]]  # a tie is the first word's


def test_the_same_logits_do_not_diverge():
    logits = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    loss, quantized, kl, agree = compared(logits, logits, torch.zeros(2, 5, dtype=torch.int64))
    assert torch.equal(loss, quantized)
    assert not kl.any()
    assert agree.all()


def test_means_and_quantiles_are_of_real_tokens():
    kl = torch.arange(1.0, 101.0).view(2, 50)
    per_token = torch.stack([torch.full((2, 50), math.log(8)), torch.full((2, 50), math.log(9)), kl, (kl > 25).float()])
    found = summarized(per_token, None)
    assert (found.positions, found.kl_mean, found.kl_median, found.kl_p99, found.kl_max) == (100, 50.5, 50, 99, 100)
    assert found.perplexity == pytest.approx(8)
    assert found.quantized_perplexity == pytest.approx(9)
    assert found.top1 == 0.75
    # means of the windows are 25.5 and 75.5: their spread over the root of 2
    assert found.kl_error == pytest.approx(torch.tensor([25.5, 75.5]).std().item() / math.sqrt(2))
    mask = torch.ones(2, 51, dtype=torch.bool)
    mask[1] = False
    half = summarized(per_token, mask)
    assert (half.positions, half.kl_mean, half.kl_max, half.kl_error) == (50, 25.5, 50, None)


def test_a_token_counts_only_if_it_and_the_one_before_are_real():
    per_token = torch.ones(4, 1, 3)
    mask = torch.tensor([[True, True, False, True]])
    assert summarized(per_token, mask).positions == 1


def test_a_model_that_is_lost_has_infinite_perplexity():
    per_token = torch.full((4, 1, 3), 2000.0)
    per_token[0] = 1.0
    assert summarized(per_token, None).quantized_perplexity == math.inf
