"""A ComfyUI to test, and a client of it: the stand-in, or the real server at COMFY_ADDRESS."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import websocket
from PIL import Image
from places import CLOUD, ROOT, copy_comfyui

JSON = dict[str, Any]

RECORDINGS: JSON = json.loads((CLOUD / "recordings.json").read_text(encoding="utf-8"))
REAL_ADDRESS = os.environ.get("COMFY_ADDRESS")
CHECKPOINT = "v1-5-pruned-emaonly-fp16.safetensors"
LIMIT_SECONDS = 60

standin_only = pytest.mark.skipif(
    REAL_ADDRESS is not None, reason="about the stand-in, not the server at COMFY_ADDRESS"
)


class Server:
    """A running server, the stand-in or a real one."""

    def __init__(self, address: str) -> None:
        self.address = address

    def call(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """Make a call; return its status and its body, parsed where it is JSON."""
        data = body if isinstance(body, str) else None
        response = requests.request(
            method, f"http://{self.address}{path}", data=data, json=None if data else body, timeout=LIMIT_SECONDS
        )
        is_json = response.headers.get("Content-Type", "").startswith("application/json")
        return response.status_code, response.json() if is_json else response.text

    def submit(self, prompt: JSON, **extra: Any) -> str:
        """Queue a prompt that must be accepted; return its id."""
        status, body = self.call("POST", "/prompt", {"prompt": prompt, **extra})
        assert status == 200, body
        return str(body["prompt_id"])

    def history(self, prompt_id: str) -> JSON:
        """Wait until a prompt has ended; return its history."""
        wait_for(lambda: self.call("GET", f"/history/{prompt_id}")[1], f"history of {prompt_id}")
        entry: JSON = self.call("GET", f"/history/{prompt_id}")[1][prompt_id]
        return entry

    def run(self, prompt: JSON, **extra: Any) -> JSON:
        """Run a prompt to its end; return its history."""
        return self.history(self.submit(prompt, **extra))

    def queue(self) -> tuple[list[str], list[str]]:
        """Return the ids of what runs and of what waits."""
        body = self.call("GET", "/queue")[1]
        return [job[1] for job in body["queue_running"]], [job[1] for job in body["queue_pending"]]

    def upload(self, name: str, content: bytes, **fields: str) -> requests.Response:
        """Upload an input file."""
        url = f"http://{self.address}/upload/image"
        return requests.post(url, files={"image": (name, content)}, data=fields, timeout=LIMIT_SECONDS)


class Standin(Server):
    """The stand-in in a folder of its own, started as the base machine starts ComfyUI."""

    def __init__(self, folder: Path, *arguments: str, **environment: str) -> None:
        self.folder = folder
        copy_comfyui(folder)
        checkpoints = folder / "models" / "checkpoints"
        checkpoints.mkdir(parents=True, exist_ok=True)
        (checkpoints / CHECKPOINT).touch()
        self.ledger = folder / "ledger.jsonl"
        self.log = folder / "comfyui.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "main.py", "--port", "0", *arguments],
                cwd=folder,
                stderr=log,
                env=os.environ | {"STANDIN_STEP_SECONDS": "0.01", "STANDIN_LEDGER": str(self.ledger)} | environment,
            )
        pattern = re.compile(r"To see the GUI go to: http://(\S+)")
        wait_for(lambda: pattern.search(self.log.read_text()) or self.process.poll() is not None, "the server")
        match = pattern.search(self.log.read_text())
        assert match, self.log.read_text()
        super().__init__(match[1])

    def entries(self) -> list[JSON]:
        """Read the ledger."""
        return [json.loads(line) for line in self.ledger.read_text().splitlines()]

    def stop(self) -> None:
        """End the server, if it has not ended."""
        self.process.terminate()
        self.process.wait(LIMIT_SECONDS)


class Client:
    """A websocket and what it has heard; binary frames are kept apart."""

    def __init__(self, server: Server, client_id: str | None = None) -> None:
        self.id = client_id or str(uuid.uuid4())
        self.messages: list[JSON] = []
        self.previews: list[bytes] = []
        url = f"ws://{server.address}/ws?clientId={self.id}"
        self.socket = websocket.create_connection(url, timeout=LIMIT_SECONDS)

    def read(self) -> JSON:
        """Return the next message."""
        while isinstance(frame := self.socket.recv(), bytes):
            self.previews.append(frame)
        self.messages.append(json.loads(frame))
        return self.messages[-1]

    def read_until(self, kind: str, **data: Any) -> list[JSON]:
        """Read until a message with these data has come; return all that were heard on this socket."""
        while not any(m["type"] == kind and data.items() <= m["data"].items() for m in self.messages):
            self.read()
        return self.messages

    def read_to_end(self, prompt_id: str) -> list[JSON]:
        """Read until a prompt has ended; return all messages heard on this socket."""
        return self.read_until("executing", node=None, prompt_id=prompt_id)

    def read_what_is_there(self) -> list[JSON]:
        """Return what the server has sent until it answers a ping."""
        heard: list[JSON] = []
        self.socket.ping("anything more?")
        while True:
            opcode, frame = self.socket.recv_data(control_frame=True)
            if opcode == websocket.ABNF.OPCODE_PONG:
                return heard
            heard.append(json.loads(frame))

    def close(self) -> None:
        """Close with a handshake, so that the server has noticed."""
        self.socket.close()


def wait_for(condition: Callable[[], Any], what: str) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + LIMIT_SECONDS
    while not condition():
        assert time.monotonic() < end, f"no {what} within {LIMIT_SECONDS} seconds"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The server under test, with the input files of the recordings."""
    standin = None if REAL_ADDRESS else Standin(tmp_path_factory.mktemp("ComfyUI"), STANDIN_NODE_SECONDS="0.1")
    server = standin or Server(str(REAL_ADDRESS))
    assert server.upload("broken.png", b"no picture", overwrite="true").status_code == 200
    assert server.upload("example.png", make_png(), overwrite="true").status_code == 200
    yield server
    if standin:
        standin.stop()


@pytest.fixture(autouse=True)
def idle(request: pytest.FixtureRequest) -> None:
    """Let what the test before left running come to its end: its messages are not for this one."""
    if "server" in request.fixturenames:
        server: Server = request.getfixturevalue("server")
        wait_for(lambda: server.queue() == ([], []), "empty queue")


@pytest.fixture
def standin(server: Server) -> Standin:
    """The shared stand-in."""
    assert isinstance(server, Standin)
    return server


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Standin]]:
    """Start stand-ins for one test alone."""
    started: list[Standin] = []

    def start_one(*arguments: str, **environment: str) -> Standin:
        started.append(Standin(tmp_path, *arguments, **environment))
        return started[-1]

    yield start_one
    for each in started:
        each.stop()


def make_png() -> bytes:
    """Make a small picture."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "PNG")
    return buffer.getvalue()


def save_workflow(prefix: str = "x", color: int | None = None) -> JSON:
    """Make a workflow that saves one image; by default one that no cache knows."""
    color = uuid.uuid4().int % 0xFFFFFF if color is None else color
    size = {"width": 64, "height": 64, "batch_size": 1}
    return {
        "1": {"class_type": "EmptyImage", "inputs": {**size, "color": color}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": prefix}},
    }


def standin_workflow(class_type: str, **inputs: Any) -> JSON:
    """Make a workflow that passes an image through one of the stand-in's own nodes."""
    workflow = save_workflow()
    workflow["2"]["inputs"]["images"] = ["3", 0]
    workflow["3"] = {"class_type": class_type, "inputs": {"image": ["1", 0], **inputs}}
    return workflow


def draw_workflow(seed: int, size: int = 64, steps: int = 2) -> JSON:
    """Make the demo workflow, small and with a seed."""
    workflow: JSON = json.loads((ROOT / "simple_workflow.json").read_text(encoding="utf-8"))
    workflow["3"]["inputs"] |= {"seed": seed, "steps": steps}
    workflow["5"]["inputs"] |= {"width": size, "height": size}
    return workflow


def empty_cache(server: Server) -> None:
    """Have the server forget what earlier prompts, or earlier test runs, left in its cache."""
    server.call("POST", "/free", {"free_memory": True})
    server.run(save_workflow("purge"))
    wait_for(lambda: server.queue() == ([], []), "empty queue")
