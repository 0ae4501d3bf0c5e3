"""What a client meets besides the recorded cases, and what the stand-in does that no real server does.

COMFY_ADDRESS=127.0.0.1:8188 takes a real server for those that any server must pass.
"""

from __future__ import annotations

import io
import json
import signal
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import requests
from comfyui_client import (
    CHECKPOINT,
    JSON,
    LIMIT_SECONDS,
    REAL_ADDRESS,
    Client,
    Server,
    Standin,
    draw_workflow,
    empty_cache,
    idle,
    make_png,
    save_workflow,
    server,
    standin,
    standin_only,
    standin_workflow,
    start,
    wait_for,
)
from PIL import Image

__all__ = ["idle", "server", "standin", "start"]


# --- What else a client meets, on any server -------------------------------------------------------


def test_api_prefix(server: Server) -> None:
    assert server.call("GET", "/api/prompt") == (200, {"exec_info": {"queue_remaining": 0}})


def test_own_prompt_id_is_kept_and_a_missing_one_made(server: Server) -> None:
    prompt_id = str(uuid.uuid4())
    assert server.submit(save_workflow(), prompt_id=prompt_id) == prompt_id
    assert uuid.UUID(server.submit(save_workflow()))


@pytest.mark.parametrize(
    ("node_id", "changes", "kind"),
    [
        ("2", {"filename_prefix": None}, None),
        ("2", {"images": "remove"}, "required_input_missing"),
        ("1", {"width": 0}, "value_smaller_than_min"),
        ("1", {"width": 99999}, "value_bigger_than_max"),
        ("1", {"width": "wide"}, "invalid_input_type"),
        ("2", {"images": ["1", 0, 0]}, "bad_linked_input"),
        ("2", {"images": ["3", 0]}, "return_type_mismatch"),
        ("2", {"images": ["99", 0]}, "exception_during_validation"),
        ("2", {"images": ["1", 5]}, "exception_during_validation"),
    ],
)
def test_validation(server: Server, node_id: str, changes: JSON, kind: str | None) -> None:
    workflow = save_workflow()
    workflow["3"] = {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}}
    inputs = workflow[node_id]["inputs"] | changes
    workflow[node_id]["inputs"] = {name: value for name, value in inputs.items() if value != "remove"}
    status, body = server.call("POST", "/prompt", {"prompt": workflow})
    assert status == (400 if kind else 200), body
    if kind:
        assert [error["type"] for error in body["node_errors"][node_id]["errors"]] == [kind]
        assert body["node_errors"][node_id]["dependent_outputs"] == ["2"]
        assert body["error"]["type"] == "prompt_outputs_failed_validation"


def test_numbers_are_converted(server: Server) -> None:
    workflow = save_workflow()
    workflow["1"]["inputs"]["width"] = "32"
    assert server.run(workflow)["prompt"][2]["1"]["inputs"]["width"] == 32


def test_cycle_is_refused(server: Server) -> None:
    blur = {"blur_radius": 1, "sigma": 1.0}
    workflow = {
        "1": {"class_type": "ImageBlur", "inputs": {"image": ["2", 0], **blur}},
        "2": {"class_type": "ImageBlur", "inputs": {"image": ["1", 0], **blur}},
        "3": {"class_type": "PreviewImage", "inputs": {"images": ["2", 0]}},
    }
    assert server.call("POST", "/prompt", {"prompt": workflow})[0] == 400


@pytest.mark.parametrize("body", [{}, {"client_id": "x"}])
def test_no_prompt(server: Server, body: JSON) -> None:
    status, answer = server.call("POST", "/prompt", body)
    assert (status, answer["error"]["type"], answer["node_errors"]) == (400, "no_prompt", {})


def test_counter_is_highest_in_folder_plus_one_and_a_new_prefix_saves_again(server: Server) -> None:
    folder, color = f"f{uuid.uuid4().hex}", uuid.uuid4().int % 0xFFFFFF
    names = []
    for prefix in ("a", "b", "a"):
        outputs = server.run(save_workflow(f"{folder}/{prefix}", color))["outputs"]
        names += [(image["subfolder"], image["filename"]) for image in outputs["2"]["images"]]
    assert names == [(folder, "a_00001_.png"), (folder, "b_00001_.png"), (folder, "a_00002_.png")]


def test_saving_outside_the_output_folder_fails(server: Server) -> None:
    entry = server.run(save_workflow("../../outside/x"))
    kind, data = entry["status"]["messages"][-1]
    assert (kind, data["exception_type"], data["node_type"]) == ("execution_error", "Exception", "SaveImage")
    assert "outside the output folder is not allowed" in data["exception_message"]


def test_upload_and_view(server: Server) -> None:
    name, other = f"{uuid.uuid4().hex}.png", make_png() + b"other"
    answers = [server.upload(name, content, subfolder="sub").json() for content in (make_png(), make_png(), other)]
    renamed = name.replace(".png", " (1).png")
    assert answers == [{"name": n, "subfolder": "sub", "type": "input"} for n in (name, name, renamed)]
    assert server.upload(name, other, subfolder="sub", overwrite="true").json()["name"] == name
    assert server.upload("x.png", other, subfolder="../..").status_code == 400
    url = f"http://{server.address}/view"
    where = {"subfolder": "sub", "type": "input"}
    assert requests.get(url, params={"filename": name, **where}, timeout=9).content == other
    workflow = save_workflow()
    workflow["1"] = {"class_type": "LoadImage", "inputs": {"image": f"sub/{renamed}"}}
    assert server.run(workflow)["status"]["completed"]


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ("", 404),
        ("filename=absent.png", 404),
        ("filename=/etc/passwd", 400),
        ("filename=../main.py", 400),
        ("filename=x.png&type=other", 400),
        ("filename=x.png&subfolder=../..", 403),
    ],
)
def test_view_refuses(server: Server, query: str, status: int) -> None:
    assert server.call("GET", f"/view?{query}")[0] == status


def test_history_is_forgotten_on_demand(server: Server) -> None:
    first, second = (server.submit(save_workflow()) for _ in range(2))
    server.history(second)
    assert server.call("POST", "/history", {"delete": [first]}) == (200, "")
    assert server.call("GET", f"/history/{first}") == (200, {})
    assert list(server.call("GET", "/history?max_items=1")[1]) == [second]
    if not REAL_ADDRESS:  # not somebody's
        assert server.call("POST", "/history", {"clear": True}) == (200, "")
        assert server.call("GET", "/history") == (200, {})


def test_nothing_is_kept_for_a_disconnected_socket(server: Server) -> None:
    client = Client(server)
    client.close()
    missed = server.submit(save_workflow(), client_id=client.id)
    server.history(missed)
    wait_for(lambda: server.queue() == ([], []), "empty queue")
    again = Client(server, client.id)
    prompt_id = server.submit(save_workflow(), client_id=client.id)
    again.read_to_end(prompt_id)
    assert missed not in json.dumps(again.messages)


def test_same_client_id_twice(server: Server) -> None:
    """When the old socket closes, the server forgets the new one, which then hears nothing, not even status."""
    old = Client(server)
    new, other = Client(server, old.id), Client(server)
    new.read()
    old.close()
    server.history(server.submit(save_workflow(), client_id=old.id))
    other.read_until("status", status={"exec_info": {"queue_remaining": 1}})
    assert new.read_what_is_there() == []


def test_messages_go_to_their_own_client(server: Server) -> None:
    own, other = Client(server), Client(server)
    own.read_to_end(server.submit(save_workflow(), client_id=own.id))
    assert {message["type"] for message in other.read_what_is_there()} == {"status"}


def test_prompt_without_a_client_tells_its_progress_to_everybody(server: Server) -> None:
    client = Client(server)
    server.run(save_workflow())
    heard = [message["type"] for message in client.read_what_is_there()]
    assert set(heard) == {"status", "progress_state"}


def test_interrupt_of_another_prompt_does_nothing(server: Server) -> None:
    assert server.call("POST", "/interrupt", {"prompt_id": str(uuid.uuid4())}) == (200, "")
    assert server.run(save_workflow())["status"]["completed"]


# --- The stand-in alone ----------------------------------------------------------------------------


@standin_only
@pytest.mark.parametrize(
    "prompt_id", ["x", "0176820B-2FD3-43B0-90EA-5FF61D34AD0C", "0176820b2fd343b090ea5ff61d34ad0c", 7]
)
def test_prompt_id_that_newer_servers_refuse(server: Server, prompt_id: object) -> None:
    status, body = server.call("POST", "/prompt", {"prompt": save_workflow(), "prompt_id": prompt_id})
    assert (status, body["error"]["type"], body["node_errors"]) == (400, "invalid_prompt_id", {})


@standin_only
def test_secrets_are_not_shown(standin: Standin) -> None:
    extra = {"api_key_comfy_org": "secret", "extra_pnginfo": {"workflow": {}}}
    entry = standin.run(save_workflow(), extra_data=extra, client_id="me")
    assert entry["prompt"][3].pop("create_time") > 1.7e12
    assert entry["prompt"][3] == {"extra_pnginfo": {"workflow": {}}, "client_id": "me"}


@standin_only
def test_cached_saver_writes_nothing_until_memory_is_freed(standin: Standin) -> None:
    workflow = save_workflow("cache/x")
    image = standin.run(workflow)["outputs"]["2"]["images"][0]
    path = standin.folder / "output" / image["subfolder"] / image["filename"]
    path.unlink()
    assert standin.run(workflow)["outputs"]["2"]["images"] == [image]
    assert not path.exists()
    standin.call("POST", "/free", {"free_memory": True, "unload_models": True})
    wait_for(lambda: standin.run(workflow) and path.exists(), "file written again")


@standin_only
def test_file_that_changed_is_loaded_again(standin: Standin) -> None:
    workflow = save_workflow()
    workflow["1"] = {"class_type": "LoadImage", "inputs": {"image": "changing.png"}}
    sizes = []
    for side in (8, 16):
        Image.new("RGB", (side, side)).save(standin.folder / "input" / "changing.png")
        image = standin.run(workflow)["outputs"]["2"]["images"][0]
        sizes.append(Image.open(standin.folder / "output" / image["filename"]).size)
    assert sizes == [(8, 8), (16, 16)]


@standin_only
def test_prompts_run_one_after_another_and_in_order(start: Callable[..., Standin]) -> None:
    standin = start()
    slow = [standin.submit(standin_workflow("StandinSleep", seconds=0.3)) for _ in range(3)]
    first = standin.submit(save_workflow(), front=True)
    standin.history(slow[2])
    entries = standin.entries()
    assert [entry["prompt_id"] for entry in entries[::2]] == [slow[0], first, *slow[1:]]
    assert [entry["event"] for entry in entries] == ["start", "success"] * 4
    assert [entry["time"] for entry in entries] == sorted(entry["time"] for entry in entries)
    assert {entry["pid"] for entry in entries} == {standin.process.pid}


@standin_only
def test_ledger_notes_error_and_interrupt(start: Callable[..., Standin]) -> None:
    standin = start()
    standin.run(standin_workflow("StandinOutOfMemory"))
    prompt_id = standin.submit(standin_workflow("StandinSleep", seconds=600))
    wait_for(lambda: standin.queue()[0] == [prompt_id], "running prompt")
    wait_for(lambda: len(standin.entries()) == 3, "start in the ledger")
    standin.call("POST", "/interrupt")
    assert standin.history(prompt_id)["status"]["messages"][-1][0] == "execution_interrupted"
    assert [entry["event"] for entry in standin.entries()] == ["start", "error", "start", "interrupted"]


@standin_only
def test_queue_is_cleared(standin: Standin) -> None:
    running, *waiting = (standin.submit(standin_workflow("StandinSleep", seconds=600)) for _ in range(3))
    wait_for(lambda: standin.queue() == ([running], waiting), "queue")
    standin.call("POST", "/queue", {"clear": True})
    assert standin.queue() == ([running], [])
    standin.call("POST", "/interrupt", {"prompt_id": running})
    standin.history(running)


@standin_only
def test_out_of_memory_passes_after_some_times(start: Callable[..., Standin]) -> None:
    standin = start()
    entries = [standin.run(standin_workflow("StandinOutOfMemory", times=2)) for _ in range(3)]
    assert [entry["status"]["status_str"] for entry in entries] == ["error", "error", "success"]
    assert entries[0]["status"]["messages"][-1][1]["exception_type"] == "torch.OutOfMemoryError"


@standin_only
def test_crash_ends_the_process(start: Callable[..., Standin]) -> None:
    standin = start()
    standin.submit(standin_workflow("StandinCrash"))
    assert standin.process.wait(LIMIT_SECONDS) == 1
    assert [entry["event"] for entry in standin.entries()] == ["start", "died"]


def test_inputs_that_a_node_does_not_know(server: Server) -> None:
    """Nobody validates them: a value is ignored, a link makes the node fail, one to nowhere see below."""
    workflow = save_workflow()
    workflow["1"]["inputs"]["more"] = 3
    assert server.run(workflow)["status"]["status_str"] == "success"
    workflow["3"] = save_workflow()["1"]
    workflow["1"]["inputs"]["more"] = ["3", 0]
    event, data = server.run(workflow)["status"]["messages"][-1]
    assert (event, data["node_id"], data["exception_type"]) == ("execution_error", "1", "TypeError")


def test_a_file_is_named_with_its_place(server: Server) -> None:
    assert server.upload("named.png", make_png(), type="output", overwrite="true").status_code == 200
    for name, status in (("named.png [output]", 200), ("named.png [input]", 400), ("named.png[output]", 400)):
        workflow = save_workflow()
        workflow["1"] = {"class_type": "LoadImage", "inputs": {"image": name}}
        assert server.call("POST", "/prompt", {"prompt": workflow})[0] == status, name


@standin_only
@pytest.mark.parametrize(("unknown", "extra"), [({}, {"extra_data": None}), ({"more": ["77", 0]}, {})])
def test_what_kills_the_executor_while_http_stays_up(
    start: Callable[..., Standin], unknown: dict[str, Any], extra: dict[str, Any]
) -> None:
    """Seen on 0.3.64, the link to nowhere by an input that nobody validates on 0.33.0 as well."""
    standin = start()
    workflow = save_workflow()
    workflow["1"]["inputs"] |= unknown
    stuck = standin.submit(workflow, **extra)
    wait_for(lambda: "Exception in thread executor" in standin.log.read_text(), "dead executor")
    later = standin.submit(save_workflow())
    assert standin.queue() == ([stuck], [later])
    assert standin.call("GET", f"/history/{stuck}") == (200, {})
    assert standin.call("GET", "/system_stats")[0] == 200


@standin_only
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_it_at_once(start: Callable[..., Standin], number: signal.Signals) -> None:
    standin = start()
    client = Client(standin)
    client.id = standin.submit(standin_workflow("StandinSleep", seconds=600), client_id=client.id)
    client.read_until("executing", node="3")
    standin.process.send_signal(number)
    assert standin.process.wait(5) == 0


@standin_only
def test_pictures_show_their_seed_and_carry_their_prompt(standin: Standin) -> None:
    pictures = []
    for seed in range(3):
        image = standin.run(draw_workflow(seed, size=256))["outputs"]["9"]["images"][0]
        picture = Image.open(standin.folder / "output" / image["filename"])
        assert picture.size == (256, 256)
        assert json.loads(picture.text["prompt"])["3"]["inputs"]["seed"] == seed  # type: ignore[attr-defined]
        pictures.append(picture.tobytes())
    assert len(set(pictures)) == 3


@standin_only
def test_nodes_near_an_output_run_first(standin: Standin) -> None:
    workflow = draw_workflow(uuid.uuid4().int % 2**32)
    workflow["8"]["inputs"] = {"vae": ["4", 2], "samples": ["3", 0]}  # now node 5 is found before node 4
    empty_cache(standin)
    client = Client(standin)
    messages = client.read_to_end(standin.submit(workflow, client_id=client.id))
    order = [message["data"]["node"] for message in messages if message["type"] == "executing"]
    assert order == ["4", "5", "7", "6", "3", "8", "9", None]


@standin_only
def test_sampler_sends_previews(standin: Standin) -> None:
    client = Client(standin)
    client.read_to_end(standin.submit(draw_workflow(uuid.uuid4().int % 2**32, steps=3), client_id=client.id))
    assert [frame[:8] for frame in client.previews] == [b"\0\0\0\x01\0\0\0\x01"] * 3
    assert Image.open(io.BytesIO(client.previews[0][8:])).format == "JPEG"


@standin_only
def test_command_line(start: Callable[..., Standin], tmp_path: Path) -> None:
    leftover = tmp_path / "t" / "temp" / "old.png"
    leftover.parent.mkdir(parents=True)
    leftover.touch()
    folders = [f"--{name}-directory=../{tmp_path.name}/{name[0]}" for name in ("output", "input", "temp")]
    standin = start("--cpu", "--preview-method", "auto", *folders, "--disable-metadata")
    assert "Arguments this stand-in ignores: --cpu --preview-method auto" in standin.log.read_text()
    assert not leftover.exists()
    image = standin.run(save_workflow("job/x"))["outputs"]["2"]["images"][0]
    assert Image.open(tmp_path / "o" / "job" / image["filename"]).info == {}
    assert standin.call("GET", "/system_stats")[1]["system"]["argv"][:3] == ["main.py", "--port", "0"]


@standin_only
def test_linked_models_folder_is_read_at_each_request(start: Callable[..., Standin], tmp_path: Path) -> None:
    store = tmp_path / "store" / "checkpoints"
    store.mkdir(parents=True)
    (tmp_path / "models").symlink_to(store.parent)
    standin = start()
    (store / "sub").mkdir()
    (store / "sub" / "new.safetensors").touch()
    info = standin.call("GET", "/object_info/CheckpointLoaderSimple")[1]["CheckpointLoaderSimple"]
    assert info["input"]["required"]["ckpt_name"][0] == ["sub/new.safetensors", CHECKPOINT]
    assert set(standin.call("GET", "/object_info")[1]) >= {"KSampler", "SaveVideo", "StandinSleep"}
