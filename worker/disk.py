"""Whether there is room on this machine's disks, what is cleared where there is none, and when that is of no use."""

from __future__ import annotations

import logging
import os
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field

from comfy_utils import NothingToRunError, Settings
from worker.attempts import understand
from worker.in_hand import InHand
from worker.inputs import Inputs
from worker.mount import Mount
from worker.outputs import Outputs
from worker.reports import Reports

logger = logging.getLogger(__name__)

FULL_BYTES = 65_536
"""With less than this no picture is written, and hardly a line of a log."""
CLEAR_EVERY_S = 60
CRAMPED_LIMIT = 3
"""So many different jobs in a row may find too little room where there is some, until that is the instance's fault:
one may want more than any instance has."""


@dataclass(eq=False)
class Disk:
    """The disks on which jobs, ComfyUI and this worker write; the bucket's mount is none of them.

    A full one is the instance's fault, not the job's.
    """

    settings: Settings
    mount: Mount
    inputs: Inputs
    outputs: Outputs
    reports: Reports
    in_hand: InHand
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _cleared_at: float | None = None
    _said: str | None = None
    _reason: str | None = None  # why the instance is to be replaced
    _cramped: set[str] = field(default_factory=set)  # jobs that found too little room since one last ran well

    # --- Looking -----------------------------------------------------------------------------------------

    def problem(self) -> str | None:
        """Which disk is full; None where all have room."""
        for folder in self._folders():
            with suppress(OSError):
                found = os.statvfs(folder)
                if found.f_bavail * found.f_frsize < FULL_BYTES:
                    return f"the disk of {folder} is full"
                if found.f_files and not found.f_favail:
                    return f"the disk of {folder} takes no more files"
        return None

    def is_full(self) -> bool:
        """Whether a disk is full, also after it was cleared; where nothing is in hand whose end would make room, that
        is the instance's fault. Asked between jobs."""
        problem = self.problem()
        if problem is not None and (self._cleared_at is None or time.monotonic() > self._cleared_at + CLEAR_EVERY_S):
            self.make_room()
            problem = self.problem()
        if problem is not None and not self.in_hand.leases:
            self._reason = f"{problem}, also after what no job needs was removed"
        if problem != self._said:
            logger.error("Nothing is taken: %s", problem) if problem else logger.info("The disk has room again")
            self._said = problem
        return problem is not None

    def _folders(self) -> list[str]:
        home = self.settings.comfy_home
        folders = [home, home / "logs", home / "job-output", home / "ComfyUI/temp"]
        links = [home / "ComfyUI/input", home / "ComfyUI/output"]
        return [*map(str, folders), *(str(link) for link in links if not self.mount.holds(link)), temporary_folder()]

    # --- Clearing ----------------------------------------------------------------------------------------

    def make_room(self, but: str | None = None) -> None:
        """Remove what no job in hand needs, `but` being one that needs nothing any more: inputs, outputs, old logs."""
        with self._lock:
            self._cleared_at = time.monotonic()
            leases = list(self.in_hand.leases)
            needed = set()
            for lease in leases:
                with suppress(NothingToRunError):
                    needed.add(understand(lease)[0].id)
            since = min((lease.received_at for lease in leases), default=time.time())
            if not self.mount.holds(self.settings.comfy_home / "ComfyUI/input"):
                self.inputs.make_room(needed - {but})
            self.outputs.make_room(needed - {but}, but, since)
            self.reports.make_room()

    # --- Blame -------------------------------------------------------------------------------------------

    def note_full(self, job_id: str) -> None:
        """A job has found no room here, also after room was made.

        What it leaves is removed. Where there is less room than one input may have, no other would fare better.
        """
        self.make_room(but=job_id)
        self._cramped.add(job_id)
        free_mb = min((_free(folder) for folder in self._folders()), default=0) / 1_000_000
        if free_mb < self.settings.input_limit_mb:
            self._reason = f"the disk is full: {free_mb:.0f} MB are free after all was removed that no job needs"
        elif len(self._cramped) >= CRAMPED_LIMIT:
            self._reason = f"{len(self._cramped)} different jobs in a row found no room on the disk"

    def note_success(self) -> None:
        """A job has run well: there was room."""
        self._cramped.clear()

    def blame(self) -> str | None:
        """Why the instance is to be replaced; None where it is not."""
        return self._reason

    def forgive(self) -> None:
        """The group knows; from now on it is counted anew."""
        self._reason = None
        self._cramped.clear()


def temporary_folder() -> str:
    """Where temporary files go; Python finds no such place on a full disk, if it has not looked before."""
    try:
        return tempfile.gettempdir()
    except FileNotFoundError:
        return os.environ.get("TMPDIR", "/tmp")


def _free(folder: str) -> float:
    """How many bytes may still be written there."""
    try:
        found = os.statvfs(folder)
    except OSError:
        return float("inf")
    return found.f_bavail * found.f_frsize
