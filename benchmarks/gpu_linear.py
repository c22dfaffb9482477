"""Time of quantized linear layers on an NVIDIA GPU, against PyTorch's bfloat16 product.

    python benchmarks/gpu_linear.py
    python benchmarks/gpu_linear.py --bits 2 --group_size 64 --asym --layout awq --backends triton

For each shape (out x in features; default: the layers of Llama-3-8B), backend and number of tokens: microseconds,
speed against bfloat16, and for few tokens the share of the memory bound, which is the time to copy as many bytes as the
packed weight and its scales have. Calls are replayed from a CUDA graph and go over so many distinct weights that the
cache holds none. Weights are random, inputs normal.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from auto_round.inference.backends import BACKENDS, why_not
from auto_round.inference.layer import LayerSpec, QuantizedLinear
from auto_round.schemes import QuantizationScheme

SHAPES = ("4096x4096", "1024x4096", "14336x4096", "4096x14336")
DECODE, PREFILL = (1, 2, 4, 8, 16), (32, 64, 128, 512, 2048)
# Bytes of weights that calls go over before one comes again: several times the cache of an H200 (60 MB).
ROTATED_BYTES = 300e6


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES))
    parser.add_argument("--backends", nargs="+", default=["triton", "tinygemm"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[*DECODE, *PREFILL])
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group_size", type=int, default=128)
    parser.add_argument("--asym", action="store_true")
    parser.add_argument("--layout", default="gptq", choices=["gptq", "gptq_zp", "awq"])
    return parser.parse_args()


def random_layer(spec: LayerSpec, backend: str) -> QuantizedLinear:
    """Returns a layer with random codes, ready to run."""
    layer = QuantizedLinear(spec, BACKENDS[backend].prepare, "cuda")
    for name, buffer in layer.named_buffers():
        if buffer.dtype == torch.int32:
            buffer.random_(-(2**31), 2**31 - 1)
        else:
            buffer.copy_((torch.rand_like(buffer) * 0.01 + 0.001).half())
        assert name in ("qweight", "qzeros", "scales"), name
    layer.settle()
    layer.prepare()
    return layer


def microseconds(calls: Sequence[Callable[[], Tensor]], repeats: int = 10) -> float:
    """Returns the median time of a call, over replays of a graph of at least 40 of them."""
    for call in calls[:2]:
        call()
    rounds = -(-40 // len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in list(calls) * rounds:
            call()
    times = []
    for _ in range(repeats + 2):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times[2:])[repeats // 2] * 1e3 / (len(calls) * rounds)


def copy_bandwidth() -> float:
    """Returns bytes per second of a copy within the GPU, read and written bytes counted."""
    source = torch.empty(2**32, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    target.copy_(source)
    start.record()
    for _ in range(10):
        target.copy_(source)
    end.record()
    end.synchronize()
    return 20 * source.numel() / (start.elapsed_time(end) * 1e-3)


def measure_shape(arguments: argparse.Namespace, spec: LayerSpec, bandwidth: float) -> None:
    """Prints a line for each backend and number of tokens."""
    scheme = spec.scheme
    packed = spec.in_features * spec.out_features * scheme.bits / 8
    # A scale of two bytes for each group.
    packed += 2 * spec.in_features * spec.out_features / spec.group_size
    count = max(2, int(ROTATED_BYTES / packed))
    dense_bytes = 2 * spec.in_features * spec.out_features
    dense = [
        torch.randn(spec.shape, device="cuda", dtype=torch.bfloat16)
        for _ in range(max(2, int(ROTATED_BYTES / dense_bytes)))
    ]
    inputs = {n: torch.randn(n, spec.in_features, device="cuda", dtype=torch.bfloat16) for n in arguments.tokens}
    base = {n: microseconds([lambda w=w, x=x: F.linear(x, w) for w in dense]) for n, x in inputs.items()}
    del dense
    bound = packed / bandwidth * 1e6
    for backend in arguments.backends:
        reason = why_not(BACKENDS[backend], spec)
        if reason is not None:
            print(f"{spec.name:>12} {backend}: {reason}")
            continue
        layers = [random_layer(spec, backend) for _ in range(count)]
        for n, x in inputs.items():
            time = microseconds([lambda layer=layer, x=x: layer(x) for layer in layers])
            share = f"{bound / time:6.0%}" if n <= max(DECODE) else "     -"
            print(
                f"{spec.name:>12} {backend:>10} {n:6d} {base[n]:10.2f} {time:10.2f} {base[n] / time:8.2f} {share}",
                flush=True,
            )


def main() -> None:
    arguments = parse_arguments()
    scheme = QuantizationScheme(bits=arguments.bits, group_size=arguments.group_size, sym=not arguments.asym)
    bandwidth = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copies {bandwidth / 1e12:.2f} TB/s; {scheme}")
    print(f"{'shape':>12} {'backend':>10} {'tokens':>6} {'bf16 us':>10} {'us':>10} {'x bf16':>8}  bound")
    kind = {"scheme": scheme, "layout": arguments.layout, "dtype": torch.bfloat16, "device": "cuda"}
    with torch.inference_mode():
        for shape in arguments.shapes:
            rows, width = map(int, shape.split("x"))
            measure_shape(arguments, LayerSpec(name=shape, in_features=width, out_features=rows, **kind), bandwidth)


if __name__ == "__main__":
    main()
