import copy
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from auto_round import pipeline
from auto_round import session as session_module
from auto_round.calibration import CalibrationSet
from auto_round.config import RunConfig
from auto_round.errors import ConfigError, ResumeMismatchError, UnsupportedError
from auto_round.formats.base import folder_name
from auto_round.layouts import LAYOUTS
from auto_round.store import RunStore
from auto_round.tuning import SignRound, round_plain

DEMO = Path(__file__).resolve().parents[1] / "examples" / "demo_model"
LAYOUT_NAMES = {"auto_round:auto_gptq": "gptq", "auto_round:auto_awq": "awq"}
FAST = {"iters": 3, "batch_size": 4, "group_size": 32, "device": "cpu"}
ROUNDING = {"iters": 0, "disable_opt_rtn": True, "group_size": 32, "device": "cpu"}


def open_session(model, output, **options):
    return session_module.open_session(RunConfig.from_options(model=model, output_dir=str(output), **options))


def run(model, output, **options):
    return pipeline.run(open_session(model, output, **options))


def quantize(model, work, **options):
    session = open_session(model, work, **options)
    return pipeline.quantize(session, work), session


def saved(model, folder, **options):
    model.save_pretrained(folder, **options)
    return str(folder)


def tensors_of(folder):
    found = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        found.update(load_file(file))
    return found


def bytes_of(folder):
    return {file.name: file.read_bytes() for file in sorted(Path(folder).glob("*")) if file.is_file()}


def assert_same_store(one, other):
    assert list(one.finished()) == list(other.finished())
    for block in one.finished():
        a, b = one.load(block), other.load(block)
        assert a.weights.keys() == b.weights.keys()
        assert a.summary() == b.summary()
        for name, weight in a.weights.items():
            assert torch.equal(weight.codes, b.weights[name].codes), name
            assert torch.equal(weight.scale, b.weights[name].scale), name
            assert weight.scheme == b.weights[name].scheme


def dense_weights(folder, plan):
    """Returns each quantized weight of a written checkpoint, unpacked by its layout, (O, I) float32."""
    config = json.loads((Path(folder) / "config.json").read_text())["quantization_config"]
    tensors = tensors_of(folder)
    layout = LAYOUTS[LAYOUT_NAMES[config["packing_format"]]]
    found = {}
    for name, entry in plan.quantized().items():
        layer = name.removesuffix(".weight")
        local = {key: tensors[f"{layer}.{key}"] for key in ("qweight", "qzeros", "scales")}
        found[name] = layout.unpack(local, entry.scheme, entry.layer.shape).dequantize()
    return found


@pytest.fixture
def ids(token_ids):
    return CalibrationSet(token_ids(8, 16))


# --- where weights come from ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gemma3", "opt", "gpt2"])
@pytest.mark.parametrize("options", [FAST, ROUNDING], ids=["tuned", "rounded"])
def test_a_folder_and_a_model_in_memory_give_the_same_store(kind, options, make_model, ids, tmp_path):
    model = make_model(kind)
    folder = saved(model, tmp_path / "model", max_shard_size="80KB")
    from_folder, _ = quantize(folder, tmp_path / "a", dataset=ids, **options)
    in_memory, _ = quantize(model, tmp_path / "b", dataset=ids, **options)
    assert_same_store(from_folder, in_memory)


def test_a_model_in_memory_is_not_changed(make_model, ids, tmp_path):
    model = make_model()
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict().items()}
    run(model, tmp_path / "out", dataset=ids, **FAST)
    for name, tensor in model.state_dict().items():
        assert tensor.data_ptr() == before[name][0]
        assert torch.equal(tensor, before[name][1])


def test_settings_of_torch_are_restored(make_model, ids, tmp_path):
    before = (torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory)
    run(make_model(), tmp_path / "out", dataset=ids, **FAST)
    assert before == (
        torch.are_deterministic_algorithms_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )


def test_plain_rounding_stores_each_weight_rounded_by_itself(make_model, tmp_path):
    model = make_model()
    store, session = quantize(model, tmp_path / "w", **ROUNDING)
    for name, entry in session.plan.quantized().items():
        block = re.match(r"model\.layers\.\d+", name)[0]
        expected = round_plain(model.get_parameter(name).detach(), entry.scheme)
        assert torch.equal(store.load(block).weights[name].codes, expected.codes)


def test_plain_rounding_reads_no_calibration_data(make_model, tmp_path):
    run(make_model(), tmp_path / "out", dataset="no-such-file.jsonl", **ROUNDING)


def test_what_lies_under_padding_changes_no_code(make_model, token_ids, tmp_path):
    mask = torch.ones(8, 16, dtype=torch.bool)
    mask[2:, 11:] = False  # the first two samples are whole
    stores = []
    for seed in (0, 9):
        tokens = torch.where(mask, token_ids(8, 16), token_ids(8, 16, seed=seed))
        options = {**FAST, "quant_lm_head": True, "bits": 2, "dataset": CalibrationSet(tokens, mask)}
        stores.append(quantize(make_model(), tmp_path / str(seed), **options)[0])
    assert_same_store(*stores)


@pytest.mark.parametrize("nblocks", [2, 3])
def test_blocks_tuned_together_are_all_stored(nblocks, make_model, ids, tmp_path):
    result = run(make_model("gemma3"), tmp_path / "out", dataset=ids, nblocks=nblocks, **FAST)
    assert len(result.summaries) == -(-3 // nblocks)
    layers = {key.split(".")[2] for key in tensors_of(tmp_path / "out") if key.endswith(".qweight")}
    assert layers == {"0", "1", "2"}


# --- formats and folders ----------------------------------------------------------------------------------------


def test_several_formats_cost_one_tuning(make_model, ids, tmp_path, monkeypatch):
    tuned = []
    call = SignRound.__call__
    monkeypatch.setattr(
        SignRound, "__call__", lambda self, task, config: tuned.append(task.block.name) or call(self, task, config)
    )
    formats = "auto_round,auto_round:gptqmodel,fake"
    result = run(make_model(), tmp_path / "out", dataset=ids, format=formats, **FAST)
    assert tuned == ["model.layers.0", "model.layers.1"]
    assert [folder.name for folder in result.folders] == ["auto-round", "auto-round-gptqmodel", "fake"]
    assert [folder_name(name) for name in formats.split(",")] == [folder.name for folder in result.folders]
    assert all((folder / "model.safetensors").is_file() for folder in result.folders)
    assert all(folder.parent == tmp_path / "out" for folder in result.folders)


def test_one_format_goes_into_the_folder_itself(make_model, tmp_path):
    assert run(make_model(), tmp_path / "out", **ROUNDING).folders == (tmp_path / "out",)
    assert (tmp_path / "out" / "config.json").is_file()


def test_formats_of_one_run_equal_those_of_single_runs(make_model, ids, tmp_path):
    run(make_model(), tmp_path / "both", dataset=ids, format="auto_round,fake", **FAST)
    run(make_model(), tmp_path / "one", dataset=ids, format="fake", **FAST)
    assert bytes_of(tmp_path / "both" / "fake") == bytes_of(tmp_path / "one")


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_fake_and_packed_exports_equal_the_stores_weights(kind, make_model, ids, tmp_path):
    model = make_model(kind)
    work = tmp_path / "work"
    run(model, tmp_path / "out", dataset=ids, format="auto_round,fake", work_dir=str(work), **FAST)
    session = open_session(model, tmp_path / "out", **FAST)
    store = RunStore.existing(work)
    fake = tensors_of(tmp_path / "out" / "fake")
    packed = dense_weights(tmp_path / "out" / "auto-round", session.plan)
    dense = dict(pipeline.dequantized(store, session.plan))
    assert dense.keys() == session.plan.quantized().keys() == packed.keys()
    for name, weight in dense.items():
        assert torch.equal(fake[name], weight), name
        transposed = session.plan.quantized()[name].layer.transposed
        assert torch.equal(packed[name], weight.t() if transposed else weight), name


def test_the_fake_export_loads_and_differs_from_the_original_only_in_quantized_weights(make_model, ids, tmp_path):
    model = make_model()
    run(model, tmp_path / "out", dataset=ids, format="fake", **FAST)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    plan = open_session(model, tmp_path, **FAST).plan
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, loaded[name])}
    assert changed == set(plan.quantized())


@pytest.mark.parametrize("kind", ["llama", "gemma3", "opt", "gpt2", "qwen3_moe"])
def test_every_stored_tensor_is_written_or_replaced_by_packed_ones(kind, make_model, tmp_path):
    model = make_model(kind)
    folder = saved(model, tmp_path / "model")
    run(folder, tmp_path / "out", **ROUNDING)
    plan = open_session(folder, tmp_path, **ROUNDING).plan
    before, after = tensors_of(folder), tensors_of(tmp_path / "out")
    layers = {name.removesuffix(".weight"): name for name in plan.quantized()}
    prefix = "" if kind != "gpt2" or any(key.startswith("transformer.") for key in before) else "transformer."
    replaced = {key for key in before if prefix + key in plan.quantized()}
    assert len(replaced) == len(layers)
    for key, tensor in before.items():
        if key in replaced:
            stem = key.removesuffix(".weight")
            assert {f"{stem}.{local}" for local in ("qweight", "qzeros", "scales")} <= after.keys()
            assert key not in after
        else:
            assert torch.equal(after[key], tensor), key
    assert len(after) == len(before) + 2 * len(replaced)


def test_shards_are_bounded_and_indexed(make_model, tmp_path):
    run(make_model(), tmp_path / "whole", **ROUNDING)
    run(make_model(), tmp_path / "out", max_shard_size="40KB", **ROUNDING)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    shards = sorted(file.name for file in (tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 1
    assert sorted(set(index["weight_map"].values())) == shards
    for shard in shards:
        tensors = load_file(tmp_path / "out" / shard)
        assert sum(t.numel() * t.element_size() for t in tensors.values()) <= 40_000 or len(tensors) == 1
        assert all(index["weight_map"][key] == shard for key in tensors)
    whole, cut = tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "out")
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[key], cut[key]) for key in whole)


def test_stale_shards_of_an_earlier_export_are_removed(make_model, tmp_path):
    run(make_model(), tmp_path / "out", max_shard_size="40KB", **ROUNDING)
    run(make_model(), tmp_path / "out", **ROUNDING)
    assert [file.name for file in (tmp_path / "out").glob("*.safetensors*")] == ["model.safetensors"]


def test_side_files_travel_and_weights_of_other_frameworks_do_not(make_model, tmp_path):
    folder = Path(saved(make_model(), tmp_path / "model"))
    (folder / "LICENSE").write_text("free")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 64, "tokenizer_class": "Nothing"}')
    (folder / "tf_model.h5").write_bytes(b"0")
    (folder / ".gitattributes").write_text("x")
    run(str(folder), tmp_path / "out", **ROUNDING)
    names = set(bytes_of(tmp_path / "out"))
    assert {"LICENSE", "chat_template.jinja", "tokenizer_config.json", "generation_config.json"} <= names
    assert not {"tf_model.h5", ".gitattributes"} & names
    assert (tmp_path / "out" / "LICENSE").read_text() == "free"


def test_model_dtype_changes_what_stays_in_16_bits_but_not_scales(make_model, tmp_path):
    run(make_model(), tmp_path / "out", model_dtype="bf16", **ROUNDING)
    for key, tensor in tensors_of(tmp_path / "out").items():
        if key.endswith(".scales"):
            assert tensor.dtype == torch.float16
        elif tensor.is_floating_point():
            assert tensor.dtype == torch.bfloat16, key
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


# --- what engines read ------------------------------------------------------------------------------------------


def quantization_config(folder):
    config = json.loads((Path(folder) / "config.json").read_text())["quantization_config"]
    assert config == json.loads((Path(folder) / "quantization_config.json").read_text())
    return config


def test_config_has_the_keys_that_engines_read(make_model, tmp_path):
    run(make_model(), tmp_path / "out", **ROUNDING)
    config = quantization_config(tmp_path / "out")
    wanted = {
        "bits": 4, "group_size": 32, "sym": True, "data_type": "int", "quant_method": "auto-round",
        "packing_format": "auto_round:auto_gptq", "block_name_to_quantize": "model.layers",
    }  # fmt: skip
    assert {name: config[name] for name in wanted} == wanted
    assert "extra_config" not in config


def test_layers_that_differ_are_in_extra_config(make_model, tmp_path):
    run(
        make_model(), tmp_path / "out", quant_lm_head=True, fp_layers="layers.1.mlp.down_proj",
        layer_config={"layers.0.self_attn.o_proj": {"bits": 8}, "up_proj": {"group_size": 64, "sym": False}},
        **ROUNDING,
    )  # fmt: skip
    assert quantization_config(tmp_path / "out")["extra_config"] == {
        "model.layers.0.self_attn.o_proj": {"bits": 8},
        "model.layers.0.mlp.up_proj": {"group_size": 64, "sym": False},
        "model.layers.1.mlp.up_proj": {"group_size": 64, "sym": False},
        "model.layers.1.mlp.down_proj": {"bits": 16},
        "lm_head": {"bits": 4, "group_size": 32, "sym": True, "data_type": "int"},
    }


def test_mixed_bits_are_stored_as_their_own_scheme_says(make_model, ids, tmp_path):
    model = make_model()
    options = {**FAST, "layer_config": {"down_proj": 8, "v_proj": 2, "q_proj": 3, "layers.1.mlp.up_proj": 16}}
    run(model, tmp_path / "out", dataset=ids, work_dir=str(tmp_path / "w"), **options)
    plan = open_session(model, tmp_path, **options).plan
    dense = dict(pipeline.dequantized(RunStore.existing(tmp_path / "w"), plan))
    for name, weight in dense_weights(tmp_path / "out", plan).items():
        assert torch.equal(weight, dense[name]), name
    tensors = tensors_of(tmp_path / "out")
    rows = {name: tensors[f"model.layers.0.{name}.qweight"].shape[0] for name in ("mlp.down_proj", "self_attn.q_proj")}
    assert rows == {"mlp.down_proj": 128 * 8 // 32, "self_attn.q_proj": 64 * 3 // 32}
    assert torch.equal(tensors["model.layers.1.mlp.up_proj.weight"], model.model.layers[1].mlp.up_proj.weight)


@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, -1], ids=["g32", "row"])
def test_each_scheme_is_written_exactly(bits, sym, group_size, make_model, ids, tmp_path):
    model = make_model(num_hidden_layers=1)
    options = {**FAST, "bits": bits, "sym": sym, "group_size": group_size, "iters": 1}
    run(model, tmp_path / "out", dataset=ids, work_dir=str(tmp_path / "w"), **options)
    plan = open_session(model, tmp_path, **options).plan
    dense = dict(pipeline.dequantized(RunStore.existing(tmp_path / "w"), plan))
    for name, weight in dense_weights(tmp_path / "out", plan).items():
        assert torch.equal(weight, dense[name]), name
    config = quantization_config(tmp_path / "out")
    assert (config["bits"], config["sym"], config["group_size"]) == (bits, sym, group_size)
    expected = "auto_round:auto_awq" if bits == 4 and not sym else "auto_round:auto_gptq"
    assert config["packing_format"] == expected


@pytest.mark.parametrize("group_size", [32, 128, -1])
def test_odd_widths_are_written_exactly(group_size, make_model, ids, tmp_path):
    """172 inputs of down_proj: groups of 32 leave a last one of 12 (no group of 16 or more divides 172)."""
    model = make_model(num_hidden_layers=1, intermediate_size=172)
    options = {**FAST, "group_size": group_size}
    run(model, tmp_path / "out", dataset=ids, work_dir=str(tmp_path / "w"), **options)
    session = open_session(model, tmp_path, **options)
    down = session.plan.quantized()["model.layers.0.mlp.down_proj.weight"]
    assert any("172" in str(change) for change in session.plan.adjustments) == (group_size != -1)
    dense = dict(pipeline.dequantized(RunStore.existing(tmp_path / "w"), session.plan))
    for name, weight in dense_weights(tmp_path / "out", session.plan).items():
        assert torch.equal(weight, dense[name]), name
    assert dense[down.layer.parameter].shape == (64, 172)


# --- output layer -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("place", ["memory", "folder"])
@pytest.mark.parametrize("options", [FAST, ROUNDING], ids=["tuned", "rounded"])
def test_a_quantized_output_layer(tied, place, options, make_model, ids, tmp_path):
    model = make_model(tie_word_embeddings=tied)
    given = model if place == "memory" else saved(model, tmp_path / "model")
    options = {**options, "quant_lm_head": True, "dataset": ids, "work_dir": str(tmp_path / "w")}
    run(given, tmp_path / "out", format="auto_round,fake", **options)
    plan = open_session(given, tmp_path, **options).plan
    dense = dict(pipeline.dequantized(RunStore.existing(tmp_path / "w"), plan))
    packed = dense_weights(tmp_path / "out" / "auto-round", plan)
    assert torch.equal(packed["lm_head.weight"], dense["lm_head.weight"])
    for folder in ("auto-round", "fake"):
        tensors = tensors_of(tmp_path / "out" / folder)
        assert torch.equal(tensors["model.embed_tokens.weight"], model.model.embed_tokens.weight)
        assert json.loads((tmp_path / "out" / folder / "config.json").read_text())["tie_word_embeddings"] is False
    assert quantization_config(tmp_path / "out" / "auto-round")["extra_config"]["lm_head"]["bits"] == 4
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "fake")
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded.lm_head.weight, dense["lm_head.weight"])
    assert torch.equal(loaded.model.embed_tokens.weight, model.model.embed_tokens.weight)


def test_an_untied_output_layer_takes_the_precision_of_the_model(make_model, tmp_path):
    model = make_model(tie_word_embeddings=True).half()
    options = {**ROUNDING, "quant_lm_head": True, "format": "fake"}
    run(model, tmp_path / "stored", **options)
    run(model, tmp_path / "asked", model_dtype="bf16", **options)
    assert tensors_of(tmp_path / "stored")["lm_head.weight"].dtype == torch.float16
    assert tensors_of(tmp_path / "asked")["lm_head.weight"].dtype == torch.bfloat16


def test_the_config_names_the_precision_of_a_model_in_memory(make_model, tmp_path):
    run(make_model().to(torch.bfloat16), tmp_path / "out", **ROUNDING)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


# --- work folder, interruption and resuming ---------------------------------------------------------------------


def test_the_work_folder_is_removed_unless_it_was_named(make_model, tmp_path):
    run(make_model(), tmp_path / "a", **ROUNDING)
    assert not (tmp_path / "a" / pipeline.WORK_FOLDER).exists()
    run(make_model(), tmp_path / "b", work_dir=str(tmp_path / "named"), **ROUNDING)
    assert list(RunStore.existing(tmp_path / "named").finished()) == ["model.layers.0", "model.layers.1"]


KILLED = """
import json, sys, time
from auto_round import pipeline
from auto_round.calibration import CalibrationSet
from auto_round.config import RunConfig
from auto_round.session import open_session
from auto_round.store import RunStore
import torch
options = json.loads(sys.argv[1])
if options.pop("tokens"):
    ids = torch.randint(2, 96, (8, 16), generator=torch.Generator().manual_seed(0))
    options["dataset"] = CalibrationSet(ids)
save = RunStore.save
def slow_save(self, block, result):
    if self.has("model.layers.0"):
        time.sleep(60)  # the test kills this process while it waits here
    save(self, block, result)
RunStore.save = slow_save
pipeline.run(open_session(RunConfig.from_options(**options)))
"""


def kill_after_first_block(options, work):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", KILLED, json.dumps(options)], env=environment)
    try:
        deadline = time.monotonic() + 60
        while not (work / "blocks" / "model.layers.0.safetensors").is_file():
            assert process.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("options", [FAST, ROUNDING], ids=["tuned", "rounded"])
def test_a_killed_run_that_is_resumed_writes_the_same_bytes(options, make_model, ids, tmp_path, monkeypatch):
    folder = saved(make_model(), tmp_path / "model")
    tuned = options is FAST
    output, work = tmp_path / "out", tmp_path / "out" / pipeline.WORK_FOLDER
    kill_after_first_block({**options, "model": folder, "output_dir": str(output), "tokens": tuned}, work)
    assert list(RunStore.existing(work).finished()) == ["model.layers.0"]

    written = []
    save = RunStore.save
    monkeypatch.setattr(
        RunStore, "save", lambda self, block, result: written.append(block) or save(self, block, result)
    )
    data = {"dataset": ids} if tuned else {}
    run(folder, output, resume=True, **options, **data)
    assert written == ["model.layers.1"]
    run(folder, tmp_path / "whole", **options, **data)
    assert bytes_of(output) == bytes_of(tmp_path / "whole")
    assert not work.exists()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"iters": 4}, "tune.iters: 3 then, 4 now"),
        ({"seed": 1}, "tune.seed: 42 then, 1 now"),
        ({"bits": 8}, "weights.model.layers.0.mlp.down_proj.weight.bits: 4 then, 8 now"),
        ({"nblocks": 2}, "tune.nblocks: 1 then, 2 now"),
    ],
    ids=["iters", "seed", "bits", "nblocks"],
)
def test_resuming_with_other_options_is_refused(changes, named, make_model, ids, tmp_path):
    model = make_model()
    work = str(tmp_path / "w")
    run(model, tmp_path / "out", dataset=ids, work_dir=work, **FAST)
    with pytest.raises(ResumeMismatchError, match=re.escape(named)):
        run(model, tmp_path / "out", dataset=ids, work_dir=work, resume=True, **{**FAST, **changes})


def test_resuming_with_other_calibration_data_is_refused(make_model, ids, token_ids, tmp_path):
    model, work = make_model(), str(tmp_path / "w")
    run(model, tmp_path / "out", dataset=ids, work_dir=work, **FAST)
    other = CalibrationSet(token_ids(8, 16, seed=5))
    with pytest.raises(ResumeMismatchError, match="calibration"):
        run(model, tmp_path / "out", dataset=other, work_dir=work, resume=True, **FAST)


def test_resuming_with_other_padding_is_refused(make_model, ids, tmp_path):
    model, work = make_model(), str(tmp_path / "w")
    run(model, tmp_path / "out", dataset=ids, work_dir=work, **FAST)
    mask = torch.ones(8, 16, dtype=torch.bool)
    mask[:, 12:] = False
    padded = CalibrationSet(ids.input_ids, mask)
    with pytest.raises(ResumeMismatchError, match="calibration"):
        run(model, tmp_path / "out", dataset=padded, work_dir=work, resume=True, **FAST)


def test_resuming_on_another_model_of_the_same_shape_is_refused(make_model, tmp_path):
    model, work = make_model(), str(tmp_path / "w")
    run(model, tmp_path / "out", work_dir=work, **ROUNDING)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    with pytest.raises(ResumeMismatchError, match="model"):
        run(other, tmp_path / "out", work_dir=work, resume=True, **ROUNDING)


def test_without_resume_a_work_folder_starts_anew(make_model, tmp_path):
    work = tmp_path / "w"
    run(make_model("gemma3"), tmp_path / "out", work_dir=str(work), **ROUNDING)
    run(make_model(), tmp_path / "out", work_dir=str(work), **{**ROUNDING, "bits": 8})
    store = RunStore.existing(work)
    assert list(store.finished()) == ["model.layers.0", "model.layers.1"]
    assert {w.scheme.bits for w in store.load("model.layers.0").weights.values()} == {8}


def test_more_than_ten_blocks_are_all_written(make_model, tmp_path):
    """Names of blocks sort as text: layers.10 comes before layers.2."""
    run(make_model(num_hidden_layers=11), tmp_path / "out", **ROUNDING)
    layers = {int(key.split(".")[2]) for key in tensors_of(tmp_path / "out") if key.endswith("down_proj.qweight")}
    assert layers == set(range(11))


# --- errors before any work -------------------------------------------------------------------------------------


def test_a_device_that_is_not_there_is_an_error(make_model, tmp_path):
    with pytest.raises(ConfigError, match="device 'nonsense' cannot be used"):
        run(make_model(), tmp_path / "out", **{**ROUNDING, "device": "nonsense"})


def test_a_format_that_cannot_hold_the_plan_is_refused_before_any_work(make_model, tmp_path):
    with pytest.raises(UnsupportedError, match="bits=8"):
        run(make_model(), tmp_path / "out", format="auto_round:auto_awq", bits=8, **ROUNDING)
    assert not (tmp_path / "out").exists()


def test_writing_over_the_original_model_is_refused_before_any_work(make_model, tmp_path, monkeypatch):
    folder = saved(make_model(), tmp_path / "model")
    before = bytes_of(folder)
    monkeypatch.setattr(RunStore, "save", lambda *_args: pytest.fail("a block was quantized"))
    with pytest.raises(ConfigError, match="holds the original model"):
        run(folder, tmp_path / "model", **ROUNDING)
    assert bytes_of(folder) == before


# --- a trained model --------------------------------------------------------------------------------------------


def test_the_demo_model_is_quantized_from_text(tmp_path):
    result = run(
        str(DEMO / "model"), tmp_path / "out", dataset=str(DEMO / "calib.jsonl"), nsamples=4, seqlen=32,
        bits=2, group_size=64, iters=2, batch_size=4, device="cpu",
    )  # fmt: skip
    assert len(result.summaries) == 6
    assert all(s["best_loss"] <= s["first_loss"] for s in result.summaries.values())
    assert (tmp_path / "out" / "tokenizer.json").is_file()
