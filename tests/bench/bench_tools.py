"""What the benchmarks share: AWS at a distance, and figures."""

from __future__ import annotations

import queue
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit


@contextmanager
def at_distance(
    endpoint: str, round_trip_s: float, on_data: Callable[[bytes], object] = lambda _: None
) -> Iterator[str]:
    """The address of a proxy in front of `endpoint` through which every request takes so much longer.

    Requests on different connections do not wait for each other, as on a real line. `on_data` sees what is asked.
    """
    target = urlsplit(endpoint)
    server = socket.create_server(("127.0.0.1", 0), backlog=100)
    is_open = True

    def serve() -> None:
        while is_open:
            try:
                near, _ = server.accept()
            except OSError:
                return
            far = socket.create_connection((target.hostname or "", target.port or 80))
            for one in (near, far):
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            pump(near, far, round_trip_s, on_data)
            pump(far, near, 0.0)

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
    finally:
        is_open = False
        server.close()


def pump(
    source: socket.socket, sink: socket.socket, delay_s: float, on_data: Callable[[bytes], object] = lambda _: None
) -> None:
    """Pass on what comes, each piece `delay_s` after it came, until the source closes."""
    pieces: queue.Queue[tuple[float, bytes]] = queue.Queue()

    def read() -> None:
        data = b"-"
        while data:
            try:
                data = source.recv(1 << 16)
            except OSError:
                data = b""
            on_data(data)
            pieces.put((time.monotonic() + delay_s, data))

    def write() -> None:
        while True:
            due, data = pieces.get()
            time.sleep(max(0.0, due - time.monotonic()))
            with suppress(OSError):
                if data:
                    sink.sendall(data)
                    continue
                sink.shutdown(socket.SHUT_WR)
            return

    for job in (read, write):
        threading.Thread(target=job, daemon=True).start()


def median_ms(seconds: Sequence[float]) -> float:
    """In milliseconds."""
    return statistics.median(seconds) * 1000
