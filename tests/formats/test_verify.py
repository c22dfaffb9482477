import dataclasses
import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from auto_round import AutoRound, blockwise, cli, pipeline
from auto_round.config import RunConfig
from auto_round.errors import UnsupportedError, VerificationError
from auto_round.formats import EXPORTERS, export, finite_logits, verify
from auto_round.formats.fake import FakeFormat
from auto_round.layouts import LAYOUTS
from auto_round.session import open_session
from auto_round.shards import INDEX_NAME
from auto_round.store import RunStore
from auto_round.tensors import BlockResult

OPTIONS = {"iters": 0, "disable_opt_rtn": True, "group_size": 32, "device": "cpu", "max_shard_size": "40KB"}
FIRST, LAST = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
NORM = "model.layers.1.input_layernorm.weight"
KINDS = ("llama", "qwen3", "gemma3", "opt", "gpt2", "qwen3_moe")


class Export:
    """A tiny model, quantized and written without a check, whose files a test may damage."""

    def __init__(self, folder: Path, model, name: str = "auto_round", **options):
        config = RunConfig.from_options(model=model, output_dir=str(folder), **{**OPTIONS, **options})
        self.session, self.folder, self.exporter = open_session(config), folder / "out", EXPORTERS[name]
        self.store = pipeline.quantize(self.session, folder / "work")
        self.write()

    def write(self) -> None:
        session = self.session
        export(self.exporter, self.folder, session.plan, session.source, self.store, session.config, None)

    def verify(self):
        session = self.session
        return verify(
            self.exporter, self.folder, plan=session.plan, source=session.source, store=self.store,
            config=session.config,
        )  # fmt: skip

    def problems(self) -> str:
        with pytest.raises(VerificationError) as error:
            self.verify()
        return str(error.value)

    def file_of(self, key: str) -> Path:
        return self.folder / self.index()["weight_map"][key]

    def index(self) -> dict:
        return json.loads((self.folder / INDEX_NAME).read_text())

    def write_index(self, index: dict) -> None:
        (self.folder / INDEX_NAME).write_text(json.dumps(index))

    def change(self, key: str, change) -> None:
        """Writes the file of a tensor anew, with `change(tensor)` in its place, or without it for None."""
        file = self.file_of(key)
        tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
        changed = change(tensors.pop(key))
        save_file(tensors if changed is None else {**tensors, key: changed}, file)


@pytest.fixture
def written(make_model, tmp_path):
    """Returns make(format, **options) -> an Export of a tiny Llama in several shards."""
    return lambda name="auto_round", **options: Export(tmp_path, make_model(), name, **options)


def flip(position: int, bit: int = 0):
    """Returns a change that flips one bit of one value of an int32 tensor."""

    def change(tensor):
        tensor.view(-1)[position] ^= 1 << bit
        return tensor

    return change


def flip_a_bit_of_any(tensor):
    """Returns a tensor of any dtype with the lowest bit of its first byte flipped."""
    changed = tensor.reshape(-1).view(torch.uint8)
    changed[0] ^= 1
    return changed.view(tensor.dtype).reshape(tensor.shape)


def put(value: float, position: int = 0):
    def change(tensor):
        tensor.view(-1)[position] = value
        return tensor

    return change


# --- what was written well passes --------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("where", ["folder", "memory"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_format_of_every_family_passes_with_finite_logits(kind, where, tied, make_model, tmp_path):
    model = make_model(kind, tie_word_embeddings=tied).bfloat16()
    if where == "folder":
        model.save_pretrained(tmp_path / "model", max_shard_size="60KB")
        model = str(tmp_path / "model")
    head = kind in ("llama", "gpt2")
    made = Export(tmp_path, model, sym=False, quant_lm_head=head)
    linears = len(made.session.plan.quantized())
    names = [name for name in EXPORTERS if not EXPORTERS[name].refusals(made.session.plan)]
    assert len(names) > 4
    for name in names:
        made.exporter, made.folder = EXPORTERS[name], tmp_path / name.replace(":", "-")
        made.write()
        done = made.verify()
        assert (done.quantized, done.logits) == (linears, "logits finite"), name
        assert done.tied == (("lm_head.weight",) if tied and not head else ())
        assert not done.dropped


@pytest.mark.parametrize("options", [{}, {"quant_lm_head": True}], ids=["", "head"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_model_that_quantize_has_changed_passes(tied, options, make_model, tmp_path):
    """The Python interface writes dequantized values into the model and unties its output layer before it saves."""
    rounder = AutoRound(make_model(tie_word_embeddings=tied), **OPTIONS, **options)
    rounder.quantize_and_save(tmp_path, format="auto_round,fake")


@pytest.mark.parametrize("name", ["auto_round", "fake"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_another_precision_passes_where_it_was_asked_for(name, dtype, make_model, tmp_path):
    Export(tmp_path, make_model().bfloat16(), name, model_dtype=dtype).verify()


def test_one_file_without_an_index_passes(written):
    made = written(max_shard_size="5GB")
    assert not (made.folder / INDEX_NAME).exists()
    assert made.verify().copied == 7


def test_tuned_norms_are_compared_with_their_tuned_values(written):
    made = written()
    weights, tuned = made.store.load("model.layers.1").weights, torch.full((64,), 2.5)
    made.store.save("model.layers.1", BlockResult(weights, {NORM: tuned}))
    assert f"copied tensors that differ from the source: {NORM}" in made.problems()  # the file holds the original
    made.change(NORM, lambda _: tuned)
    made.verify()


def test_one_line_is_logged(make_model, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    made = Export(tmp_path, make_model(tie_word_embeddings=True))
    made.verify()
    assert caplog.messages[-1].startswith(
        f"checked {made.folder}: all tensors accounted for (quantized 14; copied 6; tied 1: lm_head.weight; "
        "dropped 0), 4 of 14 layers and 6 of 6 copies compared, logits finite, "
    )


def test_a_few_layers_of_each_scheme_are_compared(written):
    made = written(layer_config={"down_proj": 8, "layers.0.self_attn": {"bits": 2}})
    assert made.verify().compared_layers == 2 + 4 + 4  # two layers of 8 bits, four of 2, four of eight of 4


STATIC = {"act_bits": 8, "act_dynamic": False}
SCHEMES = {
    "gptq": {"bits": 3, "sym": False},
    "gptq_zp": {"bits": 2},
    "awq": {"sym": False},
    "ct_packed": {"sym": False},
    "ct_int8": {"bits": 8, "group_size": -1, **STATIC, "act_group_size": 0},
    "fp8": {"data_type": "fp", "bits": 8, "group_size": -1, **STATIC, "act_group_size": 0},
    "mxfp4": {"data_type": "mx_fp", "bits": 4},
    "mxfp8": {"data_type": "mx_fp", "bits": 8},
    "nvfp4": {"data_type": "nv_fp4", "group_size": 16, "act_bits": 4, "act_data_type": "nv_fp4_with_static_gs"},
}


@dataclasses.dataclass(frozen=True, slots=True)
class OneLayout(FakeFormat):
    """A format of one layout, which declares nothing but that."""

    layout: str = ""

    def layout_for(self, scheme, plan):  # noqa: ARG002
        return LAYOUTS[self.layout]


@pytest.mark.parametrize("layout", SCHEMES)
def test_every_layout_passes_by_what_it_declares(layout, make_model, token_ids, tmp_path):
    """Calibrated input ranges included, which are stored as quotients and do not read back to the bit."""
    options = {**SCHEMES[layout], "dataset": [row.tolist() for row in token_ids()], "seqlen": 16, "nsamples": 8}
    made = Export(tmp_path, make_model(), "fake", **options)
    made.verify()
    made.exporter = OneLayout(layout=layout)
    made.write()
    assert made.verify().logits == "logits finite"
    specs = LAYOUTS[layout].specs(made.session.plan.base, (64, 64))
    for local in specs:
        made.write()
        made.change(f"{FIRST}.{local}", flip_a_bit_of_any)
        assert f"{FIRST}: " in made.problems(), local


# --- what differs is found ---------------------------------------------------------------------------------------

VALUES = {
    "a-bit-of-qweight": (f"{FIRST}.qweight", flip(5, 17), f"{FIRST}: codes read back differently"),
    "a-bit-of-the-last-qweight": (f"{LAST}.qweight", flip(-1, 31), f"{LAST}: codes read back differently"),
    "a-scale": (f"{FIRST}.scales", put(0.5), f"{FIRST}: scale read back differently"),
    "zeros-of-a-symmetric-layer": (f"{FIRST}.qzeros", flip(0), f"{FIRST}: tensors that are not as they were packed"),
    "a-norm": (NORM, put(1.001), f"copied tensors that differ from the source: {NORM}"),
    "the-embedding": ("model.embed_tokens.weight", put(9.0, 77), "differ from the source: model.embed_tokens.weight"),
}  # fmt: skip


@pytest.mark.parametrize("case", VALUES)
def test_a_changed_value_is_found(case, written):
    key, change, message = VALUES[case]
    made = written()
    made.change(key, change)
    assert message in made.problems()


def test_a_changed_zero_point_is_found(written):
    made = written(sym=False, name="auto_round:auto_gptq")
    made.change(f"{FIRST}.qzeros", flip(0))
    assert f"{FIRST}: zero_point read back differently" in made.problems()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_changed_dequantized_weight_is_found(kind, make_model, tmp_path):
    made = Export(tmp_path, make_model(kind), "fake")
    key = next(key for key, name in made.session.source.keys().items() if name in made.session.plan.quantized())
    made.change(key, put(0.123))
    assert f"{key} is not what the codes stand for" in made.problems()


def test_layers_in_each_others_place_are_found(written):
    made = written(max_shard_size="5GB")
    tensors = load_file(made.folder / "model.safetensors")
    one, other = f"{FIRST}.qweight", f"{FIRST.replace('.0.', '.1.')}.qweight"
    save_file({**tensors, one: tensors[other].clone(), other: tensors[one].clone()}, made.folder / "model.safetensors")
    assert f"{FIRST}: codes read back differently" in made.problems()


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_scale_that_is_not_finite_is_found_wherever_it_is(value, make_model, tmp_path):
    """In a layer that is not among those compared: the logits tell, and name the block."""
    made = Export(tmp_path, make_model(num_hidden_layers=3))
    made.change("model.layers.1.self_attn.o_proj.scales", put(value))
    (problem,) = made.problems().splitlines()[1:-1]
    assert problem.strip() == (
        "block model.layers.1 gives values that are not finite on random tokens; infinity or NaN in: "
        "model.layers.1.self_attn.o_proj.weight"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda t: t[:4].contiguous(), f"{FIRST}.qweight is int32 [4, 64], not int32 [8, 64]", id="shape"),
        pytest.param(lambda t: t.long(), f"{FIRST}.qweight is int64 [8, 64], not int32 [8, 64]", id="dtype"),
        pytest.param(lambda _: None, f"tensors that are missing: {FIRST}.qweight", id="missing"),
    ],
)
def test_a_packed_tensor_of_another_shape_or_dtype_is_found(change, message, written):
    made = written()
    made.change(f"{FIRST}.qweight", change)
    assert message in made.problems()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda t: t[:32].contiguous(), f"{NORM} is float32 [32], not float32 [64]", id="shape"),
        pytest.param(lambda t: t.half(), f"{NORM} is float16 [64], not float32 [64]", id="dtype"),
        pytest.param(lambda _: None, f"tensors that are missing: {NORM}", id="missing"),
    ],
)
def test_a_copied_tensor_of_another_shape_or_dtype_is_found(change, message, written):
    made = written()
    made.change(NORM, change)
    assert message in made.problems()


def test_a_tensor_that_nobody_asked_for_is_found(written):
    made = written()
    file, extra = made.file_of(NORM), f"{FIRST}.g_idx"
    save_file({**load_file(file), extra: torch.zeros(64)}, file)
    index = made.index()
    index["weight_map"][extra] = file.name
    index["metadata"]["total_size"] += 256
    made.write_index(index)
    assert made.problems().splitlines()[1:-1] == [f"  tensors that nobody asked for: {extra}"]


def test_a_missing_file_is_found(written):
    made = written()
    file = made.file_of(f"{FIRST}.qweight")
    file.unlink()
    text = made.problems()
    assert f"files that the index names are not there: {file.name}" in text
    assert "tensors that are missing: " in text


def test_a_tensor_that_the_index_lacks_is_found(written):
    made = written()
    index = made.index()
    del index["weight_map"][NORM]
    made.write_index(index)
    assert made.problems().splitlines()[1:-1] == [f"  tensors that the index lacks: {NORM}"]


def test_everything_that_is_wrong_is_reported_together_and_the_folder_stays(written):
    made = written()
    made.change(f"{FIRST}.qweight", flip(0))
    made.change(NORM, put(2.0))
    made.change(f"{LAST}.scales", lambda _: None)
    before = {file.name: file.read_bytes() for file in made.folder.iterdir()}
    text = made.problems()
    assert text.startswith(f"{made.folder} does not pass its check:\n")
    for problem in (f"{FIRST}: codes", f"source: {NORM}", f"missing: {LAST}.scales", "total_size"):
        assert problem in text
    assert "left for inspection" in text
    assert "--resume" in text
    assert "--no_verify" in text
    assert before == {file.name: file.read_bytes() for file in made.folder.iterdir()}


# --- tensors that need not be there ------------------------------------------------------------------------------


def add_to(folder: Path, **tensors) -> None:
    file = folder / "model.safetensors"
    save_file({**load_file(file), **tensors}, file)


@pytest.mark.parametrize("kept", [True, False], ids=["written", "left-out"])
@pytest.mark.parametrize(
    ("key", "why"),
    [("lm_head.weight", "tied"), ("model.layers.0.self_attn.rotary_emb.inv_freq", "no part of the model")],
    ids=["stored-twice", "no-parameter"],
)
def test_what_the_model_does_not_need_may_be_left_out_and_is_listed(key, why, kept, make_model, tmp_path):
    make_model(tie_word_embeddings=True).save_pretrained(tmp_path / "model")
    twin = load_file(tmp_path / "model" / "model.safetensors")["model.embed_tokens.weight"]
    add_to(tmp_path / "model", **{key: twin if why == "tied" else torch.ones(8)})
    made = Export(tmp_path, str(tmp_path / "model"), max_shard_size="5GB")
    if not kept:
        file = made.folder / "model.safetensors"
        save_file({name: tensor for name, tensor in load_file(file).items() if name != key}, file)
    done = made.verify()
    assert done.dropped == ({} if kept else {key: why})
    assert done.copied == (7 if kept else 6)
    assert kept or f"dropped 1: {key} ({why})" in str(done)


def test_an_embedding_may_not_be_left_out(make_model, tmp_path):
    made = Export(tmp_path, make_model(tie_word_embeddings=True))
    made.change("model.embed_tokens.weight", lambda _: None)
    assert "tensors that are missing: model.embed_tokens.weight" in made.problems()


# --- the check within a run --------------------------------------------------------------------------------------


def damaging(*arguments) -> None:
    """Stands in for `export`: writes a checkpoint, then flips one bit of it."""
    export(*arguments)
    file = arguments[1] / "model.safetensors"
    tensors = load_file(file)
    tensors[f"{FIRST}.qweight"] = flip(0)(tensors[f"{FIRST}.qweight"].clone())
    save_file(tensors, file)


def test_a_run_that_wrote_something_else_fails_and_can_be_resumed(make_model, tmp_path, monkeypatch, capsys):
    make_model().save_pretrained(tmp_path / "model")
    words = ["--model", str(tmp_path / "model"), "--output_dir", str(tmp_path / "out"), "--device", "cpu"]
    words += ["--group_size", "32", "--iters", "0", "--disable_opt_rtn"]
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setattr(pipeline, "export", damaging)
    assert cli.main(words) == 2
    assert f"VerificationError: {tmp_path / 'out'} does not pass its check" in capsys.readouterr().err
    monkeypatch.setattr(pipeline, "export", export)
    monkeypatch.setattr(blockwise, "round_plain", lambda *_: pytest.fail("quantized again"))
    assert cli.main([*words, "--resume"]) == 0
    assert {file.name for file in (tmp_path / "out").iterdir()} >= {"config.json", "model.safetensors"}
    assert not (tmp_path / "out" / pipeline.WORK_FOLDER).exists()


def test_no_verify_skips_the_check(make_model, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "export", damaging)
    options = {**OPTIONS, "max_shard_size": "5GB"}
    with pytest.raises(VerificationError, match="codes read back differently"):
        AutoRound(make_model(), **options).quantize_and_save(tmp_path)
    AutoRound(make_model(), verify=False, **options).quantize_and_save(tmp_path)
    parsed = cli.quantize_parser().parse_args(["--no_verify"])
    assert parsed.verify is False


def test_a_family_that_cannot_be_run_block_by_block_is_said_to_be_unchecked(written, monkeypatch, caplog):
    def refuse(*_, **__):
        raise UnsupportedError("no such stream")

    made = written()
    monkeypatch.setattr(finite_logits, "BlockStream", refuse)
    done = made.verify()
    assert done.logits == "logits not checked"
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert warning.getMessage() == f"{made.folder}: logits are not checked: UnsupportedError: no such stream"


def test_results_are_read_one_block_at_a_time(written, monkeypatch):
    made = written()
    loaded = []
    load = RunStore.load
    monkeypatch.setattr(RunStore, "load", lambda store, block: loaded.append(block) or load(store, block))
    made.verify()
    assert loaded == ["model.layers.0", "model.layers.1"]
