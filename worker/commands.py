"""exec_cmd: shell commands that come with a message."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from comfy_utils import Settings
from ground.answers import job_error
from ground.comfyui import JobCancelledError, JobStoppedError

OUTPUT_BYTES = 4096
"""So much of a command's output, its end, goes into the result."""


def run_command(
    settings: Settings, job_id: str, command: str, should_stop: Callable[[], bool]
) -> tuple[dict[str, dict[str, Any]], dict[str, Any] | None]:
    """Run a shell command, where EXEC_CMD allows it, in a process group of its own.

    Returns the result's `values` and `error`. Raises JobStoppedError when it is to stop.
    """
    allowed = settings.exec_cmd
    if allowed == "never" or (allowed == "base" and settings.env != "base"):
        message = f"commands do not run here: EXEC_CMD={allowed} and ENV={settings.env}"
        return {}, job_error("command_refused", message)
    deadline = time.monotonic() + settings.job_timeout_s
    environment = os.environ | {"COMFY_JOB_ID": job_id}
    environment.pop("MALLOC_TRIM_THRESHOLD_", None)  # start_service.sh means the worker by it
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            ["/bin/bash", "-c", command],
            cwd=settings.comfy_home,
            env=environment,
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
        output.seek(max(0, output.seek(0, os.SEEK_END) - OUTPUT_BYTES))
        text = output.read().decode(errors="replace")
    values = {"command": {"exit_code": exit_code, "output": text}}
    if cancelled:
        return values, job_error("cancelled", "the command was cancelled while it ran")
    if exit_code is None:
        return values, job_error("timeout", f"the command ran longer than JOB_TIMEOUT={settings.job_timeout_s} s")
    if exit_code != 0:
        return values, job_error("command_failed", f"the command ended with exit code {exit_code}", detail=text)
    return values, None
