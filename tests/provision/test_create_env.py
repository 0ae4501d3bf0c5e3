"""create_env.sh, run as it is with the real AWS CLI against moto."""

from __future__ import annotations

import base64
import json
import subprocess
from dataclasses import dataclass, field
from typing import Any

import pytest
from aws_fixtures import Aws, Base, Bundle, shape, tags_of
from environment_pro import (
    ALARM,
    BUCKET,
    QUEUE,
    WORKER,
    check_only_tls,
)
from local_cloud import ACCOUNT_ID, REGION
from workplace import Sample

from comfy_utils import ENDED


@dataclass
class Story:
    """What the runs printed, and what there was after each."""

    base: Base
    knows_the_rate: bool = True  # the AWS CLI knows VolumeInitializationRate, which came in 2025
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
    bundle.set(INSTANCE_TYPES='"g6.xlarge g5.2xlarge"', SPOT_PERCENT="70")
    skeleton = bundle.run_function("aws ec2 create-launch-template --generate-cli-skeleton input").stdout
    story.knows_the_rate = "VolumeInitializationRate" in skeleton
    if story.knows_the_rate:
        bundle.set(VOLUME_INIT_RATE="200")
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
    uploads, listed = sorted(found["bucket lifecycle"], key=lambda rule: "Expiration" in rule)
    assert (uploads["Status"], uploads["AbortIncompleteMultipartUpload"]) == ("Enabled", {"DaysAfterInitiation": 7})
    assert "Expiration" not in uploads
    assert (listed["Status"], listed["Filter"], listed["Expiration"]) == ("Enabled", {"Prefix": ENDED}, {"Days": 14})
    assert "bucket events" not in found, "nobody has asked for EventBridge"


def check_role(story: Story) -> None:
    (role,), (profile,) = story.found[COMPLETED]["roles"], story.found[COMPLETED]["profiles"]
    assert role["RoleName"] == profile["InstanceProfileName"] == WORKER
    assert tags_of(role["Tags"]) == {"comfy-env": "pro", "comfy-prefix": "simple-comfy", "Name": WORKER}
    assert [inside["RoleName"] for inside in profile["Roles"]] == [WORKER]
    (trust,) = role["AssumeRolePolicyDocument"]["Statement"]
    assert trust["Principal"] == {"Service": "ec2.amazonaws.com"}
    (policy,) = role["Policies"]
    queue = f"arn:aws:sqs:{REGION}:{ACCOUNT_ID}:{QUEUE}"
    assert [queue, f"{queue}-dlq"] in [statement["Resource"] for statement in policy["Statement"]]


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
    volume = {"DeviceName": "/dev/sda1", "Ebs": {"DeleteOnTermination": True, "VolumeInitializationRate": 200}}
    assert default["LaunchTemplateData"].get("BlockDeviceMappings", []) == [volume] * story.knows_the_rate
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


PARTS = 3


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_a_run_that_is_killed_after_any_aws_call_is_completed_by_the_next(
    bundle: Bundle, aws: Aws, part: int, sample: Sample, request: pytest.FixtureRequest
) -> None:
    """Where a call has changed nothing, the next run finds what it found one call earlier: that is not run again.

    All points take so long that they are tried in parts, beside each other; a sample of them is one part.
    """
    parts = PARTS if request.config.option.full else 1
    if part >= parts:
        pytest.skip("a sample is one part")
    base = aws.make_base(looks_until_available=2)
    calls = bundle.run_killed("create_env.sh", "pro", base.instance_id, after=1000)
    assert calls
    whole, before = shape(aws.everything("pro")), ""
    for call in sample(range(1 + calls * part // parts, 1 + calls * (part + 1) // parts), 1):
        aws.reset()
        base = aws.make_base(looks_until_available=2)
        assert bundle.run_killed("create_env.sh", "pro", base.instance_id, after=call) is None
        if (found := shape(aws.everything("pro"))) != before:
            before = found
            ran = bundle.run("create_env.sh", "pro", base.instance_id)
            assert (ran.returncode, ran.stderr) == (0, ""), f"after call {call}"
            assert shape(aws.everything("pro")) == whole, f"after call {call}"
