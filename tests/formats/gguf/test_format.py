"""The formats as users meet them: what they prescribe, refuse and write."""

import pytest

from auto_round import AutoRound
from auto_round.errors import UnsupportedError
from auto_round.formats import EXPORTERS
from auto_round.formats.gguf.mixes import MIXES

from .conftest import byte_level_tokenizer, planned, save_tokenizer

pytest.importorskip("gguf")


@pytest.mark.parametrize("mix", MIXES)
def test_every_mixture_is_a_format(mix):
    assert EXPORTERS[f"gguf:{mix}"].name == f"gguf:{mix}"


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


def test_missing_package_names_the_pip_line(save_model, monkeypatch):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "gguf" else real(name, *a))
    with pytest.raises(ImportError, match=r"pip install 'auto-round\[gguf\]'"):
        planned(save_model())
