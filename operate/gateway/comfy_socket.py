"""ComfyUI's websocket: each client hears of the jobs that it has posted, here or at another `serve`."""

from __future__ import annotations

import asyncio
import json
import logging
import struct
import uuid
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import suppress
from typing import Any

from aiohttp import WSMsgType, web

from operate.gateway.files import Files, key_of
from operate.gateway.index import Entry, mark_of
from operate.gateway.jobs import Jobs, Posted
from operate.gateway.story import PICTURE, Message, Story

logger = logging.getLogger(__name__)

MOST_SOCKETS = 2000
MOST_UNSENT = 1000
"""A client that does not read so many messages is cut off."""
MOST_BYTES = 1024 * 1024
"""Of one message from a client; all that is read of them is the handshake."""
MOST_PICTURE_BYTES = 32 * 1024 * 1024
"""Of a picture that goes by the websocket; a larger one is had by /view."""
HEARTBEAT_S = 30.0
NEWS_S, IDLE_NEWS_S = 1.0, 5.0
"""How often it is seen what other processes have taken in while jobs of connected clients are unfinished, or none."""
RETRY_S = 5.0
STATUS_S = 0.2
"""Between two messages to all."""

Watch = Callable[[str], AsyncIterator[dict[str, Any]]]
"""Yields a job's progress whenever there is some, and in the end its receipt."""


class Client:
    """One open socket, and what it has still to be sent."""

    def __init__(self, socket: web.WebSocketResponse) -> None:
        self._socket = socket
        self._unsent: asyncio.Queue[str | bytes] = asyncio.Queue(MOST_UNSENT)
        self._writer = asyncio.create_task(self._write())

    def send(self, message: str | bytes) -> None:
        """Send in order, and wait for nothing. One that does not read is cut off."""
        try:
            self._unsent.put_nowait(message)
        except asyncio.QueueFull:
            self.cut()

    def cut(self) -> None:
        """End the connection without a word: whoever does not read would not read that either."""
        self._writer.cancel()
        transport = self._socket.get_extra_info("socket")
        if transport is not None:
            with suppress(OSError):
                transport.shutdown(2)

    async def _write(self) -> None:
        with suppress(ConnectionError):
            while True:
                message = await self._unsent.get()
                if isinstance(message, str):
                    await self._socket.send_str(message)
                else:
                    await self._socket.send_bytes(message)

    def end(self) -> None:
        self._writer.cancel()


def as_text(message: Message) -> str:
    """A message as it is sent."""
    return json.dumps({"type": message[0], "data": message[1]})


class Sockets:
    """All open sockets, and the jobs of their clients."""

    def __init__(self, jobs: Jobs, files: Files, watch: Watch, features: dict[str, Any]) -> None:
        self._jobs, self._files = jobs, files
        self._watch = watch
        self._features = features
        self._clients: dict[str, set[Client]] = {}  # by the mark of their id
        self._open: set[web.WebSocketResponse] = set()
        self._followed: dict[str, asyncio.Task[None]] = {}
        self._stories: dict[str, Story] = {}
        self._status_due = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        jobs.on_change.append(self._note)

    def start(self) -> None:
        """Begin to tell."""
        self._tasks = [asyncio.create_task(self._tell_status()), asyncio.create_task(self._see_news())]

    async def end(self) -> None:
        """Close all sockets, so that their clients come back elsewhere."""
        for task in [*self._tasks, *self._followed.values()]:
            task.cancel()
        closing = [asyncio.wait_for(socket.close(code=1001), 2) for socket in list(self._open)]
        await asyncio.gather(*closing, return_exceptions=True)

    async def handle(self, request: web.Request) -> web.WebSocketResponse:
        """GET /ws: greet a client, and tell it what goes on as long as it stays."""
        if len(self._open) >= MOST_SOCKETS:
            raise web.HTTPServiceUnavailable(text="too many websockets are open", headers={"Retry-After": "5"})
        socket = web.WebSocketResponse(heartbeat=HEARTBEAT_S, max_msg_size=MOST_BYTES)
        await socket.prepare(request)
        sid = request.query.get("clientId", "") or uuid.uuid4().hex
        mark, client = mark_of(sid), Client(socket)
        self._open.add(socket)
        self._clients.setdefault(mark, set()).add(client)
        try:
            client.send(as_text(("status", {**self.status(), "sid": sid})))
            self._welcome(mark, client)
            await self._listen(socket, client)
        finally:
            client.end()
            self._open.discard(socket)
            self._clients[mark].discard(client)
            if not self._clients[mark]:
                del self._clients[mark]
                self._leave(mark)
        return socket

    async def _listen(self, socket: web.WebSocketResponse, client: Client) -> None:
        """Until it closes. All that a client has to say is which features it knows, in its first message."""
        is_first = True
        async for message in socket:
            if is_first and message.type == WSMsgType.TEXT:
                is_first = False
                with suppress(ValueError, AttributeError, RecursionError):
                    if json.loads(message.data).get("type") == "feature_flags":
                        client.send(as_text(("feature_flags", self._features)))

    # --- Who hears what ----------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """How many jobs are unfinished, in the shape of a `status` message."""
        return {"status": {"exec_info": {"queue_remaining": len(self._jobs.index.unfinished)}}}

    def _tell(self, mark: str, messages: Iterable[Message]) -> None:
        clients = self._clients.get(mark, ())
        for text in [as_text(message) for message in messages] if clients else []:
            for client in list(clients):
                client.send(text)

    async def _show(self, mark: str, file: dict[str, Any]) -> None:
        """Send a picture as ComfyUI does: what it is, a preview, and of which format, before its bytes."""
        data = await self._files.read(key_of(file["type"], file["subfolder"], file["filename"]), MOST_PICTURE_BYTES)
        if data is None:
            return
        kind = 2 if file["filename"].endswith(".png") else 1
        for client in list(self._clients.get(mark, ())):
            client.send(struct.pack(">II", 1, kind) + data)

    def _welcome(self, mark: str, client: Client) -> None:
        """Tell one who comes, or comes back, how its jobs stand, and follow them."""
        for entry in [entry for entry in self._jobs.index.unfinished.values() if entry.client == mark]:
            story = self._stories.get(entry.job_id)
            for message in story.so_far() if story else []:
                client.send(as_text(message))
            self._follow(entry)

    def _note(self, entry: Entry) -> None:
        """A job was posted, has ended, or is deleted."""
        self._status_due.set()
        if entry.is_deleted and entry.job_id in self._followed:
            self._followed.pop(entry.job_id).cancel()
        if entry.how and entry.job_id not in self._followed:
            self._stories.pop(entry.job_id, None)
        if not entry.how and entry.client in self._clients:
            # At once, as a real server does: the news of the job itself come after it.
            self._tell(entry.client, [("status", self.status())])
            self._follow(entry)

    def _leave(self, mark: str) -> None:
        """Nobody is left who wants to hear of these jobs: watching costs requests."""
        for job_id in list(self._followed):
            entry = self._jobs.index.get(job_id)
            if entry is None or entry.client == mark:
                self._followed.pop(job_id).cancel()

    def _follow(self, entry: Entry) -> None:
        if entry.job_id not in self._followed:
            self._followed[entry.job_id] = asyncio.create_task(self._tell_job(entry))

    async def _tell_job(self, entry: Entry) -> None:
        """Tell a job's client what happens to it, until it ends."""
        job_id, mark = entry.job_id, entry.client
        try:
            while True:
                try:
                    await self._tell_once(job_id, mark, await self._jobs.posted(entry))
                    return
                except Exception as error:
                    logger.warning("Job %s cannot be looked at just now: %s", job_id, error)
                await asyncio.sleep(RETRY_S)
        finally:
            if self._followed.get(job_id) is asyncio.current_task():
                del self._followed[job_id]

    async def _tell_once(self, job_id: str, mark: str, posted: Posted | None) -> None:
        story = self._stories.setdefault(job_id, Story(job_id, posted.prompt if posted else {}))
        async for event in self._watch(job_id):
            if event.get("status") == "running":
                self._jobs.note_progress(job_id, event)
                if not story.has_begun:
                    self._tell(mark, [("status", self.status())])
                self._tell(mark, story.go_on(event))
            else:
                # Who hears of the end and asks any process finds it in the history.
                await self._jobs.note_result(job_id, event)
                for message in [*story.end(event), ("status", self.status()), story.last()]:
                    if message[0] == PICTURE:
                        await self._show(mark, message[1])
                    else:
                        self._tell(mark, [message])
                self._stories.pop(job_id, None)
                return

    async def _tell_status(self) -> None:
        """Tell all how many jobs are unfinished, whenever that has changed, but not more often than it can be read."""
        while True:
            await self._status_due.wait()
            self._status_due.clear()
            text = as_text(("status", self.status()))
            for client in [client for clients in self._clients.values() for client in clients]:
                client.send(text)
            await asyncio.sleep(STATUS_S)

    async def _see_news(self) -> None:
        """See what other processes have taken in for clients that are connected here."""
        while True:
            is_busy = bool(self._followed)
            await asyncio.sleep(NEWS_S if is_busy else IDLE_NEWS_S)
            if not self._clients:
                continue
            try:
                await self._jobs.index.refresh()
            except Exception as error:
                logger.warning("The list of jobs cannot be read just now: %s", error)
