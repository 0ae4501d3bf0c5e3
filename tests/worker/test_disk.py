"""A full disk is the instance's fault: what is ours is cleared, no job is blamed, and if that does not help it leaves.

What real savers of ComfyUI 0.33.0 said on a full disk stands in SAID.
"""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import requests
from local_cloud import LocalCloud
from workplace import Site, await_that, image_workflow
from workshop import Fleet, make_worker

from comfy_utils import new_job_id
from ground.answers import job_error
from ground.comfyui import ComfySlowError
from parse_job import Worker
from worker import disk
from worker.disk import FULL_BYTES
from worker.errors import DiskFullError, PutBackError, found_no_room, is_disk_full
from worker.pictures import Pictures

NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
SAID = [
    "node 2 SaveImage: [Errno 28] No space left on device",
    "node 2 SaveLatent: Error while serializing: I/O error: No space left on device (os error 28)",
    "node 2 SaveWEBM: [Errno 28] No space left on device: '/home/ubuntu/comfy/job-output/x_00004_.webm'",
]


# --- What says so ----------------------------------------------------------------------------------------


def wrapped(error: Exception) -> Exception:
    try:
        raise PutBackError("an upload failed") from error
    except PutBackError as outer:
        return outer


@pytest.mark.parametrize(
    ("error", "says_so"),
    [
        (NO_SPACE, True),
        (OSError(errno.EDQUOT, "quota"), True),
        (wrapped(NO_SPACE), True),
        (DiskFullError("x"), True),
        (OSError(errno.EIO, "x"), False),
        (requests.ConnectionError("x"), False),
        (KeyError("No space left on device"), False),
    ],
)
def test_which_errors_are_of_a_full_disk(error: Exception, says_so: bool) -> None:
    assert is_disk_full(error) == says_so


def test_what_comfyui_says_of_a_full_disk() -> None:
    assert all(found_no_room(job_error("execution_error", message)) for message in SAID)
    assert not found_no_room(None)
    assert not found_no_room(job_error("execution_error", "node 2 SaveImage: [Errno 13] Permission denied"))
    assert not found_no_room(job_error("invalid_workflow", SAID[0])), "nothing ran"


def test_a_picture_from_the_websocket_that_is_not_written_is_no_mere_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_bytes(*_: object) -> None:
        raise NO_SPACE

    pictures = Pictures({"3": {"class_type": "SaveImageWebsocket", "inputs": {}}}, tmp_path)
    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    pictures.take("3", b"x", "png")
    assert pictures.found_no_room
    pictures.forget()
    assert not pictures.found_no_room


# --- Which disk is full ----------------------------------------------------------------------------------


@pytest.fixture
def worker(make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch) -> Worker:
    """A worker that does not run, on a machine where ComfyUI does not either."""
    worker = make_worker(make_site(), monkeypatch)
    (worker.disk.settings.comfy_home / "ComfyUI/temp").mkdir()
    return worker


def with_free(monkeypatch: pytest.MonkeyPatch, blocks: dict[str, int], files: tuple[int, int] = (9, 9)) -> list[str]:
    """Have the disks of folders whose path ends so only as many free bytes; returns which are asked."""
    asked: list[str] = []

    def statvfs(folder: str) -> Any:
        asked.append(folder)
        free = next((free for end, free in blocks.items() if folder.endswith(end)), 10**12)
        return SimpleNamespace(f_bavail=free, f_frsize=1, f_files=files[0], f_favail=files[1])

    monkeypatch.setattr(os, "statvfs", statvfs)
    return asked


@pytest.mark.parametrize("folder", ["/logs", "/job-output", "/ComfyUI/temp", "/ComfyUI/input"])
def test_each_disk_that_is_written_to_is_looked_at(
    worker: Worker, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    with_free(monkeypatch, {folder: FULL_BYTES - 1})
    assert (worker.disk.problem() or "").endswith(f"{folder} is full")
    with_free(monkeypatch, {folder: FULL_BYTES})
    assert worker.disk.problem() is None


@pytest.mark.parametrize(("files", "is_full"), [((9, 0), True), ((0, 0), False)])
def test_a_disk_may_have_no_more_files(
    worker: Worker, monkeypatch: pytest.MonkeyPatch, files: tuple[int, int], is_full: bool
) -> None:
    """Some file systems do not count them."""
    with_free(monkeypatch, {}, files)
    assert (worker.disk.problem() is not None) == is_full


def test_the_mount_of_the_bucket_is_no_disk(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked, it might hang."""
    home = worker.disk.settings.comfy_home
    (home / "ComfyUI/input").rename(home / "away")
    (home / "ComfyUI/input").symlink_to("../s3/input")
    asked = with_free(monkeypatch, {})
    assert worker.disk.problem() is None
    assert not [folder for folder in asked if folder.endswith("input")]
    assert [folder for folder in asked if folder.endswith("temp")]


# --- What is cleared -------------------------------------------------------------------------------------


def hold(worker: Worker, received_at: float) -> str:
    """Have a job in hand; returns its id."""
    job_id = new_job_id()
    lease: Any = SimpleNamespace(message_id=job_id, body='{"1": {}}', received_at=received_at, attempt=1)
    worker.in_hand.leases.append(lease)
    return job_id


def write(path: Path, age_s: float = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("x")
    os.utime(path.parent, (time.time() - age_s,) * 2)
    return path


def test_what_no_job_in_hand_needs_is_removed(worker: Worker) -> None:
    """What is new may be of a job that has just run: its files are brought together when its thread comes to it."""
    home = worker.disk.settings.comfy_home
    gone = [
        write(home / f"ComfyUI/input/jobs/{new_job_id()}/ab/a.png"),
        write(home / f"job-output/{new_job_id()}/a.png", age_s=60),
        write(home / "ComfyUI/temp/old.png"),
        write(home / "job-output/sub/old.png"),
    ]
    time.sleep(0.02)  # a file has the time of the kernel's last tick
    mine = hold(worker, time.time())
    time.sleep(0.02)
    kept = [
        write(home / f"ComfyUI/input/jobs/{mine}/ab/a.png"),
        write(home / "ComfyUI/input/jobs/readme/a.txt"),
        write(home / "ComfyUI/input/a.png"),
        write(home / f"job-output/{mine}/a.png", age_s=60),
        write(home / f"job-output/{new_job_id()}/new.png"),
        write(home / "ComfyUI/temp/new.png"),
        write(home / "job-output/new.png"),
    ]
    worker.disk.make_room()
    assert [path for path in gone if path.exists()] == []
    assert [path for path in kept if not path.exists()] == []
    worker.disk.make_room(but=mine)
    assert [path for path in kept if not path.exists()] == [kept[0], kept[3]]


def test_while_it_is_not_known_what_comfyui_runs_no_output_is_touched(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def jobs() -> list[str]:
        raise ComfySlowError("busy")

    path = write(worker.disk.settings.comfy_home / f"job-output/{new_job_id()}/a.png", age_s=60)
    monkeypatch.setattr(worker.results.comfy, "jobs", jobs)
    worker.disk.make_room()
    assert path.exists()
    monkeypatch.setattr(worker.results.comfy, "jobs", lambda: [path.parent.name])
    worker.disk.make_room()
    assert path.exists(), "it has that one"


def test_on_the_base_machine_designers_files_stay(
    make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = make_worker(make_site(ENV="base"), monkeypatch)
    home = worker.disk.settings.comfy_home
    kept = [write(home / "ComfyUI/temp/a.png"), write(home / "ComfyUI/output/a.png"), write(home / "ComfyUI/input/a")]
    own = write(home / f"job-output/{new_job_id()}/a.png", age_s=60)
    worker.disk.make_room()
    assert (own.exists(), [path.exists() for path in kept]) == (False, [True] * 3)


def test_inputs_in_the_bucket_are_not_ours_to_clear(worker: Worker) -> None:
    """There lie other instances' and senders' files, too."""
    home = worker.disk.settings.comfy_home
    (home / "s3").mkdir()
    (home / "ComfyUI/input").rename(home / "s3/input")
    (home / "ComfyUI/input").symlink_to("../s3/input")
    path = write(home / f"ComfyUI/input/jobs/{new_job_id()}/ab/a.png")
    worker.disk.make_room()
    assert path.exists()


def test_old_logs_go_once_they_are_stored(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    logs = worker.disk.settings.comfy_home / "logs"
    for name in ("parse_job.log", "parse_job.log.2026-11-24", "comfyui.log", "comfyui.log.1", "boot.json"):
        (logs / name).write_text(name)
    monkeypatch.setattr("worker.reports.LOG_LIMIT_BYTES", 12)

    def upload_file(*_: object, **__: object) -> None:
        raise OSError("S3 is down")

    with monkeypatch.context() as down:
        down.setattr(worker.results.bucket.s3, "upload_file", upload_file)
        worker.disk.make_room()
        assert len(list(logs.iterdir())) == 5
    worker.disk.make_room()
    left = {path.name: path.stat().st_size for path in logs.iterdir()}
    assert left == {"parse_job.log": 0, "comfyui.log": 11, "boot.json": 9}


def test_removing_files_of_no_job_removes_nothing(worker: Worker) -> None:
    """A message that was no job has no id."""
    path = write(worker.disk.settings.comfy_home / f"ComfyUI/input/jobs/{new_job_id()}/a.png")
    output = write(worker.disk.settings.comfy_home / f"job-output/{new_job_id()}/a.png")
    worker.disk.inputs.remove_files("")
    worker.disk.outputs.make_room(set(), "", 0)
    assert path.exists()
    assert output.exists()


# --- Whom it is blamed on --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("free_mb", "jobs", "is_blamed"),
    [(199, ["a"], True), (201, ["a"], False), (201, ["a"] * 9, False), (201, ["a", "b", "c"], True)],
)
def test_the_instance_is_blamed_where_no_other_job_would_fare_better(
    worker: Worker, monkeypatch: pytest.MonkeyPatch, free_mb: int, jobs: list[str], is_blamed: bool
) -> None:
    """INPUT_LIMIT_MB is 200. One job may want more room than any instance has."""
    with_free(monkeypatch, {"": free_mb * 1_000_000})
    for job_id in jobs:
        worker.disk.note_full(job_id)
    assert (worker.disk.blame() is not None) == is_blamed


def test_what_ran_well_between_two_jobs_absolves_it(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    with_free(monkeypatch, {})
    for job_id in ("a", "b"):
        worker.disk.note_full(job_id)
    worker.disk.note_success()
    worker.disk.note_full("c")
    assert worker.disk.blame() is None


def test_while_files_wait_for_their_upload_nobody_is_blamed(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """They will go, and make room."""
    with_free(monkeypatch, {"/job-output": 0})
    hold(worker, time.time())
    assert worker.disk.is_full()
    assert worker.disk.blame() is None
    worker.in_hand.leases.clear()
    assert worker.disk.is_full()
    assert worker.disk.blame() is not None


def test_blame_lasts_until_the_group_knows(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """AWS may refuse the first call."""
    told: list[str] = []

    def refuse(_: str) -> None:
        raise ConnectionError

    worker.disk._reason = "full"
    with monkeypatch.context() as down:
        down.setattr(worker.membership, "declare_unhealthy", refuse)
        with pytest.raises(ConnectionError):
            worker.intake._turn()
    monkeypatch.setattr(worker.membership, "declare_unhealthy", told.append)
    worker.intake._turn()
    assert (told, worker.disk.blame()) == (["full"], None)


def test_a_worker_takes_nothing_while_the_disk_is_full(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    with_free(monkeypatch, {"/logs": 0})
    monkeypatch.setattr(worker.care, "is_ready", lambda: pytest.fail("it would receive next"))
    worker.intake._turn()
    assert worker.intake._room() == 0
    assert worker.disk.blame() is not None


# --- On a real disk of 1 MB ------------------------------------------------------------------------------


@pytest.fixture
def small_disk() -> Iterator[Callable[[Path], Path]]:
    """Mounts 1 MB of memory at a folder."""
    mounted: list[Path] = []

    def mount(folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}; it takes root")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def needing(site: Site, size: int) -> dict[str, Any]:
    """A job that brings an input of so many bytes."""
    site.s3.put_object(Bucket=site.bucket, Key=f"input/{size}.png", Body=os.urandom(size))
    more = {"4": {"class_type": "StandinText", "inputs": {"text": "a.png"}}}
    return {"prompt": image_workflow(more=more), "inputs": {"a.png": f"s3://{site.bucket}/input/{size}.png"}}


def files_in(folder: Path) -> list[str]:
    return [name for _, _, names in os.walk(folder) for name in names]


def test_a_full_input_folder_is_cleared_and_where_that_does_not_help_the_instance_leaves(
    cloud: LocalCloud, fleet: Fleet, small_disk: Callable[[Path], Path]
) -> None:
    site, machine = fleet
    inputs = small_disk(site.folder / "ComfyUI/input")
    write(inputs / f"jobs/{new_job_id()}/ab/a.png").write_bytes(bytes(900_000))  # of a worker that was killed
    site.start_comfyui()
    site.start_worker()
    result = site.await_result(site.send(needing(site, 500_000)))
    assert (result["status"], result["attempt"]) == ("succeeded", 1)
    await_that("nothing is left of it", lambda: files_in(inputs) == [])
    job_id = site.send(needing(site, 2_000_000))
    await_that("it is replaced", lambda: cloud.instance_state(machine.instance_id) == "terminated")
    assert site.depth() == (1, 0), site.log()
    assert (site.result(job_id), files_in(inputs)) == (None, [])
    assert f"Job {job_id}: attempt 2" not in site.log()


def test_a_full_disk_of_logs_is_cleared_and_else_the_instance_leaves(
    worker: Worker, small_disk: Callable[[Path], Path]
) -> None:
    logs = small_disk(worker.disk.settings.comfy_home / "logs")
    (logs / "parse_job.log.2026-11-24").write_bytes(bytes(1_000_000))
    assert worker.disk.problem() is not None
    assert not worker.disk.is_full()
    (logs / "somebody's").write_bytes(bytes(1_040_000))
    worker.disk._cleared_at = None
    assert worker.disk.is_full()
    assert worker.disk.blame() is not None


UPLOAD = """
import sys, tempfile
from pathlib import Path
from comfy_utils import aws_client
from worker.bucket import Bucket
tempfile.tempdir = sys.argv.pop(1)
try:
    with tempfile.NamedTemporaryFile() as file:
        file.write(bytes(100_000))
except OSError as error:
    print(error)
bucket = Bucket(aws_client("s3", "us-west-2"), sys.argv[1])
for name in sys.argv[2:]:
    bucket.upload(Path(name), name)
"""


def test_uploads_need_no_room_on_the_disk(make_site: Callable[..., Site], small_disk: Callable[[Path], Path]) -> None:
    """Neither in one piece nor in parts. In a process of its own, because the local cloud's S3 needs some."""
    site = make_site()
    full = small_disk(site.folder / "full")
    (full / "x").write_bytes(bytes(1_048_576))
    (site.folder / "small.bin").write_bytes(bytes(1000))
    (site.folder / "large.bin").write_bytes(bytes(9_000_000))
    done = site.run(sys.executable, "-c", UPLOAD, str(full), site.bucket, "small.bin", "large.bin")
    assert (done.stderr, done.stdout) == ("", "[Errno 28] No space left on device\n")
    assert site.keys("") == ["large.bin", "small.bin"]


def test_where_python_finds_no_place_for_temporary_files_the_disk_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def gettempdir() -> str:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", gettempdir)
    monkeypatch.setenv("TMPDIR", "/somewhere")
    assert disk.temporary_folder() == "/somewhere"
