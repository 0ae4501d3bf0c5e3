"""The local cloud behaves as AWS does, where tests of the scripts and the worker build on it."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import boto3
import pytest
from aws_fixtures import Aws, Bundle
from botocore.exceptions import ClientError
from local_cloud import ACCOUNT_ID, REGION, LocalCloud, alarm_state, metric_math
from local_iam import Access, is_allowed
from places import ROOT, copy_scripts
from workplace import await_that, group_of

NO_CAPACITY = (
    "We currently do not have sufficient g5.2xlarge capacity in the Availability Zone you requested (us-west-2a). "
    "Our system will be working on provisioning additional capacity. Launching EC2 instance failed."
)
PERIOD_S = 0.2


OURS = "IF(visible > 0 AND desired < 1, 1, 0)"


class Fleet:
    """A queue, a group whose instances have nothing to run, and an alarm with a policy that adds an instance."""

    def __init__(self, cloud: LocalCloud, **settings: Any) -> None:
        self.cloud = cloud
        self.prefix = f"x{uuid.uuid4().hex[:8]}"
        self.name, self.queue_name = f"{self.prefix}-pro-asg", f"{self.prefix}-pro-queue"
        self.ec2, self.sqs = cloud.client("ec2"), cloud.client("sqs")
        self.autoscaling, self.cloudwatch = cloud.client("autoscaling"), cloud.client("cloudwatch")
        image = self.ec2.describe_images()["Images"][0]["ImageId"]
        self.ec2.create_launch_template(
            LaunchTemplateName=self.name, LaunchTemplateData={"ImageId": image, "InstanceType": "g5.2xlarge"}
        )
        self.autoscaling.create_auto_scaling_group(
            AutoScalingGroupName=self.name,
            LaunchTemplate={"LaunchTemplateName": self.name, "Version": "$Default"},
            AvailabilityZones=["us-west-2a"],
            **({"MinSize": 0, "MaxSize": 4} | settings),
        )
        self.queue_url = self.sqs.create_queue(QueueName=self.queue_name)["QueueUrl"]

    def desired(self) -> int:
        return int(group_of(self.cloud, self.name)["DesiredCapacity"])

    def states(self) -> list[str]:
        """The lifecycle states of the group's instances."""
        return [instance["LifecycleState"] for instance in group_of(self.cloud, self.name)["Instances"]]

    def activities(self) -> list[dict[str, Any]]:
        answer = self.autoscaling.describe_scaling_activities(AutoScalingGroupName=self.name)
        activities: list[dict[str, Any]] = answer["Activities"]
        return activities

    def want(self, capacity: int) -> None:
        self.autoscaling.set_desired_capacity(AutoScalingGroupName=self.name, DesiredCapacity=capacity)

    def protect(self, number: int) -> str:
        """Protect one instance from scale-in."""
        instance_id: str = group_of(self.cloud, self.name)["Instances"][number]["InstanceId"]
        self.autoscaling.set_instance_protection(
            InstanceIds=[instance_id], AutoScalingGroupName=self.name, ProtectedFromScaleIn=True
        )
        return instance_id

    def put_net(self, net: dict[str, Any], expression: str, warmup_s: int) -> None:
        """The alarm and the policy of create_env.sh for this queue and this group, with these changes."""
        policy = net["policy"] | {"AutoScalingGroupName": self.name, "PolicyName": self.name}
        arn = self.autoscaling.put_scaling_policy(**policy | {"EstimatedInstanceWarmup": warmup_s})["PolicyARN"]
        visible, desired, alone = copy.deepcopy(net["alarm"]["Metrics"])
        visible["MetricStat"]["Metric"]["Dimensions"][0]["Value"] = self.queue_name
        desired["MetricStat"]["Metric"]["Dimensions"][0]["Value"] = self.name
        alone["Expression"] = expression
        alarm = net["alarm"] | {"AlarmName": self.name, "AlarmActions": [arn], "Metrics": [visible, desired, alone]}
        self.cloudwatch.put_metric_alarm(**alarm)

    def put_hook(self) -> None:
        self.autoscaling.put_lifecycle_hook(
            LifecycleHookName="comfy-terminating",
            AutoScalingGroupName=self.name,
            LifecycleTransition="autoscaling:EC2_INSTANCE_TERMINATING",
            HeartbeatTimeout=300,
        )


@pytest.fixture
def quick_cloud(cloud: LocalCloud, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalCloud]:
    """The local cloud with a short minute, and no failure left behind."""
    monkeypatch.setattr(cloud, "metrics_period_s", PERIOD_S)
    yield cloud
    cloud.launch_failure = None


# --- Capacity ------------------------------------------------------------------------------------------------


def test_capacity_that_does_not_come_is_told_and_comes_when_it_can(quick_cloud: LocalCloud) -> None:
    quick_cloud.launch_failure = NO_CAPACITY
    fleet = Fleet(quick_cloud)
    assert fleet.activities() == []
    fleet.want(2)
    assert (fleet.desired(), fleet.states()) == (2, [])
    failed = fleet.activities()[-1]
    assert failed["StatusCode"] == "Failed"
    assert failed["StatusMessage"] == NO_CAPACITY
    assert failed["Description"] == f"Launching a new EC2 instance.  Status Reason: {NO_CAPACITY}"
    assert (
        "a user request explicitly set group desired capacity changing the desired capacity from 0 to 2."
        in (failed["Cause"])
    )
    assert "increasing the capacity from 0 to 2." in failed["Cause"]
    assert failed["AutoScalingGroupName"] == fleet.name
    assert failed["StartTime"] <= failed["EndTime"]
    assert failed["Progress"] == 100
    await_that("it is tried again", lambda: len(fleet.activities()) >= 3)

    quick_cloud.launch_failure = None
    await_that("the instances are there", lambda: fleet.states() == ["InService"] * 2)
    newest = fleet.activities()[:3]
    assert [activity["StatusCode"] for activity in newest] == ["Successful", "Successful", "Failed"]
    assert newest[0]["Description"].startswith("Launching a new EC2 instance: i-")
    assert len({activity["ActivityId"] for activity in newest}) == 3
    (latest,) = fleet.autoscaling.describe_scaling_activities(AutoScalingGroupName=fleet.name, MaxRecords=1)[
        "Activities"
    ]
    assert latest == newest[0]


def test_an_instance_that_ec2_ends_is_replaced_when_there_is_capacity(quick_cloud: LocalCloud) -> None:
    fleet = Fleet(quick_cloud, DesiredCapacity=1)
    (before,) = group_of(quick_cloud, fleet.name)["Instances"]
    quick_cloud.launch_failure = NO_CAPACITY
    fleet.ec2.terminate_instances(InstanceIds=[before["InstanceId"]])
    assert (fleet.desired(), fleet.states()) == (1, [])
    quick_cloud.launch_failure = None
    await_that("the replacement is there", lambda: fleet.states() == ["InService"])
    assert group_of(quick_cloud, fleet.name)["Instances"][0]["InstanceId"] != before["InstanceId"]


def test_a_template_may_set_a_volume_of_the_image_without_its_size(quick_cloud: LocalCloud) -> None:
    fleet = Fleet(quick_cloud)
    volume = {"DeviceName": "/dev/sda1", "Ebs": {"VolumeInitializationRate": 200, "DeleteOnTermination": True}}
    fleet.ec2.create_launch_template_version(
        LaunchTemplateName=fleet.name, SourceVersion="1", LaunchTemplateData={"BlockDeviceMappings": [volume]}
    )
    fleet.ec2.modify_launch_template(LaunchTemplateName=fleet.name, DefaultVersion="2")
    fleet.want(1)
    assert fleet.states() == ["InService"]
    (instance,) = group_of(quick_cloud, fleet.name)["Instances"]
    found = fleet.ec2.describe_instances(InstanceIds=[instance["InstanceId"]])["Reservations"][0]["Instances"][0]
    assert [device["DeviceName"] for device in found["BlockDeviceMappings"]] == ["/dev/sda1"]


@pytest.mark.parametrize("way", ["set desired", "update desired", "update maximum"])
def test_an_operator_that_lowers_takes_no_protected_instance(quick_cloud: LocalCloud, way: str) -> None:
    fleet = Fleet(quick_cloud, DesiredCapacity=2)
    fleet.put_hook()
    protected = fleet.protect(0)
    if way == "set desired":
        fleet.want(0)
    else:
        changes = {"DesiredCapacity": 0} if way == "update desired" else {"MaxSize": 0}
        fleet.autoscaling.update_auto_scaling_group(AutoScalingGroupName=fleet.name, **changes)
    assert fleet.desired() == 0
    instances = {item["InstanceId"]: item for item in group_of(quick_cloud, fleet.name)["Instances"]}
    assert instances.pop(protected)["LifecycleState"] == "InService"
    (taken,) = instances.values()
    assert taken["LifecycleState"] == "Terminating:Wait", "through the hook, not gone at once"
    refused, *others = fleet.activities()
    ending = next(
        activity for activity in others if activity["StatusCode"] != "Cancelled"
    )  # it is refused anew each minute
    assert refused["StatusCode"] == "Cancelled"
    assert refused["StatusMessage"].endswith("all remaining instances are protected from scale-in.")
    assert (ending["StatusCode"], "EndTime" in ending) == ("MidLifecycleAction", False)
    assert ending["Description"] == f"Terminating EC2 instance: {taken['InstanceId']}"

    fleet.autoscaling.complete_lifecycle_action(
        LifecycleHookName="comfy-terminating",
        AutoScalingGroupName=fleet.name,
        LifecycleActionResult="CONTINUE",
        InstanceId=taken["InstanceId"],
    )
    await_that("it is gone", lambda: fleet.states() == ["InService"])
    ended = [item for item in fleet.activities() if item["ActivityId"] == ending["ActivityId"]]
    assert [item["StatusCode"] for item in ended] == ["Successful"]


def test_an_update_keeps_what_it_does_not_name_and_its_limits(quick_cloud: LocalCloud) -> None:
    fleet = Fleet(quick_cloud)
    update = fleet.autoscaling.update_auto_scaling_group
    policy = {
        "LaunchTemplate": {
            "LaunchTemplateSpecification": {"LaunchTemplateName": fleet.name, "Version": "$Default"},
            "Overrides": [{"InstanceType": "g5.2xlarge"}],
        },
        "InstancesDistribution": {"OnDemandPercentageAboveBaseCapacity": 50},
    }
    update(AutoScalingGroupName=fleet.name, MixedInstancesPolicy=policy)
    update(AutoScalingGroupName=fleet.name, MinSize=1)
    assert (fleet.desired(), fleet.states()) == (1, ["InService"])
    assert "MixedInstancesPolicy" in group_of(quick_cloud, fleet.name)
    update(AutoScalingGroupName=fleet.name, LaunchTemplate={"LaunchTemplateName": fleet.name})
    assert "MixedInstancesPolicy" not in group_of(quick_cloud, fleet.name)
    with pytest.raises(fleet.autoscaling.exceptions.ClientError, match="must be between the specified min size"):
        update(AutoScalingGroupName=fleet.name, DesiredCapacity=9)
    with pytest.raises(fleet.autoscaling.exceptions.ClientError, match="Max bound, 0, must be greater"):
        update(AutoScalingGroupName=fleet.name, MaxSize=0)


# --- Alarms --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expression", "values", "result"),
    [
        ("IF(a > 0 AND b < 1, 1, 0)", {"a": 2.0, "b": 0.0}, 1.0),
        ("IF(a > 0 AND b < 1, 1, 0)", {"a": 0.0, "b": 0.0}, 0.0),
        ("IF(a > 0 AND b < 1, 1, 0)", {"a": 2.0, "b": 1.0}, 0.0),
        ("IF(a > 0 AND b < 1, 1, 0)", {"a": 2.0, "b": None}, None),
        ("IF(a > 0 AND b < 1, 1, 0)", {"a": None, "b": 0.0}, None),
        ("IF(a + b < 1, 1, 0)", {"a": 0.0, "b": 0.0}, 1.0),
        ("IF(a + b < 1, 1, 0)", {"a": 0.0, "b": 1.0}, 0.0),
        ("IF(a + b < 1, 1, 0)", {"a": 0.0, "b": None}, None),
        ("IF(FILL(a, 0) > 0 OR FILL(b, 1) < 1, 1, 0)", {"a": None, "b": None}, 0.0),
    ],
)
def test_metric_math(expression: str, values: dict[str, float | None], result: float | None) -> None:
    assert metric_math(expression, values) == result


@pytest.mark.parametrize("expression", ["a +", "a * 1", "RATE(a)", "c > 0", "__import__('os')", "a >= 1", "FILL(a)"])
def test_metric_math_refuses_what_it_does_not_know(expression: str) -> None:
    with pytest.raises(ValueError, match="is not understood"):
        metric_math(expression, {"a": 1.0})


@pytest.fixture(scope="module")
def net(cloud: LocalCloud, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What create_env.sh makes of alarms and policy."""
    fleet = Fleet(cloud)
    bundle = Bundle(tmp_path_factory.mktemp("net") / "bundle", Aws(cloud.endpoint, cloud.aws_cli_socket))
    bundle.set(PREFIX=fleet.prefix)
    ran = bundle.run_function("ensure_alarms; ensure_alarms")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert [line.rpartition("  ")[2] for line in ran.stdout.splitlines()] == ["created"] * 5 + ["already there"] * 5
    settings = ("ComparisonOperator", "Threshold", "EvaluationPeriods", "TreatMissingData", "Metrics")
    alarms = {
        alarm["AlarmName"].removeprefix(f"{fleet.name}-"): {name: alarm[name] for name in settings}
        for alarm in fleet.cloudwatch.describe_alarms(AlarmNamePrefix=f"{fleet.name}-")["MetricAlarms"]
    }
    fleet.cloudwatch.delete_alarms(AlarmNames=[f"{fleet.name}-{name}" for name in alarms])
    assert alarms["first-instance"]["Metrics"][2]["Expression"] == OURS
    (policy,) = fleet.autoscaling.describe_policies(AutoScalingGroupName=fleet.name)["ScalingPolicies"]
    return {
        "alarm": alarms["first-instance"],
        "alarms": alarms,
        "policy": {name: policy[name] for name in ("PolicyType", "AdjustmentType", "StepAdjustments")},
    }


@pytest.fixture
def make_fleet(quick_cloud: LocalCloud) -> Iterator[Callable[..., Fleet]]:
    """Makes fleets whose alarms end with the test."""
    fleets: list[Fleet] = []

    def make(**settings: Any) -> Fleet:
        fleets.append(Fleet(quick_cloud, **settings))
        return fleets[-1]

    yield make
    for fleet in fleets:
        fleet.cloudwatch.delete_alarms(AlarmNames=[fleet.name])


def minutes_pass(cloud: LocalCloud, count: int = 3) -> None:
    until = cloud.minutes + count
    await_that("minutes pass", lambda: cloud.minutes >= until)


@pytest.mark.parametrize(
    ("before", "message", "metrics", "expression", "warmup_s", "after"),
    [
        pytest.param(0, True, True, OURS, 300, 1, id="adds exactly one"),
        pytest.param(0, False, True, OURS, 300, 0, id="not without a message"),
        pytest.param(1, True, True, OURS, 300, 1, id="not where one is wanted"),
        pytest.param(0, True, False, OURS, 300, 0, id="not when it does not know the group"),
        # Each defence alone holds it, and without both it runs away.
        pytest.param(0, True, True, OURS, 0, 1, id="no warm-up"),
        pytest.param(0, True, True, "IF(visible > 0, 1, 0)", 300, 1, id="blind"),
        pytest.param(0, True, True, "IF(visible > 0, 1, 0)", 0, 4, id="blind and no warm-up"),
        pytest.param(
            1,
            True,
            False,
            "IF(FILL(visible, 0) > 0 AND FILL(desired, 0) < 1, 1, 0)",
            0,
            4,
            id="missing taken for zero",
        ),
    ],
)
def test_the_alarm_adds_the_first_instance(
    make_fleet: Callable[..., Fleet],
    net: dict[str, Any],
    before: int,
    message: bool,
    metrics: bool,
    expression: str,
    warmup_s: int,
    after: int,
) -> None:
    fleet = make_fleet(DesiredCapacity=before)
    if metrics:
        fleet.autoscaling.enable_metrics_collection(
            AutoScalingGroupName=fleet.name, Granularity="1Minute", Metrics=["GroupDesiredCapacity"]
        )
    if message:
        fleet.sqs.send_message(QueueUrl=fleet.queue_url, MessageBody="{}")
    fleet.put_net(net, expression, warmup_s)
    await_that("the group has what it should have", lambda: fleet.desired() == after)
    minutes_pass(fleet.cloud)
    assert (fleet.desired(), fleet.states()) == (after, ["InService"] * after)
    if after > before:
        assert f"a monitor alarm {fleet.name} in state ALARM triggered policy" in fleet.activities()[0]["Cause"]
    (alarm,) = fleet.cloudwatch.describe_alarms(AlarmNames=[fleet.name])["MetricAlarms"]
    assert alarm["StateValue"] == ("OK" if after < 4 and expression != "IF(visible > 0, 1, 0)" else "ALARM")


def test_the_alarm_waits_for_capacity_with_everybody_else(
    make_fleet: Callable[..., Fleet], net: dict[str, Any]
) -> None:
    fleet = make_fleet()
    fleet.cloud.launch_failure = NO_CAPACITY
    fleet.sqs.send_message(QueueUrl=fleet.queue_url, MessageBody="{}")
    fleet.put_net(net, "IF(visible > 0, 1, 0)", 0)
    minutes_pass(fleet.cloud)
    assert (fleet.desired(), fleet.states()) == (1, []), "what is wanted already is not wanted again"


def test_an_alarm_that_is_not_understood_is_said(
    make_fleet: Callable[..., Fleet], net: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    fleet = make_fleet()
    fleet.put_net(net, "RATE(visible)", 300)
    await_that("it is said", lambda: "the expression 'RATE(visible)' is not understood" in caplog.text)
    assert f"the alarm {fleet.name} is not evaluated" in caplog.text


# What each metric was, minute by minute, as often as the number in front says; None: nothing was published.
Past = tuple[int, dict[str, float | None]]
QUIET: dict[str, float | None] = {"visible": 0, "running": 0}
SILENT: dict[str, float | None] = {"visible": None, "running": None}


@pytest.mark.parametrize(
    ("alarm", "past", "state"),
    [
        ("dead-letters", [(1, {"visible": 1})], "ALARM"),
        ("dead-letters", [(1, {"visible": 1}), (1, {"visible": 0})], "OK"),
        ("dead-letters", [(1, {"visible": 1}), (1, {"visible": None})], "OK"),
        ("oldest-message", [(1, {"visible": 1, "age": 1801})], "ALARM"),
        ("oldest-message", [(1, {"visible": 1, "age": 1800})], "OK"),
        ("oldest-message", [(1, {"visible": 0, "age": 9999})], "OK"),  # a long job, and nobody waits for it
        ("oldest-message", [(1, {"visible": None, "age": None})], "OK"),
        ("not-in-service", [(15, {"desired": 2, "serving": 1})], "ALARM"),
        ("not-in-service", [(14, {"desired": 2, "serving": 1})], "OK"),
        ("not-in-service", [(14, {"desired": 2, "serving": 1}), (1, {"desired": 2, "serving": 2})], "OK"),
        ("not-in-service", [(15, {"desired": 1, "serving": 2})], "OK"),  # one is on its way out
        ("not-in-service", [(15, {"desired": None, "serving": None})], "OK"),
        ("idle-hour", [(60, {"serving": 1, **QUIET})], "ALARM"),
        ("idle-hour", [(60, {"serving": 1, **SILENT})], "ALARM"),  # after six hours SQS says nothing
        ("idle-hour", [(59, {"serving": 1, **QUIET})], "before"),
        ("idle-hour", [(60, {"serving": 1, **QUIET}), (1, {"serving": None, **QUIET})], "before"),
        ("idle-hour", [(30, {"serving": 1, **QUIET}), (30, {"serving": 1, **QUIET, "running": 1})], "OK"),
        ("idle-hour", [(60, {"serving": 1, **QUIET}), (1, {"serving": 1, **QUIET, "visible": 1})], "OK"),
        ("idle-hour", [(60, {"serving": 0, **QUIET})], "OK"),
    ],
)
def test_an_alarm_rings_when_it_should(net: dict[str, Any], alarm: str, past: list[Past], state: str) -> None:
    settings = net["alarms"][alarm]
    (expression,) = [metric["Expression"] for metric in settings["Metrics"] if "Expression" in metric]
    period_s = max(metric["MetricStat"]["Period"] for metric in settings["Metrics"] if "MetricStat" in metric)
    points = [metric_math(expression, values) for minutes, values in past for _ in range(minutes)]
    watched = settings["EvaluationPeriods"] * period_s // 60
    points = [*[None] * (watched - len(points)), *points][-watched:]
    seen = SimpleNamespace(
        comparison_operator=settings["ComparisonOperator"],
        threshold=settings["Threshold"],
        treat_missing_data=settings["TreatMissingData"],
        state_value="before",
    )
    assert alarm_state(seen, points) == state


def test_instances_that_are_always_there_may_be_idle(cloud: LocalCloud, tmp_path: Path) -> None:
    bundle = Bundle(tmp_path / "bundle", Aws(cloud.endpoint, cloud.aws_cli_socket))
    bundle.set(PREFIX=f"x{uuid.uuid4().hex[:8]}", MIN_INSTANCES="2")
    ran = bundle.run_function('ensure_alarm() { echo "$1 $6"; }; POLICY_ARN=x; ensure_policy() { :; }; ensure_alarms')
    assert "idle-hour IF(serving > 2 AND " in ran.stdout


def test_the_watching_alarms_ring_on_a_running_fleet(
    make_fleet: Callable[..., Fleet], net: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    fleet = make_fleet()
    dead = fleet.sqs.create_queue(QueueName=f"{fleet.queue_name}-dlq")["QueueUrl"]
    metrics = ["GroupDesiredCapacity", "GroupInServiceInstances"]
    fleet.autoscaling.enable_metrics_collection(
        AutoScalingGroupName=fleet.name, Granularity="1Minute", Metrics=metrics
    )
    for name, alarm in net["alarms"].items():
        renamed = json.loads(re.sub(r'"x[0-9a-f]{8}-pro-', f'"{fleet.prefix}-pro-', json.dumps(alarm)))
        fleet.cloudwatch.put_metric_alarm(**renamed | {"AlarmName": f"{fleet.name}-{name}"})

    def states() -> dict[str, str]:
        found = fleet.cloudwatch.describe_alarms(AlarmNamePrefix=f"{fleet.name}-")["MetricAlarms"]
        return {alarm["AlarmName"].removeprefix(f"{fleet.name}-"): alarm["StateValue"] for alarm in found}

    quiet = dict.fromkeys(net["alarms"], "OK")
    await_that("all is quiet", lambda: states() == quiet)
    fleet.cloud.launch_failure = NO_CAPACITY
    fleet.want(1)
    fleet.sqs.send_message(QueueUrl=dead, MessageBody="{}")
    ringing = quiet | {"dead-letters": "ALARM", "not-in-service": "ALARM"}
    await_that("they ring", lambda: states() == ringing)
    fleet.cloud.launch_failure = None
    fleet.sqs.purge_queue(QueueUrl=dead)
    # But for idle-hour, if this machine is so slow that an hour of short minutes has passed.
    await_that("they are quiet again", lambda: states() | {"idle-hour": "OK"} == quiet)
    assert "is not evaluated" not in caplog.text
    fleet.cloudwatch.delete_alarms(AlarmNames=[f"{fleet.name}-{name}" for name in net["alarms"]])


# --- Permissions ---------------------------------------------------------------------------------------------

POLICY = {
    "Version": "2012-10-17",
    "Statement": [
        {"Effect": "Allow", "Action": ["sqs:Get*", "sqs:SendMessage"], "Resource": "arn:aws:sqs:*:*:mine-*"},
        {
            "Effect": "Allow",
            "Action": "ec2:TerminateInstances",
            "Resource": "*",
            "Condition": {"StringEquals": {"aws:ResourceTag/comfy-env": ["pro", "test"]}},
        },
        {"Effect": "Allow", "Action": "ec2:RunInstances", "Resource": "*",
         "Condition": {"ArnLike": {"ec2:LaunchTemplate": "arn:aws:ec2:*:*:launch-template/*"}}},
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("access", "allowed"),
    [
        (Access("sqs:SendMessage", "arn:aws:sqs:us-west-2:1:mine-queue"), True),
        (Access("sqs:GetQueueUrl", "arn:aws:sqs:us-west-2:1:mine-queue"), True),
        (Access("sqs:SendMessage", "arn:aws:sqs:us-west-2:1:yours"), False),
        (Access("sqs:DeleteMessage", "arn:aws:sqs:us-west-2:1:mine-queue"), False),
        (Access("ec2:TerminateInstances", "i", {"aws:ResourceTag/comfy-env": "test"}), True),
        (Access("ec2:TerminateInstances", "i", {"aws:ResourceTag/comfy-env": "base"}), False),
        (Access("ec2:TerminateInstances", "i"), False),
        (Access("ec2:RunInstances", "i", {"ec2:LaunchTemplate": "arn:aws:ec2:r:1:launch-template/lt-1"}), True),
        (Access("ec2:RunInstances", "i"), False),
    ],
)
def test_a_policy_allows_what_it_says_and_nothing_else(access: Access, allowed: bool) -> None:
    assert is_allowed([POLICY], access) == allowed
    assert not is_allowed([], access)


@pytest.mark.parametrize("strange", [{"Effect": "Deny"}, {"NotAction": "x"}, {"Condition": {"Bool": {"a": "true"}}}])
def test_a_policy_that_is_not_understood_is_not_judged(strange: dict[str, object]) -> None:
    statement = {"Effect": "Allow", "Action": "*", "Resource": "*"} | strange
    with pytest.raises(ValueError, match="not understood"):
        is_allowed([{"Statement": statement}], Access("sqs:SendMessage", "q"))


def printed_policy(who: str, folder: Path) -> str:
    """What create_env.sh --print-policy says, for environment pro of the settings in env.example."""
    copy_scripts(folder)
    shutil.copy2(ROOT / "env.example", folder / "env")
    command = [str(folder / "create_env.sh"), "--print-policy", who, "pro"]
    return str(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


PRO = f"simple-comfy-{ACCOUNT_ID}-{REGION}-pro"
CALLS_OF_A_WORKER: list[tuple[str, str, dict[str, Any]]] = [
    ("sqs", "receive_message", {"QueueUrl": "simple-comfy-pro-queue"}),
    ("s3", "get_object", {"Bucket": PRO, "Key": "models/m"}),
    ("s3", "put_object", {"Bucket": PRO, "Key": "output/job/result.json"}),
    ("s3", "list_objects_v2", {"Bucket": PRO}),
    ("cloudwatch", "put_metric_data", {"Namespace": "simple-comfy/pro", "MetricData": []}),
    ("autoscaling", "describe_auto_scaling_groups", {}),
]
CALLS_OF_NO_WORKER: list[tuple[str, str, dict[str, Any]]] = [
    ("sqs", "receive_message", {"QueueUrl": "simple-comfy-test-queue"}),
    ("sqs", "send_message", {"QueueUrl": "simple-comfy-pro-queue", "MessageBody": "x"}),
    ("s3", "get_object", {"Bucket": PRO.replace("-pro", "-test"), "Key": "models/m"}),
    ("s3", "put_object", {"Bucket": PRO, "Key": "models/m"}),
    ("s3", "delete_object", {"Bucket": PRO, "Key": "output/job/result.json"}),
    ("s3", "delete_objects", {"Bucket": PRO, "Delete": {"Objects": [{"Key": "output/a"}]}}),
    ("s3", "list_buckets", {}),
    ("cloudwatch", "put_metric_data", {"Namespace": "simple-comfy/test", "MetricData": []}),
    ("autoscaling", "set_desired_capacity", {"AutoScalingGroupName": "simple-comfy-test-asg", "DesiredCapacity": 1}),
    ("autoscaling", "delete_auto_scaling_group", {"AutoScalingGroupName": "simple-comfy-pro-asg"}),
    ("ec2", "terminate_instances", {"InstanceIds": ["i-0123456789abcdef0"]}),
    ("iam", "create_role", {"RoleName": "any", "AssumeRolePolicyDocument": "{}"}),
]


def test_an_instance_may_do_its_work_in_its_environment_only(cloud: LocalCloud, tmp_path: Path) -> None:
    cloud.allow_only("a-worker", printed_policy("worker", tmp_path))

    def is_refused(service: str, operation: str, arguments: dict[str, Any]) -> bool:
        try:
            getattr(as_caller(cloud, "a-worker", service), operation)(**arguments)
        except ClientError as error:
            return error.response["Error"]["Code"] in ("AccessDenied", "UnauthorizedOperation")
        return False

    before = len(cloud.denied)
    assert [call for call in CALLS_OF_A_WORKER if is_refused(*call)] == []
    assert len(cloud.denied) == before
    assert [call for call in CALLS_OF_NO_WORKER if not is_refused(*call)] == []
    assert len(cloud.denied) == before + len(CALLS_OF_NO_WORKER)
    del cloud.denied[before:]


def as_caller(cloud: LocalCloud, access_key: str, service: str) -> Any:
    return boto3.client(
        service,
        endpoint_url=cloud.endpoint,
        region_name=REGION,
        aws_access_key_id=access_key,
        aws_secret_access_key="local",
    )


def test_an_instance_has_what_the_role_of_its_launch_template_has(quick_cloud: LocalCloud) -> None:
    fleet, iam = Fleet(quick_cloud), quick_cloud.client("iam")
    ec2 = quick_cloud.client("ec2")
    profile = f"profile-of-{fleet.name}"
    iam.create_role(RoleName=profile, AssumeRolePolicyDocument="{}")
    iam.create_instance_profile(InstanceProfileName=profile)
    iam.add_role_to_instance_profile(InstanceProfileName=profile, RoleName=profile)
    data = ec2.describe_launch_template_versions(LaunchTemplateName=fleet.name)["LaunchTemplateVersions"][0]
    ec2.create_launch_template_version(
        LaunchTemplateName=fleet.name,
        LaunchTemplateData=data["LaunchTemplateData"] | {"IamInstanceProfile": {"Name": profile}},
    )
    ec2.modify_launch_template(LaunchTemplateName=fleet.name, DefaultVersion="2")
    update = fleet.autoscaling.update_auto_scaling_group
    update(AutoScalingGroupName=fleet.name, MinSize=1)
    (instance,) = group_of(quick_cloud, fleet.name)["Instances"]
    machine = await_that("it has booted", lambda: quick_cloud.machines.get(instance["InstanceId"]))
    credentials = json.loads(machine.metadata["iam/security-credentials/comfy"])

    sqs, before = as_caller(quick_cloud, credentials["AccessKeyId"], "sqs"), len(quick_cloud.denied)
    with pytest.raises(ClientError, match="is not authorized to perform: sqs:ListQueues"):
        sqs.list_queues()
    assert len(quick_cloud.denied) == before + 1
    policy = {"Version": "2012-10-17", "Statement": {"Effect": "Allow", "Action": "sqs:List*", "Resource": "*"}}
    iam.put_role_policy(RoleName=profile, PolicyName="worker", PolicyDocument=json.dumps(policy))
    sqs.list_queues()
