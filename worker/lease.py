"""One received message, held as long as somebody works on it."""

from __future__ import annotations

import logging
import random
import threading
import time
from datetime import UTC, datetime
from typing import Any

from comfy_utils import error_code
from worker.errors import explain
from worker.queue import Queue

logger = logging.getLogger(__name__)

RECEIVE_LIMIT_S = 43_200
"""SQS holds a received message for 12 hours at most, however often its visibility is extended."""
LEASE_LOST_CODES = (
    "InvalidParameterValue",
    "MessageNotInflight",
    "AWS.SimpleQueueService.MessageNotInflight",
    "ReceiptHandleIsInvalid",
)


class Lease:
    """Holds one received message: extends its visibility, in a thread of its own, well before it runs out."""

    def __init__(
        self, queue: Queue, message: dict[str, Any], timeout_s: int, received_at: float | None = None
    ) -> None:
        """The message was received just now or, by a worker before this one, at `received_at` (since 1970)."""
        self.message = message
        self.received_at = received_at or time.time()
        self.body: str = message.get("Body") or ""
        self.message_id: str = message["MessageId"]
        self.attempt = int(message["Attributes"]["ApproximateReceiveCount"])
        self.sent_at = datetime.fromtimestamp(int(message["Attributes"]["SentTimestamp"]) / 1000, UTC)  # SQS's clock
        self.job_id = ""
        self.has_run = False  # the job has run to its end, or never will
        self.stored = False  # the job's result is
        self.lost = False  # the message is no longer ours: another worker has it, or soon will
        self._receipt: str = message["ReceiptHandle"]
        self._queue = queue
        self._timeout_s = timeout_s
        self._ends_at = time.monotonic() + RECEIVE_LIMIT_S - (time.time() - self.received_at)
        self._held_until = time.monotonic() + timeout_s
        self._is_back = False
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._hold, daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Extend no more. Returns when no extension is under way, so that one cannot undo a give-back."""
        self._done.set()
        self._thread.join()

    def put_back(self, delay_s: int) -> None:
        """End, and let the message be received again, by anyone, after `delay_s`.

        Once, and only as long as it is ours, for it might be taken from whoever has received it since.
        """
        self.end()
        with self._lock:
            if self.lost or self._is_back or time.monotonic() > self._held_until:
                return
            self._is_back = True
        try:
            self._queue.hide(self._receipt, delay_s)
        except Exception as error:
            logger.warning("Message %s comes back when its lease ends: %s", self.message_id, explain(error))

    def delete(self, *, more_come: bool = False) -> None:
        """Delete the message, if `more_come` soon together with them; where it is no longer ours, `lost` says so."""
        try:
            self._queue.delete(self._receipt, more_come=more_come)
        except Exception as error:
            if error_code(error) not in LEASE_LOST_CODES:
                raise
            self.lost = True

    def _hold(self) -> None:
        wait_s = self._timeout_s / 3
        while not self._done.wait(wait_s):
            left_s = int(self._ends_at - time.monotonic()) - 1
            held_s = max(0, min(self._timeout_s, left_s))
            held_until = time.monotonic() + held_s
            try:
                self._queue.hide(self._receipt, held_s)
                self._held_until = held_until
                wait_s = self._timeout_s / 3
            except Exception as error:
                if error_code(error) in LEASE_LOST_CODES:
                    logger.warning("The lease on message %s is lost: %s", self.message_id, error)
                    self.lost = True
                    return
                wait_s = self._timeout_s / 12 * random.uniform(0.5, 1)
                logger.warning("Extending the lease again in %.1f s: %s", wait_s, explain(error))
