"""The simulation of scaling policies: a load small enough to be worked out by hand, and what must hold on all."""

from __future__ import annotations

import bench_scaling
import pytest
from bench_scaling import LOADS, ORIGINAL, OURS, POLICIES, TRACKING, Fleet, Load, Ours, Outcome, make_load, oracle

BOOT_S = 150.0


def play(load: Load, policy: str, seed: str = "0", boot_s: float = BOOT_S) -> Outcome:
    return Fleet(load, POLICIES[policy](), seed, boot_s).run()


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """No chance: every boot takes as long, and counters are right."""
    monkeypatch.setattr(bench_scaling, "BOOT_SPREAD_S", 0.0)
    monkeypatch.setattr(bench_scaling, "LAG_S", 0.0)


@pytest.mark.usefixtures("exact")
def test_one_job_by_hand() -> None:
    for policy in (OURS, ORIGINAL):
        outcome = play(Load([(0.0, 30.0)], 0.0), policy)
        assert outcome.waits == [BOOT_S]
        assert outcome.launches == 1
    ours = play(Load([(0.0, 30.0)], 0.0), OURS)
    assert ours.instance_s == 150 + 45 + 30 + 180, "boot, first job, job, SCALE_COOLDOWN"
    known = oracle(Load([(0.0, 30.0)], 0.0), BOOT_S)
    assert (known.waits, known.instance_s) == ([0.0], 150 + 45 + 30)


@pytest.mark.usefixtures("exact")
def test_six_jobs_at_once_by_hand() -> None:
    load = Load([(0.0, 30.0)] * 6, 0.0)
    ours = play(load, OURS)
    assert ours.launches == 2, "ceil(6 / 3), in one step"
    assert sorted(ours.waits) == [150, 150, 225, 225, 255, 255]
    assert play(load, TRACKING).launches == 2, "one, and another after three points"
    assert play(load, "target tracking, min 0").stuck == 6


@pytest.mark.usefixtures("exact")
def test_a_victim_of_aws_is_cut_and_its_job_run_twice() -> None:
    """The original takes one of two after 180 s, whatever it does."""
    outcome = play(Load([(0.0, 20.0)] * 4 + [(1.0, 3000.0)] * 4, 0.0), ORIGINAL)
    assert outcome.interrupted > 0
    assert outcome.twice >= outcome.interrupted
    assert outcome.stuck == 0


@pytest.mark.parametrize("name", [name for name in LOADS if name != "diurnal"])
def test_ours_interrupts_nothing_and_ends_everything(name: str) -> None:
    outcome = play(make_load(name, 1), OURS)
    assert (outcome.interrupted, outcome.twice, outcome.stuck) == (0, 0, 0)


def test_same_seed_same_numbers() -> None:
    first, second = (play(make_load("heavy tail", 3), OURS) for _ in range(2))
    assert first == second
    assert first != play(make_load("heavy tail", 4), OURS)


def test_the_shipped_rules_are_what_is_simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    load = make_load("trickle", 0)
    before = play(load, OURS)
    monkeypatch.setattr(bench_scaling, "may_leave", lambda *_, **__: False)
    assert play(load, OURS).instance_s > 1.5 * before.instance_s
    monkeypatch.setattr(bench_scaling, "desired_capacity", lambda *_, **__: 0)
    assert play(load, OURS).stuck == len(load.jobs)


@pytest.mark.usefixtures("exact")
def test_nobody_gets_through_behind_long_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    load = Load([(0.0, 3600.0)] * 3 + [(60.0, 30.0)], 0.0)
    waited = max(play(load, OURS).waits)
    assert waited < 2000, "after ten minutes an instance of its own comes"
    monkeypatch.setattr(bench_scaling, "long_jobs", lambda *_: 0)
    assert max(play(load, OURS).waits) > 3600


def test_settings_move_along_the_frontier() -> None:
    load = make_load("heavy tail", 0)
    quick, cheap = (Fleet(load, Ours(backlog), "0", BOOT_S).run() for backlog in (1, 8))
    assert quick.wait(0.95) < cheap.wait(0.95)
    assert quick.instance_s > cheap.instance_s
