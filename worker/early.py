"""Files that are stored while their job still runs, for those who follow it; its end stores what was not."""

from __future__ import annotations

import json
import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from comfy_utils import Job
from ground.answers import OutputFile, outputs_of, without_secrets
from worker.bucket import Bucket
from worker.errors import explain
from worker.outputs import TICK_NS, Outputs
from worker.progress import Progress

logger = logging.getLogger(__name__)

MOST_TOLD_BYTES = 65_536
"""progress.json is written often: nodes whose outputs would make it longer are left to the job's end."""

Version = tuple[int, int, int]
"""By which it is seen whether a file is still what it was: inode, bytes, time."""


class EarlyOutputs:
    """Of one run of a live job: stores what its nodes have made as soon as ComfyUI names it, in a thread of its own.

    Whatever fails here is left to the job's end, which stores all that is not known to be stored.
    """

    def __init__(
        self,
        job: Job,
        progress: Progress,
        bucket: Bucket,
        outputs: Outputs,
        keys_of: Callable[[str, list[Path]], dict[Path, str]],
    ) -> None:
        """`keys_of` chooses the keys of a job's files, for the first of them the same if more come later."""
        self._job, self._progress = job, progress
        self._bucket, self._outputs, self._keys_of = bucket, outputs, keys_of
        self._events: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._is_closed = False
        self._paths: dict[Path, None] = {}
        self._stored: dict[str, Version] = {}
        self._told_bytes = 0

    def note(self, event: dict[str, Any]) -> None:
        """Take in an `executed` event; waits for nothing."""
        if event["type"] != "executed" or not self._job.live or self._is_closed:
            return
        self._events.put(event["data"])
        if self._thread is None:
            self._thread = threading.Thread(target=self._store_all, name="early", daemon=True)
            self._thread.start()

    def has(self, path: Path, key: str) -> bool:
        """Whether a file lies in the bucket as it is."""
        return key in self._stored and self._stored[key] == version_of(path)

    def close(self) -> None:
        """Begin to store nothing more."""
        self._is_closed = True
        self._events.put(None)

    def await_end(self, pause: Callable[[float], None]) -> None:
        """Store nothing more, and wait for a file that is under way; raises what `pause` raises."""
        self.close()
        while self._thread is not None and self._thread.is_alive():
            self._thread.join(0.2)
            pause(0.001)

    def _store_all(self) -> None:
        while (data := self._events.get()) is not None and not self._is_closed:
            try:
                self._store(data)
            except Exception as error:
                logger.warning("Job %s: a node's files are stored at its end: %s", self._job.id, explain(error))

    def _store(self, data: dict[str, Any]) -> None:
        """Store what one node has made, and tell of it once all of it is stored."""
        node_id, output = str(data.get("node")), data.get("output")
        if not isinstance(output, dict):
            return
        files, values = outputs_of({"outputs": {node_id: without_secrets(output, self._job.extra_data)}})
        found: list[tuple[OutputFile, Path]] = []
        for file in files:
            path = self._outputs.locate(self._job.id, file)
            if path is None or not path.is_file():
                return
            found.append((file, path))
        keys = self._keys_of(self._job.id, list(self._paths | dict.fromkeys(path for _, path in found)))
        told = [{**file._asdict(), "s3_key": keys[path]} for file, path in found]
        told_bytes = len(json.dumps([told, values]))
        if not (told or values) or self._told_bytes + told_bytes > MOST_TOLD_BYTES:
            return
        self._told_bytes += told_bytes
        for path in dict.fromkeys(path for _, path in found):
            self._paths[path] = None
            if self._is_closed:
                return
            self._upload(path, keys[path])
        self._progress.note_stored(node_id, told, values.get(node_id))

    def _upload(self, path: Path, key: str) -> None:
        version = version_of(path)
        if self._stored.get(key) == version:
            return
        # What is written within the same tick of the clock would not be seen to be another.
        time.sleep(max(0, min(version[2] + 2 * TICK_NS - time.time_ns(), 2 * TICK_NS)) / 1e9)
        self._stored.pop(key, None)
        self._bucket.upload(path, key)
        if version_of(path) == version:
            self._stored[key] = version


def version_of(path: Path) -> Version:
    """What is seen of a file; raises FileNotFoundError."""
    seen: os.stat_result = path.stat()
    return seen.st_ino, seen.st_size, seen.st_mtime_ns
