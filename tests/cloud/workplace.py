"""One environment a test, on the local cloud: a queue, a bucket, a ComfyUI stand-in, workers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from local_cloud import ACCOUNT_ID, REGION, LocalCloud, free_port
from places import CLOUD, copy_bytecode, copy_comfyui, link_scripts

LIMIT_S = float(os.environ.get("TEST_LIMIT_S", "90"))  # generous, because the machine may be busy
Sample = Callable[[Sequence[Any], int], list[Any]]
"""Takes so many of the points a test could go through, in their order: all of them with --full. See conftest.py."""


def await_that(what: str, condition: Callable[[], Any], limit_s: float = LIMIT_S) -> Any:
    """Wait until the condition holds and return its value. What takes long is asked for less often."""
    began = time.monotonic()
    while not (value := condition()):
        waited = time.monotonic() - began
        assert waited < limit_s, f"{what}: still not so after {limit_s:.0f} s"
        time.sleep(min(0.02 + waited / 20, 0.3))
    return value


class Site:
    """An environment with a folder like /home/ubuntu/comfy, in which ComfyUI and workers can be run."""

    def __init__(self, cloud: LocalCloud, folder: Path, **settings: str) -> None:
        self.cloud = cloud
        self.folder = folder
        self.env = settings.setdefault("ENV", f"t{uuid.uuid4().hex[:10]}")
        self.prefix = f"x{uuid.uuid4().hex[:8]}"
        self.port = free_port()
        self.bucket = f"{self.prefix}-{ACCOUNT_ID}-{REGION}-{self.env}"
        self.ledger = folder / "ledger"
        self.sqs, self.s3 = cloud.client("sqs"), cloud.client("s3")
        self.s3.create_bucket(Bucket=self.bucket, CreateBucketConfiguration={"LocationConstraint": REGION})
        dlq = self.sqs.create_queue(QueueName=f"{self.prefix}-{self.env}-queue-dlq")["QueueUrl"]
        arn = self.sqs.get_queue_attributes(QueueUrl=dlq, AttributeNames=["QueueArn"])["Attributes"]["QueueArn"]
        redrive = json.dumps({"deadLetterTargetArn": arn, "maxReceiveCount": int(settings.get("MAX_RECEIVES", "3"))})
        self.dlq_url = dlq
        self.queue_url = self.sqs.create_queue(
            QueueName=f"{self.prefix}-{self.env}-queue", Attributes={"RedrivePolicy": redrive}
        )["QueueUrl"]
        for part in ("logs", "job-output", "ComfyUI/input", "ComfyUI/output", "ComfyUI/models/checkpoints"):
            (folder / part).mkdir(parents=True)
        link_scripts(folder)
        copy_bytecode(folder)
        (folder / "ComfyUI/models/checkpoints/v1-5-pruned-emaonly-fp16.safetensors").touch()
        (folder / "ComfyUI/input/broken.png").write_text("no picture")
        lines = {
            "PREFIX": self.prefix,
            "ACCOUNT_ID": ACCOUNT_ID,
            "REGION": REGION,
            "COMFY_ADDRESS": f"127.0.0.1:{self.port}",
            **settings,
        }
        (folder / "env").write_text("".join(f"{name}={value}\n" for name, value in lines.items()))
        self.processes: list[subprocess.Popen[bytes]] = []
        self.variables: dict[str, str] = {}  # more of its processes' environment
        self.ended = threading.Event()
        self.metadata_endpoint = "http://127.0.0.1:9"

    def environment(self) -> dict[str, str]:
        """What the processes of this site see."""
        return {
            "PATH": f"{CLOUD}/bin:{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin",
            "HOME": str(self.folder),
            "LANG": "C.UTF-8",
            **self.cloud.environment(),
            "AWS_EC2_METADATA_SERVICE_ENDPOINT": self.metadata_endpoint,
            "STANDIN_STEP_SECONDS": "0.01",
            "STANDIN_LEDGER": str(self.ledger),
            "LOCAL_INSTANCE_DIR": str(self.folder),  # for the stand-in of systemctl
            **self.variables,
        }

    def start_comfyui(self) -> subprocess.Popen[bytes]:
        """Start the stand-in and wait until it answers."""
        out = self.folder / ("ComfyUI/output" if self.env == "base" else "job-output")
        copy_comfyui(self.folder / "ComfyUI")
        command = [sys.executable, "ComfyUI/main.py", "--port", str(self.port), "--output-directory", str(out)]
        process = self._start(command, "comfyui.log")
        (self.folder / "comfyui.pid").write_text(str(process.pid))
        await_that("ComfyUI answers", lambda: process.poll() is not None or _answers(self.port))
        return process

    def keep_comfyui(self) -> None:
        """Start ComfyUI, and again whenever it ends, as systemd does."""
        first = self.start_comfyui()

        def keep() -> None:
            process = first
            while process.wait() is not None and not self.ended.is_set():
                process = self.start_comfyui()

        threading.Thread(target=keep, daemon=True).start()

    def start_worker(self) -> subprocess.Popen[bytes]:
        """Start a worker."""
        return self._start([sys.executable, "parse_job.py"], "worker.log")

    def _start(self, command: list[str], log: str) -> subprocess.Popen[bytes]:
        with (self.folder / log).open("ab") as out:
            process = subprocess.Popen(
                command, cwd=self.folder, env=self.environment(), stdout=out, stderr=out, start_new_session=True
            )
        self.processes.append(process)
        return process

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command in the site's folder to its end."""
        return subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )

    def end(self) -> None:
        """End what was started."""
        self.ended.set()
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def send(self, body: object) -> str:
        """Put a message on the queue as it is (JSON unless it is text already) and return its id."""
        text = body if isinstance(body, str) else json.dumps(body)
        return str(self.sqs.send_message(QueueUrl=self.queue_url, MessageBody=text)["MessageId"])

    def result(self, job_id: str) -> dict[str, Any] | None:
        """The job's result.json, None while there is none."""
        try:
            body = self.s3.get_object(Bucket=self.bucket, Key=f"output/{job_id}/result.json")["Body"].read()
        except self.s3.exceptions.NoSuchKey:
            return None
        result: dict[str, Any] = json.loads(body)
        return result

    def await_result(self, job_id: str) -> dict[str, Any]:
        """Wait for the job's result. Where none comes, what the workers have said is shown."""
        try:
            result: dict[str, Any] = await_that(f"result of {job_id}", lambda: self.result(job_id))
        except AssertionError as error:
            raise AssertionError(f"{error}; the queue has {self.depth()}; the workers said\n{self.log()}") from error
        return result

    def depth(self, url: str | None = None) -> tuple[int, int]:
        """Messages waiting and in flight."""
        names = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"]
        answer = self.sqs.get_queue_attributes(QueueUrl=url or self.queue_url, AttributeNames=names)["Attributes"]
        return int(answer[names[0]]), int(answer[names[1]])

    def await_empty_queue(self) -> None:
        """Wait until every message has been deleted."""
        await_that("the queue is empty", lambda: self.depth() == (0, 0))

    def keys(self, prefix: str) -> list[str]:
        """The keys in the bucket below `prefix`."""
        found = self.s3.list_objects_v2(Bucket=self.bucket, Prefix=prefix).get("Contents", [])
        return [item["Key"] for item in found]

    def runs(self, job_id: str, event: str = "start") -> int:
        """How often ComfyUI really began (or ended in `event`) this job."""
        lines = self.ledger.read_text().splitlines() if self.ledger.exists() else []
        return sum(entry["prompt_id"] == job_id and entry["event"] == event for entry in map(json.loads, lines))

    def log(self) -> str:
        """What the workers have printed."""
        return (self.folder / "worker.log").read_text()


def _answers(port: int) -> bool:
    import requests

    try:
        return requests.get(f"http://127.0.0.1:{port}/system_stats", timeout=5).status_code == 200
    except requests.RequestException:
        return False


def image_workflow(
    seconds: float = 0.0, more: dict[str, Any] | None = None, until: Path | None = None
) -> dict[str, Any]:
    """A small workflow that takes `seconds` and saves one image, with `more` nodes.

    With `until` the seconds begin when there is such a file.
    """
    return {
        "1": {
            "class_type": "EmptyImage",
            "inputs": {"width": 16, "height": 16, "batch_size": 1, "color": uuid.uuid4().int % 0xFFFFFF},
        },
        "2": {
            "class_type": "StandinSleep",
            "inputs": {"seconds": seconds, "image": ["1", 0]} | ({"until": str(until)} if until else {}),
        },
        "3": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "x"}},
        **(more or {}),
    }


def two_savers(until: Path) -> dict[str, Any]:
    """A workflow that saves a picture at node 4, and another at node 3 once there is a file."""
    first = {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "early"}}
    return image_workflow(more={"4": first}, until=until)


def group_of(cloud: LocalCloud, name: str) -> dict[str, Any]:
    answer = cloud.client("autoscaling").describe_auto_scaling_groups(AutoScalingGroupNames=[name])
    group: dict[str, Any] = answer["AutoScalingGroups"][0]
    return group
