#!/usr/bin/env python3
"""Scaling policies side by side, simulated on a virtual clock: what users wait and what the fleet costs.

Ours is the shipped code: `desired_capacity`, `long_jobs`, `may_leave` and `leaving_turn` are called, not copied.
Its peers are the rules of the AWS sample that this project rebuilds, AWS target tracking, and an oracle that
knows every job in advance. Same seeds, same numbers: a load is the same for all policies, and so is the boot
time of the first, second, ... launch.

Usage: tests/bench/bench_scaling.py [--seeds N] [--load NAME] [--svg FILE]
"""

from __future__ import annotations

import argparse
import bisect
import heapq
import math
import random
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from comfy_utils import QueueDepth, desired_capacity
from worker.group import POLL_S
from worker.scaling import LOOK_S, QueueHistory, leaving_turn, long_jobs, may_leave

MAX_INSTANCES = 20
BACKLOG, COOLDOWN_S = 3, 180.0  # BACKLOGSIZE_PER_INSTANCE and SCALE_COOLDOWN
BOOTS_S = (150.0, 300.0)
BOOT_SPREAD_S = 25.0
FIRST_JOB_S = 45.0
"""What the first job on an instance takes longer, because models are loaded."""
LAG_S = 30.0
"""SQS's counters show the queue as it was up to so long ago."""
HOOK_S = 300.0
"""A terminated instance that nobody asks to wait longer has so long to finish its job."""
DOLLARS_AN_HOUR = 1.212
TAIL_S = 1800.0
"""Hours are counted until so long after the last job: a fleet has to go back to its minimum, too."""
STUCK_AFTER_S = 6 * 3600.0


# --- Loads -----------------------------------------------------------------------------------------------


class Load(NamedTuple):
    """(when it is sent, how long it runs) of each job in seconds, and when the load ends."""

    jobs: list[tuple[float, float]]
    end_s: float


def image_s(rng: random.Random) -> float:
    """How long a usual job runs."""
    return rng.lognormvariate(math.log(30), 0.4)


def arrivals(rng: random.Random, end_s: float, rate: Callable[[float], float], highest: float) -> Iterator[float]:
    """Times of a Poisson process with a rate per second that changes."""
    now = rng.expovariate(highest)
    while now < end_s:
        if rng.random() < rate(now) / highest:
            yield now
        now += rng.expovariate(highest)


def burst(rng: random.Random) -> Load:
    """200 jobs at once."""
    return Load([(0.0, image_s(rng)) for _ in range(200)], 0.0)


def trickle(rng: random.Random) -> Load:
    """A job every ten minutes, for eight hours."""
    return Load([(600.0 * number, image_s(rng)) for number in range(48)], 8 * 3600.0)


def diurnal(rng: random.Random) -> Load:
    """A day: from 0.002 jobs a second at midnight to 0.2 at noon."""
    day = 86400.0
    times = arrivals(rng, day, lambda now: 0.101 - 0.099 * math.cos(2 * math.pi * now / day), 0.2)
    return Load([(now, image_s(rng)) for now in times], day)


def heavy_tail(rng: random.Random) -> Load:
    """Six hours of 0.02 jobs a second, most of them short and a few up to an hour long."""
    times = arrivals(rng, 6 * 3600.0, lambda _: 0.02, 0.02)
    return Load([(now, min(3600.0, 20 * rng.paretovariate(1.3))) for now in times], 6 * 3600.0)


def pulses(rng: random.Random) -> Load:
    """10 to 60 jobs at once every 45 minutes, for eight hours."""
    jobs = [(2700.0 * pulse, image_s(rng)) for pulse in range(11) for _ in range(rng.randint(10, 60))]
    return Load(jobs, 8 * 3600.0)


def all_long(rng: random.Random) -> Load:
    """Eight hours of nothing but jobs of some 20 minutes, 0.004 a second."""
    times = arrivals(rng, 8 * 3600.0, lambda _: 0.004, 0.004)
    return Load([(now, rng.lognormvariate(math.log(1200), 0.3)) for now in times], 8 * 3600.0)


LOADS = {
    "burst": burst,
    "trickle": trickle,
    "diurnal": diurnal,
    "heavy tail": heavy_tail,
    "pulses": pulses,
    "all long": all_long,
}


# --- The fleet -------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Instance:
    """One instance: booting, idle, busy, draining (it finishes its job) or ended."""

    number: int
    launched: float
    state: str = "booting"
    job: int | None = None
    began: float = 0.0
    is_warm: bool = False
    idle_since: float = 0.0
    memory: Any = None  # what its policy keeps with it

    @property
    def name(self) -> str:
        """As the shipped code sees it."""
        return f"i-{self.number:017x}"


@dataclass
class Outcome:
    """What one policy made of one load."""

    waits: list[float] = field(default_factory=list)
    instance_s: float = 0.0
    work_s: float = 0.0
    interrupted: int = 0
    twice: int = 0
    launches: int = 0
    reversals: int = 0
    stuck: int = 0

    def add(self, other: Outcome) -> None:
        """Take in what happened with another seed."""
        self.waits += other.waits
        for name in ("instance_s", "work_s", "interrupted", "twice", "launches", "reversals", "stuck"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    @property
    def ratio(self) -> float:
        """Instance hours over work hours."""
        return self.instance_s / self.work_s

    def wait(self, share: float) -> float:
        """The wait that this share of the jobs does not exceed, in seconds."""
        waits = sorted(self.waits)
        return waits[max(0, math.ceil(share * len(waits)) - 1)]


class Fleet:
    """A queue and a group on a virtual clock. What scales it is the policy."""

    def __init__(self, load: Load, policy: Policy, seed: str, boot_s: float) -> None:
        self.now = 0.0
        self.load, self.policy, self.seed, self.boot_s = load, policy, seed, boot_s
        self.rng = random.Random(f"{seed} fleet")
        self.desired = 0
        self.instances: list[Instance] = []  # those that have not ended
        self.idle: list[Instance] = []
        self.outcome = Outcome(work_s=sum(length for _, length in load.jobs))
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self._queue: deque[int] = deque()
        self._in_flight = 0
        self._waits: dict[int, float] = {}
        self._done: set[int] = set()
        self._seen_at, self._seen = [-math.inf], [QueueDepth(0, 0)]
        self._direction = 0

    def run(self) -> Outcome:
        """Play the load to its end."""
        sent: dict[float, list[int]] = {}
        for number, (when, _) in enumerate(self.load.jobs):
            sent.setdefault(when, []).append(number)
        for when, numbers in sent.items():
            self.at(when, partial(self._send, numbers))
        self.set_desired(self.policy.minimum)
        self.policy.start(self)
        end = self.load.end_s + STUCK_AFTER_S
        while self._events and self._events[0][0] <= end:
            self.now, _, event = heapq.heappop(self._events)
            event()
            if len(self._done) == len(self.load.jobs):
                end = min(end, max(self.now, self.load.end_s) + TAIL_S)
        self.outcome.instance_s += sum(end - instance.launched for instance in self.instances)
        self.outcome.waits = [self._waits.get(number, math.inf) for number in range(len(self.load.jobs))]
        self.outcome.stuck = len(self.load.jobs) - len(self._done)
        return self.outcome

    def at(self, when: float, event: Callable[[], None]) -> None:
        """Have something happen then."""
        self._count += 1
        heapq.heappush(self._events, (when, self._count, event))

    def depth(self, lag_s: float | None = None) -> QueueDepth:
        """What SQS's counters show."""
        lag_s = self.rng.uniform(0, LAG_S) if lag_s is None else lag_s
        return self._seen[bisect.bisect_right(self._seen_at, self.now - lag_s) - 1]

    def staying(self) -> list[Instance]:
        """The instances that count as capacity: those on their way out do not."""
        return [instance for instance in self.instances if instance.state != "draining"]

    def set_desired(self, capacity: int) -> None:
        """SetDesiredCapacity: what is missing is launched, and where it is too much AWS picks who goes."""
        self._note_desired(max(self.policy.minimum, min(capacity, MAX_INSTANCES)))
        staying = self.staying()
        for _ in range(self.desired - len(staying)):
            self._launch()
        for instance in self.rng.sample(staying, max(0, len(staying) - self.desired)):
            if instance.state == "busy":
                instance.state = "draining"
                self.at(self.now + HOOK_S, partial(self._cut, instance))
            else:
                self._end(instance)

    def leave(self, instance: Instance) -> None:
        """TerminateInstanceInAutoScalingGroup with decrement, which is refused at the minimum."""
        if self.desired > self.policy.minimum:
            self._note_desired(self.desired - 1)
            self._end(instance)

    def _note_desired(self, capacity: int) -> None:
        direction = (capacity > self.desired) - (capacity < self.desired)
        self.outcome.reversals += direction == -self._direction != 0
        self._direction = direction or self._direction
        self.desired = capacity

    def _launch(self) -> None:
        self.outcome.launches += 1
        instance = Instance(self.outcome.launches, self.now)
        self.instances.append(instance)
        boot = random.Random(f"{self.seed} boot {instance.number}")
        self.at(self.now + max(60.0, boot.gauss(self.boot_s, BOOT_SPREAD_S)), partial(self._booted, instance))

    def _booted(self, instance: Instance) -> None:
        if instance.state == "booting":
            self.policy.booted(self, instance)
            self._free(instance)

    def _free(self, instance: Instance) -> None:
        instance.state, instance.job, instance.idle_since = "idle", None, self.now
        self.policy.between_jobs(self, instance)
        if instance.state != "idle":
            return
        if self._queue:
            self._take(instance)
        else:
            self.idle.append(instance)
            self.policy.idle(self, instance)

    def _send(self, numbers: list[int]) -> None:
        self._queue.extend(numbers)
        self._note_depth()
        self._hand_out()
        self.policy.sent(self, len(numbers))

    def _hand_out(self) -> None:
        while self._queue and self.idle:
            self._take(self.idle.pop(self.rng.randrange(len(self.idle))))

    def _take(self, instance: Instance) -> None:
        number = self._queue.popleft()
        when, length = self.load.jobs[number]
        if number in self._waits:
            self.outcome.twice += 1
        self._waits.setdefault(number, self.now - when)
        self._in_flight += 1
        self._note_depth()
        length += 0.0 if instance.is_warm else FIRST_JOB_S
        instance.is_warm, instance.state, instance.job, instance.began = True, "busy", number, self.now
        self.at(self.now + length, partial(self._finish, instance, number))
        if length > self.policy.visibility_s:
            self.at(self.now + self.policy.visibility_s, partial(self._show_again, number))
        self.policy.took(self, instance)

    def _show_again(self, number: int) -> None:
        if number not in self._done:
            self._in_flight -= 1
            self._queue.append(number)
            self._note_depth()
            self._hand_out()

    def _finish(self, instance: Instance, number: int) -> None:
        if instance.job != number:
            return
        if number not in self._done:
            self._done.add(number)
            if number in self._queue:
                self._queue.remove(number)
            else:
                self._in_flight -= 1
            self._note_depth()
        if instance.state == "draining":
            self._end(instance)
        else:
            self._free(instance)

    def _cut(self, instance: Instance) -> None:
        """The hook of an instance has run out: its job comes back."""
        number = instance.job
        if instance.state == "draining" and number is not None:
            self._end(instance)
            if number not in self._done:
                self.outcome.interrupted += 1
                if number not in self._queue:
                    self._show_again(number)

    def _end(self, instance: Instance) -> None:
        instance.state, instance.job = "ended", None
        self.instances.remove(instance)
        if instance in self.idle:
            self.idle.remove(instance)
        self.outcome.instance_s += self.now - instance.launched

    def _note_depth(self) -> None:
        self._seen_at.append(self.now)
        self._seen.append(QueueDepth(len(self._queue), self._in_flight))


# --- Policies --------------------------------------------------------------------------------------------


class Policy:
    """Who scales when. A policy serves one fleet."""

    minimum = 0
    visibility_s = math.inf

    def start(self, fleet: Fleet) -> None:
        """The fleet begins."""

    def sent(self, fleet: Fleet, count: int) -> None:
        """So many jobs have just been sent at once."""

    def booted(self, fleet: Fleet, instance: Instance) -> None:
        """An instance's worker has begun."""

    def between_jobs(self, fleet: Fleet, instance: Instance) -> None:
        """An instance is about to ask for its next job."""

    def took(self, fleet: Fleet, instance: Instance) -> None:
        """An instance has taken a job."""

    def idle(self, fleet: Fleet, instance: Instance) -> None:
        """An instance has found no job."""


class Ours(Policy):
    """What send_job.py and parse_job.py do."""

    @dataclass
    class Memory:
        """What a worker keeps."""

        history: QueueHistory
        jitter: random.Random
        looked_at: float
        next_look: float

    def __init__(self, backlog: int = BACKLOG, cooldown_s: float = COOLDOWN_S) -> None:
        self.backlog, self.cooldown_s = backlog, cooldown_s

    def sent(self, fleet: Fleet, count: int) -> None:
        depth = fleet.depth()
        self._raise(fleet, depth._replace(visible=max(depth.visible, count)), 0)

    def booted(self, fleet: Fleet, instance: Instance) -> None:
        jitter = random.Random(instance.name)
        instance.memory = self.Memory(QueueHistory(self.cooldown_s), jitter, fleet.now, fleet.now)

    def took(self, fleet: Fleet, instance: Instance) -> None:
        self._look_busy(fleet, instance, instance.job, instance.began)

    def idle(self, fleet: Fleet, instance: Instance) -> None:
        self._poll(fleet, instance, instance.idle_since)

    def _raise(self, fleet: Fleet, depth: QueueDepth, long: int) -> None:
        wanted = desired_capacity(
            depth, backlog_per_instance=self.backlog, min_instances=0, max_instances=MAX_INSTANCES, long_jobs=long
        )
        if wanted > fleet.desired:
            fleet.set_desired(wanted)

    def _look(self, fleet: Fleet, memory: Ours.Memory, pace_s: float) -> QueueDepth:
        memory.looked_at, memory.next_look = fleet.now, fleet.now + min(pace_s, self.cooldown_s / 4)
        depth = fleet.depth()
        memory.history.add(fleet.now, depth)
        return depth

    def _look_busy(self, fleet: Fleet, instance: Instance, job: int | None, began: float) -> None:
        if instance.job != job or instance.began != began:
            return
        memory: Ours.Memory = instance.memory
        if fleet.now >= memory.next_look:
            depth = self._look(fleet, memory, LOOK_S * memory.jitter.uniform(0.8, 1.2))
            self._raise(fleet, depth, long_jobs(memory.history, depth, fleet.now - began))
        fleet.at(memory.next_look, partial(self._look_busy, fleet, instance, job, began))

    def _poll(self, fleet: Fleet, instance: Instance, idle_since: float) -> None:
        left_s = idle_since + self.cooldown_s - fleet.now
        fleet.at(fleet.now + (min(POLL_S, left_s) if left_s > 0 else POLL_S),
                 partial(self._polled, fleet, instance, idle_since))  # fmt: skip

    def _polled(self, fleet: Fleet, instance: Instance, idle_since: float) -> None:
        if instance.state != "idle" or instance.idle_since != idle_since:
            return
        memory: Ours.Memory = instance.memory
        if fleet.now >= memory.next_look or memory.looked_at < idle_since + self.cooldown_s <= fleet.now:
            depth = self._look(fleet, memory, 2 * POLL_S - 1)
            in_service = [other.name for other in fleet.instances if other.state in ("idle", "busy")]
            if may_leave(
                memory.history,
                depth,
                now=fleet.now,
                idle_s=fleet.now - idle_since,
                cooldown_s=self.cooldown_s,
                desired=fleet.desired,
                turn=leaving_turn(instance.name, in_service, fleet.now),
            ):
                fleet.leave(instance)
        self._poll(fleet, instance, idle_since)


class Original(Policy):
    """The AWS sample: the sender starts the first instance, and each worker adds or takes one every 180 s.

    It takes visible messages over the instances that are there; AWS picks who goes. Its queue has SQS's default
    visibility timeout of 30 s; with `visibility_s=math.inf` that flaw is left out.
    """

    def __init__(self, visibility_s: float) -> None:
        self.visibility_s = visibility_s

    def sent(self, fleet: Fleet, _: int) -> None:
        if not fleet.instances:
            fleet.set_desired(1)

    def booted(self, _: Fleet, instance: Instance) -> None:
        instance.memory = -math.inf

    def between_jobs(self, fleet: Fleet, instance: Instance) -> None:
        if fleet.now < instance.memory + COOLDOWN_S:
            return
        instance.memory = fleet.now
        visible, there = fleet.depth().visible, len(fleet.instances)
        if visible / there > BACKLOG:
            fleet.set_desired(there + 1)
        elif visible / there < BACKLOG:
            fleet.set_desired(max(there - 1, 1 if visible else 0))

    def idle(self, fleet: Fleet, instance: Instance) -> None:
        fleet.at(fleet.now + POLL_S, partial(self._polled, fleet, instance, instance.idle_since))

    def _polled(self, fleet: Fleet, instance: Instance, idle_since: float) -> None:
        if instance.state == "idle" and instance.idle_since == idle_since:
            self.between_jobs(fleet, instance)
            fleet.at(fleet.now + POLL_S, partial(self._polled, fleet, instance, idle_since))


class TargetTracking(Policy):
    """AWS's own at visible messages / instances = 3: three points above it to go out, fifteen below 90 % to come in.

    A point a minute, a minute old. From zero instances there is no point, so it never leaves zero.
    """

    def __init__(self, minimum: int) -> None:
        self.minimum = minimum
        self._points: list[float | None] = []

    def start(self, fleet: Fleet) -> None:
        fleet.at(fleet.rng.uniform(0, 60), partial(self._tick, fleet))

    def _tick(self, fleet: Fleet) -> None:
        there = len(fleet.staying())
        self._points.append(fleet.depth(60).visible / there if there else None)
        known = [point for point in self._points[-15:] if point is not None]
        wanted = math.ceil(there * known[-1] / BACKLOG) if known else 0
        if len(known) >= 3 and min(known[-3:]) > BACKLOG:
            fleet.set_desired(max(wanted, there))
        elif len(known) == 15 and max(known) < 0.9 * BACKLOG and max(wanted, self.minimum) < there:
            fleet.set_desired(wanted)
            self._points.clear()
        fleet.at(fleet.now + 60, partial(self._tick, fleet))


class AllAtOnce(Policy):
    """Every instance there may be, the moment something is sent: nobody who cannot see the future is sooner."""

    def sent(self, fleet: Fleet, _: int) -> None:
        fleet.set_desired(MAX_INSTANCES)


def oracle(load: Load, boot_s: float) -> Outcome:
    """Knows every job in advance: instances have booted when their jobs are sent, and nobody idles for nothing.

    A job goes to the instance that was needed last; one that would idle for longer than a new one takes to boot
    and to warm up is ended, and launched anew in time.
    """
    outcome = Outcome(work_s=sum(length for _, length in load.jobs))
    free_at: list[float] = []
    for when, job_s in load.jobs:
        length = job_s
        free = [moment for moment in free_at if moment <= when]
        if free or len(free_at) == MAX_INSTANCES:
            last = max(free) if free else min(free_at)
            free_at.remove(last)
            start, gap_s = max(when, last), max(0.0, when - last)
        else:
            start, gap_s = when, math.inf
        if gap_s > boot_s + FIRST_JOB_S:
            outcome.launches += 1
            outcome.instance_s += boot_s
            length += FIRST_JOB_S
            gap_s = 0.0
        outcome.instance_s += gap_s + length
        outcome.waits.append(start - when)
        free_at.append(start + length)
    return outcome


OURS, ORIGINAL, TRACKING = "ours", "original", "target tracking, min 1"
POLICIES: dict[str, Callable[[], Policy]] = {
    OURS: Ours,
    ORIGINAL: partial(Original, math.inf),
    "original, 30 s visibility": partial(Original, 30.0),
    TRACKING: partial(TargetTracking, 1),
    "target tracking, min 0": partial(TargetTracking, 0),
    "all 20 at once": AllAtOnce,
}
ORACLE = "oracle"


# --- Measuring -------------------------------------------------------------------------------------------

Run = tuple[str, Callable[[], Policy], int, float]
"""A load's name, what makes its policy, a seed, and the mean boot time."""


def simulate(run: Run) -> Outcome:
    """Play one load with one policy."""
    name, make_policy, seed, boot_s = run
    return Fleet(make_load(name, seed), make_policy(), f"{name} {seed}", boot_s).run()


def make_load(name: str, seed: int) -> Load:
    """The same jobs for everybody."""
    return LOADS[name](random.Random(f"{name} {seed} load"))


def measure(
    pool: ProcessPoolExecutor, cases: Sequence[tuple[str, Callable[[], Policy], float]], seeds: int
) -> list[Outcome]:
    """The outcome of each case (load, policy, boot time) over all seeds."""
    runs = [(name, make, seed, boot_s) for name, make, boot_s in cases for seed in range(seeds)]
    outcomes = pool.map(simulate, runs, chunksize=seeds)
    sums = [Outcome() for _ in cases]
    for number, outcome in enumerate(outcomes):
        sums[number // seeds].add(outcome)
    return sums


def table(results: dict[str, Outcome], seeds: int) -> Iterator[str]:
    """The lines of one load's table; counts and dollars are means of one run."""
    for name, outcome in results.items():
        p50, p95, p99 = (seconds(outcome.wait(share)) for share in (0.5, 0.95, 0.99))
        dollars = outcome.instance_s / 3600 * DOLLARS_AN_HOUR / seeds
        yield (
            f"  {name:26}{p50:>7}{p95:>7}{p99:>7}{outcome.ratio:9.2f}{dollars:9.2f}{outcome.interrupted / seeds:8.1f}"
            f"{outcome.twice / seeds:8.1f}{outcome.launches / seeds:9.1f}{outcome.reversals / seeds:7.1f}"
            f"{outcome.stuck / seeds:7.1f}"
        )


HEADER = f"  {'':26}{'p50':>7}{'p95':>7}{'p99':>7}{'ratio':>9}{'dollars':>9}{'interr.':>8}{'twice':>8}{'launches':>9}{'turns':>7}{'stuck':>7}"


def seconds(value: float) -> str:
    """For the table; a job that was never run has waited for ever."""
    return "never" if math.isinf(value) else f"{value:.0f} s"


def judge(load: str, results: dict[str, Outcome]) -> Iterator[tuple[bool, str]]:
    """What we want to be true of ours on this load: whether it is, and the numbers."""
    ours, original, tracking = results[OURS], results[ORIGINAL], results[TRACKING]
    yield ours.interrupted == ours.twice == ours.stuck == 0, "no job interrupted, run twice or stuck"
    if load in ("burst", "diurnal", "heavy tail"):
        for peer, outcome, share in (("the original", original, 0.5), (TRACKING, tracking, 0.6)):
            part = ours.wait(0.95) / outcome.wait(0.95)
            yield part <= share, f"p95 wait is {part:.2f} of {peer}'s, at most {share}"
    if load == "diurnal":
        yield round(ours.ratio, 2) <= 1.25, f"instance hours are {ours.ratio:.2f} of work hours, at most 1.25"
    yield (
        ours.ratio <= tracking.ratio,
        f"instance hours are {ours.ratio / tracking.ratio:.2f} of {TRACKING}'s, at most 1",
    )
    worse = [
        name
        for name in (ORIGINAL, TRACKING)
        if ours.wait(0.95) > results[name].wait(0.95) and ours.ratio > results[name].ratio
    ]
    yield not worse, f"no peer is better in both waiting and hours{': ' if worse else ''}{', '.join(worse)}"


# --- The frontier ----------------------------------------------------------------------------------------

BACKLOGS = (1, 2, 3, 5, 8)
COOLDOWNS_S = (60.0, 120.0, 180.0, 300.0, 600.0)
FRONTIER_SEEDS = 6
FRONTIER_LOADS = ("diurnal", "heavy tail")
COLORS = ("#d1495b", "#e08e2b", "#2e8b57", "#3b7dd8", "#8657c5")


def draw(pool: ProcessPoolExecutor, seeds: int) -> str:
    """The frontier as SVG: p95 wait against instance hours, over both settings, with the peers."""
    settings = [(backlog, cooldown_s) for backlog in BACKLOGS for cooldown_s in COOLDOWNS_S]
    panels = []
    for number, load in enumerate(FRONTIER_LOADS):
        makers: list[Callable[[], Policy]] = [partial(Ours, *setting) for setting in settings]
        makers += [POLICIES[ORIGINAL], POLICIES[TRACKING]]
        outcomes = measure(pool, [(load, make, BOOTS_S[0]) for make in makers], seeds)
        points = [(outcome.ratio, max(1.0, outcome.wait(0.95))) for outcome in outcomes]
        curves = {backlog: points[at : at + len(COOLDOWNS_S)]
                  for backlog, at in zip(BACKLOGS, range(0, len(settings), len(COOLDOWNS_S)), strict=True)}  # fmt: skip
        peers = {"original": points[-2], "target tracking": points[-1]}
        panels.append(panel(40 + 420 * number, load, curves, peers))
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 880 400" font-family="sans-serif" font-size="12">\n'
        '<rect width="880" height="400" fill="#ffffff"/>\n' + "\n".join(panels) + "\n</svg>\n"
    )


def panel(left: float, title: str, curves: dict[int, list[tuple[float, float]]],
          peers: dict[str, tuple[float, float]]) -> str:  # fmt: skip
    """One load's diagram: hours to the right, waiting upwards on a logarithmic scale."""
    every = [point for curve in curves.values() for point in curve] + list(peers.values())
    low_x, high_x = 1.0, math.ceil(max(x for x, _ in every) * 2) / 2
    low_y, high_y = math.log10(min(y for _, y in every) / 1.3), math.log10(max(y for _, y in every) * 1.3)

    def place(point: tuple[float, float]) -> tuple[float, float]:
        x = left + 20 + 350 * (point[0] - low_x) / (high_x - low_x)
        return x, 330 - 280 * (math.log10(point[1]) - low_y) / (high_y - low_y)

    parts = [f'<text x="{left + 20}" y="30" font-size="15">{title}, boot {BOOTS_S[0]:.0f} s</text>']
    parts.append(f'<path d="M{left + 20} 50V330H{left + 370}" fill="none" stroke="#888"/>')
    for tick in range(int(low_x * 2), int(high_x * 2) + 1):
        x, _ = place((tick / 2, 10**low_y))
        parts.append(f'<text x="{x:.1f}" y="346" text-anchor="middle" fill="#444">{tick / 2:g}</text>')
    for wait_s in (10, 30, 100, 300, 1000, 3000):
        if low_y <= math.log10(wait_s) <= high_y:
            _, y = place((low_x, wait_s))
            parts.append(f'<path d="M{left + 20} {y:.1f}h350" stroke="#ddd"/>')
            parts.append(f'<text x="{left + 16}" y="{y + 4:.1f}" text-anchor="end" fill="#444">{wait_s}</text>')
    parts.append(f'<text x="{left + 195}" y="365" text-anchor="middle">instance hours / work hours</text>')
    parts.append(f'<text x="{left + 24}" y="46" fill="#444">p95 wait in seconds</text>')
    for color, (backlog, curve) in zip(COLORS, curves.items(), strict=True):
        places = [place(point) for point in curve]
        line = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        parts.append(f'<path d="M{line}" fill="none" stroke="{color}" stroke-width="1.5"/>')
        for (x, y), cooldown_s in zip(places, COOLDOWNS_S, strict=True):
            is_default = (backlog, cooldown_s) == (BACKLOG, COOLDOWN_S)
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{6 if is_default else 3}" fill="{color}">'
                         f"<title>BACKLOGSIZE_PER_INSTANCE={backlog} SCALE_COOLDOWN={cooldown_s:g}</title></circle>")  # fmt: skip
        x = left + 200 + 35 * BACKLOGS.index(backlog)
        parts.append(f'<text x="{x}" y="388" fill="{color}">● {backlog}</text>')
    parts.append(f'<text x="{left + 20}" y="388" fill="#444">BACKLOGSIZE_PER_INSTANCE</text>')
    for name, point in peers.items():
        x, y = place(point)
        parts.append(f'<path d="M{x - 5:.1f} {y - 5:.1f}l10 10m0 -10l-10 10" stroke="#111" stroke-width="2"/>')
        anchor = "end" if x > left + 250 else "start"
        parts.append(
            f'<text x="{x + (-9 if anchor == "end" else 9):.1f}" y="{y + 4:.1f}" text-anchor="{anchor}">{name}</text>'
        )
    return "\n".join(parts)


# --- Main ------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Print tables and verdicts, and draw the frontier where asked; returns 0."""
    parser = argparse.ArgumentParser(description="Scaling policies side by side on a virtual clock.")
    parser.add_argument("--seeds", type=int, default=20, metavar="N", help="days to simulate (default: 20)")
    parser.add_argument("--load", choices=LOADS, help="only this load")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw the frontier there")
    options = parser.parse_args(arguments)
    if options.seeds < 1:
        parser.error(f"--seeds {options.seeds}: simulate at least one")
    started = time.monotonic()
    loads = [options.load] if options.load else list(LOADS)
    misses = 0
    with ProcessPoolExecutor() as pool:
        cases = [(load, name, boot_s) for boot_s in BOOTS_S for load in loads for name in POLICIES]
        measured = measure(pool, [(load, POLICIES[name], boot_s) for load, name, boot_s in cases], options.seeds)
        outcomes = dict(zip(cases, measured, strict=True))
        for boot_s in BOOTS_S:
            print(
                f"Boot {boot_s:.0f} s, {options.seeds} seeds. Waits; instance hours / work hours; the rest per run.\n{HEADER}"
            )
            for load in loads:
                results = {name: outcomes[load, name, boot_s] for name in POLICIES}
                results[ORACLE] = Outcome()
                for seed in range(options.seeds):
                    results[ORACLE].add(oracle(make_load(load, seed), boot_s))
                print(f"{load}: {(LOADS[load].__doc__ or '').rstrip('.')}")
                print("\n".join(table(results, options.seeds)))
                for holds, sentence in judge(load, results):
                    misses += not holds
                    print(f"    {'✓' if holds else '✗'} {sentence}")
            print()
        if options.svg:
            options.svg.write_text(draw(pool, min(options.seeds, FRONTIER_SEEDS)))
    print(f"{misses} aims missed; {time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
