import json
import os
import socket
import subprocess
import sys

import pytest
import torch

from auto_round import distributed
from auto_round.store import RunStore

# One rank of a run, as torchrun would start it; without RANK in the environment it is a run of its own. Prints what
# this process wrote.
RANK = """
import json, sys
import torch
from auto_round import distributed, pipeline
from auto_round.calibration import CalibrationSet
from auto_round.checkpoint import ShardWriter
from auto_round.config import RunConfig
from auto_round.store import RunStore
torch.set_num_threads(1)
options = json.loads(sys.argv[1])
ids = torch.randint(2, 96, (8, 16), generator=torch.Generator().manual_seed(0))
written = []
save, close = RunStore.save, ShardWriter.close
RunStore.save = lambda self, block, result: written.append(block) or save(self, block, result)
ShardWriter.close = lambda self: written.append("shards") or close(self)
distributed.start()
size, rank = distributed.world_size(), distributed.rank()
pipeline.run(pipeline.open_session(RunConfig.from_options(dataset=CalibrationSet(ids), **options)))
distributed.stop()
print(json.dumps({"size": size, "rank": rank, "written": written}))
"""
# Two samples a micro-batch and two micro-batches a step: one process adds the terms that two ranks have one of each,
# and a sum of two float32 terms does not depend on their order. So everything must be the same bits.
TWO_TERMS = {"iters": 4, "batch_size": 2, "gradient_accumulate_steps": 2, "group_size": 32, "bits": 2, "device": "cpu"}
CASES = {
    "plain": {},
    "asym": {"sym": False},
    "alg_ext": {"enable_alg_ext": True},
    "norms-and-head": {"enable_norm_bias_tuning": True, "quant_lm_head": True},
    "one-rank-idle": {"batch_size": 1, "gradient_accumulate_steps": 1},
    "searched": {"iters": 0},
    "rounded": {"iters": 0, "disable_opt_rtn": True},
}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(world, options):
    """Returns what each rank printed; starts `world` processes, or one without torchrun's variables for 1."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "AR_LOG_LEVEL": "WARNING"}
    for name in ("RANK", "WORLD_SIZE"):
        environment.pop(name, None)
    port = str(free_port())
    processes = []
    for rank in range(world):
        torchrun = {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)} if world > 1 else {}
        torchrun |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if world > 1 else {}
        command = [sys.executable, "-c", RANK, json.dumps(options)]
        processes.append(
            subprocess.Popen(command, env={**environment, **torchrun}, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        )
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors.decode()[-2000:]
    return [json.loads(out.decode().strip().splitlines()[-1]) for out, _ in outputs]


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_two_ranks_write_the_bits_of_one_process_and_rank_0_alone_writes(changes, make_model, tmp_path):
    make_model().save_pretrained(tmp_path / "model")
    options = {"model": str(tmp_path / "model"), **TWO_TERMS, **changes}
    places = {world: {"output_dir": str(tmp_path / f"out{world}"), "work_dir": str(tmp_path / f"work{world}")}
              for world in (1, 2)}  # fmt: skip
    first, second = launch(2, {**options, **places[2]})
    (alone,) = launch(1, {**options, **places[1]})
    assert (first["size"], first["rank"], second["size"], second["rank"]) == (2, 0, 2, 1)
    assert second["written"] == []
    assert first["written"] == alone["written"]
    assert {"model.layers.0", "model.layers.1", "shards"} <= set(first["written"])

    one, two = (RunStore.existing(tmp_path / f"work{world}") for world in (1, 2))
    for block in one.finished():
        a, b = one.load(block), two.load(block)
        assert a.summary() == b.summary()
        for name, weight in a.weights.items():
            assert torch.equal(weight.codes, b.weights[name].codes), name
            assert torch.equal(weight.scale, b.weights[name].scale), name
        assert a.plain.keys() == b.plain.keys()
        assert all(torch.equal(tensor, b.plain[name]) for name, tensor in a.plain.items())
    shards = [(tmp_path / f"out{world}" / "model.safetensors").read_bytes() for world in (1, 2)]
    assert shards[0] == shards[1]


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


SUMS = """
import torch
from auto_round import distributed
distributed.start()
rank = distributed.rank()
summed = distributed.sum_over_ranks(torch.tensor([1.0, 10.0]) * (rank + 1))
assert summed.tolist() == [3.0, 30.0], summed
pieces = [slice(0, 2), slice(2, 4), slice(4, 5)]
rows = torch.zeros(5, 2)
for index, piece in enumerate(pieces):
    if index % 2 == rank:
        rows[piece] = index + 1
filled = distributed.fill_from_owners(rows, pieces)
assert filled is rows
assert filled[:, 0].tolist() == [1, 1, 2, 2, 3], filled
assert distributed.is_writer() == (rank == 0)
distributed.barrier()
distributed.start()  # a second start keeps the group
distributed.stop()
distributed.stop()
assert distributed.world_size() == 1
print("{}")
"""


def test_sums_and_pieces_reach_every_rank(monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "RANK", SUMS)
    assert launch(2, {}) == [{}, {}]
