"""What EC2 and the Auto Scaling group want of this instance; how it reports for work, and is handed back.

A spot notice and the group's termination are only noted here, in worker/shutdown.py: that is what the threads of jobs
ask all the time, and what gives their messages back (worker/job.py). parse_job.py then says goodbye.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

from comfy_utils import HOOK_NAME, LAUNCHING_HOOK_NAME, error_code
from worker.errors import explain
from worker.metadata import Metadata, MetadataError
from worker.shutdown import Shutdown

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 5
"""How often the instance metadata is asked; AWS advises 5 s for spot notices."""
BEAT_EVERY_S = 60
"""How often more time is asked for, while ComfyUI comes up and while the last job ends."""
REPORTS_LIMIT = 3
"""So often it is tried to report for work: a group without a warm pool has no hook for it, which AWS tells only so; and
the action may begin a little later than we come."""


class Lifecycle:
    """Reads the instance metadata, and answers the group's termination hook."""

    def __init__(
        self, metadata: Metadata, autoscaling: Any, asg_name: str, instance_id: str, shutdown: Shutdown
    ) -> None:
        self.in_group = False
        self.warming = False  # in the warm pool: it boots only to be stopped, and takes nothing
        self._metadata = metadata
        self._autoscaling = autoscaling
        of_instance = {"AutoScalingGroupName": asg_name, "InstanceId": instance_id}
        self._hook = {"LifecycleHookName": HOOK_NAME, **of_instance}
        self._launching_hook = {"LifecycleHookName": LAUNCHING_HOOK_NAME, **of_instance}
        self._reports_left = REPORTS_LIMIT
        self._next_report = 0.0
        self._shutdown = shutdown
        self._next_look = self._next_beat = 0.0

    def turn(self) -> bool:
        """Called several times a second: looks and beats when that is due; returns what `look` does."""
        now = time.monotonic()
        if self._shutdown.drain.is_set() and self.in_group and now >= self._next_beat:
            self._next_beat = now + BEAT_EVERY_S
            self.beat(self._hook)
        elif self.in_group and self._reports_left and now >= self._next_beat:
            self._next_beat = now + BEAT_EVERY_S
            self.beat(self._launching_hook)
        if now < self._next_look:
            return False
        self._next_look = now + LOOK_EVERY_S
        return self.look()

    def look(self) -> bool:
        """Read what EC2 and the group want of this instance; returns whether EC2 advises to leave while there is time."""
        try:
            state = self._metadata.get("autoscaling/target-lifecycle-state")
            notice = self._metadata.get("spot/instance-action")
            rebalance = self._metadata.get("events/recommendations/rebalance")
        except MetadataError:
            return False  # the base machine may be no EC2 instance at all
        self.in_group = state is not None
        warming = state is not None and state.startswith("Warmed:")
        if warming != self.warming:
            self.warming = warming
            self._reports_left = REPORTS_LIMIT
            logger.info("In the warm pool: nothing is taken" if warming else "In service: jobs are taken")
        if notice is not None and not self._shutdown.spot.is_set():
            logger.warning("Spot notice: the instance is taken away, its job is given back")
            self._shutdown.spot.set()
        if state == "Terminated" and not self._shutdown.drain.is_set():
            logger.info("The group takes this instance: nothing new is taken")
            self._shutdown.drain.set()
        return rebalance is not None and self.in_group and not self._shutdown.is_leaving()

    def report_for_work(self) -> None:
        """ComfyUI answers: what waits for this instance's launching hook goes on. Called again and again, does it once.

        Without a hook AWS stops an instance of the warm pool while it still boots, so a group with a pool has one; then
        each instance goes into service only when it can work.
        """
        now = time.monotonic()
        if not (self.in_group and self._reports_left) or now < self._next_report or self._shutdown.is_leaving():
            return
        self._next_report = now + LOOK_EVERY_S
        self._reports_left -= 1
        try:
            self._autoscaling.complete_lifecycle_action(**self._launching_hook, LifecycleActionResult="CONTINUE")
            self._reports_left = 0
            logger.info("Reported for work")
        except Exception as error:
            if error_code(error) != "ValidationError":
                logger.warning("Reports for work again in %d s: %s", LOOK_EVERY_S, explain(error))

    def beat(self, hook: Mapping[str, str]) -> None:
        """Ask for more time: ComfyUI is not up yet, or the last job has not ended."""
        try:
            self._autoscaling.record_lifecycle_action_heartbeat(**hook)
        except Exception as error:
            if hook is self._hook or error_code(error) != "ValidationError":
                logger.info("No lifecycle heartbeat: %s", explain(error))

    def complete(self) -> None:
        """Let the group go on with the termination; without it the hook's timeout does."""
        delay_s = 0.25
        for _ in range(10):
            try:
                self._autoscaling.complete_lifecycle_action(**self._hook, LifecycleActionResult="CONTINUE")
            except Exception as error:
                # The hook may not have begun yet, just after we asked to be terminated.
                logger.info("Lifecycle action not completed yet: %s", explain(error))
                if self._shutdown.stop.wait(delay_s):
                    return
                delay_s = min(delay_s * 2, 30)
            else:
                logger.info("Lifecycle action completed")
                return
