"""Data types: how the numbers of a weight are chosen and encoded. One file and one line here per type."""

from auto_round.data_types import fp8 as _fp8  # noqa: F401
from auto_round.data_types import int as _int  # noqa: F401
from auto_round.data_types import int_float_zp as _int_float_zp  # noqa: F401
from auto_round.data_types import int_superblock as _int_superblock  # noqa: F401
from auto_round.data_types import mxfp as _mxfp  # noqa: F401
from auto_round.data_types import nvfp4 as _nvfp4  # noqa: F401
from auto_round.data_types.base import DATA_TYPES, DataType

__all__ = ["DATA_TYPES", "DataType"]
