"""Where things are, and copies of the project to work in."""

from __future__ import annotations

import shutil
from pathlib import Path

CLOUD = Path(__file__).resolve().parent
TESTS = CLOUD.parent
ROOT = TESTS.parent
ROOMS = ("provision", "worker", "operate", "systemd")


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
    """The stand-in, in the place of ComfyUI's own files."""
    shutil.copy2(CLOUD / "comfyui_standin.py", folder / "main.py")
    shutil.copy2(CLOUD / "recordings.json", folder)
