"""The rules of scaling: pure functions of what a worker has seen."""

from __future__ import annotations

import pytest

from comfy_utils import Group, QueueDepth
from worker.scaling import (
    AHEAD,
    AHEAD_LIMIT_S,
    ALL_LONG_S,
    LONG_JOB_S,
    READY_S,
    TURN_S,
    QueueHistory,
    Replacement,
    jobs_to_fetch,
    leaving_turn,
    long_jobs,
    may_leave,
    others_at_work,
    replacement_step,
)

EMPTY = QueueDepth(0, 0)


WINDOW_S = 180.0


def watched(*depths: QueueDepth, window_s: float = WINDOW_S) -> QueueHistory:
    """A history that is full at WINDOW_S, with these depths evenly in it."""
    history = QueueHistory(window_s)
    for number, depth in enumerate(depths):
        history.add(WINDOW_S * number / max(1, len(depths) - 1), depth)
    return history


def leaves(history: QueueHistory, depth: QueueDepth, *, idle_s: float, desired: int, turn: int | None) -> bool:
    return may_leave(history, depth, now=WINDOW_S, idle_s=idle_s, cooldown_s=WINDOW_S, desired=desired, turn=turn)


# --- Leaving ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seen", "depth", "idle_s", "desired", "may"),
    [
        pytest.param(EMPTY, EMPTY, 180, 1, True, id="the last, idle long enough"),
        pytest.param(EMPTY, EMPTY, 179, 1, False, id="the last, a second too early"),
        pytest.param(QueueDepth(0, 1), EMPTY, 180, 1, True, id="the last, though something came"),
        pytest.param(EMPTY, QueueDepth(1, 0), 999, 5, False, id="a message is visible"),
        pytest.param(EMPTY, QueueDepth(0, 1), 999, 1, False, id="a message is held by somebody on the way out"),
        pytest.param(EMPTY, EMPTY, 180, 20, True, id="all, when nothing came"),
        pytest.param(QueueDepth(0, 2), QueueDepth(0, 2), 30, 4, True, id="more are there than are needed"),
        pytest.param(QueueDepth(0, 2), QueueDepth(0, 2), 999, 3, False, id="just enough are there"),
        pytest.param(QueueDepth(2, 2), QueueDepth(0, 2), 999, 4, False, id="what waited counts, too"),
    ],
)
def test_who_may_leave(seen: QueueDepth, depth: QueueDepth, idle_s: float, desired: int, may: bool) -> None:
    assert leaves(watched(seen, seen, seen), depth, idle_s=idle_s, desired=desired, turn=0) is may


def test_nobody_judges_a_queue_it_has_hardly_seen() -> None:
    history = QueueHistory(WINDOW_S)
    history.add(100, QueueDepth(0, 1))
    history.add(WINDOW_S, QueueDepth(0, 1))
    assert not leaves(history, QueueDepth(0, 1), idle_s=80, desired=9, turn=0)


@pytest.mark.parametrize("load", [1, 2, 5, 13])
@pytest.mark.parametrize("there", [2, 3, 8, 20])
@pytest.mark.parametrize("second", [0.0, 7.0, 1_000_000.0])
def test_many_who_leave_at_once_never_leave_too_few(load: int, there: int, second: float) -> None:
    history = watched(QueueDepth(0, load), QueueDepth(0, load))
    names = [f"i-{number:017x}" for number in range(there)]
    left = [
        name
        for name in names  # all see the same number, because none of them has gone yet
        if leaves(history, EMPTY, idle_s=60, desired=there, turn=leaving_turn(name, names, second))
    ]
    needed = -(-load * 10 // 9)
    assert there - len(left) == min(there, needed)


def test_turns_change_and_rest_between() -> None:
    names = [f"i-{number:017x}" for number in range(10)]

    def order(clock: float) -> list[str]:
        return sorted(names, key=lambda name: leaving_turn(name, names, clock) or 0)

    assert order(0) == order(TURN_S * 0.6)
    assert len({order(turn * TURN_S)[0] for turn in range(50)}) > 5, "a busy one does not block the others for long"
    assert leaving_turn(names[0], names, TURN_S * 0.9) is None
    assert leaving_turn("i-new", names, 0) is not None, "one that the group does not list yet has its turn"


# --- Long jobs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("running_s", "waiting", "long"),
    [
        (LONG_JOB_S - 1, 2, 0),
        (LONG_JOB_S, 2, 1),
        (ALL_LONG_S, 2, 6),
        (ALL_LONG_S, 0, 1),
    ],
)
def test_long_jobs(running_s: float, waiting: int, long: int) -> None:
    depth = QueueDepth(waiting, 6)
    assert long_jobs(watched(depth, depth), depth, running_s) == long


def test_a_queue_that_was_empty_meanwhile_shows_that_jobs_get_through() -> None:
    depth = QueueDepth(2, 6)
    assert long_jobs(watched(depth, QueueDepth(0, 6), depth), depth, ALL_LONG_S) == 1


# --- Fetching ahead --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("waiting", "others", "in_hand", "last_run_s", "running_s", "more"),
    [
        pytest.param(1, 0, 1, 5.0, 0.0, 1, id="alone, and one waits"),
        pytest.param(0, 0, 1, 5.0, 0.0, 0, id="nothing waits"),
        pytest.param(3, 3, 1, 5.0, 0.0, 0, id="each of the others is to find one"),
        pytest.param(4, 3, 1, 5.0, 0.0, 1, id="each of them does"),
        pytest.param(9, 0, 2, 5.0, 0.0, 0, id="one ahead is enough"),
        pytest.param(9, 0, 2, 0.1, 0.0, 2, id="more where jobs are shorter than it takes to fetch one"),
        pytest.param(9, 5, 2, 0.1, 0.0, 0, id="but then the others are to find two"),
        pytest.param(99, 0, 1, 0.0, 0.0, AHEAD - 1, id="the shortest jobs come together"),
        pytest.param(4, 0, 1, 0.0, 0.0, 4, id="as many as wait"),
        pytest.param(30, 2, 1, 0.0, 0.0, 6, id="as many as leave the others theirs"),
        pytest.param(99, 0, AHEAD - 2, 0.0, 0.0, 0, id="not for one or two of them"),
        pytest.param(99, 0, AHEAD, 0.0, 0.0, 0, id="never more than that in hand"),
        pytest.param(99, 0, 1, AHEAD_LIMIT_S + 1.0, 0.0, 0, id="jobs are long"),
        pytest.param(99, 0, 1, 5.0, AHEAD_LIMIT_S + 1.0, 0, id="this one turns out long"),
        pytest.param(99, 0, 1, None, 0.0, 0, id="nothing is known of how long they are"),
    ],
)
def test_who_fetches_ahead(
    waiting: int, others: int, in_hand: int, last_run_s: float | None, running_s: float, more: int
) -> None:
    fetched = jobs_to_fetch(
        waiting=waiting, others=others, in_hand=in_hand, last_run_s=last_run_s, running_s=running_s
    )
    assert fetched == more


@pytest.mark.parametrize(
    ("there", "in_flight", "held", "others"),
    [
        pytest.param(20, 1, 1, 0, id="all others still boot"),
        pytest.param(20, 13, 13, 0, id="all others still boot, and this one holds many"),
        pytest.param(20, 4, 1, 3, id="each that holds a message counts"),
        pytest.param(20, 99, 1, 19, id="never more than are in service"),
        pytest.param(20, 0, 1, 0, id="SQS counts late"),
        pytest.param(1, 5, 1, 0, id="alone"),
        pytest.param(None, 5, 1, 0, id="no group"),
    ],
)
def test_who_takes_jobs_besides(there: int | None, in_flight: int, held: int, others: int) -> None:
    names = [f"i-{number}" for number in range(there or 0)]
    group = None if there is None else Group(20, 0, 20, names, ())
    assert others_at_work(group, "i-0", QueueDepth(7, in_flight), held) == others


# --- Replacing outdated instances ------------------------------------------------------------------------


BUSY = QueueDepth(3, 2)


@pytest.mark.parametrize(
    ("group_now", "depth", "has_come", "is_ready", "step"),
    [
        pytest.param(Group(2, 0, 4, ["a", "b"], ()), BUSY, False, False, "", id="nobody is outdated"),
        pytest.param(Group(2, 0, 4, ["a", "b"], ("a", "b")), BUSY, False, False, "launch", id="another first"),
        pytest.param(Group(2, 0, 4, ["0", "a"], ("0", "a")), BUSY, False, False, "", id="not its turn"),
        pytest.param(Group(3, 0, 4, ["a", "b"], ("a", "b")), BUSY, False, False, "", id="one is on its way"),
        pytest.param(Group(3, 0, 4, ["a", "b", "n"], ("a", "b")), BUSY, True, False, "", id="it still boots"),
        pytest.param(Group(3, 0, 4, ["a", "b", "n"], ("a", "b")), BUSY, True, True, "leave", id="it is ready"),
        pytest.param(Group(4, 0, 4, ["a", "b", "n", "m"], ("a", "b")), BUSY, False, False, "swap", id="no room"),
        pytest.param(Group(1, 0, 1, ["a"], ("a",)), BUSY, False, False, "swap", id="no room, the only one"),
        pytest.param(Group(2, 0, 4, ["0", "a"], ("0", "a")), EMPTY, False, False, "leave", id="nobody needs it"),
        pytest.param(Group(1, 1, 4, ["a"], ("a",)), EMPTY, False, False, "launch", id="idle, at the minimum"),
        pytest.param(Group(1, 0, 4, ["a"], ("a",)), QueueDepth(0, 1), False, False, "launch", id="a job runs"),
    ],
)
def test_what_an_outdated_instance_does(
    group_now: Group, depth: QueueDepth, has_come: bool, is_ready: bool, step: str
) -> None:
    assert replacement_step(group_now, "a", depth, has_come=has_come, is_ready=is_ready) == step


def test_the_one_that_came_is_told_from_those_that_were_there() -> None:
    replacement = Replacement()
    there = Group(2, 0, 4, ["a", "b", "n"], ("a",))
    assert replacement.step(Group(3, 0, 4, ["a", "b", "n"], ("a",)), "a", BUSY, now=0) == "launch"
    assert replacement.step(there._replace(desired=4), "a", BUSY, now=10) == ""
    assert not replacement.is_due
    come = Group(4, 0, 4, ["a", "b", "n", "new"], ("a",))
    replacement.step(come, "a", BUSY, now=20)
    replacement.step(come, "a", BUSY, now=20 + READY_S - 1)
    assert not replacement.is_due
    replacement.step(come, "a", BUSY, now=20 + READY_S)
    assert (replacement.is_due, replacement.decrement) == (True, True)
