import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoRoundConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from auto_round.errors import CheckpointError, ConfigError, UnsupportedError
from auto_round.inference import select
from auto_round.inference.backends import BACKENDS
from auto_round.inference.convert_model import convert_hf_model, infer_target_device, post_init
from auto_round.inference.layer import QuantizedLinear
from auto_round.schemes import QuantizationScheme

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}


def load(folder, dtype=torch.float32, **options):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).eval()


@torch.no_grad()
def logits(model, ids):
    return model(ids).logits


def assert_same_logits(checkpoint, model):
    # The same float32 weights in the same kernels.
    expected = logits(checkpoint.dense, checkpoint.ids)
    torch.testing.assert_close(logits(model, checkpoint.ids), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("device_map", "expected"),
    [
        (None, "cpu"),
        ("cpu", "cpu"),
        (torch.device("cpu"), "cpu"),
        ({"": "cpu"}, "cpu"),
        ({"": torch.device("cpu")}, "cpu"),
        ({"a": "cpu", "b": "disk"}, "cpu"),
        ("cuda:1", "cuda"),
        (torch.device("cuda", 0), "cuda"),
        ({"a": "cpu", "b": "cuda:0"}, "cuda"),
        ({"a": "xpu"}, "xpu"),
    ],
)
def test_target_device_is_read_from_the_device_map(device_map, expected):
    assert infer_target_device(device_map) == expected


@pytest.mark.skipif(torch.accelerator.is_available(), reason="these depend on the machine")
def test_target_device_without_accelerator():
    assert infer_target_device("auto") == "cpu"
    assert infer_target_device({"": 0}) == "cuda"


@pytest.mark.parametrize("layout", ["gptq", "gptq_zp", "awq"])
@pytest.mark.parametrize("group_size", [-1, 32])
def test_auto_round_checkpoints_load(make_checkpoint, block_scheme, write_config, layout, group_size):
    fields = {"bits": 4, "group_size": group_size, "sym": False}
    checkpoint = make_checkpoint(write_config(layout, **fields), block_scheme(**fields), layout)
    model = load(checkpoint.folder, device_map="cpu")
    assert isinstance(model.model.layers[1].mlp.up_proj, QuantizedLinear)
    assert isinstance(model.lm_head, torch.nn.Linear)
    assert_same_logits(checkpoint, model)


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_width_loads(make_checkpoint, block_scheme, write_config, bits):
    fields = {"bits": bits, "group_size": 64, "sym": True}
    checkpoint = make_checkpoint(write_config(**fields), block_scheme(**fields))
    assert_same_logits(checkpoint, load(checkpoint.folder))


def test_mixed_schemes_and_a_quantized_lm_head_load(make_checkpoint, write_config):
    special = {
        "lm_head": {"bits": 8, "group_size": 64, "sym": False, "data_type": "int"},
        "model.layers.0.mlp.up_proj": {"bits": 2, "group_size": 32, "sym": False},
        "model.layers.1.mlp.up_proj": {"bits": 16},
    }

    def scheme(name):
        changes = {key: value for key, value in special.get(name, {}).items() if key != "data_type"}
        return QuantizationScheme(**changes) if changes.get("bits") != 16 else None

    checkpoint = make_checkpoint(write_config(extra_config=special), scheme, tie_word_embeddings=False)
    model = load(checkpoint.folder)
    assert isinstance(model.lm_head, QuantizedLinear)
    assert isinstance(model.model.layers[1].mlp.up_proj, torch.nn.Linear)
    assert_same_logits(checkpoint, model)


def test_biases_are_loaded(make_checkpoint, block_scheme, write_config):
    def fill(tensors):
        for name in tensors:
            if name.endswith(".bias"):
                tensors[name].normal_()

    checkpoint = make_checkpoint(write_config(), block_scheme(), edit=fill, attention_bias=True, mlp_bias=True)
    assert_same_logits(checkpoint, load(checkpoint.folder))
    assert bool(checkpoint.dense.model.layers[0].self_attn.q_proj.bias.any())


@pytest.mark.parametrize("shuffled", [False, True], ids=["in order", "desc_act"])
def test_gptq_checkpoints_are_taken_over(make_checkpoint, block_scheme, shuffled):
    config = {**GPTQ, "desc_act": shuffled}
    checkpoint = make_checkpoint(config, block_scheme(group_size=32), shuffled=shuffled)
    assert_same_logits(checkpoint, load(checkpoint.folder, quantization_config=AutoRoundConfig()))


def test_a_missing_group_index_is_not_taken_from_what_its_memory_held(write_config):
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1, "vocab_size": 64}
    model = LlamaForCausalLM(LlamaConfig(**sizes, quantization_config={**GPTQ, "quant_method": "auto-round"}))
    model, backends = convert_hf_model(model, "cpu")
    for name, buffer in model.named_buffers():
        if name.endswith("g_idx"):
            buffer.copy_(torch.arange(buffer.numel()) % (buffer.numel() // 32))
        else:
            buffer._is_hf_initialized = True
    post_init(model, backends)
    assert model.model.layers[0].mlp.up_proj.g_idx.tolist() == [0] * 32 + [1] * 32


@pytest.mark.parametrize("desc_act", [False, True])
def test_a_missing_group_index_is_rebuilt_unless_it_matters(make_checkpoint, block_scheme, desc_act):
    checkpoint = make_checkpoint({**GPTQ, "desc_act": desc_act}, block_scheme(group_size=32))
    if desc_act:
        with pytest.raises(CheckpointError, match=r"g_idx is missing"):
            load(checkpoint.folder, quantization_config=AutoRoundConfig())
    else:
        assert_same_logits(checkpoint, load(checkpoint.folder, quantization_config=AutoRoundConfig()))


def test_gptq_v2_keeps_zero_points(make_checkpoint, block_scheme):
    config = {**GPTQ, "sym": False, "checkpoint_format": "gptq_v2"}
    checkpoint = make_checkpoint(config, block_scheme(group_size=32, sym=False), "gptq_zp")
    assert_same_logits(checkpoint, load(checkpoint.folder, quantization_config=AutoRoundConfig()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("source", ["auto-round", "gptq", "awq"])
def test_saving_and_loading_again_changes_nothing(make_checkpoint, block_scheme, write_config, tmp_path, source, dtype):
    fields = {"group_size": 32, "sym": source != "awq"}
    layout = "awq" if source == "awq" else "gptq"
    shuffled = source == "gptq"
    configs = {
        "auto-round": write_config(**fields),
        "gptq": {**GPTQ, "desc_act": True},
        "awq": {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"},
    }
    checkpoint = make_checkpoint(configs[source], block_scheme(**fields), layout, shuffled, hidden_size=192)
    options = {} if source == "auto-round" else {"quantization_config": AutoRoundConfig()}
    model = load(checkpoint.folder, dtype, **options)
    model.save_pretrained(tmp_path / "saved")
    stored, saved = (load_file(folder / "model.safetensors") for folder in (checkpoint.folder, tmp_path / "saved"))
    assert stored.keys() == saved.keys()
    packed = [key for key in stored if key.endswith(("qweight", "qzeros", "scales", "g_idx"))]
    assert all(torch.equal(stored[key], saved[key]) and stored[key].dtype == saved[key].dtype for key in packed)
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]["bits"] == 4
    assert torch.equal(logits(load(tmp_path / "saved", dtype), checkpoint.ids), logits(model, checkpoint.ids))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_generate_works(make_checkpoint, block_scheme, write_config, dtype):
    fields = {"group_size": 32}
    checkpoint = make_checkpoint(write_config(**fields), block_scheme(**fields), hidden_size=192)
    options = {"max_new_tokens": 6, "do_sample": False}
    tokens = load(checkpoint.folder, dtype).generate(checkpoint.ids, **options)
    assert tokens.shape == (1, checkpoint.ids.shape[1] + 6)
    if dtype == torch.float32:
        assert torch.equal(tokens, checkpoint.dense.generate(checkpoint.ids, **options))


def test_bfloat16_on_a_cpu_uses_a_faster_backend_that_agrees(make_checkpoint, block_scheme, write_config):
    fields = {"group_size": 32}
    checkpoint = make_checkpoint(write_config(**fields), block_scheme(**fields), hidden_size=192)
    fast = load(checkpoint.folder, torch.bfloat16)
    plain = load(checkpoint.folder, torch.bfloat16, quantization_config=AutoRoundConfig(backend="torch"))
    assert plain.hf_quantizer.used_backends == ["auto_round:torch"]
    assert fast.hf_quantizer.used_backends != ["auto_round:torch"]
    exact = logits(checkpoint.dense, checkpoint.ids)
    # Eight tokens are served in bfloat16, twenty with activations of 8 bits, whose error is about twice as large.
    for ids, ratio in ((checkpoint.ids[:, :8], 1.5), (checkpoint.ids, 3)):
        expected = exact[:, : ids.shape[1]]
        error = [float((logits(model, ids).float() - expected).norm()) for model in (fast, plain)]
        assert error[0] < ratio * error[1]


@pytest.mark.parametrize(
    ("backend", "error", "text"),
    [
        (
            "torch_cpu_int4",
            UnsupportedError,
            r"cannot run 14 of the layers: .*dtype=float32 \(only bfloat16, float16\)",
        ),
        ("tortch", ConfigError, r"unknown backend 'tortch'\. Did you mean 'torch'"),
    ],
)
def test_a_backend_that_cannot_be_used_is_an_error(make_checkpoint, block_scheme, write_config, backend, error, text):
    checkpoint = make_checkpoint(write_config(), block_scheme())
    with pytest.raises(error, match=text):
        load(checkpoint.folder, quantization_config=AutoRoundConfig(backend=backend))


def test_missing_tensors_are_an_error(make_checkpoint, block_scheme, write_config):
    checkpoint = make_checkpoint(
        write_config(), block_scheme(), edit=lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.scales")
    )
    text = (
        r"1 tensors of quantized layers .* e\.g\. model\.layers\.1\.mlp\.up_proj\.scales\. .*extra_config with bits 16"
    )
    with pytest.raises(CheckpointError, match=text):
        load(checkpoint.folder)


@pytest.mark.parametrize(
    ("values", "options", "text"),
    [
        (
            {"block_name_to_quantize": "blocks"},
            {},
            r"no linear layer .*blocks: \('blocks',\); layers: model\.layers\.0",
        ),
        (
            {"extra_config": {"lm_head": {"bits": 4}}},
            {"tie_word_embeddings": True},
            r"tied to the embedding cannot be quantized \(1 modules, e\.g\. lm_head\)",
        ),
        (
            {"packing_format": "auto_round:auto_awq", "extra_config": {"model.layers.0.mlp.up_proj": {"bits": 8}}},
            {},
            r"layout awq cannot hold bits=8 \(only 4\) \(1 modules, e\.g\. model\.layers\.0\.mlp\.up_proj\)",
        ),
    ],
    ids=["no layer", "tied", "layout"],
)
def test_a_config_that_does_not_fit_the_model_is_refused(write_config, values, options, text):
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1, "vocab_size": 64}
    config = LlamaConfig(**sizes, **options, quantization_config={**write_config(), **values})
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    with pytest.raises(UnsupportedError, match=text):
        convert_hf_model(model, "cpu")


def test_experts_that_are_fused_in_an_unknown_way_are_refused(write_config):
    config = Qwen3MoeConfig(hidden_size=32, num_hidden_layers=1, num_experts=2, vocab_size=32, moe_intermediate_size=32)
    config.quantization_config = write_config()
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(config)
        model.model.layers[0].mlp.experts.scale = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(UnsupportedError, match=r"quantized experts.*e\.g\. model\.layers\.0\.mlp\.experts"):
        convert_hf_model(model, "cpu")


def test_conv1d_layers_are_swapped_with_their_features_transposed(write_config):
    config = GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=32)
    config.quantization_config = write_config(block_name_to_quantize="transformer.h", group_size=32, backend="torch")
    with torch.device("meta"):
        model = GPT2LMHeadModel(config)
    model, backends = convert_hf_model(model, "cpu")
    layer = model.transformer.h[0].attn.c_attn
    assert (layer.in_features, layer.out_features, layer.bias.shape) == (64, 192, (192,))
    assert tuple(layer.qweight.shape) == (8, 192)
    assert backends == ["auto_round:torch"]


def test_names_of_older_checkpoints_are_renamed_as_transformers_does(write_config):
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    sizes = {"intermediate_size": 64, "vocab_size": 64}
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2}
    config = Qwen2VLConfig(text_config={**text, **sizes}, vision_config=vision)
    config.quantization_config = write_config(block_name_to_quantize="model.layers,visual.blocks")
    with torch.device("meta"):
        model = Qwen2VLForConditionalGeneration(config)
    model, _ = convert_hf_model(model, "cpu")
    assert isinstance(model.model.language_model.layers[0].mlp.up_proj, QuantizedLinear)
    assert isinstance(model.model.visual.blocks[0].mlp.fc1, QuantizedLinear)
    assert isinstance(model.model.visual.merger.mlp[0], torch.nn.Linear)


def test_post_init_of_a_model_loaded_by_hand_checks_nothing(make_checkpoint, block_scheme, write_config):
    checkpoint = make_checkpoint(write_config(), block_scheme())
    config = checkpoint.dense.config
    config.quantization_config = write_config()
    model, backends = convert_hf_model(LlamaForCausalLM(config).eval(), "cpu")
    model.load_state_dict(load_file(checkpoint.folder / "model.safetensors"))
    post_init(model, backends)
    assert_same_logits(checkpoint, model)


def test_offloaded_layers_are_refused(write_config):
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1, "vocab_size": 64}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**sizes, quantization_config=write_config()))
    with pytest.raises(
        UnsupportedError, match=r"self_attn\.q_proj was offloaded to disk; load with offload_buffers=False"
    ):
        post_init(*convert_hf_model(model, "cpu"))


def test_importing_needs_no_optional_package():
    code = "import sys, auto_round.inference.convert_model; print(sorted(sys.modules))"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "'torch'" in modules
    for package in ("triton", "gptqmodel", "auto_round_kernel", "datasets", "gguf", "auto_round.formats"):
        assert f"'{package}'" not in modules


@pytest.fixture
def bf16_checkpoint(make_checkpoint, block_scheme, write_config):
    fields = {"group_size": 32}
    return make_checkpoint(write_config(**fields), block_scheme(**fields), hidden_size=192)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_cast_model_computes_what_one_loaded_so_does(bf16_checkpoint, dtype):
    model = load(bf16_checkpoint.folder, torch.bfloat16)
    layer = model.model.layers[0].mlp.up_proj
    logits(model, bf16_checkpoint.ids)
    before = layer.kernel
    model.to(dtype)
    # Casting rounds what is not quantized, and the rotary table, differently from loading.
    fresh = load(bf16_checkpoint.folder, dtype)
    x = torch.randn(3, 192).to(dtype)
    assert torch.equal(layer(x), fresh.model.layers[0].mlp.up_proj(x))
    assert layer.kernel is not before
    assert logits(model, bf16_checkpoint.ids).dtype == dtype


def test_a_model_cast_to_what_its_named_backend_refuses_says_so_when_called(bf16_checkpoint):
    options = {"quantization_config": AutoRoundConfig(backend="torch_cpu_int4")}
    model = load(bf16_checkpoint.folder, torch.bfloat16, **options).to(torch.float32)
    with pytest.raises(UnsupportedError, match=r"'torch_cpu_int4' cannot run 1 of the layers: dtype=float32"):
        logits(model, bf16_checkpoint.ids)
    assert logits(model.to(torch.bfloat16), bf16_checkpoint.ids).isfinite().all()


def test_the_state_of_a_model_is_its_checkpoint_whatever_its_kernels_hold(bf16_checkpoint):
    stored = load_file(bf16_checkpoint.folder / "model.safetensors")
    state = load(bf16_checkpoint.folder, torch.bfloat16).state_dict()
    assert state.keys() == stored.keys()
    packed = [key for key in stored if key.endswith(("qweight", "qzeros", "scales"))]
    assert all(torch.equal(state[key], stored[key]) for key in packed)


def test_a_better_backend_that_is_not_installed_is_told_in_one_line(bf16_checkpoint, monkeypatch, caplog):
    better = dataclasses.replace(BACKENDS["torch"], name="theirs:fast", requires=("no_such_package",), priority=99)
    monkeypatch.setattr(select, "all_backends", lambda: [better, BACKENDS["torch"]])
    for backend, lines in (("auto", 1), ("torch", 0)):
        caplog.clear()
        load(bf16_checkpoint.folder, quantization_config=AutoRoundConfig(backend=backend))
        assert sum("pip install no_such_package would bring" in line for line in caplog.messages) == lines


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_model_moves_to_a_gpu_and_back(bf16_checkpoint):
    model = load(bf16_checkpoint.folder, torch.bfloat16)
    before = logits(model, bf16_checkpoint.ids)
    moved = logits(model.to("cuda"), bf16_checkpoint.ids.cuda()).cpu()
    there = load(bf16_checkpoint.folder, torch.bfloat16, device_map="cuda")
    assert torch.equal(moved, logits(there, bf16_checkpoint.ids.cuda()).cpu())
    assert torch.equal(logits(model.to("cpu"), bf16_checkpoint.ids), before)
    stored = load_file(bf16_checkpoint.folder / "model.safetensors")
    state = there.state_dict()
    assert all(torch.equal(state[key].cpu(), stored[key]) for key in stored if key.endswith("qweight"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_model_spread_over_cpu_and_gpu_computes_the_same(bf16_checkpoint):
    names = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.0", "model.layers.1"]
    device_map = {**dict.fromkeys(names, "cuda:0"), "model.layers.1": "cpu"}
    spread = load(bf16_checkpoint.folder, torch.bfloat16, device_map=device_map)
    whole = load(bf16_checkpoint.folder, torch.bfloat16, device_map="cuda")
    ids = bf16_checkpoint.ids.cuda()
    torch.testing.assert_close(logits(spread, ids), logits(whole, ids), rtol=0.05, atol=0.05)
