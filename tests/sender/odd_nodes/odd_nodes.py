"""Custom nodes with every odd kind of input and output that a ComfyUI takes, in the way of old.

For a real server on which verdicts.json is recorded, and only there.
"""

from __future__ import annotations

from typing import Any


class Anything(str):
    """The type that custom nodes write to take every link."""

    __slots__ = ()

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = str.__hash__


class Odd:
    """A node that passes nothing on; what it takes and makes stands in its subclass."""

    RETURN_TYPES: tuple[Any, ...] = ("STRING",)
    FUNCTION = "run"
    CATEGORY = "odd"

    def run(self, **_: object) -> tuple[Any, ...]:
        """Make something for each output."""
        return ("a",) * len(self.RETURN_TYPES)


def odd(
    name: str, required: dict[str, Any], optional: dict[str, Any] | None = None, /, **members: object
) -> type[Odd]:
    """A node with these inputs, and members of its class."""
    inputs = {"required": required} | ({"optional": optional} if optional else {})
    return type(name, (Odd,), {"INPUT_TYPES": classmethod(lambda _: inputs), **members})


def starts_with_c(_: type, mode: str) -> bool | str:
    """Allow a mode that is not among those listed."""
    return mode.startswith("c") or "that is no mode"


def takes_latents(_: type, input_types: dict[str, str]) -> bool | str:
    """Allow a link of another type than the input's."""
    return input_types["link"] == "LATENT" or "that is no latent"


NODE_CLASS_MAPPINGS: dict[str, Any] = {
    made.__name__: made
    for made in (
        odd("OddEnd", {"any": (Anything("*"),)}, OUTPUT_NODE=True, RETURN_TYPES=()),
        odd("OddMode", {"mode": (["a", "b"],), "level": ("INT", {"max": 9})}, VALIDATE_INPUTS=classmethod(starts_with_c)),
        odd("OddLink", {"link": ("IMAGE",)}, VALIDATE_INPUTS=classmethod(takes_latents)),
        odd("OddStar", {"any": ("*",)}),
        odd("OddComma", {"number": ("INT,FLOAT",)}, RETURN_TYPES=("STRING,INT",)),
        odd("OddCommaSpaced", {"number": ("INT, FLOAT",)}),
        odd("OddCommaRange", {"number": ("INT,FLOAT", {"min": 1, "max": 5})}),
        odd("OddRaw", {"image": ("IMAGE", {"rawLink": True})}),
        odd("OddForce", {"text": ("STRING", {"forceInput": True})}),
        odd("OddOptional", {}, {"count": ("INT", {"min": 1, "max": 5}), "image": ("IMAGE",)}),
        odd("OddNothing", {}),
        odd("OddMakesChoice", {}, RETURN_TYPES=(["a", "b"],)),
        odd("OddMakesCombo", {}, RETURN_TYPES=("COMBO",)),
        odd("OddMakesAnything", {}, RETURN_TYPES=(Anything("*"),)),
        odd("OddMakesTwo", {}, RETURN_TYPES=("IMAGE", "LATENT")),
        odd("OddChoice", {"choice": (["a", "b"],)}),
        odd("OddOtherChoice", {"choice": (["b", "a"],)}),
        odd("OddCombo", {"choice": ("COMBO", {"options": ["a", "b"]})}),
        odd("OddNoCombo", {"choice": ("COMBO",)}),
        odd("OddMany", {"choices": ("COMBO", {"options": ["a", "b"], "multiselect": True})}),
        odd("OddNumbers", {"choice": ([1, 2, 3],)}),
        odd("OddFloats", {"choice": ([0.5, 1.0],)}),
        odd("OddBooleans", {"choice": ([True, False],)}),
        odd("OddNested", {"choice": ([["a", "b"], "c"],)}),
        odd("OddWide", {"thing": ("ODD_THING", {"min": 1})}),
    )
}  # fmt: skip
