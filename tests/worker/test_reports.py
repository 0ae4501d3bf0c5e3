"""What an instance tells of itself: worker.json, its logs, and what its ComfyUI can do."""

from __future__ import annotations

import gzip
import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from places import ROOT
from workplace import LIMIT_S, Site, await_that, image_workflow
from workshop import make_worker, start

from comfy_utils import new_job_id
from worker.progress import Progress
from worker.reports import OneLine


def test_worker_json_tells_what_the_worker_does(
    make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    site = make_site()
    worker = make_worker(site, monkeypatch)
    in_hand = worker.in_hand

    def tell() -> bool:
        return worker.reports.tell_of_jobs(in_hand.board())

    def told() -> list[dict[str, Any]]:
        body = site.s3.get_object(Bucket=site.bucket, Key=f"output/{worker.instance_id}/worker.json")["Body"].read()
        news: dict[str, Any] = json.loads(body)
        assert news.keys() == {"instance_id", "instance_type", "jobs", "updated_at"}
        return list(news["jobs"])

    assert tell()
    assert told() == [], "idle, and that is said as well"
    job_id = new_job_id()
    with in_hand.running(job_id, worker.shutdown.should_stop, alone=False):
        assert not tell(), "it may stand behind another one"
        in_hand.note_running(job_id)
        assert tell()
        assert not tell(), "there is nothing new"
        (begun,) = told()
        assert begun.keys() == {"job_id", "since"}
        progress = Progress({"7": {"class_type": "KSampler", "inputs": {}}}, job_id, worker.instance_id)
        progress.note({"type": "progress", "data": {"node": "7", "value": 3, "max": 20}})
        worker.jobs._tell(progress)
        assert tell()
        assert told() == [begun | {"job_id": job_id, "node_title": "KSampler", "value": 3, "max": 20}]
    assert tell()
    assert told() == []


def test_a_log_is_uploaded_only_when_it_has_changed(
    make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    site = make_site()
    worker = make_worker(site, monkeypatch)
    log = site.folder / "logs/parse_job.log"
    log.write_text("one\n")
    site.s3.put_bucket_versioning(Bucket=site.bucket, VersioningConfiguration={"Status": "Enabled"})

    def puts() -> int:
        return len(site.s3.list_object_versions(Bucket=site.bucket)["Versions"])

    for _ in range(2):
        worker.reports.upload_logs()
    assert puts() == 1
    with log.open("a") as file:
        file.write("two\n")
    worker.reports.upload_logs()
    assert puts() == 2


def test_a_message_is_one_line_of_the_log_whatever_it_says(tmp_path: Path) -> None:
    formatter = OneLine("%(levelname)s %(message)s")
    odd = "\x1b[31mred\x1b[0m\n2026-01-01 00:00:00,000 WARNING Message x is put back " + "y" * 100_000

    def said(exc_info: Any = None) -> list[str]:
        record = logging.LogRecord("x", logging.WARNING, "x.py", 1, "Job %s", (odd,), exc_info)
        return formatter.format(record).splitlines()

    (line,) = said()
    assert line.startswith("WARNING Job red 2026-01-01 00:00:00,000 WARNING Message x is put back yyy")
    assert line.isprintable()
    assert len(line) < 4100
    try:
        raise ValueError(odd)
    except ValueError:
        first, *traceback = said(sys.exc_info())
    assert first == line
    assert len(traceback) > 3
    assert all(each.startswith("    ") and each.isprintable() and len(each) < 4100 for each in traceback)
    set_up = (
        f"import logging, pathlib, worker.reports; worker.reports.set_up_logging(pathlib.Path({str(tmp_path)!r})); "
    )
    ran = subprocess.run(
        [sys.executable, "-c", set_up + r"logging.getLogger('x').warning('a\n\x1b[1mb')"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for text in (ran.stdout, (tmp_path / "parse_job.log").read_text()):
        assert text.endswith("WARNING a b\n")
        assert text.count("\n") == 1


def test_an_unwritable_log_folder_does_not_stop_jobs(make_site: Callable[..., Site]) -> None:
    site = make_site()
    (site.folder / "logs").rmdir()
    (site.folder / "logs").write_text("in the way")
    start(site)
    assert site.await_result(site.send(image_workflow()))["status"] == "succeeded"


def test_a_full_disk_does_not_stop_jobs(make_site: Callable[..., Site]) -> None:
    site = make_site()
    (site.folder / "logs/parse_job.log").symlink_to("/dev/full")
    start(site)
    assert site.await_result(site.send(image_workflow()))["status"] == "succeeded"


def test_the_fleets_object_info_is_stored_when_it_has_changed(make_site: Callable[..., Site]) -> None:
    site = make_site()
    place = {"Bucket": site.bucket, "Key": "output/object_info.json.gz"}

    def stored_at() -> Any:
        return site.keys(place["Key"]) and site.s3.head_object(**place)["LastModified"]

    site.start_comfyui()
    first = site.start_worker()
    await_that("it is stored", stored_at)
    described = json.loads(gzip.decompress(site.s3.get_object(**place)["Body"].read()))
    assert described["KSampler"]["input"]["required"]["steps"][0] == "INT"
    first.terminate()
    first.wait(LIMIT_S)

    # Stored again it would lose the mark.
    site.s3.copy_object(
        **place,
        CopySource=place,
        Metadata=site.s3.head_object(**place)["Metadata"] | {"mark": "x"},
        MetadataDirective="REPLACE",
    )
    second = site.start_worker()
    await_that("it was looked at", lambda: "knows what ComfyUI can do" in site.log())
    assert site.s3.head_object(**place)["Metadata"]["mark"] == "x"
    second.terminate()
    second.wait(LIMIT_S)

    (site.folder / "ComfyUI/models/checkpoints/new.safetensors").touch()
    site.start_worker()
    await_that("it is stored again", lambda: "mark" not in site.s3.head_object(**place)["Metadata"])
    body = site.s3.get_object(**place)["Body"].read()
    assert b"new.safetensors" in gzip.decompress(body)
