"""ComfyUI's calls about what people keep in the editor: /userdata, /settings and /users."""

from __future__ import annotations

import json
import mimetypes
import re
import time
import uuid
from typing import Any
from urllib.parse import unquote

from aiohttp import web

from operate.gateway.editor_shelf import Browser, ChangedError, Kept, Shelf, TakenError
from operate.gateway.files import NoSuchPlaceError
from operate.gateway.guard import Bodies, Handler
from operate.gateway.transfers import ACTIVE

MOST_FILE_BYTES = 16 * 1024 * 1024
MOST_SETTINGS_BYTES = 1024 * 1024
SETTINGS = "comfy.settings.json"
CHANGED = "Somebody else has saved this since you opened it. Save it under another name, or reload the page"
"""The editor shows this sentence; it stands in the first line of an answer."""

COOKIE = "fleet-browser"
_COOKIE = re.compile(r"([0-9a-f]{32})\.(\d{9,11})")


def browser_of(request: web.Request) -> Browser | None:
    """Whose page it is, None for what has not opened one."""
    match = _COOKIE.fullmatch(request.cookies.get(COOKIE, ""))
    return Browser(match[1], float(match[2])) if match else None


def mark_browser(request: web.Request, response: web.StreamResponse) -> None:
    """Give a browser that opens the page its mark, and note when it did. It says nothing of who it is."""
    known = browser_of(request)
    mark = known.mark if known else uuid.uuid4().hex
    response.set_cookie(
        COOKIE, f"{mark}.{int(time.time())}", max_age=400 * 86_400, httponly=True, samesite="Strict", path="/"
    )


class UserData:
    """The calls."""

    def __init__(self, shelf: Shelf, bodies: Bodies, first_settings: dict[str, Any]) -> None:
        """`first_settings` are those that hold until somebody changes them."""
        self._shelf, self._bodies, self._first_settings = shelf, bodies, first_settings

    def routes(self) -> list[tuple[str, str, Handler]]:
        """Method, path and handler of each."""
        return [
            ("GET", "/users", self.get_users),
            ("GET", "/settings", self.get_settings),
            ("POST", "/settings", self.post_settings),
            ("GET", "/settings/{id}", self.get_setting),
            ("POST", "/settings/{id}", self.post_setting),
            ("GET", "/userdata", told(self.list)),
            ("GET", "/v2/userdata", told(self.list_folders)),
            ("GET", "/userdata/{file}", told(self.get)),
            ("POST", "/userdata/{file}", told(self.post)),
            ("DELETE", "/userdata/{file}", told(self.delete)),
            ("POST", "/userdata/{file}/move/{dest}", told(self.move)),
        ]

    async def get_users(self, _: web.Request) -> web.Response:
        """One shelf for all, as a ComfyUI has it unless it is told otherwise."""
        return web.json_response({"storage": "server", "migrated": True})

    # --- Settings ----------------------------------------------------------------------------------------

    async def _settings(self) -> dict[str, Any]:
        found = await self._shelf.read(SETTINGS, None)
        return self._first_settings | settings_in(found[0] if found else None)

    async def get_settings(self, _: web.Request) -> web.Response:
        return web.json_response(await self._settings())

    async def get_setting(self, request: web.Request) -> web.Response:
        return web.json_response((await self._settings()).get(request.match_info["id"]))

    async def post_settings(self, request: web.Request) -> web.Response:
        """Change some settings, and no others."""
        changes = await self._body(request)
        if not isinstance(changes, dict):
            raise web.HTTPBadRequest(text="settings are a JSON object")
        return await self._change(changes)

    async def post_setting(self, request: web.Request) -> web.Response:
        """Change one."""
        return await self._change({request.match_info["id"]: await self._body(request)})

    async def _change(self, changes: dict[str, Any]) -> web.Response:
        def change(stored: bytes | None) -> bytes:
            text = json.dumps(settings_in(stored) | changes, indent=4).encode()
            if len(text) > MOST_SETTINGS_BYTES:
                raise web.HTTPRequestEntityTooLarge(MOST_SETTINGS_BYTES, len(text))
            return text

        try:
            await self._shelf.change(SETTINGS, change)
        except ChangedError:
            raise web.HTTPServiceUnavailable(text="others change the settings as well: try again") from None
        return web.Response()

    async def _body(self, request: web.Request) -> Any:
        async with self._bodies.read(request, MOST_SETTINGS_BYTES) as text:
            try:
                return json.loads(text)
            except (ValueError, RecursionError):
                raise web.HTTPBadRequest(text="the body must be JSON") from None

    # --- Files -------------------------------------------------------------------------------------------

    async def list(self, request: web.Request) -> web.Response:
        """The files of a folder: paths, paths in parts, or with sizes and times."""
        query = request.query
        folder = query.get("dir", "")
        if not folder:
            return web.Response(status=400, text="Directory not provided")
        files = await self._shelf.list(folder)
        if not files:
            return web.Response(status=404, text="Directory not found")
        below = len([part for part in folder.split("/") if part not in ("", ".")])
        files = [kept._replace(path="/".join(kept.path.split("/")[below:])) for kept in files]
        files = [kept for kept in files if not any(part.startswith(".") for part in kept.path.split("/"))]
        if not is_said(query.get("recurse")):
            files = [kept for kept in files if "/" not in kept.path]
        if is_said(query.get("full_info")):
            return web.json_response([info_of(kept) for kept in files])
        if is_said(query.get("split")):
            return web.json_response([[kept.path, *kept.path.split("/")] for kept in files])
        return web.json_response([kept.path for kept in files])

    async def list_folders(self, request: web.Request) -> web.Response:
        """The folders and files below a path."""
        folder = unquote(request.query.get("path", ""))
        files = await self._shelf.list(folder)
        below = [part for part in folder.split("/") if part not in ("", ".")]
        if below and not files:
            return web.Response(status=404, text="Requested path not found")
        folders: dict[str, None] = {}
        for kept in files:
            parts = kept.path.split("/")
            folders |= dict.fromkeys("/".join(parts[:end]) for end in range(len(below) + 1, len(parts)))
        entries: list[dict[str, Any]] = [
            {"name": path.rpartition("/")[2], "path": path, "type": "directory"} for path in folders
        ]
        for kept in files:
            entries.append(
                {"name": kept.path.rpartition("/")[2], "path": kept.path, "type": "file", "size": kept.size, "modified": kept.modified_s}
            )  # fmt: skip
        entries.sort(key=lambda entry: (entry["type"] != "directory", entry["name"].lower()))
        return web.json_response(entries)

    async def get(self, request: web.Request) -> web.Response:
        """A file. Whatever is in it, no browser runs it: but for user.css it is only ever saved."""
        path = path_in(request, "file")
        found = await self._shelf.read(path, browser_of(request))
        if found is None:
            return web.Response(status=404)
        body, tag = found
        kind, disposition = mimetypes.guess_type(path)[0] or "application/octet-stream", "attachment"
        if path == "user.css":
            kind, disposition = "text/css", "inline"
        elif ACTIVE.fullmatch(kind):
            kind = "application/octet-stream"
        headers = {
            "Content-Type": kind,
            "Content-Disposition": disposition,
            "X-Content-Type-Options": "nosniff",
            "ETag": tag,
            "Cache-Control": "no-cache",
        }
        if tag in request.headers.get("If-None-Match", ""):
            return web.Response(status=304, headers=headers)
        return web.Response(body=body, headers=headers)

    async def post(self, request: web.Request) -> web.Response:
        """Keep a file."""
        path = path_in(request, "file")
        async with self._bodies.read(request, MOST_FILE_BYTES) as body:
            kept = await self._shelf.write(path, body, browser_of(request), overwrite=may_overwrite(request))
        return web.json_response(info_of(kept) if is_said(request.query.get("full_info")) else kept.path)

    async def delete(self, request: web.Request) -> web.Response:
        """Take a file away."""
        is_gone = await self._shelf.delete(path_in(request, "file"), browser_of(request))
        return web.Response(status=204 if is_gone else 404)

    async def move(self, request: web.Request) -> web.Response:
        """Give a file another name."""
        path, to = path_in(request, "file"), path_in(request, "dest")
        kept = await self._shelf.move(path, to, browser_of(request), overwrite=may_overwrite(request))
        if kept is None:
            return web.Response(status=404)
        return web.json_response(info_of(kept) if is_said(request.query.get("full_info")) else kept.path)


# --- Small things ----------------------------------------------------------------------------------------


def told(handler: Handler) -> Handler:
    """The same handler, with what the shelf refuses as ComfyUI's answers."""

    async def handle(request: web.Request) -> web.StreamResponse:
        try:
            return await handler(request)
        except NoSuchPlaceError as error:
            return web.Response(status=403, text=str(error))
        except TakenError:
            return web.Response(status=409, text="File already exists")
        except ChangedError:
            return web.Response(status=409, reason=CHANGED, text=CHANGED)

    return handle


def settings_in(stored: bytes | None) -> dict[str, Any]:
    """The settings in a file, none where it is broken."""
    try:
        found = json.loads(stored or b"{}")
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {}


def path_in(request: web.Request, name: str) -> str:
    """A path in an address, where / is written as %2F; some clients write that twice."""
    return unquote(request.match_info[name])


def is_said(value: str | None) -> bool:
    return (value or "").lower() == "true"


def may_overwrite(request: web.Request) -> bool:
    return request.query.get("overwrite", "true") != "false"


def info_of(kept: Kept) -> dict[str, Any]:
    """A file as the editor's lists have it, its times in milliseconds."""
    moment = int(kept.modified_s * 1000)
    return {"path": kept.path, "size": kept.size, "modified": moment, "created": moment}
