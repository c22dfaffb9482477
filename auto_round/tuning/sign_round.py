"""SignRound: rounding offsets and clip ranges of a block tuned by signed gradient descent.

The block's output, with fake-quantized weights, is brought close to the original block's. Each step takes the gradient
with respect to the dequantized weights once; from it the data type gives the straight-through gradients of its own
parameters, layer by layer, so that the block's graph never holds the quantizer's. Source: arXiv 2309.05516.

With `enable_alg_ext` three things change (docs/algorithms.md has the derivation and the figures):
scales start from an importance-weighted search and clip factors may move both ways around it; the sign step sees the
curvature of each weight, so that it settles instead of flipping between two codes; the last step is kept, no best copy.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from auto_round import distributed
from auto_round.config import TuneConfig
from auto_round.data_types import DATA_TYPES
from auto_round.data_types.base import DataType, Range
from auto_round.schemes import QuantizationScheme
from auto_round.tensors import BlockResult, to_groups
from auto_round.tuning.base import TuningTask
from auto_round.tuning.rtn import PlainRounding, SearchedRounding
from auto_round.tuning.sampling import sample_order
from auto_round.tuning.statistics import channel_importance, output_sensitivity

CURVATURE_SHARE = 0.5  # theta: the diagonal ignores what attention couples, so only half of it is believed
WIDE_REACH_BITS = 3  # up to this width an offset may travel a whole step of the grid, above it half of one
PROBE_BATCHES = 2
NORM_STEP = 0.1  # norms and biases move by this share of a clip factor's step, relative to their own size


@dataclasses.dataclass(slots=True, eq=False)
class TunedWeight:
    """One weight while it is tuned; lives only as long as its block."""

    weight: Tensor
    scheme: QuantizationScheme
    data_type: DataType
    range_: Range
    params: dict[str, Tensor]
    curvature: Tensor | None
    clip_bounds: tuple[float, float]
    reach: float

    @torch.no_grad()
    def dequantized(self) -> Tensor:
        """Returns (O, I) float32 fake-quantized weights."""
        return self.data_type.fake_quantize(self.weight, self.scheme, self.range_, self.params)

    def gradients(self, gradient_OI: Tensor) -> dict[str, Tensor]:
        """Returns the straight-through gradients of the parameters for a gradient of the dequantized weight."""
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in self.params.items()}
        with torch.enable_grad():
            fake = self.data_type.fake_quantize(self.weight, self.scheme, self.range_, leaves)
        found = torch.autograd.grad(fake, list(leaves.values()), gradient_OI.float())
        return dict(zip(leaves, found, strict=True))

    @torch.no_grad()
    def curvature_correction(self) -> Tensor:
        """Returns theta s^2 h (u - round(u)): what each offset's own curvature adds to its gradient."""
        assert self.curvature is not None
        state = self.data_type.rounding_state(self.weight, self.scheme, self.range_, self.params)
        pull = state.scale.square() * self.curvature * state.residual
        return CURVATURE_SHARE * pull * state.in_range


class SignRound:
    """The tuner behind `iters > 0`."""

    needs_targets = True

    def __call__(self, task: TuningTask, config: TuneConfig) -> BlockResult:
        """Returns the tuned weights of a block; plain rounding, with a note, if its losses are not finite."""
        assert task.targets is not None
        run = _BlockRun(task, config)
        first_loss = run.fixed_loss()
        best_step = run.descend()
        last_loss = run.fixed_loss()
        if not (math.isfinite(first_loss) and math.isfinite(last_loss)):
            fallback = PlainRounding() if config.disable_opt_rtn else SearchedRounding()
            result = fallback(task, config)
            return dataclasses.replace(result, note="losses are not finite; rounded to nearest instead")
        return BlockResult(run.encoded(), run.plain_values(), first_loss, last_loss, best_step)


class _BlockRun:
    """State of tuning one block."""

    def __init__(self, task: TuningTask, config: TuneConfig) -> None:
        self.task, self.config = task, config
        self.weights = _make_weights(task, config)
        self.plain = _plain_parameters(task) if config.enable_norm_bias_tuning else {}
        self.plain_start = {name: tensor.clone() for name, tensor in self.plain.items()}
        self.adam = _adam(self.weights, self.plain, config) if config.adam else None
        assert task.targets is not None
        self.elements_per_token = task.targets.shape[-1]

    def descend(self) -> int:
        """Runs all steps; leaves the kept parameters in place and returns the kept step."""
        config = self.config
        keep_best = not config.not_use_best_mse and not config.enable_alg_ext
        best_loss, best_step, best = math.inf, 0, None
        count = self.task.inputs.shape[0]
        order = sample_order(count, config, self.task.generator())
        for step in range(config.iters):
            replaced = self.dequantized(requires_grad=True)
            loss, gradients = self.loss_and_gradients(next(order), replaced)
            if keep_best:
                value = float(loss)
                if not math.isfinite(value):
                    return best_step
                if value < best_loss:
                    best_loss, best_step, best = value, step, self.copy_params()
                if 0 < config.dynamic_max_gap <= step - best_step:
                    break
            self.step(gradients, _decay(config, step))
        if best is not None:
            self.restore(best)
            return best_step
        return config.iters

    def dequantized(self, *, requires_grad: bool = False) -> dict[str, Tensor]:
        """Returns what the block runs with: fake-quantized weights and tuned norms, by full name."""
        replaced = {n: self.task.as_parameter(n, w.dequantized()) for n, w in self.weights.items()}
        replaced.update({name: tensor.to(self.task.block.dtype) for name, tensor in self.plain.items()})
        return {name: t.detach().requires_grad_(requires_grad) for name, t in replaced.items()}

    def loss_and_gradients(self, samples: Tensor, replaced: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns mean squared error over a step's samples and its gradients, summed over batches and ranks.

        Every rank takes its share of the samples; the sum is the same whatever the number of batches and ranks.
        """
        names = list(replaced)
        total = torch.zeros((), device=self.task.block.device)
        gradients: dict[str, Tensor] = {}
        tokens = self._token_count(samples)
        mine = samples.chunk(distributed.world_size())
        for batch in mine[distributed.rank()].split(self.config.batch_size) if distributed.rank() < len(mine) else ():
            loss = self._squared_error(batch, replaced) / (tokens * self.elements_per_token)
            found = torch.autograd.grad(loss, [replaced[name] for name in names], allow_unused=True)
            for name, gradient in zip(names, found, strict=True):
                if gradient is not None:
                    gradients[name] = gradients[name] + gradient.float() if name in gradients else gradient.float()
            total += loss.detach()
        if distributed.world_size() > 1:
            for name in names:
                gradients.setdefault(name, torch.zeros_like(replaced[name], dtype=torch.float32).detach())
                distributed.sum_over_ranks(gradients[name])
            distributed.sum_over_ranks(total)
        return total, gradients

    @torch.no_grad()
    def step(self, gradients: Mapping[str, Tensor], decay: float) -> None:
        """Moves every parameter by the sign of its gradient (or by AdamW)."""
        for name, tuned in self.weights.items():
            if name not in gradients:
                continue
            gradient = gradients[name].t() if name in self.task.transposed else gradients[name]
            found = tuned.gradients(gradient)
            if tuned.curvature is not None:
                found["rounding"] = found["rounding"] + tuned.curvature_correction()
            for parameter, tensor in tuned.params.items():
                if self.adam is not None:
                    tensor.grad = found[parameter]
                elif parameter == "rounding":
                    tensor.sub_(found[parameter].sign_(), alpha=self.config.rounding_step * 2 * tuned.reach * decay)
                elif self.config.enable_minmax_tuning:
                    tensor.sub_(found[parameter].sign_(), alpha=self.config.clip_step * decay)
        for name, tensor in self.plain.items():
            if self.adam is not None:
                tensor.grad = gradients[name]
            else:
                size = self.plain_start[name].abs().mean()
                tensor.sub_(gradients[name].sign() * (size * NORM_STEP * self.config.clip_step * decay))
        if self.adam is not None:
            self._adam_step(decay)
        for tuned in self.weights.values():
            _keep_in_bounds(tuned)

    def _adam_step(self, decay: float) -> None:
        assert self.adam is not None
        for group in self.adam.param_groups:
            group["lr"] = group["initial_lr"] * decay
        self.adam.step()

    @torch.no_grad()
    def fixed_loss(self) -> float:
        """Returns the error on the first samples, the same ones each time; for reporting and the check for NaN."""
        samples = torch.arange(min(self.task.inputs.shape[0], 2 * self.config.batch_size))
        replaced = self.dequantized()
        errors = [self._squared_error(batch, replaced) for batch in samples.split(self.config.batch_size)]
        return float(sum(errors)) / (self._token_count(samples) * self.elements_per_token)

    def _squared_error(self, samples: Tensor, replaced: Mapping[str, Tensor]) -> Tensor:
        task = self.task
        assert task.targets is not None
        device = task.block.device
        where = samples.to(task.inputs.device)
        output = task.block.forward(task.inputs[where].to(device), samples, replaced)
        error = (output.float() - task.targets[where].to(device).float()).square()
        if task.mask is not None:
            error = error * task.mask[samples].to(device)[..., None]
        return error.sum()

    def _token_count(self, samples: Tensor) -> int:
        if self.task.mask is None:
            return samples.numel() * self.task.inputs.shape[1]
        return max(int(self.task.mask[samples].sum()), 1)

    def copy_params(self) -> list[Tensor]:
        """Returns copies of all parameters."""
        return [tensor.clone() for tensor in self._all_params()]

    def restore(self, saved: list[Tensor]) -> None:
        """Puts copied parameters back."""
        for tensor, value in zip(self._all_params(), saved, strict=True):
            tensor.data.copy_(value)

    def _all_params(self) -> list[Tensor]:
        own = [tensor for tuned in self.weights.values() for tensor in tuned.params.values()]
        return own + list(self.plain.values())

    def encoded(self) -> dict:
        """Returns the quantized weights by name."""
        return {n: w.data_type.encode(w.weight, w.scheme, w.range_, w.params) for n, w in self.weights.items()}

    def plain_values(self) -> dict[str, Tensor]:
        """Returns tuned norms and biases in the block's stored precision."""
        return {name: tensor.to(self.task.block.tensors[name].dtype) for name, tensor in self.plain.items()}


def _make_weights(task: TuningTask, config: TuneConfig) -> dict[str, TunedWeight]:
    importance: Mapping[str, Tensor] = {}
    sensitivity: Mapping[str, Tensor] = {}
    names = list(task.schemes)
    if config.enable_alg_ext:
        importance = channel_importance(task.block, task.inputs, task.batches, names)
        probes = list(task.batches)[:PROBE_BATCHES]
        sensitivity = output_sensitivity(task.block, task.original_inputs, probes, names, task.generator())
    weights = {}
    for name, scheme in task.schemes.items():
        data_type, weight = DATA_TYPES[scheme.data_type], task.weight(name)
        if config.enable_alg_ext:
            range_ = data_type.search_range(weight, scheme, importance.get(name))
        else:
            range_ = data_type.minmax_range(weight, scheme)
        curvature = None
        if name in sensitivity and name in importance:
            # Loss = mean over tokens and D outputs, so its Gauss-Newton diagonal is 2/D E[x_j^2] c_i.
            outer = sensitivity[name][:, None] * importance[name][None, :]
            curvature = to_groups(outer * (2.0 / task.inputs.shape[-1]), scheme.group_size)
        reach = 1.0 if config.enable_alg_ext and scheme.bits <= WIDE_REACH_BITS else 0.5
        bounds = (0.5, 1.5) if config.enable_alg_ext else (0.0, 1.0)
        params = data_type.trainable(weight, scheme)
        weights[name] = TunedWeight(weight, scheme, data_type, range_, params, curvature, bounds, reach)
    return weights


def _keep_in_bounds(tuned: TunedWeight) -> None:
    for parameter, tensor in tuned.params.items():
        low, high = (-tuned.reach, tuned.reach) if parameter == "rounding" else tuned.clip_bounds
        tensor.clamp_(low, high)


def _plain_parameters(task: TuningTask) -> dict[str, Tensor]:
    """Returns float32 copies of the block's one-dimensional parameters: norm weights and biases."""
    names = set()
    for name, module in zip(task.block.names, task.block.modules, strict=True):
        names |= {f"{name}.{parameter}" for parameter, value in module.named_parameters() if value.ndim == 1}
    return {name: task.block.tensors[name].float().clone() for name in sorted(names)}


def _adam(weights: Mapping[str, TunedWeight], plain: Mapping[str, Tensor], config: TuneConfig) -> torch.optim.AdamW:
    rounding = [tuned.params["rounding"] for tuned in weights.values()]
    clips = [t for tuned in weights.values() for name, t in tuned.params.items() if name != "rounding"]
    clip_step = config.clip_step if config.enable_minmax_tuning else 0.0
    groups = [{"params": rounding, "lr": config.rounding_step, "initial_lr": config.rounding_step}]
    groups += [{"params": clips, "lr": clip_step, "initial_lr": clip_step}]
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
