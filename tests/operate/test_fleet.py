"""fleet.py, the door: its help, what it refuses, what it says to programs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from local_cloud import Fault, LocalCloud
from places import ROOT
from report_tools import receipt
from workplace import Site, image_workflow

from comfy_utils import new_job_id
from fleet import main

COMMANDS = ("status", "dead", "redrive", "purge", "report")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_its_own_help_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    said = capsys.readouterr()
    assert said.out.startswith(f"usage: fleet.py {command} [-h]")
    assert f"  ./fleet.py {command} --env pro" in said.out
    assert all(flag in said.out for flag in ("--env NAME", "--json", "The object has"))
    assert said.err == ""


def test_the_help_names_every_command() -> None:
    ran = subprocess.run([sys.executable, "fleet.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    lines = [line.split() for line in ran.stdout.splitlines()]
    assert [words[0] for words in lines if words and words[0] in COMMANDS] == list(COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["report", "x/../y"], "that is no job id"),
        (["report", new_job_id(), "--price", "-1"], "argument --price: -1: give USD per hour"),
        (["status", "--price", "nan"], "argument --price: nan: give USD per hour"),
        (["status", "--price", "cheap"], "argument --price: cheap: give USD per hour"),
        (["report"], "arguments are required: JOB_ID"),
        (["status", "dead"], "unrecognized arguments: dead"),
        (["--watch"], "arguments are required: COMMAND"),
        (["dead", "--watch"], "unrecognized arguments: --watch"),
        (["dead", "--yes"], "unrecognized arguments: --yes"),
        (["x.json", "redrive"], "invalid choice: 'x.json'"),
        (["dead", "--exec-cmd", "true"], "unrecognized arguments: --exec-cmd true"),
        (["purge", "--json"], "--json leaves no room for a question: add --yes"),
        ([], "arguments are required: COMMAND"),
    ],
)
def test_misuse_is_refused(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert words in capsys.readouterr().err


def test_settings_that_cannot_be_used_are_one_sentence(make_site: Callable[..., Site]) -> None:
    ran = make_site().run("./fleet.py", "status", "--env", "Pro")
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.startswith("fleet.py: ENV='Pro' cannot be used")
    assert ran.stderr.count("\n") == 1


def test_a_missing_queue_is_one_sentence(make_site: Callable[..., Site]) -> None:
    ran = make_site().run("./fleet.py", "dead", "--env", "other")
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr.startswith("fleet.py: ")
    assert ran.stderr.count("\n") == 1


def test_what_is_not_allowed_is_named(
    cloud: LocalCloud, make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch, ours: Callable[[Site], None],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    ours(make_site())
    monkeypatch.setattr(cloud, "fault", lambda *_: Fault(403, "AccessDenied"))
    for command in ("dead", "redrive", "purge"):
        assert main([command]) == 1
        assert capsys.readouterr().err == "fleet.py: not allowed: sqs:GetQueueUrl\n"


def test_programs_read_what_became_of_dead_jobs(
    make_site: Callable[..., Site], ours: Callable[[Site], None], capsys: pytest.CaptureFixture[str]
) -> None:
    site = make_site()
    ours(site)
    job_id, queue = new_job_id(), f"{site.prefix}-{site.env}-queue"

    def said(*arguments: str) -> dict[str, object]:
        """The one object that a command prints."""
        assert main([*arguments, "--json"]) == 0
        found: dict[str, object] = json.loads(capsys.readouterr().out)
        return found

    assert said("dead") == {"queue": f"{queue}-dlq", "jobs": [], "hidden": 0, "not_seen": []}
    result = receipt(0, 1, 2) | {"job_id": job_id}
    site.s3.put_object(Bucket=site.bucket, Key=f"output/{job_id}/result.json", Body=json.dumps(result))
    body = json.dumps({"prompt": image_workflow(), "job_id": job_id})
    site.sqs.send_message(QueueUrl=site.dlq_url, MessageBody=body)
    other = site.sqs.send_message(QueueUrl=site.dlq_url, MessageBody="x")["MessageId"]
    found = said("dead")
    jobs = {job.pop("job_id"): job for job in found.pop("jobs")}  # type: ignore[attr-defined]
    assert jobs.keys() == {job_id, other}
    told = {name: jobs[job_id][name] for name in ("kind", "problem", "receives", "result", "attempts")}
    assert told == {"kind": "workflow", "problem": None, "receives": 1, "result": result, "attempts": []}
    assert jobs[other]["kind"] is None
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", jobs[other]["sent_at"])
    assert jobs[other]["problem"].startswith("the message is not JSON")
    assert (jobs[other]["result"], jobs[other]["attempts"]) == (None, [])

    assert main(["redrive", "--json"]) == 1, "the other is no job"
    answer = json.loads(capsys.readouterr().out)
    assert answer.pop("unsent").keys() == {other}
    sent = [{"dead": job_id, "job_id": job_id}]
    assert answer == {"queue": queue, "sent": sent, "undeleted": {}, "hidden": 0, "instances_wanted": None}
    assert site.depth() == (1, 0)
    assert said("purge", "--yes") == {"queue": f"{queue}-dlq", "deleted": 1}


def test_programs_read_where_the_report_is(
    make_site: Callable[..., Site], ours: Callable[[Site], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site = make_site()
    ours(site)
    result = receipt(0, 1, 2)
    there, missing = result["job_id"], new_job_id()
    site.s3.put_object(Bucket=site.bucket, Key=f"output/{there}/result.json", Body=json.dumps(result))
    page = tmp_path / "page.html"
    assert main(["report", missing, "--json"]) == 1
    assert json.loads(capsys.readouterr().out) == {"page": None, "jobs": [], "left_out": [missing]}
    assert main(["report", there, there, missing, "--output", str(page), "--json"]) == 1
    assert json.loads(capsys.readouterr().out) == {"page": str(page), "jobs": [there], "left_out": [missing]}
    assert page.exists()
    assert main(["report", there, "--output", str(page)]) == 0
    assert capsys.readouterr().out == f"Report of 1 job: {page}\n"
