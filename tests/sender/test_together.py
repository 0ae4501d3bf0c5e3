"""Many jobs waited for at once: as_completed, and both in asyncio."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from local_cloud import Fault
from sender_tools import receipt, store
from workplace import LIMIT_S, Site
from workshop import Calls

import send_job
from comfy_utils import InvalidMessageError, new_job_id
from sender import lookout

FAILED: dict[str, Any] = {"status": "failed", "error": {"message": "node 1 X: no"}}


@pytest.fixture
def in_haste(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds follow each other without a pause, or nearly so."""
    monkeypatch.setattr(send_job, "FIRST_PAUSE_S", 0.02)
    monkeypatch.setattr(send_job, "LONGEST_PAUSE_S", 0.05)
    monkeypatch.setattr(lookout, "LEAST_PAUSE_S", 0.02)


@pytest.mark.usefixtures("in_haste")
def test_each_result_comes_as_its_job_ends_failed_ones_too(sender_site: Site) -> None:
    first, second, third = ids = [new_job_id() for _ in range(3)]
    store(sender_site, second, **FAILED)
    results = send_job.as_completed([*ids, first], timeout=LIMIT_S)
    assert next(results) == receipt(second, **FAILED)
    store(sender_site, third)
    assert next(results) == receipt(third)
    store(sender_site, first)
    assert list(results) == [receipt(first)], "each once"
    assert list(send_job.as_completed([])) == []


@pytest.mark.usefixtures("in_haste", "sender_site")
def test_bad_ids_are_refused_at_once_and_the_time_limit_counts() -> None:
    for call in (send_job.as_completed, send_job.as_completed_async):
        with pytest.raises(InvalidMessageError, match="'x' is no job id"):
            call([new_job_id(), "x"])
    ids = [new_job_id() for _ in range(2)]
    with pytest.raises(send_job.WaitTimeoutError, match=r"2 jobs had no result after 0\.1 s"):
        list(send_job.as_completed(ids, timeout=0.1))

    async def wait() -> None:
        with pytest.raises(send_job.WaitTimeoutError, match=r"2 jobs had no result after 0\.1 s"):
            _ = [ended async for ended in send_job.as_completed_async(ids, timeout=0.1)]
        with pytest.raises(TimeoutError):
            await send_job.wait_async(ids[0], timeout=0.1)

    asyncio.run(wait())


@pytest.mark.usefixtures("in_haste")
def test_tasks_share_one_look_out_and_no_thread_waits_for_any_of_them(sender_site: Site) -> None:
    ids = [new_job_id() for _ in range(2 * send_job.LOOKS_PER_ROUND)]
    good, bad, *others = ids
    threads: list[int] = []

    async def wait() -> None:
        tasks = [asyncio.create_task(send_job.wait_async(job_id)) for job_id in ids]
        before = threading.active_count()
        await asyncio.to_thread(store, sender_site, good)
        assert await tasks[0] == receipt(good)
        threads.append(threading.active_count() - before)
        await asyncio.to_thread(store, sender_site, bad, **FAILED)
        with pytest.raises(send_job.JobFailed, match="node 1 X: no"):
            await tasks[1]
        for task in tasks[2:5]:
            task.cancel()
        for job_id in others[3:]:
            await asyncio.to_thread(store, sender_site, job_id)
        results = await asyncio.gather(*tasks[5:])
        assert [each["job_id"] for each in results] == others[3:]
        again = [ended["job_id"] async for ended in send_job.as_completed_async(ids[5:9])]
        assert sorted(again) == sorted(ids[5:9]), "the look-out had ended, and begins anew"

    asyncio.run(asyncio.wait_for(wait(), LIMIT_S))
    assert threads[0] < len(ids) / 2


@pytest.mark.usefixtures("in_haste", "sender_site")
def test_a_refused_bucket_is_told_to_all_who_wait(calls: Calls) -> None:
    calls.next("GET", Fault(403, "AccessDenied"), times=1000)

    async def wait() -> list[send_job.JobResult | BaseException]:
        tasks = (send_job.wait_async(new_job_id()) for _ in range(3))
        return await asyncio.gather(*tasks, return_exceptions=True)

    errors = asyncio.run(asyncio.wait_for(wait(), LIMIT_S))
    assert ["AccessDenied" in str(error) for error in errors] == [True] * 3


class Looks:
    """Receipts that come when a test says so, and a queue that says why others will not."""

    def __init__(self) -> None:
        self.unfinished: list[str] = []
        self.there: set[str] = set()
        self.trouble = False
        self.before, self.reason = float("-inf"), ""
        self.asked_for_all = 0

    def add(self, job_id: str) -> None:
        self.unfinished.append(job_id)

    def discard(self, job_id: str) -> None:
        self.unfinished.remove(job_id)

    def look(self, *, at_all: bool = False) -> Iterator[Any]:
        self.asked_for_all += at_all
        for job_id in [each for each in self.unfinished if each in self.there]:
            self.unfinished.remove(job_id)
            yield {"job_id": job_id}

    def pause_s(self) -> float:
        return 0.0


class Lost:
    """The queue of a Looks."""

    def __init__(self, looks: Looks) -> None:
        self.looks = looks
        self.before = 0.0

    def look(self) -> str | None:
        self.before = self.looks.before
        return self.looks.reason or None


@pytest.mark.usefixtures("in_haste")
def test_only_those_who_have_waited_long_enough_hear_that_a_job_is_lost() -> None:
    looks = Looks()
    one = lookout.Lookout(lambda: (looks, Lost(looks)), lambda job_id, reason: RuntimeError(f"{job_id}: {reason}"))

    async def wait() -> None:
        old = one.wait_for("old")
        await asyncio.sleep(0.01)
        looks.before = time.monotonic()
        await asyncio.sleep(0.01)
        new, abandoned = one.wait_for("new"), one.wait_for("abandoned")
        abandoned.cancel()
        looks.trouble, looks.reason = True, "the queue is gone"
        while looks.asked_for_all < 2:
            await asyncio.sleep(0.01)
        assert not old.done(), "while receipts cannot be read no job is lost"
        looks.trouble = False
        with pytest.raises(RuntimeError, match="old: the queue is gone"):
            await old
        assert not new.done()
        looks.there.add("new")
        assert await new == {"job_id": "new"}
        assert looks.unfinished == []

    asyncio.run(asyncio.wait_for(wait(), LIMIT_S))
