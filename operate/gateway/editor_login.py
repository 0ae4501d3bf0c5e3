"""How a browser brings the token: once, for a cookie that says that it has done so."""

from __future__ import annotations

import hmac
from html import escape
from pathlib import Path
from string import Template
from urllib.parse import urlsplit

from aiohttp import web

from operate.gateway.words import language_of, words_of

COOKIE = "fleet-door"
AT_DOOR = ("/", "/fleet", "/login")
"""The pages at which a browser may bring the token."""
DAYS = 30
MOST_FORM_BYTES = 4096


def cookie_of(token: str) -> str:
    """What the cookie of one who has the token holds: the token itself is not in it. A new token ends it."""
    return hmac.new(token.encode(), b"fleet.py serve: a browser has brought the token", "sha256").hexdigest()


def has_cookie(request: web.Request, token: str) -> bool:
    """Whether a browser comes with the cookie, and from our own page: another one might make it call."""
    given = request.cookies.get(COOKIE, "")
    return hmac.compare_digest(given.encode("utf-8", "surrogateescape"), cookie_of(token).encode()) and is_own(
        request
    )


def is_own(request: web.Request) -> bool:
    """Whether a call comes from a page of this address, as far as a browser tells."""
    if request.headers.get("Sec-Fetch-Site", "same-origin") not in ("same-origin", "none"):
        return False
    origin = request.headers.get("Origin")
    return origin is None or urlsplit(origin).netloc.lower() == request.headers.get("Host", "").lower()


async def at_the_door(request: web.Request, token: str, *, is_known: bool) -> web.Response | None:
    """The answer to a browser that brings the token or has yet to: the form, or what comes of it; None for all else.

    Who brings it is sent on, so that it does not stay in the address. `is_known` is who may come in already.
    """
    path = request.path
    if path not in AT_DOOR or "text/html" not in request.headers.get("Accept", ""):
        return None
    if request.method == "POST" and path == "/login":
        return await _take(request, token)
    if request.method != "GET":
        return None
    to = "/" if path == "/login" else path
    if _is_token(request.query.get("token", ""), token):
        return _let_in(request, token, to)
    return None if is_known else _form(request, is_wrong="token" in request.query)


async def _take(request: web.Request, token: str) -> web.Response:
    if not is_own(request) or (request.content_length or 0) > MOST_FORM_BYTES or request.content_length is None:
        return web.Response(status=403)
    given = (await request.post()).get("token", "")
    if isinstance(given, str) and _is_token(given.strip(), token):
        return _let_in(request, token, "/")
    return _form(request, is_wrong=True)


def _is_token(given: str, token: str) -> bool:
    return hmac.compare_digest(given.encode("utf-8", "surrogateescape"), token.encode())


def _let_in(request: web.Request, token: str, to: str) -> web.Response:
    response = web.Response(status=303, headers={"Location": to, "Cache-Control": "no-store"})
    is_https = request.scheme == "https" or request.headers.get("X-Forwarded-Proto") == "https"
    response.set_cookie(
        COOKIE, cookie_of(token), max_age=DAYS * 86_400, httponly=True, samesite="Strict", secure=is_https, path="/"
    )
    return response


def _form(request: web.Request, *, is_wrong: bool) -> web.Response:
    language = language_of(request)
    words = {
        name.removeprefix("login "): word for name, word in words_of(language).items() if name.startswith("login ")
    }
    page = Template(Path(__file__).with_name("editor_login.html").read_text(encoding="utf-8"))
    said = words["wrong"] if is_wrong else ""
    text = page.substitute(
        {name: escape(word) for name, word in words.items()} | {"said": escape(said), "lang": language}
    )
    headers = {"Cache-Control": "no-store", "Referrer-Policy": "no-referrer", "WWW-Authenticate": "Bearer"}
    return web.Response(status=401, text=text, content_type="text/html", headers=headers)
