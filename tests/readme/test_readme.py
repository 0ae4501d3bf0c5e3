"""README.md and the pages in docs/ say what the project really does; the Chinese ones say the same."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
import threading
from functools import cache
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from botocore import xform_name
from botocore.session import Session
from places import ROOT

import send_job
from worker.web import post_result

README, CHINESE = ROOT / "README.md", ROOT / "README.zh.md"
TWINS = {page: ROOT / "docs/zh" / page.name for page in sorted(ROOT.glob("docs/*.md"))} | {README: CHINESE}
"""Each English page with the Chinese one."""
PAGES = {str(page.relative_to(ROOT)): page for page in [*TWINS, *sorted(ROOT.glob("docs/zh/*.md")), CHINESE]}
ENGLISH = "\n\n".join(page.read_text() for page in TWINS)
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
DOORS = ["create_env.sh", "delete_env.sh", "send_job.py", "fleet.py"]


def page(name: str) -> str:
    """The text of an English page in docs/."""
    return (ROOT / "docs" / name).read_text()


# --- What the scripts say themselves ---------------------------------------------------------------------


def documented_settings() -> list[str]:
    """A table row for every variable of env.example, in its words."""
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
    assert page("settings.md").endswith("\n|---|---|---|\n" + "\n".join(rows) + "\n")


@cache
def help_of(*command: str) -> str:
    """What a script, or one of its commands, says with --help; nothing where it does not know the command."""
    script, *rest = command
    interpreter = [sys.executable] if script.endswith(".py") else []
    ran = subprocess.run(
        [*interpreter, str(ROOT / script), *rest, "--help"],
        env={"COLUMNS": "110", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=not rest,
    )
    return ran.stdout


def fleet_commands() -> list[str]:
    """The commands of fleet.py."""
    return re.findall(r"^    ([a-z]+) ", help_of("fleet.py"), re.MULTILINE)


def test_the_help_is_the_commands_own() -> None:
    said = help_of("send_job.py")
    assert " ".join(said.split()) in " ".join(page("jobs.md").split()), "Pythons differ in where they break lines"


def test_the_page_on_operations_has_every_command_of_fleet_py() -> None:
    assert {"status", "dead", "redrive", "purge", "report"} <= set(fleet_commands())
    table = page("operations.md").partition("| to | run |")[2].partition("\n\n")[0]
    assert set(re.findall(r"`\./fleet\.py ([a-z]+)", table)) == set(fleet_commands())


@pytest.mark.parametrize(
    "name", ["create_env.sh", "delete_env.sh", "start_service.sh", "tests/demo.sh", "tests/run.sh", "tests/soak.sh"]
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
    """The fenced blocks of this kind in all English pages, each with its page's head and its chapter (##)."""
    found = []
    for text in (page.read_text() for page in TWINS):
        head, *chapters = re.split(r"^## ", text, flags=re.MULTILINE)
        for chapter in [head, *chapters]:
            fenced = re.findall(rf"^```{kind}\n(.*?)^```", chapter, flags=re.MULTILINE | re.DOTALL)
            found += [(block, head + chapter) for block in fenced]
    return found


def commands() -> list[tuple[str, str]]:
    """Every command in a block, on one line and without its remark, with the text around it."""
    found = [(block.replace("\\\n", ""), around) for block, around in blocks("bash")]
    found += [
        ("\n".join(re.findall(r"^\$ (.*)", block, re.MULTILINE)), around) for block, around in blocks("console")
    ]
    lines = [
        (re.sub(r"(^|\s)#\s.*", "", line).strip(), around) for block, around in found for line in block.splitlines()
    ]
    return [(line, around) for line, around in lines if line]


OURS = re.compile(
    r'((?:[A-Z_]+=(?:"[^"]*"|\S*)\s+)*)(?:\S+/python )?(?:\./)?((?:tests/(?:[a-z]+/)?)?[a-z_]+\.(?:sh|py))(?=\s|$)(.*)'
)
"""A command of ours: variables before it, the script, what follows."""
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")


def unknown_in(command: re.Match[str]) -> list[str]:
    """The variables, script, fleet.py's command and options of a command that nobody knows."""
    variables, script, rest = command.groups()
    settings = (ROOT / "env.example").read_text() + (ROOT / "tests/demo/demo.py").read_text()
    found = [name for name in re.findall(r"([A-Z_]+)=", variables) if not re.search(rf"\b{name}\b", settings)]
    if not (ROOT / script).is_file():
        return [*found, script]
    options = OPTION.findall(re.split(r" [|>] ", rest)[0])
    inner = rest.split()[:1] if script == "fleet.py" else []
    known = OPTION.findall(help_of(script, *inner)) if options or inner else []
    if inner and not known:
        return [*found, *inner]
    return found + [option for option in options if option not in known]


def test_each_command_is_known_to_its_script_or_stands_where_aws_is_needed() -> None:
    found = commands()
    assert len(found) > 40
    ours = [match for line, _ in found if (match := OURS.match(line))]
    assert {match[0]: unknown_in(match) for match in ours if unknown_in(match)} == {}
    needs_aws = re.compile(r"This (part|page) needs AWS")
    assert [line for line, around in found if not OURS.match(line) and not needs_aws.search(around)] == []


def spans(text: str) -> list[str]:
    """What stands between backticks in its sentences and tables."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", FENCED.sub("", text))]


@pytest.mark.parametrize("name", PAGES)
def test_each_command_and_option_in_a_sentence_is_known(name: str) -> None:
    said = spans(PAGES[name].read_text())
    ours = [match for span in said if (match := OURS.match(span)) and (match[3] or span.startswith("./"))]
    assert {match[0]: unknown_in(match) for match in ours if unknown_in(match)} == {}
    helps = [*map(help_of, [*DOORS, "tests/run.sh", "tests/bench/bench_worker.py"])]
    helps += [help_of("fleet.py", command) for command in fleet_commands()]
    alone = {option for span in said if span.startswith("--") for option in OPTION.findall(span)}
    assert alone - set(OPTION.findall("".join(helps))) - {"--disable-metadata"} == set(), "that one is ComfyUI's"


def test_there_are_commands_in_sentences() -> None:
    assert len([span for span in spans(ENGLISH) if (match := OURS.match(span)) and match[3]]) > 20


def test_python_in_the_pages_names_what_there_is() -> None:
    assert len(blocks("python")) == 4
    for block, _ in blocks("python"):
        ast.parse(block)
    table = page("jobs.md").partition("| call | what it does |")[2].partition("\n\n")[0]
    calls = re.findall(r"`(\w+)\((.*?)\)`", table)
    assert len(calls) > 5
    for name, parameters in calls:
        assert set(re.findall(r"\w+", parameters)) <= set(inspect.signature(getattr(send_job, name)).parameters), name
    names = set(re.findall(r"\bsend_job\.(?!py\b)(\w+)", ENGLISH)) | set(re.findall(r"`(\w+Error|JobFailed)`", table))
    assert {name for name in names - {"TimeoutError"} if not hasattr(send_job, name)} == set()


def test_the_receiver_in_the_pages_accepts_what_a_worker_signs_and_nothing_else() -> None:
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


# --- The house -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAGES)
def test_every_file_and_folder_of_the_project_that_is_named_is_there(name: str) -> None:
    ours = re.compile(
        r"(?:boot|provision|ground|worker|sender|operate|tests|systemd|docs)/[\w./]*|[a-z_]+\.(?:sh|py)"
    )
    named = {span for span in spans(PAGES[name].read_text()) if ours.fullmatch(span)}
    assert {path for path in named if not (ROOT / path).exists() and "/" in path} == set()
    rooms = {
        path.name
        for folder in (
            "boot",
            "provision",
            "ground",
            "worker",
            "sender",
            "operate",
            "operate/gateway",
            "tests/machine",
        )
        for path in (ROOT / folder).glob("*")
    }
    assert {path for path in named if "/" not in path and path not in rooms and not (ROOT / path).exists()} == set()


@pytest.mark.parametrize("folder", ["boot", "provision", "ground", "worker", "sender", "operate", "operate/gateway"])
def test_every_room_is_in_the_page_on_development(folder: str) -> None:
    rooms = {path.name for path in (ROOT / folder).glob("[!._]*.*")}
    table = page("development.md").partition(f"| `{folder}/` |")[2].partition("\n\n")[0]
    named = [name for row in table.splitlines()[2:] for name in spans(row.split("|")[1])]
    assert rooms
    assert sorted(named) == sorted(rooms)


def calls_of_scripts() -> set[str]:
    """`service operation`, as the scripts call the AWS CLI."""
    found = set()
    for path in [*ROOT.glob("*.sh"), *ROOT.glob("provision/*.sh"), *ROOT.glob("boot/*.sh")]:
        code = re.sub(r"^ *#.*", "", path.read_text(), flags=re.MULTILINE)
        pattern = r"\baws (?:\"\S+\" )?(ec2|autoscaling|sqs|s3api|iam|cloudwatch|sns|sts|service-quotas|resourcegroupstaggingapi) ([a-z0-9-]+)"
        found |= {" ".join(call) for call in re.findall(pattern, code)}
        found |= {f"autoscaling {operation}" for operation in re.findall(r"\btell_aws ([a-z-]+)", code)}
    told = {"ec2 create-vpc-endpoint", "ec2 modify-subnet-attribute", "service-quotas request-service-quota-increase"}
    assert told < found
    return found - told  # what somebody else is advised to call


def calls_of_python() -> set[str]:
    """The operations that are called by boto3."""
    found: set[str] = set()
    for path in [
        *ROOT.glob("*.py"),
        *(path for room in ("ground", "worker", "sender", "operate") for path in (ROOT / room).rglob("*.py")),
    ]:
        found |= set(re.findall(r"""(?:[a-z]\.|")([a-z]+_[a-z_0-9]+)(?:\(|"\))""", path.read_text()))
    names = {
        xform_name(operation): operation
        for service in ("sqs", "s3", "autoscaling", "cloudwatch", "ec2", "sts")
        for operation in Session().get_service_model(service).operation_names
    }
    return {names[name] for name in found & names.keys()}


def test_the_page_on_calls_has_every_call() -> None:
    named = [word for span in spans(page("aws-calls.md")) for word in span.split()]
    starts = tuple(word.removesuffix("…") for word in named if re.fullmatch(r"[a-z]+-…", word))
    services = {span.split()[0] for span in spans(page("aws-calls.md")) if " " in span}
    calls = [call.split() for call in sorted(calls_of_scripts())]
    assert len(calls) > 60
    unnamed = [
        operation for service, operation in calls if operation not in named and not operation.startswith(starts)
    ]
    assert unnamed == []
    assert {service for service, _ in calls} - services == set()
    operations = calls_of_python()
    assert len(operations) > 15
    assert sorted(operations - set(named)) == []


# --- The pages themselves --------------------------------------------------------------------------------


def test_the_readme_is_read_in_one_sitting() -> None:
    assert 1200 <= len(README.read_text().split()) <= 1800
    example = re.search(r"^```console\n(.*?)^```", README.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert example
    assert len(example[1].splitlines()) <= 30


def headings(text: str) -> list[tuple[str, str]]:
    """The level and the words of each heading."""
    return re.findall(r"^(#+) (.*)", FENCED.sub("", text), flags=re.MULTILINE)


def anchors(text: str) -> set[str]:
    """What a link to one of its headings ends with."""
    return {re.sub(r"[^\w -]", "", words.lower()).replace(" ", "-") for _, words in headings(text)}


def links(path: Path) -> list[str]:
    """The links of a page that lead to something of ours."""
    found = re.findall(r"\]\(([^)\s]+)\)", FENCED.sub("", path.read_text()))
    return [link for link in found if not link.startswith("http")]


def target(path: Path, link: str) -> Path:
    """The file that a page's link leads to."""
    return (path.parent / link.partition("#")[0]).resolve() if not link.startswith("#") else path


@pytest.mark.parametrize("name", PAGES)
def test_every_link_leads_somewhere(name: str) -> None:
    path = PAGES[name]
    dead = [link for link in links(path) if not target(path, link).is_file()]
    assert dead == []
    aimed = [link for link in links(path) if "#" in link]
    assert [link for link in aimed if link.partition("#")[2] not in anchors(target(path, link).read_text())] == []


def test_there_are_links() -> None:
    assert [len(links(readme)) > 20 for readme in (README, CHINESE)] == [True, True]
    assert len([link for page in TWINS for link in links(page)]) > 50


@pytest.mark.parametrize("readme", [README, CHINESE], ids=["README.md", "README.zh.md"])
def test_every_page_is_linked_from_its_readme(readme: Path) -> None:
    pages = set(TWINS) - {README} if readme == README else set(TWINS.values()) - {CHINESE}
    assert len(pages) > 5
    table = readme.read_text().split("\n## ")[-2]
    named = {(ROOT / link).resolve() for link in re.findall(r"^\| \[[^]]+\]\(([^)]+)\)", table, flags=re.MULTILINE)}
    assert named == pages


@pytest.mark.parametrize("english", [path for path in TWINS if path != README], ids=lambda path: path.name)
def test_every_page_leads_home_and_to_its_twin(english: Path) -> None:
    home, chinese = links(english)[:2]
    assert (target(english, home), target(english, chinese)) == (README, TWINS[english])
    home, back = links(TWINS[english])[:2]
    assert (target(TWINS[english], home), target(TWINS[english], back)) == (CHINESE, english)


# --- The Chinese pages -----------------------------------------------------------------------------------


def test_every_page_is_there_in_both_languages() -> None:
    assert sorted(ROOT.glob("docs/zh/*.md")) == sorted(set(TWINS.values()) - {CHINESE})


def frame(path: Path) -> dict[str, list[Any]]:
    """What is the same in both languages."""
    text = path.read_text()
    twin = {chinese: english for english, chinese in TWINS.items()}
    led = [target(path, link) for link in links(path) if not link.startswith("README")]
    return {
        "blocks": FENCED.findall(text),
        "settings": re.findall(r"^\| (`[A-Z][A-Z0-9_]+` \| [^|]*)\|", text, flags=re.MULTILINE),
        "chapters": [level for level, _ in headings(text)],
        "cells": [line.count("|") for line in text.splitlines() if line.startswith("|")],
        "commands, names, values": sorted(set(spans(text))),
        "links": sorted(twin.get(led_to, led_to) for led_to in led),
    }


@pytest.mark.parametrize("english", TWINS, ids=lambda path: path.name)
def test_the_chinese_page_has_the_same_frame(english: Path) -> None:
    ours, theirs = frame(english), frame(TWINS[english])
    assert ours["chapters"]
    for part in ours:
        assert theirs[part] == ours[part], part
