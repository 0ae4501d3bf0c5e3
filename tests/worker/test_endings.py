"""Every way in which a job ends, or fails to: the table in docs/results.md, row by row, with a real worker."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from local_cloud import Fault
from places import ROOT
from workplace import Site, await_that, image_workflow
from workshop import Calls, receiver, speed_up, with_node

Body = dict[str, Any]


@dataclass
class Road:
    """What a road is driven with."""

    make_site: Callable[..., Site]
    calls: Calls
    tmp_path: Path
    callback_url: str
    accepts: bool = True  # the receiver of callbacks
    heard: list[Body] = field(default_factory=list)  # what it accepted

    def drive(self, body: object, *, keep: bool = False, last: bool = False, **settings: str) -> tuple[Site, str]:
        """A site with this job on its queue, ComfyUI (again and again, if `keep`) and a worker."""
        if last:  # the first attempt is
            settings["MAX_RECEIVES"] = "1"
        site = self.make_site(CALLBACK_URL=self.callback_url, **settings)
        pauses = {"LOOK_S, LONGEST_PAUSE_S = 60.0, 300.0": "LOOK_S, LONGEST_PAUSE_S = 1.0, 5.0"}
        speed_up(site, "worker/dead_letters.py", pauses)
        job_id = site.send(body)
        site.keep_comfyui() if keep else site.start_comfyui()
        return site, job_id

    def go(self, body: object, *, keep: bool = False, last: bool = False, **settings: str) -> tuple[Site, str]:
        """The same, with a worker."""
        site, job_id = self.drive(body, keep=keep, last=last, **settings)
        site.start_worker()
        return site, job_id


def dies_once(road: Road) -> tuple[Site, str]:
    return road.go(with_node("StandinCrash", once=str(road.tmp_path / "crashed")), keep=True)


def dies_at_the_end(road: Road) -> tuple[Site, str]:
    return road.go(with_node("StandinCrash"), keep=True, last=True)


def dies_twice(road: Road) -> tuple[Site, str]:
    return road.go(with_node("StandinCrash", seconds=0.0), keep=True)


def hangs(road: Road) -> tuple[Site, str]:
    return road.go(with_node("StandinDeadExecutor"), keep=True, STALL_TIMEOUT="2")


def is_gone(road: Road) -> tuple[Site, str]:
    """ComfyUI ends while another's job runs, before it comes to this one, and does not come back."""
    site = road.make_site(CALLBACK_URL=road.callback_url, SCALE_COOLDOWN="2", MAX_RECEIVES="1")
    speed_up(site, "worker/comfy_care.py", {"COMFY_BACK_S = 60": "COMFY_BACK_S = 1"})
    site.start_comfyui()
    site.start_worker()
    site.await_result(site.send(image_workflow()))
    first = site.send(with_node("StandinCrash", seconds=4.0))
    await_that("the first runs", lambda: site.runs(first))
    job_id = site.send(image_workflow())
    site.await_result(job_id)
    site.start_comfyui()  # or the worker receives nothing, and SQS moves nothing to the dead letters
    return site, job_id


def needs_too_much_memory(road: Road) -> tuple[Site, str]:
    return road.go(with_node("StandinOutOfMemory", times=1000), last=True)


def has_no_inputs(road: Road) -> tuple[Site, str]:
    workflow = image_workflow(more={"4": {"class_type": "LoadImage", "inputs": {"image": "a.png"}}})
    return road.go({"prompt": workflow, "inputs": {"a.png": "http://127.0.0.1:9/a.png"}}, last=True)


def meets_a_fault_of_ours(road: Road) -> tuple[Site, str]:
    site, job_id = road.drive(image_workflow(), last=True)
    speed_up(
        site,
        "worker/inputs.py",
        {
            "    def fetch(": "    def fetch(*_):\n        raise TypeError\n\n    def fetch_(",
        },
    )
    site.start_worker()
    return site, job_id


def meets_a_full_disk(road: Road) -> tuple[Site, str]:
    body = {"prompt": image_workflow(more={"4": {"class_type": "LoadImage", "inputs": {"image": "a.png"}}})}
    site, job_id = road.drive({**body, "inputs": {"a.png": "https://example.com/a.png"}}, last=True)
    full = 'raise OSError(28, "No space left on device")\n        with self._open('
    speed_up(site, "worker/inputs.py", {"with self._open(": full})
    site.start_worker()
    return site, job_id


def is_written_to_a_full_disk(road: Road) -> tuple[Site, str]:
    return road.go(with_node("StandinFullDisk", times=1000), last=True)


def makes_room(road: Road) -> tuple[Site, str]:
    return road.go(with_node("StandinFullDisk", times=1), last=True)


def meets_a_broken_s3(road: Road) -> tuple[Site, str]:
    """For longer than the worker's patience, at the end of its last attempt."""
    site, job_id = road.drive(image_workflow(), last=True)
    speed_up(site, "worker/retry.py", {"AWS_PATIENCE_S = 600": "AWS_PATIENCE_S = 0"})
    road.calls.next("PUT", Fault(503, "ServiceUnavailable"), times=10**6)
    site.start_worker()
    await_that("it is dead", lambda: sum(site.depth(site.dlq_url)) == 1)
    road.calls.forgive()
    return site, job_id


def cannot_be_deleted(road: Road) -> tuple[Site, str]:
    site, job_id = road.drive(image_workflow(), VISIBILITY_TIMEOUT="5")
    speed_up(site, "worker/retry.py", {"AWS_PATIENCE_S = 600": "AWS_PATIENCE_S = 0"})
    road.calls.next("DeleteMessageBatch", Fault(503, "ServiceUnavailable"), times=4)
    site.start_worker()
    return site, job_id


def is_refused_its_callback(road: Road) -> tuple[Site, str]:
    road.accepts = False
    site, job_id = road.go(image_workflow(), last=True)
    await_that("it is dead", lambda: site.depth(site.dlq_url)[0] == 1)
    assert road.heard == []
    road.accepts = True
    return site, job_id


def loses_its_worker(road: Road) -> tuple[Site, str]:
    site, job_id = road.go(image_workflow(3), VISIBILITY_TIMEOUT="300", last=True)
    await_that("it runs", lambda: site.runs(job_id))
    site.processes[-1].kill()
    site.processes[-1].wait()
    site.start_worker()
    return site, job_id


def loses_its_instance(road: Road) -> tuple[Site, str]:
    site, job_id = road.go(image_workflow(30), VISIBILITY_TIMEOUT="3", last=True)
    await_that("it runs", lambda: site.runs(job_id))
    site.processes[-1].kill()
    site.processes[-1].wait()
    shutil.rmtree(site.folder / "held")  # with the disk
    site.start_worker()
    return site, job_id


def is_stopped(road: Road) -> tuple[Site, str]:
    site, job_id = road.go(image_workflow(30), last=True)
    await_that("it runs", lambda: site.runs(job_id))
    os.kill(site.processes[-1].pid, signal.SIGTERM)
    site.processes[-1].wait()
    site.start_worker()  # which moves it to the dead letters
    return site, job_id


def loses_its_lease(road: Road) -> tuple[Site, str]:
    """What SQS says after twelve hours."""
    site, job_id = road.go(image_workflow(4), VISIBILITY_TIMEOUT="3")
    road.calls.next("ChangeMessageVisibility", Fault(400, "InvalidParameterValue"))
    return site, job_id


def cannot_be_read(road: Road) -> tuple[Site, str]:
    return road.go("{")


def cannot_be_run(road: Road) -> tuple[Site, str]:
    return road.go({"1": {"class_type": "NoSuchNode", "inputs": {}}})


def has_a_node_that_fails(road: Road) -> tuple[Site, str]:
    return road.go(image_workflow(more={"4": {"class_type": "LoadImage", "inputs": {"image": "broken.png"}},
        "5": {"class_type": "PreviewImage", "inputs": {"images": ["4", 0]}}}))  # fmt: skip


def takes_too_long(road: Road) -> tuple[Site, str]:
    return road.go(image_workflow(30), JOB_TIMEOUT="1")


def is_cancelled(road: Road) -> tuple[Site, str]:
    site, job_id = road.drive(image_workflow())
    site.s3.put_object(Bucket=site.bucket, Key=f"input/jobs/{job_id}.cancel", Body=b"")
    site.start_worker()
    return site, job_id


def is_a_command_that_fails(road: Road) -> tuple[Site, str]:
    return road.go({"exec_cmd": "false"}, EXEC_CMD="always")


def is_a_command_where_none_may_run(road: Road) -> tuple[Site, str]:
    return road.go({"exec_cmd": "true"})


def ends_well(road: Road) -> tuple[Site, str]:
    return road.go(image_workflow())


ROADS = {
    "it runs to its end": ends_well,
    "a node fails": has_a_node_that_fails,
    "ComfyUI refuses the workflow": cannot_be_run,
    "the message cannot be read": cannot_be_read,
    "it runs longer than `JOB_TIMEOUT`": takes_too_long,
    "its sender cancels it": is_cancelled,
    "a command ends with another code than 0": is_a_command_that_fails,
    "a command comes where `EXEC_CMD` forbids it": is_a_command_where_none_may_run,
    "ComfyUI ends while it runs, and not when it runs again": dies_once,
    "ComfyUI ends while it runs, twice": dies_twice,
    "ComfyUI says nothing of it for `STALL_TIMEOUT`, twice": hangs,
    "ComfyUI ends while it runs at its last attempt": dies_at_the_end,
    "ComfyUI ends before it comes to it, and does not come back": is_gone,
    "memory is too small, also when it was freed": needs_too_much_memory,
    "its inputs do not come": has_no_inputs,
    "the worker itself fails": meets_a_fault_of_ours,
    "the disk is full when its inputs come": meets_a_full_disk,
    "the disk is full when its files are written": is_written_to_a_full_disk,
    "the disk is full, until what no job needs is removed": makes_room,
    "S3 is down for longer than ten minutes": meets_a_broken_s3,
    "SQS is down for longer when it is to be deleted": cannot_be_deleted,
    "its callback is refused": is_refused_its_callback,
    "its worker is killed, once": loses_its_worker,
    "its instance is gone, or its worker is killed twice": loses_its_instance,
    "its worker is stopped, or its Spot instance taken away": is_stopped,
    "SQS holds its message no longer, after 12 hours": loses_its_lease,
}
NOT_DRIVEN = {"it waits on the queue for longer than SQS keeps messages"}
"""Nobody is there to write a receipt: see tests/sender/test_waiting.py."""


def rows() -> dict[str, list[str]]:
    """The table in the docs: what happens -> status or kind of error, where the message goes, when it is answered."""
    text = (ROOT / "docs/results.md").read_text().partition("## Every ending")[2].partition("\n## ")[0]
    table = [re.split(r" \| ", line.strip("| ")) for line in text.splitlines() if line.startswith("| ")]
    return {what: rest for what, *rest in table[1:]}


def test_every_road_is_in_the_docs() -> None:
    assert set(rows()) == set(ROADS) | NOT_DRIVEN


@pytest.mark.slow
@pytest.mark.sampled("roads", 12)
@pytest.mark.parametrize("what", ROADS)
def test_a_job_gets_its_answer(what: str, make_site: Callable[..., Site], calls: Calls, tmp_path: Path) -> None:
    def take(handler: BaseHTTPRequestHandler, body: bytes) -> None:
        if road.accepts:
            road.heard.append(json.loads(body))
        handler.send_response(204 if road.accepts else 503)
        handler.end_headers()

    with receiver(take) as url:
        road = Road(make_site, calls, tmp_path, url)
        site, job_id = ROADS[what](road)
        result = site.await_result(job_id)
        ending, place, _ = rows()[what]
        assert f"`{result['error']['kind'] if result['error'] else result['status']}`" == ending
        await_that("its callback is made", lambda: [each for each in road.heard if each["job_id"] == job_id])
        assert all(each == result for each in road.heard if each["job_id"] == job_id)
        is_dead = place == "dead-letter queue"
        await_that(
            f"the message is where the docs say: {place}",
            lambda: site.depth() == (0, 0) and (site.depth(site.dlq_url)[0] > 0) == is_dead,
        )
