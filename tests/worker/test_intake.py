"""The loop that takes messages: the next jobs stand in ComfyUI's queue while one runs."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime

import pytest
from local_cloud import LocalCloud
from workplace import LIMIT_S, Site, await_that, image_workflow
from workshop import NO_RESULT_YET, Fleet, fetch_ahead, fetch_one_ahead, pending, speed_up, start, started_and_ended

from comfy_utils import new_job_id


def test_the_next_job_stands_in_comfyuis_queue_and_times_are_honest(make_site: Callable[..., Site]) -> None:
    site = make_site(JOB_TIMEOUT="4")
    start(site)
    first, second = fetch_one_ahead(site, 3, image_workflow(2))  # it may run for 4 s, and is in hand for 5
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
    site = make_site()
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
    site = make_site(JOB_TIMEOUT="3")
    start(site)
    first, second = fetch_one_ahead(site, 600, image_workflow(1))
    assert site.await_result(first)["error"]["kind"] == "timeout"
    result = site.await_result(second)
    assert (result["status"], result["attempt"]) == ("succeeded", 1)
    assert (site.runs(second), site.runs(second, "interrupted")) == (1, 0)


def test_behind_a_job_that_turns_out_long_nobody_waits(make_site: Callable[..., Site]) -> None:
    site = make_site()
    speed_up(site, "worker/scaling.py", {"AHEAD_LIMIT_S = 60": "AHEAD_LIMIT_S = 3"})
    start(site)
    first, second = fetch_one_ahead(site, 600)
    await_that("the second is given back", lambda: site.depth() == (1, 1))
    assert (site.runs(first), site.runs(second)) == (1, 0)


def test_the_same_job_twice_in_hand_is_run_once(make_site: Callable[..., Site]) -> None:
    site = make_site()
    start(site)
    job_id = new_job_id()
    fetch_ahead(site, 1, *[{"prompt": image_workflow(1), "job_id": job_id}] * 3)
    assert site.await_result(job_id)["attempt"] == 1
    site.await_empty_queue()
    assert site.runs(job_id) == 1
