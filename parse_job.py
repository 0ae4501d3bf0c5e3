#!/usr/bin/env python3
"""The worker, one on each GPU instance: takes jobs off the queue, runs them, stores the results.

systemd starts it through `start_service.sh comfy-manage`. It needs no arguments; its settings are the
file `env` beside it. Its rooms are in worker/.
"""

from __future__ import annotations

import logging
import signal
import sys
import threading
import time

from comfy_utils import Settings, SettingsError, aws_client, load_settings
from ground.comfyui import ComfyUI
from worker.attempts import Attempts
from worker.bucket import Bucket
from worker.comfy_care import ComfyCare
from worker.dead_letters import DEAD_LETTER_HELD_S, DeadLetters
from worker.disk import Disk
from worker.group import POLL_S, Membership
from worker.held import Held
from worker.in_hand import InHand
from worker.inputs import Inputs
from worker.intake import Intake
from worker.job import Jobs
from worker.lifecycle import Lifecycle
from worker.metadata import Metadata, instance_id_of, instance_type_of
from worker.mount import Mount
from worker.outputs import Outputs
from worker.queue import Queue
from worker.reports import Reports, set_up_logging
from worker.results import Result, Results
from worker.retry import every, within
from worker.shutdown import Shutdown
from worker.watchdog import Watchdog, notify_systemd

logger = logging.getLogger("parse_job")


# --- Your business code goes here ------------------------------------------------------------------------


def on_job_done(result: Result) -> None:
    """Called once a job's result is stored and its callback was accepted, before the message is deleted.

    `result` is what stands in result.json (docs/results.md), of a failed job as well: see its `status`. It may be
    called again for the same job when the worker dies right here, and for several jobs at the same time, since a job
    is finished beside the next one. An exception is logged and changes nothing for the job.
    """


def before_exit(instance_id: str) -> None:
    """Called before the instance is handed back to its group, also at a spot notice; not when the service is stopped.

    No job is in hand any more, and the logs are stored; what is logged here is stored once more. It has an hour
    (BEFORE_EXIT_LIMIT_S), at a spot notice less than two minutes. An exception is logged.
    """


# --- The worker ------------------------------------------------------------------------------------------

BEFORE_EXIT_LIMIT_S = 3600.0
"""A hook that hangs must not keep an instance that nobody needs."""
BEAT_S = 30.0
"""While this worker leaves, systemd and the group hear so often that it goes on."""


class Worker:
    """One instance's worker: its rooms, each with its own state, and what goes on between them."""

    def __init__(self, settings: Settings, metadata: Metadata) -> None:
        self.instance_id = instance_id_of(metadata)
        autoscaling = aws_client("autoscaling", settings.region)
        comfy = ComfyUI(settings.comfy_address)
        bucket = Bucket(aws_client("s3", settings.region), settings.s3_bucket)
        self.watchdog = Watchdog()
        self.shutdown = Shutdown(settings.max_receives, self.watchdog)
        sqs = aws_client("sqs", settings.region)
        self.queue = Queue(sqs, settings.sqs_name, settings.visibility_timeout_s)
        held = Held(settings.comfy_home / "held", self.instance_id, settings.sqs_name)
        self.in_hand = InHand(held)
        self.lifecycle = Lifecycle(metadata, autoscaling, settings.asg_name, self.instance_id, self.shutdown)
        self.membership = Membership(
            settings, autoscaling, self.queue, self.in_hand, self.shutdown, self.lifecycle, self.instance_id
        )
        self.reports = Reports(settings, bucket, self.instance_id, instance_type_of(metadata))
        outputs = Outputs(settings, comfy)
        self.results = Results(settings, bucket, comfy, outputs, self.shutdown, self.instance_id)
        mount = Mount(settings, bucket)
        self.care = ComfyCare(settings, comfy, outputs, mount, self.shutdown)
        inputs = Inputs(settings, bucket)
        self.disk = Disk(settings, mount, inputs, outputs, self.reports, self.in_hand)
        self.attempts = Attempts(settings, self.instance_id, bucket, self.results, self.reports, on_job_done)
        self.jobs = Jobs(
            settings,
            self.instance_id,
            self.in_hand,
            self.shutdown,
            self.watchdog,
            self.care,
            mount,
            self.disk,
            inputs,
            self.results,
            self.reports,
            self.attempts,
        )
        dead_letters = Queue(sqs, f"{settings.sqs_name}-dlq", DEAD_LETTER_HELD_S)
        self.dead_letters = DeadLetters(dead_letters, self.attempts, self.shutdown, self.lifecycle)
        self.intake = Intake(
            settings,
            self.queue,
            held,
            self.in_hand,
            self.shutdown,
            self.care,
            self.disk,
            self.lifecycle,
            self.membership,
            self.jobs.process,
        )

    def run(self) -> None:
        """Work until SIGTERM; leave the group when idle or told to."""
        self.queue.find(self.shutdown)
        logger.info("Worker on %s takes jobs from %s", self.instance_id, self.queue.name)
        if self.lifecycle.turn():
            self.membership.make_room()
        threading.Thread(target=self.reports.tell_of_comfyui, args=(self.shutdown,), daemon=True).start()
        threading.Thread(target=self.dead_letters.run, name="dead letters", daemon=True).start()
        intake = threading.Thread(target=self.intake.run, args=(self.watchdog,), name="intake", daemon=True)
        intake.start()
        self.watch(intake)
        if self.shutdown.spot.is_set() or (self.shutdown.drain.is_set() and not self.shutdown.stop.is_set()):
            self.leave(intake)
        else:
            self.end()

    def watch(self, intake: threading.Thread) -> None:
        """What goes on beside the jobs, until there is nothing left to wait for."""
        while (
            (intake.is_alive() or self.in_hand.leases)
            and not self.shutdown.stop.wait(0.2)
            and not self.shutdown.spot.is_set()
        ):
            self.watchdog.tell_systemd()
            if self.lifecycle.turn():
                self.membership.make_room()
            if self.membership.look_is_due() and (depth := self.membership.raise_capacity()) is not None:
                self.intake.note_depth(depth)
            self.reports.turn(self.in_hand.board(), in_group=self.lifecycle.in_group)

    def leave(self, intake: threading.Thread) -> None:
        """Hand the instance back to its group and wait to be switched off."""
        with every(BEAT_S, self.tell_that_it_goes_on):
            intake.join(POLL_S + 5)
            self.intake.give_back_all()  # at a spot notice, also what has run and is not stored yet
            logger.info("Hands the instance back")
            self.reports.upload_logs()
            self.call_before_exit()
            self.dead_letters.look()
            # A message that came after the last receive would find nobody, and nobody would be started.
            self.membership.raise_capacity()
            self.publish_last_metrics()
            self.lifecycle.complete()
            self.reports.upload_logs()
        while not self.shutdown.stop.wait(1):
            notify_systemd("WATCHDOG=1")

    def call_before_exit(self) -> None:
        """Call the hook, and go on without it when it fails or does not end."""
        try:
            within(
                "before_exit has not ended",
                BEFORE_EXIT_LIMIT_S,
                lambda: before_exit(self.instance_id),
                should_stop=lambda: False,
            )
        except Exception:
            logger.exception("before_exit failed")

    def tell_that_it_goes_on(self) -> None:
        """Or systemd would end this worker while a hook takes its time, and the group would go on without it."""
        notify_systemd("WATCHDOG=1")
        self.lifecycle.turn()

    def end(self) -> None:
        """The service is stopped: jobs in hand are given back at once, and what has run is stored.

        An empty long poll is not worth waiting for: should it bring a message after all, its lease ends by itself.
        """
        limit = time.monotonic() + 10
        while any(not lease.stored for lease in self.in_hand.leases) and time.monotonic() < limit:
            time.sleep(0.05)
        self.intake.give_back_all()
        self.reports.upload_logs()
        self.publish_last_metrics()

    def publish_last_metrics(self) -> None:
        """Send the figures that are left."""
        if self.lifecycle.in_group:
            self.reports.publish_metrics(last=True)


def main() -> int:
    """Run the worker until it is told to stop; returns the exit code."""
    try:
        settings = load_settings()
    except SettingsError as error:
        print(f"parse_job.py: {error}", file=sys.stderr)
        return 2
    set_up_logging(settings.comfy_home / "logs")
    worker = Worker(settings, Metadata())
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: worker.shutdown.stop.set())
    worker.run()
    logger.info("Worker on %s ends", worker.instance_id)
    return 0


if __name__ == "__main__":
    sys.exit(main())
