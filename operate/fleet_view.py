"""How a fleet stands: its queue, the last hour, its instances and what they do, and why launches fail."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from typing import Any

from comfy_utils import Settings, aws_client, queue_depth, say
from ground.launches import explain_launch_failure
from operate.prices import price_of
from operate.words import duration, moment, refusal
from send_job import read_json

WATCH_S = 5.0
"""Between two looks of --watch; an hour of it costs about 2 US cents of CloudWatch."""
HOUR_S = 3600


def show_fleet(settings: Settings, price: float | None, *, watch: bool, as_json: bool) -> int:
    """Show how the fleet stands, once or again and again; returns the exit code."""
    shown = ""
    while True:
        fleet = read_fleet(settings, price)
        if as_json:
            print(json.dumps(fleet), flush=True)
        elif not watch:
            show(tell_fleet(fleet))
        elif sys.stdout.isatty():
            show(tell_fleet(fleet), before="\x1b[H\x1b[J")
        elif (line := tell_fleet_shortly(fleet)) != shown:
            shown = line
            say(f"{fleet['at']} {line}")
        if not watch:
            return 1 if fleet["queue"] is None and fleet["group"] is None else 0
        time.sleep(WATCH_S)


def show(lines: list[str], before: str = "") -> None:
    """Print lines, the first after what empties a terminal."""
    for line in lines:
        say(line, before=before)
        before = ""


# --- What is read ----------------------------------------------------------------------------------------


def read_fleet(settings: Settings, price: float | None = None) -> dict[str, Any]:
    """How queue and instances stand. What cannot be read is None, and `not_seen` says why."""
    now = datetime.now(UTC)
    fleet: dict[str, Any] = {
        "env": settings.env, "region": settings.region, "at": now.isoformat(timespec="seconds").replace("+00:00", "Z"),
        "queue": None, "oldest_s": None, "last_hour": None, "group": None, "instances": [], "usd_per_hour": None,
        "scaling_errors": [], "not_seen": [],
    }  # fmt: skip

    @contextmanager
    def part(service: str) -> Iterator[Any]:
        """The rest is shown without what this block reads, where it fails."""
        try:
            yield aws_client(service, settings.region)
        except Exception as error:
            fleet["not_seen"] = list(dict.fromkeys([*fleet["not_seen"], refusal(error, service)]))

    with part("sqs") as sqs:
        fleet["queue"] = read_queues(sqs, settings.sqs_name)
    with part("cloudwatch") as cloudwatch:
        fleet["oldest_s"], fleet["last_hour"] = read_metrics(cloudwatch, settings, now)
    instances: list[dict[str, Any]] = []
    with part("autoscaling") as autoscaling:
        answer = autoscaling.describe_auto_scaling_groups(AutoScalingGroupNames=[settings.asg_name])
        for group in answer["AutoScalingGroups"]:
            fleet["group"] = {
                "wanted": group["DesiredCapacity"],
                "least": group["MinSize"],
                "most": group["MaxSize"],
            }
            instances = group["Instances"]
            fleet["scaling_errors"] = read_scaling_errors(autoscaling, settings.asg_name, now)
    launched: dict[str, datetime] = {}
    if instances:
        with part("ec2") as ec2:
            launched = read_launches(ec2, settings.asg_name)
    for instance in instances:
        instance_id, kind = instance["InstanceId"], instance.get("InstanceType", "")
        jobs: list[dict[str, Any]] = []
        begun: bool | None = None
        with part("s3") as s3:
            news = read_json(s3, settings.s3_bucket, f"output/{instance_id}/worker.json")
            begun = news is not None
            jobs = news["jobs"] if begun else []
        age_s = round((now - launched[instance_id]).total_seconds()) if instance_id in launched else None
        fleet["instances"].append(
            {"instance_id": instance_id, "type": kind, "state": state_of(instance, jobs, begun), "age_s": age_s,
             "jobs": jobs, "usd_per_hour": price_of(kind, settings.region) if price is None else price}
        )  # fmt: skip
    prices = [each["usd_per_hour"] for each in fleet["instances"]]
    if fleet["group"] and None not in prices:
        fleet["usd_per_hour"] = round(sum(prices), 4)
    return fleet


def read_queues(sqs: Any, name: str) -> dict[str, int | None]:
    """How many messages wait, are held, and are dead; None for those of a dead-letter queue that is not there."""
    depth = queue_depth(sqs, sqs.get_queue_url(QueueName=name)["QueueUrl"])
    dead = None
    with suppress(sqs.exceptions.QueueDoesNotExist):
        dead = sum(queue_depth(sqs, sqs.get_queue_url(QueueName=f"{name}-dlq")["QueueUrl"]))
    return {"waiting": depth.visible, "in_flight": depth.in_flight, "dead": dead}


def read_metrics(cloudwatch: Any, settings: Settings, now: datetime) -> tuple[int | None, dict[str, int] | None]:
    """The oldest message's age in seconds, and how many jobs succeeded and failed in the last hour, None where no
    worker has published any."""
    own = f"{settings.prefix}/{settings.env}"
    queue = [{"Name": "QueueName", "Value": settings.sqs_name}]
    queries = [
        {"Id": name.lower(), "MetricStat": {"Stat": statistic, "Period": 60, "Metric": {
            "Namespace": space, "MetricName": name, "Dimensions": dimensions}}}
        for name, statistic, space, dimensions in (
            ("ApproximateAgeOfOldestMessage", "Maximum", "AWS/SQS", queue),
            ("JobsSucceeded", "Sum", own, []),
            ("JobsFailed", "Sum", own, []),
        )
    ]  # fmt: skip
    answer = cloudwatch.get_metric_data(
        MetricDataQueries=queries,
        StartTime=now - timedelta(seconds=HOUR_S),
        EndTime=now + timedelta(seconds=60),
        ScanBy="TimestampDescending",
    )
    values = {result["Id"]: result["Values"] for result in answer["MetricDataResults"]}
    ages, succeeded, failed = (values.get(query["Id"], []) for query in queries)
    hour = {"succeeded": round(sum(succeeded)), "failed": round(sum(failed))} if succeeded or failed else None
    return round(ages[0]) if ages else None, hour


def read_scaling_errors(autoscaling: Any, asg_name: str, now: datetime) -> list[dict[str, Any]]:
    """Why launches failed in the last hour, each reason once, the latest first."""
    errors: dict[str, int] = {}
    answer = autoscaling.describe_scaling_activities(AutoScalingGroupName=asg_name, MaxRecords=100)
    for activity in answer["Activities"]:
        age_s = round((now - activity["StartTime"]).total_seconds())
        if activity["StatusCode"] == "Failed" and activity.get("StatusMessage") and age_s < HOUR_S:
            errors.setdefault(explain_launch_failure(activity["StatusMessage"]), age_s)
    return [{"age_s": age_s, "message": message} for message, age_s in errors.items()]


def read_launches(ec2: Any, asg_name: str) -> dict[str, datetime]:
    """When each of the group's instances was launched."""
    pages = ec2.get_paginator("describe_instances").paginate(
        Filters=[{"Name": "tag:aws:autoscaling:groupName", "Values": [asg_name]}]
    )
    return {
        instance["InstanceId"]: instance["LaunchTime"]
        for page in pages
        for reservation in page["Reservations"]
        for instance in reservation["Instances"]
    }


def state_of(instance: dict[str, Any], jobs: list[dict[str, Any]], begun: bool | None) -> str:
    """An instance of a group in one word; `begun` says whether its worker has, None where that cannot be seen."""
    state = str(instance["LifecycleState"])
    if state.startswith("Warmed"):
        return "warm"
    if state.startswith("Terminat"):
        return "leaving"
    if instance.get("HealthStatus", "Healthy").lower() != "healthy":
        return "unhealthy"
    if state.startswith("Pending") or begun is False:
        return "booting"
    if begun is None:
        return "in service"
    return "busy" if jobs else "idle"


# --- How it is told --------------------------------------------------------------------------------------


def tell_fleet(fleet: dict[str, Any]) -> list[str]:
    """How the fleet stands, as lines for people."""
    lines = [f"Environment {fleet['env']} in {fleet['region']}, {fleet['at']}", f"queue      {tell_queue(fleet)}"]
    if fleet["oldest_s"] and (fleet["queue"] or {}).get("waiting"):
        lines[-1] += f"; the oldest for {duration(fleet['oldest_s'])}"
    hour = fleet["last_hour"]
    lines.append(
        f"last hour  {hour['succeeded']} succeeded, {hour['failed']} failed" if hour else "last hour  not known"
    )
    lines.append(f"instances  {tell_instances(fleet)}")
    for each in fleet["instances"]:
        age = duration(each["age_s"]) if each["age_s"] is not None else ""
        jobs = "; ".join(map(tell_job, each["jobs"]))
        lines.append(f"  {each['instance_id']:19}  {each['type']:12} {each['state']:10} {age:>12}  {jobs}".rstrip())
    lines += [f"scaling    {duration(each['age_s'])} ago: {each['message']}" for each in fleet["scaling_errors"]]
    return lines + [f"not seen   {each}" for each in fleet["not_seen"]]


def tell_fleet_shortly(fleet: dict[str, Any]) -> str:
    """How the fleet stands, in one line."""
    return f"{tell_queue(fleet)}; {tell_instances(fleet)}" + "".join(f"; {each}" for each in fleet["not_seen"])


def tell_queue(fleet: dict[str, Any]) -> str:
    """`3 waiting, 2 in flight, 0 dead`."""
    queue = fleet["queue"]
    if queue is None:
        return "not seen"
    dead = "no dead-letter queue" if queue["dead"] is None else f"{queue['dead']} dead"
    return f"{queue['waiting']} waiting, {queue['in_flight']} in flight, {dead}"


def tell_instances(fleet: dict[str, Any]) -> str:
    """`2 there, 2 wanted (0 to 20): 1 busy, 1 booting; $2.424 an hour on demand`."""
    group, there = fleet["group"], fleet["instances"]
    if group is None:
        refused = any("autoscaling" in each for each in fleet["not_seen"])
        return "not seen" if refused else "there is no group: scaling is off"
    told = f"{len(there)} there, {group['wanted']} wanted ({group['least']} to {group['most']})"
    if there:
        told += ": " + ", ".join(f"{n} {state}" for state, n in Counter(each["state"] for each in there).items())
        price = fleet["usd_per_hour"]
        told += "; price unknown, give --price" if price is None else f"; ${price:g} an hour on demand"
    return told


def tell_job(job: dict[str, Any]) -> str:
    """What an instance does with a job."""
    step = f" {job['value']} of {job['max']}" if job.get("max") else ""
    title = " ".join(str(job.get("node_title") or "").split())
    running_s = max(0.0, time.time() - moment(job["since"]))
    return f"{job['job_id']} for {duration(running_s)}" + (f", {title}{step}" if title else "")
