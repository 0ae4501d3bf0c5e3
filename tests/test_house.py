"""The house itself: imports run down, send_job.py can be carried away, and every file is read in one sitting."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from places import ROOT

BELOW = {
    "comfy_utils": [],
    "ground": ["comfy_utils"],
    "worker": ["ground", "comfy_utils"],
    "parse_job": ["worker", "ground", "comfy_utils"],
    "sender": ["ground", "comfy_utils"],
    "send_job": ["sender", "ground", "comfy_utils"],
    "operate": ["send_job", "sender", "ground", "comfy_utils"],
    "fleet": ["operate", "send_job", "comfy_utils"],
    "provision": [],
    "create_env": ["provision"],
    "delete_env": ["provision"],
    "start_service": ["provision"],
}
"""Every door and room, and what it may open. The rooms of one folder may open each other, but in no circle."""
LINES = 700
PORTABLE_LINES = 1450  # of send_job.py and comfy_utils.py, which must not fall into more files
PARTS_OF_BOTO3 = 0.5  # what importing send_job may cost of it

SHIPPED = sorted(
    path
    for pattern in (
        "*.py",
        "*.sh",
        "ground/**/*",
        "worker/**/*",
        "sender/**/*",
        "operate/**/*",
        "provision/**/*",
        "systemd/*",
    )
    for path in ROOT.glob(pattern)
    if path.is_file() and path.suffix != ".pyc"
)


def storey(name: str) -> str:
    """The door or room of a module `worker.job` or a file `provision/queues.sh`."""
    return re.split(r"[./]", name)[0]


def opened_by(path: Path) -> set[str]:
    """What of the house a file imports or sources, wherever in it."""
    text = path.read_text()
    if path.suffix == ".sh":
        found = {
            match[1] for match in re.finditer(r"^\s*(?:source|\.) .*?((?:provision/)?\$?\w+)\.sh", text, re.MULTILINE)
        }
    else:
        found = set()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: a relative import"
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
                found.add(str(node.module))
    return {name for name in found if storey(name) in BELOW}


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


ROOMS = {module_of(path): path for path in SHIPPED if path.suffix in (".py", ".sh")}


def test_every_file_has_its_place() -> None:
    assert {storey(name) for name in ROOMS} <= BELOW.keys()


@pytest.mark.parametrize("name", ROOMS)
def test_nothing_is_opened_from_below(name: str) -> None:
    may = {storey(name), *BELOW[storey(name)]}
    assert [other for other in opened_by(ROOMS[name]) if storey(other) not in may] == []


def test_nothing_goes_in_a_circle() -> None:
    rooms = {name: opened_by(path) & ROOMS.keys() - {name} for name, path in ROOMS.items()}
    TopologicalSorter(rooms).prepare()  # raises CycleError, which names the circle


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_is_read_in_one_sitting(path: Path) -> None:
    limit = PORTABLE_LINES if path.name in ("send_job.py", "comfy_utils.py") else LINES
    assert len(path.read_text().splitlines()) <= limit


def test_words_reach_a_terminal_by_one_way_only() -> None:
    """`print` is for JSON, which escapes what a terminal would obey; all else goes through `say`."""
    doors = [ROOT / "send_job.py", ROOT / "fleet.py", ROOT / "comfy_utils.py", *ROOT.glob("operate/*.py")]
    found = []
    for path in doors:
        tree = ast.parse(path.read_text())
        inside_say = {
            id(node)
            for function in ast.walk(tree)
            if isinstance(function, ast.FunctionDef) and function.name == "say"
            for node in ast.walk(function)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Name) and node.id == "print" and id(node) not in inside_say:
                found.append(f"{path.name}:{node.lineno}: {path.read_text().splitlines()[node.lineno - 1].strip()}")
    assert [line for line in found if "print(json.dumps(" not in line] == []
    assert len(found) > 5, "what is looked for is found"


def test_send_job_needs_one_file_beside_it_and_no_boto3_to_help(tmp_path: Path) -> None:
    """That it sends when it is carried away is tested in tests/sender/."""
    for name in ("send_job.py", "comfy_utils.py"):
        shutil.copy2(ROOT / name, tmp_path)
    alone = [sys.executable, "-IS", "-c", "import runpy, sys; sys.path.insert(0, '.'); runpy.run_path('send_job.py', run_name='__main__')"]  # fmt: skip
    ran = subprocess.run([*alone, "--help"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.startswith("usage: ")


def test_importing_send_job_costs_business_code_little() -> None:
    """Processor time, and of several runs the least, so that it holds on a busy machine."""
    seconds: dict[str, list[float]] = {"send_job": [], "boto3": []}
    for _ in range(4):
        for name, found in seconds.items():
            code = f"import time; began = time.process_time(); import {name}; print(time.process_time() - began)"
            command = [sys.executable, "-c", code]
            kept = os.environ | {"PYTHONDONTWRITEBYTECODE": ""}  # what is compiled once stays, as with any package
            ran = subprocess.run(command, cwd=ROOT, env=kept, capture_output=True, text=True, check=True)
            found.append(float(ran.stdout))
    assert min(seconds["send_job"]) < PARTS_OF_BOTO3 * min(seconds["boto3"])


def test_git_does_not_see_what_runs_leave_behind() -> None:
    left = [
        "ComfyUI",
        "first-boot",
        "held/x",
        "job-output/x",
        "local/x",
        "logs/x",
        "output/x",
        "pictures/x",
        "s3/x",
        "venv/x",
    ]
    asked = subprocess.run(["git", "check-ignore", *left], cwd=ROOT, capture_output=True, text=True, check=False)
    assert asked.stdout.split() == left
