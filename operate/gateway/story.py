"""What ComfyUI's websocket says of a running job, told from its progress and its receipt, in a real server's order.

A real server says each thing as it happens; here the news come about once a second, so what happened in between is told
at once, and nodes that began and ended between two looks are finished without having been seen at work.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from operate.gateway.shapes import end_of, outputs_of

Message = tuple[str, dict[str, Any]]
"""The `type` and the `data` of a message."""


PICTURE = "picture"
"""Not the type of a message: `data` is a file, as /view knows it, that is sent as a binary frame."""


class Story:
    """One job's messages, as a client hears them."""

    def __init__(self, job_id: str, prompt: Mapping[str, Any]) -> None:
        self.job_id = job_id
        self.prompt = prompt
        self.has_begun = False
        self.node: str | None = None
        """The node at work."""
        self._states: dict[str, dict[str, Any]] = {}
        self._step: tuple[float, float] | None = None
        self._told: dict[str, Message] = {}  # the nodes whose outputs are told

    def go_on(self, progress: Mapping[str, Any]) -> list[Message]:
        """What is new in a job's progress."""
        said = self._begin()
        for made, output in self._untold(progress).items():
            if not self._is_shown(made):
                if made not in self._states:
                    said.append(self._state(made, "finished", 1.0, 1.0))
                said.append(self._executed(made, output))
        node = progress.get("node_id")
        if isinstance(node, str) and node != self.node:
            said += self._finish()
            self.node, self._step = node, None
            said += [self._state(node, "running", 0.0, 1.0), self._executing(node)]
        value, most = progress.get("value"), progress.get("max")
        if self.node and value is not None and most and (value, most) != self._step:
            self._step = value, most
            data = {"value": value, "max": most, "prompt_id": self.job_id, "node": self.node}
            said += [self._state(self.node, "running", value, most), ("progress", data)]
        return said

    def end(self, result: Mapping[str, Any]) -> list[Message]:
        """The rest, by the job's receipt; the last message is followed by `executing` of no node."""
        said = self._begin()
        error = result.get("error")
        for node, output in self._untold(result).items():
            if node != self.node:
                said += self._finish()
                self.node = node
                said += [self._state(node, "running", 0.0, 1.0), self._executing(node)]
            if self._is_shown(node):
                said += [(PICTURE, file) for file in output.get("images", [])]
                continue
            said.append(self._executed(node, output))
        if error and error.get("node_id"):
            if error["node_id"] != self.node:
                said += self._finish()
            self.node = None
        said += self._finish()
        return [*said, end_of(self.job_id, result, now_ms())]

    def last(self) -> Message:
        """What a real server says when all of it is over."""
        return "executing", {"node": None, "prompt_id": self.job_id}

    def so_far(self) -> list[Message]:
        """What one is told who comes while the job runs: what it will not be told again, and where the job stands."""
        told = list(self._told.values())
        if self.node is None:
            return told
        return [
            ("progress_state", {"prompt_id": self.job_id, "nodes": dict(self._states)}),
            *told,
            self._executing(self.node),
        ]

    def _untold(self, news: Mapping[str, Any]) -> dict[str, dict[str, list[Any]]]:
        """What nodes have made, by a job's progress or receipt, as far as it is not told."""
        made = outputs_of(news, self.prompt)
        return {node: output for node, output in made.items() if node not in self._told}

    def _is_shown(self, node: str) -> bool:
        """Whether its pictures go by the websocket themselves, and it is `executed` without a word."""
        return bool(self.prompt.get(node, {}).get("class_type") == "SaveImageWebsocket")

    def _executed(self, node: str, output: dict[str, list[Any]]) -> Message:
        data = {"node": node, "display_node": node, "output": output, "prompt_id": self.job_id}
        self._told[node] = "executed", data
        return self._told[node]

    def _begin(self) -> list[Message]:
        if self.has_begun:
            return []
        self.has_begun = True
        return [
            ("execution_start", {"prompt_id": self.job_id, "timestamp": now_ms()}),
            ("execution_cached", {"nodes": [], "prompt_id": self.job_id, "timestamp": now_ms()}),
        ]

    def _executing(self, node: str) -> Message:
        return "executing", {"node": node, "display_node": node, "prompt_id": self.job_id}

    def _finish(self) -> list[Message]:
        """The node at work is done."""
        if self.node is None:
            return []
        most = self._states.get(self.node, {}).get("max", 1.0)
        node, self.node = self.node, None
        return [self._state(node, "finished", most, most)]

    def _state(self, node: str, state: str, value: float, most: float) -> Message:
        self._states[node] = {
            "value": value,
            "max": most,
            "state": state,
            "node_id": node,
            "prompt_id": self.job_id,
            "display_node_id": node,
            "parent_node_id": None,
            "real_node_id": node,
        }
        return "progress_state", {"prompt_id": self.job_id, "nodes": dict(self._states)}


def now_ms() -> int:
    return int(datetime.now(UTC).timestamp() * 1000)
