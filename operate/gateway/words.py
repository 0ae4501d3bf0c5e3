"""In which language a page of serve speaks: English, or Chinese."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

from aiohttp import web

WORDS = Path(__file__).with_name("words.json")
LANGUAGES = ("en", "zh")


def language_of(request: web.Request) -> str:
    """The one that ?lang= names, or else the one of ours that the browser likes best."""
    asked = request.query.get("lang", "").lower().partition("-")[0]
    if asked in LANGUAGES:
        return asked
    best, found = 0.0, "en"
    for part in request.headers.get("Accept-Language", "")[:500].split(","):
        match = re.fullmatch(r"\s*([a-zA-Z]{1,8})(?:-[\w-]+)?\s*(?:;\s*q=([01](?:\.\d{0,3})?))?\s*", part)
        if match and match[1].lower() in LANGUAGES and float(match[2] or 1) > best:
            best, found = float(match[2] or 1), match[1].lower()
    return found


@cache
def words_of(language: str) -> dict[str, str]:
    """All that the pages say, in a language."""
    words: dict[str, str] = json.loads(WORDS.read_text(encoding="utf-8"))[language]
    return words
