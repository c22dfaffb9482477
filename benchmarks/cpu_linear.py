"""Times quantized linear layers on a CPU against a bfloat16 layer of the same shape, in turns within one process.

    python benchmarks/cpu_linear.py
    python benchmarks/cpu_linear.py --bits 8 --group-size -1 --threads 2 --shapes 4096x4096

Prints, for each shape (out x in) and number of tokens, the best time of bfloat16 `F.linear` and how many times faster
each backend was (its best time; 0.5 means twice as slow). Backends whose package is missing are left out. The best of
many turns is taken because other programs on the machine only ever slow a turn down; with one thread its processor time
counts, which leaves out the turns of other programs.
"""

from __future__ import annotations

import argparse
import functools
import os
import time
from collections.abc import Callable
from typing import Any

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 2048)
SHAPES = ("4096x4096", "11008x4096")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--asym", action="store_true")
    parser.add_argument("--dtype", default="bfloat16", help="of the activations; the baseline is of this dtype too")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="OUTxIN")
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--backends", nargs="+", help="default: all that run such a layer")
    parser.add_argument("--seconds", type=float, default=1.0, help="at least this long for each cell of the table")
    return parser.parse_args()


def random_layer(spec: Any, backend: Any) -> Any:
    """Returns a layer of random codes, ready to be called."""
    import torch

    from auto_round.inference.layer import QuantizedLinear

    layer = QuantizedLinear(spec, backend.prepare)
    for name, (shape, dtype) in spec.buffers().items():
        if dtype == torch.int32:
            setattr(layer, name, torch.randint(-(2**31), 2**31 - 1, shape, dtype=dtype))
        else:
            setattr(layer, name, (torch.rand(shape) * 0.01 + 0.001).half().to(dtype))
    layer.settle()
    layer.prepare()
    return layer


def best_times(calls: dict[str, Callable[[], Any]], seconds: float, clock: Callable[[], float]) -> dict[str, float]:
    """Returns the shortest time of each call in seconds; they take turns, five at least."""
    best = dict.fromkeys(calls, float("inf"))
    started, turns = time.monotonic(), 0
    while turns < 6 or time.monotonic() - started < seconds * len(calls):
        for name, call in calls.items():
            begin = clock()
            call()
            # The first turn warms up.
            best[name] = min(best[name], clock() - begin) if turns else best[name]
        turns += 1
    return best


def main() -> None:
    arguments = parse_arguments()
    # Before torch is imported: auto-round-lib has an OpenMP of its own, which torch.set_num_threads does not reach.
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)

    import torch

    from auto_round.inference.backends import all_backends, backend_named, why_not
    from auto_round.inference.layer import LayerSpec
    from auto_round.plan import table
    from auto_round.schemes import QuantizationScheme

    torch.set_num_threads(arguments.threads)
    clock = time.thread_time if arguments.threads == 1 else time.perf_counter
    dtype = getattr(torch, arguments.dtype)
    scheme = QuantizationScheme(bits=arguments.bits, group_size=arguments.group_size, sym=not arguments.asym)
    wanted = [backend_named(name) for name in arguments.backends] if arguments.backends else all_backends()
    print(f"{scheme}, {arguments.dtype}, {arguments.threads} thread(s), torch {torch.__version__}")
    for shape in arguments.shapes:
        out_features, in_features = map(int, shape.split("x"))
        spec = LayerSpec(
            name=shape, in_features=in_features, out_features=out_features, scheme=scheme, layout="gptq", dtype=dtype
        )
        usable = [backend for backend in wanted if why_not(backend, spec) is None]
        layers = {backend.name: random_layer(spec, backend) for backend in usable}
        weight = torch.randn(out_features, in_features).to(dtype)
        rows = [(shape, "F.linear ms", *layers)]
        for tokens in arguments.tokens:
            x = torch.randn(tokens, in_features).to(dtype)
            calls = {"": functools.partial(torch.nn.functional.linear, x, weight)}
            calls |= {name: functools.partial(layer, x) for name, layer in layers.items()}
            with torch.inference_mode():
                best = best_times(calls, arguments.seconds, clock)
            ratios = (f"{best[''] / best[name]:.2f}" for name in layers)
            rows.append((f"{tokens} tokens", f"{best[''] * 1000:.2f}", *ratios))
        print(table(rows), flush=True)


if __name__ == "__main__":
    main()
