#!/usr/bin/env python3
"""What sending from a Lambda function costs: the size of the zip, its import, the first and the next send.

The zip is made as docs/jobs.md says, unpacked, and run in a new process with what Lambda gives one: no settings file, a
region, credentials. AWS is moto's server behind a proxy that adds a round trip of 25 ms. The medians of some processes.

Usage: tests/bench/bench_lambda.py [--rounds N]
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from bench_send import local_cloud
from bench_tools import at_distance
from local_cloud import REGION
from places import ROOT

from comfy_utils import aws_client

FUNCTION = """
import time
began = time.perf_counter()
import json, send_job
imported = time.perf_counter()
workflow = json.load(open(send_job.DEMO_WORKFLOW))
for _ in range(2):
    send_job.submit(workflow)
    print((imported - began) * 1000, (time.perf_counter() - imported) * 1000)
    imported = time.perf_counter()
"""


def make_zip(folder: Path) -> Path:
    """The function's zip, without a line of its own."""
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder / "wheel"],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    (wheel,) = (folder / "wheel").iterdir()
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    subprocess.run([*pip, "--target", folder / "function", wheel], check=True, capture_output=True)
    return Path(shutil.make_archive(str(folder / "function"), "zip", folder / "function"))


def main() -> int:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    with (
        tempfile.TemporaryDirectory() as name,
        local_cloud(Path(name)) as endpoint,
        at_distance(endpoint, 0.025) as far,
    ):
        folder = Path(name)
        archive = make_zip(folder)
        print(f"zip              {archive.stat().st_size / 1000:5.0f} KB")
        known = {"AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": "local", "AWS_SECRET_ACCESS_KEY": "local"}
        os.environ.update(known)
        aws_client("s3", REGION).create_bucket(
            Bucket="simple-comfy-123456789012-us-west-2-pro", CreateBucketConfiguration={"LocationConstraint": REGION}
        )
        aws_client("sqs", REGION).create_queue(QueueName="simple-comfy-pro-queue")
        variables = os.environ | {"AWS_ENDPOINT_URL": far, "AWS_REGION": REGION, "ENV": "pro"}
        times: list[list[float]] = []
        for _ in range(rounds):
            shutil.rmtree(folder / "task", ignore_errors=True)
            shutil.unpack_archive(archive, folder / "task")
            ran = subprocess.run(
                [sys.executable, "-c", FUNCTION], cwd=folder / "task", env=variables, check=True,
                capture_output=True, text=True,
            )  # fmt: skip
            first, second = (line.split() for line in ran.stdout.splitlines())
            times.append([float(first[0]), float(first[1]), float(second[1])])
    imported, first_ms, next_ms = (statistics.median(each) for each in zip(*times, strict=True))
    for what, value in (("import send_job", imported), ("first submit", first_ms), ("next submit", next_ms)):
        print(f"{what:16} {value:5.0f} ms")
    return 0


if __name__ == "__main__":
    sys.exit(main())
