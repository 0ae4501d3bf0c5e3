"""A new version of the launch template reaches a fleet at work: real workers are replaced, and no job is interrupted."""

from __future__ import annotations

import base64
import json
import subprocess
import uuid
from pathlib import Path
from typing import Any

import pytest
from demo import make_base_folder
from local_cloud import ACCOUNT_ID, REGION, LocalCloud
from workplace import await_that, group_of, image_workflow

pytestmark = pytest.mark.slow

INSTANCES = 2


@pytest.mark.sampled("replacements", 1)
@pytest.mark.parametrize("maximum", [INSTANCES + 1, INSTANCES], ids=["another is launched first", "at the maximum"])
def test_a_fleet_at_work_moves_to_the_new_version(
    cloud: LocalCloud, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, maximum: int
) -> None:
    prefix = f"x{uuid.uuid4().hex[:8]}"
    group_name = f"{prefix}-pro-asg"
    ledger = tmp_path / "ledger"
    monkeypatch.setenv("STANDIN_LEDGER", str(ledger))
    base = tmp_path / "base"
    make_base_folder(base)
    replace(base / "env", "PREFIX=simple-comfy", f"PREFIX={prefix}")
    replace(base / "env", "SCALE_COOLDOWN=5", "SCALE_COOLDOWN=4")
    replace(base / "worker/scaling.py", "READY_S = 150", "READY_S = 2")
    ec2, autoscaling, sqs, s3 = (cloud.client(name) for name in ("ec2", "autoscaling", "sqs", "s3"))
    bucket = f"{prefix}-{ACCOUNT_ID}-{REGION}-pro"
    s3.create_bucket(Bucket=bucket, CreateBucketConfiguration={"LocationConstraint": REGION})
    queue_url = sqs.create_queue(QueueName=f"{prefix}-pro-queue")["QueueUrl"]
    image_id = ec2.create_image(InstanceId=cloud.make_base(base).instance_id, Name=prefix)["ImageId"]
    print_user_data = "for room in common fill template; do source provision/$room.sh; done; ENV=pro COMFY_HOME=/home/ubuntu/comfy user_data"
    user_data = subprocess.run(["/bin/bash", "-c", print_user_data], cwd=base, check=True, capture_output=True)
    data = {"ImageId": image_id, "UserData": base64.b64encode(user_data.stdout).decode()}
    ec2.create_launch_template(LaunchTemplateName=prefix, LaunchTemplateData=data)
    autoscaling.create_auto_scaling_group(
        AutoScalingGroupName=group_name,
        LaunchTemplate={"LaunchTemplateName": prefix, "Version": "$Default"},
        MinSize=INSTANCES,
        MaxSize=maximum,
        DesiredCapacity=INSTANCES,
        NewInstancesProtectedFromScaleIn=True,
        VPCZoneIdentifier=ec2.describe_subnets()["Subnets"][0]["SubnetId"],
        Tags=[{"Key": "comfy-version", "Value": "1", "PropagateAtLaunch": False}],
        LifecycleHookSpecificationList=[
            {
                "LifecycleHookName": "comfy-terminating",
                "LifecycleTransition": "autoscaling:EC2_INSTANCE_TERMINATING",
                "HeartbeatTimeout": 120,
                "DefaultResult": "CONTINUE",
            }
        ],
    )
    sent: list[str] = []
    fewest = INSTANCES

    def instances() -> list[dict[str, Any]]:
        return [item for item in group_of(cloud, group_name)["Instances"] if item["LifecycleState"] == "InService"]

    def versions() -> list[str]:
        nonlocal fewest
        found = instances()
        fewest = min(fewest, len(found))
        if len(sent) < 300 and depth() < 4:  # so that the fleet is at work all the time
            message = {"prompt": image_workflow(1), "job_id": str(uuid.uuid4())}
            sqs.send_message(QueueUrl=queue_url, MessageBody=json.dumps(message))
            sent.append(message["job_id"])  # type: ignore[arg-type]
        return [item["LaunchTemplate"]["Version"] for item in found]

    def depth() -> int:
        names = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"]
        answer = sqs.get_queue_attributes(QueueUrl=queue_url, AttributeNames=names)["Attributes"]
        return sum(map(int, answer.values()))

    def runs() -> list[dict[str, Any]]:
        return [json.loads(line) for line in ledger.read_text().splitlines()] if ledger.exists() else []

    await_that("both work", lambda: versions() and len({entry["pid"] for entry in runs()}) >= INSTANCES)
    assert versions() == ["1", "1"]
    ec2.create_launch_template_version(LaunchTemplateName=prefix, LaunchTemplateData=data)
    ec2.modify_launch_template(LaunchTemplateName=prefix, DefaultVersion="2")
    autoscaling.create_or_update_tags(
        Tags=[
            {
                "ResourceId": group_name,
                "ResourceType": "auto-scaling-group",
                "Key": "comfy-version",
                "Value": "2",
                "PropagateAtLaunch": False,
            }
        ]
    )
    await_that("all are of version 2", lambda: (found := versions()) and set(found) == {"2"}, limit_s=180)
    await_that("all jobs are done", lambda: depth() == 0)
    assert len(instances()) >= INSTANCES
    assert fewest >= (INSTANCES if maximum > INSTANCES else INSTANCES - 1)
    for job_id in sent:
        result = json.loads(s3.get_object(Bucket=bucket, Key=f"output/{job_id}/result.json")["Body"].read())
        assert (result["status"], result["job_id"]) == ("succeeded", job_id)
    starts = [entry["prompt_id"] for entry in runs() if entry["event"] == "start"]
    assert sorted(starts) == sorted(sent), "each ran once, and none was interrupted"
    autoscaling.delete_auto_scaling_group(AutoScalingGroupName=group_name, ForceDelete=True)


def replace(path: Path, old: str, new: str) -> None:
    """Change a file of the base machine."""
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
