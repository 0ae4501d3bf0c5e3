"""What is known of a job's attempts across workers, and the answer to a job that none of them brings to its end."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any, TypedDict

from comfy_utils import InvalidMessageError, Job, Settings, attempts_key, iso, progress_key
from ground.answers import job_error
from ground.messages import parse_message
from worker.bucket import Bucket
from worker.errors import ComfyDiedError, PutBackError, explain
from worker.lease import Lease
from worker.reports import Reports
from worker.results import Ran, Result, Results

logger = logging.getLogger(__name__)


class Attempt(TypedDict):
    """One attempt that did not end. Of one whose worker was killed nothing is known."""

    attempt: int
    at: str
    instance_id: str
    kind: str
    message: str


@dataclass(eq=False)
class Attempts:
    """Keeps output/<job_id>/attempts.json: {"job_id", "attempts": [...], "answered_at"}, written when one has failed.

    It is read at a job's later attempts only, so a job that ends at its first costs nothing.
    """

    settings: Settings
    instance_id: str
    bucket: Bucket
    results: Results
    reports: Reports
    on_job_done: Callable[[Result], None]

    # --- What is known -----------------------------------------------------------------------------------

    def read(self, job_id: str) -> dict[str, Any]:
        """What stands in attempts.json; as good as empty where there is none."""
        found = self.bucket.open(attempts_key(job_id))
        known: dict[str, Any] = json.loads(found[0].read()) if found else {"job_id": job_id, "attempts": []}
        return known

    def died(self, job_id: str) -> bool:
        """Whether ComfyUI ended at this job before."""
        return any(attempt["kind"] == "comfyui_died" for attempt in self.read(job_id)["attempts"])

    def runs_still(self, job_id: str) -> bool:
        """Whether a worker that has lost the message, as one cut off from SQS has, runs its job all the same."""
        found = self.bucket.open(progress_key(job_id))
        if found is None:
            return False
        news: dict[str, Any] = json.loads(found[0].read())
        age = datetime.now(UTC) - datetime.fromisoformat(news["updated_at"])
        return age < timedelta(seconds=self.settings.visibility_timeout_s / 2)

    def note(self, job_id: str, attempt: int, error: dict[str, Any]) -> None:
        """Remember that an attempt did not end, and why. Best effort."""
        news: Attempt = {
            "attempt": attempt,
            "at": iso(datetime.now(UTC)),
            "instance_id": self.instance_id,
            "kind": error["kind"],
            "message": error["message"][:1000],
        }
        try:
            known = self.read(job_id)
            self._write({**known, "attempts": [*known["attempts"], news]})
        except Exception as failure:
            logger.warning("Job %s: its attempt is not noted: %s", job_id, explain(failure))

    def verdict(self, job_id: str, died: ComfyDiedError) -> dict[str, Any]:
        """The `error` of a job at which ComfyUI ended twice: that is its own fault, and final."""
        message = f"{died}; so it did before: it is not run again"
        return (died.error or {}) | {"message": message, "detail": "\n".join(tell(self.read(job_id)))}

    def _write(self, known: dict[str, Any]) -> None:
        self.bucket.write(attempts_key(known["job_id"]), json.dumps(known).encode())

    # --- The answer --------------------------------------------------------------------------------------

    def answer(self, lease: Lease, error: dict[str, Any] | None = None) -> None:
        """Give a job whose attempts are used up its receipt, unless it has one, and make its callback.

        `error` is the result's, where this worker knows how the last attempt ended. Does nothing where it was
        answered before. Raises NothingToRunError, and what boto3 raises; PutBackError where the callback is not
        accepted.
        """
        job, invalid = understand(lease)
        known = self.read(job.id)
        if known.get("answered_at"):
            return
        result = self.results.stored(job.id)
        if result is None:
            error = job_error("invalid_message", invalid) if invalid is not None else error or given_up(known)
            error = error | {"detail": "\n".join(filter(None, [error["detail"], *tell(known)])) or None}
            ran = Ran(datetime.now(UTC), error=error)
            made = self.results.make(job, ran, lease)
            made["attempt"] = min(lease.attempt, self.settings.max_receives)  # looks at a dead letter count as well
            result = self.results.store(made)
            self.reports.count(result)
            logger.info("Job %s is answered: %s", job.id, result["error"] and result["error"]["message"])
        self.tell_of(job, result, tries=1)
        self._write({**known, "answered_at": iso(datetime.now(UTC))})

    def answer_predecessor(self, job: Job, lease: Lease) -> None:
        """Give the dead job that was sent again as this one its receipt, where it has none. Best effort."""
        if job.retry_of is None:
            return
        try:
            before = replace(job, id=job.retry_of, retry_of=None)
            if self.results.stored(before.id) is None and not self.runs_still(before.id):
                error = job_error("gave_up", f"no attempt came to an end; it was sent again as {job.id}")
                result = self.results.store(self.results.make(before, Ran(datetime.now(UTC), error=error), lease))
                self.tell_of(before, result, tries=1)
        except Exception as failure:
            logger.warning("Job %s, sent again as %s, is not answered: %s", job.retry_of, job.id, explain(failure))

    def tell_of(self, job: Job, result: Result, tries: int) -> None:
        """Make the callback, then call the hook. Raises PutBackError where the callback is not accepted."""
        self.results.call_back(job, result, tries)
        try:
            self.on_job_done(result)
        except Exception:
            logger.exception("on_job_done failed for job %s", job.id)


def understand(lease: Lease) -> tuple[Job, str | None]:
    """The message's job, and why it is none (then the job is only whom to tell). Raises NothingToRunError."""
    try:
        return parse_message(lease.body, lease.message_id), None
    except InvalidMessageError as reason:
        return Job(reason.job_id or lease.message_id, callback_url=reason.callback_url), str(reason)


def failure_of(raised: Exception) -> dict[str, Any]:
    """The `error` of a job that failed for good because its last attempt raised this."""
    error = raised.error if isinstance(raised, PutBackError) else None
    return error or job_error("gave_up", f"the last attempt did not come to an end: {explain(raised)}")


def given_up(known: dict[str, Any]) -> dict[str, Any]:
    """The `error` of a job whose last worker was killed without a word, from what is known of the attempts before."""
    if not known["attempts"]:
        return job_error("gave_up", "no attempt came to an end, and each one's worker was ended without a word")
    last = known["attempts"][-1]
    return job_error("gave_up", f"no attempt came to an end; the last that is known: {last['message']}")


def tell(known: dict[str, Any]) -> list[str]:
    """A line for each attempt that is known."""
    return [
        f"attempt {each['attempt']}, {each['at']}, {each['instance_id']}: {each['message']}"
        for each in known["attempts"]
    ]
