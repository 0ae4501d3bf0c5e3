"""What the gateway's rooms decide, as pure functions."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from fleet_nodes import object_info

from operate.gateway.nodes import with_files
from operate.gateway.refusals import judge, upstream
from operate.gateway.shapes import ended_job, history_entry
from operate.gateway.story import Story

JOB = "0f8fad5b-d9cb-469f-a165-70867728950e"
PROMPT: dict[str, Any] = {
    "1": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 0}},
    "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "x"}},
}


def receipt(**more: Any) -> dict[str, Any]:
    """A job's result.json."""
    times = {"started_at": "2026-11-25T20:00:00.000Z", "finished_at": "2026-11-25T20:00:02.500Z"}
    return {
        "job_id": JOB,
        "status": "succeeded",
        "outputs": [],
        "values": {},
        "error": None,
        "timings": times,
        **more,
    }


# --- Nodes -----------------------------------------------------------------------------------------------


def choices(nodes: dict[str, Any], class_type: str, name: str) -> Any:
    config = nodes[class_type]["input"]["required"][name]
    return config[0] if isinstance(config[0], list) else config[1]["options"]


def test_lists_of_choices_have_what_lies_in_the_bucket_now() -> None:
    nodes = object_info()
    nodes["CLIPLoader"] = {"input": {"required": {"clip_name": [[]], "type": [["stable_diffusion", "wan"]]}}}
    nodes["NewLoader"] = {"input": {"required": {"which": ["COMBO", {"options": ["known.safetensors"]}]}}}
    nodes["Gone"] = {"replaced_by": [{}]}
    before = copy.deepcopy(nodes)
    models = {
        "checkpoints": ["new.safetensors", "sub/other.ckpt", "v1-5-pruned-emaonly-fp16.safetensors"],
        "text_encoders": ["clip.safetensors"],
        "controlnet": ["known.safetensors", "more.safetensors"],
    }
    made = with_files(nodes, models, ["b.png", "clip.mp4", "a.txt"])
    assert choices(made, "CheckpointLoaderSimple", "ckpt_name") == [
        "v1-5-pruned-emaonly-fp16.safetensors", "new.safetensors", "sub/other.ckpt",
    ]  # fmt: skip
    assert choices(made, "CLIPLoader", "clip_name") == ["clip.safetensors"], "by its name, for its list was empty"
    assert choices(made, "CLIPLoader", "type") == ["stable_diffusion", "wan"]
    assert choices(made, "NewLoader", "which") == ["known.safetensors", "more.safetensors"], "by what stood in it"
    assert choices(made, "LoadImage", "image") == ["broken.png", "example.png", "b.png"]
    assert "Gone" not in made
    assert nodes == before, "what is kept is not changed"


# --- Refusals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"1": {"inputs": {"width": 64}}}, "required_input_missing"),
        ({"2": {"inputs": {"images": ["7", 0], "filename_prefix": "x"}}}, "exception_during_validation"),
        ({"2": {"inputs": {"images": ["1", 9], "filename_prefix": "x"}}}, "exception_during_validation"),
        ({"1": {"inputs": {**PROMPT["1"]["inputs"], "width": ["1", 0]}}}, "dependency_cycle"),
        ({"1": {"class_type": "LoadImage", "inputs": {"image": "absent.png"}}}, "custom_validation_failed"),
    ],
)
def test_a_refusal_has_comfyuis_form_and_names_the_node(changes: dict[str, Any], kind: str) -> None:
    workflow = {node_id: {**node, **changes.get(node_id, {})} for node_id, node in PROMPT.items()}
    verdict = judge(workflow, object_info(), lambda _: False)
    assert verdict.error
    assert verdict.error.keys() == {"type", "message", "details", "extra_info"}
    kinds = {error["type"] for node in verdict.node_errors.values() for error in node["errors"]}
    assert kind in kinds
    assert all(node["dependent_outputs"] == ["2"] for node in verdict.node_errors.values())
    json.dumps(verdict)


def test_only_what_was_asked_for_is_judged_and_sent() -> None:
    workflow = PROMPT | {"3": {"class_type": "SaveImage", "inputs": {"images": ["8", 0], "filename_prefix": "x"}}}
    assert judge(workflow, object_info(), lambda _: False).outputs == ["2"]
    assert judge(workflow, object_info(), lambda _: False).node_errors.keys() == {"3"}
    assert judge(workflow, object_info(), lambda _: False, ["2"]).node_errors == {}
    assert (judge(workflow, object_info(), lambda _: False, ["1"]).error or {})["type"] == "prompt_no_outputs"
    assert list(upstream(workflow, ["2"])) == ["1", "2"]


# --- What is told ----------------------------------------------------------------------------------------


def test_the_story_is_told_in_order_whatever_is_seen_of_it() -> None:
    story = Story(JOB, PROMPT)
    said = story.go_on({"status": "running"})
    said += story.go_on({"status": "running", "node_id": "1", "value": 1, "max": 4})
    assert story.go_on({"status": "running", "node_id": "1", "value": 1, "max": 4}) == [], "nothing is said twice"
    said += story.go_on({"status": "running", "node_id": "1", "value": 3, "max": 4})
    assert [name for name, _ in story.so_far()] == ["progress_state", "executing"]
    file = {"node_id": "2", "kind": "images", "filename": "x.png", "s3_key": f"output/{JOB}/x.png"}
    said += [*story.end(receipt(outputs=[file])), story.last()]
    assert [name for name, _ in said if name != "progress_state"] == [
        "execution_start", "execution_cached", "executing", "progress", "progress", "executing", "executed",
        "execution_success", "executing",
    ]  # fmt: skip
    states = [data["nodes"] for name, data in said if name == "progress_state"][-1]
    assert {node_id: state["state"] for node_id, state in states.items()} == {"1": "finished", "2": "finished"}
    assert all(data["prompt_id"] == JOB for _, data in said)


def test_what_a_node_has_made_is_told_once_as_soon_as_it_is_stored() -> None:
    story = Story(JOB, PROMPT)
    file = {"node_id": "2", "kind": "images", "filename": "x.png", "s3_key": f"output/{JOB}/x.png"}
    other = file | {"node_id": "3", "filename": "y.png", "s3_key": f"output/{JOB}/y.png"}
    story.go_on({"status": "running", "node_id": "2"})
    seen = {"status": "running", "node_id": "3", "outputs": [file], "values": {"2": {"text": ["a"]}}}
    said = story.go_on(seen)
    assert [name for name, _ in said] == ["executed", "progress_state", "progress_state", "executing"], (
        "before the next node is at work"
    )
    view = {"filename": "x.png", "subfolder": JOB, "type": "output"}
    data = {"node": "2", "display_node": "2", "output": {"images": [view], "text": ["a"]}, "prompt_id": JOB}
    assert said[0] == ("executed", data)
    assert story.go_on(seen) == []
    assert [name for name, _ in story.so_far()] == ["progress_state", "executed", "executing"]
    rest = story.end(receipt(outputs=[file, other]))
    assert [data["node"] for name, data in rest if name == "executed"] == ["3"]


@pytest.mark.parametrize(
    ("error", "end", "seen"),
    [
        ({"kind": "execution_error", "message": "node 1 EmptyImage: no", "node_id": "1", "node_type": "EmptyImage",
          "detail": "PIL.UnidentifiedImageError\n line"}, "execution_error",
         {"node_id": "1", "exception_message": "no", "exception_type": "PIL.UnidentifiedImageError"}),
        ({"kind": "gave_up", "message": "three tries", "node_id": None, "node_type": None, "detail": "x y"},
         "execution_error", {"node_id": "", "exception_message": "three tries", "exception_type": "gave_up"}),
        ({"kind": "invalid_workflow", "message": "bad", "node_id": None, "node_type": None, "detail": None,
          "node_errors": {"2": {"class_type": "SaveImage", "errors": []}}}, "execution_error",
         {"node_id": "2", "node_type": "SaveImage"}),
        ({"kind": "cancelled", "message": "cancelled", "node_id": None, "node_type": None, "detail": None},
         "execution_interrupted", {"node_id": ""}),
    ],
)  # fmt: skip
def test_each_end_has_its_message(error: dict[str, Any], end: str, seen: dict[str, Any]) -> None:
    result = receipt(status="failed", error=error)
    entry = history_entry(JOB, None, result)
    name, data = entry["status"]["messages"][-1]
    assert (name, entry["status"]["status_str"], entry["status"]["completed"]) == (end, "error", False)
    assert seen.items() <= data.items()
    assert ended_job(JOB, None, result)["status"] == ("cancelled" if end == "execution_interrupted" else "failed")
    assert [name for name, _ in Story(JOB, PROMPT).end(result)][-1] == end
