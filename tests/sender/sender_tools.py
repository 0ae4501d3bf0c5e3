"""What tests of the sender share: looks at the queue, a group, receipts as workers write them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from botocore.exceptions import ClientError
from local_cloud import LocalCloud
from workplace import Site


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
    """Put a receipt into the bucket, as a worker does."""
    site.s3.put_object(
        Bucket=site.bucket, Key=f"output/{job_id}/result.json", Body=json.dumps(receipt(job_id, **more)).encode()
    )


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
