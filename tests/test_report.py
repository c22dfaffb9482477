import dataclasses
import re

import pytest
import torch

from auto_round import report
from auto_round.calibration import DATASETS
from auto_round.config import RunConfig
from auto_round.formats import EXPORTERS
from auto_round.inference import backends
from auto_round.inference.backends import Backend, all_backends
from auto_round.models import discover
from auto_round.plan import resolve
from auto_round.schemes import PRESET_SCHEMES


def test_columns_are_as_wide_as_their_widest_cell():
    assert report.table([("a", "bb", "c"), ("long", "b", ""), ("x", "", "yy")]) == "a     bb  c\nlong  b\nx         yy"


@pytest.mark.parametrize(
    ("describe", "names"),
    [
        (report.describe_formats, list(EXPORTERS)),
        (report.describe_schemes, list(PRESET_SCHEMES)),
        (report.describe_datasets, [name for name, _ in DATASETS.items()]),
        (report.describe_backends, [backend.name for backend in all_backends()]),
    ],
    ids=["formats", "schemes", "datasets", "backends"],
)
def test_a_table_has_one_line_for_each_registered_name(describe, names):
    lines = describe().splitlines()
    first = [line.split("  ")[0] for line in lines]
    assert set(names) <= set(first)
    assert len(first) == len(set(first))
    assert all(line == line.rstrip() for line in lines)


def test_the_table_of_formats_is_made_from_what_they_declare():
    heading, *lines = report.describe_formats().splitlines()
    starts = [heading.index(column) for column in ("bits", "group size", "lm_head", "loads in")]
    (gptq,) = [line for line in lines if line.startswith("auto_gptq ")]
    cells = [gptq[start:].split("  ")[0] for start in starts]
    assert cells[:3] == ["2, 3, 4, 8", "32, 64, 128, 256, 512, 1024, row", "yes"]
    assert cells[3].startswith("GPTQModel")
    assert f"auto_gptq: {EXPORTERS['auto_gptq'].summary}" in lines


def test_a_scheme_is_described_by_its_fields():
    lines = {line.split()[0]: line.split()[1:] for line in report.describe_schemes().splitlines()}
    assert lines["W2A16G64"] == ["2", "64", "True", "int", "16-bit"]


def memory(model, **options):
    config = RunConfig.from_options(device="cpu", **options)
    return report.describe_memory(resolve(discover(model), config.scheme, nblocks=config.tune.nblocks), config)


def parse(text):
    words = text.split()
    return float(words[2]), float(words[words.index("block,") + 1])


def test_memory_of_activations_is_worked_out_from_samples_tokens_and_width(make_model):
    """3 chains x 4096 samples x 8192 tokens x 64 values x 4 bytes = 24 GiB on a CPU."""
    _, chain = parse(memory(make_model(), nsamples=4096, seqlen=8192, iters=1))
    assert chain == 24
    _, one_less = parse(memory(make_model(), nsamples=4096, seqlen=8192, iters=1, enable_quanted_input=False))
    assert one_less == 16


def test_memory_of_a_block_is_26_bytes_a_weight_when_tuned_and_16_when_not(make_model):
    """A block has q, k, v, o of 64 x (64 + 32 + 32 + 64) and three MLP weights of 64 x width; none of them is real."""
    width = 2**20 // 8
    model = make_model(num_hidden_layers=1, intermediate_size=64)
    for linear in ("gate_proj", "up_proj", "down_proj"):
        layer = getattr(model.model.layers[0].mlp, linear)
        shape = (64, width) if linear == "down_proj" else (width, 64)
        layer.weight.data = layer.weight.data.new_empty((1, 1)).expand(shape)
    weights = 3 * 64 * width + 64 * 192
    tuned, _ = parse(memory(model, iters=1))
    rounded, chain = parse(memory(model, iters=0, disable_opt_rtn=True))
    assert tuned == pytest.approx(weights * 26 / 2**30, abs=0.005)
    assert rounded == pytest.approx(weights * 16 / 2**30, abs=0.005)
    assert chain == 0


def test_where_activations_are_kept_is_told(make_model):
    assert "activations on the compute device" in memory(make_model())
    assert "activations on host memory" in memory(make_model(), low_gpu_mem_usage=True)


@pytest.mark.parametrize("kind", ["opt", "gpt2"])
def test_models_with_other_layer_names_have_an_estimate_too(kind, make_model):
    _, chain = parse(memory(make_model(kind), nsamples=4096, seqlen=8192, iters=1))
    assert chain == 24


def test_a_backend_is_described_by_what_it_declares(monkeypatch):
    theirs = Backend(
        name="theirs:fast",
        aliases=("fast", "quick"),
        prepare=print,
        layouts=frozenset({"gptq", "awq"}),
        devices=frozenset({"xpu", "cpu"}),
        bits=frozenset({8, 4}),
        sym=frozenset({True}),
        dtypes=frozenset({torch.float16, torch.bfloat16}),
        requires=("no_such_package",),
        pip="no-such-package",
        priority=7,
        priority_here=lambda: 2,
    )
    monkeypatch.setattr(backends, "all_backends", lambda: [theirs, dataclasses.replace(theirs, name="b", requires=())])
    header, first, second = (re.split("  +", line) for line in report.describe_backends().splitlines())
    assert dict(zip(header, first, strict=True)) == {
        "backend": "theirs:fast",
        "also called": "fast, quick",
        "devices": "cpu, xpu",
        "bits": "4, 8",
        "data types": "int",
        "layouts": "awq, gptq",
        "symmetric": "yes",
        "dtypes": "bf16, fp16",
        "needs": "no-such-package (not installed)",
        "priority": "2",
    }
    assert dict(zip(header, second, strict=True))["needs"] == "nothing"
