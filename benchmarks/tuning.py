"""Seconds and GPU memory of tuning one block of a model of random weights, here or in Intel's auto-round.

    python benchmarks/tuning.py --shape 8b
    python benchmarks/tuning.py --shape moe --blocks 1
    PYTHONPATH=/tmp/reference python benchmarks/tuning.py --shape 8b --options '{"enable_torch_compile": true}'

The script takes whichever `auto_round` is on the path. After a run of one block and four steps, which compiles
what is needed once, a run of `--blocks` blocks is timed, search for scales and passes of all samples included. `moe` is
a block of Qwen3-30B-A3B: 128 experts, 8 of them for each token. With `--floor` the last line gives a dense block's own
forward and backward pass without quantization, eager, and the arithmetic floor: its matrix products at the rate of a
large one.
"""

from __future__ import annotations

import argparse
import json
import time
from types import SimpleNamespace
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

# hidden, intermediate, heads, key/value heads
SHAPES = {"8b": (4096, 14336, 32, 8), "0.6b": (1024, 3072, 16, 8), "tiny": (64, 128, 4, 2)}
# hidden, intermediate of an expert, heads, key/value heads, experts, experts of a token
MOE_SHAPES = {"moe": (2048, 768, 32, 4, 128, 8), "tiny-moe": (64, 32, 4, 2, 8, 2)}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="8b", choices=[*SHAPES, *MOE_SHAPES])
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--iters", type=int, default=200)
    parser.add_argument("--nsamples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--scheme", default="W4A16")
    parser.add_argument("--options", default="{}", help="JSON of further keywords of AutoRound")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--floor", action="store_true", help="measure the block alone, eager, too")
    return parser.parse_args()


def random_model(arguments: argparse.Namespace, blocks: int) -> LlamaForCausalLM | Qwen3MoeForCausalLM:
    """Returns a bfloat16 model with a vocabulary of 1000."""
    shape = SHAPES[arguments.shape] if arguments.shape in SHAPES else MOE_SHAPES[arguments.shape]
    hidden, intermediate, heads, kv_heads, *routed = shape
    common = {
        "vocab_size": 1000, "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": blocks,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "tie_word_embeddings": False,
        "max_position_embeddings": max(2048, arguments.seqlen), "dtype": "bfloat16",
    }  # fmt: skip
    torch.manual_seed(0)
    with torch.device(arguments.device):
        if not routed:
            return LlamaForCausalLM(LlamaConfig(**common)).to(torch.bfloat16).eval()
        experts, chosen = routed
        own = {"moe_intermediate_size": intermediate, "num_experts": experts, "num_experts_per_tok": chosen}
        config = Qwen3MoeConfig(**common, **own, head_dim=128 if hidden > 1000 else 16)
        return Qwen3MoeForCausalLM(config).to(torch.bfloat16).eval()


def tune(arguments: argparse.Namespace, blocks: int) -> tuple[float, float]:
    """Returns seconds of tuning a model and GiB of GPU memory at the peak, beyond the model."""
    from auto_round import AutoRound

    model = random_model(arguments, blocks)
    tokens = torch.randint(0, 1000, (arguments.nsamples, arguments.seqlen), generator=torch.Generator().manual_seed(1))
    dataset = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in tokens]
    tokenizer = SimpleNamespace(pad_token_id=0, name_or_path="", bos_token_id=None, eos_token_id=None)
    on_gpu = arguments.device.startswith("cuda")
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated() if on_gpu else 0
    started = time.monotonic()
    AutoRound(
        model, tokenizer, scheme=arguments.scheme, dataset=dataset, nsamples=arguments.nsamples,
        seqlen=arguments.seqlen, batch_size=arguments.batch_size, iters=arguments.iters, device_map=arguments.device,
        **json.loads(arguments.options),
    ).quantize()  # fmt: skip
    if on_gpu:
        torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() if on_gpu else 0
    return time.monotonic() - started, (peak - held) / 2**30


def matmul_rate() -> float:
    """Returns floating-point operations per second of a large bfloat16 matrix product."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / seconds_of(lambda: a @ b)


def seconds_of(call: Any, repeats: int = 10) -> float:
    """Returns the mean time of a call on the GPU after three others."""
    for _ in range(3):
        call()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats


def block_alone(arguments: argparse.Namespace) -> float:
    """Returns seconds of one forward and backward pass of a block over a batch, gradients of its weights only."""
    model = random_model(arguments, 1)
    layer, rotary = model.model.layers[0], model.model.rotary_emb
    x = torch.randn(
        arguments.batch_size, arguments.seqlen, SHAPES[arguments.shape][0], device="cuda", dtype=torch.bfloat16
    )
    positions = rotary(x, torch.arange(arguments.seqlen, device="cuda")[None])

    def step() -> None:
        output = layer(x, position_embeddings=positions, attention_mask=None)
        (output if torch.is_tensor(output) else output[0]).float().square().mean().backward()
        layer.zero_grad(set_to_none=True)

    return seconds_of(step)


def main() -> None:
    arguments = parse_arguments()
    import auto_round

    device = torch.cuda.get_device_name() if arguments.device.startswith("cuda") else arguments.device
    print(f"{device}, auto-round {auto_round.__version__}, {arguments.shape} {arguments.options}")
    steps, arguments.iters = arguments.iters, 4
    once, _ = tune(arguments, 1)
    arguments.iters = steps
    seconds, memory = tune(arguments, arguments.blocks)
    print(f"{seconds / arguments.blocks:.2f} s a block, {once:.1f} s once; {memory:.1f} GiB", flush=True)
    if arguments.floor and arguments.shape in SHAPES:
        hidden, intermediate, heads, kv_heads = SHAPES[arguments.shape]
        weights = hidden * (2 * hidden + 2 * hidden * kv_heads // heads + 3 * intermediate)
        tokens = arguments.batch_size * arguments.seqlen
        # Forward, gradients of weights, and of inputs but for those of q, k and v.
        into_norm = hidden * (hidden + 2 * hidden * kv_heads // heads)
        floor = 2 * tokens * (3 * weights - into_norm) / matmul_rate() * arguments.iters
        print(f"block alone {block_alone(arguments) * arguments.iters:.2f} s, matrix products {floor:.2f} s")


if __name__ == "__main__":
    main()
