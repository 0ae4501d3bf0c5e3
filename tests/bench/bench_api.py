#!/usr/bin/env python3
"""The Comfy API v2 side by side: comfy-api-proxy before one ComfyUI, and serve before a fleet of one and of three.

All ComfyUIs are the stand-in, and the client is comfy-sdk, unchanged. Measured are jobs submitted a second, the time from
a job's end in ComfyUI to its client's stream of events, for eight of them (more the proxy does not take), and the time
from the first submission to the last end. AWS is moto, in this process, on the same cores as all else.

Usage: tests/bench/bench_api.py [--jobs N] [--seconds S]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.extend(
    map(
        str,
        (
            Path(__file__).resolve().parents[2],
            *(Path(__file__).resolve().parents[1] / n for n in ("cloud", "operate")),
        ),
    )
)

import requests
from comfy_sdk import AsyncComfy
from gateway_tools import Door, start_instance
from local_cloud import LocalCloud, free_port
from workplace import Site, await_that, image_workflow

from comfy_utils import OBJECT_INFO_KEY

CLIENTS = 20
"""Submissions under way at once."""
WATCHED = 8


@contextmanager
def fleet(cloud: LocalCloud, folder: Path, instances: int) -> Iterator[tuple[str, Path]]:
    """The address of a serve, and the ledger of its ComfyUIs."""
    site = Site(cloud, folder / "comfy")
    site.start_comfyui()
    site.start_worker()
    more = [each for n in range(1, instances) for each in start_instance(site, folder / f"instance{n}")]
    await_that("the nodes are stored", lambda: site.keys(OBJECT_INFO_KEY))
    try:
        yield Door(site).url, site.ledger
    finally:
        site.end()
        for process in more:
            process.kill()
            process.wait()


@contextmanager
def proxy(cloud: LocalCloud, folder: Path) -> Iterator[tuple[str, Path]]:
    """The same of a proxy before one ComfyUI."""
    site = Site(cloud, folder / "comfy")
    site.start_comfyui()
    port = free_port()
    command = [str(Path(sys.executable).with_name("comfy-api-proxy")), "--comfyui", f"http://127.0.0.1:{site.port}"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([*command, "--port", str(port)], cwd=folder, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    await_that("the proxy answers", lambda: answers(f"{url}/api/v2/health"))
    try:
        yield url, site.ledger
    finally:
        process.kill()
        process.wait()
        site.end()


def answers(url: str) -> bool:
    try:
        return requests.get(url, timeout=5).status_code == 200
    except requests.ConnectionError:
        return False


async def measure(name: str, url: str, ledger: Path, jobs: int, seconds: float) -> None:
    """Submit so many jobs, and see when they are known to have ended."""
    os.environ["COMFY_BASE_URL"] = url
    known: dict[str, float] = {}
    async with AsyncComfy() as client:
        numbers = iter(range(jobs))
        streams: list[asyncio.Task[None]] = []

        async def listen(job: Any) -> None:
            async for _ in job.events():
                pass
            known[job.id] = time.time()

        async def submit() -> None:
            for number in numbers:
                job = await client.submit(client.workflows.from_json(image_workflow(seconds)))
                if number % max(1, jobs // WATCHED) == 0 and len(streams) < WATCHED:
                    streams.append(asyncio.create_task(listen(job)))

        began = time.time()
        await asyncio.gather(*(submit() for _ in range(CLIENTS)))
        submitted_s = time.time() - began
        while len(ends := ends_in(ledger)) < jobs:
            await asyncio.sleep(0.2)
        await asyncio.gather(*streams)
    late = [known[job_id] - ends[job_id] for job_id in known]
    print(
        f"{name}: {jobs / submitted_s:.0f} jobs submitted a second, known {statistics.median(late):.1f} s after their "
        f"end (at most {max(late):.1f}), all ended after {max(ends.values()) - began:.1f} s",
        flush=True,
    )


def ends_in(ledger: Path) -> dict[str, float]:
    """When each job ended."""
    lines = map(json.loads, ledger.read_text().splitlines() if ledger.exists() else ())
    return {entry["prompt_id"]: entry["time"] for entry in lines if entry["event"] == "success"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=200, metavar="N", help="default: 200")
    parser.add_argument("--seconds", type=float, default=0.2, metavar="S", help="of each job (default: 0.2)")
    options = parser.parse_args()
    os.environ |= {"AWS_ACCESS_KEY_ID": "local", "AWS_SECRET_ACCESS_KEY": "local"}
    # Nothing may ever reach a real AWS address.
    os.environ |= dict.fromkeys(("AWS_ENDPOINT_URL", "AWS_EC2_METADATA_SERVICE_ENDPOINT"), "http://127.0.0.1:9")
    with tempfile.TemporaryDirectory() as name, LocalCloud(Path(name)) as cloud:
        peers: dict[str, Callable[[Path], Any]] = {
            "comfy-api-proxy, one ComfyUI": lambda folder: proxy(cloud, folder),
            "serve, one instance": lambda folder: fleet(cloud, folder, 1),
            "serve, three instances": lambda folder: fleet(cloud, folder, 3),
        }
        for number, (peer, start) in enumerate(peers.items()):
            folder = Path(name) / str(number)
            folder.mkdir()
            with start(folder) as (url, ledger):
                asyncio.run(measure(peer, url, ledger, options.jobs, options.seconds))


if __name__ == "__main__":
    main()
