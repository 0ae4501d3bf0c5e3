"""The Comfy API v2, as comfy-sdk speaks it: its rooms put together, and their routes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from aiohttp import web

from operate.gateway.api_assets import Addresses, ApiAssets, Outputs
from operate.gateway.api_events import ApiEvents, Watch
from operate.gateway.api_jobs import ApiJobs
from operate.gateway.api_shapes import PREFIX
from operate.gateway.assets import Assets
from operate.gateway.claims import Claims
from operate.gateway.files import Files
from operate.gateway.guard import Bodies, Handler
from operate.gateway.jobs import Jobs
from operate.gateway.refusals import Checker

logger = logging.getLogger(__name__)


class Api:
    """All calls below /api/v2."""

    def __init__(
        self, jobs: Jobs, files: Files, watch: Watch, checker: Checker, bodies: Bodies, *, redirects: bool
    ) -> None:
        cloud = jobs.cloud
        self._jobs = jobs
        assets, claims, addresses = Assets(cloud), Claims(cloud), Addresses(files, redirects=redirects)
        outputs = Outputs(cloud, assets, addresses)
        about_jobs = ApiJobs(jobs, checker, bodies, claims, assets, outputs)
        about_assets = ApiAssets(cloud, files, assets, addresses, claims, bodies)
        self._events = ApiEvents(jobs, watch, about_jobs)
        self._routes = [*about_jobs.routes(), *about_assets.routes(), *self._events.routes()]
        self._reading: asyncio.Task[None] | None = None

    def add_to(self, router: web.UrlDispatcher) -> None:
        """Have all routes answered; a method that a path does not have is told so."""
        handlers: dict[str, dict[str, Handler]] = {}
        for method, path, handler in self._routes:
            handlers.setdefault(path, {})[method] = handler
        for path, known in handlers.items():
            if "GET" in known and not path.endswith("/events"):
                known["HEAD"] = known["GET"]
            for method, handler in known.items():
                router.add_route(method, PREFIX + path, handler)
            router.add_route("*", PREFIX + path, refuse_method(sorted(known)))

    def start(self) -> None:
        """Read the lists, so that who asks first need not wait for it."""
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        try:
            await self._jobs.index.refresh()
        except Exception as error:
            logger.info("The lists cannot be read just now: %s", error)

    async def end(self) -> None:
        """End the streams, so that their clients come back elsewhere."""
        if self._reading is not None:
            self._reading.cancel()
        self._events.end()


def refuse_method(allowed: Sequence[str]) -> Handler:
    """What answers a method that a path does not have."""

    async def refuse(request: web.Request) -> web.StreamResponse:
        raise web.HTTPMethodNotAllowed(request.method, allowed)

    return refuse
