"""Where a workflow's nodes write their files, and how each job gets a folder of its own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from comfy_utils import InvalidWorkflowError, Workflow

# ComfyUI's own savers that put `filename_prefix` below the output folder, make its folders, and count up from the
# files that are there (get_save_image_path, seen in 0.3.64 and 0.33): the prefix is all that says where they write.
_COUNTING_SAVERS = re.compile(
    "SaveImage|SaveImageAdvanced|SaveAnimatedWEBP|SaveAnimatedPNG|SaveWEBM|SaveVideo|SaveSVGNode|SaveText|SaveLatent|"
    "SaveAudio|SaveAudioMP3|SaveAudioOpus|SaveAudioAdvanced|SaveGLB|Save3DAdvanced|SaveGaussianSplat|SavePointCloud|"
    "CheckpointSave|ImageOnlyCheckpointSave|ModelSave|CLIPSave|VAESave|LoraSave"
)
_SAVES = re.compile(r"save|writ|export", re.IGNORECASE)
_PLACE_WORD = re.compile("prefix|file(name|path)?|path|(sub)?folder(name)?|(sub)?dir(ectory)?")
CACHE_BREAKER = "comfy_on_ec2_job"
"""An input that no node has: ComfyUI drops it, but takes it for a change, and so runs the node again."""


def is_contained(workflow: Workflow) -> bool:
    """Whether it is known where all that this workflow writes will lie: in the folder that own_outputs gives it.

    Not of a node whose class or inputs speak of saving, files or folders, unless it is one of ComfyUI's own that are
    known to keep to their prefix.
    """
    return all(_is_prefixed(node) or not _may_save(node) for node in workflow.values())


def _is_prefixed(node: Mapping[str, Any]) -> bool:
    prefix = node.get("inputs", {}).get("filename_prefix")
    is_known = _COUNTING_SAVERS.fullmatch(node["class_type"])
    return bool(is_known) and isinstance(prefix, str) and prefix.strip("./") != ""


def _may_save(node: Mapping[str, Any]) -> bool:
    if node["class_type"] == "SaveImageWebsocket":
        return False
    return bool(_SAVES.search(node["class_type"])) or any(
        isinstance(value, str | list) and any(map(_PLACE_WORD.fullmatch, _words(name)))
        for name, value in node.get("inputs", {}).items()
    )


def _words(name: str) -> list[str]:
    return re.findall(r"[a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower())


def own_outputs(workflow: Workflow, job_id: str) -> Workflow:
    """A copy of `workflow` whose files can be told from those of other jobs, with nothing changed that a node may mind.

    One that is contained gets the job's own folder before each filename_prefix, so it may stand in ComfyUI's queue
    beside any other. Of any other nothing is rewritten, since a node may not make that folder, or may put another one
    before it; no two of that kind may be in ComfyUI at the same time. All nodes that may save or show files are made
    to run again, as ComfyUI's cache names files that have left the disk. Raises InvalidWorkflowError for a prefix
    that climbs out of its folder.
    """
    contained = is_contained(workflow)
    used = {value[0] for node in workflow.values() for value in node.get("inputs", {}).values() if _is_link(value)}
    owned = {}
    for node_id, node in workflow.items():
        inputs = dict(node.get("inputs", {}))
        prefix = inputs.get("filename_prefix")
        if isinstance(prefix, str) and ".." in re.split(r"[/\\]", prefix):
            raise InvalidWorkflowError(
                f"node {node_id}: filename_prefix {prefix!r:.80} leaves the job's folder: take out the '..'"
            )
        if contained and _is_prefixed(node):
            inputs["filename_prefix"] = f"{job_id}/{str(prefix).lstrip('/')}"
        elif node_id not in used or _may_save(node):
            inputs[CACHE_BREAKER] = job_id
        owned[node_id] = {**node, "inputs": inputs}
    return owned


def _is_link(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)
