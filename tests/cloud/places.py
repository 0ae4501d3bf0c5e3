"""Where things are, and copies of the project to work in."""

from __future__ import annotations

import py_compile
import shutil
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
