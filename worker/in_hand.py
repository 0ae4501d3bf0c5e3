"""The messages this worker has in hand, and how far the job of each one is."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Any, NamedTuple

from comfy_utils import iso
from ground.comfyui import JobStoppedError
from worker.held import Held
from worker.lease import Lease


class Running(NamedTuple):
    """A job that runs: since when, and what worker.json says of it."""

    since: float
    news: dict[str, Any]


class InHand:
    """Written by the loop that takes messages and by the threads of their jobs; `changed` guards it and wakes them."""

    def __init__(self, held: Held) -> None:
        self._held = held
        self.changed = threading.Condition()
        self.leases: list[Lease] = []
        self.took_at = 0.0  # when the last message came
        self.idle_since = time.monotonic()
        self.last_run_s: float | None = None
        self.is_receiving = False
        self._running: dict[str, Running] = {}
        self._workflows = 0  # that are in ComfyUI's queue, or about to be
        self._alone_waiting = 0
        self._alone_runs = False

    def take(self, lease: Lease) -> None:
        """A message has come."""
        self._held.note(lease.message, lease.received_at, taken_over=False)
        self.take_over(lease)

    def take_over(self, lease: Lease) -> None:
        """A message is in hand that a worker before this one had received, and that is noted already."""
        with self.changed:
            self.took_at = time.monotonic()
            self.leases.append(lease)

    def note_run(self, lease: Lease) -> None:
        """A job has run to its end, or never will."""
        with self.changed:
            lease.has_run = True
            self.changed.notify_all()

    def let_go(self, lease: Lease, delay_s: int = 0) -> None:
        """The message is no longer ours; a worker that put it back stays until it can be received again."""
        self._held.forget(lease.message_id)
        with self.changed, suppress(ValueError):
            self.idle_since = time.monotonic() + delay_s
            self.leases.remove(lease)
            self.changed.notify_all()

    def stay(self) -> None:
        """Begin anew to be idle, because the group wants this instance."""
        with self.changed:
            self.idle_since = time.monotonic()

    def not_run(self) -> int:
        """How many jobs have not run to their end."""
        return sum(not lease.has_run for lease in list(self.leases))

    def behind(self) -> int:
        """How many of those have not begun, either."""
        return max(0, self.not_run() - len(self._running))

    def is_before_others(self, job_id: str) -> bool:
        """Whether the job runs and others stand behind it in ComfyUI's queue."""
        return job_id in self._running and self._workflows > len(self._running)

    def running_s(self) -> float:
        """How long the job that runs has run, 0 where none does."""
        return max((time.monotonic() - job.since for job in list(self._running.values())), default=0.0)

    def board(self) -> list[dict[str, Any]]:
        """What worker.json says of the jobs that run."""
        return [dict(job.news) for job in list(self._running.values())]

    def claim(self, lease: Lease, job_id: str, should_stop: Callable[[], bool]) -> None:
        """Wait until no other message of the same job is in hand. Raises JobStoppedError."""
        with self.changed:
            while any(other.job_id == job_id for other in self.leases):
                if should_stop():
                    raise JobStoppedError
                self.changed.wait(0.5)
            lease.job_id = job_id

    def await_received(self) -> None:
        """Wait for a receive that is under way, which might bring back a message that is given back during it."""
        with self.changed:
            self.changed.wait_for(lambda: not self.is_receiving, timeout=5)

    @contextmanager
    def receiving(self) -> Iterator[None]:
        """While the with-block runs, a receive that does not wait is under way."""
        with self.changed:
            self.is_receiving = True
        try:
            yield
        finally:
            with self.changed:
                self.is_receiving = False
                self.changed.notify_all()

    @contextmanager
    def running(self, job_id: str, should_stop: Callable[[], bool], *, alone: bool) -> Iterator[None]:
        """Workflows pass together, what is to run alone only when nothing else does. Raises JobStoppedError."""
        with self.changed:
            self._alone_waiting += alone
            try:
                while self._alone_runs or (self._workflows if alone else self._alone_waiting):
                    if should_stop():
                        raise JobStoppedError
                    self.changed.wait(0.5)
            finally:
                self._alone_waiting -= alone
                self.changed.notify_all()
            self._alone_runs = alone
            self._workflows += not alone
        try:
            yield
        finally:
            with self.changed:
                if alone:
                    self._alone_runs = False
                else:
                    self._workflows -= 1
                ran = self._running.pop(job_id, None)
                if ran is not None:
                    self.last_run_s = time.monotonic() - ran.since
                self.changed.notify_all()

    def note_running(self, job_id: str) -> None:
        """The job begins to run now, if it had not begun before."""
        with self.changed:
            if job_id not in self._running:
                news = {"job_id": job_id, "since": iso(datetime.now(UTC))}
                self._running[job_id] = Running(time.monotonic(), news)
            self.changed.notify_all()

    def note_run_time(self, seconds: float) -> None:
        """How long the last job really ran, where that is known better than by when its thread heard of it."""
        with self.changed:
            self.last_run_s = seconds

    def note_progress(self, job_id: str, news: dict[str, Any]) -> None:
        """How far a job is that runs."""
        with self.changed:
            if job_id in self._running:
                self._running[job_id].news.update(news)
