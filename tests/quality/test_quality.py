import json
import subprocess
import sys
from pathlib import Path

import pytest

from auto_round import AutoRound, cli, pipeline, quality
from auto_round.config import RunConfig
from auto_round.quality.measure import Measured
from auto_round.session import open_session

OPTIONS = {"iters": 2, "batch_size": 4, "group_size": 32, "nsamples": 8, "seqlen": 16, "device": "cpu"}
FILES = ("quality.json", "quality.html")


@pytest.fixture
def dataset(token_ids):
    return list(token_ids(20, 16))


def run(model, output, **options):
    config = RunConfig.from_options(model=model, output_dir=str(output), **{**OPTIONS, **options})
    return pipeline.run(open_session(config))


def read(folder):
    return json.loads((Path(folder) / "quality.json").read_text(encoding="utf-8"))


def test_each_format_gets_the_report_with_its_own_sizes(make_model, dataset, tmp_path):
    result = run(make_model(), tmp_path, dataset=dataset, format="auto_round,fake")
    first, second = (read(folder) for folder in result.folders)
    assert (first["run"]["format"], second["run"]["format"]) == ("auto_round", "fake")
    assert first["predictions"] == second["predictions"] is not None
    assert first["size"]["file_bytes"] < second["size"]["file_bytes"]
    assert all((folder / name).stat().st_size > 0 for folder in result.folders for name in FILES)


def test_no_report_leaves_none_and_removes_a_stale_one(make_model, dataset, tmp_path):
    run(make_model(), tmp_path, dataset=dataset)
    assert all((tmp_path / name).is_file() for name in FILES)
    result = run(make_model(), tmp_path, dataset=dataset, report=False)
    assert result.measured is None
    assert not any((tmp_path / name).exists() for name in FILES)


def test_a_report_does_not_travel_with_a_model_that_is_quantized_again(make_model, dataset, tmp_path):
    run(make_model(), tmp_path / "first", dataset=dataset, format="fake")
    run(str(tmp_path / "first"), tmp_path / "second", dataset=dataset, report=False)
    assert not any((tmp_path / "second" / name).exists() for name in FILES)


def test_a_resumed_run_reports_the_same(make_model, dataset, tmp_path):
    work = {"work_dir": str(tmp_path / "work"), "dataset": dataset}
    run(make_model(), tmp_path / "a", **work)
    before = read(tmp_path / "a")
    run(make_model(), tmp_path / "a", **work, resume=True)
    assert read(tmp_path / "a") == before


def test_the_work_folder_is_gone_afterwards(make_model, dataset, tmp_path):
    run(make_model(), tmp_path, dataset=dataset)
    assert not (tmp_path / pipeline.WORK_FOLDER).exists()


def test_the_python_interface_measures_before_it_overwrites_the_model(make_model, dataset, tmp_path):
    """The loaded model gets the dequantized weights: measured after that, nothing would be lost."""
    streamed = run(make_model(), tmp_path / "a", dataset=dataset)
    quantizer = AutoRound(make_model(), dataset=dataset, **OPTIONS)
    quantizer.quantize()
    (folder,) = quantizer.save_quantized(tmp_path / "b")
    assert read(folder) == read(streamed.folders[0])
    assert read(folder)["predictions"]["kl_mean"] > 0


def test_the_headline_has_the_figures_and_the_place(make_model, dataset, tmp_path):
    result = run(make_model(), tmp_path, dataset=dataset)
    line = quality.headline(result.measured, tmp_path)
    found = result.measured.predictions
    assert line.startswith(f"quality: perplexity {found.perplexity:.3f} -> {found.quantized_perplexity:.3f}, mean KL ")
    assert line.endswith(f"; {tmp_path / 'quality.html'}")
    without = quality.headline(Measured(missing=("no text",)), tmp_path)
    assert without == f"quality: not measured on text (no text); {tmp_path / 'quality.html'}"


def test_the_command_line_ends_with_the_headline(make_model, tmp_path, capsys):
    make_model().save_pretrained(tmp_path / "model")
    command = ["--model", str(tmp_path / "model"), "--iters", "0", "--disable_opt_rtn", "--group_size", "32"]
    assert cli.main([*command, "--output_dir", str(tmp_path / "out"), "--device", "cpu"]) == 0
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.startswith("quality: not measured on text (plain rounding reads no calibration text; --report_text")


def test_two_processes_measure_what_one_does(make_model, tmp_path):
    """Rank 0 writes one report; shares of the work are summed. Sums are of float32 outputs in a fixed order."""
    make_model().save_pretrained(tmp_path / "model")
    program = (
        "import sys, torch\n"
        "from auto_round import distributed, pipeline\n"
        "from auto_round.config import RunConfig\n"
        "from auto_round.session import open_session\n"
        "torch.set_num_threads(1)\n"
        "distributed.start()\n"
        "rows = list(torch.randint(2, 96, (20, 16), generator=torch.Generator().manual_seed(0)))\n"
        f"config = RunConfig.from_options(model={str(tmp_path / 'model')!r}, output_dir=sys.argv[1], dataset=rows,\n"
        "    iters=0, batch_size=4, group_size=32, nsamples=8, seqlen=16, device='cpu')\n"
        "pipeline.run(open_session(config))\n"
        "distributed.stop()\n"
    )
    (tmp_path / "program.py").write_text(program)
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    for words, output in (([], "one"), (launch, "two")):
        command = [sys.executable, *words, str(tmp_path / "program.py"), str(tmp_path / output)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    one, two = read(tmp_path / "one"), read(tmp_path / "two")
    assert two["predictions"] == pytest.approx(one["predictions"], rel=1e-4)
    for block, other in zip(one["blocks"], two["blocks"], strict=True):
        assert block["output_error"] == pytest.approx(other["output_error"], rel=1e-4)
