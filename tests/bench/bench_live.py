#!/usr/bin/env python3
"""How soon a client of `fleet.py serve` hears that its job runs: a real worker, the local cloud, the stand-in.

Jobs run one after the other. Printed is the time from ComfyUI's own note that a job begins to `execution_start` on the
client's websocket, and how often progress was stored: of jobs that a client with a websocket has posted, and of the
same that nobody follows.

Usage: tests/bench/bench_live.py [--jobs N]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.extend(str(Path(__file__).resolve().parents[1] / room) for room in ("..", "cloud", "operate"))
from gateway_tools import Client, Door
from local_cloud import LocalCloud
from workplace import Site, await_that, image_workflow

from comfy_utils import OBJECT_INFO_KEY

RUNS_S = 3.0


class Counting(LocalCloud):
    """The local cloud, which counts how often progress is stored."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.stored = Counter[str]()

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if environ["REQUEST_METHOD"] == "PUT" and path.endswith("/progress.json"):
            self.stored[path.split("/")[-2]] += 1
        return super().__call__(environ, start_response)


def began_at(site: Site, job_id: str) -> float:
    """When ComfyUI began with the job."""
    entries = map(json.loads, site.ledger.read_text().splitlines())
    return float(next(each["time"] for each in entries if each["prompt_id"] == job_id))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--jobs", type=int, default=20)
    jobs = parser.parse_args().jobs
    with tempfile.TemporaryDirectory() as folder, Counting(Path(folder) / "cloud") as cloud:
        assert isinstance(cloud, Counting)
        site = Site(cloud, Path(folder) / "comfy")
        try:
            site.start_comfyui()
            site.start_worker()
            await_that("the nodes are stored", lambda: site.keys(OBJECT_INFO_KEY))
            client = Client(Door(site).address)
            client.listen()
            late: list[float] = []
            ids: list[str] = []
            for number in range(jobs):
                ids.append(client.run(image_workflow(RUNS_S + number / 1000)))
                while client.next()["type"] != "execution_start":
                    pass
                late.append(time.time() - began_at(site, ids[-1]))
                client.hear(ids[-1])
            others = [site.send(image_workflow(RUNS_S + number / 2000)) for number in range(1, 4)]
            for job_id in others:
                site.await_result(job_id)
        finally:
            site.end()
    late.sort()
    print(f"from the begin to the client, {jobs} jobs: p50 {statistics.median(late):.2f} s, max {late[-1]:.2f} s")
    for what, group in (("followed", ids), ("not followed", others)):
        times = sum(cloud.stored[job_id] for job_id in group) / len(group)
        print(f"progress stored, {what}, {RUNS_S:g} s each: {times:.1f} times a job")
    return 0


if __name__ == "__main__":
    sys.exit(main())
