import copy

import pytest
import torch

from auto_round.blocks import BlockStream
from auto_round.calibration import CalibrationSet
from auto_round.checkpoint import CheckpointSource, ModuleSource
from auto_round.errors import CalibrationError, UnsupportedError
from auto_round.models import discover

KINDS = ("llama", "qwen3", "gemma3", "opt", "gpt2", "qwen3_moe")
BATCH = 2


def open_stream(source, data, *, nblocks=1, quantized_chain=True):
    blocks = discover(source.model).blocks
    groups = [blocks[start : start + nblocks] for start in range(0, len(blocks), nblocks)]
    cpu = torch.device("cpu")
    return BlockStream(
        source, groups, data, device=cpu, dtype=torch.float32, storage=cpu,
        batch_size=BATCH, quantized_chain=quantized_chain,
    )  # fmt: skip


def streamed(source, data, *, nblocks=1):
    """Returns the input of each group, the output of the last, and the stream behind it."""
    stream = open_stream(source, data, nblocks=nblocks)
    hidden = [stream.original.clone()]  # `advance` overwrites its inputs
    for index in range(len(stream.groups)):
        block = stream.load(index)
        outputs = stream.run(block, stream.original)
        stream.advance(block, outputs, {})
        hidden.append(outputs.clone())
    return hidden, stream


def reference(model, data):
    """Returns each block's input, the last block's output and what the output layer sees, by hooks on a copy."""
    model = copy.deepcopy(model)
    names = discover(model).blocks
    seen = {name: [] for name in (*names, "end", "head")}

    def keep(key):
        def hook(_module, args, kwargs):
            seen[key].append(args[0] if args else kwargs["hidden_states"])

        return hook

    for name in names:
        model.get_submodule(name).register_forward_pre_hook(keep(name), with_kwargs=True)
    model.get_submodule(names[-1]).register_forward_hook(
        lambda _module, _args, output: seen["end"].append(output[0] if isinstance(output, tuple) else output)
    )
    model.get_output_embeddings().register_forward_pre_hook(keep("head"), with_kwargs=True)
    with torch.no_grad():
        for start in range(0, len(data), BATCH):
            rows = slice(start, start + BATCH)
            mask = None if data.attention_mask is None else data.attention_mask[rows].long()
            model(input_ids=data.input_ids[rows], attention_mask=mask, use_cache=False)
    joined = {key: torch.cat(parts) for key, parts in seen.items()}
    head = joined.pop("head")
    return list(joined.values()), head


def source_of(model, place, tmp_path):
    if place == "memory":
        return ModuleSource(model)
    model.save_pretrained(tmp_path / "model", max_shard_size="80KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    return CheckpointSource(tmp_path / "model")


@pytest.fixture
def data(token_ids):
    return CalibrationSet(token_ids(5, 12))  # five samples: the last batch is a short one


@pytest.fixture
def padded(token_ids):
    mask = torch.ones(5, 12, dtype=torch.bool)
    mask[1, 7:] = False
    mask[4, 3:] = False
    return CalibrationSet(token_ids(5, 12), mask)


@pytest.mark.parametrize("place", ["memory", "folder"])
@pytest.mark.parametrize("kind", KINDS)
def test_streamed_hidden_states_equal_a_full_forward(kind, place, make_model, data, tmp_path):
    model = make_model(kind)
    expected, _ = reference(model, data)
    found, _ = streamed(source_of(model, place, tmp_path), data)
    assert len(found) == len(expected)
    for index, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(a, b), f"input of block {index}"


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_not_taken_for_samples_where_there_are_as_many(kind, make_model, token_ids):
    """Batches of two samples with two tokens: tables of positions have the length of a batch."""
    data = CalibrationSet(token_ids(4, BATCH))
    expected, _ = reference(make_model(kind), data)
    found, _ = streamed(ModuleSource(make_model(kind)), data)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_real_tokens_of_padded_samples_equal_a_full_forward(kind, make_model, padded):
    model = make_model(kind)
    expected, _ = reference(model, padded)
    found, _ = streamed(ModuleSource(model), padded)
    for index, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(a[padded.attention_mask], b[padded.attention_mask]), f"input of block {index}"


def test_padding_changes_what_real_tokens_see_only_through_the_mask(make_model, padded, token_ids):
    """Other ids under the padding must not matter: causal attention with the mask hides them."""
    ids = torch.where(padded.attention_mask, padded.input_ids, token_ids(5, 12, seed=9))
    found, _ = streamed(ModuleSource(make_model()), padded)
    other, _ = streamed(ModuleSource(make_model()), CalibrationSet(ids, padded.attention_mask))
    assert not torch.equal(found[0], other[0])
    assert torch.equal(found[-1][padded.attention_mask], other[-1][padded.attention_mask])


def test_blocks_taken_together_give_the_same_outputs(make_model, data):
    expected, _ = reference(make_model("gemma3"), data)
    found, stream = streamed(ModuleSource(make_model("gemma3")), data, nblocks=2)
    assert [len(group) for group in stream.groups] == [2, 1]
    assert torch.equal(found[1], expected[2])
    assert torch.equal(found[2], expected[3])


@pytest.mark.parametrize("kind", KINDS)
def test_head_inputs_are_what_the_output_layer_sees(kind, make_model, data):
    model = make_model(kind)
    expected, head_inputs = reference(model, data)
    stream = open_stream(ModuleSource(model), data)
    assert torch.equal(stream.head_inputs(discover(model).head, expected[-1]), head_inputs)


def test_replaced_weights_move_only_the_quantized_chain(make_model, data):
    model = make_model()
    changed = copy.deepcopy(model)
    name = "model.layers.0.mlp.down_proj.weight"
    with torch.no_grad():
        changed.get_parameter(name).mul_(0.5)
    stream = open_stream(ModuleSource(model), data)
    block = stream.load(0)
    stream.advance(block, stream.run(block, stream.original), {name: changed.get_parameter(name).detach()})
    assert torch.equal(stream.original, reference(model, data)[0][1])
    assert torch.equal(stream.quantized, reference(changed, data)[0][1])


def test_without_the_quantized_chain_both_are_the_original(make_model, data):
    stream = open_stream(ModuleSource(make_model()), data, quantized_chain=False)
    block = stream.load(0)
    outputs = stream.run(block, stream.original)
    stream.advance(block, outputs, {"model.layers.0.mlp.down_proj.weight": torch.zeros(64, 128)})
    assert stream.quantized is stream.original is outputs


def fingerprint(model):
    """Returns everything that must stay: module objects, storages, values, hooks, instance attributes."""
    modules = {name: (id(module), sorted(vars(module))) for name, module in model.named_modules()}
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())
    tensors = {n: (t.data_ptr(), t.clone(), t.requires_grad) for n, t in [*model.named_parameters()]}
    return modules, hooks, tensors


def assert_untouched(model, before):
    modules, hooks, tensors = fingerprint(model)
    assert modules == before[0]
    assert hooks == before[1] == 0
    for name, (pointer, value, requires_grad) in tensors.items():
        assert pointer == before[2][name][0]
        assert torch.equal(value, before[2][name][1])
        assert requires_grad == before[2][name][2]


@pytest.mark.parametrize("kind", KINDS)
def test_a_users_model_is_untouched(kind, make_model, data):
    model = make_model(kind)
    before = fingerprint(model)
    _, stream = streamed(ModuleSource(model), data)
    stream.head_inputs(discover(model).head, stream.original)
    assert_untouched(model, before)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_users_model_is_untouched_after_an_exception(make_model, token_ids):
    model = make_model()
    before = fingerprint(model)
    with pytest.raises(IndexError):
        open_stream(ModuleSource(model), CalibrationSet(token_ids(2, 4) + 1000))
    assert_untouched(model, before)


def test_a_block_that_overflows_names_itself_and_the_samples(make_model, data):
    model = make_model()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(3e38)
    with pytest.raises(
        CalibrationError, match=r"^model\.layers\.1 gives values that are not finite for samples \[0, 1"
    ):
        streamed(ModuleSource(model), data)


def test_several_blocks_are_named_as_a_range(make_model, data):
    stream = open_stream(ModuleSource(make_model("gemma3")), data, nblocks=2)
    assert [stream.load(index).name for index in (0, 1)] == ["model.layers.0..1", "model.layers.2"]


def test_a_block_that_the_model_never_calls_is_refused(make_model, data):
    model = make_model()
    model.model.spare = torch.nn.ModuleList([torch.nn.Linear(64, 64)])
    cpu = torch.device("cpu")
    with pytest.raises(UnsupportedError, match=r"never called model\.spare\.0"):
        BlockStream(
            ModuleSource(model), [("model.spare.0",)], data, device=cpu, dtype=torch.float32, storage=cpu,
            batch_size=BATCH, quantized_chain=True,
        )  # fmt: skip


def test_arguments_that_are_the_same_for_every_sample_are_kept_once(make_model, data, padded):
    plain = open_stream(ModuleSource(make_model()), data).load(0)
    assert not plain.calls[0].per_sample
    masked = open_stream(ModuleSource(make_model()), padded).load(0)
    assert [tensor.shape[0] for tensor in masked.calls[0].per_sample.values()] == [5]


def test_blocks_share_the_arguments_that_the_model_shares(make_model, padded):
    stream = open_stream(ModuleSource(make_model()), padded)
    first, second = (next(iter(stream.load(index).calls[0].per_sample.values())) for index in (0, 1))
    assert first is second


def test_outputs_may_take_the_place_of_the_inputs(make_model, data):
    stream = open_stream(ModuleSource(make_model()), data)
    block, inputs = stream.load(0), stream.original.clone()
    expected = stream.run(block, inputs)
    assert not torch.equal(expected, inputs)
    assert stream.run(block, inputs, into=inputs) is inputs
    assert torch.equal(inputs, expected)


@pytest.mark.parametrize("quantized_chain", [True, False], ids=["two-chains", "one-chain"])
@pytest.mark.parametrize("keeps_inputs", [True, False], ids=["kept", "consumed"])
def test_targets_take_the_place_of_original_inputs_that_nothing_else_needs(
    keeps_inputs, quantized_chain, make_model, data
):
    """Memory of the chains: what is overwritten is not allocated again."""
    expected, _ = reference(make_model(), data)
    stream = open_stream(ModuleSource(make_model()), data, quantized_chain=quantized_chain)
    consumed = quantized_chain and not keeps_inputs
    for index in range(2):
        block, original, inputs = stream.load(index), stream.original, stream.quantized
        targets = stream.targets(block, keeps_inputs=keeps_inputs)
        assert torch.equal(targets, expected[index + 1])
        assert torch.equal(stream.quantized, expected[index])  # what the block is tuned on
        assert (stream.original is None) == consumed
        shares = targets.data_ptr() == original.data_ptr()
        assert shares == (consumed and original is not inputs)
        stream.advance(block, targets, {})
        assert (stream.quantized is inputs) == quantized_chain


def test_samples_that_overflow_are_named_whatever_batch_they_are_in(make_model, data):
    stream = open_stream(ModuleSource(make_model()), data)
    inputs = stream.original.clone()
    inputs[3, 1] = float("inf")
    with pytest.raises(CalibrationError, match=r"^model\.layers\.0 gives values .* for samples \[3\]\. The model"):
        stream.run(stream.load(0), inputs)
