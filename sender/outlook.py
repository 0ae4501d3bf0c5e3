"""What those who wait are shown of jobs that have not ended: how far they are, how long it may take, what the fleet does."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from comfy_utils import QueueDepth, Settings, aws_client, count, one_line
from ground.launches import capacity_problem

FLEET_LOOK_S = 15.0
"""Between two looks at queue and group."""


class Outlook:
    """What is shown of the jobs waited for: of many a bar, of one what it does."""

    def __init__(
        self,
        settings: Settings,
        depth: Callable[[int], QueueDepth],
        say: Callable[[str], None],
        tell_progress: Callable[[Any], str],
    ) -> None:
        """`depth` tells how the queue stands, `say` gets sentences that stay, `tell_progress` puts progress in words."""
        self.fleet = FleetWatch(settings, depth, say)
        self.runs_s: list[float] = []
        """How long the jobs that have ended ran."""
        self._tell_progress = tell_progress
        self._first: tuple[Mapping[str, Any], float] | None = None  # the first news of the node at work, and when

    def look(self, unfinished: int) -> None:
        """Look at the fleet, unless that was a moment ago. Raises nothing."""
        self.fleet.look(unfinished)

    def of_one(self, progress: Mapping[str, Any] | None) -> str:
        """`waiting, about 2 ahead: 1 instance is booting`, later `running: KSampler 12/20 (60 %)`."""
        if progress:
            return f"running: {self._tell_progress(progress)}{self._time_left(progress)}"
        depth, news = self.fleet.depth, self.fleet.said.get("group" if self.fleet.depth else "queue")
        return f"waiting{f', about {max(depth.visible - 1, 0)} ahead' if depth else ''}" + (
            f": {news}" if news else ""
        )

    def _time_left(self, progress: Mapping[str, Any]) -> str:
        """`, about 12 s left`, by how long such jobs run or else by the pace of the node at work; "" where unknown."""
        if not (self._first and self._first[0].get("node_id") == progress.get("node_id")):
            self._first = progress, time.monotonic()
        first, since = self._first
        if "usual_run_s" in progress and "started_at" in progress:
            ran_s = (datetime.now(UTC) - datetime.fromisoformat(progress["started_at"])).total_seconds()
            if ran_s < progress["usual_run_s"]:
                return f", about {progress['usual_run_s'] - ran_s:.0f} s left"
        steps = progress.get("value", 0) - first.get("value", 0)
        if steps <= 0:
            return ""
        left = progress.get("max", 0) - progress.get("value", 0)
        return f", about {(time.monotonic() - since) / steps * left:.0f} s left in this node"

    def of_many(self, how_far: str, total: int, unfinished: int) -> str:
        """`[████░░░░] 2 of 4 jobs done, about 25 s left. On the queue: 1 waiting, 1 running. 1 instance is booting`."""
        filled = 20 * (total - unfinished) // total
        text = f"[{'█' * filled}{'░' * (20 - filled)}] {how_far}"
        if self.runs_s and self.fleet.depth and self.fleet.depth.in_flight:
            # As long as past runs took, on as many workers as are at it now.
            left_s = unfinished * sum(self.runs_s) / len(self.runs_s) / self.fleet.depth.in_flight
            text += f", about {left_s:.0f} s left"
        return ". ".join([text, *filter(None, self.fleet.said.values())])


class FleetWatch:
    """Says how the queue stands and what waiting jobs wait for: each sentence once until it changes."""

    def __init__(self, settings: Settings, depth: Callable[[int], QueueDepth], say: Callable[[str], None]) -> None:
        self._settings, self._depth, self._say = settings, depth, say
        self.said: dict[str, str | None] = {}
        """What was said last, of `queue` and of `group`."""
        self.depth: QueueDepth | None = None
        self._next_look = 0.0

    def look(self, unfinished: int) -> None:
        """Look at queue and group, unless that was less than FLEET_LOOK_S ago. Raises nothing."""
        if time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + FLEET_LOOK_S
        try:
            self.depth = depth = self._depth(0)
            news = f"On the queue: {depth.visible} waiting, {depth.in_flight} running"
            all_run = depth.in_flight >= unfinished
        except Exception as error:
            self.depth = None
            news, all_run = f"The queue cannot be looked at: {one_line(error)}", False
        self._tell("queue", news)
        try:
            settings = self._settings
            group = None if all_run else fleet_news(aws_client("autoscaling", settings.region), settings.asg_name)
        except Exception as error:
            group = f"The group cannot be looked at: {one_line(error)}"
        self._tell("group", group)

    def _tell(self, topic: str, sentence: str | None) -> None:
        if sentence and sentence != self.said.get(topic):
            self._say(sentence)
        self.said[topic] = sentence


def fleet_news(autoscaling: Any, asg_name: str) -> str | None:
    """What keeps the group from having the instances it should have, in one sentence; None when it has them.

    None also where there is no such group. Raises what boto3 raises, but needs no permission to see why
    launches fail.
    """
    groups = autoscaling.describe_auto_scaling_groups(AutoScalingGroupNames=[asg_name])["AutoScalingGroups"]
    if not groups:
        return None
    desired = groups[0]["DesiredCapacity"]
    if desired == 0:
        return f"No instance is wanted: raise the desired capacity of {asg_name}, or MAX_INSTANCES if it is 0"
    states = [instance["LifecycleState"] for instance in groups[0]["Instances"]]
    missing = desired - states.count("InService")
    if missing <= 0:
        return None
    unseen = ""
    try:
        problem = capacity_problem(autoscaling, asg_name)
        if problem:
            return problem[0].upper() + problem[1:]
    except Exception as error:
        unseen = f"; whether launches fail cannot be seen: {one_line(error)}"
    booting = sum(state.startswith("Pending") for state in states)
    if booting:
        return f"{count(booting, 'instance')} {'is' if booting == 1 else 'are'} booting{unseen}"
    return f"{count(missing, 'instance')} {'is' if missing == 1 else 'are'} asked of AWS{unseen}"
