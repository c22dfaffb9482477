"""One tuning task of a tiny model, as the pipeline would make it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from auto_round.blocks import BlockStream
from auto_round.calibration import CalibrationSet
from auto_round.checkpoint import ModuleSource
from auto_round.models import discover
from auto_round.schemes import QuantizationScheme
from auto_round.tuning import TuningTask


@pytest.fixture(scope="session")
def make_task(make_model: Callable, token_ids: Callable) -> Callable[..., TuningTask]:
    """Returns make(scheme, ...) -> the task of the first block, or of the first `nblocks` together."""

    def make(
        scheme: QuantizationScheme,
        *,
        model=None,
        data: CalibrationSet | None = None,
        batch_size: int = 4,
        nblocks: int = 1,
        seed: int = 0,
        names: tuple[str, ...] | None = None,
    ) -> TuningTask:
        model = model if model is not None else make_model()
        structure = discover(model)
        data = data if data is not None else CalibrationSet(token_ids(8, 16))
        cpu = torch.device("cpu")
        stream = BlockStream(
            ModuleSource(model), [structure.blocks[:nblocks], *[(name,) for name in structure.blocks[nblocks:]]], data,
            device=cpu, dtype=torch.float32, storage=cpu, batch_size=batch_size, quantized_chain=True,
        )  # fmt: skip
        block = stream.load(0)
        inside = [linear for linear in structure.linears if linear.block is not None and linear.block < nblocks]
        wanted = [linear for linear in inside if names is None or linear.name.rpartition(".")[2] in names]
        return TuningTask(
            block=block,
            schemes={linear.parameter: scheme for linear in wanted},
            transposed=frozenset(linear.parameter for linear in wanted if linear.transposed),
            inputs=stream.original,
            original_inputs=stream.original,
            targets=stream.run(block, stream.original),
            mask=data.attention_mask,
            batches=stream.batches(),
            seed=seed,
        )

    return make


@pytest.fixture
def ptx_for_hopper() -> Callable[..., str]:
    """Returns compile(kernel, types, constants) -> PTX of a kernel for sm_90; no GPU is needed.

    types: of each argument that is no constant. A constant of None is an argument that is left out.
    """

    def compile_(kernel: Any, types: Mapping[str, str], constants: Mapping[str, Any]) -> str:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
        places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
        options = {"num_warps": 4, "enable_fp_fusion": False}
        compiled = triton.compile(
            ASTSource(kernel, signature, constexprs=places), target=GPUTarget("cuda", 90, 32), options=options
        )
        assert "cubin" in compiled.asm
        return compiled.asm["ptx"]

    return compile_
