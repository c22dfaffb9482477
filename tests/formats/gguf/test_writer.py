"""Files as they are written: names, parts, models in memory."""

import re

import pytest
import torch

from auto_round import AutoRound

pytest.importorskip("gguf")


def test_float_formats_quantize_nothing_and_need_no_calibration(export_gguf):
    exported = export_gguf("bf16", iters=200, disable_opt_rtn=False, dataset="not/there")
    assert not exported.plan.quantized()
    assert {t.tensor_type.name for t in exported.tensors().values()} == {"BF16", "F32"}


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


def test_tuned_norms_come_into_the_file(export_gguf):
    data = {"dataset": [list(range(3, 35))] * 8, "nsamples": 8, "seqlen": 32}
    options = {"iters": 2, "enable_norm_bias_tuning": True, "batch_size": 4, **data}
    exported = export_gguf("q4_0", model={"num_hidden_layers": 1}, **options)
    assert torch.tensor(exported.tensors()["blk.0.attn_norm.weight"].data).isfinite().all()
