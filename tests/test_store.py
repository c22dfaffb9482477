from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from auto_round.errors import CheckpointError, ResumeMismatchError
from auto_round.schemes import QuantizationScheme
from auto_round.store import SCALES_FILE, RunStore
from auto_round.tensors import BlockResult, QuantizedTensor, group_count

OPTIONS = {"bits": 4, "scheme": {"group_size": 128}, "seed": 42}


def random_weight(rows: int, width: int, *, bits: int, group_size: int, sym: bool) -> QuantizedTensor:
    generator = torch.Generator().manual_seed(bits)
    groups = group_count(width, group_size)
    zero = None if sym else torch.randint(0, 2**bits, (rows, groups), generator=generator).to(torch.uint8)
    return QuantizedTensor(
        torch.randint(0, 2**bits, (rows, width), generator=generator).to(torch.uint8),
        torch.randn(rows, groups, generator=generator),
        zero,
        QuantizationScheme(bits=bits, group_size=group_size, sym=sym, scale_dtype="fp32"),
    )


def block_result() -> BlockResult:
    weights = {
        f"model.layers.0.w{bits}_{sym}.weight": random_weight(3, 37, bits=bits, group_size=16, sym=sym)
        for bits in (2, 3, 4, 5, 6, 7, 8)
        for sym in (True, False)
    }
    plain = {"model.layers.0.norm.weight": torch.randn(5).bfloat16(), "model.layers.0.w.bias": torch.randn(4)}
    return BlockResult(weights, plain, first_loss=0.1 + 0.2, best_loss=1e-30, best_step=3, note="a | b")


def test_what_is_loaded_is_exactly_what_was_saved(tmp_path):
    store = RunStore(tmp_path, OPTIONS, resume=False)
    saved = block_result()
    store.save("model.layers.0", saved)
    loaded = store.load("model.layers.0")
    assert loaded.summary() == saved.summary()
    assert list(loaded.weights) == list(saved.weights)
    for name, weight in saved.weights.items():
        again = loaded.weights[name]
        assert again.scheme == weight.scheme
        assert torch.equal(again.codes, weight.codes)
        assert torch.equal(again.scale, weight.scale)
        assert (again.zero_point is None) == (weight.zero_point is None)
        assert torch.equal(again.zero_points(), weight.zero_points())
    assert set(loaded.plain) == set(saved.plain)
    for name, tensor in saved.plain.items():
        assert torch.equal(loaded.plain[name], tensor)
        assert loaded.plain[name].dtype == tensor.dtype


def test_tuned_values_are_read_without_the_codes(tmp_path):
    store = RunStore(tmp_path, OPTIONS, resume=False)
    saved = block_result()
    store.save("model.layers.0", saved)
    found = store.plain("model.layers.0")
    assert found.keys() == saved.plain.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in saved.plain.items())


def test_a_result_without_tensors_is_kept_too(tmp_path):
    store = RunStore(tmp_path, OPTIONS, resume=False)
    store.save("model.layers.0", BlockResult({}))
    assert store.load("model.layers.0").summary() == BlockResult({}).summary()


def test_views_of_larger_tensors_are_saved_by_value(tmp_path):
    store = RunStore(tmp_path, OPTIONS, resume=False)
    table = torch.arange(12.0).reshape(3, 4)
    store.save("b", BlockResult({}, {"column": table[:, 1], "first": table[0], "second": table[1]}))
    loaded = store.load("b").plain
    assert loaded["column"].tolist() == [1, 5, 9]
    assert loaded["first"].tolist() == [0, 1, 2, 3]
    assert loaded["second"].tolist() == [4, 5, 6, 7]


def test_finished_blocks_are_known_by_name(tmp_path):
    store = RunStore(tmp_path, OPTIONS, resume=False)
    store.save("model.layers.1", BlockResult({}))
    store.save("model.layers.10", BlockResult({}))
    assert store.has("model.layers.1")
    assert not store.has("model.layers.0")
    assert list(store.finished()) == ["model.layers.1", "model.layers.10"]


def test_loading_an_unfinished_block_names_it(tmp_path):
    with pytest.raises(CheckpointError, match=r"block model\.layers\.3 is not finished"):
        RunStore(tmp_path, OPTIONS, resume=False).load("model.layers.3")


def test_resume_with_the_same_options_keeps_the_blocks(tmp_path):
    RunStore(tmp_path, OPTIONS, resume=False).save("b", block_result())
    assert RunStore(tmp_path, dict(reversed(OPTIONS.items())), resume=True).has("b")


def test_without_resume_everything_starts_anew(tmp_path):
    RunStore(tmp_path, OPTIONS, resume=False).save("b", block_result())
    assert not RunStore(tmp_path, OPTIONS, resume=False).has("b")


def test_resume_in_an_empty_folder_starts_a_run(tmp_path):
    store = RunStore(tmp_path / "deep" / "folder", OPTIONS, resume=True)
    assert store.fingerprint == OPTIONS


def test_resume_with_other_options_lists_each_difference_and_keeps_the_blocks(tmp_path):
    RunStore(tmp_path, OPTIONS, resume=False).save("b", block_result())
    with pytest.raises(ResumeMismatchError) as caught:
        RunStore(tmp_path, {"bits": 2, "scheme": {"group_size": 128}, "iters": 5}, resume=True)
    text = str(caught.value)
    assert "bits: 4 then, 2 now" in text
    assert "seed: 42 then, None now" in text
    assert "iters: None then, 5 now" in text
    assert "scheme" not in text
    assert RunStore.existing(tmp_path).has("b")
    assert RunStore.existing(tmp_path).fingerprint == OPTIONS


def test_options_that_json_spells_otherwise_are_the_same(tmp_path):
    RunStore(tmp_path, {"names": ("a", "b"), "folder": tmp_path}, resume=False).save("b", BlockResult({}))
    assert RunStore(tmp_path, {"names": ["a", "b"], "folder": tmp_path}, resume=True).has("b")


def test_partial_files_are_not_results(tmp_path):
    store = RunStore(tmp_path, OPTIONS, resume=False)
    (store.blocks / "model.layers.partial").write_bytes(b"half a block")
    (store.blocks / "model.layers.0.partial").write_bytes(b"half a block")
    again = RunStore(tmp_path, OPTIONS, resume=True)
    assert not again.has("model.layers.0")
    assert list(again.finished()) == []
    again.save("model.layers.0", block_result())
    assert again.load("model.layers.0").best_step == 3


def test_a_killed_save_leaves_the_earlier_result(tmp_path, monkeypatch):
    store = RunStore(tmp_path, OPTIONS, resume=False)
    store.save("b", BlockResult({}, best_step=1))

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", killed)
        with pytest.raises(KeyboardInterrupt):
            store.save("b", BlockResult({}, best_step=2))
    assert store.load("b").best_step == 1


@pytest.mark.parametrize("block", ["model.layers.0", "model.layers.1"])
def test_two_blocks_being_saved_do_not_share_a_partial_file(tmp_path, block, monkeypatch):
    store = RunStore(tmp_path, OPTIONS, resume=False)
    written = []
    monkeypatch.setattr("os.fsync", lambda _: written.extend(path.name for path in store.blocks.iterdir()))
    store.save(block, BlockResult({}))
    assert written == [f"{block}.partial"]


def test_an_existing_store_is_opened_without_options(tmp_path):
    RunStore(tmp_path, OPTIONS, resume=False).save("b", block_result())
    store = RunStore.existing(tmp_path)
    assert store.fingerprint == OPTIONS
    assert store.load("b").best_step == 3


def test_a_folder_without_a_run_is_no_store(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no finished run \(no run\.json\)"):
        RunStore.existing(tmp_path)


def test_the_fingerprint_is_readable_json(tmp_path):
    RunStore(tmp_path, OPTIONS, resume=False)
    assert json.loads((tmp_path / "run.json").read_text()) == OPTIONS


def test_remove_takes_the_folder_away(tmp_path):
    store = RunStore(tmp_path / "work", OPTIONS, resume=False)
    store.save("b", block_result())
    store.remove()
    assert not (tmp_path / "work").exists()
    store.remove()


def test_remove_leaves_what_others_put_there(tmp_path):
    store = RunStore(tmp_path / "work", OPTIONS, resume=False)
    (tmp_path / "work" / "notes.txt").write_text("mine")
    store.remove()
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["notes.txt"]


def test_a_damaged_block_is_reported_as_such(tmp_path):
    store = RunStore(tmp_path, OPTIONS, resume=False)
    store.save("b", block_result())
    file = store.blocks / "b.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="b"):
        store.load("b")
    with pytest.raises(CheckpointError, match=r"b\.safetensors is damaged"):
        store.plain("b")


def test_a_damaged_fingerprint_is_reported_as_such(tmp_path):
    RunStore(tmp_path, OPTIONS, resume=False)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"run\.json"):
        RunStore(tmp_path, OPTIONS, resume=True)


def test_a_damaged_fingerprint_does_not_stop_a_new_run(tmp_path):
    RunStore(tmp_path, OPTIONS, resume=False)
    (tmp_path / "run.json").write_text("{")
    assert RunStore(tmp_path, OPTIONS, resume=False).fingerprint == OPTIONS


# --- scales that take the place of those of blocks --------------------------------------------------------------


def doubled(result):
    return {name: dataclasses.replace(weight, scale=weight.scale * 2) for name, weight in result.weights.items()}


def test_saved_scales_take_the_place_of_a_blocks_own(tmp_path):
    store = RunStore(tmp_path, OPTIONS, resume=False)
    result = block_result()
    store.save("model.layers.0", result)
    changed = dict(list(doubled(result).items())[:3])
    store.save_scales(changed, {"steps": 3}, kept=1)
    loaded = RunStore.existing(tmp_path).load("model.layers.0").weights
    for name, weight in result.weights.items():
        assert torch.equal(loaded[name].scale, changed[name].scale if name in changed else weight.scale)
        assert torch.equal(loaded[name].codes, weight.codes)
    assert store.scales_record() == {"options": {"steps": 3}, "summary": {"kept": 1}}
    assert list(store.finished()) == ["model.layers.0"]
    store.drop_scales()
    again = store.load("model.layers.0").weights
    assert all(torch.equal(again[name].scale, weight.scale) for name, weight in result.weights.items())
    assert store.scales_record() == {}


def test_a_scale_of_the_tensor_is_saved_too(tmp_path):
    store = RunStore(tmp_path, OPTIONS, resume=False)
    scheme = QuantizationScheme.from_dict({"data_type": "nv_fp"})
    weight = QuantizedTensor(torch.ones(2, 16, dtype=torch.uint8), torch.ones(2, 1), None, scheme, torch.tensor(3.0))
    store.save("b", BlockResult({"b.w.weight": weight}))
    store.save_scales({"b.w.weight": dataclasses.replace(weight, global_scale=torch.tensor(5.0))}, {})
    assert float(store.load("b").weights["b.w.weight"].global_scale) == 5.0


def test_a_block_that_is_stored_anew_drops_saved_scales(tmp_path):
    store = RunStore(tmp_path, OPTIONS, resume=False)
    result = block_result()
    store.save("model.layers.0", result)
    store.save_scales(doubled(result), {})
    store.save("model.layers.0", result)
    assert store.scales_record() == {}


def test_saved_scales_live_as_long_as_the_results(tmp_path):
    result = block_result()
    store = RunStore(tmp_path / "w", OPTIONS, resume=False)
    store.save("model.layers.0", result)
    store.save_scales(doubled(result), {"steps": 3})
    assert RunStore(tmp_path / "w", OPTIONS, resume=True).scales_record()
    store.remove()
    assert not (tmp_path / "w").exists()


def test_damaged_scales_name_their_file(tmp_path):
    store = RunStore(tmp_path, OPTIONS, resume=False)
    store.save("model.layers.0", block_result())
    (tmp_path / SCALES_FILE).write_bytes(b"damaged")
    for read in (store.scales_record, lambda: store.load("model.layers.0")):
        with pytest.raises(CheckpointError, match=SCALES_FILE):
            read()


def test_held_out_samples_are_kept_and_go_with_the_store(tmp_path):
    store = RunStore(tmp_path / "work", {"a": 1}, resume=False)
    assert store.held_out() == ({}, "")
    ids = torch.arange(6).view(2, 3)
    store.save_held_out({"input_ids": ids}, "what they are")
    tensors, about = RunStore.existing(tmp_path / "work").held_out()
    assert torch.equal(tensors["input_ids"], ids)
    assert about == "what they are"
    store.save_held_out({}, "why there are none")
    assert store.held_out() == ({}, "why there are none")
    store.remove()
    assert not (tmp_path / "work").exists()
