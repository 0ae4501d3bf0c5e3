"""What is left of a job: its files in S3, its receipt, its progress."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from local_cloud import Fault
from places import ROOT
from workplace import LIMIT_S, Site, await_that, image_workflow
from workshop import Calls, cancel, make_worker, speed_up, start, started_and_ended

from comfy_utils import ENDED, Job, new_job_id, parse_ended_key, watched_key
from ground.answers import OutputFile
from worker import progress


def test_the_first_result_stands(make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch) -> None:
    site = make_site()
    worker = make_worker(site, monkeypatch)
    first = {"job_id": new_job_id(), "status": "succeeded"}
    assert worker.results.store(first) == first
    second = {**first, "status": "failed"}
    assert worker.results.store(second) == first
    assert site.result(first["job_id"]) == first
    (key,) = site.keys(ENDED)
    assert parse_ended_key(key) == (int(key[len(ENDED) :].partition("-")[0]), first["job_id"]), "listed once"


def test_a_receipt_stands_also_where_the_list_of_ended_jobs_cannot_be_written(
    make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch, calls: Calls
) -> None:
    site = make_site()
    worker = make_worker(site, monkeypatch)
    write = worker.results.bucket.write

    def refuse(key: str, body: bytes, **more: Any) -> None:
        calls.next("PUT", Fault(403, "AccessDenied"), times=int(key.startswith(ENDED)))
        write(key, body, **more)

    monkeypatch.setattr(worker.results.bucket, "write", refuse)
    made = {"job_id": new_job_id(), "status": "succeeded"}
    assert worker.results.store(made) == made
    assert (calls.faults_left(), site.result(made["job_id"]), site.keys(ENDED)) == (0, made, [])


def test_a_named_file_that_is_gone_is_no_success(
    make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = make_worker(make_site(), monkeypatch)
    stored = worker.results.store_files(new_job_id(), [OutputFile("9", "images", "gone.png", "x", "output")])
    assert stored == ([], ["node 9: its file output/x/gone.png is not there"], [])


def test_files_without_an_entry_in_the_history_are_stored(
    make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    site = make_site()
    worker = make_worker(site, monkeypatch)
    job_id = new_job_id()
    folder = site.folder / "job-output" / job_id / "loras"
    folder.mkdir(parents=True)
    (folder / "x.safetensors").write_bytes(b"weights")
    outputs = worker.results.store_files(job_id, []).outputs
    assert [(output["node_id"], output["s3_key"]) for output in outputs] == [
        (None, f"output/{job_id}/loras/x.safetensors")
    ]
    assert site.keys(f"output/{job_id}/") == [f"output/{job_id}/loras/x.safetensors"]


def test_files_are_uploaded_side_by_side_and_named_in_order(
    make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    site = make_site()
    worker = make_worker(site, monkeypatch)
    job_id = new_job_id()
    folder = site.folder / "job-output" / job_id
    folder.mkdir(parents=True)
    named = [OutputFile("9", "images", f"{number}.png", job_id, "output") for number in range(4)]
    for file in named:
        (folder / file.filename).write_text(file.filename)
    together = threading.Barrier(4)  # opens only when all four are under way
    put = worker.results.bucket.s3.put_object

    def put_object(**arguments: Any) -> Any:
        together.wait(LIMIT_S)
        return put(**arguments)

    monkeypatch.setattr(worker.results.bucket.s3, "put_object", put_object)
    outputs = worker.results.store_files(job_id, named).outputs
    assert [output["s3_key"] for output in outputs] == [f"output/{job_id}/{number}.png" for number in range(4)]
    assert len(site.keys(f"output/{job_id}/")) == 4


def test_a_file_that_mountpoint_has_written_costs_one_head(
    make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch, calls: Calls
) -> None:
    site = make_site(ENV="base")
    worker = make_worker(site, monkeypatch)
    job_id = new_job_id()
    path = site.folder / "ComfyUI/output" / job_id / "x.png"
    path.parent.mkdir()
    path.write_bytes(b"a picture")
    site.s3.put_object(Bucket=site.bucket, Key=f"output/{job_id}/x.png", Body=b"a picture")
    heads, puts, gets = (calls.count(method) for method in ("HEAD", "PUT", "GET"))
    outputs = worker.results.store_files(job_id, []).outputs
    assert [output["s3_key"] for output in outputs] == [f"output/{job_id}/x.png"]
    assert (heads(), puts(), gets()) == (1, 0, 0)
    path.write_bytes(b"another one")
    worker.results.store_files(job_id, [])
    assert puts() == 1, "another size"


def test_a_large_file_never_lies_in_memory(make_site: Callable[..., Site]) -> None:
    site = make_site()
    site.start_comfyui()
    worker = site.start_worker()
    site.await_result(site.send(image_workflow()))
    before = peak_mb(worker.pid)
    job_id = site.send(image_workflow(2))
    await_that("the job runs", lambda: site.runs(job_id))
    video = site.folder / "job-output" / job_id / "video.mp4"
    video.parent.mkdir(exist_ok=True)
    with video.open("wb") as file:
        file.truncate(300 * 2**20)
    result = site.await_result(job_id)
    size = site.s3.head_object(Bucket=site.bucket, Key=f"output/{job_id}/video.mp4")
    assert size["ContentLength"] == 300 * 2**20
    assert size["ETag"].strip('"').endswith("-38"), "in parts of 8 MB"
    assert len(result["outputs"]) == 2
    assert peak_mb(worker.pid) - before < 120


def peak_mb(pid: int) -> float:
    """The most memory a process has used."""
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024


def test_who_follows_each_step_hears_of_it_at_once(make_site: Callable[..., Site]) -> None:
    """Others hear every five seconds, here never."""
    site = make_site()
    speed_up(site, "worker/progress.py", {"PROGRESS_S = 5\n": "PROGRESS_S = 3600\n"})
    start(site)
    job_id = site.send({"prompt": image_workflow(600), "live": True})
    await_that("it tells of itself", lambda: site.keys(f"output/{job_id}/progress.json"))


def test_who_comes_later_is_looked_for_where_the_message_says_so(make_site: Callable[..., Site]) -> None:
    site = make_site()
    speed_up(site, "worker/progress.py", {"PROGRESS_S = 5\n": "PROGRESS_S = 3600\n"})
    site.variables["STANDIN_STEP_SECONDS"] = "0.5"
    start(site)
    workflow = json.loads((ROOT / "simple_workflow.json").read_text())
    workflow["3"]["inputs"]["steps"] = 1200
    job_id = site.send({"prompt": workflow, "live": "when watched"})

    def told() -> str:
        return str(site.s3.get_object(Bucket=site.bucket, Key=f"output/{job_id}/progress.json")["ETag"])

    await_that("it is said that it runs", lambda: site.keys(f"output/{job_id}/progress.json"))
    first = told()
    site.s3.put_object(Bucket=site.bucket, Key=watched_key(job_id), Body=b"")
    await_that("it tells of its steps", lambda: told() != first)
    cancel(site, job_id)
    site.await_result(job_id)
    await_that("its marks are gone", lambda: site.keys(f"input/jobs/{job_id}") == [])


def test_nobody_who_is_not_there_costs_a_thing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two looks in the first second of a job, and then one every five; where it is known, none."""
    now, looks, is_there = [0.0], [0], [False]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def look(job_id: str) -> bool:
        assert job_id == "j"
        looks[0] += 1
        return is_there[0]

    def told_in(pace: progress.Pace, seconds: float) -> int:
        told = 0
        for _ in range(round(seconds / pace.turn_s)):
            now[0] += pace.turn_s
            told += pace.is_time()
        return told

    assert (told_in(progress.Pace(Job("j"), look), 60), looks) == (12, [0])
    assert (told_in(progress.Pace(Job("j", live=True), look), 60), looks) == (150, [0])
    pace = progress.Pace(Job("j", live="when watched"), look)
    assert (told_in(pace, 3), looks) == (1, [2])
    assert told_in(pace, 57) == pytest.approx(11, abs=1)
    assert looks[0] == pytest.approx(13, abs=1)
    is_there[0] = True
    told_in(pace, 6)
    looked = looks[0]
    assert (told_in(pace, 60), looks[0]) == (150, looked), "who has come is looked for no more"


def test_progress_says_how_long_such_a_job_ran_before(make_site: Callable[..., Site]) -> None:
    site = make_site()
    start(site)
    first = site.send(image_workflow(1))
    ran_s = site.await_result(first)["timings"]["run_s"]
    second = site.send(image_workflow(20))
    key = f"output/{second}/progress.json"
    await_that("it tells of itself", lambda: site.keys(key))
    news = json.loads(site.s3.get_object(Bucket=site.bucket, Key=key)["Body"].read())
    assert 1 <= news["usual_run_s"] <= ran_s + 0.1, "the receipt's figure has the upload in it"
    started_at = datetime.fromisoformat(news["started_at"]).timestamp()
    assert started_at == pytest.approx(started_and_ended(site, second)[0], abs=10)
