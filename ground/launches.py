"""Why instances that are wanted do not come, in one sentence with the remedy, from what AWS says of failed launches."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import Any

from comfy_utils import FAILED_BOOTS_TAG

LAUNCH_FAILURE_AGE_S = 900
"""Seconds after which a failed launch says nothing about now."""

# What AWS says in a failed launch's StatusMessage (EC2 Auto Scaling user guide, "Troubleshoot", and RunInstances'
# error messages), and what we say. The first match wins.
_LAUNCH_FAILURES = (
    (
        r"sufficient (?P<type>\S+) capacity in the Availability Zone you requested \((?P<zone>[\w-]+)\)",
        "AWS has no {type} free in {zone} just now: it is tried again by itself; "
        "more types in INSTANCE_TYPES find room sooner",
    ),
    (
        r"vCPU limit of (?P<limit>\d+)",
        "the account's quota of {limit} vCPUs leaves no room for another instance: raise 'Running On-Demand "
        "G and VT instances' (for a type g…; other types have quotas of their own) in Service Quotas",
    ),
    (
        r"max ?spot ?instance ?count ?exceeded",
        "the account's quota for spot instances is used up: raise 'All G and VT Spot Instance Requests' "
        "(for a type g…; other types have quotas of their own) in Service Quotas",
    ),
    (
        r"no spot capacity available|spot instances\..*(?:UnfulfillableCapacity|InsufficientInstanceCapacity)",
        "AWS has no spot instance of this kind free just now: it is tried again by itself; "
        "more types in INSTANCE_TYPES find room sooner",
    ),
    (
        r"UnfulfillableCapacity|InsufficientInstanceCapacity|unable to fulfill capacity|sufficient \S+ capacity",
        "AWS has no instance of this kind free just now: it is tried again by itself; "
        "more types in INSTANCE_TYPES find room sooner",
    ),
    (
        r"instance type \((?P<type>[\w.-]+)\) is not supported in your requested Availability Zone \((?P<zone>[\w-]+)\)",
        "there is no {type} in {zone}: other zones are tried by themselves; "
        "more types in INSTANCE_TYPES find room sooner",
    ),
    (
        r"is pending, and cannot be run|InvalidAMIID\.Unavailable|image id '\S+' is not available",
        "the image is not ready yet: instances start by themselves once it is, some minutes after create_env.sh",
    ),
    (
        r"(?:image|AMI) id \W*(?P<image>ami-\w+)\W* does not exist",
        "the fleet's image {image} does not exist any more: run create_env.sh again",
    ),
    (
        r"Client\.InternalError",
        "an instance ended as it started, most likely because its disk's key is refused: "
        "let the role AWSServiceRoleForAutoScaling use the KMS key",
    ),
    (
        r"launch template|instance ?profile|security group\b.* does not exist|key pair\b.* does not exist|subnet\b.* does not exist",
        "AWS cannot launch what the launch template says ({words}): run create_env.sh again",
    ),
)


def explain_launch_failure(message: str) -> str:
    """Why a launch failed and what helps, in one sentence, from its scaling activity's StatusMessage.

    Where the reason is not known it is AWS's own first sentence.
    """
    words = re.sub(r"^Could not launch [\w-]+ Instances\.\s+", "", " ".join(message.split()))
    words = re.split(r"\.\s|\.$", words)[0][:300]
    for pattern, sentence in _LAUNCH_FAILURES:
        if match := re.search(pattern, message, re.IGNORECASE):
            return sentence.format(**match.groupdict(), words=words)
    return f"AWS launches no instance: {words}"


def launching_suspended(autoscaling: Any, asg_name: str) -> str | None:
    """Why the group launches nothing, as boot/giving_up.sh or somebody has decided; None where it launches."""
    answer = autoscaling.describe_auto_scaling_groups(AutoScalingGroupNames=[asg_name])
    for group in answer["AutoScalingGroups"]:
        if any(process["ProcessName"] == "Launch" for process in group.get("SuspendedProcesses", [])):
            tags = {tag["Key"]: tag["Value"] for tag in group.get("Tags", [])}
            version, _, count = tags.get(FAILED_BOOTS_TAG, "").partition(" ")
            if not count:
                return f"somebody has suspended launching in {asg_name}: resume the process Launch in the console"
            return (
                f"{count} instances in a row, of version {version} of the launch template, did not come to work, so the "
                f"group {asg_name} launches no more: see why in their logs, output/i-.../ in the bucket, mend it, and run "
                "create_env.sh again, which resumes launching"
            )
    return None


def capacity_problem(autoscaling: Any, asg_name: str) -> str | None:
    """Why instances that are wanted do not come, in one sentence with the remedy; None where nothing is known.

    The newest launch decides that failed or got its instance, unless it was LAUNCH_FAILURE_AGE_S ago; one that
    has only begun says nothing yet. Raises what boto3 raises, also where DescribeScalingActivities is refused.
    """
    if (reason := launching_suspended(autoscaling, asg_name)) is not None:
        return reason
    answer = autoscaling.describe_scaling_activities(AutoScalingGroupName=asg_name, MaxRecords=20)
    since = datetime.now(UTC) - timedelta(seconds=LAUNCH_FAILURE_AGE_S)
    decided = [
        activity
        for activity in answer["Activities"]
        if activity["StartTime"] >= since
        and activity.get("Description", "").startswith("Launching a new EC2 instance")
        and (activity["StatusCode"] in ("Failed", "Cancelled") or ": i-" in activity["Description"])
    ]
    newest = max(decided, key=lambda activity: activity["StartTime"], default=None)
    if newest is None or newest["StatusCode"] not in ("Failed", "Cancelled"):
        return None
    # A launch that was cancelled because nobody wants the instance any more carries no message.
    return explain_launch_failure(newest["StatusMessage"]) if newest.get("StatusMessage") else None
