"""Blocks that run with quantized activations, and the calibrated ranges that this takes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import torch
from torch import Tensor

from auto_round.block import Block, InputQuantizer
from auto_round.data_types.activations import quantize_activation, stored_peak
from auto_round.schemes import QuantizationScheme
from auto_round.tensors import BlockResult
from auto_round.tuning.base import TuningTask
from auto_round.tuning.statistics import input_peaks

NO_PEAK = 1.0  # of a layer whose input is never known, or always zero


def calibrated_peaks(task: TuningTask) -> dict[str, Tensor]:
    """Returns weight name -> () float32 largest input magnitude, for layers whose activation range is calibrated.

    Inputs are those that the quantized blocks before give. Layers that no token reached (idle experts), or whose input
    is all zeros, get the largest range of the block, which clips nothing that others do not clip.
    """
    names = [name for name, scheme in task.schemes.items() if _needs_calibration(scheme)]
    if not names:
        return {}
    seen = input_peaks(task.block, task.inputs, task.batches, names, mask_NT=task.mask)
    found = {name: peak for name, peak in seen.items() if float(peak) > 0}
    largest = max(found.values(), key=float, default=torch.tensor(NO_PEAK, device=task.block.device))
    return {name: stored_peak(found.get(name, largest), task.schemes[name]) for name in names}


def input_quantizers(
    schemes: Mapping[str, QuantizationScheme], peaks: Mapping[str, Tensor]
) -> dict[str, InputQuantizer]:
    """Returns weight name -> what its layer's input passes through, for layers whose activations are quantized."""
    quantizers: dict[str, InputQuantizer] = {}
    for name, scheme in schemes.items():
        if scheme.activation is not None:
            peak = peaks[name] if _needs_calibration(scheme) else None
            quantizers[name] = functools.partial(quantize_activation, scheme=scheme.activation, peak=peak)
    return quantizers


def quantizers_of(result: BlockResult) -> dict[str, InputQuantizer]:
    """Returns weight name -> what its layer's input passes through, for a block that is quantized."""
    schemes = {name: weight.scheme for name, weight in result.weights.items()}
    peaks = {name: weight.input_peak for name, weight in result.weights.items() if weight.input_peak is not None}
    return input_quantizers(schemes, peaks)


def with_input_quantizers(block: Block, quantizers: Mapping[str, InputQuantizer]) -> Block:
    """Returns a block whose layers' inputs pass through `quantizers`; the block itself if there are none."""
    return dataclasses.replace(block, input_quantizers=quantizers) if quantizers else block


def with_peaks(result: BlockResult, peaks: Mapping[str, Tensor]) -> BlockResult:
    """Returns a result whose weights carry the calibrated ranges of their inputs."""
    weights = {
        name: dataclasses.replace(weight, input_peak=peaks[name]) if name in peaks else weight
        for name, weight in result.weights.items()
    }
    return dataclasses.replace(result, weights=weights)


def _needs_calibration(scheme: QuantizationScheme) -> bool:
    return scheme.activation is not None and scheme.activation.needs_calibration
