"""What both protocols tell of a job's files while it still runs."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import requests
from gateway_tools import Client, Door, types_of
from workplace import LIMIT_S, two_savers


def test_a_websocket_hears_of_a_nodes_files_while_the_job_runs_and_once(
    client: Client, door: Door, tmp_path: Path
) -> None:
    client.listen()
    job_id = client.run(two_savers(tmp_path / "go"))
    heard = [client.next()]
    while heard[-1]["type"] != "executed":
        heard.append(client.next())
    assert door.site.result(job_id) is None
    assert heard[-1]["data"]["node"] == "4"
    (file,) = heard[-1]["data"]["output"]["images"]
    seen = client.view(file)
    assert (seen.status_code, seen.headers["Content-Type"]) == (200, "image/png")
    # One that comes back hears it, as no other will tell it.
    client.hang_up()
    client.listen()
    again = [client.next()]
    while again[-1]["type"] != "executing":
        again.append(client.next())
    assert types_of(again).count("executed") == 1
    (tmp_path / "go").touch()
    rest = client.hear(job_id)
    assert [message["data"]["node"] for message in rest if message["type"] == "executed"] == ["3"]
    assert client.history(job_id)["outputs"]["4"]["images"] == [file]
    assert client.view(file).content == seen.content


def events_of(answer: requests.Response) -> Iterator[tuple[str, Any]]:
    """The events of a stream, which is never silent for long."""
    name, limit = "", time.monotonic() + LIMIT_S
    for line in answer.iter_lines(decode_unicode=True):
        assert time.monotonic() < limit, f"all that came last was {name}"
        kind, _, value = line.partition(": ")
        if kind == "event":
            name = value
        elif kind == "data":
            yield name, json.loads(value)


def test_the_apis_outputs_grow_while_the_job_runs_and_each_is_one_event(door: Door, tmp_path: Path) -> None:
    jobs = f"{door.url}/api/v2/jobs"
    made = requests.post(jobs, json={"workflow": two_savers(tmp_path / "go")}, timeout=LIMIT_S).json()
    stream = requests.get(f"{jobs}/{made['id']}/events", stream=True, timeout=LIMIT_S)
    events = events_of(stream)
    first = next(data for name, data in events if name == "output")
    job = requests.get(f"{jobs}/{made['id']}", timeout=LIMIT_S).json()
    assert job["status"] == "running"
    assert [(output["id"], output["node_id"]) for output in job["outputs"]] == [(first["id"], "4")]
    assert requests.get(f"{door.url}/api/v2/assets/{first['id']}/content", timeout=LIMIT_S).content[1:4] == b"PNG"
    # A stream that begins later tells it first of all.
    later = events_of(requests.get(f"{jobs}/{made['id']}/events", stream=True, timeout=LIMIT_S))
    assert next(data for name, data in later if name == "output")["id"] == first["id"]
    (tmp_path / "go").touch()
    for rest in (list(events), list(later)):
        assert [data["node_id"] for name, data in rest if name == "output"] == ["3"]
        assert rest[-1] == ("status", {"status": "succeeded", "queue_position": None})
    job = requests.get(f"{jobs}/{made['id']}", timeout=LIMIT_S).json()
    assert sorted(output["node_id"] for output in job["outputs"]) == ["3", "4"]
