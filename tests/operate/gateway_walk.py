#!/usr/bin/env python3
"""One walk through the calls of a ComfyUI, which notes what was answered in a form that two servers can be compared by.

`gateway_walk.py HOST:PORT` walks over a real ComfyUI that nobody else uses, and records its answers in
gateway/answers.json. test_comfy_calls.py walks over the fleet and compares.
"""

from __future__ import annotations

import json
import re
import sys
import uuid
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

sys.path.extend(map(str, (Path(__file__).resolve().parents[2], Path(__file__).resolve().parents[1] / "cloud")))

from gateway_tools import Client, types_of
from PIL import Image
from workplace import await_that

ANSWERS = Path(__file__).with_name("gateway") / "answers.json"
Answers = dict[str, Any]


def picture(colour: str, size: int = 8, **more: Any) -> bytes:
    """A small PNG."""
    out = BytesIO()
    Image.new("RGBA", (size, size), colour).save(out, format="PNG", **more)
    return out.getvalue()


def saving(class_type: str = "SaveImage", size: int = 64, **inputs: Any) -> dict[str, Any]:
    """A workflow that makes a picture of a colour that no other has, and gives it to an output node."""
    colour = uuid.uuid4().int % 0xFFFFFF
    image = {"width": size, "height": size, "batch_size": 1, "color": colour}
    prefix = {} if class_type == "PreviewImage" else {"filename_prefix": "job/a"}
    return {
        "1": {"class_type": "EmptyImage", "inputs": image},
        "2": {"class_type": class_type, "inputs": {"images": ["1", 0], **prefix, **inputs}},
    }


class Walk:
    """The calls in their order, and what was answered."""

    def __init__(self, client: Client, bring: Callable[[str], None] = lambda _: None) -> None:
        """`bring` has a file that was uploaded come to where ComfyUI looks for it."""
        self.client = client
        self.bring = bring
        self.tag = uuid.uuid4().hex[:8]
        self.answers: Answers = {}

    def note(self, name: str, value: Any) -> None:
        self.answers[name] = self.plain(value)

    def plain(self, value: Any) -> Any:
        """A value without what differs from run to run and from server to server: ids, times, counters, the job's folder,
        which models there are; and without what a fleet adds."""
        if isinstance(value, dict):
            return {self.plain(key): self.plain_of(key, each) for key, each in value.items() if key != "fleet"}
        if isinstance(value, list):
            return [self.plain(each) for each in value]
        if isinstance(value, str):
            value = value.replace(self.tag, "TAG").replace(self.client.client_id, "CLIENT")
            value = re.sub(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "ID", value)
            value = re.sub(r"(temp_[a-z]{5})?_[0-9]{5}_", "_N_", value)
            return re.sub(r"not in \[.*\]", "not in LIST", value)
        return "TIME" if isinstance(value, int) and value > 1_000_000_000_000 else value

    def plain_of(self, key: str, value: Any) -> Any:
        """The same of what stands under a key."""
        if key in ("number", "priority", "color"):
            return "NUMBER"
        if key == "subfolder" and isinstance(value, str):
            return re.sub(r"^ID/?", "", self.plain(value))
        if key == "prompt" and isinstance(value, list):
            return ["NUMBER", *self.plain(value[1:])]
        if key == "exception_message":
            return re.sub(r"'/.*/", "'", self.plain(value)).strip()
        if key == "input_config":
            return "LIST" if isinstance(value[0], list) else value[0]
        if key in ("traceback", "current_inputs", "current_outputs", "executed"):
            return type(value).__name__  # a receipt does not have all of it
        return self.plain(value)

    def call(self, name: str, method: str, path: str, **more: Any) -> Any:
        """Call and note status, kind and JSON."""
        answer = self.client.call(method, path, **more)
        kind = answer.headers.get("Content-Type", "").partition(";")[0] if answer.content else None
        noted: dict[str, Any] = {"status": answer.status_code}
        if kind == "application/json":
            noted["body"] = answer.json()
        self.note(name, noted)
        return answer

    def go(self) -> Answers:
        """All of it."""
        self.client.listen()
        self.jobs()
        self.refusals()
        self.endings()
        self.pages()
        self.uploads()
        self.views()
        self.small_calls()
        return self.answers

    def run(self, name: str, workflow: Any, **more: Any) -> str:
        """Run a workflow to its end, and note what was said and what the history says."""
        job_id = self.client.run(workflow, **more)
        heard = self.client.hear(job_id)
        # How often progress is told depends on the hour; the order of all else does not.
        words = [word for word in types_of(heard) if word not in ("progress_state", "progress", "status")]
        nodes = [each["data"]["node"] for each in heard if each["type"] == "executed"]
        ends = [each["data"] for each in heard if each["type"].startswith("execution_") or each["type"] == "executed"]
        executing = words.count("executing")
        self.note(f"{name}: said", {"words": [word for word in words if word != "executing"], "executed": nodes, "data": ends, "is at work": executing > 1, "last": words[-1]})  # fmt: skip
        self.note(f"{name}: history", self.client.history(job_id))
        return job_id

    def jobs(self) -> None:
        job_id = self.run("a saved picture", saving(), extra_data={"extra_pnginfo": {"workflow": {"id": "w1"}}})
        self.call("its job", "GET", f"/api/jobs/{job_id}")
        self.call("the queue after it", "GET", "/api/queue")
        self.run("a shown picture", saving("PreviewImage"))
        self.run("a moving picture", saving("SaveAnimatedWEBP", fps=6.0, lossless=True, quality=80, method="default"))
        own = str(uuid.uuid4())
        assert self.run("an id of its own", saving(), prompt_id=own) == own
        two = saving() | {
            "3": {"class_type": "LoadImage", "inputs": {"image": "nope.png"}},
            "4": {"class_type": "SaveImage", "inputs": {"images": ["3", 0], "filename_prefix": "y"}},
        }
        answer = self.client.post(two)
        self.note("a branch that is dropped", answer.json())
        self.note("a branch that is dropped: history", self.client.history(answer.json()["prompt_id"]))

    def refusals(self) -> None:
        bad: dict[str, Any] = {
            "an unknown node": {"1": {"class_type": "NoSuchNode", "inputs": {}, "_meta": {"title": "Mine"}}},
            "no output": {"1": saving()["1"]},
            "a missing model": {
                "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "absent.safetensors"}},
                "8": {"class_type": "VAEDecode", "inputs": {"samples": ["5", 0], "vae": ["4", 2]}},
                "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
                "9": {"class_type": "SaveImage", "inputs": {"images": ["8", 0], "filename_prefix": "x"}},
            },
            "a missing file": {
                "1": {"class_type": "LoadImage", "inputs": {"image": "nope.png"}},
                "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "x"}},
            },
        }
        for name, changes in {
            "an input that is missing": {"width": None},
            "an input that is too small": {"width": 0},
            "an input that is too large": {"batch_size": 5000},
            "an input that is no number": {"width": "wide"},
            "a link of three": {"width": ["1", 0, 0]},
        }.items():
            workflow = saving()
            workflow["1"]["inputs"] |= changes
            workflow["1"]["inputs"] = {
                key: value for key, value in workflow["1"]["inputs"].items() if value is not None
            }
            bad[name] = workflow
        bad["a link to another kind"] = saving() | {"2": {"class_type": "SaveLatent", "inputs": {"samples": ["1", 0], "filename_prefix": "x"}}}  # fmt: skip
        for name, workflow in bad.items():
            self.call(f"refused: {name}", "POST", "/prompt", json={"prompt": workflow})
        self.call("refused: no prompt", "POST", "/prompt", json={"client_id": "x"})
        self.call("refused: a bad id", "POST", "/prompt", json={"prompt": saving(), "prompt_id": "X"})

    def endings(self) -> None:
        broken = f"broken{self.tag}.png"
        self.call("a file that is no picture", "POST", "/upload/image", files={"image": (broken, b"no picture")})
        self.bring(broken)
        self.run("a node that fails", {
            "1": {"class_type": "LoadImage", "inputs": {"image": broken}},
            "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "x"}},
        })  # fmt: skip
        slow = saving(size=1536)
        slow["3"] = {"class_type": "ImageBlur", "inputs": {"image": ["1", 0], "blur_radius": 31, "sigma": 10.0}}
        slow["2"]["inputs"]["images"] = ["3", 0]
        first = self.client.run(slow)
        waiting = self.client.run(saving())
        await_that("it runs", lambda: self.client.get("/queue")["queue_running"])
        (pending,) = self.client.get("/queue")["queue_pending"]
        self.note("a job that waits", pending[1:2] + pending[4:])
        self.note("its job while it waits", {"status": self.client.get(f"/api/jobs/{waiting}")["status"]})
        self.call("taken off the queue", "POST", "/queue", json={"delete": [waiting]})
        self.call("the queue without it", "GET", "/queue")
        self.answers["the queue without it"]["body"]["queue_running"] = len(
            self.client.get("/queue")["queue_running"]
        )
        self.call("interrupted", "POST", "/interrupt", json={"prompt_id": first})
        heard = self.client.hear(first)
        self.note("interrupted: said", [word for word in types_of(heard) if word.startswith("execution_")])
        self.note("interrupted: status", self.client.history(first)["status"]["status_str"])
        self.call("its history, which was deleted", "GET", f"/history/{waiting}")
        self.call("cancelled when it is over", "POST", f"/api/jobs/{first}/cancel")

    def pages(self) -> None:
        # In each list of jobs this walk's are the newest.
        self.note("the newest job", self.client.get("/api/jobs", limit="1")["jobs"])
        self.note("failed jobs", self.client.get("/api/jobs", status="failed", limit="1")["jobs"])
        self.note("a page", {**self.client.get("/api/jobs", limit="2", offset="1")["pagination"], "total": "NUMBER"})
        for query in ("status=odd", "sort_by=odd", "sort_order=odd", "limit=0", "limit=x", "offset=x"):
            self.call(f"jobs?{query}", "GET", f"/api/jobs?{query}")
        self.call("no job", "GET", f"/api/jobs/{uuid.uuid4()}")
        self.call("nothing to cancel", "POST", f"/api/jobs/{uuid.uuid4()}/cancel")
        self.call("several to cancel", "POST", "/api/jobs/cancel", json={"job_ids": [str(uuid.uuid4())]})
        self.call("ids that are none", "POST", "/api/jobs/cancel", json={"job_ids": ["x", 3]})
        self.call("no list of ids", "POST", "/api/jobs/cancel", json={})
        self.note("the newest of the history", len(self.client.get("/history", max_items="2")))
        newest = next(iter(self.client.get("/history", max_items="1")))
        self.call("out of the history", "POST", "/history", json={"delete": [newest]})
        self.call("what is out of the history", "GET", f"/history/{newest}")
        self.call("an unknown job's history", "GET", f"/api/history/{uuid.uuid4()}")

    def uploads(self) -> None:
        name, one, other = f"{self.tag}.png", picture("red"), picture("blue")
        steps: list[tuple[str, bytes, dict[str, str]]] = [
            ("an upload", one, {}),
            ("the same again", one, {}),
            ("another of its name", other, {}),
            ("the other again", other, {}),
            ("one that overwrites", picture("green"), {"overwrite": "true"}),
            ("one in a folder", one, {"subfolder": f"f{self.tag}", "type": "input"}),
            ("one that climbs", one, {"subfolder": "../up"}),
        ]
        for label, content, fields in steps:
            self.call(label, "POST", "/upload/image", files={"image": (name, content)}, data=fields)
        self.call("a form without a file", "POST", "/upload/image", files={"other": ("x", b"")})
        place = {"filename": name, "type": "input"}
        self.note("what was overwritten", self.client.view(place).content == picture("green"))
        reference = json.dumps(place)
        masked = self.call("a mask", "POST", "/api/upload/mask", files={"image": (f"m{name}", picture("#00000080"))}, data={"original_ref": reference, "subfolder": "clipspace"})  # fmt: skip
        with Image.open(
            BytesIO(self.client.view(dict(masked.json(), filename=masked.json()["name"])).content)
        ) as image:
            self.note("its first point", list(image.getpixel((0, 0))))  # type: ignore[arg-type]

    def views(self) -> None:
        file = f"{self.tag}.png"
        for label, query in {
            "nothing": {},
            "an empty name": {"filename": ""},
            "a name that climbs": {"filename": "../x.png"},
            "a name from the root": {"filename": "/etc/passwd"},
            "a folder that climbs": {"filename": "x.png", "subfolder": "../.."},
            "a folder from the root": {"filename": "x.png", "subfolder": "/etc"},
            "another place": {"filename": "x.png", "type": "models"},
            "what is not there": {"filename": "x.png", "subfolder": str(uuid.uuid4())},
        }.items():
            answer = self.client.call("GET", "/view", params=query)
            self.note(f"view of {label}", answer.status_code)
        for label, headers in {
            "all": {},
            "the beginning": {"Range": "bytes=0-9"},
            "the end": {"Range": "bytes=-5"},
            "too much": {"Range": "bytes=9999999-"},
        }.items():
            answer = self.client.view({"filename": file, "type": "input"}, **headers)
            seen = {name: answer.headers.get(name) for name in ("Content-Type", "Content-Range", "Content-Disposition", "X-Content-Type-Options")}  # fmt: skip
            whole = picture("green")
            part = {"all": whole, "the beginning": whole[:10], "the end": whole[-5:], "too much": b""}[label]
            if answer.status_code == 416:
                seen = {}
            self.note(f"view of {label}", {"status": answer.status_code, "is right": answer.content == part or answer.status_code == 416, **seen})  # fmt: skip
        tag = self.client.view({"filename": file, "type": "input"}).headers["ETag"]
        again = self.client.view({"filename": file, "type": "input"}, **{"If-None-Match": tag})
        self.note("view of what one has", again.status_code)
        self.note("view of a name with its place", self.client.view({"filename": f"{file} [input]"}).status_code)
        for query in ({"preview": "webp;50"}, {"preview": "jpeg"}, {"channel": "rgb"}, {"channel": "a"}):
            answer = self.client.view({"filename": file, "type": "input", **query})
            with Image.open(BytesIO(answer.content)) as image:
                shown = [image.format, image.mode]
            self.note(f"view with {query}", [answer.status_code, answer.headers["Content-Type"], shown])
        page = f"{self.tag}.html"
        self.client.call("POST", "/upload/image", files={"image": (page, b"<script>")})
        answer = self.client.view({"filename": page, "type": "input"})
        self.note("view of a page", [answer.headers["Content-Type"], answer.headers["Content-Disposition"]])

    def small_calls(self) -> None:
        for path in ("/object_info/Nope", "/models/nope", "/nothing", "/api/nothing", "/jobs"):
            self.call(path, "GET", path)
        self.note("features", sorted(self.client.get("/features")))
        self.note(
            "system_stats", {key: type(value).__name__ for key, value in self.client.get("/system_stats").items()}
        )
        self.note("models", {"checkpoints", "loras", "vae"} <= set(self.client.get("/models")))
        self.note("embeddings", type(self.client.get("/api/embeddings")).__name__)
        self.note("extensions", type(self.client.get("/extensions")).__name__)
        self.note("prompt", self.client.get("/prompt")["exec_info"]["queue_remaining"])
        self.note("SaveImage", sorted(self.client.get("/object_info/SaveImage")["SaveImage"]["input"]["required"]))
        self.call("nothing to interrupt", "POST", "/interrupt")
        self.call("nothing to clear", "POST", "/queue", json={"clear": True})


def main() -> None:
    """Record a real server's answers."""
    client = Client(sys.argv[1])
    answers = Walk(client).go()
    client.hang_up()
    ANSWERS.write_text(json.dumps(answers, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
