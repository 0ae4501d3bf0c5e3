"""What is left of a job: its files in S3, its receipt, its progress, its callback."""

from __future__ import annotations

import json
import logging
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

from comfy_utils import (
    ComfyGoneError,
    ComfyUI,
    Finished,
    Job,
    OutputFile,
    Settings,
    error_code,
    explain_node_errors,
    iso,
    job_error,
    outputs_of,
    result_key,
)
from worker.bucket import Bucket
from worker.errors import PutBackError
from worker.lease import Lease
from worker.progress import Progress
from worker.retry import backoff_s, insist
from worker.shutdown import Shutdown
from worker.web import post_result

logger = logging.getLogger(__name__)

Result = dict[str, Any]
"""What result.json holds; its fields are listed in docs/results.md."""

UPLOADS_AT_ONCE = 8
CALLBACK_TRIES = 3


@dataclass(frozen=True)
class Ran:
    """What became of a job's run."""

    started_at: datetime
    finished: Finished | None = None
    """What ComfyUI says of a workflow that it ran to an end."""
    values: dict[str, dict[str, Any]] = field(default_factory=dict)
    error: dict[str, Any] | None = None


@dataclass(eq=False)
class Results:
    """Stores what a job has made, and tells of it."""

    settings: Settings
    bucket: Bucket
    comfy: ComfyUI
    shutdown: Shutdown
    instance_id: str
    _uploads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(UPLOADS_AT_ONCE, "upload"))

    # --- The receipt -------------------------------------------------------------------------------------

    def make(self, job: Job, ran: Ran, lease: Lease) -> Result:
        """Store the files of a job that has run, and return its result.

        Raises PutBackError where ComfyUI has lost a file that it would make again, JobStoppedError.
        """
        outputs: list[dict[str, Any]] = []
        warnings: list[str] = []
        values, error = ran.values, ran.error
        if ran.finished is not None:
            warnings = [f"dropped: {text}" for text in explain_node_errors(ran.finished.node_errors)]
            warnings += [f"blocked: {ran.finished.blocked}"] if ran.finished.blocked else []
            files, values = outputs_of(ran.finished.entry)
            outputs, missing = insist(lambda: self.store_files(job.id, files), self.shutdown.pause)
            if missing and any(file.type == "temp" for file in files) and self._has_forgotten(job.id):
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
            if error_code(error) not in ("PreconditionFailed", "ConditionalRequestConflict"):
                raise
            stored = self.stored(result["job_id"])
            if stored is None:
                raise PutBackError("another worker is writing this job's result") from error
            logger.warning("Job %s: another worker stored its result first", result["job_id"])
            return stored
        return result

    def _has_forgotten(self, job_id: str) -> bool:
        """Whether ComfyUI was restarted after it ran the job."""
        try:
            return self.comfy.history(job_id) is None
        except ComfyGoneError:
            return True

    # --- Files -------------------------------------------------------------------------------------------

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
            return {**output, "s3_key": self._upload(job_id, path, output["type"])}

        if len(found) == 1:  # as mostly
            return [upload(*found[0])], missing
        return list(self._uploads.map(upload, *zip(*found, strict=True))) if found else [], missing

    def local_path(self, file: OutputFile) -> Path | None:
        """Where ComfyUI put the file; None for a place outside its folders."""
        roots = {"output": self.settings.output_dir, "temp": self.settings.comfy_home / "ComfyUI/temp"}
        root = roots.get(file.type)
        parts = PurePosixPath(file.subfolder, file.filename)
        if root is None or parts.is_absolute() or ".." in parts.parts:
            return None
        return root / parts

    def _upload(self, job_id: str, path: Path, type_: str) -> str:
        """Bring a file into the bucket and return its key.

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
        if self.settings.env != "base" or self.bucket.size(key) != path.stat().st_size:
            self.bucket.upload(path, key)
        return key

    def remove_local_files(self, job_id: str) -> None:
        """Free the instance's disk of a job's files: they are in the bucket, or of no use."""
        if self.settings.env == "base":
            return  # there the output folder is the bucket itself
        remove_folder(self.settings.output_dir / job_id)

    # --- Telling of it -----------------------------------------------------------------------------------

    def store_progress(self, progress: Progress) -> dict[str, Any] | None:
        """Write progress.json and return what it says; None if nothing has changed since the last time."""
        news = progress.news()
        if news is not None:
            self.bucket.write(f"output/{progress.job_id}/progress.json", json.dumps(news).encode())
        return news

    def call_back(self, job: Job, result: Result) -> None:
        """POST the result to the job's callback, signed; raises PutBackError when it is not accepted."""
        url = job.callback_url or self.settings.callback_url
        reason = ""
        for attempt in range(CALLBACK_TRIES if url else 0):
            if attempt:
                self.shutdown.pause(backoff_s(attempt))
            reason = post_result(url, result, self.settings.callback_secret)
            if not reason:
                return
            logger.info("The callback of job %s failed: %s", job.id, reason)
        if reason:
            raise PutBackError(f"the callback of job {job.id} failed: {reason}")


def remove_folder(folder: Path) -> None:
    """Remove a folder as far as that is possible."""
    for path in sorted(folder.rglob("*"), reverse=True):
        with suppress(OSError):
            path.rmdir() if path.is_dir() else path.unlink()
    with suppress(OSError):
        folder.rmdir()
