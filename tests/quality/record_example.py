"""Records as `record` makes them, small and with every kind of value."""

from __future__ import annotations

import copy
from typing import Any


def example(**changes: Any) -> dict[str, Any]:
    """Returns the record of a tuned run of two blocks; changes replace whole parts of it."""
    layers = [layer("model.embed_tokens", None, "16-bit", 16.0, why="embedding or other weight outside the blocks")]
    for block in range(2):
        name = f"model.layers.{block}"
        layers.append(layer(f"{name}.mlp.up_proj", name, "int4 g32 sym", 4.5, 0.01, 0.02 + 0.01 * block))
        layers.append(layer(f"{name}.mlp.down_proj", name, "int8 g32 sym", 8.5, 1e-5, 2e-5, why="by 'down_proj'"))
    types = [
        {"type": "16-bit", "layers": 1, "weights": 8192, "bytes": 16384},
        {"type": "int8 g32 sym", "layers": 2, "weights": 16384, "bytes": 17408},
        {"type": "int4 g32 sym", "layers": 2, "weights": 16384, "bytes": 9216},
    ]
    found = {
        "version": 1,
        "model": {"name": "org/model", "class": "LlamaForCausalLM", "parameters": 40960},
        "run": {"package": "auto-round 1.0.0", "format": "auto_round", "scheme": "int4 g32 sym", "options": OPTIONS},
        "text": "16 windows, 8192 tokens: calibration text that was not used for tuning",
        "predictions": {
            "positions": 8176, "perplexity": 9.71, "quantized_perplexity": 9.948, "kl_mean": 0.0231,
            "kl_error": 0.0011, "kl_median": 0.0081, "kl_p99": 0.241, "kl_max": 3.1, "top1": 0.9312,
        },
        "size": {
            "bytes": 43008, "bytes_16bit": 81920, "file_bytes": 43500, "bits_per_weight": 8.4,
            "block_bits_per_weight": 6.5, "types": types,
        },
        "blocks": [block_of(0, 0.02, 0.01, 0.0011, 0.0011), block_of(1, 0.04, 0.03, 0.0022, 0.0012)],
        "layers": layers,
        "missing": [],
    }  # fmt: skip
    return copy.deepcopy({**found, **changes})


OPTIONS = {"iters": 4, "disable_opt_rtn": False, "nsamples": 8, "lr": 0.25}


def without_text() -> dict[str, Any]:
    """Returns the record of plain rounding: no text, no losses."""
    found = example(text=None, predictions=None, missing=["plain rounding reads no calibration text"])
    found["run"]["options"] = {"iters": 0, "disable_opt_rtn": True}
    for block in found["blocks"]:
        nothing = ("loss_before", "loss_after", "kept_step", "steps_per_point", "output_error", "own_error")
        block |= {**dict.fromkeys(nothing), "steps": 0, "loss_curve": []}
    for one in found["layers"]:
        one["weighted_error"] = None
    return found


def layer(name, block, kind, bits, error=None, weighted=None, why="in a block") -> dict[str, Any]:
    """Returns one layer of 128 x 64 weights."""
    return {
        "name": name, "block": block, "shape": [128, 64], "type": kind, "bits_per_weight": bits,
        "bytes": int(128 * 64 * bits / 8), "weight_error": error, "weighted_error": weighted, "why": why,
    }  # fmt: skip


def block_of(number, before, after, output, own, note="") -> dict[str, Any]:
    """Returns one block."""
    name = f"model.layers.{number}"
    return {
        "name": name, "names": [name], "bytes": 13312, "bits_per_weight": 6.5, "loss_before": before,
        "loss_after": after, "kept_step": 4, "steps": 4, "steps_per_point": 1,
        "loss_curve": [before, before / 2, after, after], "output_error": output, "own_error": own, "note": note,
    }  # fmt: skip
