"""How the fleet stands for who looks at it in a browser: instances, boots, cost of today, what comes next."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, NamedTuple

from comfy_utils import Settings, aws_client
from ground.launches import capacity_problem
from operate.gateway.cloud import Cloud
from operate.prices import price_of
from operate.report import LAUNCH
from operate.words import moment, refusal
from send_job import read_json

NEWS_S = 4.0
"""News that are no older serve again."""
LIFE_S = 30.0
"""The same of launches, boots and problems, which change slowly."""
BOOTS = 5
"""So many boots say how long one takes."""
MOST_ACTIVITIES = 500
MOST_INSTANCES = 40


class Launch(NamedTuple):
    """An instance that the group has launched, in seconds since 1970."""

    instance_id: str
    began: float
    ended: float | None = None


class Instance(NamedTuple):
    """One instance of the group: `state` is starting, booting, loading, idle, busy or leaving."""

    instance_id: str
    type: str
    state: str
    age_s: float | None
    jobs: Sequence[dict[str, Any]]


class News(NamedTuple):
    """How it stands. What cannot be read is None, and `not_seen` says why."""

    at: float
    waiting: int | None
    running: int | None
    wanted: int | None
    instances: Sequence[Instance]
    boot_s: float | None
    """How long a boot usually takes, from the launch until ComfyUI answers."""
    hours_today: float | None
    usd_today: float | None
    problem: str | None
    """Why instances that are wanted do not come."""
    not_seen: Sequence[str]


class Slow(NamedTuple):
    """What is looked at less often."""

    launches: Sequence[Launch]
    boots_s: Sequence[float]
    problem: str | None
    not_seen: Sequence[str]


class FleetNews:
    """The news of one environment, read when somebody asks."""

    def __init__(self, settings: Settings, cloud: Cloud) -> None:
        self._settings, self._cloud = settings, cloud
        self._news: News | None = None
        self._slow: Slow | None = None
        self._slow_at = 0.0
        self._boots: dict[str, float] = {}  # by instance: how long its boot took
        self._types: dict[str, str] = {}
        self._one = asyncio.Lock()

    async def read(self) -> News:
        """How it stands now, or a moment ago."""
        async with self._one:
            if self._news is None or time.time() - self._news.at > NEWS_S:
                self._news = await self._cloud.call(self._look)
        return self._news

    def _look(self) -> News:
        settings, not_seen = self._settings, []
        waiting = running = wanted = None
        there: list[dict[str, Any]] = []
        try:
            sqs = aws_client("sqs", settings.region)
            names = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"]
            url = sqs.get_queue_url(QueueName=settings.sqs_name)["QueueUrl"]
            depth = sqs.get_queue_attributes(QueueUrl=url, AttributeNames=names)["Attributes"]
            waiting, running = (int(depth[name]) for name in names)
        except Exception as error:
            not_seen.append(refusal(error, "sqs"))
        try:
            autoscaling = aws_client("autoscaling", settings.region)
            answer = autoscaling.describe_auto_scaling_groups(AutoScalingGroupNames=[settings.asg_name])
            for group in answer["AutoScalingGroups"]:
                wanted, there = group["DesiredCapacity"], group["Instances"][:MOST_INSTANCES]
        except Exception as error:
            not_seen.append(refusal(error, "autoscaling"))
        if self._slow is None or time.monotonic() - self._slow_at > LIFE_S:
            # Where there is no group nothing was launched.
            self._slow = self._look_slowly() if wanted is not None else Slow([], [], None, not_seen)
            self._slow_at = time.monotonic()
        slow, now = self._slow, time.time()
        began = {launch.instance_id: launch.began for launch in slow.launches}
        instances = [self._instance(each, began.get(each["InstanceId"]), now) for each in there]
        hours = hours_since(slow.launches, midnight(now), now)
        hours_today, usd_today = self._spent(hours) if wanted is not None else (None, None)
        boot_s = statistics.median(slow.boots_s) if slow.boots_s else None
        seen = [*dict.fromkeys([*not_seen, *slow.not_seen])]
        return News(now, waiting, running, wanted, instances, boot_s, hours_today, usd_today, slow.problem, seen)

    def _instance(self, item: dict[str, Any], began: float | None, now: float) -> Instance:
        instance_id, kind = item["InstanceId"], item.get("InstanceType", "")
        self._types[instance_id] = kind
        news = self._told(instance_id, "worker.json")
        jobs = (news or {}).get("jobs") or []
        has_booted = bool(jobs) or (news is not None and self._boot_of(instance_id) is not None)
        state = state_of(
            item["LifecycleState"], has_worker=news is not None, has_booted=has_booted, is_busy=bool(jobs)
        )
        return Instance(instance_id, kind, state, now - began if began else None, jobs)

    def _told(self, instance_id: str, name: str) -> dict[str, Any] | None:
        """What an instance has told of itself, None where it has not, or it cannot be seen."""
        found = None
        with suppress(Exception):
            found = read_json(self._cloud.s3, self._cloud.bucket, f"output/{instance_id}/{name}")
        return found if isinstance(found, dict) else None

    def _boot_of(self, instance_id: str) -> float | None:
        """When an instance's ComfyUI first answered, in seconds since 1970; None while it has not."""
        if instance_id not in self._boots:
            with suppress(TypeError, KeyError, ValueError):
                boot = self._told(instance_id, "boot.json") or {}
                self._boots[instance_id] = moment(boot["booted_at"]) + float(boot["total"])
        return self._boots.get(instance_id)

    def _look_slowly(self) -> Slow:
        settings = self._settings
        launches: list[Launch] = []
        problem, not_seen = None, []
        try:
            autoscaling = aws_client("autoscaling", settings.region)
            pages = autoscaling.get_paginator("describe_scaling_activities").paginate(
                AutoScalingGroupName=settings.asg_name,
                PaginationConfig={"MaxItems": MOST_ACTIVITIES, "PageSize": 100},
            )
            launches = launches_in(activity for page in pages for activity in page["Activities"])
            problem = capacity_problem(autoscaling, settings.asg_name)
        except Exception as error:
            not_seen.append(refusal(error, "autoscaling"))
        boots: list[float] = []
        for launch in sorted(launches, key=lambda each: each.began, reverse=True)[: BOOTS * 3]:
            ready = self._boot_of(launch.instance_id)
            if ready is not None and ready > launch.began and len(boots) < BOOTS:
                boots.append(ready - launch.began)
        return Slow(launches, boots, problem, not_seen)

    def _spent(self, hours: dict[str, float]) -> tuple[float, float | None]:
        """These hours, and what they cost on demand, None where a price is not known."""
        usd = 0.0
        for instance_id, each in hours.items():
            if instance_id not in self._types:
                self._types[instance_id] = str(
                    (self._told(instance_id, "worker.json") or {}).get("instance_type") or ""
                )
            price = price_of(self._types[instance_id], self._settings.region)
            if price is None:
                return sum(hours.values()), None
            usd += each * price
        return sum(hours.values()), usd


def state_of(lifecycle: str, *, has_worker: bool, has_booted: bool, is_busy: bool) -> str:
    """An instance in one word: AWS starts it, it boots, its ComfyUI loads, it is idle or busy, it leaves."""
    if lifecycle.startswith("Terminat"):
        return "leaving"
    if is_busy:
        return "busy"
    if has_worker:
        return "idle" if has_booted else "loading"
    return "starting" if lifecycle.startswith("Pending") else "booting"


def launches_in(activities: Iterable[dict[str, Any]]) -> list[Launch]:
    """The instances of a group's activities, with when they came and went."""
    began: dict[str, float] = {}
    ended: dict[str, float] = {}
    for activity in activities:
        match = LAUNCH.match(activity["Description"])
        if not match or activity["StatusCode"] in ("Failed", "Cancelled"):
            continue
        if match[1] != "Terminating":
            began[match[2]] = activity["StartTime"].timestamp()
        elif "EndTime" in activity:
            ended[match[2]] = activity["EndTime"].timestamp()
    return [Launch(instance_id, since, ended.get(instance_id)) for instance_id, since in began.items()]


def hours_since(launches: Iterable[Launch], since: float, now: float) -> dict[str, float]:
    """How many hours each instance was there since a moment, by its id."""
    hours = {each.instance_id: (min(each.ended or now, now) - max(each.began, since)) / 3600 for each in launches}
    return {instance_id: each for instance_id, each in hours.items() if each > 0}


def midnight(now: float) -> float:
    """When this day began, by UTC, as AWS bills."""
    return datetime.fromtimestamp(now, UTC).replace(hour=0, minute=0, second=0, microsecond=0).timestamp()
