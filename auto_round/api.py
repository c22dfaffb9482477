"""The Python interface: `AutoRound`, and `tune_block` for libraries that bring their own block loop."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from auto_round import blockwise, pipeline, quality
from auto_round.auto_scheme import AutoScheme
from auto_round.block import Block, InputQuantizer
from auto_round.calls import BlockCalls
from auto_round.config import PARTS, RunConfig, TuneConfig
from auto_round.errors import ConfigError
from auto_round.formats import FormatTarget
from auto_round.formats.export import checked_targets
from auto_round.model_free import round_folder
from auto_round.models.base import LinearInfo, is_linear, is_transposed
from auto_round.option_values import parse_formats, parse_layer_config
from auto_round.plan import Plan, fit_group
from auto_round.recipes import recipe_options
from auto_round.schemes import QuantizationScheme, to_scheme
from auto_round.session import open_session
from auto_round.store import RunStore
from auto_round.tensors import BlockResult
from auto_round.tuning import TuningTask, quantizers_of, tune

logger = logging.getLogger(__name__)

# Positional order of the first arguments, as users of the existing package write them.
POSITIONAL = (
    "model",
    "tokenizer",
    "bits",
    "group_size",
    "sym",
    "layer_config",
    "batch_size",
    "amp",
    "device",
    "dataset",
)
OTHER_NAMES = {"enable_adam": "adam", "ignore_layers": "fp_layers", "device_map": "device"}
# Options of the existing package that ask for what is always so here.
ALWAYS_SO = {
    "low_cpu_mem_usage": "weights are read block by block in any case",
    "low_cpu_mem_mode": "weights are read block by block in any case",
    "disable_deterministic_algorithms": "repeatable kernels are used where torch has them",
    "template": "conversations are written by the model's own chat template",
    "truncation": "samples with pictures are never cut, longer ones are left out",
}


class AutoRound:
    """Quantizes a model and writes checkpoints.

    Args:
        model: a model folder or hub name (streamed, never wholly in memory), or a loaded Transformers model.
        tokenizer: of a loaded model; may be None when `dataset` holds token ids, or for plain rounding.
        processor: of a loaded vision-language model, for calibration with pictures; saved beside the weights.
        image_processor: saved beside the weights where there is no processor.
        options: every field of `config.py`, by keyword: scheme or bits/group_size/sym, layer_config, iters, nsamples,
            seqlen, dataset, batch_size, lr, enable_alg_ext ...; and `recipe`, a name, a JSON file or a dictionary of
            options, which those given beside it win over.
    Raises:
        ConfigError: an unknown option or a value that is not allowed, before any work.

    Example:
        AutoRound("Qwen/Qwen3-0.6B", bits=4, group_size=128).quantize_and_save("out", format="auto_round")
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        options = _with_positional(args, options)
        tokenizer = options.pop("tokenizer", None)
        self.processor, self.image_processor = options.pop("processor", None), options.pop("image_processor", None)
        for name in [name for name in options if name in ALWAYS_SO]:
            if options[name] is not None:
                logger.info("option %s has no effect: %s", name, ALWAYS_SO[name])
            del options[name]
        for old, new in OTHER_NAMES.items():
            if options.get(old) is not None:
                options.setdefault(new, options[old])
            options.pop(old, None)
        if isinstance(options.get("scheme"), AutoScheme):
            options |= options.pop("scheme").to_options()
        if options.get("layer_config") is not None:
            options["layer_config"] = parse_layer_config(options["layer_config"])
        recipe = options.pop("recipe", None)
        given = {name: value for name, value in options.items() if value is not None}
        given = given if recipe is None else {**recipe_options(recipe), **given}
        if "device" in given:
            given["device"] = str(given["device"])
        self.config = RunConfig.from_options(**given)
        processor = self.processor if self.processor is not None else self.image_processor
        self.session = open_session(self.config, tokenizer=tokenizer, processor=processor)
        self._work: tempfile.TemporaryDirectory | None = None
        self._store: RunStore | None = None
        self._formats: tuple[str, ...] | None = None
        self._measured: quality.Measured | None = None

    @property
    def plan(self) -> Plan:
        """What becomes of each weight."""
        return self.session.plan

    @property
    def model(self) -> Any:
        """The model; on the meta device when it was given as a folder."""
        return self.session.source.original

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, given or loaded from the model's folder."""
        return self.session.tokenizer

    def quantize(self) -> tuple[Any, dict[str, dict[str, Any]]]:
        """Quantizes every block.

        A loaded model gets the dequantized weights written into it. A model given as a folder stays on disk.

        Returns:
            The model, and layer name -> scheme fields for every quantized layer.
        """
        if self.config.work_dir:
            work = Path(self.config.work_dir)
        else:
            self._work = tempfile.TemporaryDirectory(prefix="auto_round_")
            work = Path(self._work.name)
        self.session = pipeline.settled(self.session, work, self._formats)
        self._store = pipeline.quantize(self.session, work)
        self._measured = pipeline.measure_quality(self.session, self._store)
        if self.session.source.folder is None:
            _write_back(self.session.source.model, self._store, self.plan)
        return self.model, {e.layer.name: e.scheme.to_dict() for e in self.plan.quantized().values()}

    def input_quantizers(self) -> dict[str, InputQuantizer]:
        """Returns layer name -> what its input passes through when activations are quantized; `quantize` comes first.

        A model in memory keeps plain linear layers with dequantized weights. Registered as forward pre-hooks, these
        show what an engine that quantizes activations will compute.
        """
        if self._store is None:
            raise ConfigError("nothing is quantized yet: call quantize() first")
        found: dict[str, InputQuantizer] = {}
        for block in self._store.finished():
            quantizers = quantizers_of(self._store.load(block))
            found |= {name.removesuffix(".weight"): quantizer for name, quantizer in quantizers.items()}
        return found

    def save_quantized(
        self, output_dir: str | Path | None = None, format: str | None = None, **unused: Any
    ) -> list[Path]:
        """Writes one or several formats (comma separated) and returns their folders. `quantize` comes first.

        Raises:
            ConfigError: not quantized yet, or an unknown keyword.
            UnsupportedError: a format cannot hold the plan.
            VerificationError: what was written is not what was quantized (`verify=False` skips the check).
        """
        wanted = self._checked_targets(output_dir, format, unused)
        if self._store is None:
            raise ConfigError("nothing is quantized yet: call quantize() first, or quantize_and_save()")
        for target in wanted:
            pipeline.write(self.session, target, self._store)
        if self._measured is not None:
            pipeline.write_reports(self.session, wanted, pipeline.block_summaries(self._store), self._measured)
        return [target.folder for target in wanted]

    def quantize_and_save(
        self, output_dir: str | Path = "tmp_autoround", format: str = "auto_round", **unused: Any
    ) -> tuple[Any, list[Path]]:
        """Checks the formats, quantizes, writes. Returns the model (empty with `model_free`) and the folders."""
        self._formats = parse_formats(format or self.config.format)
        if self.config.model_free:
            wanted = self._checked_targets(output_dir, format, unused)
            round_folder(self.session, wanted)
            return self.model, [target.folder for target in wanted]
        if self.session.is_settled:
            self._checked_targets(output_dir, format, unused)
        model, _ = self.quantize()
        return model, self.save_quantized(output_dir, format, **unused)

    def _checked_targets(
        self, output_dir: str | Path | None, format: str | None, unused: Mapping[str, Any]
    ) -> list[FormatTarget]:
        """Returns formats and folders; everything that would keep them from being written is an error here."""
        unknown = set(unused) - {"inplace"}
        if unknown:
            raise ConfigError(f"save_quantized does not know {', '.join(sorted(unknown))}")
        names = parse_formats(format or self.config.format)
        return checked_targets(names, Path(output_dir or self.config.output_dir), self.plan, self.session.source)


def _signature() -> inspect.Signature:
    """Returns AutoRound's arguments with their defaults, made from the config classes."""
    fields = {}
    for owner in (*PARTS.values(), RunConfig):
        for field in dataclasses.fields(owner):
            if field.metadata:  # an option; fields without are the parts of RunConfig
                default = field.default if field.default is not dataclasses.MISSING else None
                fields[field.name] = inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default)
    kinds = inspect.Parameter.POSITIONAL_OR_KEYWORD
    fields.pop("model", None)
    fields["recipe"] = inspect.Parameter("recipe", inspect.Parameter.KEYWORD_ONLY, default=None)
    first = [inspect.Parameter("self", kinds), inspect.Parameter("model", kinds)]
    first += [inspect.Parameter("tokenizer", kinds, default=None)]
    first += [fields.pop(name).replace(kind=kinds) for name in POSITIONAL[2:]]
    return inspect.Signature([*first, *fields.values()])


AutoRound.__init__.__signature__ = _signature()  # type: ignore[attr-defined]


class AutoRoundAdam(AutoRound):
    """AutoRound with AdamW in place of sign steps."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"adam": True, **options})


class AutoRoundMLLM(AutoRound):
    """AutoRound under the name, and with the positional arguments, that it had for vision-language models.

    The language part is quantized and calibrated on text, unless `dataset` is of pictures; `quant_nontext_module` takes
    vision tower and projector too. `AutoRound` does the same.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        processor: Any = None,
        image_processor: Any = None,
        *scheme: Any,
        **options: Any,
    ) -> None:
        given = _with_positional((model, tokenizer, *scheme), options)
        super().__init__(**{**given, "processor": processor, "image_processor": image_processor})


def tune_block(
    block: nn.Module,
    inputs: Tensor,
    *,
    scheme: str | Mapping[str, Any] | QuantizationScheme = "W4A16",
    targets: Tensor | None = None,
    arguments: Mapping[str, Any] | None = None,
    layer_schemes: Mapping[str, Any] | None = None,
    **tuning: Any,
) -> BlockResult:
    """Returns tuned codes, scales and zero points for the linear layers of one block. The block is not changed.

    Args:
        block: any module that takes hidden states first and returns them (or a tuple that starts with them).
        inputs: (N, T, H) what the block will see.
        scheme: of every linear layer, unless `layer_schemes` says otherwise.
        targets: (N, T, H) what the block should give; by default what it gives now.
        arguments: further keyword arguments of the block, the same for every sample.
        layer_schemes: layer name within the block -> scheme, or 16 to keep it.
        tuning: fields of `config.TuneConfig` (iters, batch_size, enable_alg_ext ...).
    Raises:
        ConfigError: an unknown option.
    """
    known = [field.name for field in dataclasses.fields(TuneConfig)]
    unknown = [name for name in tuning if name not in known]
    if unknown:
        raise ConfigError(f"tune_block does not know {', '.join(unknown)}. Known: {', '.join(known)}")
    config = TuneConfig(**tuning)
    root = "block"
    named = [*block.named_parameters(), *block.named_buffers()]
    device = inputs.device
    tensors = {f"{root}.{name}": tensor.detach().to(device) for name, tensor in named}
    dtype = inputs.dtype
    flat, spec = torch.utils._pytree.tree_flatten(((), dict(arguments or {})))
    view = Block((root,), (block,), (BlockCalls(tuple(flat), {}, spec),), tensors, device, dtype)
    batches = [slice(i, min(i + config.batch_size, len(inputs))) for i in range(0, len(inputs), config.batch_size)]
    if targets is None:
        with torch.no_grad():
            targets = torch.cat([view.forward(inputs[b], torch.arange(b.start, b.stop)) for b in batches])
    schemes, transposed = _block_schemes(block, root, to_scheme(scheme), layer_schemes or {})
    task = TuningTask(
        block=view, schemes=schemes, transposed=transposed, inputs=inputs, original_inputs=inputs, targets=targets,
        mask=None, batches=batches, seed=blockwise.block_seed(config.seed, root),
    )  # fmt: skip
    result = tune(task, config)
    strip = len(root) + 1
    return dataclasses.replace(
        result,
        weights={name[strip:]: weight for name, weight in result.weights.items()},
        plain={name[strip:]: tensor for name, tensor in result.plain.items()},
    )


def _block_schemes(
    block: nn.Module, root: str, base: QuantizationScheme, layer_schemes: Mapping[str, Any]
) -> tuple[dict[str, QuantizationScheme], frozenset[str]]:
    schemes, transposed = {}, set()
    layers = {name: module for name, module in block.named_modules() if is_linear(module)}
    unknown = [name for name in layer_schemes if name not in layers]
    if unknown:
        raise ConfigError(f"layer_schemes names {', '.join(unknown)}. Layers: {', '.join(layers)}")
    for name, module in layers.items():
        given = layer_schemes.get(name, base)
        scheme = QuantizationScheme(bits=given) if isinstance(given, int) else to_scheme(given)
        if not scheme.is_quantized:
            continue
        rows, columns = module.weight.shape
        shape = (columns, rows) if is_transposed(module) else (rows, columns)
        parameter = f"{root}.{name}.weight"
        schemes[parameter], _ = fit_group(LinearInfo(name, shape, is_transposed(module), 0), scheme)
        if is_transposed(module):
            transposed.add(parameter)
    return schemes, frozenset(transposed)


@torch.no_grad()
def _write_back(model: nn.Module, store: RunStore, plan: Plan) -> None:
    """Puts the dequantized values into a loaded model; a tied output layer that was quantized gets its own weight."""
    untied = f"{plan.structure.head}.weight" if plan.structure.tied_head else None
    for name, value in pipeline.dequantized(store, plan):
        parameter = model.get_parameter(name)
        if name == untied:
            module = model.get_submodule(name.removesuffix(".weight"))
            module.weight = nn.Parameter(value.to(parameter), requires_grad=parameter.requires_grad)
        else:
            parameter.copy_(value.to(parameter))


def _with_positional(args: tuple[Any, ...], options: Mapping[str, Any]) -> dict[str, Any]:
    if len(args) > len(POSITIONAL):
        raise ConfigError(f"AutoRound takes at most {len(POSITIONAL)} positional arguments: {', '.join(POSITIONAL)}")
    named = dict(zip(POSITIONAL, args, strict=False))
    twice = [name for name in named if name in options]
    if twice:
        raise ConfigError(f"given twice: {', '.join(twice)}")
    return {**named, **options}
