"""Asks a real ComfyUI for its verdict on each workflow of verdicts.json, and writes it down there.

    python tests/sender/record_verdicts.py 127.0.0.1:8188

Run by hand, with a server that is idle and keeps its files in fresh folders, and in whose custom_nodes/ the modules of
tests/sender/odd_nodes/ lie. A new workflow is a new row with a `prompt` in verdicts.json: each server adds its verdict
under its version where that has none, with the part of its /object_info that the rows need. Some workflows end the
thread of a ComfyUI that runs jobs: this ends then, and goes on where it was once that server has been started again.
"""

from __future__ import annotations

import io
import json
import math
import struct
import sys
import time
import wave
from pathlib import Path
from typing import Any

import requests
from PIL import Image

VERDICTS = Path(__file__).with_name("verdicts.json")
NEEDED = ("input", "output", "output_node", "python_module", "search_aliases")
UNTOLD = ("tooltip", "advanced", "display_name", "placeholder")
"""What of /object_info says nothing of what is valid."""
LIMIT_S = 60
DIED = "died"
DEAD_S = 15
"""Long after the slowest of these jobs has ended."""


def picture() -> bytes:
    """A small PNG."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "PNG")
    return buffer.getvalue()


def tone() -> bytes:
    """A short WAV."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(b"".join(struct.pack("<h", int(9000 * math.sin(n / 3))) for n in range(800)))
    return buffer.getvalue()


FILES = {
    "in.png": picture, "sub/in.png": picture, "words.txt": lambda: b"hello", "tone.wav": tone,
    "out.png [output]": picture, "below/out.png [output]": picture, "seen.png [temp]": picture,
}  # fmt: skip
"""What lies on the server: the names that a workflow calls them by."""


def upload(server: str, name: str, content: bytes) -> None:
    """Put a file where a workflow finds it under this name."""
    path, _, place = name.partition(" [")
    subfolder, _, filename = path.rpartition("/")
    answer = requests.post(
        f"{server}/upload/image",
        files={"image": (filename, content)},
        data={"subfolder": subfolder, "type": place.rstrip("]") or "input", "overwrite": "true"},
        timeout=LIMIT_S,
    )
    answer.raise_for_status()


def verdict_of(server: str, prompt: dict[str, Any]) -> dict[str, Any]:
    """What the server says of a workflow, and how it ended where it was run."""
    answer = requests.post(f"{server}/prompt", json={"prompt": prompt}, timeout=LIMIT_S)
    if answer.status_code == 500:
        return {"status": 500}
    body = answer.json()
    errors = {
        node: sorted({error["type"] for error in found["errors"]}) for node, found in body["node_errors"].items()
    }
    told: dict[str, Any] = {"status": answer.status_code} | ({"errors": errors} if errors else {})
    if answer.status_code != 200:
        return told | {"error": body["error"]["type"]}
    end = time.monotonic() + DEAD_S
    while not (history := requests.get(f"{server}/history/{body['prompt_id']}", timeout=LIMIT_S).json()):
        if time.monotonic() > end:
            return told | {"ran": DIED}
        time.sleep(0.02)
    return told | {"ran": history[body["prompt_id"]]["status"]["status_str"]}


def told_of(value: Any) -> Any:
    """A piece of /object_info without what is only for people."""
    if isinstance(value, dict):
        return {key: told_of(each) for key, each in value.items() if key not in UNTOLD}
    return [told_of(each) for each in value] if isinstance(value, list) else value


def main(address: str) -> None:
    """Ask this server, and write down what it says."""
    server = f"http://{address}"
    recorded = json.loads(VERDICTS.read_text(encoding="utf-8"))
    version = requests.get(f"{server}/system_stats", timeout=LIMIT_S).json()["system"]["comfyui_version"]
    for name, make in FILES.items():
        upload(server, name, make())
    for row in recorded["rows"].values():
        if version not in row:
            row[version] = verdict_of(server, row["prompt"])
            if row[version].get("ran") == DIED:
                write(recorded)
                sys.exit(f"ComfyUI runs nothing more: start it again, and this. It was {dense(row['prompt'])}")
    used = {node["class_type"] for row in recorded["rows"].values() for node in row["prompt"].values()}
    info = requests.get(f"{server}/object_info", timeout=LIMIT_S).json()
    replaced = requests.get(f"{server}/node_replacements", timeout=LIMIT_S)
    known = replaced.json() if replaced.ok else {}
    used |= {each["new_node_id"] for old in used & known.keys() for each in known[old]}
    recorded["servers"][version] = {
        "object_info": {
            name: {key: told_of(info[name][key]) for key in NEEDED if key in info[name]}
            for name in sorted(used & info.keys())
        },
        "node_replacements": {name: known[name] for name in sorted(used & known.keys())},
    }
    write(recorded)


def write(recorded: dict[str, Any]) -> None:
    """A line for each row and each node, so that a change is seen in what changed."""
    lines = ["{", f'"about": {json.dumps(recorded["about"])},', '"servers": {']
    for number, (version, server) in enumerate(recorded["servers"].items()):
        lines += [f"{',' * (number > 0)}{json.dumps(version)}: {{"]
        for part in ("object_info", "node_replacements"):
            entries = [f"{json.dumps(name)}: {dense(value)}" for name, value in server[part].items()]
            lines += [f'{"," * (part != "object_info")}"{part}": {{', ",\n".join(entries), "}"]
        lines += ["}"]
    rows = [f"{json.dumps(name)}: {dense(row)}" for name, row in recorded["rows"].items()]
    lines += ["},", '"rows": {', ",\n".join(rows), "}", "}"]
    VERDICTS.write_text("\n".join(line for line in lines if line) + "\n", encoding="utf-8")
    assert json.loads(VERDICTS.read_text(encoding="utf-8")) == recorded


def dense(value: Any) -> str:
    """JSON without blanks."""
    return json.dumps(value, separators=(",", ":"))


if __name__ == "__main__":
    main(sys.argv[1])
