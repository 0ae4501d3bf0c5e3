"""The Comfy API v2's events of a job, by the same look into the bucket as the websocket's."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import suppress
from typing import Any

from aiohttp import web

from operate.gateway.api_jobs import ApiJobs, no_job
from operate.gateway.api_shapes import ENDED, Envelope, progress_snapshot, status_of
from operate.gateway.guard import Handler
from operate.gateway.jobs import Jobs, Posted, Standing

logger = logging.getLogger(__name__)

MOST_STREAMS = 1000
BEAT_S = 15.0
"""After so long without news a comment is sent: idle connections are cut, and clients think them dead."""
TICK_S = 1.0
"""Between two looks at what this process knows of a job's place in the queue."""
PLACES_S = 5.0
"""Between two looks into the bucket for the places of all jobs that wait and are watched."""
PROGRESS_S = 0.5
"""Between two snapshots of a job's progress."""
WRITE_S = 60.0
"""A client that takes nothing for so long is cut off."""
HEADERS = {
    "Content-Type": "text/event-stream",
    "Cache-Control": "no-store",
    "X-Accel-Buffering": "no",  # a proxy on the way is not to collect them
}

Watch = Callable[[str], AsyncIterator[dict[str, Any]]]


class ApiEvents:
    """All open streams."""

    def __init__(self, jobs: Jobs, watch: Watch, about_jobs: ApiJobs) -> None:
        self._jobs, self._watch, self._about_jobs = jobs, watch, about_jobs
        self._open: set[asyncio.Task[Any]] = set()

    def routes(self) -> list[tuple[str, str, Handler]]:
        """Method, path and handler."""
        return [("GET", "/jobs/{id}/events", self.handle)]

    def end(self) -> None:
        """End all streams."""
        for task in self._open:
            task.cancel()

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Tell what is, and then what happens, until the job has ended."""
        standing = await self._about_jobs.find(request)
        if standing is None:
            return no_job(request)
        if len(self._open) >= MOST_STREAMS:
            text = "too many streams are open: ask for the job itself meanwhile"
            return Envelope(429, "too_many_streams", text, headers={"Retry-After": "5"})
        task = asyncio.current_task()
        assert task is not None
        self._open.add(task)
        try:
            response = web.StreamResponse(headers=HEADERS)
            await response.prepare(request)
            posted = await self._jobs.posted(standing.entry)
            await Stream(self, request, response, standing.job_id, posted).tell(standing)
            return response
        finally:
            self._open.discard(task)

    # --- What a stream asks for --------------------------------------------------------------------------

    async def watch(self, standing: Standing) -> AsyncIterator[dict[str, Any]]:
        """What happens to a job, of which its worker tells more often from now on."""
        if standing.entry:
            await self._jobs.note_watched(standing.entry)
        async for news in self._watch(standing.job_id):
            yield news

    def place(self, job_id: str) -> int | None:
        return self._about_jobs.place(job_id)

    def is_deleted(self, job_id: str) -> bool:
        """Whether a job was taken off the queue, as far as this process knows."""
        entry = self._jobs.index.get(job_id)
        return entry is not None and entry.is_deleted

    async def refresh(self) -> None:
        """See which jobs before this one have begun; all streams share it."""
        with suppress(Exception):  # the next look is soon
            await self._jobs.refresh()

    async def note(self, job_id: str, news: dict[str, Any]) -> None:
        """Let all of this process know what was seen."""
        if news.get("status") == "running":
            self._jobs.note_progress(job_id, news)
        else:
            await self._jobs.note_result(job_id, news)

    async def outputs(self, request: web.Request, standing: Standing) -> list[dict[str, Any]]:
        job = await self._about_jobs.job(request, standing)
        found: list[dict[str, Any]] = job["outputs"]
        return found


class Stream:
    """One client's stream of one job."""

    def __init__(
        self,
        events: ApiEvents,
        request: web.Request,
        response: web.StreamResponse,
        job_id: str,
        posted: Posted | None,
    ) -> None:
        self._events, self._request, self._response = events, request, response
        self._job_id = job_id
        self._prompt: Mapping[str, Any] = posted.prompt if posted else {}
        self._said: tuple[str, int | None] | None = None
        self._keys: set[str] = set()  # of the files that were seen while it ran
        self._told: set[str] = set()  # ids of outputs
        self._due: dict[str, Any] | None = None  # progress that waits for its time
        self._progress_at = self._sent_at = self._places_at = 0.0

    async def tell(self, standing: Standing) -> None:
        """All that there is to tell."""
        if status_of(standing) in ENDED:
            await self._end(standing)
            return
        await self._status(status_of(standing))
        if standing.progress:
            await self._progress(standing.progress)
        news: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        watching = asyncio.create_task(self._listen(standing, news))
        try:
            await self._follow(news, standing)
        finally:
            watching.cancel()
            with suppress(asyncio.CancelledError):
                await watching

    async def _listen(self, standing: Standing, news: asyncio.Queue[dict[str, Any]]) -> None:
        async for event in self._events.watch(standing):
            news.put_nowait(event)

    async def _follow(self, news: asyncio.Queue[dict[str, Any]], standing: Standing) -> None:
        is_running = standing.state == "running"
        while True:
            try:
                event = await asyncio.wait_for(news.get(), self._pause_s())
            except TimeoutError:
                event = None
            if event is not None:
                await self._events.note(self._job_id, event)
                if event.get("status") != "running":
                    await self._end(Standing(self._job_id, "ended", standing.entry, event))
                    return
                if not is_running:
                    is_running = True
                    await self._status("running")
                await self._outputs_so_far(Standing(self._job_id, "running", standing.entry, progress=event))
                self._due = event
            if self._events.is_deleted(self._job_id) and not is_running:
                await self._end(Standing(self._job_id, "deleted", standing.entry))
                return
            await self._status("running" if is_running else "queued")
            if self._due is not None and time.monotonic() >= self._progress_at + PROGRESS_S:
                await self._progress(self._due)
            if not is_running and time.monotonic() >= self._places_at + PLACES_S:
                self._places_at = time.monotonic()
                await self._events.refresh()
            if time.monotonic() >= self._sent_at + BEAT_S:
                await self._write(b": still here\n\n")

    def _pause_s(self) -> float:
        if self._due is None:
            return TICK_S
        return max(0.01, self._progress_at + PROGRESS_S - time.monotonic())

    async def _end(self, standing: Standing) -> None:
        """The files, and the end, which is the last."""
        await self._outputs(await self._events.outputs(self._request, standing))
        await self._status(status_of(standing))

    async def _outputs_so_far(self, standing: Standing) -> None:
        """The files that are stored while the job runs. What cannot be looked at now is told with the next, or at the
        end."""
        keys = {file["s3_key"] for file in (standing.progress or {}).get("outputs") or []}
        if keys <= self._keys:
            return
        try:
            outputs = await self._events.outputs(self._request, standing)
        except Exception as error:
            logger.warning("The files of job %s cannot be looked at just now: %s", self._job_id, error)
            return
        self._keys |= keys
        await self._outputs(outputs)

    async def _outputs(self, outputs: list[dict[str, Any]]) -> None:
        """Each file once."""
        for output in outputs:
            if output["id"] not in self._told:
                self._told.add(output["id"])
                await self._send("output", output)

    async def _status(self, status: str) -> None:
        """A status, where it is another than the last."""
        place = self._events.place(self._job_id) if status == "queued" else None
        if (status, place) != self._said:
            self._said = status, place
            await self._send("status", {"status": status, "queue_position": place})

    async def _progress(self, progress: Mapping[str, Any]) -> None:
        self._due, self._progress_at = None, time.monotonic()
        await self._send("progress", progress_snapshot(progress, self._prompt))

    async def _send(self, event: str, data: Mapping[str, Any]) -> None:
        await self._write(f"event: {event}\ndata: {json.dumps(data)}\n\n".encode())

    async def _write(self, frame: bytes) -> None:
        self._sent_at = time.monotonic()
        async with asyncio.timeout(WRITE_S):
            await self._response.write(frame)
