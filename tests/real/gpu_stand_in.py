"""A custom node for a real ComfyUI without a GPU: it waits as one does for a GPU, which leaves the processors free."""

import time
from typing import Any


class GpuStandIn:
    """Passes a picture on after so many milliseconds."""

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "work"
    CATEGORY = "test"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - ComfyUI's name
        """What the node takes."""
        return {"required": {"image": ("IMAGE",), "milliseconds": ("INT", {"default": 0, "max": 3_600_000})}}

    def work(self, image: Any, milliseconds: int) -> tuple[Any]:
        """Wait."""
        time.sleep(milliseconds / 1000)
        return (image,)


NODE_CLASS_MAPPINGS = {"GpuStandIn": GpuStandIn}
