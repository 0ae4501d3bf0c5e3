"""The whole story of demo.sh. Each of its calls is checked against the policies that create_env.sh prints."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import requests
from aws_cli_server import AWS_CLI_SOCKET
from demo import CHECKPOINT, DemoError, choose_workflow, copy_real_comfyui, start_comfyui
from places import CLOUD, ROOT, TESTS
from workplace import LIMIT_S, await_that

DEMO_LIMIT_S = 900  # 40 s on a quiet machine


def shape(line: str) -> str:
    """A line of the story without its numbers, ids, bars and spaces, which differ from run to run."""
    return "".join(re.sub(r"[0-9a-f-]*\d[0-9a-f-]*|[█░]+", "#", line).split())


@pytest.mark.slow
def test_the_demo_needs_no_permission_that_the_policies_do_not_give(tmp_path: Path) -> None:
    path = f"{CLOUD}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}"
    alone = {name: value for name, value in os.environ.items() if name != AWS_CLI_SOCKET}  # as a user starts it
    ran = subprocess.run(
        [sys.executable, TESTS / "demo/demo.py", "3"],
        env=alone | {"PATH": path, "DEMO_FOLDER": str(tmp_path)},
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


@pytest.mark.slow
@pytest.mark.sampled("stories", 3)
def test_the_editor_is_there_to_play_with(tmp_path: Path) -> None:
    path = f"{CLOUD}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}"
    log = tmp_path / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, TESTS / "demo/editor_demo.py", "0"],
            env=os.environ | {"PATH": path, "TMPDIR": str(tmp_path)},
            stdout=out,
            stderr=out,
        )
    try:
        await_that(
            "serve answers",
            lambda: "answers as a ComfyUI on" in log.read_text() or process.poll() is not None,
            DEMO_LIMIT_S,
        )
        found = re.search(r"on (http://\S+)", log.read_text())
        assert found, log.read_text()
        assert "<title>ComfyUI</title>" in requests.get(found[1], timeout=LIMIT_S).text, (
            "no instance was needed for that"
        )
        saved = requests.get(f"{found[1]}/userdata?dir=workflows", timeout=LIMIT_S).json()
        assert saved == ["portrait.json", "retouch.json"]
    finally:
        process.terminate()
        code = process.wait(LIMIT_S)
    assert (code, list(tmp_path.glob("comfy-demo-*"))) == (0, []), log.read_text()


def test_of_a_real_comfyui_only_what_it_works_on_is_left_out(tmp_path: Path) -> None:
    """Further down, folders of these names are code."""
    code = [
        f"{folder}/{name}/__init__.py"
        for folder in ("comfy_api", "comfy/ldm")
        for name in ("input", "output", "models", "temp", "user")
    ]
    data = ["input/a.png", "output/a.png", "temp/a.png", "user/a.json", ".git/HEAD", "venv/pyvenv.cfg"]
    for name in (*code, *data, "models/a.safetensors", "main.py"):
        (tmp_path / "real" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "real" / name).touch()
    copy_real_comfyui(tmp_path / "real", tmp_path / "copy")
    assert [
        name for name in (*code, "models/a.safetensors", "main.py") if not (tmp_path / "copy" / name).exists()
    ] == []
    assert [name for name in data if (tmp_path / "copy" / name).exists()] == []
    assert (tmp_path / "copy/models").is_symlink()


def test_a_comfyui_that_ends_is_told_at_once_with_its_last_words(tmp_path: Path) -> None:
    service = tmp_path / "start_service.sh"
    service.write_text("#!/bin/bash\nseq 40\necho \"No module named 'torch'\"\nexit 3\n")
    service.chmod(0o755)
    machine: Any = SimpleNamespace(
        side=tmp_path,
        folder=tmp_path,
        services={},
        environment=dict,
        comfy_port=9,
        instance_id="i-1",
        is_on=lambda: True,
    )
    with pytest.raises(DemoError) as raised:
        start_comfyui(machine)
    said = str(raised.value).splitlines()
    assert said[0] == "ComfyUI on i-1 has ended with exit code 3. It said last:"
    assert said[1:] == [f"   {line}" for line in [*map(str, range(27, 41)), "No module named 'torch'"]]


def test_what_is_sent_to_a_real_comfyui_without_models_needs_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COMFYUI_DIR", raising=False)
    monkeypatch.delenv("DEMO_WORKFLOW", raising=False)
    assert choose_workflow(tmp_path) == []
    monkeypatch.setenv("COMFYUI_DIR", "x")
    (path,) = choose_workflow(tmp_path)
    assert "CheckpointLoader" not in Path(path).read_text()
    (tmp_path / "ComfyUI/models/checkpoints").mkdir(parents=True)
    (tmp_path / "ComfyUI/models/checkpoints" / CHECKPOINT).touch()
    assert choose_workflow(tmp_path) == []
    monkeypatch.setenv("DEMO_WORKFLOW", "mine.json")
    assert choose_workflow(tmp_path) == [str(Path("mine.json").resolve())]
