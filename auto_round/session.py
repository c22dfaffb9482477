"""What a run works on: options, weights, tokenizer, plan, calibration samples; and what tells one run from another."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from auto_round import __version__, distributed, end_to_end
from auto_round.calibration import CalibrationSet, has_pictures, load_calibration, load_pictures
from auto_round.checkpoint import WeightSource, load_processor, resolve_folder
from auto_round.config import RunConfig
from auto_round.errors import ConfigError, UnsupportedError
from auto_round.extra_tensors import extra_modules
from auto_round.formats.base import EXPORTERS, FileExporter, prescription
from auto_round.formats.gguf.importance import importance_of_model
from auto_round.models import discover, keep_joined
from auto_round.models.base import ModelStructure
from auto_round.option_values import parse_formats
from auto_round.plan import Plan, resolve
from auto_round.sources import open_source
from auto_round.sources.named import open_named

logger = logging.getLogger(__name__)

# Enough to tell a fine-tuned model from its base without reading it whole.
IDENTITY_TENSORS, IDENTITY_VALUES = 16, 4096
# Tokens that quality is measured on, in no fewer samples than 16 and no more than 64: the mean divergence of lm-6m at 3
# bits has a standard error of a tenth of itself on 1008 tokens. A step of tuning takes 8 samples.
HELD_OUT_TOKENS, FEWEST_HELD_OUT, MOST_HELD_OUT = 1 << 13, 16, 64


@dataclasses.dataclass(frozen=True, slots=True)
class Session:
    """What a run works on: its options, where weights come from, what becomes of them.

    Attributes:
        processor: of pictures, as given; None: the one in the model's folder.
        importance: weight name -> (I,) mean squares of input channels from an importance matrix; empty without one.
        data: the calibration samples, once they were loaded; a second look at an iterator would find nothing.
        recipe: options that give this plan again where it was chosen by measuring, written beside the result.
    """

    config: RunConfig
    source: WeightSource
    tokenizer: Any
    plan: Plan
    processor: Any = None
    importance: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    data: CalibrationSet | None = None
    recipe: Mapping[str, Any] | None = None

    @property
    def needs_calibration(self) -> bool:
        """Whether quantization needs calibration text. An importance matrix takes its place where nothing is tuned."""
        calib, tune = self.config.calib, self.config.tune
        if self.plan.needs_calibration or calib.write_imatrix is not None:
            return True
        return tune.needs_calibration and bool(self.plan.quantized()) and (tune.iters > 0 or calib.imatrix is None)

    @property
    def is_settled(self) -> bool:
        """Whether the plan is the final one: no options are left to choose among."""
        return not self.config.mixed.options


def open_session(config: RunConfig, *, tokenizer: Any = None, processor: Any = None) -> Session:
    """Reads the model's structure and resolves the plan; no weights are read.

    Args:
        tokenizer: used instead of the one in the model's folder.
        processor: the same for the processor of pictures.
    Raises:
        ConfigError, UnsupportedError: everything that is wrong with the options, before any work.
    """
    if config.model is None:
        raise ConfigError("no model given. Write --model FOLDER_OR_NAME")
    model = resolve_folder(str(config.model)) if isinstance(config.model, (str, Path)) else config.model
    names = config.scheme.to_quant_block_names
    lists = [name.strip() for name in names.split(",")] if isinstance(names, str) else names
    if config.model_free:
        return _open_without_model(config, model, lists, tokenizer)
    source = open_source(model, trust_remote_code=config.trust_remote_code)
    if tokenizer is None and source.folder is not None:
        tokenizer = _load_tokenizer(source.folder, config)
    structure = keep_joined(discover(source.model, lists), set(source.keys().values()), source.fused_experts())
    structure = dataclasses.replace(structure, extra_modules=extra_modules(source))
    plan = _planned(config, structure, source, tokenizer)
    end_to_end.check(config, plan)
    importance: Mapping[str, Tensor] = {}
    if config.calib.imatrix is not None:
        shapes = {name: entry.layer.shape for name, entry in plan.quantized().items()}
        importance = importance_of_model(config.calib.imatrix, source, structure, shapes)
    clipped = _clip_seqlen(config, _longest(source.model, tokenizer))
    return Session(clipped, source, tokenizer, plan, processor, importance)


def _open_without_model(config: RunConfig, model: Any, lists: list[str] | None, tokenizer: Any) -> Session:
    """Returns a session whose plan is made from the names of a folder's tensors."""
    if not isinstance(model, Path):
        raise ConfigError("model_free reads the files of a folder. Give a folder or hub name, or leave out model_free")
    formats = parse_formats(config.format)
    files = [name for name in formats if name in EXPORTERS and isinstance(EXPORTERS[name], FileExporter)]
    if files:
        able = [name for name, exporter in EXPORTERS.items() if not isinstance(exporter, FileExporter)]
        raise UnsupportedError(
            f"model_free cannot write {', '.join(files)}, which needs the model. It writes {', '.join(able)}"
        )
    source = open_named(model)
    plan = resolve(source.structure(lists), config.scheme)
    if plan.needs_calibration:
        raise ConfigError(
            "model_free sees no calibration text, but ranges of activations or scales of a cache are asked for. Use a "
            "scheme with dynamic activations or none, such as FP8_DYNAMIC or W4A16, or leave out model_free"
        )
    return Session(_clip_seqlen(config, source.longest()), source, tokenizer, plan)


def replanned(session: Session, config: RunConfig) -> Session:
    """Returns a session with other options and the plan that they give."""
    plan = _planned(config, session.plan.structure, session.source, session.tokenizer)
    return dataclasses.replace(session, config=config, plan=plan)


def _planned(config: RunConfig, structure: ModelStructure, source: WeightSource, tokenizer: Any) -> Plan:
    """Returns the plan; while options are to be chosen among, that of the first one."""
    prescribed = prescription(parse_formats(config.format), structure, source, tokenizer, config)
    scheme = config.scheme
    if prescribed is None and config.mixed.options:
        scheme = dataclasses.replace(scheme, scheme=config.mixed.option_list()[0])
    return resolve(structure, scheme, nblocks=config.tune.nblocks, prescription=prescribed)


def load_data(session: Session) -> CalibrationSet:
    """Returns the calibration samples that a session asks for."""
    if session.data is not None:
        return session.data
    calib = session.config.calib
    size = {"nsamples": calib.nsamples, "seqlen": calib.seqlen, "seed": session.config.tune.seed}
    if not has_pictures(calib.dataset):
        return load_calibration(calib.dataset, session.tokenizer, **size, held_out=held_out_count(calib.seqlen))
    processor, folder = session.processor, session.source.folder
    if processor is None and folder is not None and isinstance(calib.dataset, str | Path):
        processor = load_processor(folder, trust_remote_code=session.config.trust_remote_code)
    return load_pictures(calib.dataset, processor, **size, folder=calib.extra_data_dir)


def held_out_count(seqlen: int) -> int:
    """Returns how many samples of so many tokens quality is measured on."""
    return min(max(HELD_OUT_TOKENS // seqlen, FEWEST_HELD_OUT), MOST_HELD_OUT)


def fingerprint(session: Session, data: CalibrationSet | None) -> dict[str, Any]:
    """Returns what two runs have to agree in for one to go on with the other's blocks."""
    return {
        "version": __version__,
        "model": _model_identity(session.source),
        "weights": {name: entry.scheme.to_dict() for name, entry in session.plan.quantized().items()},
        "groups": [list(group) for group in session.plan.groups],
        "cache_scales": session.plan.has_cache_scales,
        "tune": dataclasses.asdict(session.config.tune) if data is not None else {"iters": 0, "disable_opt_rtn": True},
        "imatrix": _importance_identity(session.importance),
        "calibration": None if data is None else _data_identity(data),
        "all_experts": session.config.calib.calibrate_all_experts,
        "world_size": distributed.world_size(),
    }


def _data_identity(data: CalibrationSet) -> str:
    digest = hashlib.sha256(data.input_ids.numpy().tobytes())
    if data.attention_mask is not None:
        digest.update(data.attention_mask.numpy().tobytes())
    for sample in data.media or ():
        for name in sorted(sample):
            digest.update(name.encode() + sample[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


def _importance_identity(importance: Mapping[str, Tensor]) -> str | None:
    if not importance:
        return None
    digest = hashlib.sha256()
    for name in sorted(importance):
        digest.update(name.encode() + importance[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


def _model_identity(source: WeightSource) -> dict[str, Any]:
    """Returns what tells one model from another: names of all tensors, and the start of a few of them."""
    keys = list(source.keys())
    digest = hashlib.sha256("\n".join(keys).encode())
    for key in keys[:: max(1, len(keys) // IDENTITY_TENSORS)]:
        start = source.read(key).detach().flatten()[:IDENTITY_VALUES].float().cpu()
        digest.update(start.contiguous().numpy().tobytes())
    return {"class": type(source.model).__name__, "tensors": len(keys), "digest": digest.hexdigest()}


def _load_tokenizer(folder: Path, config: RunConfig) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        logger.info("%s has no tokenizer that loads (%s); calibration needs token ids then", folder, error)
        return None


def _longest(model: Any, tokenizer: Any) -> list[Any]:
    """Returns the model's positions and the tokenizer's limit, in whatever form they have them."""
    model_config = getattr(model, "config", None)
    text_config = model_config.get_text_config() if hasattr(model_config, "get_text_config") else model_config
    return [getattr(text_config, "max_position_embeddings", None), getattr(tokenizer, "model_max_length", None)]


def _clip_seqlen(config: RunConfig, limits: list[Any]) -> RunConfig:
    """Returns the config with seqlen no longer than any limit that is a number."""
    longest = min([limit for limit in limits if isinstance(limit, int) and limit > 0], default=config.calib.seqlen)
    if config.calib.seqlen <= longest:
        return config
    logger.info("changed: seqlen %d -> %d (the model takes no more)", config.calib.seqlen, longest)
    return dataclasses.replace(config, calib=dataclasses.replace(config.calib, seqlen=longest))
