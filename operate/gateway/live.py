"""What happens to the jobs that somebody watches: one loop looks at the bucket for all of them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

from comfy_utils import progress_key, result_key
from operate.gateway.cloud import Cloud

logger = logging.getLogger(__name__)

ROUND_S = 0.5
"""Between two looks for a job's receipt and its progress."""
FEW = 30
"""Where more jobs are watched, those that wait are looked at for the one, and a round later for the other."""
LOOKS_PER_ROUND = 150
"""Most jobs that are looked at in one round. Of more each is looked at less often, so that they cost no more."""
LOOKS_AT_ONCE = 20
RETRY_S = 2.0

Event = dict[str, Any]


class Live:
    """Looks for progress and receipts of the jobs that are watched, and for nothing where none is."""

    def __init__(self, cloud: Cloud) -> None:
        self._cloud = cloud
        self._watched: dict[str, set[asyncio.Queue[Event]]] = {}
        self._told: dict[str, Event] = {}
        self._gate = asyncio.Semaphore(LOOKS_AT_ONCE)
        self._loop: asyncio.Task[None] | None = None

    async def watch(self, job_id: str) -> AsyncIterator[Event]:
        """A job's progress whenever it has changed, and in the end its receipt."""
        news: asyncio.Queue[Event] = asyncio.Queue()
        watchers = self._watched.setdefault(job_id, set())
        watchers.add(news)
        if job_id in self._told:
            news.put_nowait(self._told[job_id])
        if self._loop is None or self._loop.done():
            self._loop = asyncio.create_task(self._look_on())
        try:
            while True:
                event = await news.get()
                yield event
                if event.get("status") != "running":
                    return
        finally:
            watchers.discard(news)
            if not watchers and self._watched.get(job_id) is watchers:
                del self._watched[job_id]
                self._told.pop(job_id, None)

    async def _look_on(self) -> None:
        """Look until nobody watches anything."""
        number = 0
        while self._watched:
            number += 1
            began = asyncio.get_running_loop().time()
            # The jobs of this round go to the end of the line.
            jobs = list(self._watched)[:LOOKS_PER_ROUND]
            if len(self._watched) > LOOKS_PER_ROUND:
                for job_id in jobs:
                    self._watched[job_id] = self._watched.pop(job_id)
            all_of_it, is_even = len(jobs) <= FEW, number % 2 == 0
            found = await asyncio.gather(
                *(self._look(job_id, all_of_it or job_id in self._told, is_even) for job_id in jobs),
                return_exceptions=True,
            )
            failures = [each for each in found if isinstance(each, Exception)]
            if failures:
                logger.warning("Jobs cannot be looked at just now: %s", failures[0])
            took = asyncio.get_running_loop().time() - began
            await asyncio.sleep(RETRY_S if failures else max(0.05, ROUND_S - took))

    async def _look(self, job_id: str, all_of_it: bool, is_even: bool) -> None:
        event = None
        async with self._gate:
            if all_of_it or is_even:
                event = await self._cloud.read_final(result_key(job_id))
            if event is None and (all_of_it or not is_even):
                event = await self._cloud.read_json(progress_key(job_id))
        if event and job_id in self._watched and event != self._told.get(job_id):
            self._told[job_id] = event
            for news in self._watched[job_id]:
                news.put_nowait(event)
