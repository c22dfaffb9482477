"""Granite's mixtures of experts: checkpoints hold the experts of a layer in one tensor."""

from auto_round.models.base import FAMILIES, ModelFamily


class GraniteMoe(ModelFamily):
    """Experts get the names that vLLM gives them when it splits the tensor. Source: vLLM models/granitemoe.py."""

    expert_names = ("w1", "w3", "w2")


FAMILIES.register("granitemoe", "granitemoeshared", "granitemoehybrid")(GraniteMoe())
