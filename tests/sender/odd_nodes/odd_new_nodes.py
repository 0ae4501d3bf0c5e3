"""Custom nodes whose inputs depend on what they are given, for a ComfyUI that has such.

For a real server on which verdicts.json is recorded, and only there.
"""

from __future__ import annotations

from typing import Any

from comfy_api.latest import ComfyAPI, ComfyExtension, io


def new(node_id: str, *inputs: Any, **more: Any) -> Any:
    """A node of the newer kind."""
    schema = io.Schema(node_id=node_id, category="odd", inputs=list(inputs), outputs=[io.String.Output()], **more)
    members = {
        "define_schema": classmethod(lambda _: schema),
        "execute": classmethod(lambda _, **__: io.NodeOutput("a")),
    }
    return type(node_id, (io.ComfyNode,), members)


class Extension(ComfyExtension):  # type: ignore[misc]
    """The newer nodes."""

    async def on_load(self) -> None:
        """Say that one node took the place of another."""
        mapping = [
            {"new_id": "choice", "old_id": "what"},
            {"new_id": "count", "set_value": 2},
        ]
        for old in ("OddOld", "OddOlder"):
            await ComfyAPI().node_replacement.register(
                io.NodeReplace(
                    new_node_id="OddNew" if old == "OddOld" else "OddNowhere",
                    old_node_id=old,
                    input_mapping=mapping,
                    output_mapping=[{"new_idx": 0, "old_idx": 1}],
                )
            )

    async def get_node_list(self) -> list[Any]:
        """Name them."""
        count = io.Int.Input("count", min=1, max=3)
        choice = io.Combo.Input("choice", options=["a", "b"])
        pictures = io.Autogrow.Input(
            "pictures", template=io.Autogrow.TemplatePrefix(io.Image.Input("picture"), prefix="p", min=2, max=4)
        )
        nested = io.DynamicCombo.Input(
            "inner", options=[io.DynamicCombo.Option("x", [count]), io.DynamicCombo.Option("y", [pictures])]
        )
        return [
            new("OddNew", choice, count),
            new("OddGrow", pictures),
            new(
                "OddGrowOptional",
                io.Autogrow.Input(
                    "names",
                    template=io.Autogrow.TemplateNames(
                        io.Int.Input("number", min=1, max=3, optional=True), names=["one", "two"], min=2
                    ),
                ),
            ),
            new(
                "OddGrowRange",
                io.Autogrow.Input("names", template=io.Autogrow.TemplateNames(count, names=["one", "two"], min=1)),
            ),
            new(
                "OddDeep",
                io.DynamicCombo.Input(
                    "outer",
                    options=[io.DynamicCombo.Option("n", [nested]), io.DynamicCombo.Option("c", [choice])],
                ),
            ),
            new("OddMatch", io.MatchType.Input("any", io.MatchType.Template("t", [io.Image, io.Mask]))),
            new("OddTyped", io.MultiType.Input(io.Float.Input("number", min=1, max=5), [io.Int])),
            new("OddChoices", io.MultiCombo.Input("choices", options=["a", "b"])),
            new("OddAll", count, accept_all_inputs=True),
        ]


async def comfy_entrypoint() -> Extension:
    """What ComfyUI looks for."""
    return Extension()
