"""The decisions about how many instances there are: pure functions of what a worker has seen.

tests/bench/bench_scaling.py runs the same ones on a virtual clock.
"""

from __future__ import annotations

import hashlib
import math
from collections import deque

from comfy_utils import Group, QueueDepth

LOOK_S = 30
"""How often, on average, a worker with a job looks at the queue; one without looks after every second poll."""
GLANCE_S = 0.25
"""How often at most it asks besides whether more wait, when one came although none was known to."""
LONG_JOB_S = 300
"""A job that runs for so long occupies its worker: longer than another instance takes to come."""
ALL_LONG_S = 600
"""A worker with such a job, and messages that wait all along, takes all running jobs for long ones."""
UTILISATION = 0.9
"""How busy the fleet that stays may be; the rest takes up what comes unevenly."""
TURN_S = 15
"""So long it is the turn of the same instances to leave."""

AHEAD_LIMIT_S = 60
"""Behind a job that takes longer none is fetched ahead: little would be gained, and it might wait for long."""
FETCH_S = 0.2
"""So long it takes to fetch a job, with AWS far away."""
AHEAD = 20
"""So many jobs a worker has in hand at most that have not run to their end: one runs, the others come next."""
READY_S = 150
"""So long an instance in service still boots before it takes its first job."""


def jobs_to_fetch(*, waiting: int, others: int, in_hand: int, last_run_s: float | None, running_s: float) -> int:
    """How many jobs a worker takes besides the `in_hand`, of which one runs or is about to.

    Only while so many wait that each of the `others`, idle or about to be free, still finds as many as this worker
    would then have before it; so that nobody could have started it sooner. Only behind short jobs, as the last one was
    and the one that runs still is, and no more than run in the time it takes to fetch one. Where those are many,
    several are fetched in one call.
    """
    if last_run_s is None or max(last_run_s, running_s) > AHEAD_LIMIT_S:
        return 0
    enough = min(AHEAD, 2 + int(FETCH_S / max(last_run_s, 0.001)))
    more = 0
    while in_hand + more < enough and waiting > (in_hand + more) * others:
        more += 1
        waiting -= others + 1  # they, too, take one after the other
    return more if in_hand <= enough - max(1, enough // 3) else 0


def others_at_work(group: Group | None, instance_id: str, depth: QueueDepth, held: int) -> int:
    """How many other instances take jobs, as far as one can know that holds so many messages itself.

    Those in service; but one that still boots is in service as well, and takes none yet. While messages wait, who
    takes jobs has one in hand.
    """
    if group is None:
        return 0
    in_service = sum(name != instance_id for name in group.in_service)
    return min(in_service, max(0, depth.in_flight - held))


class Replacement:
    """How an instance that was launched from an old template version has itself replaced, one at a time."""

    def __init__(self) -> None:
        self.is_due = False  # it leaves once it has no job in hand that has not run
        self.decrement = False
        self.is_asked = False
        self._known: frozenset[str] = frozenset()  # those that were up to date when another was asked for
        self._came_at: float | None = None

    def forget(self) -> None:
        """Begin anew."""
        self.is_due = self.is_asked = False
        self._came_at = None

    def step(self, group: Group, me: str, depth: QueueDepth, now: float) -> str:
        """Take in how the group stands and return what is to be done: "launch" another, or "" for nothing."""
        current = frozenset(group.in_service) - frozenset(group.outdated)
        has_come = self.is_asked and bool(current - self._known)
        self._came_at = (self._came_at or now) if has_come else None
        is_ready = self._came_at is not None and now - self._came_at >= READY_S
        step = replacement_step(group, me, depth, has_come=has_come, is_ready=is_ready)
        if step == "launch":
            self.is_asked, self._known = True, current
        self.is_due = step in ("leave", "swap")
        self.decrement = step == "leave"
        return step if step == "launch" else ""


def replacement_step(group: Group, me: str, depth: QueueDepth, *, has_come: bool, is_ready: bool) -> str:
    """What an instance does about being outdated: "launch" another first, "leave", "swap", or "" for nothing.

    It leaves where nobody needs it, or when the one it asked for `has_come` and `is_ready`. One at a time: the first
    of the outdated, and only when all instances that are wanted are in service. Where the group is at its maximum
    none can be launched first: it swaps, which means that AWS launches the other while it goes.
    """
    if me not in group.outdated:
        return ""
    if depth == (0, 0) and max(group.desired, len(group.in_service)) > group.min_size:
        return "leave"
    if has_come:
        return "leave" if is_ready else ""
    if me != min(group.outdated) or group.desired > len(group.in_service):
        return ""
    if group.desired < group.max_size:
        return "launch"
    return "swap"


class QueueHistory:
    """What one worker has seen of the queue during the last `window_s` seconds."""

    def __init__(self, window_s: float) -> None:
        self.window_s = window_s
        self._depths: deque[tuple[float, QueueDepth]] = deque()
        self._since: float | None = None

    def add(self, now: float, depth: QueueDepth) -> None:
        """Take in what was seen at `now`, in seconds on any clock that never goes back."""
        if self._since is None:
            self._since = now
        self._depths.append((now, depth))
        while self._depths[0][0] < now - self.window_s:
            self._depths.popleft()

    def is_full(self, now: float) -> bool:
        """Whether the queue was watched for as long as the window is."""
        return self._since is not None and now - self._since >= self.window_s

    def mean_load(self) -> float:
        """How many jobs there were on average, waiting or running."""
        return sum(depth.visible + depth.in_flight for _, depth in self._depths) / max(1, len(self._depths))

    def always_waited(self) -> bool:
        """Whether messages waited whenever it was looked."""
        return all(depth.visible for _, depth in self._depths)


def long_jobs(history: QueueHistory, depth: QueueDepth, running_s: float) -> int:
    """How many of the jobs in flight are long, as far as a worker can know whose own job runs for `running_s`.

    Its own one after LONG_JOB_S. All of them when also nothing has helped those that wait: the others
    are then most likely jobs of the same kind.
    """
    if running_s >= ALL_LONG_S and depth.visible and history.always_waited():
        return depth.in_flight
    return 1 if running_s >= LONG_JOB_S else 0


def may_leave(
    history: QueueHistory,
    depth: QueueDepth,
    *,
    now: float,
    idle_s: float,
    cooldown_s: float,
    desired: int,
    turn: int | None,
) -> bool:
    """Whether an idle worker ends its own instance.

    Never while messages are visible. One that was idle for `cooldown_s` leaves an empty queue, if it is the
    last or nothing has come in that time. Others leave earlier once the load of the last `window_s` needs fewer
    than `desired` instances: those whose `turn` (0 first) lies below the difference, so that many who leave at once
    never leave too few.
    """
    if depth.visible:
        return False
    nothing_came = depth.in_flight == 0 and (desired <= 1 or history.mean_load() == 0)
    if idle_s >= cooldown_s and nothing_came:
        return True
    needed = max(1, math.ceil(history.mean_load() / UTILISATION))
    return history.is_full(now) and turn is not None and turn < desired - needed


def leaving_turn(instance_id: str, in_service: list[str], clock: float) -> int | None:
    """This instance's place, 0 first, in the order in which the group's instances may leave at this time of day.

    The same order for all who ask within TURN_S, and another one after, because the first may be busy. None in the
    last third of a turn, so that its last has left when the next one's first counts who is there.
    """
    slot, since = divmod(clock, TURN_S)
    if since > TURN_S * 2 / 3:
        return None
    order = sorted(
        {*in_service, instance_id}, key=lambda name: hashlib.sha256(f"{slot:.0f} {name}".encode()).digest()
    )
    return order.index(instance_id)
