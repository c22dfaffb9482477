"""Perplexity on a text, built in; task scores through lm-eval, an optional package."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from auto_round.device import compute_device
from auto_round.errors import CalibrationError, ConfigError, UnsupportedError, require
from auto_round.formats import Exporter
from auto_round.models.auto_class import auto_class

DEFAULT_TASKS = (
    "lambada_openai,hellaswag,winogrande,piqa,mmlu,wikitext,truthfulqa_mc1,openbookqa,boolq,arc_easy,arc_challenge"
)


EXACT_BACKEND = "auto_round:torch"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EvalSettings:
    """How a model folder is measured.

    Attributes:
        seqlen: tokens of a window of perplexity.
        max_tokens: use only the first so many tokens of the text; None for all.
        batch_size: windows, or samples of tasks, at a time.
    Raises:
        ConfigError: a number is too small; all are reported together.
    """

    seqlen: int = 512
    max_tokens: int | None = None
    batch_size: int = 8
    device: str = "auto"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        problems = []
        if self.seqlen < 2:
            problems.append(f"perplexity seqlen={self.seqlen} (at least 2, so that there is a token to predict)")
        if self.max_tokens is not None and self.max_tokens < 1:
            problems.append(f"perplexity tokens={self.max_tokens} (must be positive)")
        if self.batch_size < 1:
            problems.append(f"evaluation batch_size={self.batch_size} (must be positive)")
        if problems:
            raise ConfigError("; ".join(problems))


def text_windows(file: str | Path, tokenizer: Any, *, seqlen: int, max_tokens: int | None = None) -> Tensor:
    """Returns (N, seqlen) token ids: the file tokenized as one string, cut into windows, the rest dropped.

    Args:
        max_tokens: use no more than the first so many tokens.
    Raises:
        ConfigError: no such file. CalibrationError: fewer tokens than one window.
    """
    path = Path(file)
    if not path.is_file():
        raise ConfigError(f"no text file '{file}' to measure perplexity on")
    ids = torch.tensor(tokenizer(path.read_text(encoding="utf-8"), verbose=False).input_ids)[:max_tokens]
    count = ids.numel() // seqlen
    if count == 0:
        raise CalibrationError(
            f"{file} has {ids.numel()} tokens, fewer than one window of {seqlen}. Lower --ppl_seqlen"
        )
    return ids[: count * seqlen].view(count, seqlen)


@torch.no_grad()
def perplexity(model: Any, windows_NT: Tensor, *, batch_size: int = 8) -> float:
    """Returns exp of the mean negative log-likelihood of every token of each window but its first."""
    device = next(model.parameters()).device
    total = 0.0
    for batch in windows_NT.split(batch_size):
        logits = model(batch.to(device), use_cache=False).logits[:, :-1].float()
        wanted = batch[:, 1:].to(device)
        total += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum"))
    return math.exp(total / (windows_NT.shape[0] * (windows_NT.shape[1] - 1)))


def check_formats(exporters: Sequence[Exporter]) -> None:
    """Raises UnsupportedError if a run would write formats that cannot be measured afterwards."""
    names = [exporter.name for exporter in exporters if not exporter.capability.loads_here]
    if names:
        raise UnsupportedError(
            f"{', '.join(names)} cannot be evaluated here, as Transformers does not load it. Leave out --ppl and "
            "--tasks, or evaluate the same weights written with --format fake"
        )


def load_for_evaluation(model: str | Path, settings: EvalSettings) -> Any:
    """Returns a model folder loaded through Transformers; GPTQ and AWQ checkpoints by this package's own loader.

    On a CPU a quantized one is computed exactly: faster backends round activations to 8 bits, and the figures are to
    say what the rounding of weights costs.
    """
    from transformers import AutoConfig, AutoRoundConfig

    where, trust = compute_device(settings.device), settings.trust_remote_code
    config = AutoConfig.from_pretrained(model, trust_remote_code=trust)
    method = dict(getattr(config, "quantization_config", None) or {}).get("quant_method")
    backend = EXACT_BACKEND if where.type == "cpu" else "auto"
    ours = method in ("auto-round", "gptq", "awq")
    options = {"quantization_config": AutoRoundConfig(backend=backend)} if ours else {}
    loaded = auto_class(config).from_pretrained(
        model, dtype="auto", device_map=where, trust_remote_code=trust, **options
    )
    return loaded.eval()


def perplexity_of_folder(model: str | Path, file: str | Path, settings: EvalSettings) -> float:
    """Returns the perplexity of a model folder, 16-bit or quantized, on a text file.

    Raises:
        ConfigError: no such file, or no tokenizer beside the model. CalibrationError: the file is too short.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=settings.trust_remote_code)
    except (OSError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise ConfigError(f"{model} has no tokenizer that loads, so no text can be measured on it ({first})") from error
    windows = text_windows(file, tokenizer, seqlen=settings.seqlen, max_tokens=settings.max_tokens)
    return perplexity(load_for_evaluation(model, settings), windows, batch_size=settings.batch_size)


def require_task_packages() -> None:
    """Raises MissingDependencyError if `task_scores` would, so that a run can ask before its work."""
    require("lm_eval", needed_for="--tasks", install="auto-round[eval]")


def task_scores(model: str | Path, tasks: str, settings: EvalSettings) -> dict[str, Any]:
    """Returns lm-eval's results for a model folder, by task.

    Raises:
        MissingDependencyError: lm-eval is not installed.
    """
    require_task_packages()
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    loaded = load_for_evaluation(model, settings)
    wrapped = HFLM(pretrained=loaded, tokenizer=str(model), batch_size=settings.batch_size)
    return dict(simple_evaluate(model=wrapped, tasks=tasks.split(","))["results"])
