"""Tables for people: what there is to choose from, and what a plan will take."""

from __future__ import annotations

from auto_round.config import RunConfig
from auto_round.plan import Plan, table
from auto_round.schemes import PRESET_SCHEMES

SHORT_DTYPES = {"torch.bfloat16": "bf16", "torch.float16": "fp16", "torch.float32": "fp32"}


def describe_memory(plan: Plan, config: RunConfig) -> str:
    """Returns an estimate of the memory a run takes, from shapes alone.

    Tuning holds, for the largest block: the weight and its fake-quantized copy and gradient, the rounding offset, its
    gradient and best copy (about 26 bytes a weight), and two or three activation chains of nsamples x seqlen x hidden.
    """
    from auto_round.device import compute_device

    sizes: dict[int, int] = {}
    for entry in plan.entries:
        if entry.layer.block is not None:
            weights = entry.layer.shape[0] * entry.layer.shape[1]
            sizes[entry.layer.block] = sizes.get(entry.layer.block, 0) + weights
    largest = max(sizes.values(), default=0) * config.tune.nblocks
    per_weight = 26 if config.tune.iters > 0 else 16
    heads = [entry.layer for entry in plan.entries if entry.layer.name == plan.structure.head]
    widths = [layer.shape[1] for layer in heads] or [entry.layer.shape[1] for entry in plan.entries]
    bytes_per_value = 4 if compute_device(config.device).type == "cpu" else 2
    chains = 3 if config.tune.enable_quanted_input and config.tune.iters > 0 else 2
    chain = (
        chains * config.calib.nsamples * config.calib.seqlen * widths[0] * bytes_per_value
        if config.tune.needs_calibration
        else 0
    )
    where = "host memory" if config.low_gpu_mem_usage else "the compute device"
    return (
        f"memory estimate: {largest * per_weight / 2**30:.2f} GiB for the largest block, "
        f"{chain / 2**30:.2f} GiB of activations on {where}, batches come on top"
    )


def describe_formats() -> str:
    """Returns the table of export formats, made from what each declares, and a line on each."""
    from auto_round.formats import EXPORTERS

    described = {name: exporter.capability.describe() for name, exporter in EXPORTERS.items()}
    columns = next(iter(described.values()))
    what = [f"{name}: {exporter.summary}" for name, exporter in EXPORTERS.items()]
    rows = [("format", *columns), *((name, *cells.values()) for name, cells in described.items())]
    return "\n".join([table(rows), "", *what])


def describe_schemes() -> str:
    """Returns the table of preset schemes."""
    rows = [("scheme", "bits", "group_size", "sym", "data type", "activations")]
    rows += [
        (n, str(s.bits), str(s.group_size), str(s.sym), s.data_type, str(s.activation or "16-bit"))
        for n, s in PRESET_SCHEMES.items()
    ]
    return table(rows)


def describe_datasets() -> str:
    """Returns the table of named calibration datasets."""
    from auto_round.calibration import DATASETS

    rows = [("dataset", "hub"), *((name, entry.hub_path) for name, entry in DATASETS.items())]
    return table([*rows, ("FILE.json, .jsonl, .txt", "local text")])


def describe_backends() -> str:
    """Returns the table of inference backends, the highest priority on this machine first."""
    from auto_round.inference.backends import all_backends

    rows = [
        (
            "backend",
            "devices",
            "bits",
            "data types",
            "layouts",
            "symmetric",
            "dtypes",
            "needs",
            "priority",
            "also called",
        )
    ]
    for backend in all_backends():
        state = "not installed" if backend.missing() else "installed"
        rows.append(
            (
                backend.name,
                ", ".join(sorted(backend.devices)),
                ", ".join(map(str, sorted(backend.bits))),
                ", ".join(sorted(backend.data_types)),
                ", ".join(sorted(backend.layouts)),
                ", ".join("yes" if sym else "no" for sym in sorted(backend.sym, reverse=True)),
                ", ".join(sorted(SHORT_DTYPES[dtype] for dtype in map(str, backend.dtypes))),
                f"{backend.packages()} ({state})" if backend.requires else "nothing",
                str(backend.rank()),
                ", ".join(backend.aliases),
            )
        )
    return table(rows)
