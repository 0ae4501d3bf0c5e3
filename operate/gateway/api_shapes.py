"""The Comfy API v2's answers: pure functions from what the fleet knows of a job and its files.

The shapes are those of the contract's version 2.0.0, with the labels and the list that its SDK of today asks for.
"""

from __future__ import annotations

import json
import mimetypes
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from aiohttp import web

from comfy_utils import iso
from operate.gateway.index import KNOWN_S, Entry
from operate.gateway.jobs import Posted, Standing

PREFIX = "/api/v2"
STATUSES = ("queued", "running", "succeeded", "canceling", "canceled", "failed", "expired")
ENDED = ("succeeded", "canceled", "failed", "expired")
STATUS_OF_END = {"succeeded": "succeeded", "failed": "failed", "interrupted": "canceled", "deleted": "canceled"}
"""The end of a job in the index, and its status here."""
TYPE_OF_KIND = {
    "images": "image", "gifs": "video", "video": "video", "videos": "video", "audio": "audio", "text": "text",
    "latents": "latent",
}  # fmt: skip
"""What nodes call their outputs, where the file's name does not tell."""
REASONS = {"required_input_missing": "missing_input"}
"""A problem's word in the contract's own example; the others keep ComfyUI's."""


class Envelope(web.Response):
    """A refusal in the contract's shape."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        details: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        error = {"code": code, "message": message, "details": details}
        text = json.dumps({"error": error})
        super().__init__(status=status, text=text, content_type="application/json", headers=headers)


# --- Jobs ------------------------------------------------------------------------------------------------


def status_of(standing: Standing) -> str:
    """A job's status, but for one whose cancelling is under way."""
    if standing.result is not None:
        return status_of_result(standing.result)
    return {"waiting": "queued", "running": "running"}.get(standing.state, "canceled")


def status_of_result(result: Mapping[str, Any]) -> str:
    """How a job ended, by its receipt."""
    if result["status"] == "succeeded":
        return "succeeded"
    kind = (result.get("error") or {}).get("kind")
    return "canceled" if kind in ("cancelled", "interrupted") else "failed"


def job_of(
    standing: Standing,
    posted: Posted | None,
    status: str,
    *,
    place: int | None,
    outputs: list[dict[str, Any]],
    expires_at: datetime,
) -> dict[str, Any]:
    """A whole job. `place` is its place in the queue, the first being 1."""
    job_id, result, entry = standing.job_id, standing.result, standing.entry
    timings = (result or {}).get("timings") or {}
    ended_ms = entry.ended_ms if entry else None
    return {
        "id": job_id,
        "status": status,
        "created_at": created_at(standing),
        "started_at": timings.get("started_at") or (standing.progress or {}).get("started_at"),
        "completed_at": timings.get("finished_at") or (iso_of_ms(ended_ms) if ended_ms else None),
        "expires_at": iso(expires_at),
        "queue_position": place if status == "queued" else None,
        "progress": progress_of(standing, posted),
        "outputs": outputs,
        "error": error_of(result) if result is not None and status == "failed" else None,
        "metrics": {
            "queue_ms": ms_of(timings.get("wait_s")),
            "execution_ms": ms_of(timings.get("run_s")),
        },
        "urls": urls_of(job_id),
        "metadata": posted.labels if posted else {},
    }


def urls_of(job_id: str) -> dict[str, str]:
    """A job's links, which a client resolves against where it has asked."""
    own = f"{PREFIX}/jobs/{job_id}"
    return {"self": own, "events": f"{own}/events", "cancel": f"{own}/cancel"}


def created_at(standing: Standing) -> str:
    """When a job was posted; of one that was sent in another way, what is known of it."""
    if standing.entry:
        return iso_of_ms(standing.entry.posted_ms)
    timings = (standing.result or {}).get("timings") or {}
    progress = standing.progress or {}
    return str(timings.get("sent_at") or progress.get("started_at") or progress.get("updated_at") or iso_of_ms(0))


def kept_until(standing: Standing, days: int | None) -> datetime:
    """Until when a job is known: as long as the lists know it, or less where its files are deleted after `days`."""
    created = moment(created_at(standing))
    kept = created + timedelta(seconds=KNOWN_S)
    return min(kept, deleted_at(created, days)) if days is not None else kept


def deleted_at(created: datetime, days: int) -> datetime:
    """When S3 deletes by a rule of `days`: at the midnight (UTC) that follows them."""
    due = created.astimezone(UTC) + timedelta(days=days)
    midnight = due.replace(hour=0, minute=0, second=0, microsecond=0)
    return midnight if midnight == due else midnight + timedelta(days=1)


def progress_of(standing: Standing, posted: Posted | None) -> dict[str, Any] | None:
    """How far a job is, None where nothing is known."""
    prompt = posted.prompt if posted else {}
    if standing.result is not None:
        if standing.result["status"] != "succeeded" or not prompt:
            return None
        return snapshot(1.0, len(prompt), len(prompt))
    return progress_snapshot(standing.progress, prompt) if standing.progress else None


def progress_snapshot(progress: Mapping[str, Any], prompt: Mapping[str, Any]) -> dict[str, Any]:
    """A running job's progress, from what its worker has written."""
    total = max(int(progress.get("nodes") or len(prompt)), 0)
    done = min(int(progress.get("nodes_done") or 0), total)
    step, steps, node = progress.get("value"), progress.get("max"), progress.get("node_id")
    part = min(max(step / steps, 0.0), 1.0) if step is not None and steps else 0.0
    value = min((done + part) / total, 1.0) if total else 0.0
    node_class = prompt.get(node, {}).get("class_type") if node else None
    title = node_class or progress.get("node_title")
    made = snapshot(value, done, total) | {"current_node": node, "current_node_class": node_class}
    if steps and step is not None:
        made |= {"step": int(step), "steps": int(steps), "message": f"{title or 'node'} {int(step)}/{int(steps)}"}
    elif title:
        made["message"] = title
    return made


def snapshot(value: float, done: int, total: int) -> dict[str, Any]:
    return {
        "value": value, "nodes_done": done, "nodes_total": total, "current_node": None, "current_node_class": None,
        "step": None, "steps": None, "message": None,
    }  # fmt: skip


def error_of(result: Mapping[str, Any]) -> dict[str, Any]:
    """Why a job failed."""
    error = result.get("error") or {"kind": "failed", "message": "it failed"}
    node_id, class_type = error.get("node_id"), error.get("node_type")
    for refused, node in (error.get("node_errors") or {}).items() if not node_id else ():
        node_id, class_type = refused, node.get("class_type")
        break
    return {
        "code": "node_execution_error" if error["kind"] == "execution_error" else error["kind"],
        "message": str(error["message"]).removeprefix(f"node {node_id} {class_type}: "),
        "node_id": node_id,
        "class_type": class_type,
        "traceback": error.get("detail"),
    }


def list_item(entry: Entry, status: str, labels: Mapping[str, str]) -> dict[str, Any]:
    """A job in the list, which has less of it."""
    created = iso_of_ms(entry.posted_ms)
    return {
        "id": entry.job_id,
        "status": status,
        "create_time": created,
        "update_time": iso_of_ms(entry.ended_ms) if entry.ended_ms else created,
        "metadata": dict(labels),
        "urls": urls_of(entry.job_id),
    }


# --- Refused workflows -----------------------------------------------------------------------------------


def invalid_workflow(error: Mapping[str, Any], node_errors: Mapping[str, Any]) -> Envelope:
    """ComfyUI's refusal in the contract's words: which node, which input, and why."""
    told: dict[str, list[dict[str, Any]]] = {}
    message = ""
    for node_id, node in node_errors.items():
        for each in node["errors"]:
            info = each.get("extra_info") or {}
            text = ": ".join(filter(None, (each["message"], each["details"])))
            message = message or f"Node {node_id} ({node['class_type']}): {text}"
            told.setdefault(node_id, []).append({
                "field": info.get("input_name"),
                "reason": REASONS.get(each["type"], each["type"]),
                "message": text,
                "class_type": node["class_type"],
            })  # fmt: skip
    text = ": ".join(filter(None, (error["message"], error["details"])))
    info = error.get("extra_info") or {}
    if not told and info.get("node_id"):
        reason = {
            "field": "class_type",
            "reason": error["type"],
            "message": text,
            "class_type": info.get("class_type"),
        }
        told[info["node_id"]] = [reason]
    details = {"type": error["type"], "node_errors": told} if told else {"type": error["type"]}
    return Envelope(422, "invalid_workflow", message or text, details)


def is_ui_format(workflow: Mapping[str, Any]) -> bool:
    """Whether it is what the editor saves for itself: lists of nodes and links."""
    return isinstance(workflow.get("nodes"), list)


# --- Files -----------------------------------------------------------------------------------------------


def type_of(name: str, kind: str) -> str:
    """The contract's word for an output."""
    if name.lower().endswith(".latent"):
        return "latent"
    first = (mimetypes.guess_type(name)[0] or "").partition("/")[0]
    if first in ("image", "video", "audio", "text"):
        return first
    return TYPE_OF_KIND.get(kind, "file")


def content_type_of(name: str) -> str:
    return mimetypes.guess_type(name)[0] or "application/octet-stream"


# --- Small things ----------------------------------------------------------------------------------------


def iso_of_ms(at_ms: int) -> str:
    return iso(datetime.fromtimestamp(at_ms / 1000, UTC))


def moment(text: str) -> datetime:
    return datetime.fromisoformat(text)


def ms_of(seconds: float | None) -> int | None:
    return None if seconds is None else max(0, round(seconds * 1000))
