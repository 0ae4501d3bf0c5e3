"""README.md says what the project really does: settings, help, commands, code. README.zh.md says the same."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
import threading
from functools import cache
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from places import ROOT

import send_job
from worker.web import post_result

README = (ROOT / "README.md").read_text()
CHINESE = (ROOT / "README.zh.md").read_text()
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def documented_settings() -> list[str]:
    """A README table row for every variable of env.example, in its words."""
    rows: list[str] = []
    words: list[str] = []
    for line in (ROOT / "env.example").read_text().partition("# --- Where")[2].splitlines():
        if match := re.fullmatch(r'#?([A-Z][A-Z0-9_]*)="?([^"]*)"?', line):
            default = f"`{match[2]}`" if match[2] else ""
            rows.append(f"| `{match[1]}` | {default} | {' '.join(words)} |")
        words = [*words, line[2:]] if line.startswith("# ") and "---" not in line else []
    return rows


def test_the_settings_table_has_the_words_of_env_example() -> None:
    rows = documented_settings()
    assert len(rows) > 20
    assert "\n".join(rows) in README


@cache
def help_of(script: str) -> str:
    """What a script says with --help."""
    interpreter = [sys.executable] if script.endswith(".py") else []
    ran = subprocess.run(
        [*interpreter, str(ROOT / script), "--help"],
        env={"COLUMNS": "110", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    return ran.stdout


def test_the_help_is_the_commands_own() -> None:
    said = help_of("send_job.py")
    assert " ".join(said.split()) in " ".join(README.split()), "Pythons differ in where they break lines"


@pytest.mark.parametrize(
    "name", ["create_env.sh", "delete_env.sh", "start_service.sh", "tests/demo.sh", "tests/run.sh"]
)
def test_every_script_shows_its_header_as_help(name: str) -> None:
    ran = subprocess.run(
        [ROOT / name, "--help"], env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True, check=False
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "Usage:" in ran.stdout
    assert not any(line.startswith("#") for line in ran.stdout.splitlines())


# --- Commands and code -----------------------------------------------------------------------------------


def blocks(kind: str) -> list[tuple[str, str]]:
    """The README's fenced blocks of this kind, each with the text of the chapter (##) it stands in."""
    return [
        (block, chapter)
        for chapter in re.split(r"^## ", README, flags=re.MULTILINE)
        for block in re.findall(rf"^```{kind}\n(.*?)^```", chapter, flags=re.MULTILINE | re.DOTALL)
    ]


def commands() -> list[tuple[str, str]]:
    """Every command in a block, on one line and without its remark, with the chapter's text."""
    found = [(block.replace("\\\n", ""), chapter) for block, chapter in blocks("bash")]
    found += [
        ("\n".join(re.findall(r"^\$ (.*)", block, re.MULTILINE)), chapter) for block, chapter in blocks("console")
    ]
    lines = [
        (re.sub(r"(^|\s)#\s.*", "", line).strip(), chapter) for block, chapter in found for line in block.splitlines()
    ]
    return [(line, chapter) for line, chapter in lines if line]


OURS = re.compile(
    r'((?:[A-Z_]+=(?:"[^"]*"|\S*)\s+)*)(?:\S+/python )?(?:\./)?((?:tests/(?:[a-z]+/)?)?[a-z_]+\.(?:sh|py))(?=\s|$)(.*)'
)
"""A command of ours: variables before it, the script, what follows."""
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")


def unknown_in(command: re.Match[str]) -> list[str]:
    """The variables and options of a command that nobody knows."""
    variables, script, rest = command.groups()
    settings = (ROOT / "env.example").read_text() + (ROOT / "tests/demo/demo.py").read_text()
    found = [name for name in re.findall(r"([A-Z_]+)=", variables) if not re.search(rf"\b{name}\b", settings)]
    if not (ROOT / script).is_file():
        return [*found, script]
    options = OPTION.findall(re.split(r" [|>] ", rest)[0])
    return found + [option for option in options if option not in OPTION.findall(help_of(script))]


def test_each_command_is_known_to_its_script_or_stands_where_aws_is_needed() -> None:
    found = commands()
    assert len(found) > 40
    ours = [match for line, _ in found if (match := OURS.match(line))]
    assert {match[0]: unknown_in(match) for match in ours if unknown_in(match)} == {}
    assert [line for line, chapter in found if not OURS.match(line) and "This part needs AWS" not in chapter] == []


def test_each_command_and_option_in_a_sentence_is_known() -> None:
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", FENCED.sub("", README))]
    ours = [match for span in spans if (match := OURS.match(span))]
    assert len(ours) > 20
    assert {match[0]: unknown_in(match) for match in ours if unknown_in(match)} == {}
    known = OPTION.findall(
        "".join(map(help_of, ["create_env.sh", "delete_env.sh", "send_job.py", "tests/bench/bench_worker.py"]))
    )
    alone = {option for span in spans if span.startswith("--") for option in OPTION.findall(span)}
    assert alone - set(known) - {"--disable-metadata"} == set(), "that one is ComfyUI's"


def headings(text: str) -> list[tuple[str, str]]:
    """The level and the words of each heading."""
    return re.findall(r"^(#+) (.*)", FENCED.sub("", text), flags=re.MULTILINE)


@pytest.mark.parametrize("text", [README, CHINESE], ids=["README.md", "README.zh.md"])
def test_every_link_leads_somewhere(text: str) -> None:
    anchors = {"#" + re.sub(r"[^\w -]", "", words.lower()).replace(" ", "-") for _, words in headings(text)}
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("http")]
    assert len(links) > 10
    assert [link for link in links if link not in anchors and not (ROOT / link).is_file()] == []


def test_the_chinese_readme_has_the_same_blocks_settings_and_chapters() -> None:
    def frame(text: str) -> tuple[list[str], list[str], list[str]]:
        settings = re.findall(r"^\| (`[A-Z][A-Z0-9_]+` \| [^|]*)\|", text, flags=re.MULTILINE)
        return FENCED.findall(text), settings, [level for level, _ in headings(text)]

    assert all(len(part) > 20 for part in frame(README))
    assert frame(CHINESE) == frame(README)


def test_python_in_the_readme_names_what_there_is() -> None:
    assert len(blocks("python")) == 2
    for block, _ in blocks("python"):
        ast.parse(block)
    table = README.partition("| call | what it does |")[2].partition("\n\n")[0]
    calls = re.findall(r"`(\w+)\((.*?)\)`", table)
    assert len(calls) > 5
    for name, parameters in calls:
        assert set(re.findall(r"\w+", parameters)) <= set(inspect.signature(getattr(send_job, name)).parameters), name
    names = set(re.findall(r"\bsend_job\.(?!py\b)(\w+)", README)) | set(re.findall(r"`(\w+Error|JobFailed)`", table))
    assert {name for name in names - {"TimeoutError"} if not hasattr(send_job, name)} == set()


def test_the_readmes_receiver_accepts_what_a_worker_signs_and_nothing_else() -> None:
    names: dict[str, Any] = {}
    exec(next(block for block, _ in blocks("python") if "is_genuine" in block), names)

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200 if names["is_genuine"](self.headers, body, "hush") else 403)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Receiver) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/done"
        assert post_result(url, {"job_id": "K采样器"}, "hush") == ""
        assert "403" in post_result(url, {"job_id": "K采样器"}, "another secret")
        server.shutdown()
