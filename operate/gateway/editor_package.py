"""The editor's own files, as ComfyUI's packages in Python's index bring them, where these are installed beside serve."""

from __future__ import annotations

import asyncio
import gzip
import mimetypes
import re
from collections import OrderedDict
from collections.abc import Mapping
from importlib import metadata, util
from pathlib import Path
from typing import Any

from aiohttp import web

EDITOR = "comfyui-frontend-package"
SHARED = {EDITOR: ("", "static"), "comfyui-embedded-docs": ("docs/", "docs")}
"""Packages of which a folder is served: where in the address, and which."""
TEMPLATES = "comfyui-workflow-templates"
TEMPLATE_LISTS = re.compile(r"templates/index(_logo|\.[\w-]+)?\.json")
"""What the editor asks for where it shows example workflows: where that package is not installed, there are none."""

HASHED = re.compile(r"assets/.*-[\w-]{8}\.\w+")
"""Another content has another name."""
PACKED_FROM_BYTES = 1024
PACKED_TYPES = re.compile(r"text/.*|application/(javascript|json|manifest\+json|wasm)|image/svg\+xml")
KEPT_BYTES = 48 * 1024 * 1024
"""So much of what is packed is kept."""


class Package:
    """Which files there are, and their bytes, packed once."""

    def __init__(self) -> None:
        self.version = _version(EDITOR)
        """The editor's, None where there is none."""
        self._files: dict[str, tuple[Path, str]] = {}  # by its address: a file, and its ETag
        for package, (prefix, folder) in SHARED.items():
            found = _folder_of(package)
            if found is not None:
                for path in (found / folder).rglob("*"):
                    if path.is_file():
                        address = prefix + path.relative_to(found / folder).as_posix()
                        self._files[address] = path, f"{_version(package)}"
        for address, path in _templates().items():
            self._files[address] = path, f"{_version(TEMPLATES)}"
        self._packed: OrderedDict[str, bytes] = OrderedDict()
        self._packed_bytes = 0

    @property
    def has_templates(self) -> bool:
        """Whether there are example workflows."""
        return "templates/index.json" in self._files

    def extensions(self) -> list[str]:
        """The scripts among them that the editor loads by /extensions."""
        return [f"/{name}" for name in self._files if name.startswith("extensions/") and name.endswith(".js")]

    async def answer(self, request: web.Request, name: str) -> web.StreamResponse | None:
        """The file at an address, None where there is none."""
        found = self._files.get(name)
        if found is None:
            lists = TEMPLATE_LISTS.fullmatch(name) if self.version else None
            return web.json_response({} if lists[1] == "_logo" else []) if lists else None
        path, tag = found
        is_fixed = bool(HASHED.fullmatch(name))
        return await self._send(
            request, path, tag, "private, max-age=31536000, immutable" if is_fixed else "no-cache"
        )

    async def _send(self, request: web.Request, path: Path, tag: str, cache: str) -> web.StreamResponse:
        kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
        headers = {"Cache-Control": cache, "X-Content-Type-Options": "nosniff"}
        is_packed = bool(PACKED_TYPES.fullmatch(kind)) and path.stat().st_size >= PACKED_FROM_BYTES
        if not is_packed:
            return web.FileResponse(path, headers=headers)
        headers |= {"ETag": f'W/"{tag}"', "Vary": "Accept-Encoding"}
        if is_known(request, headers["ETag"]):
            return web.Response(status=304, headers=headers)
        if "gzip" not in request.headers.get("Accept-Encoding", ""):
            body = await asyncio.to_thread(path.read_bytes)
        else:
            headers["Content-Encoding"] = "gzip"
            body = await self._pack(path)
        return web.Response(body=body, headers=headers, content_type=kind, charset="utf-8")

    async def _pack(self, path: Path) -> bytes:
        name = str(path)
        if name in self._packed:
            self._packed.move_to_end(name)
            return self._packed[name]
        # Half the work of gzip's usual level 6 for 4 % more bytes: whoever opens the editor first waits for it.
        body = await asyncio.to_thread(lambda: gzip.compress(path.read_bytes(), 4))
        if name not in self._packed:
            self._packed[name] = body
            self._packed_bytes += len(body)
            while self._packed_bytes > KEPT_BYTES:
                self._packed_bytes -= len(self._packed.popitem(last=False)[1])
        return body


def is_known(request: web.Request, tag: str) -> bool:
    """Whether a browser has what this ETag names."""
    return tag in [each.strip() for each in request.headers.get("If-None-Match", "").split(",")]


def other_version(installed: str | None, system_stats: Mapping[str, Any] | None) -> str | None:
    """The editor's version that the fleet's ComfyUI asks for, where another is installed here."""
    system = (system_stats or {}).get("system")
    wanted = system.get("required_frontend_version") if isinstance(system, dict) else None
    is_version = isinstance(wanted, str) and re.fullmatch(r"\d+(\.\d+){1,3}\w*", wanted)
    return str(wanted) if installed and is_version and wanted != installed else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _folder_of(package: str) -> Path | None:
    """Where a package lies. It is not run."""
    found = util.find_spec(package.replace("-", "_"))
    return Path(found.origin).parent if found and found.origin else None


def _templates() -> dict[str, Path]:
    """The files of ComfyUI's example workflows, by address; they lie in several packages, which one of them knows."""
    try:
        import comfyui_workflow_templates as templates
    except ImportError:
        return {}
    return {
        f"templates/{asset.filename}": Path(templates.get_asset_path(entry.template_id, asset.filename))
        for entry in templates.iter_templates()
        for asset in entry.assets
    }
