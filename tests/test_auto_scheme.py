from __future__ import annotations

import logging

import pytest

from auto_round.auto_scheme import AutoScheme
from auto_round.config import RunConfig
from auto_round.errors import ConfigError


def test_it_asks_for_mixed_bits_in_other_words():
    scheme = AutoScheme(3.0, ("W2A16", "W4A16"), nsamples=16, ignore_scale_zp_bits=True)
    config = RunConfig.from_options(**scheme.to_options()).mixed
    assert config.option_list() == ["W2A16", "W4A16"]
    assert (config.target_bits, config.ignore_scale_zp_bits, config.sensitivity_samples) == (3.0, True, 16)


def test_what_is_taken_without_effect_is_said(caplog):
    with caplog.at_level(logging.INFO):
        AutoScheme(3.0, "W2A16,W4A16", seqlen=128, dataset="pile").to_options()
    assert "AutoScheme: seqlen, dataset without effect" in caplog.text


@pytest.mark.parametrize("wrong", [{"shared_layers": [["a", "b"]]}, {"method": "other"}], ids=str)
def test_what_is_not_known_is_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        AutoScheme(3.0, "W2A16,W4A16", **wrong).to_options()
