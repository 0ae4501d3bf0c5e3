"""provision/fill.sh and provision/fill.py: names are filled into templates, and none is forgotten."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from places import ROOT


def fill(tmp_path: Path, *templates: Any, shell: str = "", given: str = "", name: str = "t%d.json") -> Any:
    """Fill templates, as text or as what is written in JSON. Returns the document, or what is said of a mistake."""
    folder = tmp_path / "provision" / "templates"
    folder.mkdir(parents=True)
    for script in ("common.sh", "fill.sh", "fill.py"):
        (tmp_path / "provision" / script).write_text((ROOT / "provision" / script).read_text())
    names = [name % i if "%" in name else name for i in range(len(templates))]
    for file, template in zip(names, templates, strict=True):
        (folder / file).write_text(template if isinstance(template, str) else json.dumps(template))
    sources = f"source {tmp_path}/provision/common.sh; source {tmp_path}/provision/fill.sh"
    command = f"set -euo pipefail; {sources}; {shell}\nfill {' '.join(names)} {given}"
    ran = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    if ran.returncode:
        assert ran.stdout == ""
        return ran.stderr
    assert ran.stderr == ""
    return json.loads(ran.stdout) if names[0].endswith("json") else ran.stdout


@pytest.mark.parametrize(
    "value", ["plain", 'a "quoted" word', "back\\slash \\n", "two\nlines\tand a tab", "日本 ü", "${OTHER} $OTHER `x`"]
)
def test_a_value_breaks_no_document(tmp_path: Path, value: str) -> None:
    shell = "read -r -d '' NAME <<'END' || :\n" + value + "\nEND\nNAME=${NAME%$'\\n'}"
    assert fill(tmp_path, {"a": ["<${NAME}> ${NAME}"]}, shell=shell) == {"a": [f"<{value}> {value}"]}


@pytest.mark.parametrize("value", ["/home/ubuntu/comfy", "/home/a b/it's $(comfy)", 'a"b\\c'])
def test_a_value_is_quoted_for_a_shell(tmp_path: Path, value: str) -> None:
    script = fill(
        tmp_path, "printf %s ${UNSET:-${NAME}}", given=f"NAME={json.dumps(value)}".replace("$", "\\$"), name="t.sh"
    )
    ran = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout == value


def test_numbers_and_lists_have_their_forms(tmp_path: Path) -> None:
    template = {
        "number": "${COUNT:number}",
        "text": "${COUNT}",
        "words": ["first", "${WORDS:each}"],
        "objects": [{"in": {"COUNT": "${COUNT}"}, "is": "<${WORDS:each}>"}],
        "untouched": [1, True, None, "$Default"],
    }
    assert fill(tmp_path, template, shell='COUNT=7 WORDS="a b"') == {
        "number": 7,
        "text": "7",
        "words": ["first", "a", "b"],
        "objects": [{"in": {"COUNT": "7"}, "is": "<a>"}, {"in": {"COUNT": "7"}, "is": "<b>"}],
        "untouched": [1, True, None, "$Default"],
    }


def test_several_templates_become_one_document(tmp_path: Path) -> None:
    first = {"Version": "1", "Statement": ["a"], "Only": {"x": 1}}
    second = {"Version": "1", "Statement": ["${NAME}"], "Only": {"y": 2}}
    joined = {"Version": "1", "Statement": ["a", "b"], "Only": {"x": 1, "y": 2}}
    assert fill(tmp_path, first, second, given="NAME=b") == joined


def test_a_given_value_wins_over_the_variable(tmp_path: Path) -> None:
    assert fill(tmp_path, {"a": "${NAME}"}, shell="NAME=of-all", given="NAME=of-this") == {"a": "of-this"}


@pytest.mark.parametrize("shell", ["", "NAME=''", "NAME=' '"], ids=["unknown", "empty", "blank"])
@pytest.mark.parametrize(
    ("template", "name"),
    [({"a": "<${NAME}>"}, "t.json"), ({"a": ["${NAME:each}"]}, "t.json"), ("echo ${NAME}", "t.sh")],
    ids=["text", "list", "shell"],
)
def test_a_name_without_a_value_is_refused(tmp_path: Path, template: Any, name: str, shell: str) -> None:
    said = fill(tmp_path, template, shell=shell, name=name)
    assert "fill.py: NAME has no value\n" in said
    assert f"cannot make what AWS gets of provision/templates/{name}: see above" in said
