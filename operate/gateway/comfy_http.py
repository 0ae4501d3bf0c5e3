"""ComfyUI's calls, each with and without the prefix /api."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from aiohttp import web

from comfy_utils import (
    InvalidMessageError,
    InvalidWorkflowError,
    check_extra_data,
    check_workflow,
    is_job_id,
    load_json,
    new_job_id,
)
from operate.gateway.guard import Bodies, Handler, plain_error
from operate.gateway.index import Entry
from operate.gateway.jobs import SHOWN_EXTRA, BusyError, Jobs, NotSentError, Posted
from operate.gateway.nodes import Nodes
from operate.gateway.refusals import Checker, Verdict, make_error, upstream
from operate.gateway.shapes import (
    ENDS,
    NOBODY_POSTED,
    STATUSES,
    ended_job,
    history_entry,
    queue_item,
    unfinished_job,
    workflow_id_of,
)

MOST_PROMPT_BYTES = 16 * 1024 * 1024
"""As much as a worker reads of a workflow."""
MOST_CALL_BYTES = 1024 * 1024
MOST_HISTORY = 200
"""So many jobs stand in one answer where the client names no number, and MOST_ASKED where it does."""
MOST_ASKED = 1000
MOST_SHOWN = 200
"""So many jobs of /queue have their workflow: each is a file of its own in the bucket."""

FEATURES: dict[str, Any] = {
    "supports_preview_metadata": True,
    "supports_model_type_tags": True,
    "max_upload_size": 1024 * 1024 * 1024,
    "extension": {"manager": {"supports_v4": True}},
    "node_replacements": True,
    "assets": False,
}
"""What ComfyUI 0.33 says of itself, with the size that an upload may have here."""

NOT_ON_A_FLEET = {
    "free": "a fleet's instances free their memory themselves, and leave when they are idle",
    "internal": "there is no one machine whose inside could be shown",
    "manager": "nodes are installed on the base machine, and come to the fleet with ./create_env.sh NAME --rebake",
    "customnode": "nodes are installed on the base machine, and come to the fleet with ./create_env.sh NAME --rebake",
    "users": "all who come here share one shelf of workflows and settings",
    "view_metadata": "models lie in the bucket, and are read by the instances alone",
    "assets": "files are uploaded by /upload/image",
}
"""What cannot be had from a fleet, by the first part of its path, and why."""


class ComfyCalls:
    """The calls about jobs and nodes; those about files are in comfy_files.py."""

    def __init__(self, jobs: Jobs, nodes: Nodes, checker: Checker, bodies: Bodies) -> None:
        self._jobs, self._nodes, self._checker, self._bodies = jobs, nodes, checker, bodies

    def routes(self) -> list[tuple[str, str, Handler]]:
        """Method, path and handler of each."""
        return [
            ("POST", "/prompt", self.post_prompt),
            ("GET", "/prompt", self.get_prompt),
            ("GET", "/queue", self.get_queue),
            ("POST", "/queue", self.post_queue),
            ("POST", "/interrupt", self.post_interrupt),
            ("GET", "/history", self.get_history),
            ("GET", "/history/{prompt_id}", self.get_history_of),
            ("POST", "/history", self.post_history),
            ("GET", "/jobs", self.get_jobs),
            ("POST", "/jobs/cancel", self.cancel_jobs),
            ("GET", "/jobs/{job_id}", self.get_job),
            ("POST", "/jobs/{job_id}/cancel", self.cancel_job),
            ("GET", "/object_info", self.get_object_info),
            ("GET", "/object_info/{node_class}", self.get_node),
            ("GET", "/node_replacements", self.get_replacements),
            ("GET", "/models", self.get_folders),
            ("GET", "/models/{folder}", self.get_models),
            ("GET", "/embeddings", self.get_embeddings),
            ("GET", "/system_stats", self.get_system_stats),
            ("GET", "/features", self.get_features),
        ]

    # --- Posting -----------------------------------------------------------------------------------------

    async def post_prompt(self, request: web.Request) -> web.Response:
        """Check a workflow as ComfyUI does, and make a job of it."""
        async with self._bodies.read(request, MOST_PROMPT_BYTES) as text:
            try:
                body = await self._jobs.cloud.call(load_json, "the body", text)
            except InvalidWorkflowError as error:
                return refuse(make_error("invalid_json", "The body is not JSON", str(error)))
            if not isinstance(body, dict) or "prompt" not in body:
                return refuse(make_error("no_prompt", "No prompt provided", "No prompt provided"))
            return await self._post(request, body)

    async def _post(self, request: web.Request, body: dict[str, Any]) -> web.Response:
        job_id = body.get("prompt_id")
        if job_id is None:
            job_id = new_job_id()
        elif not is_job_id(job_id):
            details = "prompt_id must be a UUID string in canonical lowercase hyphenated form; "
            details += "omit it to let the server generate one"
            return refuse(make_error("invalid_prompt_id", "prompt_id must be a valid UUID", details))
        targets = body.get("partial_execution_targets")
        if targets is not None and not isinstance(targets, list):
            details = "partial_execution_targets must be a list of node ids"
            return refuse(make_error("invalid_prompt", "Cannot execute", details))
        try:
            workflow = check_workflow(body["prompt"])
            extra_data = dict(check_extra_data(body.get("extra_data")))
            number = number_of(body)
        except InvalidMessageError as error:
            return refuse(make_error("invalid_prompt", "Cannot execute this prompt", str(error)))
        verdict = await self._jobs.cloud.call(self._checker.judge, workflow, targets)
        if verdict.error:
            return refuse(verdict.error, verdict.node_errors)
        if source := request.headers.get("Comfy-Usage-Source"):
            extra_data.setdefault("comfy_usage_source", source[:200])
        shown = {name: extra_data[name] for name in SHOWN_EXTRA if name in extra_data}
        client_id = body.get("client_id", extra_data.pop("client_id", None))
        shown |= {"create_time": int(time.time() * 1000)}
        shown |= {"client_id": client_id} if isinstance(client_id, str) else {}
        posted = Posted(workflow, shown, number, verdict.outputs)
        return await self._send(job_id, extra_data, posted, verdict, targets)

    async def _send(
        self, job_id: str, extra_data: dict[str, Any], posted: Posted, verdict: Verdict, targets: list[str] | None
    ) -> web.Response:
        sent = posted.prompt
        if targets is not None and verdict.outputs:
            sent = upstream(sent, verdict.outputs)  # a worker makes every output that there is
        try:
            # A client that goes away now has posted all the same: what is sent is noted as well.
            entry = await asyncio.shield(self._jobs.post(job_id, sent, extra_data, posted))
        except InvalidMessageError as error:
            return refuse(make_error("invalid_prompt", "Cannot execute this prompt", str(error)))
        except BusyError as error:
            return plain_error(503, "busy", str(error), headers={"Retry-After": "1"})
        except NotSentError as error:
            return plain_error(503, "not_sent", f"the queue has not taken the job: {error}")
        first = await self._jobs.posted(entry)
        number = first.number if first else posted.number
        return web.json_response({"prompt_id": job_id, "number": number, "node_errors": verdict.node_errors})

    # --- Queue -------------------------------------------------------------------------------------------

    async def get_prompt(self, _: web.Request) -> web.Response:
        """How many jobs are unfinished; beside that, what a fleet has more to say than a machine."""
        await self._jobs.refresh()
        return web.json_response(
            {"exec_info": {"queue_remaining": len(self._jobs.index.unfinished), "fleet": await self._fleet()}}
        )

    async def get_queue(self, _: web.Request) -> web.Response:
        """What runs and what waits."""
        await self._jobs.refresh()
        waiting = self._jobs.waiting()
        running = [entry for job_id in list(self._jobs.running) if (entry := self._jobs.index.unfinished.get(job_id))]
        shown = await self._posted([*running, *waiting][:MOST_SHOWN])
        items = [
            queue_item(entry.job_id, shown.get(entry.job_id, NOBODY_POSTED._replace(number=entry.posted_ms)))
            for entry in (*running, *waiting)
        ]
        return web.json_response(
            {
                "queue_running": items[: len(running)],
                "queue_pending": items[len(running) :],
                "fleet": await self._fleet(),
            }
        )

    async def _posted(self, entries: Iterable[Entry]) -> dict[str, Posted]:
        """What was posted, by job; without those that cannot be read."""
        wanted = list(entries)
        found = await asyncio.gather(*(self._jobs.posted(entry) for entry in wanted))
        return {entry.job_id: posted for entry, posted in zip(wanted, found, strict=True) if posted}

    async def _fleet(self) -> dict[str, Any]:
        """All that waits on the queue, also of other senders, and how many instances there are or will be."""
        depth, group = await self._jobs.fleet()
        return {
            "waiting": depth.visible if depth else None,
            "running": depth.in_flight if depth else None,
            "instances_wanted": group.desired if group else None,
            "instances_in_service": len(group.in_service) if group else None,
        }

    async def post_queue(self, request: web.Request) -> web.Response:
        """Take waiting jobs off the queue: those named, or all that were posted here."""
        body = await self._body(request)
        if body.get("clear"):
            await self._jobs.refresh()
            await self._jobs.delete([entry.job_id for entry in self._jobs.waiting()])
        await self._jobs.delete(ids_of(body.get("delete")))
        return web.Response()

    async def post_interrupt(self, request: web.Request) -> web.Response:
        """Interrupt the job that is named, or else all that run of those that were posted here."""
        job_id = (await self._body(request, is_needed=False)).get("prompt_id")
        if not job_id:
            await self._jobs.interrupt_all()
        elif is_job_id(job_id):
            await self._jobs.interrupt(job_id)
        return web.Response()

    # --- History -----------------------------------------------------------------------------------------

    async def get_history(self, request: web.Request) -> web.Response:
        """The jobs that have ended, in the order in which they did: the newest, where not all are asked for."""
        try:
            most = int(request.query.get("max_items", MOST_HISTORY))
            offset = int(request.query.get("offset", -1))
        except ValueError:
            raise web.HTTPBadRequest(text="max_items and offset are whole numbers") from None
        await self._jobs.refresh()
        ended = list(self._jobs.index.ended.values())
        most = max(0, min(most, MOST_ASKED))
        first = offset if offset >= 0 else max(len(ended) - most, 0)
        chosen = ended[first : first + most]
        entries = await asyncio.gather(*(self._history_of(entry.job_id) for entry in chosen))
        return web.json_response({job_id: entry for found in entries for job_id, entry in found.items()})

    async def get_history_of(self, request: web.Request) -> web.Response:
        """One job, {} where it has not ended, or is not known."""
        job_id = request.match_info["prompt_id"]
        return web.json_response(await self._history_of(job_id) if is_job_id(job_id) else {})

    async def _history_of(self, job_id: str) -> dict[str, Any]:
        standing = await self._jobs.look(job_id)
        if standing.result is None:
            return {}
        return {job_id: history_entry(job_id, await self._jobs.posted(standing.entry), standing.result)}

    async def post_history(self, request: web.Request) -> web.Response:
        """Take jobs out of the history: those named, or all. Receipts and files stay."""
        body = await self._body(request)
        await self._jobs.refresh()
        if body.get("clear"):
            await self._jobs.forget(list(self._jobs.index.ended))
        await self._jobs.forget(ids_of(body.get("delete")))
        return web.Response()

    # --- /api/jobs ---------------------------------------------------------------------------------------

    async def get_jobs(self, request: web.Request) -> web.Response:
        """All jobs, the newest first, in pages."""
        query = request.query
        asked = [word.strip().lower() for word in query.get("status", "").split(",") if word.strip()]
        if wrong := [word for word in asked if word not in STATUSES]:
            raise bad_call(f"Invalid status value(s): {', '.join(wrong)}. Valid values: {', '.join(STATUSES)}")
        sort_by, order = query.get("sort_by", "created_at").lower(), query.get("sort_order", "desc").lower()
        if sort_by not in ("created_at", "execution_duration"):
            raise bad_call("sort_by must be 'created_at' or 'execution_duration'")
        if order not in ("asc", "desc"):
            raise bad_call("sort_order must be 'asc' or 'desc'")
        limit, offset = limit_of(query.get("limit")), offset_of(query.get("offset"))
        await self._jobs.refresh()
        entries = self._entries(asked or STATUSES)
        entries.sort(key=lambda entry: entry.posted_ms, reverse=order == "desc")
        workflow_id = query.get("workflow_id")
        if workflow_id or sort_by != "created_at":
            # What decides stands in the files of the jobs: of the newest, so many as are read in a moment.
            entries = sorted(entries, key=lambda entry: entry.posted_ms)[-MOST_ASKED:]
            jobs = await self._described(entries[:: -1 if order == "desc" else 1], workflow_id)
            if sort_by != "created_at":
                jobs.sort(key=run_ms, reverse=order == "desc")
            total, page = len(jobs), jobs[offset : offset + (limit or MOST_HISTORY)]
        else:
            total = len(entries)
            page = await self._described(entries[offset : offset + min(limit or MOST_HISTORY, MOST_ASKED)])
        pages = {"offset": offset, "limit": limit, "total": total, "has_more": offset + len(page) < total}
        return web.json_response({"jobs": page, "pagination": pages})

    def _entries(self, statuses: Iterable[str]) -> list[Entry]:
        """The jobs of these statuses."""
        index, wanted = self._jobs.index, set(statuses)
        found = [entry for entry in index.ended.values() if ENDS.get(entry.how) in wanted]
        for entry in index.unfinished.values():
            if ("in_progress" if entry.job_id in self._jobs.running else "pending") in wanted:
                found.append(entry)
        return found

    async def _described(self, entries: Iterable[Entry], workflow_id: str | None = None) -> list[dict[str, Any]]:
        async def describe(entry: Entry) -> dict[str, Any] | None:
            posted = await self._jobs.posted(entry)
            if workflow_id and workflow_id_of(posted) != workflow_id:
                return None
            result = (await self._jobs.look(entry.job_id)).result if entry.how else None
            if result:
                return ended_job(entry.job_id, posted, result)
            return unfinished_job(
                entry.job_id, posted or NOBODY_POSTED, is_running=entry.job_id in self._jobs.running
            )

        return [job for job in await asyncio.gather(*map(describe, entries)) if job]

    async def get_job(self, request: web.Request) -> web.Response:
        """One job with all that is known of it."""
        job_id = request.match_info["job_id"]
        standing = await self._jobs.look(job_id) if is_job_id(job_id) else None
        if standing is None or standing.state in ("unknown", "deleted"):
            return web.json_response({"error": "Job not found"}, status=404)
        posted = await self._jobs.posted(standing.entry)
        if standing.result:
            return web.json_response(ended_job(job_id, posted, standing.result, is_whole=True))
        return web.json_response(
            unfinished_job(job_id, posted or NOBODY_POSTED, is_running=standing.state == "running")
        )

    async def cancel_job(self, request: web.Request) -> web.Response:
        """Cancel a job, whether it waits or runs."""
        job_id = request.match_info["job_id"]
        return web.json_response({"cancelled": is_job_id(job_id) and await self._cancel(job_id)})

    async def cancel_jobs(self, request: web.Request) -> web.Response:
        """Cancel several."""
        try:
            body = await self._body(request)
        except web.HTTPBadRequest:
            raise bad_call("Request body must be valid JSON") from None
        job_ids = body.get("job_ids")
        if not isinstance(job_ids, list):
            raise bad_call("job_ids must be a list")
        if wrong := [
            job_id if isinstance(job_id, str) else repr(job_id) for job_id in job_ids if not is_job_id(job_id)
        ]:
            answer = {"error": "job_ids contains invalid id(s)", "invalid_ids": wrong}
            return web.json_response(answer, status=400)
        cancelled = [await self._cancel(job_id) for job_id in job_ids]
        return web.json_response({"cancelled": any(cancelled)})

    async def _cancel(self, job_id: str) -> bool:
        return bool(await self._jobs.delete([job_id])) or await self._jobs.interrupt(job_id)

    # --- What the fleet has ------------------------------------------------------------------------------

    async def get_object_info(self, request: web.Request) -> web.Response:
        """All nodes. Packed once, and not sent again to a client that has them."""
        found = await self._nodes.object_info()
        if found is None:
            raise no_nodes()
        body, tag = found
        headers = {"ETag": tag, "Vary": "Accept-Encoding", "Cache-Control": "no-cache"}
        if tag in request.headers.get("If-None-Match", ""):
            return web.Response(status=304, headers=headers)
        if "gzip" in request.headers.get("Accept-Encoding", ""):
            headers["Content-Encoding"] = "gzip"
        else:
            body = await self._jobs.cloud.call(unpack, body)
        return web.Response(body=body, headers=headers, content_type="application/json", charset="utf-8")

    async def get_node(self, request: web.Request) -> web.Response:
        """One class of nodes."""
        info = await self._nodes.node_info(request.match_info["node_class"])
        if info is None:
            raise no_nodes()
        return web.json_response(info)

    async def get_replacements(self, _: web.Request) -> web.Response:
        return web.json_response(await self._nodes.replacements())

    async def get_folders(self, _: web.Request) -> web.Response:
        return web.json_response(list(await self._nodes.models()))

    async def get_models(self, request: web.Request) -> web.Response:
        models = (await self._nodes.models()).get(request.match_info["folder"])
        return web.Response(status=404) if models is None else web.json_response(models)

    async def get_embeddings(self, _: web.Request) -> web.Response:
        names = (await self._nodes.models()).get("embeddings", [])
        return web.json_response([name.rpartition(".")[0] for name in names])

    async def get_system_stats(self, _: web.Request) -> web.Response:
        """What the instance that came last has said of itself."""
        stats = await self._nodes.system_stats()
        if stats is None:
            return plain_error(503, "not_known", "no instance of this fleet has said yet what runs on it")
        return web.json_response(stats)

    async def get_features(self, _: web.Request) -> web.Response:
        return web.json_response(FEATURES)

    async def _body(self, request: web.Request, *, is_needed: bool = True) -> dict[str, Any]:
        """A small call's JSON object."""
        async with self._bodies.read(request, MOST_CALL_BYTES) as text:
            if not text.strip() and not is_needed:
                return {}
            try:
                body = json.loads(text)
            except (ValueError, RecursionError):
                body = None
            if not isinstance(body, dict):
                raise web.HTTPBadRequest(text="the body must be a JSON object")
            return body


# --- Small things ----------------------------------------------------------------------------------------


def refuse(error: dict[str, Any], node_errors: dict[str, Any] | None = None) -> web.Response:
    """ComfyUI's answer to a prompt that is not queued."""
    return web.json_response({"error": error, "node_errors": node_errors or {}}, status=400)


def bad_call(text: str) -> web.HTTPBadRequest:
    """How /api/jobs refuses."""
    return web.HTTPBadRequest(text=json.dumps({"error": text}), content_type="application/json")


def no_nodes() -> web.HTTPServiceUnavailable:
    text = "which nodes this fleet has is stored by its first instance, and none has been there yet: post a job"
    return web.HTTPServiceUnavailable(text=json.dumps({"error": text}), content_type="application/json")


def number_of(body: dict[str, Any]) -> float:
    """The number of a prompt: its own, or the time. Jobs run as the queue hands them out, whatever it is."""
    if "number" not in body:
        now = int(time.time() * 1000)
        return -now if body.get("front") else now
    with suppress(TypeError, ValueError, OverflowError):
        if math.isfinite(number := float(body["number"])):
            return number
    raise InvalidMessageError(f"number is {body['number']!r:.60}: leave it out, or give a number")


def ids_of(value: Any) -> list[str]:
    """The job ids in a list, if it is one."""
    return [each for each in value if is_job_id(each)] if isinstance(value, list) else []


def limit_of(text: str | None) -> int | None:
    if text is None:
        return None
    try:
        limit = int(text)
    except ValueError:
        raise bad_call("limit must be an integer") from None
    if limit <= 0:
        raise bad_call("limit must be a positive integer")
    return limit


def offset_of(text: str | None) -> int:
    try:
        return max(0, int(text or 0))
    except ValueError:
        raise bad_call("offset must be an integer") from None


def run_ms(job: dict[str, Any]) -> int:
    """How long a job ran, as far as it has."""
    start, end = job.get("execution_start_time"), job.get("execution_end_time")
    return int(end - start) if start and end else 0


def unpack(body: bytes) -> bytes:
    import gzip

    return gzip.decompress(body)
