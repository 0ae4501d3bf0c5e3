"""Pictures that a workflow does not save: SaveImageWebsocket sends them over the websocket."""

from __future__ import annotations

import logging
import re
from collections import Counter
from pathlib import Path
from typing import Any

from comfy_utils import Workflow
from ground.answers import OutputFile
from worker.errors import is_disk_full

logger = logging.getLogger(__name__)

FOLDER = "websocket"


class Pictures:
    """Those of one job, written into its own folder as they come."""

    def __init__(self, workflow: Workflow, folder: Path) -> None:
        self.nodes = {node_id for node_id, node in workflow.items() if node["class_type"] == "SaveImageWebsocket"}
        self.files: list[OutputFile] = []
        self.found_no_room = False
        self._folder = folder / FOLDER
        self._announced: dict[str, Any] = {}  # node -> how many it sends

    def take(self, node_id: str, image: bytes | memoryview, suffix: str) -> None:
        """Write a picture that has come while a node was at work, if it is one of those that save by it."""
        if node_id not in self.nodes:
            return  # a preview
        name = f"{re.sub(r'[^A-Za-z0-9_-]', '_', node_id)[:100]}_{len(self.files) + 1:05}.{suffix}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / name).write_bytes(image)
        except OSError as error:  # the line goes on, and the receipt will say what is missing
            self.found_no_room = self.found_no_room or is_disk_full(error)
            logger.error("Cannot write %s: %s", self._folder / name, error)
        else:
            self.files.append(OutputFile(node_id, "images", name, FOLDER, "output"))

    def note(self, event: dict[str, Any]) -> None:
        """Take in a `progress` event: the node counts its pictures in it."""
        data = event["data"]
        if event["type"] == "progress" and data.get("node") in self.nodes:
            self._announced[data["node"]] = data.get("max")

    def forget(self) -> None:
        """Begin anew, as the job does."""
        self.files = []
        self.found_no_room = False

    def warnings(self) -> list[str]:
        """A sentence for each node of which not all pictures have come."""
        came = Counter(file.node_id for file in self.files)
        return [
            f"node {node_id} SaveImageWebsocket: {came[node_id]} of {self._announced.get(node_id, 'its')} pictures have "
            "come: the websocket to ComfyUI was cut, or not there; use SaveImage"
            for node_id in sorted(self.nodes)
            if not came[node_id] or came[node_id] != self._announced.get(node_id, came[node_id])
        ]
