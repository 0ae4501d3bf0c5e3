"""The door of the Comfy API v2: whatever is refused there is said in the contract's own shape."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

from comfy_utils import InvalidWorkflowError, is_text, load_json
from operate.gateway.api_shapes import PREFIX, Envelope
from operate.gateway.claims import Claims
from operate.gateway.guard import Bodies, Handler

BUSY = "the fleet takes no more just now: try again"
FAILED = "the fleet cannot do this just now: try again"
CODES = {
    400: (422, "invalid_request"),
    401: (401, "unauthorized"),
    403: (403, "forbidden"),
    404: (404, "not_found"),
    405: (405, "method_not_allowed"),
    408: (422, "timeout"),
    413: (422, "too_large"),
}
"""The contract's status and code for those that the rooms behind the door have."""


@web.middleware
async def speak_the_contract(request: web.Request, handler: Handler) -> web.StreamResponse:
    """The middleware before all others: a refusal below /api/v2 becomes an envelope."""
    if not is_api(request.path):
        return await handler(request)
    try:
        answer = await handler(request)
    except web.HTTPException as error:
        return envelope_of(error)
    if isinstance(answer, web.Response) and answer.status >= 400 and not isinstance(answer, Envelope):
        return envelope_of(answer)
    return answer


def is_api(path: str) -> bool:
    return path == PREFIX or path.startswith(f"{PREFIX}/")


def envelope_of(answer: web.Response) -> web.Response:
    """An answer of the other rooms in the contract's shape. Of what went wrong inside, nothing is told."""
    if answer.status < 400:
        return answer
    headers = {
        name: answer.headers[name] for name in ("Retry-After", "Allow", "WWW-Authenticate") if name in answer.headers
    }
    if answer.status >= 500:
        if answer.status == 503 and "Retry-After" in headers and not headers.keys() & {"Allow"}:
            return Envelope(500, "upstream_error", BUSY, headers=headers)
        return Envelope(500, "upstream_error", FAILED, headers=headers)
    status, code = CODES.get(answer.status, (answer.status, "invalid_request"))
    if status == 416:
        return answer
    return Envelope(status, code, words_of(answer), headers=headers)


def words_of(answer: web.Response) -> str:
    """The sentence of another room's refusal."""
    text = answer.text or ""
    try:
        said = json.loads(text)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        said = text if text and not text.startswith(("{", "<")) else answer.reason
    return str(said)


@asynccontextmanager
async def json_object(bodies: Bodies, request: web.Request, most_bytes: int) -> AsyncIterator[dict[str, Any] | None]:
    """The JSON object that a call brings, None for what is none."""
    async with bodies.read(request, most_bytes) as text:
        try:
            body = load_json("the body", text)
        except InvalidWorkflowError:
            body = None
        yield body if isinstance(body, dict) else None


# --- Idempotency-Key -------------------------------------------------------------------------------------

REUSED = (
    "this Idempotency-Key was used before. A key counts once: list your jobs to find what it has made, "
    "or send a new key"
)
MOST_KEY = 255


def key_of(request: web.Request) -> str | Envelope | None:
    """The key that a call brings, None where it brings none, or why it is no key."""
    key = request.headers.get("Idempotency-Key")
    if key is None or 0 < len(key) <= MOST_KEY:
        return key
    return Envelope(422, "invalid_request", f"an Idempotency-Key has 1 to {MOST_KEY} characters")


class Held:
    """A key that a call holds: kept where it may have made something, else given back."""

    def __init__(self) -> None:
        self.is_kept = False

    def keep(self) -> None:
        self.is_kept = True


@asynccontextmanager
async def held(claims: Claims, kind: str, key: str | None) -> AsyncIterator[Held | None]:
    """Hold a key while something is made; None where somebody has used it. Given back unless the block keeps it."""
    if key is None:
        yield Held()
        return
    if not await claims.take(kind, key):
        yield None
        return
    hold = Held()
    try:
        yield hold
    finally:
        if not hold.is_kept:
            await claims.let_go(kind, key)


# --- Labels ----------------------------------------------------------------------------------------------

MOST_LABELS = 16
MOST_NAME, MOST_VALUE = 128, 1024
FILTER = re.compile(r"metadata\[(.*)\]", re.DOTALL)


def wrong_labels(labels: Any) -> str | None:
    """What is wrong with the `metadata` of a job."""
    if not isinstance(labels, Mapping):
        return "metadata is a map of labels: an object of strings"
    if len(labels) > MOST_LABELS:
        return f"metadata has {len(labels)} labels: at most {MOST_LABELS} are kept"
    for name, value in labels.items():
        if not (name and len(name) <= MOST_NAME and is_label(name)):
            return f"the label {name!r:.80} has no name of 1 to {MOST_NAME} printable characters"
        if not (isinstance(value, str) and len(value) <= MOST_VALUE and is_label(value)):
            return f"the label {name!r:.80} has no text of at most {MOST_VALUE} printable characters as its value"
    return None


def is_label(text: str) -> bool:
    return text.isprintable() and is_text(text)


def filters_of(request: web.Request) -> dict[str, str] | None:
    """The labels that listed jobs must have, by `metadata[name]=value`; None where one cannot be read."""
    wanted: dict[str, str] = {}
    for name, value in request.query.items():
        match = FILTER.fullmatch(name)
        if match is None:
            if name.startswith("metadata"):
                return None
            continue
        if wanted.get(match[1], value) != value:
            return None
        wanted[match[1]] = value
    return None if wrong_labels(wanted) else wanted
