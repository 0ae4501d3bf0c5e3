#!/usr/bin/env python3
"""How fast jobs are sent: many in one call and one by one, and what one `send_job.py` spends its time on.

AWS is moto's server, a process of its own, behind a proxy that adds a round trip. Everything is measured side by
side in one run, and several times in turn; the median counts. Each measurement has a queue of its own, because
moto's grow slow as they grow long. What moto itself can take stands beside: the same batches, ready-made and
posted straight to it, REQUESTS_AT_ONCE at a time.

Usage: tests/bench/bench_send.py [--jobs N] [--rounds N]
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import urlsplit

from bench_tools import at_distance, median_ms

sys.path.extend(map(str, (Path(__file__).resolve().parents[2], Path(__file__).resolve().parents[1] / "cloud")))

from local_cloud import ACCOUNT_ID, REGION
from places import CLOUD, ROOT, copy_scripts

import send_job
from comfy_utils import Settings, aws_client, load_settings

ROUND_TRIPS_S = (0.0, 0.025)
ONE_BY_ONE = 5
SETTINGS = f"ENV=bench\nACCOUNT_ID={ACCOUNT_ID}\nREGION={REGION}\n"

PHASES = """
import time
began = time.perf_counter()
import json
import send_job
imported = time.perf_counter()
workflow = json.load(open(send_job.DEMO_WORKFLOW))
sender = send_job.Sender(send_job.load_settings())
loaded = time.perf_counter()
import boto3
boto = time.perf_counter()
send_job.fleet_check(sender.settings, (), print).check(workflow)
checked = time.perf_counter()
sender._queue()
found = time.perf_counter()
sender.send({"prompt": workflow})
sent = time.perf_counter()
sender.raise_capacity(1)
raised = time.perf_counter()
print(imported - began, loaded - imported, boto - loaded, checked - boto, found - checked, sent - found, raised - sent)
"""
NAMES = (
    "import send_job",
    "workflow, settings",
    "import boto3",
    "client, what the fleet has",
    "client, GetQueueUrl",
    "SendMessage",
    "client, raise capacity",
)


@contextmanager
def local_cloud(folder: Path) -> Iterator[str]:
    """The local cloud in a process of its own; yields its address."""
    process = subprocess.Popen(
        [sys.executable, str(CLOUD / "aws_fixtures.py"), str(folder)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout
        endpoint, _ = process.stdout.readline().split()
        yield endpoint
    finally:
        process.terminate()
        process.wait()


def as_the_sample_does(sqs: Any, autoscaling: Any, settings: Settings, body: str) -> None:
    """One job with the calls that the AWS sample's sender makes, on clients it has already."""
    url = sqs.get_queue_url(QueueName=settings.sqs_name)["QueueUrl"]
    sqs.send_message(QueueUrl=url, MessageBody=body)
    sqs.get_queue_attributes(QueueUrl=url, AttributeNames=["ApproximateNumberOfMessages"])
    autoscaling.describe_auto_scaling_groups(AutoScalingGroupNames=[settings.asg_name])


def post_straight(endpoint: str, queue_url: str, body: str, jobs: int) -> None:
    """As many jobs in ready-made batches: what moto can take when the sender does nothing but send."""
    entries = [{"Id": str(number), "MessageBody": body} for number in range(10)]
    request = json.dumps({"QueueUrl": queue_url, "Entries": entries})
    credential = f"local/20260101/{REGION}/sqs/aws4_request"
    headers = {
        "X-Amz-Target": "AmazonSQS.SendMessageBatch",
        "Content-Type": "application/x-amz-json-1.0",
        "Authorization": f"AWS4-HMAC-SHA256 Credential={credential}, SignedHeaders=host, Signature=none",
    }
    batches = iter(range(jobs // 10))

    def post(_: int) -> None:
        connection = http.client.HTTPConnection(urlsplit(endpoint).netloc)
        for _number in batches:
            connection.request("POST", "/", request, headers)
            answer = connection.getresponse()
            answer.read()
            assert answer.status == 200, answer.status
        connection.close()

    with ThreadPoolExecutor(send_job.REQUESTS_AT_ONCE) as pool:
        list(pool.map(post, range(send_job.REQUESTS_AT_ONCE)))


def rate(jobs: int, action: Callable[[], object], times: int = 1) -> float:
    """Jobs a second, of an action that sends so many and is done so often."""
    began = time.perf_counter()
    for _ in range(times):
        action()
    return jobs * times / (time.perf_counter() - began)


def bench_many(endpoint: str, settings: Settings, jobs: int, rounds: int) -> None:
    """Jobs a second: many in one call, straight into moto, one `submit` after the other, and the sample's calls."""
    workflow = json.loads((ROOT / "simple_workflow.json").read_text())
    body = json.dumps({"prompt": workflow})
    near = aws_client("sqs", REGION)

    def new_queue() -> tuple[Settings, str]:
        name = f"bench-{uuid.uuid4().hex}"
        return replace(settings, sqs_name=name), near.create_queue(QueueName=name)["QueueUrl"]

    print(f"{'jobs a second':24}{'submit_many':>13}{'moto takes':>12}{'submit':>9}{'as the sample':>15}{'ratio':>7}")
    for round_trip_s in ROUND_TRIPS_S:
        rates = []
        with at_distance(endpoint, round_trip_s) as far, mock.patch.dict(os.environ, AWS_ENDPOINT_URL=far):
            sample = partial(as_the_sample_does, aws_client("sqs", REGION), aws_client("autoscaling", REGION))
            for _ in range(rounds):
                mine, _ = new_queue()
                with mock.patch.object(send_job, "load_settings", lambda _, mine=mine: mine):
                    many = rate(jobs, partial(send_job.submit_many, [workflow] * jobs))
                straight = rate(jobs, partial(post_straight, far, new_queue()[1], body, jobs))
                mine, _ = new_queue()
                with mock.patch.object(send_job, "load_settings", lambda _, mine=mine: mine):
                    one = rate(1, partial(send_job.submit, workflow), ONE_BY_ONE)
                rates.append((many, straight, one, rate(1, partial(sample, mine, body), ONE_BY_ONE)))
        many, straight, one, theirs = (sorted(column)[rounds // 2] for column in zip(*rates, strict=True))
        label = f"{round_trip_s * 1000:.0f} ms to AWS, {jobs} jobs"
        print(
            f"{label:24}{many:13.0f}{straight:12.0f}{one:9.1f}{theirs:15.1f}{many / theirs:7.0f}",
            flush=True,
        )


def bench_process(endpoint: str, settings: Settings, rounds: int, folder: Path) -> None:
    """What a process that sends one job spends its time on, with 25 ms trips, beside an empty interpreter.

    Its processor seconds, too, which say more where the machine is busy with other things.
    """
    times: dict[str, list[float]] = {}
    processor_s: dict[str, list[float]] = {}
    aws_client("sqs", REGION).create_queue(QueueName=settings.sqs_name)
    # As installed: modules are compiled once.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    with at_distance(endpoint, ROUND_TRIPS_S[-1]) as far:
        environment["AWS_ENDPOINT_URL"] = far
        for _ in range(rounds + 1):
            for name, command in {
                "python -c pass": ("-c", "pass"),
                "import send_job": ("-c", "import send_job"),
                "import boto3, websocket": ("-c", "import boto3, websocket"),
                "send_job.py --help": ("send_job.py", "--help"),
                "send_job.py, one job": ("send_job.py",),
                "its phases, one after the other": ("-c", PHASES),
            }.items():
                began, used = time.perf_counter(), os.times()
                ran = subprocess.run(
                    [sys.executable, *command],
                    cwd=folder,
                    env=environment,
                    check=True,
                    capture_output=True,
                    text=True,
                )
                times.setdefault(name, []).append(time.perf_counter() - began)
                now = os.times()
                processor_s.setdefault(name, []).append(
                    now.children_user - used.children_user + now.children_system - used.children_system
                )
            for name, seconds in zip(NAMES, map(float, ran.stdout.split()), strict=True):
                times.setdefault(f"  {name}", []).append(seconds)
    # The first round compiles.
    nothing = median_ms(times["python -c pass"][1:])
    print(f"\n{'whole processes, 25 ms to AWS':40}{'median':>10}{'beyond an empty one':>25}{'processor':>15}")
    for name, measured in times.items():
        median = median_ms(measured[1:])
        more = (
            f"{median - nothing:22.0f} ms{median_ms(processor_s[name][1:]):12.0f} ms" if name in processor_s else ""
        )
        print(f"{name:40}{median:7.0f} ms{more}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Print both tables."""
    parser = argparse.ArgumentParser(description="How fast jobs are sent.")
    parser.add_argument("--jobs", type=int, default=1000, metavar="N", help="jobs in one submit_many (default: 1000)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="measurements of each (default: 3)")
    options = parser.parse_args(arguments)
    if min(options.jobs // 10, options.rounds) < 1:
        parser.error("--jobs is at least 10, --rounds at least 1")
    with tempfile.TemporaryDirectory() as scratch, local_cloud(Path(scratch) / "cloud") as endpoint:
        folder = Path(scratch)
        copy_scripts(folder)
        (folder / "env").write_text(SETTINGS)
        os.environ.update(
            AWS_ENDPOINT_URL=endpoint,
            AWS_EC2_METADATA_SERVICE_ENDPOINT="http://127.0.0.1:9",
            AWS_ACCESS_KEY_ID="local",
            AWS_SECRET_ACCESS_KEY="local",
        )
        settings = load_settings(None, folder / "env")
        aws_client("s3", REGION).create_bucket(
            Bucket=settings.s3_bucket, CreateBucketConfiguration={"LocationConstraint": REGION}
        )
        ec2, group = aws_client("ec2", REGION), settings.asg_name
        launch = {"ImageId": ec2.describe_images()["Images"][0]["ImageId"], "InstanceType": "g5.2xlarge"}
        ec2.create_launch_template(LaunchTemplateName=group, LaunchTemplateData=launch)
        aws_client("autoscaling", REGION).create_auto_scaling_group(
            AutoScalingGroupName=group, LaunchTemplate={"LaunchTemplateName": group}, MinSize=0, MaxSize=0,
            AvailabilityZones=[f"{REGION}a"],
        )  # fmt: skip
        bench_many(endpoint, settings, options.jobs, options.rounds)
        bench_process(endpoint, settings, options.rounds, folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
