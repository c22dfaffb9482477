"""Tokens per second of `generate`, quantized against bfloat16, for a Llama of random weights shaped like one of 1B.

    python benchmarks/generate.py --device cuda
    python benchmarks/generate.py --device cpu --prompt 16 --new 8

The model is made on the spot, rounded to 4 bits in groups of 128 into a temporary folder, and loaded from there with
the backend that is chosen by itself (or --backend). One sequence; on a GPU also with a static cache and a compiled
forward pass, which generate then replays from CUDA graphs. The time of the prompt is left out.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from auto_round import AutoRound, AutoRoundConfig


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--prompt", type=int, help="tokens; default 128, on a CPU 32")
    parser.add_argument("--new", type=int, help="tokens; default 64, on a CPU 16")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--no_compile", action="store_true", help="leave out the compiled runs")
    return parser.parse_args()


def random_model(layers: int, device: str) -> LlamaForCausalLM:
    """Returns a bfloat16 Llama with 1.1 billion weights at 16 layers."""
    config = LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=8192, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=2048, tie_word_embeddings=False, dtype="bfloat16",
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def tokens_per_second(model: PreTrainedModel, prompt: int, new: int, is_static: bool) -> float:
    """Returns the speed of generating `new` tokens after a prompt, the prompt's own time left out."""
    ids = torch.arange(prompt, device=model.device)[None] % model.config.vocab_size
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    options |= {"cache_implementation": "static"} if is_static else {}

    def seconds(count: int) -> float:
        start = time.perf_counter()
        output = model.generate(ids, max_new_tokens=count, min_new_tokens=count, **options)
        assert output.shape[1] == prompt + count
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for _ in range(2 if is_static else 1):  # the first compiles, the second captures graphs
        seconds(new)
    return (new - 1) / max(min(seconds(new) for _ in range(2)) - min(seconds(1) for _ in range(2)), 1e-9)


def quantized_model(dense: Path, folder: Path, arguments: argparse.Namespace) -> PreTrainedModel:
    """Rounds the weights in `dense` into `folder` and loads the result."""
    options = {"bits": arguments.bits, "group_size": 128, "iters": 0, "disable_opt_rtn": True}
    AutoRound(str(dense), device=arguments.device, **options).quantize_and_save(str(folder), format="auto_round")
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        device_map=arguments.device,
        dtype=torch.bfloat16,
        quantization_config=AutoRoundConfig(backend=arguments.backend),
    )
    # Transformers compiles for a static cache by itself, but not what its quantizer does not vouch for.
    model.hf_quantizer = None
    return model


def main() -> None:
    arguments = parse_arguments()
    is_cuda = arguments.device == "cuda"
    prompt, new = arguments.prompt or (128 if is_cuda else 32), arguments.new or (64 if is_cuda else 16)
    modes = {"eager": False} | ({"static cache, compiled": True} if is_cuda and not arguments.no_compile else {})
    with tempfile.TemporaryDirectory() as folder:
        model = random_model(arguments.layers, arguments.device)
        model.save_pretrained(Path(folder, "dense"))
        models = {
            "bfloat16": lambda: model,
            f"W{arguments.bits}": lambda: quantized_model(Path(folder, "dense"), Path(folder, "quantized"), arguments),
        }
        for name, load in models.items():
            torch._dynamo.reset()
            loaded = load()
            for mode, is_static in modes.items():
                speed = tokens_per_second(loaded, prompt, new, is_static)
                print(f"{name:>10} {mode:>24} {speed:8.1f} tokens/s", flush=True)


if __name__ == "__main__":
    main()
