#!/usr/bin/env python3
"""How much `fleet.py serve` takes, and how soon it tells.

AWS is moto's server, a process of its own, behind a proxy that adds a round trip. No worker runs: this program writes
the receipts itself, so that it knows when. Measured are jobs posted a second by one process, the time from a receipt to
its client's websocket and the requests to S3 meanwhile, many waiting websockets, and the memory that serve holds while a
large file goes through /view.

Usage: tests/bench/bench_gateway.py [--jobs N] [--watched N] [--sockets N] [--mib N] [--round-trip SECONDS]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench_tools import at_distance

sys.path.extend(map(str, (Path(__file__).resolve().parents[2], Path(__file__).resolve().parents[1] / "cloud")))

import aiohttp
import boto3
from bench_send import local_cloud
from local_cloud import ACCOUNT_ID, REGION
from places import copy_scripts

BUCKET = f"simple-comfy-{ACCOUNT_ID}-{REGION}-bench"
RUN_S = 2.0
CLIENTS = 50
"""Connections that post at the same time."""


class Serve:
    """A serve in a process of its own, before an empty environment."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        with (folder / "serve.log").open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "fleet.py", "serve", "--port", "0"],
                cwd=folder,
                env=environment,
                stdout=log,
                stderr=log,
            )
        while not (found := re.search(r"http://\S+", (folder / "serve.log").read_text())):
            assert self.process.poll() is None, (folder / "serve.log").read_text()
            time.sleep(0.05)
        self.url = found[0]

    def memory_mib(self) -> float:
        """What it holds now."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(text.partition("VmRSS:")[2].split()[0]) / 1024


@contextmanager
def environment(round_trip_s: float) -> Iterator[tuple[Serve, Any, list[bytes]]]:
    """A serve, an S3 client that is near, and the requests that serve makes."""
    asked: list[bytes] = []

    def note(data: bytes) -> None:
        asked.extend(re.findall(rb"(?m)^(GET|PUT|HEAD|POST) ", data))

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "comfy"
        folder.mkdir()
        copy_scripts(folder)
        (folder / "env").write_text(f"ENV=bench\nACCOUNT_ID={ACCOUNT_ID}\nREGION={REGION}\n")
        os.environ |= {"AWS_ACCESS_KEY_ID": "local", "AWS_SECRET_ACCESS_KEY": "local"}
        with local_cloud(Path(name)) as endpoint, at_distance(endpoint, round_trip_s, note) as far:
            s3 = boto3.client("s3", endpoint_url=endpoint, region_name=REGION)
            sqs = boto3.client("sqs", endpoint_url=endpoint, region_name=REGION)
            s3.create_bucket(Bucket=BUCKET, CreateBucketConfiguration={"LocationConstraint": REGION})
            sqs.create_queue(QueueName="simple-comfy-bench-queue")
            serve = Serve(folder, os.environ | {"AWS_ENDPOINT_URL": far})
            try:
                yield serve, s3, asked
            finally:
                serve.process.terminate()
                serve.process.wait()


def workflow() -> dict[str, Any]:
    """One that a fleet would take."""
    return {
        "1": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 0}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "x"}},
    }


def receipt(job_id: str) -> bytes:
    """A job's result.json, without files."""
    now = datetime.now(UTC).isoformat()
    timings = {"sent_at": now, "started_at": now, "finished_at": now, "wait_s": 0.0, "run_s": 0.0}
    result = {"job_id": job_id, "status": "succeeded", "env": "bench", "instance_id": "i-0", "attempt": 1,
              "outputs": [], "values": {}, "warnings": [], "error": None, "timings": timings}  # fmt: skip
    return json.dumps(result).encode()


async def post_many(
    session: aiohttp.ClientSession, url: str, jobs: int, client_id: str
) -> tuple[list[str], list[float]]:
    """Post so many by CLIENTS at once; their ids, and how long each took."""
    ids: list[str] = []
    took: list[float] = []
    numbers = iter(range(jobs))

    async def post() -> None:
        for _ in numbers:
            began = time.perf_counter()
            async with session.post(f"{url}/prompt", json={"prompt": workflow(), "client_id": client_id}) as answer:
                assert answer.status == 200, await answer.text()
                ids.append((await answer.json())["prompt_id"])
            took.append(time.perf_counter() - began)

    await asyncio.gather(*(post() for _ in range(CLIENTS)))
    return ids, took


async def measure_posts(serve: Serve, jobs: int) -> None:
    """Jobs a second through one process."""
    async with aiohttp.ClientSession() as session:
        await post_many(session, serve.url, CLIENTS, "warm")
        began = time.perf_counter()
        _, took = await post_many(session, serve.url, jobs, "bench")
        seconds = time.perf_counter() - began
    print(json.dumps({
        "measured": "POST /prompt", "jobs": jobs, "jobs a second": round(jobs / seconds, 1),
        "median ms": round(1000 * statistics.median(took), 1), "slowest ms": round(1000 * max(took), 1),
    }))  # fmt: skip


async def measure_watching(serve: Serve, s3: Any, asked: list[bytes], watched: int) -> None:
    """From a receipt in the bucket to the websocket, while so many jobs are watched: one begins every fifth of a second,
    and ends RUN_S later."""
    client_id = str(uuid.uuid4())
    ended: dict[str, float] = {}
    late: list[float] = []
    async with aiohttp.ClientSession() as session, session.ws_connect(f"{serve.url}/ws?clientId={client_id}") as line:
        ids, _ = await post_many(session, serve.url, watched, client_id)
        await asyncio.sleep(3)
        asked.clear()
        began = time.perf_counter()

        async def hear() -> None:
            async for message in line:
                said = json.loads(message.data)
                if said["type"] == "execution_success":
                    while said["data"]["prompt_id"] not in ended:  # S3 has it, and this program is not told yet
                        await asyncio.sleep(0.001)
                    late.append(time.perf_counter() - ended[said["data"]["prompt_id"]])
                    if len(late) == watched:
                        return

        hearing = asyncio.create_task(hear())
        await asyncio.sleep(10)
        watching_s, requests = time.perf_counter() - began, len(asked)

        async def work(job_id: str) -> None:
            """What a worker does in the bucket."""
            progress = json.dumps({"job_id": job_id, "status": "running", "nodes": 2}).encode()
            await asyncio.to_thread(s3.put_object, Bucket=BUCKET, Key=f"output/{job_id}/progress.json", Body=progress)
            await asyncio.sleep(RUN_S)
            body = receipt(job_id)
            await asyncio.to_thread(s3.put_object, Bucket=BUCKET, Key=f"output/{job_id}/result.json", Body=body)
            ended[job_id] = time.perf_counter()

        working = []
        for job_id in ids:
            working.append(asyncio.create_task(work(job_id)))
            await asyncio.sleep(0.2)
        await hearing
        await asyncio.gather(*working)
    ordered = sorted(late)
    print(json.dumps({
        "measured": "from receipt to websocket", "watched": watched, "median s": round(statistics.median(ordered), 3),
        "95 of 100 s": round(ordered[int(0.95 * (len(ordered) - 1))], 3), "slowest s": round(ordered[-1], 3),
        "requests a watched job-minute": round(requests / watching_s * 60 / watched, 1),
    }))  # fmt: skip


async def measure_sockets(serve: Serve, sockets: int) -> None:
    """So many clients that wait, and how soon the last of them hears that a job was posted."""
    before = serve.memory_mib()
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        began = time.perf_counter()
        lines = [await session.ws_connect(f"{serve.url}/ws?clientId={number}") for number in range(sockets)]
        for line in lines:
            await line.receive()
        opened_s = time.perf_counter() - began
        held = serve.memory_mib()
        began = time.perf_counter()
        await post_many(session, serve.url, 1, "somebody")
        await asyncio.gather(*(line.receive() for line in lines))
        told_s = time.perf_counter() - began
        for line in lines:
            await line.close()
    print(json.dumps({
        "measured": "waiting websockets", "sockets": sockets, "opened in s": round(opened_s, 2),
        "KiB each": round(1024 * (held - before) / sockets, 1), "all told of a job in s": round(told_s, 2),
    }))  # fmt: skip


async def measure_view(serve: Serve, s3: Any, mib: int) -> None:
    """What serve holds while a large file goes through it."""
    job_id = str(uuid.uuid4())
    key = f"output/{job_id}/large.bin"
    part = os.urandom(1024 * 1024) * 64
    upload = s3.create_multipart_upload(Bucket=BUCKET, Key=key)["UploadId"]
    parts = []
    for number in range(1, max(1, mib // 64) + 1):
        tag = s3.upload_part(Bucket=BUCKET, Key=key, UploadId=upload, PartNumber=number, Body=part)["ETag"]
        parts.append({"PartNumber": number, "ETag": tag})
    s3.complete_multipart_upload(Bucket=BUCKET, Key=key, UploadId=upload, MultipartUpload={"Parts": parts})
    before, most, size = serve.memory_mib(), 0.0, 0
    query = {"filename": "large.bin", "subfolder": job_id, "type": "output"}
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        began = time.perf_counter()
        async with session.get(f"{serve.url}/view", params=query) as answer:
            async for chunk in answer.content.iter_chunked(1024 * 1024):
                size += len(chunk)
                most = max(most, serve.memory_mib())
        seconds = time.perf_counter() - began
    assert size == len(part) * len(parts)
    print(json.dumps({
        "measured": "a file through /view", "MiB": size // 2**20, "MiB a second": round(size / 2**20 / seconds),
        "held before MiB": round(before, 1), "most held MiB": round(most, 1),
    }))  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print an object for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--watched", type=int, default=100)
    parser.add_argument("--sockets", type=int, default=1000)
    parser.add_argument("--mib", type=int, default=2048, help="how large the file is")
    parser.add_argument("--round-trip", type=float, default=0.025, metavar="SECONDS")
    options = parser.parse_args(arguments)
    with environment(options.round_trip) as (serve, s3, asked):
        asyncio.run(measure_sockets(serve, options.sockets))
        asyncio.run(measure_view(serve, s3, options.mib))
        asyncio.run(measure_posts(serve, options.jobs))
        asyncio.run(measure_watching(serve, s3, asked, options.watched))
    return 0


if __name__ == "__main__":
    sys.exit(main())
