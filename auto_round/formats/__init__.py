"""Export formats. One file and one line here per format."""

from auto_round.formats import auto_round, fake, llm_compressor
from auto_round.formats.base import EXPORTERS, Exporter, FormatTarget, check, targets
from auto_round.formats.export import export

__all__ = [
    "EXPORTERS",
    "Exporter",
    "FormatTarget",
    "auto_round",
    "check",
    "export",
    "fake",
    "llm_compressor",
    "targets",
]
