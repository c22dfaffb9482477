import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from auto_round import pipeline
from auto_round.config import RunConfig
from auto_round.formats import EXPORTERS, export, finite_logits
from auto_round.formats.finite_logits import DenseTensors, LogitsOutcome, check_logits
from auto_round.formats.verify import expected_tensors
from auto_round.formats.written import WrittenCheckpoint
from auto_round.session import open_session

OPTIONS = {"iters": 0, "disable_opt_rtn": True, "group_size": 32, "device": "cpu"}
CPU = torch.device("cpu")


class Written:
    """A tiny model, quantized and written as one file."""

    def __init__(self, folder, model, name="auto_round", **options):
        self.config = RunConfig.from_options(model=model, **{**OPTIONS, **options})
        session = open_session(self.config)
        self.folder, self.blocks = folder / name, session.plan.structure.blocks
        store = pipeline.quantize(session, folder / "work")
        export(EXPORTERS[name], self.folder, session.plan, session.source, store, self.config, None)
        self.weights = expected_tensors(EXPORTERS[name], session.plan, session.source, self.config).weights

    def put(self, key, value):
        file = self.folder / "model.safetensors"
        tensors = load_file(file)
        tensors[key].view(-1)[5] = value
        save_file(tensors, file)

    def check(self):
        return check_logits(WrittenCheckpoint(self.folder), self.weights, self.blocks, self.config)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3_moe"])
def test_packed_weights_are_given_dequantized_under_their_original_keys(kind, make_model, tmp_path):
    packed = Written(tmp_path, make_model(kind), sym=False)
    dense = load_file(Written(tmp_path, make_model(kind), "fake", sym=False).folder / "model.safetensors")
    tensors = DenseTensors(WrittenCheckpoint(packed.folder), packed.weights, CPU)
    assert set(tensors) == set(dense)
    assert len(tensors) == len(dense)
    for key, tensor in dense.items():
        assert torch.equal(tensors[key], tensor), key
        assert key not in packed.weights or tensors[key].dtype == tensor.dtype


@pytest.mark.parametrize("name", ["auto_round", "fake"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_forward_pass_is_that_of_the_loaded_model(name, tied, make_model, tmp_path, monkeypatch):
    """Independent oracle: Transformers loads the dequantized checkpoint and runs the same tokens."""
    options = {"sym": False, "quant_lm_head": tied}
    written = Written(tmp_path, make_model(tie_word_embeddings=tied), name, **options)
    plain = Written(tmp_path, make_model(tie_word_embeddings=tied), "fake", **options)
    tokens, seen = [], []
    draw, finite = finite_logits._random_tokens, finite_logits._finite
    monkeypatch.setattr(finite_logits, "_random_tokens", lambda *args: tokens.append(draw(*args)) or tokens[0])
    monkeypatch.setattr(finite_logits, "_finite", lambda tensor: seen.append(tensor) or finite(tensor))
    assert written.check() == LogitsOutcome("logits finite")
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(plain.folder)(tokens[0]).logits
    assert seen[-1].shape == (2, 16, 96)
    torch.testing.assert_close(seen[-1], wanted)


@pytest.mark.parametrize("name", ["auto_round", "fake"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")], ids=str)
@pytest.mark.parametrize("block", [0, 1])
def test_the_first_block_that_breaks_is_named_with_its_tensor(block, value, name, make_model, tmp_path):
    written = Written(tmp_path, make_model(), name)
    for index in range(block, 2):
        written.put(f"model.layers.{index}.mlp.up_proj.{'weight' if name == 'fake' else 'scales'}", value)
    outcome = written.check()
    assert (outcome.summary, outcome.skipped) == ("logits not finite", "")
    assert outcome.problems == (
        f"block model.layers.{block} gives values that are not finite on random tokens; infinity or NaN in: "
        f"model.layers.{block}.mlp.up_proj.weight",
    )


@pytest.mark.parametrize(
    ("key", "where"),
    [
        ("model.norm.weight", "the output layer lm_head, or the norm before it,"),
        ("lm_head.scales", "the output layer lm_head, or the norm before it,"),
        ("model.embed_tokens.weight", "the embedding"),
    ],
)
def test_what_lies_around_the_blocks_is_named_too(key, where, make_model, tmp_path, monkeypatch):
    written = Written(tmp_path, make_model(), quant_lm_head=True)
    monkeypatch.setattr(finite_logits, "_random_tokens", lambda *_: torch.zeros(2, 8, dtype=torch.long))
    written.put(key, float("nan"))
    (problem,) = written.check().problems
    assert problem.startswith(f"{where} gives values that are not finite")


def test_finite_weights_that_overflow_are_told_from_bad_ones(make_model, tmp_path):
    model = make_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.fill_(3e38)
    written = Written(tmp_path, model, "fake", layer_config={"layers.1.mlp.up_proj": 16})
    (problem,) = written.check().problems
    assert problem.startswith("block model.layers.1 gives")
    assert problem.endswith("; its weights are finite, so it may overflow in float32")


def test_a_parameter_without_a_tensor_is_a_problem(make_model, tmp_path):
    written = Written(tmp_path, make_model())
    file = written.folder / "model.safetensors"
    name = "model.layers.1.input_layernorm.weight"
    save_file({key: tensor for key, tensor in load_file(file).items() if key != name}, file)
    outcome = written.check()
    assert outcome.skipped == ""
    assert f"no weights for {name}" in outcome.problems[0]


def test_short_models_get_short_samples(make_model, tmp_path):
    assert Written(tmp_path, make_model(max_position_embeddings=5)).check() == LogitsOutcome("logits finite")


def test_what_cannot_be_run_is_skipped_with_the_reason(make_model, tmp_path):
    written = Written(tmp_path, make_model())
    (written.folder / "config.json").write_text('{"model_type": "nobody_knows"}')
    outcome = written.check()
    assert (outcome.summary, outcome.problems) == ("logits not checked", ())
    assert outcome.skipped.startswith("ValueError: ")
