"""One look-out for all the jobs for which the tasks of an event loop wait, in a thread that is there only while it looks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import suppress
from typing import Any, Protocol
from weakref import WeakKeyDictionary

LEAST_PAUSE_S = 0.5
"""Between two rounds, however many jobs are added meanwhile."""


class Receipts(Protocol):
    """Looks for receipts in rounds, as send_job.Receipts does."""

    trouble: bool

    @property
    def unfinished(self) -> list[str]: ...
    def add(self, job_id: str) -> None: ...
    def discard(self, job_id: str) -> None: ...
    def look(self, *, at_all: bool = False) -> Iterator[Any]: ...
    def pause_s(self) -> float: ...


class LostWatch(Protocol):
    """Says why no more results will come, as send_job.LostWatch does, and for whom: who waits since `before`."""

    before: float

    def look(self) -> str | None: ...


class Lookout:
    """Tells each of those who wait of its job's end."""

    def __init__(
        self, make: Callable[[], tuple[Receipts, LostWatch]], lost_error: Callable[[str, str], Exception]
    ) -> None:
        """`make` may take long, `lost_error` makes of a job id and a reason what those who wait for it are raised."""
        self._make, self._lost_error = make, lost_error
        self._waiting: dict[str, list[asyncio.Future[Any]]] = {}
        self._since: dict[str, float] = {}
        self._news = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def wait_for(self, job_id: str) -> asyncio.Future[Any]:
        """The job's result, when it has one. Who cancels it waits no longer."""
        future = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(job_id, []).append(future)
        self._since.setdefault(job_id, time.monotonic())
        future.add_done_callback(lambda done: self._forget(job_id, done))
        self._news.set()
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())
        return future

    def _forget(self, job_id: str, future: asyncio.Future[Any]) -> None:
        if futures := self._waiting.get(job_id):
            futures.remove(future)
        if not futures:
            self._waiting.pop(job_id, None)
            self._since.pop(job_id, None)
            self._news.set()  # so that a look-out for nothing ends

    async def _run(self) -> None:
        try:
            receipts, lost = await asyncio.to_thread(self._make)
            while self._waiting:
                self._news.clear()
                for job_id in self._waiting.keys() - set(receipts.unfinished):
                    receipts.add(job_id)
                for job_id in set(receipts.unfinished) - self._waiting.keys():
                    receipts.discard(job_id)
                await self._look(receipts)
                await self._look_for_lost(receipts, lost)
                await asyncio.sleep(LEAST_PAUSE_S)
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._news.wait(), max(receipts.pause_s() - LEAST_PAUSE_S, 0))
        except BaseException as error:
            for future in [each for futures in self._waiting.values() for each in futures if not each.done()]:
                if isinstance(error, Exception):
                    future.set_exception(error)
                else:
                    future.cancel()
            if not isinstance(error, Exception):
                raise

    async def _look(self, receipts: Receipts, *, at_all: bool = False) -> None:
        """One round; each result is told as it is found."""
        loop = asyncio.get_running_loop()

        def look() -> None:
            for result in receipts.look(at_all=at_all):
                loop.call_soon_threadsafe(self._tell, result["job_id"], result)

        await asyncio.to_thread(look)

    def _tell(self, job_id: str, result: Any) -> None:
        for future in self._waiting.get(job_id, []):
            if not future.done():
                future.set_result(result)

    async def _look_for_lost(self, receipts: Receipts, lost: LostWatch) -> None:
        reason = await asyncio.to_thread(lost.look)
        gone = {job_id for job_id, since in self._since.items() if since <= lost.before} if reason else set()
        if not (reason and gone):
            return
        await self._look(receipts, at_all=True)
        if receipts.trouble:
            return
        for job_id in gone & set(receipts.unfinished):
            for future in self._waiting.get(job_id, []):
                if not future.done():
                    future.set_exception(self._lost_error(job_id, reason))


_lookouts: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[Hashable, Lookout]] = WeakKeyDictionary()


def shared(key: Hashable, make: Callable[[], Lookout]) -> Lookout:
    """The running event loop's look-out for what `key` names."""
    mine = _lookouts.setdefault(asyncio.get_running_loop(), {})
    if key not in mine:
        mine[key] = make()
    return mine[key]
