"""Model families: block discovery by structure, one file here per family that needs more."""

from auto_round.models.base import FAMILIES, LinearInfo, ModelFamily, ModelStructure, discover, keep_joined

__all__ = ["FAMILIES", "LinearInfo", "ModelFamily", "ModelStructure", "discover", "keep_joined"]
