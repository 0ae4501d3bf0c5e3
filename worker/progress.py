"""How far a job is, which those who wait for it can read."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from comfy_utils import Workflow, iso


class Progress:
    """How far a job is, from ComfyUI's events."""

    def __init__(self, workflow: Workflow, job_id: str, instance_id: str, usual_run_s: float | None = None) -> None:
        self.workflow = workflow
        self.job_id = job_id
        self.instance_id = instance_id
        self.usual_run_s = usual_run_s
        self.started_at: datetime | None = None
        self._state: dict[str, Any] = {}
        self._reported: dict[str, Any] = {}

    def note(self, event: dict[str, Any]) -> None:
        """Take in an `execution_start`, `executing`, `progress` or `progress_state` event."""
        data = event["data"]
        if event["type"] == "execution_start":
            self.started_at = self.started_at or datetime.now(UTC)
        elif event["type"] == "progress_state":
            done = sum(node.get("state") == "finished" for node in data.get("nodes", {}).values())
            self._state = {**self._state, "nodes_done": done}
        elif data.get("node") is not None:
            step = {"value": data.get("value"), "max": data.get("max")} if event["type"] == "progress" else {}
            self._state = {"nodes_done": self._state.get("nodes_done", 0), "node_id": data["node"], **step}

    def news(self) -> dict[str, Any] | None:
        """What progress.json is to say, None when nothing changed since the last call."""
        state = self._state
        if state == self._reported:
            return None
        self._reported = state
        node = self.workflow.get(state.get("node_id", ""), {})
        return {
            "job_id": self.job_id,
            "status": "running",
            "instance_id": self.instance_id,
            "node_title": node.get("_meta", {}).get("title") or node.get("class_type"),
            "nodes": len(self.workflow),
            **state,
            **({"started_at": iso(self.started_at)} if self.started_at else {}),
            **({"usual_run_s": round(self.usual_run_s, 1)} if self.usual_run_s is not None else {}),
            "updated_at": iso(datetime.now(UTC)),
        }
