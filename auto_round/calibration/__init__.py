"""Calibration data: from a dataset string, files or Python objects to fixed token windows."""

from auto_round.calibration import named  # noqa: F401  fills DATASETS
from auto_round.calibration.base import DATASETS, CalibrationSet
from auto_round.calibration.load import Budget, draw_samples, load_calibration
from auto_round.calibration.pictures import has_pictures, load_pictures

__all__ = [
    "DATASETS",
    "Budget",
    "CalibrationSet",
    "draw_samples",
    "has_pictures",
    "load_calibration",
    "load_pictures",
]
