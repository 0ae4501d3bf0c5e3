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

from comfy_utils import (
    ComfyGoneError,
    ComfyStalledError,
    ComfyUI,
    Finished,
    InvalidWorkflowError,
    JobCancelledError,
    JobStoppedError,
    JobTimeoutError,
    Settings,
    Workflow,
    check_workflow,
    error_of,
    new_job_id,
    own_outputs,
)
from worker.errors import NeverStartedError, PutBackError
from worker.results import remove_folder
from worker.shutdown import Shutdown

logger = logging.getLogger(__name__)

READY_WAIT_S = 20
"""So long it is waited for ComfyUI before it is looked at the rest, too: as long as a poll of the queue takes."""
COMFY_BACK_S = 60
"""So long a job that ComfyUI had not started when it died is kept; then it is for another instance."""
FAILURES_LIMIT = 2
"""After so many failures of ComfyUI in a row the instance is declared Unhealthy."""
INTERRUPT_S = 60
"""An interrupt takes effect at the next node or sampler step; a node that takes longer is stuck."""


@dataclass(eq=False)
class ComfyCare:
    """Runs workflows in ComfyUI, and knows how it has fared."""

    settings: Settings
    comfy: ComfyUI
    shutdown: Shutdown
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _answered_at: float | None = None  # when ComfyUI last did
    _is_warm: bool = False
    _failures: int = 0  # in a row
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
                    self._note_failure(time.monotonic())
                    self._restart(time.monotonic())
                return False
            self.shutdown.stop.wait(0.1)
        self._answered_at = time.monotonic()
        if self.settings.warmup_workflow is not None and not self._is_warm:
            self._warm_up(self.settings.warmup_workflow)
        return not self.shutdown.is_leaving()

    def comes_back(self, attempt: int) -> bool:
        """Wait for a ComfyUI that is gone, with a job in hand that it had not started; False where that takes long."""
        limit = time.monotonic() + COMFY_BACK_S
        while not self.comfy.is_ready():
            if self.shutdown.gives_back(attempt):
                raise JobStoppedError
            if time.monotonic() > limit:
                return False
            time.sleep(0.2)
        self._answered_at = time.monotonic()
        return True

    def _warm_up(self, path: Path) -> None:
        """Run WARMUP_WORKFLOW once, so that the first job does not pay for loading the models."""
        self._is_warm = True
        job_id, began = new_job_id(), time.monotonic()
        try:
            workflow = own_outputs(check_workflow(json.loads(path.read_bytes())), job_id)
            finished = self.comfy.run(
                workflow,
                job_id,
                timeout_s=self.settings.job_timeout_s,
                stall_s=self.settings.stall_timeout_s,
                should_stop=lambda: self.shutdown.should_stop() or self.shutdown.is_leaving(),
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

    # --- Running -----------------------------------------------------------------------------------------

    def run(
        self,
        workflow: Workflow,
        job_id: str,
        *,
        on_progress: Callable[[dict[str, Any]], None],
        should_stop: Callable[[], bool],
        should_withdraw: Callable[[], bool],
        before_first_submit: Callable[[], None],
    ) -> tuple[datetime | None, Finished]:
        """Run a workflow (see ComfyUI.run); out of memory is tried once more on freed memory.

        Returns since when it ran, as ComfyUI has it, and how it ended. Raises PutBackError, NeverStartedError where
        ComfyUI was gone before it began, and what ComfyUI.run raises of a workflow that is refused, timed out or
        stopped.
        """
        began_at: datetime | None = None
        submitted_at = time.monotonic()
        has_started = threading.Event()

        def note(event: dict[str, Any]) -> None:
            has_started.set()  # the first event says so
            on_progress(event)

        for again in (False, True):
            try:
                finished = self.comfy.run(
                    workflow,
                    job_id,
                    timeout_s=self.settings.job_timeout_s,
                    stall_s=self.settings.stall_timeout_s,
                    on_progress=note,
                    should_stop=should_stop,
                    should_withdraw=should_withdraw,
                    before_first_submit=before_first_submit,
                    again=again,
                )
            except (JobTimeoutError, JobCancelledError):
                self._await_free_executor(job_id)
                raise
            except ComfyGoneError as error:
                self._note_failure(submitted_at)
                if isinstance(error, ComfyStalledError):
                    self._restart(submitted_at)
                raise (PutBackError if has_started.is_set() else NeverStartedError)(str(error)) from error
            self._failures = 0
            began_at = began_at or started_at(finished.entry)
            if (error_of(finished.entry) or {}).get("kind") != "out_of_memory":
                return began_at, finished
            logger.warning("Job %s ran out of memory%s", job_id, " again" if again else ": freeing, one more try")
            with suppress(ComfyGoneError):
                self.comfy.free()
        raise PutBackError("out of memory, also after ComfyUI freed its own")

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

    def is_to_blame(self) -> bool:
        """Whether it fails again and again, so that the instance is to be replaced. Asked, it counts anew."""
        with self._lock:
            is_bad = self._failures >= FAILURES_LIMIT
            if is_bad:
                self._failures = 0
        return is_bad

    def _note_failure(self, since: float) -> None:
        """Count a failure of ComfyUI that began after `since`, once for all jobs that it lost."""
        with self._lock:
            self._failures += since > self._failed_at
            self._failed_at = time.monotonic()

    def _restart(self, since: float) -> None:
        """Kill ComfyUI, unless it was done after `since`; systemd starts it and all that belongs to it anew.

        It is given as long again to come up.
        """
        with self._lock:
            if self._restarted_at > since:
                return
            self._restarted_at = time.monotonic()
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
