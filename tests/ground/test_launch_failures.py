"""Why instances that are wanted do not come."""

from __future__ import annotations

from typing import Any

import pytest
from launches import FULL, FULL_SAYS, QUOTA, QUOTA_SAYS, Group, activity

from ground.launches import (
    LAUNCH_FAILURE_AGE_S,
    capacity_problem,
    explain_launch_failure,
)

SPOT_SAYS = (
    "AWS has no spot instance of this kind free just now: it is tried again by itself; "
    "more types in INSTANCE_TYPES find room sooner"
)
NOT_READY_SAYS = (
    "the image is not ready yet: instances start by themselves once it is, some minutes after create_env.sh"
)


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        (FULL, FULL_SAYS),
        (f"Could not launch On-Demand Instances. InsufficientInstanceCapacity - {FULL}", FULL_SAYS),
        (QUOTA, QUOTA_SAYS),
        (f"Could not launch On-Demand Instances. VcpuLimitExceeded - {QUOTA}", QUOTA_SAYS),
        (QUOTA.replace("of 8", "of 0"), QUOTA_SAYS.replace("of 8", "of 0")),
        ("There is no Spot capacity available that matches your request. Launching EC2 instance failed.", SPOT_SAYS),
        (
            "Could not launch Spot Instances. UnfulfillableCapacity - Unable to fulfill capacity due to your request "
            "configuration. Please adjust your request and try again. Launching EC2 instance failed.",
            SPOT_SAYS,
        ),
        (
            "Could not launch On-Demand Instances. UnfulfillableCapacity - Unable to fulfill capacity due to your "
            "request configuration. Please adjust your request and try again. Launching EC2 instance failed.",
            SPOT_SAYS.replace("spot instance", "instance"),
        ),
        (
            "Could not launch Spot Instances. MaxSpotInstanceCountExceeded - Max spot instance count exceeded. "
            "Launching EC2 instance failed.",
            "the account's quota for spot instances is used up: raise 'All G and VT Spot Instance Requests' "
            "(for a type g…; other types have quotas of their own) in Service Quotas",
        ),
        (
            "Your requested instance type (g5.2xlarge) is not supported in your requested Availability Zone "
            "(us-west-2d). Please retry your request by not specifying an Availability Zone or choosing us-west-2a. "
            "Launching EC2 instance failed.",
            "there is no g5.2xlarge in us-west-2d: other zones are tried by themselves; "
            "more types in INSTANCE_TYPES find room sooner",
        ),
        ("AMI ami-0abc12 is pending, and cannot be run. Launching EC2 instance failed.", NOT_READY_SAYS),
        (
            "Could not launch On-Demand Instances. InvalidAMIID.Unavailable - The image ID 'ami-0abc12' is not "
            "available. Launching EC2 instance failed.",
            NOT_READY_SAYS,
        ),
        (
            "The image id '[ami-0abc12]' does not exist. Launching EC2 instance failed.",
            "the fleet's image ami-0abc12 does not exist any more: run create_env.sh again",
        ),
        (
            "The AMI ID ami-0abc12 does not exist. Launching EC2 instance failed.",
            "the fleet's image ami-0abc12 does not exist any more: run create_env.sh again",
        ),
        (
            "Instance became unhealthy while waiting for instance to be in InService state. Termination Reason: "
            "Client.InternalError: Client error on launch",
            "an instance ended as it started, most likely because its disk's key is refused: "
            "let the role AWSServiceRoleForAutoScaling use the KMS key",
        ),
        (
            "Value (comfy) for parameter iamInstanceProfile.name is invalid. Invalid IAM Instance Profile name. "
            "Launching EC2 instance failed.",
            "AWS cannot launch what the launch template says (Value (comfy) for parameter iamInstanceProfile.name is "
            "invalid): run create_env.sh again",
        ),
        (
            "The security group 'sg-0abc' does not exist. Launching EC2 instance failed.",
            "AWS cannot launch what the launch template says (The security group 'sg-0abc' does not exist): "
            "run create_env.sh again",
        ),
        (
            "Could not launch On-Demand Instances. InvalidParameterCombination - The specified instance type is not "
            "eligible for Free Tier. For a list, run 'describe-instance-types'. Launching EC2 instance failed.",
            "AWS launches no instance: InvalidParameterCombination - The specified instance type is not eligible for "
            "Free Tier",
        ),
        (
            "This account is currently blocked and not recognized as a valid account. Launching EC2 instance failed.",
            "AWS launches no instance: This account is currently blocked and not recognized as a valid account",
        ),
        ("x" * 1000, "AWS launches no instance: " + "x" * 300),
        ("{words} {0}", "AWS launches no instance: {words} {0}"),
    ],
)
def test_the_sentence_for_a_failed_launch(message: str, sentence: str) -> None:
    assert explain_launch_failure(message) == sentence


@pytest.mark.parametrize(
    ("activities", "problem"),
    [
        ([], None),
        ([activity("Failed", 5, FULL)], FULL_SAYS),
        ([activity("Cancelled", 5, FULL)], FULL_SAYS),
        ([activity("Cancelled", 5)], None),
        ([activity("Successful", 1), activity("Failed", 5, FULL)], None),
        ([activity("PreInService", 1), activity("Failed", 5, FULL)], None),
        ([activity("Failed", 1, FULL), activity("Successful", 5)], FULL_SAYS),
        ([activity("Failed", 1, QUOTA), activity("Failed", 5, FULL)], QUOTA_SAYS),
        ([activity("Failed", 5, FULL), activity("Failed", 1, QUOTA)], QUOTA_SAYS),
        # A try that is under way has no instance yet, and AWS lists it first.
        ([activity("WaitingForInstanceId", 1, description="Launching a new EC2 instance"),
          activity("Failed", 5, FULL)], FULL_SAYS),
        ([activity("Successful", 1, description="Terminating EC2 instance: i-0abc"),
          activity("Failed", 5, FULL)], FULL_SAYS),
        ([activity("Failed", 5, FULL, description="Terminating EC2 instance: i-0abc")], None),
        ([activity("Failed", LAUNCH_FAILURE_AGE_S + 5, FULL)], None),
    ],
)  # fmt: skip
def test_the_newest_launch_that_was_decided_tells(activities: list[dict[str, Any]], problem: str | None) -> None:
    assert capacity_problem(Group(activities=activities), "asg") == problem
