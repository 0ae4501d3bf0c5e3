"""A job's verdict counts only where ComfyUI sees the bucket as it is; what does not see it is started anew."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from local_cloud import LocalCloud
from places import ROOT
from workplace import LIMIT_S, Site, await_that, image_workflow
from workshop import Fleet, in_group, make_worker

from worker import mount
from worker.mount import Mount

MODEL = "v1-5-pruned-emaonly-fp16.safetensors"


def with_model(name: str) -> dict[str, Any]:
    workflow: dict[str, Any] = json.loads((ROOT / "simple_workflow.json").read_text())
    workflow["4"]["inputs"]["ckpt_name"] = name
    return workflow


def lead_to_mount(site: Site) -> Path:
    """Have the site's ComfyUI read models and inputs from s3/, as start_service.sh does; returns s3/."""
    s3 = site.folder / "s3"
    s3.mkdir()
    for name in ("models", "input"):
        folder = site.folder / "ComfyUI" / name
        folder.rename(s3 / name)
        folder.symlink_to(f"../s3/{name}")
    put_back(s3)
    return s3


def lose(s3: Path) -> None:
    """The bucket is no longer mounted: an empty folder is left."""
    s3.rename(s3.with_name("away"))
    s3.mkdir()


def put_back(s3: Path) -> None:
    """What start_service.sh does each time; the mark is that of the stand-ins for mount-s3 and mountpoint."""
    away = s3.with_name("away")
    if away.exists():
        shutil.rmtree(s3)
        away.rename(s3)
    (s3 / ".mounted-by-stand-in").write_text(f"{s3}\n")


def keep_comfyui(site: Site, mend: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Start ComfyUI, and anew whenever it ends; it is mended before, but not the first time."""
    start = site.start_comfyui
    starts = iter([lambda: None])

    def start_mended() -> subprocess.Popen[bytes]:
        next(starts, mend)()
        return start()

    monkeypatch.setattr(site, "start_comfyui", start_mended)
    site.keep_comfyui()


def comfy_starts(site: Site) -> int:
    """How often ComfyUI was started."""
    return sum("main.py" in str(process.args) for process in site.processes)


# --- A mount that is gone --------------------------------------------------------------------------------


def refused_for_a_model(site: Site) -> str:
    return site.send(with_model(MODEL))


def refused_for_an_input(site: Site) -> str:
    more = {
        "4": {"class_type": "LoadImage", "inputs": {"image": "there.png"}},
        "5": {"class_type": "PreviewImage", "inputs": {"images": ["4", 0]}},
    }
    return site.send({id_: node for id_, node in image_workflow(more=more).items() if id_ in more})


def robbed_of_a_branch(site: Site) -> str:
    more = {
        "4": {"class_type": "LoadImage", "inputs": {"image": "there.png"}},
        "5": {"class_type": "PreviewImage", "inputs": {"images": ["4", 0]}},
    }
    return site.send(image_workflow(more=more))


@pytest.mark.parametrize("send", [refused_for_a_model, refused_for_an_input, robbed_of_a_branch])
def test_a_verdict_without_the_bucket_is_none(
    make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch, send: Callable[[Site], str]
) -> None:
    site = make_site(WARMUP_WORKFLOW="")
    s3 = lead_to_mount(site)
    shutil.copy(ROOT / "docs/report.png", s3 / "input/there.png")
    keep_comfyui(site, lambda: put_back(s3), monkeypatch)
    site.start_worker()
    first = site.send(image_workflow(1))
    await_that("a job runs", lambda: site.runs(first))
    lose(s3)
    results = [site.await_result(job_id) for job_id in (first, send(site))]
    assert [(result["status"], result["attempt"], result["warnings"]) for result in results] == [
        ("succeeded", 1, []),
        ("succeeded", 1, []),
    ]
    assert comfy_starts(site) == 2, "once, after the job that ran"
    assert "nothing is mounted" in site.log()


def test_a_mount_that_dies_while_nothing_runs_is_mended(
    make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    site = make_site(SCALE_COOLDOWN="2")  # it looks every second
    s3 = lead_to_mount(site)
    keep_comfyui(site, lambda: put_back(s3), monkeypatch)
    site.start_worker()
    await_that("it is at work", lambda: "takes jobs from" in site.log())
    lose(s3)
    await_that("it is mended", (s3 / "models").exists)
    assert site.await_result(site.send(with_model(MODEL)))["status"] == "succeeded"


def test_a_bucket_that_is_not_to_be_seen_here_condemns_the_instance(
    cloud: LocalCloud, fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its jobs go back, and are not failed."""
    site, machine = fleet
    s3 = lead_to_mount(site)
    (s3 / ".mounted-by-stand-in").unlink()  # ComfyUI starts all the same
    keep_comfyui(site, lambda: None, monkeypatch)
    site.start_worker()
    job_id = site.send(with_model(MODEL))
    await_that("it is replaced", lambda: cloud.instance_state(machine.instance_id) == "terminated")
    assert "did not see the bucket" in site.log()
    assert site.result(job_id) is None
    assert in_group(cloud, site)["DesiredCapacity"] == 1


# --- A model that came later -----------------------------------------------------------------------------


def bring(site: Site, key: str) -> None:
    """Bring a model into the bucket. ComfyUI's folder has it, too, and keeps its time, as on Mountpoint."""
    site.s3.put_object(Bucket=site.bucket, Key=f"models/{key}", Body=b"")
    path = site.folder / "ComfyUI/models" / key
    path.parent.mkdir(exist_ok=True)
    before = path.parent.stat()
    path.touch()
    os.utime(path.parent, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_model_that_came_after_comfyui_was_started_is_found(
    make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    site = make_site()
    keep_comfyui(site, lambda: None, monkeypatch)
    site.start_worker()
    assert site.await_result(site.send(with_model(MODEL)))["status"] == "succeeded"
    bring(site, "checkpoints/late.safetensors")
    result = site.await_result(site.send(with_model("late.safetensors")))
    assert (result["status"], result["attempt"], comfy_starts(site)) == ("succeeded", 1, 2)


def test_a_model_that_no_start_helps_is_missing_for_good(
    make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It lies in the folder of another kind."""
    site = make_site()
    keep_comfyui(site, lambda: None, monkeypatch)
    site.start_worker()
    bring(site, "loras/other.safetensors")
    for _ in range(2):
        result = site.await_result(site.send(with_model("other.safetensors")))
        assert (result["error"]["kind"], result["attempt"]) == ("invalid_workflow", 1)
    assert comfy_starts(site) == 2, "once for this file"
    result = site.await_result(site.send(with_model("nowhere.safetensors")))
    assert result["error"]["kind"] == "invalid_workflow"
    assert comfy_starts(site) == 2, "not for one that the bucket has not"


def test_designers_keep_what_they_run(make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch) -> None:
    worker = make_worker(make_site(ENV="base"), monkeypatch)
    refusal = {"4": {"errors": [{"type": "value_not_in_list", "extra_info": {"input_name": "ckpt_name"}}]}}
    monkeypatch.setattr(worker.jobs.mount, "_bucket", SimpleNamespace(keys=lambda _: [f"models/checkpoints/{MODEL}"]))
    assert worker.jobs.mount.doubt(with_model(MODEL), refusal, has_failed=True) is None
    monkeypatch.setattr(worker.jobs.mount, "_is_base", False)
    assert worker.jobs.mount.doubt(with_model(MODEL), refusal, has_failed=True) is not None


# --- The look at the mount -------------------------------------------------------------------------------


@pytest.fixture
def dead_mount(make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch) -> Iterator[Mount]:
    """A real FUSE mount whose process was killed. The kernel says so; only root may make one."""
    site = make_site()
    worker = make_worker(site, monkeypatch)
    s3 = lead_to_mount(site)
    lose(s3)
    try:
        fuse = os.open("/dev/fuse", os.O_RDWR)
    except OSError as error:
        pytest.skip(f"no FUSE here: {error}")
    options = f"fd={fuse},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()}".encode()
    libc = ctypes.CDLL(None, use_errno=True)
    failed = libc.mount(b"dead", str(s3).encode(), b"fuse", 0, options)
    os.close(fuse)  # the process is gone
    if failed:
        pytest.skip(f"nothing may be mounted here: {os.strerror(ctypes.get_errno())}")
    yield worker.jobs.mount
    libc.umount2(str(s3).encode(), 2)


def test_a_dead_mount_is_seen(dead_mount: Mount) -> None:
    assert "is dead: Transport endpoint is not connected" in str(dead_mount.problem())


def test_a_mount_that_hangs_is_seen_and_holds_up_one_thread_only(
    make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    site = make_site()
    looks = make_worker(site, monkeypatch).jobs.mount
    lead_to_mount(site)
    assert looks.problem() is None
    hang = threading.Event()
    asked: list[object] = []

    def ask(path: object) -> None:
        asked.append(path)
        hang.wait()

    monkeypatch.setattr(mount, "ANSWER_S", 0.1)
    monkeypatch.setattr(os, "statvfs", ask)
    assert [str(looks.problem()).endswith("hangs") for _ in range(3)] == [True] * 3
    assert len(asked) == 1
    hang.set()
    await_that("it is well again", lambda: looks.problem() is None)


def test_jobs_that_ask_at_once_hear_the_same(make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer is that of whoever asked first, and none of them takes a mount that answers for one that hangs."""
    site = make_site()
    looks = make_worker(site, monkeypatch).jobs.mount
    lead_to_mount(site)
    asked, answer = threading.Event(), threading.Event()

    def ask(_: object) -> None:
        asked.set()
        answer.wait(LIMIT_S)

    monkeypatch.setattr(os, "statvfs", ask)
    with ThreadPoolExecutor(2) as jobs:
        first = jobs.submit(looks.problem)
        assert asked.wait(LIMIT_S)
        second = jobs.submit(looks.problem)
        threading.Timer(0.3, answer.set).start()  # by then the second asks, too
        assert (first.result(), second.result()) == (None, None)


def test_who_needs_no_mount_has_no_problem(make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch) -> None:
    """A ComfyUI with folders of its own, as where somebody runs the worker by hand."""
    site = make_site()
    assert make_worker(site, monkeypatch).jobs.mount.problem() is None
    with suppress(FileNotFoundError):
        shutil.rmtree(site.folder / "s3")
    assert make_worker(site, monkeypatch).jobs.mount.problem() is None
