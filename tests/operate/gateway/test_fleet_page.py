"""What /fleet and the editor's line say, as pure functions. That they say it of a real fleet is in tests/operate/editor/."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest

from operate.gateway.fleet_news import Instance, Launch, News, hours_since, launches_in, midnight, state_of
from operate.gateway.fleet_page import Html, draw, duration_of, line_of, picture_of
from operate.gateway.words import WORDS, words_of

NOW = datetime(2026, 11, 26, 10, 0, tzinfo=UTC).timestamp()
JOB = "0f8fad5b-d9cb-469f-a165-70867728950e"


def news(*states: str, **more: Any) -> News:
    """A fleet with instances in these states, five minutes old."""
    instances = [Instance(f"i-{number}", "g5.2xlarge", state, 300.0, []) for number, state in enumerate(states)]
    return News(NOW, 0, 0, len(states), instances, None, 0.0, 0.0, None, [])._replace(**more)


@pytest.mark.parametrize(
    ("lifecycle", "has_worker", "has_booted", "is_busy", "state"),
    [("Pending", False, False, False, "starting"), ("Pending:Wait", False, False, False, "starting"),
     ("InService", False, False, False, "booting"), ("InService", True, False, False, "loading"),
     ("InService", True, True, False, "idle"), ("InService", True, False, True, "busy"),
     ("Terminating:Wait", True, True, True, "leaving")],
)  # fmt: skip
def test_an_instance_in_one_word(
    lifecycle: str, has_worker: bool, has_booted: bool, is_busy: bool, state: str
) -> None:
    assert state_of(lifecycle, has_worker=has_worker, has_booted=has_booted, is_busy=is_busy) == state


def test_what_a_day_costs_is_the_hours_of_its_instances() -> None:
    def activity(
        words: str, instance: str, hour: int, end: int | None = None, status: str = "Successful"
    ) -> dict[str, Any]:
        ends = {"EndTime": datetime(2026, 11, 26, end, tzinfo=UTC)} if end is not None else {}
        start = (
            datetime(2026, 11, 26, hour, tzinfo=UTC) if hour >= 0 else datetime(2026, 11, 25, 24 + hour, tzinfo=UTC)
        )
        return {"Description": f"{words} EC2 instance: {instance}", "StartTime": start, "StatusCode": status} | ends

    launches = launches_in(
        [
            activity("Terminating", "i-night", 2, 3),
            activity("Launching a new", "i-night", -4),
            activity("Launching a new", "i-there", 8),
            activity("Launching a new", "i-never", 8, 8, "Failed"),
            activity("Launching a new", "i-yesterday", -10),
            activity("Terminating", "i-yesterday", -6, 0),
            {"Description": "Something else", "StartTime": datetime.now(UTC), "StatusCode": "Successful"},
        ]
    )
    assert hours_since(launches, midnight(NOW), NOW) == {"i-night": 3.0, "i-there": 2.0}
    assert hours_since([Launch("i", NOW - 60)], midnight(NOW), NOW) == {"i": 1 / 60}


@pytest.mark.parametrize(
    ("told", "line"),
    [
        (news(), ""),
        (news("idle", "booting"), ""),
        (news("busy", "booting", waiting=3), ""),
        (news("booting", waiting=1), "The first instance is coming (booting, 5 min 0 s so far)."),
        (news("starting", "loading", waiting=1, boot_s=95.0), "The first instance is coming (starting, 5 min 0 s so far); it usually takes 1 min 35 s."),
        (news(waiting=1), "An instance is asked for (none is there yet)."),
        (news(waiting=1, problem="AWS has none."), "AWS has none."),
        (news("idle", waiting=1), "An instance is idle: a job is taken soon."),
        (news("booting", waiting=None), ""),
    ],
)  # fmt: skip
def test_the_line_says_why_a_job_waits(told: News, line: str) -> None:
    assert line_of(told, words_of("en")) == line
    assert bool(line_of(told, words_of("zh"))) is bool(line)


def test_both_languages_have_the_same_words() -> None:
    both = json.loads(WORDS.read_text(encoding="utf-8"))
    assert both["en"].keys() == both["zh"].keys()
    for name, word in both["en"].items():
        assert word.count("{") == both["zh"][name].count("{"), name
    assert duration_of(7321, words_of("en")) == "2 h 2 min"


def test_nothing_that_a_job_says_is_markup() -> None:
    evil = "<script>alert(1)</script>"
    busy = Instance(evil, evil, "busy", 1.0, [{"node_title": evil, "value": 1, "max": 2}])
    page = draw(evil, news(problem=evil)._replace(instances=[busy], not_seen=[evil]), "en", [], evil)
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 6
    assert 'lang="zh"' in page
    for language in ("en", "zh"):
        assert (
            "$"
            not in draw("pro", news(usd_today=None, wanted=None), language, [Html("")], None).partition("<main>")[2]
        )


def test_a_jobs_first_picture_is_shown() -> None:
    files = [{"s3_key": f"output/{JOB}/{name}"} for name in ("a.txt", "temp/b.png", "c d.PNG", "e.png")]
    picture = picture_of(files)
    assert picture is not None
    assert picture.startswith(f"/view?filename=c+d.PNG&subfolder={JOB}&type=output")
    assert picture_of(files[:2]) is None
