"""`fleet.py serve`: the rooms put together, and the address at which they answer."""

from __future__ import annotations

import asyncio
import errno
import logging
import resource
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from aiohttp import web

from comfy_utils import Settings, SettingsError, printable, say
from operate.gateway.api import Api
from operate.gateway.api_door import speak_the_contract
from operate.gateway.cloud import Cloud
from operate.gateway.comfy_files import ComfyFiles
from operate.gateway.comfy_http import FEATURES, NOT_ON_A_FLEET, ComfyCalls
from operate.gateway.comfy_socket import Sockets
from operate.gateway.editor import Editor
from operate.gateway.editor_shelf import Shelf
from operate.gateway.editor_userdata import UserData
from operate.gateway.files import Files
from operate.gateway.fleet_news import FleetNews
from operate.gateway.fleet_page import FleetPage
from operate.gateway.guard import Bodies, is_loopback, make_guard, plain_error
from operate.gateway.jobs import Jobs
from operate.gateway.live import Live
from operate.gateway.nodes import Nodes
from operate.gateway.refusals import Checker
from operate.words import refusal
from send_job import Sender

MOST_CONNECTIONS = 4000
SPARE_FILES = 300
"""So many open files are kept for S3 and uploads."""
SILENT_S = 20.0
"""A connection that has asked for nothing by then is closed."""
LEAST_TOKEN = 16


class Address(NamedTuple):
    """Where serve answers, and to whom: to all where there is no token."""

    host: str
    port: int
    token: str | None
    redirects: bool = True
    """Whether the bytes of assets are fetched from S3 itself, at an address that serve signs."""


def choose_address(
    host: str, port: int, token_file: Path | None, *, no_auth: bool, no_redirect: bool = False
) -> Address:
    """The address that is asked for. Raises SettingsError where anybody could come in without that being wanted."""
    if token_file is not None:
        try:
            token = token_file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(f"--token-file {token_file} cannot be read ({error}): name a readable file") from None
        if len(token) < LEAST_TOKEN or not token.isascii() or not token.isprintable() or " " in token:
            raise SettingsError(
                f"--token-file {token_file} has no token in it: write one line of at least {LEAST_TOKEN} characters, "
                "such as by: openssl rand -hex 32"
            )
        return Address(host, port, token, not no_redirect)
    if not is_loopback(host) and not no_auth:
        raise SettingsError(
            f"--host {host:.60} lets others in, who could run jobs and see all files: add --token-file FILE, "
            "or --no-auth where something before it asks who comes"
        )
    return Address(host, port, None, not no_redirect)


def serve(settings: Settings, address: Address) -> int:
    """Answer until the process is told to end; returns the exit code."""
    handler = logging.StreamHandler()
    handler.setFormatter(OneLine("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    try:
        Sender(settings).depth(0)
    except Exception as error:
        say(f"fleet.py serve: the queue {settings.sqs_name} cannot be seen: {refusal(error, 'sqs')}", to=sys.stderr)
        return 1
    return asyncio.run(run(settings, address))


class OneLine(logging.Formatter):
    """Each message a line, whatever is in it."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        record.message = printable(record.message)
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:  # noqa: N802
        return "\n".join(f"    {printable(line)}" for line in super().formatException(ei).splitlines())


async def run(settings: Settings, address: Address) -> int:
    """Open the door, and close it in order."""
    loop = asyncio.get_running_loop()
    told_to_end = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told_to_end.set)
    gateway = Gateway(settings, address)
    runner = web.AppRunner(gateway.app, access_log=None, handler_cancellation=True, shutdown_timeout=5)
    await runner.setup()
    assert runner.server is not None
    factory = gateway.door.factory(runner.server, most_connections())
    try:
        server = await loop.create_server(factory, address.host, address.port, backlog=512)
    except OSError as error:
        await runner.cleanup()
        where = f"{address.host}:{address.port}"
        if error.errno == errno.EADDRINUSE:
            text = f"{where} is taken, perhaps by a ComfyUI: choose another port, such as --port {address.port + 1}"
        else:
            text = f"cannot listen on {where} ({error.strerror}): choose another --host or --port"
        say(f"fleet.py serve: {text}", to=sys.stderr)
        return 1
    gateway.start()
    port = server.sockets[0].getsockname()[1]
    say(f"The fleet {settings.env} answers as a ComfyUI on http://{address.host}:{port}")
    await gateway.look_at_editor()
    await told_to_end.wait()
    server.close()
    await gateway.end()
    await runner.cleanup()
    gateway.cloud.end()
    return 0


class Gateway:
    """All rooms, put together."""

    def __init__(self, settings: Settings, address: Address) -> None:
        self.env = settings.env
        self.cloud = Cloud(settings)
        self.jobs = Jobs(settings, self.cloud)
        self.door = Door()
        live = Live(self.cloud)
        nodes, bodies = Nodes(self.cloud), Bodies()
        files = Files(self.cloud)
        self.sockets = Sockets(self.jobs, files, live.watch, FEATURES)
        checker = Checker(settings)
        calls = ComfyCalls(self.jobs, nodes, checker, bodies)
        about_files = ComfyFiles(files, nodes)
        self.editor = Editor(settings.env, self.cloud, nodes)
        kept = UserData(Shelf(self.cloud), bodies, self.editor.first_settings)
        about_fleet = FleetPage(self.env, self.jobs, FleetNews(settings, self.cloud), self.editor.remark)
        self.app = web.Application(middlewares=[self._note_speaker, speak_the_contract, make_guard(address.token)])
        self.api = Api(self.jobs, files, live.watch, checker, bodies, redirects=address.redirects)
        self.api.add_to(self.app.router)
        for method, path, handler in [
            *calls.routes(),
            *about_files.routes(),
            *self.editor.routes(),
            *kept.routes(),
            *about_fleet.routes(),
            ("GET", "/ws", self.sockets.handle),
        ]:
            # Real servers have /jobs with its prefix only.
            for prefix in ("/api",) if path.startswith("/jobs") else ("", "/api"):
                self.app.router.add_route(method, prefix + path, handler)
                if method == "GET" and path != "/ws":
                    self.app.router.add_route("HEAD", prefix + path, handler)
        self.app.router.add_get("/", self.editor.page)
        self.app.router.add_route("*", "/{rest:.*}", self._nothing)

    def start(self) -> None:
        """Begin what goes on beside the calls."""
        self.jobs.start()
        self.sockets.start()
        self.api.start()

    async def look_at_editor(self) -> None:
        """Say where the editor is not the one that the fleet's ComfyUI asks for. It works on all the same."""
        with suppress(Exception):
            if remark := await self.editor.remark():
                say(remark)

    async def end(self) -> None:
        """End it: what was taken in is passed on."""
        await self.sockets.end()
        await self.api.end()
        await self.jobs.end()

    @property
    def _note_speaker(self) -> Any:
        @web.middleware
        async def note(request: web.Request, handler: Any) -> web.StreamResponse:
            self.door.hear(request.protocol)
            answer: web.StreamResponse = await handler(request)
            return answer

        return note

    async def _nothing(self, request: web.Request) -> web.StreamResponse:
        """One of the editor's files; what a fleet cannot have, and why; else what nobody knows."""
        if request.method in ("GET", "HEAD") and (file := await self.editor.file(request)) is not None:
            return file
        first = request.path.removeprefix("/api").strip("/").partition("/")[0]
        is_file = request.path.startswith("/assets/")  # of the editor, which has a call of that name besides
        if (reason := NOT_ON_A_FLEET.get(first)) and not is_file:
            return plain_error(501, "not_on_a_fleet", f"{request.path:.100} cannot be had from a fleet: {reason}")
        if not is_file and (node := await self.editor.route_owner(request.path)):
            text = f"{request.path:.100} is answered by the custom node {node} on an instance, and cannot be had without one"
            return plain_error(501, "not_on_a_fleet", text)
        return web.Response(status=404)


class Door:
    """Takes connections, as many as there may be, and closes those that say nothing."""

    def __init__(self) -> None:
        self._silent: dict[Any, asyncio.TimerHandle] = {}

    def factory(self, server: web.Server, most: int) -> Callable[[], asyncio.BaseProtocol]:
        """What makes the protocol of a new connection, of `most` at once."""

        def make() -> asyncio.BaseProtocol:
            if len(server.connections) >= most:
                return Refusal()
            protocol = server()
            self._silent[protocol] = asyncio.get_running_loop().call_later(SILENT_S, self._close, protocol)
            return protocol

        return make

    def hear(self, protocol: Any) -> None:
        """A connection has asked for something."""
        if timer := self._silent.pop(protocol, None):
            timer.cancel()

    def _close(self, protocol: Any) -> None:
        del self._silent[protocol]
        if protocol.transport is not None:
            protocol.transport.close()


class Refusal(asyncio.Protocol):
    """A connection too many."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(
            b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\nRetry-After: 5\r\n\r\n"
        )
        transport.close()


def most_connections() -> int:
    """How many connections there may be: each takes an open file, of which the process may have so many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_CONNECTIONS + SPARE_FILES
    if soft < wanted:
        soft = min(wanted, hard) if hard != resource.RLIM_INFINITY else wanted
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return max(64, min(MOST_CONNECTIONS, soft - SPARE_FILES))
