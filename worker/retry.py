"""How long to wait for what fails, hangs or has to be repeated."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from comfy_utils import JobStoppedError, error_code
from worker.errors import PutBackError, explain

logger = logging.getLogger(__name__)

T = TypeVar("T")

AWS_PATIENCE_S = 600
"""How long a worker with a job in hand waits for S3 or SQS to recover."""


def backoff_s(failures: int) -> float:
    """Seconds to wait after so many failures in a row: doubling, at most a minute, with jitter."""
    return min(2.0**failures, 60.0) * random.uniform(0.5, 1)


def insist(action: Callable[[], T], pause: Callable[[float], None]) -> T:
    """Call until AWS does it: a job that has run is not given back, and no attempt used up, for an outage.

    Raises the error after AWS_PATIENCE_S, and at once one that is not AWS's; and what `pause` raises.
    """
    from botocore.exceptions import BotoCoreError

    limit = time.monotonic() + AWS_PATIENCE_S
    failures = 0
    while True:
        try:
            return action()
        except Exception as error:
            if not (error_code(error) or isinstance(error, BotoCoreError)) or time.monotonic() > limit:
                raise
            failures += 1
            delay_s = backoff_s(failures)
            logger.warning("Trying again in %.0f s: %s", delay_s, explain(error))
            pause(delay_s)


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


def within(limit_s: float, action: Callable[[], object], should_stop: Callable[[], bool]) -> None:
    """Run `action` in a thread of its own and raise what it raises.

    Raises PutBackError when it takes longer than `limit_s`, JobStoppedError when it is to stop; it is then left to
    itself.
    """
    raised: list[Exception] = []
    done = threading.Event()

    def run() -> None:
        try:
            action()
        except Exception as error:
            raised.append(error)
        done.set()

    threading.Thread(target=run, daemon=True).start()
    limit = time.monotonic() + limit_s
    while not done.wait(0.1):
        if should_stop():
            raise JobStoppedError
        if time.monotonic() > limit:
            raise PutBackError(f"the inputs have not come within {limit_s:.0f} s")
    if raised:
        raise raised[0]
