from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from auto_round.checkpoint import (
    CheckpointSource,
    ModuleSource,
    copy_side_files,
    quantization_of,
    resolve_folder,
    without_quantization,
)
from auto_round.errors import CheckpointError, ConfigError
from auto_round.shards import INDEX_NAME, ShardWriter

KINDS = ("llama", "qwen3", "opt", "gpt2", "qwen3_moe", "mixtral")
ANY_SIZE = 10**9


@pytest.fixture(scope="session")
def any_model(make_model):
    """Returns make(kind, **config) -> a tiny model."""
    return make_model


def blocks_of(model) -> list[str]:
    lists = [name for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList)]
    stem = min(lists, key=len)
    return [f"{stem}.{index}" for index in range(len(model.get_submodule(stem)))]


def unfused_parameters(model) -> dict[str, torch.Tensor]:
    """Returns the parameters of a model by name, fused experts cut into matrices."""
    found = {}
    gate, up, down = ("w1", "w3", "w2") if "Mixtral" in type(model).__name__ else ("gate_proj", "up_proj", "down_proj")
    for name, tensor in model.named_parameters(remove_duplicate=False):
        stem, _, leaf = name.rpartition(".")
        if not stem.endswith(".experts"):
            found[name] = tensor
            continue
        for index, own in enumerate(tensor):
            parts = own.chunk(2) if leaf == "gate_up_proj" else [own]
            for part, projection in zip(parts, [gate, up] if len(parts) == 2 else [down], strict=True):
                found[f"{stem}.{index}.{projection}.weight"] = part
    return found


def check_same_tensors(source, model) -> None:
    """Asserts that a source gives, block by block and as a whole, exactly the parameters of a model."""
    wanted = unfused_parameters(model)
    for block in blocks_of(model):
        found = source.tensors(block)
        expected = {name: tensor for name, tensor in wanted.items() if name.startswith(block + ".")}
        assert expected
        assert set(expected) <= set(found)
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), name
            assert found[name].dtype == tensor.dtype, name


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_gives_the_tensors_of_the_model_saved_to_it(any_model, kind, tmp_path):
    model = any_model(kind)
    model.save_pretrained(tmp_path)
    source = CheckpointSource(tmp_path)
    check_same_tensors(source, model)
    # Once more: reading a block leaves nothing behind that a second reading would stumble over.
    check_same_tensors(source, model)
    assert all(parameter.is_meta for parameter in source.model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_in_memory_gives_what_its_folder_gives(any_model, kind, tmp_path):
    model = any_model(kind)
    model.save_pretrained(tmp_path)
    on_disk, in_memory = CheckpointSource(tmp_path), ModuleSource(model)
    check_same_tensors(in_memory, model)
    assert set(in_memory.keys()) == set(on_disk.keys())
    for key, name in on_disk.keys().items():
        assert in_memory.keys()[key] == name, key
        assert torch.equal(in_memory.read(key), on_disk.read(key)), key


def test_experts_have_a_name_each_in_the_checkpoint_and_in_the_model(any_model, tmp_path):
    any_model("mixtral").save_pretrained(tmp_path)
    keys = CheckpointSource(tmp_path).keys()
    assert keys["model.layers.1.block_sparse_moe.experts.3.w1.weight"] == "model.layers.1.mlp.experts.3.w1.weight"
    assert keys["model.layers.0.block_sparse_moe.gate.weight"] == "model.layers.0.mlp.gate.weight"
    assert None not in keys.values()


@pytest.mark.parametrize("kind", ["gpt_oss", "llama4", "granitemoe"])
def test_what_a_checkpoint_stores_fused_is_listed_by_slices_and_joined_again(any_model, kind, tmp_path):
    model = any_model(kind)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    for source in (CheckpointSource(tmp_path), ModuleSource(model)):
        keys = source.keys()
        fused = source.fused()
        assert fused
        assert fused.keys() <= stored.keys()
        assert not fused.keys() & keys.keys()
        assert set(stored) - set(fused) == set(keys) - {part for parts in fused.values() for part in parts}
        for key, parts in fused.items():
            assert torch.equal(source.join(key, {part: source.read(part) for part in parts}), stored[key])


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_weights_may_lie_in_several_files(any_model, kind, tmp_path):
    model = any_model(kind)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    check_same_tensors(CheckpointSource(tmp_path), model)


def test_sixteen_bit_weights_stay_as_they_are_stored(any_model, tmp_path):
    model = any_model("llama").bfloat16()
    model.save_pretrained(tmp_path)
    source = CheckpointSource(tmp_path)
    check_same_tensors(source, model)
    assert {source.read(key).dtype for key in source.keys()} == {torch.bfloat16}


def test_a_tied_head_is_stored_once_and_found_under_both_names(any_model, tmp_path):
    model = any_model("llama", tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    source = CheckpointSource(tmp_path)
    assert "lm_head.weight" not in source.keys()
    assert torch.equal(source.tensors("lm_head")["lm_head.weight"], model.model.embed_tokens.weight)
    assert torch.equal(source.tensors("model.embed_tokens")["model.embed_tokens.weight"], model.lm_head.weight)
    assert set(ModuleSource(model).keys()) == set(source.keys())


def test_buffers_of_the_model_are_real(any_model, tmp_path):
    model = any_model("llama")
    model.save_pretrained(tmp_path)
    found = CheckpointSource(tmp_path).tensors("model.rotary_emb")
    assert torch.equal(found["model.rotary_emb.inv_freq"], model.model.rotary_emb.inv_freq)


def save_pickled(model, folder: Path, *, shards: int = 1) -> None:
    folder.mkdir(exist_ok=True)
    model.config.save_pretrained(folder)
    state = list(model.state_dict().items())
    size = -(-len(state) // shards)
    files = {}
    for number in range(shards):
        name = "pytorch_model.bin" if shards == 1 else f"pytorch_model-{number + 1:05d}-of-{shards:05d}.bin"
        part = dict(state[number * size : (number + 1) * size])
        torch.save(part, folder / name)
        files.update(dict.fromkeys(part, name))
    if shards > 1:
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))


@pytest.mark.parametrize("shards", [1, 3])
def test_pickled_weights_are_read(any_model, shards, tmp_path):
    model = any_model("llama")
    save_pickled(model, tmp_path, shards=shards)
    check_same_tensors(CheckpointSource(tmp_path), model)


def test_safetensors_come_before_pickled_weights(any_model, tmp_path):
    model = any_model("llama")
    save_pickled(any_model("llama", vocab_size=32), tmp_path)
    model.save_pretrained(tmp_path)
    check_same_tensors(CheckpointSource(tmp_path), model)


class Dangerous:
    """Would make a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_a_pickle_that_holds_code_is_refused_and_not_run(any_model, tmp_path):
    any_model("llama").config.save_pretrained(tmp_path)
    trace = tmp_path / "trace"
    torch.save({"model.embed_tokens.weight": Dangerous(trace)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin cannot be read"):
        CheckpointSource(tmp_path)
    assert not trace.exists()


@pytest.mark.parametrize("bytes_left", [0, 4, 100, -50], ids=["empty", "half a header size", "half a header", "cut"])
def test_a_truncated_file_is_reported(any_model, bytes_left, tmp_path):
    any_model("llama").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:bytes_left])
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        CheckpointSource(tmp_path)


def test_a_truncated_shard_is_reported_when_it_is_read(any_model, tmp_path):
    any_model("llama").save_pretrained(tmp_path, max_shard_size="40KB")
    file = max(tmp_path.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-50])
    source = CheckpointSource(tmp_path)
    (key,) = [key for key, shard in source.stored.files.items() if shard == file.name][:1]
    with pytest.raises(CheckpointError, match=f"{file.name} cannot be read"):
        source.read(key)


def test_a_truncated_pickle_is_reported(any_model, tmp_path):
    save_pickled(any_model("llama"), tmp_path)
    file = tmp_path / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:-5000])
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin cannot be read"):
        CheckpointSource(tmp_path)


def test_a_missing_shard_is_named(any_model, tmp_path):
    any_model("llama").save_pretrained(tmp_path, max_shard_size="40KB")
    gone = sorted(tmp_path.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(CheckpointError, match=f"not there: {gone.name}"):
        CheckpointSource(tmp_path)


def test_a_key_that_its_shard_does_not_hold_is_reported(any_model, tmp_path):
    any_model("llama").save_pretrained(tmp_path, max_shard_size="40KB")
    index = json.loads((tmp_path / INDEX_NAME).read_text())
    files = sorted(set(index["weight_map"].values()))
    key = next(key for key, file in index["weight_map"].items() if file == files[0])
    index["weight_map"][key] = files[1]
    (tmp_path / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=key):
        CheckpointSource(tmp_path).read(key)


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_a_broken_index_is_reported(any_model, text, tmp_path):
    any_model("llama").save_pretrained(tmp_path, max_shard_size="40KB")
    (tmp_path / INDEX_NAME).write_text(text)
    with pytest.raises(CheckpointError, match=INDEX_NAME):
        CheckpointSource(tmp_path)


def test_a_missing_tensor_is_named(any_model, tmp_path):
    model = any_model("llama")
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"]
    (tmp_path / "model.safetensors").unlink()
    writer = ShardWriter(tmp_path, ANY_SIZE)
    for key, tensor in state.items():
        writer.add(key, tensor)
    writer.close()
    source = CheckpointSource(tmp_path)
    source.tensors("model.layers.0")
    with pytest.raises(CheckpointError, match=r"no weights for model\.layers\.1\.mlp\.up_proj\.weight \(1 in all\)"):
        source.tensors("model.layers.1")


def test_a_folder_without_weights_is_reported(any_model, tmp_path):
    any_model("llama").config.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"holds no weights \(\*\.safetensors or pytorch_model\*\.bin\)"):
        CheckpointSource(tmp_path)


def edit_config(folder: Path, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_a_folder_without_a_config_is_no_model(any_model, tmp_path):
    any_model("llama").save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        CheckpointSource(tmp_path)


def test_code_in_the_folder_runs_only_on_demand(any_model, tmp_path):
    any_model("llama").save_pretrained(tmp_path)
    trace = tmp_path / "trace"
    (tmp_path / "own.py").write_text(f"open({str(trace)!r}, 'w').close()\n")
    edit_config(tmp_path, auto_map={"AutoModelForCausalLM": "own.Model", "AutoConfig": "own.Config"})
    with pytest.raises(ConfigError, match="--trust_remote_code"):
        CheckpointSource(tmp_path)
    assert not trace.exists()


@pytest.mark.parametrize("key", ["quantization_config", "quantization", "compression_config"])
def test_a_quantization_is_found_in_a_config_and_taken_out_of_it(key):
    config = {"model_type": "llama", key: {"bits": 4}}
    assert quantization_of(config) == {"bits": 4}
    assert without_quantization(config) == {"model_type": "llama"}
    assert quantization_of({"model_type": "llama", key: None}) is None


def test_a_quantization_may_be_said_of_the_language_part_alone():
    config = {"text_config": {"hidden_size": 8, "quantization_config": {"bits": 4}}, "vision_config": {}}
    assert quantization_of(config) == {"bits": 4}
    assert without_quantization(config) == {"text_config": {"hidden_size": 8}, "vision_config": {}}
    assert quantization_of(without_quantization(config)) is None


def test_a_quantized_model_is_refused_by_its_method(any_model, tmp_path):
    any_model("llama").save_pretrained(tmp_path)
    edit_config(tmp_path, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ConfigError, match=r"quantized already \(gptq\)"):
        CheckpointSource(tmp_path)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3_moe"])
def test_a_quantized_folder_is_reopened_with_tensors_from_elsewhere(any_model, kind, tmp_path):
    model = any_model(kind)
    model.config.save_pretrained(tmp_path)
    edit_config(tmp_path, quantization_config={"quant_method": "gptq", "bits": 4})
    memory = ModuleSource(model)
    source = CheckpointSource.reopened(tmp_path, {key: memory.read(key) for key in memory.keys()})
    check_same_tensors(source, model)
    assert source.keys() == memory.keys()
    assert not hasattr(source.model.config, "quantization_config")


def test_stored_tensors_that_no_part_of_the_model_takes_are_known(any_model, tmp_path):
    """Experts take part in the model, although no single parameter has their name."""
    any_model("mixtral").save_pretrained(tmp_path)
    assert CheckpointSource(tmp_path).ignored() == set()
    extra = "model.layers.0.self_attn.rotary_emb.inv_freq"
    file = tmp_path / "model.safetensors"
    save_file({**load_file(file), extra: torch.ones(8)}, file)
    assert CheckpointSource(tmp_path).ignored() == {extra}
    assert ModuleSource(any_model("mixtral")).ignored() == set()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("limit", [40_000, ANY_SIZE], ids=["many shards", "one shard"])
def test_a_model_in_memory_can_be_written_and_read_back(any_model, kind, limit, tmp_path):
    """Experts are handed out as views of one tensor, which must not trouble the writer."""
    model = any_model(kind)
    model.config.save_pretrained(tmp_path)
    source = ModuleSource(model)
    writer = ShardWriter(tmp_path, limit)
    for key in source.keys():
        writer.add(key, source.read(key))
    writer.close()
    check_same_tensors(CheckpointSource(tmp_path), model)


def test_side_files_travel_and_weights_and_configs_do_not(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "folder").mkdir(parents=True)
    target.mkdir()
    kept = {"tokenizer.json", "tokenizer.model", "chat_template.jinja", "LICENSE", "modeling_own.py", "vocab.txt"}
    left = {
        "config.json",
        "a.safetensors",
        "pytorch_model.bin",
        "x.gguf",
        INDEX_NAME,
        ".hidden",
        "quantization_config.json",
    }
    for name in kept | left:
        (source / name).write_text(name)
    copy_side_files(source, target)
    assert {file.name for file in target.iterdir()} == kept
    assert (target / "tokenizer.json").read_text() == "tokenizer.json"


def test_a_folder_is_itself(tmp_path):
    assert resolve_folder(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("name", ["/no/such/folder", "./no_such", "no_such", "a/b/c"])
def test_what_cannot_be_a_hub_name_is_not_looked_up(name):
    with pytest.raises(ConfigError, match="no such folder"):
        resolve_folder(name)
