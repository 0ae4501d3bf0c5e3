"""Dead letters that died without a word, because their workers were killed: they are answered, too."""

from __future__ import annotations

import logging
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from comfy_utils import NothingToRunError, error_code
from worker.attempts import Attempts, understand
from worker.errors import explain
from worker.lease import Lease
from worker.lifecycle import Lifecycle
from worker.queue import BATCH, Queue
from worker.shutdown import Shutdown

logger = logging.getLogger(__name__)

LOOK_S, LONGEST_PAUSE_S = 60.0, 300.0
"""Between two looks; it grows while the dead-letter queue holds nothing but what was answered."""
LOOK_LIMIT_S = 60.0
DEAD_LETTER_HELD_S = 30
"""So long a dead letter is hidden from others while it is looked at."""
NO_QUEUE_CODES = ("AWS.SimpleQueueService.NonExistentQueue", "QueueDoesNotExist")
"""A queue made by hand may have none."""


@dataclass(eq=False)
class DeadLetters:
    """Looks for them beside the jobs, and once more before this worker leaves.

    A dead letter stays where it is, for `fleet.py redrive`. What was answered is known by attempts.json, so one
    receipt is written and one callback made, whichever worker comes first.
    """

    queue: Queue
    attempts: Attempts
    shutdown: Shutdown
    lifecycle: Lifecycle
    _answered: set[str] = field(default_factory=set)  # message ids
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self) -> None:
        """Look from time to time until this worker leaves."""
        pause_s = 0.0
        while not self._leaves_within(pause_s):
            pause_s = LOOK_S if self.lifecycle.warming or self.look() else min(2 * pause_s or LOOK_S, LONGEST_PAUSE_S)

    def look(self) -> bool:
        """Answer what has no answer; returns whether it is worth looking again soon."""
        with self._lock:
            try:
                if not self.queue.url:
                    self.queue.look_up()
                return self._look()
            except Exception as error:
                if error_code(error) not in NO_QUEUE_CODES:
                    logger.warning("Dead letters are looked at later: %s", explain(error))
                return False

    def _look(self) -> bool:
        receipts: list[str] = []
        has_news = False
        limit = time.monotonic() + LOOK_LIMIT_S
        try:
            while time.monotonic() < limit and not self.shutdown.should_stop():
                messages = self.queue.receive(BATCH, 0)
                if not messages:
                    break
                receipts += [message["ReceiptHandle"] for message in messages]
                for message in messages:
                    if message["MessageId"] not in self._answered:
                        has_news = self._answer(message) or has_news
        finally:
            for receipt in receipts:
                with suppress(Exception):  # it is seen again by itself
                    self.queue.hide(receipt, 0)
        return has_news or not receipts

    def _answer(self, message: dict[str, Any]) -> bool:
        """Answer one dead letter; returns whether it was, or will be soon."""
        lease = Lease(self.queue, message, self.queue.visibility_timeout_s)
        try:
            if not self.attempts.runs_still(understand(lease)[0].id):
                self.attempts.answer(lease)
                self._answered.add(lease.message_id)
        except NothingToRunError:
            lease.delete()
        except Exception as error:
            logger.warning("The dead letter %s is answered later: %s", lease.message_id, explain(error))
            return False
        finally:
            lease.end()
        return True

    def _leaves_within(self, seconds: float) -> bool:
        limit = time.monotonic() + seconds
        while time.monotonic() < limit and not self.shutdown.is_leaving():
            time.sleep(0.2)
        return self.shutdown.is_leaving()
