"""The Comfy API v2's calls about jobs."""

from __future__ import annotations

import asyncio
import logging
import re
from dataclasses import replace
from typing import Any

from aiohttp import web

from comfy_utils import InvalidMessageError, check_workflow, is_job_id, new_job_id, result_key
from operate.gateway.api_assets import Outputs
from operate.gateway.api_door import (
    BUSY,
    FAILED,
    REUSED,
    Held,
    filters_of,
    held,
    json_object,
    key_of,
    wrong_labels,
)
from operate.gateway.api_shapes import (
    STATUS_OF_END,
    STATUSES,
    Envelope,
    invalid_workflow,
    is_ui_format,
    job_of,
    kept_until,
    list_item,
    status_of,
)
from operate.gateway.assets import Assets, Resolved
from operate.gateway.claims import Claims
from operate.gateway.guard import Bodies, Handler
from operate.gateway.index import Entry, marks_of, now_ms
from operate.gateway.jobs import BusyError, Jobs, NotSentError, Posted, Standing
from operate.gateway.refusals import Checker

logger = logging.getLogger(__name__)

MOST_BYTES = 16 * 1024 * 1024
"""As much as a worker reads of a workflow."""
PAGE, MOST_PAGE = 50, 100
MOST_LOOKS = 200
"""So many unfinished jobs are looked at for one page; where a filter leaves few, the page is shorter."""
CURSOR = re.compile(r"(\d{13})-([0-9a-f-]{36})")
RESERVED = ("webhook_url", "inputs")
SECRET = "api_key_comfy_org"


class ApiJobs:
    """The calls about jobs, but for their events."""

    def __init__(
        self, jobs: Jobs, checker: Checker, bodies: Bodies, claims: Claims, assets: Assets, outputs: Outputs
    ) -> None:
        self._jobs, self._checker, self._bodies, self._claims = jobs, checker, bodies, claims
        self._assets, self._outputs = assets, outputs

    def routes(self) -> list[tuple[str, str, Handler]]:
        """Method, path and handler of each."""
        return [
            ("GET", "/health", self.health),
            ("POST", "/jobs", self.submit),
            ("GET", "/jobs", self.list_jobs),
            ("GET", "/jobs/{id}", self.get),
            ("GET", "/jobs/{id}/workflow", self.get_workflow),
            ("POST", "/jobs/{id}/cancel", self.cancel),
        ]

    async def health(self, _: web.Request) -> web.Response:
        """Whether serve answers; needs no token, and asks AWS for nothing."""
        return web.json_response({"status": "healthy"})

    # --- Submitting --------------------------------------------------------------------------------------

    async def submit(self, request: web.Request) -> web.Response:
        """Check a workflow as ComfyUI does, and make a job of it."""
        key = key_of(request)
        if isinstance(key, Envelope):
            return key
        async with json_object(self._bodies, request, MOST_BYTES) as body:
            if body is None:
                return Envelope(422, "invalid_request", "the body is no JSON object: send one with a workflow")
            if refused := wrong_submission(body):
                return refused
            try:
                workflow, extra_data = check_workflow(body["workflow"]), body.get("extra_data") or {}
            except InvalidMessageError as error:
                return Envelope(422, "invalid_workflow", str(error))
            resolved = await self._assets.resolve(workflow)
            if resolved.missing:
                text = f"no such asset: {', '.join(resolved.missing)[:500]}. Upload it, and refer to its id"
                return Envelope(422, "missing_asset", text, {"missing_ids": resolved.missing})
            verdict = await self._jobs.cloud.call(
                self._checker.judge, resolved.workflow, coming=frozenset(resolved.inputs)
            )
            if verdict.error:
                return invalid_workflow(verdict.error, verdict.node_errors)
            shown = {"create_time": now_ms()}
            posted = Posted(resolved.workflow, shown, now_ms(), verdict.outputs, labels=body.get("metadata") or {})
            async with held(self._claims, "jobs", key) as hold:
                if hold is None:
                    return Envelope(422, "idempotency_key_reuse", REUSED)
                return await self._post(request, resolved, extra_data, posted, hold)

    async def _post(
        self, request: web.Request, resolved: Resolved, extra_data: dict[str, Any], posted: Posted, hold: Held
    ) -> web.Response:
        job_id = new_job_id()
        hold.is_kept = True
        try:
            # A client that goes away now has posted all the same: what is sent is noted as well.
            entry = await asyncio.shield(
                self._jobs.post(job_id, resolved.workflow, extra_data, posted, inputs=resolved.inputs)
            )
        except InvalidMessageError as error:
            hold.is_kept = False
            return Envelope(422, "invalid_workflow", str(error))
        except BusyError:
            hold.is_kept = False
            return Envelope(429, "queue_full", BUSY, headers={"Retry-After": "1"})
        except NotSentError as error:
            hold.is_kept = not error.is_certain
            logger.warning("Job %s is not known to be sent: %s", job_id, error)
            return Envelope(500, "upstream_error", FAILED)
        return web.json_response(await self.job(request, Standing(job_id, "waiting", entry)), status=201)

    # --- How they stand ----------------------------------------------------------------------------------

    async def get(self, request: web.Request) -> web.Response:
        """A job: the truth that all else here tells a part of."""
        standing = await self.find(request)
        return no_job(request) if standing is None else web.json_response(await self.job(request, standing))

    async def find(self, request: web.Request) -> Standing | None:
        """The job that a call names, None where it is not known."""
        job_id = request.match_info["id"]
        if not is_job_id(job_id):
            return None
        standing = await self._jobs.look(job_id)
        if standing.state == "deleted":  # it may have ended all the same
            result = await self._jobs.cloud.read_final(result_key(job_id))
            return replace(standing, result=result)
        return known(standing)

    async def job(self, request: web.Request, standing: Standing) -> dict[str, Any]:
        """A whole job, as it stands."""
        status = status_of(standing)
        if status == "running" and await self._jobs.is_cancelled(standing.job_id):
            status = "canceling"
        return job_of(
            standing,
            await self._jobs.posted(standing.entry),
            status,
            place=self.place(standing.job_id),
            outputs=await self._outputs.of_job(request, standing),
            expires_at=kept_until(standing, await self._assets.days_kept("output/")),
        )

    def place(self, job_id: str) -> int | None:
        """A job's place among those that wait, as far as this process knows."""
        waiting = self._jobs.waiting()
        return next((place for place, entry in enumerate(waiting, 1) if entry.job_id == job_id), None)

    async def get_workflow(self, request: web.Request) -> web.Response:
        """What a job ran, with the names that its files had there."""
        standing = await self.find(request)
        posted = await self._jobs.posted(standing.entry) if standing else None
        if posted is None:
            return no_job(request)
        return web.json_response({"workflow": posted.prompt, "format": "api"})

    async def cancel(self, request: web.Request) -> web.Response:
        """Cancel a job, whether it waits or runs; one that has ended stays as it is."""
        standing = await self.find(request)
        if standing is None:
            return no_job(request)
        job_id = standing.job_id
        if standing.state in ("waiting", "running"):
            _ = await self._jobs.delete([job_id]) or await self._jobs.interrupt(job_id)
            standing = await self.find(request) or standing
        return web.json_response(await self.job(request, standing))

    # --- The list ----------------------------------------------------------------------------------------

    async def list_jobs(self, request: web.Request) -> web.Response:
        """A page of the jobs that were posted here, the newest in front, by labels and status where these are named."""
        labels = filters_of(request)
        if labels is None:
            text = "a label is asked for as metadata[name]=value, and each name once"
            return Envelope(400, "invalid_metadata_filter", text)
        limit = limit_of(request.query.get("limit"))
        if limit is None:
            return Envelope(400, "invalid_request", f"limit is no number from 1 on: leave it out for {PAGE}")
        statuses = {each.strip() for each in request.query.get("status", "").split(",") if each.strip()}
        if statuses - set(STATUSES):
            return Envelope(400, "invalid_request", f"a status is one of {', '.join(STATUSES)}")
        before = CURSOR.fullmatch(request.query.get("cursor", ""))
        if before is None and request.query.get("cursor"):
            return Envelope(400, "invalid_cursor", "that is no cursor of this list: begin again without one")
        if before is None or not self._jobs.index.is_read:  # what is new is in front
            await self._jobs.index.refresh()
        entries = self._jobs.index.newest()
        if before is not None:
            last = int(before[1]), before[2]
            entries = [entry for entry in entries if (entry.posted_ms, entry.job_id) < last]
        items, seen = await self._page(entries, labels, statuses, limit)
        page: dict[str, Any] = {"jobs": items}
        if seen < len(entries):
            page["next_cursor"] = f"{entries[seen - 1].posted_ms:013d}-{entries[seen - 1].job_id}"
        return web.json_response(page)

    async def _page(
        self, entries: list[Entry], labels: dict[str, str], statuses: set[str], limit: int
    ) -> tuple[list[dict[str, Any]], int]:
        """At most `limit` jobs of these, and how many were gone through for them."""
        marks = set(filter(None, marks_of(labels).split(".")))
        items: list[dict[str, Any]] = []
        seen = looks = 0
        while seen < len(entries) and len(items) < limit and looks < MOST_LOOKS:
            taken: list[Entry] = []
            while seen < len(entries) and len(taken) < limit - len(items):
                entry = entries[seen]
                seen += 1
                if marks <= set(entry.labels.split(".")) and may_be(entry, statuses):
                    taken.append(entry)
            looks += sum(not entry.how for entry in taken)
            for item in await asyncio.gather(*map(self._item, taken)):
                if labels.items() <= item["metadata"].items() and (not statuses or item["status"] in statuses):
                    items.append(item)
        return items, seen

    async def _item(self, entry: Entry) -> dict[str, Any]:
        posted = await self._jobs.posted(entry) if entry.labels else None
        status = STATUS_OF_END.get(entry.how)
        if status is None:
            standing = known(await self._jobs.look(entry.job_id))
            status = status_of(standing) if standing else "queued"
        return list_item(entry, status, posted.labels if posted else {})


# --- Small things ----------------------------------------------------------------------------------------


def known(standing: Standing) -> Standing | None:
    """A job as it stands, None for one that nobody knows."""
    return None if standing.state == "unknown" else standing


def no_job(request: web.Request) -> Envelope:
    return Envelope(404, "not_found", f"there is no job {request.match_info['id']:.60}")


def may_be(entry: Entry, statuses: set[str]) -> bool:
    """Whether a job may have one of these statuses, by what is known without looking."""
    if not statuses:
        return True
    return not entry.how or STATUS_OF_END[entry.how] in statuses


def limit_of(text: str | None) -> int | None:
    """How many jobs a page is to have, None for what is no number."""
    if text is None:
        return PAGE
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) < 1:
        return None
    return min(int(text), MOST_PAGE)


def wrong_submission(body: dict[str, Any]) -> Envelope | None:
    """Why a body cannot be a job, by its shape alone."""
    for name in RESERVED:
        if body.get(name) is not None:
            return Envelope(422, "invalid_request", f"{name} is reserved by the contract: leave it out")
    workflow, extra_data, labels = body.get("workflow"), body.get("extra_data"), body.get("metadata")
    if not isinstance(workflow, dict):
        return Envelope(422, "invalid_workflow", "there is no workflow: send one that was exported for the API")
    if is_ui_format(workflow):
        text = "this is what the editor saves for itself: export the workflow for the API (File, Export (API))"
        return Envelope(422, "workflow_format_ui", text)
    if extra_data is not None and not (isinstance(extra_data, dict) and extra_data.keys() <= {SECRET}):
        return Envelope(422, "invalid_request", f"extra_data has {SECRET} in it and nothing else")
    if extra_data and not isinstance(extra_data[SECRET], str):
        return Envelope(422, "invalid_request", f"extra_data.{SECRET} is a text")
    if labels is not None and (wrong := wrong_labels(labels)):
        return Envelope(422, "metadata_invalid", wrong)
    return None
