"""/fleet: how the fleet stands, for people, in English and Chinese; and the line about it that the editor shows.

Everything is in the page: no script, nothing from elsewhere. fleet_page.html holds its markup.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from datetime import UTC, datetime
from functools import cache
from html import escape
from pathlib import Path
from string import Template
from typing import Any
from urllib.parse import urlencode

from aiohttp import web

from operate.gateway.comfy_files import has_pillow
from operate.gateway.files import place_of_key
from operate.gateway.fleet_news import FleetNews, Instance, News
from operate.gateway.guard import Handler
from operate.gateway.jobs import Jobs
from operate.gateway.words import language_of, words_of
from operate.words import moment

MOST_JOBS = 12
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif")
LANGUAGES = {"en": "English", "zh": "中文"}

Remark = Callable[[], Awaitable[str | None]]


class FleetPage:
    """The page and the line."""

    def __init__(self, env: str, jobs: Jobs, news: FleetNews, remark: Remark) -> None:
        """`remark` says what there is to be said of the editor."""
        self._env, self._jobs, self._news, self._remark = env, jobs, news, remark

    def routes(self) -> list[tuple[str, str, Handler]]:
        """Method, path and handler of each."""
        return [("GET", "/fleet", self.page), ("GET", "/fleet/line", self.line)]

    async def page(self, request: web.Request) -> web.Response:
        """How it stands, all of it."""
        language = language_of(request)
        await self._jobs.refresh()
        news, cards = await self._news.read(), await self._cards(language)
        text = draw(self._env, news, language, cards, await self._remark())
        headers = {"Cache-Control": "no-store", "Content-Security-Policy": "default-src 'none'; img-src 'self'; style-src 'unsafe-inline'"}  # fmt: skip
        return web.Response(text=text, content_type="text/html", headers=headers)

    async def line(self, request: web.Request) -> web.Response:
        """What whoever waits should know, in one line; nothing where a job runs already."""
        said = line_of(await self._news.read(), words_of(language_of(request)))
        return web.json_response({"line": said}, headers={"Cache-Control": "no-store"})

    async def _cards(self, language: str) -> list[Html]:
        """The jobs that ended last, the latest first, with a picture of each that has one."""
        words, cards = words_of(language), []
        for entry in list(self._jobs.index.ended.values())[: -MOST_JOBS - 1 : -1]:
            result = (await self._jobs.look(entry.job_id)).result
            if result is None:
                continue
            seconds = result["timings"].get("run_s")
            picture = picture_of(result["outputs"])
            cards.append(
                fill(
                    "card",
                    id=entry.job_id,
                    how=words.get(entry.how, entry.how),
                    kind=entry.how,
                    when=moment_of(moment(result["timings"]["finished_at"])),
                    took=f"{seconds:.1f} s" if isinstance(seconds, int | float) else "",
                    error=(result.get("error") or {}).get("message", "")[:300],
                    picture=fill("picture", source=picture, job=entry.job_id) if picture else "",
                )
            )
        return cards


def picture_of(outputs: Iterable[dict[str, Any]]) -> str | None:
    """The address of a job's first picture, made smaller where that can be."""
    for output in outputs:
        place = place_of_key(output["s3_key"])
        if place and place["type"] == "output" and place["filename"].lower().endswith(PICTURES):
            small = {"preview": "webp;60"} if has_pillow() else {}
            return f"/view?{urlencode(place | small)}"
    return None


# --- What is said ----------------------------------------------------------------------------------------


def line_of(news: News, words: dict[str, str]) -> str:
    """Why a job waits, and for how long it usually does; "" where nothing waits or one is at work."""
    if not news.waiting or any(each.state == "busy" for each in news.instances):
        return ""
    if coming := [each for each in news.instances if each.state in ("starting", "booting", "loading")]:
        first = max(coming, key=lambda each: each.age_s or 0)
        said = words["coming"].format(phase=words[first.state])
        if first.age_s is not None:
            said += words["so far"].format(time=duration_of(first.age_s, words))
        return said + (words["usually"].format(time=duration_of(news.boot_s, words)) if news.boot_s else words["."])
    if news.problem:
        return news.problem
    if any(each.state == "idle" for each in news.instances):
        return words["taken soon"]
    return words["asked"] + (
        words["usually"].format(time=duration_of(news.boot_s, words)) if news.boot_s else words["."]
    )


def draw(env: str, news: News, language: str, cards: list[Html], remark: str | None) -> str:
    """The page."""
    words = words_of(language)
    unknown = words["unknown"]
    cost = f"${news.usd_today:,.2f}" if news.usd_today is not None else unknown
    hours = f"{news.hours_today:.1f} h" if news.hours_today is not None else ""
    counts = Counter(words[each.state] for each in news.instances)
    notes = [line_of(news, words), news.problem or "", remark or "", *map(words["not seen"].format, news.not_seen)]
    figures = [
        (words["waiting"], unknown if news.waiting is None else news.waiting, ""),
        (words["running"], unknown if news.running is None else news.running, ""),
        (words["instances"], len(news.instances), ", ".join(f"{number} {state}" for state, number in counts.items())),
        (words["wanted"], unknown if news.wanted is None else news.wanted, ""),
        (words["boot"], duration_of(news.boot_s, words) if news.boot_s else unknown, words["boot of"]),
        (words["today"], cost, hours),
    ]
    others = [fill("language", code=code, name=name) for code, name in LANGUAGES.items() if code != language]
    return fill(
        "page",
        language=language,
        title=words["title"].format(env=env),
        at=moment_of(news.at),
        languages=join(others),
        editor=words["editor"],
        notes=join(fill("note", text=note) for note in dict.fromkeys(notes) if note),
        figures=join(fill("figure", name=name, value=value, more=more) for name, value, more in figures),
        rows=join(row_of(each, words) for each in news.instances) or fill("nothing", text=words["no instances"]),
        their=words["instances"],
        jobs=words["jobs"],
        cards=join(cards) or fill("nothing", text=words["no jobs"]),
    )


def row_of(instance: Instance, words: dict[str, str]) -> Html:
    """One instance."""
    doing = [
        f"{job.get('node_title') or job.get('job_id', '')}"
        + (f" {job['value']}/{job['max']}" if job.get("max") else "")
        for job in instance.jobs
    ]
    age = duration_of(instance.age_s, words) if instance.age_s is not None else ""
    return fill("row", id=instance.instance_id, type=instance.type, state=words[instance.state], kind=instance.state, age=age, doing=", ".join(doing))  # fmt: skip


def duration_of(seconds: float, words: dict[str, str]) -> str:
    """`45 s`, `3 min 20 s`, `2 h 5 min`, in words of the language."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} {words['s']}"
    if whole < 3600:
        return f"{whole // 60} {words['min']} {whole % 60} {words['s']}"
    return f"{whole // 3600} {words['h']} {whole % 3600 // 60} {words['min']}"


def moment_of(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S} UTC"


# --- Markup ----------------------------------------------------------------------------------------------


class Html(str):
    """Markup, and not a text that is to be shown."""

    __slots__ = ()


def fill(template: str, /, **slots: object) -> Html:
    """The template of that name, filled in; what is no Html is text and escaped."""
    safe = {name: value if isinstance(value, Html) else escape(str(value)) for name, value in slots.items()}
    return Html(templates()[template].substitute(safe))


def join(parts: Iterable[Html]) -> Html:
    return Html("\n".join(parts))


@cache
def templates() -> dict[str, Template]:
    """The page, and the <template> elements at its end by their ids."""
    source = Path(__file__).with_name("fleet_page.html").read_text(encoding="utf-8")
    pieces = dict(re.findall(r'<template id="(\w+)">(.*?)</template>', source, re.DOTALL))
    page = re.sub(r"<template\b.*?</template>\n", "", source, flags=re.DOTALL)
    return {name: Template(text) for name, text in {**pieces, "page": page}.items()}
