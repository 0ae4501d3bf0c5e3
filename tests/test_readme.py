"""README.md says what the project really does: settings, help, demo."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text()


def documented_settings() -> list[str]:
    """A README table row for every variable of env.example, in its words."""
    rows: list[str] = []
    words: list[str] = []
    for line in (ROOT / "env.example").read_text().partition("# --- Where")[2].splitlines():
        if match := re.fullmatch(r'#?([A-Z][A-Z0-9_]*)="?([^"]*)"?', line):
            default = f"`{match[2]}`" if match[2] else ""
            rows.append(f"| `{match[1]}` | {default} | {' '.join(words)} |")
        words = [*words, line[2:]] if line.startswith("# ") and "---" not in line else []
    return rows


def test_the_settings_table_has_the_words_of_env_example() -> None:
    rows = documented_settings()
    assert len(rows) > 20
    assert "\n".join(rows) in README


def test_the_help_is_the_commands_own() -> None:
    said = subprocess.run(
        [sys.executable, ROOT / "send_job.py", "--help"],
        env={"COLUMNS": "110", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert " ".join(said.split()) in " ".join(README.split()), "Pythons differ in where they break lines"


@pytest.mark.parametrize(
    "name", ["create_env.sh", "delete_env.sh", "start_service.sh", "tests/demo.sh", "tests/run.sh"]
)
def test_every_script_shows_its_header_as_help(name: str) -> None:
    ran = subprocess.run(
        [ROOT / name, "--help"], env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True, check=False
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "Usage:" in ran.stdout
    assert not any(line.startswith("#") for line in ran.stdout.splitlines())
