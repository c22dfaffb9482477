"""Every family of vision-language models: blocks are found, and streaming them is the model's own forward pass."""

import pytest
import torch
import transformers
from vision_families import FAMILIES, IMAGE, ORDINARY, TEXT

from auto_round import AutoRound
from auto_round.blocks import BlockStream
from auto_round.calibration import CalibrationSet
from auto_round.checkpoint import CheckpointSource, ModuleSource
from auto_round.errors import UnsupportedError
from auto_round.models import discover

CPU = torch.device("cpu")
TOKENS = 30


def open_stream(source, data, batch_size=1):
    groups = [(name,) for name in discover(source.model).blocks]
    return BlockStream(
        source, groups, data, device=CPU, dtype=torch.float32, storage=CPU, batch_size=batch_size, quantized_chain=True
    )


def hidden_states(stream):
    """Returns the output of each block by name, of those that run."""
    outputs = {}
    for index, (name,) in enumerate(stream.groups):
        block = stream.load(index)
        found = stream.run(block, stream.original)
        stream.advance(block, found, {})
        if block.runs:
            outputs[name] = found
    return outputs


def full_forward(model, calls):
    """Returns the outputs of each block by name for several calls of the model, and the output layer's inputs."""
    seen = {}

    def keep(key, of):
        def hook(_module, args, output):
            seen.setdefault(key, []).append(of(args, output))

        return hook

    handles = [
        model.get_submodule(name).register_forward_hook(keep(name, lambda _, o: o[0] if isinstance(o, tuple) else o))
        for name in discover(model).blocks
    ]
    head = discover(model).head
    handles.append(model.get_submodule(head).register_forward_hook(keep(head, lambda args, _: args[0])))
    with torch.no_grad():
        for arguments in calls:
            model(**arguments, use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


def same(found, expected, source):
    """Whether values are equal, but for the order of sums.

    Alignment sets it where weights are mapped from a file; experts are layers here, one product in the model.
    """
    if source.folder is None and source.original is source.model:
        return torch.equal(found, expected)
    return torch.allclose(found, expected, rtol=1e-5, atol=1e-5)


def picture_data(family, count=3):
    """Returns samples of different lengths, each with a picture, padded to one length, and the same by themselves."""
    samples = [family.with_picture(tokens=14 + 2 * index, seed=index) for index in range(count)]
    width = max(sample["input_ids"].shape[1] for sample in samples) + 1
    ids, masks, media = [], [], []
    for sample in samples:
        length = sample["input_ids"].shape[1]
        fill = {name: pad(tensor, length, width) for name, tensor in sample.items()}
        ids.append(fill.pop("input_ids"))
        masks.append(fill.pop("attention_mask").bool())
        media.append(fill)
    data = CalibrationSet(torch.cat(ids), torch.cat(masks), tuple(media))
    calls = [
        {"input_ids": data.input_ids[i : i + 1], "attention_mask": data.attention_mask[i : i + 1].long(), **media[i]}
        for i in range(count)
    ]
    return data, calls


def pad(tensor, length, width):
    if tensor.is_floating_point() or tensor.ndim < 2 or tensor.shape[1] != length:
        return tensor
    filled = tensor.new_zeros(tensor.shape[0], width, *tensor.shape[2:])
    filled[:, :length] = tensor
    return filled


@pytest.fixture(params=FAMILIES)
def family(request):
    found = FAMILIES[request.param]
    if not found.is_there:
        pytest.skip(f"this Transformers has no {found.architecture}")
    return found


def test_the_decoder_is_found_not_the_vision_tower(family):
    assert discover(family.model()).block_lists == (family.blocks,)


def test_streamed_text_equals_a_full_forward(family, tmp_path):
    model = family.model()
    model.save_pretrained(tmp_path / "model")
    data = CalibrationSet(family.text(3))
    expected = full_forward(model, [{"input_ids": data.input_ids[i : i + 1]} for i in range(3)])
    for source in (ModuleSource(model), CheckpointSource(tmp_path / "model")):
        stream = open_stream(source, data)
        found = hidden_states(stream)
        head = discover(source.model).head
        found[head] = stream.head_inputs(head, stream.original)
        assert found.keys() == expected.keys()
        for name in expected:
            assert same(found[name], expected[name], source), name


def test_streamed_pictures_equal_a_full_forward(family, tmp_path):
    model = family.model()
    model.save_pretrained(tmp_path / "model")
    data, calls = picture_data(family)
    expected = full_forward(model, calls)
    for source in (ModuleSource(model), CheckpointSource(tmp_path / "model")):
        stream = open_stream(source, data)
        found = hidden_states(stream)
        head = discover(source.model).head
        found[head] = stream.head_inputs(head, stream.original)
        assert found.keys() == expected.keys()
        for name in expected:
            assert same(found[name], expected[name], source), name


def test_batches_of_pictures_give_what_single_ones_do(family):
    data, _ = picture_data(family)
    model = family.model()
    single, batched = (hidden_states(open_stream(ModuleSource(model), data, size)) for size in (1, 2))
    for name in single:
        # Products of two samples at a time may sum in another order.
        real = data.attention_mask
        torch.testing.assert_close(batched[name][real], single[name][real], rtol=1e-4, atol=1e-4)


def test_vision_features_between_blocks_forbid_tuning_these_together():
    family = FAMILIES["qwen3_vl"]
    data, _ = picture_data(family)
    blocks = discover(family.model()).blocks
    with pytest.raises(UnsupportedError, match=r"changes hidden states before .*layers\.1.*nblocks=1"):
        BlockStream(
            ModuleSource(family.model()), [blocks[:2], blocks[2:]], data, device=CPU, dtype=torch.float32, storage=CPU,
            batch_size=1, quantized_chain=True,
        )  # fmt: skip


def test_cross_attention_is_rounded_on_text_and_tuned_on_pictures():
    family = FAMILIES["mllama"]
    options = {"bits": 4, "group_size": 32, "iters": 1, "nsamples": 3, "seqlen": 48, "batch_size": 1, "device": "cpu"}
    notes = []
    for data in (family.text(3), [family.with_picture(seed=index) for index in range(3)]):
        rounder = AutoRound(family.model(), dataset=data, **options)
        rounder.quantize()
        notes.append(rounder._store.load(f"{family.blocks}.1").note)
    assert notes[0].startswith("calibration never reached")
    assert "calibration" not in notes[1]


def test_weights_that_a_checkpoint_joins_stay_and_say_why(tmp_path):
    FAMILIES["molmo2"].model().save_pretrained(tmp_path)
    entries = AutoRound(str(tmp_path), group_size=32, iters=0, disable_opt_rtn=True).plan.entries
    inside = {e.layer.name.split(".")[-1]: e for e in entries if e.layer.block == 0}
    assert {name for name, entry in inside.items() if entry.scheme.is_quantized} == {"o_proj", "down_proj"}
    assert inside["q_proj"].reason == "the checkpoint stores it joined with other weights"


def test_models_that_take_the_first_element_of_what_a_block_returns_are_streamed_too():
    """Chameleon does, and so does much code that comes with checkpoints."""
    quantizer = {
        "embed_dim": 16, "num_embeddings": 8, "latent_channels": 16, "resolution": 16, "base_channels": 32,
        "channel_multiplier": [1, 1], "num_res_blocks": 1,
    }  # fmt: skip
    words = {"<image>": IMAGE, **{f"IMGIMG{chr(65 + index)}Z": index for index in range(8)}}
    config = transformers.ChameleonConfig(**TEXT, vq_config=quantizer, vocabulary_map=words)
    model = transformers.ChameleonForConditionalGeneration(config).eval()
    ids = torch.randint(20, ORDINARY, (3, 24), generator=torch.Generator().manual_seed(0))
    expected = full_forward(model, [{"input_ids": ids[index : index + 1]} for index in range(3)])
    found = hidden_states(open_stream(ModuleSource(model), CalibrationSet(ids)))
    assert len(found) == 3
    assert all(torch.equal(hidden, expected[name]) for name, hidden in found.items())
