"""Who may call, how much may come, and in which form a refusal goes back."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import SplitResult, urlsplit

from aiohttp import web

from comfy_utils import error_code
from operate.gateway.editor_login import at_the_door, has_cookie
from operate.gateway.files import NoSuchPlaceError
from operate.words import refusal
from send_job import will_pass

logger = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

HELD_BYTES = 64 * 1024 * 1024
"""So much of requests is in memory at once."""
BODY_S = 60.0
"""A body that takes longer to come is given up."""
CHUNK_BYTES = 64 * 1024


def plain_error(status: int, kind: str, message: str, headers: dict[str, str] | None = None) -> web.Response:
    """A refusal in the shape of ComfyUI's errors."""
    error = {"type": kind, "message": message, "details": "", "extra_info": {}}
    return web.json_response({"error": error, "node_errors": {}}, status=status, headers=headers)


class Bodies:
    """Reads what small calls bring, never more at once than HELD_BYTES."""

    def __init__(self) -> None:
        self._held = 0

    @asynccontextmanager
    async def read(self, request: web.Request, most_bytes: int) -> AsyncIterator[bytes]:
        """A body of at most `most_bytes`, held as long as the block lasts. Raises what aiohttp answers with."""
        length = request.content_length
        if length is not None and length > most_bytes:
            raise web.HTTPRequestEntityTooLarge(most_bytes, length)
        reserved = most_bytes if length is None else length
        if self._held + reserved > HELD_BYTES:
            raise web.HTTPServiceUnavailable(text="too much comes at once: try again", headers={"Retry-After": "1"})
        self._held += reserved
        try:
            body = bytearray()
            async with asyncio.timeout(BODY_S):
                async for chunk in request.content.iter_chunked(CHUNK_BYTES):
                    body += chunk
                    if len(body) > most_bytes:
                        raise web.HTTPRequestEntityTooLarge(most_bytes, len(body))
            yield bytes(body)
        except TimeoutError:
            raise web.HTTPRequestTimeout(text="the body did not come in time") from None
        finally:
            self._held -= reserved


OPEN_TO_ALL = ("/api/v2/health",)
"""What a load balancer asks, which has no token."""


def make_guard(token: str | None) -> Any:
    """The middleware that lets calls in and puts what goes wrong into an answer."""

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        if is_foreign(request):
            return web.Response(status=403)
        may_come = (
            token is None or request.path in OPEN_TO_ALL or has_token(request, token) or has_cookie(request, token)
        )
        if token is not None and (at_door := await at_the_door(request, token, is_known=may_come)) is not None:
            return at_door
        if not may_come:
            return plain_error(
                401,
                "unauthorized",
                "give the token as 'Authorization: Bearer …' or as ?token=…",
                {"WWW-Authenticate": "Bearer"},
            )
        if request.method == "OPTIONS":
            return web.Response()
        try:
            return await handler(request)
        except (web.HTTPException, asyncio.CancelledError, ConnectionError):
            raise
        except NoSuchPlaceError as error:
            return web.Response(status=400, text=str(error))
        except Exception as error:
            return answer_to(error)

    return guard


def is_foreign(request: web.Request) -> bool:
    """Whether a page of another site calls, by the rule of ComfyUI's own server: a browser says so, or calls a server
    on this machine from an origin that is another."""
    if request.headers.get("Sec-Fetch-Site") == "cross-site":
        return True
    if "Host" not in request.headers or "Origin" not in request.headers:
        return False
    host = _split(f"//{request.headers['Host'].lower()}")
    origin = _split(request.headers["Origin"].lower())
    if host is None or origin is None:
        return True
    if not is_loopback(host.hostname) or not host.hostname or not origin.hostname:
        return False
    if host.port is None or origin.port is None:  # where one leaves the port out it is not compared
        return host.hostname != origin.hostname
    return host.netloc != origin.netloc


def _split(address: str) -> SplitResult | None:
    """An address in its parts, None for one that is none."""
    try:
        parts = urlsplit(address)
        _ = parts.port
    except ValueError:
        return None
    return parts


def is_loopback(host: str | None) -> bool:
    """Whether a name or an address means this machine."""
    if host is None:
        return False
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def has_token(request: web.Request, token: str) -> bool:
    """Whether a call brings the token: in a header, or in its address where a browser can set no header."""
    kind, _, given = request.headers.get("Authorization", "").partition(" ")
    if kind.lower() != "bearer":
        given = request.headers.get("X-API-Key") or request.query.get("token", "")
    return hmac.compare_digest(given.strip().encode("utf-8", "surrogateescape"), token.encode())


def answer_to(error: Exception) -> web.Response:
    """What a client is told where a call failed: whether it is worth another try, and nothing of the inside."""
    from botocore.exceptions import BotoCoreError, ClientError

    if isinstance(error, BotoCoreError | ClientError):
        code = error_code(error)
        logger.warning("AWS: %s", refusal(error, "s3"))
        if will_pass(error):
            return plain_error(503, "aws_unavailable", f"AWS does not answer just now ({code or type(error).__name__})", {"Retry-After": "2"})  # fmt: skip
        return plain_error(
            502, "aws_refused", f"AWS refuses it ({code or type(error).__name__}): see the log of serve"
        )
    logger.error("a call failed", exc_info=error)
    return plain_error(500, "internal_error", "this call failed: see the log of serve")
