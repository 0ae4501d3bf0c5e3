"""What a fleet has installed, as the tests of check and upload pretend."""

from __future__ import annotations

import copy
import gzip
import json
from typing import Any

import comfyui_standin
from places import CLOUD
from workplace import Site

from comfy_utils import (
    OBJECT_INFO_KEY,
)

RECORDINGS = json.loads((CLOUD / "recordings.json").read_text())


def object_info() -> dict[str, Any]:
    """/object_info of the recorded server, as far as it was recorded; of the other nodes the stand-in's."""
    settings = comfyui_standin.Settings.__new__(comfyui_standin.Settings)
    names = set(comfyui_standin.NODES) - {"LoadImage", "CheckpointLoaderSimple"}
    nodes = {name: comfyui_standin.describe_node(name, settings) for name in names}
    for recorded in (value["body"] for name, value in RECORDINGS.items() if name.startswith("object_info_")):
        nodes |= copy.deepcopy(recorded)
    nodes["CheckpointLoaderSimple"]["input"]["required"]["ckpt_name"][0] = ["v1-5-pruned-emaonly-fp16.safetensors"]
    nodes["Custom"] = {
        "input": {"required": {"mode": [["a", "b"]], "level": ["INT", {"max": 9}], "what": ["*"]}, "optional": {}},
        "output": ["IMAGE"], "output_node": False, "python_module": "custom_nodes.of_somebody",
    }  # fmt: skip
    nodes["Dynamic"] = {
        "input": {"required": {
            "parts": ["COMFY_AUTOGROW_V3", {"template": {"input": {"required": {"part": ["INT"]}}, "prefix": "p", "min": 0, "max": 2}}],
            "later": ["COMFY_OF_A_LATER_KIND_V4", {}], "kind": ["COMBO", {"options": ["x"]}],
        }},
        "output": ["COMFY_MATCHTYPE_V3"], "output_node": False, "python_module": "comfy_extras.nodes_x",
    }  # fmt: skip
    return nodes


def saving(class_type: str, output: int = 0, /, **inputs: Any) -> dict[str, Any]:
    """A node, 10, whose output is saved."""
    return {
        "10": {"class_type": class_type, "inputs": inputs, "_meta": {"title": "Mine"}},
        "11": {"class_type": "SaveImage", "inputs": {"images": ["10", output], "filename_prefix": "y"}},
    }


def store_nodes(site: Site, nodes: dict[str, Any]) -> None:
    """Store what a fleet has installed, as a worker does."""
    site.s3.put_object(Bucket=site.bucket, Key=OBJECT_INFO_KEY, Body=gzip.compress(json.dumps(nodes).encode()))
