"""Work beside the run: the next block is read and the finished one written while the GPU is busy."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

logger = logging.getLogger(__name__)


class Background:
    """A thread that does one thing at a time.

    An error is raised where the next thing is given or the result is waited for, at the latest at the end of the `with`
    block that the thread lives in.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="auto_round")
        self._job: Future[Any] | None = None

    def begin(self, function: Callable[..., Any], *args: Any) -> None:
        """Lets the thread call `function(*args)`, when what it did before is finished."""
        self.result()
        self._job = self._thread.submit(function, *args)

    def result(self) -> Any:
        """Waits for what the thread does and returns what came of it; None if there is nothing, or it was asked for."""
        job, self._job = self._job, None
        return None if job is None else job.result()

    def __enter__(self) -> Background:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Waits; an error that ends the `with` block already is not replaced by one of the thread."""
        self._thread.shutdown(wait=True)
        if kind is None:
            self.result()
        elif self._job is not None and (other := self._job.exception()) is not None:
            logger.error("besides, in the background: %r", other)
