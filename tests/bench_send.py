#!/usr/bin/env python3
"""How fast jobs are sent: many in one call and one by one, and what one `send_job.py` spends its time on.

AWS is moto's server behind a proxy that adds a round trip. Everything is measured side by side in one run, and
several times in turn; the median counts.

Usage: tests/bench_send.py [--jobs N] [--rounds N]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from bench_tools import at_distance, median_ms
from local_cloud import ACCOUNT_ID, REGION, LocalCloud

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import send_job
from comfy_utils import aws_client, load_settings

ROOT = Path(__file__).resolve().parent.parent
BUNDLE = ("send_job.py", "comfy_utils.py", "simple_workflow.json")
ROUND_TRIPS_S = (0.0, 0.005, 0.025)
ONE_BY_ONE = 10
SETTINGS = f"ENV=bench\nACCOUNT_ID={ACCOUNT_ID}\nREGION={REGION}\n"
QUEUE, GROUP = "simple-comfy-bench-queue", "simple-comfy-bench-asg"

PHASES = """
import time
began = time.perf_counter()
import send_job
imported = time.perf_counter()
sender = send_job.Sender(send_job.load_settings())
loaded = time.perf_counter()
import boto3
boto = time.perf_counter()
sender._queue()
found = time.perf_counter()
sender.send({"exec_cmd": "true"})
sent = time.perf_counter()
sender.raise_capacity(1)
raised = time.perf_counter()
print(imported - began, loaded - imported, boto - loaded, found - boto, sent - found, raised - sent)
"""
NAMES = (
    "import send_job",
    "settings",
    "import boto3",
    "client, GetQueueUrl",
    "SendMessage",
    "client, raise capacity",
)


def as_the_sample_does(sqs: Any, autoscaling: Any, body: str) -> None:
    """One job with the calls that the AWS sample's sender makes, on clients it has already."""
    url = sqs.get_queue_url(QueueName=QUEUE)["QueueUrl"]
    sqs.send_message(QueueUrl=url, MessageBody=body)
    sqs.get_queue_attributes(QueueUrl=url, AttributeNames=["ApproximateNumberOfMessages"])
    autoscaling.describe_auto_scaling_groups(AutoScalingGroupNames=[GROUP])


def rate(jobs: int, action: Callable[[], object], times: int = 1) -> float:
    """Jobs a second, of an action that sends so many and is done so often."""
    began = time.perf_counter()
    for _ in range(times):
        action()
    return jobs * times / (time.perf_counter() - began)


def bench_many(endpoint: str, jobs: int, rounds: int) -> None:
    """Jobs a second: many in one call, one `submit` after the other, and the sample's calls one after the other."""
    workflow = json.loads((ROOT / "simple_workflow.json").read_text())
    body = json.dumps(workflow)
    print(
        f"{'jobs a second, round trip to AWS':40}{'submit_many':>13}{'submit':>10}{'as the sample':>15}{'ratio':>8}"
    )
    for round_trip_s in ROUND_TRIPS_S:
        with at_distance(endpoint, round_trip_s) as far:
            os.environ["AWS_ENDPOINT_URL"] = far
            sample_sends = partial(
                as_the_sample_does, aws_client("sqs", REGION), aws_client("autoscaling", REGION), body
            )
            rates = [
                (
                    rate(jobs, partial(send_job.submit_many, [workflow] * jobs)),
                    rate(1, partial(send_job.submit, workflow), ONE_BY_ONE),
                    rate(1, sample_sends, ONE_BY_ONE),
                )
                for _ in range(rounds)
            ]
            many, one, sample = (sorted(column)[rounds // 2] for column in zip(*rates, strict=True))
            label = f"  {round_trip_s * 1000:.0f} ms, {jobs} jobs"
            print(f"{label:40}{many:13.0f}{one:10.1f}{sample:15.1f}{many / sample:8.0f}")


def bench_process(endpoint: str, rounds: int, folder: Path) -> None:
    """What a process that sends one job spends its time on, with 25 ms trips, beside an empty interpreter."""
    times: dict[str, list[float]] = {}
    with at_distance(endpoint, ROUND_TRIPS_S[-1]) as far:
        os.environ["AWS_ENDPOINT_URL"] = far
        for _ in range(rounds):
            for name, command in {
                "python -c pass": ("-c", "pass"),
                "import send_job": ("-c", "import send_job"),
                "import boto3, as the sample does": ("-c", "import boto3, websocket"),
                "send_job.py --help": ("send_job.py", "--help"),
                "send_job.py, one job": ("send_job.py",),
            }.items():
                began = time.perf_counter()
                subprocess.run([sys.executable, *command], cwd=folder, check=True, capture_output=True)
                times.setdefault(name, []).append(time.perf_counter() - began)
            ran = subprocess.run(
                [sys.executable, "-c", PHASES], cwd=folder, check=True, capture_output=True, text=True
            )
            for name, seconds in zip(NAMES, map(float, ran.stdout.split()), strict=True):
                times.setdefault(f"  {name}", []).append(seconds)
    nothing = median_ms(times["python -c pass"])
    print(f"\n{'whole processes, 25 ms to AWS':40}{'median':>13}{'beyond an empty one':>25}")
    for name, measured in times.items():
        beyond = "" if name.startswith("  ") else f"{median_ms(measured) - nothing:22.0f} ms"
        print(f"{name:40}{median_ms(measured):10.0f} ms{beyond}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Print both tables."""
    parser = argparse.ArgumentParser(description="How fast jobs are sent.")
    parser.add_argument("--jobs", type=int, default=1000, metavar="N", help="jobs in one submit_many (default: 1000)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="measurements of each (default: 5)")
    options = parser.parse_args(arguments)
    if min(options.jobs, options.rounds) < 1:
        parser.error("--jobs and --rounds are at least 1")
    with tempfile.TemporaryDirectory() as scratch, LocalCloud(Path(scratch) / "cloud") as cloud:
        folder = Path(scratch)
        for name in BUNDLE:
            shutil.copy2(ROOT / name, folder)
        (folder / "env").write_text(SETTINGS)
        os.environ.update(cloud.environment())
        cloud.client("sqs").create_queue(QueueName=QUEUE)
        image = cloud.client("ec2").describe_images()["Images"][0]["ImageId"]
        cloud.client("autoscaling").create_launch_configuration(
            LaunchConfigurationName="bench", ImageId=image, InstanceType="g5.2xlarge"
        )
        cloud.client("autoscaling").create_auto_scaling_group(
            AutoScalingGroupName=GROUP, LaunchConfigurationName="bench", MinSize=0, MaxSize=0,
            AvailabilityZones=[f"{REGION}a"],
        )  # fmt: skip
        with mock.patch.object(send_job, "load_settings", lambda env: load_settings(env, folder / "env")):
            bench_many(cloud.endpoint, options.jobs, options.rounds)
        bench_process(cloud.endpoint, options.rounds, folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
