"""How far a job is, which those who wait for it can read."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from comfy_utils import Job, Workflow, iso

PROGRESS_S = 5
LIVE_S = 0.4
"""The same where somebody follows each step, who looks twice a second."""
SOON_S, LOOK_S = 1.0, 5.0
"""Between the first two looks whether somebody does, as who opens a stream mostly does it right after sending, and
between all that follow."""


class Progress:
    """How far a job is, from ComfyUI's events."""

    def __init__(self, workflow: Workflow, job_id: str, instance_id: str, usual_run_s: float | None = None) -> None:
        self.workflow = workflow
        self.job_id = job_id
        self.instance_id = instance_id
        self.usual_run_s = usual_run_s
        self.started_at: datetime | None = None
        self._state: dict[str, Any] = {}
        self._stored: dict[str, tuple[list[dict[str, Any]], dict[str, Any] | None]] = {}  # by node
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
        elif event["type"] in ("executing", "progress") and isinstance(data.get("node"), str):
            step = (
                {name: number_of(data.get(name)) for name in ("value", "max")} if event["type"] == "progress" else {}
            )
            self._state = {"nodes_done": self._state.get("nodes_done", 0), "node_id": data["node"], **step}

    def note_stored(self, node_id: str, outputs: list[dict[str, Any]], values: dict[str, Any] | None) -> None:
        """Take in what a node has made, when all of it is stored; in the receipt's shapes. Another thread may call."""
        self._stored = {**self._stored, node_id: (outputs, values)}

    def forget_stored(self) -> None:
        """The job begins anew."""
        self._stored = {}

    def node(self) -> tuple[str | None, str | None]:
        """The id and the class of the node at work, None where that is not known."""
        node_id = self._state.get("node_id")
        return node_id, self.workflow.get(node_id or "", {}).get("class_type")

    def news(self) -> dict[str, Any] | None:
        """What progress.json is to say, None when nothing changed since the last call."""
        stored = self._stored
        outputs = [output for made, _ in stored.values() for output in made]
        values = {node_id: each for node_id, (_, each) in stored.items() if each}
        state = {
            **self._state,
            **({"outputs": outputs} if outputs else {}),
            **({"values": values} if values else {}),
        }
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


class Pace:
    """How often what a job does is told: more often where somebody follows it, which is looked for where its message
    says so. Of any other nothing is asked."""

    def __init__(self, job: Job, is_watched: Callable[[str], bool]) -> None:
        self.turn_s = LIVE_S if job.live else PROGRESS_S
        """So often it is to be asked whether it is time."""
        self._job_id = job.id
        self._is_watched = is_watched
        self._each_turn = job.live != "when watched"
        self._looks = 0
        self._look_at = self._tell_at = time.monotonic()  # that it runs is told at once

    def is_time(self) -> bool:
        """Whether it is time to tell. Raises what boto3 raises."""
        now = time.monotonic()
        if not self._each_turn and now >= self._look_at:
            self._looks += 1
            self._look_at = now + (SOON_S if self._looks == 1 else LOOK_S)
            self._each_turn = self._is_watched(self._job_id)
        if not self._each_turn and now < self._tell_at:
            return False
        self._tell_at = now + PROGRESS_S
        return True


def title_of(node: Mapping[str, Any]) -> str | None:
    """What a workflow calls a node; its `_meta` is the editor's, and may be anything."""
    meta = node.get("_meta")
    title = meta.get("title") if isinstance(meta, dict) else None
    return title if isinstance(title, str) and title else node.get("class_type")


def number_of(value: object) -> float | None:
    """A step as ComfyUI counts it, None where it is no number that all who read it can write."""
    return value if isinstance(value, int | float) and abs(value) < 2**53 else None
