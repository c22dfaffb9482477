"""The quality report as plain JSON values, `quality.json`. Two runs with the same options give the same record.

Version 1. Numbers that are not finite are null. Errors are squared and relative: 0.01 is a hundredth of the energy.

    version       1
    model         {name, class, parameters}
    run           {package, format, scheme, options}     options: those of calibration and tuning, by their flags
    text          what was measured on, in words, or null
    predictions   null, or {positions, perplexity, quantized_perplexity, kl_mean, kl_error, kl_median, kl_p99, kl_max,
                  top1}: nats; top1 is a share of 1; kl_error the standard error of kl_mean
    size          {bytes, bytes_16bit, file_bytes, bits_per_weight, block_bits_per_weight,
                  types: [{type, layers, weights, bytes}]}
                  bytes: of all weights by their schemes, scales and zero points counted; file_bytes: of the weight
                  files in the folder; block_bits_per_weight: of linear layers in blocks
    blocks        [{name, names, bytes, bits_per_weight, loss_before, loss_after, kept_step, steps, steps_per_point,
                  loss_curve, output_error, own_error, note}] in the order in which the model runs them.
                  losses: mean squared error of the block's output on calibration text; loss_curve: means over
                  `steps_per_point` steps; output_error: of the block behind quantized blocks, own_error: behind
                  original ones, both on the held-out text
    layers        [{name, block, shape, type, bits_per_weight, bytes, weight_error, weighted_error, why}]
                  weighted_error: input channels weighted by their mean squares on the held-out text
    missing       what was not measured, and why

Values that a run does not have (losses without tuning, errors of layers that stay in 16 bits) are null.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from auto_round import __version__
from auto_round.checkpoint import WEIGHT_SUFFIXES
from auto_round.config import MODEL_DTYPES, RunConfig
from auto_round.formats import FormatTarget
from auto_round.plan import Plan, PlanEntry
from auto_round.quality.errors_of_weights import LayerError
from auto_round.quality.measure import Measured
from auto_round.session import Session

VERSION = 1
MOST_POINTS = 50  # of a loss curve
DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8}
OTHER = "norms and biases"


def record(
    session: Session, target: FormatTarget, summaries: Mapping[str, Mapping[str, Any]], measured: Measured
) -> dict[str, Any]:
    """Returns the report of one format of a run.

    Args:
        target: already written, so that its files have their sizes.
        summaries: first name of a group of blocks -> `BlockResult.summary`.
    """
    plan, config = session.plan, session.config
    layers = _layers(session, measured)
    stated = {
        "version": VERSION,
        "model": {
            "name": model_name(config.model, session.source.original),
            "class": type(session.source.original).__name__,
            "parameters": sum(layer["weights"] for layer in layers),
        },
        "run": {
            "package": f"auto-round {__version__}",
            "format": target.exporter.name,
            "scheme": str(plan.prescribed_by or plan.base),
            "options": _options(config),
        },
        "text": measured.text or None,
        "predictions": None if measured.predictions is None else dataclasses.asdict(measured.predictions),
        "size": _size(plan, layers, target.folder),
        "blocks": [_block(names, layers, summaries.get(names[0], {}), measured) for names in plan.groups],
        "layers": [{key: value for key, value in layer.items() if key != "weights"} for layer in layers],
        "missing": list(measured.missing),
    }
    return finite(stated)


def model_name(given: Any, model: Any) -> str:
    """Returns what a model is called: the hub name, or the last part of a path, which is nobody else's business."""
    if not isinstance(given, str | Path):
        given = getattr(getattr(model, "config", None), "name_or_path", "") or type(model).__name__
    is_path = Path(given).is_absolute() or str(given).startswith((".", "~")) or Path(given).is_dir()
    return Path(given).resolve().name if is_path else str(given)


def finite(value: Any) -> Any:
    """Returns a JSON value with null in the place of floats that JSON does not know."""
    if isinstance(value, Mapping):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def loss_curve(losses: Sequence[float]) -> tuple[int, list[float]]:
    """Returns steps for each point, and means of the losses over so many steps (the last point may have fewer)."""
    step = max(1, -(-len(losses) // MOST_POINTS))
    pieces = [losses[start : start + step] for start in range(0, len(losses), step)]
    return step, [sum(piece) / len(piece) for piece in pieces]


def _options(config: RunConfig) -> dict[str, Any]:
    """Returns the options of calibration and tuning, and those that say what becomes of weights."""
    described = {"iters": config.tune.iters, "disable_opt_rtn": config.tune.disable_opt_rtn}
    if config.tune.needs_calibration:
        described |= {"nsamples": config.calib.nsamples, "seqlen": config.calib.seqlen}
        described |= {"batch_size": config.tune.batch_size, "seed": config.tune.seed}
    if config.tune.iters:
        described |= {"lr": config.tune.rounding_step, "minmax_lr": config.tune.clip_step}
        described |= {"enable_alg_ext": config.tune.enable_alg_ext, "nblocks": config.tune.nblocks}
    if config.end_to_end.e2e_steps:
        described |= {"e2e_steps": config.end_to_end.e2e_steps, "e2e_lr": config.end_to_end.e2e_lr}
    return described


def _layers(session: Session, measured: Measured) -> list[dict[str, Any]]:
    """Returns every weight matrix in the order of the model, and the vectors together; each weight counts once."""
    plan, model = session.plan, session.source.model
    planned = {entry.layer.parameter: entry for entry in plan.entries}
    parameters = dict(model.named_parameters())
    found, vectors = [], [0, 0]
    for name, parameter in parameters.items():
        size = _stored_bytes(parameter, session.config)
        entry = planned.pop(name, None)
        if entry is not None:
            found.append(_planned_layer(plan, entry, parameter, size, measured.layers.get(name)))
        elif parameter.ndim >= 2:
            why = plan.structure.other_weights.get(name, "no linear layer")
            found.append(_layer(name.removesuffix(".weight"), None, tuple(parameter.shape), _kind(size), size, why))
        else:
            vectors[0] += parameter.numel()
            vectors[1] += size * parameter.numel()
    for name, entry in planned.items():  # an output layer that is tied to the embedding, unless quantization unties it
        if entry.scheme.is_quantized:
            found.append(_planned_layer(plan, entry, None, 2, measured.layers.get(name)))
    if vectors[0]:
        found.append(_layer(OTHER, None, (vectors[0],), _kind(vectors[1] / vectors[0]), vectors[1] / vectors[0], ""))
    return found


def _planned_layer(
    plan: Plan, entry: PlanEntry, parameter: Any, size: float, error: LayerError | None
) -> dict[str, Any]:
    block = None if entry.layer.block is None else plan.structure.blocks[entry.layer.block]
    if not entry.scheme.is_quantized:
        shape = tuple(parameter.shape)
        return _layer(entry.layer.name, block, shape, _kind(size), size, entry.reason)
    own = _layer(entry.layer.name, block, entry.layer.shape, str(entry.scheme), entry.stored_bits / 8, entry.reason)
    if error is not None:
        own |= {"weight_error": error.weight, "weighted_error": error.weighted}
    return own


def _layer(name: str, block: str | None, shape: tuple[int, ...], kind: str, size: float, why: str) -> dict[str, Any]:
    weights = math.prod(shape)
    return {
        "name": name,
        "block": block,
        "shape": list(shape),
        "type": kind,
        "bits_per_weight": round(8 * size, 4),
        "bytes": math.ceil(size * weights),
        "weight_error": None,
        "weighted_error": None,
        "why": why,
        "weights": weights,
    }


def _stored_bytes(parameter: Any, config: RunConfig) -> int:
    dtype = MODEL_DTYPES[config.model_dtype] if config.model_dtype else str(parameter.dtype).removeprefix("torch.")
    return DTYPE_BYTES.get(dtype, parameter.element_size())


def _kind(size: float) -> str:
    return f"{round(8 * size)}-bit"


def _size(plan: Plan, layers: Sequence[Mapping[str, Any]], folder: Path) -> dict[str, Any]:
    weights = sum(layer["weights"] for layer in layers)
    stored = sum(layer["bytes"] for layer in layers)
    types: dict[str, dict[str, Any]] = {}
    for layer in layers:
        own = types.setdefault(layer["type"], {"type": layer["type"], "layers": 0, "weights": 0, "bytes": 0})
        own["layers"] += layer["name"] != OTHER
        own["weights"] += layer["weights"]
        own["bytes"] += layer["bytes"]
    files = [file for file in folder.glob("*") if file.suffix in WEIGHT_SUFFIXES]
    return {
        "bytes": stored,
        "bytes_16bit": 2 * weights,
        "file_bytes": sum(file.stat().st_size for file in files) or None,
        "bits_per_weight": 8 * stored / max(weights, 1),
        "block_bits_per_weight": plan.average_bits(),
        "types": sorted(types.values(), key=lambda own: -own["bytes"]),
    }


def _block(
    names: tuple[str, ...], layers: Sequence[Mapping[str, Any]], summary: Mapping[str, Any], measured: Measured
) -> dict[str, Any]:
    inside = [layer for layer in layers if layer["block"] in names]
    weights = sum(layer["weights"] for layer in inside)
    losses = summary.get("losses", [])
    per_point, curve = loss_curve(losses)
    error = measured.blocks.get(names[0])
    return {
        "name": names[0],
        "names": list(names),
        "bytes": sum(layer["bytes"] for layer in inside),
        "bits_per_weight": 8 * sum(layer["bytes"] for layer in inside) / max(weights, 1),
        "loss_before": summary.get("first_loss"),
        "loss_after": summary.get("best_loss"),
        "kept_step": summary.get("best_step") if losses else None,
        "steps": len(losses),
        "steps_per_point": per_point if losses else None,
        "loss_curve": curve,
        "output_error": None if error is None else error.output,
        "own_error": None if error is None else error.own,
        "note": summary.get("note", ""),
    }
