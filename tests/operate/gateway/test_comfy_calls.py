"""The same walk over a real ComfyUI, whose answers are recorded, and over the fleet."""

from __future__ import annotations

import json

from gateway_tools import Client, Door
from gateway_walk import ANSWERS, Walk

DIFFERENT = {
    "a moving picture: history": "a receipt does not say whether there were several pictures in it",
    "a moving picture: said": "the same",
}
"""What a fleet answers in another way than a ComfyUI, and why: the list in docs/gateway.md."""


def test_the_fleet_answers_as_a_comfyui_does(client: Client, door: Door) -> None:
    def bring(name: str) -> None:
        """As Mountpoint does."""
        door.site.s3.download_file(door.site.bucket, f"input/{name}", str(door.site.folder / "ComfyUI/input" / name))

    real, ours = json.loads(ANSWERS.read_text()), json.loads(json.dumps(Walk(client, bring).go()))
    different = {name: (real.get(name), ours.get(name)) for name in real | ours if ours.get(name) != real.get(name)}
    assert different.keys() == DIFFERENT.keys(), json.dumps(different, indent=1)
