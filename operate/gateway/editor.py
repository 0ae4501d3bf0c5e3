"""ComfyUI's own editor before a fleet: its page, and what it asks of a server beside jobs, files and what people keep."""

from __future__ import annotations

import mimetypes
from pathlib import Path
from typing import Any

from aiohttp import web

from operate.gateway.cloud import Cloud
from operate.gateway.editor_package import EDITOR, Package, other_version
from operate.gateway.editor_userdata import mark_browser
from operate.gateway.editor_web import EditorWeb, listed, template_address
from operate.gateway.guard import Handler
from operate.gateway.nodes import ALIASES, Nodes

MODELS_ROOT = "/home/ubuntu/comfy/ComfyUI/models"
"""Where instances have the models, which the editor shows beside their names."""
MODEL_KINDS = [".bin", ".ckpt", ".pkl", ".pt", ".pt2", ".pth", ".safetensors", ".sft"]
LINE = "/extensions/fleet/line.js"
"""Our own: what the editor has no place for."""
NO_MODELS = ("configs", "custom_nodes")
"""Folders that ComfyUI leaves out of its list of models."""


class Editor:
    """The page and its files, and the calls that only an editor makes."""

    def __init__(self, env: str, cloud: Cloud, nodes: Nodes) -> None:
        self._env, self._cloud, self._nodes = env, cloud, nodes
        self._package, self._web = Package(), EditorWeb(cloud)

    def routes(self) -> list[tuple[str, str, Handler]]:
        """Method, path and handler of each."""
        return [
            ("GET", "/extensions", self.get_extensions),
            ("GET", "/i18n", self.get_i18n),
            ("GET", "/workflow_templates", self.get_templates),
            ("GET", "/global_subgraphs", self.get_subgraphs),
            ("GET", "/global_subgraphs/{id}", self.get_subgraph),
            ("GET", "/internal/folder_paths", self.get_folder_paths),
            ("GET", "/internal/files/{place}", self.get_files),
            ("GET", "/experiment/models", self.get_folders),
            ("GET", "/experiment/models/{folder}", self.get_models),
            ("GET", "/experiment/models/preview/{folder}/{index}/{name:.+}", self.get_preview),
        ]

    @property
    def first_settings(self) -> dict[str, Any]:
        """Where there are no example workflows, a newcomer is not shown an empty list of them."""
        return {} if self._package.has_templates else {"Comfy.TutorialCompleted": True}

    async def can_open(self) -> bool:
        """Whether an instance has said what there is to edit with."""
        return bool(await self._nodes.nodes()) and await self._nodes.system_stats() is not None

    async def remark(self) -> str | None:
        """What whoever starts serve should know of the editor; None where all is as it should be."""
        if self._package.version is None:
            return None
        if not await self.can_open():
            return (
                "The editor opens once an instance has told which nodes it has: post a job, such as by ./send_job.py"
            )
        wanted = other_version(self._package.version, await self._nodes.system_stats())
        if wanted is None:
            return None
        return (
            f"The editor here is {EDITOR} {self._package.version}, and the fleet's ComfyUI asks for {wanted}: "
            f"pip install {EDITOR}=={wanted}"
        )

    # --- The page ----------------------------------------------------------------------------------------

    async def page(self, request: web.Request) -> web.StreamResponse:
        """The editor, or where there is none how to have one."""
        answer = await self._package.answer(request, "index.html")
        if answer is None:
            return web.Response(
                text=f"This is the fleet {self._env}, by the calls of a ComfyUI: POST /prompt, GET /ws, /history, /view "
                f"and the others. There is no editor here: for one, pip install -r requirements-serve.txt\n"
                "How the fleet stands: /fleet\n"
            )
        if not await self.can_open():
            raise web.HTTPFound("/fleet")
        mark_browser(request, answer)
        return answer

    async def file(self, request: web.Request) -> web.StreamResponse | None:
        """One of the editor's files, None where there is none of that name."""
        if request.path == LINE:
            return web.FileResponse(Path(__file__).with_name("editor_line.js"), headers={"Cache-Control": "no-cache"})
        own = await self._package.answer(request, request.path.lstrip("/"))
        if own is not None:
            return own
        name = template_address(request.path) or request.path.lstrip("/")
        return (
            await self._web.answer(request, name) if name.startswith(("extensions/", "workflow_templates/")) else None
        )

    async def route_owner(self, path: str) -> str | None:
        """The custom node whose server would answer this on an instance, None where none is known to."""
        return await self._web.route_owner(path)

    # --- What it asks for --------------------------------------------------------------------------------

    async def get_extensions(self, _: web.Request) -> web.Response:
        """The scripts that the editor loads."""
        return web.json_response([*self._package.extensions(), LINE, *await self._web.extensions()])

    async def get_i18n(self, _: web.Request) -> web.Response:
        """Translations of custom nodes."""
        return web.json_response((await self._web.answers()).get("i18n", {}))

    async def get_templates(self, _: web.Request) -> web.Response:
        """Which example workflows custom nodes bring."""
        return web.json_response((await self._web.answers()).get("workflow_templates", {}))

    async def get_subgraphs(self, _: web.Request) -> web.Response:
        """Which subgraphs ComfyUI and custom nodes bring."""
        return web.json_response(listed((await self._web.answers()).get("global_subgraphs")))

    async def get_subgraph(self, request: web.Request) -> web.Response:
        """One of them."""
        found = ((await self._web.answers()).get("global_subgraphs") or {}).get(request.match_info["id"])
        return web.json_response(found) if found else web.Response(status=404)

    async def get_folder_paths(self, _: web.Request) -> web.Response:
        """Where the instances have which models."""
        known = {folder: [f"{MODELS_ROOT}/{folder}"] for folder in await self._nodes.models()}
        return web.json_response(known | ((await self._web.answers()).get("folder_paths") or {}))

    async def get_files(self, request: web.Request) -> web.Response:
        """What lies at the top of a folder: inputs do, outputs lie in the folders of their jobs."""
        place = request.match_info["place"]
        if place not in ("output", "input", "temp"):
            return web.json_response({"error": "Invalid directory type"}, status=400)
        names = await self._nodes.inputs() if place == "input" else []
        return web.json_response([f"{name} [{place}]" for name in names if not name.startswith(".")])

    async def get_folders(self, _: web.Request) -> web.Response:
        """The folders of models."""
        told = (await self._web.answers()).get("model_folders") or []
        names = {each["name"] for each in told}
        folders = [each for each in await self._nodes.models() if each not in NO_MODELS and each not in names]
        return web.json_response(
            told
            + [{"name": each, "folders": [f"{MODELS_ROOT}/{each}"], "extensions": MODEL_KINDS} for each in folders]
        )

    async def get_models(self, request: web.Request) -> web.Response:
        """The models of a folder."""
        asked = request.match_info["folder"]
        files = (await self._nodes.model_files()).get(ALIASES.get(asked, asked))
        if files is None:
            return web.Response(status=404)
        return web.json_response(
            [
                {
                    "name": name,
                    "pathIndex": 0,
                    "modified": file.modified_s,
                    "created": file.modified_s,
                    "size": file.size,
                }
                for name, file in files.items()
            ]
        )

    async def get_preview(self, request: web.Request) -> web.Response:
        """The picture that lies beside a model, as it is."""
        asked = request.match_info["folder"]
        key = await self._nodes.preview_of(ALIASES.get(asked, asked), request.match_info["name"])
        body = await self._cloud.read(key) if key else None
        if key is None or body is None:
            return web.Response(status=404)
        kind = mimetypes.guess_type(key)[0] or "application/octet-stream"
        headers = {"X-Content-Type-Options": "nosniff", "Cache-Control": "private, max-age=3600"}
        return web.Response(body=body, content_type=kind, headers=headers)
