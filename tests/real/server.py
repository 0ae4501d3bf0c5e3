"""A real ComfyUI, started for a program here, in folders of its own."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1])]

from ground.comfyui import ComfyUI  # noqa: E402 - the path above

START_S = 300


def parser_of(about: str | None) -> argparse.ArgumentParser:
    """The arguments that all these programs take."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comfyui", type=Path, metavar="DIR", help="ComfyUI's folder")
    parser.add_argument("python", help="its Python")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="go to its main.py, such as --cpu")
    return parser


def start(
    args: argparse.Namespace, base: Path, port: int, nodes: Iterable[Path], output: Path | None = None
) -> subprocess.Popen[bytes]:
    """Start it on `base`, in which all that it works on lies, with these custom nodes; wait until it answers.

    Ends the program where it ends instead, with its last words.
    """
    comfyui = args.comfyui.resolve()
    for part in ("custom_nodes", "input", "output", "temp", "user"):
        (base / part).mkdir(parents=True, exist_ok=True)
    for module in (*nodes, comfyui / "custom_nodes/websocket_image_save.py"):
        if module.exists():
            shutil.copy2(module, base / "custom_nodes")
    command = [args.python, "main.py", "--port", str(port), "--base-directory", str(base)]
    command += ["--output-directory", str(output or base / "output"), "--database-url", "sqlite:///:memory:"]
    with (base / "comfyui.log").open("ab") as log:
        process = subprocess.Popen(
            [*command, *args.arguments], cwd=comfyui, stdout=log, stderr=log, start_new_session=True
        )
    limit = time.monotonic() + START_S
    comfy = ComfyUI(f"127.0.0.1:{port}")
    while not comfy.is_ready():
        if process.poll() is not None or time.monotonic() > limit:
            process.kill()
            sys.exit(f"ComfyUI does not answer. It said last:\n{(base / 'comfyui.log').read_text()[-2000:]}")
        time.sleep(0.2)
    return process
