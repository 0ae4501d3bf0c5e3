"""How far a job is, which those who wait for it can read."""

from __future__ import annotations

from collections.abc import Mapping
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
        """Take in an `execution_start`, `executing`, `progress` or `progress_state` event, as far as it has the form."""
        data = event["data"]
        if event["type"] == "execution_start":
            self.started_at = self.started_at or datetime.now(UTC)
            self._state.setdefault("nodes_done", 0)  # more is not known without a websocket
        elif event["type"] == "progress_state":
            nodes = data.get("nodes")
            states = (
                [node.get("state") for node in nodes.values() if isinstance(node, dict)]
                if isinstance(nodes, dict)
                else []
            )
            self._state = {**self._state, "nodes_done": states.count("finished")}
        elif isinstance(data.get("node"), str):
            step = (
                {name: number_of(data.get(name)) for name in ("value", "max")} if event["type"] == "progress" else {}
            )
            self._state = {"nodes_done": self._state.get("nodes_done", 0), "node_id": data["node"], **step}

    def node(self) -> tuple[str | None, str | None]:
        """The id and the class of the node at work, None where that is not known."""
        node_id = self._state.get("node_id")
        return node_id, self.workflow.get(node_id or "", {}).get("class_type")

    def news(self) -> dict[str, Any] | None:
        """What progress.json is to say, None when nothing changed since the last call."""
        state = self._state
        if state == self._reported:
            return None
        self._reported = state
        return {
            "job_id": self.job_id,
            "status": "running",
            "instance_id": self.instance_id,
            "node_title": title_of(self.workflow.get(state.get("node_id", ""), {})),
            "nodes": len(self.workflow),
            **state,
            **({"started_at": iso(self.started_at)} if self.started_at else {}),
            **({"usual_run_s": round(self.usual_run_s, 1)} if self.usual_run_s is not None else {}),
            "updated_at": iso(datetime.now(UTC)),
        }


def title_of(node: Mapping[str, Any]) -> str | None:
    """What a workflow calls a node; its `_meta` is the editor's, and may be anything."""
    meta = node.get("_meta")
    title = meta.get("title") if isinstance(meta, dict) else None
    return title if isinstance(title, str) and title else node.get("class_type")


def number_of(value: object) -> float | None:
    """A step as ComfyUI counts it, None where it is no number that all who read it can write."""
    return value if isinstance(value, int | float) and abs(value) < 2**53 else None
