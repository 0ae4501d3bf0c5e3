"""The whole story of demo.sh. Each of its calls is checked against the policies that create_env.sh prints."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from places import CLOUD, ROOT, TESTS

DEMO_LIMIT_S = 900  # 40 s on a quiet machine


def shape(line: str) -> str:
    """A line of the story without its numbers, ids, bars and spaces, which differ from run to run."""
    return "".join(re.sub(r"[0-9a-f-]*\d[0-9a-f-]*|[█░]+", "#", line).split())


@pytest.mark.slow
def test_the_demo_needs_no_permission_that_the_policies_do_not_give(tmp_path: Path) -> None:
    path = f"{CLOUD}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}"
    ran = subprocess.run(
        [sys.executable, TESTS / "demo/demo.py", "3"],
        env=os.environ | {"PATH": path, "DEMO_FOLDER": str(tmp_path)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEMO_LIMIT_S,
        check=False,
    )
    assert (ran.returncode, ran.stderr) == (0, ""), ran.stdout
    assert "✓ no call needed a permission that the policies do not give" in ran.stdout
    assert "✓ nothing of pro is left" in ran.stdout
    assert (tmp_path / "demo-output/report.html").is_file()
    example = (ROOT / "README.md").read_text().partition("```console\n")[2].partition("\n```")[0]
    seen = {shape(line.replace(f"{tmp_path}/", "")) for line in ran.stdout.splitlines()}
    assert [line for line in example.splitlines() if shape(line) not in seen | {"$./tests/demo.sh", "…", ""}] == []
