"""The formats as users meet them: what they prescribe, refuse and write."""

import re

import pytest
import torch

from auto_round import AutoRound, pipeline
from auto_round.config import RunConfig
from auto_round.errors import ConfigError, UnsupportedError, VerificationError
from auto_round.formats import EXPORTERS
from auto_round.formats.gguf.mixes import MIXES

from .conftest import byte_level_tokenizer, save_tokenizer

pytest.importorskip("gguf")


def planned(folder, name="gguf:q4_k_m", **options):
    """Returns the plan of a run; nothing is quantized."""
    places = {"model": str(folder), "output_dir": str(folder.parent / "out"), "device": "cpu"}
    return pipeline.open_session(RunConfig.from_options(**{**places, "format": name, **options})).plan


def schemes(plan):
    return {entry.layer.name: str(entry.scheme) for entry in plan.entries}


@pytest.mark.parametrize("mix", MIXES)
def test_every_mixture_is_a_format(mix):
    assert EXPORTERS[f"gguf:{mix}"].name == f"gguf:{mix}"


def test_the_plan_follows_the_mixture(save_model):
    plan = planned(save_model(num_hidden_layers=3))
    found = schemes(plan)
    assert [found[f"model.layers.{n}.mlp.down_proj"][:7] for n in range(3)] == ["int_dq4", "int_dq4", "int_dq6"]
    assert found["lm_head"].startswith("int_dq6")
    assert found["model.embed_tokens"].startswith("int_dq4")
    assert plan.prescribed_by == "gguf:q4_k_m"


def test_a_tied_output_layer_is_the_embedding(save_model):
    found = schemes(planned(save_model("llama-tied")))
    assert found["lm_head"] == "16-bit"
    assert found["model.embed_tokens"].startswith("int_dq6")


def test_float_formats_quantize_nothing_and_need_no_calibration(export_gguf):
    exported = export_gguf("bf16", iters=200, disable_opt_rtn=False, dataset="not/there")
    assert not exported.plan.quantized()
    assert {t.tensor_type.name for t in exported.tensors().values()} == {"BF16", "F32"}


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 3},
        {"group_size": 128},
        {"sym": True},
        {"scheme": "W4A16"},
        {"act_bits": 8},
        {"data_type": "mx_fp4"},
        {"static_kv_dtype": "fp8"},
    ],
    ids=str,
)
def test_options_that_contradict_the_format_are_refused(save_model, options):
    with pytest.raises(ConfigError, match=rf"{next(iter(options))}=.*gguf:q4_k_m"):
        planned(save_model(), **options)


@pytest.mark.parametrize("options", [{"bits": 4}, {"scheme": "gguf:q4_k_m"}, {"scheme": "GGUF:Q4_K"}], ids=str)
def test_options_that_say_the_same_are_taken(save_model, options):
    folder = save_model()
    assert schemes(planned(folder, **options)) == schemes(planned(folder))


def test_layer_config_wins(save_model):
    config = {"down_proj": "gguf:q8_0", "layers.0.self_attn": 5, "lm_head": 16, "embed_tokens": "gguf:q3_k"}
    found = schemes(planned(save_model(), layer_config=config, fp_layers="layers.2.mlp.up_proj"))
    assert found["model.layers.1.mlp.down_proj"] == "int8 g32 sym"
    assert found["model.layers.0.self_attn.v_proj"].startswith("int_dq5")
    assert found["model.embed_tokens"].startswith("int_dq3")
    assert found["lm_head"] == found["model.layers.2.mlp.up_proj"] == "16-bit"


def test_plain_mixtures_give_plain_blocks_for_a_number_of_bits(save_model):
    found = schemes(planned(save_model(), "gguf:q4_1", layer_config={"up_proj": 5}))
    assert found["model.layers.0.mlp.up_proj"].startswith("int_float_zp5")


@pytest.mark.parametrize(
    ("family", "config", "text"),
    [
        ("llama-tied", {"lm_head": 8}, "shares the embedding's tensor"),
        ("llama", {"down_proj": 7}, "no type of 7 bits"),
        ("llama", {"down_proj": {"bits": 4, "group_size": 64}}, "GGUF has no block type"),
        ("llama", {"nothing": 4}, "matches no linear layer"),
        ("deepseek-v3", {"kv_b_proj": 4}, "rearranged"),
        ("qwen2-moe", {"shared_expert_gate": 8}, "keeps it in float32"),
    ],
)
def test_layer_configs_that_cannot_be_are_refused(save_model, family, config, text):
    with pytest.raises((ConfigError, UnsupportedError), match=text):
        planned(save_model(family), layer_config=config)


@pytest.mark.parametrize("others", ["gguf:q4_k_m,auto_round", "auto_gptq,gguf:q4_0", "gguf:q4_0,gguf:q8_0"])
def test_other_formats_cannot_be_written_in_the_same_run(save_model, others):
    with pytest.raises(UnsupportedError, match="cannot be written in one run with"):
        planned(save_model(), others)


def test_dequantized_weights_can_be_written_beside_it(save_model, tmp_path):
    folder = save_model("llama-tied")
    options = {"iters": 0, "disable_opt_rtn": True, "device": "cpu"}
    quantizer = AutoRound(str(folder), format="gguf:q4_k_m,fake", **options)
    _, folders = quantizer.quantize_and_save(tmp_path / "both", format="gguf:q4_k_m,fake")
    assert [path.name for path in folders] == ["gguf-q4-k-m", "fake"]
    assert list(folders[0].glob("*.gguf"))
    assert '"tie_word_embeddings": true' in (folders[1] / "config.json").read_text()


def test_a_run_planned_for_another_format_cannot_become_one(save_model):
    folder = save_model()
    quantizer = AutoRound(str(folder), bits=4, group_size=32, iters=0, disable_opt_rtn=True, device="cpu")
    with pytest.raises(UnsupportedError, match="planned without it"):
        quantizer.quantize_and_save(folder.parent / "out", format="gguf:q4_0")


def test_an_unknown_architecture_is_refused_before_any_work(make_model, tmp_path):
    make_model("opt").save_pretrained(tmp_path / "opt")
    save_tokenizer(byte_level_tokenizer(), tmp_path / "opt")
    with pytest.raises(
        UnsupportedError, match=r"architecture opt is not known\. Known: .*SmolLM \(llama, mistral\).*--format"
    ):
        planned(tmp_path / "opt")


@pytest.mark.parametrize(
    ("family", "changes", "text"),
    [
        ("qwen3-moe", {"norm_topk_prob": False}, "norm_topk_prob=false"),
        ("gemma2", {"query_pre_attn_scalar": 100}, "query_pre_attn_scalar=100"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type=dynamic"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(save_model, family, changes, text):
    with pytest.raises(UnsupportedError, match=text):
        planned(save_model(family, **changes))


def test_a_model_in_memory_is_written_with_its_tokenizer(save_model, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = save_model("qwen3-moe")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    options = {"format": "gguf:q4_k_m", "iters": 0, "disable_opt_rtn": True, "device": "cpu"}
    AutoRound(model, tokenizer, **options).quantize_and_save(tmp_path / "memory", format="gguf:q4_k_m")
    AutoRound(str(folder), **options).quantize_and_save(tmp_path / "disk", format="gguf:q4_k_m")
    found, wanted = (next((tmp_path / place).glob("*.gguf")) for place in ("memory", "disk"))
    import gguf

    tensors = [{t.name: t for t in gguf.GGUFReader(file).tensors} for file in (found, wanted)]
    assert tensors[0].keys() == tensors[1].keys()
    assert all((tensor.data == tensors[1][name].data).all() for name, tensor in tensors[0].items())


def test_the_file_is_named_after_model_size_and_type(export_gguf):
    assert re.fullmatch(r"tiny-[\d.]+M-Q4_K_M\.gguf", export_gguf("q4_k_m").files[0].name)
    assert export_gguf("fp16", folder=export_gguf("q8_0").original).files[0].name.endswith("-F16.gguf")


def test_split_files_hold_everything_and_pass_the_check(export_gguf):
    whole = export_gguf("q4_0").tensors()
    parts = export_gguf("q4_0", max_shard_size="200KB")
    assert len(parts.files) > 3
    assert parts.files[0].name.endswith(f"-00001-of-{len(parts.files):05d}.gguf")
    assert parts.metadata()["split.count"] == len(parts.files)
    assert {name: t.data.tobytes() for name, t in parts.tensors().items()} == {
        name: t.data.tobytes() for name, t in whole.items()
    }


def test_a_damaged_file_does_not_pass(save_model, tmp_path, monkeypatch):
    from auto_round.formats.gguf import writer

    good = writer.tensor_bytes

    def damaged(tensor, *rest):
        found = good(tensor, *rest)
        return found.flip(0) if tensor.name == "token_embd.weight" else found

    monkeypatch.setattr(writer, "tensor_bytes", damaged)
    options = {"format": "gguf:q8_0", "iters": 0, "disable_opt_rtn": True, "device": "cpu"}
    with pytest.raises(VerificationError, match=r"do not read back.*token_embd\.weight"):
        AutoRound(str(save_model()), **options).quantize_and_save(tmp_path / "out", format="gguf:q8_0")


def test_the_check_says_what_became_of_every_stored_tensor(save_model, tmp_path, caplog):
    caplog.set_level("INFO")
    options = {"format": "gguf:q4_k_m", "iters": 0, "disable_opt_rtn": True, "device": "cpu"}
    AutoRound(str(save_model("qwen3")), **options).quantize_and_save(tmp_path / "out", format="gguf:q4_k_m")
    line = next(record.getMessage() for record in caplog.records if record.getMessage().startswith("checked"))
    assert "all tensors accounted for (35 stored tensors in 35: 22 quantized, 13 float; dropped 0)" in line


def test_missing_package_names_the_pip_line(save_model, monkeypatch):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "gguf" else real(name, *a))
    with pytest.raises(ImportError, match=r"pip install 'auto-round\[gguf\]'"):
        planned(save_model())


def test_tuned_norms_come_into_the_file(export_gguf):
    data = {"dataset": [list(range(3, 35))] * 8, "nsamples": 8, "seqlen": 32}
    options = {"iters": 2, "enable_norm_bias_tuning": True, "batch_size": 4, **data}
    exported = export_gguf("q4_0", model={"num_hidden_layers": 1}, **options)
    assert torch.tensor(exported.tensors()["blk.0.attn_norm.weight"].data).isfinite().all()
