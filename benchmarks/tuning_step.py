"""Time of one tuning step of one weight on a GPU: its kernel against autograd, scheme by scheme.

    python benchmarks/tuning_step.py
    python benchmarks/tuning_step.py --schemes MXFP4 NVFP4 W4A16 --shape 4096 4096
    TRITON_INTERPRET=1 python benchmarks/tuning_step.py --device cpu --shape 64 128 --repeats 1    # whether it runs

A step takes a gradient and leaves the dequantized weights of the next one, both in bfloat16. For each scheme: the
milliseconds of both ways, the rate at which the kernel moves the 14 bytes a weight that it must (compare it with that
of a copy in the first line), and the share of weights that differ after three steps. That is 0 for schemes with
float elements unless clip factors move; elsewhere it may be some in a million, where a sum is about zero. (Triton's
interpreter truncates to bfloat16, so there all schemes but MX differ.)
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from auto_round.data_types import DATA_TYPES
from auto_round.schemes import preset_name_to_scheme
from auto_round.tuning.fused_step import fused_weight
from auto_round.tuning.tuned_weight import Curvature, TunedWeight

SCHEMES = ("W4A16", "MXFP4", "MXFP6", "MXFP8", "MXINT4", "MXINT8", "NVFP4", "FPW8A16", "FP8_BLOCK")
BYTES = 14  # weight, gradient and result in bfloat16, offsets in float32 read and written
DECAY, ROUNDING_SIZE, CLIP_SIZE = 0.7, 1 / 200, 1 / 200


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemes", nargs="+", default=SCHEMES)
    parser.add_argument("--shape", nargs=2, type=int, default=(14336, 4096), metavar=("OUT", "IN"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--repeats", type=int, default=20)
    return parser.parse_args()


def make_weight(scheme_name: str, shape: tuple[int, int], device: str, *, curved: bool) -> TunedWeight:
    """Returns the same random weight each time, with the scales of rounding to nearest."""
    rng = torch.Generator().manual_seed(0)
    scheme = preset_name_to_scheme(scheme_name)
    data_type = DATA_TYPES[scheme.data_type]
    weight = torch.randn(shape, generator=rng).to(device, torch.bfloat16)
    outputs, inputs = (torch.rand(size, generator=rng).to(device) for size in shape)
    return TunedWeight(
        weight, scheme, data_type, data_type.minmax_range(weight, scheme), data_type.trainable(weight, scheme),
        Curvature(outputs, inputs) if curved else None, 0.5,
    )  # fmt: skip


def step_with_autograd(tuned: TunedWeight, gradient: Tensor, decay: Tensor, clip_size: float) -> Tensor:
    """Takes a step as the tuner does without a kernel and returns the dequantized weights."""
    for rows, part in tuned.pieces():
        found = part.gradients(gradient[rows])
        for name, tensor in part.params.items():
            tensor.sub_(found[name].sign() * (decay * (ROUNDING_SIZE if name == "rounding" else clip_size)))
    tuned.keep_in_bounds()
    return tuned.dequantized().to(torch.bfloat16)


def milliseconds(call: Callable[[], object], device: str, repeats: int) -> float:
    """Returns the mean time of a call after three others."""

    def run(times: int) -> float:
        started = time.monotonic()
        for _ in range(times):
            call()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        return (time.monotonic() - started) * 1e3 / times

    run(3)
    return run(repeats)


@torch.no_grad()
def measure(name: str, arguments: argparse.Namespace, *, curved: bool, clips: bool) -> str:
    """Returns a line of the table."""
    shape, device = tuple(arguments.shape), arguments.device
    one, two = (make_weight(name, shape, device, curved=curved) for _ in range(2))
    fused, clip_size = fused_weight(one, torch.bfloat16), CLIP_SIZE if clips else 0.0
    label = f"{name + ', curved' * curved + ', clips' * clips:26}"
    if fused is None:
        return f"{label} no kernel"
    gradient, decay = torch.randn_like(one.weight), torch.tensor(DECAY, device=device)
    for _ in range(3):
        fused.move(gradient, decay, ROUNDING_SIZE, clip_size)
        expected = step_with_autograd(two, gradient, decay, clip_size)
    differing = (fused.dequantized != expected).float().mean().item()
    repeats = arguments.repeats
    kernel = milliseconds(lambda: fused.move(gradient, decay, ROUNDING_SIZE, clip_size), device, repeats)
    autograd = milliseconds(lambda: step_with_autograd(two, gradient, decay, clip_size), device, repeats)
    rate = BYTES * one.weight.numel() / kernel / 1e6
    return f"{label} {kernel:9.3f} {rate:9.0f} {autograd:12.3f} {autograd / kernel:7.1f} {differing:10.1e}"


def main() -> None:
    arguments = parse_arguments()
    device = arguments.device
    a = torch.zeros(BYTES * arguments.shape[0] * arguments.shape[1] // 2, dtype=torch.int8, device=device)
    b = torch.empty_like(a)
    rate = 2 * a.numel() / milliseconds(lambda: b.copy_(a), device, arguments.repeats) / 1e6
    where = torch.cuda.get_device_name() if device.startswith("cuda") else device
    print(f"{where}, {arguments.shape[0]} x {arguments.shape[1]}; a copy moves {rate:.0f} GB/s")
    print(f"{'scheme':26} {'kernel ms':>9} {'GB/s':>9} {'autograd ms':>12} {'times':>7} {'differing':>10}")
    for name in arguments.schemes:
        clips = preset_name_to_scheme(name).data_type == "int"  # as by default
        print(measure(name, arguments, curved=True, clips=clips), flush=True)
    for curved, clips in ((False, False), (False, True), (True, True)):
        print(measure("MXFP4", arguments, curved=curved, clips=clips), flush=True)


if __name__ == "__main__":
    main()
