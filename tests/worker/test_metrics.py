"""The figures that a worker sends to CloudWatch."""

from __future__ import annotations

import json
import time
from typing import Any

from local_cloud import Fault, LocalCloud
from workplace import await_that, image_workflow
from workshop import Calls, Fleet, speed_up, start

from worker.metrics import METRICS_KEPT, Metrics


def receipt(wait_s: float, run_s: float, error: str | None = None) -> dict[str, Any]:
    return {"error": error and {"message": error}, "timings": {"wait_s": wait_s, "run_s": run_s}}


def test_each_minute_has_its_figures() -> None:
    metrics = Metrics()
    now = metrics._minute_began
    for number in range(61):
        metrics.tick(now + number, busy=number <= 15)
    assert [figure["MetricName"] for figure in metrics.due(now + 60, last=False)] == ["BusyShare"]
    for job in (receipt(1.24, 2), receipt(1.21, 3), receipt(9, 3, "no")):
        metrics.add_job(job)
    figures = {figure["MetricName"]: figure for figure in metrics.due(now + 61, last=True)[1:]}
    assert figures["JobsSucceeded"]["Value"] == 2
    assert figures["JobsFailed"]["Value"] == 1
    assert (figures["WaitSeconds"]["Values"], figures["WaitSeconds"]["Counts"]) == ([1.2, 9.0], [2.0, 1.0])
    assert metrics.due(now, last=True)[0]["Value"] == 25.0, "it waits until it has been sent"


def test_an_idle_workers_minutes_are_sent_five_at_once_and_figures_never_pile_up() -> None:
    metrics = Metrics()
    start = metrics._minute_began
    for minute in range(1, 5):
        metrics.tick(start + 60 * minute, busy=False)
        assert not metrics.due(start + 60 * minute, last=False)
    metrics.tick(start + 300, busy=False)
    assert len(metrics.due(start + 300, last=False)) == 5
    metrics.sent(5)
    for minute in range(6, 1000):
        metrics.add_job(receipt(minute, minute * 1.7))
        metrics.tick(start + 60 * minute, busy=True)
    for second in range(1000):
        metrics.add_job(receipt(second, second))
    figures = metrics.due(start, last=True)
    assert len(figures) <= METRICS_KEPT
    assert max(len(figure.get("Values", ())) for figure in figures) <= 150, "CloudWatch takes no more"


def test_the_figures_reach_cloudwatch_and_a_refusal_is_said_once(
    cloud: LocalCloud, fleet: Fleet, calls: Calls
) -> None:
    site, _ = fleet
    speed_up(site, "worker/metrics.py", {"METRIC_S = 60": "METRIC_S = 1"})
    report = {"phases": {"mount": 1.5}, "comfyui_started_at": time.time()}
    (site.folder / "logs/boot.json").write_text(json.dumps(report))
    calls.next("PutMetricData", Fault(403, "AccessDenied"), times=2)
    start(site)
    assert site.await_result(site.send(image_workflow(3)))["status"] == "succeeded"

    def published() -> set[str]:
        found = cloud.client("cloudwatch").list_metrics(Namespace=f"{site.prefix}/{site.env}")["Metrics"]
        return {metric["MetricName"] for metric in found}

    expected = {"BusyShare", "JobsSucceeded", "WaitSeconds", "RunSeconds", "BootSeconds"}
    await_that("all figures are there", lambda: published() == expected)
    assert site.log().count("Cannot publish figures") == 1
    assert "cloudwatch:PutMetricData)" in site.log()
