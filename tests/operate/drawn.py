"""Workflows as ComfyUI's editor saves them."""

from __future__ import annotations

import json
from typing import Any


class Drawn:
    """A workflow as the editor saves it."""

    def __init__(self) -> None:
        self.nodes: dict[int, dict[str, Any]] = {}
        self.links: list[list[Any]] = []

    def add(
        self,
        kind: str,
        place: tuple[int, int, int, int],
        inputs: str = "",
        outputs: str = "",
        values: tuple[Any, ...] = (),
    ) -> int:
        """A node; `inputs` are `name:TYPE`, `place` is x, y, width, height. Returns its id."""
        number = len(self.nodes) + 1
        self.nodes[number] = {
            "id": number, "type": kind, "pos": place[:2], "size": place[2:], "flags": {}, "order": number, "mode": 0,
            "inputs": [dict(zip(("name", "type"), each.split(":"), strict=True)) | {"link": None} for each in inputs.split()],
            "outputs": [{"name": each, "type": each, "links": []} for each in outputs.split()],
            "properties": {}, "widgets_values": list(values),
        }  # fmt: skip
        return number

    def link(self, source: int, output: int, target: int, into: int) -> None:
        out, at = self.nodes[source]["outputs"][output], self.nodes[target]["inputs"][into]
        self.links.append([len(self.links) + 1, source, output, target, into, out["type"]])
        out["links"].append(len(self.links))
        at["link"] = len(self.links)

    def text(self) -> bytes:
        """The file."""
        made = {"last_node_id": len(self.nodes), "last_link_id": len(self.links), "nodes": [*self.nodes.values()],
                "links": self.links, "groups": [], "config": {}, "extra": {}, "version": 0.4}  # fmt: skip
        return json.dumps(made).encode()


def portrait() -> bytes:
    """Text to picture."""
    drawn = Drawn()
    model = drawn.add(
        "CheckpointLoaderSimple", (20, 60, 300, 100), "", "MODEL CLIP VAE", ("v1-5-pruned-emaonly-fp16.safetensors",)
    )
    wanted = drawn.add("CLIPTextEncode", (350, 60, 300, 130), "clip:CLIP", "CONDITIONING", ("a red fox",))
    unwanted = drawn.add("CLIPTextEncode", (350, 250, 300, 130), "clip:CLIP", "CONDITIONING", ("blurred",))
    size = drawn.add("EmptyLatentImage", (20, 250, 300, 110), "", "LATENT", (512, 512, 1))
    needs = "model:MODEL positive:CONDITIONING negative:CONDITIONING latent_image:LATENT"
    sampler = drawn.add("KSampler", (690, 60, 270, 262), needs, "LATENT", (7, "fixed", 8, 8, "euler", "normal", 1))
    decoder = drawn.add("VAEDecode", (690, 380, 210, 46), "samples:LATENT vae:VAE", "IMAGE")
    saver = drawn.add("SaveImage", (1000, 60, 300, 340), "images:IMAGE", "", ("portrait",))
    for each in ((model, 0, sampler, 0), (model, 1, wanted, 0), (model, 1, unwanted, 0), (wanted, 0, sampler, 1),
                 (unwanted, 0, sampler, 2), (size, 0, sampler, 3), (sampler, 0, decoder, 0), (model, 2, decoder, 1),
                 (decoder, 0, saver, 0)):  # fmt: skip
        drawn.link(*each)
    return drawn.text()


def retouch(name: str) -> bytes:
    """Picture to picture."""
    drawn = Drawn()
    loader = drawn.add("LoadImage", (60, 60, 320, 340), "", "IMAGE MASK", (name, "image"))
    blur = drawn.add("ImageBlur", (430, 60, 270, 82), "image:IMAGE", "IMAGE", (1, 1.0))
    saver = drawn.add("SaveImage", (750, 60, 300, 340), "images:IMAGE", "", ("retouched",))
    drawn.link(loader, 0, blur, 0)
    drawn.link(blur, 0, saver, 0)
    return drawn.text()
