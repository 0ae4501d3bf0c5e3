"""What custom nodes bring for the editor, as an instance has stored it: web files, translations, examples, subgraphs."""

from __future__ import annotations

import asyncio
import io
import json
import mimetypes
import re
import time
import zipfile
from collections.abc import Mapping
from typing import Any

from aiohttp import web

from comfy_utils import error_code
from ground.comfyui import EDITOR_FILES_KEY
from operate.gateway.cloud import Cloud

READ_S, NONE_S = 60.0, 10.0
"""So long the archive is believed to be the newest, and that there is none."""
MOST_ARCHIVE_BYTES = 96 * 1024 * 1024
MOST_FILE_BYTES = 16 * 1024 * 1024
RESERVED = ("core", "fleet")
"""Names of extensions that no custom node may have: the editor's own, and ours."""


class EditorWeb:
    """The archive that the instances have stored, kept in memory as it is."""

    def __init__(self, cloud: Cloud) -> None:
        self._cloud = cloud
        self._archive: zipfile.ZipFile | None = None
        self._answers: dict[str, Any] = {}
        self._tag = ""
        self._read_at = 0.0
        self._one = asyncio.Lock()

    async def answers(self) -> Mapping[str, Any]:
        """What an instance has answered: see ANSWERS in worker/editor_files.py. Empty where none has been there."""
        await self._refresh()
        return self._answers

    async def extensions(self) -> list[str]:
        """The scripts of custom nodes that the editor loads."""
        found = (await self.answers()).get("extensions") or []
        return [
            each for each in found if re.match(r"/extensions/[^/]+/", each) and each.split("/")[2] not in RESERVED
        ]

    async def answer(self, request: web.Request, name: str) -> web.Response | None:
        """A file of the archive, None where there is none. A custom node's script runs in the editor, as it does in
        ComfyUI: it is part of the fleet's image."""
        await self._refresh()
        if self._archive is None or name == "answers.json":
            return None
        try:
            info = self._archive.getinfo(name)
        except KeyError:
            return None
        if info.file_size > MOST_FILE_BYTES:
            return None
        tag = f'"{info.CRC:08x}-{info.file_size:x}"'
        headers = {"ETag": tag, "Cache-Control": "no-cache", "X-Content-Type-Options": "nosniff"}
        if tag in request.headers.get("If-None-Match", ""):
            return web.Response(status=304, headers=headers)
        body = await asyncio.to_thread(self._archive.read, info)
        kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
        response = web.Response(body=body, content_type=kind, headers=headers)
        response.enable_compression()
        return response

    async def route_owner(self, path: str) -> str | None:
        """The custom node whose server would answer this path on an instance, None where none is known to."""
        for route, node in (await self.answers()).get("routes", {}).items():
            if is_route(route, path.removeprefix("/api")) or is_route(route, path):
                return str(node)
        return None

    async def _refresh(self) -> None:
        async with self._one:
            if self._read_at and time.monotonic() - self._read_at < (READ_S if self._archive else NONE_S):
                return
            found = await self._cloud.move(self._read)
            if found is not None:
                self._archive, self._answers, self._tag = found
            self._read_at = time.monotonic()

    def _read(self) -> tuple[zipfile.ZipFile | None, dict[str, Any], str] | None:
        """The archive in the bucket, None where it is the one that is known."""
        condition = {"IfNoneMatch": self._tag} if self._tag else {}
        try:
            answer = self._cloud.s3_for_files.get_object(Bucket=self._cloud.bucket, Key=EDITOR_FILES_KEY, **condition)
        except Exception as error:
            if error_code(error) in ("304", "NotModified"):
                return None
            if error_code(error) == "NoSuchKey":
                return None, {}, ""
            raise
        if answer["ContentLength"] > MOST_ARCHIVE_BYTES:
            return None, {}, ""
        archive = zipfile.ZipFile(io.BytesIO(answer["Body"].read()))
        return archive, dict(json.loads(archive.read("answers.json"))), answer["ETag"]


def is_route(route: str, path: str) -> bool:
    """Whether a path is one that a route such as `/node/{name}` means."""
    parts = re.split(r"(\{[^{}]*\})", route)
    pattern = "".join(
        "[^/]+" if part.startswith("{") and ":" not in part else ".*" if part.startswith("{") else re.escape(part)
        for part in parts
    )
    return re.fullmatch(pattern, path) is not None


def template_address(name: str) -> str | None:
    """Where an example workflow of a custom node lies in the archive, None for what is none."""
    match = re.fullmatch(r"/(?:api/)?(workflow_templates/[^/]+/[^/]+\.json)", name)
    return match[1] if match else None


def listed(subgraphs: Mapping[str, Any] | None) -> dict[str, Any]:
    """Subgraphs as they are listed: without what is in them."""
    found = {number: each for number, each in (subgraphs or {}).items() if isinstance(each, dict)}
    return {number: {name: value for name, value in each.items() if name != "data"} for number, each in found.items()}
