"""send_job.py --wait and --status: what is told, what is saved, what is shown on a terminal."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import types
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from local_cloud import Fault, LocalCloud
from sender_tools import receipt, store, store_progress
from workplace import Site, image_workflow

import send_job
from comfy_utils import (
    QueueDepth,
    new_job_id,
)
from sender.outlook import Outlook


@pytest.fixture
def sending(make_site: Callable[..., Site]) -> Iterator[Callable[..., tuple[Site, subprocess.Popen[str]]]]:
    """Starts send_job.py in a new site, to be watched as it runs."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str, site: Site | None = None) -> tuple[Site, subprocess.Popen[str]]:
        site = site or make_site()
        # A shell that starts tests in the background has them ignore Ctrl-C, and their children with them.
        command = ["env", "--default-signal=INT", "python", "send_job.py", *arguments]
        process = subprocess.Popen(
            command,
            cwd=site.folder,
            env=site.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return site, process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def read_until(process: subprocess.Popen[str], beginning: str) -> list[str]:
    """The lines it prints, up to and with the first that begins like this."""
    lines: list[str] = []
    assert process.stdout
    for line in process.stdout:
        lines.append(line.rstrip("\n"))
        if lines[-1].startswith(beginning):
            return lines
    raise AssertionError(f"it ended without {beginning!r}: {lines} {process.stderr and process.stderr.read()}")


def ids_of(lines: list[str]) -> list[str]:
    words = "Message sent successfully: "
    return [line.removeprefix(words) for line in lines if line.startswith(words)]


def test_waiting_tells_of_every_job(busy_site: Site) -> None:
    (busy_site.folder / "good.json").write_text(json.dumps(image_workflow()))
    ran = busy_site.run("python", "send_job.py", "good.json", "--count", "2", "--wait")
    assert (ran.returncode, ran.stderr) == (0, "")
    lines = ran.stdout.splitlines()
    for job_id in ids_of(lines):
        timings = busy_site.await_result(job_id)["timings"]
        said = f"Job {job_id} succeeded in {timings['run_s']:.1f} s, waited {timings['wait_s']:.1f} s: 1 file"
        assert lines.count(said) == 1
    assert lines[-1] == "2 of 2 jobs done"


def test_a_job_that_fails_is_told_and_makes_the_exit_code(busy_site: Site) -> None:
    ran = busy_site.run("python", "send_job.py", "--exec-cmd", "exit 3", "--wait", "--timeout", "80")
    (job_id,) = ids_of(ran.stdout.splitlines())
    message = busy_site.await_result(job_id)["error"]["message"]
    assert ran.stdout.splitlines()[-2:] == [f"Job {job_id} failed: {message}", "1 of 1 job done, 1 failed"]
    assert (ran.returncode, ran.stderr) == (1, "")


def test_only_changes_are_printed(sending: Callable[..., tuple[Site, subprocess.Popen[str]]]) -> None:
    site, process = sending("--exec-cmd", "true", "--count", "3", "--wait")
    first, second, third = ids_of(read_until(process, "0 of 3 jobs done"))
    store(site, second, outputs=[{}, {}])
    more = read_until(process, "1 of 3 jobs done")
    assert more[-2] == f"Job {second} succeeded in 12.3 s, waited 160.2 s: 2 files"
    assert [line for line in more[:-2] if not line.startswith("On the queue: ")] == []
    store(site, first, status="failed", error={"message": "node 1 X: no"})
    store(site, third)
    out, err = process.communicate(timeout=60)
    assert f"Job {first} failed: node 1 X: no" in out
    assert f"Job {third} succeeded in 12.3 s, waited 160.2 s: 0 files" in out
    assert out.endswith("3 of 3 jobs done, 1 failed\n")
    assert (process.returncode, err) == (1, "")


def test_the_time_limit_ends_the_waiting_only(make_site: Callable[..., Site]) -> None:
    site = make_site()
    ran = site.run("python", "send_job.py", "--exec-cmd", "true", "--wait", "--timeout", "0.2")
    (job_id,) = ids_of(ran.stdout.splitlines())
    assert ran.returncode == 3
    assert ran.stderr == (
        "send_job.py: not done after 0.2 s: 1 of 1 job had no result yet and goes on; "
        f"come back with: ./send_job.py --env {site.env} --wait --status {job_id}\n"
    )
    assert site.depth() == (1, 0)


def test_ctrl_c_ends_the_waiting_only(sending: Callable[..., tuple[Site, subprocess.Popen[str]]]) -> None:
    site, process = sending("--exec-cmd", "true", "--count", "2", "--wait")
    read_until(process, "0 of 2 jobs done")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == (
        "send_job.py: interrupted: 2 of 2 jobs had no result yet and go on; "
        f"come back with: ./send_job.py --env {site.env} --wait --status JOB_ID …\n"
    )
    assert site.depth() == (2, 0)


def test_a_refused_bucket_ends_the_waiting_with_the_remedy(
    cloud: LocalCloud, make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    site = make_site()
    denied = Fault(403, "AccessDenied")
    monkeypatch.setattr(cloud, "fault", lambda service, call: denied if (service, call) == ("s3", "GET") else None)
    ran = site.run("python", "send_job.py", "--exec-cmd", "true", "--wait")
    assert ran.returncode == 1
    assert ran.stderr.startswith("send_job.py: results cannot be read: ")
    assert f"(s3:GetObject and s3:ListBucket on {site.bucket} are needed)" in ran.stderr
    assert ran.stderr.count("\n") == 1


def test_jobs_that_were_sent_are_waited_for_when_others_could_not_be(
    sender_site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    send_many = send_job.Sender.send_many

    def send_one(self: send_job.Sender, bodies: Sequence[dict[str, Any]], *_: Any, **__: Any) -> list[str]:
        sent = send_many(self, bodies[:1])
        store(sender_site, sent[0])
        raise send_job.NotAllSentError(sent, ["another"], "the line is cut")

    monkeypatch.setattr(send_job.Sender, "send_many", send_one)
    assert send_job.main(["--exec-cmd", "true", "--count", "2", "--wait"]) == 1
    said = capsys.readouterr()
    assert said.err.endswith("the line is cut\n")
    assert "1 of 2 jobs sent" in said.err
    assert said.out.endswith("1 of 1 job done\n")


def test_results_can_be_saved_and_read_by_programs(busy_site: Site) -> None:
    (busy_site.folder / "good.json").write_text(json.dumps(image_workflow()))
    ran = busy_site.run("python", "send_job.py", "good.json", "--count", "2", "--wait", "--save", "saved", "--json")
    assert (ran.returncode, ran.stderr) == (0, "")
    events = [json.loads(line) for line in ran.stdout.splitlines()]
    sent = [event["job_id"] for event in events if event["event"] == "sent"]
    results = {event["result"]["job_id"]: event["result"] for event in events if event["event"] == "result"}
    assert results == {job_id: busy_site.result(job_id) for job_id in sent}
    saved = {event["job_id"]: event["path"] for event in events if event["event"] == "saved"}
    assert set(saved) == set(sent)
    for job_id, path in saved.items():
        assert path.startswith(f"saved/{job_id}/")
        key = results[job_id]["outputs"][0]["s3_key"]
        stored = busy_site.s3.get_object(Bucket=busy_site.bucket, Key=key)["Body"].read()
        assert (busy_site.folder / path).read_bytes() == stored


def test_files_that_cannot_be_saved_make_the_exit_code(
    sending: Callable[..., tuple[Site, subprocess.Popen[str]]],
) -> None:
    site, process = sending("--exec-cmd", "true", "--count", "2", "--wait", "--save", "saved")
    first, second = ids_of(read_until(process, "0 of 2 jobs done"))
    store(site, first, outputs=[{"s3_key": f"output/{first}/gone.png"}])
    store(site, second, outputs=[{"s3_key": f"output/{second}/../../evil"}])
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"the files of job {first} are not saved: An error occurred (404)" in err
    assert f"the files of job {second} are not saved: 'output/{second}/../../evil' is no file of a job" in err
    assert [path for path in (site.folder / "saved").rglob("*") if path.is_file()] == []
    assert not (site.folder / "evil").exists()


def test_the_status_of_jobs(sender_site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site = sender_site
    good, bad, running, unknown = (new_job_id() for _ in range(4))
    store(site, good)
    store(site, bad, status="failed", error={"message": "node 1 X: no"})
    store_progress(site, running, value=12)
    lines = {
        good: f"Job {good} succeeded in 12.3 s, waited 160.2 s: 0 files",
        bad: f"Job {bad} failed: node 1 X: no",
        running: f"Job {running} is running: Sampler 12/20 (60 %), 3 of 7 nodes done, at 2026-01-02T03:04:05.678Z",
        unknown: f"Job {unknown} has neither result nor progress: it waits, has just begun, or never was",
    }
    for job_ids, code in (([good], 0), ([bad], 1), ([good, running], 3), ([unknown], 3), ([running, bad], 1)):
        assert send_job.main(["--status", *job_ids]) == code
        said = capsys.readouterr()
        assert (said.out.splitlines(), said.err) == ([lines[name] for name in job_ids], "")
    assert send_job.main(["--status", good, "--wait", "--json"]) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert events == [
        {"event": "result", "result": receipt(good)},
        {"event": "info", "text": "1 of 1 job done"},
    ]
    assert site.depth() == (0, 0), "nothing is sent"


def test_on_a_terminal_one_line_changes(make_site: Callable[..., Site]) -> None:
    site = make_site()
    controller, terminal = pty.openpty()
    command = ["env", "--default-signal=INT", "COLUMNS=200", "python", "send_job.py", "--exec-cmd", "true", "--wait"]
    process = subprocess.Popen(command, cwd=site.folder, env=site.environment(), stdout=terminal, stderr=terminal)
    os.close(terminal)
    shown = ""

    def read_on(words: str) -> str:
        """Read until it shows this; returns all it has shown."""
        nonlocal shown
        while words not in shown:
            shown += os.read(controller, 4096).decode()
        return shown

    try:
        job_id = re.search(r"successfully: (\S+)", read_on("waiting, about 0 ahead"))
        assert job_id
        store_progress(site, job_id[1], value=10)
        read_on("\r\x1b[Krunning: Sampler 10/20 (50 %), 3 of 7 nodes done\r")
        store_progress(site, job_id[1], value=15)
        read_on("\r\x1b[Krunning: Sampler 15/20 (75 %), 3 of 7 nodes done, about ")
        process.send_signal(signal.SIGINT)
        read_on("come back with: ./send_job.py")
        assert process.wait(60) == 130
    finally:
        process.kill()
        process.wait()
        os.close(controller)


def make_outlook() -> Outlook:
    settings: Any = types.SimpleNamespace(region="us-west-2", asg_name="asg")
    return Outlook(settings, lambda _: QueueDepth(0, 0), print, send_job.tell_progress)


def test_many_jobs_are_one_bar(capsys: pytest.CaptureFixture[str]) -> None:
    sender: Any = types.SimpleNamespace(settings=types.SimpleNamespace(s3_bucket="bucket"), depth=None)
    waiting = send_job.Waiting(sender, None, ["a", "b", "c", "d"], send_job.Teller())
    waiting.outlook = outlook = make_outlook()
    assert waiting.line() == "[░░░░░░░░░░░░░░░░░░░░] 0 of 4 jobs done"
    outlook.fleet.depth = QueueDepth(1, 2)
    outlook.fleet.said = {"queue": "On the queue: 1 waiting, 2 running", "group": None}
    done: Any = receipt("a")  # 12.34 s
    waiting.take(done)
    waiting.take(done | {"job_id": "b", "status": "failed", "error": {"message": "no"}})
    bar = "[██████████░░░░░░░░░░] 2 of 4 jobs done, 1 failed, about 12 s left. On the queue: 1 waiting, 2 running"
    assert waiting.line() == bar
    outlook.fleet.said["group"] = "1 instance is booting"
    assert waiting.line() == f"{bar}. 1 instance is booting"
    waiting.outlook = None  # carried away without the room
    assert waiting.line() == "2 of 4 jobs done, 1 failed"
    assert capsys.readouterr().out.endswith("Job b failed: no\n")


def test_how_long_a_job_goes_on_is_told_by_past_runs_of_its_kind() -> None:
    progress: Any = {"job_id": "a", "node_title": "KSampler", "nodes": 7, "usual_run_s": 300.0}
    for ran_s, told in ((100, r", about (199|200) s left"), (400, "")):  # longer than ever: nobody knows
        started_at = (datetime.now(UTC) - timedelta(seconds=ran_s)).isoformat()
        assert re.fullmatch(f"running: KSampler{told}", make_outlook().of_one(progress | {"started_at": started_at}))


@pytest.mark.parametrize(
    ("text", "columns", "fits"), [("abc", 3, "abc"), ("abcd", 3, "abc"), ("K采样器", 4, "K采"), ("", 0, "")]
)
def test_the_line_that_changes_fits_the_terminal(text: str, columns: int, fits: str) -> None:
    assert send_job.cut(text, columns) == fits
