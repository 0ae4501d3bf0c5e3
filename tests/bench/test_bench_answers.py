"""bench_answers.py kills, sees every job answered once, and prints how long that took."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from places import TESTS
from workplace import LIMIT_S

QUICKLY = """
import sys

sys.path[:0] = sys.argv[1:3]
import bench_answers
from workshop import speed_up

class Site(bench_answers.Site):
    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        speed_up(self, "worker/dead_letters.py", {"LOOK_S, LONGEST_PAUSE_S = 60.0": "LOOK_S, LONGEST_PAUSE_S = 1.0"})

bench_answers.Site = Site
sys.exit(bench_answers.main(["--jobs", "2"]))
"""
"""With workers that look at the dead letters every second."""


@pytest.mark.slow
@pytest.mark.sampled("benchmarks", 1)
def test_every_job_is_answered_once_and_it_is_said_how_soon() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", QUICKLY, TESTS / "bench", TESTS / "worker"],
        capture_output=True,
        text=True,
        timeout=3 * LIMIT_S,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    row = r"^(killed|died) +2 jobs +(receipt|callback) +p50 +[\d.]+ s +max +[\d.]+ s +each got 1 for 2$"
    assert re.findall(row, ran.stdout, re.MULTILINE) == [
        ("killed", "receipt"),
        ("killed", "callback"),
        ("died", "receipt"),
        ("died", "callback"),
    ], ran.stdout
