#!/usr/bin/env python3
"""The worker, one on each GPU instance: takes jobs off the queue, runs them, stores the results.

systemd starts it through `start_service.sh comfy-manage`. It needs no arguments; its settings are the
file `env` beside it.
"""

from __future__ import annotations

import gzip
import hashlib
import hmac
import ipaddress
import json
import logging
import logging.handlers
import math
import mimetypes
import os
import random
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import urlsplit

from comfy_utils import (
    HOOK_NAME,
    OBJECT_INFO_KEY,
    Capacity,
    ComfyGoneError,
    ComfyStalledError,
    ComfyUI,
    Finished,
    Group,
    InvalidMessageError,
    InvalidWorkflowError,
    Job,
    JobCancelledError,
    JobStoppedError,
    JobTimeoutError,
    Metadata,
    MetadataError,
    NothingToRunError,
    OutputFile,
    QueueDepth,
    Settings,
    SettingsError,
    Workflow,
    WorkflowRefusedError,
    aws_client,
    cancel_key,
    capacity_problem,
    check_workflow,
    error_code,
    error_of,
    explain_node_errors,
    job_error,
    load_settings,
    new_job_id,
    outputs_of,
    own_outputs,
    parse_message,
    queue_depth,
    raise_capacity,
    read_group,
    result_key,
    started_at,
    use_inputs,
)

logger = logging.getLogger("parse_job")

T = TypeVar("T")
Result = dict[str, Any]
"""What result.json holds; its fields are listed in the README."""


# --- Your business code goes here ------------------------------------------------------------------------


def on_job_done(result: Result) -> None:
    """Called once a job's result is stored and its callback was accepted, before the message is deleted.

    `result` is what stands in result.json. It may be called again for the same job when the worker
    dies right here, and for several jobs at the same time, since a job is finished beside the next one. An
    exception is logged and changes nothing for the job.
    """


def before_exit(instance_id: str) -> None:
    """Called once before the instance is handed back to its group, after the last job and the logs."""


# --- The worker ------------------------------------------------------------------------------------------

POLL_S = 20
"""SQS's longest long poll: the fewest calls while idle."""
LIFECYCLE_POLL_S = 5
"""How often the instance metadata is asked; AWS advises 5 s for spot notices."""
GROUP_AGE_S = 300
"""So long an idle worker believes what it knows of its group, unless it is about to leave."""
LOG_UPLOAD_S = 300
HEARTBEAT_S = 60
PROGRESS_S = 5
WORKER_NEWS_S = 30
TURN_LIMIT_S = 240
"""A lane that has not turned for so long hangs; systemd's WatchdogSec must be longer."""
RECEIVE_LIMIT_S = 43_200
"""SQS holds a received message for 12 hours at most, however often its visibility is extended."""
COMFY_BACK_S = 60
"""So long a job that ComfyUI had not started when it died is kept; then it is for another instance."""
COMFY_FAILURES_LIMIT = 2
"""After so many failures of ComfyUI in a row the instance is declared Unhealthy."""
AWS_PATIENCE_S = 600
"""How long a worker with a job in hand waits for S3 or SQS to recover."""
CALLBACK_TRIES = 3
LANES = 4
"""So many jobs a worker has in hand at most that have not run to their end: one runs, the others come next."""
MESSAGES_AT_ONCE = LANES + 8
"""With those that have run, and whose files, receipt and callback are under way."""
UPLOADS_AT_ONCE = 8
PART_BYTES = 8 * 1024 * 1024
"""A larger file is uploaded in parts, several at once."""
COMMAND_OUTPUT_BYTES = 4096
STOP_S = 3
"""So long the running job waits, when all are given back, for those behind it to be taken out of the queue."""
USUAL_RUNS = 100
"""Of so many kinds of workflows it is remembered how long they run, for those who wait."""
CANCEL_S = 5
"""How often it is looked whether a running job was cancelled."""
FIRST_LOOK_S = 2
"""So long a job waits for the first look, which mostly has answered before it is asked."""
WORKFLOW_LIMIT_BYTES = 16 * 1024 * 1024
"""A workflow from the bucket is read into memory."""
INPUTS_LIMIT_S = 600
"""So long may all inputs of a job take together, however slowly a server sends."""
INTERRUPT_S = 60
"""An interrupt takes effect at the next node or sampler step; a node that takes longer is stuck."""


class PutBackError(Exception):
    """The job did not end, and another try may help: the message goes back to the queue."""


class NeverStartedError(PutBackError):
    """The job had not begun to run when ComfyUI was gone."""


@dataclass(frozen=True)
class Ran:
    """What became of a job's run."""

    started_at: datetime
    finished: Finished | None = None
    """What ComfyUI says of a workflow that it ran to an end."""
    values: dict[str, dict[str, Any]] = field(default_factory=dict)
    error: dict[str, Any] | None = None


class Worker:
    """One instance's worker. `run` is the whole story; everything below it is a step of it."""

    def __init__(self, settings: Settings, metadata: Metadata) -> None:
        self.settings = settings
        self.metadata = metadata
        self.comfy = ComfyUI(settings.comfy_address)
        self.sqs = aws_client("sqs", settings.region)
        self.s3 = aws_client("s3", settings.region)
        self.autoscaling = aws_client("autoscaling", settings.region)
        self.instance_id = instance_id_of(metadata)
        self.instance_type = instance_type_of(metadata)
        self.queue_url = ""
        self.stop = threading.Event()  # SIGTERM: give everything back and exit
        self.spot = threading.Event()  # the machine is taken away in two minutes
        self.drain = threading.Event()  # the group takes this instance: finish the job, take nothing new
        self.leases: list[Lease] = []  # the messages in hand
        self.look_due = threading.Event()  # a message was taken: are more instances called for?
        self.history = QueueHistory(settings.scale_cooldown_s)
        self.jitter = random.Random(self.instance_id)  # so that workers started together do not ask together
        self.next_look = self.looked_at = time.monotonic()
        self.board: dict[str, dict[str, Any]] = {}  # by job id, what worker.json says of it
        self.board_told: list[dict[str, Any]] | None = None
        self.group: Group | None = None
        self.group_read_at = -math.inf
        self.capacity_said: str | None = None
        self.idle_since = time.monotonic()
        self.answered_at: float | None = None  # when ComfyUI last did
        self.warmed_up = settings.warmup_workflow is None
        self.comfy_failures = 0  # in a row
        self.comfy_failed_at = self.restarted_at = -math.inf
        self.in_group = False
        self.warming = False  # in the warm pool: it boots only to be stopped, and takes nothing
        self.scaling_off_said = False
        self.metrics = Metrics()
        self.metrics_failed = False
        self.cloudwatch: Any = None
        self.logs_stored: dict[str, tuple[int, int]] = {}  # log -> its size and time when it was uploaded
        self.uploads = ThreadPoolExecutor(UPLOADS_AT_ONCE, thread_name_prefix="upload")
        # What the lanes agree on; `turn` guards it and wakes those that wait.
        self.turn = threading.Condition()
        self.turned_at: dict[str, float] = {}  # lane -> when it last turned
        self.polling = False  # one lane waits at the queue, for all
        self.failures = 0  # in a row, of any lane
        self.quiet_until = -math.inf  # no lane takes anything before, because something has failed
        self.fetching = 0  # lanes that fetch a job ahead just now
        self.taken = 0  # jobs in hand that have not run to their end
        self.running: dict[str, float] = {}  # job -> since when it runs
        self.last_run_s: float | None = None
        self.usual_runs_s: dict[str, float] = {}  # a workflow's nodes -> how long the last one of them ran
        self.waiting = 0  # messages on the queue, as far as is known
        self.glance_due = False  # is that still so?
        self.others = 0  # instances that the group wants besides this one
        self.workflows = self.commands_waiting = 0
        self.command_runs = False
        self.replacement = Replacement()

    def run(self) -> None:
        """Work until SIGTERM; leave the group when idle or told to."""
        self.queue_url = self.find_queue()
        logger.info("Worker on %s takes jobs from %s", self.instance_id, self.settings.sqs_name)
        self.look_at_lifecycle()
        threading.Thread(target=self.store_object_info, daemon=True).start()
        lanes = [threading.Thread(target=self.work, name=f"lane {n + 1}", daemon=True) for n in range(LANES)]
        self.turned_at = {lane.name: time.monotonic() for lane in lanes}
        for lane in lanes:
            lane.start()
        self.watch(lanes)
        if self.spot.is_set() or (self.drain.is_set() and not self.stop.is_set()):
            limit = time.monotonic() + POLL_S + 5
            for lane in lanes:
                lane.join(max(0, limit - time.monotonic()))
            self.give_back_all()
            self.leave()
        else:
            # Jobs in hand are given back at once, and what has run is stored. An empty long poll is not worth
            # waiting for: should it bring a message after all, its lease ends by itself.
            limit = time.monotonic() + 10
            while any(not lease.stored for lease in self.leases) and time.monotonic() < limit:
                time.sleep(0.05)
            self.give_back_all()
            self.upload_logs()
            self.publish_metrics(last=True)

    def work(self) -> None:
        """A lane: one message after the other. Several stand in ComfyUI's queue, so that it never waits for us."""
        while not self.is_leaving():
            try:
                turn = self.await_turn()
                if turn is None:
                    continue
                message = None
                try:
                    if turn == "leave":
                        self.leave_to_replacement()
                    elif turn == "ahead" or self.comfyui_answers():
                        message = self.receive(ahead=turn == "ahead")
                    if turn == "poll" and message is None:
                        self.leave_if_idle()
                finally:
                    self.end_turn(turn, took=message is not None)
                if message is not None:
                    self.process_one_message(message)
                if self.comfy_failures >= COMFY_FAILURES_LIMIT:
                    self.declare_unhealthy()
                self.failures = 0
            except Exception as error:
                self.failures += 1
                delay_s = backoff_s(self.failures)
                self.quiet_until = time.monotonic() + delay_s
                logger.error("Going on in %.0f s: %s", delay_s, explain(error), exc_info=not error_code(error))

    def await_turn(self) -> str | None:
        """What this lane is to do: "poll" the queue for all, fetch a job "ahead", or "leave" to a replacement.

        None: nothing now.
        """
        with self.turn:
            self.should_stop()
            is_quiet = time.monotonic() < self.quiet_until
            if not (self.polling or self.warming or is_quiet or self.is_leaving()):
                if self.replacement.is_due and self.taken == 0:
                    self.polling = True
                    return "leave"
                if not self.replacement.is_due and len(self.leases) < MESSAGES_AT_ONCE:
                    if self.taken == 0:
                        self.polling = True
                        return "poll"
                    if self.may_fetch_ahead():
                        self.taken += 1
                        self.fetching += 1
                        return "ahead"
            self.turn.wait(0.5)
        return None

    def end_turn(self, turn: str, *, took: bool) -> None:
        """The receive is over, and `took` a message or not."""
        with self.turn:
            if turn != "ahead":
                self.polling = False
                self.taken += took
            else:
                self.fetching -= 1
            if turn == "ahead" and not took:
                self.taken -= 1
                self.waiting = 0
            if took:
                self.waiting -= self.others + 1  # they, too, take one after the other
                self.glance_due = self.waiting <= 0
            self.turn.notify_all()

    def end_run(self) -> None:
        """A job in hand has run to its end, or never will."""
        with self.turn:
            self.taken -= 1
            self.turn.notify_all()

    def may_fetch_ahead(self) -> bool:
        """Whether a job may be taken now that will stand behind those in hand. `turn` is held."""
        group = self.group
        if self.comfy_failed_at >= (self.answered_at or 0) or (group and self.instance_id in group.outdated):
            return False
        if any(lease.attempt > 1 and not lease.stored for lease in self.leases):
            return False  # a job that was given back before may be one that kills ComfyUI, and all behind it
        return may_fetch_ahead(
            waiting=self.waiting,
            others=self.others,
            in_hand=self.taken,
            last_run_s=self.last_run_s,
            running_s=self.running_s(),
        )

    def running_s(self) -> float:
        """How long the job that runs has run, 0 where none does."""
        return max((time.monotonic() - since for since in list(self.running.values())), default=0.0)

    @contextmanager
    def running_job(self, job_id: str, lease: Lease, cancel: CancelWatch, *, alone: bool) -> Iterator[None]:
        """Workflows pass together, a command only when nothing else runs."""
        with self.turn:
            self.commands_waiting += alone
            try:
                while self.command_runs or (self.workflows if alone else self.commands_waiting):
                    if cancel.should_stop() or self.gives_back(lease):
                        raise JobStoppedError
                    self.turn.wait(0.5)
            finally:
                self.commands_waiting -= alone
                self.turn.notify_all()
            if alone:
                self.command_runs = True
            else:
                self.workflows += 1
        try:
            yield
        finally:
            with self.turn:
                if alone:
                    self.command_runs = False
                else:
                    self.workflows -= 1
                since = self.running.pop(job_id, None)
                self.board.pop(job_id, None)
                if since is not None:
                    self.last_run_s = time.monotonic() - since
                self.turn.notify_all()

    def note_running(self, job_id: str) -> None:
        """The job begins to run now, if it had not begun before."""
        with self.turn:
            if job_id not in self.running:
                self.running[job_id] = time.monotonic()
                self.board[job_id] = {"job_id": job_id, "since": iso(datetime.now(UTC))}
            self.turn.notify_all()

    def watch(self, lanes: list[threading.Thread]) -> None:
        """What goes on beside the lanes, until there is nothing left to wait for."""
        next_lifecycle = next_beat = next_glance = next_news = 0.0
        next_upload = time.monotonic() + LOG_UPLOAD_S
        while (
            (any(lane.is_alive() for lane in lanes) or self.leases)
            and not self.stop.wait(0.2)
            and not self.spot.is_set()
        ):
            now = time.monotonic()
            turned_at = [self.turned_at[lane.name] for lane in lanes if lane.is_alive()]
            if now < min(turned_at, default=now) + TURN_LIMIT_S:
                notify_systemd("WATCHDOG=1")
            if now >= next_lifecycle:
                next_lifecycle = now + LIFECYCLE_POLL_S
                self.look_at_lifecycle()
            if self.drain.is_set() and self.in_group and now >= next_beat:
                next_beat = now + HEARTBEAT_S
                self.beat()
            if (self.look_due.is_set() or self.leases) and now >= self.next_look:
                self.look_due.clear()
                self.raise_capacity()
            if self.glance_due and now >= next_glance:
                next_glance = now + GLANCE_S
                self.glance()
            if now >= next_news and self.tell_of_jobs():
                next_news = now + WORKER_NEWS_S
            if now >= next_upload:
                next_upload = now + LOG_UPLOAD_S
                self.upload_logs()
            self.metrics.tick(now, busy=bool(self.running))
            self.publish_metrics()

    def is_leaving(self) -> bool:
        """Whether nothing new is to be taken."""
        return self.stop.is_set() or self.spot.is_set() or self.drain.is_set()

    def gives_back(self, lease: Lease) -> bool:
        """Whether a job that has not started is to go back to the queue, because this worker leaves.

        On its last attempt it would end in the dead-letter queue. So it is run after all, where there is time.
        """
        last = lease.attempt >= self.settings.max_receives
        return self.stop.is_set() or self.spot.is_set() or (self.drain.is_set() and not last)

    def should_stop(self) -> bool:
        """Whether running jobs are to be given back at once. Asked all the time, so it shows that a lane turns."""
        name = threading.current_thread().name
        if name in self.turned_at:
            self.turned_at[name] = time.monotonic()
        return self.stop.is_set() or self.spot.is_set()

    # --- One message -------------------------------------------------------------------------------------

    def process_one_message(self, message: dict[str, Any]) -> None:
        """Bring one message to its end: result stored, callback accepted, message deleted; or put it back."""
        lease = Lease(self.sqs, self.queue_url, message, self.settings.visibility_timeout_s)
        self.leases.append(lease)
        self.look_due.set()
        result: Result | None = None
        ran: Ran | None = None
        try:
            with self.putting_back(lease), CancelWatch(self.is_cancelled, self.should_stop) as cancel:
                if self.gives_back(lease):
                    raise JobStoppedError
                try:
                    job, invalid = understand(message)
                except NothingToRunError as reason:
                    self.drop(lease, reason)
                    return
                self.claim(job.id, lease)
                logger.info("Job %s: attempt %d", job.id, lease.attempt)
                cancel.watch(job.id)
                result = self.insist(lambda: self.stored_result(job.id))
                if result is None:
                    ran = self.run_job(job, invalid, lease, cancel)
                else:
                    lease.stored = True
                    logger.info("Job %s has its result already: not run again", job.id)
        finally:
            self.end_run()
        if result is not None or ran is not None:
            # The GPU does not wait for S3, nor for somebody's server.
            threading.Thread(target=self.finish, args=(job, ran, result, lease), daemon=True).start()

    def claim(self, job_id: str, lease: Lease) -> None:
        """Wait until no other lane has a message of the same job in hand."""
        while True:
            with self.turn:
                if all(other.job_id != job_id for other in self.leases):
                    lease.job_id = job_id
                    return
            if self.should_stop() or self.gives_back(lease):
                raise JobStoppedError
            time.sleep(0.1)

    def finish(self, job: Job, ran: Ran | None, result: Result | None, lease: Lease) -> None:
        """What comes after the run: files, receipt, callback, and the message is deleted."""
        with self.putting_back(lease):
            if result is None and ran is not None:
                stored = self.result_of(job, ran, lease)
                result = self.insist(lambda: self.store_result(stored))
                lease.stored = True
                self.metrics.add_job(result)
            assert result is not None
            self.call_back(job, result)
            try:
                on_job_done(result)
            except Exception:
                logger.exception("on_job_done failed for job %s", job.id)
            if lease.lost:
                logger.warning("Job %s: its lease was lost, so its message comes again and is deleted then", job.id)
            else:
                self.insist(lambda: self.sqs.delete_message(QueueUrl=self.queue_url, ReceiptHandle=lease.receipt))
            lease.end()
            self.remove_local_files(job.id)
            self.remove_inputs(job, result)
            self.let_go(lease)
            reason = f" ({result['error']['message']})" if result["error"] else ""
            logger.info("Job %s: %s%s", job.id, result["status"], reason)

    @contextmanager
    def putting_back(self, lease: Lease) -> Iterator[None]:
        """Where the block raises, the message goes back to the queue."""
        try:
            yield
        except JobStoppedError:
            logger.info("Message %s is given back: it is not to run here", lease.message_id)
            lease.end()
            with self.turn:  # or a receive that is under way here brings it again
                self.turn.wait_for(lambda: not self.fetching, timeout=5)
            self.put_back(lease.message, delay_s=0)
            self.let_go(lease)
        except Exception as error:
            # The delay doubles with each attempt. After MAX_RECEIVES SQS moves it to the dead-letter queue.
            # A job that stood in the queue of a ComfyUI which died has not failed: it is for anyone, at once, if
            # that helps.
            at_once = isinstance(error, NeverStartedError) and lease.attempt == 1
            delay_s = 0 if at_once else min(5 * 2 ** (lease.attempt - 1), 300)
            logger.warning(
                "Message %s is put back for %d s after attempt %d of %d: %s",
                lease.message_id,
                delay_s,
                lease.attempt,
                self.settings.max_receives,
                explain(error),
                exc_info=not (isinstance(error, PutBackError) or error_code(error)),
            )
            lease.end()
            self.put_back(lease.message, delay_s)
            self.let_go(lease, delay_s)

    def insist(self, action: Callable[[], T]) -> T:
        """Call until AWS does it: a job that has run is not given back, and no attempt used up, for an outage.

        Raises the error after AWS_PATIENCE_S, and at once one that is not AWS's.
        """
        from botocore.exceptions import BotoCoreError

        limit = time.monotonic() + AWS_PATIENCE_S
        failures = 0
        while True:
            try:
                return action()
            except Exception as error:
                if not (error_code(error) or isinstance(error, BotoCoreError)) or time.monotonic() > limit:
                    raise
                failures += 1
                delay_s = backoff_s(failures)
                logger.warning("Trying again in %.0f s: %s", delay_s, explain(error))
                self.pause(delay_s)

    def pause(self, seconds: float) -> None:
        """Wait, unless this worker is to stop: then raise JobStoppedError."""
        limit = time.monotonic() + seconds
        while time.monotonic() < limit:
            if self.should_stop():
                raise JobStoppedError
            time.sleep(0.1)

    def let_go(self, lease: Lease, delay_s: int = 0) -> None:
        """The message is no longer ours; a worker that put it back stays until it can be received again."""
        self.idle_since = time.monotonic() + delay_s
        with self.turn, suppress(ValueError):
            self.leases.remove(lease)
            self.turn.notify_all()

    def give_back_all(self) -> None:
        """Give back what is still in hand, such as jobs whose callback is under way."""
        for lease in list(self.leases):
            lease.end()
            self.put_back(lease.message, delay_s=0)
            self.let_go(lease)

    def run_job(self, job: Job, invalid: str | None, lease: Lease, cancel: CancelWatch) -> Ran:
        """Run the job to its end; raises PutBackError or JobStoppedError."""
        now = datetime.now(UTC)
        if invalid is not None:
            return Ran(now, error=job_error("invalid_message", invalid))
        if cancel.came_first():
            return Ran(now, error=job_error("cancelled", "the job was cancelled before its turn"))
        progress: Progress | None = None
        try:
            if job.command is not None:
                with self.running_job(job.id, lease, cancel, alone=not self.settings.exec_cmd_beside):
                    now = datetime.now(UTC)
                    self.note_running(job.id)
                    values, error = self.run_command(job.id, job.command, cancel.should_stop)
                    return Ran(now, values=values, error=error)
            workflow = own_outputs(job.workflow or self.insist(lambda: self.fetch_workflow(job)), job.id)
            workflow = self.fetch_inputs(job, workflow, cancel.should_stop)
            nodes = " ".join(sorted(node["class_type"] for node in workflow.values()))
            progress = Progress(workflow, job.id, self.instance_id, self.usual_runs_s.get(nodes))
            with self.running_job(job.id, lease, cancel, alone=False):
                try:
                    began_at, finished = self.run_workflow(job, workflow, progress, lease, cancel)
                except NeverStartedError:
                    # It stood behind another, which may have killed ComfyUI. To give it back would use up an attempt.
                    if not self.comfyui_comes_back(lease):
                        raise
                    logger.info("Job %s had not started: ComfyUI is back, once more", job.id)
                    began_at, finished = self.run_workflow(job, workflow, progress, lease, cancel)
        except InvalidWorkflowError as reason:
            return Ran(now, error=job_error("invalid_workflow", str(reason)))
        except WorkflowRefusedError as refused:
            return Ran(now, error=refused.error)
        except JobCancelledError:
            began_at = progress.started_at if progress else None
            when = "while it ran" if began_at else "before its turn"
            return Ran(began_at or now, error=job_error("cancelled", f"the job was cancelled {when}"))
        except JobTimeoutError:
            error = job_error("timeout", f"the job ran longer than JOB_TIMEOUT={self.settings.job_timeout_s} s")
            return Ran((progress and progress.started_at) or now, error=error)
        ran = Ran(began_at or progress.started_at or now, finished, error=error_of(finished.entry))
        if ran.error is None:
            self.usual_runs_s[nodes] = (datetime.now(UTC) - ran.started_at).total_seconds()
            if len(self.usual_runs_s) > USUAL_RUNS:
                del self.usual_runs_s[next(iter(self.usual_runs_s))]
        return ran

    def result_of(self, job: Job, ran: Ran, lease: Lease) -> Result:
        """Store the files of a job that has run, and return its result."""
        outputs: list[dict[str, Any]] = []
        warnings: list[str] = []
        values, error = ran.values, ran.error
        if ran.finished is not None:
            warnings = [f"dropped: {text}" for text in explain_node_errors(ran.finished.node_errors)]
            warnings += [f"blocked: {ran.finished.blocked}"] if ran.finished.blocked else []
            files, values = outputs_of(ran.finished.entry)
            outputs, missing = self.insist(lambda: self.store_files(job.id, files))
            if missing and any(file.type == "temp" for file in files) and self.has_forgotten(job.id):
                raise PutBackError(f"{missing[0]}: ComfyUI empties its temp folder when it starts")
            if missing and error is None:
                error = job_error("execution_error", missing[0])
            warnings += missing
        finished_at = datetime.now(UTC)
        return {
            "job_id": job.id,
            "status": "failed" if error else "succeeded",
            "env": self.settings.env,
            "instance_id": self.instance_id,
            "attempt": lease.attempt,
            "outputs": outputs,
            "values": values,
            "warnings": warnings,
            "error": error,
            **({"source": job.source} if job.source else {}),
            "timings": {
                "sent_at": iso(lease.sent_at),
                "started_at": iso(ran.started_at),
                "finished_at": iso(finished_at),
                "wait_s": round((ran.started_at - lease.sent_at).total_seconds(), 3),
                "run_s": round((finished_at - ran.started_at).total_seconds(), 3),
            },
        }

    def has_forgotten(self, job_id: str) -> bool:
        """Whether ComfyUI was restarted after it ran the job."""
        try:
            return self.comfy.history(job_id) is None
        except ComfyGoneError:
            return True

    def run_workflow(
        self, job: Job, workflow: Workflow, progress: Progress, lease: Lease, cancel: CancelWatch
    ) -> tuple[datetime | None, Finished]:
        """Run the workflow in ComfyUI; out of memory is tried once more on freed memory.

        Returns since when it ran, as ComfyUI has it, and how it ended.
        """
        began_at: datetime | None = None
        submitted_at = time.monotonic()
        stopped_at: list[float] = []

        def note(event: dict[str, Any]) -> None:
            if event["type"] == "execution_start":
                self.note_running(job.id)
            progress.note(event)

        def should_stop() -> bool:
            """Those behind it are taken out first, or they would begin to run."""
            if not cancel.should_stop():
                return False
            stopped_at.append(time.monotonic())
            is_first = job.id in self.running and self.workflows > len(self.running)
            return not is_first or time.monotonic() > stopped_at[0] + STOP_S

        def should_withdraw() -> bool:
            """Others may start it sooner than we can. An attempt is used up, so not the last ones."""
            too_long = self.running_s() > AHEAD_LIMIT_S and time.monotonic() - submitted_at > AHEAD_LIMIT_S
            return self.gives_back(lease) or (too_long and lease.attempt < self.settings.max_receives - 1)

        with every(PROGRESS_S, lambda: self.store_progress(progress)):
            for again in (False, True):
                try:
                    finished = self.comfy.run(
                        workflow,
                        job.id,
                        timeout_s=self.settings.job_timeout_s,
                        stall_s=self.settings.stall_timeout_s,
                        on_progress=note,
                        should_stop=should_stop,
                        should_withdraw=should_withdraw,
                        before_first_submit=lambda: self.remove_local_files(job.id),  # of a try cut short
                        again=again,
                    )
                except (JobTimeoutError, JobCancelledError):
                    self.await_free_executor(job.id)
                    raise
                except ComfyGoneError as error:
                    self.note_comfy_failure(submitted_at)
                    if isinstance(error, ComfyStalledError):
                        self.restart_comfyui(submitted_at)
                    raise (PutBackError if progress.started_at else NeverStartedError)(str(error)) from error
                self.comfy_failures = 0
                began_at = began_at or started_at(finished.entry)
                if (error_of(finished.entry) or {}).get("kind") != "out_of_memory":
                    return began_at, finished
                logger.warning("Job %s ran out of memory%s", job.id, " again" if again else ": freeing, one more try")
                with suppress(ComfyGoneError):
                    self.comfy.free()
        raise PutBackError("out of memory, also after ComfyUI freed its own")

    def note_comfy_failure(self, since: float) -> None:
        """Count a failure of ComfyUI that began after `since`, once for all jobs that it lost."""
        with self.turn:
            self.comfy_failures += since > self.comfy_failed_at
            self.comfy_failed_at = time.monotonic()

    def run_command(
        self, job_id: str, command: str, should_stop: Callable[[], bool]
    ) -> tuple[dict[str, dict[str, Any]], dict[str, Any] | None]:
        """Run a shell command in a process group of its own; its output's last 4 KB go into the result."""
        allowed = self.settings.exec_cmd
        if allowed == "never" or (allowed == "base" and self.settings.env != "base"):
            message = f"commands do not run here: EXEC_CMD={allowed} and ENV={self.settings.env}"
            return {}, job_error("command_refused", message)
        deadline = time.monotonic() + self.settings.job_timeout_s
        with tempfile.TemporaryFile() as output:
            process = subprocess.Popen(
                ["/bin/bash", "-c", command],
                cwd=self.settings.comfy_home,
                env=os.environ | {"COMFY_JOB_ID": job_id},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            cancelled = False
            try:
                while process.poll() is None:
                    if should_stop():
                        raise JobStoppedError
                    if time.monotonic() > deadline:
                        break
                    time.sleep(0.05)
            except JobCancelledError:
                cancelled = True
            finally:
                exit_code = process.poll()
                # The whole group, because a command's children must not outlive it.
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            output.seek(max(0, output.seek(0, os.SEEK_END) - COMMAND_OUTPUT_BYTES))
            text = output.read().decode(errors="replace")
        values = {"command": {"exit_code": exit_code, "output": text}}
        if cancelled:
            return values, job_error("cancelled", "the command was cancelled while it ran")
        if exit_code is None:
            return values, job_error(
                "timeout", f"the command ran longer than JOB_TIMEOUT={self.settings.job_timeout_s} s"
            )
        if exit_code != 0:
            return values, job_error("command_failed", f"the command ended with exit code {exit_code}", detail=text)
        return values, None

    # --- The queue ---------------------------------------------------------------------------------------

    def find_queue(self) -> str:
        """The queue's address; waits for a queue that is not there yet rather than spin through restarts."""
        failures = 0
        while True:
            try:
                return str(self.sqs.get_queue_url(QueueName=self.settings.sqs_name)["QueueUrl"])
            except Exception as error:
                failures += 1
                delay_s = backoff_s(failures)
                name = self.settings.sqs_name
                logger.error("Cannot find the queue %s, again in %.0f s: %s", name, delay_s, explain(error))
                notify_systemd("WATCHDOG=1")
                if self.stop.wait(delay_s):
                    sys.exit(0)

    def receive(self, *, ahead: bool) -> dict[str, Any] | None:
        """Receive one message; where none is fetched ahead, wait for it.

        The visibility timeout is named, so a queue made by hand works too.
        """
        cooldown_s = self.settings.scale_cooldown_s
        left = self.idle_since + cooldown_s - time.monotonic()
        wait_s = max(1, min(POLL_S, math.ceil(left) if left > 0 else cooldown_s))
        answer = self.sqs.receive_message(
            QueueUrl=self.queue_url,
            MaxNumberOfMessages=1,
            WaitTimeSeconds=0 if ahead else wait_s,
            VisibilityTimeout=self.settings.visibility_timeout_s,
            MessageSystemAttributeNames=["ApproximateReceiveCount", "SentTimestamp"],
        )
        messages = answer.get("Messages") or [None]
        return messages[0]  # type: ignore[no-any-return]

    def put_back(self, message: dict[str, Any], delay_s: int) -> None:
        """Let the message be received again, by anyone, after `delay_s`."""
        try:
            self.sqs.change_message_visibility(
                QueueUrl=self.queue_url, ReceiptHandle=message["ReceiptHandle"], VisibilityTimeout=delay_s
            )
        except Exception as error:
            logger.warning("Message %s comes back when its lease ends: %s", message["MessageId"], explain(error))

    def depth(self) -> QueueDepth:
        """How many messages wait and how many are held."""
        return queue_depth(self.sqs, self.queue_url)

    # --- Files and results -------------------------------------------------------------------------------

    def fetch_workflow(self, job: Job) -> Workflow:
        """The workflow of a message that only points to it."""
        if job.source not in (None, f"s3://{self.settings.s3_bucket}/{job.workflow_key}"):
            raise InvalidWorkflowError(f"{job.source} is not in this environment's bucket {self.settings.s3_bucket}")
        try:
            answer = self.s3.get_object(Bucket=self.settings.s3_bucket, Key=job.workflow_key)
        except self.s3.exceptions.NoSuchKey:
            raise InvalidWorkflowError(f"there is no {job.workflow_key} in {self.settings.s3_bucket}") from None
        if answer["ContentLength"] > WORKFLOW_LIMIT_BYTES:
            answer["Body"].close()
            raise InvalidWorkflowError(f"{job.workflow_key} has more than {WORKFLOW_LIMIT_BYTES} bytes")
        body = answer["Body"].read()
        try:
            return check_workflow(json.loads(body))
        except (ValueError, RecursionError):
            raise InvalidWorkflowError(f"{job.workflow_key} is not JSON: send the job again") from None

    def store_files(self, job_id: str, named: list[OutputFile]) -> tuple[list[dict[str, Any]], list[str]]:
        """Upload the files that history names and all others in the job's folder.

        Returns the `outputs` of the result, and a sentence for each named file that is not there (as
        when ComfyUI served it from its cache after the file was deleted).
        """
        root = self.settings.output_dir
        found: list[tuple[dict[str, Any], Path]] = []
        missing: list[str] = []
        for file in named:
            path = self.local_path(file)
            if path is None or not path.is_file():
                missing.append(f"node {file.node_id}: its file {file.subfolder}/{file.filename} is not there")
            else:
                found.append((file._asdict(), path))
        # Checkpoint and LoRA savers write files without any entry in the history.
        folder = root / job_id
        seen = {path for _, path in found}
        ours = {folder / "result.json", folder / "progress.json"}  # seen through Mountpoint on the base machine
        for path in sorted(folder.rglob("*")):
            if path.is_file() and not path.is_symlink() and path not in seen and path not in ours:
                file = OutputFile("", "files", path.name, path.parent.relative_to(root).as_posix(), "output")
                found.append((file._asdict() | {"node_id": None}, path))

        def upload(output: dict[str, Any], path: Path) -> dict[str, Any]:
            return {**output, "s3_key": self.upload(job_id, path, output["type"])}

        if len(found) == 1:  # as mostly
            return [upload(*found[0])], missing
        return list(self.uploads.map(upload, *zip(*found, strict=True))) if found else [], missing

    def local_path(self, file: OutputFile) -> Path | None:
        """Where ComfyUI put the file; None for a place outside its folders."""
        roots = {"output": self.settings.output_dir, "temp": self.settings.comfy_home / "ComfyUI/temp"}
        root = roots.get(file.type)
        parts = PurePosixPath(file.subfolder, file.filename)
        if root is None or parts.is_absolute() or ".." in parts.parts:
            return None
        return root / parts

    def upload(self, job_id: str, path: Path, type_: str) -> str:
        """Bring a file into the bucket and return its key. Streamed, in parts when large.

        On the base machine Mountpoint has mostly brought it there already: one HEAD tells. On a fleet
        instance a file outside the job's folder goes there all the same, since two instances may use
        the same name.
        """
        if type_ == "temp":
            key = f"output/{job_id}/temp/{path.name}"
        else:
            relative = path.relative_to(self.settings.output_dir).as_posix()
            own = relative.startswith(f"{job_id}/") or self.settings.env == "base"
            key = f"output/{relative}" if own else f"output/{job_id}/{relative}"
        if self.settings.env != "base" or self.object_size(key) != path.stat().st_size:
            content_type = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
            if path.stat().st_size > PART_BYTES:
                extra = {"ContentType": content_type}
                self.s3.upload_file(str(path), self.settings.s3_bucket, key, ExtraArgs=extra)
            else:  # without the threads that upload_file starts
                with path.open("rb") as file:
                    self.s3.put_object(Bucket=self.settings.s3_bucket, Key=key, Body=file, ContentType=content_type)
        return key

    def object_size(self, key: str) -> int | None:
        """Bytes of an object in the bucket; None when there is none."""
        head = self.head(key)
        return None if head is None else int(head["ContentLength"])

    def head(self, key: str) -> dict[str, Any] | None:
        """What S3 says of an object in the bucket; None when there is none."""
        try:
            return dict(self.s3.head_object(Bucket=self.settings.s3_bucket, Key=key))
        except Exception as error:
            if error_code(error) in ("404", "NoSuchKey"):
                return None
            raise

    def remove_local_files(self, job_id: str) -> None:
        """Free the instance's disk of a job's files: they are in the bucket, or of no use."""
        if self.settings.env == "base":
            return  # there the output folder is the bucket itself
        remove_folder(self.settings.output_dir / job_id)

    def stored_result(self, job_id: str) -> Result | None:
        """The job's result.json, None while it has none."""
        try:
            body = self.s3.get_object(Bucket=self.settings.s3_bucket, Key=result_key(job_id))["Body"].read()
        except self.s3.exceptions.NoSuchKey:
            return None
        result: Result = json.loads(body)
        return result

    def store_result(self, result: Result) -> Result:
        """Write result.json, unless another worker was first; return the one that stands."""
        try:
            self.s3.put_object(
                Bucket=self.settings.s3_bucket,
                Key=result_key(result["job_id"]),
                Body=json.dumps(result).encode(),
                ContentType="application/json",
                IfNoneMatch="*",
            )
        except Exception as error:
            if error_code(error) not in ("PreconditionFailed", "ConditionalRequestConflict"):
                raise
            stored = self.stored_result(result["job_id"])
            if stored is None:
                raise PutBackError("another worker is writing this job's result") from error
            logger.warning("Job %s: another worker stored its result first", result["job_id"])
            return stored
        return result

    def store_progress(self, progress: Progress) -> None:
        """Write progress.json if something changed since the last time."""
        news = progress.news()
        if news is not None:
            seen = {name: news.get(name) for name in ("node_title", "value", "max")}
            self.board.get(progress.job_id, {}).update(seen)
            self.s3.put_object(
                Bucket=self.settings.s3_bucket,
                Key=f"output/{progress.job_id}/progress.json",
                Body=json.dumps(news).encode(),
                ContentType="application/json",
            )

    def tell_of_jobs(self) -> bool:
        """Write worker.json, by which an operator sees what this instance does; False when there is nothing new."""
        jobs = [dict(job) for job in list(self.board.values())]
        if jobs == self.board_told:
            return False
        news = {"instance_id": self.instance_id, "instance_type": self.instance_type, "jobs": jobs}
        try:
            self.s3.put_object(
                Bucket=self.settings.s3_bucket,
                Key=f"output/{self.instance_id}/worker.json",
                Body=json.dumps(news | {"updated_at": iso(datetime.now(UTC))}).encode(),
                ContentType="application/json",
            )
            self.board_told = jobs
        except Exception as error:
            logger.info("worker.json is not written: %s", explain(error))
        return True

    def call_back(self, job: Job, result: Result) -> None:
        """POST the result to the job's callback, signed; raises PutBackError when it is not accepted."""
        url = job.callback_url or self.settings.callback_url
        reason = ""
        for attempt in range(CALLBACK_TRIES if url else 0):
            if attempt:
                self.pause(backoff_s(attempt))
            reason = post_result(url, result, self.settings.callback_secret)
            if not reason:
                return
            logger.info("The callback of job %s failed: %s", job.id, reason)
        if reason:
            raise PutBackError(f"the callback of job {job.id} failed: {reason}")

    # --- Cancelled, and nothing to run -------------------------------------------------------------------

    def is_cancelled(self, job_id: str) -> bool:
        """Whether the job's sender has cancelled it."""
        return self.head(cancel_key(job_id)) is not None

    def drop(self, lease: Lease, reason: Exception) -> None:
        """Delete a message that asks for nothing."""
        logger.info("Message %s asks for nothing: %s", lease.message_id, reason)
        self.insist(lambda: self.sqs.delete_message(QueueUrl=self.queue_url, ReceiptHandle=lease.receipt))
        lease.end()
        self.let_go(lease)

    # --- A job's inputs ----------------------------------------------------------------------------------

    def fetch_inputs(self, job: Job, workflow: Workflow, should_stop: Callable[[], bool]) -> Workflow:
        """Fetch the job's inputs and return the workflow with their names in ComfyUI's input folder.

        Each run has a folder of its own, so that none touches what another reads: the same job may still be
        running here after a restart, or on a worker that has lost its lease. Raises InvalidWorkflowError where it
        would fail again, PutBackError where another try may help, and what `should_stop` asks for.
        """
        if not job.inputs:
            return workflow
        folder = f"jobs/{job.id}/{secrets.token_hex(4)}"
        changed = use_inputs(workflow, {name: f"{folder}/{name}" for name in job.inputs})
        path = self.settings.comfy_home / "ComfyUI/input" / folder
        path.mkdir(parents=True)

        def fetch_all() -> None:
            for name, address in job.inputs.items():
                self.fetch_input(name, address, path / name)

        # A name that is long in resolving and a server that sends a byte now and then outlast any timeout.
        within(INPUTS_LIMIT_S, fetch_all, should_stop)
        return changed

    def fetch_input(self, name: str, address: str, path: Path) -> None:
        """Stream one input to `path`."""
        limit = self.settings.input_limit_mb * 1_000_000
        logger.info("Fetching the input %s", name)
        with self.open_input(name, address) as chunks, path.open("xb") as out:
            for chunk in chunks:
                if out.tell() + len(chunk) > limit:
                    raise InvalidWorkflowError(
                        f"the input {name} is larger than INPUT_LIMIT_MB={self.settings.input_limit_mb}"
                    )
                out.write(chunk)

    @contextmanager
    def open_input(self, name: str, address: str) -> Iterator[Iterable[bytes]]:
        """Open an http(s) or s3:// address. Addresses are not repeated in errors: they may hold a signature."""
        if not address.startswith("s3://"):
            with open_url(f"the input {name}", address) as chunks:
                yield chunks
            return
        bucket, _, key = address.removeprefix("s3://").partition("/")
        if bucket != self.settings.s3_bucket:
            raise InvalidWorkflowError(
                f"the input {name} is in the bucket {bucket}: the fleet reads its own, {self.settings.s3_bucket}"
            )
        try:
            body = self.s3.get_object(Bucket=bucket, Key=key)["Body"]
        except self.s3.exceptions.NoSuchKey:
            raise InvalidWorkflowError(f"the input {name} is not there: {address:.200}") from None
        with body:
            yield body.iter_chunks(1 << 16)

    def remove_inputs(self, job: Job, result: Result) -> None:
        """Remove what was put into input/jobs/ for a job that has ended: the inputs of all its tries, its cancel."""
        if job.inputs:
            shutil.rmtree(self.settings.comfy_home / "ComfyUI/input/jobs" / job.id, ignore_errors=True)
        if (result["error"] or {}).get("kind") == "cancelled":
            try:
                self.s3.delete_object(Bucket=self.settings.s3_bucket, Key=cancel_key(job.id))
            except Exception as error:
                logger.info("The cancel of job %s stays: %s", job.id, explain(error))

    # --- The instance ------------------------------------------------------------------------------------

    def store_object_info(self) -> None:
        """Store what this ComfyUI can do, unless it is stored already. Best effort, in a thread of its own."""
        comfy = ComfyUI(self.settings.comfy_address)
        try:
            while not comfy.is_ready():
                if self.stop.wait(1):
                    return
            text = json.dumps(comfy.object_info(), sort_keys=True).encode()
            digest = hashlib.sha256(text).hexdigest()
            stored = self.head(OBJECT_INFO_KEY)
            if stored is not None and stored["Metadata"].get("sha256") == digest:
                logger.info("The bucket knows what ComfyUI can do")
                return
            self.s3.put_object(
                Bucket=self.settings.s3_bucket,
                Key=OBJECT_INFO_KEY,
                Body=gzip.compress(text),
                ContentType="application/gzip",
                Metadata={"sha256": digest},
            )
            logger.info("Stored what ComfyUI can do in %s", OBJECT_INFO_KEY)
        except Exception as error:
            logger.warning("What ComfyUI can do is not stored: %s", explain(error))

    def comfyui_answers(self) -> bool:
        """Whether ComfyUI answers, waiting for it as long as a poll takes: without it nothing is taken.

        Until its first answer it may take any time, because models may have to be copied.
        """
        limit = time.monotonic() + POLL_S
        while not self.comfy.is_ready():
            if self.should_stop() or self.is_leaving() or time.monotonic() > limit:
                if self.answered_at is None:
                    logger.info("Waiting for ComfyUI on %s", self.settings.comfy_address)
                    return False
                gone_s = time.monotonic() - self.answered_at
                logger.warning("ComfyUI has not answered on %s for %.0f s", self.settings.comfy_address, gone_s)
                if gone_s > self.settings.stall_timeout_s:
                    self.note_comfy_failure(time.monotonic())
                    self.restart_comfyui(time.monotonic())
                return False
            self.stop.wait(0.1)
        if self.answered_at is None:
            self.metrics.add_boot(finish_boot_report(self.settings.comfy_home / "logs") or {})
        self.answered_at = time.monotonic()
        if not self.warmed_up:
            self.warm_up()
        return not self.is_leaving()

    def comfyui_comes_back(self, lease: Lease) -> bool:
        """Wait for a ComfyUI that is gone, with a job in hand that it had not started; False where that takes long."""
        limit = time.monotonic() + COMFY_BACK_S
        while not self.comfy.is_ready():
            if self.should_stop() or self.gives_back(lease):
                raise JobStoppedError
            if time.monotonic() > limit:
                return False
            time.sleep(0.2)
        self.answered_at = time.monotonic()
        return True

    def warm_up(self) -> None:
        """Run WARMUP_WORKFLOW once, so that the first job does not pay for loading the models."""
        self.warmed_up = True
        path = self.settings.warmup_workflow
        assert path is not None
        job_id, began = new_job_id(), time.monotonic()
        try:
            workflow = own_outputs(check_workflow(json.loads(path.read_bytes())), job_id)
            finished = self.comfy.run(
                workflow,
                job_id,
                timeout_s=self.settings.job_timeout_s,
                stall_s=self.settings.stall_timeout_s,
                should_stop=lambda: self.should_stop() or self.is_leaving(),
            )
            error = error_of(finished.entry)
            if error is not None:
                raise InvalidWorkflowError(error["message"])
            logger.info("Warmed up with %s in %.1f s", path, time.monotonic() - began)
        except JobStoppedError:
            logger.info("Not warmed up: this worker stops")
        except Exception as error:
            logger.warning("Cannot warm up with WARMUP_WORKFLOW=%s, so the first job takes longer: %s", path, error)
        remove_folder(self.settings.output_dir / job_id)

    def restart_comfyui(self, since: float) -> None:
        """Kill ComfyUI, unless it was done after `since`; systemd starts it and all that belongs to it anew.

        By its pid, because that needs no sudo; and at once, because one that hangs has nothing to put in order.
        It is given as long again to come up.
        """
        with self.turn:
            if self.restarted_at > since:
                return
            self.restarted_at = time.monotonic()
        logger.warning("Restarting ComfyUI")
        command = ["systemctl", "show", "--property=MainPID", "--value", "comfyui.service"]
        try:
            shown = subprocess.run(
                command, check=True, timeout=60, stdin=subprocess.DEVNULL, capture_output=True, text=True
            )
            if (pid := int(shown.stdout)) > 0:  # 0 where systemd is starting it already
                os.kill(pid, signal.SIGKILL)
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            logger.error("Cannot restart ComfyUI: %s", error)
        self.restarted_at = self.comfy_failed_at = self.answered_at = time.monotonic()

    def await_free_executor(self, job_id: str) -> None:
        """Restart ComfyUI if it does not let go of an interrupted job: the next would wait behind it."""
        limit = time.monotonic() + INTERRUPT_S
        try:
            while self.comfy.place(job_id) is not None and not self.should_stop():
                if time.monotonic() > limit:
                    self.restart_comfyui(limit)
                    return
                time.sleep(0.2)
        except ComfyGoneError as error:
            logger.warning("After the interrupt: %s", error)

    def declare_unhealthy(self) -> None:
        """Have the group replace this instance, whose ComfyUI fails again and again; its messages are back."""
        self.comfy_failures = 0
        if not self.in_group:
            return
        logger.error("ComfyUI failed %d times in a row: this instance is declared Unhealthy", COMFY_FAILURES_LIMIT)
        self.autoscaling.set_instance_health(
            InstanceId=self.instance_id, HealthStatus="Unhealthy", ShouldRespectGracePeriod=False
        )
        self.drain.set()

    def look_at_lifecycle(self) -> None:
        """Read what EC2 and the group want of this instance."""
        try:
            state = self.metadata.get("autoscaling/target-lifecycle-state")
            notice = self.metadata.get("spot/instance-action")
            rebalance = self.metadata.get("events/recommendations/rebalance")
        except MetadataError:
            return  # the base machine may be no EC2 instance at all
        self.in_group = state is not None
        warming = state is not None and state.startswith("Warmed:")
        if warming != self.warming:
            self.warming = warming
            logger.info("In the warm pool: nothing is taken" if warming else "In service: jobs are taken")
        if notice is not None and not self.spot.is_set():
            logger.warning("Spot notice: the instance is taken away, its job is given back")
            self.spot.set()
        if state == "Terminated" and not self.drain.is_set():
            logger.info("The group takes this instance: nothing new is taken")
            self.drain.set()
        if rebalance is not None and self.in_group and not self.is_leaving():
            self.make_room()

    def make_room(self) -> None:
        """Leave while there is time, because EC2 expects to take this spot instance soon."""
        logger.warning("EC2 recommends to rebalance: nothing new is taken, the job in hand is finished")
        try:
            if not self.leave_group(decrement=True):
                self.leave_group(decrement=False)
        except Exception as error:
            logger.warning("Asks its group again in %d s: %s", LIFECYCLE_POLL_S, explain(error))

    def look(self) -> QueueDepth:
        """Look how the queue stands, and set when to look again."""
        now = self.looked_at = time.monotonic()
        # Idle, it is after every second poll, which makes five calls a minute in all.
        pace_s = LOOK_S * self.jitter.uniform(0.8, 1.2) if self.leases else 2 * POLL_S - 1
        self.next_look = now + min(pace_s, max(1.0, self.settings.scale_cooldown_s / 4))
        depth = self.depth()
        self.history.add(now, depth)
        self.note_waiting(depth)
        return depth

    def glance(self) -> None:
        """See whether more messages wait, so that they are fetched ahead; nothing else is decided by it."""
        try:
            self.note_waiting(self.depth())
        except Exception as error:
            logger.info("Nothing is fetched ahead for now: %s", explain(error))

    def note_waiting(self, depth: QueueDepth) -> None:
        """Take in how many messages wait."""
        with self.turn:
            self.waiting, self.glance_due = depth.visible, False
            self.turn.notify_all()

    def raise_capacity(self) -> None:
        """Raise the group to what the queue calls for. A failed read means no action."""
        try:
            depth = self.look()
            jobs = long_jobs(self.history, depth, self.running_s())
            # What was fetched ahead waits as well, only not on the queue.
            ahead = max(0, min(self.taken - len(self.running), depth.in_flight))
            depth = QueueDepth(depth.visible + ahead, depth.in_flight - ahead)
            if self.drain.is_set() and self.leases:
                # What it still finishes is no job for the others.
                depth = depth._replace(in_flight=max(0, depth.in_flight - len(self.leases)))
                if not depth.visible:
                    return
            capacity = raise_capacity(
                self.autoscaling,
                self.settings.asg_name,
                depth,
                self.settings.backlogsize_per_instance,
                jobs,
            )
        except Exception as error:
            logger.warning("Capacity is left as it is: %s", explain(error))
            return
        if capacity is None and not self.scaling_off_said:
            self.scaling_off_said = True
            logger.info("There is no group %s: scaling is off", self.settings.asg_name)
        if capacity is None:
            return
        self.note_group(capacity.group)
        self.others = max(0, capacity.after - 1)
        self.consider_replacement(depth)
        if capacity.after > capacity.before:
            logger.info("Adjusted ASG capacity to %d", capacity.after)
        self.say_what_is_missing(capacity)

    def say_what_is_missing(self, capacity: Capacity) -> None:
        """Log why instances that are wanted do not come, once for each reason."""
        problem = None
        if capacity.missing > 0:
            try:
                problem = capacity_problem(self.autoscaling, self.settings.asg_name)
            except Exception as error:
                problem = f"why cannot be seen: {explain(error)}"
        if problem and problem != self.capacity_said:
            logger.warning("%d of %d instances are not there yet: %s", capacity.missing, capacity.after, problem)
        self.capacity_said = problem

    def leave_if_idle(self) -> None:
        """End this instance when its group can do without it: see may_leave."""
        now = time.monotonic()
        cooled_at = self.idle_since + self.settings.scale_cooldown_s
        is_due = now >= self.next_look or self.looked_at < cooled_at <= now
        if not self.in_group or self.leases or not is_due:
            return
        depth = self.look()
        if self.group is None or now > self.group_read_at + GROUP_AGE_S or self.replacement.is_asked:
            self.read_group()
        self.consider_replacement(depth)
        if not self.is_superfluous(depth):
            return
        self.read_group()  # what is decided is decided on how the group stands now
        # More than are wanted are there after an operator has lowered that: one that leaves lowers it no further.
        decrement = self.group is not None and len(self.group.in_service) <= self.group.desired
        if self.is_superfluous(depth) and self.leave_group(decrement=decrement):
            logger.info("Idle for %.0f s: leaves the group", now - self.idle_since)

    def read_group(self) -> None:
        """Ask how the group stands."""
        self.note_group(read_group(self.autoscaling, self.settings.asg_name))

    def note_group(self, group: Group | None) -> None:
        """Remember how the group stood."""
        self.group = group
        self.group_read_at = time.monotonic()

    def consider_replacement(self, depth: QueueDepth) -> None:
        """Where this instance was launched from a template version that counts no more, have it replaced."""
        group = self.group
        if group is None or self.is_leaving():
            return
        step = self.replacement.step(group, self.instance_id, depth, time.monotonic())
        if step != "launch":
            return
        logger.info("This instance is outdated: another is started in its place, and then it leaves")
        try:
            self.autoscaling.set_desired_capacity(
                AutoScalingGroupName=self.settings.asg_name, DesiredCapacity=group.desired + 1, HonorCooldown=False
            )
        except Exception as error:
            self.replacement.forget()
            logger.warning("No other instance is started in its place: %s", explain(error))

    def leave_to_replacement(self) -> None:
        """Leave the group to the instance that was started in this one's place. No job is in hand that has not run."""
        try:
            logger.info("Outdated: leaves the group")
            self.leave_group(decrement=self.replacement.decrement)
        finally:
            self.replacement.forget()

    def is_superfluous(self, depth: QueueDepth) -> bool:
        """Whether the group can do without this idle instance, as it was when it was read."""
        now, group = time.monotonic(), self.group
        if group is None:
            return False
        there = max(group.desired, len(group.in_service))
        if there <= group.min_size:
            return False
        return may_leave(
            self.history,
            depth,
            now=now,
            idle_s=now - self.idle_since,
            cooldown_s=self.settings.scale_cooldown_s,
            desired=there,
            turn=leaving_turn(self.instance_id, group.in_service, time.time()),
        )

    def leave_group(self, *, decrement: bool) -> bool:
        """Have the group end this instance, and want one fewer; False where that would be below its minimum."""
        try:
            self.autoscaling.terminate_instance_in_auto_scaling_group(
                InstanceId=self.instance_id, ShouldDecrementDesiredCapacity=decrement
            )
        except Exception as error:
            if error_code(error) != "ValidationError":
                raise
            self.idle_since = time.monotonic()
            logger.info("Stays, the group is at its minimum: %s", error)
            return False
        self.drain.set()
        return True

    def beat(self) -> None:
        """Ask for more time while the last job ends."""
        try:
            self.autoscaling.record_lifecycle_action_heartbeat(
                LifecycleHookName=HOOK_NAME,
                AutoScalingGroupName=self.settings.asg_name,
                InstanceId=self.instance_id,
            )
        except Exception as error:
            logger.info("No lifecycle heartbeat: %s", explain(error))

    def leave(self) -> None:
        """Hand the instance back to its group and wait to be switched off."""
        logger.info("Hands the instance back")
        self.upload_logs()
        try:
            before_exit(self.instance_id)
        except Exception:
            logger.exception("before_exit failed")
        # A message that came after the last receive would find nobody, and nobody would be started.
        self.raise_capacity()
        self.publish_metrics(last=True)
        self.complete_lifecycle()
        self.upload_logs()
        while not self.stop.wait(1):
            notify_systemd("WATCHDOG=1")

    def complete_lifecycle(self) -> None:
        """Let the group go on with the termination; without it the hook's timeout does."""
        delay_s = 0.25
        for _ in range(10):
            try:
                self.autoscaling.complete_lifecycle_action(
                    LifecycleHookName=HOOK_NAME,
                    AutoScalingGroupName=self.settings.asg_name,
                    InstanceId=self.instance_id,
                    LifecycleActionResult="CONTINUE",
                )
            except Exception as error:
                # The hook may not have begun yet, just after we asked to be terminated.
                logger.info("Lifecycle action not completed yet: %s", explain(error))
                if self.stop.wait(delay_s):
                    return
                delay_s = min(delay_s * 2, 30)
            else:
                logger.info("Lifecycle action completed")
                return

    def upload_logs(self) -> None:
        """Store this instance's logs, those that have changed, under output/<instance_id>/."""
        for path in sorted((self.settings.comfy_home / "logs").glob("*")):
            key = f"output/{self.instance_id}/{path.name}"
            try:
                state = path.stat()
                stamp = (state.st_size, state.st_mtime_ns)
                if path.is_file() and self.logs_stored.get(path.name) != stamp:
                    extra = {"ContentType": "text/plain; charset=utf-8"}
                    self.s3.upload_file(str(path), self.settings.s3_bucket, key, ExtraArgs=extra)
                    self.logs_stored[path.name] = stamp
            except Exception as error:
                logger.warning("Cannot store the log %s: %s", path.name, explain(error))

    def publish_metrics(self, *, last: bool = False) -> None:
        """Send the figures that are due to CloudWatch, from the instances of a group only: they cost money."""
        figures = self.metrics.due(time.monotonic(), last=last) if self.in_group else []
        if not figures:
            return
        try:
            if self.cloudwatch is None:
                self.cloudwatch = aws_client("cloudwatch", self.settings.region)
            namespace = f"{self.settings.prefix}/{self.settings.env}"
            self.cloudwatch.put_metric_data(Namespace=namespace, MetricData=figures)
            self.metrics.sent(len(figures))
        except Exception as error:
            if not self.metrics_failed:
                self.metrics_failed = True
                logger.warning("Cannot publish figures, which is not said again: %s", explain(error))


# --- Scaling ---------------------------------------------------------------------------------------------
# Pure functions of what a worker has seen; tests/bench_scaling.py runs the same ones on a virtual clock.

LOOK_S = 30
"""How often, on average, a worker with a job looks at the queue; one without looks after every second poll."""
GLANCE_S = 1
"""How often at most it asks besides whether more wait, when one came although none was known to."""
LONG_JOB_S = 300
"""A job that runs for so long occupies its worker: longer than another instance takes to come."""
ALL_LONG_S = 600
"""A worker with such a job, and messages that wait all along, takes all running jobs for long ones."""
UTILISATION = 0.9
"""How busy the fleet that stays may be; the rest takes up what comes unevenly."""
TURN_S = 15
"""So long it is the turn of the same instances to leave."""


AHEAD_LIMIT_S = 60
"""Behind a job that takes longer none is fetched ahead: little would be gained, and it might wait for long."""
FETCH_S = 0.2
"""So long it takes to fetch a job, with AWS far away."""
READY_S = 150
"""So long an instance in service still boots before it takes its first job."""


def may_fetch_ahead(*, waiting: int, others: int, in_hand: int, last_run_s: float | None, running_s: float) -> bool:
    """Whether a worker takes another job that has `in_hand` already, of which one runs or is about to.

    Only while so many wait that each of the `others`, idle, booting or about to be free, still finds as many as this
    worker would then have before it; so that nobody could have started it sooner. Only behind short jobs, as the last
    one was and the one that runs still is, and no more than run in the time it takes to fetch one.
    """
    if last_run_s is None or max(last_run_s, running_s) > AHEAD_LIMIT_S:
        return False
    enough = min(LANES, 2 + int(FETCH_S / max(last_run_s, 0.001)))
    return in_hand < enough and waiting > in_hand * others


class Replacement:
    """How an instance that was launched from an old template version has itself replaced, one at a time."""

    def __init__(self) -> None:
        self.is_due = False  # it leaves once it has no job in hand that has not run
        self.decrement = False
        self.is_asked = False
        self._known: frozenset[str] = frozenset()  # those that were up to date when another was asked for
        self._came_at: float | None = None

    def forget(self) -> None:
        """Begin anew."""
        self.is_due = self.is_asked = False
        self._came_at = None

    def step(self, group: Group, me: str, depth: QueueDepth, now: float) -> str:
        """Take in how the group stands and return what is to be done: "launch" another, or "" for nothing."""
        current = frozenset(group.in_service) - frozenset(group.outdated)
        has_come = self.is_asked and bool(current - self._known)
        self._came_at = (self._came_at or now) if has_come else None
        is_ready = self._came_at is not None and now - self._came_at >= READY_S
        step = replacement_step(group, me, depth, has_come=has_come, is_ready=is_ready)
        if step == "launch":
            self.is_asked, self._known = True, current
        self.is_due = step in ("leave", "swap")
        self.decrement = step == "leave"
        return step if step == "launch" else ""


def replacement_step(group: Group, me: str, depth: QueueDepth, *, has_come: bool, is_ready: bool) -> str:
    """What an instance does about being outdated: "launch" another first, "leave", "swap", or "" for nothing.

    It leaves where nobody needs it, or when the one it asked for `has_come` and `is_ready`. One at a time: the first
    of the outdated, and only when all instances that are wanted are in service. Where the group is at its maximum
    none can be launched first: it swaps, which means that AWS launches the other while it goes.
    """
    if me not in group.outdated:
        return ""
    if depth == (0, 0) and max(group.desired, len(group.in_service)) > group.min_size:
        return "leave"
    if has_come:
        return "leave" if is_ready else ""
    if me != min(group.outdated) or group.desired > len(group.in_service):
        return ""
    if group.desired < group.max_size:
        return "launch"
    return "swap"


class QueueHistory:
    """What one worker has seen of the queue during the last `window_s` seconds."""

    def __init__(self, window_s: float) -> None:
        self.window_s = window_s
        self._depths: deque[tuple[float, QueueDepth]] = deque()
        self._since: float | None = None

    def add(self, now: float, depth: QueueDepth) -> None:
        """Take in what was seen at `now`, in seconds on any clock that never goes back."""
        if self._since is None:
            self._since = now
        self._depths.append((now, depth))
        while self._depths[0][0] < now - self.window_s:
            self._depths.popleft()

    def is_full(self, now: float) -> bool:
        """Whether the queue was watched for as long as the window is."""
        return self._since is not None and now - self._since >= self.window_s

    def mean_load(self) -> float:
        """How many jobs there were on average, waiting or running."""
        return sum(depth.visible + depth.in_flight for _, depth in self._depths) / max(1, len(self._depths))

    def always_waited(self) -> bool:
        """Whether messages waited whenever it was looked."""
        return all(depth.visible for _, depth in self._depths)


def long_jobs(history: QueueHistory, depth: QueueDepth, running_s: float) -> int:
    """How many of the jobs in flight are long, as far as a worker can know whose own job runs for `running_s`.

    Its own one after LONG_JOB_S. All of them when also nothing has helped those that wait: the others
    are then most likely jobs of the same kind.
    """
    if running_s >= ALL_LONG_S and depth.visible and history.always_waited():
        return depth.in_flight
    return 1 if running_s >= LONG_JOB_S else 0


def may_leave(
    history: QueueHistory,
    depth: QueueDepth,
    *,
    now: float,
    idle_s: float,
    cooldown_s: float,
    desired: int,
    turn: int | None,
) -> bool:
    """Whether an idle worker ends its own instance.

    Never while messages are visible. One that was idle for `cooldown_s` leaves an empty queue, if it is the
    last or nothing has come in that time. Others leave earlier once the load of the last `window_s` needs fewer
    than `desired` instances: those whose `turn` (0 first) lies below the difference, so that many who leave at once
    never leave too few.
    """
    if depth.visible:
        return False
    nothing_came = depth.in_flight == 0 and (desired <= 1 or history.mean_load() == 0)
    if idle_s >= cooldown_s and nothing_came:
        return True
    needed = max(1, math.ceil(history.mean_load() / UTILISATION))
    return history.is_full(now) and turn is not None and turn < desired - needed


def leaving_turn(instance_id: str, in_service: list[str], clock: float) -> int | None:
    """This instance's place, 0 first, in the order in which the group's instances may leave at this time of day.

    The same order for all who ask within TURN_S, and another one after, because the first may be busy. None in the
    last third of a turn, so that its last has left when the next one's first counts who is there.
    """
    slot, since = divmod(clock, TURN_S)
    if since > TURN_S * 2 / 3:
        return None
    order = sorted(
        {*in_service, instance_id}, key=lambda name: hashlib.sha256(f"{slot:.0f} {name}".encode()).digest()
    )
    return order.index(instance_id)


# --- Helpers ---------------------------------------------------------------------------------------------


def understand(message: dict[str, Any]) -> tuple[Job, str | None]:
    """The message's job, and why it is none (then the job is only whom to tell)."""
    try:
        return parse_message(message.get("Body") or "", message["MessageId"]), None
    except InvalidMessageError as reason:
        return Job(reason.job_id or message["MessageId"], callback_url=reason.callback_url), str(reason)


class CancelWatch:
    """Looks in a thread of its own whether a job was cancelled: at once, beside the first look for its receipt,
    which makes it cost no time, and then every CANCEL_S until the with-block ends."""

    def __init__(self, is_cancelled: Callable[[str], bool], should_stop: Callable[[], bool]) -> None:
        self._is_cancelled = is_cancelled
        self._should_stop = should_stop
        self._looked = threading.Event()
        self._cancelled = False
        self._done = threading.Event()

    def __enter__(self) -> CancelWatch:
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()

    def watch(self, job_id: str) -> None:
        """Begin."""
        threading.Thread(target=self._watch, args=(job_id,), daemon=True).start()

    def came_first(self) -> bool:
        """Whether the job was cancelled before it was to run. A look that fails or hangs keeps no job waiting."""
        self._looked.wait(FIRST_LOOK_S)
        return self._cancelled

    def should_stop(self) -> bool:
        """Whether the job is to be given back at once. Raises JobCancelledError once it is cancelled."""
        if self._cancelled:
            raise JobCancelledError
        return self._should_stop()

    def _watch(self, job_id: str) -> None:
        while not self._cancelled:
            try:
                self._cancelled = self._is_cancelled(job_id)
            except Exception as error:
                logger.warning("Looks for a cancel again in %d s: %s", CANCEL_S, explain(error))
            self._looked.set()
            if self._done.wait(CANCEL_S):
                return


class Lease:
    """Holds one received message: extends its visibility, in a thread of its own, well before it runs out."""

    def __init__(self, sqs: Any, queue_url: str, message: dict[str, Any], timeout_s: int) -> None:
        self.message = message
        self.message_id: str = message["MessageId"]
        self.receipt: str = message["ReceiptHandle"]
        self.attempt = int(message["Attributes"]["ApproximateReceiveCount"])
        self.sent_at = datetime.fromtimestamp(int(message["Attributes"]["SentTimestamp"]) / 1000, UTC)  # SQS's clock
        self.job_id = ""
        self.stored = False  # the job's result is
        self.lost = False  # the message is no longer ours: another worker has it, or soon will
        self._sqs = sqs
        self._queue_url = queue_url
        self._timeout_s = timeout_s
        self._received_at = time.monotonic()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._hold, daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Extend no more. Returns when no extension is under way, so that one cannot undo a give-back."""
        self._done.set()
        self._thread.join()

    def _hold(self) -> None:
        wait_s = self._timeout_s / 3
        while not self._done.wait(wait_s):
            left_s = int(RECEIVE_LIMIT_S - (time.monotonic() - self._received_at)) - 1
            try:
                self._sqs.change_message_visibility(
                    QueueUrl=self._queue_url,
                    ReceiptHandle=self.receipt,
                    VisibilityTimeout=max(0, min(self._timeout_s, left_s)),
                )
                wait_s = self._timeout_s / 3
            except Exception as error:
                if error_code(error) in LEASE_LOST_CODES:
                    logger.warning("The lease on message %s is lost: %s", self.message_id, error)
                    self.lost = True
                    return
                wait_s = self._timeout_s / 12 * random.uniform(0.5, 1)
                logger.warning("Extending the lease again in %.1f s: %s", wait_s, explain(error))


LEASE_LOST_CODES = (
    "InvalidParameterValue",
    "MessageNotInflight",
    "AWS.SimpleQueueService.MessageNotInflight",
    "ReceiptHandleIsInvalid",
)


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

    def add_job(self, result: Result) -> None:
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


class Progress:
    """How far a job is, from ComfyUI's events."""

    def __init__(self, workflow: Workflow, job_id: str, instance_id: str, usual_run_s: float | None = None) -> None:
        self.workflow = workflow
        self.job_id = job_id
        self.instance_id = instance_id
        self.usual_run_s = usual_run_s
        self.started_at: datetime | None = None
        self._state: dict[str, Any] = {}
        self._reported: dict[str, Any] = {}

    def note(self, event: dict[str, Any]) -> None:
        """Take in an `execution_start`, `executing`, `progress` or `progress_state` event."""
        data = event["data"]
        if event["type"] == "execution_start":
            self.started_at = self.started_at or datetime.now(UTC)
        elif event["type"] == "progress_state":
            done = sum(node.get("state") == "finished" for node in data.get("nodes", {}).values())
            self._state = {**self._state, "nodes_done": done}
        elif data.get("node") is not None:
            step = {"value": data.get("value"), "max": data.get("max")} if event["type"] == "progress" else {}
            self._state = {"nodes_done": self._state.get("nodes_done", 0), "node_id": data["node"], **step}

    def news(self) -> dict[str, Any] | None:
        """What progress.json is to say, None when nothing changed since the last call."""
        state = self._state
        if state == self._reported:
            return None
        self._reported = state
        node = self.workflow.get(state.get("node_id", ""), {})
        return {
            "job_id": self.job_id,
            "status": "running",
            "instance_id": self.instance_id,
            "node_title": node.get("_meta", {}).get("title") or node.get("class_type"),
            "nodes": len(self.workflow),
            **state,
            **({"started_at": iso(self.started_at)} if self.started_at else {}),
            **({"usual_run_s": round(self.usual_run_s, 1)} if self.usual_run_s is not None else {}),
            "updated_at": iso(datetime.now(UTC)),
        }


@contextmanager
def every(seconds: float, action: Callable[[], None]) -> Iterator[None]:
    """Call `action` every so many seconds in a thread of its own while the with-block runs."""
    done = threading.Event()

    def repeat() -> None:
        while not done.wait(seconds):
            try:
                action()
            except Exception as error:
                logger.warning("Trying again in %.0f s: %s", seconds, explain(error))

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(1)


def within(limit_s: float, action: Callable[[], object], should_stop: Callable[[], bool]) -> None:
    """Run `action` in a thread of its own and raise what it raises.

    Raises PutBackError when it takes longer than `limit_s`, JobStoppedError when it is to stop; it is then left to
    itself.
    """
    raised: list[Exception] = []
    done = threading.Event()

    def run() -> None:
        try:
            action()
        except Exception as error:
            raised.append(error)
        done.set()

    threading.Thread(target=run, daemon=True).start()
    limit = time.monotonic() + limit_s
    while not done.wait(0.1):
        if should_stop():
            raise JobStoppedError
        if time.monotonic() > limit:
            raise PutBackError(f"the inputs have not come within {limit_s:.0f} s")
    if raised:
        raise raised[0]


@contextmanager
def open_url(what: str, url: str) -> Iterator[Iterable[bytes]]:
    """Open an http(s) address that came with a message, for reading as it comes.

    Raises InvalidWorkflowError where another try would fail as well, PutBackError where it may help. No error repeats
    the address, which may be signed.
    """
    import requests

    try:
        refuse_link_local(url)
        with guarded_session() as session:
            answer = session.get(url, timeout=(5, 30), allow_redirects=False, stream=True)
            if answer.status_code in (408, 425, 429) or answer.status_code >= 500:
                raise PutBackError(f"{what} does not come: it was answered with HTTP {answer.status_code}")
            if answer.status_code != 200:
                redirect = ", and redirects are not followed" if answer.is_redirect else ""
                raise InvalidWorkflowError(f"{what} was answered with HTTP {answer.status_code}{redirect}")
            yield answer.iter_content(1 << 16)
    except (
        requests.ConnectionError,
        requests.Timeout,
        requests.exceptions.ChunkedEncodingError,
        socket.gaierror,
    ) as error:
        raise PutBackError(f"{what} does not come: {type(error).__name__} at {urlsplit(url).hostname}") from None
    except LinkLocalError as error:
        raise InvalidWorkflowError(f"{what} is refused: {error}") from None
    except (requests.RequestException, ValueError):
        raise InvalidWorkflowError(f"{what} has an address that cannot be read from") from None


def guarded_session() -> Any:
    """A requests session for addresses that came with a message.

    It looks where each connection has led before anything is sent over it, because a name may resolve to something
    else by then than it did when it was checked. Behind a proxy, which looks names up by itself, it sees the proxy.
    """
    import requests
    from requests.adapters import HTTPAdapter
    from urllib3 import HTTPConnectionPool, HTTPSConnectionPool
    from urllib3.connection import HTTPConnection, HTTPSConnection

    class GuardedHttp(HTTPConnection):
        def _new_conn(self) -> socket.socket:
            return refuse_connection(super()._new_conn())

    class GuardedHttps(HTTPSConnection):
        def _new_conn(self) -> socket.socket:
            return refuse_connection(super()._new_conn())

    class HttpPool(HTTPConnectionPool):
        ConnectionCls = GuardedHttp

    class HttpsPool(HTTPSConnectionPool):
        ConnectionCls = GuardedHttps

    adapter = HTTPAdapter()
    adapter.poolmanager.pool_classes_by_scheme = {"http": HttpPool, "https": HttpsPool}
    session = requests.Session()
    session.mount("http://", adapter)
    session.mount("https://", adapter)
    return session


def post_result(url: str, result: Result, secret: str) -> str:
    """POST a result, signed; returns why it was not accepted, "" when it was."""
    import requests

    body = json.dumps(result).encode()
    timestamp = str(int(time.time()))
    digest = hmac.new(secret.encode(), f"{timestamp}.".encode() + body, hashlib.sha256)
    headers = {
        "Content-Type": "application/json",
        "X-Comfy-Timestamp": timestamp,
        "X-Comfy-Signature": f"sha256={digest.hexdigest()}",
    }
    try:
        refuse_link_local(url)
        with guarded_session() as session:
            answer = session.post(
                url, data=body, headers=headers, timeout=(3, 10), allow_redirects=False, stream=True
            )
    except (requests.RequestException, OSError, ValueError) as error:
        return str(error)
    return "" if 200 <= answer.status_code < 300 else f"it was answered with HTTP {answer.status_code}"


class LinkLocalError(ValueError):
    """An address from a message leads to where instance metadata lives."""


def refuse_link_local(url: str) -> None:
    """Raise LinkLocalError for an address where instance metadata lives, ValueError for one that is not http(s)."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{url!r:.100} is no http(s) address")
    for *_, address in socket.getaddrinfo(parts.hostname, parts.port or 80, proto=socket.IPPROTO_TCP):
        if is_link_local(str(address[0])):
            raise LinkLocalError(f"{parts.hostname} is a link-local address: nothing from a message leads there")


def refuse_connection(connection: socket.socket) -> socket.socket:
    """Return a connection, unless it has led to where instance metadata lives."""
    address = str(connection.getpeername()[0])
    if is_link_local(address):
        connection.close()
        raise LinkLocalError(f"{address} is a link-local address: nothing from a message leads there")
    return connection


def is_link_local(address: str) -> bool:
    """Whether instance metadata may live at this IP address."""
    ip = ipaddress.ip_address(re.sub(r"%.*", "", address))
    mapped = getattr(ip, "ipv4_mapped", None) or ip
    return mapped.is_link_local or mapped == ipaddress.ip_address("fd00:ec2::254")


def remove_folder(folder: Path) -> None:
    """Remove a folder as far as that is possible."""
    for path in sorted(folder.rglob("*"), reverse=True):
        with suppress(OSError):
            path.rmdir() if path.is_dir() else path.unlink()
    with suppress(OSError):
        folder.rmdir()


def iso(moment: datetime) -> str:
    """ISO 8601 in UTC, to the millisecond."""
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def instance_id_of(metadata: Metadata) -> str:
    """This instance's id; the host's name where there is no metadata service."""
    with suppress(MetadataError):
        instance_id = metadata.get("instance-id")
        if instance_id:
            return instance_id
    return socket.gethostname()


def instance_type_of(metadata: Metadata) -> str | None:
    """This instance's type; None where there is no metadata service."""
    with suppress(MetadataError):
        return metadata.get("instance-type")
    return None


PERMISSIONS = {
    "HeadObject": "s3:GetObject and s3:ListBucket",
    "GetObject": "s3:GetObject and s3:ListBucket",
    "PutObject": "s3:PutObject",
    "CreateMultipartUpload": "s3:PutObject",
    "PutMetricData": "cloudwatch:PutMetricData",
}
"""Where the permission is not named like the operation. Without s3:ListBucket a missing object is "access denied"."""


def explain(error: Exception) -> str:
    """An error in one line; when AWS refused access it ends with the permission that is missing."""
    text = " ".join(str(error).split()) or repr(error)
    code = error_code(error)
    if "AccessDenied" in code or code in ("403", "UnauthorizedOperation"):
        operation = str(getattr(error, "operation_name", "PutObject"))  # an upload's error does not say its own
        service = "sqs" if "Message" in operation or "Queue" in operation else "autoscaling"
        text += f" (this instance's role needs {PERMISSIONS.get(operation, f'{service}:{operation}')})"
    return text


def backoff_s(failures: int) -> float:
    """Seconds to wait after so many failures in a row: doubling, at most a minute, with jitter."""
    return min(2.0**failures, 60.0) * random.uniform(0.5, 1)


def notify_systemd(state: str) -> None:
    """Send one sd_notify datagram; nothing where systemd does not listen."""
    address = os.environ.get("NOTIFY_SOCKET")
    if address:
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify_socket:
            notify_socket.connect("\0" + address[1:] if address.startswith("@") else address)
            notify_socket.send(state.encode())


def finish_boot_report(folder: Path) -> dict[str, Any] | None:
    """Add to boot.json in `folder` how long ComfyUI, which answers now, took for that, and the total; return it.

    start_service.sh has begun it: {"booted_at": ISO, "comfyui_started_at": seconds since 1970, "phases": {name:
    seconds}}. None where there is nothing to add: it is complete, or there is none.
    """
    file = folder / "boot.json"
    try:
        report: dict[str, Any] = json.loads(file.read_text())
        if "total" in report:
            return None
        phases = report["phases"]
        phases["comfyui"] = round(time.time() - report["comfyui_started_at"], 3)
        report["total"] = round(sum(phases.values()), 3)
        new = file.with_suffix(".json.new")
        new.write_text(json.dumps(report))
        new.replace(file)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("Cannot complete %s: %s", file, error)
        return None
    return report


def set_up_logging(folder: Path) -> None:
    """Log to stdout, and to logs/parse_job.log: rotated at midnight, 30 kept."""
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stdout)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "parse_job.log"
        handlers.append(
            logging.handlers.TimedRotatingFileHandler(file, when="midnight", backupCount=30, encoding="utf-8")
        )
    except OSError as error:
        print(f"parse_job.py: logs go to stdout only: {error}", file=sys.stderr)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", handlers=handlers)
    logging.getLogger("botocore").setLevel(logging.WARNING)
    logging.raiseExceptions = False  # a full disk does not stop jobs


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
        signal.signal(number, lambda *_: worker.stop.set())
    worker.run()
    logger.info("Worker on %s ends", worker.instance_id)
    return 0


if __name__ == "__main__":
    sys.exit(main())
