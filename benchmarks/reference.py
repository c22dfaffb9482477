"""Perplexity and seconds of Intel's auto-round on the same tokens as `accuracy.py`, for comparison in one run.

Both packages are called `auto_round`, so this script imports nothing of this one and runs in a process of its own:

    pip install --no-deps --target /tmp/reference auto-round==0.16.1 py-cpuinfo
    PYTHONPATH=/tmp/reference python benchmarks/reference.py --model DIR --calib calib.txt --text dev.txt \\
        --settings '[{"bits": 2, "group_size": 64, "iters": 200}]'

Settings are keywords of the reference's `AutoRound`. Windows are chosen as `accuracy.py` chooses them: the calibration
text as one string, cut into windows, the first `nsamples` of a random order with seed 42.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--calib", required=True)
    parser.add_argument("--text", nargs="+", required=True)
    parser.add_argument("--settings", required=True, help="JSON list of options, or a file of it")
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--nsamples", type=int, default=128)
    parser.add_argument("--max_tokens", type=int, default=300_000)
    return parser.parse_args()


def windows_of(file: str, tokenizer: Any, seqlen: int, max_tokens: int | None = None) -> torch.Tensor:
    """Returns (N, seqlen) token ids."""
    ids = torch.tensor(tokenizer(Path(file).read_text(encoding="utf-8"), verbose=False).input_ids)[:max_tokens]
    return ids[: len(ids) // seqlen * seqlen].view(-1, seqlen)


@torch.no_grad()
def perplexity(model: Any, windows: torch.Tensor, batch_size: int) -> float:
    """Returns exp of the mean negative log-likelihood of every token of each window but its first."""
    total = 0.0
    for batch in windows.split(batch_size):
        batch = batch.to(model.device)
        logits = model(batch, use_cache=False).logits[:, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"))
    return math.exp(total / (windows.shape[0] * (windows.shape[1] - 1)))


def measure(arguments: argparse.Namespace, options: dict[str, Any]) -> str:
    """Returns one line: options, perplexities, seconds of quantization."""
    from auto_round import AutoRound

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.bfloat16).to(device).eval()
    windows = windows_of(arguments.calib, tokenizer, arguments.seqlen)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(42))[: arguments.nsamples]
    dataset = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in windows[order]]
    started = time.monotonic()
    quantizer = AutoRound(
        model, tokenizer, dataset=dataset, nsamples=arguments.nsamples, seqlen=arguments.seqlen, device_map=device,
        **{"iters": 200, "low_cpu_mem_usage": False, **options},
    )  # fmt: skip
    quantizer.quantize()
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.monotonic() - started
    model = quantizer.model.to(device, torch.bfloat16).eval()
    scores = []
    for text in arguments.text:
        found = windows_of(text, tokenizer, arguments.seqlen, arguments.max_tokens)
        scores.append(f"{Path(text).stem} {perplexity(model, found, 32 if device == 'cuda' else 8):.3f}")
    return f"{json.dumps(options)}  {'  '.join(scores)}  {seconds:.1f} s"


def main() -> None:
    arguments = parse_arguments()
    file = Path(arguments.settings)
    for options in json.loads(file.read_text() if file.suffix == ".json" else arguments.settings):
        try:
            print(measure(arguments, options), flush=True)
        except Exception as error:  # one setting the reference cannot run must not hide the others
            print(f"{json.dumps(options)}  failed: {type(error).__name__}: {error}", flush=True)


if __name__ == "__main__":
    main()
