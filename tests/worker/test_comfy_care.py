"""ComfyUI that is not there yet, fails, hangs, is slow, or runs out of memory."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import requests
from local_cloud import LocalCloud
from workplace import LIMIT_S, Site, await_that, group_of, image_workflow
from workshop import (
    NO_RESULT_YET,
    Fleet,
    fetch_ahead,
    fetch_one_ahead,
    make_worker,
    speed_up,
    start,
    with_node,
)

from comfy_utils import new_job_id
from ground.comfyui import ComfyAbsentError, Finished
from worker.comfy_care import ComfyCare
from worker.errors import ComfyDiedError, NeverStartedError

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


def test_a_job_that_kills_comfyui_each_time_costs_no_instance_and_no_other_job(fleet: Fleet) -> None:
    site, machine = fleet
    site.keep_comfyui()
    site.start_worker()
    killer, *innocent = fetch_ahead(site, 1, with_node("StandinCrash"), *[image_workflow()] * 4)[1]
    result = site.await_result(killer)
    assert (result["error"]["kind"], result["attempt"]) == ("comfyui_died", 2)
    assert (result["error"]["node_id"], result["error"]["node_type"]) == ("4", "StandinCrash")
    assert [line.split(",")[0] for line in result["error"]["detail"].splitlines()] == ["attempt 1", "attempt 2"]
    assert site.runs(killer) == 2
    for job_id in innocent:
        assert (site.await_result(job_id)["error"], site.await_result(job_id)["attempt"]) == (None, 1)
    assert "declared Unhealthy" not in site.log()
    assert machine.is_on()
    site.await_empty_queue()
    assert site.depth(site.dlq_url) == (0, 0), "it is final"


def run_in(care: ComfyCare, job_id: str) -> None:
    """Run a job that nobody stops or asks about."""
    nothing: dict[str, Any] = dict.fromkeys(("on_progress", "before_first_submit"), lambda *_: None)
    nothing |= dict.fromkeys(("should_stop", "should_withdraw"), lambda: False)
    care.run({}, job_id, extra_data={}, has_died=False, is_whole=lambda _: True, on_picture=None, **nothing)


@pytest.mark.parametrize("first_ends", [False, True])
def test_of_two_jobs_the_later_one_was_running(
    make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch, first_ends: bool
) -> None:
    """Where both have begun, for the first's end was not heard any more; or its end was, and the second's start not."""
    care = make_worker(make_site(), monkeypatch).care
    both_have_begun = threading.Barrier(2)
    first_has_begun = threading.Event()

    def end_with_comfyui(_: object, job_id: str, **call: Any) -> None:
        if job_id == "second":
            first_has_begun.wait(LIMIT_S)
        call["on_submitted"](1 if job_id == "first" else 2)
        if job_id == "first" or not first_ends:
            call["on_progress"]({"type": "execution_start"})
        if job_id == "first" and first_ends:
            call["on_progress"]({"type": "execution_success"})
        first_has_begun.set()
        both_have_begun.wait(LIMIT_S)
        raise ComfyAbsentError

    def blamed(job_id: str) -> bool:
        with pytest.raises((ComfyDiedError, NeverStartedError)) as raised:
            run_in(care, job_id)
        return raised.type is ComfyDiedError

    monkeypatch.setattr(care.comfy, "run", end_with_comfyui)
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(blamed, ("first", "second"))) == [False, True]


def test_a_job_that_waits_for_its_second_try_is_not_the_one_that_ran(
    make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first one was short of memory, and it stands behind the job at which ComfyUI ends."""
    care = make_worker(make_site(), monkeypatch).care
    messages = [["execution_error", {"exception_type": "torch.OutOfMemoryError", "exception_message": ""}]]
    entry = {"status": {"status_str": "error", "messages": messages}}

    def run(*_: object, again: bool, **call: Any) -> Finished:
        if again:
            raise ComfyAbsentError
        call["on_submitted"](1)
        call["on_progress"]({"type": "execution_start"})
        return Finished(entry, {}, None)

    monkeypatch.setattr(care.comfy, "run", run)
    with pytest.raises(NeverStartedError):
        run_in(care, "j")


def test_a_job_at_which_comfyui_died_runs_alone_next_time(make_site: Callable[..., Site], tmp_path: Path) -> None:
    site = make_site(SCALE_COOLDOWN="2")
    site.keep_comfyui()
    site.start_worker()
    again = image_workflow(3, {"4": {"class_type": "StandinCrash", "inputs": {"once": str(tmp_path / "crashed")}},
                               "5": {"class_type": "PreviewImage", "inputs": {"images": ["4", 0]}}})  # fmt: skip
    _, (suspect,) = fetch_ahead(site, 1, again)
    await_that("it runs again", lambda: site.runs(suspect) == 2)
    others = [site.send(image_workflow()) for _ in range(3)]
    beside: set[str] = set()
    while site.result(suspect) is NO_RESULT_YET:
        queue = requests.get(f"http://127.0.0.1:{site.port}/queue", timeout=LIMIT_S).json()
        if suspect in [item[1] for item in queue["queue_running"]]:
            beside.update(item[1] for item in queue["queue_pending"])
    assert not beside
    results = [site.await_result(job_id) for job_id in (suspect, *others)]
    assert [(result["error"], result["attempt"]) for result in results] == [(None, 2)] + [(None, 1)] * 3


def test_a_link_that_would_end_the_executor_is_refused(busy_site: Site) -> None:
    """An input that its node does not know, linked to a node that is not there: ComfyUI takes that."""
    bad = image_workflow()
    bad["2"]["inputs"]["stale"] = ["77", 0]
    error = busy_site.await_result(busy_site.send(bad))["error"]
    assert error["kind"] == "invalid_workflow"
    assert error["message"].startswith("node 2 StandinSleep: its input stale is linked to a node that is not there")
    harmless = image_workflow(more={"9": {"class_type": "StandinSleep", "inputs": {"stale": ["77", 0]}}})
    results = [busy_site.await_result(busy_site.send(workflow)) for workflow in (harmless, image_workflow())]
    assert [result["error"] for result in results] == [None, None]


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


def test_a_job_that_hangs_when_the_worker_comes_does_not_hold_up_the_others(make_site: Callable[..., Site]) -> None:
    """Its worker was killed, so nobody else notices."""
    site = make_site(JOB_TIMEOUT="3", MAX_RECEIVES="1")
    speed_up(site, "worker/comfy_care.py", {"INTERRUPT_S = 60": "INTERRUPT_S = 1"})
    site.keep_comfyui()
    orphan = new_job_id()
    body = {"prompt": with_node("StandinDeadExecutor"), "prompt_id": orphan}
    requests.post(f"http://127.0.0.1:{site.port}/prompt", json=body, timeout=LIMIT_S).raise_for_status()
    await_that("it hangs", lambda: site.runs(orphan))
    site.start_worker()
    result = site.await_result(site.send(image_workflow()))
    assert (result["error"], result["attempt"]) == (None, 1), "ComfyUI did not end at this one"


def test_a_comfyui_that_fails_with_different_jobs_costs_the_instance_its_place(
    cloud: LocalCloud, fleet: Fleet
) -> None:
    site, machine = fleet
    site.keep_comfyui()
    site.start_worker()
    for _ in range(3):
        site.send(with_node("StandinCrash"))
    await_that("the instance is declared Unhealthy", lambda: "3 different jobs in a row" in site.log())
    await_that("the instance is replaced", lambda: cloud.instance_state(machine.instance_id) == "terminated")
    group = group_of(cloud, f"{site.prefix}-{site.env}-asg")
    assert group["DesiredCapacity"] == 1
    assert machine.instance_id not in [instance["InstanceId"] for instance in group["Instances"]]
    await_that("the messages are back", lambda: site.depth() == (3, 0))


def test_a_comfyui_that_ends_at_its_warm_up_costs_the_instance_its_place(fleet: Fleet) -> None:
    site, machine = fleet
    (site.folder / "warm-up.json").write_text(json.dumps(with_node("StandinCrash")))
    site.variables["WARMUP_WORKFLOW"] = "warm-up.json"
    site.keep_comfyui()
    site.start_worker()
    await_that("the instance is declared Unhealthy", lambda: "ended at its warm-up, 2 times" in site.log())
    assert machine


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
    care = ComfyCare(*[None] * 5)  # type: ignore[arg-type]
    care._restart(time.monotonic())
    assert killed == []
    assert care._answered_at, "it is given time to come up"
