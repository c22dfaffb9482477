"""The command line. Flags are generated from the dataclasses of config.py; nothing heavy is imported for --help."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from auto_round.config import PARTS, RunConfig
from auto_round.errors import AutoRoundError, ConfigError, nearest
from auto_round.option_values import parse_layer_config
from auto_round.recipes import recipe_options

if TYPE_CHECKING:
    from auto_round.evaluation import EvalSettings

USAGE = """%(prog)s --model DIR_OR_NAME [options]
       %(prog)s plan --model DIR_OR_NAME [options]      what becomes of each weight; reads no weights
       %(prog)s list formats|schemes|datasets|backends  what there is
"""


def main(argv: Sequence[str] | None = None, *, recipe: str = "default") -> int:
    """Runs a command and returns the exit status: 0, or 2 for a problem that the message explains."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # Repeatable cuBLAS needs this before the first CUDA call; it is read by the library, not by us.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    logging.basicConfig(level=os.environ.get("AR_LOG_LEVEL", "INFO").upper(), format="%(message)s", stream=sys.stdout)
    for noisy in ("transformers", "httpx", "huggingface_hub", "datasets"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    try:
        if arguments[:1] == ["list"]:
            return _list(arguments[1:])
        if arguments[:1] == ["eval"] or "--eval" in arguments:
            return main_eval([argument for argument in arguments if argument not in ("eval", "--eval")])
        return _quantize(arguments, recipe)
    except AutoRoundError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2


def main_best() -> int:
    """Runs the recipe of best accuracy."""
    return main(recipe="best")


def main_light() -> int:
    """Runs the recipe of least time."""
    return main(recipe="light")


def main_mllm() -> int:
    """Runs on a vision-language model: its language part is quantized."""
    return main()


def main_eval(argv: Sequence[str] | None = None) -> int:
    """Measures perplexity or task scores of a model folder."""
    parser = argparse.ArgumentParser("auto-round-eval", allow_abbrev=False)
    parser.add_argument(
        "--model", "--model_name", "--model_name_or_path", required=True, help="model folder, 16-bit or quantized"
    )
    _add_evaluation_flags(parser)
    parser.add_argument("--device", "--devices", default="auto", help="auto, cpu, cuda ...")
    parser.add_argument("--trust_remote_code", action="store_true", help="run model code that comes with the model")
    options = parser.parse_args(argv)
    try:
        if not options.ppl and options.tasks is None:
            raise ConfigError("nothing to measure. Give --ppl FILE, or --tasks for lm-eval")
        settings = _evaluation_settings(options, options.device, trust_remote_code=options.trust_remote_code)
        _evaluate(options, options.model, settings, label="")
    except AutoRoundError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


def quantize_parser(recipe: str = "default") -> argparse.ArgumentParser:
    """Returns the parser of the main command."""
    name = "auto-round" if recipe == "default" else f"auto-round-{recipe}"
    parser = argparse.ArgumentParser(name, usage=USAGE, allow_abbrev=False)
    parser.add_argument("--dry_run", action="store_true", help="print the plan and stop; same as the command 'plan'")
    parser.add_argument(
        "--recipe", default=recipe, metavar="X", help="options: best, default, light, or a JSON file; flags win over it"
    )
    parser.add_argument("--mllm", action="store_true", help="accepted; vision-language models are recognised")
    parser.add_argument("--template", metavar="X", help="accepted; the model's own chat template is used")
    parser.add_argument("--truncation", action="store_true", help="accepted; samples with pictures are never cut")
    _add_evaluation_flags(parser)
    groups = {"run": RunConfig, **PARTS}
    for title, owner in groups.items():
        group = parser.add_argument_group(title, description=owner.__doc__)
        for field in dataclasses.fields(owner):
            if field.metadata:
                _add_flag(group, field)
    return parser


def _add_flag(group: argparse._ArgumentGroup, field: dataclasses.Field) -> None:
    """Adds a field as `--name`; None on the command line means that it was not given."""
    flags, text = [f"--{field.name}", *field.metadata["flags"]], field.metadata["help"]
    kind, default = field.metadata["kind"], field.default
    if field.metadata["off"]:
        group.add_argument(
            field.metadata["off"], dest=field.name, action="store_false", default=None, help=f"not: {text}"
        )
        group.add_argument(*flags, dest=field.name, action="store_true", default=None, help=text)
    elif isinstance(default, bool):
        group.add_argument(*flags, dest=field.name, action="store_true", default=None, help=text)
    else:
        shown = "" if default is None or default is dataclasses.MISSING or default == "" else f" (default {default})"
        value_type = {dict: str, bool: _boolean}.get(kind, kind or type(default))
        group.add_argument(*flags, dest=field.name, type=value_type, default=None, metavar="X", help=text + shown)


def _add_evaluation_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("evaluation")
    group.add_argument("--ppl", metavar="FILE", help="measure perplexity on this text; after a run also before it")
    group.add_argument("--ppl_seqlen", type=int, default=512, metavar="X", help="tokens of a window (default 512)")
    group.add_argument("--eval_bs", type=int, default=8, metavar="X", help="batch size of evaluation (default 8)")
    group.add_argument("--ppl_tokens", type=int, metavar="X", help="use only the first so many tokens")
    group.add_argument(
        "--tasks", "--task", nargs="?", const="", help="lm-eval tasks, comma separated (extra: auto-round[eval])"
    )


def _quantize(arguments: list[str], recipe: str) -> int:
    plan_only = arguments[:1] == ["plan"]
    parser = quantize_parser(recipe)
    parsed, unknown = parser.parse_known_args(arguments[1:] if plan_only else arguments)
    if unknown:
        known = [flag for action in parser._actions for flag in action.option_strings]
        hints = "; ".join(f"{word}{nearest(word, known)}" for word in unknown if word.startswith("-"))
        raise ConfigError(f"unknown argument: {hints or ' '.join(unknown)}")
    names = [f.name for owner in (RunConfig, *PARTS.values()) for f in dataclasses.fields(owner) if f.metadata]
    options = recipe_options(parsed.recipe)
    options.update({name: value for name in names if (value := getattr(parsed, name)) is not None})
    if "layer_config" in options:
        options["layer_config"] = parse_layer_config(options["layer_config"])
    config = RunConfig.from_options(**options)
    if config.model is None:
        raise ConfigError("no model given. Write --model FOLDER_OR_NAME")
    return _run(config, parsed, plan_only=plan_only or parsed.dry_run)


def _run(config: RunConfig, parsed: argparse.Namespace, *, plan_only: bool) -> int:
    from auto_round import distributed, evaluation, pipeline
    from auto_round.quality import headline
    from auto_round.report import describe_memory
    from auto_round.session import open_session

    session = open_session(config)
    targets = pipeline.format_targets(session)
    if plan_only:
        print(pipeline.describe_plan(session))
        print(describe_memory(session.plan, session.config))
        return 0
    if parsed.ppl or parsed.tasks is not None:
        evaluation.check_formats([target.exporter for target in targets])
    settings = _evaluation_settings(parsed, config.device, trust_remote_code=config.trust_remote_code)
    if parsed.tasks is not None:
        evaluation.require_task_packages()
    distributed.start()
    if not distributed.is_writer():
        logging.getLogger("auto_round").setLevel(logging.WARNING)
    try:
        if parsed.ppl and distributed.is_writer():
            _evaluate(parsed, config.model, settings, label="before: ")
        result = pipeline.run(session)
        if distributed.is_writer():
            print(f"quantized {len(session.plan.structure.blocks)} blocks in {result.seconds:.1f} s")
            for folder in result.folders:
                if parsed.ppl or parsed.tasks is not None:
                    _evaluate(parsed, folder, settings, label="after: ")
                print(f"saved to {folder}")
            if result.measured is not None:
                print(headline(result.measured, result.folders[0]))
    finally:
        distributed.stop()
    return 0


def _evaluation_settings(options: argparse.Namespace, device: str, *, trust_remote_code: bool) -> EvalSettings:
    """Returns how to evaluate; numbers that are not allowed are an error here, before a run."""
    from auto_round import evaluation

    return evaluation.EvalSettings(
        seqlen=options.ppl_seqlen,
        max_tokens=options.ppl_tokens,
        batch_size=options.eval_bs,
        device=device,
        trust_remote_code=trust_remote_code,
    )


def _evaluate(options: argparse.Namespace, model: Any, settings: EvalSettings, *, label: str) -> None:
    from auto_round import evaluation

    if options.ppl:
        value = evaluation.perplexity_of_folder(model, options.ppl, settings)
        print(f"{label}perplexity {value:.3f} on {options.ppl}")
    if options.tasks is not None and label != "before: ":
        scores = evaluation.task_scores(model, options.tasks or evaluation.DEFAULT_TASKS, settings)
        for task, values in scores.items():
            print(f"{task}: " + ", ".join(f"{k}={v:.4f}" for k, v in values.items() if isinstance(v, float)))


def _list(arguments: list[str]) -> int:
    from auto_round import report

    tables = {
        "formats": report.describe_formats,
        "schemes": report.describe_schemes,
        "datasets": report.describe_datasets,
        "backends": report.describe_backends,
    }
    wanted = arguments or list(tables)
    unknown = [word for word in wanted if word not in tables]
    if unknown:
        raise ConfigError(f"list what? '{unknown[0]}' is none of {', '.join(tables)}.{nearest(unknown[0], tables)}")
    print("\n\n".join(tables[word]() for word in wanted))
    return 0


def _boolean(text: str) -> bool:
    if text.lower() in ("true", "1", "yes"):
        return True
    if text.lower() in ("false", "0", "no"):
        return False
    raise argparse.ArgumentTypeError(f"'{text}' is neither true nor false")
