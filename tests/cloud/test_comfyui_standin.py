"""The ComfyUI stand-in, or the real server at COMFY_ADDRESS, held against every recorded case.

    pytest tests/cloud/test_comfyui_standin.py                                the stand-in
    COMFY_ADDRESS=127.0.0.1:8188 pytest tests/cloud/test_comfyui_standin.py   a real server, idle and used by nobody

Only what must differ is set aside before the comparison: ids, times, counters in file names, paths, the
server's number, how many nodes ran before an interrupt.
"""

import copy
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import websocket
from PIL import Image
from places import CLOUD, ROOT, copy_comfyui

JSON = dict[str, Any]

RECORDINGS: JSON = json.loads((CLOUD / "recordings.json").read_text(encoding="utf-8"))
CASES = [name for name, case in RECORDINGS.items() if isinstance(case, dict)]
REAL_ADDRESS = os.environ.get("COMFY_ADDRESS")
CHECKPOINT = "v1-5-pruned-emaonly-fp16.safetensors"
LIMIT_SECONDS = 60
BLURS = 40  # ImageBlur nodes in the recordings' long workflow

standin_only = pytest.mark.skipif(
    REAL_ADDRESS is not None, reason="about the stand-in, not the server at COMFY_ADDRESS"
)


# --- A server to talk to ---------------------------------------------------------------------------


class Server:
    """A running server, the stand-in or a real one."""

    def __init__(self, address: str) -> None:
        self.address = address

    def call(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """Make a call; return its status and its body, parsed where it is JSON."""
        data = body if isinstance(body, str) else None
        response = requests.request(
            method, f"http://{self.address}{path}", data=data, json=None if data else body, timeout=LIMIT_SECONDS
        )
        is_json = response.headers.get("Content-Type", "").startswith("application/json")
        return response.status_code, response.json() if is_json else response.text

    def submit(self, prompt: JSON, **extra: Any) -> str:
        """Queue a prompt that must be accepted; return its id."""
        status, body = self.call("POST", "/prompt", {"prompt": prompt, **extra})
        assert status == 200, body
        return str(body["prompt_id"])

    def history(self, prompt_id: str) -> JSON:
        """Wait until a prompt has ended; return its history."""
        wait_for(lambda: self.call("GET", f"/history/{prompt_id}")[1], f"history of {prompt_id}")
        entry: JSON = self.call("GET", f"/history/{prompt_id}")[1][prompt_id]
        return entry

    def run(self, prompt: JSON, **extra: Any) -> JSON:
        """Run a prompt to its end; return its history."""
        return self.history(self.submit(prompt, **extra))

    def queue(self) -> tuple[list[str], list[str]]:
        """Return the ids of what runs and of what waits."""
        body = self.call("GET", "/queue")[1]
        return [job[1] for job in body["queue_running"]], [job[1] for job in body["queue_pending"]]

    def upload(self, name: str, content: bytes, **fields: str) -> requests.Response:
        """Upload an input file."""
        url = f"http://{self.address}/upload/image"
        return requests.post(url, files={"image": (name, content)}, data=fields, timeout=LIMIT_SECONDS)


class Standin(Server):
    """The stand-in in a folder of its own, started as the base machine starts ComfyUI."""

    def __init__(self, folder: Path, *arguments: str, **environment: str) -> None:
        self.folder = folder
        copy_comfyui(folder)
        checkpoints = folder / "models" / "checkpoints"
        checkpoints.mkdir(parents=True, exist_ok=True)
        (checkpoints / CHECKPOINT).touch()
        self.ledger = folder / "ledger.jsonl"
        self.log = folder / "comfyui.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "main.py", "--port", "0", *arguments],
                cwd=folder,
                stderr=log,
                env=os.environ | {"STANDIN_STEP_SECONDS": "0.01", "STANDIN_LEDGER": str(self.ledger)} | environment,
            )
        pattern = re.compile(r"To see the GUI go to: http://(\S+)")
        wait_for(lambda: pattern.search(self.log.read_text()) or self.process.poll() is not None, "the server")
        match = pattern.search(self.log.read_text())
        assert match, self.log.read_text()
        super().__init__(match[1])

    def entries(self) -> list[JSON]:
        """Read the ledger."""
        return [json.loads(line) for line in self.ledger.read_text().splitlines()]

    def stop(self) -> None:
        """End the server, if it has not ended."""
        self.process.terminate()
        self.process.wait(LIMIT_SECONDS)


class Client:
    """A websocket and what it has heard; binary frames are kept apart."""

    def __init__(self, server: Server, client_id: str | None = None) -> None:
        self.id = client_id or str(uuid.uuid4())
        self.messages: list[JSON] = []
        self.previews: list[bytes] = []
        url = f"ws://{server.address}/ws?clientId={self.id}"
        self.socket = websocket.create_connection(url, timeout=LIMIT_SECONDS)

    def read(self) -> JSON:
        """Return the next message."""
        while isinstance(frame := self.socket.recv(), bytes):
            self.previews.append(frame)
        self.messages.append(json.loads(frame))
        return self.messages[-1]

    def read_until(self, kind: str, **data: Any) -> list[JSON]:
        """Read until a message with these data has come; return all that were heard on this socket."""
        while not any(m["type"] == kind and data.items() <= m["data"].items() for m in self.messages):
            self.read()
        return self.messages

    def read_to_end(self, prompt_id: str) -> list[JSON]:
        """Read until a prompt has ended; return all messages heard on this socket."""
        return self.read_until("executing", node=None, prompt_id=prompt_id)

    def read_what_is_there(self) -> list[JSON]:
        """Return what the server has sent until it answers a ping."""
        heard: list[JSON] = []
        self.socket.ping("anything more?")
        while True:
            opcode, frame = self.socket.recv_data(control_frame=True)
            if opcode == websocket.ABNF.OPCODE_PONG:
                return heard
            heard.append(json.loads(frame))

    def close(self) -> None:
        """Close with a handshake, so that the server has noticed."""
        self.socket.close()


def wait_for(condition: Callable[[], Any], what: str) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + LIMIT_SECONDS
    while not condition():
        assert time.monotonic() < end, f"no {what} within {LIMIT_SECONDS} seconds"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The server under test, with the input files of the recordings."""
    standin = None if REAL_ADDRESS else Standin(tmp_path_factory.mktemp("ComfyUI"), STANDIN_NODE_SECONDS="0.1")
    server = standin or Server(str(REAL_ADDRESS))
    assert server.upload("broken.png", b"no picture", overwrite="true").status_code == 200
    assert server.upload("example.png", make_png(), overwrite="true").status_code == 200
    yield server
    if standin:
        standin.stop()


@pytest.fixture(autouse=True)
def _idle(request: pytest.FixtureRequest) -> None:
    """Let what the test before left running come to its end: its messages are not for this one."""
    if "server" in request.fixturenames:
        server: Server = request.getfixturevalue("server")
        wait_for(lambda: server.queue() == ([], []), "empty queue")


@pytest.fixture
def standin(server: Server) -> Standin:
    """The shared stand-in."""
    assert isinstance(server, Standin)
    return server


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Standin]]:
    """Start stand-ins for one test alone."""
    started: list[Standin] = []

    def start_one(*arguments: str, **environment: str) -> Standin:
        started.append(Standin(tmp_path, *arguments, **environment))
        return started[-1]

    yield start_one
    for each in started:
        each.stop()


def make_png() -> bytes:
    """Make a small picture."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "PNG")
    return buffer.getvalue()


def save_workflow(prefix: str = "x", color: int | None = None) -> JSON:
    """Make a workflow that saves one image; by default one that no cache knows."""
    color = uuid.uuid4().int % 0xFFFFFF if color is None else color
    size = {"width": 64, "height": 64, "batch_size": 1}
    return {
        "1": {"class_type": "EmptyImage", "inputs": {**size, "color": color}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": prefix}},
    }


def standin_workflow(class_type: str, **inputs: Any) -> JSON:
    """Make a workflow that passes an image through one of the stand-in's own nodes."""
    workflow = save_workflow()
    workflow["2"]["inputs"]["images"] = ["3", 0]
    workflow["3"] = {"class_type": class_type, "inputs": {"image": ["1", 0], **inputs}}
    return workflow


def draw_workflow(seed: int, size: int = 64, steps: int = 2) -> JSON:
    """Make the demo workflow, small and with a seed."""
    workflow: JSON = json.loads((ROOT / "simple_workflow.json").read_text(encoding="utf-8"))
    workflow["3"]["inputs"] |= {"seed": seed, "steps": steps}
    workflow["5"]["inputs"] |= {"width": size, "height": size}
    return workflow


# --- The contract: every recorded case -------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_recorded_case(server: Server, name: str) -> None:
    """The same calls get the same answers, and the websocket hears the same messages in the same order."""
    case = RECORDINGS[name]
    if name.startswith("object_info_") or name == "system_stats":
        status, body = server.call("GET", case["request"]["path"])
        assert status == case["status"]
        assert_same_shape(case["body"], body, exact_text=not REAL_ADDRESS and name != "system_stats")
    elif name == "malformed_json":
        assert server.call("POST", "/prompt", "{no json") == (case["http"][0]["status"], case["http"][0]["body"])
    else:
        skip_what_the_server_lacks(server, case)
        empty_cache(server)
        Replay(server, name).run()


def skip_what_the_server_lacks(server: Server, case: JSON) -> None:
    """Skip a case that a real server cannot run."""
    for node in case["http"][0]["request"]["body"]["prompt"].values():
        class_type = node.get("class_type") if isinstance(node, dict) else None
        if class_type and class_type != "NoSuchNode":
            info = server.call("GET", f"/object_info/{class_type}")[1]
            if class_type not in info:
                pytest.skip(f"the server has no node {class_type}")
            wanted = node["inputs"].get("ckpt_name")
            if wanted == CHECKPOINT and wanted not in info[class_type]["input"]["required"]["ckpt_name"][0]:
                pytest.skip(f"the server has no model {wanted}")


def empty_cache(server: Server) -> None:
    """Have the server forget what earlier prompts, or earlier test runs, left in its cache."""
    server.call("POST", "/free", {"free_memory": True})
    server.run(save_workflow("purge"))
    wait_for(lambda: server.queue() == ([], []), "empty queue")


class Replay:
    """Makes a case's calls again, with fresh ids, and compares what comes."""

    def __init__(self, server: Server, name: str) -> None:
        self.server = server
        self.name = name
        self.steps = copy.deepcopy(RECORDINGS[name]["http"])
        self.recorded_ws = copy.deepcopy(RECORDINGS[name].get("ws", []))
        body = self.steps[0]["request"]["body"]
        if name == "cached":
            server.run(body["prompt"])
        self.client = Client(server)
        self.fresh = {body["client_id"]: self.client.id}  # recorded id -> ours
        self.deleted: list[str] = []
        self.ran = 0  # nodes started before an interrupt

    def run(self) -> None:
        """Make the calls, then compare the websocket."""
        for step in self.steps:
            if "request" in step:
                self.make_call(**step["request"], step=step)
            else:
                self.reconnect(step["ws_after_reconnect_same_client_id"])
        if self.name != "reconnect_mid_run":  # there the socket was compared when it closed
            live = self.client.messages or [self.client.read()]
            assert_messages(self.recorded_messages(), tidy(live), apart=self.name == "delete_pending")
        self.client.close()

    def make_call(self, method: str, path: str, body: Any = None, *, step: JSON) -> None:
        """Make one call, at the moment it was made when it was recorded, and compare the answer."""
        recorded_id = path.rpartition("/")[2] if path.startswith("/history/") else None
        if body and "prompt_id" in body and path == "/prompt":
            self.fresh[body["prompt_id"]] = str(uuid.uuid4())
            body = {**body, "prompt": rebuild(body["prompt"])}
        if path == "/queue" and method == "POST":
            self.deleted += body["delete"]
        is_interrupt = path == "/interrupt" and self.name != "reconnect_mid_run"
        if is_interrupt or (isinstance(step["body"], str) and method == "GET"):
            self.client.read_until("executing", node="3")
        if recorded_id in self.fresh and recorded_id not in self.deleted:
            messages = self.client.read_to_end(self.fresh[recorded_id])
            stopped = [m["data"]["node_id"] for m in messages if m["type"] == "execution_interrupted"]
            self.ran = int(stopped[0]) if stopped else 0
        body, path = (self.replace_ids(each) for each in (body, path))
        status, answer = self.server.call(method, path, body)
        assert status == step["status"], answer
        if path == "/prompt" and self.name == "delete_pending":
            self.client.read_until("execution_start")  # else the second prompt may come before the first starts
        if step["body"] == "" or not isinstance(step["body"], str) or status == 500:
            self.skip_other_order(step["body"], answer)
            assert tidy(answer) == self.tidy_recorded(step["body"])
        else:  # a description: the running job is there
            assert [job[1] for job in answer["queue_running"]] == [body["prompt_id"] if body else self.newest_id()]
            assert [len(job) for job in answer["queue_running"]] == [5]

    def newest_id(self) -> str:
        """Return our id of the prompt submitted last."""
        return list(self.fresh.values())[-1]

    def skip_other_order(self, recorded: Any, live: Any) -> None:
        """Skip where a real server, which keeps outputs in a set, ran them in another order."""
        if REAL_ADDRESS and isinstance(recorded, dict):
            orders = [
                [e["prompt"][4] for e in body.values() if isinstance(e, dict) and "prompt" in e]
                for body in (recorded, live)
            ]
            if orders[0] != orders[1]:
                pytest.skip(f"the server ran the outputs in the order {orders[1]}, recorded was {orders[0]}")

    def reconnect(self, recorded: list[JSON]) -> None:
        """Compare the socket so far, open it again under the same clientId and compare what that hears."""
        self.client.read_until("executing", node="3")
        assert_messages(self.recorded_messages(), tidy(self.client.messages))
        self.client.close()
        self.client = Client(self.server, self.client.id)
        self.client.read_until("executing")
        node = int(self.client.messages[-1]["data"]["node"])
        live = self.client.read_until("executing", node=str(node + 3))
        head = self.tidy_recorded(recorded[:2])
        head[1]["data"]["node"] = str(node)
        blocks = make_blocks(self.tidy_recorded(self.recorded_ws), node + 3)
        assert_messages(head + blocks[3 * node - 1 :], tidy(live))

    def recorded_messages(self) -> list[JSON]:
        """Return the recorded messages; if the prompt was interrupted, as if as many nodes had run as here."""
        messages: list[JSON] = self.tidy_recorded(self.recorded_ws)
        kinds = [message["type"] for message in messages]
        if "execution_interrupted" not in kinds or not self.ran:
            return messages
        first, end = kinds.index("progress_state"), kinds.index("execution_interrupted")
        recorded_count = int(self.recorded_ws[end]["data"]["node_id"])
        assert messages[first:end] == make_blocks(messages, recorded_count)  # the rule reproduces the record
        return messages[:first] + make_blocks(messages, self.ran) + messages[end:]

    def replace_ids(self, value: Any) -> Any:
        """Put our ids for the recorded ones."""
        text = json.dumps(value)
        for recorded, fresh in self.fresh.items():
            text = text.replace(recorded, fresh)
        return json.loads(text)

    def tidy_recorded(self, value: Any) -> Any:
        """Tidy what was recorded."""
        return tidy(self.replace_ids(value))


def rebuild(prompt: JSON) -> JSON:
    """Write out a workflow that was shortened with `…`."""
    if "…" not in prompt:
        return prompt
    blurs = {}
    for number in range(2, BLURS + 2):
        blurs[str(number)] = copy.deepcopy(prompt["2"])
        blurs[str(number)]["inputs"]["image"] = [str(number - 1), 0]
    last = str(BLURS + 2)
    return {"1": prompt["1"], **blurs, last: prompt[last]}


def make_blocks(messages: list[JSON], count: int) -> list[JSON]:
    """Return what is told of `count` nodes in a row, the last one still running, after the first one's record.

    Each node has three messages: progress_state (running), executing, progress_state (finished).
    """
    states = [m["data"]["nodes"]["1"] for m in messages if m["type"] == "progress_state"]
    executing = next(m for m in messages if m["type"] == "executing")
    prompt_id = executing["data"]["prompt_id"]
    blocks = []
    nodes: JSON = {}
    for number in map(str, range(1, count + 1)):
        for state in states[:2]:
            own = dict.fromkeys(("node_id", "display_node_id", "real_node_id"), number)
            nodes = {**nodes, number: {**state, **own}}
            blocks.append({"type": "progress_state", "data": {"prompt_id": prompt_id, "nodes": nodes}})
            if state is states[0]:
                data = {**executing["data"], "node": number, "display_node": number}
                blocks.append({"type": "executing", "data": data})
    return blocks[:-1]


def tidy(value: Any) -> Any:
    """Set aside what must differ between two servers, or two runs."""
    if isinstance(value, list):
        return [tidy(each) for each in value]
    if isinstance(value, dict):
        entries = {key: tidy_entry(key, each) for key, each in value.items() if key != "create_time"}
        if "executed" in entries and "exception_type" not in entries:  # where an interrupt hit, in a row of nodes
            assert entries["executed"] == [str(number) for number in range(1, int(entries["node_id"]))]
            entries |= {"node_id": "?", "executed": "?"}
        return entries
    if isinstance(value, str):
        value = re.sub(r"_temp_[a-z]{5}_", "_temp_?_", value)
        value = re.sub(r"_\d{5}_\.", "_?_.", value)
        value = re.sub(r"'/[^']*/(?=broken\.png)", "'…/", value)
        value = re.sub(r" not in \[.*\]$", " not in […]", value)
        return value.split("          ...")[0]  # the text of a tensor is cut there
    return value


def tidy_entry(key: str, value: Any) -> Any:
    """Tidy one entry of a mapping."""
    if key in ("timestamp", "number"):
        assert isinstance(value, int | float)
        return "?"
    if key == "traceback":
        assert value
        assert all(isinstance(line, str) for line in value)
        return "?"
    if key in ("executed", "current_outputs"):
        return sorted(value, key=int)
    if key == "input_config" and isinstance(value[0], list):
        return tidy([[], *value[1:]])
    if key == "prompt" and isinstance(value, list):
        number, prompt_id, prompt, extra_data, outputs = value
        assert isinstance(number, int | float)
        return ["?", prompt_id, tidy(rebuild(prompt)), tidy(extra_data), sorted(outputs)]
    return tidy(value)


def assert_messages(recorded: list[JSON], live: list[JSON], *, apart: bool = False) -> None:
    """Compare two sockets; with `apart` status messages, which other calls cause, need not fall in between."""
    if apart:
        recorded, live = (sorted(messages, key=lambda m: m["type"] != "status") for messages in (recorded, live))
    assert [m["type"] for m in live] == [m["type"] for m in recorded]
    assert live == recorded


def assert_same_shape(recorded: Any, live: Any, *, exact_text: bool, path: str = "") -> None:
    """Compare keys and types, and with `exact_text` all but lists of files, which hold what is installed."""
    if isinstance(recorded, dict):
        assert recorded.keys() == live.keys() or (REAL_ADDRESS and recorded.keys() <= live.keys()), path
        for key in recorded:
            assert_same_shape(recorded[key], live[key], exact_text=exact_text, path=f"{path}/{key}")
    elif path.endswith(("/ckpt_name", "/image")):
        assert all(isinstance(file, str) for file in live[0]), path
        assert live[1:] == recorded[1:] or REAL_ADDRESS, path
    elif exact_text:
        assert live == recorded, path
    elif isinstance(recorded, list) and recorded and isinstance(recorded[0], dict):
        assert_same_shape(recorded[0], live[0], exact_text=False, path=f"{path}/0")
    elif recorded is not None and live is not None:  # None: a package is not installed
        assert isinstance(live, type(recorded)), path


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
    assert [entry["event"] for entry in standin.entries()] == ["start"]


@standin_only
def test_extra_data_null_kills_the_executor_while_http_stays_up(start: Callable[..., Standin]) -> None:
    standin = start()
    stuck = standin.submit(save_workflow(), extra_data=None)
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
