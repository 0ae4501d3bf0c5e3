"""What tests of the sender share: looks at the queue, a group, receipts as workers write them."""

from __future__ import annotations

import io
import json
import time
import types
from collections.abc import Callable
from typing import Any

import pytest
from botocore.exceptions import ClientError
from local_cloud import LocalCloud
from workplace import Site

import send_job
from comfy_utils import ENDED, ended_key

BEGAN_S = 1_800_000_000.0
"""What the clock says when a test begins, on a Bucket."""
LONGEST_S = 1e6


def bodies(site: Site) -> list[dict[str, Any]]:
    """The messages on the queue."""
    found: list[dict[str, Any]] = []
    while messages := site.sqs.receive_message(QueueUrl=site.queue_url, MaxNumberOfMessages=10).get("Messages"):
        found += [json.loads(message["Body"]) for message in messages]
    return found


def make_group(cloud: LocalCloud, site: Site, **sizes: int) -> Callable[[], int]:
    """A group for the site; returns a look at its desired capacity."""
    name = f"{site.prefix}-{site.env}-asg"
    image = cloud.client("ec2").describe_images()["Images"][0]["ImageId"]
    cloud.client("ec2").create_launch_template(
        LaunchTemplateName=name, LaunchTemplateData={"ImageId": image, "InstanceType": "g5.2xlarge"}
    )
    autoscaling = cloud.client("autoscaling")
    autoscaling.create_auto_scaling_group(
        AutoScalingGroupName=name,
        LaunchTemplate={"LaunchTemplateName": name},
        AvailabilityZones=["us-west-2a"],
        **({"MinSize": 0, "MaxSize": 5, "DesiredCapacity": 0} | sizes),
    )

    def desired() -> int:
        answer = autoscaling.describe_auto_scaling_groups(AutoScalingGroupNames=[name])
        return int(answer["AutoScalingGroups"][0]["DesiredCapacity"])

    return desired


def store(site: Site, job_id: str, **more: Any) -> None:
    """Put a receipt into the bucket, and the job into the list of ended ones, as a worker does."""
    site.s3.put_object(
        Bucket=site.bucket, Key=f"output/{job_id}/result.json", Body=json.dumps(receipt(job_id, **more)).encode()
    )
    site.s3.put_object(Bucket=site.bucket, Key=ended_key(int(time.time() * 1000), job_id))


def store_progress(site: Site, job_id: str, **more: Any) -> None:
    """Say how far a job is, as a worker does."""
    progress = {"job_id": job_id, "status": "running", "instance_id": "i-1", "node_id": "3", "node_title": "Sampler",
                "nodes": 7, "nodes_done": 3, "max": 20, "updated_at": "2026-01-02T03:04:05.678Z"} | more  # fmt: skip
    site.s3.put_object(Bucket=site.bucket, Key=f"output/{job_id}/progress.json", Body=json.dumps(progress).encode())


def receipt(job_id: str, **more: Any) -> dict[str, Any]:
    timings = {"wait_s": 160.21, "run_s": 12.34}
    return {"job_id": job_id, "status": "succeeded", "outputs": [], "error": None, "timings": timings} | more


def client_error(status: int, code: str, operation: str = "GetObject") -> ClientError:
    answer = {"Error": {"Code": code, "Message": "no"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return ClientError(answer, operation)


class Bucket:
    """An S3 client with a clock of its own, by which send_job waits: each receipt appears at a second of it, errors come first."""

    class exceptions:  # noqa: N801
        NoSuchKey = KeyError

    def __init__(self, monkeypatch: pytest.MonkeyPatch, done_at: dict[str, float], *errors: Exception) -> None:
        self.now = 0.0
        self.done_at = done_at
        self.errors = list(errors)
        self.asked: list[tuple[float, str]] = []
        self.listed: list[float] = []
        self.marked_at: dict[str, float] = {}
        """When each job came into the list of ended ones, by its worker's clock; others never do."""
        clock = types.SimpleNamespace(monotonic=lambda: self.now, sleep=self.sleep, time=lambda: BEGAN_S + self.now)
        monkeypatch.setattr(send_job, "time", clock)

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds
        assert self.now < LONGEST_S, "it waits for ever"

    def get_object(self, Bucket: str, Key: str) -> dict[str, Any]:  # noqa: N803
        assert Bucket == "bucket"
        job_id = Key.split("/")[1]
        self.asked.append((self.now, job_id))
        if self.errors:
            raise self.errors.pop(0)
        if self.now < self.done_at[job_id]:
            raise KeyError(Key)
        return {"Body": io.BytesIO(json.dumps(receipt(job_id)).encode())}

    def list_objects_v2(self, Bucket: str, Prefix: str, StartAfter: str) -> dict[str, Any]:  # noqa: N803
        assert (Bucket, Prefix) == ("bucket", ENDED)
        self.listed.append(self.now)
        there = sorted(
            ended_key(int((BEGAN_S + moment) * 1000), job_id)
            for job_id, moment in self.marked_at.items()
            if self.now >= self.done_at.get(job_id, moment)
        )
        after = [{"Key": key} for key in there if key > StartAfter]
        return {"Contents": after[:1000], "IsTruncated": len(after) > 1000} if after else {"IsTruncated": False}

    def wait(self, **more: Any) -> list[tuple[float, str]]:
        """(when, which) of each receipt."""
        found = send_job.wait_for(self, "bucket", list(self.done_at), **more)
        return [(self.now, result["job_id"]) for result in found]
