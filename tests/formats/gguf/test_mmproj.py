"""Vision towers beside the text model's file: what clip.cpp of llama.cpp reads, and llama.cpp itself on a picture."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import pytest
import torch
import transformers

from auto_round import pipeline
from auto_round.checkpoint import CheckpointSource
from auto_round.config import RunConfig
from auto_round.errors import ConfigError, UnsupportedError
from auto_round.formats.gguf.mmproj import check_mmproj, mmproj_path, type_of
from auto_round.session import open_session

from .conftest import COMMON, byte_level_tokenizer, planned, save_tokenizer

gguf = pytest.importorskip("gguf")
TEXT = {**COMMON, "initializer_range": 0.05}
QWEN = {"depth": 4, "num_heads": 2, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}
ROTARY = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12]}}
MODELS = {
    "Qwen2VL": {
        "text_config": {**TEXT, **ROTARY},
        "vision_config": {**QWEN, "embed_dim": 128, "hidden_size": 256, "mlp_ratio": 2},
    },
    "Qwen2_5_VL": {
        "text_config": {**TEXT, **ROTARY},
        "vision_config": {
            **QWEN,
            "hidden_size": 128,
            "out_hidden_size": 256,
            "intermediate_size": 192,
            "fullatt_block_indexes": [1, 3],
            "window_size": 56,
        },
    },
    "Gemma3": {
        "text_config": {**TEXT, "head_dim": 64, "query_pre_attn_scalar": 64, "tie_word_embeddings": True},
        "vision_config": {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 56,
            "patch_size": 14,
            "initializer_range": 0.05,
        },
        "mm_tokens_per_image": 4,
    },
}
# Rows and columns of the file's tensors by what clip.cpp asks for; (name, dimensions) for a block and around it.
QWEN_NAMES = {
    "v.patch_embd.weight",
    "v.patch_embd.weight.1",
    "v.post_ln.weight",
    "mm.0.weight",
    "mm.0.bias",
    "mm.2.weight",
}
QWEN_NAMES |= {
    "mm.2.bias",
    *(f"v.blk.3.attn_{one}.{kind}" for one in ("q", "k", "v", "out") for kind in ("weight", "bias")),
}
QWEN_NAMES |= {f"v.blk.0.{one}.weight" for one in ("ln1", "ln2", "ffn_up", "ffn_down")}
NAMES = {
    "Qwen2VL": QWEN_NAMES | {"v.blk.0.ln1.bias", "v.post_ln.bias", "v.blk.0.ffn_up.bias"},
    "Qwen2_5_VL": QWEN_NAMES | {"v.blk.0.ffn_gate.weight", "v.blk.0.ffn_gate.bias"},
    "Gemma3": {
        "v.patch_embd.weight", "v.patch_embd.bias", "v.position_embd.weight", "v.post_ln.weight", "v.post_ln.bias",
        "mm.input_projection.weight", "mm.soft_emb_norm.weight", "v.blk.1.attn_q.weight", "v.blk.1.attn_out.bias",
        "v.blk.1.ffn_up.weight", "v.blk.1.ffn_down.weight", "v.blk.1.ln2.bias",
    },
}  # fmt: skip


def save_vision(folder: Path, kind: str, **changes) -> Path:
    """Returns the folder of a tiny random model in bfloat16, with a tokenizer that has the words for pictures."""
    words = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<start_of_image>", "<end_of_image>")
    special = ("<unk>", "<s>", "</s>", *words)
    ids = {"image_token_id": 5, "video_token_id": 5, "vision_start_token_id": 3, "vision_end_token_id": 4}
    if kind == "Gemma3":
        ids = {"image_token_index": 5, "boi_token_index": 6, "eoi_token_index": 7}
    config_class = getattr(transformers, f"{kind}Config")
    values = {key: dict(value) if isinstance(value, dict) else value for key, value in MODELS[kind].items()}
    values["vision_config"] |= changes
    config = config_class(**values, **ids)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or "mm_input" in name:
                parameter.data.add_(torch.randn_like(parameter) * 0.1)
    model.to(torch.bfloat16).save_pretrained(folder)
    save_tokenizer(byte_level_tokenizer(special=special), folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2] * 3})
    )
    return folder


def export(folder: Path, mix: str = "q8_0") -> Path:
    """Returns the folder with both files."""
    options = {"iters": 0, "disable_opt_rtn": True, "device": "cpu", "format": f"gguf:{mix}", "seqlen": 32}
    out = folder.parent / f"out-{mix}"
    pipeline.run(open_session(RunConfig.from_options(model=str(folder), output_dir=str(out), **options)))
    return out


def read(folder: Path):
    """Returns tensors and keys of the vision tower's file."""
    (file,) = folder.glob("mmproj-*.gguf")
    reader = gguf.GGUFReader(file)
    return {t.name: t for t in reader.tensors}, {key: field.contents() for key, field in reader.fields.items()}


@pytest.mark.parametrize("kind", MODELS)
def test_both_files_are_written_and_all_values_come_back(tmp_path, kind):
    folder = save_vision(tmp_path / "tiny", kind)
    out = export(folder)
    assert len(list(out.glob("*.gguf"))) == 2
    tensors, keys = read(out)
    assert NAMES[kind] <= tensors.keys()
    assert keys["general.architecture"] == "clip"
    assert keys["clip.vision.projection_dim"] == 256
    assert keys["clip.vision.image_mean"] == pytest.approx([0.5, 0.4, 0.3])
    assert check_mmproj(out, "q8_0", CheckpointSource(folder)) == []


@pytest.mark.parametrize("kind", ["Qwen2VL", "Qwen2_5_VL"])
def test_queries_keys_and_values_are_thirds_and_patches_one_tensor_for_each_frame(tmp_path, kind):
    folder = save_vision(tmp_path / "tiny", kind)
    tensors, keys = read(export(folder, "bf16"))
    source = CheckpointSource(folder)
    joined = source.read("visual.blocks.1.attn.qkv.weight").float()
    patches = source.read("visual.patch_embed.proj.weight").float()

    def values(name):
        return torch.from_numpy(gguf.dequantize(tensors[name].data, tensors[name].tensor_type).copy())

    for index, one in enumerate("qkv"):
        assert torch.equal(values(f"v.blk.1.attn_{one}.weight"), joined[index * 128 : (index + 1) * 128])
    assert torch.equal(values("v.patch_embd.weight").reshape(128, 3, 14, 14), patches[:, :, 0])
    assert torch.equal(values("v.patch_embd.weight.1").reshape(128, 3, 14, 14), patches[:, :, 1])
    assert tensors["v.blk.1.attn_q.weight"].tensor_type.name == "BF16"
    assert tensors["v.patch_embd.weight"].tensor_type.name == "F32"
    assert keys.get("clip.vision.n_wa_pattern") == (2 if kind == "Qwen2_5_VL" else None)


def test_gemmas_projector_norm_has_one_added_and_its_pooling_is_told(tmp_path):
    folder = save_vision(tmp_path / "tiny", "Gemma3")
    tensors, keys = read(export(folder))
    stored = CheckpointSource(folder).read("multi_modal_projector.mm_soft_emb_norm.weight").float()
    assert torch.equal(torch.from_numpy(tensors["mm.soft_emb_norm.weight"].data.copy()), stored + 1)
    assert keys["clip.vision.projector.scale_factor"] == 2  # 4 x 4 patches become 2 x 2 tokens
    assert not any("head" in name for name in tensors)


def test_the_names_of_published_gemma_checkpoints_are_known():
    from auto_round.formats.gguf.vision import VISION_FAMILIES

    family = VISION_FAMILIES["gemma3"]
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, 2)
    for stem in ("vision_tower", "vision_tower.vision_model", "model.vision_tower.vision_model"):
        key = family.key_of(f"{stem}.encoder.layers.1.mlp.fc1.weight")
        (place,) = family.place(key, lambda name: table.get_name(name, try_suffixes=(".weight", ".bias")))
        assert place.name == "v.blk.1.ffn_up.weight"
    assert family.key_of("language_model.model.norm.weight") is None


def test_a_damaged_file_is_found(tmp_path):
    folder = save_vision(tmp_path / "tiny", "Gemma3")
    out, source = export(folder), CheckpointSource(folder)
    path = mmproj_path(out, source)
    reader = gguf.GGUFReader(path)
    place = next(tensor for tensor in reader.tensors if tensor.name == "v.blk.0.attn_q.weight").data_offset
    data = bytearray(path.read_bytes())
    data[place + 1] ^= 0x40
    path.write_bytes(data)
    assert "v.blk.0.attn_q.weight" in check_mmproj(out, "q8_0", source)[0]
    path.unlink()
    assert check_mmproj(out, "q8_0", source) == ["mmproj-tiny.gguf is missing"]


def test_what_float16_cannot_hold_is_bfloat16():
    assert type_of("v.blk.0.attn_q.weight", torch.full((2, 2), 7e4), "F16") == "BF16"
    assert type_of("v.blk.0.attn_q.weight", torch.ones(2, 2), "F16") == "F16"
    assert type_of("v.blk.0.ln1.weight", torch.ones(2), "F16") == "F32"


def test_windows_that_llama_cpp_has_not_are_refused(tmp_path):
    folder = save_vision(tmp_path / "tiny", "Qwen2_5_VL", fullatt_block_indexes=[1, 2])
    with pytest.raises(UnsupportedError, match="fullatt_block_indexes"):
        planned(folder)


def test_the_tower_is_not_quantized(tmp_path):
    with pytest.raises(ConfigError, match="quant_nontext_module"):
        planned(save_vision(tmp_path / "tiny", "Gemma3"), quant_nontext_module=True)


@pytest.mark.parametrize("kind", MODELS)
def test_llama_cpp_sees_a_picture(tmp_path, kind):
    """The tower loads, and what the model predicts depends on the picture."""
    package, image = pytest.importorskip("xllamacpp"), pytest.importorskip("PIL.Image")
    out = export(save_vision(tmp_path / "tiny", kind), "bf16")
    (tower,) = out.glob("mmproj-*.gguf")
    (text,) = set(out.glob("*.gguf")) - {tower}
    parameters = package.CommonParams()
    parameters.model.path, parameters.mmproj.path, parameters.mmproj_use_gpu = str(text), str(tower), False
    parameters.n_ctx, parameters.n_parallel, parameters.warmup, parameters.verbosity = 512, 1, False, -1
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
    server = package.Server(parameters)

    def probabilities(color):
        buffer = io.BytesIO()
        image.new("RGB", (56, 56), color).save(buffer, format="PNG")
        data = base64.b64encode(buffer.getvalue()).decode()
        picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
        message = {"role": "user", "content": [{"type": "text", "text": "the "}, picture]}
        asked = {"max_tokens": 1, "logprobs": True, "top_logprobs": 100, "temperature": 0, "cache_prompt": False}
        answer = server.handle_chat_completions({"messages": [message], **asked})
        assert "choices" in answer, answer
        top = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        return {one["id"]: one["logprob"] for one in top}

    red, blue = probabilities((255, 0, 0)), probabilities((0, 0, 255))
    again = probabilities((255, 0, 0))
    colors = max(abs(red[one] - blue[one]) for one in red.keys() & blue.keys())
    # Which rows a product takes at a time differs from run to run, and with it the rounding to bfloat16.
    repeats = max(abs(red[one] - again[one]) for one in red.keys() & again.keys())
    assert colors > max(0.01, 5 * repeats)
