"""What the gateway's tests share: serve as a process, and a client such as ComfyUI's own example of one."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import requests
import websocket
from local_cloud import free_port
from places import copy_bytecode, copy_comfyui, link_scripts
from workplace import LIMIT_S, Site, await_that

Message = dict[str, Any]
PAUSE_S = 10.0
"""Less than between two pings of a server."""


class Door:
    """A `fleet.py serve` of a site, as a process."""

    def __init__(
        self,
        site: Site,
        name: str = "serve",
        *arguments: str,
        more: dict[str, str] | None = None,
        changes: dict[str, float] | None = None,
    ) -> None:
        """`more` is for its environment, beside that of the site; `changes` are constants of serve.py."""
        self.site = site
        code = f"import sys, fleet, operate.gateway.serve as room; vars(room).update({changes or {}}); sys.exit(fleet.main(sys.argv[1:]))"
        self.more = more or {}
        self.log = site.folder / f"{name}.log"
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-c", code, "serve", "--port", "0", *arguments],
                cwd=site.folder,
                env=site.environment() | (more or {}),
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        site.processes.append(self.process)
        found = await_that("serve answers", self._said)
        assert isinstance(found, re.Match), f"serve has ended: {self.log.read_text()}"
        self.url = found[0]
        self.address = found[1]

    def _said(self) -> Any:
        return re.search(r"http://(\S+:\d+)", self.log.read_text()) or self.process.poll() is not None

    def kill(self) -> None:
        """End it as a lost machine does."""
        self.process.kill()
        self.process.wait()


class Client:
    """Somebody who knows a ComfyUI at an address."""

    def __init__(self, address: str, client_id: str | None = None) -> None:
        self.address = address
        self.client_id = client_id or str(uuid.uuid4())
        self.messages: list[Message] = []
        self._socket: websocket.WebSocket | None = None

    def listen(self) -> None:
        """Open the websocket, and read its greeting."""
        url = f"ws://{self.address}/ws?clientId={self.client_id}"
        self._socket = websocket.create_connection(url, timeout=PAUSE_S)
        assert self.next()["type"] == "status"

    def hang_up(self) -> None:
        if self._socket:
            self._socket.close()
            self._socket = None

    def next(self) -> Message:
        """The next message that is no picture."""
        assert self._socket is not None
        end, text = time.monotonic() + LIMIT_S, None
        while not isinstance(text, str):
            assert time.monotonic() < end, f"nothing more was said; so far: {self.messages[-20:]}"
            with suppress(websocket.WebSocketTimeoutException):  # a ping begins its time anew
                text = self._socket.recv()
        if not text:
            raise ConnectionError("the server has closed the websocket")
        message: Message = json.loads(text)
        self.messages.append(message)
        return message

    def hear(self, job_id: str) -> list[Message]:
        """All messages up to the job's end."""
        heard = [self.next()]
        while not (heard[-1]["type"] == "executing" and heard[-1]["data"] == {"node": None, "prompt_id": job_id}):
            heard.append(self.next())
        return heard

    def call(self, method: str, path: str, **more: Any) -> requests.Response:
        return requests.request(method, f"http://{self.address}{path}", timeout=LIMIT_S, **more)

    def get(self, path: str, **query: Any) -> Any:
        """The JSON that a path answers."""
        answer = self.call("GET", path, params=query)
        assert answer.status_code == 200, (path, answer.status_code, answer.text[:500])
        return answer.json()

    def post(self, workflow: Any, **more: Any) -> requests.Response:
        return self.call("POST", "/prompt", json={"prompt": workflow, "client_id": self.client_id, **more})

    def run(self, workflow: Any, **more: Any) -> str:
        """Post a workflow that is right, and return its id."""
        answer = self.post(workflow, **more)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["prompt_id"])

    def history(self, job_id: str) -> dict[str, Any]:
        """The job's entry, when it has ended."""
        entry: dict[str, Any] = await_that(
            f"{job_id} is in the history", lambda: self.get(f"/history/{job_id}").get(job_id)
        )
        return entry

    def view(self, file: dict[str, Any], **headers: str) -> requests.Response:
        """A file as the history names it."""
        return self.call("GET", "/view", params=file, headers=headers)


def start_instance(site: Site, folder: Path) -> list[subprocess.Popen[bytes]]:
    """One more instance on a site's environment, in a folder of its own: a ComfyUI and a worker.

    When it is killed its last long poll still stands, and may take what the next test sends: that comes back soon.
    """
    for part in ("logs", "job-output", "ComfyUI/input", "ComfyUI/output", "ComfyUI/models/checkpoints"):
        (folder / part).mkdir(parents=True)
    link_scripts(folder)
    copy_bytecode(folder)
    copy_comfyui(folder / "ComfyUI")
    (folder / "ComfyUI/models/checkpoints/v1-5-pruned-emaonly-fp16.safetensors").touch()
    (folder / "ComfyUI/input/broken.png").write_text("no picture")
    port = free_port()
    text = (site.folder / "env").read_text().replace(f"127.0.0.1:{site.port}", f"127.0.0.1:{port}")
    (folder / "env").write_text(f"{text}VISIBILITY_TIMEOUT=30\n")
    environment = site.environment() | {"LOCAL_INSTANCE_DIR": str(folder)}
    out = str(folder / "job-output")
    started = []
    for command in (["ComfyUI/main.py", "--port", str(port), "--output-directory", out], ["parse_job.py"]):
        with (folder / "log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, *command], cwd=folder, env=environment, stdout=log, stderr=log
            )
        started.append(process)
    return started


def types_of(messages: Sequence[Message]) -> list[str]:
    return [message["type"] for message in messages]
