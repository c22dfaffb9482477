"""All options, as frozen dataclasses. Command line and API are both made from them.

Each field names its help text and flags once (`option`). `RunConfig.from_options` sends flat keyword arguments to the
dataclass that owns them; an unknown one is an error. Values are checked when a config is made; nothing is changed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from auto_round.errors import ConfigError, nearest
from auto_round.option_values import parse_size
from auto_round.schemes import QuantizationScheme, to_scheme

MIXED_INPUT_BITS = 3  # docs/accuracy.md: wider weights gain nothing from it
FP8_CACHE = ("fp8", "float8_e4m3fn")


def option(default: Any, text: str, *flags: str, off: str = "", kind: Any = None) -> Any:
    """Declares a field with its command-line form.

    Args:
        text: one line of help.
        flags: spellings besides `--<field name>`.
        off: the flag that turns a boolean off, for those that are on by default.
        kind: type of the value on the command line, if the default does not tell.
    """
    metadata = {"help": text, "flags": flags, "off": off, "kind": kind}
    if isinstance(default, (dict, list)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SchemeConfig:
    """What becomes of the weights."""

    scheme: str | Mapping[str, Any] | QuantizationScheme | None = option(
        None, "named scheme such as W4A16, W2A16G64; single options below override its fields", kind=str
    )
    bits: int | None = option(None, "bits of a weight, 2 to 8 (default 4)", kind=int)
    group_size: int | None = option(None, "weights that share a scale; -1: a whole row (default 128)", kind=int)
    sym: bool | None = option(None, "symmetric codes (default)", off="--asym")
    data_type: str | None = option(None, "data type of weights (default int)", "--dtype", kind=str)
    scale_dtype: str | None = option(None, "precision of scales: fp16, bf16, fp32 (default fp16)", kind=str)
    act_bits: int | None = option(None, "bits of activations; 16 leaves them alone", kind=int)
    act_group_size: int | None = option(None, "group size of activations", kind=int)
    act_sym: bool | None = option(None, "symmetric activations", kind=bool)
    act_data_type: str | None = option(None, "data type of activations", "--act_dtype", kind=str)
    act_dynamic: bool | None = option(None, "activation ranges computed at run time", off="--disable_act_dynamic")
    super_bits: int | None = option(None, "bits of scales of scales", kind=int)
    super_group_size: int | None = option(None, "scales that share a scale", kind=int)
    static_kv_dtype: str | None = option(
        None, "fp8: calibrated scales for an FP8 key/value cache go into the checkpoint", kind=str
    )
    layer_config: Mapping[str, Any] = option(
        {},
        "JSON object or file: layer name, substring, glob or re:regex -> scheme fields, preset name or bits",
        kind=dict,
    )
    fp_layers: str = option("", "comma separated layers to keep in 16 bits (same patterns)", "--ignore_layers")
    quant_lm_head: bool = option(False, "quantize lm_head too")
    quant_nontext_module: bool = option(False, "quantize vision tower and projector of a vision-language model too")
    to_quant_block_names: str | None = option(
        None, "comma separated block lists to quantize, e.g. model.layers (default: the decoder's)", kind=str
    )

    def __post_init__(self) -> None:
        if self.static_kv_dtype not in (None, *FP8_CACHE):
            raise ConfigError(f"static_kv_dtype={self.static_kv_dtype!r} (allowed: fp8)")

    def base_scheme(self) -> QuantizationScheme:
        """Returns the scheme of layers that nothing else is said of.

        Raises:
            ConfigError: a field is unknown or has a value that is not allowed.
        """
        base = to_scheme(self.scheme) if self.scheme is not None else QuantizationScheme()
        names = [field.name for field in dataclasses.fields(QuantizationScheme)]
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return base.replace(**given)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CalibConfig:
    """The text that calibration sees."""

    dataset: Any = option(
        "NeelNanda/pile-10k",
        "local .json/.jsonl/.txt or named datasets: 'a.jsonl,NeelNanda/pile-10k:num=256'",
        kind=str,
    )
    nsamples: int = option(128, "samples of calibration text", "--nsample")
    seqlen: int = option(2048, "tokens of a sample", "--seq_len")
    extra_data_dir: str | None = option(
        None, "folder of the pictures that a LLaVA-style --dataset names: DIR or image=DIR", kind=str
    )
    calibrate_all_experts: bool = option(
        False, "scales of each expert are searched on all tokens, also those routed to other experts"
    )
    imatrix: str | None = option(
        None,
        "importance matrix of llama.cpp that weights the search for scales; --iters 0 needs no text then",
        kind=str,
    )
    write_imatrix: str | None = option(
        None,
        "file for an importance matrix of the calibration text: GGUF, or the older form if it ends in .dat",
        kind=str,
    )

    def __post_init__(self) -> None:
        problems = [
            f"{name}={getattr(self, name)} (must be positive)"
            for name in ("nsamples", "seqlen")
            if getattr(self, name) < 1
        ]
        if problems:
            raise ConfigError("; ".join(problems))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TuneConfig:
    """How rounding and clip ranges are tuned."""

    iters: int = option(200, "tuning steps for each block; 0: rounding only", "--iter")
    lr: float | None = option(None, "step of the rounding offsets (default 1/iters)", kind=float)
    minmax_lr: float | None = option(None, "step of the clip factors (default: lr)", kind=float)
    lr_scheduler: str = option("linear", "decay of the step: linear, cosine, constant")
    batch_size: int = option(8, "samples of a step, and of a forward pass", "--train_bs", "--bs")
    gradient_accumulate_steps: int = option(1, "batches whose gradients make one step")
    nblocks: int = option(1, "consecutive blocks tuned together")
    enable_quanted_input: bool = option(
        True, "tune a block on the outputs of the quantized blocks before it", off="--disable_quanted_input"
    )
    enable_mixed_input: bool | None = option(
        None,
        "steps see half of a block's input tokens as the original model gives them (default: at up to 3 bits)",
        off="--disable_mixed_input",
    )
    enable_minmax_tuning: bool | None = option(
        None, "tune clip ranges (default: of integers, where it helps)", off="--disable_minmax_tuning"
    )
    enable_norm_bias_tuning: bool = option(False, "tune norm weights and biases of blocks too")
    enable_alg_ext: bool | None = option(
        None, "steps see the curvature of each weight (default: sign steps do)", off="--disable_alg_ext"
    )
    not_use_best_mse: bool = option(
        True, "keep the last step; off: the one with the least loss on its own samples", off="--use_best_mse"
    )
    dynamic_max_gap: int = option(-1, "stop a block after this many steps without a better loss; -1: never")
    disable_opt_rtn: bool = option(
        False, "with --iters 0: plain rounding, without the search for scales", off="--enable_opt_rtn"
    )
    adam: bool = option(False, "AdamW instead of sign steps")
    sampler: str = option("rand", "how samples are drawn: rand, epoch")
    amp: bool = option(True, "run blocks in 16 bits on GPUs", off="--disable_amp")
    enable_torch_compile: bool | None = option(
        None,
        "compile blocks, on a GPU by default if they are large (falls back to eager)",
        off="--disable_torch_compile",
    )
    seed: int = option(42, "seed of sample choice and tuning")

    def __post_init__(self) -> None:
        problems = [
            f"{name}={getattr(self, name)} (must be positive)"
            for name in ("batch_size", "gradient_accumulate_steps", "nblocks")
            if getattr(self, name) < 1
        ]
        if self.iters < 0:
            problems.append(f"iters={self.iters} (0 for rounding only, or a number of steps)")
        problems += [
            f"{name}={getattr(self, name)} (must be positive)"
            for name in ("lr", "minmax_lr")
            if getattr(self, name) is not None and getattr(self, name) <= 0
        ]
        if self.enable_mixed_input and not self.enable_quanted_input:
            problems.append("enable_mixed_input mixes both chains, and disable_quanted_input leaves only one")
        for name, allowed in (("lr_scheduler", ("linear", "cosine", "constant")), ("sampler", ("rand", "epoch"))):
            if getattr(self, name) not in allowed:
                problems.append(f"{name}={getattr(self, name)!r} (allowed: {', '.join(allowed)})")
        if problems:
            raise ConfigError("; ".join(problems))

    @property
    def rounding_step(self) -> float:
        """First step of the rounding offsets, in units of the scale."""
        return self.lr if self.lr is not None else 1.0 / max(self.iters, 1)

    @property
    def clip_step(self) -> float:
        """First step of the clip factors."""
        return self.minmax_lr if self.minmax_lr is not None else self.rounding_step

    def mixes_inputs(self, least_bits: int) -> bool:
        """Whether steps see tokens of both chains, where the narrowest weight has so many bits."""
        wanted = least_bits <= MIXED_INPUT_BITS if self.enable_mixed_input is None else self.enable_mixed_input
        return wanted and self.enable_quanted_input

    @property
    def uses_curvature(self) -> bool:
        """Whether steps see the curvature of each weight."""
        return not self.adam if self.enable_alg_ext is None else self.enable_alg_ext

    @property
    def needs_calibration(self) -> bool:
        """Whether any text is needed."""
        return self.iters > 0 or not self.disable_opt_rtn


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EndToEndConfig:
    """How the scales of all layers are tuned together, after the blocks."""

    e2e_steps: int | None = option(
        None,
        "steps that tune all scales together, codes fixed, by KL to the 16-bit model's predictions; 0: none (default: "
        "50 or iters/4, at 2 and 3 bits)",
        kind=int,
    )
    # models/lm-6m, 2 bits g64, 100 steps on 128 x 256 tokens, perplexity of dev.txt and WikiText-2 (31.01 and 97.1
    # without): 1e-3 30.15 and 94.0, 2e-3 30.04 and 93.0, 3e-3 30.05 and 92.8, 1e-2 30.20 and 93.3.
    e2e_lr: float = option(2e-3, "largest step of a scale, as a fraction of it; falls to 0 over the steps", kind=float)

    def __post_init__(self) -> None:
        below = self.e2e_steps is not None and self.e2e_steps < 0
        problems = [f"e2e_steps={self.e2e_steps} (0 for none, or a number of steps)"] if below else []
        problems += [f"e2e_lr={self.e2e_lr} (must be positive)"] if not self.e2e_lr > 0 else []
        if problems:
            raise ConfigError("; ".join(problems))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MixedBitsConfig:
    """Which of several schemes each layer gets, chosen by what it costs the model's predictions."""

    options: str | Sequence[Any] = option(
        "", "schemes to choose among for each layer, comma separated: W2A16G64,W4A16,W8A16", "--option"
    )
    target_bits: float | None = option(
        None, "with --options: mean bits of a weight, scales counted", "--avg_bits", kind=float
    )
    target_size: str | None = option(None, "with --options: size of the files of weights, e.g. 2.5GB", kind=str)
    ignore_scale_zp_bits: bool = option(False, "scales and zero points do not count in target_bits")
    separate_joined: bool = option(
        False, "with --options: q/k/v and gate/up may differ, which vLLM and SGLang do not load"
    )
    sensitivity_samples: int = option(32, "calibration samples that sensitivities are measured on")

    def __post_init__(self) -> None:
        given = [name for name in ("target_bits", "target_size") if getattr(self, name) is not None]
        problems = []
        if self.options and len(given) != 1:
            problems.append("options needs a budget: give either target_bits or target_size")
        if given and not self.options:
            problems.append(f"{given[0]} needs the schemes to choose among. Write for example --options W2A16G64,W4A16")
        if self.target_bits is not None and not 0 < self.target_bits <= 16:
            problems.append(f"target_bits={self.target_bits} (above 0, at most 16)")
        if self.ignore_scale_zp_bits and self.target_size is not None:
            problems.append("ignore_scale_zp_bits goes with target_bits: a size counts everything")
        if self.sensitivity_samples < 1:
            problems.append(f"sensitivity_samples={self.sensitivity_samples} (must be positive)")
        if problems:
            raise ConfigError("; ".join(problems))
        if self.target_size is not None:
            parse_size(self.target_size)

    def option_list(self) -> list[str | Mapping[str, Any] | QuantizationScheme]:
        """Returns the options one by one, as they were given."""
        if isinstance(self.options, str):
            return [name.strip() for name in self.options.split(",") if name.strip()]
        return list(self.options)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """One run: from a model to folders on disk."""

    model: Any = option(None, "model folder or hub name", "--model_name", "--model_name_or_path", kind=str)
    format: str = option("auto_round", "export formats, comma separated", "--formats")
    output_dir: str = option("./tmp_autoround", "folder for the result")
    work_dir: str | None = option(None, "folder for finished blocks (kept; default: inside output_dir)", kind=str)
    resume: bool = option(False, "continue a run that was interrupted")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, xpu ...", "--devices", "--device_map")
    low_gpu_mem_usage: bool = option(False, "keep calibration activations in host memory")
    max_gpu_memory: str | None = option(
        None, "GPU memory that quantizing blocks may take, e.g. 8GiB (default: what is free)", kind=str
    )
    model_dtype: str | None = option(None, "precision that 16-bit tensors are written in: bf16, fp16, fp32", kind=str)
    max_shard_size: str = option("5GB", "largest size of a file of weights")
    verify: bool = option(True, "reopen each written checkpoint and check it", off="--no_verify")
    report: bool = option(
        True, "measure what was lost and write quality.json and quality.html beside the weights", off="--no_report"
    )
    report_text: str | None = option(
        None,
        "what the report measures on: written as --dataset (default: calibration text that was not used)",
        kind=str,
    )
    trust_remote_code: bool = option(False, "run model code that comes with the checkpoint")
    model_free: bool = option(
        False, "round the files tensor by tensor, without the model's code; plain rounding", off="--disable_model_free"
    )
    scheme: SchemeConfig = dataclasses.field(default_factory=SchemeConfig)
    calib: CalibConfig = dataclasses.field(default_factory=CalibConfig)
    tune: TuneConfig = dataclasses.field(default_factory=TuneConfig)
    end_to_end: EndToEndConfig = dataclasses.field(default_factory=EndToEndConfig)
    mixed: MixedBitsConfig = dataclasses.field(default_factory=MixedBitsConfig)

    def __post_init__(self) -> None:
        parse_size(self.max_shard_size)
        if self.max_gpu_memory is not None:
            parse_size(self.max_gpu_memory)
        if self.calib.imatrix is not None and not self.tune.needs_calibration:
            raise ConfigError("imatrix weights the search for scales, and disable_opt_rtn turns it off. Leave one out")
        if self.model_free and (self.tune.iters or self.end_to_end.e2e_steps):
            raise ConfigError(
                f"model_free rounds without tuning, but iters={self.tune.iters} and "
                f"e2e_steps={self.end_to_end.e2e_steps} were asked for. Leave these out, or leave out model_free"
            )
        if self.model_free and self.report_text is not None:
            raise ConfigError("model_free has no model to measure text with. Leave out report_text or model_free")
        if self.model_free and self.mixed.options:
            raise ConfigError("model_free measures nothing to choose options by. Leave out options or model_free")
        own = ("scheme", "bits", "data_type", "quant_lm_head", "quant_nontext_module")
        said = [name for name in own if getattr(self.scheme, name) not in (None, False)]
        if self.mixed.options and said:
            raise ConfigError(
                f"{', '.join(said)} beside options: these say what a layer may become, and are for layers of blocks. "
                "Say what single layers become with layer_config"
            )
        if self.model_dtype is not None and self.model_dtype not in MODEL_DTYPES:
            raise ConfigError(f"model_dtype={self.model_dtype!r} (allowed: {', '.join(MODEL_DTYPES)})")

    @classmethod
    def from_options(cls, **options: Any) -> RunConfig:
        """Returns the config for flat keyword arguments, each sent to the dataclass that owns it.

        Raises:
            ConfigError: an unknown option (with the nearest valid one), or a value that is not allowed.
        """
        own = {f.name for f in dataclasses.fields(cls)} - set(PARTS)
        owners = {f.name: part for part, kind in PARTS.items() for f in dataclasses.fields(kind)}
        unknown = [name for name in options if name not in own and name not in owners]
        if unknown:
            known = sorted(own | set(owners))
            raise ConfigError("; ".join(f"unknown option '{name}'.{nearest(name, known)}" for name in unknown))
        parts: dict[str, dict[str, Any]] = {part: {} for part in PARTS}
        for name, value in options.items():
            if name in owners:
                parts[owners[name]][name] = value
        rest = {name: value for name, value in options.items() if name not in owners}
        if rest.get("model_free"):
            parts["tune"] = {"iters": 0, "disable_opt_rtn": True, **parts["tune"]}
        return cls(**rest, **{part: kind(**parts[part]) for part, kind in PARTS.items()})


PARTS: dict[str, type] = {
    "scheme": SchemeConfig,
    "calib": CalibConfig,
    "tune": TuneConfig,
    "end_to_end": EndToEndConfig,
    "mixed": MixedBitsConfig,
}
MODEL_DTYPES = {"bf16": "bfloat16", "bfloat16": "bfloat16", "fp16": "float16", "float16": "float16"}
MODEL_DTYPES |= {"fp32": "float32", "float32": "float32"}

# Name of a recipe -> the options it changes. "light" keeps steps of 1/iters: with steps of 5e-3 offsets travel an
# eighth of a grid step only, and 2-bit perplexity was 1 higher (docs/algorithms.md).
RECIPES: dict[str, dict[str, Any]] = {
    "default": {},
    "best": {"iters": 1000, "nsamples": 512, "low_gpu_mem_usage": True},
    "light": {"iters": 50},
}
