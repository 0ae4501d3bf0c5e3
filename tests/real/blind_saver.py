"""A custom node for a real ComfyUI: it saves as WAS Image Save does.

It takes a `filename_prefix`, makes the folder `output_path` and no other, and swallows the error when a picture cannot
be written.
"""

from pathlib import Path
from typing import Any

import folder_paths  # type: ignore[import-not-found]  # ComfyUI's own
import numpy  # type: ignore[import-not-found]
from PIL import Image


class BlindSaver:
    """Image Save of the WAS Node Suite, as far as it is about files."""

    OUTPUT_NODE = True
    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "save"
    CATEGORY = "test"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - ComfyUI's name
        """What the node takes."""
        text = ("STRING", {"default": ""})
        return {"required": {"images": ("IMAGE",), "output_path": text, "filename_prefix": text}}

    def save(self, images: Any, output_path: str, filename_prefix: str) -> dict[str, Any]:
        """Write the pictures that can be written, and name those."""
        folder = Path(folder_paths.get_output_directory(), output_path)
        folder.mkdir(parents=True, exist_ok=True)
        shown = []
        for number, image in enumerate(images, 1):
            path = folder / f"{filename_prefix}_{number:04}.png"
            try:
                Image.fromarray((255 * image.cpu().numpy()).astype(numpy.uint8)).save(path)
                shown.append(
                    {"filename": f"{filename_prefix}_{number:04}.png", "subfolder": output_path, "type": "output"}
                )
            except OSError as error:
                print(f"Unable to save file to: {path}: {error}")
        return {"ui": {"images": shown}, "result": (images,)}


NODE_CLASS_MAPPINGS = {"Image Save": BlindSaver}
