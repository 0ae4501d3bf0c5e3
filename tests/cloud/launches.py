"""A stand-in for an Auto Scaling client, and what AWS says of launches that fail."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any


class Group:
    """An Auto Scaling client: one group, its instances' states, its activities. Exceptions stand for answers."""

    def __init__(self, desired: int = 0, states: str = "", activities: object = (), *, there: bool = True) -> None:
        self.group = {
            "DesiredCapacity": desired,
            "Instances": [{"LifecycleState": state} for state in states.split()],
        }
        self.activities = activities
        self.there = there

    def describe_auto_scaling_groups(self, AutoScalingGroupNames: list[str]) -> dict[str, Any]:  # noqa: N803
        assert AutoScalingGroupNames == ["asg"]
        return {"AutoScalingGroups": [self.group] if self.there else []}

    def describe_scaling_activities(self, AutoScalingGroupName: str, MaxRecords: int) -> dict[str, Any]:  # noqa: N803
        assert (AutoScalingGroupName, MaxRecords) == ("asg", 20)
        if isinstance(self.activities, Exception):
            raise self.activities
        return {"Activities": self.activities}


def activity(status: str, age_s: float = 0, words: str | None = None, description: str = "") -> dict[str, Any]:
    """A launch as AWS describes it; with an instance unless it failed or only begins."""
    failed = status in ("Failed", "Cancelled")
    description = description or (
        f"Launching a new EC2 instance.  Status Reason: {words}" if failed else "Launching a new EC2 instance: i-0abc"
    )
    started = datetime.now(UTC) - timedelta(seconds=age_s)
    return {"StatusCode": status, "StartTime": started, "Description": description} | (
        {"StatusMessage": words} if words else {}
    )


FULL = (
    "We currently do not have sufficient g5.2xlarge capacity in the Availability Zone you requested (us-west-2a). "
    "Our system will be working on provisioning additional capacity. You can currently get g5.2xlarge capacity by not "
    "specifying an Availability Zone in your request or choosing us-west-2b, us-west-2c. Launching EC2 instance failed."
)
FULL_SAYS = (
    "AWS has no g5.2xlarge free in us-west-2a just now: it is tried again by itself; "
    "more types in INSTANCE_TYPES find room sooner"
)
QUOTA = (
    "You have requested more vCPU capacity than your current vCPU limit of 8 allows for the instance bucket that the "
    "specified instance type belongs to. Please visit http://aws.amazon.com/contact-us/ec2-request to request an "
    "adjustment to this limit. Launching EC2 instance failed."
)
QUOTA_SAYS = (
    "the account's quota of 8 vCPUs leaves no room for another instance: raise 'Running On-Demand G and VT instances' "
    "(for a type g…; other types have quotas of their own) in Service Quotas"
)
