import importlib.machinery
import importlib.util
import math
import sys
import types

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from auto_round import AutoRound, evaluation
from auto_round.errors import CalibrationError, ConfigError, MissingDependencyError, UnsupportedError
from auto_round.evaluation import (
    EvalSettings,
    check_formats,
    load_for_evaluation,
    perplexity,
    perplexity_of_folder,
    task_scores,
    text_windows,
)
from auto_round.formats import EXPORTERS


@pytest.fixture(scope="module")
def tokenizer():
    """The word "17" is id 17."""
    vocabulary = {"<unk>": 0, **{str(number): number for number in range(1, 96)}}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", model_max_length=8)


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "eval.txt"
    file.write_text(" ".join(str(2 + number % 90) for number in range(50)))
    return file


def direct_perplexity(model, windows):
    """One token at a time, each window by itself, in double precision."""
    losses = []
    for window in windows:
        for position in range(1, len(window)):
            with torch.no_grad():
                logits = model(window[None, :position]).logits[0, -1].double()
            losses.append(float(torch.logsumexp(logits, 0) - logits[window[position]]))
    return math.exp(sum(losses) / len(losses))


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_perplexity_is_that_of_a_direct_loop(batch_size, make_model, token_ids):
    model, windows = make_model(), token_ids(5, 9)
    # float32 logits: 1e-5 covers a few units in the last place of a logit of size 10
    assert perplexity(model, windows, batch_size=batch_size) == pytest.approx(
        direct_perplexity(model, windows), rel=1e-5
    )


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary(make_model, token_ids):
    model = make_model()
    torch.nn.init.zeros_(model.lm_head.weight)
    assert perplexity(model, token_ids(4, 8)) == pytest.approx(96, rel=1e-6)


def test_windows_are_cut_from_the_whole_text_and_the_rest_is_dropped(text, tokenizer):
    windows = text_windows(text, tokenizer, seqlen=16)
    assert torch.equal(windows.flatten(), torch.arange(2, 50))
    assert windows.shape == (3, 16)


def test_only_the_first_tokens_are_used_when_asked(text, tokenizer):
    assert torch.equal(text_windows(text, tokenizer, seqlen=8, max_tokens=20), torch.arange(2, 18).view(2, 8))


def test_too_short_a_text_is_an_error_with_the_numbers(text, tokenizer):
    with pytest.raises(CalibrationError, match=r"has 50 tokens, fewer than one window of 64\. Lower --ppl_seqlen"):
        text_windows(text, tokenizer, seqlen=64)
    with pytest.raises(CalibrationError, match="has 7 tokens"):
        text_windows(text, tokenizer, seqlen=8, max_tokens=7)


def test_a_missing_text_is_an_error(tmp_path, tokenizer):
    with pytest.raises(ConfigError, match=r"no text file '.*none\.txt'"):
        text_windows(tmp_path / "none.txt", tokenizer, seqlen=8)


def test_perplexity_of_a_folder_loads_model_and_tokenizer(make_model, tokenizer, text, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    found = perplexity_of_folder(tmp_path / "model", text, EvalSettings(seqlen=16, device="cpu", batch_size=2))
    assert found == pytest.approx(direct_perplexity(model, torch.arange(2, 50).view(3, 16)), rel=1e-5)


@pytest.mark.parametrize("name", ["auto_gptq", "auto_awq"])
def test_checkpoints_of_other_engines_are_measured_without_them(make_model, tokenizer, text, tmp_path, name):
    """Transformers alone would ask for optimum or gptqmodel."""
    make_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rounding = {"iters": 0, "disable_opt_rtn": True, "group_size": 32, "device": "cpu"}
    rounder = AutoRound(str(tmp_path / "model"), **rounding)
    _, folders = rounder.quantize_and_save(tmp_path / "out", format=f"{name},fake")
    settings = EvalSettings(seqlen=16, device="cpu")
    packed, fake = (perplexity_of_folder(folder, text, settings) for folder in folders)
    # The model is float32, and so are the weights of both.
    assert packed == pytest.approx(fake, rel=1e-5)


def test_a_format_that_transformers_does_not_load_is_refused_before_a_run():
    check_formats([EXPORTERS["auto_gptq"], EXPORTERS["fake"]])
    with pytest.raises(UnsupportedError, match=r"mlx cannot be evaluated here.*--format fake"):
        check_formats([EXPORTERS["auto_gptq"], EXPORTERS["mlx"]])


def test_a_quantized_folder_is_computed_exactly_on_a_cpu(make_model, tokenizer, tmp_path):
    """In bfloat16 the backend chosen otherwise may round activations."""
    make_model().to(torch.bfloat16).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    quantizer = AutoRound(str(tmp_path / "model"), bits=4, group_size=32, iters=0, disable_opt_rtn=True)
    quantizer.quantize_and_save(str(tmp_path / "int4"))
    loaded = load_for_evaluation(tmp_path / "int4", EvalSettings(device="cpu"))
    assert loaded.dtype == torch.bfloat16
    assert loaded.hf_quantizer.used_backends == ["auto_round:torch"]


def test_a_missing_text_of_a_folder_is_told_before_its_weights_are_loaded(make_model, tokenizer, tmp_path, monkeypatch):
    tokenizer.save_pretrained(tmp_path / "model")
    make_model().save_pretrained(tmp_path / "model")
    monkeypatch.setattr(evaluation, "load_for_evaluation", lambda *_: pytest.fail("loaded the model"))
    with pytest.raises(ConfigError, match="no text file"):
        perplexity_of_folder(tmp_path / "model", tmp_path / "none.txt", EvalSettings())


def test_tasks_without_lm_eval_name_the_package_to_install(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_rest: None if name == "lm_eval" else find(name))
    with pytest.raises(
        MissingDependencyError, match=r"--tasks needs the package lm_eval.*pip install auto-round\[eval\]"
    ):
        task_scores(tmp_path, "piqa", EvalSettings())


def test_bad_numbers_are_reported_together():
    with pytest.raises(ConfigError, match=r"seqlen=1 .*tokens=0 .*batch_size=0 "):
        EvalSettings(seqlen=1, max_tokens=0, batch_size=0)


def test_a_folder_without_a_tokenizer_is_an_error_that_says_so(make_model, text, tmp_path):
    make_model().save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match="has no tokenizer that loads"):
        perplexity_of_folder(tmp_path / "model", text, EvalSettings(device="cpu"))


def test_task_scores_hands_the_loaded_model_to_lm_eval(make_model, tmp_path, monkeypatch):
    """A stand-in for lm_eval: what it is called with, and that its results come back by task."""
    calls = []
    harness, wrapper = types.ModuleType("lm_eval"), types.ModuleType("lm_eval.models.huggingface")
    wrapper.HFLM = lambda **options: options
    harness.simple_evaluate = lambda model, tasks: calls.append((model, tasks)) or {"results": {"a": {"acc": 0.5}}}
    harness.__spec__ = importlib.machinery.ModuleSpec("lm_eval", None)
    for name, module in {
        "lm_eval": harness,
        "lm_eval.models": types.ModuleType("m"),
        wrapper.__name__: wrapper,
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    make_model().save_pretrained(tmp_path / "model")
    assert task_scores(tmp_path / "model", "a,b", EvalSettings(device="cpu", batch_size=3)) == {"a": {"acc": 0.5}}
    ((wrapped, tasks),) = calls
    assert tasks == ["a", "b"]
    assert (wrapped["tokenizer"], wrapped["batch_size"]) == (str(tmp_path / "model"), 3)
    assert type(wrapped["pretrained"]).__name__ == "LlamaForCausalLM"
