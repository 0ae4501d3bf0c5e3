"""Where things are, and copies of the project to work in."""

from __future__ import annotations

import atexit
import os
import py_compile
import shutil
import tempfile
from functools import cache
from pathlib import Path

CLOUD = Path(__file__).resolve().parent
TESTS = CLOUD.parent
ROOT = TESTS.parent
ROOMS = ("boot", "provision", "ground", "worker", "sender", "operate", "systemd")


def copy_scripts(folder: Path, root: Path = ROOT) -> None:
    """What lies in /home/ubuntu/comfy beside ComfyUI and `env`: the doors, and the rooms behind them."""
    for door in (*root.glob("*.sh"), *root.glob("*.py"), root / "simple_workflow.json"):
        shutil.copy2(door, folder)
    for room in ROOMS:
        if (root / room).is_dir():
            shutil.copytree(root / room, folder / room)


def link_scripts(folder: Path) -> None:
    """The same, but the rooms' files are links to one copy of this process, as to write them takes a tenth of a whole
    test run. Who changes one puts another in its place."""
    copy, _ = the_copy()
    for path in copy.iterdir():
        if path.is_dir():
            shutil.copytree(path, folder / path.name, copy_function=os.link)
        else:
            shutil.copy2(path, folder)


@cache
def the_copy() -> tuple[Path, dict[Path, int]]:
    """What `link_scripts` links to, which goes with this process, and when each file was last written."""
    place = tempfile.TemporaryDirectory(prefix="scripts-")
    atexit.register(place.cleanup)
    copy = Path(place.name)
    copy_scripts(copy)
    return copy, {path: path.stat().st_mtime_ns for path in copy.rglob("*") if path.is_file()}


def written_in_place() -> list[str]:
    """What a test has written into the files that all share."""
    copy, written = the_copy() if the_copy.cache_info().currsize else (ROOT, {})
    return [str(path.relative_to(copy)) for path, at in written.items() if path.stat().st_mtime_ns != at]


def copy_bytecode(folder: Path) -> None:
    """What Python has compiled of the scripts, or every process that is started would compile them again."""
    compiled = ROOT / "__pycache__"
    if compiled.is_dir():
        shutil.copytree(compiled, folder / compiled.name, ignore=shutil.ignore_patterns("*.pyc.*"))


def copy_comfyui(folder: Path) -> None:
    """The stand-in, in the place of ComfyUI's own files. A script is compiled at each start, a module is not."""
    (folder / "main.py").write_text("from comfyui_standin import main\n\nmain()\n")
    for name in ("comfyui_standin.py", "recordings.json"):
        shutil.copy2(CLOUD / name, folder)
    (folder / "__pycache__").mkdir(exist_ok=True)
    shutil.copy2(compiled_standin(), folder / "__pycache__")


@cache
def compiled_standin() -> str:
    """Where it is, compiled."""
    return str(py_compile.compile(str(CLOUD / "comfyui_standin.py"), doraise=True))
