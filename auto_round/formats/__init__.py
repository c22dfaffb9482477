"""Export formats. One file and one line here per format."""

from auto_round.formats import auto_awq, auto_gptq, auto_round, fake, gguf, llm_compressor, mlx
from auto_round.formats.base import EXPORTERS, Exporter, FormatTarget, check, targets
from auto_round.formats.export import export
from auto_round.formats.verify import verify

__all__ = [
    "EXPORTERS",
    "Exporter",
    "FormatTarget",
    "auto_awq",
    "auto_gptq",
    "auto_round",
    "check",
    "export",
    "fake",
    "gguf",
    "llm_compressor",
    "mlx",
    "targets",
    "verify",
]
