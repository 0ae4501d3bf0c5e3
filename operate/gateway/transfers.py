"""Files on their way through HTTP, whichever protocol asks: the form that brings one, and the bytes that go out."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Mapping
from urllib.parse import quote

from aiohttp import BodyPartReader, web
from aiohttp.http import HttpProcessingError

from operate.gateway.files import Files, Stored

CHUNK_S = 60.0
"""A file's next bytes that take longer are given up."""
CHUNK_BYTES = 256 * 1024
MOST_FIELD_BYTES = 16 * 1024

BROKEN_FORM = (ValueError, AssertionError, HttpProcessingError)
"""What aiohttp raises of a form that is none."""

ACTIVE = re.compile(
    r"text/(html.*|javascript|css|xml)|application/(x?html.*|(x-)?javascript|ecmascript|xml|wasm)|message/rfc822|.*\+xml"
)
"""Kinds of files that a browser would run or obey: they are only ever saved."""


# --- What comes ------------------------------------------------------------------------------------------


async def chunks_of(part: BodyPartReader) -> AsyncIterator[bytes]:
    """The bytes of a form's file as they come."""
    while True:
        async with asyncio.timeout(CHUNK_S):
            chunk = await part.read_chunk(CHUNK_BYTES)
        if not chunk:
            return
        yield chunk


class LongFieldError(Exception):
    """A form's field has more than MOST_FIELD_BYTES: `size` have come."""

    def __init__(self, size: int) -> None:
        super().__init__(f"{size} bytes of a field that may have {MOST_FIELD_BYTES}")
        self.size = size


async def text_of(part: BodyPartReader) -> str:
    """A form's field. Raises LongFieldError."""
    text = bytearray()
    async with asyncio.timeout(CHUNK_S):
        while chunk := await part.read_chunk():
            text += chunk
            if len(text) > MOST_FIELD_BYTES:
                raise LongFieldError(len(text))
    return text.decode("utf-8", "replace")


# --- What goes -------------------------------------------------------------------------------------------


def conditions(request: web.Request) -> dict[str, str]:
    """What of a request S3 itself understands: the range, and the conditions."""
    asked: dict[str, str] = {}
    headers = request.headers
    if headers.get("Range", "").startswith("bytes=") and "," not in headers["Range"]:
        asked["Range"] = headers["Range"]
        if headers.get("If-Range", "").startswith('"'):
            asked["IfMatch"] = headers["If-Range"]
        elif "If-Range" in headers:  # a date is not compared: the whole is always right
            del asked["Range"]
    if "If-None-Match" in headers:
        asked["IfNoneMatch"] = headers["If-None-Match"]
    return asked


async def send(request: web.Request, files: Files, stored: Stored, headers: Mapping[str, str]) -> web.StreamResponse:
    """Answer with an open object as it comes; `headers` are said besides its own."""
    response = web.StreamResponse(status=stored.status, headers={**stored.headers, **headers})
    await response.prepare(request)
    if stored.body is not None and request.method != "HEAD":
        async for chunk in files.chunks(stored.body):
            async with asyncio.timeout(CHUNK_S):
                await response.write(chunk)
        await response.write_eof()
    return response


def quoted(name: str) -> str:
    """A name inside the quotes of a header."""
    text = name.replace("\\", "\\\\").replace('"', '\\"')
    return text if text.isascii() else quote(text)
