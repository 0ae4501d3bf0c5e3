"""This instance in its Auto Scaling group: raising what is wanted, leaving, being replaced.

The hands; what is decided is decided in worker/scaling.py.
"""

from __future__ import annotations

import logging
import math
import random
import time
from typing import Any

from comfy_utils import (
    FAILED_BOOTS_TAG,
    Capacity,
    Group,
    QueueDepth,
    Settings,
    error_code,
    raise_capacity,
    read_group,
)
from ground.launches import capacity_problem
from worker.errors import explain
from worker.in_hand import InHand
from worker.lifecycle import LOOK_EVERY_S, Lifecycle
from worker.queue import Queue
from worker.scaling import LOOK_S, QueueHistory, Replacement, leaving_turn, long_jobs, may_leave, others_at_work
from worker.shutdown import Shutdown

logger = logging.getLogger(__name__)

POLL_S = 20
"""SQS's longest long poll: the fewest calls while idle."""
GROUP_AGE_S = 300
"""So long an idle worker believes what it knows of its group, unless it is about to leave."""


class Membership:
    """Knows how queue and group stood when they were last looked at."""

    def __init__(
        self,
        settings: Settings,
        autoscaling: Any,
        queue: Queue,
        in_hand: InHand,
        shutdown: Shutdown,
        lifecycle: Lifecycle,
        instance_id: str,
    ) -> None:
        self.replacement = Replacement()
        self._settings = settings
        self._autoscaling = autoscaling
        self._queue = queue
        self._in_hand = in_hand
        self._shutdown = shutdown
        self._lifecycle = lifecycle
        self._instance_id = instance_id
        self._history = QueueHistory(settings.scale_cooldown_s)
        self._jitter = random.Random(instance_id)  # so that workers started together do not ask together
        self._next_look = self._looked_at = time.monotonic()
        self._group: Group | None = None
        self._group_read_at = -math.inf
        self._problem_said: str | None = None
        self._scaling_off_said = False

    # --- Looking -----------------------------------------------------------------------------------------

    def look_is_due(self) -> bool:
        """Whether it is time to look if more instances are called for: while there are jobs, and after each."""
        has_news = bool(self._in_hand.leases) or self._in_hand.took_at > self._looked_at
        return has_news and time.monotonic() >= self._next_look

    def is_outdated(self) -> bool:
        """Whether this instance was launched from a template version that counts no more."""
        return self._group is not None and self._instance_id in self._group.outdated

    def others_at_work(self, depth: QueueDepth) -> int:
        """How many other instances take jobs, as far as is known."""
        return others_at_work(self._group, self._instance_id, depth, len(self._in_hand.leases))

    def _look(self) -> QueueDepth:
        """Look how the queue stands, and set when to look again."""
        now = self._looked_at = time.monotonic()
        # Idle, it is after every second poll, which makes five calls a minute in all.
        pace_s = LOOK_S * self._jitter.uniform(0.8, 1.2) if self._in_hand.leases else 2 * POLL_S - 1
        self._next_look = now + min(pace_s, max(1.0, self._settings.scale_cooldown_s / 4))
        depth = self._queue.depth()
        self._history.add(now, depth)
        return depth

    def _read_group(self) -> None:
        """Ask how the group stands."""
        self._note_group(read_group(self._autoscaling, self._settings.asg_name))

    def _note_group(self, group: Group | None) -> None:
        """Remember how the group stood."""
        self._group = group
        self._group_read_at = time.monotonic()
        # This one works. What failed of a later version may still be that version's fault.
        if group is not None and group.failed_boots is not None and not self.is_outdated():
            self._forget_failed_boots(group.failed_boots)

    def _forget_failed_boots(self, failed: str) -> None:
        """Instances before this one did not come to work; what made them fail is not in all of them."""
        try:
            tag = {
                "ResourceId": self._settings.asg_name,
                "ResourceType": "auto-scaling-group",
                "Key": FAILED_BOOTS_TAG,
            }
            self._autoscaling.delete_tags(Tags=[tag])
            logger.info("The group's tag %s=%s is removed: this instance works", FAILED_BOOTS_TAG, failed)
        except Exception as error:
            logger.warning("The group's tag %s stays for now: %s", FAILED_BOOTS_TAG, explain(error))

    # --- More instances ----------------------------------------------------------------------------------

    def raise_capacity(self) -> QueueDepth | None:
        """Raise the group to what the queue calls for. A failed read means no action.

        Returns how the queue stands; None where that is not known.
        """
        seen: QueueDepth | None = None
        try:
            depth = seen = self._look()
            jobs = long_jobs(self._history, depth, self._in_hand.running_s())
            # What was fetched ahead waits as well, only not on the queue.
            ahead = min(self._in_hand.behind(), depth.in_flight)
            depth = QueueDepth(depth.visible + ahead, depth.in_flight - ahead)
            held = len(self._in_hand.leases)
            if self._shutdown.drain.is_set() and held:
                # What it still finishes is no job for the others.
                depth = depth._replace(in_flight=max(0, depth.in_flight - held))
                if not depth.visible:
                    return seen
            capacity = raise_capacity(
                self._autoscaling,
                self._settings.asg_name,
                depth,
                self._settings.backlogsize_per_instance,
                jobs,
            )
        except Exception as error:
            logger.warning("Capacity is left as it is: %s", explain(error))
            return seen
        if capacity is not None:
            self._note_group(capacity.group)
            self._consider_replacement(depth)
            if capacity.after > capacity.before:
                logger.info("Adjusted ASG capacity to %d", capacity.after)
            self._say_what_is_missing(capacity)
        elif not self._scaling_off_said:
            self._scaling_off_said = True
            logger.info("There is no group %s: scaling is off", self._settings.asg_name)
        return seen

    def _say_what_is_missing(self, capacity: Capacity) -> None:
        """Log why instances that are wanted do not come, once for each reason."""
        problem = None
        if capacity.missing > 0:
            try:
                problem = capacity_problem(self._autoscaling, self._settings.asg_name)
            except Exception as error:
                problem = f"why cannot be seen: {explain(error)}"
        if problem and problem != self._problem_said:
            logger.warning("%d of %d instances are not there yet: %s", capacity.missing, capacity.after, problem)
        self._problem_said = problem

    # --- Leaving -----------------------------------------------------------------------------------------

    def leave_if_idle(self) -> None:
        """End this instance when its group can do without it: see may_leave."""
        now = time.monotonic()
        cooled_at = self._in_hand.idle_since + self._settings.scale_cooldown_s
        is_due = now >= self._next_look or self._looked_at < cooled_at <= now
        if not self._lifecycle.in_group or self._in_hand.leases or not is_due:
            return
        depth = self._look()
        if self._group is None or now > self._group_read_at + GROUP_AGE_S or self.replacement.is_asked:
            self._read_group()
        self._consider_replacement(depth)
        if not self._is_superfluous(depth):
            return
        self._read_group()  # what is decided is decided on how the group stands now
        # More than are wanted are there after an operator has lowered that: one that leaves lowers it no further.
        decrement = self._group is not None and len(self._group.in_service) <= self._group.desired
        if self._is_superfluous(depth) and self._leave(decrement=decrement):
            logger.info("Idle for %.0f s: leaves the group", now - self._in_hand.idle_since)

    def make_room(self) -> None:
        """Leave while there is time, because EC2 expects to take this spot instance soon."""
        logger.warning("EC2 recommends to rebalance: nothing new is taken, the job in hand is finished")
        try:
            if not self._leave(decrement=True):
                self._leave(decrement=False)
        except Exception as error:
            logger.warning("Asks its group again in %d s: %s", LOOK_EVERY_S, explain(error))

    def leave_to_replacement(self) -> None:
        """Leave the group to the instance that was started in this one's place. No job is in hand that has not run."""
        try:
            logger.info("Outdated: leaves the group")
            self._leave(decrement=self.replacement.decrement)
        finally:
            self.replacement.forget()

    def declare_unhealthy(self, reason: str) -> None:
        """Have the group replace this instance; its messages are back."""
        if not self._lifecycle.in_group:
            return
        logger.error("%s: this instance is declared Unhealthy", reason)
        self._autoscaling.set_instance_health(
            InstanceId=self._instance_id, HealthStatus="Unhealthy", ShouldRespectGracePeriod=False
        )
        self._shutdown.drain.set()

    def _is_superfluous(self, depth: QueueDepth) -> bool:
        """Whether the group can do without this idle instance, as it was when it was read."""
        now, group = time.monotonic(), self._group
        if group is None:
            return False
        there = max(group.desired, len(group.in_service))
        if there <= group.min_size:
            return False
        return may_leave(
            self._history,
            depth,
            now=now,
            idle_s=now - self._in_hand.idle_since,
            cooldown_s=self._settings.scale_cooldown_s,
            desired=there,
            turn=leaving_turn(self._instance_id, group.in_service, time.time()),
        )

    def _leave(self, *, decrement: bool) -> bool:
        """Have the group end this instance, and want one fewer; False where that would be below its minimum."""
        try:
            self._autoscaling.terminate_instance_in_auto_scaling_group(
                InstanceId=self._instance_id, ShouldDecrementDesiredCapacity=decrement
            )
        except Exception as error:
            if error_code(error) != "ValidationError":
                raise
            self._in_hand.stay()
            logger.info("Stays, the group is at its minimum: %s", error)
            return False
        self._shutdown.drain.set()
        return True

    # --- Being replaced ----------------------------------------------------------------------------------

    def _consider_replacement(self, depth: QueueDepth) -> None:
        """Where this instance was launched from a template version that counts no more, have it replaced."""
        group = self._group
        if group is None or self._shutdown.is_leaving():
            return
        step = self.replacement.step(group, self._instance_id, depth, time.monotonic())
        if step != "launch":
            return
        logger.info("This instance is outdated: another is started in its place, and then it leaves")
        try:
            self._autoscaling.set_desired_capacity(
                AutoScalingGroupName=self._settings.asg_name, DesiredCapacity=group.desired + 1, HonorCooldown=False
            )
        except Exception as error:
            self.replacement.forget()
            logger.warning("No other instance is started in its place: %s", explain(error))
