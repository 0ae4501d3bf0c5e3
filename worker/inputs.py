"""What a job brings along: its workflow where the message only points to it, its files, its cancel."""

from __future__ import annotations

import logging
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from comfy_utils import InvalidWorkflowError, Job, Settings, Workflow, cancel_key, is_job_id, load_json, watched_key
from ground.messages import parse_workflow_file
from worker.bucket import Bucket
from worker.errors import explain
from worker.retry import within
from worker.web import Connections, open_url

logger = logging.getLogger(__name__)

WORKFLOW_LIMIT_BYTES = 16 * 1024 * 1024
"""A workflow from the bucket is read into memory."""
INPUTS_LIMIT_S = 600
"""So long may all inputs of a job take together, however slowly a server sends."""


class Inputs:
    """Fetches into ComfyUI's input folder what a job needs, and removes it when the job has ended."""

    def __init__(self, settings: Settings, bucket: Bucket) -> None:
        self._bucket = bucket
        self._limit_mb = settings.input_limit_mb
        self._folder = settings.comfy_home / "ComfyUI/input"

    def fetch_workflow(self, job: Job) -> tuple[Job, tuple[str, ...]]:
        """The job with its workflow, also where its message only points to it, and what in that file is not used.

        Raises InvalidWorkflowError, and what boto3 raises.
        """
        if job.workflow is not None:
            return job, ()
        key = str(job.workflow_key)
        if job.source not in (None, f"s3://{self._bucket.name}/{key}"):
            raise InvalidWorkflowError(f"{job.source} is not in this environment's bucket {self._bucket.name}")
        found = self._bucket.open(key)
        if found is None:
            raise InvalidWorkflowError(f"there is no {key} in {self._bucket.name}")
        body, size = found
        with body:
            if size > WORKFLOW_LIMIT_BYTES:
                raise InvalidWorkflowError(f"{key} has more than {WORKFLOW_LIMIT_BYTES} bytes")
            text = body.read()
        return parse_workflow_file(load_json(key, text), job)

    def fetch(self, job: Job, workflow: Workflow, should_stop: Callable[[], bool]) -> Workflow:
        """Fetch the job's inputs and return the workflow with their names in ComfyUI's input folder.

        Each run has a folder of its own, so that none touches what another reads: the same job may still be
        running here after a restart, or on a worker that has lost its lease. Raises InvalidWorkflowError where it
        would fail again, PutBackError where another try may help, and what `should_stop` asks for.
        """
        if not job.inputs:
            return workflow
        folder = f"jobs/{job.id}/{secrets.token_hex(4)}"
        changed = use_inputs(workflow, {name: f"{folder}/{name}" for name in job.inputs})
        path = self._folder / folder
        path.mkdir(parents=True)

        def fetch_all() -> None:
            for name, address in job.inputs.items():
                self._fetch_one(name, address, path / name, connections)

        # A name that is long in resolving and a server that sends a byte now and then outlast any timeout.
        try:
            with Connections() as connections:
                within("the inputs have not come", INPUTS_LIMIT_S, fetch_all, should_stop)
        except BaseException:
            shutil.rmtree(path, ignore_errors=True)
            raise
        return changed

    def _fetch_one(self, name: str, address: str, path: Path, connections: Connections) -> None:
        """Stream one input to `path`."""
        limit = self._limit_mb * 1_000_000
        logger.info("Fetching the input %s", name)
        with self._open(name, address, connections) as chunks, path.open("xb") as out:
            for chunk in chunks:
                if out.tell() + len(chunk) > limit:
                    raise InvalidWorkflowError(f"the input {name} is larger than INPUT_LIMIT_MB={self._limit_mb}")
                out.write(chunk)

    @contextmanager
    def _open(self, name: str, address: str, connections: Connections) -> Iterator[Iterable[bytes]]:
        """Open an http(s) or s3:// address. Addresses are not repeated in errors: they may hold a signature."""
        if not address.startswith("s3://"):
            with open_url(f"the input {name}", address, connections) as chunks:
                yield chunks
            return
        bucket, _, key = address.removeprefix("s3://").partition("/")
        if bucket != self._bucket.name:
            raise InvalidWorkflowError(
                f"the input {name} is in the bucket {bucket}: the fleet reads its own, {self._bucket.name}"
            )
        found = self._bucket.open(key)
        if found is None:
            raise InvalidWorkflowError(f"the input {name} is not there: {address:.200}")
        body, _ = found
        with body:
            yield body.iter_chunks(1 << 16)

    def is_cancelled(self, job_id: str) -> bool:
        """Whether the job's sender has cancelled it."""
        return self._bucket.head(cancel_key(job_id)) is not None

    def is_watched(self, job_id: str) -> bool:
        """Whether somebody follows the job's steps."""
        return self._bucket.head(watched_key(job_id)) is not None

    def remove(self, job: Job, error: Mapping[str, Any] | None) -> None:
        """Remove what was put there for a job that has ended in `error`: the inputs of all its tries, its marks."""
        if job.inputs:
            self.remove_files(job.id)
        marks = [cancel_key(job.id)] if (error or {}).get("kind") == "cancelled" else []
        marks += [watched_key(job.id)] if job.live == "when watched" else []
        for mark in marks:
            try:
                self._bucket.delete(mark)
            except Exception as reason:
                logger.info("%s stays: %s", mark, explain(reason))

    def remove_files(self, job_id: str) -> None:
        """Remove a job's inputs, those of all its tries."""
        if is_job_id(job_id):
            shutil.rmtree(self._folder / "jobs" / job_id, ignore_errors=True)

    def make_room(self, needed: set[str]) -> None:
        """Remove the inputs of all jobs but those. Only where this folder is the machine's own, not the bucket's."""
        for folder in self._folder.glob("jobs/*/"):
            if is_job_id(folder.name) and folder.name not in needed:
                self.remove_files(folder.name)


def use_inputs(workflow: Workflow, names: Mapping[str, str]) -> Workflow:
    """A copy of `workflow` in which every input that is one of `names` is what it is called on this machine.

    Raises InvalidWorkflowError for a name that no node uses.
    """
    used = set()

    def renamed(value: Any) -> Any:
        if not isinstance(value, str) or value not in names:
            return value
        used.add(value)
        return names[value]

    changed = {
        node_id: {**node, "inputs": {name: renamed(value) for name, value in node.get("inputs", {}).items()}}
        for node_id, node in workflow.items()
    }
    for name in names:
        if name not in used:
            raise InvalidWorkflowError(
                f"inputs has {name!r:.60}, but no node has an input of that value: name the file in one"
            )
    return changed
