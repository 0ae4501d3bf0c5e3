"""Scaling and the instance lifecycle: the rules themselves, and workers on the local cloud that follow them."""

from __future__ import annotations

import json
import socket
import time
from collections import Counter
from typing import Any

import pytest
from local_cloud import Fault, LocalCloud, Machine
from workplace import Site, await_that, group_of, image_workflow

from comfy_utils import Group, QueueDepth
from parse_job import (
    AHEAD_LIMIT_S,
    ALL_LONG_S,
    LANES,
    LONG_JOB_S,
    METRICS_KEPT,
    READY_S,
    TURN_S,
    Metrics,
    QueueHistory,
    Replacement,
    leaving_turn,
    long_jobs,
    may_fetch_ahead,
    may_leave,
    replacement_step,
)

EMPTY = QueueDepth(0, 0)
WINDOW_S = 180.0


def watched(*depths: QueueDepth, window_s: float = WINDOW_S) -> QueueHistory:
    """A history that is full at WINDOW_S, with these depths evenly in it."""
    history = QueueHistory(window_s)
    for number, depth in enumerate(depths):
        history.add(WINDOW_S * number / max(1, len(depths) - 1), depth)
    return history


def leaves(history: QueueHistory, depth: QueueDepth, *, idle_s: float, desired: int, turn: int | None) -> bool:
    return may_leave(history, depth, now=WINDOW_S, idle_s=idle_s, cooldown_s=WINDOW_S, desired=desired, turn=turn)


# --- Leaving ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seen", "depth", "idle_s", "desired", "may"),
    [
        pytest.param(EMPTY, EMPTY, 180, 1, True, id="the last, idle long enough"),
        pytest.param(EMPTY, EMPTY, 179, 1, False, id="the last, a second too early"),
        pytest.param(QueueDepth(0, 1), EMPTY, 180, 1, True, id="the last, though something came"),
        pytest.param(EMPTY, QueueDepth(1, 0), 999, 5, False, id="a message is visible"),
        pytest.param(EMPTY, QueueDepth(0, 1), 999, 1, False, id="a message is held by somebody on the way out"),
        pytest.param(EMPTY, EMPTY, 180, 20, True, id="all, when nothing came"),
        pytest.param(QueueDepth(0, 2), QueueDepth(0, 2), 30, 4, True, id="more are there than are needed"),
        pytest.param(QueueDepth(0, 2), QueueDepth(0, 2), 999, 3, False, id="just enough are there"),
        pytest.param(QueueDepth(2, 2), QueueDepth(0, 2), 999, 4, False, id="what waited counts, too"),
    ],
)
def test_who_may_leave(seen: QueueDepth, depth: QueueDepth, idle_s: float, desired: int, may: bool) -> None:
    assert leaves(watched(seen, seen, seen), depth, idle_s=idle_s, desired=desired, turn=0) is may


def test_nobody_judges_a_queue_it_has_hardly_seen() -> None:
    history = QueueHistory(WINDOW_S)
    history.add(100, QueueDepth(0, 1))
    history.add(WINDOW_S, QueueDepth(0, 1))
    assert not leaves(history, QueueDepth(0, 1), idle_s=80, desired=9, turn=0)


@pytest.mark.parametrize("load", [1, 2, 5, 13])
@pytest.mark.parametrize("there", [2, 3, 8, 20])
@pytest.mark.parametrize("second", [0.0, 7.0, 1_000_000.0])
def test_many_who_leave_at_once_never_leave_too_few(load: int, there: int, second: float) -> None:
    history = watched(QueueDepth(0, load), QueueDepth(0, load))
    names = [f"i-{number:017x}" for number in range(there)]
    left = [
        name
        for name in names  # all see the same number, because none of them has gone yet
        if leaves(history, EMPTY, idle_s=60, desired=there, turn=leaving_turn(name, names, second))
    ]
    needed = -(-load * 10 // 9)
    assert there - len(left) == min(there, needed)


def test_turns_change_and_rest_between() -> None:
    names = [f"i-{number:017x}" for number in range(10)]

    def order(clock: float) -> list[str]:
        return sorted(names, key=lambda name: leaving_turn(name, names, clock) or 0)

    assert order(0) == order(TURN_S * 0.6)
    assert len({order(turn * TURN_S)[0] for turn in range(50)}) > 5, "a busy one does not block the others for long"
    assert leaving_turn(names[0], names, TURN_S * 0.9) is None
    assert leaving_turn("i-new", names, 0) is not None, "one that the group does not list yet has its turn"


# --- Long jobs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("running_s", "waiting", "long"),
    [
        (LONG_JOB_S - 1, 2, 0),
        (LONG_JOB_S, 2, 1),
        (ALL_LONG_S, 2, 6),
        (ALL_LONG_S, 0, 1),
    ],
)
def test_long_jobs(running_s: float, waiting: int, long: int) -> None:
    depth = QueueDepth(waiting, 6)
    assert long_jobs(watched(depth, depth), depth, running_s) == long


def test_a_queue_that_was_empty_meanwhile_shows_that_jobs_get_through() -> None:
    depth = QueueDepth(2, 6)
    assert long_jobs(watched(depth, QueueDepth(0, 6), depth), depth, ALL_LONG_S) == 1


# --- Workers ---------------------------------------------------------------------------------------------

Fleet = tuple[Site, Machine]


class Calls:
    """The AWS calls that reach the local cloud, one of which may be answered with a fault."""

    def __init__(self, cloud: LocalCloud, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[str] = []
        self.faults: dict[str, list[Fault]] = {}
        monkeypatch.setattr(cloud, "fault", self._next)

    def _next(self, _: str, operation: str) -> Fault | None:
        self.seen.append(operation)
        faults = self.faults.get(operation)
        return faults.pop(0) if faults else None

    def await_more(self, operation: str, count: int = 1) -> None:
        before = self.seen.count(operation)
        await_that(f"{operation} is called", lambda: self.seen.count(operation) >= before + count)


@pytest.fixture
def calls(cloud: LocalCloud, monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(cloud, monkeypatch)


def group(cloud: LocalCloud, site: Site) -> dict[str, Any]:
    return group_of(cloud, f"{site.prefix}-{site.env}-asg")


def start(site: Site) -> None:
    site.start_comfyui()
    site.start_worker()


def update_group(cloud: LocalCloud, site: Site, **changes: int) -> None:
    cloud.client("autoscaling").update_auto_scaling_group(
        AutoScalingGroupName=f"{site.prefix}-{site.env}-asg", **changes
    )


def test_an_idle_worker_does_not_even_ask_to_leave_at_the_minimum(
    cloud: LocalCloud, fleet: Fleet, calls: Calls
) -> None:
    site, machine = fleet
    update_group(cloud, site, MinSize=1)
    start(site)
    calls.await_more("GetQueueAttributes", 3)
    assert "TerminateInstanceInAutoScalingGroup" not in calls.seen
    assert machine.is_on()
    assert site.await_result(site.send(image_workflow()))["status"] == "succeeded"


def test_a_refused_decrement_is_a_normal_answer(cloud: LocalCloud, fleet: Fleet, calls: Calls) -> None:
    site, machine = fleet
    calls.faults["TerminateInstanceInAutoScalingGroup"] = [Fault(400, "ValidationError")]
    start(site)
    await_that("it stays", lambda: "Stays, the group is at its minimum" in site.log())
    assert site.await_result(site.send(image_workflow()))["status"] == "succeeded"
    await_that("it leaves in the end", lambda: not group(cloud, site)["Instances"])
    assert cloud.instance_state(machine.instance_id) == "terminated"
    assert "Traceback" not in site.log()


def test_failed_reads_change_nothing(cloud: LocalCloud, fleet: Fleet, calls: Calls) -> None:
    site, _ = fleet
    calls.faults["DescribeAutoScalingGroups"] = [Fault(503, "ServiceUnavailable")] * 4
    calls.faults["GetQueueAttributes"] = [Fault(400, "Throttling")] * 4
    start(site)
    await_that("reads have failed", lambda: not any(calls.faults.values()))
    assert "TerminateInstanceInAutoScalingGroup" not in calls.seen
    assert "SetDesiredCapacity" not in calls.seen
    await_that("it leaves once it can read", lambda: not group(cloud, site)["Instances"])


def test_a_busy_worker_calls_for_others_and_says_why_they_do_not_come(cloud: LocalCloud, fleet: Fleet) -> None:
    site, _ = fleet
    cloud.launch_failure = (
        "We currently do not have sufficient g5.2xlarge capacity in the Availability Zone you requested (us-west-2a)."
    )
    try:
        for _ in range(9):
            site.send(image_workflow(3))
        start(site)
        await_that("it is said", lambda: "AWS has no g5.2xlarge free in us-west-2a" in site.log())
        assert group(cloud, site)["DesiredCapacity"] == 3, "ceil(8 / 3)"
    finally:
        cloud.launch_failure = None
    await_that("they come", lambda: len(group(cloud, site)["Instances"]) == 3)
    site.await_empty_queue()
    assert site.log().count("AWS has no g5.2xlarge free") == 1


def test_a_recommendation_to_rebalance(cloud: LocalCloud, fleet: Fleet) -> None:
    site, machine = fleet
    start(site)
    job_id = site.send(image_workflow(15))
    await_that("the job runs", lambda: site.runs(job_id))
    machine.metadata["events/recommendations/rebalance"] = '{"noticeTime": "2026-01-01T00:00:00Z"}'
    waiting = site.send(image_workflow())
    await_that("another is called for", lambda: len(group(cloud, site)["Instances"]) == 2)
    assert group(cloud, site)["DesiredCapacity"] == 1, "this one is wanted no more, and the message calls for one"
    assert not site.result(job_id)
    assert site.await_result(job_id)["status"] == "succeeded"
    await_that("it goes", lambda: cloud.instance_state(machine.instance_id) == "terminated")
    assert site.runs(waiting) == 0
    assert group(cloud, site)["DesiredCapacity"] == 1


def test_at_the_minimum_a_recommendation_to_rebalance_has_the_instance_replaced(
    cloud: LocalCloud, fleet: Fleet
) -> None:
    site, machine = fleet
    update_group(cloud, site, MinSize=1)
    start(site)
    machine.metadata["events/recommendations/rebalance"] = '{"noticeTime": "2026-01-01T00:00:00Z"}'
    await_that("it goes", lambda: cloud.instance_state(machine.instance_id) == "terminated")
    (other,) = group(cloud, site)["Instances"]
    assert other["InstanceId"] != machine.instance_id


def test_an_instance_of_the_warm_pool_takes_nothing(fleet: Fleet, calls: Calls) -> None:
    site, machine = fleet
    looks: list[str] = []

    class Metadata(dict[str, str]):
        def get(self, path: str, *default: Any) -> Any:
            looks.extend([path] if path == "autoscaling/target-lifecycle-state" else [])
            return super().get(path, *default)

    machine.metadata = Metadata(machine.metadata | {"autoscaling/target-lifecycle-state": "Warmed:Stopped"})
    job_id = site.send(image_workflow())
    start(site)
    await_that("the worker knows", lambda: "In the warm pool" in site.log())
    looks.clear()
    await_that("it has looked again", lambda: len(looks) >= 2)
    assert "ReceiveMessage" not in calls.seen
    machine.metadata["autoscaling/target-lifecycle-state"] = "InService"
    assert site.await_result(job_id)["status"] == "succeeded"


def test_an_operator_who_lowers_what_is_wanted_ends_no_running_job(cloud: LocalCloud, fleet: Fleet) -> None:
    site, machine = fleet
    cloud.client("autoscaling").set_instance_protection(
        InstanceIds=[machine.instance_id],
        AutoScalingGroupName=f"{site.prefix}-{site.env}-asg",
        ProtectedFromScaleIn=True,
    )
    start(site)
    job_id = site.send(image_workflow(4))
    await_that("the job runs", lambda: site.runs(job_id))
    update_group(cloud, site, MaxSize=0)
    assert group(cloud, site)["DesiredCapacity"] == 0
    assert site.await_result(job_id)["status"] == "succeeded"
    assert site.runs(job_id) == 1
    await_that("it leaves, although no fewer can be wanted", lambda: not group(cloud, site)["Instances"])
    assert group(cloud, site)["DesiredCapacity"] == 0


def test_a_spot_notice_with_a_job_an_upload_and_messages_at_hand(fleet: Fleet, calls: Calls) -> None:
    site, machine = fleet
    start(site)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        called_back = site.send({"prompt": image_workflow(), "callback_url": url})
        await_that("its callback is under way", lambda: site.result(called_back))
        calls.faults["PUT"] = [Fault(503, "SlowDown", after_s=2)] * 60
        uploading = site.send(image_workflow())
        await_that("its upload is under way", lambda: site.runs(uploading, "success"))
        running = site.send(image_workflow(600))
        await_that("a job runs beside it", lambda: site.runs(running))
        machine.metadata["spot/instance-action"] = json.dumps({"action": "terminate"})
        await_that("all messages are back", lambda: site.depth() == (3, 0), limit_s=110)
    assert not site.result(uploading)
    assert not site.result(running)
    calls.faults.clear()
    await_that("it goes", lambda: "Hands the instance back" in site.log())


# --- Fetching ahead --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("waiting", "others", "in_hand", "last_run_s", "running_s", "may"),
    [
        pytest.param(1, 0, 1, 5.0, 0.0, True, id="alone, and one waits"),
        pytest.param(0, 0, 1, 5.0, 0.0, False, id="nothing waits"),
        pytest.param(3, 3, 1, 5.0, 0.0, False, id="each of the others, booting or not, is to find one"),
        pytest.param(4, 3, 1, 5.0, 0.0, True, id="each of them does"),
        pytest.param(9, 0, 2, 5.0, 0.0, False, id="one ahead is enough"),
        pytest.param(9, 0, 2, 0.1, 0.0, True, id="two where jobs are shorter than it takes to fetch one"),
        pytest.param(9, 5, 2, 0.1, 0.0, False, id="but then the others are to find two"),
        pytest.param(99, 0, LANES, 0.0, 0.0, False, id="never more than there are lanes"),
        pytest.param(99, 0, 1, AHEAD_LIMIT_S + 1.0, 0.0, False, id="jobs are long"),
        pytest.param(99, 0, 1, 5.0, AHEAD_LIMIT_S + 1.0, False, id="this one turns out long"),
        pytest.param(99, 0, 1, None, 0.0, False, id="nothing is known of how long they are"),
    ],
)
def test_who_fetches_ahead(
    waiting: int, others: int, in_hand: int, last_run_s: float | None, running_s: float, may: bool
) -> None:
    assert may is may_fetch_ahead(
        waiting=waiting, others=others, in_hand=in_hand, last_run_s=last_run_s, running_s=running_s
    )


# --- Replacing outdated instances ------------------------------------------------------------------------

BUSY = QueueDepth(3, 2)


@pytest.mark.parametrize(
    ("group_now", "depth", "has_come", "is_ready", "step"),
    [
        pytest.param(Group(2, 0, 4, ["a", "b"], ()), BUSY, False, False, "", id="nobody is outdated"),
        pytest.param(Group(2, 0, 4, ["a", "b"], ("a", "b")), BUSY, False, False, "launch", id="another first"),
        pytest.param(Group(2, 0, 4, ["0", "a"], ("0", "a")), BUSY, False, False, "", id="not its turn"),
        pytest.param(Group(3, 0, 4, ["a", "b"], ("a", "b")), BUSY, False, False, "", id="one is on its way"),
        pytest.param(Group(3, 0, 4, ["a", "b", "n"], ("a", "b")), BUSY, True, False, "", id="it still boots"),
        pytest.param(Group(3, 0, 4, ["a", "b", "n"], ("a", "b")), BUSY, True, True, "leave", id="it is ready"),
        pytest.param(Group(4, 0, 4, ["a", "b", "n", "m"], ("a", "b")), BUSY, False, False, "swap", id="no room"),
        pytest.param(Group(1, 0, 1, ["a"], ("a",)), BUSY, False, False, "swap", id="no room, the only one"),
        pytest.param(Group(2, 0, 4, ["0", "a"], ("0", "a")), EMPTY, False, False, "leave", id="nobody needs it"),
        pytest.param(Group(1, 1, 4, ["a"], ("a",)), EMPTY, False, False, "launch", id="idle, at the minimum"),
        pytest.param(Group(1, 0, 4, ["a"], ("a",)), QueueDepth(0, 1), False, False, "launch", id="a job runs"),
    ],
)
def test_what_an_outdated_instance_does(
    group_now: Group, depth: QueueDepth, has_come: bool, is_ready: bool, step: str
) -> None:
    assert replacement_step(group_now, "a", depth, has_come=has_come, is_ready=is_ready) == step


def test_the_one_that_came_is_told_from_those_that_were_there() -> None:
    replacement = Replacement()
    there = Group(2, 0, 4, ["a", "b", "n"], ("a",))
    assert replacement.step(Group(3, 0, 4, ["a", "b", "n"], ("a",)), "a", BUSY, now=0) == "launch"
    assert replacement.step(there._replace(desired=4), "a", BUSY, now=10) == ""
    assert not replacement.is_due
    come = Group(4, 0, 4, ["a", "b", "n", "new"], ("a",))
    replacement.step(come, "a", BUSY, now=20)
    replacement.step(come, "a", BUSY, now=20 + READY_S - 1)
    assert not replacement.is_due
    replacement.step(come, "a", BUSY, now=20 + READY_S)
    assert (replacement.is_due, replacement.decrement) == (True, True)


# --- Figures and calls -----------------------------------------------------------------------------------


def receipt(wait_s: float, run_s: float, error: str | None = None) -> dict[str, Any]:
    return {"error": error and {"message": error}, "timings": {"wait_s": wait_s, "run_s": run_s}}


def test_each_minute_has_its_figures() -> None:
    metrics = Metrics()
    now = metrics._minute_began
    for number in range(61):
        metrics.tick(now + number, busy=number <= 15)
    assert [figure["MetricName"] for figure in metrics.due(now + 60, last=False)] == ["BusyShare"]
    for job in (receipt(1.24, 2), receipt(1.21, 3), receipt(9, 3, "no")):
        metrics.add_job(job)
    figures = {figure["MetricName"]: figure for figure in metrics.due(now + 61, last=True)[1:]}
    assert figures["JobsSucceeded"]["Value"] == 2
    assert figures["JobsFailed"]["Value"] == 1
    assert (figures["WaitSeconds"]["Values"], figures["WaitSeconds"]["Counts"]) == ([1.2, 9.0], [2.0, 1.0])
    assert metrics.due(now, last=True)[0]["Value"] == 25.0, "it waits until it has been sent"


def test_an_idle_workers_minutes_are_sent_five_at_once_and_figures_never_pile_up() -> None:
    metrics = Metrics()
    start = metrics._minute_began
    for minute in range(1, 5):
        metrics.tick(start + 60 * minute, busy=False)
        assert not metrics.due(start + 60 * minute, last=False)
    metrics.tick(start + 300, busy=False)
    assert len(metrics.due(start + 300, last=False)) == 5
    metrics.sent(5)
    for minute in range(6, 1000):
        metrics.add_job(receipt(minute, minute * 1.7))
        metrics.tick(start + 60 * minute, busy=True)
    for second in range(1000):
        metrics.add_job(receipt(second, second))
    figures = metrics.due(start, last=True)
    assert len(figures) <= METRICS_KEPT
    assert max(len(figure.get("Values", ())) for figure in figures) <= 150, "CloudWatch takes no more"


def test_the_figures_reach_cloudwatch_and_a_refusal_is_said_once(
    cloud: LocalCloud, fleet: Fleet, calls: Calls
) -> None:
    site, _ = fleet
    speed_up(site, {"METRIC_S = 60": "METRIC_S = 1"})
    report = {"phases": {"mount": 1.5}, "comfyui_started_at": time.time()}
    (site.folder / "logs/boot.json").write_text(json.dumps(report))
    calls.faults["PutMetricData"] = [Fault(403, "AccessDenied")] * 2
    start(site)
    assert site.await_result(site.send(image_workflow(3)))["status"] == "succeeded"

    def published() -> set[str]:
        found = cloud.client("cloudwatch").list_metrics(Namespace=f"{site.prefix}/{site.env}")["Metrics"]
        return {metric["MetricName"] for metric in found}

    expected = {"BusyShare", "JobsSucceeded", "WaitSeconds", "RunSeconds", "BootSeconds"}
    await_that("all figures are there", lambda: published() == expected)
    assert site.log().count("Cannot publish figures") == 1
    assert "cloudwatch:PutMetricData)" in site.log()


def speed_up(site: Site, changes: dict[str, str]) -> None:
    """Change constants of the site's own worker."""
    script = site.folder / "parse_job.py"
    text = script.read_text()
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    script.write_text(text)


@pytest.mark.slow
def test_an_idle_worker_makes_five_calls_a_minute(cloud: LocalCloud, fleet: Fleet, calls: Calls) -> None:
    site, _ = fleet
    update_group(cloud, site, MinSize=1)
    text = (site.folder / "env").read_text()
    (site.folder / "env").write_text(text.replace("SCALE_COOLDOWN=2", "SCALE_COOLDOWN=18"))
    # Ten times as fast as in life: a minute takes six seconds.
    tenth = {"POLL_S = 20": "POLL_S = 2", "GROUP_AGE_S = 300": "GROUP_AGE_S = 30", "LOG_UPLOAD_S = 300": "LOG_UPLOAD_S = 30", "METRIC_S = 60": "METRIC_S = 6", "2 * POLL_S - 1": "2 * POLL_S - 0.1"}  # fmt: skip
    speed_up(site, tenth)
    start(site)
    site.await_result(site.send(image_workflow()))
    site.await_empty_queue()
    calls.await_more("GetQueueAttributes", 2)
    began = len(calls.seen)
    limit = time.monotonic() + 30
    await_that("five minutes pass", lambda: time.monotonic() > limit)
    seen = [name for name in calls.seen[began:] if name != "DescribeAlarms"]
    assert len(seen) <= 26, Counter(seen)
    assert seen.count("ReceiveMessage") >= 10, "it did poll all the time"
