"""Layers outside the blocks, rounded under what calibration gives them."""

import pytest
import torch
from vision_families import FAMILIES

from auto_round import AutoRound
from auto_round.errors import ConfigError
from auto_round.formats.export import HEAD_BLOCK

FAMILY = FAMILIES["llava"]
OPTIONS = {"bits": 2, "group_size": 32, "nsamples": 4, "seqlen": 48, "batch_size": 2, "device": "cpu"}
PICTURES = [FAMILY.with_picture(seed=index) for index in range(4)]
TOWER = "model.vision_tower.encoder.layers.0.mlp.fc2.weight"


def outside(**options):
    rounder = AutoRound(FAMILY.model(), quant_nontext_module=True, **{**OPTIONS, "dataset": FAMILY.text(4), **options})
    rounder.quantize()
    return rounder, rounder._store.load(HEAD_BLOCK)


def error(weight, quantized, importance):
    return float(((weight - quantized.dequantize()) ** 2 * importance).sum())


def test_scales_are_searched_under_what_pictures_give_the_layer():
    model = FAMILY.model()
    seen = []
    layer = model.get_submodule(TOWER.removesuffix(".weight"))
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().flatten(0, -2)))
    with torch.no_grad():
        for picture in PICTURES:
            model(**picture)
    handle.remove()
    importance = torch.cat(seen).square().mean(0)
    (_, by_text), (_, by_pictures) = outside(iters=0), outside(iters=0, dataset=PICTURES)
    weight = model.get_parameter(TOWER).detach()
    plain, weighted = (result.weights[TOWER] for result in (by_text, by_pictures))
    assert error(weight, weighted, importance) < error(weight, plain, importance)
    assert error(weight, weighted, torch.ones(())) > error(weight, plain, torch.ones(()))


def test_the_note_says_what_calibration_never_reached():
    rounder, by_text = outside(iters=0)
    count = len(rounder.plan.outside())
    assert by_text.note.startswith(f"calibration never reached {count} of {count} layers")


def test_layers_that_no_kernel_takes_and_the_output_layer_stay():
    rounder, result = outside(iters=0, disable_opt_rtn=True)
    reasons = {entry.layer.name: entry.reason for entry in rounder.plan.entries if not entry.scheme.is_quantized}
    assert reasons == {"lm_head": "output layer (--quant_lm_head quantizes it)"}
    assert not any("lm_head" in name for name in result.weights)


def test_a_model_without_a_vision_tower_is_told_apart(make_model):
    with pytest.raises(ConfigError, match="no vision tower or projector"):
        AutoRound(make_model(), quant_nontext_module=True)


def test_formats_that_cannot_say_it_refuse():
    with pytest.raises(Exception, match="quantized layers outside the blocks"):
        AutoRound(FAMILY.model(), quant_nontext_module=True, **{**OPTIONS, "bits": 4}).quantize_and_save(
            "nowhere", format="auto_gptq"
        )
