#!/usr/bin/env python3
"""How long a job whose last attempt dies waits for its answer: real workers, the local cloud, the stand-in.

Two kinds of jobs, on two sites beside each other, each with a queue, a worker and a ComfyUI of its own:

killed  the worker gets SIGKILL 0.2 s after it has received the job, at each of two attempts, and another is started,
        which knows nothing of what it held, as on another instance.
        Nobody says a word of the job: its message must come back, which VISIBILITY_TIMEOUT=3 decides here and 120
        where nothing is set, and come to the dead-letter queue; there a worker finds it when it looks.
died    the job ends ComfyUI each time it runs, the second time for good, and systemd's stand-in starts it anew.

Printed is the time from the last kill, or death, to the receipt and to the callback, and how many of these each job
got. It exits with 1 where that is not one receipt and a callback. That may come twice: from a worker which is killed
before it has noted that it was made.

Usage: tests/bench/bench_answers.py [--jobs N] [--only killed|died]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

sys.path.extend(map(str, (Path(__file__).resolve().parents[2], Path(__file__).resolve().parents[1] / "cloud")))
from local_cloud import LocalCloud
from workplace import Site, await_that, image_workflow

SITES = 2
MAX_RECEIVES = 2
KILLED_AFTER_S = 0.2
LIMIT_S = 3600.0


class Delivery(NamedTuple):
    """A message that a worker has received."""

    message_id: str
    attempt: int


class Answers:
    """What each job got, by the jobs' ids: when its last attempt died, its receipts, its callbacks."""

    def __init__(self) -> None:
        self.died_at: dict[str, float] = {}
        self.receipts: dict[str, list[float]] = defaultdict(list)
        self.callbacks: dict[str, list[float]] = defaultdict(list)


class Witness(LocalCloud):
    """The local cloud, which notes what workers receive and every receipt that is written."""

    def __init__(self, folder: Path, answers: Answers) -> None:
        super().__init__(folder)
        self.answers = answers
        self.deliveries: dict[str, list[Delivery]] = defaultdict(list)  # by queue

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        answered: list[Any] = []
        answer = b"".join(super().__call__(environ, lambda *args: answered.append(args)))
        if answered[-1][0].startswith("200"):
            receipt = re.fullmatch(r"/[^/]+/output/([^/]+)/result\.json", environ["PATH_INFO"])
            if receipt and environ["REQUEST_METHOD"] == "PUT":
                self.answers.receipts[receipt[1]].append(time.time())
            if environ.get("HTTP_X_AMZ_TARGET", "").endswith("ReceiveMessage"):
                self._note(json.loads(environ["wsgi.input"].getvalue()), json.loads(answer))
        start_response(*answered[-1])
        return [answer]

    def _note(self, call: dict[str, Any], answer: dict[str, Any]) -> None:
        for message in answer.get("Messages", []):
            attempt = int(message["Attributes"]["ApproximateReceiveCount"])
            self.deliveries[call["QueueUrl"]].append(Delivery(message["MessageId"], attempt))


def serve_callbacks(answers: Answers) -> ThreadingHTTPServer:
    """Take callbacks and note when they came."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            result = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            answers.callbacks[result["job_id"]].append(time.time())
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def kill_workers(site: Site, cloud: Witness, answers: Answers, jobs: int) -> None:
    """Jobs whose worker is killed at each attempt."""
    site.start_comfyui()
    ids = [site.send(image_workflow(3600)) for _ in range(jobs)]
    deliveries = cloud.deliveries[site.queue_url]
    while True:
        seen, worker = len(deliveries), site.start_worker()
        await_that("a job comes", lambda before=seen: len(deliveries) > before or site.depth() == (0, 0), LIMIT_S)  # type: ignore[misc]
        if len(deliveries) == seen:
            break
        time.sleep(KILLED_AFTER_S)
        os.killpg(worker.pid, signal.SIGKILL)
        worker.wait()
        shutil.rmtree(site.folder / "held")
        for delivery in deliveries[seen:]:
            if delivery.attempt == MAX_RECEIVES:
                answers.died_at[delivery.message_id] = time.time()
    await_answers(answers, ids)


def end_comfyui(site: Site, _: Witness, answers: Answers, jobs: int) -> None:
    """Jobs that end ComfyUI each time."""
    site.keep_comfyui()
    workflow = image_workflow()
    workflow["2"] = {"class_type": "StandinCrash", "inputs": {"image": ["1", 0]}}
    ids = [site.send(workflow) for _ in range(jobs)]
    site.start_worker()
    await_answers(answers, ids)
    for entry in map(json.loads, site.ledger.read_text().splitlines()):
        if entry["event"] == "died":
            answers.died_at[entry["prompt_id"]] = entry["time"]


def await_answers(answers: Answers, ids: list[str]) -> None:
    """Wait until each job has its callback, and its receipt then, too."""
    await_that("all are answered", lambda: all(answers.callbacks.get(job_id) for job_id in ids), LIMIT_S)


def measure(name: str, run: Callable[[Site, Witness, Answers, int], None], jobs: int, folder: Path) -> bool:
    """Measure one kind, print it, and say whether each job got one receipt and a callback."""
    answers = Answers()
    callbacks = serve_callbacks(answers)
    address = f"http://127.0.0.1:{callbacks.server_port}/done"
    settings = {"VISIBILITY_TIMEOUT": "3", "MAX_RECEIVES": str(MAX_RECEIVES), "CALLBACK_URL": address}
    began = time.monotonic()
    cloud = Witness(folder / "cloud", answers)
    with cloud, ThreadPoolExecutor(SITES) as pool:
        sites = [Site(cloud, folder / f"site{number}", **settings) for number in range(SITES)]
        try:
            shares = [jobs * (number + 1) // SITES - jobs * number // SITES for number in range(SITES)]
            list(pool.map(lambda site, share: run(site, cloud, answers, share), sites, shares))
        finally:
            for site in sites:
                site.end()
    callbacks.shutdown()
    counts = [
        Counter(len(got[job_id]) for job_id in answers.died_at) for got in (answers.receipts, answers.callbacks)
    ]
    took = [
        sorted(got[job_id][0] - died_at for job_id, died_at in answers.died_at.items())
        for got in (answers.receipts, answers.callbacks)
    ]
    for what, count, seconds in zip(("receipt", "callback"), counts, took, strict=True):
        each = ", ".join(f"{number} for {these}" for number, these in sorted(count.items()))
        print(
            f"{name:<8}{len(seconds):5} jobs  {what:<9} p50 {seconds[len(seconds) // 2]:6.1f} s  max {seconds[-1]:6.1f} s"
            f"  each got {each}",
            flush=True,
        )
    print(f"{name:<8}took {time.monotonic() - began:.0f} s", flush=True)
    return len(answers.died_at) == jobs and counts[0] == {1: jobs} and not counts[1][0]


KINDS = {"killed": kill_workers, "died": end_comfyui}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; 1 where a job did not get one receipt and a callback."""
    parser = argparse.ArgumentParser(description="How long a job whose last attempt dies waits for its answer.")
    parser.add_argument("--jobs", type=int, default=200, metavar="N", help="so many of each kind")
    parser.add_argument("--only", choices=list(KINDS), help="only one kind")
    options = parser.parse_args(arguments)
    if options.jobs < SITES:
        parser.error(f"--jobs is {SITES} at least: one for each site")
    good = []
    for name, run in KINDS.items():
        if options.only in (None, name):
            with tempfile.TemporaryDirectory() as folder:
                good.append(measure(name, run, options.jobs, Path(folder)))
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
