#!/usr/bin/env python3
"""One walk through the calls that ComfyUI's editor makes about what people keep.

`editor_walk.py HOST:PORT` walks over a real ComfyUI that nobody else uses, and records its answers in
gateway/editor_answers.json. test_editor.py walks over the fleet and compares.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.extend(map(str, (Path(__file__).resolve().parents[2], Path(__file__).resolve().parents[1] / "cloud")))

from gateway_tools import Client
from gateway_walk import Answers, Walk

EDITOR_ANSWERS = Path(__file__).with_name("gateway") / "editor_answers.json"


class EditorWalk(Walk):
    """The calls in their order, and what was answered."""

    def plain_of(self, key: str, value: Any) -> Any:
        return (
            "TIME"
            if key in ("modified", "created") and isinstance(value, int | float)
            else super().plain_of(key, value)
        )

    def go(self) -> Answers:
        folder = f"walk{self.tag}"
        file = f"/userdata/{folder}%2Fa.json"
        self.call("users", "GET", "/users")
        self.call("a list of a folder that is not there", "GET", f"/userdata?dir={folder}")
        self.call("a list of no folder", "GET", "/userdata")
        for name, more in (
            ("kept", {}),
            ("kept again", {}),
            ("kept, but not over another", {"overwrite": "false"}),
            ("kept, with all that is known", {"full_info": "true"}),
        ):
            self.call(name, "POST", file, params=more, data=b'{"a": 1}')
        self.call("kept deeper", "POST", f"/userdata/{folder}%2Fsub%2Fb.json", data=b"{}")
        self.call("kept, hidden", "POST", f"/userdata/{folder}%2F.index.json", data=b"{}")
        self.call("kept, written twice", "POST", f"/userdata/{folder}%252Fpage%20one.html", data=b"<script>")
        for query in ("", "&recurse=true", "&recurse=true&split=true", "&recurse=true&full_info=true", "/sub"):
            answer = self.client.get(f"/userdata?dir={folder}{query}")
            self.note(f"a list{query}", sorted(answer, key=json.dumps))
        tree = self.client.call("GET", f"/v2/userdata?path={folder}").json()
        self.note("a tree", sorted(tree, key=lambda each: each["path"]))
        for name in ("a.json", "page one.html", "nothing.json", ".index.json"):
            answer = self.client.call("GET", f"/api/userdata/{folder}%2F{name}")
            shown = [answer.headers.get(each) for each in ("Content-Disposition", "X-Content-Type-Options")]
            kind = answer.headers.get("Content-Type") if answer.content else None
            self.note(f"read {name}", [answer.status_code, answer.text, kind, shown])
        self.moves(folder)
        self.settings()
        self.outside()
        return self.answers

    def moves(self, folder: str) -> None:
        a, b = f"/userdata/{folder}%2Fa.json", f"{folder}%2Fsub%2Fb.json"
        self.call("moved onto another", "POST", f"{a}/move/{b}", params={"overwrite": "false"})
        self.call("moved", "POST", f"{a}/move/{folder}%2Fc.json", params={"full_info": "true"})
        self.call("moved again", "POST", f"{a}/move/{folder}%2Fc.json")
        self.call("moved over another", "POST", f"/userdata/{folder}%2Fc.json/move/{b}")
        self.note("what is there then", self.client.call("GET", f"/userdata/{b}").text)
        self.call("taken away", "DELETE", f"/userdata/{b}")
        self.call("taken away again", "DELETE", f"/userdata/{b}")

    def settings(self) -> None:
        name = f"Walk.{self.tag}"
        self.call("a setting that nobody has made", "GET", f"/settings/{name}")
        self.call("a setting", "POST", f"/settings/{name}", json={"deep": [1]})
        self.call("some settings", "POST", "/settings", json={f"{name}.b": "ü"})
        self.call("the setting", "GET", f"/settings/{name}")
        kept = self.client.get("/settings")
        self.note("both are there", [kept[name], kept[f"{name}.b"]])

    def outside(self) -> None:
        for path in ("..%2F..%2Fx", "%2Fetc%2Fx", "a%2F..%2F..%2F..%2Fx"):
            for method in ("GET", "POST", "DELETE"):
                answer = self.client.call(method, f"/api/userdata/{path}", data=b"x" if method == "POST" else None)
                self.note(f"{method} {path}", answer.status_code)
        self.note("a list of what is outside", self.client.call("GET", "/userdata?dir=../..").status_code)


def main() -> None:
    """Record a real server's answers."""
    answers = EditorWalk(Client(sys.argv[1])).go()
    EDITOR_ANSWERS.write_text(json.dumps(answers, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
