import json
import os
import socket
import subprocess
import sys

import pytest
import torch

from auto_round import distributed, pipeline
from auto_round.calibration import CalibrationSet
from auto_round.config import RunConfig
from auto_round.session import open_session
from auto_round.store import RunStore

# One rank, as torchrun would start it: first the collectives by themselves, then every case as a run of its own.
# Prints, for each case, what this process wrote.
RANK = """
import json, sys
import torch
from auto_round import distributed, pipeline
from auto_round.calibration import CalibrationSet
from auto_round.shards import ShardWriter
from auto_round.config import RunConfig
from auto_round.session import open_session
from auto_round.store import RunStore

torch.set_num_threads(1)
distributed.start()
distributed.start()  # a second start keeps the group
size, rank = distributed.world_size(), distributed.rank()
assert distributed.is_writer() == (rank == 0)
assert distributed.sum_over_ranks(torch.tensor([1.0, 10.0]) * (rank + 1)).tolist() == [3.0, 30.0]
pieces = [slice(0, 2), slice(2, 4), slice(4, 5)]
rows = torch.zeros(5, 2)
for index, piece in enumerate(pieces):
    if index % 2 == rank:
        rows[piece] = index + 1
filled = distributed.fill_from_owners(rows, pieces)
assert filled is rows and filled[:, 0].tolist() == [1, 1, 2, 2, 3]

written = {}
save, close = RunStore.save, ShardWriter.close
for case, options in json.loads(sys.argv[1]).items():
    seen = written.setdefault(case, [])
    RunStore.save = lambda self, block, result: seen.append(block) or save(self, block, result)
    ShardWriter.close = lambda self: seen.append("shards") or close(self)
    ids = torch.randint(2, 96, (8, 16), generator=torch.Generator().manual_seed(0))
    pipeline.run(open_session(RunConfig.from_options(dataset=CalibrationSet(ids), **options)))
distributed.stop()
distributed.stop()
assert distributed.world_size() == 1
print(json.dumps({"size": size, "rank": rank, "written": written}))
"""
# Two samples a micro-batch and two micro-batches a step: one process adds the terms that two ranks have one of each,
# and a sum of two float32 terms does not depend on their order. So everything must be the same bits.
TWO_TERMS = {
    "iters": 4, "batch_size": 2, "gradient_accumulate_steps": 2, "group_size": 32, "bits": 2, "device": "cpu",
    "e2e_steps": 0,
}  # fmt: skip
CASES = {
    "plain": {},
    "asym": {"sym": False},
    "paper": {"enable_alg_ext": False},
    "adam": {"adam": True},
    "norms-and-head": {"enable_norm_bias_tuning": True, "quant_lm_head": True},
    "one-rank-idle": {"batch_size": 1, "gradient_accumulate_steps": 1},
    "searched": {"iters": 0},
    "rounded": {"iters": 0, "disable_opt_rtn": True},
    "end-to-end": {"iters": 0, "e2e_steps": 4, "quant_lm_head": True, "seed": 2},
}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(world, cases):
    """Returns what each of `world` ranks printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environment["WORLD_SIZE"] = str(world)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, json.dumps(cases)],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in range(world)
    ]
    try:
        outputs = [process.communicate(timeout=180) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors.decode()[-2000:]
    return [json.loads(out.decode().strip().splitlines()[-1]) for out, _ in outputs]


@pytest.fixture(scope="module")
def two_ranks(make_model, tmp_path_factory):
    """Returns the folder of the model and of every case's output, and what each rank printed. One start for all."""
    place = tmp_path_factory.mktemp("ranks")
    make_model().save_pretrained(place / "model")
    cases = {
        case: {
            "model": str(place / "model"),
            "output_dir": str(place / case / "out"),
            "work_dir": str(place / case / "work"),
            **TWO_TERMS,
            **changes,
        }
        for case, changes in CASES.items()
    }
    return place, launch(2, cases)


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_write_the_bits_of_one_process(case, two_ranks, token_ids, tmp_path):
    place, _ = two_ranks
    options = {"model": str(place / "model"), **TWO_TERMS, **CASES[case], "dataset": CalibrationSet(token_ids(8, 16))}
    options |= {"output_dir": str(tmp_path / "out"), "work_dir": str(tmp_path / "work")}
    pipeline.run(open_session(RunConfig.from_options(**options)))
    one, two = RunStore.existing(tmp_path / "work"), RunStore.existing(place / case / "work")
    assert list(one.finished()) == list(two.finished())
    kept = {
        name: record["summary"]["kept_step"] if (record := store.scales_record()) else None
        for name, store in (("one", one), ("two", two))
    }
    assert kept["one"] == kept["two"] != 0
    for block in one.finished():
        a, b = one.load(block), two.load(block)
        assert a.summary() == b.summary()
        for name, weight in a.weights.items():
            assert torch.equal(weight.codes, b.weights[name].codes), name
            assert torch.equal(weight.scale, b.weights[name].scale), name
            if weight.zero_point is not None:
                assert torch.equal(weight.zero_point, b.weights[name].zero_point), name
        assert a.plain.keys() == b.plain.keys()
        assert all(torch.equal(tensor, b.plain[name]) for name, tensor in a.plain.items())
    shard = "model.safetensors"
    assert (tmp_path / "out" / shard).read_bytes() == (place / case / "out" / shard).read_bytes()


@pytest.mark.parametrize("case", CASES)
def test_rank_0_alone_writes(case, two_ranks):
    _, (first, second) = two_ranks
    assert (first["size"], first["rank"], second["size"], second["rank"]) == (2, 0, 2, 1)
    assert second["written"][case] == []
    blocks = ["model.layers.0", "model.layers.1", *(["outside_blocks"] if "quant_lm_head" in CASES[case] else [])]
    assert first["written"][case] == [*blocks, "shards"]


def test_without_torchrun_there_is_one_rank_and_everything_is_the_identity(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    distributed.start()
    assert (distributed.world_size(), distributed.rank(), distributed.is_writer()) == (1, 0, True)
    tensor = torch.arange(4.0)
    assert distributed.sum_over_ranks(tensor) is tensor
    assert distributed.fill_from_owners(tensor, [slice(0, 2), slice(2, 4)]) is tensor
    assert tensor.tolist() == [0, 1, 2, 3]
    distributed.barrier()
    distributed.stop()
