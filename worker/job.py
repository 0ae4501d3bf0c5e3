"""One job's story, from its message to the deletion of that; every ending there is."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Any, TypeVar

from comfy_utils import InvalidWorkflowError, Job, NothingToRunError, Settings, Workflow, error_code
from ground.answers import error_of, job_error
from ground.comfyui import Finished, JobCancelledError, JobStoppedError, JobTimeoutError, WorkflowRefusedError
from ground.savers import own_outputs
from worker.attempts import Attempts, failure_of, understand
from worker.cancel import CancelWatch
from worker.comfy_care import ComfyCare, ran_s
from worker.commands import run_command
from worker.disk import Disk
from worker.errors import (
    ComfyDiedError,
    DiskFullError,
    NeverStartedError,
    PutBackError,
    explain,
    found_no_room,
    is_disk_full,
)
from worker.in_hand import InHand
from worker.inputs import Inputs
from worker.lease import Lease
from worker.mount import Mount
from worker.progress import Pace, Progress
from worker.reports import Reports
from worker.results import CALLBACK_TRIES, Ran, Result, Results
from worker.retry import Patience, backoff_s, every
from worker.scaling import AHEAD_LIMIT_S
from worker.shutdown import Shutdown
from worker.watchdog import Watchdog

logger = logging.getLogger(__name__)

T = TypeVar("T")

STOP_S = 3
"""So long the running job waits, when all are given back, for those behind it to be taken out of the queue."""
NEVER_STARTED_LIMIT = 5
"""So often a job is handed to a ComfyUI that ends before it comes to it; then it is for another instance."""
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
    mount: Mount
    disk: Disk
    inputs: Inputs
    results: Results
    reports: Reports
    attempts: Attempts
    _usual_runs_s: dict[str, float] = field(
        default_factory=dict
    )  # a workflow's nodes -> how long one of them last ran
    _deleting: Patience = field(default_factory=Patience)

    def process(self, lease: Lease) -> None:
        """Bring one message to its end: result stored, callback accepted, message deleted; or put it back."""
        try:
            self._bring_to_end(lease)
        except Exception as error:
            if is_disk_full(error):
                error = DiskFullError(f"the disk has no room: {explain(error)}")
            self._put_back(lease, error)

    def _bring_to_end(self, lease: Lease) -> None:
        """Raises JobStoppedError where it is not to end here, anything else where it did not end."""
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
            result = self._read(lambda: self.results.stored(job.id))
            if result is None:
                self.attempts.answer_predecessor(job, lease)
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
        try:
            made = self.results.make(job, ran, lease)
        except OSError as error:
            if not is_disk_full(error):
                raise
            self.disk.make_room()
            with self._judging_the_disk(job.id):
                made = self.results.make(job, ran, lease)
        result = self.results.bucket.writing.insist(lambda: self.results.store(made), self.shutdown.pause)
        lease.stored = True
        self.reports.count(result)
        return result

    def _finish(self, job: Job, result: Result, lease: Lease) -> None:
        """The job has its receipt: tell whoever is to hear of it, and delete the message."""
        self.attempts.tell_of(job, result, CALLBACK_TRIES)
        if not lease.lost:
            self._deleting.insist(lambda: lease.delete(more_come=self.in_hand.not_run() > 0), self.shutdown.pause)
        if lease.lost:
            logger.warning("Job %s: its lease was lost, so its message comes again and is deleted then", job.id)
        lease.end()
        self.results.end_early(job.id)
        self.results.outputs.remove(job.id)
        self.inputs.remove(job, result["error"])
        self.in_hand.let_go(lease)
        reason = f" ({result['error']['message']})" if result["error"] else ""
        logger.info("Job %s: %s%s", job.id, result["status"], reason)

    def _drop(self, lease: Lease, reason: Exception) -> None:
        """Delete a message that asks for nothing."""
        logger.info("Message %s asks for nothing: %s", lease.message_id, reason)
        self._deleting.insist(lease.delete, self.shutdown.pause)
        lease.end()
        self.in_hand.let_go(lease)

    def _put_back(self, lease: Lease, error: Exception) -> None:
        """The job did not end here: another attempt may help. Where none is left it is answered before."""
        is_stopped, is_last = isinstance(error, JobStoppedError), lease.attempt >= self.settings.max_receives
        # The delay doubles with each attempt. A job that stood in the queue of a ComfyUI which died has not failed: it
        # is for anyone, at once, if that helps; and after MAX_RECEIVES SQS moves it to the dead-letter queue.
        is_blameless = isinstance(error, NeverStartedError | DiskFullError)
        at_once = is_stopped or is_last or (is_blameless and lease.attempt == 1)
        delay_s = 0 if at_once else min(5 * 2 ** (lease.attempt - 1), 300)
        if is_stopped and not is_last:
            logger.info("Message %s is given back: it is not to run here", lease.message_id)
        else:
            logger.warning(
                "Message %s is put back for %d s after attempt %d of %d: %s",
                lease.message_id,
                delay_s,
                lease.attempt,
                self.settings.max_receives,
                explain(error) if not is_stopped else "this worker stops",
                exc_info=error
                if not (isinstance(error, PutBackError | JobStoppedError) or error_code(error))
                else None,
            )
            self._note_attempt(lease, error)
        if is_last:
            self._answer(lease, error)
        if is_stopped or isinstance(error, DiskFullError):  # it is to go elsewhere
            lease.end()
            self.in_hand.await_received()
        self.results.end_early(lease.job_id, at_once=is_stopped)
        if not (is_stopped or lease.lost):
            self.inputs.remove_files(lease.job_id)
        lease.put_back(delay_s)
        self.in_hand.let_go(lease, delay_s)

    def _note_attempt(self, lease: Lease, error: Exception) -> None:
        """Let the next worker, and the operator, know how this attempt ended."""
        noted = failure_of(error)
        if lease.stored:
            noted = noted | {"kind": "callback", "message": explain(error)}
        with suppress(NothingToRunError):
            self.attempts.note(understand(lease)[0].id, lease.attempt, noted)

    def _answer(self, lease: Lease, error: Exception) -> None:
        """The last attempt is over: tell whoever waits. What fails here is left to worker/dead_letters.py."""
        if lease.stored:
            return  # its callback was refused to the last
        try:
            self.attempts.answer(lease, failure_of(error))
        except Exception as failure:
            logger.warning("Message %s is answered later: %s", lease.message_id, explain(failure))

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
        warnings: tuple[str, ...] = ()
        has_died = lease.attempt > 1 and self._read(lambda: self.attempts.died(job.id))
        try:
            job, warnings = self._read(partial(self.inputs.fetch_workflow, job))
            workflow = own_outputs(job.workflow or {}, job.id)
            nodes = " ".join(sorted(node["class_type"] for node in workflow.values()))
            progress = Progress(workflow, job.id, self.instance_id, self._usual_runs_s.get(nodes))
            began_at, finished = self._run_with_room(job, workflow, progress, lease, cancel, has_died)
            if (seconds := ran_s(finished.entry)) is not None:
                self.in_hand.note_run_time(seconds)
        except InvalidWorkflowError as reason:
            return Ran(now, error=job_error("invalid_workflow", str(reason)))
        except WorkflowRefusedError as refused:
            return Ran(now, error=refused.error, warnings=warnings)
        except JobCancelledError:
            began_at = progress.started_at if progress else None
            when = "while it ran" if began_at else "before its turn"
            return Ran(began_at or now, error=job_error("cancelled", f"the job was cancelled {when}"))
        except ComfyDiedError as died:
            died.name_node(*(progress.node() if progress else (None, None)))
            if not has_died:
                raise
            self.attempts.note(job.id, lease.attempt, failure_of(died))
            return Ran((progress and progress.started_at) or now, error=self.attempts.verdict(job.id, died))
        except JobTimeoutError:
            error = job_error("timeout", f"the job ran longer than JOB_TIMEOUT={self.settings.job_timeout_s} s")
            return Ran((progress and progress.started_at) or now, error=error)
        ran = Ran(began_at or progress.started_at or now, finished, error=error_of(finished.entry), warnings=warnings)
        if ran.error is None:
            self._remember(nodes, (datetime.now(UTC) - ran.started_at).total_seconds())
            self.disk.note_success()
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
        except OSError as error:  # Python's words for a full disk may be others
            if (problem := self.disk.problem()) is None:
                raise
            raise DiskFullError(problem) from error

    def _run_with_room(
        self, job: Job, workflow: Workflow, progress: Progress, lease: Lease, cancel: CancelWatch, has_died: bool
    ) -> tuple[datetime | None, Finished]:
        """Run a workflow; where the disk has no room, once more, with room made.

        Raises what `_run_seeing` does, and what `is_disk_full` says so of where that was of no use.
        """
        try:
            return self._run_seeing(job, workflow, progress, lease, cancel, has_died)
        except (OSError, DiskFullError) as error:
            if not is_disk_full(error):
                raise
            logger.warning("Job %s has found no room on the disk, which is cleared: %s", job.id, explain(error))
            self.disk.make_room(but=job.id)
        with self._judging_the_disk(job.id):
            return self._run_seeing(job, workflow, progress, lease, cancel, has_died)

    @contextmanager
    def _judging_the_disk(self, job_id: str) -> Iterator[None]:
        """Room was made: where there is none again, it may be time for the instance to leave. That is known before this
        worker takes anything else, or it might take the same job."""
        try:
            yield
        except (OSError, DiskFullError) as error:
            if is_disk_full(error):
                self.disk.note_full(job_id)
            raise

    def _run_seeing(
        self, job: Job, workflow: Workflow, progress: Progress, lease: Lease, cancel: CancelWatch, has_died: bool
    ) -> tuple[datetime | None, Finished]:
        """Run a workflow; where it may only have failed because ComfyUI did not see the bucket, once more.

        Raises what `_run_workflow` does, and PutBackError where the bucket is not to be seen here.
        """
        is_anew = False
        while True:
            since, refused = time.monotonic(), None
            try:
                fetched = self.inputs.fetch(job, workflow, cancel.should_stop)
                began_at, finished = self._run_workflow(job, fetched, progress, lease, cancel, has_died)
                error = error_of(finished.entry)
                if found_no_room(error) or self.results.outputs.pictures(job.id).found_no_room:
                    raise DiskFullError(error["message"] if error else "a picture could not be written")
                node_errors, has_failed = finished.node_errors, error is not None
            except WorkflowRefusedError as reason:
                refused, node_errors, has_failed = reason, reason.error["node_errors"], True
            except OSError:
                if (problem := self.mount.problem()) is None:
                    raise
                self.care.note_blind()
                raise PutBackError(problem) from None
            doubt = self.mount.doubt(fetched, node_errors, has_failed=has_failed)
            if doubt is None:
                if refused is not None:
                    raise refused
                return began_at, finished
            if is_anew:
                self.care.note_blind()
                raise PutBackError(doubt)
            is_anew = True
            logger.warning("Job %s is run again, by a ComfyUI that is started anew: %s", job.id, doubt)
            with self.in_hand.running(job.id, self._may_not_start(lease, cancel), alone=True):
                self.care.start_anew(lease.attempt, since)

    def _run_workflow(
        self, job: Job, workflow: Workflow, progress: Progress, lease: Lease, cancel: CancelWatch, has_died: bool
    ) -> tuple[datetime | None, Finished]:
        """Run a workflow when its turn has come; returns since when it ran, as ComfyUI has it, and how it ended.

        One at which ComfyUI died before runs alone.
        """
        submitted_at = 0.0
        stopped_at: list[float] = []

        pictures = self.results.outputs.pictures(job.id, workflow)
        pace = Pace(job, self.inputs.is_watched)
        early = self.results.early(job, progress)

        def note(event: dict[str, Any]) -> None:
            if event["type"] == "execution_start":
                self.in_hand.note_running(job.id)
            progress.note(event)
            pictures.note(event)
            early.note(event)

        def tell() -> None:
            if pace.is_time():
                self._tell(progress)

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
                extra_data=job.extra_data,
                has_died=has_died,
                on_progress=note,
                should_stop=should_stop,
                should_withdraw=should_withdraw,
                before_first_submit=lambda: self.results.outputs.clear(job.id),
                is_whole=lambda entry: self.results.outputs.is_whole(job.id, entry),
                on_picture=pictures.take if pictures.nodes else None,
            )

        with (
            self.in_hand.running(job.id, self._may_not_start(lease, cancel), alone=has_died),
            every(pace.turn_s, tell),
            self.results.outputs.held(job.id, workflow, lambda: should_stop() or should_withdraw()),
        ):
            # It stood behind another, which may have killed ComfyUI. To give it back would use up an attempt.
            for failures in range(1, NEVER_STARTED_LIMIT):
                submitted_at = time.monotonic()
                try:
                    return run()
                except NeverStartedError as error:
                    if not self.care.comes_back(lease.attempt):
                        raise
                    logger.info("Job %s had not started, once more, for ComfyUI is back: %s", job.id, error)
                    self.shutdown.pause(backoff_s(failures))
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

    def _read(self, action: Callable[[], T]) -> T:
        """What the bucket says, though it may be a while until it does."""
        return self.results.bucket.reading.insist(action, self.shutdown.pause)
