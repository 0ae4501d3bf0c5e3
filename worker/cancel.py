"""Whether a job was cancelled by its sender."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from ground.comfyui import JobCancelledError
from worker.errors import explain

logger = logging.getLogger(__name__)

CANCEL_S = 5
"""How often it is looked whether a running job was cancelled."""
FIRST_LOOK_S = 2
"""So long a job waits for the first look, which mostly has answered before it is asked."""


class CancelWatch:
    """Looks in a thread of its own whether a job was cancelled: at once, beside the first look for its receipt,
    which makes it cost no time, and then every CANCEL_S until the with-block ends."""

    def __init__(self, is_cancelled: Callable[[str], bool], should_stop: Callable[[], bool]) -> None:
        self._is_cancelled = is_cancelled
        self._should_stop = should_stop
        self._looked = threading.Event()
        self._cancelled = False
        self._done = threading.Event()

    def __enter__(self) -> CancelWatch:
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()

    def watch(self, job_id: str) -> None:
        """Begin."""
        threading.Thread(target=self._watch, args=(job_id,), daemon=True).start()

    def came_first(self) -> bool:
        """Whether the job was cancelled before it was to run. A look that fails or hangs keeps no job waiting."""
        self._looked.wait(FIRST_LOOK_S)
        return self._cancelled

    def should_stop(self) -> bool:
        """Whether the job is to be given back at once. Raises JobCancelledError once it is cancelled."""
        if self._cancelled:
            raise JobCancelledError
        return self._should_stop()

    def _watch(self, job_id: str) -> None:
        while not self._cancelled:
            try:
                self._cancelled = self._is_cancelled(job_id)
            except Exception as error:
                logger.warning("Looks for a cancel again in %d s: %s", CANCEL_S, explain(error))
            self._looked.set()
            if self._done.wait(CANCEL_S):
                return
