import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from auto_round import cli, pipeline
from auto_round.config import RECIPES
from auto_round.option_values import parse_layer_config

DEMO = Path(__file__).resolve().parents[1] / "examples" / "demo_model"
# Every flag of the main command. A new one needs a line in the docs and a review of this list.
FLAGS = {
    "--act_bits", "--act_data_type", "--act_dtype", "--act_dynamic", "--act_group_size", "--act_sym", "--adam", "--amp",
    "--asym", "--batch_size", "--bits", "--bs", "--data_type", "--dataset", "--device", "--device_map", "--devices",
    "--calibrate_all_experts", "--disable_act_dynamic", "--disable_alg_ext",
    "--disable_mixed_input", "--enable_mixed_input", "--disable_amp",
    "--disable_minmax_tuning", "--disable_opt_rtn",
    "--disable_quanted_input", "--dry_run", "--dtype", "--dynamic_max_gap", "--enable_alg_ext",
    "--enable_minmax_tuning", "--enable_norm_bias_tuning", "--enable_quanted_input", "--enable_torch_compile",
    "--avg_bits", "--e2e_lr", "--e2e_steps", "--ignore_scale_zp_bits", "--option", "--options", "--sensitivity_samples",
    "--separate_joined",
    "--target_bits", "--target_size",
    "--eval_bs", "--format", "--formats", "--fp_layers", "--gradient_accumulate_steps", "--group_size", "--help",
    "--ignore_layers", "--imatrix", "--iter", "--iters", "--layer_config", "--low_gpu_mem_usage", "--lr",
    "--lr_scheduler",
    "--max_gpu_memory", "--max_shard_size", "--minmax_lr", "--mllm", "--model", "--model_dtype", "--model_name",
    "--model_name_or_path",
    "--nblocks", "--no_verify", "--not_use_best_mse", "--use_best_mse", "--disable_torch_compile",
    "--nsample", "--nsamples", "--output_dir", "--ppl",
    "--ppl_seqlen", "--ppl_tokens", "--quant_lm_head", "--recipe", "--resume", "--sampler", "--scale_dtype",
    "--scheme", "--seed", "--static_kv_dtype",
    "--no_report", "--report", "--report_text",
    "--seq_len", "--seqlen", "--super_bits", "--super_group_size", "--sym", "--task", "--tasks",
    "--extra_data_dir", "--quant_nontext_module", "--template", "--truncation",
    "--disable_model_free", "--enable_opt_rtn", "--model_free",
    "--to_quant_block_names", "--train_bs", "--trust_remote_code", "--verify", "--work_dir", "--write_imatrix", "-h",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(make_model, tmp_path_factory):
    place = tmp_path_factory.mktemp("model")
    make_model().save_pretrained(place)
    return str(place)


@pytest.fixture
def config_of(monkeypatch):
    """Returns parse(*arguments) -> the RunConfig that the command line makes, without running it."""
    seen = []
    monkeypatch.setattr(cli, "_run", lambda config, _parsed, **_how: seen.append(config) or 0)

    def parse(*arguments, **options):
        assert cli.main(["--model", "m", *arguments], **options) == 0
        return seen[-1]

    return parse


def fails(capsys, *arguments):
    """Returns the one message of a command that ends with status 2."""
    assert cli.main(list(arguments)) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


# --- flags ------------------------------------------------------------------------------------------------------


def test_the_flags_are_those_of_the_frozen_list():
    assert {flag for action in cli.quantize_parser()._actions for flag in action.option_strings} == FLAGS


def test_help_is_given_without_loading_torch():
    script = (
        "import sys\nfrom auto_round.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "heavy = {'torch', 'transformers', 'numpy', 'datasets', 'safetensors'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    assert "--group_size" in done.stdout
    assert "plan --model" in done.stdout


def test_every_flag_has_a_line_of_help():
    assert all(action.help for action in cli.quantize_parser()._actions)


@pytest.mark.parametrize(
    ("arguments", "part", "field", "value"),
    [
        (["--asym"], "scheme", "sym", False),
        (["--sym"], "scheme", "sym", True),
        ([], "scheme", "sym", None),
        (["--disable_minmax_tuning"], "tune", "enable_minmax_tuning", False),
        (["--disable_quanted_input"], "tune", "enable_quanted_input", False),
        (["--disable_amp"], "tune", "amp", False),
        (["--enable_alg_ext"], "tune", "enable_alg_ext", True),
        (["--disable_alg_ext"], "tune", "enable_alg_ext", False),
        (["--group_size", "-1"], "scheme", "group_size", -1),
        (["--iter", "7"], "tune", "iters", 7),
        (["--lr", "0.01"], "tune", "lr", 0.01),
        (["--bs", "3"], "tune", "batch_size", 3),
        (["--train_bs", "3"], "tune", "batch_size", 3),
        (["--seq_len", "99"], "calib", "seqlen", 99),
        (["--nsample", "5"], "calib", "nsamples", 5),
        (["--ignore_layers", "a,b"], "scheme", "fp_layers", "a,b"),
        (["--formats", "fake"], None, "format", "fake"),
        (["--device_map", "0"], None, "device", "0"),
        (["--dtype", "int"], "scheme", "data_type", "int"),
        (["--act_sym", "false"], "scheme", "act_sym", False),
        (["--layer_config", '{"o_proj": {"bits": 8}}'], "scheme", "layer_config", {"o_proj": {"bits": 8}}),
    ],
    ids=lambda value: " ".join(value) or "default" if isinstance(value, list) else None,
)
def test_a_flag_sets_its_option(arguments, part, field, value, config_of):
    config = config_of(*arguments)
    assert getattr(getattr(config, part) if part else config, field) == value


@pytest.mark.parametrize("name", ["--model", "--model_name", "--model_name_or_path"])
def test_the_model_has_three_spellings(name, monkeypatch):
    seen = []
    monkeypatch.setattr(cli, "_run", lambda config, _parsed, *, plan_only: seen.append((config.model, plan_only)) or 0)
    assert cli.main([name, "some/model"]) == 0
    assert cli.main(["plan", name, "some/model"]) == 0
    assert cli.main([name, "some/model", "--dry_run"]) == 0
    assert seen == [("some/model", False), ("some/model", True), ("some/model", True)]


def test_a_layer_config_is_read_from_a_file(config_of, tmp_path):
    file = tmp_path / "layers.json"
    file.write_text('{"down_proj": 8}')
    assert config_of("--layer_config", str(file)).scheme.layer_config == {"down_proj": 8}
    assert parse_layer_config(str(file)) == {"down_proj": 8}


@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_a_recipe_sets_its_options_and_flags_win_over_it(recipe, config_of):
    def flat(config):
        return {n: getattr(p, n) for p in (config, config.tune, config.calib) for n in p.__dataclass_fields__}

    plain, by_flag = flat(config_of()), flat(config_of("--recipe", recipe))
    by_command = flat(config_of(recipe=recipe))
    changed = {name: value for name, value in by_flag.items() if plain[name] != value and name not in ("tune", "calib")}
    assert changed == RECIPES[recipe]
    assert by_command == by_flag
    assert config_of("--recipe", recipe, "--iters", "3").tune.iters == 3


def test_a_recipe_in_a_file_sets_its_options_and_flags_win_over_it(config_of, tmp_path):
    file = tmp_path / "mine.json"
    file.write_text('{"comment": "c", "scheme": "W2A16G64", "iters": 7, "layer_config": {"down_proj": 4}}')
    config = config_of("--recipe", str(file), "--iters", "3")
    assert (config.scheme.scheme, config.tune.iters) == ("W2A16G64", 3)
    assert config.scheme.layer_config == {"down_proj": 4}
    assert config_of("--recipe", str(file), "--layer_config", '{"o_proj": 8}').scheme.layer_config == {"o_proj": 8}


@pytest.mark.parametrize(("command", "recipe"), [("main_best", "best"), ("main_light", "light"), ("main_mllm", None)])
def test_the_other_commands_choose_a_recipe(command, recipe, monkeypatch):
    seen = []
    monkeypatch.setattr(cli, "_run", lambda config, _parsed, **_how: seen.append(config.tune.iters) or 0)
    monkeypatch.setattr(sys, "argv", ["auto-round", "--model", "m"])
    assert getattr(cli, command)() == 0
    assert seen == [RECIPES[recipe]["iters"] if recipe else 200]


# --- problems ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--group_sise", "32"], "ConfigError: unknown argument: --group_sise Did you mean '--group_size'?"),
        (["--asymm"], "unknown argument: --asymm Did you mean '--asym'?"),
        (["stray"], "unknown argument: stray"),
        (["--bits", "9"], "bits=9 (allowed: 2 to 8, or 16"),
        (["--batch_size", "0"], "batch_size=0 (must be positive)"),
        (["--nsamples", "0", "--seqlen", "-3"], "nsamples=0 (must be positive); seqlen=-3 (must be positive)"),
        (["--iters", "-1"], "iters=-1"),
        (["--lr_scheduler", "step"], "lr_scheduler='step' (allowed: linear, cosine, constant)"),
        (["--scheme", "W4A61"], "unknown scheme 'W4A61'. Did you mean 'W4A16'?"),
        (["--layer_config", "{oops"], "layer_config is not valid JSON"),
        (["--layer_config", "none.json"], "layer_config 'none.json' is neither a JSON object nor a file"),
        (["--layer_config", '{"no_such": 8}'], "pattern 'no_such' matches no linear layer"),
        (["--fp_layers", "down_prj"], "pattern 'down_prj' matches no linear layer. Did you mean 'down_proj'?"),
        (["--format", "auto_rond"], "unknown format 'auto_rond'. Did you mean 'auto_round'?"),
        (["--format", "itrex"], "UnsupportedError: format itrex is not written"),
        (["--format", "auto_round:auto_awq", "--bits", "3"], "auto_round:auto_awq: cannot store bits=3"),
        (["--max_shard_size", "big"], "'big' is no size"),
        (["--model_dtype", "int8"], "model_dtype='int8' (allowed: "),
        (["--recipe", "bset"], "recipe 'bset' is neither one of default, best, light nor a file. Did you mean 'best'?"),
        (["--to_quant_block_names", "model.layer"], "'model.layer' is no list of layers"),
    ],
    ids=lambda value: "_".join(value)[:40] if isinstance(value, list) else None,
)
def test_a_bad_option_ends_with_status_2_and_one_message(arguments, message, folder, capsys, tmp_path):
    output = tmp_path / "out"
    assert message in fails(capsys, "--model", folder, "--output_dir", str(output), *arguments)
    assert not output.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no model given. Write --model FOLDER_OR_NAME"),
        (["--model", "/no/such/folder"], "model '/no/such/folder': no such folder"),
        (["list", "fromats"], "'fromats' is none of formats, schemes, datasets, backends. Did you mean 'formats'?"),
        (["eval", "--model", "m"], "nothing to measure. Give --ppl FILE, or --tasks"),
    ],
    ids=["no-model", "no-folder", "list", "eval"],
)
def test_a_command_without_what_it_needs_says_so(arguments, message, capsys):
    assert message in fails(capsys, *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bits", "four"], "argument --bits: invalid int value: 'four'"),
        (["--act_sym", "maybe"], "'maybe' is neither true nor false"),
        (["--bits"], "argument --bits: expected one argument"),
    ],
    ids=["word", "boolean", "nothing"],
)
def test_a_value_of_the_wrong_kind_ends_with_status_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["--model", "m", *arguments])
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_flags_are_not_shortened(capsys):
    """An abbreviation that works today would break when a flag is added."""
    assert "unknown argument: --group" in fails(capsys, "--model", "m", "--group", "32")


@pytest.mark.parametrize("seqlen", ["0", "1", "-4"])
def test_windows_too_short_to_predict_a_token_are_refused(seqlen, folder, capsys, tmp_path):
    (tmp_path / "eval.txt").write_text("words")
    options = ["--model", folder, "--ppl", str(tmp_path / "eval.txt"), "--ppl_seqlen", seqlen]
    assert f"seqlen={seqlen}" in fails(capsys, "eval", *options)
    assert f"seqlen={seqlen}" in fails(capsys, *options, "--output_dir", str(tmp_path / "out"))


def test_missing_packages_for_tasks_are_told_before_any_work(folder, capsys, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_rest: None if name == "lm_eval" else find(name))
    monkeypatch.setattr(pipeline, "run", lambda *_: pytest.fail("worked before checking"))
    options = ["--model", folder, "--output_dir", str(tmp_path / "out"), "--tasks", "piqa"]
    assert "pip install auto-round[eval]" in fails(capsys, *options)


def test_a_format_that_cannot_be_measured_is_told_before_any_work(folder, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "run", lambda *_: pytest.fail("worked before checking"))
    options = ["--model", folder, "--format", "mlx", "--group_size", "32", "--output_dir", str(tmp_path / "out")]
    assert "mlx cannot be evaluated here" in fails(capsys, *options, "--ppl", str(tmp_path / "eval.txt"))


def test_a_problem_in_a_process_of_its_own_has_no_traceback():
    command = [sys.executable, "-m", "auto_round", "--model", "/no/such/folder", "--bits", "4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert re.fullmatch(r"ConfigError: model '/no/such/folder': no such folder\..*\n", done.stderr)


# --- commands ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["plan"], ["--dry_run"]], ids=["plan", "dry_run"])
def test_plan_prints_every_layer_and_reads_no_weights(arguments, folder, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "run", lambda *_: pytest.fail("quantized"))
    options = ["--model", folder, "--group_size", "32", "--fp_layers", "o_proj", "--output_dir", str(tmp_path / "o")]
    assert cli.main([*arguments, *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    row = next(line for line in lines if line.startswith("model.layers.*.mlp.down_proj"))
    assert re.split(r"\s{2,}", row)[1:4] == ["2", "64 x 128", "int4 g32 sym"]
    kept = next(line for line in lines if line.startswith("model.layers.*.self_attn.o_proj"))
    assert "16-bit" in kept
    assert "'o_proj'" in kept
    assert any(line.startswith("average bits") for line in lines)
    assert any(line.startswith("memory estimate") for line in lines)
    assert not (tmp_path / "o").exists()


def test_plan_needs_no_weights_of_the_model(folder, capsys, tmp_path):
    """The header of the file is read, its data is not: zeros do as well."""
    config = json.loads((Path(folder) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    data = bytearray((Path(folder) / "model.safetensors").read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    (tmp_path / "model.safetensors").write_bytes(bytes(data[:start]) + bytes(len(data) - start))
    assert cli.main(["plan", "--model", str(tmp_path), "--group_size", "32"]) == 0
    assert "down_proj" in capsys.readouterr().out


@pytest.mark.parametrize("what", ["formats", "schemes", "datasets", "backends"])
def test_list_prints_one_table(what, capsys):
    assert cli.main(["list", what]) == 0
    alone = capsys.readouterr().out
    assert len(alone.splitlines()) > 1
    assert cli.main(["list"]) == 0
    assert alone.strip() in capsys.readouterr().out


def test_a_run_writes_the_folder_it_names(folder, capsys, tmp_path):
    output = tmp_path / "out"
    options = ["--model", folder, "--output_dir", str(output), "--bits", "2", "--asym", "--group_size", "32"]
    assert cli.main([*options, "--iters", "0", "--disable_opt_rtn", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert f"saved to {output}" in printed
    assert "quantized 2 blocks" in printed
    config = json.loads((output / "config.json").read_text())["quantization_config"]
    assert (config["bits"], config["sym"], config["group_size"]) == (2, False, 32)
    assert load_file(output / "model.safetensors")["model.layers.0.mlp.up_proj.qweight"].dtype == torch.int32


def test_a_run_on_text_measures_perplexity_before_and_after(capsys, tmp_path):
    """The trained demo model: 8 bits without tuning change its perplexity by less than one percent."""
    options = ["--model", str(DEMO / "model"), "--output_dir", str(tmp_path / "out"), "--bits", "8", "--format", "fake"]
    options += ["--iters", "0", "--disable_opt_rtn", "--device", "cpu"]
    options += ["--ppl", str(DEMO / "eval.txt"), "--ppl_seqlen", "64", "--ppl_tokens", "512"]
    assert cli.main(options) == 0
    before, after = (
        float(re.search(rf"{label}: perplexity ([\d.]+)", capsys_text)[1])
        for capsys_text in [capsys.readouterr().out]
        for label in ("before", "after")
    )
    assert 1 < before < 100
    assert after == pytest.approx(before, rel=0.01)
