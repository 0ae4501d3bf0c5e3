#!/usr/bin/env python3
"""An honest stand-in for ComfyUI: its protocol word for word, small drawn pictures instead of models.

Copied as ComfyUI/main.py into a base folder, with recordings.json (what a real server answered) beside
it, and started like ComfyUI's own main.py; arguments it does not know are ignored. It logs to stderr, as
ComfyUI does, and needs aiohttp and Pillow. test_comfyui_standin.py holds it, or a real server, against
every recorded case.

Its own nodes, for tests: StandinSleep (slow, silent, interruptible; with `until`, the path of a file, its seconds begin
when there is one), StandinOutOfMemory (fails `times`
times in this server's life; without `times` always), StandinFullDisk (likewise, as a saver on a full disk),
StandinCrash (the process dies after `seconds`; with `once`, the path of a file that it makes, only where there is
none), StandinDeadExecutor
(its thread does), StandinBlock (an ExecutionBlocker's message), StandinShow (writes the files it is given and says in
history what it is told to), StandinText (gives a text), StandinSaveBlind (a saver that makes no folder and swallows its
error, as WAS Image Save), StandinPassPreview (shows a picture in temp/ and passes it on),
StandinApi (a node that has a key and lets it out: in a `text`, in an `error`, or as a `block`). Like any node they are
served from cache unless an input differs.

Environment: STANDIN_STEP_SECONDS for a KSampler step (0.05), STANDIN_NODE_SECONDS for an ImageBlur (0),
STANDIN_BOOT_SECONDS before it listens (0), STANDIN_LEDGER a file that gets one JSON line whenever a
prompt starts and ends, and when one ends the process.

Calls of its own: POST /standin/cut-sockets cuts every websocket as a broken line does; POST /standin/sockets
with {"mode": ...} has them "refuse" (503, as a proxy that knows none), "mute" (nothing is ever sent), "close"
(after each message), or "open" again.
"""

import argparse
import asyncio
import bisect
import colorsys
import contextlib
import copy
import errno
import functools
import hashlib
import io
import json
import logging
import math
import mimetypes
import os
import platform
import random
import re
import shutil
import signal
import socket
import struct
import sys
import textwrap
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from aiohttp import web
from PIL import Image, ImageDraw, ImageFont, ImageOps, ImageSequence
from PIL.PngImagePlugin import PngInfo

JSON = dict[str, Any]

HISTORY_DELAY_SECONDS = 0.02  # a real server, too, writes history after it has sent execution_success
HISTORY_LIMIT = 10_000
MAX_UPLOAD_BYTES = 100 * 1024**2
MAX_PICTURE_PIXELS = 512
MODEL_SUFFIXES = {".ckpt", ".safetensors", ".sft", ".pt", ".pt2", ".pth", ".bin", ".pkl"}
SECRETS = ("auth_token_comfy_org", "api_key_comfy_org")  # parts of extra_data that are never shown
OUT_OF_MEMORY_TIPS = (
    "This error means you ran out of memory on your GPU.\n\n"
    "TIPS: If the workflow worked before you might have accidentally set the batch_size to a large number."
)


@dataclass(frozen=True)
class Settings:
    """Where files lie and how slow the nodes are."""

    folders: dict[str, Path]  # by the types that /view knows: output, input, temp
    models: Path
    metadata: bool
    step_seconds: float
    node_seconds: float
    ledger: str | None


class Job(NamedTuple):
    """A prompt as /queue and /history show it."""

    number: float
    prompt_id: str
    prompt: JSON
    extra_data: Any
    outputs: list[str]


# --- HTTP and websocket ----------------------------------------------------------------------------


class Server:
    """The calls, the sockets, and the one loop that sends to them in order."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.loop = asyncio.get_running_loop()
        self.outbox: asyncio.Queue[tuple[str | int, Any, str | None]] = asyncio.Queue()
        self.sockets: dict[str, web.WebSocketResponse] = {}
        self.socket_mode = "open"
        self.number = 0
        self.client_id: str | None = None  # of the prompt that runs, or ran last
        self.last_node_id: str | None = None
        self.executor = Executor(self, settings)
        nodes = settings.models.parent / "custom_nodes"
        self.web_folders = {path.parent.name: path for path in nodes.glob("*/web") if path.is_dir()}
        """The web files of custom nodes, whose WEB_DIRECTORY is ./web."""

    def app(self) -> web.Application:
        """Make the application; every call is served under /api/, too."""
        app = web.Application(client_max_size=MAX_UPLOAD_BYTES)
        for prefix in ("", "/api"):
            app.router.add_get(prefix + "/ws", self.websocket)
            app.router.add_get(prefix + "/prompt", self.get_prompt)
            app.router.add_post(prefix + "/prompt", self.post_prompt)
            app.router.add_get(prefix + "/history", self.get_history)
            app.router.add_get(prefix + "/history/{prompt_id}", self.get_history)
            app.router.add_post(prefix + "/history", self.post_history)
            app.router.add_get(prefix + "/queue", self.get_queue)
            app.router.add_post(prefix + "/queue", self.post_queue)
            app.router.add_post(prefix + "/interrupt", self.post_interrupt)
            app.router.add_post(prefix + "/free", self.post_free)
            app.router.add_post(prefix + "/upload/image", self.upload_image)
            app.router.add_get(prefix + "/view", self.view)
            app.router.add_get(prefix + "/system_stats", self.system_stats)
            app.router.add_get(prefix + "/object_info", self.object_info)
            app.router.add_get(prefix + "/object_info/{name}", self.object_info)
            app.router.add_get(prefix + "/extensions", self.extensions)
            app.router.add_get(prefix + "/global_subgraphs", self.subgraphs)
            app.router.add_get(prefix + "/global_subgraphs/{id}", self.subgraphs)
        for name, folder in self.web_folders.items():
            app.router.add_static(f"/extensions/{name}", folder)
        app.router.add_get("/", self.index)
        app.router.add_post("/standin/cut-sockets", self.cut_sockets)
        app.router.add_post("/standin/sockets", self.change_sockets)
        return app

    def send(self, event: str | int, data: Any, client_id: str | None = None) -> None:
        """Send to one client's socket, or to all; from any thread. What nobody is there to hear is lost."""
        self.loop.call_soon_threadsafe(self.outbox.put_nowait, (event, data, client_id))

    def send_status(self) -> None:
        """Tell everybody how long the queue is."""
        self.send("status", self.status())

    def status(self) -> JSON:
        """Return how long the queue is, in the shape of a `status` message."""
        running, pending = self.executor.snapshot()
        return {"status": {"exec_info": {"queue_remaining": len(running) + len(pending)}}}

    async def publish(self) -> None:
        """Send what the outbox holds, for ever."""
        while True:
            await self.deliver(*await self.outbox.get())

    async def deliver(self, event: str | int, data: Any, client_id: str | None) -> None:
        """Send one message now; an event that is a number makes a binary frame."""
        for each in [each for sid, each in self.sockets.items() if client_id in (None, sid)]:
            if self.socket_mode == "mute":
                continue
            with contextlib.suppress(ConnectionError):
                if isinstance(event, int):
                    await each.send_bytes(struct.pack(">I", event) + data)
                else:
                    await each.send_json({"type": event, "data": data})
                if self.socket_mode == "close":
                    await each.close()

    async def websocket(self, request: web.Request) -> web.WebSocketResponse:
        """Greet a client; if its prompt is running, name the node that is at work."""
        if self.socket_mode == "refuse":
            raise web.HTTPServiceUnavailable
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        sid = request.query.get("clientId", "") or uuid.uuid4().hex
        self.sockets[sid] = socket
        try:
            await self.deliver("status", {**self.status(), "sid": sid}, sid)
            if self.client_id == sid and self.last_node_id is not None:
                await self.deliver("executing", {"node": self.last_node_id}, sid)
            async for _ in socket:
                pass
        finally:
            self.sockets.pop(sid, None)  # even if a newer socket of the same clientId stands there by now
        return socket

    async def index(self, _: web.Request) -> web.Response:
        return web.Response(text="A stand-in for ComfyUI: see comfyui_standin.py\n")

    async def cut_sockets(self, _: web.Request) -> web.Response:
        """Cut every websocket without a closing frame."""
        for websocket in list(self.sockets.values()):
            connection = websocket.get_extra_info("socket")
            if connection is not None:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
        return web.Response()

    async def change_sockets(self, request: web.Request) -> web.Response:
        """Be one whose websockets are of no use, or of use again."""
        self.socket_mode = (await request.json())["mode"]
        return web.Response()

    async def get_prompt(self, _: web.Request) -> web.Response:
        return web.json_response(self.status()["status"])

    async def post_prompt(self, request: web.Request) -> web.Response:
        """Check a prompt and queue it. What is no JSON, or no workflow at all, raises: aiohttp answers 500."""
        logging.info("got prompt")
        body = await request.json()
        if "number" in body:
            number = float(body["number"])
        else:
            number = -self.number if body.get("front") else self.number
            self.number += 1
        if "prompt" not in body:
            return refuse(make_error("no_prompt", "No prompt provided", "No prompt provided"))
        prompt_id = body.get("prompt_id")
        if prompt_id is None:
            prompt_id = str(uuid.uuid4())
        elif not is_canonical_uuid(prompt_id):
            details = "prompt_id must be a UUID string in canonical lowercase hyphenated form; "
            details += "omit it to let the server generate one"
            return refuse(make_error("invalid_prompt_id", "prompt_id must be a valid UUID", details))
        outputs, error, node_errors = Validation(body["prompt"], self.settings).run()
        extra_data = body.get("extra_data", {})
        if "client_id" in body:
            extra_data["client_id"] = body["client_id"]
        if error:
            logging.warning("invalid prompt: %s", error)
            return refuse(error, node_errors)
        if extra_data is not None:
            self.executor.secrets[prompt_id] = {key: extra_data[key] for key in SECRETS if key in extra_data}
            extra_data = {key: value for key, value in extra_data.items() if key not in SECRETS}
            extra_data["create_time"] = now_ms()
        self.executor.put(Job(number, prompt_id, body["prompt"], extra_data, outputs))
        return web.json_response({"prompt_id": prompt_id, "number": number, "node_errors": node_errors})

    async def get_history(self, request: web.Request) -> web.Response:
        prompt_id = request.match_info.get("prompt_id")
        history = self.executor.history.copy()
        if prompt_id is not None:
            history = {prompt_id: history[prompt_id]} if prompt_id in history else {}
        elif "max_items" in request.query:
            count, first = int(request.query["max_items"]), int(request.query.get("offset", "-1"))
            first = max(len(history) - count, 0) if first < 0 else first
            history = dict(list(history.items())[first : first + count])
        return web.json_response(history)

    async def post_history(self, request: web.Request) -> web.Response:
        body = await request.json()
        for prompt_id in list(self.executor.history) if body.get("clear") else body.get("delete", []):
            self.executor.history.pop(prompt_id, None)
        return web.Response()

    async def get_queue(self, _: web.Request) -> web.Response:
        running, pending = self.executor.snapshot()
        return web.json_response({"queue_running": running, "queue_pending": pending})

    async def post_queue(self, request: web.Request) -> web.Response:
        body = await request.json()
        if body.get("clear"):
            self.executor.pending.clear()
            self.send_status()
        for prompt_id in body.get("delete", []):
            self.executor.delete(prompt_id)
        return web.Response()

    async def post_interrupt(self, request: web.Request) -> web.Response:
        """Interrupt what runs; with a prompt_id only if that is the one."""
        try:
            prompt_id = (await request.json()).get("prompt_id")
        except json.JSONDecodeError:
            prompt_id = None
        running, _ = self.executor.snapshot()
        if not prompt_id or any(job.prompt_id == prompt_id for job in running):
            self.executor.interrupt.set()
        return web.Response()

    async def post_free(self, request: web.Request) -> web.Response:
        if (await request.json()).get("free_memory"):
            self.executor.free_cache()
        return web.Response()

    async def upload_image(self, request: web.Request) -> web.Response:
        """Store a file; a second one of that name, with other content, becomes `name (1).png`."""
        form = await request.post()
        image = form.get("image")
        if not isinstance(image, web.FileField) or not image.filename:
            return web.Response(status=400)
        kind, subfolder = str(form.get("type", "input")), str(form.get("subfolder", ""))
        root, name = self.settings.folders[kind], Path(image.filename)
        if not is_inside(root, root / subfolder / name):
            return web.Response(status=400)
        content = image.file.read()
        path = root / subfolder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        count = 0
        while form.get("overwrite") not in ("true", "1") and path.exists() and path.read_bytes() != content:
            count += 1
            path = path.with_name(f"{name.stem} ({count}){name.suffix}")
        path.write_bytes(content)
        return web.json_response({"name": path.name, "subfolder": subfolder, "type": kind})

    async def view(self, request: web.Request) -> web.StreamResponse:
        name = request.query.get("filename")
        if name is None:
            return web.Response(status=404)
        root = self.settings.folders.get(request.query.get("type", "output"))
        if not name or name.startswith("/") or ".." in name or root is None:
            return web.Response(status=400)
        folder = root / request.query.get("subfolder", "")
        if not is_inside(root, folder):
            return web.Response(status=403)
        path = folder / Path(name).name
        if not path.is_file():
            return web.Response(status=404)
        return web.FileResponse(path, headers={"Content-Disposition": f'filename="{path.name}"'})

    async def system_stats(self, _: web.Request) -> web.Response:
        """Answer what was recorded, with what is true here."""
        stats = copy.deepcopy(load_recordings()["system_stats"]["body"])
        stats["system"] |= {"python_version": platform.python_version(), "argv": sys.argv}
        stats["system"]["pytorch_version"] = "stand-in"
        with contextlib.suppress(metadata.PackageNotFoundError):  # as one whose requirements are installed
            stats["system"]["required_frontend_version"] = metadata.version("comfyui-frontend-package")
        return web.json_response(stats)

    async def extensions(self, _: web.Request) -> web.Response:
        """List the scripts of the editor, of which there are none but one, and those of custom nodes."""
        found = [
            f"/extensions/{quote(name)}/{path.relative_to(folder).as_posix()}"
            for name, folder in self.web_folders.items()
            for path in folder.rglob("*.js")
        ]
        return web.json_response(["/extensions/core/groupNode.js", *found])

    async def subgraphs(self, request: web.Request) -> web.Response:
        """List one subgraph, or give it whole."""
        entry = {"source": "templates", "name": "Blur", "info": {"node_pack": "comfyui"}}
        if "id" not in request.match_info:
            return web.json_response({"a1": entry})
        status = 200 if request.match_info["id"] == "a1" else 404
        return web.json_response(entry | {"data": json.dumps(BLUEPRINT)}, status=status)

    async def object_info(self, request: web.Request) -> web.Response:
        names = [name for name in NODES if request.match_info.get("name", name) == name]
        return web.json_response({name: describe_node(name, self.settings) for name in names})


BLUEPRINT = {
    "version": 0.4,
    "last_node_id": 1,
    "last_link_id": 0,
    "nodes": [
        {"id": 1, "type": "5f0b3c1e-8d0a-4a51-9d0e-2a8f0c6f7b11", "pos": [0, 0], "size": [200, 100], "flags": {}, "order": 0,
         "mode": 0, "inputs": [], "outputs": [], "properties": {}, "widgets_values": []}
    ],
    "links": [],
    "groups": [],
    "definitions": {
        "subgraphs": [
            {"id": "5f0b3c1e-8d0a-4a51-9d0e-2a8f0c6f7b11", "version": 1, "revision": 0, "config": {}, "name": "Blur",
             "state": {"lastGroupId": 0, "lastNodeId": 0, "lastLinkId": 0, "lastRerouteId": 0},
             "inputNode": {"id": -10, "bounding": [0, 0, 120, 60]}, "outputNode": {"id": -20, "bounding": [400, 0, 120, 60]},
             "inputs": [], "outputs": [], "widgets": [], "nodes": [], "groups": [], "links": [], "extra": {}}
        ]
    },
    "extra": {},
}  # fmt: skip
"""A workflow of one node, which is a subgraph: the editor refuses one without."""


def refuse(error: JSON, node_errors: JSON | None = None) -> web.Response:
    """Make the answer to a prompt that is not queued."""
    return web.json_response({"error": error, "node_errors": node_errors or {}}, status=400)


def is_canonical_uuid(value: object) -> bool:
    """Tell whether newer servers accept this prompt_id."""
    try:
        return isinstance(value, str) and str(uuid.UUID(value)) == value
    except ValueError:
        return False


def is_inside(root: Path, path: Path) -> bool:
    """Tell whether a path stays under the root, by its text alone: the folders may be links."""
    return os.path.commonpath([root, os.path.abspath(path)]) == str(root)  # noqa: PTH100 - no resolve()


def locate_input(settings: Settings, name: str) -> Path:
    """Find a file named as LoadImage names it: in input/, unless it ends in [output], [input] or [temp]."""
    for place in ("output", "input", "temp"):
        if name.endswith(f"[{place}]"):
            return settings.folders[place] / name[: -len(f" [{place}]")]  # a blank is taken off without a look
    return settings.folders["input"] / name


def now_ms() -> int:
    """Return the time as ComfyUI stamps it."""
    return int(time.time() * 1000)


# --- Queue and execution ---------------------------------------------------------------------------


class InterruptedByUserError(Exception):
    """Somebody posted /interrupt."""


class OutOfMemoryError(RuntimeError):
    """What a GPU without memory raises, under the name it has there."""

    __module__ = "torch"


class Cached(NamedTuple):
    """What a node returned, kept under the digest of its inputs."""

    outputs: list[Any]
    ui: JSON
    meta: JSON


class Executor(threading.Thread):
    """The queue, and the one thread that runs prompts from it, one after another."""

    def __init__(self, server: Server, settings: Settings) -> None:
        super().__init__(name="executor", daemon=True)
        self.server = server
        self.settings = settings
        self.changed = threading.Condition(threading.RLock())
        self.pending: list[Job] = []
        self.running: list[Job] = []
        self.history: dict[str, JSON] = {}
        self.cache: dict[str, Cached] = {}
        self.secrets: dict[str, JSON] = {}  # what nodes see of extra_data and nobody else
        self.free_memory = False
        self.interrupt = threading.Event()
        self.out_of_memory_count = self.full_disk_count = 0

    def put(self, job: Job) -> None:
        """Queue a prompt by its number."""
        with self.changed:
            bisect.insort(self.pending, job, key=lambda each: each.number)
            self.server.send_status()
            self.changed.notify()

    def delete(self, prompt_id: str) -> None:
        """Take a waiting prompt out of the queue without a trace."""
        with self.changed:
            for job in [job for job in self.pending if job.prompt_id == prompt_id][:1]:
                self.pending.remove(job)
                self.server.send_status()
                if not self.pending:
                    self.server.send_status()  # ComfyUI, too, tells it twice when the last one goes

    def snapshot(self) -> tuple[list[Job], list[Job]]:
        """Return what runs and what waits."""
        with self.changed:
            return list(self.running), list(self.pending)

    def free_cache(self) -> None:
        """Empty the cache as soon as nothing runs."""
        with self.changed:
            self.free_memory = True
            self.changed.notify()

    def run(self) -> None:
        """Run prompts for ever. An exception in here ends the thread while HTTP stays up, as in ComfyUI."""
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.pending or self.free_memory)
                job = self.pending.pop(0) if self.pending else None
                if job:
                    self.running.append(copy.deepcopy(job))
                    self.server.send_status()
            if job:
                self.run_job(job)
            if self.free_memory:
                self.cache, self.free_memory = {}, False

    def run_job(self, job: Job) -> None:
        """Run one prompt and move it into history."""
        started = time.monotonic()
        self.interrupt.clear()
        # `in None` raises: this is how `extra_data: null` without a client id kills ComfyUI's thread
        self.server.client_id = job.extra_data["client_id"] if "client_id" in job.extra_data else None  # noqa: SIM401
        self.write_ledger("start", job.prompt_id)
        run = Run(self, job)
        ending = run.execute()
        self.server.last_node_id = None
        self.write_ledger(ending, job.prompt_id)
        time.sleep(HISTORY_DELAY_SECONDS)
        success = ending == "success"
        status = {"status_str": "success" if success else "error", "completed": success, "messages": run.messages}
        shown = {node_id: entry for node_id in job.prompt if (entry := run.cached(node_id)) and entry.ui}
        with self.changed:
            self.history.pop(job.prompt_id, None)
            self.history[job.prompt_id] = {
                "prompt": self.running.pop(),
                "outputs": {node_id: entry.ui for node_id, entry in shown.items()},
                "status": status,
                "meta": {node_id: entry.meta for node_id, entry in shown.items()},
            }
            while len(self.history) > HISTORY_LIMIT:
                self.history.pop(next(iter(self.history)))
            self.server.send_status()
        run.tell("executing", {"node": None})
        logging.info("Prompt executed in %.2f seconds", time.monotonic() - started)

    def check_interrupt(self) -> None:
        """Raise if somebody asked to stop."""
        if self.interrupt.is_set():
            self.interrupt.clear()
            raise InterruptedByUserError

    def write_ledger(self, event: str, prompt_id: str) -> None:
        """Note a start or an end where tests can count them, across restarts and servers."""
        if self.settings.ledger:
            here = str(Path(__file__).parent)
            entry = {"event": event, "prompt_id": prompt_id, "pid": os.getpid(), "folder": here, "time": time.time()}
            ledger = os.open(self.settings.ledger, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            os.write(ledger, (json.dumps(entry) + "\n").encode())
            os.close(ledger)


class Run:
    """One prompt's execution: which node is next, and what is told about it."""

    def __init__(self, executor: Executor, job: Job) -> None:
        self.executor = executor
        self.settings = executor.settings
        self.server = executor.server
        self.job = job
        self.nodes = job.prompt
        self.prompt_id = job.prompt_id
        self.messages: list[list[Any]] = []  # those that history keeps
        self.progress: dict[str, JSON] = {}
        self.executed: list[str] = []
        self.digests: dict[str, str] = {}
        self.waits: dict[str, set[str]] = {}  # node still to visit -> the inputs it waits for
        self.feeds: dict[str, set[str]] = {}  # node still to visit -> the nodes that wait for it

    def execute(self) -> str:
        """Run all nodes; return `success`, `error` or `interrupted`."""
        self.announce("execution_start", {"prompt_id": self.prompt_id})
        digests = {self.digest(node_id) for node_id in self.nodes}
        # the cache reaches back to the previous prompt: what this one cannot use is dropped
        self.executor.cache = {key: entry for key, entry in self.executor.cache.items() if key in digests}
        cached = [node_id for node_id in self.nodes if self.cached(node_id)]
        self.announce("execution_cached", {"nodes": cached, "prompt_id": self.prompt_id})
        for node_id in self.job.outputs:
            self.plan(node_id)
        while self.waits:
            ready = [node_id for node_id, waits in self.waits.items() if not waits]
            node_id = min(ready, key=self.steps_to_output)
            where: JSON = {"prompt_id": self.prompt_id, "node_id": node_id}
            where |= {"node_type": self.nodes[node_id]["class_type"], "executed": self.executed}
            try:
                self.visit(node_id)
            except InterruptedByUserError:
                self.announce("execution_interrupted", where, everyone=True)
                return "interrupted"
            except Exception as error:  # a node may raise anything
                logging.exception("!!! Exception during processing !!!")
                self.announce("execution_error", where | self.describe_error(node_id, error))
                return "error"
            del self.waits[node_id]
            for fed in self.feeds.pop(node_id):
                self.waits[fed].discard(node_id)
        self.announce("execution_success", {"prompt_id": self.prompt_id})
        return "success"

    def plan(self, output_id: str) -> None:
        """Note an output node and every node it needs that is not cached, in ComfyUI's order of discovery."""
        stack = [output_id]
        while stack:
            node_id = stack.pop()
            if node_id not in self.waits:
                links = [value[0] for value in self.nodes[node_id]["inputs"].values() if is_link(value)]
                needed = [source for source in links if not self.cached(source)]
                self.waits[node_id] = set(needed)
                self.feeds.setdefault(node_id, set())
                for source in needed:
                    self.feeds.setdefault(source, set()).add(node_id)
                stack += needed

    def steps_to_output(self, node_id: str) -> int:
        """Count the steps to an output node, at most 3: nearer ones run first, as in ComfyUI."""
        reached = {node_id}
        for steps in range(3):
            if any(is_output(self.nodes[each]) for each in reached):
                return steps
            reached = {fed for each in reached for fed in self.feeds[each]}
        return 3

    def visit(self, node_id: str) -> None:
        """Run a node, or tell again what it showed when it ran for the prompt before."""
        names = {"node": node_id, "display_node": node_id}
        entry = self.cached(node_id)
        if entry:
            self.tell("executed", {**names, "output": entry.ui or None})
            self.update_progress(node_id, "finished")
            return
        self.update_progress(node_id, "running", 0.0, 1.0)
        if self.server.client_id is not None:
            self.server.last_node_id = node_id
        self.tell("executing", names)
        self.executor.check_interrupt()
        class_type, inputs = self.nodes[node_id]["class_type"], self.gather_inputs(node_id)
        if unknown := inputs.keys() - self.known_inputs(node_id):
            raise TypeError(f"{class_type}.run() got an unexpected keyword argument '{min(unknown)}'")
        outputs, ui = NODES[class_type].run(Call(self, node_id, inputs))
        if ui:
            self.tell("executed", {**names, "output": ui})
        meta = {"node_id": node_id, "display_node": node_id, "parent_node": None, "real_node_id": node_id}
        self.executor.cache[self.digests[node_id]] = Cached(outputs, ui, meta)
        self.update_progress(node_id, "finished")
        self.executed.append(node_id)

    def gather_inputs(self, node_id: str) -> JSON:
        """Return a node's inputs, links replaced by what the other node returned.

        A value that the node does not know is left out, a link is not.
        """
        inputs = {}
        known = self.known_inputs(node_id)
        for name, value in self.nodes[node_id]["inputs"].items():
            source = self.cached(value[0]) if is_link(value) else None
            if source or name in known:
                inputs[name] = source.outputs[value[1]] if source else value
        return inputs

    def known_inputs(self, node_id: str) -> set[str]:
        """Name the inputs that a node knows."""
        return {name for name, _, _ in list_inputs(self.nodes[node_id]["class_type"], self.settings)}

    def cached(self, node_id: str) -> Cached | None:
        """Look a node up in the cache."""
        return self.executor.cache.get(self.digests[node_id])

    def digest(self, node_id: str) -> str:
        """Return one text for a node's class and inputs, with those of every node before it."""
        if node_id not in self.digests:
            node = self.nodes[node_id]
            parts: list[Any] = [node["class_type"]]
            if node["class_type"] == "LoadImage":  # runs again when the file has changed
                path = locate_input(self.settings, node["inputs"]["image"])
                parts.append(hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else random.random())
            if node["class_type"] == "SaveImageWebsocket":  # as its IS_CHANGED says
                parts.append(time.time())
            for name, value in sorted(node["inputs"].items()):
                is_fed = (
                    is_link(value) and value[0] in self.nodes
                )  # a link to no node ends only the run that needs it
                parts.append([name, "link", self.digest(value[0]), value[1]] if is_fed else [name, value])
            self.digests[node_id] = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
        return self.digests[node_id]

    def announce(self, event: str, data: JSON, *, everyone: bool = False) -> None:
        """Send one of the messages that history keeps."""
        stamped = {**data, "timestamp": now_ms()}
        self.messages.append([event, stamped])
        if self.server.client_id is not None or everyone:
            self.server.send(event, stamped, self.server.client_id)

    def tell(self, event: str, data: JSON) -> None:
        """Send a message to this prompt's client, if it named one."""
        if self.server.client_id is not None:
            self.server.send(event, {**data, "prompt_id": self.prompt_id}, self.server.client_id)

    def update_progress(self, node_id: str, state: str, value: float = 1, maximum: float = 1) -> None:
        """Note how far a node is and send that of all; if the prompt named no client, everybody hears it."""
        if state == "finished":
            value = maximum = self.progress.get(node_id, {}).get("max", 1)
        entry = {"value": value, "max": maximum, "state": state, "node_id": node_id, "prompt_id": self.prompt_id}
        entry |= {"display_node_id": node_id, "parent_node_id": None, "real_node_id": node_id}
        self.progress[node_id] = entry
        data = {"prompt_id": self.prompt_id, "nodes": dict(self.progress)}
        self.server.send("progress_state", data, self.server.client_id)

    def describe_error(self, node_id: str, error: Exception) -> JSON:
        """Say why a node failed."""
        module, name = type(error).__module__, type(error).__qualname__
        tips = OUT_OF_MEMORY_TIPS if isinstance(error, OutOfMemoryError) else ""
        inputs = {
            key: [value if isinstance(value, int | float | str | None) else str(value)]
            for key, value in self.gather_inputs(node_id).items()
        }
        return {
            "exception_message": f"{error}\n{tips}",
            "exception_type": name if module == "builtins" else f"{module}.{name}",
            "traceback": traceback.format_tb(error.__traceback__),
            "current_inputs": inputs,
            "current_outputs": list(self.nodes),
        }


def is_link(value: object) -> bool:
    """Tell whether an input is [node id, output index]."""
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], int)


def is_output(node: JSON) -> bool:
    """Tell whether a workflow's node is one that ends a branch: as mostly, one that returns nothing."""
    return is_output_class(node["class_type"])


def is_output_class(name: str) -> bool:
    """Tell the same of a class."""
    return not NODES[name].outputs or name == "StandinPassPreview"


# --- Validation ------------------------------------------------------------------------------------


class InputError(Exception):
    """An input that is not right; `error` is its entry in node_errors."""

    def __init__(self, kind: str, message: str, details: str, **extra_info: Any) -> None:
        super().__init__(message)
        self.error = make_error(kind, message, details, **extra_info)


def make_error(kind: str, message: str, details: str = "", **extra_info: Any) -> JSON:
    """Make an error as ComfyUI words it."""
    return {"type": kind, "message": message, "details": details, "extra_info": extra_info}


class Validation:
    """Checks a prompt before it is queued and converts its numbers, as ComfyUI does."""

    def __init__(self, prompt: Any, settings: Settings) -> None:
        self.prompt = prompt
        self.settings = settings
        self.errors: dict[str, list[JSON]] = {}  # of every node visited
        self.sound: dict[str, bool] = {}

    def run(self) -> tuple[list[str], JSON | None, JSON]:
        """Return the output nodes that can run, the error if there are none, and node_errors.

        A prompt that is no mapping of nodes (a workflow saved in UI format) raises.
        """
        for node_id, node in self.prompt.items():
            text = "Cannot execute because a node is missing the class_type property."
            if "class_type" in node:
                text = f"Cannot execute because node {node['class_type']} does not exist."
            if node.get("class_type") not in NODES:
                return [], make_error("invalid_prompt", text, f"Node ID '#{node_id}'"), {}
        outputs = [node_id for node_id, node in self.prompt.items() if is_output(node)]
        if not outputs:
            return [], make_error("prompt_no_outputs", "Prompt has no outputs"), {}

        node_errors: JSON = {}
        reasons: list[JSON] = []
        for output in outputs:
            try:
                self.check_node(output)
            except Exception as error:
                self.keep(output, "exception_during_validation", "Exception when validating node", error)
            if not self.sound[output]:
                reasons += self.errors[output]
                for node_id in [each for each, errors in self.errors.items() if errors]:
                    entry = {"errors": self.errors[node_id], "dependent_outputs": []}
                    entry["class_type"] = self.prompt[node_id]["class_type"]
                    node_errors.setdefault(node_id, entry)["dependent_outputs"].append(output)
        good = [output for output in outputs if self.sound[output]]
        if good:
            return good, None, node_errors
        details = "\n".join(f"{reason['message']}: {reason['details']}" for reason in reasons)
        message = "Prompt outputs failed validation"
        return [], make_error("prompt_outputs_failed_validation", message, details), node_errors

    def check_node(self, node_id: str) -> bool:
        """Check a node and all before it."""
        if node_id in self.sound:
            return self.sound[node_id]
        class_type, inputs = self.prompt[node_id]["class_type"], self.prompt[node_id]["inputs"]
        errors: list[JSON] = []
        sound = True
        for name, required, config in list_inputs(class_type, self.settings):
            try:
                if name not in inputs:
                    if required:
                        raise InputError("required_input_missing", "Required input is missing", name, input_name=name)
                elif isinstance(inputs[name], list):
                    sound = self.check_link(name, config, inputs[name]) and sound
                else:
                    inputs[name] = check_value(name, config, inputs[name], self.settings)
            except InputError as problem:
                errors.append(problem.error)
        self.errors[node_id] = errors
        self.sound[node_id] = sound and not errors
        return self.sound[node_id]

    def check_link(self, name: str, config: list[Any], link: list[Any]) -> bool:
        """Check a link's form and type, and the node it comes from."""
        about: JSON = {"input_name": name, "input_config": config}
        if len(link) != 2:
            text = "Bad linked input, must be a length-2 list of [node_id, slot_index]"
            raise InputError("bad_linked_input", text, name, **about, received_value=link)
        source, slot = link
        received = NODES[self.prompt[source]["class_type"]].outputs[slot]
        if config[0] not in ("*", received):
            details = f"{name}, received_type({received}) mismatch input_type({config[0]})"
            text = "Return type mismatch between linked nodes"
            raise InputError("return_type_mismatch", text, details, **about, received_type=received, linked_node=link)
        try:
            return self.check_node(source)
        except Exception as error:
            about |= {"exception_message": str(error), "linked_node": link}
            text = "Exception when validating inner node"
            self.keep(source, "exception_during_inner_validation", text, error, **about)
            return False

    def keep(self, node_id: str, kind: str, message: str, error: Exception, **about: Any) -> None:
        """Keep an exception that came while a node was checked."""
        about |= {"exception_type": type(error).__qualname__, "traceback": traceback.format_tb(error.__traceback__)}
        self.errors[node_id] = [make_error(kind, message, str(error), **about)]
        self.sound[node_id] = False


def list_inputs(class_type: str, settings: Settings) -> Iterator[tuple[str, bool, list[Any]]]:
    """Yield each input's name, whether it must be there, and its [type, options]."""
    for category, inputs in describe_node(class_type, settings)["input"].items():
        if category != "hidden":
            for name, config in inputs.items():
                yield name, category == "required", [*config, {}][:2]


def check_value(name: str, config: list[Any], value: Any, settings: Settings) -> Any:
    """Return an input's value converted to its type, or raise InputError."""
    kind, options = config
    about: JSON = {"input_name": name, "input_config": config, "received_value": value}
    types: dict[str, Callable[[Any], Any]] = {"INT": int, "FLOAT": float, "STRING": str, "BOOLEAN": bool}
    if isinstance(kind, str) and kind in types:
        try:
            value = about["received_value"] = types[kind](value)
        except Exception as error:
            text, about["exception_message"] = f"Failed to convert an input value to a {kind} value", str(error)
            raise InputError("invalid_input_type", text, f"{name}, {value}, {error}", **about) from error
    if "min" in options and value < options["min"]:
        text = f"Value {value} smaller than min of {options['min']}"
        raise InputError("value_smaller_than_min", text, name, **about)
    if "max" in options and value > options["max"]:
        text = f"Value {value} bigger than max of {options['max']}"
        raise InputError("value_bigger_than_max", text, name, **about)
    if "image_upload" in options:  # LoadImage looks for the file itself, in subfolders, too
        if not locate_input(settings, value).exists():
            details = f"{name} - Invalid image file: {value}"
            raise InputError(
                "custom_validation_failed", "Custom validation failed for node", details, input_name=name
            )
        return value
    choices = kind if isinstance(kind, list) else options.get("options")
    if choices is not None and value not in choices:
        shown = str(choices)
        if len(choices) > 20:
            shown, about["input_config"] = f"(list of length {len(choices)})", None
        raise InputError("value_not_in_list", "Value not in list", f"{name}: '{value}' not in {shown}", **about)
    return value


# --- Nodes -----------------------------------------------------------------------------------------


class Frames(list[Image.Image]):
    """An IMAGE: a batch of pictures of one size. As text it looks like the tensor it stands for."""

    def __str__(self) -> str:
        size = (len(self), self[0].height, self[0].width, 3)

        def show(index: tuple[int, ...]) -> str:
            depth = len(index)
            if depth == 4:
                frame, y, x, channel = index
                return f"{self[frame].crop((x, y, x + 1, y + 1)).tobytes()[channel] / 255:.4f}"
            count = size[depth]
            shown = list(range(count)) if count <= 6 else [0, 1, 2, -1, count - 3, count - 2, count - 1]
            gap = ", " if depth == 3 else "," + "\n" * (3 - depth) + " " * (8 + depth)
            return "[" + gap.join("..." if each < 0 else show((*index, each)) for each in shown) + "]"

        return f"tensor({show(())})"


class Latent(NamedTuple):
    """A LATENT: what to draw when it is decoded. An empty one has no seed."""

    width: int
    height: int
    batch_size: int
    seed: int | None = None
    text: str = ""


@dataclass(frozen=True)
class Call:
    """What a node gets when it runs; its inputs by `call["name"]`."""

    run: Run
    node_id: str
    inputs: JSON

    def __getitem__(self, name: str) -> Any:
        return self.inputs[name]

    def metadata(self) -> dict[str, str]:
        """Return what savers write into their files."""
        if not self.run.settings.metadata:
            return {}
        extra = self.run.job.extra_data.get("extra_pnginfo") or {}
        return {name: json.dumps(value) for name, value in {"prompt": self.run.nodes, **extra}.items()}

    def save(self, suffix: str, write: Callable[[Path, int], object], count: int = 1, kind: str = "output") -> JSON:
        """Write files under the next free numbers, highest in the folder + 1, and return their entries."""
        root = self.run.settings.folders[kind]
        prefix = self.inputs.get("filename_prefix", "ComfyUI")
        if kind == "temp":
            prefix += "_temp_" + "".join(random.choices("abcdefghijklmnopqrstuvwxyz", k=5))
        for name, code in zip(("year", "month", "day", "hour", "minute", "second"), "YmdHMS", strict=True):
            prefix = prefix.replace(f"%{name}%", time.strftime(f"%{code}"))
        subfolder, stem = os.path.split(os.path.normpath(prefix))
        folder = root / subfolder
        if not is_inside(root, folder):
            raise Exception(f"**** ERROR: Saving image outside the output folder is not allowed.\n{folder} {root}")
        folder.mkdir(parents=True, exist_ok=True)
        numbers = [re.match(re.escape(stem) + r"_(\d+)(?:_|$)", each.name) for each in folder.iterdir()]
        number = max((int(match[1]) for match in numbers if match), default=0) + 1
        entries = []
        for index in range(count):
            filename = f"{stem.replace('%batch_num%', str(index))}_{number + index:05}_.{suffix}"
            write(folder / filename, index)
            entries.append({"filename": filename, "subfolder": subfolder, "type": kind})
        return {"images": entries}


Result = tuple[list[Any], JSON]  # a node's outputs, and what it shows in history


class Node(NamedTuple):
    """A node class."""

    outputs: tuple[str, ...]
    inputs: JSON
    run: Callable[[Call], Result]


NODES: dict[str, Node] = {}


def node(name: str, *outputs: str, **inputs: list[Any]) -> Callable[[Callable[[Call], Result]], object]:
    """Install a function as a node class. Without inputs, /object_info is the recorded one."""
    return lambda run: NODES.setdefault(name, Node(outputs, inputs, run))


def describe_node(name: str, settings: Settings) -> JSON:
    """Return a node's /object_info, with the files that are there now as the allowed values."""
    recorded = load_recordings().get(f"object_info_{name}")
    if not recorded:
        own = NODES[name]
        optional = {key: config for key, config in own.inputs.items() if config[1].get("optional")}
        inputs = {"required": {k: v for k, v in own.inputs.items() if k not in optional}, "optional": optional}
        return {
            "input": inputs,
            "input_order": {category: list(each) for category, each in inputs.items()},
            "output": own.outputs,
            "output_is_list": [False] * len(own.outputs),
            "output_name": own.outputs,
            "name": name,
            "display_name": name,
            "description": own.run.__doc__,
            "python_module": "comfyui_standin",
            "category": "stand-in",
            "output_node": is_output_class(name),
        }
    info: JSON = copy.deepcopy(recorded["body"][name])
    required = info["input"]["required"]
    if name == "LoadImage":
        files = [file.name for file in settings.folders["input"].iterdir() if file.is_file()]
        required["image"][0] = sorted(
            file for file in files if "image/" in str(mimetypes.guess_type(file, strict=False)[0])
        )
    if name == "CheckpointLoaderSimple":
        required["ckpt_name"][0] = list_models(settings.models / "checkpoints")
    return info


_listed: dict[Path, tuple[list[str], dict[str, float]]] = {}


def list_models(root: Path) -> list[str]:
    """Return the models below a folder, read anew only when the time of one of its folders has changed.

    Mountpoint never changes it. A folder that was there and cannot be asked any more raises OSError, as in ComfyUI.
    """
    names, times = _listed.get(root, ([], {}))
    is_unchanged = all(Path(folder).stat().st_mtime == time for folder, time in times.items())
    if not is_unchanged or str(root) not in times:
        walked = list(os.walk(root, followlinks=True))  # a link, or full of links, as may be; or not there
        paths = [Path(folder, file) for folder, _, files in walked for file in files]
        names = sorted(str(path.relative_to(root)) for path in paths if path.suffix in MODEL_SUFFIXES)
        _listed[root] = names, {folder: Path(folder).stat().st_mtime for folder, _, _ in walked}
    return names


@functools.cache
def load_recordings() -> JSON:
    """Read what a real server answered."""
    recordings: JSON = json.loads(Path(__file__).with_name("recordings.json").read_text(encoding="utf-8"))
    return recordings


def number(kind: str, default: float, low: float, high: float, **options: Any) -> list[Any]:
    """Describe a number input."""
    return [kind, {"default": default, "min": low, "max": high, **options}]


def text(default: str = "ComfyUI") -> list[Any]:
    """Describe a text input."""
    return ["STRING", {"default": default}]


def choice(*values: str) -> list[Any]:
    """Describe an input that must be one of a list."""
    return ["COMBO", {"default": values[0], "options": list(values)}]


IMAGE: list[Any] = ["IMAGE", {}]
OPTIONAL_IMAGE: list[Any] = ["IMAGE", {"optional": True}]
LATENT: list[Any] = ["LATENT", {}]
SIDE = number("INT", 512, 1, 16384)
LATENT_SIDE = number("INT", 512, 16, 16384)
BATCH = number("INT", 1, 1, 4096)


@node("LoadImage", "IMAGE", "MASK")
def load_image(call: Call) -> Result:
    """Read a picture from input/."""
    with Image.open(str(locate_input(call.run.settings, call["image"]))) as image:
        frames = Frames(ImageOps.exif_transpose(each).convert("RGB") for each in ImageSequence.Iterator(image))
    return [frames, None], {}


@node("EmptyImage", "IMAGE", width=SIDE, height=SIDE, batch_size=BATCH, color=number("INT", 0, 0, 0xFFFFFF))
def empty_image(call: Call) -> Result:
    """Make pictures of one colour."""
    picture = Image.new("RGB", (call["width"], call["height"]), f"#{call['color']:06x}")
    return [Frames([picture] * call["batch_size"])], {}


@node("ImageInvert", "IMAGE", image=IMAGE)
def invert_image(call: Call) -> Result:
    """Turn each colour into its opposite."""
    return [Frames(ImageOps.invert(each) for each in call["image"])], {}


@node("ImageBlur", "IMAGE", image=IMAGE, blur_radius=number("INT", 1, 1, 31), sigma=number("FLOAT", 1.0, 0.1, 10.0))
def blur_image(call: Call) -> Result:
    """Take its time; the picture stays as it is."""
    time.sleep(call.run.settings.node_seconds)
    return [call["image"]], {}


@node("CheckpointLoaderSimple", "MODEL", "CLIP", "VAE")
def load_checkpoint(call: Call) -> Result:
    """Let a model's name stand for it."""
    return [call["ckpt_name"]] * 3, {}


@node("CLIPTextEncode", "CONDITIONING", text=text(""), clip=["CLIP", {}])
def encode_text(call: Call) -> Result:
    """Pass the text on."""
    return [call["text"]], {}


@node("EmptyLatentImage", "LATENT", width=LATENT_SIDE, height=LATENT_SIDE, batch_size=BATCH)
def empty_latent(call: Call) -> Result:
    """Remember a size."""
    return [Latent(call["width"], call["height"], call["batch_size"])], {}


@node("KSampler", "LATENT")
def sample(call: Call) -> Result:
    """Remember seed and text; step by step tell the progress and send a preview."""
    run, steps, latent = call.run, call["steps"], call["latent_image"]
    preview = io.BytesIO(struct.pack(">I", 1))  # a JPEG
    preview.seek(0, io.SEEK_END)
    draw_picture(64, 64, call["seed"], "").save(preview, "JPEG")
    for step in range(1, steps + 1):
        time.sleep(run.settings.step_seconds)
        run.executor.check_interrupt()
        run.update_progress(call.node_id, "running", step, steps)
        progress = {"value": step, "max": steps, "prompt_id": run.prompt_id, "node": call.node_id}
        run.server.send("progress", progress, run.server.client_id)
        run.server.send(1, preview.getvalue(), run.server.client_id)
    return [Latent(latent.width, latent.height, latent.batch_size, call["seed"], call["positive"])], {}


@node("VAEDecode", "IMAGE", samples=LATENT, vae=["VAE", {}])
def decode_latent(call: Call) -> Result:
    """Draw what a latent remembers."""
    latent: Latent = call["samples"]
    scale = min(1.0, MAX_PICTURE_PIXELS / max(latent.width, latent.height))
    width, height = round(latent.width * scale), round(latent.height * scale)
    if latent.seed is None:
        return [Frames([Image.new("RGB", (width, height), "grey")] * latent.batch_size)], {}
    seeds = range(latent.seed, latent.seed + latent.batch_size)
    return [Frames(draw_picture(width, height, seed, latent.text) for seed in seeds)], {}


def save_pictures(call: Call, kind: str) -> Result:
    """Write PNG files that carry their prompt."""
    images, info = call["images"], PngInfo()
    for name, value in call.metadata().items():
        info.add_text(name, value)
    return [], call.save("png", lambda path, index: images[index].save(path, pnginfo=info), len(images), kind)


@node("SaveImage")
def save_image(call: Call) -> Result:
    """Write pictures in output/."""
    return save_pictures(call, "output")


@node("PreviewImage", images=IMAGE)
def preview_image(call: Call) -> Result:
    """Write pictures in temp/."""
    return save_pictures(call, "temp")


@node("PreviewAny", source=["*", {}])
def preview_any(call: Call) -> Result:
    """Show anything as text."""
    return [], {"text": [str(call["source"])]}


@node(
    "SaveAnimatedWEBP",
    images=IMAGE,
    filename_prefix=text(),
    fps=number("FLOAT", 6.0, 0.01, 1000.0),
    lossless=["BOOLEAN", {"default": True}],
    quality=number("INT", 80, 0, 100),
    method=choice("default", "fastest", "slowest"),
)
def save_webp(call: Call) -> Result:
    """Write one picture that moves."""
    first, *rest = call["images"]
    options = {"save_all": True, "append_images": rest, "lossless": call["lossless"], "quality": call["quality"]}
    saved = call.save("webp", lambda path, _: first.save(path, duration=int(1000 / call["fps"]), **options))
    return [], {**saved, "animated": [True]}


@node("CreateVideo", "VIDEO", images=IMAGE, fps=number("FLOAT", 30.0, 1.0, 120.0))
def create_video(call: Call) -> Result:
    """Pass the pictures on."""
    return [call["images"]], {}


@node(
    "SaveVideo",
    video=["VIDEO", {}],
    filename_prefix=text("video/ComfyUI"),
    format=choice("auto", "mp4"),
    codec=choice("auto", "h264"),
)
def save_video(call: Call) -> Result:
    """Write a file that begins as an mp4 does and holds no film."""
    content = b"\0\0\0\x18ftypisom\0\0\2\0isommp41\0\0\0\x08mdat"
    return [], {**call.save("mp4", lambda path, _: path.write_bytes(content)), "animated": [True]}


@node("SaveLatent", samples=LATENT, filename_prefix=text("latents/ComfyUI"))
def save_latent(call: Call) -> Result:
    """Write a safetensors file of zeros."""
    latent: Latent = call["samples"]
    shape = [latent.batch_size, 4, latent.height // 8, latent.width // 8]
    tensor = {"dtype": "F32", "shape": shape, "data_offsets": [0, 4 * math.prod(shape)]}
    header = json.dumps({"__metadata__": call.metadata(), "latent_tensor": tensor}).encode()
    content = struct.pack("<Q", len(header)) + header + bytes(4 * math.prod(shape))
    return [], {"latents": call.save("latent", lambda path, _: path.write_bytes(content))["images"]}


def pass_image(call: Call) -> Result:
    """Return the image that came in, or a black one."""
    return [call.inputs.get("image") or Frames([Image.new("RGB", (64, 64))])], {}


@node(
    "StandinSleep",
    "IMAGE",
    seconds=number("FLOAT", 1.0, 0.0, 86400.0),
    image=OPTIONAL_IMAGE,
    until=["STRING", {"optional": True}],
)
def sleep(call: Call) -> Result:
    """Be slow and silent; an interrupt is noticed at once."""
    while (until := call.inputs.get("until")) and not Path(until).exists():
        call.run.executor.check_interrupt()
        time.sleep(0.05)
    end = time.monotonic() + call["seconds"]
    while (rest := end - time.monotonic()) > 0:
        call.run.executor.check_interrupt()
        time.sleep(min(rest, 0.05))
    return pass_image(call)


@node("StandinOutOfMemory", "IMAGE", image=OPTIONAL_IMAGE, times=number("INT", 1, 0, 1000, optional=True))
def run_out_of_memory(call: Call) -> Result:
    """Fail as on a GPU without memory."""
    executor = call.run.executor
    if executor.out_of_memory_count < call.inputs.get("times", math.inf):
        executor.out_of_memory_count += 1
        raise OutOfMemoryError("Allocation on device")
    return pass_image(call)


@node("StandinFullDisk", "IMAGE", image=OPTIONAL_IMAGE, times=number("INT", 1, 0, 1000, optional=True))
def run_into_a_full_disk(call: Call) -> Result:
    """Fail as a saver does where the disk is full."""
    executor = call.run.executor
    if executor.full_disk_count < call.inputs.get("times", math.inf):
        executor.full_disk_count += 1
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return pass_image(call)


@node(
    "SaveImageDataSetToFolder",
    images=IMAGE,
    folder_name=text("dataset"),
    filename_prefix=text("image"),
    mode=choice("overwrite", "increment"),
)
def save_data_set(call: Call) -> Result:
    """Write pictures of fixed names in a folder, as ComfyUI's own node does: it makes that folder and no other."""
    folder = call.run.settings.folders["output"] / call["folder_name"]
    folder.mkdir(parents=True, exist_ok=True)
    for index, picture in enumerate(call["images"]):
        picture.save(folder / f"{call['filename_prefix']}_{index:05d}.png")
    return [], {}


@node("StandinSaveBlind", images=IMAGE, output_path=text(""), filename_prefix=text())
def save_blindly(call: Call) -> Result:
    """Write pictures as WAS Image Save does: without the prefix's folder, and without a word where that fails."""
    root = call.run.settings.folders["output"]
    folder = root / call["output_path"]
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for index, picture in enumerate(call["images"]):
        name = f"{call['filename_prefix']}_{index + 1:04}.png"
        try:
            picture.save(folder / name)
        except OSError as error:
            logging.info("Unable to save file to: %s (%s)", folder / name, error)
        else:
            entries.append({"filename": name, "subfolder": str(folder.relative_to(root)), "type": "output"})
    return [], {"images": entries} if entries else {}


@node("StandinShow", write=text("{}"), ui=text("{}"), folder=["STRING", {"optional": True}])
def show(call: Call) -> Result:
    """Write files, given as JSON, path below the folders' parent (output/a.txt) -> content, and show `ui`, JSON, too."""
    for path, content in json.loads(call["write"]).items():
        kind, _, rest = path.partition("/")
        target = call.run.settings.folders[kind] / rest
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(content)
    return [], json.loads(call["ui"])


@node("SaveImageWebsocket", images=IMAGE)
def send_pictures(call: Call) -> Result:
    """Send pictures over the websocket, as PNG, and nothing into history."""
    run, images = call.run, call["images"]
    for step, picture in enumerate(images):
        run.update_progress(call.node_id, "running", step, len(images))
        progress = {"value": step, "max": len(images), "prompt_id": run.prompt_id, "node": call.node_id}
        run.server.send("progress", progress, run.server.client_id)
        frame = io.BytesIO(struct.pack(">I", 2))  # a PNG
        frame.seek(0, io.SEEK_END)
        picture.save(frame, "PNG")
        run.server.send(1, frame.getvalue(), run.server.client_id)
    return [], {}


@node("StandinText", "STRING", text=text(""))
def give_text(call: Call) -> Result:
    """Give a text, for an input that comes over a link."""
    return [call["text"]], {}


@node("StandinPassPreview", "IMAGE", image=IMAGE)
def pass_preview(call: Call) -> Result:
    """Show a picture in temp/ and pass it on, as bridges and comparers do."""
    name = f"pass_{uuid.uuid4().hex}.png"
    call["image"][0].save(call.run.settings.folders["temp"] / name)
    return [call["image"]], {"images": [{"filename": name, "subfolder": "", "type": "temp"}]}


@node(
    "StandinCrash",
    "IMAGE",
    image=OPTIONAL_IMAGE,
    seconds=number("FLOAT", 0.2, 0.0, 86400.0, optional=True),
    once=["STRING", {"optional": True}],
)
def crash(call: Call) -> Result:
    """Die as a process does that the kernel kills, in the middle of the job."""
    if once := call.inputs.get("once"):
        try:
            Path(once).touch(exist_ok=False)
        except FileExistsError:
            return pass_image(call)
    time.sleep(call.inputs.get("seconds", 0.2))  # by default the answer to POST /prompt gets out first
    call.run.executor.write_ledger("died", call.run.prompt_id)
    os._exit(1)


@node("StandinDeadExecutor", "IMAGE", image=OPTIONAL_IMAGE)
def kill_executor(_: Call) -> Result:
    """End the executor thread: the job stays in queue_running for ever, and HTTP still answers."""
    raise SystemExit


@node("StandinApi", image=OPTIONAL_IMAGE, out=choice("text", "error", "block"))
def call_api(call: Call) -> Result:
    """Let out the key that came with the prompt, as careless nodes do."""
    key = call.run.executor.secrets.get(call.run.prompt_id, {}).get("api_key_comfy_org")
    said = f"Unauthorized: the key {key} is not known"
    if call["out"] == "error":
        raise RuntimeError(said)
    if call["out"] == "block":
        where = {"prompt_id": call.run.prompt_id, "node_id": call.node_id, "node_type": "StandinApi", "executed": []}
        what = {"exception_type": "ExecutionBlocked", "exception_message": said}
        call.run.tell(
            "execution_error", where | what | {"traceback": [], "current_inputs": [], "current_outputs": []}
        )
    return [], {"text": [said]}


@node("StandinBlock", "IMAGE", image=OPTIONAL_IMAGE)
def block(call: Call) -> Result:
    """Tell what an ExecutionBlocker tells: an error on the socket, while history will say success."""
    where = {"prompt_id": call.run.prompt_id, "node_id": call.node_id, "node_type": "StandinBlock", "executed": []}
    what = {"exception_type": "ExecutionBlocked", "exception_message": "Execution Blocked: not today"}
    call.run.tell("execution_error", where | what | {"traceback": [], "current_inputs": [], "current_outputs": []})
    return pass_image(call)


# --- Pictures --------------------------------------------------------------------------------------


def draw_picture(width: int, height: int, seed: int, caption: str) -> Image.Image:
    """Draw hills under a sky, in colours and shapes of the seed, with seed and caption below."""
    chance = random.Random(seed)
    hue = chance.random()

    def colour(shift: float, saturation: float, light: float) -> tuple[int, ...]:
        rgb = colorsys.hls_to_rgb((hue + shift) % 1, light, saturation)
        return tuple(round(part * 255) for part in rgb)

    fade = Image.linear_gradient("L").resize((width, height))
    picture = ImageOps.colorize(fade, colour(0, 0.7, 0.25), colour(0.12, 0.9, 0.75))
    draw = ImageDraw.Draw(picture)
    for _ in range(40):
        draw.point((chance.uniform(0, width), chance.uniform(0, height / 2)), fill=colour(0.1, 0.5, 0.9))
    sun = chance.uniform(0.15, 0.85) * width, chance.uniform(0.15, 0.4) * height
    draw.circle(sun, width * chance.uniform(0.05, 0.12), fill=colour(0.15, 1.0, 0.88))
    for layer in range(4):
        waves = [(chance.uniform(1, 9), chance.uniform(0, 7), chance.uniform(0.01, 0.07)) for _ in range(3)]
        ridge = [(0.0, float(height))]
        for x in range(width + 1):
            lift = sum(size * math.sin(pace * x / width + start) for pace, start, size in waves)
            ridge.append((x, height * (0.5 + 0.11 * layer - lift)))
        draw.polygon([*ridge, (width, height)], fill=colour(0.03 * layer, 0.55, 0.42 - 0.09 * layer))
    if width >= 128:
        write_caption(picture, f"seed {seed}", caption)
    return picture


def write_caption(picture: Image.Image, title: str, caption: str) -> None:
    """Write a title and a wrapped text on a dark strip at the bottom, as much of it as fits."""
    size = max(10, picture.width // 28)
    font = ImageFont.load_default(size)
    columns = max(8, int((picture.width - 2 * size) / font.getlength("n")))
    lines = [title, *textwrap.wrap(caption, columns, max_lines=4, placeholder=" …")]
    top = max(0, picture.height - round((len(lines) + 0.7) * size * 1.3))
    box = (0, top, picture.width, picture.height)
    picture.paste(picture.crop(box).point(lambda value: value * 0.4), box)
    draw = ImageDraw.Draw(picture)
    for row, line in enumerate(lines):
        place = (size, top + round((row + 0.35) * size * 1.3))
        draw.text(place, line, font=font, fill="white" if row else "wheat")


# --- Start -----------------------------------------------------------------------------------------


def read_settings(args: argparse.Namespace) -> Settings:
    """Find the folders: those named, else those beside this file. As in ComfyUI, temp/ is put into the one named."""
    base = Path(args.base_directory or Path(__file__).parent)
    folders = {
        "output": Path(args.output_directory or base / "output"),
        "input": Path(args.input_directory or base / "input"),
        "temp": Path(args.temp_directory or base) / "temp",
    }
    return Settings(
        folders={kind: Path(os.path.abspath(folder)) for kind, folder in folders.items()},  # noqa: PTH100 - see is_inside
        models=base / "models",
        metadata=not args.disable_metadata,
        step_seconds=float(os.environ.get("STANDIN_STEP_SECONDS", "0.05")),
        node_seconds=float(os.environ.get("STANDIN_NODE_SECONDS", "0")),
        ledger=os.environ.get("STANDIN_LEDGER"),
    )


def stop() -> None:
    """End at once: nobody waits for the node at work, and the kernel closes the sockets."""
    logging.info("Stopped server")
    os._exit(0)


async def serve(args: argparse.Namespace) -> None:
    """Listen and serve until a signal comes."""
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stop)
    loop.add_signal_handler(signal.SIGINT, stop)
    settings = read_settings(args)
    shutil.rmtree(settings.folders["temp"], ignore_errors=True)
    for kind in ("temp", "input"):
        settings.folders[kind].mkdir(parents=True, exist_ok=True)
    await asyncio.sleep(float(os.environ.get("STANDIN_BOOT_SECONDS", "0")))
    server = Server(settings)
    runner = web.AppRunner(server.app(), access_log=None)
    await runner.setup()
    server.executor.start()
    for address in args.listen.split(","):
        await web.TCPSite(runner, address, args.port).start()
        host, port = runner.addresses[-1][:2]
        logging.info("To see the GUI go to: http://%s:%s", f"[{host}]" if ":" in host else host, port)
    await server.publish()


def main() -> None:
    """Read the command line, a part of ComfyUI's."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None, allow_abbrev=False)
    parser.add_argument("--listen", nargs="?", default="127.0.0.1", const="0.0.0.0,::", metavar="ADDRESS")
    parser.add_argument("--port", type=int, default=8188, help="0 takes a free one")
    for folder in ("base", "output", "input", "temp"):
        parser.add_argument(f"--{folder}-directory", metavar="FOLDER")
    parser.add_argument("--disable-metadata", action="store_true")
    args, unknown = parser.parse_known_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if unknown:
        logging.info("Arguments this stand-in ignores: %s", " ".join(unknown))
    asyncio.run(serve(args))


if __name__ == "__main__":
    main()
