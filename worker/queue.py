"""The SQS queue, as a worker uses it."""

from __future__ import annotations

import logging
import queue
import sys
import threading
from concurrent.futures import Future
from typing import Any

from comfy_utils import QueueDepth, queue_depth
from worker.errors import explain
from worker.orders import Orders
from worker.retry import backoff_s
from worker.watchdog import notify_systemd

logger = logging.getLogger(__name__)

BATCH = 10
"""SQS hands out and deletes so many messages in a call at most."""


class Queue:
    """Receives, gives back and deletes messages. Every call raises what boto3 raises."""

    def __init__(self, sqs: Any, name: str, visibility_timeout_s: int) -> None:
        self.url = ""
        self.name = name
        self._sqs = sqs
        self._visibility_timeout_s = visibility_timeout_s
        self._to_delete: queue.SimpleQueue[tuple[str, Future[None]]] = queue.SimpleQueue()
        threading.Thread(target=self._delete_all, name="deleter", daemon=True).start()

    def find(self, orders: Orders) -> None:
        """Learn the queue's address; waits for a queue that is not there yet rather than spin through restarts."""
        failures = 0
        while True:
            try:
                self.url = str(self._sqs.get_queue_url(QueueName=self.name)["QueueUrl"])
                return
            except Exception as error:
                failures += 1
                delay_s = backoff_s(failures)
                logger.error("Cannot find the queue %s, again in %.0f s: %s", self.name, delay_s, explain(error))
                notify_systemd("WATCHDOG=1")
                if orders.stop.wait(delay_s):
                    sys.exit(0)

    def receive(self, most: int, wait_s: int) -> list[dict[str, Any]]:
        """Receive up to `most` messages, and wait `wait_s` for the first.

        The visibility timeout is named, so a queue made by hand works too.
        """
        answer = self._sqs.receive_message(
            QueueUrl=self.url,
            MaxNumberOfMessages=min(most, BATCH),
            WaitTimeSeconds=wait_s,
            VisibilityTimeout=self._visibility_timeout_s,
            MessageSystemAttributeNames=["ApproximateReceiveCount", "SentTimestamp"],
        )
        return answer.get("Messages") or []

    def hide(self, receipt: str, seconds: int) -> None:
        """Let nobody receive the message for so long from now on; 0 gives it back at once."""
        self._sqs.change_message_visibility(QueueUrl=self.url, ReceiptHandle=receipt, VisibilityTimeout=seconds)

    def delete(self, receipt: str) -> None:
        """Delete a message; returns when it is gone."""
        done: Future[None] = Future()
        self._to_delete.put((receipt, done))
        done.result()

    def depth(self) -> QueueDepth:
        """How many messages wait and how many are held."""
        return queue_depth(self._sqs, self.url)

    def _delete_all(self) -> None:
        """One call after the other, each with what has come during the last one: a lone message waits for nobody."""
        while True:
            batch = [self._to_delete.get()]
            while len(batch) < BATCH and not self._to_delete.empty():
                batch.append(self._to_delete.get())
            try:
                failed = self._delete_batch([receipt for receipt, _ in batch])
            except Exception as error:
                failed = dict.fromkeys(range(len(batch)), error)
            for number, (_, done) in enumerate(batch):
                if number in failed:
                    done.set_exception(failed[number])
                else:
                    done.set_result(None)

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
