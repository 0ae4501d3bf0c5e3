"""provision/group.sh."""

from __future__ import annotations

from typing import Any

import pytest
from aws_fixtures import Aws, Bundle

ROOMS = ("checks", "image", "template", "trigger", "group", "summary")
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
    ran = bundle.run_function(facts + "check_fleet_settings; ensure_template; ensure_group; summarise", *ROOMS)
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
    ran = bundle.run_function(shell, *ROOMS, PATH=path, PROFILE_WAIT_SECONDS=limit)
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
    ran = bundle.run_function(f"SUBNETS={base.private[0]} VERSION=1; check_fleet_settings; ensure_group", *ROOMS)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "3 instances are wanted: maximum 2 cannot be set yet, run this again later" in ran.stdout
    (group,) = aws.everything("pro")["groups"]
    assert (group["MinSize"], group["MaxSize"], group["DesiredCapacity"]) == (1, 3, 3)
    assert group["NewInstancesProtectedFromScaleIn"] is True


def test_a_group_that_launches_no_more_does_so_again(bundle: Bundle, aws: Aws) -> None:
    """Instances that did not come to work have stopped it. What somebody has suspended stays so."""
    base = aws.make_base(files=False)
    image = aws.client("ec2").create_image(InstanceId=base.instance_id, Name="image")["ImageId"]
    template = "simple-comfy-pro-asg-template"
    data = {"ImageId": image, "InstanceType": "g5.2xlarge"}
    aws.client("ec2").create_launch_template(LaunchTemplateName=template, LaunchTemplateData=data)
    autoscaling, name = aws.client("autoscaling"), "simple-comfy-pro-asg"
    shell = f"SUBNETS={base.private[0]} VERSION=1; check_fleet_settings; ensure_group"
    for failed in (True, False):
        bundle.run_function(shell, *ROOMS)
        autoscaling.suspend_processes(AutoScalingGroupName=name, ScalingProcesses=["Launch"])
        if failed:
            tag = {"ResourceId": name, "ResourceType": "auto-scaling-group", "PropagateAtLaunch": False}
            autoscaling.create_or_update_tags(Tags=[tag | {"Key": "comfy-failed-boots", "Value": "1 3"}])
        ran = bundle.run_function(shell, *ROOMS)
        assert (ran.returncode, ran.stderr) == (0, "")
        (group,) = aws.everything("pro")["groups"]
        suspended = {process["ProcessName"] for process in group["SuspendedProcesses"]}
        assert ("Launch" in suspended) is not failed
        assert "comfy-failed-boots" not in {tag["Key"] for tag in group["Tags"]}


def test_a_group_gets_spot_instances_or_a_warm_pool_and_goes_back(bundle: Bundle, aws: Aws) -> None:
    base = aws.make_base(files=False)
    image = aws.client("ec2").create_image(InstanceId=base.instance_id, Name="image")["ImageId"]
    template = "simple-comfy-pro-asg-template"
    data = {"ImageId": image, "InstanceType": "g5.2xlarge"}
    aws.client("ec2").create_launch_template(LaunchTemplateName=template, LaunchTemplateData=data)

    def run(**settings: str) -> dict[str, Any]:
        # Twice: the second run finds all as it is wanted.
        shell = f"SUBNETS={base.private[0]} VERSION=1 IMAGE_STATE=available; check_fleet_settings; ensure_group; ensure_group"
        ran = bundle.run_function(shell, *ROOMS, **settings)
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
