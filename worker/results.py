"""What is left of a job: its files in S3, its receipt, its progress, its callback."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from comfy_utils import Job, Settings, ended_key, is_refused_condition, iso, progress_key, result_key
from ground.answers import OutputFile, explain_node_errors, job_error, outputs_of
from ground.comfyui import ComfyGoneError, ComfyUI, Finished, JobStoppedError
from worker.bucket import Bucket
from worker.early import EarlyOutputs
from worker.errors import PutBackError
from worker.lease import Lease
from worker.outputs import Outputs, silent_nodes
from worker.progress import Progress
from worker.retry import backoff_s
from worker.shutdown import Shutdown
from worker.web import post_result

logger = logging.getLogger(__name__)

Result = dict[str, Any]
"""What result.json holds; its fields are listed in docs/results.md."""

UPLOADS_AT_ONCE = 8
RECEIPTS = ("result.json", "progress.json", "attempts.json")
MAX_KEY_BYTES = 1024
"""S3 has no longer keys."""
CALLBACK_TRIES = 3


@dataclass(frozen=True)
class Ran:
    """What became of a job's run."""

    started_at: datetime
    finished: Finished | None = None
    """What ComfyUI says of a workflow that it ran to an end."""
    values: dict[str, dict[str, Any]] = field(default_factory=dict)
    error: dict[str, Any] | None = None
    warnings: tuple[str, ...] = ()
    """What stands in the file of its workflow and was not used."""


class Stored(NamedTuple):
    """The `outputs` of a result; a sentence for each file that should be there and is not, and for what is no file."""

    outputs: list[dict[str, Any]]
    missing: list[str]
    warnings: list[str]


@dataclass(eq=False)
class Results:
    """Stores what a job has made, and tells of it."""

    settings: Settings
    bucket: Bucket
    comfy: ComfyUI
    outputs: Outputs
    shutdown: Shutdown
    instance_id: str
    _uploads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(UPLOADS_AT_ONCE, "upload"))
    _early: dict[str, EarlyOutputs] = field(default_factory=dict)

    # --- While it runs -----------------------------------------------------------------------------------

    def early(self, job: Job, progress: Progress) -> EarlyOutputs:
        """What stores the files of a run that begins as soon as they are there.

        On the base machine it does so for nobody: there Mountpoint writes into the bucket.
        """
        self.end_early(job.id)
        progress.forget_stored()
        early = EarlyOutputs(job, progress, self.bucket, self.outputs, self._keys)
        if self.settings.env == "base":
            early.close()
        self._early[job.id] = early
        return early

    def end_early(self, job_id: str, *, at_once: bool = False) -> None:
        """Store nothing more before the job's end; a file that is under way is waited for, as far as there is time, so
        that it is not written over one of the next attempt."""
        early = self._early.pop(job_id, None)
        if early is None:
            return
        if at_once:
            early.close()
            return
        with suppress(JobStoppedError):
            early.await_end(self.shutdown.pause)

    # --- The receipt -------------------------------------------------------------------------------------

    def make(self, job: Job, ran: Ran, lease: Lease) -> Result:
        """Store the files of a job that has run, and return its result.

        Raises PutBackError where ComfyUI has lost a file that it would make again, JobStoppedError.
        """
        outputs: list[dict[str, Any]] = []
        warnings = [*job.warnings, *ran.warnings]
        values, error = ran.values, ran.error
        if (early := self._early.get(job.id)) is not None:  # what is under way is not to be stored twice
            early.await_end(self.shutdown.pause)
        if ran.finished is not None:
            entry = ran.finished.entry
            warnings += [f"dropped: {text}" for text in explain_node_errors(ran.finished.node_errors)]
            warnings += [f"blocked: {ran.finished.blocked}"] if ran.finished.blocked else []
            self.outputs.collect(job.id, entry)
            files, values = outputs_of(entry)
            pictures = self.outputs.pictures(job.id)
            files += pictures.files
            warnings += pictures.warnings() if error is None else []
            stored = self.bucket.writing.insist(lambda: self.store_files(job.id, files), self.shutdown.pause)
            outputs, missing = stored.outputs, stored.missing
            if missing and any(file.type == "temp" for file in files) and self._has_forgotten(job.id):
                raise PutBackError(f"{missing[0]}: ComfyUI empties its temp folder when it starts")
            if missing and error is None:
                error = job_error("execution_error", missing[0])
            warnings += missing + stored.warnings
            if error is None and not (outputs or values or pictures.nodes):
                nodes = ", ".join(silent_nodes(entry))
                warnings.append(f"node {nodes} gave neither a file nor a value: ComfyUI's log may say why")
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
            **({"retry_of": job.retry_of} if job.retry_of else {}),
            "timings": {
                "sent_at": iso(lease.sent_at),
                "started_at": iso(ran.started_at),
                "finished_at": iso(finished_at),
                "wait_s": round((ran.started_at - lease.sent_at).total_seconds(), 3),
                "run_s": round((finished_at - ran.started_at).total_seconds(), 3),
            },
        }

    def stored(self, job_id: str) -> Result | None:
        """The job's result.json, None while it has none."""
        found = self.bucket.open(result_key(job_id))
        if found is None:
            return None
        result: Result = json.loads(found[0].read())
        return result

    def store(self, result: Result) -> Result:
        """Write result.json, unless another worker was first; return the one that stands."""
        try:
            self.bucket.write(result_key(result["job_id"]), json.dumps(result).encode(), IfNoneMatch="*")
        except Exception as error:
            if not is_refused_condition(error):
                raise
            stored = self.stored(result["job_id"])
            if stored is None:
                raise PutBackError("another worker is writing this job's result") from error
            logger.warning("Job %s: another worker stored its result first", result["job_id"])
            return stored
        self._list_as_ended(result["job_id"])
        return result

    def _list_as_ended(self, job_id: str) -> None:
        """Tell those who wait for many jobs at once. Best effort: they look at each receipt itself, only seldom."""
        try:
            self.bucket.write(ended_key(int(time.time() * 1000), job_id), b"")
        except Exception as error:
            logger.warning("Job %s is not in the list of ended jobs: %s", job_id, error)

    def _has_forgotten(self, job_id: str) -> bool:
        """Whether ComfyUI was restarted after it ran the job."""
        try:
            return self.comfy.history(job_id) is None
        except ComfyGoneError:
            return True

    # --- Files -------------------------------------------------------------------------------------------

    def store_files(self, job_id: str, named: list[OutputFile]) -> Stored:
        """Upload the files that history names and all others that the job has written."""
        found: list[tuple[dict[str, Any], Path]] = []
        missing: list[str] = []
        warnings: list[str] = []
        for file in named:
            path = self.outputs.locate(job_id, file)
            name = f"node {file.node_id}: its file {PurePosixPath(file.type, file.subfolder, file.filename)}"
            if path is None:
                (warnings if file.type == "input" else missing).append(f"{name} is not there")
            elif not path.is_file():
                warnings.append(f"{name} is no regular file")
            else:
                found.append((file._asdict(), path))
        # Checkpoint and LoRA savers write files without any entry in the history.
        seen = {path for _, path in found}
        receipts = {self.settings.output_dir / job_id / name for name in RECEIPTS}
        if self.settings.env == "base":
            seen |= receipts  # seen through Mountpoint
        for path in self.outputs.unnamed(job_id):
            if path not in seen:
                subfolder = PurePosixPath(job_id, self.outputs.place(job_id, path)).parent.as_posix()
                file = OutputFile("", "files", path.name, subfolder, "output")
                found.append((file._asdict() | {"node_id": None}, path))
        keys = self._keys(job_id, [path for _, path in found])
        early = self._early.get(job_id)
        missed = {path: key for path, key in keys.items() if early is None or not early.has(path, key)}
        list(
            self._uploads.map(self._upload, missed, missed.values())
            if len(missed) > 1
            else map(self._upload, missed, missed.values())
        )
        return Stored([{**output, "s3_key": keys[path]} for output, path in found], missing, warnings)

    def _keys(self, job_id: str, paths: list[Path]) -> dict[Path, str]:
        """Each file's key in the bucket: as ComfyUI has it below the job's own, no two the same."""
        keys: dict[Path, str] = {}
        taken = {f"output/{job_id}/{name}" for name in RECEIPTS}
        for path in paths:
            if path in keys:
                continue
            # A name need be neither text nor short, and send_job.py saves none with a backslash.
            name = (
                os.fsencode(self.outputs.place(job_id, path)).decode("utf-8", "backslashreplace").replace("\\", "%")
            )
            if len(f"output/{job_id}/{name}".encode()) > MAX_KEY_BYTES - 10:
                name = f"long/{hashlib.sha256(name.encode()).hexdigest()}{path.suffix[:20]}"
            pure = PurePosixPath(f"output/{job_id}/{name}")
            key, number = str(pure), 1
            while key in taken:
                number += 1
                key = str(pure.with_stem(f"{pure.stem} ({number})"))
            taken.add(key)
            keys[path] = key
        return keys

    def _upload(self, path: Path, key: str) -> None:
        """Bring a file into the bucket. On the base machine Mountpoint may have done so: one HEAD tells."""
        if self.settings.env != "base" or self.bucket.size(key) != path.stat().st_size:
            self.bucket.upload(path, key)

    # --- Telling of it -----------------------------------------------------------------------------------

    def store_progress(self, progress: Progress) -> dict[str, Any] | None:
        """Write progress.json and return what it says; None if nothing has changed since the last time."""
        news = progress.news()
        if news is not None:
            self.bucket.write(progress_key(progress.job_id), json.dumps(news).encode())
        return news

    def call_back(self, job: Job, result: Result, tries: int = CALLBACK_TRIES) -> None:
        """POST the result to the job's callback, signed; raises PutBackError when it is not accepted."""
        url = job.callback_url or self.settings.callback_url
        reason = ""
        for attempt in range(tries if url else 0):
            if attempt:
                self.shutdown.pause(backoff_s(attempt))
            reason = post_result(url, result, self.settings.callback_secret)
            if not reason:
                return
            logger.info("The callback of job %s failed: %s", job.id, reason)
        if reason:
            raise PutBackError(f"the callback of job {job.id} failed: {reason}")
