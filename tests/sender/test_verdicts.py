"""The check held against what real ComfyUIs said: verdicts.json, recorded by record_verdicts.py."""

from __future__ import annotations

import json
from typing import Any

import pytest
import record_verdicts

from sender.check import find_problems, place_of

RECORDED: dict[str, Any] = json.loads(record_verdicts.VERDICTS.read_text(encoding="utf-8"))
FILES = {place_of(name) for name in record_verdicts.FILES}

DIFFERS = {
    "a custom node may validate in a way of its own, so all it is given is only doubted": """
        COMBO into STRING
        COMBO into choice
        COMBO without options 0.33.0
        boolean among choices as text
        choice into STRING
        choice into the choice in other order
        choice linked to a choice that differs
        choices with one that is not there 0.33.0
        comma does not take IMAGE
        comma into FLOAT
        comma out of range
        comma with a range takes text
        custom COMBO that is not there 0.33.0
        deep out of range 0.33.0
        grow optional out of range 0.33.0
        grow out of range 0.33.0
        grow with the second out of range 0.33.0
        level out of range
        link that only the node allows
        link to the wrong of two outputs
        mode that only the node allows
        mode that the node refuses
        new node with a wrong choice 0.33.0
        number among choices as text
        optional input out of range
        raw link of the wrong type
        replaced node with a wrong value 0.33.0
        several choices, one not there 0.33.0
        takes all, out of range 0.33.0
        type of one's own with a range, text
        typed linked to STRING 0.33.0
        typed out of range 0.33.0
        typed with text 0.33.0
    """,
    "only the custom node itself knows that it refuses this": """
        link that the node refuses
        mode that is there
    """,
    "an instance may be told by COMFYUI_ARGS to keep its outputs, so what is looked for there is only doubted": """
        LoadImage 'nope.png [output]'
        LoadImage 'nope.png [temp]'
        LoadImageOutput that is not there
    """,
    "where a path leads that goes up or begins at the root, only the server knows": """
        LoadImage '../in.png'
        LoadImage '/etc/hostname' 0.33.0
    """,
    "before 0.7 a COMBO took what is not in it, and what the node then makes of it is not known": """
        COMBO null 0.3.64
        COMBO number 0.3.64
        COMBO that is not there 0.3.64
        COMBO without options 0.3.64
        custom COMBO that is not there 0.3.64
        several choices, one not there 0.3.64
    """,
    "before 0.7 fewer types went together, and nothing in /object_info tells how old a server is": """
        COMBO linked to a list of choices 0.3.64
        choice into COMBO 0.3.64
        plain star 0.3.64
    """,
    "before 0.4 Load3D did not validate its file itself, and no file of a kind may be anything": """
        Load3D none 0.3.64
        Load3D out of range 0.3.64
        built-in replacement 0.3.64
    """,
    "before 0.19 an output behind a circle was dropped without a word: ours is better": """
        a circle in another branch 0.3.64
    """,
}
"""Rows that the check sees differently, and why: of all servers, or of the one behind the name."""
EXCUSED = {line.strip() for names in DIFFERS.values() for line in names.strip().splitlines()}


def nodes_of(version: str) -> dict[str, Any]:
    """What a worker stores of that server."""
    server = RECORDED["servers"][version]
    known: dict[str, Any] = server["object_info"]
    return {name: {"replaced_by": each} for name, each in server["node_replacements"].items()} | known


NODES = {version: nodes_of(version) for version in RECORDED["servers"]}


@pytest.mark.parametrize("version", NODES)
def test_the_check_says_what_the_server_said(version: str) -> None:
    """A false alarm keeps a job from being sent: nothing excuses that. Whatever else differs is listed."""
    false_alarms, differs = {}, set()
    for name, row in RECORDED["rows"].items():
        told, found = row[version], find_problems(row["prompt"], NODES[version], lambda file: place_of(file) in FILES)
        certain, named = any(problem.certain for problem in found), {problem.node_id for problem in found}
        could_run = told["status"] == 200 and told["ran"] != record_verdicts.DIED
        ran_well = could_run and told["ran"] == "success" and "errors" not in told
        if certain and could_run:
            false_alarms[name] = found
        elif certain == could_run or (found and ran_well) or not told.get("errors", {}).keys() <= named:
            differs.add(name)
    assert not false_alarms
    assert differs == {name for name in RECORDED["rows"] if not EXCUSED.isdisjoint({name, f"{name} {version}"})}


def test_the_servers_saw_all_that_the_rows_are_about() -> None:
    ways = {
        (
            told["status"],
            told.get("ran"),
            *sorted({kind for kinds in told.get("errors", {}).values() for kind in kinds}),
        )
        for row in RECORDED["rows"].values()
        for told in (row[version] for version in NODES)
    }
    kinds = {kind for _, _, *errors in ways for kind in errors}
    assert {"0.3.64", "0.33.0"} <= NODES.keys()
    assert len(RECORDED["rows"]) >= 150
    assert {way[:2] for way in ways} == {
        (400, None),
        (500, None),
        *((200, ran) for ran in ("success", "error", "died")),
    }
    assert kinds == {
        "required_input_missing", "bad_linked_input", "return_type_mismatch", "invalid_input_type",
        "value_smaller_than_min", "value_bigger_than_max", "value_not_in_list", "custom_validation_failed",
        "exception_during_validation", "exception_during_inner_validation", "dependency_cycle",
    }  # fmt: skip
