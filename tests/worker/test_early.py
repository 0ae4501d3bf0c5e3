"""Files that are stored while their job still runs."""

from __future__ import annotations

import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from local_cloud import Fault, LocalCloud
from workplace import LIMIT_S, Site, await_that, two_savers
from workshop import make_worker, start

import parse_job
from comfy_utils import Job, new_job_id
from ground.answers import OutputFile
from ground.comfyui import Finished
from worker.early import MOST_TOLD_BYTES, EarlyOutputs
from worker.progress import Progress
from worker.results import Ran


class Puts:
    """What is stored in S3, by the names of files; the first tries for some are refused."""

    def __init__(self) -> None:
        self.count: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()


@pytest.fixture
def puts(monkeypatch: pytest.MonkeyPatch) -> Puts:
    puts, answer = Puts(), LocalCloud.__call__

    def look(cloud: LocalCloud, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        name = environ["PATH_INFO"].rpartition("/")[2]
        if environ["REQUEST_METHOD"] == "PUT":
            puts.count[name] += 1
            if puts.refused[name] > 0:
                puts.refused[name] -= 1
                environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
                return cloud._answer_fault(Fault(403, "AccessDenied"), start_response, "s3", json_protocol=False)
        return answer(cloud, environ, start_response)

    monkeypatch.setattr(LocalCloud, "__call__", look)
    return puts


def three_savers(until: Path) -> dict[str, Any]:
    """The same with a picture that is only shown."""
    return two_savers(until) | {"5": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}}}


def progress_of(site: Site, job_id: str) -> dict[str, Any]:
    """What progress.json says, nothing while there is none."""
    key = f"output/{job_id}/progress.json"
    if key not in site.keys(key):
        return {}
    news: dict[str, Any] = json.loads(site.s3.get_object(Bucket=site.bucket, Key=key)["Body"].read())
    return news


def await_early(site: Site, job_id: str) -> list[dict[str, Any]]:
    """The outputs of the two nodes that end before the job does."""
    outputs: list[dict[str, Any]] = await_that(
        "both are told of",
        lambda: len(found := progress_of(site, job_id).get("outputs", [])) == 2 and found,
    )
    return outputs


def test_what_a_live_job_has_made_is_stored_and_told_while_it_runs_and_no_file_is_stored_twice(
    make_site: Callable[..., Site], puts: Puts, tmp_path: Path
) -> None:
    site = make_site()
    start(site)
    job_id = site.send({"prompt": three_savers(tmp_path / "go"), "live": True})
    told = await_early(site, job_id)
    assert {output["s3_key"] for output in told} <= set(site.keys(f"output/{job_id}/"))
    assert {output["node_id"] for output in told} == {"4", "5"}
    assert site.result(job_id) is None
    assert (progress_of(site, job_id)["status"], progress_of(site, job_id)["node_id"]) == ("running", "2")
    (tmp_path / "go").touch()
    result = site.await_result(job_id)
    assert (result["status"], result["warnings"], len(result["outputs"])) == ("succeeded", [], 3)
    assert all(output in result["outputs"] for output in told), "in the receipt's own words"
    assert [puts.count[output["s3_key"].rpartition("/")[2]] for output in result["outputs"]] == [1, 1, 1]


def test_what_nobody_follows_is_stored_at_the_end(make_site: Callable[..., Site], puts: Puts, tmp_path: Path) -> None:
    site = make_site()
    start(site)
    job_id = site.send({"prompt": three_savers(tmp_path / "go")})
    await_that("it is at its second", lambda: progress_of(site, job_id).get("node_id") == "2")
    assert "outputs" not in progress_of(site, job_id)
    assert site.keys(f"output/{job_id}/") == [f"output/{job_id}/progress.json"]
    (tmp_path / "go").touch()
    assert len(site.await_result(job_id)["outputs"]) == 3
    assert not [name for name in puts.count if name.endswith(".png") and puts.count[name] != 1]


def test_what_cannot_be_stored_early_is_stored_at_the_end(
    make_site: Callable[..., Site], puts: Puts, tmp_path: Path
) -> None:
    site = make_site()
    start(site)
    puts.refused["early_00001_.png"] = 1
    job_id = site.send({"prompt": three_savers(tmp_path / "go"), "live": True})
    await_that("the other is told of", lambda: progress_of(site, job_id).get("outputs"))
    await_that("it was tried", lambda: puts.count["early_00001_.png"])
    (tmp_path / "go").touch()
    result = site.await_result(job_id)
    assert (result["status"], result["warnings"], len(result["outputs"])) == ("succeeded", [], 3)
    assert f"output/{job_id}/early_00001_.png" in site.keys(f"output/{job_id}/")
    assert puts.count["early_00001_.png"] == 2


def test_another_attempt_begins_with_nothing_and_names_its_own(
    make_site: Callable[..., Site], puts: Puts, tmp_path: Path
) -> None:
    site = make_site()
    comfyui = site.start_comfyui()
    site.start_worker()
    job_id = site.send({"prompt": three_savers(tmp_path / "go"), "live": True})
    first = await_early(site, job_id)
    shown = next(output["s3_key"] for output in first if output["type"] == "temp")
    comfyui.kill()
    comfyui.wait()
    site.start_comfyui()
    await_that("it runs again", lambda: site.runs(job_id) == 2)
    (tmp_path / "go").touch()
    result = site.await_result(job_id)
    assert (result["status"], result["attempt"]) == ("succeeded", 2)
    assert len(result["outputs"]) == 3
    assert puts.count["early_00001_.png"] == 2, "each attempt's own"
    there = {output["s3_key"] for output in result["outputs"]}
    assert there <= set(site.keys(f"output/{job_id}/"))
    assert shown.startswith(f"output/{job_id}/temp/")


# --- In this process -------------------------------------------------------------------------------------


class Bench:
    """A job whose ComfyUI is played, and the uploads of its files."""

    def __init__(self, worker: parse_job.Worker, monkeypatch: pytest.MonkeyPatch, **more: Any) -> None:
        self.results = worker.results
        self.job = Job(new_job_id(), workflow={}, live=True, **more)
        self.progress = Progress({}, self.job.id, "i-1")
        self.uploaded: list[str] = []
        monkeypatch.setattr(self.results.bucket, "upload", self.upload)
        self.folder = worker.results.settings.comfy_home / "job-output" / self.job.id
        self.folder.mkdir(parents=True)
        self.early = self.begin()

    def begin(self) -> EarlyOutputs:
        return self.results.early(self.job, self.progress)

    def upload(self, path: Path, key: str) -> None:
        assert key.endswith(path.name)
        self.uploaded.append(path.name)

    def show(self, node_id: str, *names: str, **more: Any) -> None:
        files = [{"filename": name, "subfolder": self.job.id, "type": "output"} for name in names]
        self.early.note({"type": "executed", "data": {"node": node_id, "output": {"images": files, **more}}})

    def told(self) -> dict[str, Any]:
        return self.progress.news() or {}

    def end(self, *names: str) -> list[str]:
        """What the receipt names."""
        self.early.await_end(lambda _: None)
        files = [OutputFile("1", "images", name, self.job.id, "output") for name in names]
        return [output["s3_key"] for output in self.results.store_files(self.job.id, files).outputs]


@pytest.fixture
def bench(make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(make_worker(make_site(), monkeypatch), monkeypatch)


def test_a_file_that_was_written_again_is_stored_again(bench: Bench) -> None:
    for name in ("a.png", "b.png"):
        (bench.folder / name).write_text("1")
    bench.show("1", "a.png", "b.png")
    await_that("both are told of", lambda: len(bench.told().get("outputs", [])) == 2)
    (bench.folder / "b.png").write_text("2")
    assert bench.end("a.png", "b.png") == [f"output/{bench.job.id}/{name}" for name in ("a.png", "b.png")]
    assert bench.uploaded == ["a.png", "b.png", "b.png"]


def test_what_is_not_there_or_too_much_to_tell_is_left_to_the_end(bench: Bench) -> None:
    (bench.folder / "a.png").write_text("1")
    bench.show("1", "a.png", "gone.png")
    bench.show("2", text=["x" * MOST_TOLD_BYTES])
    bench.show("3", "a.png", text=["y"])
    news = await_that("the third is told of", bench.told)
    assert ([output["node_id"] for output in news["outputs"]], news["values"]) == (["3"], {"3": {"text": ["y"]}})


def test_the_end_waits_for_a_file_that_is_under_way_and_does_not_store_it_again(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, go_on = threading.Event(), threading.Event()

    def upload(path: Path, key: str) -> None:
        bench.upload(path, key)
        began.set()
        assert go_on.wait(LIMIT_S)

    monkeypatch.setattr(bench.results.bucket, "upload", upload)
    monkeypatch.setattr(bench.results.shutdown, "pause", lambda _: go_on.set())
    (bench.folder / "a.png").write_text("1")
    bench.show("1", "a.png")
    assert began.wait(LIMIT_S)
    file = {"filename": "a.png", "subfolder": bench.job.id, "type": "output"}
    entry = {"outputs": {"1": {"images": [file]}}, "status": {"status_str": "success"}}
    now = datetime.now(UTC)
    lease: Any = SimpleNamespace(attempt=1, sent_at=now)
    result = bench.results.make(bench.job, Ran(now, Finished(entry, {}, None)), lease)
    assert (result["status"], len(result["outputs"]), bench.uploaded) == ("succeeded", 1, ["a.png"])


def test_a_run_that_begins_anew_has_told_nothing(bench: Bench) -> None:
    (bench.folder / "a.png").write_text("1")
    bench.show("1", "a.png")
    await_that("it is told of", bench.told)
    bench.early = bench.begin()
    bench.progress.note({"type": "executing", "data": {"node": "1"}})
    news = bench.told()
    assert news["node_id"] == "1"
    assert "outputs" not in news
    assert bench.end("a.png")
    assert bench.uploaded == ["a.png", "a.png"], "another worker may have been at it meanwhile"


def test_no_secret_is_told(make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch) -> None:
    key = "comfyui-0123456789abcdef"
    bench = Bench(make_worker(make_site(), monkeypatch), monkeypatch, extra_data={"api_key_comfy_org": key})
    bench.show("1", text=[f"the key {key} is not known"])
    news = await_that("it is told of", bench.told)
    assert news["values"] == {"1": {"text": ["the key *** is not known"]}}
    assert not re.search(key, json.dumps(news))
