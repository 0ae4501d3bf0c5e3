"""The one guarded way to fetch from an address that came with a message, or to post to it."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import json
import re
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

from comfy_utils import InvalidWorkflowError
from worker.errors import PutBackError
from worker.retry import within

POST_LIMIT_S = 30.0
"""So long one try of a callback may take in all: finding the name, connecting, sending, and the answer's headers."""


class Connections:
    """The connections to addresses that came with a message, until the with-block ends: then they are cut.

    A timeout holds for each read only, so that a server which sends a byte now and then keeps its reader for ever.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._twins: list[socket.socket] | None = []  # None: cut

    def __enter__(self) -> Connections:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            twins, self._twins = self._twins or [], None
        for twin in twins:
            with suppress(OSError):  # mostly it has ended by itself
                twin.shutdown(socket.SHUT_RDWR)
            twin.close()

    def take(self, connection: socket.socket) -> socket.socket:
        """Return a connection, unless it has led to where instance metadata lives, or comes too late."""
        refuse_connection(connection)
        with self._lock:
            if self._twins is not None:
                self._twins.append(connection.dup())  # TLS takes the socket itself away
                return connection
        connection.close()
        raise ConnectionAbortedError("it is too late to connect")


@contextmanager
def open_url(what: str, url: str, connections: Connections) -> Iterator[Iterable[bytes]]:
    """Open an http(s) address that came with a message, for reading as it comes.

    Raises InvalidWorkflowError where another try would fail as well, PutBackError where it may help. No error repeats
    the address, which may be signed.
    """
    import requests

    try:
        refuse_link_local(url)
        with guarded_session(connections) as session:
            answer = session.get(url, timeout=(5, 30), allow_redirects=False, stream=True)
            if answer.status_code in (408, 425, 429) or answer.status_code >= 500:
                raise PutBackError(f"{what} does not come: it was answered with HTTP {answer.status_code}")
            if answer.status_code != 200:
                redirect = ", and redirects are not followed" if answer.is_redirect else ""
                raise InvalidWorkflowError(f"{what} was answered with HTTP {answer.status_code}{redirect}")
            yield answer.iter_content(1 << 16)
    except (
        requests.ConnectionError,
        requests.Timeout,
        requests.exceptions.ChunkedEncodingError,
        socket.gaierror,
    ) as error:
        raise PutBackError(f"{what} does not come: {type(error).__name__} at {urlsplit(url).hostname}") from None
    except LinkLocalError as error:
        raise InvalidWorkflowError(f"{what} is refused: {error}") from None
    except (requests.RequestException, ValueError):
        raise InvalidWorkflowError(f"{what} has an address that cannot be read from") from None


def guarded_session(connections: Connections) -> Any:
    """A requests session for addresses that came with a message.

    It looks where each connection has led before anything is sent over it, because a name may resolve to something
    else by then than it did when it was checked. Behind a proxy, which looks names up by itself, it sees the proxy.
    """
    import requests
    from requests.adapters import HTTPAdapter
    from urllib3 import HTTPConnectionPool, HTTPSConnectionPool
    from urllib3.connection import HTTPConnection, HTTPSConnection

    class GuardedHttp(HTTPConnection):
        def _new_conn(self) -> socket.socket:
            return connections.take(super()._new_conn())

    class GuardedHttps(HTTPSConnection):
        def _new_conn(self) -> socket.socket:
            return connections.take(super()._new_conn())

    class HttpPool(HTTPConnectionPool):
        ConnectionCls = GuardedHttp

    class HttpsPool(HTTPSConnectionPool):
        ConnectionCls = GuardedHttps

    adapter = HTTPAdapter()
    adapter.poolmanager.pool_classes_by_scheme = {"http": HttpPool, "https": HttpsPool}
    session = requests.Session()
    session.mount("http://", adapter)
    session.mount("https://", adapter)
    return session


def post_result(url: str, result: Mapping[str, Any], secret: str) -> str:
    """POST a result, signed; returns why it was not accepted, "" when it was."""
    import requests

    body = json.dumps(result).encode()
    timestamp = str(int(time.time()))
    digest = hmac.new(secret.encode(), f"{timestamp}.".encode() + body, hashlib.sha256)
    headers = {
        "Content-Type": "application/json",
        "X-Comfy-Timestamp": timestamp,
        "X-Comfy-Signature": f"sha256={digest.hexdigest()}",
    }
    answered: list[int] = []

    def post() -> None:
        refuse_link_local(url)
        with guarded_session(connections) as session:
            answer = session.post(
                url, data=body, headers=headers, timeout=(3, 10), allow_redirects=False, stream=True
            )
            answered.append(answer.status_code)

    try:
        with Connections() as connections:
            within("it was not answered", POST_LIMIT_S, post, lambda: False)
    except (requests.RequestException, OSError, ValueError, PutBackError) as error:
        return str(error)
    return "" if 200 <= answered[0] < 300 else f"it was answered with HTTP {answered[0]}"


class LinkLocalError(ValueError):
    """An address from a message leads to where instance metadata lives."""


def refuse_link_local(url: str) -> None:
    """Raise LinkLocalError for an address where instance metadata lives, ValueError for one that is not http(s)."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{url!r:.100} is no http(s) address")
    for *_, address in socket.getaddrinfo(parts.hostname, parts.port or 80, proto=socket.IPPROTO_TCP):
        if is_link_local(str(address[0])):
            raise LinkLocalError(f"{parts.hostname} is a link-local address: nothing from a message leads there")


def refuse_connection(connection: socket.socket) -> socket.socket:
    """Return a connection, unless it has led to where instance metadata lives."""
    address = str(connection.getpeername()[0])
    if is_link_local(address):
        connection.close()
        raise LinkLocalError(f"{address} is a link-local address: nothing from a message leads there")
    return connection


def is_link_local(address: str) -> bool:
    """Whether instance metadata may live at this IP address."""
    ip = ipaddress.ip_address(re.sub(r"%.*", "", address))
    mapped = getattr(ip, "ipv4_mapped", None) or ip
    return mapped.is_link_local or mapped == ipaddress.ip_address("fd00:ec2::254")
