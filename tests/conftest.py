"""Fixtures that several folders of tests use."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import settings

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Returns the folder of models, texts and golden checkpoints beside the repository; skips where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is not there")
    return SHARED


# Two shared cores: the time of one example says nothing about the code.
settings.register_profile("no_deadline", deadline=None)
settings.load_profile("no_deadline")


# Sizes that every tiny model shares; hidden 64 keeps two groups of 32 in a row.
COMMON = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 64}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 128}
TINY = {
    "llama": ("Llama", {**COMMON, **HEADS}),
    "qwen3": ("Qwen3", {**COMMON, **HEADS}),
    "gemma3": (
        "Gemma3",
        {
            **COMMON,
            **HEADS,
            "num_hidden_layers": 3,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        },
    ),
    "opt": ("OPT", {**COMMON, "ffn_dim": 128, "num_attention_heads": 4, "word_embed_proj_dim": 64, "dropout": 0.0}),
    "gpt2": ("GPT2", {"vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}),
}
MLA = {
    "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 32,
    "num_key_value_heads": 4,
}  # fmt: skip
ROUTED = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
SHARED_EXPERT = {"n_shared_experts": 1, "first_k_dense_replace": 1}
# Mixtures of experts, all with four experts; a family joins the tests of tests/models/test_families.py by a line here.
MOE = {
    "qwen3_moe": ("Qwen3Moe", {"num_experts": 4, **ROUTED}),
    "qwen2_moe": ("Qwen2Moe", {"num_experts": 4, **ROUTED, "shared_expert_intermediate_size": 64}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32}),
    "deepseek_v2": ("DeepseekV2", {"n_routed_experts": 4, **ROUTED, **MLA, **SHARED_EXPERT}),
    "deepseek_v3": (
        "DeepseekV3",
        {"n_routed_experts": 4, **ROUTED, **MLA, **SHARED_EXPERT, "n_group": 2, "topk_group": 1},
    ),
    "olmoe": ("Olmoe", {"num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32}),
    "granitemoe": ("GraniteMoe", {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32}),
    "gpt_oss": (
        "GptOss",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32, "sliding_window": 8},
    ),
    "llama4": (
        "Llama4",
        {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size": 32, "intermediate_size_mlp": 64},
    ),
    "glm4_moe": (
        "Glm4Moe",
        {"n_routed_experts": 4, **ROUTED, **SHARED_EXPERT, "n_group": 1, "topk_group": 1},
    ),
}
TINY |= {kind: (family, {**COMMON, **HEADS, **values}) for kind, (family, values) in MOE.items()}
SPECIAL_IDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Any]:
    """Returns make(kind, **config) -> a tiny random causal language model, the same weights each time."""

    def make(kind: str = "llama", **changes: Any) -> Any:
        family, values = TINY[kind]
        suffix = "TextConfig" if kind in ("gemma3", "llama4") else "Config"
        values = {name: value for name, value in values.items() if name != "head_dim" or "v_head_dim" not in values}
        config = getattr(transformers, family + suffix)(
            **{"initializer_range": 0.1, "tie_word_embeddings": False, **SPECIAL_IDS, **values, **changes}
        )
        with torch.random.fork_rng():
            torch.manual_seed(7)
            head = "LMHeadModel" if kind == "gpt2" else "ForCausalLM"
            model = getattr(transformers, family + head)(config).eval()
            for parameter in model.parameters() if kind in MOE else ():  # routers that start at zero choose nothing
                if not parameter.any():
                    torch.nn.init.normal_(parameter, std=0.1)
            return model

    return make


@pytest.fixture(scope="session")
def token_ids() -> Callable[..., torch.Tensor]:
    """Returns make(samples, tokens, seed) -> random token ids that every tiny model knows."""

    def make(samples: int = 8, tokens: int = 16, seed: int = 0) -> torch.Tensor:
        return torch.randint(2, 96, (samples, tokens), generator=torch.Generator().manual_seed(seed))

    return make


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Keeps torch to one thread: tiny tensors gain nothing, and sums keep one order."""
    torch.set_num_threads(1)


@pytest.fixture
def run_interpreted() -> Callable[[str], int]:
    """Returns run(file) -> how many tests of a file pass in a process of their own with Triton's interpreter.

    Triton decides about interpretation when it is imported, so it cannot be switched on here.
    """

    def run(file: str) -> int:
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", file]
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
        return int(re.search(r"(\d+) passed", done.stdout)[1])

    return run
