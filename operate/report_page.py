"""Draws a page of jobs that have ended: timeline, costs, images. Pure; report.html holds all its markup."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from html import escape
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

from comfy_utils import count
from operate.words import duration, moment

BILLED_AT_LEAST_S = 60
AFTERWARDS_S = 600
"""So long after the last job the page shows instances that idle and leave."""

Receipt = Mapping[str, Any]
"""What stands in a job's result.json."""


class Picture(NamedTuple):
    """An image of a job: its address (a data: URI, or relative to the page) and what its file says of its making."""

    source: str
    name: str
    prompt: str = ""
    seed: str = ""


class Life(NamedTuple):
    """What is known of an instance, in seconds since 1970, and its USD per hour."""

    launched: float | None = None
    ready: float | None = None
    ended: float | None = None
    type: str = ""
    price: float | None = None


def draw_report(
    title: str,
    results: Iterable[Receipt],
    pictures: Mapping[str, Sequence[Picture]],
    lives: Mapping[str, Life],
    note: str = "",
) -> str:
    """One HTML page, with nothing from elsewhere, of jobs that have ended.

    `pictures` by job id and `lives` by instance id, as far as they are known; `note` is for its end.
    """
    ended = sorted(results, key=lambda result: (result["timings"]["sent_at"], result["timings"]["started_at"]))
    jobs = [Ran.of(number, result) for number, result in enumerate(ended, 1)]
    if not jobs:
        return fill("page", title=title, about="No jobs", figures="", ticks="", rows="", cards="", notes="")
    last = max(job.finished for job in jobs)
    ends = [life.ended for life in lives.values() if life.ended]
    begin, end = min(job.sent for job in jobs), min(max([last, *ends]), last + AFTERWARDS_S)
    span = Span(begin, max(end, begin + 1))
    lanes = sorted(lanes_of(jobs, lives, span), key=lambda lane: (lane.begin, lane.instance_id))
    when = datetime.fromtimestamp(begin, UTC)
    there = f"{count(len(jobs), 'job')} on {count(len(lanes), 'instance')}"
    cost = cost_of(lanes, span)
    return fill(
        "page",
        title=title,
        about=f"{when.day} {when:%B %Y, %H:%M} UTC, {there}",
        figures=draw_figures(jobs, lanes, cost, span),
        ticks=join(fill("tick", left=f"{span.at(begin + tick):.3f}", time=round_time(tick)) for tick in span.ticks()),
        rows=join([*draw_curves(jobs, lanes, span), *(draw_lane(lane, span) for lane in lanes)]),
        cards=join(draw_card(job, pictures.get(job.result["job_id"], ())) for job in jobs),
        notes=draw_notes(lanes, cost, note),
    )


# --- Who had what when -----------------------------------------------------------------------------------


class Ran(NamedTuple):
    """One job of a report: its number on the page, its times, its receipt."""

    number: int
    sent: float
    started: float
    finished: float
    result: Receipt

    @classmethod
    def of(cls, number: int, result: Receipt) -> Ran:
        """The job of a receipt. Instances' clocks differ a little: none starts before it was sent."""
        sent, started, finished = (
            moment(result["timings"][f"{name}_at"]) for name in ("sent", "started", "finished")
        )
        started = max(sent, started)
        return cls(number, sent, started, max(started, finished), result)

    @property
    def succeeded(self) -> bool:
        """Whether it did."""
        return bool(self.result["status"] == "succeeded")

    def times(self) -> str:
        """How long it waited and ran, in words."""
        return f"waited {duration(self.started - self.sent)}, ran {duration(self.finished - self.started)}"


class Lane(NamedTuple):
    """One instance of a report: what is known of it, its time on the page, where it was ready, its jobs."""

    instance_id: str
    life: Life
    begin: float
    ready: float
    end: float
    jobs: list[Ran]

    def busy(self) -> Iterator[tuple[float, float]]:
        """When it had a job, without overlaps: jobs may overlap a little where one is finished beside the next."""
        free = self.begin
        for job in self.jobs:
            if job.finished > free:
                yield max(job.started, free), job.finished
                free = job.finished


class Span(NamedTuple):
    """The stretch of time that a page shows."""

    begin: float
    end: float

    def at(self, seconds: float) -> float:
        """Where a moment is, in percent."""
        return 100 * (min(max(seconds, self.begin), self.end) - self.begin) / (self.end - self.begin)

    def ticks(self) -> Iterator[float]:
        """At most seven round numbers of seconds since the beginning."""
        long = self.end - self.begin
        steps = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 43200)
        step = next((step for step in steps if step * 6.5 >= long), math.ceil(long / 6 / 86400) * 86400)
        return (float(step * number) for number in range(int(long / step) + 1))


def lanes_of(jobs: Sequence[Ran], lives: Mapping[str, Life], span: Span) -> Iterator[Lane]:
    """Each instance's lane. Of one that nothing is known of: from its first job to its last."""
    for instance_id in dict.fromkeys([*(job.result["instance_id"] for job in jobs), *lives]):
        own = sorted((job for job in jobs if job.result["instance_id"] == instance_id), key=lambda job: job.started)
        life = lives.get(instance_id, Life())
        first, last = (own[0].started, max(job.finished for job in own)) if own else (span.end, span.begin)
        begin = max(span.begin, min(first, life.launched or first))
        end = min(span.end, max(last, life.ended or (span.end if life.launched else last)))
        if begin < end or own:
            yield Lane(instance_id, life, begin, min(max(life.ready or begin, begin), first, end), end, own)


def cost_of(lanes: Sequence[Lane], span: Span) -> float | None:
    """The USD for the instances' time on the page; None where the price of one is not known."""
    cost = 0.0
    for lane in lanes:
        if lane.life.price is None:
            return None
        from_launch = lane.life.launched is not None and lane.life.launched >= span.begin
        billed_s = max(lane.end - lane.begin, BILLED_AT_LEAST_S if from_launch else 0)
        cost += billed_s * lane.life.price / 3600
    return cost


# --- What is drawn ---------------------------------------------------------------------------------------


def draw_figures(jobs: Sequence[Ran], lanes: Sequence[Lane], cost: float | None, span: Span) -> Html:
    """The numbers at the top of the page."""
    waits = [job.started - job.sent for job in jobs]
    runs = [job.finished - job.started for job in jobs]
    ends = [job.finished - span.begin for job in jobs]
    failed = sum(not job.succeeded for job in jobs)
    alive_s = sum(lane.end - lane.begin for lane in lanes)
    busy_s = sum(end - begin for lane in lanes for begin, end in lane.busy())
    kinds = dict.fromkeys((lane.life.type, lane.life.price) for lane in lanes)
    rates = ", ".join(f"{kind} ${price:g}/h".strip() for kind, price in kinds if price is not None)
    figures = [
        ("jobs succeeded", fill("share", part=len(jobs) - failed, whole=len(jobs)), f"{failed or 'none'} failed"),
        ("all done in", duration(max(ends)), f"first after {duration(min(ends))}"),
        ("wait, median", duration(percentile(waits, 0.5)), f"95 % at most {duration(percentile(waits, 0.95))}"),
        ("run, median", duration(percentile(runs, 0.5)), f"95 % at most {duration(percentile(runs, 0.95))}"),
        ("instance time busy", f"{100 * busy_s / alive_s if alive_s else 100:.0f} %", f"{duration(busy_s)} of {duration(alive_s)}"),
        ("cost", "price unknown" if cost is None else usd(cost), rates or types_of(lanes)),
    ]  # fmt: skip
    return join(fill("figure", what=what, value=value, more=more) for what, value, more in figures)


def draw_notes(lanes: Sequence[Lane], cost: float | None, note: str) -> Html:
    """The notes at the page's end."""
    notes = [
        "Busy: the share of the instances' time on this page in which they had one of its jobs.",
        "Cost: that time at the on-demand price; EC2 bills "
        f"{BILLED_AT_LEAST_S} seconds at least for each launch. Storage, requests and Spot discounts are left out.",
    ]
    if cost is None:
        notes.append(f"Price unknown ({types_of(lanes)}): give it with --price.")
    return join(fill("paragraph", text=text) for text in [*notes, note] if text)


def types_of(lanes: Sequence[Lane]) -> str:
    """`2 g5.2xlarge, 1 of unknown type`."""
    kinds = Counter((lane.life.type, lane.life.price) for lane in lanes)
    return ", ".join(f"{number} {kind or 'of unknown type'}" for (kind, _), number in kinds.items())


def draw_curves(jobs: Sequence[Ran], lanes: Sequence[Lane], span: Span) -> list[Html]:
    """How many jobs wait, and how many instances boot, work and idle."""
    waiting = [change for job in jobs for change in ((job.sent, 1), (job.started, -1))]
    busy = [change for lane in lanes for begin, end in lane.busy() for change in ((begin, 1), (end, -1))]
    boots = [change for lane in lanes for change in ((lane.begin, 1), (lane.ready, -1))]
    alive = [change for lane in lanes for change in ((lane.begin, 1), (lane.end, -1))]
    layers = {"idle": alive, "booting": [*busy, *boots], "busy": busy}
    depth, most = peak(waiting), peak(alive)
    return [
        fill("curve", name="Jobs waiting", peak=depth, about="How many jobs waited on the queue",
             areas=draw_area(waiting, depth, "waiting", span)),
        fill("curve", name="Instances", peak=most, about="How many instances were busy, booting and idle",
             areas=join(draw_area(changes, most, kind, span) for kind, changes in layers.items())),
    ]  # fmt: skip


def draw_area(changes: Iterable[tuple[float, int]], highest: int, kind: str, span: Span) -> Html:
    """What lies below a number that changes in steps, in a box of 100 by 100."""
    path, level = "M0,100", 0
    for when, change in sorted(changes):
        level += change
        path += f"H{span.at(when):.2f}V{100 - 100 * level / max(1, highest):.2f}"
    return fill("area", kind=kind, path=f"{path}H100V100Z")


def draw_lane(lane: Lane, span: Span) -> Html:
    """An instance's time: booting, idle, and its jobs."""
    bars = [fill("life", **placed(lane.begin, lane.end, span))]
    if lane.ready > lane.begin:
        place = placed(lane.begin, lane.ready, span)
        bars.append(fill("booting", **place, time=duration(lane.ready - lane.begin)))
    bars += [draw_bar(job, span) for job in lane.jobs]
    name = lane.instance_id
    jobs = count(len(lane.jobs), "job")
    return fill("lane", instance_id=name, head=name[:-5], tail=name[-5:], jobs=jobs, bars=join(bars))


def draw_bar(job: Ran, span: Span) -> Html:
    """A job on its instance's lane, which leads to its card."""
    kind, name = ("busy", f"job {job.number}") if job.succeeded else ("failed", f"job {job.number} failed")
    east = " east" if span.at(job.started) > 30 else ""
    place, job_id = placed(job.started, job.finished, span), job.result["job_id"]
    return fill("bar", **place, kind=kind + east, number=job.number, name=name, job_id=job_id, times=job.times())


def placed(begin: float, end: float, span: Span) -> dict[str, str]:
    """Where a stretch of time lies on a lane, in percent."""
    return {"left": f"{span.at(begin):.3f}", "width": f"{span.at(end) - span.at(begin):.3f}"}


def draw_card(job: Ran, pictures: Sequence[Picture]) -> Html:
    """A job in the gallery: its images and what they were made of, or what became of it instead."""
    result, parts = job.result, []
    for each in pictures:
        link = f"#job{job.number}" if each.source.startswith("data:") else each.source
        parts.append(fill("picture", link=link, source=each.source, words=each.prompt or each.name))
    if not job.succeeded:
        error = result["error"] or {}
        parts.append(fill("error", kind=error.get("kind"), message=error.get("message")))
    elif not pictures:
        names = ", ".join(str(output["filename"]) for output in result["outputs"])
        parts.append(fill("none", names=names or "no file"))
    prompt = "\n".join(dict.fromkeys(each.prompt for each in pictures if each.prompt))
    seeds = ", ".join(dict.fromkeys(each.seed for each in pictures if each.seed))
    return fill(
        "card", number=job.number, columns=min(len(parts), 2), pictures=join(parts), times=job.times(),
        prompt=fill("paragraph", text=prompt) if prompt else "", seed=fill("seed", seeds=seeds) if seeds else "",
        instance_id=result["instance_id"], job_id=result["job_id"],
    )  # fmt: skip


# --- Markup ----------------------------------------------------------------------------------------------


class Html(str):
    """Markup, and not a text that is to be shown."""

    __slots__ = ()


def fill(template: str, /, **slots: object) -> Html:
    """The template of that name in report.html, filled in; what is no Html is text and escaped."""
    safe = {slot: value if isinstance(value, Html) else plain(value) for slot, value in slots.items()}
    return Html(templates()[template].substitute(safe))


def join(parts: Iterable[Html]) -> Html:
    """Pieces of markup as one."""
    return Html("\n".join(parts))


@cache
def templates() -> dict[str, Template]:
    """The page, and by their ids the <template> elements at its end, whose line breaks are only for who reads them."""
    source = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    pieces = re.findall(r'<template id="(\w+)">(.*?)</template>', source, re.DOTALL)
    page = re.sub(r"<(template\b.*?</template|!--.*?--)>\n", "", source, flags=re.DOTALL)
    joined = {name: re.sub(r"\n\s*", "", piece) for name, piece in pieces}
    return {name: Template(text) for name, text in {**joined, "page": page}.items()}


def plain(value: object) -> str:
    """Anything as text in HTML: it may come from a prompt, a node or a message, so from anybody."""
    text = re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufffe\uffff]", "", str(value))
    return escape(text.encode("utf-8", "replace").decode())


# --- Numbers ---------------------------------------------------------------------------------------------


def round_time(seconds: float) -> str:
    """`75 s`, `2 min`, `1.5 h` for a round number of seconds."""
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= size and seconds * 2 % size == 0:
            return f"{seconds / size:g} {unit}"
    return f"{seconds:g} s"


def usd(amount: float) -> str:
    """`$1.21`, `$0.0404`."""
    return f"${amount:,.2f}" if amount >= 1 else f"${amount:.4f}"


def percentile(values: Iterable[float], share: float) -> float:
    """The value that this share of the values does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def peak(changes: Iterable[tuple[float, int]]) -> int:
    """The highest number that such changes lead to."""
    return max(itertools.accumulate((change for _, change in sorted(changes)), initial=0))
