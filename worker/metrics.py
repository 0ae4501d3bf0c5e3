"""What the worker did, as CloudWatch takes it."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

METRIC_S = 60
METRIC_IDLE_MINUTES = 5
METRICS_KEPT = 150
"""So many figures wait at most where CloudWatch cannot be reached; it takes 1000 in a call."""
VALUES_KEPT = 150
"""CloudWatch takes so many different values of a figure."""


class Metrics:
    """What the worker did, as CloudWatch takes it: a set of figures each minute."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._minute_began = self._ticked_at = time.monotonic()
        self._busy_s = 0.0
        self._counts = {"JobsSucceeded": 0, "JobsFailed": 0}
        self._seconds: dict[str, Counter[float]] = {"WaitSeconds": Counter(), "RunSeconds": Counter()}
        self._waiting: deque[dict[str, Any]] = deque(maxlen=METRICS_KEPT)
        self._minutes = 0  # that are in those
        self._was_busy = False  # in one of them

    def add_job(self, result: Mapping[str, Any]) -> None:
        """Count a job that has its receipt."""
        with self._lock:
            self._counts["JobsFailed" if result["error"] else "JobsSucceeded"] += 1
            for name, key in (("WaitSeconds", "wait_s"), ("RunSeconds", "run_s")):
                values, value = self._seconds[name], float(result["timings"][key])
                # Tenths, or seconds where too many differ.
                value = round(value, 1 if len(values) < VALUES_KEPT / 2 else 0)
                if value in values or len(values) < VALUES_KEPT:
                    values[value] += 1

    def add_boot(self, report: dict[str, Any]) -> None:
        """Take in how many seconds each phase of the boot took."""
        with self._lock:
            self._waiting.extend(
                {
                    "MetricName": "BootSeconds",
                    "Dimensions": [{"Name": "Phase", "Value": phase}],
                    "Timestamp": datetime.now(UTC),
                    "Unit": "Seconds",
                    "Value": seconds,
                }
                for phase, seconds in report.get("phases", {}).items()
            )

    def tick(self, now: float, *, busy: bool) -> None:
        """Called several times a second: measures how busy the GPU is, and ends a minute."""
        with self._lock:
            self._busy_s += (now - self._ticked_at) * busy
            self._ticked_at = now
            if now - self._minute_began >= METRIC_S:
                self._end_minute(now)

    def _end_minute(self, now: float) -> None:
        share = min(100.0, 100 * self._busy_s / max(0.001, now - self._minute_began))
        figures: list[dict[str, Any]] = [{"MetricName": "BusyShare", "Unit": "Percent", "Value": round(share, 1)}]
        figures += [
            {"MetricName": name, "Unit": "Count", "Value": float(count)}
            for name, count in self._counts.items()
            if count
        ]
        figures += [
            {"MetricName": name, "Unit": "Seconds", "Values": list(values), "Counts": [*map(float, values.values())]}
            for name, values in self._seconds.items()
            if values
        ]
        self._waiting.extend(figure | {"Timestamp": datetime.now(UTC)} for figure in figures)
        self._minutes += 1
        self._was_busy = self._was_busy or len(figures) > 1 or share > 0
        self._minute_began, self._busy_s = now, 0.0
        self._counts = dict.fromkeys(self._counts, 0)
        self._seconds = {name: Counter() for name in self._seconds}

    def due(self, now: float, *, last: bool) -> list[dict[str, Any]]:
        """The figures to send now: each minute's, those of an idle worker five minutes at once, all at the end.

        They wait until `sent` is told of them, and are due again a minute later.
        """
        with self._lock:
            if last:
                self._end_minute(now)
            elif self._minutes < (1 if self._was_busy else METRIC_IDLE_MINUTES):
                return []
            self._minutes, self._was_busy = 0, False
            return list(self._waiting)

    def sent(self, count: int) -> None:
        """The first `count` figures are in CloudWatch."""
        with self._lock:
            for _ in range(min(count, len(self._waiting))):
                self._waiting.popleft()
