"""One line for each finished block."""

from __future__ import annotations

import logging
import re

from auto_round.progress import Progress
from auto_round.tensors import BlockResult


def test_a_line_tells_position_losses_and_time_left(caplog):
    caplog.set_level(logging.INFO, logger="auto_round")
    progress = Progress(2)
    progress.report("model.layers.0", BlockResult({}, first_loss=0.5, best_loss=0.25))
    progress.report("model.layers.1", BlockResult({}), resumed=True)
    first, second = (record.getMessage() for record in caplog.records)
    assert re.fullmatch(r"block 1/2 model\.layers\.0 loss 5\.000e-01 -> 2\.500e-01, \d+\.\d s, \d+ s left", first)
    assert re.fullmatch(r"block 2/2 model\.layers\.1 \(from the interrupted run\), \d+\.\d s, 0 s left", second)


def test_a_note_is_a_warning_with_the_blocks_name(caplog):
    Progress(1).report("model.layers.0", BlockResult({}, note="rounded to nearest instead"))
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert warning.getMessage() == "model.layers.0: rounded to nearest instead"


def test_tokens_of_the_experts_are_told(caplog):
    caplog.set_level(logging.INFO, logger="auto_round")
    Progress(1).report("model.layers.0", BlockResult({}, expert_tokens={"model.layers.0.mlp.experts": [7, 0, 3, 5]}))
    text = caplog.records[-1].getMessage()
    assert text == "model.layers.0.mlp.experts: 0 to 7 tokens reached an expert, 4 in the median"
