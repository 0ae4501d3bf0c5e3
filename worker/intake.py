"""The one loop that takes messages off the queue, and keeps the next jobs ready behind the one that runs."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from comfy_utils import QueueDepth, Settings, error_code
from worker.comfy_care import ComfyCare
from worker.disk import Disk
from worker.errors import explain
from worker.group import POLL_S, Membership
from worker.held import Held
from worker.in_hand import InHand
from worker.lease import Lease
from worker.lifecycle import Lifecycle
from worker.queue import Queue
from worker.retry import backoff_s
from worker.scaling import AHEAD, GLANCE_S, jobs_to_fetch
from worker.shutdown import Shutdown
from worker.watchdog import Watchdog

logger = logging.getLogger(__name__)

AT_ONCE = AHEAD + 8
"""So many messages are held at most: with those that have run, and whose files, receipt and callback are under way."""


@dataclass(eq=False)
class Intake:
    """Hands each message to a thread of its own, `process`, which brings it to its end and lets go of it."""

    settings: Settings
    queue: Queue
    held: Held
    in_hand: InHand
    shutdown: Shutdown
    care: ComfyCare
    disk: Disk
    lifecycle: Lifecycle
    membership: Membership
    process: Callable[[Lease], None]
    _waiting: int = 0  # messages on the queue, as far as is known
    _others: int = 0  # instances that take them besides this one
    _glance_due: bool = False  # is that still so?
    _glanced_at: float = 0.0

    def run(self, watchdog: Watchdog) -> None:
        """Take messages until this worker leaves."""
        failures = 0
        with watchdog.watched():
            self._take_over()
            while not self.shutdown.is_leaving():
                watchdog.turn()
                try:
                    self._turn()
                    failures = 0
                except Exception as error:
                    failures += 1
                    delay_s = backoff_s(failures)
                    logger.error("Going on in %.0f s: %s", delay_s, explain(error), exc_info=not error_code(error))
                    self._await_news(delay_s)

    def note_depth(self, depth: QueueDepth) -> None:
        """Take in how many messages wait, and how many others take them."""
        with self.in_hand.changed:
            self._waiting, self._glance_due = depth.visible, False
            self._others = self.membership.others_at_work(depth)
            self.in_hand.changed.notify_all()

    def give_back_all(self) -> None:
        """Give back what is still in hand, such as jobs whose callback is under way."""
        for lease in list(self.in_hand.leases):
            lease.put_back(0)
            self.in_hand.let_go(lease)

    def _turn(self) -> None:
        """One turn of the loop: wait for a message, fetch some ahead, leave, or wait for a job to end."""
        if reason := self.care.blame() or self.disk.blame():
            self.membership.declare_unhealthy(reason)
            self.care.forgive()
            self.disk.forgive()
        elif self.lifecycle.warming:
            if self.care.is_ready():
                self.lifecycle.report_for_work()
            self._await_change()
        elif len(self.in_hand.leases) >= AT_ONCE:
            self._await_change()
        elif self.in_hand.not_run():
            self._fetch_ahead()
        elif self.membership.replacement.is_due:
            self.membership.leave_to_replacement()
        elif self.disk.is_full():
            self._await_change()
        elif self.care.is_ready():
            self.lifecycle.report_for_work()
            self._poll()

    def _poll(self) -> None:
        """No job is in hand that has not run: wait for one."""
        cooldown_s = self.settings.scale_cooldown_s
        left_s = self.in_hand.idle_since + cooldown_s - time.monotonic()
        wait_s = max(1, min(POLL_S, math.ceil(left_s) if left_s > 0 else cooldown_s))
        if not self._take(max(1, self._room()), wait_s):
            self.membership.leave_if_idle()

    def _fetch_ahead(self) -> None:
        """Take what shall stand behind the jobs in hand, or wait for news of them."""
        if self._glance_due and time.monotonic() >= self._glanced_at + GLANCE_S:
            self._glance()
        room = self._room()
        if not room:
            self._await_change()
            return
        with self.in_hand.receiving():
            took = self._take(room, 0)
        if not took:
            # Without waiting SQS asks only some of its servers, so some may wait all the same.
            self._waiting, self._glance_due = 0, True

    def _room(self) -> int:
        """How many jobs may be fetched ahead now."""
        if self.care.has_failed() or self.membership.is_outdated() or self.membership.replacement.is_due:
            return 0
        if self.disk.blame() or self.disk.problem():
            return 0
        more = jobs_to_fetch(
            waiting=self._waiting,
            others=self._others,
            in_hand=self.in_hand.not_run(),
            last_run_s=self.in_hand.last_run_s,
            running_s=self.in_hand.running_s(),
        )
        return min(more, AT_ONCE - len(self.in_hand.leases))

    def _take(self, most: int, wait_s: int) -> int:
        """Receive, and begin with each message; returns how many came."""
        messages = self.queue.receive(most, wait_s)
        leases = [Lease(self.queue, message, self.settings.visibility_timeout_s) for message in messages]
        with self.in_hand.changed:
            self._waiting -= len(leases) * (self._others + 1)  # they, too, take one after the other
            self._glance_due = self._glance_due or (bool(leases) and self._waiting <= 0)
        for lease in leases:
            self.in_hand.take(lease)
            self._begin(lease)
        return len(leases)

    def _take_over(self) -> None:
        """Go on with what a worker before this one, which was killed, had in hand.

        Where ComfyUI is gone as well, as after a power cut, another instance may be sooner.
        """
        for note in self.held.left_behind():
            message = note["message"]
            is_ready = self.care.comfy.is_ready()
            try:
                self.queue.hide(message["ReceiptHandle"], self.settings.visibility_timeout_s if is_ready else 0)
            except Exception as error:
                logger.info("Message %s of the worker before is left alone: %s", message["MessageId"], explain(error))
                is_ready = False
            if not is_ready:
                self.held.forget(message["MessageId"])
                continue
            logger.info("Takes over message %s, which the worker before had in hand", message["MessageId"])
            lease = Lease(self.queue, message, self.settings.visibility_timeout_s, note["received_at"])
            self.in_hand.take_over(lease)
            self._begin(lease)

    def _begin(self, lease: Lease) -> None:
        """Bring a message to its end in a thread of its own."""
        threading.Thread(target=self.process, args=(lease,), name=lease.message_id, daemon=True).start()

    def _glance(self) -> None:
        """See whether more messages wait, so that they are fetched ahead; nothing else is decided by it."""
        self._glanced_at = time.monotonic()
        try:
            self.note_depth(self.queue.depth())
        except Exception as error:
            logger.info("Nothing is fetched ahead for now: %s", explain(error))

    def _await_change(self) -> None:
        """Wait until something changes with the jobs in hand, half a second at most."""
        with self.in_hand.changed:
            self.in_hand.changed.wait(0.5)

    def _await_news(self, seconds: float) -> None:
        """Wait so long, unless this worker leaves."""
        limit = time.monotonic() + seconds
        while time.monotonic() < limit and not self.shutdown.is_leaving():
            time.sleep(0.1)
