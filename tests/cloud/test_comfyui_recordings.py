"""The ComfyUI stand-in, or the real server at COMFY_ADDRESS, held against every recorded case.

    pytest tests/cloud/test_comfyui_recordings.py                                the stand-in
    COMFY_ADDRESS=127.0.0.1:8188 pytest tests/cloud/test_comfyui_recordings.py   a real server, idle and used by nobody

Only what must differ is set aside before the comparison: ids, times, counters in file names, paths, the
server's number, how many nodes ran before an interrupt.
"""

from __future__ import annotations

import copy
import json
import re
import uuid
from typing import Any

import pytest
from comfyui_client import (
    CHECKPOINT,
    JSON,
    REAL_ADDRESS,
    RECORDINGS,
    Client,
    Server,
    empty_cache,
    idle,
    server,
)

__all__ = ["idle", "server"]

CASES = [name for name, case in RECORDINGS.items() if isinstance(case, dict)]
BLURS = 40  # ImageBlur nodes in the recordings' long workflow


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
            newer = [self.tidy_recorded(body) for key, body in step.items() if key.startswith("body since ")]
            if not (REAL_ADDRESS and tidy(answer) in newer):
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
        # Of a tensor's text the first row: how many are shown before those left out is the server's, too.
        return value.split("\n")[0] if value.startswith("tensor(") else value
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
