"""The one room that knows jobs: how they are posted, how they stand, how they are cancelled. It speaks no protocol.

What it knows it can read again from the bucket: the receipt says how a job ended, its progress file that it runs, and
the lists of `index.py` which there are.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

from comfy_utils import (
    Group,
    QueueDepth,
    Settings,
    aws_client,
    cancel_key,
    progress_key,
    read_group,
    result_key,
    watched_key,
)
from operate.gateway.cloud import Cloud
from operate.gateway.index import Entry, Index, mark_of, marks_of, now_ms
from send_job import Message, Sender, batches, message_of

logger = logging.getLogger(__name__)

SENDERS = 2
"""So many requests to the queue are under way at once: what comes meanwhile travels together, ten to a request."""
MOST_WAITING_POSTS = 1000
LOOKS = 40
"""Most jobs that are looked at because somebody asks for the queue, and how often."""
SWEEP_S = 1.0
FLEET_S = 5.0
"""A look at queue and group that is no older serves again."""
SHOWN_EXTRA = ("extra_pnginfo", "client_id", "create_time", "preview_method", "comfy_usage_source")
"""What of extra_data is kept to be shown: all else in it may be a secret."""


class BusyError(Exception):
    """More comes than can be passed on."""


class NotSentError(Exception):
    """The queue is not known to have taken a job."""

    @property
    def is_certain(self) -> bool:
        """Whether AWS has said no, which it does with a code. Without an answer the queue may have the job."""
        return bool(re.match(r"(An error occurred \(|[\w.]+: )(?!Internal|ServiceUnavailable)", str(self)))


class Posted(NamedTuple):
    """What was posted, as it can be shown."""

    prompt: dict[str, Any]
    extra_data: dict[str, Any]
    number: float
    outputs: list[str]
    """The output nodes that run."""
    labels: dict[str, str] = {}  # noqa: RUF012  never changed
    """By which it is found in a list."""


@dataclass(frozen=True)
class Standing:
    """How a job stands: `unknown`, `waiting`, `running`, `ended` or `deleted`."""

    job_id: str
    state: str
    entry: Entry | None = None
    result: dict[str, Any] | None = None
    progress: dict[str, Any] | None = None


class Fleet(NamedTuple):
    """How queue and group stood at the last look; None for what could not be read."""

    depth: QueueDepth | None
    group: Group | None


def how_it_ended(result: dict[str, Any]) -> str:
    """A receipt's end in one word of the index."""
    if result.get("status") == "succeeded":
        return "succeeded"
    kind = (result.get("error") or {}).get("kind")
    return "interrupted" if kind in ("cancelled", "interrupted") else "failed"


class Jobs:
    """The jobs of one environment."""

    def __init__(self, settings: Settings, cloud: Cloud) -> None:
        self.settings = settings
        self.cloud = cloud
        self.index = Index(cloud, self._tell)
        self.on_change: list[Callable[[Entry], None]] = []
        """Called with each job that was posted here or has ended, when that is known."""
        self.running: dict[str, dict[str, Any]] = {}
        """The progress of those that run, as it was last seen."""
        self._sender = Sender(settings)
        self._outbox: asyncio.Queue[tuple[Message, asyncio.Future[NotSentError | None]]] = asyncio.Queue(
            MOST_WAITING_POSTS
        )
        self._sent = 0
        self._raise = asyncio.Event()
        self._swept_at = 0.0
        self._sweeping = asyncio.Lock()
        self._fleet = Fleet(None, None)
        self._fleet_at = 0.0
        self._looking = asyncio.Lock()
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin to pass on what is posted."""
        self._tasks = [asyncio.create_task(self._pass_on()) for _ in range(SENDERS)]
        self._tasks.append(asyncio.create_task(self._raise_capacity()))

    async def end(self) -> None:
        """Pass on what was taken in, and raise nothing any more."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._outbox.join(), 10)
        for task in self._tasks:
            task.cancel()

    # --- Posting -----------------------------------------------------------------------------------------

    async def post(
        self,
        job_id: str,
        workflow: dict[str, Any],
        extra_data: dict[str, Any],
        posted: Posted,
        *,
        inputs: Mapping[str, str] | None = None,
    ) -> Entry:
        """Put a checked job on the queue, and note it for all.

        `extra_data` goes to ComfyUI, secrets among it; what is stored is `posted`. `inputs` are files that the worker
        fetches first. An id that is known is not sent again, as it would not run again. Raises BusyError, NotSentError,
        InvalidMessageError.
        """
        known = self.index.get(job_id)
        if known:
            return known
        body: dict[str, Any] = {"prompt": workflow} | ({"extra_data": extra_data} if extra_data else {})
        if inputs:
            body["inputs"] = dict(inputs)
        # A client has a websocket, or will soon. Of others the worker hears by note_watched.
        body["live"] = True if posted.extra_data.get("client_id") else "when watched"
        message = message_of(body, job_id, None)
        shown = {name: value for name, value in posted._asdict().items() if name != "labels" or value}
        record = json.dumps(shown, ensure_ascii=False).encode()
        sent: asyncio.Future[NotSentError | None] = asyncio.get_running_loop().create_future()
        try:
            self._outbox.put_nowait((message, sent))
        except asyncio.QueueFull:
            raise BusyError("more jobs are posted than the queue takes: post it again in a moment") from None
        if failure := await sent:
            raise failure
        entry = Entry(job_id, now_ms(), mark_of(posted.extra_data.get("client_id")), labels=marks_of(posted.labels))
        try:
            await self.index.post(entry, record)
        except Exception as error:
            # It is on the queue and will run; saying otherwise would have it posted again.
            logger.warning("Job %s is sent, but not noted for other processes: %s", job_id, error)
        self._tell(entry)
        return entry

    async def _pass_on(self) -> None:
        """Send what is posted: what has come while a request was under way goes in one."""
        while True:
            taken = [await self._outbox.get()]
            while len(taken) < 10 and not self._outbox.empty():
                taken.append(self._outbox.get_nowait())
            for batch in batches([message for message, _ in taken]):
                refused = await self._send(batch)
                for message, sent in taken:
                    if message in batch and not sent.done():
                        sent.set_result(refused.get(message.job_id))
                self._sent += len(batch) - len(refused)
            for _ in taken:
                self._outbox.task_done()
            self._raise.set()

    async def _send(self, batch: list[Message]) -> dict[str, NotSentError]:
        """Send what goes in one request; why not, by id."""
        try:
            reasons = await self.cloud.call(self._sender.send_batch, batch)
        except Exception as error:
            reasons = dict.fromkeys((message.job_id for message in batch), str(error) or repr(error))
        return {job_id: NotSentError(reason) for job_id, reason in reasons.items()}

    async def _raise_capacity(self) -> None:
        """Have instances come, once for all jobs that were sent in the meantime."""
        while True:
            await self._raise.wait()
            self._raise.clear()
            sent, self._sent = self._sent, 0
            if sent:
                await self.cloud.call(self._sender.raise_capacity, sent)
                await asyncio.sleep(0.5)

    # --- How they stand ----------------------------------------------------------------------------------

    async def look(self, job_id: str) -> Standing:
        """How a job stands just now, whoever has sent it: the receipt decides. Raises what boto3 raises."""
        entry = await self.index.find(job_id)
        if entry and entry.is_deleted:
            return Standing(job_id, "deleted", entry)
        result = await self.cloud.read_final(result_key(job_id))
        if result:
            await self.note_result(job_id, result)
            return Standing(job_id, "ended", entry, result)
        progress = await self.cloud.read_json(progress_key(job_id))
        if progress:
            self.note_progress(job_id, progress)
            return Standing(job_id, "running", entry, progress=progress)
        return Standing(job_id, "waiting" if entry else "unknown", entry)

    async def note_result(self, job_id: str, result: dict[str, Any]) -> None:
        """Take in a receipt, and note for all that the job has ended."""
        self.running.pop(job_id, None)
        if await self.index.end(job_id, how_it_ended(result)):
            self._tell(self.index.get(job_id))

    def note_progress(self, job_id: str, progress: dict[str, Any]) -> None:
        """Take in what is known of a running job that was posted here."""
        if job_id in self.index.unfinished:
            self.running[job_id] = progress

    async def refresh(self) -> None:
        """See what is new in the lists, and which of the jobs that run or come next have ended since."""
        await self.index.refresh()
        async with self._sweeping:
            if time.monotonic() - self._swept_at < SWEEP_S:
                return
            unfinished = self.index.unfinished
            asked = dict.fromkeys([*(each for each in self.running if each in unfinished), *unfinished])
            await asyncio.gather(*(self.look(job_id) for job_id in list(asked)[:LOOKS]))
            self._swept_at = time.monotonic()

    def waiting(self) -> list[Entry]:
        """The jobs that wait, as far as this process knows, the first in front."""
        return [entry for entry in self.index.unfinished.values() if entry.job_id not in self.running]

    async def posted(self, entry: Entry | None) -> Posted | None:
        """What was posted, None for a job that was sent in another way."""
        record = await self.cloud.read_final(entry.key) if entry else None
        return Posted(**record) if record else None

    def _tell(self, entry: Entry | None) -> None:
        if entry is not None:
            if entry.how:
                self.running.pop(entry.job_id, None)
            for listener in self.on_change:
                listener(entry)

    async def fleet(self) -> Fleet:
        """How queue and group stand, by a look that is FLEET_S old at most."""
        async with self._looking:
            if not self._fleet_at or time.monotonic() - self._fleet_at > FLEET_S:
                self._fleet = await self.cloud.call(self._look_at_fleet)
                self._fleet_at = time.monotonic()
        return self._fleet

    def _look_at_fleet(self) -> Fleet:
        depth = group = None
        try:
            depth = self._sender.depth(0)
            group = read_group(aws_client("autoscaling", self.settings.region), self.settings.asg_name)
        except Exception as error:
            logger.info("Queue or group cannot be looked at: %s", error)
        return Fleet(depth, group)

    # --- Cancelling --------------------------------------------------------------------------------------

    async def delete(self, job_ids: Iterable[str]) -> list[str]:
        """Take jobs that wait off the queue: they are gone from it at once, and run nowhere. Returns which."""

        async def delete(job_id: str) -> bool:
            standing = await self.look(job_id)
            if standing.state != "waiting":
                return False
            await self._cancel(job_id)
            await self.index.end(job_id, "deleted")
            self._tell(standing.entry)
            return True

        wanted = list(dict.fromkeys(job_ids))
        done = await asyncio.gather(*map(delete, wanted))
        return [job_id for job_id, is_deleted in zip(wanted, done, strict=True) if is_deleted]

    async def interrupt(self, job_id: str) -> bool:
        """Cancel a job that runs; False where it has ended. One of which nothing is heard yet may have begun."""
        if (await self.look(job_id)).state not in ("running", "waiting"):
            return False
        await self._cancel(job_id)
        return True

    async def interrupt_all(self) -> None:
        """Cancel what runs of all that was posted here."""
        await self.refresh()
        await asyncio.gather(*(self.interrupt(job_id) for job_id in list(self.running)))

    async def forget(self, job_ids: Iterable[str]) -> None:
        """Take jobs that have ended out of the history. Their receipts and files stay."""
        known = [job_id for job_id in dict.fromkeys(job_ids) if job_id in self.index.ended]
        await asyncio.gather(*(self.index.end(job_id, "deleted") for job_id in known))

    async def note_watched(self, entry: Entry) -> None:
        """Let the worker know that somebody follows a job's steps, if it does not take that for granted."""
        if entry.client == mark_of(None):
            try:
                await self.cloud.write(watched_key(entry.job_id), b"")
            except Exception as error:
                logger.warning("Job %s tells of itself every five seconds only: %s", entry.job_id, error)

    async def is_cancelled(self, job_id: str) -> bool:
        """Whether somebody has cancelled a job that has not ended."""
        return await self.cloud.head(cancel_key(job_id)) is not None

    async def _cancel(self, job_id: str) -> None:
        await self.cloud.write(cancel_key(job_id), b"")
