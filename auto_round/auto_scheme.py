"""`AutoScheme`: automatic mixed bits in the words of scripts for auto-round 0.8 to 0.16."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from auto_round.errors import ConfigError
from auto_round.schemes import QuantizationScheme

logger = logging.getLogger(__name__)

# Fields without a meaning here: sensitivities are measured with what the run itself is given.
OF_THE_RUN = ("batch_size", "seqlen", "dataset", "device_map", "enable_torch_compile")


@dataclasses.dataclass(frozen=True, slots=True)
class AutoScheme:
    """Schemes to choose among for each layer and their mean bits; give it as `scheme` to AutoRound.

    Attributes:
        avg_bits: mean bits of a weight, scales counted.
        options: schemes, or their names, in a list or comma separated.
        ignore_scale_zp_bits: scales and zero points do not count.
        nsamples: calibration samples that sensitivities are measured on.
        shared_layers, method: nothing else than the default is known.
        batch_size, seqlen, dataset, device_map, enable_torch_compile: taken, without effect; the run's own are used.
        low_gpu_mem_usage, low_cpu_mem_usage: always so: weights are read block by block.
    """

    avg_bits: float
    options: str | Sequence[str | Mapping[str, Any] | QuantizationScheme]
    shared_layers: Any = None
    method: str = "default"
    ignore_scale_zp_bits: bool = False
    batch_size: int | None = None
    nsamples: int | None = None
    seqlen: int | None = None
    dataset: Any = None
    device_map: Any = None
    enable_torch_compile: bool | None = None
    low_gpu_mem_usage: bool = True
    low_cpu_mem_usage: bool = True

    def to_options(self) -> dict[str, Any]:
        """Returns the options of a run that ask for the same.

        Raises:
            ConfigError: something that is not known here.
        """
        if self.shared_layers:
            raise ConfigError(
                "AutoScheme: shared_layers is not known here. q/k/v, gate/up and the experts of a block share a scheme "
                "always; give other layers one with layer_config"
            )
        if self.method != "default":
            raise ConfigError(f"AutoScheme: method={self.method!r} (only 'default')")
        unused = [name for name in OF_THE_RUN if getattr(self, name) is not None]
        if unused:
            logger.info("AutoScheme: %s without effect, the run's own are used", ", ".join(unused))
        options = {"target_bits": self.avg_bits, "options": self.options}
        options["ignore_scale_zp_bits"] = self.ignore_scale_zp_bits
        return options if self.nsamples is None else {**options, "sensitivity_samples": self.nsamples}
