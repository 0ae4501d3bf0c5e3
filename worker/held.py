"""What this worker holds, in files: should it be killed, the next one on this machine goes on with it at once.

Without them the messages of a killed worker come back when their visibility timeout ends, though the next worker is
there after seconds and ComfyUI may have done the job meanwhile.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypedDict

logger = logging.getLogger(__name__)


class Note(TypedDict):
    """A message as SQS gave it; whose it was; and whether it was taken over from a killed worker."""

    instance_id: str
    queue: str
    received_at: float
    taken_over: bool
    message: dict[str, Any]


class Held:
    """A folder of this worker's own, held/<a name>/, with a file for each message; locked as long as it lives.

    All is best effort: what cannot be written costs the next worker the visibility timeout, and no job.
    """

    def __init__(self, folder: Path, instance_id: str, queue_name: str) -> None:
        self._all = folder
        self._instance_id = instance_id
        self._queue_name = queue_name
        self._own: Path | None = None
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            self._own = Path(tempfile.mkdtemp(dir=folder))
            self._lock = os.open(self._own, os.O_RDONLY)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
        except OSError as error:
            logger.warning("A worker after this one would not know what it held: %s", error)

    def note(self, message: dict[str, Any], received_at: float, *, taken_over: bool) -> None:
        """The message is in hand; `received_at` in seconds since 1970."""
        note: Note = {
            "instance_id": self._instance_id,
            "queue": self._queue_name,
            "received_at": received_at,
            "taken_over": taken_over,
            "message": message,
        }
        if self._own is not None:
            try:
                (self._own / message["MessageId"]).write_text(json.dumps(note))
            except OSError as error:
                logger.warning("Message %s is not noted: %s", message["MessageId"], error)

    def forget(self, message_id: str) -> None:
        """The message is no longer in hand."""
        if self._own is not None:
            (self._own / message_id).unlink(missing_ok=True)

    def left_behind(self) -> Iterator[Note]:
        """What workers that were killed on this machine had in hand.

        Each message once: a job that kills its worker would else do so for ever, without an attempt being used up.
        """
        for folder in self._all.glob("*"):
            if folder == self._own or not _is_dead(folder):
                continue
            for path in folder.glob("*"):
                note = _read(path)
                if note is not None and self._is_ours(note):
                    self.note(note["message"], note["received_at"], taken_over=True)
                    yield note
            shutil.rmtree(folder, ignore_errors=True)

    def _is_ours(self, note: Note) -> bool:
        """An image that was made of a machine at work has that one's notes."""
        return (note["instance_id"], note["queue"]) == (self._instance_id, self._queue_name) and not note[
            "taken_over"
        ]


def _is_dead(folder: Path) -> bool:
    """Whether the worker whose folder it is lives no more; its lock went with it."""
    try:
        lock = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        finally:
            os.close(lock)
    except OSError:
        return False


def _read(path: Path) -> Note | None:
    """A note; None for one that was being written when its worker was killed."""
    try:
        note: Note = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        logger.info("A killed worker's note %s cannot be read: %s", path.name, error)
        return None
    return note
