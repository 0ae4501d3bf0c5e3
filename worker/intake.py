"""The one loop that takes messages off the queue, and keeps the next jobs ready behind the one that runs."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable

from comfy_utils import QueueDepth, Settings, error_code
from worker.comfy_care import FAILURES_LIMIT, ComfyCare
from worker.errors import explain
from worker.group import POLL_S, Membership
from worker.in_hand import InHand
from worker.lease import Lease
from worker.lifecycle import Lifecycle
from worker.orders import Orders
from worker.queue import Queue
from worker.retry import backoff_s
from worker.scaling import AHEAD, GLANCE_S, jobs_to_fetch
from worker.watchdog import Watchdog

logger = logging.getLogger(__name__)

AT_ONCE = AHEAD + 8
"""So many messages are held at most: with those that have run, and whose files, receipt and callback are under way."""


class Intake:
    """Hands each message to a thread of its own, `process`, which brings it to its end and lets go of it."""

    def __init__(
        self,
        settings: Settings,
        queue: Queue,
        in_hand: InHand,
        orders: Orders,
        care: ComfyCare,
        lifecycle: Lifecycle,
        membership: Membership,
        process: Callable[[Lease], None],
    ) -> None:
        self._settings = settings
        self._queue = queue
        self._in_hand = in_hand
        self._orders = orders
        self._care = care
        self._lifecycle = lifecycle
        self._membership = membership
        self._process = process
        self._waiting = 0  # messages on the queue, as far as is known
        self._others = 0  # instances that take them besides this one
        self._glance_due = False  # is that still so?
        self._glanced_at = 0.0

    def run(self, watchdog: Watchdog) -> None:
        """Take messages until this worker leaves."""
        failures = 0
        with watchdog.watched():
            while not self._orders.is_leaving():
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
        with self._in_hand.changed:
            self._waiting, self._glance_due = depth.visible, False
            self._others = self._membership.others_at_work(depth)
            self._in_hand.changed.notify_all()

    def give_back_all(self) -> None:
        """Give back what is still in hand, such as jobs whose callback is under way."""
        for lease in list(self._in_hand.leases):
            lease.put_back(0)
            self._in_hand.let_go(lease)

    def _turn(self) -> None:
        """One turn of the loop: wait for a message, fetch some ahead, leave, or wait for a job to end."""
        if self._care.is_to_blame():
            self._membership.declare_unhealthy(f"ComfyUI failed {FAILURES_LIMIT} times in a row")
        elif self._lifecycle.warming or len(self._in_hand.leases) >= AT_ONCE:
            self._await_change()
        elif self._in_hand.not_run():
            self._fetch_ahead()
        elif self._membership.replacement.is_due:
            self._membership.leave_to_replacement()
        elif self._care.is_ready():
            self._poll()

    def _poll(self) -> None:
        """No job is in hand that has not run: wait for one."""
        cooldown_s = self._settings.scale_cooldown_s
        left_s = self._in_hand.idle_since + cooldown_s - time.monotonic()
        wait_s = max(1, min(POLL_S, math.ceil(left_s) if left_s > 0 else cooldown_s))
        if not self._take(max(1, self._room()), wait_s):
            self._membership.leave_if_idle()

    def _fetch_ahead(self) -> None:
        """Take what shall stand behind the jobs in hand, or wait for news of them."""
        if self._glance_due and time.monotonic() >= self._glanced_at + GLANCE_S:
            self._glance()
        room = self._room()
        if not room:
            self._await_change()
            return
        with self._in_hand.receiving():
            took = self._take(room, 0)
        if not took:
            # Without waiting SQS asks only some of its servers, so some may wait all the same.
            self._waiting, self._glance_due = 0, True

    def _room(self) -> int:
        """How many jobs may be fetched ahead now."""
        if self._care.has_failed() or self._membership.is_outdated() or self._membership.replacement.is_due:
            return 0
        if self._in_hand.has_retry():
            return 0
        more = jobs_to_fetch(
            waiting=self._waiting,
            others=self._others,
            in_hand=self._in_hand.not_run(),
            last_run_s=self._in_hand.last_run_s,
            running_s=self._in_hand.running_s(),
        )
        return min(more, AT_ONCE - len(self._in_hand.leases))

    def _take(self, most: int, wait_s: int) -> int:
        """Receive, and begin with each message; returns how many came."""
        messages = self._queue.receive(most, wait_s)
        leases = [Lease(self._queue, message, self._settings.visibility_timeout_s) for message in messages]
        # What was given back before may be a job that kills ComfyUI, and all that stand behind it.
        for lease in sorted(leases, key=lambda lease: lease.attempt):
            self._in_hand.take(lease)
            threading.Thread(target=self._process, args=(lease,), name=lease.message_id, daemon=True).start()
            self._waiting -= self._others + 1  # they, too, take one after the other
        if leases:
            self._glance_due = self._waiting <= 0
        return len(leases)

    def _glance(self) -> None:
        """See whether more messages wait, so that they are fetched ahead; nothing else is decided by it."""
        self._glanced_at = time.monotonic()
        try:
            self.note_depth(self._queue.depth())
        except Exception as error:
            logger.info("Nothing is fetched ahead for now: %s", explain(error))

    def _await_change(self) -> None:
        """Wait until something changes with the jobs in hand, half a second at most."""
        with self._in_hand.changed:
            self._in_hand.changed.wait(0.5)

    def _await_news(self, seconds: float) -> None:
        """Wait so long, unless this worker leaves."""
        limit = time.monotonic() + seconds
        while time.monotonic() < limit and not self._orders.is_leaving():
            time.sleep(0.1)
