"""Whether all threads that must turn still do, which systemd is told."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

TURN_LIMIT_S = 240
"""A thread that has not turned for so long hangs; systemd's WatchdogSec must be longer."""


class Watchdog:
    """Knows when each of the threads under watch has last turned."""

    def __init__(self) -> None:
        self._turned_at: dict[int, float] = {}

    @contextmanager
    def watched(self) -> Iterator[None]:
        """While the with-block runs, this thread has to call `turn` all the time."""
        self._turned_at[threading.get_ident()] = time.monotonic()
        try:
            yield
        finally:
            del self._turned_at[threading.get_ident()]

    def turn(self) -> None:
        """This thread still turns, if it is one under watch."""
        if threading.get_ident() in self._turned_at:
            self._turned_at[threading.get_ident()] = time.monotonic()

    def tell_systemd(self) -> None:
        """Have systemd wait on, unless a thread hangs: then it starts the worker anew."""
        now = time.monotonic()
        if now < min(list(self._turned_at.values()), default=now) + TURN_LIMIT_S:
            notify_systemd("WATCHDOG=1")


def notify_systemd(state: str) -> None:
    """Send one sd_notify datagram; nothing where systemd does not listen."""
    address = os.environ.get("NOTIFY_SOCKET")
    if address:
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify_socket:
            notify_socket.connect("\0" + address[1:] if address.startswith("@") else address)
            notify_socket.send(state.encode())
