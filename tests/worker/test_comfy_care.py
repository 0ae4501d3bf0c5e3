"""ComfyUI that is not there yet, fails, hangs, is slow, or runs out of memory."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import pytest
import requests
from local_cloud import LocalCloud
from workplace import LIMIT_S, Site, await_that, group_of, image_workflow
from workshop import NO_RESULT_YET, Fleet, fetch_one_ahead, start, with_node

from worker.comfy_care import ComfyCare

# --- Ready or not ----------------------------------------------------------------------------------------


def test_the_worker_waits_for_comfyui_ready_to_receive(make_site: Callable[..., Site]) -> None:
    site = make_site(WARMUP_WORKFLOW="warm-up.json", STALL_TIMEOUT="2")
    (site.folder / "warm-up.json").write_text(json.dumps(image_workflow()))
    job_id = site.send(image_workflow())
    site.start_worker()
    await_that("it waits", lambda: "Waiting for ComfyUI" in site.log())
    assert "Restarting ComfyUI" not in site.log(), "it may copy models for long"
    assert site.depth() == (1, 0)
    site.start_comfyui()
    answered_at = time.time()
    started_at = datetime.fromisoformat(site.await_result(job_id)["timings"]["started_at"]).timestamp()
    assert started_at - answered_at < 5, "0.1 s and the warm-up on a quiet machine: see bench_worker.py"
    assert 0 < site.log().find("Warmed up with") < site.log().find("attempt 1")
    site.await_empty_queue()
    await_that("what the warm-up made is thrown away", lambda: not list((site.folder / "job-output").iterdir()))


def test_a_warm_up_that_fails_does_not_stop_the_worker(make_site: Callable[..., Site]) -> None:
    site = make_site(WARMUP_WORKFLOW="absent.json")
    start(site)
    assert site.await_result(site.send(image_workflow()))["status"] == "succeeded"
    assert f"Cannot warm up with WARMUP_WORKFLOW={site.folder}/absent.json" in site.log()


# --- Out of memory ---------------------------------------------------------------------------------------


def test_out_of_memory_is_tried_again_on_freed_memory(busy_site: Site) -> None:
    more = {
        "4": {"class_type": "StandinOutOfMemory", "inputs": {"image": ["1", 0], "times": 1}},
        "5": {"class_type": "SaveImage", "inputs": {"images": ["4", 0], "filename_prefix": "y"}},
    }
    job_id = busy_site.send(image_workflow(more=more))
    result = busy_site.await_result(job_id)
    assert (result["status"], result["attempt"]) == ("succeeded", 1)
    assert busy_site.runs(job_id) == 2


@pytest.mark.slow
def test_out_of_memory_again_and_again_ends_in_the_dead_letter_queue(make_site: Callable[..., Site]) -> None:
    site = make_site()
    start(site)
    job_id = site.send(with_node("StandinOutOfMemory", times=1000))
    await_that("the message is in the DLQ", lambda: site.depth(site.dlq_url)[0] == 1)
    assert site.result(job_id) is None
    assert site.runs(job_id) == 4, "twice at first, and once more each time it came back"


def test_out_of_memory_leaves_the_job_behind_it_alone(make_site: Callable[..., Site]) -> None:
    site = make_site()
    start(site)
    more = {
        "4": {"class_type": "StandinOutOfMemory", "inputs": {"image": ["2", 0], "times": 1}},
        "5": {"class_type": "SaveImage", "inputs": {"images": ["4", 0], "filename_prefix": "y"}},
    }
    site.await_result(site.send(image_workflow()))
    first = site.send(image_workflow(2, more))
    second = site.send(image_workflow(1))
    results = [site.await_result(job_id) for job_id in (first, second)]
    assert [(result["status"], result["attempt"]) for result in results] == [("succeeded", 1)] * 2
    assert (site.runs(first), site.runs(second)) == (2, 1)


# --- Failures --------------------------------------------------------------------------------------------


def test_a_job_outlives_its_socket(busy_site: Site) -> None:
    job_id = busy_site.send(image_workflow(3))
    await_that("the job runs", lambda: busy_site.runs(job_id))
    requests.post(f"http://127.0.0.1:{busy_site.port}/standin/cut-sockets", timeout=LIMIT_S).raise_for_status()
    result = busy_site.await_result(job_id)
    assert (result["status"], result["attempt"]) == ("succeeded", 1)
    assert busy_site.runs(job_id) == 1


def test_a_comfyui_that_is_only_slow_does_not_lose_its_job(make_site: Callable[..., Site]) -> None:
    site = make_site()
    comfyui = site.start_comfyui()
    site.start_worker()
    job_id = site.send(image_workflow(3))
    await_that("the job runs", lambda: site.runs(job_id))
    os.kill(comfyui.pid, 19)  # SIGSTOP: connections are taken, nothing is answered
    threading.Timer(13, lambda: os.kill(comfyui.pid, 18)).start()  # longer than a call's limit of 10 s
    result = site.await_result(job_id)
    assert (result["status"], result["attempt"]) == ("succeeded", 1)
    assert site.runs(job_id) == 1


def test_comfyui_dies_and_the_job_is_run_again(make_site: Callable[..., Site]) -> None:
    site = make_site()
    comfyui = site.start_comfyui()
    site.start_worker()
    early = {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "early"}}
    job_id = site.send(image_workflow(4, {"4": early}))
    saved = site.folder / "job-output" / job_id / "early_00001_.png"
    await_that("a file is saved", saved.exists)
    comfyui.kill()
    comfyui.wait()
    await_that("the worker noticed", lambda: "is put back" in site.log())
    assert site.result(job_id) is NO_RESULT_YET
    site.start_comfyui()
    result = site.await_result(job_id)
    assert (result["status"], result["attempt"]) == ("succeeded", 2)
    files = sorted(output["filename"] for output in result["outputs"])
    assert files == ["early_00001_.png", "x_00001_.png"], "nothing of the try that was cut short"


def test_comfyui_dies_with_two_jobs_and_that_counts_once(fleet: Fleet) -> None:
    site, machine = fleet
    comfyui = site.start_comfyui()
    site.start_worker()
    first, second = fetch_one_ahead(site, 15)
    comfyui.kill()
    comfyui.wait()
    await_that("the first is put back", lambda: "is put back" in site.log())
    site.start_comfyui()
    results = [site.await_result(job_id) for job_id in (second, first)]
    assert [(result["error"], result["attempt"]) for result in results] == [(None, 1), (None, 2)]
    assert site.log().count("is put back") == 1, "the one that never ran has used up no attempt"
    assert "declared Unhealthy" not in site.log()
    assert machine.is_on()
    assert (site.runs(first), site.runs(second)) == (2, 1)


@pytest.mark.slow
def test_a_job_that_kills_comfyui_each_time_ends_in_the_dead_letter_queue(make_site: Callable[..., Site]) -> None:
    site = make_site()
    site.keep_comfyui()
    site.start_worker()
    crash = {"4": {"class_type": "StandinCrash", "inputs": {"image": ["1", 0]}},
             "5": {"class_type": "SaveImage", "inputs": {"images": ["4", 0], "filename_prefix": "y"}}}  # fmt: skip
    job_id = site.send(image_workflow(more=crash))
    await_that("the message is in the DLQ", lambda: site.depth(site.dlq_url)[0] == 1)
    assert site.result(job_id) is NO_RESULT_YET
    assert site.log().count("is put back") == 3


def test_a_dead_executor_is_restarted_and_the_job_run_again(make_site: Callable[..., Site]) -> None:
    site = make_site(STALL_TIMEOUT="3")
    site.keep_comfyui()
    site.start_worker()
    workflow = with_node("StandinDeadExecutor")
    job_id = site.send(workflow)
    await_that("ComfyUI is restarted", lambda: "Restarting ComfyUI" in site.log())
    assert site.result(job_id) is None
    await_that("it is run again", lambda: site.runs(job_id) >= 2)
    assert site.await_result(site.send(image_workflow()))["status"] == "succeeded"


def test_a_comfyui_that_fails_twice_costs_the_instance_its_place(cloud: LocalCloud, fleet: Fleet) -> None:
    site, machine = fleet
    site.keep_comfyui()
    site.start_worker()
    site.send(with_node("StandinCrash"))
    await_that("the instance is declared Unhealthy", lambda: "declared Unhealthy" in site.log())
    await_that("the instance is replaced", lambda: cloud.instance_state(machine.instance_id) == "terminated")
    group = group_of(cloud, f"{site.prefix}-{site.env}-asg")
    assert group["DesiredCapacity"] == 1
    assert machine.instance_id not in [instance["InstanceId"] for instance in group["Instances"]]
    await_that("the message is back", lambda: site.depth() == (1, 0))


@pytest.mark.parametrize("shown", ["0", "", "-1", "[not set]"])
def test_where_systemd_has_no_comfyui_nothing_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shown: str
) -> None:
    """To os.kill, 0 and -1 are whole groups of processes, this one among them."""
    (tmp_path / "systemctl").write_text(f"#!/bin/sh\necho '{shown}'\n")
    (tmp_path / "systemctl").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    killed: list[int] = []
    monkeypatch.setattr(os, "kill", lambda pid, _: killed.append(pid))
    care = ComfyCare(*[None] * 3)  # type: ignore[arg-type]
    care._restart(time.monotonic())
    assert killed == []
    assert care._answered_at, "it is given time to come up"
