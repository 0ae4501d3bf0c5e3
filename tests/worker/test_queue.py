"""The queue as a worker uses it: messages are deleted together, and each hears what became of its own."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from botocore.exceptions import ClientError
from workplace import LIMIT_S, await_that

from worker import queue, retry
from worker.queue import Queue
from worker.retry import Patience


class Sqs:
    """Deletes while `may_go_on`; fails once for each receipt in `fails`."""

    def __init__(self, *fails: str) -> None:
        self.batches: list[list[str]] = []
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        self._fails = list(fails)

    def delete_message_batch(self, QueueUrl: str, Entries: list[dict[str, str]]) -> dict[str, Any]:  # noqa: ARG002, N803
        self.batches.append([entry["ReceiptHandle"] for entry in Entries])
        self.may_go_on.wait(LIMIT_S)
        failed = [entry for entry in Entries if entry["ReceiptHandle"] in self._fails]
        for entry in failed:
            self._fails.remove(entry["ReceiptHandle"])
        return {"Failed": [{"Id": entry["Id"], "Code": "InternalError", "SenderFault": False} for entry in failed]}


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A linger that nobody can overlook."""
    monkeypatch.setattr(queue, "LINGER_S", 2 * LIMIT_S)


@pytest.mark.usefixtures("patient")
def test_a_lone_message_is_deleted_at_once() -> None:
    sqs = Sqs()
    started = time.monotonic()
    Queue(sqs, "", 120).delete("one")
    assert time.monotonic() - started < LIMIT_S
    assert sqs.batches == [["one"]]


@pytest.mark.usefixtures("patient")
def test_ten_messages_are_deleted_in_one_call() -> None:
    sqs = Sqs()
    many = Queue(sqs, "", 120)
    with ThreadPoolExecutor(10) as pool:
        list(pool.map(lambda number: many.delete(str(number), more_come=True), range(10)))
    assert [sorted(batch) for batch in sqs.batches] == [[str(number) for number in range(10)]]


def test_what_waits_for_a_call_goes_together_with_the_next_but_ten_at_most() -> None:
    sqs = Sqs()
    sqs.may_go_on.clear()
    many = Queue(sqs, "", 120)
    with ThreadPoolExecutor(16) as pool:
        deletes = [pool.submit(many.delete, "first")]
        await_that("the first is under way", lambda: sqs.batches)
        deletes += [pool.submit(many.delete, str(number)) for number in range(15)]
        await_that("the others wait", lambda: many._to_delete.qsize() == 15)
        assert not any(delete.done() for delete in deletes), "who deletes waits until the message is gone"
        sqs.may_go_on.set()
        for delete in deletes:
            delete.result(LIMIT_S)
    assert [len(batch) for batch in sqs.batches] == [1, 10, 5]


@pytest.mark.usefixtures("patient")
def test_a_message_that_is_not_deleted_fails_alone_and_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    sqs = Sqs("3")
    many = Queue(sqs, "", 120)

    def delete(number: int) -> str:
        try:
            many.delete(str(number), more_come=True)
        except ClientError as error:
            return f"{error.operation_name}: {error.response['Error']['Code']}"
        return ""

    with ThreadPoolExecutor(10) as pool:
        failures = list(pool.map(delete, range(10)))
    assert failures == ["DeleteMessageBatch: InternalError" if number == 3 else "" for number in range(10)]
    assert len(sqs.batches) == 1

    sqs = Sqs("3")
    monkeypatch.setattr(retry, "backoff_s", lambda _: 0.0)
    alone = Queue(sqs, "", 120)
    Patience().insist(lambda: alone.delete("3"), time.sleep)
    assert sqs.batches == [["3"], ["3"]]


def test_a_call_that_fails_fails_for_all_its_messages() -> None:
    class Gone(Sqs):
        def delete_message_batch(self, QueueUrl: str, Entries: list[dict[str, str]]) -> dict[str, Any]:  # noqa: N803
            super().delete_message_batch(QueueUrl, Entries)
            raise ClientError({"Error": {"Code": "Throttling", "Message": "slow down"}}, "DeleteMessageBatch")

    many = Queue(Gone(), "", 120)
    with ThreadPoolExecutor(10) as pool:
        deletes = [pool.submit(many.delete, str(number), more_come=True) for number in range(10)]
        assert all(isinstance(delete.exception(LIMIT_S), ClientError) for delete in deletes)
