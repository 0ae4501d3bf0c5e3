"""Whether ComfyUI is well: ready, warmed up, restarted where it hangs; and whom a failure is blamed on."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from comfy_utils import InvalidWorkflowError, Settings, Workflow, check_workflow, new_job_id
from ground.answers import error_of
from ground.comfyui import (
    ComfyGoneError,
    ComfySlowError,
    ComfyStalledError,
    ComfyUI,
    Finished,
    JobCancelledError,
    JobStoppedError,
    JobTimeoutError,
)
from ground.savers import own_outputs
from worker.errors import ComfyDiedError, NeverStartedError, OutOfMemoryError, PutBackError
from worker.mount import Mount
from worker.outputs import Outputs
from worker.shutdown import Shutdown

logger = logging.getLogger(__name__)

READY_WAIT_S = 20
"""So long it is waited for ComfyUI before it is looked at the rest, too: as long as a poll of the queue takes."""
COMFY_BACK_S = 60
"""So long a job that ComfyUI had not started when it died is kept; then it is for another instance."""
ANEW_S = 180
"""So long it is waited, with a job in hand, for a ComfyUI that was started anew to see the bucket as it is."""
ABSENCES_LIMIT = 2
"""So often ComfyUI may not come back, not see the bucket, or end at its warm-up, until the instance is Unhealthy."""
SUSPECTS_LIMIT = 3
"""So many different jobs may end ComfyUI, none having run to its end between, until it is. Two of them may be bad
jobs of one batch; and until then no job has failed for good."""
FREE_S = 0.1
"""ComfyUI frees memory and cache when its executor next looks; a job that came before that would run on the old ones."""
INTERRUPT_S = 60
"""An interrupt takes effect at the next node or sampler step; a node that takes longer is stuck."""


@dataclass(eq=False)
class _Submission:
    """A job that was handed to ComfyUI."""

    number: Any = None  # its place in the queue, smaller ones run first; None where that is not known
    is_in_queue: bool = False  # as far as is known
    has_started: bool = False
    has_ended: bool = False  # well; its history may not have been read yet
    is_behind: bool = False  # a job that was there before this worker
    ran: bool | None = None  # when ComfyUI failed


@dataclass(eq=False)
class ComfyCare:
    """Runs workflows in ComfyUI, and knows how it has fared."""

    settings: Settings
    comfy: ComfyUI
    outputs: Outputs
    mount: Mount
    shutdown: Shutdown
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _answered_at: float | None = None  # when ComfyUI last did
    _is_warm: bool = False
    _has_orphans: bool = False
    _submissions: dict[str, _Submission] = field(default_factory=dict)  # by job id
    _suspects: set[str] = field(default_factory=set)  # jobs at which ComfyUI ended since one last ran to its end
    _absences: int = 0  # since then
    _failed_at: float = -math.inf
    _restarted_at: float = -math.inf

    # --- Ready or not ------------------------------------------------------------------------------------

    def is_ready(self) -> bool:
        """Whether ComfyUI answers, waiting for it as long as a poll takes: without it nothing is taken.

        Until its first answer it may take any time, because models may have to be copied.
        """
        address = self.settings.comfy_address
        limit = time.monotonic() + READY_WAIT_S
        while not self.comfy.is_ready():
            if self.shutdown.should_stop() or self.shutdown.is_leaving() or time.monotonic() > limit:
                if self._answered_at is None:
                    logger.info("Waiting for ComfyUI on %s", address)
                    return False
                gone_s = time.monotonic() - self._answered_at
                logger.warning("ComfyUI has not answered on %s for %.0f s", address, gone_s)
                if gone_s > self.settings.stall_timeout_s:
                    self._absences += 1
                    self._restart(time.monotonic())
                return False
            self.shutdown.stop.wait(0.1)
        if self._answered_at is None and self.settings.env != "base":  # there, designers have theirs
            self._look_for_orphans()
        self._answered_at = time.monotonic()
        if (problem := self.mount.problem()) is not None:
            logger.error("ComfyUI is started anew: %s", problem)
            self._absences += 1
            self._restart(time.monotonic())
            return False
        if self.settings.warmup_workflow is not None and not self._is_warm:
            self._warm_up(self.settings.warmup_workflow)
        return not self.has_failed() and not self.shutdown.is_leaving()

    def start_anew(self, attempt: int, since: float) -> None:
        """Restart ComfyUI, unless it was done after `since`, so that it sees the bucket as it is; wait until it answers.

        Nothing else runs. Raises PutBackError where it does not come back, JobStoppedError.
        """
        self._restart(since)
        if not self.comes_back(attempt, ANEW_S):
            raise PutBackError("ComfyUI, which was started anew to see the bucket as it is, does not come back")

    def comes_back(self, attempt: int, limit_s: float = COMFY_BACK_S) -> bool:
        """Wait for a ComfyUI that is gone, with a job in hand that it had not started; False where that takes long."""
        limit = time.monotonic() + limit_s
        while not self.comfy.is_ready():
            if self.shutdown.gives_back(attempt):
                raise JobStoppedError
            if time.monotonic() > limit:
                return False
            time.sleep(0.2)
        self._answered_at = time.monotonic()
        return True

    def _look_for_orphans(self) -> None:
        """Look after the jobs that ComfyUI has when this worker comes: those of a worker that was killed."""
        with suppress(ComfyGoneError):
            orphans = self.comfy.jobs()
            self._has_orphans = bool(orphans)
            threading.Thread(target=self._watch_orphans, args=(orphans,), name="orphans", daemon=True).start()

    def _watch_orphans(self, orphans: list[str]) -> None:
        """Until they have ended, or their messages have come here. Nobody else notices one that hangs.

        What they tell is told to the worker that was killed, so only JOB_TIMEOUT tells that they do.
        """

        def is_there(job_id: str) -> bool:
            try:
                return self.comfy.place(job_id, 1) is not None
            except ComfySlowError:
                return True

        try:
            for job_id in orphans:  # in the order in which they run
                limit = time.monotonic() + self.settings.job_timeout_s
                while job_id not in self._submissions and is_there(job_id):
                    if time.monotonic() > limit:
                        logger.warning(
                            "Job %s, of a worker that is gone, has run for longer than JOB_TIMEOUT", job_id
                        )
                        self.comfy.cancel(job_id)
                        self._await_free_executor(job_id)
                    time.sleep(1)
        except ComfyGoneError as error:
            logger.info("The jobs of a worker that is gone are, too: %s", error)
        finally:
            self._has_orphans = False

    def _warm_up(self, path: Path) -> None:
        """Run WARMUP_WORKFLOW once, so that the first job does not pay for loading the models."""
        job_id, began = new_job_id(), time.monotonic()

        def should_stop() -> bool:
            return self.shutdown.should_stop() or self.shutdown.is_leaving()

        try:
            workflow = own_outputs(check_workflow(json.loads(path.read_bytes())), job_id)
            with self.outputs.held(job_id, workflow, should_stop):
                finished = self.comfy.run(
                    workflow,
                    job_id,
                    timeout_s=self.settings.job_timeout_s,
                    stall_s=self.settings.stall_timeout_s,
                    should_stop=should_stop,
                )
            self.outputs.collect(job_id, finished.entry)
            error = error_of(finished.entry)
            if error is not None:
                raise InvalidWorkflowError(error["message"])
            self._note_success()
            logger.info("Warmed up with %s in %.1f s", path, time.monotonic() - began)
        except JobStoppedError:
            logger.info("Not warmed up: this worker stops")
        except ComfyGoneError as error:
            self._absences += 1
            self._note_failure(began, error)
            logger.warning("ComfyUI ended at its warm-up with %s: %s", path, error)
            return
        except Exception as error:
            logger.warning("Cannot warm up with WARMUP_WORKFLOW=%s, so the first job takes longer: %s", path, error)
        self._is_warm = True
        self.outputs.remove(job_id)

    # --- Running -----------------------------------------------------------------------------------------

    def run(
        self,
        workflow: Workflow,
        job_id: str,
        *,
        extra_data: Mapping[str, Any],
        has_died: bool,
        on_progress: Callable[[dict[str, Any]], None],
        should_stop: Callable[[], bool],
        should_withdraw: Callable[[], bool],
        before_first_submit: Callable[[], None],
        is_whole: Callable[[Mapping[str, Any]], bool],
        on_picture: Callable[[str, memoryview, str], None] | None,
    ) -> tuple[datetime | None, Finished]:
        """Run a workflow (see ComfyUI.run); what ran out of memory, or is not `is_whole`, once more on freed memory.

        `has_died` says that ComfyUI ended at this job before, anywhere. Returns since when it ran, as ComfyUI has it,
        and how it ended. Raises ComfyDiedError where ComfyUI ended at this job, NeverStartedError where it ended
        before it came to it, OutOfMemoryError, and what ComfyUI.run raises of a workflow that is refused, timed out
        or stopped.
        """
        mine = _Submission()

        def note(event: dict[str, Any]) -> None:
            mine.has_started = True  # the first event says so
            mine.has_ended = event["type"] == "execution_success"
            on_progress(event)

        def note_submitted(number: Any) -> None:
            mine.number, mine.is_in_queue = number, True

        def run(again: bool) -> Finished:
            return self.comfy.run(
                workflow,
                job_id,
                timeout_s=self.settings.job_timeout_s,
                extra_data=extra_data,
                stall_s=self.settings.stall_timeout_s,
                on_progress=note,
                should_stop=should_stop,
                should_withdraw=should_withdraw,
                before_first_submit=before_first_submit,
                on_submitted=note_submitted,
                on_picture=on_picture,
                again=again,
            )

        submitted_at = time.monotonic()
        with self._lock:
            mine.is_behind = self._has_orphans
            self._submissions[job_id] = mine
        try:
            finished = run(again=False)
            self._note_success()
            began_at = started_at(finished.entry)
            if is_out_of_memory(finished) or not is_whole(finished.entry):
                what = "ran out of memory" if is_out_of_memory(finished) else "got names of files that are gone"
                logger.warning("Job %s %s: emptying memory and cache, one more try", job_id, what)
                mine.has_started = mine.has_ended = mine.is_in_queue = False  # it is to stand behind others once more
                with suppress(ComfyGoneError):
                    self.comfy.free()
                time.sleep(FREE_S)
                before_first_submit()  # what the first run has made is made again
                finished = run(again=True)
                if is_out_of_memory(finished):
                    raise OutOfMemoryError(error_of(finished.entry) or {})
            return began_at, finished
        except (JobTimeoutError, JobCancelledError):
            self._await_free_executor(job_id)
            raise
        except ComfyGoneError as error:
            if self.shutdown.should_stop():
                raise JobStoppedError from error  # the whole machine goes down
            self._note_failure(submitted_at, error)
            if not self._ran(mine):
                raise NeverStartedError(str(error)) from error
            if not has_died:
                self._suspects.add(job_id)
            raise ComfyDiedError(f"ComfyUI ended while this job ran: {error}") from error
        finally:
            with self._lock:
                self._submissions.pop(job_id, None)

    def _await_free_executor(self, job_id: str) -> None:
        """Restart ComfyUI if it does not let go of an interrupted job: the next would wait behind it."""
        limit = time.monotonic() + INTERRUPT_S
        try:
            while self.comfy.place(job_id) is not None and not self.shutdown.should_stop():
                if time.monotonic() > limit:
                    self._restart(limit)
                    return
                time.sleep(0.2)
        except ComfyGoneError as error:
            logger.warning("After the interrupt: %s", error)

    # --- Failures ----------------------------------------------------------------------------------------

    def has_failed(self) -> bool:
        """Whether ComfyUI has failed since it was last known to answer."""
        return self._failed_at >= (self._answered_at or 0)

    def blame(self) -> str | None:
        """Why the instance is to be replaced; None where it is not.

        A job's own fault is none of the instance's: it fails with different jobs, or does not come back.
        """
        reason = None
        if self._absences >= ABSENCES_LIMIT:
            reason = (
                f"ComfyUI did not come back, did not see the bucket, or ended at its warm-up, {self._absences} times"
            )
        elif len(self._suspects) >= SUSPECTS_LIMIT:
            reason = f"ComfyUI ended at {len(self._suspects)} different jobs in a row"
        return reason

    def forgive(self) -> None:
        """The group knows; from now on it is counted anew."""
        self._note_success()

    def _note_success(self) -> None:
        """ComfyUI has brought a job to its end: what failed before was not the instance's fault."""
        self._absences = 0
        self._suspects.clear()

    def note_blind(self) -> None:
        """ComfyUI has failed a job because it does not see the bucket."""
        self._failed_at = time.monotonic()
        self._absences += 1

    def _note_failure(self, since: float, error: ComfyGoneError) -> None:
        """ComfyUI has failed a job that was handed to it at `since`; where it hangs it is restarted."""
        self._failed_at = time.monotonic()
        self._is_warm = False
        if isinstance(error, ComfyStalledError):
            self._restart(since)

    def _ran(self, mine: _Submission) -> bool:
        """Whether it was this job that ran when ComfyUI failed: the last that had begun, or else the first in the queue.

        ComfyUI runs them one after the other, and may end sooner than it tells that one has begun, or has ended. The
        first of ours is not the first where a job of another worker's stood before it.
        """
        with self._lock:
            if mine.ran is None:
                lost = [each for each in self._submissions.values() if each.ran is None and each.is_in_queue]
                lost.sort(key=lambda each: math.inf if each.number is None else each.number)
                left = [each for each in lost if not each.has_ended]
                running = [each for each in left if each.has_started][-1:]
                running = running or [each for each in left[:1] if not each.is_behind]
                for each in lost:
                    each.ran = each in running
            return mine.has_started if mine.ran is None else mine.ran

    def _restart(self, since: float) -> None:
        """Kill ComfyUI, unless it was done after `since`; systemd starts it and all that belongs to it anew.

        It is given as long again to come up.
        """
        with self._lock:
            if self._restarted_at > since:
                return
            self._restarted_at = time.monotonic()
        self._is_warm = False
        kill_comfyui()
        self._restarted_at = self._failed_at = self._answered_at = time.monotonic()


def kill_comfyui() -> None:
    """Kill ComfyUI by its pid, because that needs no sudo; and at once, because one that hangs has nothing to put
    in order."""
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


def is_out_of_memory(finished: Finished) -> bool:
    """Whether a job ended because the GPU's memory was too small."""
    return (error_of(finished.entry) or {}).get("kind") == "out_of_memory"


def started_at(entry: Mapping[str, Any]) -> datetime | None:
    """When ComfyUI began to run the job, from its history entry; None where it does not tell."""
    stamps = _timestamps(entry)
    return datetime.fromtimestamp(stamps["execution_start"] / 1000, UTC) if "execution_start" in stamps else None


def ran_s(entry: Mapping[str, Any]) -> float | None:
    """How many seconds ComfyUI ran the job, without what the worker needs to hear of it; None where it does not tell."""
    stamps = _timestamps(entry)
    return (max(stamps.values()) - stamps["execution_start"]) / 1000 if "execution_start" in stamps else None


def _timestamps(entry: Mapping[str, Any]) -> dict[str, int]:
    """The milliseconds since 1970 of what ComfyUI notes of a run."""
    messages = (entry.get("status") or {}).get("messages") or []
    return {name: data["timestamp"] for name, data in messages if isinstance(data.get("timestamp"), int)}
