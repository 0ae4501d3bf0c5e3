"""The one guarded way to fetch from an address that came with a message, or to post to it."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import json
import re
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from comfy_utils import InvalidWorkflowError
from worker.errors import PutBackError


@contextmanager
def open_url(what: str, url: str) -> Iterator[Iterable[bytes]]:
    """Open an http(s) address that came with a message, for reading as it comes.

    Raises InvalidWorkflowError where another try would fail as well, PutBackError where it may help. No error repeats
    the address, which may be signed.
    """
    import requests

    try:
        refuse_link_local(url)
        with guarded_session() as session:
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


def guarded_session() -> Any:
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
            return refuse_connection(super()._new_conn())

    class GuardedHttps(HTTPSConnection):
        def _new_conn(self) -> socket.socket:
            return refuse_connection(super()._new_conn())

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
    try:
        refuse_link_local(url)
        with guarded_session() as session:
            answer = session.post(
                url, data=body, headers=headers, timeout=(3, 10), allow_redirects=False, stream=True
            )
    except (requests.RequestException, OSError, ValueError) as error:
        return str(error)
    return "" if 200 <= answer.status_code < 300 else f"it was answered with HTTP {answer.status_code}"


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
