"""The loop that takes messages: the next jobs stand in ComfyUI's queue while one runs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from local_cloud import LocalCloud
from workplace import LIMIT_S, Site, await_that, image_workflow
from workshop import (
    NO_RESULT_YET,
    Calls,
    Fleet,
    fetch_ahead,
    fetch_one_ahead,
    in_group,
    pending,
    speed_up,
    start,
    started_and_ended,
    update_group,
)

from comfy_utils import QueueDepth, new_job_id
from worker.held import Held
from worker.in_hand import InHand
from worker.intake import Intake
from worker.lease import Lease
from worker.shutdown import Shutdown
from worker.watchdog import Watchdog


def test_the_next_job_stands_in_comfyuis_queue_and_times_are_honest(make_site: Callable[..., Site]) -> None:
    site = make_site(JOB_TIMEOUT="20", SCALE_COOLDOWN="4")
    start(site)
    first, second = fetch_one_ahead(site, 11, image_workflow(11))  # it may run for 20 s, and is in hand for 22
    result = site.await_result(second)
    assert (result["status"], result["attempt"]) == ("succeeded", 1)
    _, first_ended = started_and_ended(site, first)
    started, _ = started_and_ended(site, second)
    timings = result["timings"]
    said = datetime.fromisoformat(timings["started_at"]).timestamp()
    assert first_ended <= started
    assert said == pytest.approx(started, abs=0.05)
    assert timings["wait_s"] > 2
    assert timings["run_s"] >= 2
    assert site.await_result(first)["attempt"] == 1


def test_sigterm_gives_both_jobs_back_and_the_second_never_ran(make_site: Callable[..., Site]) -> None:
    site = make_site(SCALE_COOLDOWN="4")
    site.start_comfyui()
    worker = site.start_worker()
    first, second = fetch_one_ahead(site, 600)
    worker.terminate()
    assert worker.wait(LIMIT_S) == 0
    assert site.depth() == (2, 0)
    await_that("ComfyUI was interrupted", lambda: site.runs(first, "interrupted"))
    assert pending(site) == []
    assert site.runs(second) == 0


def test_a_worker_that_drains_gives_the_next_job_back_and_finishes_the_first(cloud: LocalCloud, fleet: Fleet) -> None:
    site, machine = fleet
    start(site)
    first, second = fetch_one_ahead(site, 15)
    cloud.client("autoscaling").terminate_instance_in_auto_scaling_group(
        InstanceId=machine.instance_id, ShouldDecrementDesiredCapacity=True
    )
    await_that("the second is given back", lambda: site.depth() == (1, 1))
    assert site.result(first) is NO_RESULT_YET
    assert site.await_result(first)["status"] == "succeeded"
    await_that("the instance is gone", lambda: cloud.instance_state(machine.instance_id) == "terminated")
    assert (site.runs(first), site.runs(second)) == (1, 0)


def test_a_job_over_its_time_takes_no_other_with_it(make_site: Callable[..., Site]) -> None:
    site = make_site(JOB_TIMEOUT="12", SCALE_COOLDOWN="4")
    start(site)
    first, second = fetch_one_ahead(site, 600, image_workflow(1))
    assert site.await_result(first)["error"]["kind"] == "timeout"
    result = site.await_result(second)
    assert (result["status"], result["attempt"]) == ("succeeded", 1)
    assert (site.runs(second), site.runs(second, "interrupted")) == (1, 0)


def test_behind_a_job_that_turns_out_long_nobody_waits(make_site: Callable[..., Site]) -> None:
    site = make_site(SCALE_COOLDOWN="4")
    speed_up(site, "worker/scaling.py", {"AHEAD_LIMIT_S = 60": "AHEAD_LIMIT_S = 20"})
    start(site)
    first, second = fetch_one_ahead(site, 600)
    await_that("the second is given back", lambda: site.depth() == (1, 1))
    assert (site.runs(first), site.runs(second)) == (1, 0)


def test_the_same_job_twice_in_hand_is_run_once(make_site: Callable[..., Site]) -> None:
    site = make_site(SCALE_COOLDOWN="4")
    start(site)
    job_id = new_job_id()
    fetch_ahead(site, 1, *[{"prompt": image_workflow(1), "job_id": job_id}] * 3)
    assert site.await_result(job_id)["attempt"] == 1
    site.await_empty_queue()
    assert site.runs(job_id) == 1


# --- Which messages are taken, and when ------------------------------------------------------------------


class FakeQueue:
    """Hands out the messages it is given, and remembers how many were asked for."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self.asked: list[int] = []

    def add(self, *attempts: int) -> None:
        self.messages += [
            {
                "MessageId": new_job_id(),
                "ReceiptHandle": "r",
                "Attributes": {"ApproximateReceiveCount": str(attempt), "SentTimestamp": "0"},
            }
            for attempt in attempts
        ]

    def hide(self, *_: object) -> None:
        pass

    def receive(self, most: int, _: int) -> list[dict[str, Any]]:
        if not self.messages:
            time.sleep(0.05)  # a poll, shortened
            return []
        self.asked.append(most)
        taken, self.messages = self.messages[: min(most, 10)], self.messages[min(most, 10) :]
        return taken

    def depth(self) -> QueueDepth:
        return QueueDepth(len(self.messages), 1)


@pytest.fixture
def intake(tmp_path: Path) -> Iterator[tuple[Intake, FakeQueue]]:
    """A loop that takes messages, alone in the world. Its jobs end when a test ends them: see end()."""
    queue = FakeQueue()
    shutdown = Shutdown(3, Watchdog())
    held = Held(tmp_path / "held", "i-1", "queue")
    membership = SimpleNamespace(
        replacement=SimpleNamespace(is_due=False),
        is_outdated=lambda: False,
        others_at_work=lambda _: 0,
        leave_if_idle=lambda: None,
    )
    parts: Any = (
        SimpleNamespace(scale_cooldown_s=180, visibility_timeout_s=120),
        queue,
        held,
        InHand(held),
        shutdown,
        SimpleNamespace(blame=lambda: None, has_failed=lambda: False, is_ready=lambda: True),
        SimpleNamespace(blame=lambda: None, problem=lambda: None, is_full=lambda: False),
        SimpleNamespace(warming=False, report_for_work=lambda: None),
        membership,
        lambda _: None,
    )
    intake = Intake(*parts)
    thread = threading.Thread(target=intake.run, args=(Watchdog(),), daemon=True)
    thread.start()
    yield intake, queue
    shutdown.stop.set()
    thread.join(LIMIT_S)


def end(in_hand: InHand, *leases: Lease) -> None:
    """Their jobs have run, and their messages are gone."""
    for lease in leases:
        in_hand.note_run(lease)
        lease.end()
        in_hand.let_go(lease)


def know_short_jobs(intake: Intake, queue: FakeQueue) -> Lease:
    """Have it hold a job, and know that jobs are short."""
    queue.add(1)
    await_that("it holds the first", lambda: intake.in_hand.leases)
    intake.in_hand.note_run_time(0.01)
    return intake.in_hand.leases[0]


def test_several_messages_come_with_one_receive_once_jobs_are_known_to_be_short(
    intake: tuple[Intake, FakeQueue],
) -> None:
    loop, queue = intake
    know_short_jobs(loop, queue)
    assert queue.asked == [1], "nothing is known of how long jobs are"
    queue.add(*[1] * 9)
    loop.note_depth(QueueDepth(9, 1))
    await_that("all are in hand", lambda: len(loop.in_hand.leases) == 10)
    assert queue.asked == [1, 9]


def test_a_worker_keeps_jobs_ready_where_all_others_still_boot(cloud: LocalCloud, fleet: Fleet, calls: Calls) -> None:
    site, _ = fleet
    update_group(cloud, site, MinSize=20, MaxSize=20, DesiredCapacity=20)
    await_that("they are in service", lambda: len(in_group(cloud, site)["Instances"]) == 20)
    start(site)
    site.send(image_workflow())
    calls.await_more("DescribeAutoScalingGroups")  # it knows of them
    first, second = fetch_one_ahead(site, 1)
    assert [site.await_result(job_id)["attempt"] for job_id in (first, second)] == [1, 1]
