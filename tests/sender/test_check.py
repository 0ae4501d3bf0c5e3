"""The check before a GPU is paid for: what ComfyUI would refuse."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from fleet_nodes import RECORDINGS, object_info, saving, store_nodes
from local_cloud import Fault, LocalCloud
from places import ROOT
from sender_tools import bodies
from workplace import Site, image_workflow

import send_job
from comfy_utils import Settings
from sender import check


def recorded_prompts() -> list[Any]:
    def whole(prompt: dict[str, Any]) -> dict[str, Any]:
        """With the nodes that the recording only mentions."""
        if prompt.pop("…", None):
            blurs = range(3, 42)
            prompt |= {
                f"{n}": prompt["2"] | {"inputs": prompt["2"]["inputs"] | {"image": [f"{n - 1}", 0]}} for n in blurs
            }
        return prompt

    return [
        pytest.param(whole(call["request"]["body"]["prompt"]), call["status"], call["body"], id=f"{name}-{number}")
        for name, case in RECORDINGS.items()
        if isinstance(case, dict)
        for number, call in enumerate(case.get("http", []))
        if call.get("request", {}).get("path") == "/prompt" and call["status"] != 500
    ]


@pytest.mark.parametrize(("prompt", "status", "answer"), recorded_prompts())
def test_the_check_agrees_with_the_recorded_server(prompt: Any, status: int, answer: Any) -> None:
    problems = check.find_problems(prompt, object_info(), lambda _: False)
    assert any(problem.certain for problem in problems) == (status == 400)
    if answer.get("node_errors"):
        assert {problem.node_id for problem in problems} == set(answer["node_errors"])


def test_the_recordings_hold_both_kinds() -> None:
    assert Counter(case.values[1] for case in recorded_prompts()).keys() == {200, 400}


def checked(more: dict[str, Any], *, instead: bool = False, may_have: bool = False) -> list[tuple[str, bool]]:
    """What is said of a workflow with these nodes besides a good branch, or instead of it."""
    good: dict[str, Any] = {} if instead else image_workflow()
    return [
        (str(problem), problem.certain)
        for problem in check.find_problems({**good, **more}, object_info(), lambda _: may_have)
    ]


EMPTY = {"width": 64, "height": 64, "batch_size": 1, "color": 0}
PIXEL_RANGE = "give a number from 1 to 16384"


@pytest.mark.parametrize(
    ("nodes", "said"),
    [
        (saving("EmptyImage", **EMPTY | {"width": "many"}), "node 10 Mine: width is 'many': give a whole number"),
        (saving("EmptyImage", **EMPTY | {"width": None}), "node 10 Mine: width is None: give a whole number"),
        (saving("EmptyImage", **EMPTY | {"width": 0}), f"node 10 Mine: width is 0: {PIXEL_RANGE}"),
        (saving("EmptyImage", **EMPTY | {"width": "99999"}), f"node 10 Mine: width is 99999: {PIXEL_RANGE}"),
        (saving("EmptyImage", width=8, height=8, batch_size=1), "node 10 Mine: color is missing: connect it or give it a value"),
        (saving("EmptyImage", **EMPTY | {"width": ["7"]}), 'node 10 Mine: width is no link: write ["node id", number of its output]'),
        (saving("EmptyImage", **EMPTY | {"width": ["7", 0]}), "node 10 Mine: width links to node 7, which is not there: the nodes are 10, 11"),
        (saving("EmptyImage", 1, **EMPTY), "node 11 SaveImage: images links to output 1 of node 10, which has 1 output: count its outputs from 0"),
        (saving("EmptyLatentImage", width=64, height=64, batch_size=1), "node 11 SaveImage: images is IMAGE, but output 0 of node 10 is LATENT: link it to an output that is IMAGE"),
        (saving("LoadImage", image="nothing.png"), "node 10 Mine: image 'nothing.png' is not installed: put it into the bucket's input/"),
        (saving("LoadImage", image="exampel.png"), "node 10 Mine: image 'exampel.png' is not installed: the closest is example.png, or put it into the bucket's input/"),
        (saving("LoadImage", image="below/nope.xyz"), "node 10 Mine: image 'below/nope.xyz' is not installed: put it into the bucket's input/"),
        (saving("EmptyImages", **EMPTY), "node 10 Mine: there is no node EmptyImages: the closest are EmptyImage, EmptyLatentImage, or install it on the base machine and run create_env.sh again"),
        ({"1": {"class_type": "EmptyImage", "inputs": EMPTY}}, "it has no output node: add one that saves something, such as SaveImage"),
    ],
)  # fmt: skip
def test_what_comfyui_refuses_is_told_with_the_remedy(nodes: dict[str, Any], said: str) -> None:
    assert checked(nodes, instead=True) == [(said, True)]


@pytest.mark.parametrize(
    "nodes",
    [
        saving("EmptyImage", **EMPTY | {"width": "64", "height": 64.9, "batch_size": True}),
        saving("EmptyImage", **EMPTY | {"width": {"__value__": 64}}),
        saving("EmptyImage", -1, **EMPTY),
        saving("EmptyImage", **EMPTY, unknown=["77", "x"]),
        {**saving("EmptyImage", **EMPTY), "12": {"class_type": "EmptyImage", "inputs": {}}},  # nobody needs it
        saving("Dynamic", kind="x"),
        {"10": {"class_type": "EmptyImage", "inputs": EMPTY}, "11": {"class_type": "PreviewAny", "inputs": {"source": ["10", 0]}}},
        {"11": {"class_type": "PreviewAny", "inputs": {"source": 3}}},
    ],
)  # fmt: skip
def test_what_comfyui_accepts_is_no_problem(nodes: dict[str, Any]) -> None:
    assert checked(nodes, instead=True) == []


@pytest.mark.parametrize(
    ("nodes", "said"),
    [
        (saving("Custom", mode="c", level=1, what=1), "mode is 'c': it may be a, b"),
        (saving("Custom", mode="a", level=10, what=1), "level is 10: give a number from -inf to 9"),
        (saving("Custom", 3, mode="a", level=1, what=1), "links to output 3"),
        (saving("Dynamic", kind="y"), "kind is 'y'"),
        (saving("LoadImage", image="../nope.png"), "is not installed"),
        (saving("LoadImage", image="nope.png [output]"), "instances keep nothing in output/"),
        (saving("EmptyImage", **EMPTY, unknown=["11", 0]), "it has no input unknown"),
    ],
)
def test_what_comfyui_may_accept_is_only_doubted(nodes: dict[str, Any], said: str) -> None:
    ((sentence, certain),) = checked(nodes, instead=True)
    assert said in sentence
    assert not certain


def test_a_bad_branch_beside_a_good_one_is_only_warned_of() -> None:
    bad = saving("LoadImage", image="nope.png")
    assert [certain for _, certain in checked(bad, instead=True)] == [True]
    assert [certain for _, certain in checked(bad)] == [False]
    assert checked(bad, may_have=True) == []
    assert checked({"10": {"class_type": "NoSuchNode"}})[0][1], "an unknown node is refused wherever it stands"


def test_a_link_to_nowhere_that_nobody_validates_is_refused_wherever_it_runs() -> None:
    """It ends the thread of ComfyUI that runs jobs; one that is never looked at does no harm."""
    deadly = saving("EmptyImage", **EMPTY, unknown=["77", 0])
    (found,) = checked(deadly)
    assert found == (
        "node 10 Mine: unknown links to node 77, which is not there: take it out: EmptyImage has no such input", True
    )  # fmt: skip
    assert [
        certain for _, certain in checked(deadly | saving("EmptyImage", **EMPTY | {"width": 0}, unknown=["77", 0]))
    ] == [False]
    del deadly["11"]
    assert checked(deadly) == []


@pytest.mark.parametrize(
    ("env", "file", "looked_for", "may_be_there"),
    [
        ("pro", "sub/a.png", "input/sub/a.png", True),
        ("pro", "a.png [input]", "input/a.png", True),
        ("pro", "a.png [output]", None, False),
        ("pro", "a.png [temp]", None, False),
        ("base", "a.png [output]", "output/a.png", True),
        ("base", "a.png [temp]", None, True),
        ("pro", "coming.png", None, True),
    ],
)
def test_a_file_is_looked_for_where_it_is_said_to_lie(
    monkeypatch: pytest.MonkeyPatch, env: str, file: str, looked_for: str | None, may_be_there: bool
) -> None:
    """The base machine alone keeps what it made where ComfyUI finds it again."""
    looked: list[str] = []

    def is_there(_: check.FleetCheck, key: str) -> bool:
        looked.append(key)
        return True

    monkeypatch.setattr(check.FleetCheck, "is_there", is_there)
    monkeypatch.setattr(check.FleetCheck, "read_nodes", lambda _: None)
    settings = SimpleNamespace(env=env, s3_bucket="b", region="r")
    fleet = check.FleetCheck(cast(Settings, settings), ["coming.png"])
    assert fleet.may_have(file) == may_be_there
    assert looked == ([looked_for] if looked_for else [])


def test_submit_refuses_what_the_fleet_would(
    cloud: LocalCloud, sender_site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    workflow = json.loads((ROOT / "simple_workflow.json").read_text())
    workflow["4"]["inputs"]["ckpt_name"] = "v1-5-pruned-emaonly.safetensors"
    send_job.submit(workflow)  # nothing is known of the fleet
    check._nodes_read.clear()
    store_nodes(sender_site, object_info())
    for call in (send_job.submit, lambda one: send_job.submit_many([image_workflow(), one])):
        with pytest.raises(send_job.WorkflowProblemsError) as caught:
            call(workflow)
        (problem,) = caught.value.problems
        assert (problem.node_id, problem.title) == ("4", workflow["4"]["_meta"]["title"])
        assert "the closest is v1-5-pruned-emaonly-fp16.safetensors" in problem.remedy
    assert str(caught.value).startswith("workflow 2 cannot run on the fleet: node 4 ")
    send_job.submit(workflow, check=False)
    sender_site.s3.put_object(Bucket=sender_site.bucket, Key="models/checkpoints/v1-5-pruned-emaonly.safetensors")
    send_job.submit(workflow)  # the model came after the fleet was looked at
    with pytest.warns(UserWarning, match=r"node 10 Mine: image 'nope\.png'"):
        send_job.submit(image_workflow(more=saving("LoadImage", image="nope.png")))
    assert len(bodies(sender_site)) == 4

    monkeypatch.setattr(check, "NODES_AGE_S", 0)
    read = check._nodes_read[sender_site.bucket][2]
    calls: list[str] = []
    monkeypatch.setattr(cloud, "fault", lambda _, operation: calls.append(operation))
    with pytest.raises(send_job.WorkflowProblemsError):  # it is known still, by its ETag
        send_job.submit(image_workflow(more={"10": {"class_type": "New", "inputs": {}}}))
    assert check._nodes_read[sender_site.bucket][2] is read
    store_nodes(sender_site, object_info() | {"New": {"input": {}, "output": []}})
    send_job.submit(image_workflow(more={"10": {"class_type": "New", "inputs": {}}}))
    assert calls.count("GET") == 2
    monkeypatch.setattr(cloud, "fault", lambda service, _: Fault(403, "AccessDenied") if service == "s3" else None)
    send_job.submit(image_workflow(more={"10": {"class_type": "Nowhere", "inputs": {}}}))
    assert len(bodies(sender_site)) == 2


def test_the_command_line_checks(sender_site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    workflow = json.loads((ROOT / "simple_workflow.json").read_text())
    (tmp_path / "good.json").write_text(json.dumps(workflow))
    title = workflow["3"]["_meta"]["title"]
    workflow["3"]["inputs"] |= {"steps": 0, "sampler_name": "eular"}
    (tmp_path / "bad.json").write_text(json.dumps(workflow))
    good, bad = str(tmp_path / "good.json"), str(tmp_path / "bad.json")
    assert send_job.main(["--check", bad]) == 0
    assert capsys.readouterr().out.startswith(
        f"Its format is right; what {sender_site.env} has installed is not known"
    )
    store_nodes(sender_site, object_info())
    check._nodes_read.clear()
    assert send_job.main(["--check", good]) == 0
    assert capsys.readouterr().out == f"{sender_site.env} can run this workflow\n"
    assert send_job.main(["--check", bad]) == 1
    problems = capsys.readouterr().out.splitlines()[:-1]
    assert [line.split(": ")[:2] for line in problems] == [
        [f"node 3 {title}", "steps is 0"],
        [f"node 3 {title}", "sampler_name is 'eular'"],
    ]
    assert "the closest is euler, or it may be euler, euler_cfg_pp" in problems[1]
    assert send_job.main([bad]) == 2
    said = capsys.readouterr()
    assert said.err.splitlines() == [
        f"send_job.py: this workflow cannot run on {sender_site.env}, and was not sent:", *problems
    ]  # fmt: skip
    assert sender_site.depth() == (0, 0)
    assert send_job.main([bad, "--no-check"]) == 0
    assert sender_site.depth() == (1, 0)
