"""Perplexity of one model under several settings and seeds, in one process.

    python benchmarks/accuracy.py --model DIR --calib calib.txt --text dev.txt --settings settings.json

`settings.json` holds a list of option dictionaries (the keywords of `AutoRound`), each run with every seed. The first
128 windows of the calibration text are those that `--dataset FILE` takes with seed 42, whatever the seed of tuning.
Prints one line for each run and the mean and spread of each setting.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from auto_round import AutoRound
from auto_round.calibration import load_calibration
from auto_round.evaluation import perplexity, text_windows


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--calib", required=True)
    parser.add_argument("--text", nargs="+", required=True, help="text files to measure perplexity on")
    parser.add_argument("--settings", required=True, help="JSON list of options, or a file of it")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--nsamples", type=int, default=128)
    parser.add_argument("--max_tokens", type=int, default=300_000)
    parser.add_argument("--json", help="write all results here")
    return parser.parse_args()


def measure(arguments: argparse.Namespace, options: dict[str, Any], seed: int) -> dict[str, Any]:
    """Returns seconds and perplexities of one run."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    nsamples = options.get("nsamples", arguments.nsamples)
    data = load_calibration(arguments.calib, tokenizer, nsamples=nsamples, seqlen=arguments.seqlen, seed=42)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.bfloat16).to(device).eval()
    started = time.monotonic()
    if options:
        options = {"nsamples": nsamples, "seqlen": arguments.seqlen, **options}
        quantizer = AutoRound(model, tokenizer, dataset=data, seed=seed, device=device, **options)
        quantizer.quantize()
        for name, quantize_input in quantizer.input_quantizers().items():
            model.get_submodule(name).register_forward_pre_hook(
                lambda _module, inputs, quantize_input=quantize_input: (quantize_input(inputs[0]),)
            )
    seconds = time.monotonic() - started
    scores = {}
    for text in arguments.text:
        windows = text_windows(text, tokenizer, seqlen=arguments.seqlen, max_tokens=arguments.max_tokens)
        scores[Path(text).stem] = perplexity(model, windows, batch_size=32 if device == "cuda" else 8)
    return {"options": options, "seed": seed, "seconds": seconds, "perplexity": scores}


def main() -> None:
    arguments = parse_arguments()
    file = Path(arguments.settings)
    settings = json.loads(file.read_text() if file.suffix == ".json" else arguments.settings)
    results = []
    for options in settings:
        seeds = arguments.seeds if options.get("iters", 0) else arguments.seeds[:1]
        runs = [measure(arguments, options, seed) for seed in seeds]
        results += runs
        shown = []
        for text in runs[0]["perplexity"]:
            values = [run["perplexity"][text] for run in runs]
            spread = max(values) - min(values)
            shown.append(f"{text} {statistics.mean(values):.3f} (spread {spread:.3f})")
        seconds = statistics.mean(run["seconds"] for run in runs)
        print(f"{json.dumps(options)}  {'  '.join(shown)}  {seconds:.1f} s", flush=True)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
