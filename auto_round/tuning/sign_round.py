"""SignRound: rounding offsets and clip ranges of a block tuned by signed gradient descent.

The block's output, with fake-quantized weights, is brought close to the original block's. Each step takes the gradient
with respect to the dequantized weights once; from it the data type gives the straight-through gradients of its own
parameters, layer by layer, so that the block's graph never holds the quantizer's. Source: arXiv 2309.05516.

Scales start from an importance-weighted search and clip factors may move both ways around it; the paper starts from the
min-max range, which costs about 1.5 perplexity more at 2 bits asymmetric (docs/algorithms.md has the figures).

The sign step also sees the curvature of each weight, so that it settles instead of flipping between two codes and may
travel further at 2 and 3 bits; `--disable_alg_ext` is the paper's step.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.func import functional_call

from auto_round import distributed
from auto_round.config import TuneConfig
from auto_round.memory import release_freed
from auto_round.tensors import ROW_FIELDS, BlockResult, QuantizedTensor
from auto_round.tuning.base import TuningTask
from auto_round.tuning.block_error import BlockError
from auto_round.tuning.capture import compiled_or_eager, repeat_on_device
from auto_round.tuning.fused_step import FusedWeight, fused_weight
from auto_round.tuning.rtn import PlainRounding, SearchedRounding
from auto_round.tuning.sampling import sample_order
from auto_round.tuning.start import starting_weights
from auto_round.tuning.tuned_weight import TunedWeight

# Blocks up to this many weights spend their time in kernel launches; larger ones would only pay the graph's memory.
CAPTURED_WEIGHTS = 50_000_000
NORM_STEP = 0.1  # norms and biases move by this share of a clip factor's step, relative to their own size


class SignRound:
    """The tuner behind `iters > 0`."""

    needs_targets = True

    def __init__(self, *, mixes_inputs: bool = False) -> None:
        """Steps see half of a block's input tokens as the original model gives them, if inputs are mixed."""
        self.needs_original_inputs = mixes_inputs

    def __call__(self, task: TuningTask, config: TuneConfig) -> BlockResult:
        """Returns the tuned weights of a block; rounding to nearest, with a note, if a loss is not finite."""
        assert task.targets is not None
        run = _BlockRun(task, config, mixes_inputs=self.needs_original_inputs)
        release_freed()  # what the search for scales has left behind is as much as a step takes
        first_loss = run.fixed_loss(run.dequantized())
        best_step = run.descend()
        last_loss = run.fixed_loss(run.kept())
        if not (math.isfinite(first_loss) and math.isfinite(last_loss) and bool(run.all_finite)):
            fallback = PlainRounding() if config.disable_opt_rtn else SearchedRounding()
            result = fallback(task, config)
            return dataclasses.replace(result, note="losses are not finite; rounded to nearest instead")
        if last_loss > first_loss:
            # Steps of 1/iters are too long for a handful of iterations.
            run.go_back()
            note = "steps did not lower the loss; kept the searched rounding"
            kept = BlockResult(run.encoded(), run.plain_values(), first_loss, first_loss, 0, note=note)
        else:
            kept = BlockResult(run.encoded(), run.plain_values(), first_loss, last_loss, best_step)
        return dataclasses.replace(kept, losses=run.losses[: run.steps_taken].tolist())


class _BlockRun:
    """State of tuning one block. Everything a step reads or writes is a tensor on the compute device, so that a step
    needs no host synchronisation and can be captured as a CUDA graph."""

    def __init__(self, task: TuningTask, config: TuneConfig, *, mixes_inputs: bool = False) -> None:
        self.task, self.config = task, config
        self.weights = starting_weights(task, config)
        self.plain = _plain_parameters(task) if config.enable_norm_bias_tuning else {}
        self.plain_sizes = {name: float(tensor.abs().mean()) for name, tensor in self.plain.items()}
        self.adam = _adam(self.weights, self.plain, config) if config.adam else None
        call = compiled_or_eager(functional_call) if self._is_compiled() else functional_call
        self.error = BlockError(task, task.micro_batch or config.batch_size, call, mixes=mixes_inputs)
        self.fused = _fused_weights(task, self.weights) if self.adam is None else {}
        device = task.block.device
        self.decay = torch.ones((), device=device)
        self.step_number = self.error.step
        self.steps_taken = 0
        self.steps = torch.arange(config.iters, device=device)
        self.losses = torch.zeros(config.iters, device=device)
        self.all_finite = torch.ones((), dtype=torch.bool, device=device)
        self.best_loss = torch.full((), math.inf, device=device)
        self.best_step = torch.zeros((), dtype=torch.int64, device=device)
        alone = distributed.world_size() == 1 and self.adam is None
        self.moves_in_backward = alone and not self._may_be_captured()
        # To stop where the loss no longer falls is to keep what was best.
        self.keeps_best = not config.not_use_best_mse or config.dynamic_max_gap > 0
        # Of the best step only what is stored is kept: a byte a weight, where its offset would take four.
        self.best = {n: w.encoded() for n, w in self.weights.items()} if self.keeps_best else {}
        self.best_plain = {n: tensor.clone() for n, tensor in self.plain.items()} if self.keeps_best else self.plain

    def descend(self) -> int:
        """Runs all steps; leaves the kept parameters in place and returns the kept step."""
        config = self.config
        drawn = sample_order(self.task.inputs.shape[0], config, self.task.generator())
        order = list(itertools.islice(drawn, config.iters))
        take_step = repeat_on_device(self.step, self._may_be_captured())
        with self.error.fed_ahead(order):
            for step, samples in enumerate(order):
                self.decay.fill_(_decay(config, step))
                self.step_number.fill_(step)
                take_step(samples)
                self.steps_taken = step + 1
                if self.keeps_best and 0 < config.dynamic_max_gap <= step - int(self.best_step):
                    break
        return int(self.best_step) if self.keeps_best else config.iters

    def go_back(self) -> None:
        """Sets all parameters to where they started, and keeps these."""
        for tuned in self.weights.values():
            for name, tensor in tuned.data_type.trainable(tuned.weight, tuned.scheme).items():
                tuned.params[name].copy_(tensor)
        self.plain = _plain_parameters(self.task) if self.plain else {}
        self.best, self.best_plain = {}, self.plain

    def _may_be_captured(self) -> bool:
        """Whether a step is launch-bound and free of host work: small blocks on one GPU, samples all of one length."""
        block = self.task.block
        size = sum(tuned.weight.numel() for tuned in self.weights.values())
        varying = any(calls.per_sample for calls in block.calls) or self.task.mask is not None
        on_device = self.task.inputs.device.type == "cuda" and distributed.world_size() == 1
        return on_device and size <= CAPTURED_WEIGHTS and not varying and self.adam is None

    def _is_compiled(self) -> bool:
        """Whether the block is compiled: if asked, or where that is sure to pay.

        An 8B block's step takes 30 ms instead of 49 then, and all blocks share what is compiled once. Experts that are
        called one by one would be compiled one by one.
        """
        block, asked = self.task.block, self.config.enable_torch_compile
        if asked is not None or block.recomputes:
            return bool(asked) and not block.recomputes
        return block.device.type == "cuda" and not self._may_be_captured() and not block.experts()

    def step(self, samples: Tensor) -> None:
        """Takes one step on some samples."""
        replaced = self.dequantized(requires_grad=True)
        if self.moves_in_backward:
            self._step_in_backward(samples, replaced)
            return
        loss, gradients = self.error.gradients(samples, replaced)
        self._note_loss(loss)
        self._move(gradients)

    def _step_in_backward(self, samples: Tensor, replaced: Mapping[str, Tensor]) -> None:
        """Takes the same step, but moves each weight as soon as its gradient is there."""
        self.error.give_gradients(samples, replaced, self._note_loss, self._consume)

    def _consume(self, name: str, gradient: Tensor, unit: float) -> None:
        self._move({name: gradient if name in self.fused else gradient.float() * unit}, unit)

    @torch.no_grad()
    def _note_loss(self, loss: Tensor) -> None:
        """Keeps the loss, and the parameters of the best one so far, from before the step."""
        self.all_finite.logical_and_(torch.isfinite(loss))
        torch.where(self.steps == self.step_number, loss, self.losses, out=self.losses)
        if self.keeps_best:
            better = loss < self.best_loss
            for name, tuned in self.weights.items():
                for rows, part in tuned.pieces():
                    _keep_where(better, part.encoded(), self.best[name], rows)
            for name, tensor in self.plain.items():
                torch.where(better, tensor, self.best_plain[name], out=self.best_plain[name])
            torch.where(better, loss, self.best_loss, out=self.best_loss)
            torch.where(better, self.step_number, self.best_step, out=self.best_step)

    def dequantized(self, *, requires_grad: bool = False) -> dict[str, Tensor]:
        """Returns what the block runs with: fake-quantized weights and tuned norms, by full name."""
        replaced = {
            name: self.task.as_parameter(
                name, self.fused[name].dequantized if name in self.fused else tuned.dequantized()
            )
            for name, tuned in self.weights.items()
        }
        replaced.update({name: tensor.to(self.task.block.dtype) for name, tensor in self.plain.items()})
        return {name: t.detach().requires_grad_(requires_grad) for name, t in replaced.items()}

    @torch.no_grad()
    def _move(self, gradients: Mapping[str, Tensor], unit: float = 1.0) -> None:
        """Moves every parameter by the sign of its gradient (or by AdamW); kernels multiply theirs by `unit`."""
        config = self.config
        for name, tuned in self.weights.items():
            if name not in gradients:
                continue
            clip_step, gradient = _clip_step(tuned, config), self.task.rows(name, gradients[name])
            if name in self.fused:
                rounding_step = config.rounding_step * 2 * tuned.reach
                self.fused[name].move(gradient, self.decay, rounding_step, clip_step, unit)
                continue
            reached = tuned.reached_by(gradient)
            for rows, part in reached.pieces() if self.adam is None else [(slice(None), reached)]:
                found = part.gradients(gradient[rows])
                for parameter, tensor in part.params.items():
                    size = config.rounding_step * 2 * tuned.reach if parameter == "rounding" else clip_step
                    self._move_one(tensor, found[parameter], size)
        for name, tensor in self.plain.items():
            if name in gradients:
                self._move_one(tensor, gradients[name], self.plain_sizes[name] * NORM_STEP * config.clip_step)
        if self.adam is not None:
            for group in self.adam.param_groups:
                group["lr"] = group["initial_lr"] * float(self.decay)
            self.adam.step()
        for name, tuned in self.weights.items():
            if name in gradients and name not in self.fused:
                tuned.keep_in_bounds()

    def _move_one(self, tensor: Tensor, gradient: Tensor, size: float) -> None:
        if self.adam is not None:
            tensor.grad = gradient
        else:
            tensor.sub_(gradient.sign().mul_(self.decay * size))

    def fixed_loss(self, replaced: Mapping[str, Tensor]) -> float:
        """Returns the error on the first samples, the same ones each time; for reporting and the check for NaN."""
        return self.error.mean(torch.arange(min(self.task.inputs.shape[0], 2 * self.config.batch_size)), replaced)

    def encoded(self) -> dict[str, QuantizedTensor]:
        """Returns the kept quantized weights, each by its own name: those of the best step, or of the last one."""
        stacks, found = self.task.block.stacks, {}
        for name, tuned in self.weights.items():
            parts = tuned.encoded_parts(self.best.get(name))
            found.update(zip(stacks.get(name, (name,)), parts, strict=True))
        return {name: found[name] for name in self.task.schemes}

    def kept(self) -> dict[str, Tensor]:
        """Returns what the block runs with in the end: dequantized weights and tuned norms, by full name."""
        replaced = {name: self.task.as_parameter(name, w.dequantize()) for name, w in self.encoded().items()}
        plain = {name: tensor.to(self.task.block.dtype) for name, tensor in self.best_plain.items()}
        return self.task.block.stacked(replaced | plain)

    def plain_values(self) -> dict[str, Tensor]:
        """Returns tuned norms and biases in the block's stored precision."""
        return {name: tensor.to(self.task.block.tensors[name].dtype) for name, tensor in self.best_plain.items()}


def _fused_weights(task: TuningTask, weights: Mapping[str, TunedWeight]) -> dict[str, FusedWeight]:
    """Returns those weights whose steps a kernel takes."""
    found = {name: fused_weight(w, task.block.dtype) for name, w in weights.items() if name not in task.transposed}
    return {name: fused for name, fused in found.items() if fused is not None}


def _clip_step(tuned: TunedWeight, config: TuneConfig) -> float:
    """Returns the first step of a weight's clip factors, 0 where they stay.

    Scales of float types and of GGUF blocks are few and searched exactly: moving them made perplexity worse.
    """
    wanted = config.enable_minmax_tuning
    moves = tuned.data_type.name == "int" if wanted is None else wanted
    return config.clip_step if moves else 0.0


def _keep_where(condition: Tensor, now: QuantizedTensor, kept: QuantizedTensor, rows: slice) -> None:
    """Overwrites rows of `kept` with `now` where a scalar condition holds, without asking the device."""
    for field in ROW_FIELDS:
        value, place = getattr(now, field), getattr(kept, field)
        if value is not None:
            torch.where(condition, value, place[rows], out=place[rows])


def _plain_parameters(task: TuningTask) -> dict[str, Tensor]:
    """Returns float32 copies of the block's one-dimensional parameters: norm weights and biases."""
    names = set()
    for name, module in zip(task.block.names, task.block.modules, strict=True):
        names |= {f"{name}.{parameter}" for parameter, value in module.named_parameters() if value.ndim == 1}
    return {name: task.block.tensors[name].float().clone() for name in sorted(names)}


def _adam(weights: Mapping[str, TunedWeight], plain: Mapping[str, Tensor], config: TuneConfig) -> torch.optim.AdamW:
    rounding = [tuned.params["rounding"] for tuned in weights.values()]
    moving = [tuned for tuned in weights.values() if _clip_step(tuned, config)]
    clips = [tensor for tuned in moving for name, tensor in tuned.params.items() if name != "rounding"]
    groups = [{"params": rounding, "lr": config.rounding_step, "initial_lr": config.rounding_step}]
    groups += [{"params": clips, "lr": config.clip_step, "initial_lr": config.clip_step}] if clips else []
    if plain:
        step = config.clip_step * NORM_STEP
        groups.append({"params": list(plain.values()), "lr": step, "initial_lr": step})
    return torch.optim.AdamW(groups, weight_decay=0.0)


def _decay(config: TuneConfig, step: int) -> float:
    """Returns the factor of the step size, 1 at the start."""
    done = step / config.iters
    if config.lr_scheduler == "constant":
        return 1.0
    return 1 - done if config.lr_scheduler == "linear" else 0.5 * (1 + math.cos(math.pi * done))
