"""Small random models of every family with a tokenizer that llama.cpp knows, and their GGUF exports."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from auto_round import pipeline
from auto_round.checkpoint import CheckpointSource
from auto_round.config import RunConfig
from auto_round.formats.gguf.contents import contents_of
from auto_round.formats.gguf.pre_tokenizers import QWEN2
from auto_round.plan import Plan
from auto_round.session import open_session
from auto_round.tensors import QuantizedTensor

SPECIAL = ("<unk>", "<s>", "</s>")
WORDS = ("th", "he", "in", "er", "an", "re", "on", "at", "the", "ing")
VOCABULARY = 320
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
    "initializer_range": 0.08,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 256}
GEMMA = {"head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 8, "tie_word_embeddings": True}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 128,
    "kv_lora_rank": 256,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    **EXPERTS,
}
# Name -> class of Transformers without its ending, and the config.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama3-rope": ("Llama", {"rope_parameters": LLAMA3_ROPE, "num_key_value_heads": 1}),
    "llama-biases": ("Llama", {"attention_bias": True, "head_dim": 32}),
    "mistral": ("Mistral", {}),
    "mixtral": ("Mixtral", {"num_local_experts": 4}),
    "mixtral-8": ("Mixtral", {"num_local_experts": 8}),
    "qwen2": ("Qwen2", {}),
    "qwen2-yarn": ("Qwen2", {"rope_parameters": YARN}),
    "qwen2-moe": ("Qwen2Moe", {"num_experts": 4, "shared_expert_intermediate_size": 256, **EXPERTS}),
    "qwen3": ("Qwen3", {"head_dim": 64, "tie_word_embeddings": True}),
    "qwen3-moe": ("Qwen3Moe", {"head_dim": 64, "num_experts": 4, "norm_topk_prob": True, **EXPERTS}),
    "gemma2": ("Gemma2", GEMMA),
    "gemma3": ("Gemma3", {**GEMMA, "num_hidden_layers": 7}),
    "phi3": ("Phi3", {}),
    "phi3-long": (
        "Phi3",
        {
            "max_position_embeddings": 1024,
            "original_max_position_embeddings": 512,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.75,
                "original_max_position_embeddings": 512,
                "long_factor": [2.0] * 24,
                "short_factor": [1.0 + 0.05 * index for index in range(24)],
            },
        },
    ),
    "starcoder2": ("Starcoder2", {"tie_word_embeddings": True}),
    "olmo2": ("Olmo2", {}),
    "granite": (
        "Granite",
        {
            "attention_multiplier": 0.1,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "logits_scaling": 2.0,
            "tie_word_embeddings": True,
        },
    ),
    "glm4": ("Glm4", {"head_dim": 64, "attention_bias": True}),
    "deepseek-v2": ("DeepseekV2", {**LATENT, "topk_method": "greedy", "routed_scaling_factor": 1.0}),
    "deepseek-v3": ("DeepseekV3", {**LATENT, "norm_topk_prob": True, "routed_scaling_factor": 2.5}),
    "gpt-oss": (
        "GptOss",
        {
            "head_dim": 64,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 8,
            "num_hidden_layers": 4,
            "intermediate_size": 256,
        },
    ),
}


@dataclasses.dataclass(frozen=True)
class ExportedFile:
    """A GGUF file, and what was put into it.

    Attributes:
        files: the file, or its parts.
        plan: what became of each weight.
        weights: parameter name -> quantized weight.
        original: folder of the model.
    """

    files: list[Path]
    plan: Plan
    weights: dict[str, QuantizedTensor]
    original: Path

    def tensors(self) -> dict[str, Any]:
        """Returns the tensors of the file as the gguf package reads them."""
        import gguf

        return {tensor.name: tensor for file in self.files for tensor in gguf.GGUFReader(file).tensors}

    def metadata(self) -> dict[str, Any]:
        """Returns the keys of the (first) file and their values."""
        import gguf

        return {key: field.contents() for key, field in gguf.GGUFReader(self.files[0]).fields.items()}

    def dequantized_model(self, folder: Path) -> Any:
        """Returns the model in float32 with the values that the file holds, as the gguf package decodes them."""
        import gguf

        source = CheckpointSource(self.original)
        state = {key: source.read(key).float() for key in source.keys()}
        found, changed = self.tensors(), {}
        for tensor in contents_of(source, self.plan.structure).tensors:
            values = torch.from_numpy(gguf.dequantize(found[tensor.name].data, found[tensor.name].tensor_type).copy())
            values = values.reshape(tensor.shape)
            for part in tensor.parts:
                if part.place.change is None:
                    own = values if part.place.expert is None else values[part.place.expert]
                    order = part.place.order
                    state[part.key] = own if order is None else own[order(torch.arange(len(own))).argsort()]
                else:
                    changed.setdefault(part.key, {})[tensor.name.split(".")[-2]] = values
        state |= {key: put_back(found) for key, found in changed.items() if (put_back := _put_back(key)) is not None}
        for key, slices in getattr(source, "fused", dict)().items():
            state[key] = source.join(key, {part: state.pop(part) for part in slices})
        folder.mkdir()
        save_file({key: tensor.contiguous() for key, tensor in state.items()}, folder / "model.safetensors")
        shutil.copyfile(self.original / "config.json", folder / "config.json")
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def _put_back(key: str) -> Callable[[dict[str, torch.Tensor]], torch.Tensor] | None:
    """Returns how a matrix comes out of the tensors that a family makes of it; None for vectors, which are exact."""
    if key.endswith("kv_b_proj.weight"):
        return lambda found: torch.cat([found["attn_k_b"].mT, found["attn_v_b"]], dim=1).flatten(0, 1)
    if key.endswith("experts.gate_up_proj"):
        return lambda found: torch.stack([found["ffn_gate_exps"], found["ffn_up_exps"]], dim=2).flatten(1, 2).mT
    if key.endswith("experts.down_proj"):
        return lambda found: found["ffn_down_exps"].mT
    return None


def byte_level_tokenizer(pattern: str = QWEN2, special: tuple[str, ...] = SPECIAL, **model: Any) -> Tokenizer:
    """Returns byte-level BPE with a few merges; special tokens come first."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*special, *alphabet, *WORDS])}
    merges = [("t", "h"), ("h", "e"), ("i", "n"), ("e", "r"), ("a", "n"), ("r", "e"), ("o", "n"), ("a", "t")]
    merges += [("th", "e"), ("in", "g")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, **model))
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    return tokenizer


def piece_tokenizer() -> Tokenizer:
    """Returns a SentencePiece vocabulary in a tokenizer.json: bytes, letters and a few merges."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    pieces = [*SPECIAL, *(f"<0x{code:02X}>" for code in range(256)), "▁", *letters]
    merges = [("t", "h"), ("i", "n"), ("th", "e"), ("▁", "the")]
    vocabulary = {piece: index for index, piece in enumerate([*pieces, *("".join(merge) for merge in merges)])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, **options: Any) -> None:
    """Writes tokenizer.json and tokenizer_config.json."""
    named = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", **options}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(folder)


def planned(folder, name="gguf:q4_k_m", **options):
    """Returns the plan of a run; nothing is quantized."""
    places = {"model": str(folder), "output_dir": str(folder.parent / "out"), "device": "cpu"}
    return open_session(RunConfig.from_options(**{**places, "format": name, **options})).plan


def schemes(plan):
    return {entry.layer.name: str(entry.scheme) for entry in plan.entries}


@pytest.fixture
def save_model(tmp_path: Path) -> Callable[..., Path]:
    """Returns save(family, tokenizer, **config) -> folder of a random bfloat16 model; norms and biases are random."""

    def save(name: str = "llama", *, tokenizer: Tokenizer | None = None, **changes: Any) -> Path:
        kind, values = FAMILIES[name]
        text = "TextConfig" if kind == "Gemma3" else "Config"
        config = getattr(transformers, kind + text)(**{**COMMON, **values, **changes})
        folder = tmp_path / "tiny"  # llama.cpp looks for certain tokens where the name says Phi-3
        with torch.random.fork_rng():
            torch.manual_seed(5)
            model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
            for parameter_name, parameter in model.named_parameters():
                if parameter.ndim == 1 or parameter_name.endswith(("bias", "sinks")):
                    parameter.data.add_(torch.randn_like(parameter) * 0.1)
            for buffer_name, buffer in model.named_buffers():
                if buffer_name.endswith("e_score_correction_bias"):
                    buffer.copy_(torch.randn_like(buffer) * 0.1)
        model.to(torch.bfloat16).save_pretrained(folder)
        save_tokenizer(tokenizer or byte_level_tokenizer(), folder)
        return folder

    return save


@pytest.fixture
def export_gguf(save_model: Callable[..., Path], tmp_path: Path) -> Callable[..., ExportedFile]:
    """Returns make(mix, family, model, folder, **options) -> the file of a random model, rounded to nearest."""
    pytest.importorskip("gguf")

    def make(
        mix: str,
        name: str = "llama",
        *,
        model: dict[str, Any] | None = None,
        folder: Path | None = None,
        **options: Any,
    ) -> ExportedFile:
        original = folder or save_model(name, **(model or {}))
        defaults: dict[str, Any] = {"iters": 0, "disable_opt_rtn": True, "device": "cpu"}
        work, output = tmp_path / "work", tmp_path / f"gguf-{mix}"
        places = {"model": str(original), "output_dir": str(output), "work_dir": str(work), "format": f"gguf:{mix}"}
        session = open_session(RunConfig.from_options(**{**defaults, **places, **options}))
        pipeline.run(session)
        store = pipeline.RunStore.existing(work)
        weights = {key: weight for block in store.finished() for key, weight in store.load(block).weights.items()}
        return ExportedFile(sorted(output.glob("*.gguf")), session.plan, weights, original)

    return make
