"""What those who wait are told of queue and group."""

from __future__ import annotations

import types
from typing import Any

import pytest
from launches import FULL, FULL_SAYS, QUOTA, QUOTA_SAYS, Group, activity
from sender_tools import client_error

from comfy_utils import (
    QueueDepth,
)
from sender import outlook

DENIED = client_error(403, "AccessDenied", "DescribeScalingActivities")


@pytest.mark.parametrize(
    ("group", "news"),
    [
        (Group(there=False), None),
        (Group(2, "InService InService", [activity("Failed", 5, FULL)]), None),
        (Group(0), "No instance is wanted: raise the desired capacity of asg, or MAX_INSTANCES if it is 0"),
        (Group(2), "2 instances are asked of AWS"),
        (Group(1), "1 instance is asked of AWS"),
        (Group(3, "InService Pending Pending:Wait"), "2 instances are booting"),
        (Group(1, "Terminating:Wait Pending"), "1 instance is booting"),
        (Group(2, "Pending", [activity("Failed", 5, FULL)]), FULL_SAYS),
        (Group(2, "InService", [activity("Failed", 5, QUOTA)]), "T" + QUOTA_SAYS[1:]),
        (Group(1, "", DENIED), f"1 instance is asked of AWS; whether launches fail cannot be seen: {DENIED}"),
    ],
)
def test_what_is_said_of_the_group(group: Group, news: str | None) -> None:
    assert outlook.fleet_news(group, "asg") == news


class Watched:
    """A FleetWatch on stand-ins and a clock that tests move."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.looks = 100.0, 0
        self.depth: QueueDepth | Exception = QueueDepth(2, 0)
        self.news: str | Exception | None = "1 instance is booting"
        self.said: list[str] = []
        monkeypatch.setattr(outlook, "time", types.SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(outlook, "aws_client", lambda *_: None)
        monkeypatch.setattr(outlook, "fleet_news", lambda *_: self.answer(self.news))
        settings: Any = types.SimpleNamespace(region="us-west-2", asg_name="asg")
        self.watch = outlook.FleetWatch(settings, lambda _: self.answer(self.depth), self.said.append)

    def answer(self, value: Any) -> Any:
        self.looks += 1
        if isinstance(value, Exception):
            raise value
        return value

    def look(self, unfinished: int = 2, after_s: float = outlook.FLEET_LOOK_S) -> list[str]:
        """What is said now."""
        self.now += after_s
        self.said.clear()
        self.watch.look(unfinished)
        return list(self.said)


def test_each_sentence_is_said_once_until_it_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch)
    assert watched.look() == ["On the queue: 2 waiting, 0 running", "1 instance is booting"]
    assert watched.look() == []
    watched.news = None
    assert watched.look() == []
    watched.news = "1 instance is booting"
    assert watched.look() == ["1 instance is booting"]
    watched.depth = QueueDepth(1, 1)
    assert watched.look() == ["On the queue: 1 waiting, 1 running"]


def test_queue_and_group_are_looked_at_rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch)
    watched.look()
    looks = watched.looks
    watched.look(after_s=outlook.FLEET_LOOK_S - 0.1)
    assert watched.looks == looks
    watched.look(after_s=0.1)
    assert watched.looks > looks


def test_nothing_is_said_of_the_group_when_every_job_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch)
    watched.depth = QueueDepth(0, 2)
    assert watched.look() == ["On the queue: 0 waiting, 2 running"]
    assert watched.look(unfinished=3) == ["1 instance is booting"]


def test_a_look_that_fails_is_said_once_and_waiting_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch)
    watched.news = client_error(403, "AccessDenied", "DescribeAutoScalingGroups")
    watched.depth = client_error(403, "AccessDenied", "GetQueueAttributes")
    assert watched.look() == [
        f"The queue cannot be looked at: {watched.depth}",
        f"The group cannot be looked at: {watched.news}",
    ]
    assert watched.look() == []
