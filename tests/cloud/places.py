"""Where things are, and copies of the project to work in."""

from __future__ import annotations

import shutil
from pathlib import Path

CLOUD = Path(__file__).resolve().parent
TESTS = CLOUD.parent
ROOT = TESTS.parent
ROOMS = ("provision", "worker", "operate", "systemd")


def copy_scripts(folder: Path) -> None:
    """What lies in /home/ubuntu/comfy beside ComfyUI and `env`: the doors, and the rooms behind them."""
    for door in (*ROOT.glob("*.sh"), *ROOT.glob("*.py"), ROOT / "simple_workflow.json"):
        shutil.copy2(door, folder)
    for room in ROOMS:
        if (ROOT / room).is_dir():
            shutil.copytree(ROOT / room, folder / room)


def copy_comfyui(folder: Path) -> None:
    """The stand-in, in the place of ComfyUI's own files."""
    shutil.copy2(CLOUD / "comfyui_standin.py", folder / "main.py")
    shutil.copy2(CLOUD / "recordings.json", folder)
