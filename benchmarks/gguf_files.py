"""GGUF files of one model as llama.cpp measures them: ours, llama-quantize's, the reference's; and the time of both.

    python benchmarks/gguf_files.py --tools llama.cpp/build/bin --model DIR --calib calib.txt --text dev.txt
    python benchmarks/gguf_files.py --tools llama.cpp/build/bin --model DIR --time --threads 2

All files come from one bfloat16 file and one calibration text: llama-imatrix runs over windows of `--seqlen` tokens of
it, ours runs over the same windows. `--tuned STEPS` adds a row for tuned rounding. `--reference "PYTHON SCRIPT"` is a
command that takes the reference's options; it reads records, so the windows are written as such. Prints a row for each
mixture and maker: bytes and perplexity.

With `--time`, a random Llama-shaped model of about 1 GB with the vocabulary of `--model` is rounded under one random
importance matrix by both programs in turn. Prints seconds, those of processors in brackets (other programs on the
machine change these little), and the ratio of both.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

MIXES = ("q2_k_s", "q3_k_m", "q4_0", "q4_k_m", "q5_k_m", "q6_k")
NEEDS_IMATRIX = ("q2_k_s",)  # llama-quantize refuses to make it without one
LAYERS = 11  # of the random model, 513 million weights


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", type=Path, required=True, help="folder of llama-quantize and the others")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calib", type=Path, help="text of calibration")
    parser.add_argument("--text", type=Path, nargs="+", default=[], help="texts to measure perplexity on")
    parser.add_argument("--mixes", nargs="+", default=MIXES)
    parser.add_argument("--tuned", type=int, default=0, help="steps of a tuned row (0: none)")
    parser.add_argument("--tuned_mixes", nargs="+", default=("q2_k_s", "q3_k_m"))
    parser.add_argument("--nsamples", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--max_bytes", type=int, default=300_000, help="of each text")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--reference", help="command of the reference's program")
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--layers", type=int, default=LAYERS, help="of the random model")
    return parser.parse_args()


class Bench:
    """Runs the programs; everything is written below one folder."""

    def __init__(self, arguments: argparse.Namespace, work: Path) -> None:
        self.arguments, self.work = arguments, work

    def run(self, command: list[str]) -> str:
        """Returns what a program printed; ends with it if it fails."""
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{shlex.join(command)} failed:\n{done.stderr[-2000:]}")
        return done.stdout + done.stderr

    def ours(self, model: Path, mix: str, name: str, *options: str) -> Path:
        """Returns the file that this package writes."""
        folder = self.work / name
        command = [sys.executable, "-m", "auto_round", "--model", str(model), "--format", f"gguf:{mix}"]
        self.run([*command, "--output_dir", str(folder), "--device", "cpu", *options])
        return next(folder.glob("*.gguf"))

    def quantize(self, whole: Path, mix: str, imatrix: Path | None) -> Path:
        """Returns the file that llama-quantize writes."""
        file = self.work / f"{whole.stem}-{mix}-{'imatrix' if imatrix else 'plain'}.gguf"
        given = ["--imatrix", str(imatrix)] if imatrix else []
        tool, threads = str(self.arguments.tools / "llama-quantize"), str(self.arguments.threads)
        self.run([tool, *given, str(whole), str(file), mix.upper(), threads])
        return file

    def calibration(self) -> tuple[Path, Path]:
        """Returns a text of exactly the windows that are used, and the same as records for the reference."""
        from transformers import AutoTokenizer

        tokenizer, size = AutoTokenizer.from_pretrained(self.arguments.model), self.arguments.seqlen
        text = self.arguments.calib.read_text(encoding="utf-8")
        encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
        windows = min(self.arguments.nsamples, len(encoded["input_ids"]) // size)
        end = encoded["offset_mapping"][min(windows * size + 8, len(encoded["input_ids"]) - 1)][1]
        plain, records = self.work / "calib.txt", self.work / "calib.jsonl"
        plain.write_text(text[:end], encoding="utf-8")
        ids = encoded["input_ids"]
        # A few tokens more: what is cut out may fall into fewer tokens, and the reference drops short records.
        cut = [tokenizer.decode(ids[start : start + size + 4]) for start in range(0, windows * size, size)]
        records.write_text("".join(json.dumps({"text": one}) + "\n" for one in cut), encoding="utf-8")
        return plain, records

    def table(self) -> None:
        """Prints the sizes and perplexities of all files."""
        arguments = self.arguments
        plain, records = self.calibration()
        whole = self.ours(arguments.model, "bf16", "whole", "--iters", "0")
        imatrix = self.work / "imatrix.gguf"
        size, threads = str(arguments.seqlen), str(arguments.threads)
        tool = str(arguments.tools / "llama-imatrix")
        self.run([tool, "-m", str(whole), "-f", str(plain), "-o", str(imatrix), "-c", size, "-t", threads])
        same = ["--dataset", str(plain), "--nsamples", str(arguments.nsamples), "--seqlen", size]
        self.show("", "bf16", whole)
        for mix in arguments.mixes:
            self.show(mix, "ours", self.ours(arguments.model, mix, f"ours-{mix}", "--iters", "0", *same))
            if mix not in NEEDS_IMATRIX:
                self.show(mix, "llama-quantize", self.quantize(whole, mix, None))
            self.show(mix, "llama-quantize --imatrix", self.quantize(whole, mix, imatrix))
            if arguments.reference:
                self.show(mix, "reference", self.reference(mix, records))
            if arguments.tuned and mix in arguments.tuned_mixes:
                options = ["--iters", str(arguments.tuned), *same]
                self.show(mix, f"ours, {arguments.tuned} steps", self.ours(arguments.model, mix, f"t-{mix}", *options))

    def reference(self, mix: str, records: Path) -> Path:
        """Returns the file that the reference writes."""
        folder, arguments = self.work / f"reference-{mix}", self.arguments
        options = ["--model", str(arguments.model), "--format", f"gguf:{mix}", "--iters", "0", "--device", "cpu"]
        options += ["--dataset", str(records), "--nsamples", str(arguments.nsamples), "--seqlen", str(arguments.seqlen)]
        self.run([*shlex.split(arguments.reference), *options, "--output_dir", str(folder)])
        return next(folder.rglob("*.gguf"))

    def show(self, mix: str, maker: str, file: Path) -> None:
        """Prints a row: bytes, and perplexity on each text."""
        cells = []
        for text in self.arguments.text:
            part = self.work / f"part-{text.name}"
            part.write_bytes(text.read_bytes()[: self.arguments.max_bytes])
            tool, threads = str(self.arguments.tools / "llama-perplexity"), str(self.arguments.threads)
            said = self.run([tool, "-m", str(file), "-f", str(part), "-c", "512", "-t", threads])
            found = re.search(r"PPL = ([\d.]+)", said)
            cells.append(f"{text.stem} {found[1] if found else 'none'}")
        print(f"{mix:8} {maker:26} {file.stat().st_size:>12}  {'  '.join(cells)}", flush=True)

    def times(self) -> None:
        """Prints seconds of both programs for each mixture, export and file included, the check after it not."""
        model = self.random_model()
        whole = self.ours(model, "bf16", "random-whole", "--iters", "0")
        imatrix = self.random_imatrix(whole)
        print(f"{whole.stat().st_size / 1e9:.2f} GB in bfloat16, {self.arguments.threads} threads")
        for mix in self.arguments.mixes:
            options = ("--iters", "0", "--imatrix", str(imatrix), "--no_verify")
            ours = self.timed(lambda mix=mix, options=options: self.ours(model, mix, f"random-{mix}", *options))
            theirs = self.timed(lambda mix=mix: self.quantize(whole, mix, imatrix))
            print(
                f"{mix:8} ours {ours[0]:.1f} s ({ours[1]:.1f} s of processors)  llama-quantize {theirs[0]:.1f} s "
                f"({theirs[1]:.1f} s)  ratio {ours[0] / theirs[0]:.2f} ({ours[1] / theirs[1]:.2f})",
                flush=True,
            )

    def timed(self, call: Callable[[], object]) -> tuple[float, float]:
        """Returns seconds on the wall and of processors that the programs of a call took."""
        before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
        call()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return time.monotonic() - started, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    def random_model(self) -> Path:
        """Returns the folder of a random model with the tokenizer of `--model`."""
        import torch
        from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

        tokenizer = AutoTokenizer.from_pretrained(self.arguments.model)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=2048,
            intermediate_size=5632,
            num_hidden_layers=self.arguments.layers,
            num_attention_heads=32,
            num_key_value_heads=8,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
        )
        torch.manual_seed(0)
        folder = self.work / "random"
        torch.set_default_dtype(torch.bfloat16)
        LlamaForCausalLM(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    def random_imatrix(self, whole: Path) -> Path:
        """Returns an importance matrix with heavy-tailed channels for all layers of a file."""
        import gguf
        import torch

        from auto_round.calibration.imatrix import ImportanceEntry, ImportanceMatrix, write_imatrix

        entries = {}
        for tensor in gguf.GGUFReader(whole).tensors:
            if len(tensor.shape) == 2 and tensor.name.startswith("blk."):
                sums = torch.rand(1, int(tensor.shape[0])).add(0.05).log().neg().add(4).square()
                entries[tensor.name] = ImportanceEntry(sums, torch.ones(1))
        file = self.work / "random.gguf"
        write_imatrix(file, ImportanceMatrix(entries, 1, 512, ("random",)))
        return file


def main() -> None:
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory(prefix="gguf-") as folder:
        bench = Bench(arguments, Path(folder))
        if arguments.calib and arguments.text:
            bench.table()
        if arguments.time:
            bench.times()


if __name__ == "__main__":
    main()
