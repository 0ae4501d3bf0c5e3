"""How long is waited for AWS, and by how many at a time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise

import pytest
from botocore.exceptions import ClientError, EndpointConnectionError
from workplace import LIMIT_S, await_that

from worker import retry
from worker.retry import LONGEST_PAUSE_S, Patience, Wait, backoff_s

OUTAGE_S = 150.0
TRIED_AGAIN_S = 15.0
"""So long after its return what waits for S3 may take, and no longer."""


def play(
    waits: list[Wait], patience: Patience, is_up: Callable[[int, float], bool], until: float
) -> list[list[float]]:
    """Each wait as its thread lives it, on a clock of its own; returns when each has tried, the last time well."""
    tries: list[list[float]] = [[] for _ in waits]
    left = dict(enumerate(waits))
    now = 0.0
    while left and now < until:
        for number, wait in list(left.items()):
            if tries[number] and not patience.may_try(wait, now):
                continue
            tries[number].append(now)
            if is_up(number, now):
                patience.note_success()
                del left[number]
            else:
                patience.note_failure(wait, now)
        now += 0.1
    return tries


@pytest.mark.parametrize("outage_s", [3.0, 60.0, OUTAGE_S, 590.0])
def test_when_s3_is_back_all_go_on_soon_and_until_then_one_tries_for_all(outage_s: float) -> None:
    waits = [Wait() for _ in range(27)]
    tries = play(waits, Patience(), lambda _, now: now >= outage_s, 3600)
    assert max(each[-1] for each in tries) <= outage_s + TRIED_AGAIN_S - 4, "botocore itself takes up to four more"
    during = sorted(moment for each in tries for moment in each[1:] if moment < outage_s)
    assert all(later - sooner > 0.5 for sooner, later in pairwise(during)), "one at a time"
    assert len(during) <= 5 + outage_s / (LONGEST_PAUSE_S / 2)


def test_what_fails_alone_keeps_nobody_from_going_on_and_does_not_spin() -> None:
    """Such as a file whose key may not be written, while others' are."""
    patience = Patience()
    tries = play([Wait() for _ in range(6)], patience, lambda number, now: number != 0 and now >= 20, 60)
    assert all(each[-1] < 20 + 2 * LONGEST_PAUSE_S + 1 for each in tries[1:]), "it has every other try at most"
    later = [moment for moment in tries[0] if moment > 20]
    assert 3 <= len(later) <= 20, later
    # Those that come after it are stored without a wait, which does not make it try each time.
    lone = Wait()
    patience.note_failure(lone, 100.0)
    tried = 0
    for step in range(600):
        patience.note_success()
        if patience.may_try(lone, 100 + step / 10):
            tried += 1
            patience.note_failure(lone, 100 + step / 10)
    assert 3 <= tried <= 25


def test_while_the_one_that_tries_takes_long_another_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be a large file, of which the others hear nothing before it is stored."""
    monkeypatch.setattr(retry, "backoff_s", lambda _: 1.0)
    patience, large, small = Patience(), Wait(), Wait()
    patience.note_failure(large, 0.0)
    patience.note_failure(small, 0.0)
    assert patience.may_try(large, 2.0)
    assert not patience.may_try(small, 3.0)
    assert patience.may_try(small, 2.0 + LONGEST_PAUSE_S)


def test_threads_that_insist_all_get_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "backoff_s", lambda _: 0.05)
    is_back, patience = threading.Event(), Patience()
    failed: list[int] = []

    def act(number: int) -> int:
        if not is_back.is_set():
            failed.append(number)
            raise EndpointConnectionError(endpoint_url="s3")
        return number

    with ThreadPoolExecutor(9) as pool:
        tries = [pool.submit(patience.insist, partial(act, number), time.sleep) for number in range(9)]
        await_that("each has failed, and one has tried again", lambda: len(set(failed)) == 9 < len(failed))
        is_back.set()
        assert [each.result(LIMIT_S) for each in tries] == list(range(9))


def test_what_is_none_of_awss_errors_is_raised_at_once_and_what_lasts_in_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(error: Exception) -> None:
        raise error

    def nobody_waits(_: float) -> None:
        raise AssertionError

    with pytest.raises(KeyError):
        Patience().insist(lambda: fail(KeyError("x")), nobody_waits)
    monkeypatch.setattr(retry, "AWS_PATIENCE_S", 0.01)
    denied = ClientError({"Error": {"Code": "AccessDenied"}}, "PutObject")
    with pytest.raises(ClientError):
        Patience().insist(lambda: fail(denied), time.sleep)


def test_no_number_of_failures_is_too_large() -> None:
    """An outage of hours once ended the thread that takes messages: 2.0**1024 is no number."""
    pauses = [backoff_s(failures) for failures in (1, 2, 3, 4, 100, 1024, 10**6)]
    assert all(0 < pause <= LONGEST_PAUSE_S for pause in pauses)
    assert min(pauses[3:]) >= LONGEST_PAUSE_S / 2
