#!/usr/bin/env python3
"""How much of ComfyUI's time the worker leaves unused: jobs through the queue, and straight into ComfyUI.

AWS is the local cloud, in a process of its own, behind a proxy that adds a round trip. The same prompts are first
posted straight into ComfyUI's queue, which is the limit, and then sent through SQS to a worker. Both times are from
the end of the second job to the end of the last, as ComfyUI's history has them: nothing is fetched ahead until the
worker has seen that more wait. Share is the one over the other. A gap is the time from one job's end to the next
one's start. Every file and receipt is looked for at the end.

Usage: tests/bench/bench_worker.py [--scale X] [--memory JOBS [--side PIXELS]] [--only MS] [--wanted N] [--scripts DIR]

--wanted puts the worker into an Auto Scaling group that wants N instances, all of which are in service for AWS, though
only this one takes jobs yet. --scripts measures the worker of another checkout, to compare with.

COMFY_ADDRESS=host:port uses a real ComfyUI on this machine, and COMFY_OUTPUT names its output folder. It needs the
nodes EmptyImage, ImageBlur and SaveImage; so many are blurred that a job takes as long as it should.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import boto3
import requests
from bench_tools import at_distance
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "cloud"))
from local_cloud import ACCOUNT_ID, REGION, free_port
from places import CLOUD, ROOT, copy_comfyui, copy_scripts

JOBS = {0: 200, 50: 60, 200: 20, 1000: 7}
"""A job's milliseconds and how many of them are measured, so that the whole takes little more than a minute."""
ROUND_TRIPS_S = (0.0, 0.005, 0.025)
LIMIT_S = 600.0
NOISE = "bench-noise.png"
BUCKET = f"simple-comfy-{ACCOUNT_ID}-{REGION}-bench"
SETTINGS = f"ENV=bench\nACCOUNT_ID={ACCOUNT_ID}\nREGION={REGION}\nSCALE_COOLDOWN=3600\n"
Workflow = dict[str, dict[str, Any]]


class Measured(NamedTuple):
    """A series of jobs, as ComfyUI ran them."""

    span_s: float
    gaps_s: list[float]

    def gap_ms(self, percent: int) -> float:
        """A percentile of the gaps."""
        return 1000 * statistics.quantiles(self.gaps_s, n=100, method="inclusive")[percent - 1]


class Comfy:
    """The ComfyUI that is measured: the stand-in, or the one that COMFY_ADDRESS names."""

    def __init__(self, home: Path) -> None:
        self.address = os.environ.get("COMFY_ADDRESS") or f"127.0.0.1:{free_port()}"
        self.is_real = "COMFY_ADDRESS" in os.environ
        self.home = home
        self.http = requests.Session()
        self.blur_s = 0.0
        self.sleeper = "" if self.is_real else "StandinSleep"  # a class of node that sleeps, where there is one
        self.side = 512 if self.is_real else 16  # of a picture, in pixels
        self.has_noise = False
        self.process: subprocess.Popen[bytes] | None = None
        if self.is_real:
            (home / "job-output").symlink_to(os.environ["COMFY_OUTPUT"])
        else:
            (home / "job-output").mkdir()

    def start(self) -> float:
        """Start it where it does not run already; returns when it first answered."""
        if not self.is_real:
            copy_comfyui(self.home / "ComfyUI")
            command = [sys.executable, "main.py", "--port", self.address.rpartition(":")[2]]
            self.process = subprocess.Popen(
                [*command, "--output-directory", str(self.home / "job-output")],
                cwd=self.home / "ComfyUI",
                stderr=subprocess.DEVNULL,
            )
        await_that(self.answers, pause_s=0.005)
        return time.monotonic()

    def answers(self) -> bool:
        """Whether it does."""
        try:
            return self.http.get(f"http://{self.address}/system_stats", timeout=5).status_code == 200
        except requests.RequestException:
            return False

    def workflow(self, milliseconds: int, prefix: str = "bench") -> Workflow:
        """A job that takes so long and saves one small picture, which is in no cache."""
        seconds = milliseconds / 1000
        color = uuid.uuid4().int % 0xFFFFFF
        nodes: Workflow = {
            "0": {
                "class_type": "EmptyImage",
                "inputs": {"width": self.side, "height": self.side, "batch_size": 1, "color": color},
            }
        }
        if self.has_noise:
            nodes["0"] = {"class_type": "LoadImage", "inputs": {"image": NOISE}}
        if self.sleeper:
            inputs = {"seconds": seconds, "milliseconds": milliseconds, "image": ["0", 0]}
            nodes["1"] = {"class_type": self.sleeper, "inputs": inputs}
        for number in range(round(seconds / self.blur_s) if self.blur_s else 0):
            blur = {"image": [str(number), 0], "blur_radius": 31, "sigma": 10.0}
            nodes[str(number + 1)] = {"class_type": "ImageBlur", "inputs": blur}
        save = {"images": [str(len(nodes) - 1), 0], "filename_prefix": prefix}
        return {**nodes, "save": {"class_type": "SaveImage", "inputs": save}}

    def take_noise(self, side: int) -> None:
        """From now on a job's picture is noise, so many pixels a side, of which no file format makes less."""
        data = io.BytesIO()
        Image.frombytes("RGB", (side, side), os.urandom(3 * side * side)).save(data, "PNG")
        files = {"image": (NOISE, data.getvalue())}
        self.http.post(f"http://{self.address}/upload/image", files=files, timeout=60).raise_for_status()
        self.has_noise = True

    def calibrate(self) -> None:
        """Find out how long a real server blurs."""
        if self.is_real:
            bare = self.run_straight(0, 5).span_s
            self.blur_s = 0.001
            self.blur_s = (self.run_straight(20, 5).span_s - bare) / (3 * 20)

    def run_straight(self, milliseconds: int, jobs: int) -> Measured:
        """Run them one after the other out of its own queue."""
        ids = self.post(milliseconds, jobs)
        await_that(lambda: self.history(ids[-1]))
        return self.measure(ids)

    def post(self, milliseconds: int, jobs: int) -> list[str]:
        """Post them all into its queue; returns their ids."""
        ids = [str(uuid.uuid4()) for _ in range(jobs)]
        for job_id in ids:
            body = {"prompt": self.workflow(milliseconds, f"{job_id}/bench"), "prompt_id": job_id}
            self.http.post(f"http://{self.address}/prompt", json=body, timeout=60).raise_for_status()
        return ids

    def history(self, job_id: str) -> Any:
        """A job's history, None until it has ended."""
        return self.http.get(f"http://{self.address}/history/{job_id}", timeout=60).json().get(job_id)

    def measure(self, job_ids: list[str]) -> Measured:
        """When the jobs ran."""
        runs = []
        for job_id in job_ids:
            told = {name: data["timestamp"] / 1000 for name, data in self.history(job_id)["status"]["messages"]}
            runs.append((told["execution_start"], told["execution_success"]))
        runs = sorted(runs)[1:]
        gaps = [after[0] - before[1] for before, after in itertools.pairwise(runs)]
        return Measured(runs[-1][1] - runs[0][1], gaps)


class Site:
    """A worker's folder, its queue and bucket."""

    def __init__(self, home: Path, comfy: Comfy, endpoint: str, scripts: Path) -> None:
        self.home, self.comfy, self.endpoint = home, comfy, endpoint
        self.sqs, self.s3 = (self.client(name) for name in ("sqs", "s3"))
        self.queue_url = self.sqs.create_queue(QueueName="simple-comfy-bench-queue")["QueueUrl"]
        self.s3.create_bucket(Bucket=BUCKET, CreateBucketConfiguration={"LocationConstraint": REGION})
        copy_scripts(home, scripts)
        (home / "env").write_text(f"{SETTINGS}COMFY_HOME={home}\nCOMFY_ADDRESS={comfy.address}\n")

    def make_group(self, wanted: int) -> None:
        """A group that wants so many instances, which are in service at once."""
        ec2, autoscaling = self.client("ec2"), self.client("autoscaling")
        name, image = "simple-comfy-bench-asg", ec2.register_image(Name="bench")["ImageId"]
        ec2.create_launch_template(LaunchTemplateName=name, LaunchTemplateData={"ImageId": image})
        autoscaling.create_auto_scaling_group(
            AutoScalingGroupName=name,
            LaunchTemplate={"LaunchTemplateName": name},
            MinSize=0,
            MaxSize=wanted,
            DesiredCapacity=wanted,
            AvailabilityZones=["us-west-2a"],
        )

    def client(self, service: str) -> Any:
        """A client without the distance."""
        return boto3.client(
            service, region_name=REGION, endpoint_url=self.endpoint, aws_access_key_id="x", aws_secret_access_key="x"
        )

    @contextmanager
    def worker(self, endpoint: str) -> Iterator[Worker]:
        """A worker that sees AWS there."""
        environment = {
            **os.environ,
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_EC2_METADATA_SERVICE_ENDPOINT": "http://127.0.0.1:9",
            "AWS_ACCESS_KEY_ID": "x",
            "AWS_SECRET_ACCESS_KEY": "x",
            "COMFY_ADDRESS": self.comfy.address,
            "MALLOC_TRIM_THRESHOLD_": "131072",  # as start_service.sh has it
        }
        process = subprocess.Popen(
            [sys.executable, "parse_job.py"],
            cwd=self.home,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            yield Worker(process)
        finally:
            process.terminate()
            process.wait(60)

    def run(self, milliseconds: int, jobs: int) -> list[str]:
        """Send so many jobs, and wait until all are done; returns their ids."""
        ids = [str(uuid.uuid4()) for _ in range(jobs)]
        bodies = [json.dumps({"prompt": self.comfy.workflow(milliseconds), "job_id": job_id}) for job_id in ids]
        for first in range(0, jobs, 10):
            entries = [{"Id": str(n), "MessageBody": body} for n, body in enumerate(bodies[first : first + 10])]
            self.sqs.send_message_batch(QueueUrl=self.queue_url, Entries=entries)
        await_that(self.is_empty, pause_s=0.2)
        return ids

    def is_empty(self) -> bool:
        """Whether every message was deleted."""
        names = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"]
        return set(self.sqs.get_queue_attributes(QueueUrl=self.queue_url, AttributeNames=names)["Attributes"].values()) == {"0"}  # fmt: skip

    def check(self, job_ids: list[str]) -> None:
        """Every job has its receipt, which says that it succeeded, and its file."""
        for job_id in job_ids:
            result = json.loads(self.s3.get_object(Bucket=BUCKET, Key=f"output/{job_id}/result.json")["Body"].read())
            (output,) = result["outputs"]
            assert result["status"] == "succeeded", result
            assert self.s3.head_object(Bucket=BUCKET, Key=output["s3_key"])["ContentLength"] > 0


class Worker:
    """A running worker, as Linux counts what it uses."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.pid = process.pid

    def cpu_s(self) -> float:
        """Seconds of processor time until now."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def resident_mb(self) -> float:
        """Memory in use now."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


class Calls:
    """Counts the requests that pass the proxy."""

    def __init__(self) -> None:
        self.count = 0
        self.first_receive = threading.Event()
        self.received_at = 0.0

    def __call__(self, data: bytes) -> None:
        self.count += data.count(b" HTTP/1.1\r\n")
        if b"AmazonSQS.ReceiveMessage" in data and not self.first_receive.is_set():
            self.received_at = time.monotonic()
            self.first_receive.set()


def await_that(condition: Callable[[], Any], pause_s: float = 0.02) -> None:
    """Wait until it holds."""
    limit = time.monotonic() + LIMIT_S
    while not condition():
        if time.monotonic() > limit:
            sys.exit(f"bench_worker.py: still waiting after {LIMIT_S:.0f} s")
        time.sleep(pause_s)


def bench_boot(site: Site) -> None:
    """From ComfyUI's first answer to the worker's first receive, with AWS far away; starts ComfyUI."""
    calls = Calls()
    with at_distance(site.endpoint, ROUND_TRIPS_S[-1], calls) as far, site.worker(far):
        await_that(lambda: calls.count)  # the queue is found
        time.sleep(1)
        answered_at = site.comfy.start()
        calls.first_receive.wait(LIMIT_S)
        if not site.comfy.is_real:
            seconds = max(0.0, calls.received_at - answered_at)
            print(f"from ComfyUI's first answer to the first receive: {1000 * seconds:.0f} ms\n", flush=True)


def bench_jobs(site: Site, jobs: dict[int, int]) -> None:
    """The table."""
    print(
        f"{'a job':>8}{'jobs':>6}{'to AWS':>8}{'straight':>10}{'worker':>9}{'share':>8}{'jobs/s':>8}"
        f"{'gap p50':>9}{'p95':>8}{'calls/job':>11}{'CPU/job':>9}{'memory':>9}"
    )
    for milliseconds, count in jobs.items():
        limit = site.comfy.run_straight(milliseconds, count)
        print(
            f"{milliseconds:5} ms{count:6}{'-':>8}{limit.span_s:8.2f} s{'':9}{1:8.3f}{(count - 2) / limit.span_s:8.1f}"
            f"{limit.gap_ms(50):6.1f} ms{limit.gap_ms(95):5.1f} ms",
            flush=True,
        )
        for round_trip_s in ROUND_TRIPS_S:
            calls = Calls()
            with at_distance(site.endpoint, round_trip_s, calls) as far, site.worker(far) as worker:
                site.check(site.run(0, 2))  # so that everything is connected
                calls.count, cpu_s = 0, worker.cpu_s()
                ids = site.run(milliseconds, count)
                cpu_ms = 1000 * (worker.cpu_s() - cpu_s) / count
                memory_mb, called = worker.resident_mb(), calls.count / count
            site.check(ids)
            took = site.comfy.measure(ids)
            print(
                f"{milliseconds:5} ms{count:6}{1000 * round_trip_s:5.0f} ms{limit.span_s:8.2f} s{took.span_s:7.2f} s"
                f"{limit.span_s / took.span_s:8.3f}{(count - 2) / took.span_s:8.1f}{took.gap_ms(50):6.1f} ms"
                f"{took.gap_ms(95):5.1f} ms{called:11.1f}{cpu_ms:6.1f} ms{memory_mb:6.1f} MB",
                flush=True,
            )


def bench_memory(site: Site, jobs: int, side: int) -> None:
    """Resident memory while so many jobs pass, whose pictures have so many pixels a side where that is not 0."""
    if side:
        site.comfy.take_noise(side)
    portion = max(1, jobs // 20)
    print(f"\n{'jobs done':>10}{'memory':>12}")
    with site.worker(site.endpoint) as worker:
        for done in range(portion, jobs + 1, portion):
            site.run(0, portion)
            print(f"{done:10}{worker.resident_mb():9.1f} MB", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Start AWS and ComfyUI, and print."""
    parser = argparse.ArgumentParser(description="How much of ComfyUI's time the worker leaves unused.")
    parser.add_argument("--scale", type=float, default=1, metavar="X", help="measure X times as many jobs")
    parser.add_argument(
        "--only", type=int, choices=list(JOBS), metavar="MS", help="only jobs of 0, 50, 200 or 1000 ms"
    )
    parser.add_argument(
        "--memory", type=int, default=0, metavar="JOBS", help="then the memory while so many jobs pass, such as 10000"
    )
    parser.add_argument(
        "--side", type=int, default=0, metavar="PIXELS", help="with pictures of noise, so large, in those"
    )
    parser.add_argument("--wanted", type=int, default=0, metavar="N", help="in a group that wants so many instances")
    parser.add_argument("--scripts", type=Path, default=ROOT, metavar="DIR", help="another checkout's worker")
    options = parser.parse_args(arguments)
    if options.scale <= 0 or min(options.memory, options.side) < 0:
        parser.error("--scale is above 0, --memory and --side not below it")
    jobs = {ms: max(5, round(count * options.scale)) for ms, count in JOBS.items() if options.only in (None, ms)}
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch) / "comfy"
        (home / "ComfyUI").mkdir(parents=True)
        comfy = Comfy(home)
        cloud = subprocess.Popen(
            [sys.executable, CLOUD / "aws_fixtures.py", f"{scratch}/cloud"], stdout=subprocess.PIPE, text=True
        )
        try:
            assert cloud.stdout is not None
            site = Site(home, comfy, cloud.stdout.readline().split()[0], options.scripts)
            if options.wanted:
                site.make_group(options.wanted)
            bench_boot(site)
            comfy.calibrate()
            bench_jobs(site, jobs)
            if options.memory:
                bench_memory(site, options.memory, options.side)
        finally:
            for process in (comfy.process, cloud):
                if process is not None:
                    process.terminate()
                    process.wait(60)
    return 0


if __name__ == "__main__":
    sys.exit(main())
