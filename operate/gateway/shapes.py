"""Jobs in the shapes of ComfyUI's answers: pure functions from what was posted and what the receipt says.

The shapes are those of ComfyUI 0.33. What a receipt does not say, such as which nodes came from a cache, is empty.
"""

from __future__ import annotations

import mimetypes
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from operate.gateway.files import place_of_key
from operate.gateway.jobs import Posted

NOBODY_POSTED = Posted({}, {}, 0, [])
"""What is shown of a job that was sent in another way: its workflow is known to its sender alone."""
ENDS = {"succeeded": "completed", "failed": "failed", "interrupted": "cancelled"}
"""The end of a job in the index, and the status that /api/jobs has for it."""
STATUSES = ("pending", "in_progress", "completed", "failed", "cancelled")
PREVIEWED = ("images", "video", "audio", "3d", "text")
SOLIDS = (".obj", ".fbx", ".gltf", ".glb", ".usdz")
TEXTS = (".txt", ".md", ".json")


def queue_item(job_id: str, posted: Posted) -> list[Any]:
    """A job in /queue."""
    return [posted.number, job_id, posted.prompt, posted.extra_data, posted.outputs]


def history_entry(job_id: str, posted: Posted | None, result: Mapping[str, Any]) -> dict[str, Any]:
    """A job in /history."""
    posted = posted or NOBODY_POSTED
    outputs = outputs_of(result, posted.prompt)
    is_success = result["status"] == "succeeded"
    return {
        "prompt": queue_item(job_id, posted),
        "outputs": outputs,
        "status": {
            "status_str": "success" if is_success else "error",
            "completed": is_success,
            "messages": [[name, data] for name, data in messages_of(job_id, result)],
        },
        "meta": {
            node_id: {"node_id": node_id, "display_node": node_id, "parent_node": None, "real_node_id": node_id}
            for node_id in outputs
        },
    }


def outputs_of(result: Mapping[str, Any], prompt: Mapping[str, Any]) -> dict[str, dict[str, list[Any]]]:
    """What the nodes showed: files under the names by which /view finds them, and values."""
    outputs: dict[str, dict[str, list[Any]]] = {}
    for file in result.get("outputs") or []:
        place = place_of_key(file["s3_key"])
        if file["node_id"] and place:
            outputs.setdefault(file["node_id"], {}).setdefault(file["kind"], []).append(place)
            if _moves(file, prompt.get(file["node_id"], {})):
                outputs[file["node_id"]]["animated"] = [True]
    for node_id, values in (result.get("values") or {}).items():
        for kind, items in values.items():
            outputs.setdefault(node_id, {}).setdefault(kind, []).extend(items)
    return outputs


def _moves(file: Mapping[str, Any], node: Mapping[str, Any]) -> bool:
    """Whether ComfyUI says `animated` of it, which a receipt leaves out."""
    is_video = (mimetypes.guess_type(file["filename"])[0] or "").startswith("video/")
    return file["kind"] == "images" and (is_video or str(node.get("class_type", "")).startswith("SaveAnimated"))


def messages_of(job_id: str, result: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """What ComfyUI has said of a job that ended, as far as its history keeps it: beginning, cache, end."""
    start, end = (_ms(result["timings"][name]) for name in ("started_at", "finished_at"))
    return [
        ("execution_start", {"prompt_id": job_id, "timestamp": start}),
        ("execution_cached", {"nodes": [], "prompt_id": job_id, "timestamp": start}),
        end_of(job_id, result, end),
    ]


def end_of(job_id: str, result: Mapping[str, Any], at_ms: int) -> tuple[str, dict[str, Any]]:
    """The message that ends a job: execution_success, execution_error or execution_interrupted."""
    error = result.get("error")
    if not error:
        return "execution_success", {"prompt_id": job_id, "timestamp": at_ms}
    node_id, node_type = error.get("node_id") or "", error.get("node_type") or ""
    for refused, node in (error.get("node_errors") or {}).items() if not node_id else ():
        node_id, node_type = refused, node.get("class_type", "")
        break
    where: dict[str, Any] = {"prompt_id": job_id, "node_id": node_id, "node_type": node_type, "executed": []}
    if error["kind"] in ("cancelled", "interrupted"):
        return "execution_interrupted", {**where, "timestamp": at_ms}
    exception, _, trace = (error.get("detail") or "").partition("\n")
    is_exception = error["kind"] in ("execution_error", "out_of_memory") and exception.replace(".", "").isidentifier()
    return "execution_error", {
        **where,
        "exception_message": error["message"].removeprefix(f"node {node_id} {node_type}: "),
        "exception_type": exception if is_exception else error["kind"],
        "traceback": [f"{line}\n" for line in trace.splitlines()],
        "current_inputs": {},
        "current_outputs": [],
        "timestamp": at_ms,
    }


def _ms(moment: str) -> int:
    return int(datetime.fromisoformat(moment).timestamp() * 1000)


# --- /api/jobs -------------------------------------------------------------------------------------------


def unfinished_job(job_id: str, posted: Posted, *, is_running: bool) -> dict[str, Any]:
    """A job that waits or runs in /api/jobs."""
    return {
        "id": job_id,
        "status": "in_progress" if is_running else "pending",
        "priority": posted.number,
        **_dates_of(posted),
        "outputs_count": 0,
        "previewable_outputs_count": 0,
    }


def ended_job(
    job_id: str, posted: Posted | None, result: Mapping[str, Any], *, is_whole: bool = False
) -> dict[str, Any]:
    """A job that has ended in /api/jobs; `is_whole` with all that is known of it."""
    posted = posted or NOBODY_POSTED
    entry = history_entry(job_id, posted, result)
    (_, start), _, (end_name, end) = entry["status"]["messages"]
    how = {"execution_success": "completed", "execution_error": "failed"}.get(end_name, "cancelled")
    count, previewed, preview = _summary(entry["outputs"])
    job = {
        "id": job_id,
        "status": how,
        "priority": posted.number,
        **_dates_of(posted),
        "execution_start_time": start["timestamp"],
        "execution_end_time": end["timestamp"],
        **({"execution_error": end} if how == "failed" else {}),
        "outputs_count": count,
        "previewable_outputs_count": previewed,
        **({"preview_output": preview} if preview else {}),
    }
    if is_whole:
        job["outputs"] = entry["outputs"]
        job["execution_status"] = entry["status"]
        job["workflow"] = {"prompt": posted.prompt, "extra_data": posted.extra_data}
    return job


def _dates_of(posted: Posted) -> dict[str, Any]:
    info = posted.extra_data.get("extra_pnginfo")
    workflow = info.get("workflow") if isinstance(info, dict) else None
    workflow_id = workflow.get("id") if isinstance(workflow, dict) else None
    return {"create_time": posted.extra_data.get("create_time", 0)} | (
        {"workflow_id": workflow_id} if workflow_id else {}
    )


def workflow_id_of(posted: Posted | None) -> str | None:
    """The id that the editor gave the workflow, if it was posted with one."""
    return _dates_of(posted).get("workflow_id") if posted else None


def _summary(outputs: Mapping[str, Mapping[str, list[Any]]]) -> tuple[int, int, dict[str, Any] | None]:
    """How many files there are, how many can be shown, and which one stands for the job: a saved picture before one
    of temp/, that before a text."""
    count = previewed = 0
    best: tuple[int, dict[str, Any] | None] = (9, None)
    for node_id, kinds in outputs.items():
        for kind, items in kinds.items():
            for item in items if kind != "animated" else []:
                shown: dict[str, Any] = {"nodeId": node_id, "mediaType": kind}
                if isinstance(item, dict) and isinstance(item.get("filename"), str):
                    count += 1
                    rank = _rank(kind, item)
                    previewed += rank < 9
                    shown = item | shown
                elif isinstance(item, str) and kind == "text":
                    rank = 3
                    shown |= {"content": item[:1024]} | ({"truncated": True} if len(item) > 1024 else {})
                else:
                    continue
                if rank < best[0]:
                    best = rank, shown
    return count, previewed, best[1]


def _rank(kind: str, file: Mapping[str, Any]) -> int:
    name = file["filename"].lower()
    if name.endswith(TEXTS) or kind == "text":
        return 2
    mime = mimetypes.guess_type(name)[0] or ""
    if kind in PREVIEWED or mime.startswith(("image/", "video/", "audio/")) or name.endswith(SOLIDS):
        return 0 if file["type"] == "output" else 1
    return 9
