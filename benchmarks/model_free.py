"""Rounding without the model, here and in Intel's auto-round, as whole commands in turn: seconds and peak memory.

    pip install --no-deps --target /tmp/reference auto-round==0.16.1 py-cpuinfo
    python benchmarks/model_free.py --folder /tmp/random_model --gigabytes 3 --runs 3 --reference /tmp/reference

Makes a Llama-shaped checkpoint of random weights (once). Each run is a process of its own, imports and the check of
the result included; peak memory is all resident memory, pages of files included. Runs of the two packages alternate, so
that a machine that others use slows both; medians are printed at the end. Without `--reference` only this package runs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from pathlib import Path

from memory import make_checkpoint

HERE = Path(__file__).resolve().parent.parent


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder", type=lambda text: Path(text).resolve(), required=True, help="for checkpoint, results"
    )
    parser.add_argument("--gigabytes", type=float, default=3.0)
    parser.add_argument("--scheme", default="W4A16")
    parser.add_argument("--format", default="auto_round")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--reference", type=Path, help="folder that auto-round 0.16.1 is installed in")
    parser.add_argument("--reference_python", default=sys.executable, help="python with what the reference needs")
    return parser.parse_args()


def measure(command: list[str], package: Path, log: Path) -> dict[str, float]:
    """Runs a command with a package first in the path; returns seconds, processor seconds and peak memory (Unix)."""
    started = time.monotonic()
    with open(log, "wb") as out:
        actions = [(os.POSIX_SPAWN_DUP2, out.fileno(), 1), (os.POSIX_SPAWN_DUP2, out.fileno(), 2)]
        environment = {**os.environ, "PYTHONPATH": str(package)}
        child = os.posix_spawn(command[0], command, environment, file_actions=actions)
        _, status, usage = os.wait4(child, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed:\n{log.read_text(errors='replace')[-3000:]}")
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "seconds": time.monotonic() - started,
        "processor_seconds": usage.ru_utime + usage.ru_stime,
        "peak_GB": usage.ru_maxrss * unit / 1e9,
    }


def main() -> None:
    arguments = parse_arguments()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    model, work = arguments.folder / "model", arguments.folder / "elsewhere"
    if not (model / "config.json").is_file():
        make_checkpoint(model, arguments.gigabytes)
    files = [file.stat().st_size for file in model.glob("*.safetensors")]
    print(json.dumps({"model_GB": round(sum(files) / 1e9, 2), "largest_file_GB": round(max(files) / 1e9, 2)}))
    packages = {"here": (sys.executable, HERE)}
    if arguments.reference:
        packages["reference"] = (arguments.reference_python, arguments.reference.resolve())
    work.mkdir(exist_ok=True)
    os.chdir(work)  # `python -m` looks into the working folder first
    options = ["--model_free", "--scheme", arguments.scheme, "--format", arguments.format]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in packages}
    for _ in range(arguments.runs):
        for name, (python, package) in packages.items():
            output = arguments.folder / f"out_{name}"
            command = [python, "-m", "auto_round", "--model", str(model), *options, "--output_dir", str(output)]
            figures = measure(command, package, arguments.folder / f"{name}.log")
            shutil.rmtree(output)
            found[name].append(figures)
            print(json.dumps({"run": name, **{key: round(value, 2) for key, value in figures.items()}}), flush=True)
    medians = {
        name: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for name, runs in found.items()
    }
    print(json.dumps({"median": {n: {k: round(v, 2) for k, v in m.items()} for n, m in medians.items()}}))
    if "reference" in medians:
        ratios = {key: medians["reference"][key] / medians["here"][key] for key in medians["here"]}
        print(json.dumps({"reference_over_here": {key: round(value, 2) for key, value in ratios.items()}}))


if __name__ == "__main__":
    main()
