"""The SQS queue, as a worker uses it."""

from __future__ import annotations

import logging
import queue
import sys
import threading
import time
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, NamedTuple

from comfy_utils import QueueDepth, queue_depth
from worker.errors import explain
from worker.retry import backoff_s
from worker.shutdown import Shutdown
from worker.watchdog import notify_systemd

logger = logging.getLogger(__name__)

BATCH = 10
"""SQS hands out and deletes so many messages in a call at most."""
LINGER_S = 0.2
"""So long a message that is to be deleted waits for others which are said to come."""


class _Deletion(NamedTuple):
    receipt: str
    more_come: bool
    done: Future[None]


class Queue:
    """Receives, gives back and deletes messages. Every call raises what boto3 raises."""

    def __init__(self, sqs: Any, name: str, visibility_timeout_s: int) -> None:
        self.url = ""
        self.name = name
        self._sqs = sqs
        self.visibility_timeout_s = visibility_timeout_s
        self._to_delete: queue.SimpleQueue[_Deletion] = queue.SimpleQueue()
        threading.Thread(target=self._delete_all, name="deleter", daemon=True).start()

    def find(self, shutdown: Shutdown) -> None:
        """Learn the queue's address; waits for a queue that is not there yet rather than spin through restarts."""
        failures = 0
        while True:
            try:
                self.look_up()
                return
            except Exception as error:
                failures += 1
                delay_s = backoff_s(failures)
                logger.error("Cannot find the queue %s, again in %.0f s: %s", self.name, delay_s, explain(error))
                notify_systemd("WATCHDOG=1")
                if shutdown.stop.wait(delay_s):
                    sys.exit(0)

    def look_up(self) -> None:
        """Learn the queue's address."""
        self.url = str(self._sqs.get_queue_url(QueueName=self.name)["QueueUrl"])

    def receive(self, most: int, wait_s: int) -> list[dict[str, Any]]:
        """Receive up to `most` messages, and wait `wait_s` for the first.

        The visibility timeout is named, so a queue made by hand works too.
        """
        answer = self._sqs.receive_message(
            QueueUrl=self.url,
            MaxNumberOfMessages=min(most, BATCH),
            WaitTimeSeconds=wait_s,
            VisibilityTimeout=self.visibility_timeout_s,
            MessageSystemAttributeNames=["ApproximateReceiveCount", "SentTimestamp"],
        )
        return answer.get("Messages") or []

    def hide(self, receipt: str, seconds: int) -> None:
        """Let nobody receive the message for so long from now on; 0 gives it back at once."""
        self._sqs.change_message_visibility(QueueUrl=self.url, ReceiptHandle=receipt, VisibilityTimeout=seconds)

    def delete(self, receipt: str, *, more_come: bool = False) -> None:
        """Delete a message, if `more_come` soon in one call with them; returns when it is gone."""
        done: Future[None] = Future()
        self._to_delete.put(_Deletion(receipt, more_come, done))
        done.result()

    def depth(self) -> QueueDepth:
        """How many messages wait and how many are held."""
        return queue_depth(self._sqs, self.url)

    def _delete_all(self) -> None:
        """Delete what is to be deleted, as many as possible in a call."""
        while True:
            batch = [self._to_delete.get()]
            limit = time.monotonic() + LINGER_S
            with suppress(queue.Empty):
                while len(batch) < BATCH:
                    left_s = limit - time.monotonic() if batch[-1].more_come else 0
                    batch.append(self._to_delete.get(timeout=max(0, left_s)))
            try:
                failed = self._delete_batch([deletion.receipt for deletion in batch])
            except Exception as error:
                failed = dict.fromkeys(range(len(batch)), error)
            for number, deletion in enumerate(batch):
                if number in failed:
                    deletion.done.set_exception(failed[number])
                else:
                    deletion.done.set_result(None)

    def _delete_batch(self, receipts: list[str]) -> dict[int, Exception]:
        """The messages that were not deleted, by their place, and why."""
        from botocore.exceptions import ClientError

        entries = [{"Id": str(number), "ReceiptHandle": receipt} for number, receipt in enumerate(receipts)]
        answer = self._sqs.delete_message_batch(QueueUrl=self.url, Entries=entries)
        return {
            int(failed["Id"]): ClientError(
                {"Error": {"Code": failed["Code"], "Message": failed.get("Message", "")}}, "DeleteMessageBatch"
            )
            for failed in answer.get("Failed", [])
        }
