"""How two models predict the same text: perplexity of both, divergence of the second from the first, agreement.

Shape letters: N samples, T tokens, V words.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Predictions:
    """Means over all positions of the text whose next token is known and real.

    Attributes:
        positions: how many there are.
        perplexity, quantized_perplexity: exp of the mean negative log-likelihood of the next token.
        kl_mean: KL(16-bit || quantized) in nats.
        kl_error: standard error of the mean, from the means of the windows; None for a single window.
        kl_median, kl_p99, kl_max: of single positions.
        top1: share of positions at which both models find the same token likeliest, 0 to 1.
    """

    positions: int
    perplexity: float
    quantized_perplexity: float
    kl_mean: float
    kl_error: float | None
    kl_median: float
    kl_p99: float
    kl_max: float
    top1: float


def compared(wanted_NTV: Tensor, found_NTV: Tensor, ids_NT: Tensor) -> Tensor:
    """Returns (4, N, T - 1) float32: likelihood loss of both models, KL(wanted || found), 1 where they agree.

    Args:
        wanted_NTV, found_NTV: logits of the original and the quantized model, any float dtype.
        ids_NT: int64, the tokens of the text.
    """
    following = ids_NT[:, 1:, None]
    wanted, found = (logits[:, :-1].float().log_softmax(-1) for logits in (wanted_NTV, found_NTV))
    agree = (wanted.argmax(-1) == found.argmax(-1)).float()
    losses = [-logs.gather(-1, following)[..., 0] for logs in (wanted, found)]
    kl = torch.nn.functional.kl_div(found, wanted, reduction="none", log_target=True).sum(-1)
    # Where both agree to the last bit but a few, rounding makes sums below zero, which no divergence is.
    return torch.stack([*losses, kl.clamp_min(0), agree])


def summarized(per_token_4NT: Tensor, mask_NT: Tensor | None) -> Predictions:
    """Returns means and quantiles of what `compared` gave, over real tokens whose next token is real too.

    Args:
        mask_NT: bool, of all T + 1 tokens of a window; None when nothing is padded.
    """
    losses, quantized, kl, agree = per_token_4NT.double()
    real = torch.ones_like(kl, dtype=torch.bool) if mask_NT is None else mask_NT[:, 1:] & mask_NT[:, :-1]
    windows = torch.stack([window[own].mean() for window, own in zip(kl, real, strict=True) if own.any()])
    spread = float(windows.std() / math.sqrt(len(windows))) if len(windows) > 1 else None
    seen = kl[real].sort().values
    return Predictions(
        positions=int(real.sum()),
        perplexity=math.exp(float(losses[real].mean())),
        quantized_perplexity=_exp(float(quantized[real].mean())),
        kl_mean=float(seen.mean()),
        kl_error=spread,
        kl_median=float(seen[(len(seen) - 1) // 2]),
        kl_p99=float(seen[math.ceil(0.99 * len(seen)) - 1]),
        kl_max=float(seen[-1]),
        top1=float(agree[real].mean()),
    )


def _exp(loss: float) -> float:
    """Returns exp, infinite where it is too large for a float: a quantized model may be that bad."""
    return math.exp(loss) if loss < 700 else math.inf
