"""A worker in its group: raising what is wanted, leaving, and what that costs in calls."""

from __future__ import annotations

import time
from collections import Counter

import pytest
from local_cloud import Fault, LocalCloud
from workplace import await_that, image_workflow
from workshop import Calls, Fleet, in_group, speed_up, start, update_group


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
    calls.next("TerminateInstanceInAutoScalingGroup", Fault(400, "ValidationError"))
    start(site)
    await_that("it stays", lambda: "Stays, the group is at its minimum" in site.log())
    assert site.await_result(site.send(image_workflow()))["status"] == "succeeded"
    await_that("it leaves in the end", lambda: not in_group(cloud, site)["Instances"])
    assert cloud.instance_state(machine.instance_id) == "terminated"
    assert "Traceback" not in site.log()


def test_failed_reads_change_nothing(cloud: LocalCloud, fleet: Fleet, calls: Calls) -> None:
    site, _ = fleet
    calls.next("DescribeAutoScalingGroups", Fault(503, "ServiceUnavailable"), times=4)
    calls.next("GetQueueAttributes", Fault(400, "Throttling"), times=4)
    start(site)
    await_that("reads have failed", lambda: not calls.faults_left())
    assert "TerminateInstanceInAutoScalingGroup" not in calls.seen
    assert "SetDesiredCapacity" not in calls.seen
    await_that("it leaves once it can read", lambda: not in_group(cloud, site)["Instances"])


@pytest.mark.slow
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
        assert in_group(cloud, site)["DesiredCapacity"] == 3, "ceil(8 / 3)"
    finally:
        cloud.launch_failure = None
    await_that("they come", lambda: len(in_group(cloud, site)["Instances"]) == 3)
    site.await_empty_queue()
    assert site.log().count("AWS has no g5.2xlarge free") == 1


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
    assert in_group(cloud, site)["DesiredCapacity"] == 0
    assert site.await_result(job_id)["status"] == "succeeded"
    assert site.runs(job_id) == 1
    await_that("it leaves, although no fewer can be wanted", lambda: not in_group(cloud, site)["Instances"])
    assert in_group(cloud, site)["DesiredCapacity"] == 0


@pytest.mark.slow
def test_an_idle_worker_makes_six_calls_a_minute(cloud: LocalCloud, fleet: Fleet, calls: Calls) -> None:
    site, _ = fleet
    update_group(cloud, site, MinSize=1)
    text = (site.folder / "env").read_text()
    (site.folder / "env").write_text(text.replace("SCALE_COOLDOWN=2", "SCALE_COOLDOWN=18"))
    # Ten times as fast as in life: a minute takes six seconds.
    speed_up(site, "worker/reports.py", {"LOGS_EVERY_S = 300": "LOGS_EVERY_S = 30"})
    speed_up(
        site,
        "worker/dead_letters.py",
        {"LOOK_S, LONGEST_PAUSE_S = 60.0, 300.0": "LOOK_S, LONGEST_PAUSE_S = 6.0, 30.0"},
    )
    speed_up(site, "worker/metrics.py", {"METRIC_S = 60": "METRIC_S = 6"})
    group = {"POLL_S = 20": "POLL_S = 2", "GROUP_AGE_S = 300": "GROUP_AGE_S = 30"}
    speed_up(site, "worker/group.py", group | {"2 * POLL_S - 1": "2 * POLL_S - 0.1"})
    start(site)
    site.await_result(site.send(image_workflow()))
    site.await_empty_queue()
    calls.await_more("GetQueueAttributes", 2)
    began, began_at = len(calls.seen), time.monotonic()
    await_that("five minutes pass", lambda: time.monotonic() > began_at + 30)
    minutes = (time.monotonic() - began_at) / 6
    # It reports for work three times at first, and no more.
    seen = [name for name in calls.seen[began:] if name not in ("DescribeAlarms", "CompleteLifecycleAction")]
    assert len(seen) <= 6 * minutes + 2, Counter(seen)
    assert seen.count("ReceiveMessage") >= 10, "it did poll all the time"
