"""Reopens a checkpoint that was just written and compares it with what it was made from.

Every tensor of the source must be accounted for, every written tensor must be one that the plan asks for, a sample is
compared value by value, and the logits of a few tokens must be finite. Only what a format declares is used (`specs`,
`pack` and `unpack` of its layouts), nothing of how it writes.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from auto_round.checkpoint import WeightSource
from auto_round.config import MODEL_DTYPES, RunConfig
from auto_round.errors import VerificationError
from auto_round.extra_tensors import extra_matrices
from auto_round.formats.base import Exporter, FileExporter
from auto_round.formats.export import HEAD_BLOCK
from auto_round.formats.finite_logits import LogitsOutcome, check_logits
from auto_round.formats.packing import Joints, Packing
from auto_round.formats.written import TensorSpec, WrittenCheckpoint, WrittenWeight, listed
from auto_round.plan import Plan
from auto_round.store import Results, RunStore
from auto_round.tensors import QuantizedTensor

logger = logging.getLogger(__name__)

LAYERS_PER_SCHEME = 4
SMALL_BYTES = 1 << 20  # copied tensors up to this size (norms, biases) are all compared
LARGE_COPIES = 8
# Fields of a weight that layouts give back exactly. Calibrated input ranges are stored as quotients; their bytes are
# compared.
READ_BACK = ("scheme", "codes", "scale", "zero_point", "global_scale")


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Expected:
    """What a checkpoint has to hold.

    Attributes:
        weights: quantized weights by the key of the original.
        copies: checkpoint key -> parameter name, or None, of tensors that are written under their own key.
        specs: spec of every tensor, those of packed weights included.
        droppable: keys of source tensors that may be left out -> why.
        tied: parameters that have no tensor of their own because they share one.
        joined: key of a fused tensor -> (key, parameter) of its slices, none of which is packed.
        extra: those of `copies` that are matrices and no part of the model.
    """

    weights: Mapping[str, WrittenWeight]
    copies: Mapping[str, str | None]
    specs: Mapping[str, TensorSpec]
    droppable: Mapping[str, str]
    tied: tuple[str, ...]
    joined: Mapping[str, tuple[tuple[str, str | None], ...]] = dataclasses.field(default_factory=dict)
    extra: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Verified:
    """What a check has looked at; its text is the line that is logged."""

    quantized: int
    copied: int
    tied: tuple[str, ...]
    dropped: Mapping[str, str]
    compared_layers: int
    compared_copies: int
    logits: str
    seconds: float
    extra: tuple[str, ...] = ()

    def __str__(self) -> str:
        tied = listed(f"tied {len(self.tied)}", self.tied) or ["tied 0"]
        dropped = listed(f"dropped {len(self.dropped)}", {f"{key} ({why})" for key, why in self.dropped.items()})
        fates = [f"quantized {self.quantized}", f"copied {self.copied}", *tied, *(dropped or ["dropped 0"])]
        fates += listed(f"carried over {len(self.extra)} that the model does not know", self.extra)
        return (
            f"all tensors accounted for ({'; '.join(fates)}), {self.compared_layers} of {self.quantized} layers and "
            f"{self.compared_copies} of {self.copied} copies compared, {self.logits}, {self.seconds:.1f} s"
        )


def verify(
    exporter: Exporter, folder: Path, *, plan: Plan, source: WeightSource, store: Results, config: RunConfig
) -> Verified | str:
    """Checks what one format has written, logs one line and returns what it says.

    Raises:
        VerificationError: with everything that is wrong. The folder is left as it is.
    """
    started = time.monotonic()
    if isinstance(exporter, FileExporter):
        assert isinstance(store, RunStore), store
        return _verify_file(exporter, folder, plan=plan, source=source, store=store, config=config)
    written = WrittenCheckpoint(folder)
    expected = expected_tensors(exporter, plan, source, config)
    scales = {name: scale for block in store.finished() for name, scale in store.cache_scales(block).items()}
    expected = dataclasses.replace(expected, specs={**expected.specs, **_specs_of(scales)})
    dropped = {key: why for key, why in expected.droppable.items() if key not in written.specs}
    problems = [*written.problems, *_account(expected, written, dropped)]
    intact = {key for key, spec in expected.specs.items() if written.specs.get(key) == spec}
    single = {key: weight for key, weight in expected.weights.items() if weight.specs}
    layers = [weight for weight in _sampled_weights(single) if weight.specs.keys() <= intact]
    copies = _sampled_copies(expected, intact)
    outcome = LogitsOutcome("logits not computed")
    if not problems and not config.model_free:
        outcome = check_logits(written, expected.weights, plan.structure.blocks, config)
    problems += _different_layers(layers, written, plan, store)
    problems += _different_copies(copies, expected, written, source, store)
    problems += _different_joints(expected, intact, written, source, store)
    same = {name for name in intact & scales.keys() if torch.equal(scales[name], written.read(name))}
    problems += listed(
        "scales of the key/value cache that differ from the measured ones", intact & scales.keys() - same
    )
    problems += outcome.problems
    if problems:
        raise VerificationError(_report(folder, problems))
    if outcome.skipped:
        logger.warning("%s: logits are not checked: %s", folder, outcome.skipped)
    copied = len(expected.copies) - len(dropped)
    done = Verified(
        len(expected.weights), copied, expected.tied, dropped, len(layers), len(copies), outcome.summary,
        time.monotonic() - started, expected.extra,
    )  # fmt: skip
    logger.info("checked %s: %s", folder, done)
    return done


def _verify_file(
    exporter: FileExporter, folder: Path, *, plan: Plan, source: WeightSource, store: RunStore, config: RunConfig
) -> str:
    started = time.monotonic()
    problems, done = exporter.check_written(folder, plan=plan, source=source, store=store, config=config)
    if problems:
        raise VerificationError(_report(folder, problems))
    done = f"{done}, {time.monotonic() - started:.1f} s"
    logger.info("checked %s: %s", folder, done)
    return done


def expected_tensors(exporter: Exporter, plan: Plan, source: WeightSource, config: RunConfig) -> Expected:
    """Returns what the checkpoint of a format has to hold, from the plan and the shapes of the source alone."""
    packing = Packing.of(exporter, plan)
    joints = Joints(source, packing)
    quantized, keys = packing.entries, source.keys()
    asked = MODEL_DTYPES[config.model_dtype] if config.model_dtype else None
    weights, copies, specs, joined = {}, {}, {}, {}
    dtypes = {key: source.outline(key).dtype for key, name in keys.items() if name in quantized}
    originals = {name: key for key, name in keys.items() if name in quantized}
    for name, entry in quantized.items():
        # A quantized output layer that is tied in the source has no key of its own there.
        key = originals.get(name, name)
        dtype = dtypes[key] if key in dtypes else source.tensors(entry.layer.name)[name].dtype
        layout = packing.layout(name)
        if layout is None and key in joints.keys:
            own = {}
        elif layout is None:
            shape = entry.layer.shape[::-1] if entry.layer.transposed else entry.layer.shape
            own = {key: TensorSpec(shape, asked or str(dtype).removeprefix("torch."))}
        else:
            layer = key.removesuffix(".weight")
            declared = layout.specs(entry.scheme, entry.layer.shape)
            own = {f"{layer}.{local}": TensorSpec(tuple(shape), kind) for local, (shape, kind) in declared.items()}
        weights[key] = WrittenWeight(entry, key, layout, own, dtype)
        specs.update(own)
    for key, name in keys.items():
        if name not in quantized and key not in joints.keys:
            copies[key] = name
            tensor = source.outline(key)
            spec, written_in = TensorSpec.of(tensor), packing.copied_dtype(name, asked)
            change = written_in is not None and tensor.is_floating_point()
            specs[key] = dataclasses.replace(spec, dtype=written_in) if change else spec
    for fused, parts in joints.parts.items():
        joined[fused] = tuple((part, keys[part]) for part in parts)
        spec = TensorSpec.of(source.join(fused, {part: source.outline(part) for part in parts}))
        specs[fused] = spec if asked is None else dataclasses.replace(spec, dtype=asked)
    tied, twins = _tied(source, set(quantized))
    extra = extra_matrices(source)
    droppable = {key: "no part of the model" for key in source.ignored() - set(extra)}
    droppable |= {key: "tied" for key, name in copies.items() if name in twins}
    return Expected(weights, copies, specs, droppable, tied, joined, tuple(extra))


def _specs_of(tensors: Mapping[str, Tensor]) -> dict[str, TensorSpec]:
    return {name: TensorSpec.of(tensor) for name, tensor in tensors.items()}


def _tied(source: WeightSource, quantized: set[str]) -> tuple[tuple[str, ...], set[str]]:
    """Returns parameters that share the stored tensor of another, and those that are stored twice."""
    stored = {name for name in source.keys().values() if name is not None}
    sharing: dict[int, list[str]] = {}
    for name, parameter in source.model.named_parameters(remove_duplicate=False):
        sharing.setdefault(id(parameter), []).append(name)
    groups = [[n for n in names if n not in quantized] for names in sharing.values()]
    tied = [n for names in groups for n in names if n not in stored and stored.intersection(names)]
    return tuple(tied), {n for names in groups for n in [m for m in names if m in stored][1:]}


def _account(expected: Expected, written: WrittenCheckpoint, dropped: Mapping[str, str]) -> list[str]:
    """Returns what is missing, what nobody asked for, and what has another shape or dtype."""
    missing = expected.specs.keys() - written.specs.keys() - dropped.keys()
    problems = listed("tensors that are missing", missing)
    problems += listed("tensors that nobody asked for", written.specs.keys() - expected.specs.keys())
    wrong = [
        f"{key} is {written.specs[key]}, not {spec}"
        for key, spec in expected.specs.items()
        if key in written.specs and written.specs[key] != spec
    ]
    return problems + listed("tensors of another shape or dtype", wrong)


def _sampled_weights(weights: Mapping[str, WrittenWeight]) -> list[WrittenWeight]:
    """Returns the first and the last weight, and a few of each scheme."""
    by_scheme: dict[object, list[WrittenWeight]] = {}
    for weight in weights.values():
        by_scheme.setdefault(weight.entry.scheme, []).append(weight)
    chosen = {w.key for group in by_scheme.values() for w in _spread(group, LAYERS_PER_SCHEME)}
    chosen |= {weight.key for weight in _spread(list(weights.values()), 2)}
    return [weight for key, weight in weights.items() if key in chosen]


def _sampled_copies(expected: Expected, intact: set[str]) -> list[str]:
    """Returns the keys of all small copied tensors and of a few large ones."""
    keys = [key for key in expected.copies if key in intact]
    large = [key for key in keys if _size(expected.specs[key]) > SMALL_BYTES]
    chosen = set(keys) - set(large) | set(_spread(large, LARGE_COPIES))
    return [key for key in keys if key in chosen]


def _spread(items: Sequence, count: int) -> list:
    """Returns up to `count` items at equal distances, the first and the last among them."""
    if len(items) <= count:
        return list(items)
    return [items[index * (len(items) - 1) // (count - 1)] for index in range(count)]


def _size(spec: TensorSpec) -> int:
    dtype: torch.dtype = getattr(torch, spec.dtype)
    return dtype.itemsize * torch.Size(spec.shape).numel()


def _blocks(plan: Plan) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yields the name that results are stored under and the beginnings of the parameter names they are for."""
    for group in plan.groups:
        yield group[0], tuple(f"{name}." for name in group)
    if plan.outside():
        yield HEAD_BLOCK, tuple(plan.outside())


def _different_layers(
    weights: list[WrittenWeight], written: WrittenCheckpoint, plan: Plan, store: Results
) -> list[str]:
    """Returns the layers that do not read back as the store has them; the store is read one block at a time."""
    problems = []
    for block, prefixes in _blocks(plan):
        chosen = [weight for weight in weights if weight.entry.layer.parameter.startswith(prefixes)]
        if chosen:
            result = store.load(block)
            for weight in chosen:
                problems += _difference(weight, result.weights[weight.entry.layer.parameter], written)
    return problems


def _difference(weight: WrittenWeight, stored: QuantizedTensor, written: WrittenCheckpoint) -> list[str]:
    if weight.layout is None:
        found = written.read(weight.key)
        same = _same_bytes(weight.as_stored(stored, found.dtype), found)
        return [] if same else [f"{weight.key} is not what the codes stand for, rounded to its dtype"]
    read = weight.unpacked(written)
    fields = [name for name in READ_BACK if not _same(getattr(read, name), getattr(stored, name))]
    if fields:
        return [f"{weight.layer}: {', '.join(fields)} read back differently from what was quantized"]
    # A tensor can say nothing here and something to an engine, as qzeros of symmetric weights do.
    tensors = weight.packed(written)
    other = [local for local, tensor in weight.layout.pack(stored).items() if not _same_bytes(tensor, tensors[local])]
    return listed(f"{weight.layer}: tensors that are not as they were packed", other)


def _different_copies(
    keys: list[str], expected: Expected, written: WrittenCheckpoint, source: WeightSource, store: Results
) -> list[str]:
    """Returns the copied tensors that differ from the source, or from the store where they were tuned."""
    tuned: dict[str, Tensor] = {}
    for block in store.finished():
        tuned.update(store.plain(block))
    different = []
    for key in keys:
        found = written.read(key)
        original = tuned.get(expected.copies[key] or "", source.read(key))
        if not _same_bytes(original.detach().cpu().to(found.dtype), found):
            different.append(key)
    return listed("copied tensors that differ from the source", different)


def _different_joints(
    expected: Expected, intact: set[str], written: WrittenCheckpoint, source: WeightSource, store: Results
) -> list[str]:
    """Returns the fused tensors of a sample that are not what their slices should be."""
    different = []
    for fused in _spread([key for key in expected.joined if key in intact], LAYERS_PER_SCHEME):
        found = written.read(fused)
        slices = expected.joined[fused]
        results = [store.load(name) for name in store.finished() if any(_below(p, name) for _, p in slices)]
        weights = {name: weight for result in results for name, weight in result.weights.items()}
        tensors = {
            key: weights[name].dequantize(found.dtype) if name in weights else source.read(key).to(found.dtype)
            for key, name in slices
        }
        if not _same_bytes(source.join(fused, tensors), found):
            different.append(fused)
    return listed("fused tensors that differ from what their slices should be", different)


def _below(parameter: str | None, block: str) -> bool:
    return parameter is not None and parameter.startswith(block + ".")


def _same(one: object, other: object) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return one == other


def _same_bytes(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same to the bit, NaN included."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    pieces = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(*pieces)


def _report(folder: Path, problems: list[str]) -> str:
    lines = "\n  ".join(problems)
    return (
        f"{folder} does not pass its check:\n  {lines}\n"
        "The folder is left for inspection; do not use it. Finished blocks are kept: repeat the command with --resume "
        "(or call save_quantized again) to write it anew. If it fails again, check disk and memory, and report it; "
        "--no_verify skips this check"
    )
