#!/usr/bin/env python3
"""What a process with many waiting jobs costs: as_completed, as_completed_async, and a thread with `wait` for each job.

S3 and SQS are a small server of its own here that answers what is asked after a round trip, so that its speed is no part
of the figures. Jobs end one after the other, each with a receipt and an entry in the list of ended jobs, as workers
write them; most of them end after the time is up. Of each way: how long until all wait and the processor time for it,
then requests to S3 a minute, share of a core, and from the receipt to the news of it.

Usage: tests/bench/bench_wait.py [--jobs N] [--ending N] [--seconds S] [--ways NAME ...]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

sys.path.append(str(Path(__file__).resolve().parents[2]))

from comfy_utils import ended_key, result_key

ROOT = Path(__file__).resolve().parents[2]
ROUND_TRIP_S = 0.025
SETTLED_S = 10.0
"""So long after all wait the first round's looks are over, and the figures begin."""
NOT_THERE = b"<Error><Code>NoSuchKey</Code><Message>no</Message></Error>"
QUEUE = {"QueueUrl": "http://127.0.0.1/queue", "Attributes": {
    "MessageRetentionPeriod": "345600", "ApproximateNumberOfMessages": "900",
    "ApproximateNumberOfMessagesNotVisible": "100", "ApproximateNumberOfMessagesDelayed": "0"}}  # fmt: skip

WAITER = """
import asyncio, json, sys, threading, time
import send_job

way, ids = sys.argv[1], json.load(open(sys.argv[2]))
said = threading.Lock()


def tell(result):
    with said:
        print("news", result["job_id"], time.time(), flush=True)


async def together():
    async for result in send_job.as_completed_async(ids):
        tell(result)


def cpu_time():
    for line in sys.stdin:
        print("cpu", time.process_time(), flush=True)


threading.Thread(target=cpu_time, daemon=True).start()
if way == "as_completed":
    for result in send_job.as_completed(ids):
        tell(result)
elif way == "as_completed_async":
    asyncio.run(together())
else:
    threads = [threading.Thread(target=lambda job_id: tell(send_job.wait(job_id)), args=[job_id]) for job_id in ids]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
"""
WAYS = ("as_completed", "as_completed_async", "threads")


class Aws:
    """A bucket with receipts and the list of ended jobs, and a queue that holds messages."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self.looked_at: set[str] = set()
        self.receipts: dict[str, bytes] = {}
        self.listed: list[str] = []
        self.port = 0
        self._loop = asyncio.new_event_loop()
        ready = threading.Event()

        async def start() -> None:
            server = await asyncio.start_server(self._serve, "127.0.0.1", 0, backlog=2000)
            self.port = server.sockets[0].getsockname()[1]
            ready.set()

        def run() -> None:
            self._loop.run_until_complete(start())
            self._loop.run_forever()

        threading.Thread(target=run, daemon=True).start()
        ready.wait()

    def end(self, job_id: str) -> float:
        """Store a receipt, then the entry in the list; returns when."""
        now = time.time()
        receipt: dict[str, object] = {"job_id": job_id, "status": "succeeded", "error": None, "outputs": []}
        self.receipts["/bench/" + result_key(job_id)] = json.dumps(receipt).encode()
        self.listed.append(ended_key(int(now * 1000), job_id))
        return now

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                length = re.search(r"(?i)content-length: (\d+)", head)
                await reader.readexactly(int(length[1]) if length else 0)
                await asyncio.sleep(ROUND_TRIP_S)
                status, body = self._answer(*head.split(" ", 2)[:2])
                writer.write(f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    def _answer(self, method: str, target: str) -> tuple[int, bytes]:
        url = urlsplit(target)
        query = parse_qs(url.query)
        if method == "POST":
            self.asked["sqs"] += 1
            return 200, json.dumps(QUEUE).encode()
        if "list-type" in query:
            self.asked["list"] += 1
            after = unquote(query["start-after"][0])
            keys = "".join(f"<Contents><Key>{key}</Key></Contents>" for key in self.listed if key > after)
            return 200, f"<ListBucketResult>{keys}<IsTruncated>false</IsTruncated></ListBucketResult>".encode()
        self.asked["get"] += 1
        self.looked_at.add(url.path)
        receipt = self.receipts.get(url.path)
        return (200, receipt) if receipt else (404, NOT_THERE)


class Waiter:
    """A process that waits, and what it says."""

    def __init__(self, way: str, aws: Aws, ids: Sequence[str], folder: Path) -> None:
        (folder / "ids.json").write_text(json.dumps(ids))
        known = {"ENV": "bench", "S3_BUCKET": "bench", "AWS_REGION": "us-west-2", "PYTHONPATH": str(ROOT),
                 "AWS_ENDPOINT_URL": f"http://127.0.0.1:{aws.port}", "AWS_ACCESS_KEY_ID": "local",
                 "AWS_SECRET_ACCESS_KEY": "local", "COMFY_SETTINGS": str(folder / "none")}  # fmt: skip
        (folder / "none").touch()
        command = [sys.executable, "-c", WAITER, way, str(folder / "ids.json")]
        self.process = subprocess.Popen(
            command, env=os.environ | known, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.news: dict[str, float] = {}
        self._cpu_s = -1.0
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            kind, *values = line.split()
            if kind == "cpu":
                self._cpu_s = float(values[0])
            else:
                self.news[values[0]] = float(values[1])

    def cpu_s(self) -> float:
        """Its processor time until now."""
        assert self.process.stdin
        self._cpu_s = -1.0
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        while self._cpu_s < 0:
            assert self.process.poll() is None, "the waiter has ended"
            time.sleep(0.01)
        return self._cpu_s

    def end(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()


def measure(way: str, jobs: int, ending: int, seconds: float, folder: Path) -> str:
    """A row of the table: what so many waiting jobs cost, of which `ending` end within the time."""
    aws, ids = Aws(), [str(uuid.uuid4()) for _ in range(jobs)]
    began = time.monotonic()
    waiter = Waiter(way, aws, ids, folder)
    try:
        while len(aws.looked_at) < (jobs if way == "threads" else 1):
            time.sleep(0.05)
        ready_s, ready_cpu_s = time.monotonic() - began, waiter.cpu_s()
        time.sleep(SETTLED_S)
        before, cpu_s, began = aws.asked.copy(), waiter.cpu_s(), time.monotonic()
        ended: dict[str, float] = {}
        for number, job_id in enumerate(random.Random(1).sample(ids, ending)):
            time.sleep(max(0.0, began + (number + 0.5) * seconds / ending - time.monotonic()))
            ended[job_id] = aws.end(job_id)
        time.sleep(max(0.0, began + seconds - time.monotonic()))
        took_s = time.monotonic() - began
        share, asked = (waiter.cpu_s() - cpu_s) / took_s, aws.asked - before
        while len(waiter.news) < ending:
            time.sleep(0.05)
    finally:
        waiter.end()
    late = sorted(waiter.news[job_id] - moment for job_id, moment in ended.items())
    per_minute = {kind: round(asked[kind] * 60 / took_s) for kind in ("get", "list")}
    return (
        f"| {way} | {ending} | {ready_s:.1f} s, {ready_cpu_s:.1f} s | {per_minute['get']} + {per_minute['list']} "
        f"| {100 * share:.1f} % | {statistics.median(late):.1f} s | {late[int(0.99 * len(late))]:.1f} s |"
    )


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--jobs", type=int, default=1000, help="so many wait")
    parser.add_argument("--ending", type=int, nargs="+", default=[20, 600], help="so many of them end in the time")
    parser.add_argument("--seconds", type=float, default=60.0, help="the time")
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    options = parser.parse_args()
    print("| way | jobs that end | until all wait, processor time | GET + LIST a minute | of a core | p50 | p99 |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for ending in options.ending:
            for way in options.ways:
                print(measure(way, options.jobs, ending, options.seconds, Path(folder)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
