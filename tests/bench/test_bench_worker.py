"""bench_worker.py runs, looks for every file and receipt, and prints its table."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from places import TESTS
from workplace import LIMIT_S


@pytest.mark.slow
@pytest.mark.sampled("benchmarks", 1)
def test_the_table_has_a_row_for_each_distance() -> None:
    options = ["--only", "0", "--scale", "0.03", "--memory", "20", "--side", "64"]
    ran = subprocess.run(
        [sys.executable, TESTS / "bench/bench_worker.py", *options],
        capture_output=True,
        text=True,
        timeout=3 * LIMIT_S,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert re.search(r"first receive: \d+ ms", ran.stdout)
    rows = re.findall(r"^ +0 ms +6 +(\d+) ms .* s +([\d.]+) +[\d.]+ ", ran.stdout, re.MULTILINE)
    assert [row[0] for row in rows] == ["0", "5", "25"], ran.stdout
    assert len(re.findall(r"^ +\d+ +[\d.]+ MB$", ran.stdout, re.MULTILINE)) == 20
