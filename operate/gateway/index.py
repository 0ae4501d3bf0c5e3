"""Which jobs were posted here and which of them have ended: two lists in the bucket, which all `serve` processes share.

A job is one object below POSTED, whose body is what was posted, and later an empty one below ENDED. Their names begin
with the time, so a listing from the last name that is known gives the news: two requests, however many jobs there are.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from operate.gateway.cloud import Cloud

POSTED = "input/jobs/serve/posted/"
ENDED = "input/jobs/serve/ended/"
"""Below input/jobs/, which belongs to one environment alone, and without .json, which S3's trigger would take."""
KNOWN_S = 14 * 86_400
"""A queue keeps no message longer, so what was posted before neither waits nor runs."""
MOST_ENDED = 10_000
"""As many as a ComfyUI's history keeps."""
OVERLAP_S, DEEP_OVERLAP_S, DEEP_EVERY_S = 15, 180, 60
"""Another process's clock may be behind, and its object later than its name says: so far each listing looks back."""
PAUSE_S = 0.25
"""Between two listings, however many ask: one that was begun before somebody asked is not good enough for them."""

MOST_LABELS = 16
"""So many marks have room in a key."""

_NAME = re.compile(r"(\d{13})-([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})-(\w+)(?:-([0-9a-f.]+))?")


@dataclass(slots=True)
class Entry:
    """A job that was posted here."""

    job_id: str
    posted_ms: int
    client: str
    """The mark of the client that posted it."""
    ended_ms: int | None = None
    how: str = ""
    """How it ended: succeeded, failed, interrupted, or deleted, which is gone from queue and history."""
    labels: str = ""
    """The marks of its labels, with dots between them."""
    is_forgotten: bool = False
    """It was deleted after it had ended."""

    @property
    def key(self) -> str:
        """Where what was posted lies."""
        labels = f"-{self.labels}" if self.labels else ""
        return f"{POSTED}{self.posted_ms:013d}-{self.job_id}-{self.client}{labels}"

    @property
    def is_deleted(self) -> bool:
        return self.how == "deleted"


def mark_of(client_id: str | None) -> str:
    """A client's mark in a key: client ids are any text."""
    return hashlib.sha256(client_id.encode("utf-8", "replace")).hexdigest()[:16] if client_id else "nobody"


def mark_of_label(name: str, value: str) -> str:
    """A label's mark in a key: enough to find by, what was posted has the label itself."""
    return hashlib.sha256(f"{name}\0{value}".encode()).hexdigest()[:8]


def marks_of(labels: Mapping[str, str]) -> str:
    """The marks of at most MOST_LABELS labels."""
    return ".".join(sorted(mark_of_label(name, value) for name, value in labels.items()))


def now_ms() -> int:
    return int(time.time() * 1000)


class Index:
    """What this process knows of the two lists. It may be forgotten at any time."""

    def __init__(self, cloud: Cloud, on_news: Callable[[Entry], None]) -> None:
        """`on_news` is called with each job that is seen in the lists for the first time, or to have ended."""
        self._on_news = on_news
        self._cloud = cloud
        self._jobs: dict[str, Entry] = {}
        self._unlisted: dict[str, list[tuple[int, str]]] = {}  # ended, but not seen among the posted: when and how
        self.unfinished: dict[str, Entry] = {}
        """In the order in which they were posted, as far as one clock may tell."""
        self.ended: dict[str, Entry] = {}
        """In the order in which they ended, without those that were deleted."""
        self._seen_ms = {POSTED: 0, ENDED: 0}
        self._listed_at = self._deep_at = 0.0
        self._one = asyncio.Lock()

    @property
    def is_read(self) -> bool:
        """Whether the lists have been read once."""
        return bool(self._listed_at)

    def get(self, job_id: str) -> Entry | None:
        """A job, as far as this process knows."""
        return self._jobs.get(job_id)

    def newest(self) -> list[Entry]:
        """All that this process knows and that are not forgotten, the last posted in front."""
        known = [entry for entry in self._jobs.values() if not entry.is_forgotten]
        return sorted(known, key=lambda entry: (entry.posted_ms, entry.job_id), reverse=True)

    async def find(self, job_id: str) -> Entry | None:
        """A job, also one that another process has just taken in."""
        if job_id not in self._jobs:
            await self.refresh()
        return self._jobs.get(job_id)

    async def refresh(self) -> None:
        """Read what is new in the lists. Who asks meanwhile shares the next reading."""
        asked = time.monotonic()
        async with self._one:
            if self._listed_at >= asked:
                return
            await asyncio.sleep(max(0.0, self._listed_at + PAUSE_S - asked))
            began = time.monotonic()
            is_deep = began - self._deep_at > DEEP_EVERY_S
            overlap_s = DEEP_OVERLAP_S if is_deep else OVERLAP_S
            ended, posted = await asyncio.gather(self._list(ENDED, overlap_s), self._list(POSTED, overlap_s))
            self._take(ENDED, ended)  # in this order nothing old is taken for news
            self._take(POSTED, posted)
            self._listed_at = began
            if is_deep:
                self._deep_at = began
                self._forget()

    def _forget(self) -> None:
        """Forget what was posted so long ago that a new process would not find it either."""
        oldest_ms = now_ms() - KNOWN_S * 1000
        for entry in [entry for entry in self._jobs.values() if entry.posted_ms < oldest_ms]:
            for known in (self._jobs, self.unfinished, self.ended):
                known.pop(entry.job_id, None)
        self._unlisted = {job_id: each for job_id, each in self._unlisted.items() if each[-1][0] > oldest_ms}

    async def _list(self, prefix: str, overlap_s: int) -> list[re.Match[str]]:
        """What has come into a list."""
        oldest_ms = now_ms() - KNOWN_S * 1000
        since_ms = max(self._seen_ms[prefix] - overlap_s * 1000, oldest_ms)
        found: list[re.Match[str]] = []
        async for page in self._cloud.names(prefix, after=f"{prefix}{since_ms:013d}"):
            found += filter(None, (_NAME.fullmatch(item["Key"].removeprefix(prefix)) for item in page))
        return found

    def _take(self, prefix: str, found: list[re.Match[str]]) -> None:
        """Take in what a listing has found, and tell what is news."""
        for match in found:
            moment_ms, job_id = int(match[1]), match[2]
            # A clock that is ahead must not hide what is to come.
            self._seen_ms[prefix] = max(self._seen_ms[prefix], min(moment_ms, now_ms()))
            if prefix == POSTED:
                is_news = self.note_posted(Entry(job_id, moment_ms, match[3], labels=match[4] or ""))
            else:
                is_news = self.note_ended(job_id, moment_ms, match[3])
            if is_news:
                self._on_news(self._jobs[job_id])

    def note_posted(self, entry: Entry) -> bool:
        """Take in a job that was posted; False where it was known. The first post of an id counts."""
        if entry.job_id in self._jobs:
            return False
        self._jobs[entry.job_id] = self.unfinished[entry.job_id] = entry
        for ended_ms, how in self._unlisted.pop(entry.job_id, ()):
            self.note_ended(entry.job_id, ended_ms, how)
        return True

    def note_ended(self, job_id: str, ended_ms: int, how: str) -> bool:
        """Take in that a job has ended; False where that was known. What is deleted stays so."""
        entry = self._jobs.get(job_id)
        if entry is None:
            ends = self._unlisted.setdefault(job_id, [])
            if (ended_ms, how) not in ends:  # a listing looks back
                ends.append((ended_ms, how))
            return False
        if entry.how and (entry.how == how or how != "deleted"):
            return False
        entry.is_forgotten = bool(entry.how)
        entry.ended_ms, entry.how = ended_ms, how
        self.unfinished.pop(job_id, None)
        self.ended.pop(job_id, None)
        if how != "deleted":
            self.ended[job_id] = entry
        while len(self.ended) > MOST_ENDED:
            oldest = next(iter(self.ended))
            del self.ended[oldest], self._jobs[oldest]
        return True

    async def post(self, entry: Entry, body: bytes) -> None:
        """Store a job that was posted, and what was."""
        self.note_posted(entry)
        self._cloud.keep(entry.key, body)
        await self._cloud.write(entry.key, body)

    async def end(self, job_id: str, how: str) -> bool:
        """Store that a job has ended, for all; False where that was known."""
        ended_ms = now_ms()
        if not self.note_ended(job_id, ended_ms, how):
            return False
        await self._cloud.write(f"{ENDED}{ended_ms:013d}-{job_id}-{how}", b"")
        return True
