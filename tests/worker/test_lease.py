"""Leases: who holds a message, who lost it, and who takes it over."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable

import pytest
from botocore.exceptions import ClientError
from local_cloud import Fault
from workplace import Site, await_that, image_workflow
from workshop import Calls

from comfy_utils import new_job_id
from worker import lease
from worker.lease import Lease
from worker.queue import Queue


def test_a_long_job_is_held_and_not_run_twice(make_site: Callable[..., Site]) -> None:
    site = make_site(VISIBILITY_TIMEOUT="6")
    site.start_comfyui()
    job_id = site.send(image_workflow(14))
    for _ in range(2):
        site.start_worker()
    result = site.await_result(job_id)
    assert (result["status"], result["attempt"]) == ("succeeded", 1)
    assert site.runs(job_id) == 1
    site.await_empty_queue()
    assert "attempt 2" not in site.log()


def test_a_killed_workers_job_is_adopted(make_site: Callable[..., Site]) -> None:
    site = make_site(VISIBILITY_TIMEOUT="3")
    site.start_comfyui()
    worker = site.start_worker()
    job_id = site.send(image_workflow(6))
    await_that("the job runs", lambda: site.runs(job_id))
    os.killpg(worker.pid, signal.SIGKILL)
    worker.wait()
    shutil.rmtree(site.folder / "held")  # or it would not wait for the lease's end: see test_held.py
    site.start_worker()
    result = site.await_result(job_id)
    assert (result["status"], result["attempt"]) == ("succeeded", 2)
    assert site.runs(job_id) == 1


def test_the_same_message_at_two_instances_gives_one_receipt(make_site: Callable[..., Site]) -> None:
    first, second = make_site(), make_site()
    for setting in ("prefix", "env"):  # the second instance joins the first one's environment
        setattr(second, setting, getattr(first, setting))
    text = (first.folder / "env").read_text().replace(str(first.port), str(second.port))
    (second.folder / "env").write_text(text)
    for site in (first, second):
        site.start_comfyui()
        site.start_worker()
    await_that("both work", lambda: all("takes jobs from" in site.log() for site in (first, second)))
    job_id = new_job_id()
    for _ in range(2):
        first.send({"prompt": image_workflow(2), "job_id": job_id})
    receipt = first.await_result(job_id)
    first.await_empty_queue()
    assert first.result(job_id) == receipt
    assert "stored its result first" in first.log() + second.log()


def test_a_lost_lease_keeps_the_result_and_leaves_the_message(make_site: Callable[..., Site], calls: Calls) -> None:
    site = make_site(VISIBILITY_TIMEOUT="6")
    site.start_comfyui()
    calls.next("ChangeMessageVisibility", Fault(400, "InvalidParameterValue"), times=1)
    deletes = calls.count("DeleteMessageBatch")
    site.start_worker()
    job_id = site.send(image_workflow(3))
    assert site.await_result(job_id)["attempt"] == 1
    await_that("the message came again and was deleted", deletes)  # moto's counts may both be 0 as a lease ends
    site.await_empty_queue()
    assert "its lease was lost" in site.log()
    assert deletes() == 1, "the message was deleted only by the receive that owned it"
    assert site.runs(job_id) == 1


def test_a_lease_that_cannot_be_extended_at_first_is_tried_again(
    make_site: Callable[..., Site], calls: Calls
) -> None:
    site = make_site(VISIBILITY_TIMEOUT="9")
    site.start_comfyui()
    calls.next("ChangeMessageVisibility", Fault(403, "AccessDenied"), times=3)
    for _ in range(2):
        site.start_worker()
    job_id = site.send(image_workflow(12))
    assert site.await_result(job_id)["attempt"] == 1
    site.await_empty_queue()
    assert "Extending the lease again" in site.log()
    assert "attempt 2" not in site.log()


def test_a_lease_never_asks_for_more_than_twelve_hours(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    class Queue:
        def hide(self, _: str, seconds: int) -> None:
            asked.append(seconds)

    monkeypatch.setattr(lease, "RECEIVE_LIMIT_S", 4)
    message = {
        "MessageId": "m",
        "ReceiptHandle": "r",
        "Attributes": {"ApproximateReceiveCount": "1", "SentTimestamp": "0"},
    }
    held = lease.Lease(Queue(), message, 3)  # type: ignore[arg-type]
    await_that("three extensions", lambda: len(asked) >= 3)
    held.end()
    assert asked[:3] == [1, 0, 0]


class Messages(Queue):
    """A queue that notes what is hidden for how long, and cannot delete where it has an error."""

    def __init__(self, error: str = "") -> None:
        self.error = error
        self.hidden: list[tuple[str, int]] = []

    def hide(self, receipt: str, seconds: int) -> None:
        self.hidden.append((receipt, seconds))

    def delete(self, receipt: str, *, more_come: bool = False) -> None:
        if self.error:
            message = f"{receipt}, more come: {more_come}"
            raise ClientError({"Error": {"Code": self.error, "Message": message}}, "DeleteMessageBatch")


def a_lease(queue: Queue, timeout_s: int = 60) -> Lease:
    attributes = {"ApproximateReceiveCount": "1", "SentTimestamp": "0"}
    return Lease(queue, {"MessageId": "m", "ReceiptHandle": "r", "Attributes": attributes}, timeout_s)


def test_a_message_is_given_back_once() -> None:
    """By the thread of its job, and by that which gives back all. It might be another's by then."""
    queue = Messages()
    held = a_lease(queue)
    for _ in range(2):
        held.put_back(0)
    assert queue.hidden == [("r", 0)]


def test_a_message_whose_time_has_run_out_is_not_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the worker stood still: whoever has received it since would lose it."""
    queue = Messages()
    held = a_lease(queue)
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 61)
    held.put_back(0)
    assert queue.hidden == []


@pytest.mark.parametrize("code", lease.LEASE_LOST_CODES)
def test_a_message_that_is_another_s_by_now_is_deleted_by_that(code: str) -> None:
    held = a_lease(Messages(code))
    held.delete()
    assert held.lost


def test_a_message_that_cannot_be_deleted_now_is_still_held() -> None:
    held = a_lease(Messages("ServiceUnavailable"))
    with pytest.raises(ClientError):
        held.delete()
    assert not held.lost
