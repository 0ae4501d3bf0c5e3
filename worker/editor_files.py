"""What ComfyUI's editor needs of an instance besides the list of nodes, so that it works where no instance is: the web
files that custom nodes bring, their translations, examples and subgraphs. It is one archive, stored once per image."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from ground.comfyui import EDITOR_FILES_KEY, ComfyUI
from worker.bucket import Bucket

logger = logging.getLogger(__name__)

ANSWERS = {
    "i18n": "/i18n",
    "workflow_templates": "/workflow_templates",
    "global_subgraphs": "/global_subgraphs",
    "folder_paths": "/internal/folder_paths",
    "model_folders": "/experiment/models",
}
"""What is asked of ComfyUI, by the name under which the answer is kept. Older ones do not know all of it."""
MOST_FILE_BYTES = 8 * 1024 * 1024
MOST_BYTES = 64 * 1024 * 1024
MOST_FILES = 5000
"""What is more than that stays away, and the log says so."""
DEPTH = 4
"""So deep in a custom node's folder its web files are looked for."""
LEFT_OUT = re.compile(r"^\.|^__pycache__$|\.pyc?$|^node_modules$")
"""Names of files and folders that no page needs."""
ROUTE = re.compile(
    r"""\.(?:get|post|put|delete|patch|add_(?:get|post|put|delete|route))\(\s*(?:["']\w+["'],\s*)?[rf]?["'](/[^"'\s]+)["']"""
)
"""A route that a custom node adds to ComfyUI's server, in its code."""
ZIP_DATE = (1980, 1, 1, 0, 0, 0)


def store_editor_files(comfy: ComfyUI, comfy_folder: Path, bucket: Bucket) -> None:
    """Store the archive unless it is stored already. Raises what boto3 and ComfyUI raise."""
    archive = pack(comfy, comfy_folder / "custom_nodes")
    digest = hashlib.sha256(archive).hexdigest()
    stored = bucket.head(EDITOR_FILES_KEY)
    if stored is not None and stored["Metadata"].get("sha256") == digest:
        return
    bucket.write(EDITOR_FILES_KEY, archive, ContentType="application/zip", Metadata={"sha256": digest})
    logger.info("Stored what the editor needs of custom nodes in %s", EDITOR_FILES_KEY)


def pack(comfy: ComfyUI, custom_nodes: Path) -> bytes:
    """The archive: `answers.json`, and the files by their addresses. The same files make the same bytes."""
    answers: dict[str, Any] = {
        name: found for name, path in ANSWERS.items() if (found := read(comfy, path)) is not None
    }
    scripts = [each for each in read(comfy, "/extensions") or [] if not each.startswith("/extensions/core/")]
    answers |= {"extensions": sorted(scripts), "routes": routes_of(custom_nodes)}
    for number in list(answers.get("global_subgraphs", {})):
        answers["global_subgraphs"][number] = read(comfy, f"/global_subgraphs/{quote(number)}")
    out = io.BytesIO()
    left, count = MOST_BYTES, 0
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, body in [*files_of(comfy, custom_nodes, scripts), *templates_of(comfy, answers)]:
            if len(body) > min(MOST_FILE_BYTES, left) or count >= MOST_FILES:
                logger.warning("The editor will not have %s: it is too large, or one too many", name)
                continue
            left, count = left - len(body), count + 1
            archive.writestr(zipfile.ZipInfo(name, ZIP_DATE), body, zipfile.ZIP_DEFLATED)
        text = json.dumps(answers, sort_keys=True).encode()
        archive.writestr(zipfile.ZipInfo("answers.json", ZIP_DATE), text, zipfile.ZIP_DEFLATED)
    return out.getvalue()


def read(comfy: ComfyUI, path: str) -> Any:
    """The JSON of a call, None where this ComfyUI does not know it."""
    body = comfy.fetch(path)
    return None if body is None else json.loads(body)


def files_of(comfy: ComfyUI, custom_nodes: Path, scripts: list[str]) -> Iterator[tuple[str, bytes]]:
    """The web files of all custom nodes. ComfyUI lists scripts only, but serves all that lies beside them: so their
    folders are looked for on the disk, and where one is not found its scripts are fetched."""
    by_node: dict[str, list[str]] = {}
    for script in scripts:
        _, _, node, *parts = script.split("/")
        if parts and ".." not in parts:
            by_node.setdefault(node, []).append("/".join(parts))
    for node, names in sorted(by_node.items()):
        folder = web_folder(comfy, custom_nodes, node, names)
        if folder is not None:
            for path in below(folder):
                yield f"extensions/{unquote(node)}/{path.relative_to(folder).as_posix()}", path.read_bytes()
            continue
        for name in sorted(names):
            body = comfy.fetch(f"/extensions/{node}/{quote(name)}")
            if body is not None:
                yield f"extensions/{unquote(node)}/{name}", body


def web_folder(comfy: ComfyUI, custom_nodes: Path, node: str, names: list[str]) -> Path | None:
    """The folder from which ComfyUI serves these scripts, None where there is none such."""
    own = custom_nodes / unquote(node)
    tops = [own] if own.is_dir() else sorted(path for path in custom_nodes.glob("*") if path.is_dir())
    served: bytes | None = None
    for top in tops:
        for folder in folders_below(top):
            if all((folder / name).is_file() for name in names):
                served = served or comfy.fetch(f"/extensions/{node}/{quote(names[0])}")
                if served == (folder / names[0]).read_bytes():
                    return folder
    return None


def folders_below(top: Path) -> Iterator[Path]:
    """A folder and those below it, as deep as web files lie."""
    for folder, names, _ in os.walk(top):
        path = Path(folder)
        yield path
        deep = len(path.relative_to(top).parts) >= DEPTH
        names[:] = [] if deep else sorted(name for name in names if not LEFT_OUT.search(name))


def below(folder: Path) -> Iterator[Path]:
    """The files below a folder that a page may need, in order."""
    for parent, names, files in os.walk(folder):
        names[:] = sorted(name for name in names if not LEFT_OUT.search(name))
        for name in sorted(files):
            path = Path(parent, name)
            if not LEFT_OUT.search(name) and path.is_file() and not path.is_symlink():
                yield path


def templates_of(comfy: ComfyUI, answers: dict[str, Any]) -> Iterator[tuple[str, bytes]]:
    """The example workflows of custom nodes."""
    for node, names in sorted((answers.get("workflow_templates") or {}).items()):
        for name in sorted(names):
            body = comfy.fetch(f"/api/workflow_templates/{quote(node)}/{quote(name)}.json")
            if body is not None:
                yield f"workflow_templates/{node}/{name}.json", body


def routes_of(custom_nodes: Path) -> dict[str, str]:
    """The routes that custom nodes add to ComfyUI's server, each with the folder of its node: without an instance nobody
    answers them, and whoever asks is to be told."""
    found: dict[str, str] = {}
    for top in sorted(path for path in custom_nodes.glob("*") if path.is_dir()):
        for folder in folders_below(top):
            for path in sorted(folder.glob("*.py")):
                text = (
                    path.read_text(encoding="utf-8", errors="replace")
                    if path.stat().st_size < MOST_FILE_BYTES
                    else ""
                )
                if "PromptServer" in text:
                    found |= dict.fromkeys(ROUTE.findall(text), top.name)
    return found
