"""How long to wait for what fails, hangs or has to be repeated."""

from __future__ import annotations

import logging
import math
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TypeVar

from comfy_utils import error_code
from ground.comfyui import JobStoppedError
from worker.errors import PutBackError, explain

logger = logging.getLogger(__name__)

T = TypeVar("T")

AWS_PATIENCE_S = 600
"""How long a worker with a job in hand waits for S3 or SQS to recover."""
LONGEST_PAUSE_S = 10.0
"""What waits for longer is late when AWS is back: a job that has run, whose sender waits for its receipt."""
PATIENCE_STEP_S = 0.1


def backoff_s(failures: int) -> float:
    """Seconds to wait after so many failures in a row: doubling up to LONGEST_PAUSE_S, with jitter."""
    return min(2.0 ** min(failures, 10), LONGEST_PAUSE_S) * random.uniform(0.5, 1)


@dataclass(eq=False)
class Wait:
    """One call that has failed and is to be made again."""

    failures: int = 0
    again_at: float = -math.inf  # by itself it is not made before
    seen: int = 0  # successes of others before it failed
    is_probe: bool = False  # its last try was one for all
    was_woken: bool = False  # its last try was made because another call had succeeded


class Patience:
    """For one kind of call to AWS, which all threads that make it share: it is made until AWS does it.

    While AWS does not, one call at a time tries whether it is back; once any has succeeded all the others are made at
    once. One that fails alone then waits by itself. The moments are of time.monotonic().
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._failures = 0  # in a row, of the calls that tried for all
        self._probe_at = -math.inf  # the next one tries
        self._successes = 0
        self._waiting: list[Wait] = []  # whose last try was the longest ago comes first

    def insist(self, action: Callable[[], T], pause: Callable[[float], None]) -> T:
        """Call until AWS does it: a job that has run is not given back, and no attempt used up, for an outage.

        Raises the error after AWS_PATIENCE_S, and at once one that is not AWS's; and what `pause` raises.
        """
        from botocore.exceptions import BotoCoreError

        limit = time.monotonic() + AWS_PATIENCE_S
        wait = Wait()
        while True:
            try:
                value = action()
            except Exception as error:
                if not (error_code(error) or isinstance(error, BotoCoreError)) or time.monotonic() > limit:
                    raise
                self.note_failure(wait, time.monotonic())
                logger.warning("Trying again within %.0f s: %s", LONGEST_PAUSE_S, explain(error))
                try:
                    while not self.may_try(wait, time.monotonic()):
                        pause(PATIENCE_STEP_S)
                        if time.monotonic() > limit:
                            raise
                finally:
                    self.leave(wait)
            else:
                self.note_success()
                return value

    def note_failure(self, wait: Wait, now: float) -> None:
        """The call has failed."""
        with self._lock:
            wait.failures += 1
            wait.again_at = now + backoff_s(wait.failures)
            wait.seen = self._successes
            self._waiting.append(wait)
            if wait.is_probe or now >= self._probe_at:
                self._failures += 1
                self._probe_at = now + backoff_s(self._failures)

    def note_success(self) -> None:
        """A call has succeeded."""
        with self._lock:
            self._failures = 0
            self._successes += 1

    def may_try(self, wait: Wait, now: float) -> bool:
        """Whether the call is to be made again now; if so, it is expected to be."""
        with self._lock:
            is_back = self._successes > wait.seen and not (wait.was_woken and now < wait.again_at)
            is_turn = now >= self._probe_at and wait is next(
                (each for each in self._waiting if now >= each.again_at), None
            )
            if not (is_back or is_turn):
                return False
            wait.was_woken, wait.is_probe = is_back, not is_back
            if wait.is_probe:
                self._probe_at = now + LONGEST_PAUSE_S  # as one that stores a large file says nothing for long
            self._waiting.remove(wait)
            return True

    def leave(self, wait: Wait) -> None:
        """The call waits no more."""
        with self._lock, suppress(ValueError):
            self._waiting.remove(wait)


@contextmanager
def every(seconds: float, action: Callable[[], None]) -> Iterator[None]:
    """Call `action` every so many seconds in a thread of its own while the with-block runs."""
    done = threading.Event()

    def repeat() -> None:
        while not done.wait(seconds):
            try:
                action()
            except Exception as error:
                logger.warning("Trying again in %.0f s: %s", seconds, explain(error))

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(1)


def within(what: str, limit_s: float, action: Callable[[], object], should_stop: Callable[[], bool]) -> None:
    """Run `action` in a thread of its own and raise what it raises.

    Raises PutBackError, which begins with `what`, when it takes longer than `limit_s`, JobStoppedError when it is to
    stop; it is then left to itself.
    """
    raised: list[Exception] = []
    done = threading.Event()

    def run() -> None:
        try:
            action()
        except Exception as error:
            raised.append(error)
        finally:
            done.set()

    threading.Thread(target=run, name="within", daemon=True).start()
    limit = time.monotonic() + limit_s
    while not done.wait(0.1):
        if should_stop():
            raise JobStoppedError
        if time.monotonic() > limit:
            raise PutBackError(f"{what} within {limit_s:g} s")
    if raised:
        raise raised[0]
