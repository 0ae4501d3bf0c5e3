"""create_env.sh, run as it is with the real AWS CLI against moto."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from aws_fixtures import ENV_FILE, Aws, Base, Bundle, aws, aws_server, bundle, shape, tags_of
from local_cloud import ACCOUNT_ID, REGION
from places import CLOUD
from workplace import Sample

from comfy_utils import OBJECT_INFO_KEY

__all__ = ["aws", "aws_server", "bundle"]

BASE_BUCKET = f"simple-comfy-{ACCOUNT_ID}-{REGION}-base"
BUCKET = f"simple-comfy-{ACCOUNT_ID}-{REGION}-pro"
ALARM = "simple-comfy-pro-asg-first-instance"
QUEUE = "simple-comfy-pro-queue"
WORKER = "simple-comfy-pro-asg-worker"
PATH_OF_WORKER = f"/simple-comfy/{REGION}/pro/"
NO_INSTANCE = "i-0123456789abcdef0"


# --- A whole environment: stopped half-way, completed, made again, changed -----------------------------------


@dataclass
class Story:
    """What the runs printed, and what there was after each."""

    base: Base
    ran: list[subprocess.CompletedProcess[str]] = field(default_factory=list)
    found: list[dict[str, Any]] = field(default_factory=list)


STOPPED, COMPLETED, AGAIN, CHANGED = range(4)


@pytest.mark.slow
def test_an_environment_is_made_completed_left_alone_and_changed(bundle: Bundle, aws: Aws) -> None:
    """One test, because each run of the script takes seconds: the checks below look at what the runs left."""
    story = Story(aws.make_base(looks_until_available=2))

    def run(**environment: str) -> None:
        story.ran.append(bundle.run("create_env.sh", "pro", story.base.instance_id, **environment))
        story.found.append(aws.everything("pro"))

    run(PATH=bundle.break_call("ec2 create-launch-template", "UnauthorizedOperation"))
    check_the_run_that_was_stopped(story)
    run()
    check_the_run_that_completed_it(story)
    for check in (
        check_queues,
        check_bucket,
        check_role,
        check_image,
        check_template,
        check_group,
        check_alarms,
        check_dashboard,
    ):
        check(story)
    run()
    check_that_nothing_changed(story)
    bundle.set(MAX_INSTANCES="7", INSTANCE_TYPE="g6.xlarge", VISIBILITY_TIMEOUT="60", MAX_RECEIVES="5")
    bundle.set(INSTANCE_TYPES='"g6.xlarge g5.2xlarge"', SPOT_PERCENT="70", VOLUME_INIT_RATE="200")
    topic = aws.client("sns").create_topic(Name="operators")["TopicArn"]
    bundle.set(ALARM_AGE="600", ALARM_TOPIC=topic)
    group = {"AutoScalingGroupName": "simple-comfy-pro-asg"}
    aws.client("autoscaling").delete_policy(PolicyName=ALARM)
    transition = "autoscaling:EC2_INSTANCE_TERMINATING"
    hook = {"LifecycleHookName": "comfy-terminating", "LifecycleTransition": transition, "HeartbeatTimeout": 3600}
    aws.client("autoscaling").put_lifecycle_hook(**hook, **group)
    aws.client("autoscaling").resume_processes(ScalingProcesses=["AZRebalance"], **group)
    aws.open_to_internet(story.base.vpc, story.base.private[1])
    run()
    check_that_settings_were_applied(story)


def check_the_run_that_was_stopped(story: Story) -> None:
    ran, found = story.ran[STOPPED], story.found[STOPPED]
    assert ran.returncode == 1
    assert ran.stderr == (
        "create_env.sh: cannot create the launch template simple-comfy-pro-asg-template: "
        "An error occurred (UnauthorizedOperation) when calling an operation: no.\n"
    )
    assert found["images"]
    assert "templates" not in found
    assert "groups" not in found


def check_the_run_that_completed_it(story: Story) -> None:
    ran = story.ran[COMPLETED]
    assert (ran.returncode, ran.stderr) == (0, "")
    steps = [line.split() for line in ran.stdout.splitlines() if line]
    assert [(step[0], step[-1]) for step in steps if step[0] in ("template", "group", "alarm", "dashboard")] == [
        ("template", "created"),
        ("group", "created"),
        *[("alarm", "created")] * 5,
        ("dashboard", "created"),
    ]
    assert ran.stdout.count("already there") == 6
    assert "0 instances wanted now, 0 to 20 g5.2xlarge" in ran.stdout
    assert "Next: ./send_job.py --env pro" in ran.stdout
    image_ids = [[image["ImageId"] for image in found["images"]] for found in story.found]
    assert image_ids == [image_ids[STOPPED]] * 2


def check_queues(story: Story) -> None:
    found = story.found[COMPLETED]
    for name in (QUEUE, f"{QUEUE}-dlq"):
        attributes = found[name]["attributes"]
        assert attributes["VisibilityTimeout"] == "120"
        assert attributes["ReceiveMessageWaitTimeSeconds"] == "20"
        assert attributes["MessageRetentionPeriod"] == str(14 * 24 * 3600)
        assert attributes["MaximumMessageSize"] == str(1024 * 1024)
        assert found[name]["tags"] == {"comfy-env": "pro", "comfy-prefix": "simple-comfy", "Name": name}
        assert attributes["SqsManagedSseEnabled"] == "true"
        check_only_tls(attributes["Policy"], [f"arn:aws:sqs:{REGION}:{ACCOUNT_ID}:{name}"])
    assert json.loads(found[QUEUE]["attributes"]["RedrivePolicy"]) == {
        "deadLetterTargetArn": f"arn:aws:sqs:{REGION}:{ACCOUNT_ID}:{QUEUE}-dlq",
        "maxReceiveCount": 3,
    }
    assert "RedrivePolicy" not in found[f"{QUEUE}-dlq"]["attributes"]


def check_bucket(story: Story) -> None:
    found = story.found[COMPLETED]
    assert found["bucket"] == BUCKET
    assert set(found["bucket access"].values()) == {True}
    assert tags_of(found["bucket tags"]) == {"comfy-env": "pro", "comfy-prefix": "simple-comfy", "Name": BUCKET}
    assert [file["Key"] for file in found["bucket files"]] == ["input/photo.png", "models/model.safetensors"]

    arn = f"arn:aws:s3:::{BUCKET}"
    check_only_tls(found["bucket policy"], [arn, f"{arn}/*"])
    (rule,) = found["bucket encryption"]["Rules"]
    assert rule["ApplyServerSideEncryptionByDefault"] == {"SSEAlgorithm": "AES256"}
    (rule,) = found["bucket lifecycle"]
    assert (rule["Status"], rule["AbortIncompleteMultipartUpload"]) == ("Enabled", {"DaysAfterInitiation": 7})
    assert "Expiration" not in rule
    assert found["bucket events"] == {"EventBridgeConfiguration"}


def check_only_tls(policy: str, resources: list[str]) -> None:
    (statement,) = json.loads(policy)["Statement"]
    assert (statement["Effect"], statement["Principal"]) == ("Deny", "*")
    assert statement["Condition"] == {"Bool": {"aws:SecureTransport": "false"}}
    assert statement["Resource"] == resources


def check_role(story: Story) -> None:
    (role,), (profile,) = story.found[COMPLETED]["roles"], story.found[COMPLETED]["profiles"]
    assert role["RoleName"] == profile["InstanceProfileName"] == WORKER
    assert tags_of(role["Tags"]) == {"comfy-env": "pro", "comfy-prefix": "simple-comfy", "Name": WORKER}
    assert [inside["RoleName"] for inside in profile["Roles"]] == [WORKER]
    (trust,) = role["AssumeRolePolicyDocument"]["Statement"]
    assert trust["Principal"] == {"Service": "ec2.amazonaws.com"}
    (policy,) = role["Policies"]
    resources = {resource for statement in policy["Statement"] for resource in [statement["Resource"]]
                 if isinstance(resource, str)}  # fmt: skip
    assert f"arn:aws:sqs:{REGION}:{ACCOUNT_ID}:{QUEUE}" in resources


def check_image(story: Story) -> None:
    tags = {"comfy-env": "pro", "comfy-prefix": "simple-comfy", "Name": "simple-comfy-pro-asg"}
    (image,), (snapshot,) = story.found[COMPLETED]["images"], story.found[COMPLETED]["snapshots"]
    assert image["SourceInstanceId"] == story.base.instance_id
    assert image["Name"].startswith("simple-comfy-pro-asg-image-2")
    assert tags_of(image["Tags"]) == tags
    assert tags_of(snapshot["Tags"]) == tags
    assert image["BlockDeviceMappings"][0]["Ebs"]["SnapshotId"] == snapshot["SnapshotId"]


def check_template(story: Story) -> None:
    (template,), (version,) = story.found[COMPLETED]["templates"], story.found[COMPLETED]["versions"]
    assert tags_of(template["Tags"])["comfy-env"] == "pro"
    data = version["LaunchTemplateData"]
    assert base64.b64decode(data["UserData"]).decode().startswith("#!/bin/bash\n# First boot")
    assert data["ImageId"] == story.found[COMPLETED]["images"][0]["ImageId"]
    assert data["InstanceType"] == "g5.2xlarge"
    assert data["SecurityGroupIds"] == [story.base.security_group]
    assert data["IamInstanceProfile"] == {"Name": WORKER}
    assert data["KeyName"] == "operator"
    assert data["MetadataOptions"] == {
        "HttpTokens": "required",
        "HttpPutResponseHopLimit": 1,
        "HttpEndpoint": "enabled",
    }
    tags = {spec["ResourceType"]: tags_of(spec["Tags"]) for spec in data["TagSpecifications"]}
    for resource in ("instance", "volume"):
        assert tags[resource] == {"comfy-env": "pro", "comfy-prefix": "simple-comfy", "Name": "simple-comfy-pro"}


def check_group(story: Story) -> None:
    (group,), (hook,) = story.found[COMPLETED]["groups"], story.found[COMPLETED]["hooks"]
    assert (group["MinSize"], group["MaxSize"], group["DesiredCapacity"]) == (0, 20, 0)
    assert set(group["VPCZoneIdentifier"].split(",")) == set(story.base.private)
    assert group["LaunchTemplate"]["LaunchTemplateName"] == "simple-comfy-pro-asg-template"
    assert group["LaunchTemplate"]["Version"] == "$Default"
    assert group["NewInstancesProtectedFromScaleIn"] is True
    assert group["HealthCheckType"] == "EC2"
    assert [process["ProcessName"] for process in group["SuspendedProcesses"]] == ["AZRebalance"]
    assert (tags_of(group["Tags"])["comfy-env"], tags_of(group["Tags"])["comfy-version"]) == ("pro", "1")
    assert hook["LifecycleHookName"] == "comfy-terminating"
    assert hook["LifecycleTransition"] == "autoscaling:EC2_INSTANCE_TERMINATING"
    assert (hook["HeartbeatTimeout"], hook["DefaultResult"]) == (300, "CONTINUE")


def check_alarms(story: Story) -> None:
    found = story.found[COMPLETED]
    (policy,) = found["policies"]
    alarms = {alarm["AlarmName"]: alarm for alarm in found["alarms"]}
    kinds = ("first-instance", "dead-letters", "oldest-message", "not-in-service", "idle-hour")
    assert set(alarms) == {f"simple-comfy-pro-asg-{kind}" for kind in kinds}
    for name, alarm in alarms.items():
        assert tags_of(alarm["Tags"]) == {"comfy-env": "pro", "comfy-prefix": "simple-comfy", "Name": name}
        assert (alarm["ComparisonOperator"], alarm["Threshold"]) == ("GreaterThanOrEqualToThreshold", 1)
        assert sum(metric["ReturnData"] for metric in alarm["Metrics"]) == 1
        assert alarm["AlarmActions"] == ([policy["PolicyARN"]] if name == ALARM else [])
    alarm = alarms[ALARM]
    assert {metric["Metric"] for metric in found["groups"][0]["EnabledMetrics"]} == {
        "GroupDesiredCapacity",
        "GroupInServiceInstances",
        "GroupPendingInstances",
        "GroupTotalInstances",
    }
    assert (policy["PolicyName"], policy["PolicyType"]) == (ALARM, "StepScaling")
    assert policy["AdjustmentType"] == "ChangeInCapacity"
    assert policy["StepAdjustments"] == [{"MetricIntervalLowerBound": 0.0, "ScalingAdjustment": 1}]
    assert policy["EstimatedInstanceWarmup"] == 300
    assert (alarm["EvaluationPeriods"], alarm["TreatMissingData"]) == (1, "notBreaching")
    measured = {
        metric["Id"]: (stat["Metric"]["MetricName"], stat["Metric"]["Dimensions"][0]["Value"], stat["Period"])
        for metric in alarm["Metrics"]
        if (stat := metric.get("MetricStat"))
    }
    assert measured == {
        "visible": ("ApproximateNumberOfMessagesVisible", QUEUE, 60),
        "desired": ("GroupDesiredCapacity", "simple-comfy-pro-asg", 60),
    }
    returned = [metric for metric in alarm["Metrics"] if metric["ReturnData"]]
    assert [metric["Expression"] for metric in returned] == ["IF(visible > 0 AND desired < 1, 1, 0)"]


def check_dashboard(story: Story) -> None:
    dashboard = json.loads(story.found[COMPLETED]["dashboard"])
    states, *widgets = dashboard["widgets"]
    assert states["type"] == "alarm"
    assert set(states["properties"]["alarms"]) == {alarm["AlarmArn"] for alarm in story.found[COMPLETED]["alarms"]}
    places = {(widget["x"], widget["y"]) for widget in widgets}
    assert places == {(x, y) for x in (0, 8, 16) for y in (2, 8, 14)}, "three rows of three, none over another"
    shown: dict[str, list[tuple[str, ...]]] = {}
    for widget in widgets:
        properties = widget["properties"]
        assert properties["region"] == REGION
        shown[properties["title"]] = [tuple(metric[:-1]) for metric in properties["metrics"] if len(metric) > 1]
    ours, group = "simple-comfy/pro", ("AutoScalingGroupName", "simple-comfy-pro-asg")
    visible, running = "ApproximateNumberOfMessagesVisible", "ApproximateNumberOfMessagesNotVisible"
    assert shown == {
        "Messages": [
            ("AWS/SQS", visible, "QueueName", QUEUE),
            ("AWS/SQS", running, "QueueName", QUEUE),
            ("AWS/SQS", visible, "QueueName", f"{QUEUE}-dlq"),
        ],
        "Age of the oldest message (seconds)": [("AWS/SQS", "ApproximateAgeOfOldestMessage", "QueueName", QUEUE)],
        "Instances": [
            ("AWS/AutoScaling", "GroupDesiredCapacity", *group),
            ("AWS/AutoScaling", "GroupInServiceInstances", *group),
        ],
        "Jobs per minute": [(ours, "JobsSucceeded"), (ours, "JobsFailed")],
        "Wait (seconds)": [(ours, "WaitSeconds")] * 2,
        "Run (seconds)": [(ours, "RunSeconds")] * 2,
        "Failed jobs": [(ours, "JobsFailed")],
        "GPU busy (percent)": [(ours, "BusyShare")],
        "Boot (seconds)": [
            (ours, "BootSeconds", "Phase", phase) for phase in ("system", "cloud_init", "mount", "models", "comfyui")
        ],
    }


def check_that_nothing_changed(story: Story) -> None:
    assert story.found[AGAIN] == story.found[COMPLETED]
    printed = story.ran[AGAIN].stdout
    assert printed.count("already there") == 14
    assert "created" not in printed
    assert "updated" not in printed


def check_that_settings_were_applied(story: Story) -> None:
    found = story.found[CHANGED]
    assert (story.ran[CHANGED].returncode, story.ran[CHANGED].stderr) == (0, "")
    assert found[QUEUE]["attributes"]["VisibilityTimeout"] == "60"
    assert json.loads(found[QUEUE]["attributes"]["RedrivePolicy"])["maxReceiveCount"] == 5
    (group,) = found["groups"]
    assert group["MaxSize"] == 7
    assert group["VPCZoneIdentifier"] == story.base.private[0]
    assert [process["ProcessName"] for process in group["SuspendedProcesses"]] == ["AZRebalance"]
    assert found["hooks"] == story.found[COMPLETED]["hooks"]
    assert len(found["versions"]) == 2
    (default,) = [version for version in found["versions"] if version["DefaultVersion"]]
    assert default["LaunchTemplateData"]["InstanceType"] == "g6.xlarge"
    assert tags_of(group["Tags"])["comfy-version"] == "2", "the workers see that they are outdated"
    assert default["LaunchTemplateData"]["BlockDeviceMappings"] == [
        {"DeviceName": "/dev/sda1", "Ebs": {"DeleteOnTermination": True, "VolumeInitializationRate": 200}}
    ]
    assert found["images"] == story.found[COMPLETED]["images"]
    policy = group["MixedInstancesPolicy"]
    assert policy["LaunchTemplate"]["LaunchTemplateSpecification"]["Version"] == "$Default"
    assert [item["InstanceType"] for item in policy["LaunchTemplate"]["Overrides"]] == ["g6.xlarge", "g5.2xlarge"]
    assert policy["InstancesDistribution"] == {
        "OnDemandAllocationStrategy": "prioritized",
        "OnDemandBaseCapacity": 0,
        "OnDemandPercentageAboveBaseCapacity": 30,
        "SpotAllocationStrategy": "price-capacity-optimized",
    }
    assert found["policies"] == story.found[COMPLETED]["policies"]
    topic = f"arn:aws:sns:{REGION}:{ACCOUNT_ID}:operators"
    told = [alarm["AlarmName"] for alarm in found["alarms"] if alarm["AlarmActions"] == [topic]]
    assert ALARM not in told
    assert len(told) == 4
    assert any(
        metric.get("Expression") == "IF(visible > 0 AND age > 600, 1, 0)"
        for alarm in found["alarms"]
        for metric in alarm["Metrics"]
    )
    assert found["dashboard"] == story.found[COMPLETED]["dashboard"]
    printed = story.ran[CHANGED].stdout
    assert printed.count("updated") == 8
    assert "0 to 7 g6.xlarge or g5.2xlarge as jobs come and go.\nSpot instances are 70 % of them.\n" in printed


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (ENV_FILE, ENV_FILE.replace("ENV=base", "ENV=pro")),
        ("# mine\nENV=test\nMY_ENV=base\nX=y", "# mine\nENV=pro\nMY_ENV=base\nX=y"),
        ("REGION=us-west-2\nS3_BUCKET=a-${ENV}\n", "ENV=pro\nREGION=us-west-2\nS3_BUCKET=a-${ENV}\n"),
    ],
    ids=["as shipped", "another ENV", "no ENV line"],
)
def test_user_data_chooses_the_environment_and_forgets_the_logs(
    bundle: Bundle, tmp_path: Path, before: str, after: str
) -> None:
    user_data = bundle.run_function("user_data").stdout
    assert "home=${COMFY_HOME:-/home/ubuntu/comfy}" in user_data
    home = tmp_path / "comfy"
    (home / "logs" / "old").mkdir(parents=True)
    (home / "logs" / "parse_job.log").write_text("the base machine's")
    (home / "ComfyUI").mkdir()
    (home / "env").write_text(before)
    (home / "env").chmod(0o600)
    for _ in range(2):
        subprocess.run(
            ["bash", "-c", user_data], env={"PATH": os.environ["PATH"], "COMFY_HOME": str(home)}, check=True
        )
        assert (home / "env").read_text() == after
        assert (home / "env").stat().st_mode & 0o777 == 0o600
        assert {path.name for path in home.iterdir()} == {"env", "logs", "ComfyUI"}
        assert list((home / "logs").iterdir()) == []


# --- Stopped anywhere, and run again ---------------------------------------------------------------------------

PARTS = 3


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_a_run_that_is_killed_after_any_aws_call_is_completed_by_the_next(
    bundle: Bundle, aws: Aws, part: int, sample: Sample
) -> None:
    """Where a call has changed nothing, the next run finds what it found one call earlier: that is not run again."""
    base = aws.make_base(looks_until_available=2)
    calls = bundle.run_killed("create_env.sh", "pro", base.instance_id, after=1000)
    assert calls
    whole, before = shape(aws.everything("pro")), ""
    for call in sample(range(1 + calls * part // PARTS, 1 + calls * (part + 1) // PARTS), 1):
        aws.reset()
        base = aws.make_base(looks_until_available=2)
        assert bundle.run_killed("create_env.sh", "pro", base.instance_id, after=call) is None
        if (found := shape(aws.everything("pro"))) != before:
            before = found
            ran = bundle.run("create_env.sh", "pro", base.instance_id)
            assert (ran.returncode, ran.stderr) == (0, ""), f"after call {call}"
            assert shape(aws.everything("pro")) == whole, f"after call {call}"


def image_ids(found: dict[str, Any]) -> list[str]:
    """The environment's images, the oldest first."""
    return [image["ImageId"] for image in sorted(found["images"], key=lambda image: str(image["CreationDate"]))]


def image_in_use(found: dict[str, Any]) -> str:
    """The image of the template's default version, which the group must know."""
    (version,) = [version for version in found["versions"] if version["DefaultVersion"]]
    assert tags_of(found["groups"][0]["Tags"])["comfy-version"] == str(version["VersionNumber"])
    return str(version["LaunchTemplateData"]["ImageId"])


def run_well(bundle: Bundle, *arguments: str) -> list[str]:
    """Run create_env.sh, which must succeed without a warning. Returns the lines it reports."""
    ran = bundle.run("create_env.sh", *arguments)
    assert (ran.returncode, ran.stderr) == (0, "")
    return ran.stdout.partition("\n\n")[0].splitlines()[1:]


@pytest.mark.slow
def test_a_rebake_and_a_rollback_that_are_killed_after_each_change_are_gone_on_with(bundle: Bundle, aws: Aws) -> None:
    base = aws.make_base(looks_until_available=2)
    run_well(bundle, "pro", base.instance_id)
    (first,) = image_ids(aws.everything("pro"))

    rebake = ("create_env.sh", "pro", base.instance_id, "--rebake", "--keep", "0")
    for words in (
        "ec2 create-image",
        "ec2 create-launch-template-version",
        "ec2 modify-launch-template",
        "autoscaling create-or-update-tags",
        "ec2 deregister-image",
    ):
        assert bundle.run_killed(*rebake, after=words) is None, words
        if words == "ec2 create-launch-template-version":
            lines = run_well(bundle, "pro", base.instance_id)
            assert image_in_use(aws.everything("pro")) == first, "a plain run does not move the fleet"
            assert any("waits for the --rebake that was stopped" in line for line in lines)
    run_well(bundle, *rebake[1:])
    found = aws.everything("pro")
    (second,) = image_ids(found)
    assert second != first
    assert image_in_use(found) == second
    assert len(found["versions"]) == 2
    assert len(found["snapshots"]) == 1, "the snapshot whose image had gone when it was killed has gone too"

    run_well(bundle, *rebake[1:4])
    third = image_ids(aws.everything("pro"))[-1]
    rollback = ("create_env.sh", "pro", base.instance_id, "--rollback")
    for words in (
        "ec2 create-tags",
        "ec2 create-launch-template-version",
        "ec2 modify-launch-template",
        "autoscaling create-or-update-tags",
    ):
        assert bundle.run_killed(*rollback, after=words) is None, words
    run_well(bundle, *rollback[1:])
    found = aws.everything("pro")
    assert image_ids(found) == [second, third]
    assert image_in_use(found) == second
    assert len(found["versions"]) == 4


@pytest.mark.slow
def test_the_fleet_moves_to_new_images_and_back(bundle: Bundle, aws: Aws) -> None:
    base = aws.make_base(looks_until_available=3)

    def run(*options: str) -> list[str]:
        return run_well(bundle, "pro", base.instance_id, *options)

    def run_foretold(*options: str) -> list[str]:
        """A run that --dry-run, which changes nothing, foretells line by line."""
        before = aws.everything("pro")
        foretold = [foreseen(line) for line in run_well(bundle, "pro", base.instance_id, *options, "--dry-run")]
        assert aws.everything("pro") == before
        lines = run(*options)
        told = [foreseen(line) for line in lines if "waiting until it can be used" not in line]
        assert told == foretold
        return lines

    def foreseen(line: str) -> str:
        return re.sub(r"ami-\S+|snap-\S+|20\d{6}T\d{6}Z", "*", line.replace("to be ", "")).replace(" ", "")

    assert "waiting until it can be used, some minutes: 33%" in str(run_foretold("--wait"))
    (first,) = image_ids(aws.everything("pro"))
    ec2 = aws.client("ec2")
    (busy,) = ec2.run_instances(ImageId=first, MinCount=1, MaxCount=1)["Instances"]
    shown = str(run_foretold("--rebake"))
    assert "waiting until it can be used, some minutes: 33%" in shown
    assert "waiting until it can be used, some minutes: 66%" in shown
    second = image_in_use(aws.everything("pro"))
    assert image_ids(aws.everything("pro")) == [first, second], "one is kept"
    run_foretold("--rollback")
    assert image_in_use(aws.everything("pro")) == first
    run()
    assert image_in_use(aws.everything("pro")) == first, "not undone by a plain run, though there is a newer image"
    refused_rollback = bundle.run("create_env.sh", "pro", base.instance_id, "--rollback")
    assert "there is no earlier image of pro to go back to" in refused_rollback.stderr
    bundle.set(MAX_INSTANCES="7")
    run_foretold("--rebake", "--keep", "0")
    found = aws.everything("pro")
    third = image_in_use(found)
    assert image_ids(found) == [first, third], "what was rolled back is gone, what an instance uses stays"
    assert [tags_of(image["Tags"]).get("comfy-image") for image in found["images"]] == [None, "used"]
    ec2.terminate_instances(InstanceIds=[busy["InstanceId"]])
    run("--keep", "0")
    found = aws.everything("pro")
    assert image_ids(found) == [third]
    assert len(found["snapshots"]) == 1
    assert found["groups"][0]["MaxSize"] == 7


# --- The base machine itself -----------------------------------------------------------------------------------


@pytest.fixture
def comfy_home(bundle: Bundle) -> Path:
    """A base machine's folder with files in ComfyUI, of which one lies elsewhere."""
    comfyui = bundle.folder / "ComfyUI"
    (comfyui / "models" / "loras").mkdir(parents=True)
    (comfyui / "models" / "checkpoints").mkdir()
    (comfyui / "models" / "checkpoints" / "a model.safetensors").write_text("weights")
    (bundle.folder / "elsewhere.safetensors").write_text("more weights")
    (comfyui / "models" / "linked.safetensors").symlink_to(bundle.folder / "elsewhere.safetensors")
    (comfyui / "input").mkdir()
    (comfyui / "output").mkdir()
    (comfyui / "output" / "日本.png").write_text("picture")
    bundle.set(COMFY_HOME=str(bundle.folder))
    return bundle.folder


MOVED = {
    "models/checkpoints/a model.safetensors": "weights",
    "models/linked.safetensors": "more weights",
    "models/loras/": "",
    "output/日本.png": "picture",
}


def look_of(folder: Path) -> dict[str, str]:
    """Every file and link below ComfyUI and what it holds."""
    return {
        str(path.relative_to(folder)): str(path.readlink()) if path.is_symlink() else path.read_text()
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


LINKED = {name: f"../s3/{name}" for name in ("models", "input", "output")}


def test_base_gets_a_bucket_and_queues(bundle: Bundle, aws: Aws) -> None:
    foretold = run_well(bundle, "base", "--dry-run")
    assert aws.everything("base") == {}
    lines = run_well(bundle, "base")
    assert [line.replace("to be ", "") for line in foretold] == lines
    found = aws.everything("base")
    assert set(found) >= {"bucket", "simple-comfy-base-queue", "simple-comfy-base-queue-dlq"}
    assert not {"images", "groups", "templates"} & set(found)
    assert set(found["bucket access"].values()) == {True}
    assert all(line.endswith("already there") for line in run_well(bundle, "base"))
    assert aws.everything("base") == found


@pytest.mark.slow
def test_data_is_moved_to_the_bucket_by_any_number_of_runs_that_are_killed(
    bundle: Bundle, aws: Aws, comfy_home: Path, sample: Sample
) -> None:
    options = ("base", "--move-data", "--yes")
    before = look_of(comfy_home / "ComfyUI")
    foretold = run_well(bundle, *options, "--dry-run")
    assert aws.everything("base") == {}
    assert look_of(comfy_home / "ComfyUI") == before
    kept = shutil.copytree(comfy_home, comfy_home.parent / "kept", symlinks=True)
    lines = run_well(bundle, *options)
    assert [re.sub(" +", " ", line.replace("to be ", "")) for line in foretold] == [
        re.sub(" +", " ", line) for line in lines
    ]
    assert aws.files(BASE_BUCKET) == MOVED
    assert look_of(comfy_home / "ComfyUI") == LINKED
    assert (comfy_home / "elsewhere.safetensors").read_text() == "more weights"

    def begin_again() -> None:
        aws.reset()
        shutil.rmtree(comfy_home)
        shutil.copytree(kept, comfy_home, symlinks=True)

    begin_again()
    calls = bundle.run_killed("create_env.sh", *options, after=1000)
    assert calls
    for call in sample(range(1, calls + 1), 4):
        begin_again()
        assert bundle.run_killed("create_env.sh", *options, after=call) is None
        there = set(aws.files(BASE_BUCKET).values()) if aws.client("s3").list_buckets()["Buckets"] else set()
        here = {path.read_text() for path in (comfy_home / "ComfyUI").rglob("*") if path.is_file()}
        assert here | there >= {"weights", "more weights", "picture"}, f"a file was lost after call {call}"
        run_well(bundle, *options)
        assert aws.files(BASE_BUCKET) == MOVED
        assert look_of(comfy_home / "ComfyUI") == LINKED


def meddle(bundle: Bundle, words: str, command: str) -> str:
    """A PATH on which `command` runs once, right after the first AWS call with these words."""
    folder = bundle.folder.parent / "meddling"
    folder.mkdir()
    stub = folder / "aws"
    stub.write_text(
        f"""#!/usr/bin/env bash
'{CLOUD}/bin/aws' "$@" || exit
if [[ " $* " == *" {words} "* ]] && mkdir '{folder}/done' 2>/dev/null; then {command}; fi
"""
    )
    stub.chmod(0o755)
    return f"{folder}:{bundle.aws.environment()['PATH']}"


def test_a_file_that_changes_while_it_is_copied_is_copied_again(bundle: Bundle, aws: Aws, comfy_home: Path) -> None:
    path = meddle(bundle, "s3 sync", f"printf WEIGHTS >'{comfy_home}/ComfyUI/models/checkpoints/a model.safetensors'")
    ran = bundle.run("create_env.sh", "base", "--move-data", PATH=path)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert aws.files(BASE_BUCKET) == MOVED | {"models/checkpoints/a model.safetensors": "WEIGHTS"}
    moved = comfy_home / "ComfyUI" / "models.moved" / "checkpoints" / "a model.safetensors"
    assert moved.read_text() == "WEIGHTS", "without --yes, and nobody to ask, the folder stays beside the link"
    assert "run this again with --yes to remove it" in ran.stdout
    late = moved.with_name("late.safetensors")
    late.write_text("written after the last look")
    ran = bundle.run("create_env.sh", "base", "--move-data", "--yes")
    assert f"{comfy_home}/ComfyUI/models.moved has files that are not in the bucket" in ran.stderr
    assert late.exists()
    late.unlink()
    path = bundle.break_call("s3api list-objects-v2", "AccessDenied")
    bundle.run("create_env.sh", "base", "--move-data", "--yes", PATH=path)
    assert moved.exists(), "what cannot be looked up counts as missing"
    run_well(bundle, "base", "--move-data", "--yes")
    assert look_of(comfy_home / "ComfyUI") == LINKED


def test_a_file_that_did_not_arrive_keeps_the_folder(bundle: Bundle, comfy_home: Path) -> None:
    path = meddle(bundle, "s3 sync", f"aws s3 rm --quiet s3://{BASE_BUCKET}/models/linked.safetensors")
    before = look_of(comfy_home / "ComfyUI" / "models")
    ran = bundle.run("create_env.sh", "base", "--move-data", "--yes", PATH=path)
    assert ran.returncode == 1
    assert "did not arrive in" in ran.stderr
    assert "12\tlinked.safetensors" in ran.stderr
    assert look_of(comfy_home / "ComfyUI" / "models") == before
    run_well(bundle, "base", "--move-data", "--yes")


def test_what_s3_cannot_hold_or_has_otherwise_is_told_before_anything_is_copied(
    bundle: Bundle, aws: Aws, comfy_home: Path
) -> None:
    models = comfy_home / "ComfyUI" / "models"
    (models / "broken.safetensors").symlink_to("gone")
    ran = bundle.run("create_env.sh", "base", "--move-data")
    assert ran.returncode == 1
    assert f"{models}/broken.safetensors" in ran.stderr
    (models / "broken.safetensors").unlink()
    (models / "loop").symlink_to(models)
    assert "cannot read all of" in bundle.run("create_env.sh", "base", "--move-data").stderr
    (models / "loop").unlink()
    aws.client("s3").put_object(Bucket=BASE_BUCKET, Key="models/linked.safetensors", Body=b"another")
    ran = bundle.run("create_env.sh", "base", "--move-data")
    assert "and, with another size, in" in ran.stderr
    assert ran.stderr.rstrip().endswith("linked.safetensors")
    assert aws.files(BASE_BUCKET) == {"models/linked.safetensors": "another"}


# --- Checks ----------------------------------------------------------------------------------------------------


def test_all_problems_are_told_together(bundle: Bundle, aws: Aws) -> None:
    base = aws.make_base(files=False)
    bundle.set(MIN_INSTANCES="30", INSTANCE_TYPE="g99.xlarge")
    ran = bundle.run("create_env.sh", "pro", base.instance_id, "--rollback")
    assert ran.returncode == 1
    assert ran.stdout == ""
    assert [line.split(": ", 1)[1][:40] for line in ran.stderr.splitlines()] == [
        "MIN_INSTANCES is '30': set it in " + str(bundle.env_file)[:7],
        "AWS has no g99.xlarge in us-west-2a,us-w",
        f"the base machine's bucket {BASE_BUCKET}"[:40],
        "there is no earlier image of pro to go b",
    ]
    assert aws.everything("pro") == {}


def test_warnings_stop_nobody(bundle: Bundle, aws: Aws) -> None:
    base = aws.make_base()
    ec2 = aws.client("ec2")
    endpoints = [endpoint["VpcEndpointId"] for endpoint in ec2.describe_vpc_endpoints()["VpcEndpoints"]]
    ec2.delete_vpc_endpoints(VpcEndpointIds=endpoints)
    bundle.set(MAX_INSTANCES="100", INSTANCE_TYPES='"g5.2xlarge g99.xlarge"', SPOT_PERCENT="1")
    ran = bundle.run("create_env.sh", "pro", base.instance_id, "--dry-run")
    assert ran.returncode == 0
    (table,) = set(aws.tables(base.vpc)) & set(ran.stderr.replace("\n", " ").split())
    warnings = [line.removeprefix("create_env.sh: warning: ") for line in ran.stderr.splitlines()]
    assert warnings[0].endswith(
        f"aws ec2 create-vpc-endpoint --region {REGION} --vpc-id {base.vpc} "
        f"--service-name com.amazonaws.{REGION}.s3 --route-table-ids {table}"
    )
    assert warnings[1].startswith("AWS has no g99.xlarge in us-west-2a,us-west-2b")
    assert warnings[2] == (
        "MAX_INSTANCES is 100, but the account may run only 96 g5.2xlarge (on-demand) at a time, because its quota is "
        f"768 vCPUs: aws service-quotas request-service-quota-increase --region {REGION} --service-code ec2 "
        "--quota-code L-DB2E81BA --desired-value 792"
    )
    assert len(warnings) == 3
    path = bundle.break_call("service-quotas get-service-quota", "AccessDeniedException")
    ran = bundle.run("create_env.sh", "pro", base.instance_id, "--dry-run", PATH=path)
    assert ran.returncode == 0
    assert "cannot look at the quota L-DB2E81BA, see AWS's words above, so that is not checked" in ran.stderr


def test_on_the_base_machine_its_folder_and_comfyui_are_looked_at(bundle: Bundle) -> None:
    bundle.set(COMFY_HOME=str(bundle.folder), COMFY_ADDRESS="127.0.0.1:9")
    ran = bundle.run_function("check_here; die_of_problems")
    assert ran.returncode == 1
    assert "ComfyUI does not answer on 127.0.0.1:9" in ran.stderr
    for file in ("start_service.sh", "parse_job.py", "ComfyUI/main.py"):
        assert f"there is no {bundle.folder}/{file}, so no instance of the fleet could work" in ran.stderr
    assert "/env," not in ran.stderr


@pytest.mark.parametrize(
    ("partition", "console", "queue"),
    [
        ("aws", "console.aws.amazon.com", "sqs.us-west-2.amazonaws.com%2F"),
        ("aws-cn", "console.amazonaws.cn", "sqs.us-west-2.amazonaws.com.cn%2F"),
    ],
)
def test_the_summary_has_links_to_the_console(bundle: Bundle, partition: str, console: str, queue: str) -> None:
    lines = bundle.run_function(f"PARTITION={partition}; show_links").stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["Files", "Queue", "Fleet", "Dashboard"]
    assert all(f" https://{console}/" in line for line in lines)
    assert queue in lines[1]


# --- Bad input: one sentence, and nothing is made ------------------------------------------------------------


def refused(bundle: Bundle, *arguments: str, **environment: str) -> str:
    """Run create_env.sh, which must refuse in a sentence for each problem and make nothing. Returns them."""
    ran = bundle.run("create_env.sh", *arguments, **environment)
    assert ran.returncode != 0
    assert ran.stdout == ""
    assert all(line.startswith("create_env.sh: ") for line in ran.stderr.splitlines()), ran.stderr
    assert bundle.aws.everything("pro") == {}
    assert not bundle.aws.client("s3").list_objects_v2(Bucket=BASE_BUCKET, Prefix="none").get("Contents")
    return ran.stderr


@pytest.fixture
def with_base_bucket(aws: Aws) -> None:
    aws.make_bucket(BASE_BUCKET)


@pytest.mark.usefixtures("with_base_bucket")
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "which environment? Give its name: create_env.sh NAME"),
        (["Pro"], "the environment's name 'Pro' is not allowed: use lowercase letters"),
        (["pro_1"], "'pro_1' is not allowed"),
        (["-"], "the option '-' is not known"),
        (["pro-"], "'pro-' is not allowed"),
        (["x" * 40], "has 76 characters and S3 allows 63: choose a shorter name than"),
        (["base", NO_INSTANCE], f"{NO_INSTANCE} is not for base, the machine that environments are made from"),
        (["base", "--rebake"], "--rebake is not for base"),
        (["base", "--move-data"], "there is no /home/ubuntu/comfy/ComfyUI: --move-data is run on the base machine"),
        (["pro", "--move-data"], "--move-data belongs to ./create_env.sh base"),
        (["pro", "--rebake", "--rollback"], "--rebake and --rollback are opposites: give one of them"),
        (["pro", "--keep"], "--keep is followed by the number of images to keep, 0 to 999, not by ''"),
        (["pro", "--fast"], "the option '--fast' is not known: see --help"),
        (["pro", NO_INSTANCE, "more"], "the argument 'more' is one too many"),
        (["pro", "web-1"], "'web-1' is not an instance id: it looks like i-"),
        (["pro", NO_INSTANCE], f"there is no instance {NO_INSTANCE} in {REGION}: give the id"),
        (["pro"], "this is not an EC2 instance"),
    ],
)
def test_bad_arguments(bundle: Bundle, arguments: list[str], sentence: str) -> None:
    assert sentence in refused(bundle, *arguments)


@pytest.mark.usefixtures("with_base_bucket")
@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("ACCOUNT_ID", "1234", "ACCOUNT_ID is '1234': set it in"),
        ("ACCOUNT_ID", "", "ACCOUNT_ID is '': set it in"),
        (
            "ACCOUNT_ID",
            "210987654321",
            f"the credentials belong to account {ACCOUNT_ID}, but ACCOUNT_ID is 210987654321",
        ),
        ("REGION", "Oregon", "REGION is 'Oregon': set it in"),
        ("PREFIX", "My-Comfy", "PREFIX is 'My-Comfy': use lowercase"),
        ("MIN_INSTANCES", "-1", "MIN_INSTANCES is '-1': set it in"),
        ("MIN_INSTANCES", "21", "to a whole number from 0 to 20"),
        ("MAX_INSTANCES", "many", "MAX_INSTANCES is 'many': set it in"),
        ("MAX_INSTANCES", "010", "MAX_INSTANCES is '010': set it in"),
        ("VISIBILITY_TIMEOUT", "43201", "to a whole number from 3 to 43200"),
        ("MAX_RECEIVES", "0", "to a whole number from 1 to 1000"),
        ("INSTANCE_TYPE", "large", "INSTANCE_TYPE is 'large': set it in"),
        ("INSTANCE_TYPES", '"g5.2xlarge large"', "INSTANCE_TYPES has 'large': set it in"),
        ("INSTANCE_TYPES", '"g5.xlarge g6.xlarge g5.xlarge"', "INSTANCE_TYPES has g5.xlarge twice: take one out"),
        ("INSTANCE_TYPES", f'"{" ".join(f"g{n}.large" for n in range(41))}"', "has 41 types and AWS allows 40"),
        ("SPOT_PERCENT", "101", "SPOT_PERCENT is '101': set it in"),
        ("SPOT_PERCENT", "50%", "to a whole number from 0 to 100"),
        ("WARM_POOL", "21", "to a whole number from 0 to 20"),
        ("WARM_POOL", "1\nSPOT_PERCENT=50", "AWS keeps no Spot instances in a warm pool: set one of them"),
        ("VOLUME_INIT_RATE", "99", "VOLUME_INIT_RATE is '99': set it in"),
        ("VOLUME_INIT_RATE", "fast", "to a whole number from 100 to 300"),
        ("ALARM_AGE", "1h", "ALARM_AGE is '1h': set it in"),
        ("ALARM_TOPIC", "operators", "ALARM_TOPIC is 'operators': set it in"),
        ("ALARM_TOPIC", f"arn:aws:sns:eu-west-1:{ACCOUNT_ID}:ops", f"to the ARN of an SNS topic in {REGION}"),
        ("ALARM_TOPIC", f"arn:aws:sns:{REGION}:{ACCOUNT_ID}:gone", "but there is no such topic: create it"),
        ("COMFY_HOME", "comfy", "COMFY_HOME is 'comfy': set it in"),
        ("INSTANCE_PROFILE", "a/b", "INSTANCE_PROFILE is 'a/b': set it in"),
        ("ASG_NAME", "a" * 54 + "-${ENV}", "has 65 characters and IAM allows 64: choose a shorter ASG_NAME"),
        ("S3_BUCKET", "ab", "S3_BUCKET is 'ab' for both base and pro: write it with ${ENV}"),
        ("S3_BUCKET", "My.Bucket-${ENV}", "S3_BUCKET is 'My.Bucket-pro': use 3 to 63 lowercase"),
        ("SQS_NAME", "jobs.${ENV}", "SQS_NAME is 'jobs.pro': use at most 76"),
        ("ASG_NAME", "fleet", "ASG_NAME is 'fleet' for both base and pro"),
        ("ASG_NAME", "${FLEET}-${ENV}", "uses ${FLEET}, which is not set"),
        ("ASG_NAME", "$(id)", "(ASG_NAME) is malformed: write NAME=value"),
    ],
)
def test_bad_settings(bundle: Bundle, name: str, value: str, sentence: str) -> None:
    bundle.set(ENV="base", **{name: value})
    assert sentence in refused(bundle, "pro", NO_INSTANCE)


@pytest.mark.usefixtures("with_base_bucket")
def test_no_settings_file(bundle: Bundle) -> None:
    bundle.env_file.unlink()
    assert f"cannot read the settings file {bundle.env_file}: copy env.example" in refused(bundle, "pro")
    bundle.env_file.mkdir()  # what not even root can read as a file
    assert f"cannot read the settings file {bundle.env_file}" in refused(bundle, "pro")


@pytest.mark.usefixtures("with_base_bucket")
def test_no_aws_cli(bundle: Bundle, tmp_path: Path) -> None:
    for tool in ("bash", "dirname", "env"):
        (tmp_path / tool).symlink_to(f"/usr/bin/{tool}")
    assert "the AWS CLI is not installed: install it, see https://" in refused(bundle, "pro", PATH=str(tmp_path))


def test_no_base_bucket(bundle: Bundle, aws: Aws) -> None:
    base = aws.make_base(files=False)
    ran = bundle.run("create_env.sh", "pro", base.instance_id)
    assert ran.returncode != 0
    assert ran.stdout == ""
    assert ran.stderr == (
        f"create_env.sh: the base machine's bucket {BASE_BUCKET} does not exist: "
        f"run ./create_env.sh base first, and check S3_BUCKET in {bundle.env_file}\n"
    )
    assert aws.everything("pro") == {}


def test_help(bundle: Bundle) -> None:
    ran = bundle.run("create_env.sh", "--help")
    assert ran.returncode == 0
    assert "Usage: ./create_env.sh base [--move-data [--yes]] [--dry-run]" in ran.stdout
    assert ran.stdout.rstrip().endswith("until --rebake or --rollback.")


# --- The base machine ----------------------------------------------------------------------------------------


def test_a_base_machine_that_has_ended_is_refused(bundle: Bundle, aws: Aws) -> None:
    ec2 = aws.client("ec2")
    image = ec2.register_image(Name="ubuntu")["ImageId"]
    instance = ec2.run_instances(ImageId=image, MinCount=1, MaxCount=1)["Instances"][0]["InstanceId"]
    ran = bundle.run_function(f'inspect_base {instance}; echo "$KEY_NAME"')
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "None\n", "")

    ec2.terminate_instances(InstanceIds=[instance])
    ran = bundle.run_function(f"inspect_base {instance}; die_of_problems")
    assert ran.returncode == 1
    assert (
        f"the instance {instance} is terminated: an image can be made of it when it is running or stopped"
        in ran.stderr
    )


# --- Permissions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pro", "base"])
@pytest.mark.parametrize("who", ["worker", "sender", "operator"])
def test_policies_are_printed_without_aws_and_fit_into_iam(bundle: Bundle, who: str, name: str) -> None:
    bundle.set(PREFIX="a-company-with-a-longer-name")
    ran = bundle.run("create_env.sh", "--print-policy", who, name, AWS_ENDPOINT_URL="http://127.0.0.1:9")
    assert (ran.returncode, ran.stderr) == (0, "")
    policy = json.loads(ran.stdout)
    assert len("".join(ran.stdout.split())) <= 6144, "the longest that a managed policy may be"
    text = json.dumps(policy)
    assert f"arn:aws:sqs:{REGION}:{ACCOUNT_ID}:a-company-with-a-longer-name-{name}-queue" in text
    open_to_all = {
        action
        for statement in policy["Statement"]
        if statement["Resource"] == "*"
        for action in ([statement["Action"]] if isinstance(statement["Action"], str) else statement["Action"])
    }
    looks = ("Describe", "List", "GetResources", "GetServiceQuota", "GetMetricData", "PutMetricData")
    assert all(action.partition(":")[2].startswith(looks) for action in open_to_all), open_to_all
    if name == "base":
        assert "Delete" not in text or who == "worker"


def test_a_policy_is_that_of_the_env_in_the_settings(bundle: Bundle) -> None:
    bundle.set(ENV="pro")
    printed = [bundle.run("create_env.sh", "--print-policy", "sender", *name).stdout for name in ([], ["pro"])]
    assert printed[0] == printed[1] != ""
    ran = bundle.run("create_env.sh", "--print-policy", "sender", REGION="cn-north-1")
    assert f'"arn:aws-cn:sqs:cn-north-1:{ACCOUNT_ID}:{QUEUE}"' in ran.stdout
    for arguments, sentence in (
        (["root"], "'root' is no one's policy: use --print-policy worker, sender or operator"),
        ([], "'' is no one's policy"),
        (["sender", "pro", "more"], "the argument 'more' is one too many"),
        (["sender", "Pro"], "the environment's name 'Pro' is not allowed"),
    ):
        ran = bundle.run("create_env.sh", "--print-policy", *arguments)
        assert (ran.returncode, ran.stdout) == (1, "")
        assert ran.stderr.startswith(f"create_env.sh: {sentence}")


def test_a_changed_policy_is_applied_and_a_stopped_run_completed(bundle: Bundle, aws: Aws) -> None:
    iam = aws.client("iam")
    iam.create_role(RoleName=WORKER, Path=PATH_OF_WORKER, AssumeRolePolicyDocument="{}")
    other = {"Version": "2012-10-17", "Statement": {"Effect": "Allow", "Action": "s3:*", "Resource": "*"}}
    iam.put_role_policy(RoleName=WORKER, PolicyName="worker", PolicyDocument=json.dumps(other))
    ran = bundle.run_function("ensure_profile; ensure_profile; echo $PROFILE")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert [line.split(maxsplit=2)[2] for line in ran.stdout.splitlines()[:2]] == ["updated", "already there"]
    found = aws.everything("pro")
    printed = bundle.run("create_env.sh", "--print-policy", "worker", "pro").stdout
    assert found["roles"][0]["Policies"] == [json.loads(printed)]
    assert found["profiles"][0]["Roles"][0]["RoleName"] == WORKER


def test_a_role_of_another_region_is_refused(bundle: Bundle, aws: Aws) -> None:
    path = "/simple-comfy/eu-central-1/pro/"
    aws.client("iam").create_role(RoleName=WORKER, Path=path, AssumeRolePolicyDocument="{}")
    ran = bundle.run_function("ensure_profile")
    assert ran.returncode == 1
    assert f"the role {WORKER} is not this environment's (its path is {path}, not {PATH_OF_WORKER})" in ran.stderr


def test_another_profile_can_be_named(bundle: Bundle, aws: Aws) -> None:
    bundle.set(INSTANCE_PROFILE="company")
    ran = bundle.run_function("ensure_profile")
    assert ran.returncode == 1
    assert f"cannot use the instance profile company, see INSTANCE_PROFILE in {bundle.env_file}" in ran.stderr
    aws.client("iam").create_instance_profile(InstanceProfileName="company")
    ran = bundle.run_function("ensure_profile; echo $PROFILE")
    assert (ran.returncode, ran.stdout.splitlines()[-1]) == (0, "company")
    assert "roles" not in aws.everything("pro")


# --- Names ---------------------------------------------------------------------------------------------------


def test_the_argument_chooses_the_environment_not_the_shell(bundle: Bundle) -> None:
    show = 'echo "$ENV $S3_BUCKET $DLQ_NAME $TEMPLATE_NAME $BASE_S3_BUCKET $MAX_INSTANCES"'
    ran = bundle.run_function(show, ENV="test", MAX_INSTANCES="9")
    assert ran.stdout.split() == ["pro", BUCKET, f"{QUEUE}-dlq", "simple-comfy-pro-asg-template", BASE_BUCKET, "9"]


def test_names_have_defaults(bundle: Bundle) -> None:
    bundle.env_file.write_text(f"ACCOUNT_ID={ACCOUNT_ID}\nREGION=eu-central-1\n")
    ran = bundle.run_function(
        'echo "$S3_BUCKET $SQS_NAME $ASG_NAME $AWS_DEFAULT_REGION $AWS_REGION"', AWS_REGION="us-east-1"
    )
    assert ran.stdout.split() == [
        f"simple-comfy-{ACCOUNT_ID}-eu-central-1-pro",
        QUEUE,
        "simple-comfy-pro-asg",
        "eu-central-1",
        "eu-central-1",
    ]


class MetadataHandler(BaseHTTPRequestHandler):
    """An instance metadata service that knows one thing, and tells it only to who holds a token."""

    def do_PUT(self) -> None:
        self.answer(b"token" if self.path == "/latest/api/token" else b"")

    def do_GET(self) -> None:
        known = self.path == "/latest/meta-data/instance-id" and self.headers["X-aws-ec2-metadata-token"] == "token"
        self.answer(NO_INSTANCE.encode() if known else b"")

    def answer(self, body: bytes) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture
def metadata_endpoint() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), MetadataHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_on_the_base_machine_the_id_comes_from_the_metadata_service(bundle: Bundle, metadata_endpoint: str) -> None:
    ran = bundle.run_function("find_instance_id", AWS_EC2_METADATA_SERVICE_ENDPOINT=metadata_endpoint)
    assert ran.stdout == NO_INSTANCE
    assert not (bundle.folder / "__pycache__").exists()


# --- Subnets -------------------------------------------------------------------------------------------------


def chosen_subnets(bundle: Bundle, vpc: str) -> tuple[set[str], str]:
    ran = bundle.run_function(f'VPC={vpc}; choose_subnets; echo "$SUBNETS|$SUBNETS_ARE"')
    subnets, _, are = ran.stdout.strip().partition("|")
    return set(subnets.split(",")), are


def test_a_subnet_is_private_by_its_route_table(bundle: Bundle, aws: Aws) -> None:
    base = aws.make_base(files=False)
    ec2 = aws.client("ec2")
    # Now the main table leads to the internet, and only what has a table of its own without such a route is private.
    main = ec2.describe_route_tables(
        Filters=[{"Name": "vpc-id", "Values": [base.vpc]}, {"Name": "association.main", "Values": ["true"]}]
    )["RouteTables"][0]["RouteTableId"]
    gateway = ec2.create_internet_gateway()["InternetGateway"]["InternetGatewayId"]
    ec2.create_route(RouteTableId=main, DestinationCidrBlock="0.0.0.0/0", GatewayId=gateway)
    own = ec2.create_route_table(VpcId=base.vpc)["RouteTable"]["RouteTableId"]
    ec2.associate_route_table(RouteTableId=own, SubnetId=base.private[1])
    assert chosen_subnets(bundle, base.vpc) == ({base.private[1]}, "private")


def test_without_a_private_subnet_all_are_used(bundle: Bundle, aws: Aws) -> None:
    base = aws.make_base(files=False)
    for subnet in base.private:
        aws.open_to_internet(base.vpc, subnet)
    assert chosen_subnets(bundle, base.vpc) == (
        {base.public, *base.private},
        "no subnet is private, so all are used",
    )


# --- Bucket --------------------------------------------------------------------------------------------------


def test_the_bucket_gets_what_is_new_and_loses_nothing(bundle: Bundle, aws: Aws) -> None:
    s3 = aws.client("s3")
    aws.make_bucket(BASE_BUCKET)
    assert "copied: 2\n" in bundle.run_function("ensure_bucket; copy_files no").stdout
    s3.put_object(Bucket=BUCKET, Key="output/job/result.json", Body=b"production's")
    s3.put_object(Bucket=BUCKET, Key="models/own.safetensors", Body=b"production's")
    s3.put_object(Bucket=BASE_BUCKET, Key="models/new.safetensors", Body=b"new")
    s3.delete_object(Bucket=BASE_BUCKET, Key="input/photo.png")
    expected = {
        "input/photo.png": "input/photo.png",
        "models/model.safetensors": "models/model.safetensors",
        "models/own.safetensors": "production's",
        "models/new.safetensors": "new",
        "output/job/result.json": "production's",
    }
    ran = bundle.run_function("ensure_bucket; copy_files no")
    assert ran.returncode == 0
    assert "copied: 1\n" in ran.stdout
    assert aws.files(BUCKET) == expected
    bundle.run_function("ensure_bucket; copy_files yes")  # --with-output
    assert aws.files(BUCKET) == expected | {"output/old.png": "output/old.png"}


def test_us_east_1_needs_no_location(bundle: Bundle, aws: Aws) -> None:
    bundle.set(REGION="us-east-1")
    aws.make_bucket(f"simple-comfy-{ACCOUNT_ID}-us-east-1-base", "us-east-1")
    ran = bundle.run_function("ensure_bucket; copy_files no")
    assert (ran.returncode, ran.stderr) == (0, "")
    bucket = f"simple-comfy-{ACCOUNT_ID}-us-east-1-pro"
    assert aws.client("s3", "us-east-1").get_bucket_location(Bucket=bucket)["LocationConstraint"] is None


def test_a_bucket_with_files_of_unknown_origin_is_used_but_not_claimed(bundle: Bundle, aws: Aws) -> None:
    aws.make_bucket(BUCKET, files=("company.txt",))
    aws.make_bucket(BASE_BUCKET, files=())
    before = aws.everything("pro")
    ran = bundle.run_function("ensure_bucket no")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "delete_env.sh will leave it alone" in ran.stdout
    assert bundle.run_function("bucket_owner").stdout == "None"
    assert aws.everything("pro") == before, "its settings are somebody else's"


def test_what_somebody_has_set_on_our_bucket_stays(bundle: Bundle, aws: Aws) -> None:
    s3 = aws.client("s3")
    aws.make_bucket(BASE_BUCKET, files=())
    aws.make_bucket(BUCKET, tag="pro", files=())
    rule = {"ID": "theirs", "Status": "Enabled", "Filter": {"Prefix": "output/"}, "Expiration": {"Days": 30}}
    s3.put_bucket_lifecycle_configuration(Bucket=BUCKET, LifecycleConfiguration={"Rules": [rule]})
    queue = {"QueueArn": f"arn:aws:sqs:{REGION}:{ACCOUNT_ID}:any", "Events": ["s3:ObjectCreated:*"]}
    aws.client("sqs").create_queue(QueueName="any")
    s3.put_bucket_notification_configuration(
        Bucket=BUCKET, NotificationConfiguration={"QueueConfigurations": [queue]}
    )
    ran = bundle.run_function("ensure_bucket no; ensure_bucket no")
    assert (ran.returncode, ran.stderr) == (0, "")
    states = [line.split(maxsplit=2)[2] for line in ran.stdout.splitlines() if line.startswith("bucket")]
    assert states == ["updated", "already there"]
    found = aws.everything("pro")
    assert found["bucket events"] == {"QueueConfigurations", "EventBridgeConfiguration"}
    assert [rule["ID"] for rule in found["bucket lifecycle"]] == ["theirs"]
    check_only_tls(found["bucket policy"], [f"arn:aws:s3:::{BUCKET}", f"arn:aws:s3:::{BUCKET}/*"])


def test_an_empty_bucket_is_claimed(bundle: Bundle, aws: Aws) -> None:
    aws.make_bucket(BUCKET, files=())  # an earlier run was stopped before it could tag it
    assert bundle.run_function("claim_bucket None; bucket_owner").stdout == "pro"


def test_a_bucket_of_another_environment_is_refused(bundle: Bundle, aws: Aws) -> None:
    aws.make_bucket(BUCKET, tag="test")
    ran = bundle.run_function("ensure_bucket; copy_files no")
    assert ran.returncode == 1
    assert f"the bucket {BUCKET} belongs to the environment test: write S3_BUCKET with ${{ENV}}" in ran.stderr


# --- Dashboard -----------------------------------------------------------------------------------------------


def test_a_dashboard_is_put_only_where_it_differs(bundle: Bundle, aws: Aws) -> None:
    cloudwatch = aws.client("cloudwatch")

    def run(shell: str = "PARTITION=aws; ensure_dashboard") -> str:
        ran = bundle.run_function(shell)
        assert (ran.returncode, ran.stderr) == (0, "")
        return ran.stdout.strip().rpartition("  ")[2]

    assert run("DRY_RUN=yes PARTITION=aws; ensure_dashboard") == "to be created"
    assert not cloudwatch.list_dashboards()["DashboardEntries"]
    assert run() == "created"
    body = cloudwatch.get_dashboard(DashboardName="simple-comfy-pro-asg")["DashboardBody"]
    cloudwatch.put_dashboard(
        DashboardName="simple-comfy-pro-asg", DashboardBody=json.dumps(json.loads(body), indent=2)
    )
    assert run() == "already there", "AWS may keep it in its own layout"
    bundle.set(SQS_NAME="other-${ENV}")
    assert run() == "updated"


def test_a_dashboard_that_may_not_be_seen_is_not_overwritten(bundle: Bundle, aws: Aws) -> None:
    path = bundle.break_call("cloudwatch get-dashboard", "AccessDenied")
    ran = bundle.run_function("PARTITION=aws; ensure_dashboard", PATH=path)
    assert ran.returncode == 1
    assert "cannot look at the dashboard simple-comfy-pro-asg: An error occurred (AccessDenied)" in ran.stderr
    assert not aws.client("cloudwatch").list_dashboards()["DashboardEntries"]


def test_a_topic_that_may_not_be_seen_is_believed(bundle: Bundle) -> None:
    path = bundle.break_call("sns get-topic-attributes", "AuthorizationError")
    bundle.set(ALARM_TOPIC=f"arn:aws:sns:{REGION}:{ACCOUNT_ID}:of-another-team")
    ran = bundle.run_function("check_fleet_settings; check_topic", PATH=path)
    assert (ran.returncode, ran.stderr) == (0, "")


# --- When AWS refuses ----------------------------------------------------------------------------------------


def test_a_queue_name_that_aws_still_keeps_is_waited_for(bundle: Bundle, aws: Aws) -> None:
    path = bundle.break_call("sqs create-queue", "AWS.SimpleQueueService.QueueDeletedRecently", times=3)
    ran = bundle.run_function(f"create_queue {QUEUE} '{{}}'", PATH=path)
    assert ran.returncode == 0
    assert ran.stdout.count("AWS frees its name within a minute, waiting") == 1
    assert QUEUE in aws.everything("pro")


def test_a_queue_name_is_not_waited_for_without_end(bundle: Bundle) -> None:
    path = bundle.break_call("sqs create-queue", "AWS.SimpleQueueService.QueueDeletedRecently")
    ran = bundle.run_function(f"create_queue {QUEUE} '{{}}'", PATH=path, QUEUE_WAIT_SECONDS="1")
    assert ran.returncode == 1
    assert f"AWS still keeps the name of the deleted queue {QUEUE} after 1 seconds" in ran.stderr


FACTS = (
    "find_images; IMAGE={image} IMAGE_STATE=pending SUBNETS={subnet} "
    "SECURITY_GROUPS=None PROFILE=any KEY_NAME=None PARTITION=aws; "
)


@pytest.mark.parametrize("min_instances", ["0", "2"])
def test_a_group_waits_for_the_image_when_it_must(bundle: Bundle, aws: Aws, min_instances: str) -> None:
    """With instances to start at once it waits before, else only when AWS refuses the image."""
    bundle.set(MIN_INSTANCES=min_instances)
    base = aws.make_base(looks_until_available=3)
    image = aws.client("ec2").create_image(InstanceId=base.instance_id, Name="slow")["ImageId"]
    facts = FACTS.format(image=image, subnet=base.private[0])
    ran = bundle.run_function(facts + "check_fleet_settings; ensure_template; ensure_group; summarise")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "waiting until it can be used" in ran.stdout
    assert (f"it costs {min_instances} instances day and night" in ran.stdout) == (min_instances != "0")
    assert aws.everything("pro")["groups"][0]["DesiredCapacity"] == int(min_instances)


@pytest.mark.parametrize("limit", ["60", "0"])
def test_a_new_instance_profile_is_waited_for(bundle: Bundle, aws: Aws, limit: str) -> None:
    base = aws.make_base(files=False)
    image = aws.client("ec2").create_image(InstanceId=base.instance_id, Name="image")["ImageId"]
    facts = FACTS.format(image=image, subnet=base.private[0]).replace("pending", "available")
    words = "ValidationError) Value (any) for parameter iamInstanceProfile.name is invalid. Invalid IAM Instance Profile name"
    path = bundle.break_call("autoscaling create-auto-scaling-group", words, times=2)
    shell = facts + "check_fleet_settings; ensure_template; ensure_group"
    ran = bundle.run_function(shell, PATH=path, PROFILE_WAIT_SECONDS=limit)
    assert ran.returncode == (limit == "0"), ran.stderr
    assert ("groups" in aws.everything("pro")) == (limit != "0")


def test_a_smaller_maximum_never_lowers_what_is_wanted(bundle: Bundle, aws: Aws) -> None:
    base = aws.make_base(files=False)
    image = aws.client("ec2").create_image(InstanceId=base.instance_id, Name="image")["ImageId"]
    template = "simple-comfy-pro-asg-template"
    data = {"ImageId": image, "InstanceType": "g5.2xlarge"}
    aws.client("ec2").create_launch_template(LaunchTemplateName=template, LaunchTemplateData=data)
    aws.client("autoscaling").create_auto_scaling_group(
        AutoScalingGroupName="simple-comfy-pro-asg",
        LaunchTemplate={"LaunchTemplateName": template, "Version": "$Default"},
        MinSize=0,
        MaxSize=9,
        DesiredCapacity=3,
        VPCZoneIdentifier=base.private[0],
    )
    bundle.set(MAX_INSTANCES="2", MIN_INSTANCES="1")
    ran = bundle.run_function(f"SUBNETS={base.private[0]} VERSION=1; check_fleet_settings; ensure_group")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "3 instances are wanted: maximum 2 cannot be set yet, run this again later" in ran.stdout
    (group,) = aws.everything("pro")["groups"]
    assert (group["MinSize"], group["MaxSize"], group["DesiredCapacity"]) == (1, 3, 3)
    assert group["NewInstancesProtectedFromScaleIn"] is True


def test_a_group_gets_spot_instances_or_a_warm_pool_and_goes_back(bundle: Bundle, aws: Aws) -> None:
    base = aws.make_base(files=False)
    image = aws.client("ec2").create_image(InstanceId=base.instance_id, Name="image")["ImageId"]
    template = "simple-comfy-pro-asg-template"
    data = {"ImageId": image, "InstanceType": "g5.2xlarge"}
    aws.client("ec2").create_launch_template(LaunchTemplateName=template, LaunchTemplateData=data)

    def run(**settings: str) -> dict[str, Any]:
        # Twice: the second run finds all as it is wanted.
        shell = f"SUBNETS={base.private[0]} VERSION=1 IMAGE_STATE=available; check_fleet_settings; ensure_group; ensure_group"
        ran = bundle.run_function(shell, **settings)
        assert (ran.returncode, ran.stderr) == (0, "")
        shown.append([line.split()[0] + " " + " ".join(line.split()[2:]) for line in ran.stdout.splitlines()])
        (group,) = aws.everything("pro")["groups"]
        return dict(group)

    shown: list[list[str]] = []
    policy = run(SPOT_PERCENT="100")["MixedInstancesPolicy"]
    assert [item["InstanceType"] for item in policy["LaunchTemplate"]["Overrides"]] == ["g5.2xlarge"]
    assert policy["InstancesDistribution"]["OnDemandPercentageAboveBaseCapacity"] == 0
    group = run(WARM_POOL="2")
    assert "MixedInstancesPolicy" not in group
    assert group["LaunchTemplate"]["Version"] == "$Default"
    assert group["WarmPoolConfiguration"] == {"MaxGroupPreparedCapacity": 2, "MinSize": 2, "PoolState": "Stopped"}
    group = run(SPOT_PERCENT="40")
    assert "WarmPoolConfiguration" not in group
    assert group["MixedInstancesPolicy"]["InstancesDistribution"]["OnDemandPercentageAboveBaseCapacity"] == 60
    assert shown == [
        ["group created", "group already there"],
        ["group updated", "pool created", "group already there", "pool already there"],
        ["pool removed", "group updated", "group already there"],
    ], "the pool goes before Spot instances come, because AWS allows only one of them"


def test_what_the_bases_comfyui_has_is_stored_when_its_image_is_made(bundle: Bundle, aws: Aws) -> None:
    described = {"KSampler": {"input": {"required": {"steps": ["INT"]}}}, "Ä": {}}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/object_info" else 404)
            self.end_headers()
            self.wfile.write(json.dumps(described).encode())

        def log_message(self, *_: object) -> None:
            pass

    aws.make_bucket(BUCKET, files=())
    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"127.0.0.1:{server.server_port}"
    shell = "COMFYUI_ANSWERS=yes; store_object_info; echo none; IMAGE_MADE=yes; store_object_info"
    ran = bundle.run_function(shell, COMFY_ADDRESS=address)
    server.shutdown()
    server.server_close()
    assert (ran.returncode, ran.stderr) == (0, "")
    assert re.fullmatch(f"none\nnodes +s3://{BUCKET}/{OBJECT_INFO_KEY} +updated\n", ran.stdout)
    stored = aws.client("s3").get_object(Bucket=BUCKET, Key=OBJECT_INFO_KEY)
    text = gzip.decompress(stored["Body"].read())
    assert json.loads(text) == described
    # By the same digest the workers see that they need not store it again.
    assert stored["Metadata"]["sha256"] == hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()

    ran = bundle.run_function("IMAGE_MADE=yes COMFYUI_ANSWERS=yes; store_object_info", COMFY_ADDRESS=address)
    assert (ran.returncode, ran.stdout) == (0, "")
    assert "what ComfyUI has installed is not stored" in ran.stderr


# --- The S3 trigger ------------------------------------------------------------------------------------------


def trigger(bundle: Bundle, wanted: str, dry_run: str = "no", **environment: str) -> str:
    """Run the two steps of create_env.sh that make the trigger, and return the line that they report."""
    ran = bundle.run_function(
        f"PARTITION=aws DRY_RUN={dry_run}; S3_TRIGGER='{wanted}'; look_at_trigger; ensure_trigger", **environment
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    return ran.stdout


def test_the_trigger_is_added_kept_repaired_and_taken_away(bundle: Bundle, aws: Aws) -> None:
    sqs, s3 = aws.client("sqs"), aws.client("s3")
    aws.make_bucket(BUCKET)
    url = sqs.create_queue(QueueName=QUEUE)["QueueUrl"]
    other = {
        "QueueArn": f"arn:aws:sqs:{REGION}:{ACCOUNT_ID}:{QUEUE}",
        "Events": ["s3:ObjectRemoved:*"],
        "Id": "theirs",
    }
    s3.put_bucket_notification_configuration(
        Bucket=BUCKET,
        NotificationConfiguration={"QueueConfigurations": [other]},
    )

    def events() -> dict[str, Any]:
        answer = s3.get_bucket_notification_configuration(Bucket=BUCKET)
        return {entry["Id"]: entry for entry in answer["QueueConfigurations"]}

    def statements() -> list[dict[str, Any]]:
        answer = sqs.get_queue_attributes(QueueUrl=url, AttributeNames=["Policy"])
        policy = answer.get("Attributes", {}).get("Policy")
        return json.loads(policy)["Statement"] if policy else []

    assert trigger(bundle, "") == "", "nobody asked for it"
    assert (list(events()), statements()) == (["theirs"], [])

    path = bundle.break_call("put-bucket-notification-configuration", "Unable to validate the following", times=2)
    said = trigger(bundle, "yes", PATH=path)
    assert said.count("waiting until the queue's new policy counts") == 1
    assert said.endswith("created\n")
    ours = events()["comfy-jobs"]
    assert (ours["QueueArn"], ours["Events"]) == (other["QueueArn"], ["s3:ObjectCreated:*"])
    rules = {rule["Name"].lower(): rule["Value"] for rule in ours["Filter"]["Key"]["FilterRules"]}
    assert rules == {"prefix": "input/jobs/", "suffix": ".json"}
    assert "theirs" in events()
    (statement,) = statements()
    assert statement.pop("Sid").startswith("ComfyTrigger")
    assert statement == {
        "Effect": "Allow",
        "Principal": {"Service": "s3.amazonaws.com"},
        "Action": "sqs:SendMessage",
        "Resource": other["QueueArn"],
        "Condition": {
            "ArnEquals": {"aws:SourceArn": f"arn:aws:s3:::{BUCKET}"},
            "StringEquals": {"aws:SourceAccount": ACCOUNT_ID},
        },
    }

    assert "already there" in trigger(bundle, ""), "it stays without being asked for again"
    theirs = {"Sid": "x", "Effect": "Deny", "Principal": "*", "Action": "sqs:*", "Resource": "*"}
    policy = json.dumps({"Version": "2012-10-17", "Statement": [theirs]})
    sqs.set_queue_attributes(QueueUrl=url, Attributes={"Policy": policy})
    assert "updated" in trigger(bundle, "")
    assert [found["Sid"][:12] for found in statements()] == ["x", "ComfyTrigger"]
    assert "to be removed" in trigger(bundle, "no", dry_run="yes")
    assert "comfy-jobs" in events()
    assert "removed" in trigger(bundle, "no")
    assert (list(events()), statements()) == (["theirs"], [theirs])
    assert "already there" in trigger(bundle, "no")


@pytest.mark.slow
def test_with_the_option_an_environment_is_made_with_its_trigger(bundle: Bundle, aws: Aws) -> None:
    base = aws.make_base()
    ran = bundle.run("create_env.sh", "pro", base.instance_id, "--s3-trigger")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert f"A workflow that is dropped into s3://{BUCKET}/input/jobs/ runs." in ran.stdout
    s3, sqs = aws.client("s3"), aws.client("sqs")
    url = sqs.get_queue_url(QueueName=QUEUE)["QueueUrl"]
    for key in ("input/jobs/a b.json", "input/jobs/note.txt", "input/other.json"):
        s3.put_object(Bucket=BUCKET, Key=key, Body=b"{}")
    messages = sqs.receive_message(QueueUrl=url, MaxNumberOfMessages=10)["Messages"]
    tested, told = (json.loads(message["Body"]) for message in messages)
    assert tested["Event"] == "s3:TestEvent"
    assert [record["s3"]["object"]["key"] for record in told["Records"]] == ["input%2Fjobs%2Fa+b.json"]
