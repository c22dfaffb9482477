import dataclasses
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from vision_families import FAMILIES, ORDINARY

from auto_round import pipeline
from auto_round.blocks import BlockStream
from auto_round.errors import UnsupportedError
from auto_round.quality.held_out import stored_samples
from auto_round.quality.measure import relative_error

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo_model"
# float32 sums in another order: a few units in the last place of logits of size 10
CLOSE = {"rel": 2e-4, "abs": 1e-6}


def direct(finished, samples):
    """The figures from whole models in Transformers, in double precision where it is cheap."""
    mask = samples.attention_mask
    arguments = {} if mask is None else {"attention_mask": mask.long()}
    real = torch.ones_like(samples.input_ids, dtype=torch.bool) if mask is None else mask
    known = real[:, 1:] & real[:, :-1]
    logs, following = [], samples.input_ids[:, 1:]
    for model in (finished.model, finished.quantized()):
        with torch.no_grad():
            logits = model(samples.input_ids, use_cache=False, **arguments).logits
        logs.append(logits[:, :-1].double().log_softmax(-1)[known])
    losses = [-log.gather(-1, following[known][:, None]).mean() for log in logs]
    kl = (logs[0].exp() * (logs[0] - logs[1])).sum(-1)
    agree = (logs[0].argmax(-1) == logs[1].argmax(-1)).double().mean()
    return {
        "positions": int(known.sum()),
        "perplexity": math.exp(losses[0]),
        "quantized_perplexity": math.exp(losses[1]),
        "kl_mean": float(kl.mean()),
        "kl_max": float(kl.max()),
        "top1": float(agree),
    }


def block_outputs(model, names, ids):
    found = {}

    def keep(name):
        def hook(_module, _args, output):
            found[name] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    with torch.no_grad():
        model(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("kind", ["llama", "gemma3", "opt", "gpt2", "qwen3_moe"])
def test_predictions_are_those_of_whole_models(kind, finish):
    finished = finish(kind)
    found = pipeline.measure_quality(finished.session, finished.store)
    samples, _ = stored_samples(finished.store)
    expected = direct(finished, samples)
    assert found.missing == ()
    assert found.text.startswith("12 windows, 192 tokens")
    for name, value in expected.items():
        assert getattr(found.predictions, name) == pytest.approx(value, **CLOSE), name
    assert expected["kl_mean"] > 1e-3  # 3 bits: not everything agrees by chance
    assert found.predictions.kl_median <= found.predictions.kl_p99 <= found.predictions.kl_max


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_quantized_output_layer_counts(tied, finish, make_model):
    finished = finish(model=make_model(tie_word_embeddings=tied), quant_lm_head=True)
    found = pipeline.measure_quality(finished.session, finished.store)
    samples, _ = stored_samples(finished.store)
    for name, value in direct(finished, samples).items():
        assert getattr(found.predictions, name) == pytest.approx(value, **CLOSE), name
    assert found.layers["lm_head.weight"].weighted is not None


def test_a_quantized_embedding_is_what_the_quantized_model_reads(finish, token_ids):
    """GGUF quantizes the embedding too, here tied to the output layer: the quantized stream starts from it."""
    folder = str(DEMO / "model")
    rows = list(token_ids(8, 12))
    wanted = {"format": "gguf:q4_0", "iters": 0, "bits": None, "group_size": None, "nsamples": 4, "dataset": rows}
    wanted["model_dtype"] = "fp32"  # what is compared with is a checkpoint of dequantized weights
    finished = finish(model=folder, **wanted)
    found = pipeline.measure_quality(finished.session, finished.store)
    assert found.layers["model.embed_tokens.weight"].weighted is not None
    finished = dataclasses.replace(finished, model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    samples, _ = stored_samples(finished.store)
    for name, value in direct(finished, samples).items():
        assert getattr(found.predictions, name) == pytest.approx(value, **CLOSE), name
    blocks = list(found.blocks.values())
    assert blocks[0].own < blocks[0].output  # the embedding's error comes on top


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl", "llava", "gemma3", "mllama"])
def test_vision_language_models_are_measured_on_text(kind, finish):
    if not FAMILIES[kind].is_there:
        pytest.skip(f"this Transformers has no {FAMILIES[kind].architecture}")
    rows = torch.randint(2, ORDINARY, (20, 16), generator=torch.Generator().manual_seed(0))
    finished = finish(model=FAMILIES[kind].model(), dataset=list(rows))
    found = pipeline.measure_quality(finished.session, finished.store)
    assert found.missing == ()
    samples, _ = stored_samples(finished.store)
    for name, value in direct(finished, samples).items():
        assert getattr(found.predictions, name) == pytest.approx(value, **CLOSE), name


def test_padding_does_not_count(finish, padded):
    finished = finish(dataset=padded)
    found = pipeline.measure_quality(finished.session, finished.store)
    expected = direct(finished, padded.held_out)
    assert expected["positions"] == 3 * 15 + 3 * 10
    for name, value in expected.items():
        assert getattr(found.predictions, name) == pytest.approx(value, **CLOSE), name


@pytest.mark.parametrize("kind", ["llama", "gemma3", "opt"])
def test_errors_of_blocks_are_those_of_their_outputs(kind, finish):
    finished = finish(kind)
    found = pipeline.measure_quality(finished.session, finished.store)
    samples, _ = stored_samples(finished.store)
    names = finished.session.plan.structure.blocks
    wanted, got = (block_outputs(model, names, samples.input_ids) for model in (finished.model, finished.quantized()))
    assert list(found.blocks) == list(names)
    for name in names:
        error = float((got[name] - wanted[name]).double().square().sum() / wanted[name].double().square().sum())
        assert found.blocks[name].output == pytest.approx(error, **CLOSE)
    first = found.blocks[names[0]]
    assert first.own == first.output  # nothing before it is quantized
    assert found.blocks[names[1]].own < found.blocks[names[1]].output


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_errors_of_layers_are_weighted_by_mean_squares_of_their_inputs(kind, finish):
    finished = finish(kind)
    found = pipeline.measure_quality(finished.session, finished.store)
    samples, _ = stored_samples(finished.store)
    assert set(found.layers) == set(finished.session.plan.quantized())
    name, entry = next(iter(finished.session.plan.quantized().items()))
    seen = []
    module = finished.model.get_submodule(entry.layer.name)
    handle = module.register_forward_hook(lambda _module, args, _output: seen.append(args[0].flatten(0, -2).double()))
    with torch.no_grad():
        finished.model(samples.input_ids)
    handle.remove()
    means = torch.cat(seen).square().mean(0)
    stored = module.weight.detach().double()
    weight = stored.t() if entry.layer.transposed else stored
    group = finished.session.plan.groups[0][0]
    lost = (weight - finished.store.load(group).weights[name].dequantize().double()).square()
    assert found.layers[name].weight == pytest.approx(float(lost.sum() / weight.square().sum()), **CLOSE)
    weighted = float((lost * means).sum() / (weight.square() * means).sum())
    assert found.layers[name].weighted == pytest.approx(weighted, **CLOSE)


def test_a_model_whose_weights_lie_on_the_grid_loses_nothing(finish):
    first = finish(iters=0, disable_opt_rtn=True, dataset="none.txt")
    again = finish(model=first.quantized(), iters=0, disable_opt_rtn=False)
    again = finish(model=again.quantized(), iters=0, disable_opt_rtn=False)
    found = pipeline.measure_quality(again.session, again.store)
    assert found.predictions.top1 == 1
    assert found.predictions.kl_mean < 1e-6
    assert found.predictions.perplexity == pytest.approx(found.predictions.quantized_perplexity, rel=1e-5)


def test_blocks_tuned_together_have_one_error(finish):
    finished = finish("gemma3", nblocks=2)
    found = pipeline.measure_quality(finished.session, finished.store)
    assert list(found.blocks) == ["model.layers.0", "model.layers.2"]


def test_without_text_errors_of_weights_remain(finish):
    finished = finish(iters=0, disable_opt_rtn=True, dataset="no-such-file.txt")
    found = pipeline.measure_quality(finished.session, finished.store)
    assert found.predictions is None
    assert found.blocks == {}
    assert found.missing == ("plain rounding reads no calibration text; --report_text FILE measures on a text",)
    assert set(found.layers) == set(finished.session.plan.quantized())
    assert all(error.weight > 0 and error.weighted is None for error in found.layers.values())


def test_a_model_that_cannot_be_streamed_is_no_error_of_the_run(finish, monkeypatch):
    finished = finish()

    def refuse(*_args, **_options):
        raise UnsupportedError("this model never calls its blocks")

    monkeypatch.setattr(BlockStream, "__init__", refuse)
    found = pipeline.measure_quality(finished.session, finished.store)
    assert found.missing == ("the model could not be run over the text: this model never calls its blocks",)
    assert set(found.layers) == set(finished.session.plan.quantized())


def test_no_report_measures_nothing(finish):
    finished = finish(report=False)
    assert pipeline.measure_quality(finished.session, finished.store) is None
    assert not (finished.store.folder / "held_out.safetensors").exists()


def test_quantized_activations_count(finish):
    """Another activation scheme on the same weights changes what the quantized model predicts."""
    options = {"iters": 0, "disable_opt_rtn": False, "bits": 8, "group_size": -1}
    plain = finish(**options)
    without = pipeline.measure_quality(plain.session, plain.store)
    rounded = finish(**options, act_bits=4, act_data_type="int", act_dynamic=True, act_group_size=-1, format="fake")
    with_rounding = pipeline.measure_quality(rounded.session, rounded.store)
    assert with_rounding.predictions.kl_mean > 10 * without.predictions.kl_mean


def test_relative_error_counts_real_tokens_only():
    wanted = torch.tensor([[[2.0], [1.0]], [[1.0], [5.0]]])
    found = torch.tensor([[[1.0], [1.0]], [[1.0], [9.0]]])
    assert relative_error(wanted, found, None) == pytest.approx((1 + 16) / (4 + 1 + 1 + 25))
    mask = torch.tensor([[True, True], [True, False]])
    assert relative_error(wanted, found, mask) == pytest.approx(1 / 6)
    assert relative_error(torch.zeros(1, 1, 1), torch.zeros(1, 1, 1), None) == 0
