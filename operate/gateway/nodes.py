"""What the fleet's ComfyUI can do, as the instances have stored it, with what has come into the bucket since."""

from __future__ import annotations

import asyncio
import copy
import gzip
import hashlib
import json
import re
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

from comfy_utils import OBJECT_INFO_KEY, error_code
from ground.comfyui import SYSTEM_STATS_KEY
from operate.gateway.cloud import Cloud

NODES_S, FILES_S = 60.0, 10.0
"""So long what was read of the nodes, and of models and inputs, is believed."""
MOST_INPUTS = 5000
"""So many inputs stand in the lists of choices."""

FOLDERS = (
    "checkpoints", "configs", "loras", "vae", "text_encoders", "diffusion_models", "clip_vision", "style_models",
    "embeddings", "diffusers", "vae_approx", "controlnet", "gligen", "upscale_models", "latent_upscale_models",
    "hypernetworks", "photomaker", "classifiers", "model_patches", "audio_encoders",
)  # fmt: skip
"""The folders that ComfyUI 0.33 has for models, whether there is one in them or not."""
ALIASES = {"clip": "text_encoders", "unet": "diffusion_models"}
"""Folders of old names, which ComfyUI reads as well."""
FOLDER_OF_INPUT = {
    "ckpt_name": "checkpoints", "lora_name": "loras", "vae_name": "vae", "control_net_name": "controlnet",
    "unet_name": "diffusion_models", "style_model_name": "style_models", "clip_name1": "text_encoders",
    "clip_name2": "text_encoders", "clip_name3": "text_encoders", "clip_name4": "text_encoders",
    "gligen_name": "gligen", "hypernetwork_name": "hypernetworks", "photomaker_model_name": "photomaker",
}  # fmt: skip
"""The folder of an input whose list is empty, and so does not tell; of ComfyUI's own loaders."""
FOLDER_OF_LOADER = {
    "CLIPLoader": "text_encoders", "CLIPVisionLoader": "clip_vision", "UpscaleModelLoader": "upscale_models",
    "ModelPatchLoader": "model_patches", "AudioEncoderLoader": "audio_encoders",
}  # fmt: skip
"""The same of loaders whose input's name says too little."""
MODEL_FILE = re.compile(r"\.(bin|ckpt|pkl|pt|pt2|pth|safetensors|sft|gguf|yaml)$", re.IGNORECASE)
PREVIEW_KINDS = ("png", "jpg", "jpeg", "webp")
PREVIEW_FILE = re.compile(rf"\.({'|'.join(PREVIEW_KINDS)})$")
KIND_OF_UPLOAD = {
    "image_upload": re.compile(r"\.(png|jpe?g|webp|gif|bmp|tiff?|avif)$", re.IGNORECASE),
    "video_upload": re.compile(r"\.(mp4|mov|mkv|webm|avi|m4v)$", re.IGNORECASE),
    "audio_upload": re.compile(r"\.(wav|mp3|flac|ogg|opus|m4a|aac|mp4|webm|mov|mkv)$", re.IGNORECASE),
}
"""What of input/ a node lists whose input has this option."""


class ModelFile(NamedTuple):
    """A model in the bucket: the folder of its key, its size, when it was written."""

    folder: str
    size: int
    modified_s: float


class Known:
    """Something that is read again when it is too old; who asks meanwhile shares the reading."""

    def __init__(self) -> None:
        self.value: Any = None
        self.at = 0.0
        self.lock = asyncio.Lock()

    def is_old(self, seconds: float) -> bool:
        return not self.at or time.monotonic() - self.at > seconds


class Nodes:
    """Nodes, models and inputs of one environment."""

    def __init__(self, cloud: Cloud) -> None:
        self._cloud = cloud
        self._nodes, self._models, self._inputs, self._body = Known(), Known(), Known(), Known()
        self._tag = ""
        self._previews: set[str] = set()

    async def nodes(self) -> dict[str, Any] | None:
        """The stored /object_info, None where no instance has been there yet."""
        async with self._nodes.lock:
            if self._nodes.is_old(NODES_S if self._nodes.value else FILES_S):
                self._nodes.value, self._tag = await self._cloud.call(self._read_nodes)
                self._nodes.at = time.monotonic()
        found: dict[str, Any] | None = self._nodes.value
        return found

    def _read_nodes(self) -> tuple[dict[str, Any] | None, str]:
        condition = {"IfNoneMatch": self._tag} if self._tag else {}
        try:
            answer = self._cloud.s3.get_object(Bucket=self._cloud.bucket, Key=OBJECT_INFO_KEY, **condition)
            return dict(json.loads(gzip.decompress(answer["Body"].read()))), answer["ETag"]
        except Exception as error:
            if error_code(error) in ("304", "NotModified"):
                return self._nodes.value, self._tag
            if error_code(error) == "NoSuchKey":
                return None, ""
            raise

    async def models(self) -> dict[str, list[str]]:
        """The models in the bucket: by folder, as ComfyUI names them there."""
        return {folder: list(files) for folder, files in (await self.model_files()).items()}

    async def model_files(self) -> dict[str, dict[str, ModelFile]]:
        """The same with what is known of each file."""
        async with self._models.lock:
            if self._models.is_old(FILES_S):
                found: dict[str, dict[str, ModelFile]] = {folder: {} for folder in FOLDERS}
                previews: set[str] = set()
                async for page in self._cloud.names("models/"):
                    for item in page:
                        _, folder, *name = item["Key"].split("/")
                        if name and MODEL_FILE.search(name[-1]):
                            file = ModelFile(folder, item["Size"], item["LastModified"].timestamp())
                            found.setdefault(ALIASES.get(folder, folder), {})["/".join(name)] = file
                        elif PREVIEW_FILE.search(item["Key"]):
                            previews.add(item["Key"])
                self._models.value = {folder: dict(sorted(files.items())) for folder, files in found.items()}
                self._previews = previews
                self._models.at = time.monotonic()
        models: dict[str, dict[str, ModelFile]] = self._models.value
        return models

    async def preview_of(self, folder: str, name: str) -> str | None:
        """The key of the picture that lies beside a model, None where there is none."""
        file = (await self.model_files()).get(folder, {}).get(name)
        if file is None:
            return None
        stem = f"models/{file.folder}/{name.rpartition('.')[0]}"
        return next(
            (key for key in (f"{stem}{middle}.{kind}" for middle in ("", ".preview") for kind in PREVIEW_KINDS) if key in self._previews),
            None,
        )  # fmt: skip

    async def inputs(self) -> list[str]:
        """The files at the top of input/, which is what ComfyUI's lists show of it."""
        async with self._inputs.lock:
            if self._inputs.is_old(FILES_S):
                names: list[str] = []
                async for page in self._cloud.names("input/", delimiter="/"):
                    names += [item["Key"].removeprefix("input/") for item in page if "Key" in item]
                    if len(names) > MOST_INPUTS:
                        break
                self._inputs.value = sorted(name for name in names if name)[:MOST_INPUTS]
                self._inputs.at = time.monotonic()
        inputs: list[str] = self._inputs.value
        return inputs

    def note_input(self) -> None:
        """Have the inputs listed anew, because one has come."""
        self._inputs.at = 0.0

    async def object_info(self) -> tuple[bytes, str] | None:
        """The answer of /object_info, gzip'd, and its ETag: the stored one with what is in the bucket now."""
        nodes = await self.nodes()
        if nodes is None:
            return None
        models, inputs = await self.models(), await self.inputs()
        async with self._body.lock:
            if self._body.is_old(0) or self._body.at < max(self._nodes.at, self._models.at, self._inputs.at):
                began = time.monotonic()
                self._body.value = await self._cloud.call(_pack, nodes, models, inputs)
                self._body.at = began
        body: tuple[bytes, str] = self._body.value
        return body

    async def node_info(self, name: str) -> dict[str, Any] | None:
        """What is known of one class, {} where there is none such; None where no nodes are known."""
        nodes = await self.nodes()
        if nodes is None:
            return None
        one = {name: nodes[name]} if "input" in nodes.get(name, {}) else {}
        return with_files(one, await self.models(), await self.inputs())

    async def replacements(self) -> dict[str, Any]:
        """What ComfyUI puts in the place of nodes that are gone."""
        nodes = await self.nodes() or {}
        return {name: node["replaced_by"] for name, node in nodes.items() if "replaced_by" in node}

    async def system_stats(self) -> dict[str, Any] | None:
        """The /system_stats of the instance that came last, None where none has stored any."""
        stats: dict[str, Any] | None = await self._cloud.read_json(SYSTEM_STATS_KEY)
        return stats


def _pack(nodes: dict[str, Any], models: dict[str, list[str]], inputs: list[str]) -> tuple[bytes, str]:
    text = json.dumps(with_files(nodes, models, inputs)).encode()
    return gzip.compress(text, 6), f'"{hashlib.sha256(text).hexdigest()[:32]}"'


def with_files(nodes: Mapping[str, Any], models: Mapping[str, list[str]], inputs: list[str]) -> dict[str, Any]:
    """The nodes with the bucket's models and inputs in their lists of choices, beside those that stand there.

    A list's folder is the one that has its models; where it is empty, the one that ComfyUI's own loaders read.
    """
    folders_of: dict[str, set[str]] = {}
    for folder, names in models.items():
        for name in names:
            folders_of.setdefault(name, set()).add(folder)
    made = {}
    for class_type, node in nodes.items():
        if "input" not in node:  # only said to be replaced
            continue
        more: dict[tuple[str, str], list[str]] = {}
        for category in ("required", "optional"):
            for name, config in (node["input"].get(category) or {}).items():
                choices = _choices(config)
                if choices is None:
                    continue
                options = config[1] if len(config) > 1 and isinstance(config[1], dict) else {}
                coming = _inputs_for(options, inputs)
                if coming is None:
                    coming = models.get(_folder_of(class_type, name, choices, folders_of), [])
                if new := [one for one in coming if one not in choices]:
                    more[category, name] = new
        if more:
            node = {**node, "input": copy.deepcopy(node["input"])}  # noqa: PLW2901
            for (category, name), new in more.items():
                choices = _choices(node["input"][category][name])
                assert choices is not None
                choices += new
        made[class_type] = node
    return made


def _choices(config: Any) -> list[Any] | None:
    """The list of choices of an input, None where it has none: [[choice, …], …] or ["COMBO", {"options": …}]."""
    if not (isinstance(config, list) and config):
        return None
    if isinstance(config[0], list):
        return config[0]
    options = config[1].get("options") if len(config) > 1 and isinstance(config[1], dict) else None
    return options if config[0] == "COMBO" and isinstance(options, list) else None


def _inputs_for(options: Mapping[str, Any], inputs: list[str]) -> list[str] | None:
    """The inputs that an input with these options lists; None where it lists none at all."""
    if options.get("image_folder", "input") != "input":
        return []
    kinds = [kind for name, kind in KIND_OF_UPLOAD.items() if options.get(name)]
    return [name for name in inputs if any(kind.search(name) for kind in kinds)] if kinds else None


def _folder_of(class_type: str, name: str, choices: list[Any], folders_of: Mapping[str, set[str]]) -> str:
    """The folder whose models an input lists, "" where it lists none."""
    counts = Counter(folder for one in choices if isinstance(one, str) for folder in folders_of.get(one, ()))
    if counts:
        return counts.most_common(1)[0][0]
    if choices and not any(isinstance(one, str) and MODEL_FILE.search(one) for one in choices):
        return ""
    return FOLDER_OF_LOADER.get(class_type) or FOLDER_OF_INPUT.get(name, "")
