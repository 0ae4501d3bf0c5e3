"""What the worker's tests share: workflows, a look at the cloud and at ComfyUI, servers for callbacks."""

from __future__ import annotations

import json
import os
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import requests
from local_cloud import Fault, LocalCloud, Machine
from workplace import LIMIT_S, Site, await_that, group_of, image_workflow

import parse_job
from comfy_utils import load_settings
from worker.metadata import Metadata

NO_RESULT_YET = None
Fleet = tuple[Site, Machine]


# --- Workers and their groups ----------------------------------------------------------------------------


def start(site: Site) -> None:
    """Start ComfyUI and a worker."""
    site.start_comfyui()
    site.start_worker()


def make_worker(site: Site, monkeypatch: pytest.MonkeyPatch) -> parse_job.Worker:
    """A worker in this process, not running."""
    for name, value in site.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("COMFY_HOME", str(site.folder))
    worker = parse_job.Worker(load_settings(None, site.folder / "env"), Metadata())
    worker.queue.url = site.queue_url
    return worker


def speed_up(site: Site, room: str, changes: dict[str, str]) -> None:
    """Change constants in a room of the site's own worker."""
    script = site.folder / room
    text = script.read_text()
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    script.unlink()  # others' folders link to it
    script.write_text(text)


def in_group(cloud: LocalCloud, site: Site) -> dict[str, Any]:
    """How the site's group stands."""
    return group_of(cloud, f"{site.prefix}-{site.env}-asg")


def update_group(cloud: LocalCloud, site: Site, **changes: int) -> None:
    """Change the limits of the site's group."""
    cloud.client("autoscaling").update_auto_scaling_group(
        AutoScalingGroupName=f"{site.prefix}-{site.env}-asg", **changes
    )


class Calls:
    """The AWS calls that reach the local cloud, some of which are answered with a fault instead."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self._faults: dict[str, tuple[Fault, int]] = {}

    def __call__(self, _: str, operation: str) -> Fault | None:
        self.seen.append(operation)
        fault, times = self._faults.get(operation, (None, 0))
        if fault is None or times <= 0:
            return None
        self._faults[operation] = (fault, times - 1)
        return fault

    def next(self, operation: str, fault: Fault, times: int = 1) -> None:
        """Answer the next `times` calls of this operation with the fault."""
        self._faults[operation] = (fault, times)

    def faults_left(self) -> int:
        """How many calls will still be answered with a fault."""
        return sum(times for _, times in self._faults.values())

    def forgive(self) -> None:
        """No more faults."""
        self._faults.clear()

    def count(self, operation: str) -> Callable[[], int]:
        """A look at how many calls of the operation there were since."""
        before = Counter(self.seen)[operation]
        return lambda: self.seen.count(operation) - before

    def await_more(self, operation: str, count: int = 1) -> None:
        """Wait until there were so many more calls of the operation."""
        more = self.count(operation)
        await_that(f"{operation} is called", lambda: more() >= count)


# --- Jobs ------------------------------------------------------------------------------------------------


def with_node(class_type: str, **inputs: Any) -> dict[str, Any]:
    """An image workflow with one more node of a class, and a saver behind it."""
    return image_workflow(
        more={
            "4": {"class_type": class_type, "inputs": {"image": ["1", 0], **inputs}},
            "5": {"class_type": "SaveImage", "inputs": {"images": ["4", 0], "filename_prefix": "y"}},
        }
    )


def pending(site: Site) -> list[str]:
    """The jobs that stand in ComfyUI's queue behind the one that runs."""
    queue = requests.get(f"http://127.0.0.1:{site.port}/queue", timeout=LIMIT_S).json()
    return [item[1] for item in queue["queue_pending"]]


def started_and_ended(site: Site, job_id: str) -> tuple[float, float]:
    """When ComfyUI began and ended a job, as its ledger has it."""
    entries = [
        entry for entry in map(json.loads, site.ledger.read_text().splitlines()) if entry["prompt_id"] == job_id
    ]
    return entries[0]["time"], entries[-1]["time"]


def fetch_ahead(site: Site, seconds: float, *bodies: object, until: Path | None = None) -> tuple[str, list[str]]:
    """A job of `seconds` that runs, and those that were fetched ahead meanwhile and stand behind it.

    With `until` the seconds begin when there is such a file. Then the others are sent when it runs; else when it is in
    hand, so that it does not end before, and one of them may be the quicker to get to ComfyUI.

    The site's SCALE_COOLDOWN is short, so that its worker looks every second how many wait.
    """
    site.await_result(site.send(image_workflow()))  # so that the worker knows jobs to be short
    site.await_empty_queue()
    first = site.send(image_workflow(seconds, until=until))
    await_that("the first is taken", lambda: site.depth() == (0, 1))  # one receive might bring all, in any order
    if until is not None:
        await_that("the first runs", lambda: site.runs(first))
    ids = [site.send(body) for body in bodies or (image_workflow(),)]
    await_that("the first runs", lambda: site.runs(first))
    return first, ids


def fetch_one_ahead(site: Site, seconds: float, body: object = None) -> tuple[str, str]:
    """Likewise one workflow, which is known to stand there when the first one's seconds begin."""
    is_there = site.folder / f"is-there-{uuid.uuid4().hex}"
    first, (second,) = fetch_ahead(site, seconds, body or image_workflow(), until=is_there)
    try:
        await_that("the second stands in ComfyUI's queue", lambda: second in pending(site))
    except AssertionError as error:
        raise AssertionError(f"{error}; the workers said\n{site.log()}") from error
    is_there.touch()
    return first, second


def cancel(site: Site, job_id: str) -> None:
    """What send_job.py --cancel does."""
    site.s3.put_object(Bucket=site.bucket, Key=f"input/jobs/{job_id}.cancel", Body=b"")


def is_alive(pid: int) -> bool:
    """Whether a process runs that is no zombie."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


# --- Callbacks -------------------------------------------------------------------------------------------


@contextmanager
def receiver(answer: Callable[[BaseHTTPRequestHandler, bytes], None]) -> Iterator[str]:
    """A server for callbacks, which `answer` is handed with their bodies; yields its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            answer(self, self.rfile.read(int(self.headers["Content-Length"])))

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/done"
    finally:
        server.shutdown()


@contextmanager
def remembering_receiver(*, refuse: int) -> Iterator[tuple[str, list[tuple[dict[str, str], bytes]]]]:
    """A server that refuses the first callbacks and remembers all: yields its address, and headers and body of each."""
    calls: list[tuple[dict[str, str], bytes]] = []

    def note(handler: BaseHTTPRequestHandler, body: bytes) -> None:
        calls.append((dict(handler.headers), body))
        handler.send_response(503 if len(calls) <= refuse else 204)
        handler.end_headers()

    with receiver(note) as url:
        yield url, calls


@contextmanager
def dripping_server() -> Iterator[tuple[str, threading.Event]]:
    """A server that answers with a byte of a header now and then, and never ends; yields its address, and what is set
    once it is cut off."""
    stop, cut = threading.Event(), threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def handle(self) -> None:
            try:
                self.connection.sendall(b"HTTP/1.1 200 OK\r\nX-Drip: ")
                while not stop.wait(0.05):
                    self.connection.sendall(b"x")
            except OSError:
                cut.set()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/drip", cut
    finally:
        stop.set()
        server.shutdown()
