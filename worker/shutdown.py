"""Whether this worker leaves: at once, or when the jobs in hand have ended."""

from __future__ import annotations

import threading
import time

from ground.comfyui import JobStoppedError
from worker.watchdog import Watchdog


class Shutdown:
    """Set by a signal (`stop`) and by what EC2 and the group say (worker/lifecycle.py); asked everywhere."""

    def __init__(self, max_receives: int, watchdog: Watchdog) -> None:
        self.stop = threading.Event()  # SIGTERM: give everything back and exit
        self.spot = threading.Event()  # the machine is taken away in two minutes
        self.drain = threading.Event()  # the group takes this instance: finish the job, take nothing new
        self._max_receives = max_receives
        self._watchdog = watchdog

    def is_leaving(self) -> bool:
        """Whether nothing new is to be taken."""
        return self.stop.is_set() or self.spot.is_set() or self.drain.is_set()

    def should_stop(self) -> bool:
        """Whether running jobs are to be given back at once. Asked all the time, so it shows that a thread turns."""
        self._watchdog.turn()
        return self.stop.is_set() or self.spot.is_set()

    def gives_back(self, attempt: int) -> bool:
        """Whether a job that has not started is to go back to the queue, because this worker leaves.

        On its last attempt it would end in the dead-letter queue. So it is run after all, where there is time.
        """
        return self.should_stop() or (self.drain.is_set() and attempt < self._max_receives)

    def pause(self, seconds: float) -> None:
        """Wait, unless this worker is to stop: then raise JobStoppedError."""
        limit = time.monotonic() + seconds
        while time.monotonic() < limit:
            if self.should_stop():
                raise JobStoppedError
            time.sleep(0.1)
