"""Automatic mixed bits: which of several schemes each layer gets under a budget of bits or bytes."""

from auto_round.mixed_bits.choices import describe_choices, find_choices
from auto_round.mixed_bits.chosen import settle

__all__ = ["describe_choices", "find_choices", "settle"]
