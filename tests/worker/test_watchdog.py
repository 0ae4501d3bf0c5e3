"""systemd hears that a worker lives, until one of its threads hangs."""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from workplace import LIMIT_S, Site, await_that
from workshop import make_worker

import parse_job
from worker import watchdog
from worker.shutdown import Shutdown
from worker.watchdog import TURN_LIMIT_S, Watchdog


@pytest.fixture
def systemd(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[socket.socket]:
    """What the worker notifies."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(LIMIT_S)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield systemd


def test_systemd_hears_that_the_worker_lives_until_its_intake_hangs(
    make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch, systemd: socket.socket
) -> None:
    worker = make_worker(make_site(), monkeypatch)
    hang = threading.Event()

    def take_nothing() -> None:
        with worker.watchdog.watched():
            hang.wait()

    intake = threading.Thread(target=take_nothing, daemon=True)
    intake.start()
    watch = threading.Thread(target=worker.watch, args=(intake,), daemon=True)
    watch.start()
    assert systemd.recv(100) == b"WATCHDOG=1"
    monkeypatch.setattr(watchdog, "TURN_LIMIT_S", 0.1)
    systemd.settimeout(2)
    await_that("it hears no more", lambda: not hears(systemd))
    hang.set()
    watch.join(LIMIT_S)


def test_one_thread_that_hangs_is_enough(systemd: socket.socket) -> None:
    dog = Watchdog()
    shutdown = Shutdown(3, dog)
    systemd.settimeout(0.2)
    hang, is_watched = threading.Event(), threading.Event()

    def be_watched() -> None:
        with dog.watched():
            is_watched.set()
            hang.wait()

    other = threading.Thread(target=be_watched, daemon=True)
    other.start()
    assert is_watched.wait(LIMIT_S)
    with dog.watched():
        dog.tell_systemd()
        assert hears(systemd)
        for thread in (threading.current_thread(), other):
            dog._turned_at[thread.ident or 0] -= TURN_LIMIT_S + 1
        shutdown.should_stop()  # asked all the time: this thread turns, the other does not
        dog.tell_systemd()
        assert not hears(systemd)
        hang.set()
        other.join(LIMIT_S)
        dog.tell_systemd()
        assert hears(systemd), "who is no longer under watch does not hang"


@pytest.fixture
def leaving(make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch) -> parse_job.Worker:
    """A worker that leaves, and ends when it has completed its lifecycle action."""
    worker = make_worker(make_site(), monkeypatch)
    monkeypatch.setattr(parse_job, "BEAT_S", 0.02)
    monkeypatch.setattr(worker.lifecycle, "complete", worker.shutdown.stop.set)
    worker.shutdown.drain.set()
    return worker


def leave(worker: parse_job.Worker) -> None:
    """Its loop has ended."""
    intake = threading.Thread(target=lambda: None)
    intake.start()
    worker.leave(intake)


def test_while_a_hook_takes_its_time_systemd_and_the_group_hear_that_it_goes_on(
    leaving: parse_job.Worker, monkeypatch: pytest.MonkeyPatch, systemd: socket.socket
) -> None:
    beats = threading.Semaphore(0)
    monkeypatch.setattr(leaving.lifecycle, "turn", beats.release)
    heard: list[bool] = []

    def hook(_: str) -> None:
        heard.append(all(beats.acquire(timeout=LIMIT_S) and hears(systemd) for _ in range(3)))

    monkeypatch.setattr(parse_job, "before_exit", hook)
    leave(leaving)
    assert heard == [True]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("ends", [threading.Event().wait, sys.exit, lambda: 1 / 0])
def test_a_hook_that_hangs_or_fails_keeps_no_instance(
    leaving: parse_job.Worker, monkeypatch: pytest.MonkeyPatch, ends: Callable[[], object]
) -> None:
    monkeypatch.setattr(parse_job, "BEFORE_EXIT_LIMIT_S", 0.2)
    monkeypatch.setattr(parse_job, "before_exit", lambda _: ends())
    leave(leaving)
    assert leaving.shutdown.stop.is_set(), "the lifecycle action is completed"


def hears(systemd: socket.socket) -> bool:
    """Whether a notification comes in time."""
    try:
        return bool(systemd.recv(100))
    except TimeoutError:
        return False
