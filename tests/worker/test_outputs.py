"""Whose the files are that ComfyUI writes, and what becomes of all of them."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import requests
from places import ROOT
from workplace import LIMIT_S, Site, await_that, image_workflow
from workshop import fetch_ahead, make_worker, start, started_and_ended

from comfy_utils import new_job_id
from ground.answers import OutputFile
from ground.comfyui import JobStoppedError
from ground.savers import is_contained
from worker.outputs import Outputs
from worker.pictures import Pictures

PICTURE = {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": 7}}
NAME = {"class_type": "StandinText", "inputs": {"text": "deep/in/name"}}
PREVIEW = {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}}


def show(ui: object = None, write: dict[str, str] | None = None, **inputs: Any) -> dict[str, Any]:
    """A node that writes files and has `ui` in the history."""
    return {
        "class_type": "StandinShow",
        "inputs": {"write": json.dumps(write or {}), "ui": json.dumps(ui or {})} | inputs,
    }


def named(*names: str, kind: str = "output", subfolder: str = "") -> list[dict[str, str]]:
    """What the history says of files."""
    return [{"filename": name, "subfolder": subfolder, "type": kind} for name in names]


def left_on_disk(site: Site) -> list[str]:
    """The files that jobs have left on the instance, while the worker may be removing them."""
    roots = [site.folder / "job-output", site.folder / "ComfyUI/temp"]
    return [f"{folder}/{name}" for root in roots for folder, _, names in os.walk(root) for name in names]


BLIND = "StandinSaveBlind"
UUID = "0f8fad5b-d9cb-469f-a165-70867728950e"
FREE = {"1": {"class_type": "Image Save", "inputs": {"filename_prefix": "a/b/x"}}}
"""A workflow that writes where it likes."""
CONTAINED = {"1": {"class_type": "SaveImage", "inputs": {"filename_prefix": "x"}}}
TWICE = {"output/a.txt": "1", "output/sub/a.txt": "2", "temp/a.txt": "3", "temp/sub/a.txt": "4"}
STORED: dict[str, tuple[dict[str, Any], set[str]]] = {
    "a saver that makes no folder": (
        {"2": {"class_type": BLIND, "inputs": {"images": ["1", 0], "output_path": "", "filename_prefix": "x"}}},
        {"x_0001.png"},
    ),
    "the same with a folder in its prefix": (
        {"2": {"class_type": BLIND, "inputs": {"images": ["1", 0], "output_path": "", "filename_prefix": "a/b/x"}}},
        {"a/b/x_0001.png"},
    ),
    "the same with a name that the node makes up in it": (
        {"2": {"class_type": BLIND, "inputs": {"images": ["1", 0], "output_path": "", "filename_prefix": "c/d/%y%x"}}},
        {"c/d/%y%x_0001.png"},
    ),
    "the same with a folder of its own": (
        {"2": {"class_type": BLIND, "inputs": {"images": ["1", 0], "output_path": "out", "filename_prefix": "x"}}},
        {"out/x_0001.png"},
    ),
    "a folder before the prefix, and nothing in the history": (
        {
            "2": {
                "class_type": "SaveImageDataSetToFolder",
                "inputs": {"images": ["1", 0], "folder_name": "d", "filename_prefix": "i", "mode": "overwrite"},
            }
        },
        {"d/i_00000.png"},
    ),
    "a prefix that comes over a link": (
        {"2": NAME, "3": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": ["2", 0]}}},
        {"deep/in/name_00001_.png"},
    ),
    "a prefix that ends in a slash": (
        {"2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "a/"}}},
        {"a_00001_.png"},
    ),
    "a prefix that is none": (
        {"2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": ""}}},
        {"._00001_.png"},
    ),
    "one name in four places": (
        {"2": show({"files": [*named("a.txt"), *named("a.txt", subfolder="sub"), *named("a.txt", kind="temp"),
                              *named("a.txt", kind="temp", subfolder="sub")]}, TWICE)},
        {"a.txt", "sub/a.txt", "temp/a.txt", "temp/sub/a.txt"},
    ),
    "files of our own names": (
        {"2": show({"files": named("a.txt", kind="temp")},
                   {"temp/a.txt": "1", "output/temp/a.txt": "2", "output/result.json": "3", "output/progress.json": "4"})},
        {"temp/a.txt", "temp/a (2).txt", "result (2).json", "progress (2).json"},
    ),
    "a folder that is named like a job's": (
        {"2": show({}, {f"output/{UUID}/x.txt": "x"}, folder="x")},
        {f"{UUID}/x.txt"},
    ),
    "files in a list of lists": (
        {"2": show({"files": [[named("a.txt"), [True]], *named("a.txt")]}, {"output/a.txt": "1"})},
        {"a.txt"},
    ),
    "a name that s3 has no room for": (
        {"2": show({}, {"output/" + "/".join(["d" * 200] * 6) + "/x.txt": "1"})},
        {"long/"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", STORED)
def test_whatever_a_job_writes_is_stored_as_its_own_and_gone_from_the_disk(busy_site: Site, what: str) -> None:
    more, expected = STORED[what]
    # Twice the same: nothing may be served from ComfyUI's cache that has left the disk.
    for _ in range(2):
        job_id = busy_site.send({"1": PICTURE, **more})
        result = busy_site.await_result(job_id)
        assert (result["status"], result["error"], result["warnings"]) == ("succeeded", None, [])
        assert busy_site.runs(job_id) == 1
        keys = {output["s3_key"].removeprefix(f"output/{job_id}/") for output in result["outputs"]}
        keys = {"long/" if key.startswith("long/") else key for key in keys}
        assert keys == expected
        there = {key.removeprefix(f"output/{job_id}/") for key in busy_site.keys(f"output/{job_id}/")}
        assert len(there) == len(expected) + 1 + ("progress.json" in there), "these, the receipt, and nothing else"
        await_that("nothing is left on the disk", lambda: not left_on_disk(busy_site))


LONG = "n" * 300
VALUES: dict[str, tuple[object, dict[str, Any]]] = {
    "no lists": ({"a": True, "b": None, "c": 1.5, "d": "x", "e": {}}, {"a": [True], "b": [None], "c": [1.5], "d": ["x"], "e": [{}]}),
    "empty and nested lists": ({"a": [], "b": [[1, [None]]]}, {"b": [[1, [None]]]}),
    "names that are none": ({"a": [*named(""), {"filename": 7}, {"filename": ["x"]}]}, {"a": [*named(""), {"filename": 7}, {"filename": ["x"]}]}),
    "subfolders and types that are none": (
        {"a": [{"filename": "x", "subfolder": 7}, {"filename": "x", "type": ["output"]}]},
        {"a": [{"filename": "x", "subfolder": 7}, {"filename": "x", "type": ["output"]}]},
    ),
    "names that no file can have": ({"a": named(LONG, "a\0b", f"a/{LONG}")}, {"a": named(LONG, "a\0b", f"a/{LONG}")}),
    "types that are no folder": ({"a": named("x.png", kind="cloud")}, {"a": named("x.png", kind="cloud")}),
    "a number that json cannot write": ({"a": [float("nan")], "b": [[float("inf")]]}, {"a": ["nan"], "b": [["inf"]]}),
}  # fmt: skip


@pytest.mark.parametrize("what", VALUES)
def test_whatever_history_says_ends_in_a_receipt(busy_site: Site, what: str) -> None:
    ui, values = VALUES[what]
    job_id = busy_site.send({"2": show(ui)})
    result = busy_site.await_result(job_id)
    assert (result["status"], result["outputs"], result["warnings"]) == ("succeeded", [], [])
    assert result["values"] == {"2": values}
    body = busy_site.s3.get_object(Bucket=busy_site.bucket, Key=f"output/{job_id}/result.json")["Body"].read()
    json.loads(body, parse_constant=pytest.fail)


def test_what_is_no_file_of_the_job_is_a_warning(busy_site: Site) -> None:
    (busy_site.folder / "ComfyUI/input/mine.txt").write_text("mine")
    ui = {"a": [*named("gone.png", "mine.txt", kind="input"), *named("sub")]}
    result = busy_site.await_result(busy_site.send({"2": show(ui, {"output/sub/x.txt": "x"})}))
    assert result["status"] == "succeeded"
    assert result["warnings"] == [
        "node 2: its file input/gone.png is not there",
        "node 2: its file output/sub is no regular file",
    ]
    keys = [output["s3_key"].removeprefix(f"output/{result['job_id']}/") for output in result["outputs"]]
    assert keys == ["input/mine.txt", "sub/x.txt"]
    assert (busy_site.folder / "ComfyUI/input/mine.txt").exists(), "not the job's to remove"


@pytest.mark.parametrize("subfolder", ["", "../../..", "/etc"])
def test_a_file_that_should_be_there_and_is_not_fails_the_job(busy_site: Site, subfolder: str) -> None:
    result = busy_site.await_result(busy_site.send({"2": show({"a": named("passwd", subfolder=subfolder)})}))
    assert (result["status"], result["outputs"]) == ("failed", [])
    assert "passwd is not there" in result["error"]["message"]


def test_a_job_that_gave_nothing_at_all_says_so(busy_site: Site) -> None:
    blind = {"images": ["1", 0], "output_path": "", "filename_prefix": "%none%/x"}
    result = busy_site.await_result(busy_site.send({"1": PICTURE, "2": {"class_type": BLIND, "inputs": blind}}))
    assert (result["status"], result["outputs"]) == ("succeeded", [])
    assert result["warnings"] == [
        "node 2 StandinSaveBlind gave neither a file nor a value: ComfyUI's log may say why"
    ]


# --- Pictures over the websocket -------------------------------------------------------------------------


def over_the_websocket(seconds: float, **more: Any) -> dict[str, Any]:
    """A workflow that samples, with previews, and sends three pictures of 64 pixels."""
    return {
        "1": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 3, "color": 7}},
        "2": {"class_type": "StandinSleep", "inputs": {"seconds": seconds, "image": ["1", 0]}},
        "3": {"class_type": "SaveImageWebsocket", "inputs": {"images": ["2", 0]}},
        **more,
    }


def test_pictures_that_come_over_the_websocket_are_the_jobs_files(busy_site: Site) -> None:
    workflow = json.loads((ROOT / "simple_workflow.json").read_text())
    (saver,) = [node_id for node_id, node in workflow.items() if node["class_type"] == "SaveImage"]
    workflow[saver] = {"class_type": "SaveImageWebsocket", "inputs": {"images": workflow[saver]["inputs"]["images"]}}
    for body, count in ((over_the_websocket(0), 3), (workflow, 1), (over_the_websocket(0), 3)):
        job_id = busy_site.send(body)
        result = busy_site.await_result(job_id)
        assert (result["status"], result["warnings"]) == ("succeeded", [])
        node_id = "3" if count == 3 else saver
        names = [f"{node_id}_{number + 1:05}.png" for number in range(count)]
        assert [output["filename"] for output in result["outputs"]] == names, "and none of the sampler's previews"
        assert {output["node_id"] for output in result["outputs"]} == {node_id}
        for output, name in zip(result["outputs"], names, strict=True):
            assert output["s3_key"] == f"output/{job_id}/websocket/{name}"
            stored = busy_site.s3.get_object(Bucket=busy_site.bucket, Key=output["s3_key"])["Body"].read()
            assert stored.startswith(b"\x89PNG")
        await_that("nothing is left on the disk", lambda: not left_on_disk(busy_site))


def test_pictures_that_cannot_come_are_told_of(busy_site: Site) -> None:
    job_id = busy_site.send(over_the_websocket(2))
    await_that("it runs", lambda: busy_site.runs(job_id))
    requests.post(f"http://127.0.0.1:{busy_site.port}/standin/cut-sockets", timeout=LIMIT_S).raise_for_status()
    result = busy_site.await_result(job_id)
    assert (result["status"], result["outputs"]) == ("succeeded", [])
    (warning,) = result["warnings"]
    assert warning.startswith("node 3 SaveImageWebsocket: 0 of its pictures have come: the websocket")


def test_a_picture_that_is_missing_is_told_of(tmp_path: Path) -> None:
    pictures = Pictures(over_the_websocket(0), tmp_path)
    pictures.note({"type": "progress", "data": {"node": "3", "max": 3}})
    for _ in range(2):
        pictures.take("3", b"x", "png")
    pictures.take("2", b"x", "png")
    assert [file.filename for file in pictures.files] == ["3_00001.png", "3_00002.png"]
    assert pictures.warnings()[0].startswith("node 3 SaveImageWebsocket: 2 of 3 pictures have come")
    pictures.take("3", b"x", "png")
    assert pictures.warnings() == []
    pictures.forget()
    assert pictures.files == []


# --- The cache -------------------------------------------------------------------------------------------


def test_the_same_workflow_again_gives_the_same_files_again(busy_site: Site) -> None:
    """Also where a node in the middle, which nothing tells to write, is served from ComfyUI's cache."""
    middle = {"class_type": "StandinPassPreview", "inputs": {"image": ["1", 0]}}
    save = {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "x"}}
    for _ in range(3):
        job_id = busy_site.send({"1": PICTURE, "2": middle, "3": save, "4": PREVIEW})
        result = busy_site.await_result(job_id)
        assert result["status"] == "succeeded"
        assert sorted(output["node_id"] for output in result["outputs"]) == ["2", "3", "4"]
        assert len(busy_site.keys(f"output/{job_id}/temp/")) == 2
        for path in (busy_site.folder / "ComfyUI/temp").glob("pass_*"):
            path.unlink()  # as happens to old ones


# --- One beside the other --------------------------------------------------------------------------------


def data_set(seconds: float, color: int) -> dict[str, Any]:
    """A workflow that writes one picture, always of the same name."""
    return {
        "1": {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": color}},
        "2": {"class_type": "StandinSleep", "inputs": {"seconds": seconds, "image": ["1", 0]}},
        "3": {
            "class_type": "SaveImageDataSetToFolder",
            "inputs": {"images": ["2", 0], "folder_name": "d", "filename_prefix": "i", "mode": "overwrite"},
        },
    }


def test_jobs_of_one_name_one_right_after_the_other(make_site: Callable[..., Site]) -> None:
    """One that keeps to its folder stands in ComfyUI's queue beside them, as ever."""
    site = make_site(SCALE_COOLDOWN="2")
    start(site)
    _, ids = fetch_ahead(site, 1.5, *(data_set(0, color) for color in range(6)), image_workflow())
    *same, other = [site.await_result(job_id) for job_id in ids]
    assert [len(result["outputs"]) for result in (*same, other)] == [1] * 7
    keys = [result["outputs"][0]["s3_key"] for result in same]
    assert keys == [f"output/{job_id}/d/i_00000.png" for job_id in ids[:6]]
    pictures = {site.s3.get_object(Bucket=site.bucket, Key=key)["Body"].read() for key in keys}
    assert len(pictures) == 6
    await_that("nothing is left on the disk", lambda: not left_on_disk(site))


def test_what_a_killed_workers_job_wrote_stays_its_own(make_site: Callable[..., Site]) -> None:
    site = make_site(VISIBILITY_TIMEOUT="8")
    site.start_comfyui()
    worker = site.start_worker()
    first = site.send(data_set(2, 0xFF0000))
    await_that("it runs", lambda: site.runs(first))
    worker.kill()
    site.start_worker()
    second = site.send(data_set(0, 0x00FF00))
    results = [site.await_result(job_id) for job_id in (first, second)]
    assert [result["status"] for result in results] == ["succeeded"] * 2
    assert started_and_ended(site, first)[1] <= started_and_ended(site, second)[0]
    assert site.runs(first) == 1, "taken up where it was"
    pictures = [
        site.s3.get_object(Bucket=site.bucket, Key=result["outputs"][0]["s3_key"])["Body"].read()
        for result in results
    ]
    assert len(set(pictures)) == 2
    await_that("nothing is left on the disk", lambda: not left_on_disk(site))


def test_a_job_given_back_keeps_its_hands_off_what_comes_next(
    make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is still in ComfyUI keeps the ground until it is gone, and what it has written."""
    site = make_site()
    outputs = make_outputs(site, monkeypatch)
    first, second = new_job_id(), new_job_id()
    in_comfyui = {first}
    monkeypatch.setattr(outputs.comfy, "place", lambda job_id: "running" if job_id in in_comfyui else None)
    ground = site.folder / "job-output"

    def stop() -> None:
        (ground / "x.txt").write_text("first")
        raise JobStoppedError

    with pytest.raises(JobStoppedError), outputs.held(first, FREE, lambda: False):
        stop()
    with pytest.raises(JobStoppedError), outputs.held(second, FREE, lambda: True):
        pytest.fail("it had to wait")
    in_comfyui.clear()
    with outputs.held(second, FREE, lambda: False):
        assert (ground / first / "x.txt").read_text() == "first"
        (ground / "x.txt").write_text("second")
    assert (ground / second / "x.txt").read_text() == "second"
    assert (ground / first / "x.txt").read_text() == "first"


def test_only_one_job_at_a_time_writes_where_it_likes(
    make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs = make_outputs(make_site(), monkeypatch)
    inside = 0
    most: list[int] = []

    def run(job_id: str) -> None:
        nonlocal inside
        with outputs.held(job_id, FREE, lambda: False):
            inside += 1
            most.append(inside)
            time.sleep(0.002)
            inside -= 1

    threads = [threading.Thread(target=run, args=(new_job_id(),)) for _ in range(10)]
    for thread in threads:
        thread.start()
    with outputs.held(new_job_id(), CONTAINED, lambda: False):
        pass  # one that keeps to its folder waits for nobody
    for thread in threads:
        thread.join(LIMIT_S)
    assert most == [1] * 10


def test_a_stray_file_belongs_to_the_job_that_ran_then(
    make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    site = make_site()
    outputs = make_outputs(site, monkeypatch)
    before, now, after = new_job_id(), new_job_id(), new_job_id()
    path = site.folder / "job-output/a/stray.txt"
    path.parent.mkdir()
    path.write_text("x")
    began_ms = path.stat().st_ctime_ns // 1_000_000  # the kernel's time, which lags
    ended_ms = began_ms
    outputs.collect(before, ran(began_ms - 9000, began_ms - 100))
    outputs.collect(after, ran(ended_ms + 100, ended_ms + 9000))
    with outputs.held(new_job_id(), FREE, lambda: False):
        outputs.collect(now, ran(began_ms, ended_ms))
        assert path.exists(), "so close to the end it may be the first file of the one that holds the ground"
    outputs.collect(now, ran(began_ms + 3, ended_ms + 3))  # it was written at once, within the kernel's tick
    assert outputs.unnamed(now) == [site.folder / "job-output" / now / "a/stray.txt"]


def ran(*stamps: int) -> dict[str, Any]:
    """A history entry that says when a job began and ended."""
    return {"status": {"messages": [["execution_x", {"timestamp": stamp}] for stamp in stamps]}}


# --- The base machine ------------------------------------------------------------------------------------


def test_on_the_base_machine_designers_keep_what_is_theirs(make_site: Callable[..., Site]) -> None:
    """Its output folder is the bucket itself: there a job's files are copied under its own keys, and stay."""
    site = make_site(ENV="base")
    output = site.folder / "ComfyUI/output"
    (output / "designer").mkdir()
    (output / "designer/mine.png").write_bytes(b"mine")
    os.utime(output / "designer/mine.png", (1, 1))
    start(site)
    made_at = (output / "designer/mine.png").stat().st_ctime
    await_that("it is older than the second by which files there are told apart", lambda: time.time() > made_at + 2)
    job_id = site.send(data_set(1.5, 7) | {"4": show({}, {"output/unnamed.txt": "x"}), "5": PREVIEW})
    result = site.await_result(job_id)
    assert result["status"] == "succeeded"
    keys = {output["s3_key"].removeprefix(f"output/{job_id}/") for output in result["outputs"]}
    assert {key for key in keys if not key.startswith("temp/")} == {"d/i_00000.png", "unnamed.txt"}
    assert (output / "designer/mine.png").read_bytes() == b"mine"
    assert (output / "d/i_00000.png").exists()
    await_that("no copy is left", lambda: not left_on_disk(site))


# --- The disk --------------------------------------------------------------------------------------------


def test_what_nobody_came_back_for_goes_after_a_day(
    make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    site = make_site()
    outputs = make_outputs(site, monkeypatch)
    forgotten: list[str] = []
    monkeypatch.setattr(outputs.comfy, "forget", forgotten.append)
    job_id = new_job_id()
    paths = [
        site.folder / name
        for name in (f"job-output/{job_id}/x", "job-output/stray", "job-output/sub/stray", "ComfyUI/temp/sub/x")
    ]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    outputs.sweep()
    assert all(path.exists() for path in paths)
    outputs.sweep(later_s=7300)  # a job may run for an hour
    assert [path.exists() for path in paths] == [True, True, True, False]
    assert forgotten == []
    outputs.sweep(later_s=86_500)
    assert not any(path.exists() for path in paths)
    assert forgotten == [job_id], "so that it is run, not looked for, should it come back"
    assert (site.folder / "job-output/sub").is_dir(), "a node may have made it for good"


def test_what_is_retried_begins_with_nothing_of_the_try_before(
    make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    site = make_site()
    outputs = make_outputs(site, monkeypatch)
    job_id = new_job_id()
    with outputs.held(job_id, FREE, lambda: False):
        (site.folder / "job-output/half.txt").write_text("ha")
        outputs.clear(job_id)
        (site.folder / "job-output/whole.txt").write_text("whole")
    assert [path.name for path in outputs.unnamed(job_id)] == ["whole.txt"]


def make_outputs(site: Site, monkeypatch: pytest.MonkeyPatch) -> Outputs:
    """A site's outputs, with no ComfyUI that knows of any job."""
    outputs = make_worker(site, monkeypatch).results.outputs
    monkeypatch.setattr(outputs.comfy, "place", lambda _: None)
    return outputs


# --- What is rewritten -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("node", "contained"),
    [
        ({"class_type": "SaveImage", "inputs": {"filename_prefix": "x"}}, True),
        ({"class_type": "SaveImage", "inputs": {"filename_prefix": "/a/b/"}}, True),
        ({"class_type": "SaveImage", "inputs": {"filename_prefix": ["2", 0]}}, False),
        ({"class_type": "SaveImage", "inputs": {"filename_prefix": "./"}}, False),
        ({"class_type": "SaveImage", "inputs": {}}, False),
        ({"class_type": "Image Save", "inputs": {"filename_prefix": "x"}}, False),
        ({"class_type": "Some Exporter", "inputs": {}}, False),
        ({"class_type": "SomeNode", "inputs": {"outputFolder": "x"}}, False),
        ({"class_type": "SomeNode", "inputs": {"file_path": ["2", 0]}}, False),
        ({"class_type": "SomeNode", "inputs": {"direction": "x", "profile": "y", "ckpt_name": "z", "path": 3}}, True),
        ({"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}}, True),
        ({"class_type": "SaveImageWebsocket", "inputs": {"images": ["1", 0]}}, True),
    ],
)
def test_which_node_keeps_to_the_jobs_folder(node: dict[str, Any], contained: bool) -> None:
    assert is_contained({"1": node}) is contained


def test_a_file_outside_comfyuis_folders_is_never_looked_at(
    make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs = make_outputs(make_site(), monkeypatch)
    for subfolder in ("../..", "/etc", "a/../../.."):
        assert outputs.locate(new_job_id(), OutputFile("9", "images", "passwd", subfolder, "output")) is None
    inside = Path(outputs.settings.output_dir, "sub")
    inside.mkdir()
    (inside / "x.png").touch()
    assert outputs.locate(new_job_id(), OutputFile("9", "images", "x.png", str(inside), "output")) == inside / "x.png"
