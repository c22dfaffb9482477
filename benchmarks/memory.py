"""Peak memory of quantizing a checkpoint of random weights, measured from outside.

    python benchmarks/memory.py --folder /tmp/random_model --gigabytes 3

Makes a Llama-shaped checkpoint of at least that size (once), quantizes it by plain rounding and by two steps of tuning,
and prints the peak anonymous resident memory of each run: what the process itself holds. Pages of mapped weight files
are page cache, which the system takes back at will, and are not counted.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

DEMO = Path(__file__).parent.parent / "examples" / "demo_model"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="folder for the random checkpoint and the results")
    parser.add_argument("--gigabytes", type=float, default=3.0)
    return parser.parse_args()


def make_checkpoint(folder: Path, gigabytes: float) -> int:
    """Writes a checkpoint of at least `gigabytes`, shard by shard, and returns its bytes of weights."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from auto_round.shards import ShardWriter

    config = LlamaConfig(
        vocab_size=4096, hidden_size=2048, intermediate_size=5632, num_hidden_layers=1, num_attention_heads=16,
        num_key_value_heads=8, max_position_embeddings=2048, tie_word_embeddings=False, dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    with torch.device("meta"):
        layer_bytes = 2 * sum(p.numel() for p in LlamaForCausalLM(config).model.layers.parameters())
        config.num_hidden_layers = int(gigabytes * 1e9 / layer_bytes) + 1
        model = LlamaForCausalLM(config)
    writer = ShardWriter(folder, 500_000_000)
    generator, total = torch.Generator().manual_seed(0), 0
    for name, parameter in model.named_parameters():
        shape = parameter.shape
        value = torch.randn(shape, generator=generator).mul_(0.02) if len(shape) > 1 else torch.ones(shape)
        writer.add(name, value.to(torch.bfloat16))
        total += 2 * parameter.numel()
    writer.close()
    config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(DEMO / "model").save_pretrained(folder)
    return total


def peak_anonymous_memory(command: list[str]) -> tuple[int, float]:
    """Runs a command and returns its peak anonymous resident memory in bytes, and its seconds (Linux only)."""
    started, peak = time.monotonic(), 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        lines = [line for line in status.splitlines() if line.startswith("RssAnon")]
        peak = max([peak] + [int(line.split()[1]) * 1024 for line in lines])
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    return peak, time.monotonic() - started


def main() -> None:
    arguments = parse_arguments()
    model = arguments.folder / "model"
    if not (model / "config.json").is_file():
        make_checkpoint(model, arguments.gigabytes)
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    base = [sys.executable, "-m", "auto_round", "--model", str(model), "--bits", "4"]
    data = ["--dataset", str(DEMO / "calib.jsonl"), "--nsamples", "8", "--seqlen", "128", "--batch_size", "4"]
    runs = {"plain rounding": ["--iters", "0", "--disable_opt_rtn"], "2 iterations": ["--iters", "2", *data]}
    for name, options in runs.items():
        output = ["--output_dir", str(arguments.folder / "out"), "--max_shard_size", "500MB"]
        peak, seconds = peak_anonymous_memory([*base, *options, *output])
        print(json.dumps({"run": name, "model_GB": round(size / 1e9, 2), "peak_GB": round(peak / 1e9, 2),
                          "share": round(peak / size, 3), "seconds": round(seconds, 1)}), flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
