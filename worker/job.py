"""One job's story, from its message to the deletion of that; every ending there is."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, TypeVar

from comfy_utils import (
    Finished,
    InvalidMessageError,
    InvalidWorkflowError,
    Job,
    JobCancelledError,
    JobStoppedError,
    JobTimeoutError,
    NothingToRunError,
    Settings,
    Workflow,
    WorkflowRefusedError,
    error_code,
    error_of,
    job_error,
    own_outputs,
    parse_message,
)
from worker.cancel import CancelWatch
from worker.comfy_care import ComfyCare, ran_s
from worker.commands import run_command
from worker.errors import NeverStartedError, PutBackError, explain
from worker.in_hand import InHand
from worker.inputs import Inputs
from worker.lease import Lease
from worker.progress import Progress
from worker.reports import Reports
from worker.results import Ran, Result, Results
from worker.retry import every, insist
from worker.scaling import AHEAD_LIMIT_S
from worker.shutdown import Shutdown
from worker.watchdog import Watchdog

logger = logging.getLogger(__name__)

T = TypeVar("T")

PROGRESS_S = 5
STOP_S = 3
"""So long the running job waits, when all are given back, for those behind it to be taken out of the queue."""
USUAL_RUNS = 100
"""Of so many kinds of workflows it is remembered how long they run, for those who wait."""


@dataclass(eq=False)
class Jobs:
    """Brings messages to their end, each in a thread of its own."""

    settings: Settings
    instance_id: str
    in_hand: InHand
    shutdown: Shutdown
    watchdog: Watchdog
    care: ComfyCare
    inputs: Inputs
    results: Results
    reports: Reports
    on_job_done: Callable[[Result], None]
    _usual_runs_s: dict[str, float] = field(
        default_factory=dict
    )  # a workflow's nodes -> how long one of them last ran

    def process(self, lease: Lease) -> None:
        """Bring one message to its end: result stored, callback accepted, message deleted; or put it back."""
        with self._putting_back(lease):
            with self._in_turn(lease), CancelWatch(self.inputs.is_cancelled, self.shutdown.should_stop) as cancel:
                if self.shutdown.gives_back(lease.attempt):
                    raise JobStoppedError
                try:
                    job, invalid = understand(lease)
                except NothingToRunError as reason:
                    self._drop(lease, reason)
                    return
                self.in_hand.claim(lease, job.id, lambda: self.shutdown.gives_back(lease.attempt))
                logger.info("Job %s: attempt %d", job.id, lease.attempt)
                cancel.watch(job.id)
                result = self._insist(lambda: self.results.stored(job.id))
                if result is None:
                    ran = self._run(job, invalid, lease, cancel)
            # The GPU does not wait for S3, nor for somebody's server.
            if result is None:
                result = self._store(job, ran, lease)
            else:
                lease.stored = True
                logger.info("Job %s has its result already: not run again", job.id)
            self._finish(job, result, lease)

    # --- The endings -------------------------------------------------------------------------------------

    def _store(self, job: Job, ran: Ran, lease: Lease) -> Result:
        """The job has run: store its files and its receipt."""
        made = self.results.make(job, ran, lease)
        result = self._insist(lambda: self.results.store(made))
        lease.stored = True
        self.reports.count(result)
        return result

    def _finish(self, job: Job, result: Result, lease: Lease) -> None:
        """The job has its receipt: tell whoever is to hear of it, and delete the message."""
        self.results.call_back(job, result)
        try:
            self.on_job_done(result)
        except Exception:
            logger.exception("on_job_done failed for job %s", job.id)
        if lease.lost:
            logger.warning("Job %s: its lease was lost, so its message comes again and is deleted then", job.id)
        else:
            self._insist(lambda: lease.delete(more_come=self.in_hand.not_run() > 0))
        lease.end()
        self.results.remove_local_files(job.id)
        self.inputs.remove(job, result["error"])
        self.in_hand.let_go(lease)
        reason = f" ({result['error']['message']})" if result["error"] else ""
        logger.info("Job %s: %s%s", job.id, result["status"], reason)

    def _drop(self, lease: Lease, reason: Exception) -> None:
        """Delete a message that asks for nothing."""
        logger.info("Message %s asks for nothing: %s", lease.message_id, reason)
        self._insist(lease.delete)
        lease.end()
        self.in_hand.let_go(lease)

    @contextmanager
    def _putting_back(self, lease: Lease) -> Iterator[None]:
        """Where the block raises, the message goes back to the queue."""
        try:
            yield
        except JobStoppedError:
            logger.info("Message %s is given back: it is not to run here", lease.message_id)
            lease.end()
            self.in_hand.await_received()
            lease.put_back(0)
            self.in_hand.let_go(lease)
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
            lease.put_back(delay_s)
            self.in_hand.let_go(lease, delay_s)

    # --- The run -----------------------------------------------------------------------------------------

    @contextmanager
    def _in_turn(self, lease: Lease) -> Iterator[None]:
        """While the block runs, the job is one that has not run to its end, and its thread has to turn."""
        try:
            with self.watchdog.watched():
                yield
        finally:
            self.in_hand.note_run(lease)

    def _run(self, job: Job, invalid: str | None, lease: Lease, cancel: CancelWatch) -> Ran:
        """Run the job to its end; raises PutBackError or JobStoppedError."""
        now = datetime.now(UTC)
        if invalid is not None:
            return Ran(now, error=job_error("invalid_message", invalid))
        if cancel.came_first():
            return Ran(now, error=job_error("cancelled", "the job was cancelled before its turn"))
        if job.command is not None:
            return self._run_command(job, job.command, lease, cancel)
        progress: Progress | None = None
        try:
            workflow = own_outputs(job.workflow or self._insist(lambda: self.inputs.fetch_workflow(job)), job.id)
            workflow = self.inputs.fetch(job, workflow, cancel.should_stop)
            nodes = " ".join(sorted(node["class_type"] for node in workflow.values()))
            progress = Progress(workflow, job.id, self.instance_id, self._usual_runs_s.get(nodes))
            began_at, finished = self._run_workflow(job, workflow, progress, lease, cancel)
            if (seconds := ran_s(finished.entry)) is not None:
                self.in_hand.note_run_time(seconds)
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
            self._remember(nodes, (datetime.now(UTC) - ran.started_at).total_seconds())
        return ran

    def _run_command(self, job: Job, command: str, lease: Lease, cancel: CancelWatch) -> Ran:
        """Run a command when its turn has come."""
        now = datetime.now(UTC)
        try:
            with self.in_hand.running(
                job.id, self._may_not_start(lease, cancel), alone=not self.settings.exec_cmd_beside
            ):
                now = datetime.now(UTC)
                self.in_hand.note_running(job.id)
                values, error = run_command(self.settings, job.id, command, cancel.should_stop)
                return Ran(now, values=values, error=error)
        except JobCancelledError:
            return Ran(now, error=job_error("cancelled", "the job was cancelled before its turn"))

    def _run_workflow(
        self, job: Job, workflow: Workflow, progress: Progress, lease: Lease, cancel: CancelWatch
    ) -> tuple[datetime | None, Finished]:
        """Run a workflow when its turn has come; returns since when it ran, as ComfyUI has it, and how it ended."""
        submitted_at = time.monotonic()
        stopped_at: list[float] = []

        def note(event: dict[str, Any]) -> None:
            if event["type"] == "execution_start":
                self.in_hand.note_running(job.id)
            progress.note(event)

        def should_stop() -> bool:
            """Those behind it are taken out first, or they would begin to run."""
            if not cancel.should_stop():
                return False
            stopped_at.append(time.monotonic())
            return not self.in_hand.is_before_others(job.id) or time.monotonic() > stopped_at[0] + STOP_S

        def should_withdraw() -> bool:
            """Others may start it sooner than we can. An attempt is used up, so not the last ones."""
            waited_s = time.monotonic() - submitted_at
            too_long = min(self.in_hand.running_s(), waited_s) > AHEAD_LIMIT_S
            is_early = lease.attempt < self.settings.max_receives - 1
            return self.shutdown.gives_back(lease.attempt) or (too_long and is_early)

        def run() -> tuple[datetime | None, Finished]:
            return self.care.run(
                workflow,
                job.id,
                on_progress=note,
                should_stop=should_stop,
                should_withdraw=should_withdraw,
                before_first_submit=lambda: self.results.remove_local_files(job.id),  # of a try cut short
            )

        with (
            self.in_hand.running(job.id, self._may_not_start(lease, cancel), alone=False),
            every(PROGRESS_S, lambda: self._tell(progress)),
        ):
            submitted_at = time.monotonic()
            try:
                return run()
            except NeverStartedError:
                # It stood behind another, which may have killed ComfyUI. To give it back would use up an attempt.
                if not self.care.comes_back(lease.attempt):
                    raise
                logger.info("Job %s had not started: ComfyUI is back, once more", job.id)
                submitted_at = time.monotonic()
                return run()

    def _may_not_start(self, lease: Lease, cancel: CancelWatch) -> Callable[[], bool]:
        """What is asked while a job waits for its turn."""
        return lambda: cancel.should_stop() or self.shutdown.gives_back(lease.attempt)

    def _tell(self, progress: Progress) -> None:
        """Tell those who wait, and the operator, how far the job is."""
        news = self.results.store_progress(progress)
        if news is not None:
            seen = {name: news.get(name) for name in ("node_title", "value", "max")}
            self.in_hand.note_progress(progress.job_id, seen)

    def _remember(self, nodes: str, seconds: float) -> None:
        """How long a workflow of these nodes ran."""
        self._usual_runs_s[nodes] = seconds
        if len(self._usual_runs_s) > USUAL_RUNS:
            del self._usual_runs_s[next(iter(self._usual_runs_s))]

    def _insist(self, action: Callable[[], T]) -> T:
        return insist(action, self.shutdown.pause)


def understand(lease: Lease) -> tuple[Job, str | None]:
    """The message's job, and why it is none (then the job is only whom to tell). Raises NothingToRunError."""
    try:
        return parse_message(lease.body, lease.message_id), None
    except InvalidMessageError as reason:
        return Job(reason.job_id or lease.message_id, callback_url=reason.callback_url), str(reason)
