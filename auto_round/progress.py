"""What a run tells while it works: one line for each finished block."""

from __future__ import annotations

import logging
import statistics
import time

from auto_round.tensors import BlockResult

logger = logging.getLogger(__name__)


class Progress:
    """Logs one line per finished block: losses, seconds, time left."""

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0
        self.started = self.last = time.monotonic()

    def report(self, name: str, result: BlockResult, *, resumed: bool = False) -> None:
        now = time.monotonic()
        self.done += 1
        loss = "" if result.first_loss is None else f" loss {result.first_loss:.3e} -> {result.best_loss:.3e}"
        left = (now - self.started) / self.done * (self.total - self.done)
        state = " (from the interrupted run)" if resumed else ""
        logger.info(
            "block %d/%d %s%s%s, %.1f s, %.0f s left", self.done, self.total, name, loss, state, now - self.last, left
        )
        for experts, tokens in result.expert_tokens.items():
            least, median, most = min(tokens), statistics.median(tokens), max(tokens)
            logger.info("%s: %d to %d tokens reached an expert, %d in the median", experts, least, most, median)
        if result.note:
            logger.warning("%s: %s", name, result.note)
        self.last = now
