"""What EC2 and the group want of an instance: it ends, drains, makes room or waits in the warm pool."""

from __future__ import annotations

import json
import socket
import time
from typing import Any

import pytest
from local_cloud import Fault, LocalCloud
from workplace import await_that, group_of, image_workflow
from workshop import NO_RESULT_YET, Calls, Fleet, in_group, start, update_group

from worker.shutdown import Shutdown
from worker.watchdog import Watchdog


def test_an_idle_worker_ends_its_instance(cloud: LocalCloud, fleet: Fleet) -> None:
    site, machine = fleet
    group = f"{site.prefix}-{site.env}-asg"
    start(site)
    job_id = site.send(image_workflow())
    assert site.await_result(job_id)["instance_id"] == machine.instance_id
    await_that("the group is empty", lambda: not group_of(cloud, group)["Instances"])
    assert group_of(cloud, group)["DesiredCapacity"] == 0
    assert f"output/{machine.instance_id}/parse_job.log" in site.keys("output/")


def test_a_job_is_finished_before_the_instance_goes(
    cloud: LocalCloud, fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    site, machine = fleet
    calls: list[str] = []
    monkeypatch.setattr(cloud, "fault", lambda _, operation: calls.append(operation))
    start(site)
    job_id = site.send(image_workflow(8))
    await_that("the job runs", lambda: site.runs(job_id))
    await_that("the worker has looked at the capacity", lambda: "DescribeAutoScalingGroups" in calls)
    cloud.client("autoscaling").terminate_instance_in_auto_scaling_group(
        InstanceId=machine.instance_id, ShouldDecrementDesiredCapacity=True
    )
    assert group_of(cloud, f"{site.prefix}-{site.env}-asg")["DesiredCapacity"] == 0
    waiting = site.send(image_workflow())
    assert site.await_result(job_id)["status"] == "succeeded"
    assert site.runs(job_id) == 1
    await_that("the instance is gone", lambda: cloud.instance_state(machine.instance_id) == "terminated")
    assert site.result(waiting) is NO_RESULT_YET, "nothing new is taken"
    group = group_of(cloud, f"{site.prefix}-{site.env}-asg")
    assert group["DesiredCapacity"] == 1, "the last look at the queue starts another instance"


def test_a_spot_notice_gives_the_job_back_at_once(fleet: Fleet) -> None:
    site, machine = fleet
    start(site)
    job_id = site.send(image_workflow(600))
    await_that("the job runs", lambda: site.runs(job_id))
    started = time.monotonic()
    machine.metadata["spot/instance-action"] = '{"action": "terminate", "time": "2026-01-01T00:00:00Z"}'
    await_that("the message is back", lambda: site.depth() == (1, 0))
    assert time.monotonic() - started < 60
    await_that("the logs are stored", lambda: f"output/{machine.instance_id}/parse_job.log" in site.keys("output/"))


def test_a_spot_notice_with_a_job_an_upload_and_messages_at_hand(fleet: Fleet, calls: Calls) -> None:
    site, machine = fleet
    start(site)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        called_back = site.send({"prompt": image_workflow(), "callback_url": url})
        await_that("its callback is under way", lambda: site.result(called_back))
        calls.next("PUT", Fault(503, "SlowDown", after_s=2), times=60)
        uploading = site.send(image_workflow())
        await_that("its upload is under way", lambda: site.runs(uploading, "success"))
        running = site.send(image_workflow(600))
        await_that("a job runs beside it", lambda: site.runs(running))
        machine.metadata["spot/instance-action"] = json.dumps({"action": "terminate"})
        await_that("all messages are back", lambda: site.depth() == (3, 0), limit_s=110)
    assert not site.result(uploading)
    assert not site.result(running)
    calls.forgive()
    await_that("it goes", lambda: "Hands the instance back" in site.log())


def test_a_hook_that_is_not_completed_runs_out(cloud: LocalCloud, fleet: Fleet) -> None:
    _, machine = fleet
    cloud.client("autoscaling").terminate_instance_in_auto_scaling_group(
        InstanceId=machine.instance_id, ShouldDecrementDesiredCapacity=True
    )
    assert machine.metadata["autoscaling/target-lifecycle-state"] == "Terminated"
    cloud.terminations[machine.instance_id].deadline = 0
    await_that("the instance is gone", lambda: cloud.instance_state(machine.instance_id) == "terminated")


def test_a_recommendation_to_rebalance(cloud: LocalCloud, fleet: Fleet) -> None:
    site, machine = fleet
    start(site)
    job_id = site.send(image_workflow(15))
    await_that("the job runs", lambda: site.runs(job_id))
    machine.metadata["events/recommendations/rebalance"] = '{"noticeTime": "2026-01-01T00:00:00Z"}'
    waiting = site.send(image_workflow())
    await_that("another is called for", lambda: len(in_group(cloud, site)["Instances"]) == 2)
    assert in_group(cloud, site)["DesiredCapacity"] == 1, "this one is wanted no more, and the message calls for one"
    assert not site.result(job_id)
    assert site.await_result(job_id)["status"] == "succeeded"
    await_that("it goes", lambda: cloud.instance_state(machine.instance_id) == "terminated")
    assert site.runs(waiting) == 0
    assert in_group(cloud, site)["DesiredCapacity"] == 1


def test_at_the_minimum_a_recommendation_to_rebalance_has_the_instance_replaced(
    cloud: LocalCloud, fleet: Fleet
) -> None:
    site, machine = fleet
    update_group(cloud, site, MinSize=1)
    start(site)
    machine.metadata["events/recommendations/rebalance"] = '{"noticeTime": "2026-01-01T00:00:00Z"}'
    await_that("it goes", lambda: cloud.instance_state(machine.instance_id) == "terminated")
    (other,) = in_group(cloud, site)["Instances"]
    assert other["InstanceId"] != machine.instance_id


def test_an_instance_of_the_warm_pool_takes_nothing(fleet: Fleet) -> None:
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
    assert list(site.depth()) == [1, 0], f"the job waits for somebody else: {site.log()}"
    machine.metadata["autoscaling/target-lifecycle-state"] = "InService"
    assert site.await_result(job_id)["status"] == "succeeded"


def test_a_job_on_its_last_attempt_is_run_while_the_group_takes_the_instance() -> None:
    shutdown = Shutdown(3, Watchdog())
    assert not shutdown.gives_back(1)
    shutdown.drain.set()
    assert [shutdown.gives_back(attempt) for attempt in (1, 2, 3)] == [True, True, False]
    shutdown.spot.set()
    assert shutdown.gives_back(3), "there is no time"
