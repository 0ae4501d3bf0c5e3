"""The page of a report: times, places, costs, and what others have written."""

from __future__ import annotations

import pytest
from report_tools import T0, draw, figures, receipt, texts, tree, widths

from operate.prices import price_of
from operate.report_page import Life, Picture, Span, draw_report, round_time


def test_times_places_and_costs_are_those_of_the_receipts() -> None:
    results = [
        receipt(0, 50, 60, instance_id="i-1"),
        receipt(0, 60, 80, instance_id="i-1"),
        receipt(0, 40, 70, instance_id="i-2"),
    ]
    lives = {
        "i-1": Life(T0 + 10, T0 + 45, T0 + 100, "g5.2xlarge", 1.212),
        "i-2": Life(T0 + 20, T0 + 30, T0 + 75, "g5.2xlarge", 1.212),
    }
    root = draw(results, lives=lives)
    assert figures(root) == {
        "jobs succeeded": ("3 of 3", "none failed"),
        "all done in": ("80.0 s", "first after 60.0 s"),
        "wait, median": ("50.0 s", "95 % at most 60.0 s"),
        "run, median": ("20.0 s", "95 % at most 30.0 s"),
        "instance time busy": ("41 %", "60.0 s of 2 min 25 s"),  # 90 s and 55 s alive
        "cost": ("$0.0505", "g5.2xlarge $1.212/h"),  # the second is billed for a minute
    }
    assert widths(root, "idle") == [(10, 90), (20, 55)], "from launch to end, the window being 100 s"
    assert widths(root, "booting") == [(10, 35), (20, 10)]
    assert sorted(widths(root, "bar")) == [(40, 30), (50, 10), (60, 20)]
    (waiting,) = [path.get("d") for path in root.iter("path") if path.get("class") == "waiting"]
    assert waiting == "M0,100H0.00V66.67H0.00V33.33H0.00V0.00H40.00V33.33H50.00V66.67H60.00V100.00H100V100Z"
    assert [label for label in texts(root, ".//small") if "peak" in label] == ["peak 3", "peak 2"]


def test_jobs_that_overlap_on_an_instance_are_busy_time_once() -> None:
    root = draw([receipt(0, 0, 10), receipt(0, 9, 20), receipt(0, 12, 15)])
    assert figures(root)["instance time busy"] == ("100 %", "20.0 s of 20.0 s")


@pytest.mark.parametrize(
    ("lives", "cost"),
    [
        ({}, "price unknown"),
        ({"i-1": Life(type="p9.huge")}, "price unknown"),
        ({"i-1": Life(type="g5.2xlarge", price=3.6)}, "$0.0200"),  # nothing is known of its launch: its jobs' time
        ({"i-1": Life(T0 - 1000, None, None, "", 3.6)}, "$0.0300"),  # and still there
        ({"i-1": Life(T0, None, T0 + 3630, "", 3.6)}, "$0.6300"),  # as far as the page goes
    ],
)
def test_the_price_is_that_of_what_is_known(lives: dict[str, Life], cost: str) -> None:
    assert figures(draw([receipt(0, 10, 30)], lives=lives))["cost"][0] == cost


def test_no_price_is_invented() -> None:
    assert price_of("g5.2xlarge", "us-west-2") == 1.212
    assert price_of("g5.2xlarge", "eu-central-1") is None
    assert price_of("p9.huge", "us-west-2") is None


EVIL = "</p><script>alert(1)</script><img src=x onerror=alert(1)>\"' style='x' &amp; \0\x1b\ud800 \ufffe 日本<\""


def test_what_others_have_written_is_text() -> None:
    error = {"kind": EVIL, "message": EVIL}
    results = [
        receipt(0, 1, 2, status="failed", error=error, instance_id=EVIL),
        receipt(0, 1, 2, outputs=[{"filename": EVIL, "type": "output"}]),
        receipt(0, 1, 2),
    ]
    picture = Picture("data:image/png;base64,AA==", EVIL, EVIL, EVIL)
    root = tree(draw_report(EVIL, results, {results[2]["job_id"]: [picture]}, {EVIL: Life(type=EVIL)}))
    clean = EVIL.replace("\0\x1b", "").replace("\ud800", "?").replace(" \ufffe ", "  ")
    assert texts(root, ".//h1") == [clean]
    failed, named, drawn = root.iterfind(".//article")
    assert texts(failed, ".//p[@class='error']") == [f"{clean} {clean}"]
    assert texts(named, ".//p[@class='none']") == [clean]
    assert [each.get("alt") for each in drawn.iter("img")] == [clean]


def test_pages_of_none_and_of_many_jobs() -> None:
    assert texts(draw([]), ".//header/p") == ["No jobs"]
    failed = {"status": "failed", "error": {"kind": "execution_error", "message": "no"}}
    results = [
        receipt(n / 10, 5 * n, 5 * n + 4, instance_id=f"i-{n % 20}", **(failed if n % 9 == 0 else {}))
        for n in range(60)
    ]
    root = draw(results)
    assert texts(root, ".//header/p")[0].endswith("60 jobs on 20 instances")
    assert figures(root)["jobs succeeded"] == ("53 of 60", "7 failed")
    assert len(widths(root, "bar")) == len(list(root.iterfind(".//article"))) == 60
    anchors = {f"#{article.get('id')}" for article in root.iterfind(".//article")}
    assert {bar.get("href") for bar in root.iter("a") if "bar" in bar.get("class", "")} == anchors


def test_receipts_of_the_same_moment_are_drawn() -> None:
    (bar,) = widths(draw([receipt(0, -1, 0)]), "bar")  # the instance's clock is behind
    assert bar == (0, 0)


@pytest.mark.parametrize(
    ("long_s", "first", "last"),
    [(13, "0 s", "12 s"), (100, "0 s", "1.5 min"), (600, "0 s", "10 min"), (500_000, "0 s", "120 h")],
)
def test_the_axis_has_round_times(long_s: float, first: str, last: str) -> None:
    ticks = list(Span(0, long_s).ticks())
    assert 3 <= len(ticks) <= 7
    assert (round_time(ticks[0]), round_time(ticks[-1])) == (first, last)
