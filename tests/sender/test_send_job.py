"""send_job.py: its command line as a user runs it, and its functions."""

from __future__ import annotations

import copy
import gzip
import io
import itertools
import json
import math
import os
import pty
import re
import signal
import subprocess
import sys
import time
import types
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import comfyui_standin
import pytest
from botocore.exceptions import ClientError, EndpointConnectionError, NoCredentialsError, ResponseStreamingError
from local_cloud import Fault, LocalCloud
from places import CLOUD, ROOT
from workplace import Site, image_workflow

import send_job
from comfy_utils import (
    LAUNCH_FAILURE_AGE_S,
    MAX_MESSAGE_BYTES,
    OBJECT_INFO_KEY,
    InvalidMessageError,
    InvalidWorkflowError,
    QueueDepth,
    capacity_problem,
    explain_launch_failure,
    is_job_id,
    load_settings,
    new_job_id,
)


def bodies(site: Site) -> list[dict[str, Any]]:
    """The messages on the queue."""
    found: list[dict[str, Any]] = []
    while messages := site.sqs.receive_message(QueueUrl=site.queue_url, MaxNumberOfMessages=10).get("Messages"):
        found += [json.loads(message["Body"]) for message in messages]
    return found


def make_group(cloud: LocalCloud, site: Site, **sizes: int) -> Callable[[], int]:
    """A group for the site; returns a look at its desired capacity."""
    name = f"{site.prefix}-{site.env}-asg"
    image = cloud.client("ec2").describe_images()["Images"][0]["ImageId"]
    cloud.client("ec2").create_launch_template(
        LaunchTemplateName=name, LaunchTemplateData={"ImageId": image, "InstanceType": "g5.2xlarge"}
    )
    autoscaling = cloud.client("autoscaling")
    autoscaling.create_auto_scaling_group(
        AutoScalingGroupName=name,
        LaunchTemplate={"LaunchTemplateName": name},
        AvailabilityZones=["us-west-2a"],
        **({"MinSize": 0, "MaxSize": 5, "DesiredCapacity": 0} | sizes),
    )

    def desired() -> int:
        answer = autoscaling.describe_auto_scaling_groups(AutoScalingGroupNames=[name])
        return int(answer["AutoScalingGroups"][0]["DesiredCapacity"])

    return desired


# --- The command line ------------------------------------------------------------------------------------


def test_it_sends_the_demo_workflow_and_starts_the_first_instance(
    cloud: LocalCloud, make_site: Callable[..., Site]
) -> None:
    site = make_site()
    desired = make_group(cloud, site)
    ran = site.run("python", "send_job.py")
    assert (ran.returncode, ran.stderr) == (0, "")
    first, *rest = ran.stdout.splitlines()
    words, _, job_id = first.rpartition(" ")
    assert words == "Message sent successfully:"
    assert rest == [
        "Job submitted successfully",
        "Current queue size: 1",
        "Current instance count: 0",
        "Starting first instance...",
        "Adjusted ASG capacity to 1",
    ]
    assert desired() == 1
    (body,) = bodies(site)
    demo = json.loads((ROOT / "simple_workflow.json").read_text())
    assert body["job_id"] == job_id
    assert body["prompt"]["3"]["inputs"].pop("seed") != demo["3"]["inputs"].pop("seed")
    assert body["prompt"] == demo


def test_many_jobs_are_one_step_of_capacity(cloud: LocalCloud, make_site: Callable[..., Site]) -> None:
    site = make_site()
    desired = make_group(cloud, site, DesiredCapacity=1)
    ran = site.run("python", "send_job.py", "--count", "8", "--set", "3.steps=5", "--set", "6.text=a=b red fox")
    assert ran.stdout.splitlines()[-3:] == [
        "Current queue size: 8",
        "Current instance count: 1",
        "Adjusted ASG capacity to 3",
    ]
    assert desired() == 3
    sent = bodies(site)
    assert len({body["job_id"] for body in sent}) == 8
    assert len({body["prompt"]["3"]["inputs"]["seed"] for body in sent}) == 8, "each has a seed of its own"
    assert {body["prompt"]["3"]["inputs"]["steps"] for body in sent} == {5}
    assert {body["prompt"]["6"]["inputs"]["text"] for body in sent} == {"a=b red fox"}


def test_capacity_stays_within_the_group_and_is_never_lowered(
    cloud: LocalCloud, make_site: Callable[..., Site]
) -> None:
    site = make_site()
    desired = make_group(cloud, site, MaxSize=2)
    site.run("python", "send_job.py", "--count", "30", "--exec-cmd", "true")
    assert desired() == 2
    bodies(site)
    ran = site.run("python", "send_job.py")
    assert "Adjusted" not in ran.stdout
    assert desired() == 2


def test_a_workflow_of_ones_own_keeps_its_seed(make_site: Callable[..., Site], tmp_path: Path) -> None:
    site = make_site()
    workflow = json.loads((ROOT / "simple_workflow.json").read_text())
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(workflow))
    assert site.run("python", "send_job.py", str(file), "--callback-url", "https://x/y").returncode == 0
    (body,) = bodies(site)
    assert body["prompt"] == workflow
    assert body["callback_url"] == "https://x/y"


def test_a_chosen_seed_stays(make_site: Callable[..., Site]) -> None:
    site = make_site()
    site.run("python", "send_job.py", "--count", "2", "--set", "3.seed=7")
    assert [body["prompt"]["3"]["inputs"]["seed"] for body in bodies(site)] == [7, 7]


def test_a_command_is_sent_with_its_extras(make_site: Callable[..., Site]) -> None:
    site = make_site()
    ran = site.run("python", "send_job.py", "--exec-cmd", "nvidia-smi", "--env", site.env)
    (body,) = bodies(site)
    assert body.pop("job_id") in ran.stdout
    assert body == {"exec_cmd": "nvidia-smi"}
    assert f"There is no group {site.prefix}-{site.env}-asg: scaling is off" in ran.stdout


def test_another_environment_is_named_on_the_command_line(make_site: Callable[..., Site]) -> None:
    site = make_site()
    ran = site.run("python", "send_job.py", "--env", "other")
    assert ran.returncode == 1
    assert f"{site.prefix}-other-queue" in ran.stderr


def test_not_being_allowed_to_scale_is_no_failure_to_send(
    make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    site = make_site()
    for name, value in site.environment().items():
        monkeypatch.setenv(name, value)
    settings = load_settings(None, site.folder / "env")
    sender = send_job.Sender(settings)
    sender.send({"exec_cmd": "true"})
    said: list[str] = []

    def refuse(*_: object) -> None:
        raise PermissionError("AccessDenied: autoscaling:DescribeAutoScalingGroups")

    monkeypatch.setattr(send_job, "raise_capacity", refuse)
    assert sender.raise_capacity(1, said.append) is None
    assert said[-1] == "Capacity was not raised: AccessDenied: autoscaling:DescribeAutoScalingGroups"
    assert len(bodies(site)) == 1


def test_a_workflow_too_large_for_a_message_goes_by_the_bucket(
    make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    site = make_site()
    for name, value in site.environment().items():
        monkeypatch.setenv(name, value)
    workflow = image_workflow(more={"9": {"class_type": "PreviewAny", "inputs": {"source": "ü" * 600_000}}})
    job_id = send_job.Sender(load_settings(None, site.folder / "env")).send({"prompt": workflow})
    assert bodies(site) == [{"workflow_key": f"input/jobs/{job_id}.json", "job_id": job_id}]
    stored = site.s3.get_object(Bucket=site.bucket, Key=f"input/jobs/{job_id}.json")["Body"].read()
    assert json.loads(stored) == workflow


def test_it_works_when_copied_elsewhere(make_site: Callable[..., Site]) -> None:
    site = make_site()
    ran = site.run(
        "python",
        "-c",
        "import json, send_job; print(send_job.submit(json.load(open('simple_workflow.json'))), "
        f"send_job.submit_command('true', env='{site.env}'))",
    )
    ids = ran.stdout.split()
    assert all(map(is_job_id, ids)), ran.stderr
    assert {body["job_id"] for body in bodies(site)} == set(ids)


# --- Bad input: one sentence, nothing sent ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["missing.json"], 2, "cannot read the workflow missing.json: No such file or directory"),
        (["text.json"], 2, "text.json is not JSON"),
        (["list.json"], 2, "list.json: this is no workflow: export one with Save (API Format)"),
        (["ui.json"], 2, "ui.json: this workflow is saved in UI format: export it with Save (API Format)"),
        (["--set", "99.text=x"], 2, "--set 99.text: there is no node 99; the nodes are 3, 4, 5, 6, 7, 8, 9"),
        (["--set", "6.txt=x"], 2, "--set 6.txt: node 6 has no input txt; its inputs are text, clip"),
        (["--set", "3.steps=many"], 2, "--set 3.steps=many: the input is a number, such as 20"),
        (["--set", "nonsense"], 2, "--set nonsense: write NODE.INPUT=VALUE"),
        (["--set", "6.text=@gone"], 2, "--set 6.text=@gone: cannot read it: No such file or directory; write @@"),
        (["--env", "Pro"], 2, "ENV='Pro' cannot be used"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_sent(
    make_site: Callable[..., Site], arguments: list[str], code: int, said: str
) -> None:
    site = make_site()
    (site.folder / "text.json").write_text("hello")
    (site.folder / "list.json").write_text("[]")
    (site.folder / "ui.json").write_text('{"nodes": [], "links": []}')
    ran = site.run("python", "send_job.py", *arguments)
    assert ran.returncode == code
    assert ran.stdout == ""
    assert ran.stderr.startswith(f"send_job.py: {said}")
    assert ran.stderr.count("\n") == 1
    assert site.depth() == (0, 0)


@pytest.mark.parametrize(
    "arguments",
    [["--count", "0"], ["--count", "x"], ["--exec-cmd", ""], ["--exec-cmd", "ls", "x.json"], ["--bogus"],
     ["--wait", "--direct", "127.0.0.1:9"], ["--timeout", "5"], ["--wait", "--timeout", "0"],
     ["--wait", "--timeout", "nan"], ["--wait", "--timeout", "inf"], ["--save", "x"], ["--direct", "x:1", "--json"],
     ["--input", str(ROOT / "env.example"), "--check"], ["--check", "--wait"], ["--input", "gone.png"],
     ["--direct", "x:1", "--set", "1.image=@x"], ["--status", "x"], ["--exec-cmd", "ls", "--status", "0f8fad5b-d9cb-469f-a165-70867728950e"]],
)  # fmt: skip
def test_misuse_shows_the_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        send_job.main(arguments)
    assert ended.value.code == 2
    assert "usage: send_job.py" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("old", "text", "new"),
    [("a", "7", "7"), ("a", "@@b", "@b"), (1, "7", 7), (1.5, "2", 2), (True, "false", False), (["4", 0], '["5", 1]', ["5", 1]), (["4", 0], "x", "x")],
)  # fmt: skip
def test_a_set_value_takes_the_type_of_the_old(old: object, text: str, new: object) -> None:
    workflow = {"1": {"class_type": "X", "inputs": {"a.b": old}}}
    assert send_job.set_input(workflow, f"1.a.b={text}", {}) == ("1", "a.b")
    assert workflow["1"]["inputs"] == {"a.b": new}


@pytest.mark.parametrize(("old", "text"), [(1, "true"), (1, '"7"'), (True, "1"), (1.5, "null")])
def test_a_set_value_of_another_type_is_refused(old: object, text: str) -> None:
    with pytest.raises(InvalidWorkflowError):
        send_job.set_input({"1": {"class_type": "X", "inputs": {"a": old}}}, f"1.a={text}", {})


# --- On a ComfyUI at hand --------------------------------------------------------------------------------


def test_direct_runs_without_any_aws_and_saves_the_files(busy_site: Site) -> None:
    (busy_site.folder / "mine.json").write_text(json.dumps(image_workflow()))
    address = f"127.0.0.1:{busy_site.port}"
    ran = busy_site.run("env", "-u", "AWS_ENDPOINT_URL", "python", "send_job.py", "mine.json", "--direct", address,
                        "--save", "saved", "--count", "2")  # fmt: skip
    assert (ran.returncode, ran.stderr) == (0, "")
    saved = [line.removeprefix("Saved ") for line in ran.stdout.splitlines()]
    assert len(saved) == 2
    for name in saved:
        assert (busy_site.folder / name).read_bytes().startswith(b"\x89PNG")


def test_direct_tells_a_failure(busy_site: Site) -> None:
    more = {"4": {"class_type": "LoadImage", "inputs": {"image": "broken.png"}},
            "5": {"class_type": "SaveImage", "inputs": {"images": ["4", 0], "filename_prefix": "y"}}}  # fmt: skip
    (busy_site.folder / "bad.json").write_text(json.dumps(image_workflow(more=more)))
    ran = busy_site.run("python", "send_job.py", "bad.json", "--direct", f"127.0.0.1:{busy_site.port}")
    assert ran.returncode == 1
    assert "node 4 LoadImage" in ran.stderr


def test_direct_needs_a_comfyui_that_answers(busy_site: Site) -> None:
    started = time.monotonic()
    ran = busy_site.run("python", "send_job.py", "--direct", "127.0.0.1:9")
    assert ran.returncode == 1
    assert ran.stderr.startswith("send_job.py: ComfyUI on 127.0.0.1:9 does not answer")
    assert time.monotonic() - started < 60


# --- Waiting: the command line ---------------------------------------------------------------------------


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


def store(site: Site, job_id: str, **more: Any) -> None:
    """Put a receipt into the bucket, as a worker does."""
    site.s3.put_object(
        Bucket=site.bucket, Key=f"output/{job_id}/result.json", Body=json.dumps(receipt(job_id, **more)).encode()
    )


def store_progress(site: Site, job_id: str, **more: Any) -> None:
    """Say how far a job is, as a worker does."""
    progress = {"job_id": job_id, "status": "running", "instance_id": "i-1", "node_id": "3", "node_title": "Sampler",
                "nodes": 7, "nodes_done": 3, "max": 20, "updated_at": "2026-01-02T03:04:05.678Z"} | more  # fmt: skip
    site.s3.put_object(Bucket=site.bucket, Key=f"output/{job_id}/progress.json", Body=json.dumps(progress).encode())


def receipt(job_id: str, **more: Any) -> dict[str, Any]:
    timings = {"wait_s": 160.21, "run_s": 12.34}
    return {"job_id": job_id, "status": "succeeded", "outputs": [], "error": None, "timings": timings} | more


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
    make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    site = make_site()
    for name, value in (site.environment() | {"ENV": site.env}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(send_job, "load_settings", lambda _: load_settings(None, site.folder / "env"))
    send_many = send_job.Sender.send_many

    def send_one(self: send_job.Sender, bodies: Sequence[dict[str, Any]], *_: Any, **__: Any) -> list[str]:
        sent = send_many(self, bodies[:1])
        store(site, sent[0])
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


def test_many_jobs_are_one_bar(capsys: pytest.CaptureFixture[str]) -> None:
    sender: Any = types.SimpleNamespace(settings=types.SimpleNamespace(s3_bucket="bucket"))
    waiting = send_job.Waiting(sender, None, ["a", "b", "c", "d"], send_job.Teller())
    assert waiting.line_of_many() == "[░░░░░░░░░░░░░░░░░░░░] 0 of 4 jobs done"
    waiting.fleet.depth = QueueDepth(1, 2)
    waiting.fleet.said = {"queue": "On the queue: 1 waiting, 2 running", "group": None}
    done: Any = receipt("a")  # 12.34 s
    waiting.take(done)
    waiting.take(done | {"job_id": "b", "status": "failed", "error": {"message": "no"}})
    bar = "[██████████░░░░░░░░░░] 2 of 4 jobs done, 1 failed, about 12 s left. On the queue: 1 waiting, 2 running"
    assert waiting.line_of_many() == bar
    waiting.fleet.said["group"] = "1 instance is booting"
    assert waiting.line_of_many() == f"{bar}. 1 instance is booting"
    assert capsys.readouterr().out.endswith("Job b failed: no\n")


def test_how_long_a_job_goes_on_is_told_by_past_runs_of_its_kind() -> None:
    sender: Any = types.SimpleNamespace(settings=types.SimpleNamespace(s3_bucket="bucket"))
    waiting = send_job.Waiting(sender, None, ["a"], send_job.Teller())
    progress: Any = {"job_id": "a", "node_title": "KSampler", "nodes": 7, "usual_run_s": 300.0}
    for ran_s, told in ((100, r", about (199|200) s left"), (400, "")):  # longer than ever: nobody knows
        started_at = (datetime.now(UTC) - timedelta(seconds=ran_s)).isoformat()
        waiting._note(progress | {"started_at": started_at})
        assert re.fullmatch(f"running: KSampler{told}", waiting.line_of_one())


@pytest.mark.parametrize(
    ("text", "columns", "fits"), [("abc", 3, "abc"), ("abcd", 3, "abc"), ("K采样器", 4, "K采"), ("", 0, "")]
)
def test_the_line_that_changes_fits_the_terminal(text: str, columns: int, fits: str) -> None:
    assert send_job.cut(text, columns) == fits


# --- Many at once ----------------------------------------------------------------------------------------


@pytest.fixture
def sender_site(make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch) -> Site:
    """A site whose settings this process has, too."""
    site = make_site()
    for name, value in site.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(send_job, "load_settings", lambda _=None: load_settings(site.env, site.folder / "env"))
    return site


def test_many_workflows_are_ten_to_a_request_and_one_decision(
    cloud: LocalCloud, sender_site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    desired = make_group(cloud, sender_site)
    calls: list[str] = []
    monkeypatch.setattr(cloud, "fault", lambda _, operation: calls.append(operation))
    workflows = [image_workflow(number) for number in range(25)]
    ids = send_job.submit_many(workflows, callback_url="https://x/y")
    assert calls.count("SendMessageBatch") == 3
    assert calls.count("DescribeAutoScalingGroups") == calls.count("SetDesiredCapacity") == 1
    assert desired() == 5, "the group's maximum, for ceil(25 / 3)"
    sent = {body["job_id"]: body for body in bodies(sender_site)}
    assert [sent[job_id]["prompt"] for job_id in ids] == workflows, "ids come back in the order of the workflows"
    assert {body["callback_url"] for body in sent.values()} == {"https://x/y"}
    assert send_job.submit_many([]) == []


def test_what_sqs_refuses_of_a_batch_is_sent_again_unless_it_is_our_fault(
    sender_site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    settings = load_settings(None, sender_site.folder / "env")
    sender = send_job.Sender(settings)
    real = sender._queue()
    asked: list[list[str]] = []
    ids = [new_job_id() for _ in range(4)]

    class Moody:
        def send_message_batch(self, QueueUrl: str, Entries: list[dict[str, str]]) -> dict[str, Any]:  # noqa: N803
            asked.append([entry["Id"] for entry in Entries])
            failed = [
                {"Id": ids[1], "Code": "ServiceUnavailable", "SenderFault": False},
                {"Id": ids[2], "Code": "InvalidMessageContents", "Message": "bad", "SenderFault": True},
                {"Id": ids[3], "Code": "InternalError", "SenderFault": False},
            ]
            failed = [entry for entry in failed if entry["Id"] in asked[-1]][: None if len(asked) == 1 else 1]
            good = [entry for entry in Entries if entry["Id"] not in [item["Id"] for item in failed]]
            answer = real.send_message_batch(QueueUrl=QueueUrl, Entries=good) if good else {}
            return {**answer, "Failed": failed}

    sender._sqs = Moody()
    with pytest.raises(send_job.NotAllSentError) as caught:
        sender.send_many([{"exec_cmd": "true"}] * 4, ids)
    assert asked == [ids, [ids[1], ids[3]]] + [[ids[1]]] * (send_job.BATCH_TRIES - 2)
    assert caught.value.sent == [ids[0], ids[3]]
    assert caught.value.unsent == [ids[1], ids[2]]
    assert str(caught.value) == "2 of 4 jobs were sent: ServiceUnavailable: "
    assert {body["job_id"] for body in bodies(sender_site)} == {ids[0], ids[3]}


def test_a_refused_request_names_what_was_not_sent(
    cloud: LocalCloud, sender_site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    desired = make_group(cloud, sender_site)
    monkeypatch.setattr(send_job, "REQUESTS_AT_ONCE", 1)
    answers = [None, Fault(403, "AccessDenied")]
    monkeypatch.setattr(
        cloud, "fault", lambda _, operation: answers.pop(0) if operation == "SendMessageBatch" else None
    )
    ids = [new_job_id() for _ in range(12)]
    with pytest.raises(send_job.NotAllSentError, match=r"10 of 12 jobs were sent: .*AccessDenied") as caught:
        send_job.submit_many([image_workflow()] * 12, job_ids=ids)
    assert (caught.value.sent, caught.value.unsent) == (ids[:10], ids[10:])
    assert desired() == 4, "what was sent is to be run"


def test_large_workflows_among_many(sender_site: Site) -> None:
    large, small = image_workflow(), image_workflow()
    large["1"]["_meta"] = {"title": "x" * 1_100_000}
    ids = send_job.submit_many([small, large, small])
    sent = {body["job_id"]: body for body in bodies(sender_site)}
    assert sent[ids[1]] == {"workflow_key": f"input/jobs/{ids[1]}.json", "job_id": ids[1]}
    stored = sender_site.s3.get_object(Bucket=sender_site.bucket, Key=f"input/jobs/{ids[1]}.json")["Body"].read()
    assert json.loads(stored) == large


def test_the_addresses_of_inputs_travel_with_the_job(sender_site: Site) -> None:
    inputs = {"photo.png": "https://example.com/some.png?signature=x"}
    small, large = image_workflow(), image_workflow()
    large["1"]["_meta"] = {"title": "x" * 1_100_000}
    ids = [send_job.submit(workflow, inputs=inputs) for workflow in (small, large)]
    sent = {body["job_id"]: body for body in bodies(sender_site)}
    assert [sent[job_id]["inputs"] for job_id in ids] == [inputs, inputs]
    with pytest.raises(InvalidMessageError, match=r"inputs has the name '../photo.png'"):
        send_job.submit(small, inputs={"../photo.png": "https://example.com/x"})
    assert sender_site.depth() == (0, 2)


def test_batches_fit_into_a_request() -> None:
    half = MAX_MESSAGE_BYTES // 2
    sizes = [half, half, 1, 1, *[2] * 12]
    messages = [send_job.Message(str(number), "", size) for number, size in enumerate(sizes)]
    made = list(send_job.batches(messages))
    assert [len(batch) for batch in made] == [2, 10, 4]
    assert [message for batch in made for message in batch] == messages


@pytest.mark.parametrize(
    ("workflows", "job_ids", "sentence"),
    [
        ([image_workflow(), {"nodes": [], "links": []}], None, "workflow 2: this workflow is saved in UI format"),
        ([image_workflow(math.nan)], None, "job 1: the job cannot be written as JSON .*: use text, lists, dicts and"),
        ([image_workflow(more={"7": {"class_type": "X", "inputs": {"path": ROOT}}})], None, "Path is not JSON"),
        ([image_workflow()], ["x", "y"], "there are 2 job_ids for 1 jobs: give one for each"),
        ([image_workflow()] * 2, ["0f8fad5b-d9cb-469f-a165-70867728950e", "X"], "job 2: job_id 'X' is no lowercase"),
        ([image_workflow()] * 2, ["0f8fad5b-d9cb-469f-a165-70867728950e"] * 2, "70867728950e is there twice"),
    ],
)
def test_bad_input_among_many_is_refused_before_anything_is_sent(
    sender_site: Site, workflows: list[Any], job_ids: list[str] | None, sentence: str
) -> None:
    with pytest.raises(InvalidMessageError, match=sentence):
        send_job.submit_many(workflows, job_ids=job_ids)
    assert sender_site.depth() == (0, 0)


def test_importing_it_imports_nothing_of_aws_nor_of_the_command_line() -> None:
    slow = ("boto3", "botocore", "requests", "websocket", "dotenv", "argparse", "logging", "uuid")
    program = f"import sys, send_job; print([name for name in {slow} if name in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n"


# --- From business code ----------------------------------------------------------------------------------


def test_business_code_sends_waits_and_downloads(busy_site: Site) -> None:
    program = """
import asyncio, json, send_job

good = json.load(open("good.json"))
job_id = send_job.submit(good)
result = send_job.wait(job_id, timeout=80)
assert result == send_job.result(job_id), result
(path,) = send_job.download(result, "mine")
assert path.read_bytes().startswith(b"\\x89PNG")
try:
    send_job.wait(send_job.submit_command("exit 3"), timeout=80)
except send_job.JobFailed as failed:
    assert failed.error["kind"] == "command_refused", failed.error
    assert failed.result["error"] == failed.error
    assert failed.error["message"] in str(failed)

async def together():
    ticks = 0
    waiting = asyncio.gather(*(asyncio.to_thread(send_job.wait, send_job.submit(good)) for _ in range(2)))
    while not waiting.done():
        ticks += 1
        await asyncio.sleep(0.01)
    return await waiting, ticks

results, ticks = asyncio.run(together())
assert [result["status"] for result in results] == ["succeeded"] * 2
assert ticks > 3, ticks
print("all is well")
"""
    (busy_site.folder / "good.json").write_text(json.dumps(image_workflow(0.5)))
    ran = busy_site.run("python", "-c", program)
    assert (ran.stdout, ran.stderr) == ("all is well\n", "")


def test_progress_is_told_once_and_waiting_ends_with_the_receipt(sender_site: Site) -> None:
    job_id = new_job_id()
    store_progress(sender_site, job_id, value=5)
    heard: list[float] = []

    def note(progress: send_job.JobProgress) -> None:
        heard.append(progress["value"])
        if progress["value"] == 5:
            store_progress(sender_site, job_id, value=6)
        else:
            store(sender_site, job_id)

    assert send_job.wait(job_id, on_progress=note, timeout=80) == receipt(job_id)
    assert heard == [5, 6]


@pytest.mark.usefixtures("sender_site")
def test_a_wait_that_takes_too_long_is_a_timeout() -> None:
    job_id = new_job_id()
    assert send_job.result(job_id) is None
    with pytest.raises(TimeoutError, match=r"1 job had no result after 0\.1 s"):
        send_job.wait(job_id, timeout=0.1)


@pytest.mark.parametrize("call", [send_job.wait, send_job.result, send_job.cancel])
def test_what_is_no_job_id_becomes_no_key(call: Callable[[str], object]) -> None:
    with pytest.raises(InvalidMessageError, match=r"'\.\./x' is no job id"):
        call("../x")


@pytest.mark.parametrize("key", ["", "output/", "output/x", "input/x/y", "output/../y", "output/x//y", "output/x/..", "/output/x/y"])  # fmt: skip
def test_a_key_that_is_no_file_of_a_job_is_not_saved(key: str) -> None:
    with pytest.raises(ValueError, match="is no file of a job"):
        send_job.local_parts(key)
    assert send_job.local_parts("output/x/y z/ü.png") == ["x", "y z", "ü.png"]


def test_cancelling_leaves_word_for_the_worker(sender_site: Site) -> None:
    job_id = new_job_id()
    send_job.cancel(job_id)
    assert sender_site.keys("input/") == [f"input/jobs/{job_id}.cancel"]


# --- Check before a GPU is paid for ----------------------------------------------------------------------

RECORDINGS = json.loads((CLOUD / "recordings.json").read_text())


def object_info() -> dict[str, Any]:
    """/object_info of the recorded server, as far as it was recorded; of the other nodes the stand-in's."""
    settings = comfyui_standin.Settings.__new__(comfyui_standin.Settings)
    names = set(comfyui_standin.NODES) - {"LoadImage", "CheckpointLoaderSimple"}
    nodes = {name: comfyui_standin.describe_node(name, settings) for name in names}
    for recorded in (value["body"] for name, value in RECORDINGS.items() if name.startswith("object_info_")):
        nodes |= copy.deepcopy(recorded)
    nodes["CheckpointLoaderSimple"]["input"]["required"]["ckpt_name"][0] = ["v1-5-pruned-emaonly-fp16.safetensors"]
    nodes["Custom"] = {
        "input": {"required": {"mode": [["a", "b"]], "level": ["INT", {"max": 9}], "what": ["*"]}, "optional": {}},
        "output": ["IMAGE"], "output_node": False, "python_module": "custom_nodes.of_somebody",
    }  # fmt: skip
    nodes["Dynamic"] = {
        "input": {"required": {"parts": ["COMFY_AUTOGROW_V3", {}], "kind": ["COMBO", {"options": ["x"]}]}},
        "output": ["COMFY_MATCHTYPE_V3"], "output_node": False, "python_module": "comfy_extras.nodes_x",
    }  # fmt: skip
    return nodes


def recorded_prompts() -> list[Any]:
    def whole(prompt: dict[str, Any]) -> dict[str, Any]:
        """With the nodes that the recording only mentions."""
        if prompt.pop("…", None):
            blurs = range(3, 42)
            prompt |= {
                f"{n}": prompt["2"] | {"inputs": prompt["2"]["inputs"] | {"image": [f"{n - 1}", 0]}} for n in blurs
            }
        return prompt

    return [
        pytest.param(whole(call["request"]["body"]["prompt"]), call["status"], call["body"], id=f"{name}-{number}")
        for name, case in RECORDINGS.items()
        if isinstance(case, dict)
        for number, call in enumerate(case.get("http", []))
        if call.get("request", {}).get("path") == "/prompt" and call["status"] != 500
    ]


@pytest.mark.parametrize(("prompt", "status", "answer"), recorded_prompts())
def test_the_check_agrees_with_the_recorded_server(prompt: Any, status: int, answer: Any) -> None:
    problems = send_job.find_problems(prompt, object_info(), lambda _: False)
    assert any(problem.certain for problem in problems) == (status == 400)
    if answer.get("node_errors"):
        assert {problem.node_id for problem in problems} == set(answer["node_errors"])


def test_the_recordings_hold_both_kinds() -> None:
    assert Counter(case.values[1] for case in recorded_prompts()).keys() == {200, 400}


def checked(more: dict[str, Any], *, instead: bool = False, may_have: bool = False) -> list[tuple[str, bool]]:
    """What is said of a workflow with these nodes besides a good branch, or instead of it."""
    good: dict[str, Any] = {} if instead else image_workflow()
    return [
        (str(problem), problem.certain)
        for problem in send_job.find_problems({**good, **more}, object_info(), lambda _: may_have)
    ]


def saving(class_type: str, output: int = 0, /, **inputs: Any) -> dict[str, Any]:
    """A node, 10, whose output is saved."""
    return {
        "10": {"class_type": class_type, "inputs": inputs, "_meta": {"title": "Mine"}},
        "11": {"class_type": "SaveImage", "inputs": {"images": ["10", output], "filename_prefix": "y"}},
    }


EMPTY = {"width": 64, "height": 64, "batch_size": 1, "color": 0}
PIXEL_RANGE = "give a number from 1 to 16384"


@pytest.mark.parametrize(
    ("nodes", "said"),
    [
        (saving("EmptyImage", **EMPTY | {"width": "many"}), "node 10 Mine: width is 'many': give a whole number"),
        (saving("EmptyImage", **EMPTY | {"width": None}), "node 10 Mine: width is None: give a whole number"),
        (saving("EmptyImage", **EMPTY | {"width": 0}), f"node 10 Mine: width is 0: {PIXEL_RANGE}"),
        (saving("EmptyImage", **EMPTY | {"width": "99999"}), f"node 10 Mine: width is 99999: {PIXEL_RANGE}"),
        (saving("EmptyImage", width=8, height=8, batch_size=1), "node 10 Mine: color is missing: connect it or give it a value"),
        (saving("EmptyImage", **EMPTY | {"width": ["7"]}), 'node 10 Mine: width is no link: write ["node id", number of its output]'),
        (saving("EmptyImage", **EMPTY | {"width": ["7", 0]}), "node 10 Mine: width links to node 7, which is not there: the nodes are 10, 11"),
        (saving("EmptyImage", 1, **EMPTY), "node 11 SaveImage: images links to output 1 of node 10, which has 1 output: count its outputs from 0"),
        (saving("EmptyLatentImage", width=64, height=64, batch_size=1), "node 11 SaveImage: images is IMAGE, but output 0 of node 10 is LATENT: link it to an output that is IMAGE"),
        (saving("LoadImage", image="nothing.png"), "node 10 Mine: image 'nothing.png' is not installed: put it into the bucket's input/"),
        (saving("LoadImage", image="exampel.png"), "node 10 Mine: image 'exampel.png' is not installed: the closest is example.png, or put it into the bucket's input/"),
        (saving("EmptyImages", **EMPTY), "node 10 Mine: there is no node EmptyImages: the closest are EmptyImage, EmptyLatentImage, or install it on the base machine and run create_env.sh again"),
        ({"1": {"class_type": "EmptyImage", "inputs": EMPTY}}, "it has no output node: add one that saves something, such as SaveImage"),
    ],
)  # fmt: skip
def test_what_comfyui_refuses_is_told_with_the_remedy(nodes: dict[str, Any], said: str) -> None:
    assert checked(nodes, instead=True) == [(said, True)]


@pytest.mark.parametrize(
    "nodes",
    [
        saving("EmptyImage", **EMPTY | {"width": "64", "height": 64.9, "batch_size": True}),
        saving("EmptyImage", **EMPTY | {"width": {"__value__": 64}}),
        saving("EmptyImage", -1, **EMPTY),
        saving("EmptyImage", **EMPTY, unknown=["77", 0]),
        {**saving("EmptyImage", **EMPTY), "12": {"class_type": "EmptyImage", "inputs": {}}},  # nobody needs it
        saving("Dynamic", kind="x"),
        {"10": {"class_type": "EmptyImage", "inputs": EMPTY}, "11": {"class_type": "PreviewAny", "inputs": {"source": ["10", 0]}}},
        {"11": {"class_type": "PreviewAny", "inputs": {"source": 3}}},
    ],
)  # fmt: skip
def test_what_comfyui_accepts_is_no_problem(nodes: dict[str, Any]) -> None:
    assert checked(nodes, instead=True) == []


@pytest.mark.parametrize(
    ("nodes", "said"),
    [
        (saving("Custom", mode="c", level=1, what=1), "mode is 'c': it may be a, b"),
        (saving("Custom", mode="a", level=10, what=1), "level is 10: give a number from -inf to 9"),
        (saving("Custom", 3, mode="a", level=1, what=1), "links to output 3"),
        (saving("Dynamic", kind="y"), "kind is 'y'"),
        (saving("LoadImage", image="below/nope.png"), "is not installed"),
        (saving("LoadImage", image="nope.png [output]"), "is not installed"),
        (saving("LoadImage", image="nope.xyz"), "is not installed"),
    ],
)
def test_what_comfyui_may_accept_is_only_doubted(nodes: dict[str, Any], said: str) -> None:
    ((sentence, certain),) = checked(nodes, instead=True)
    assert said in sentence
    assert not certain


def test_a_bad_branch_beside_a_good_one_is_only_warned_of() -> None:
    bad = saving("LoadImage", image="nope.png")
    assert [certain for _, certain in checked(bad, instead=True)] == [True]
    assert [certain for _, certain in checked(bad)] == [False]
    assert checked(bad, may_have=True) == []
    assert checked({"10": {"class_type": "NoSuchNode"}})[0][1], "an unknown node is refused wherever it stands"


def store_nodes(site: Site, nodes: dict[str, Any]) -> None:
    """Store what a fleet has installed, as a worker does."""
    site.s3.put_object(Bucket=site.bucket, Key=OBJECT_INFO_KEY, Body=gzip.compress(json.dumps(nodes).encode()))


def test_submit_refuses_what_the_fleet_would(
    cloud: LocalCloud, sender_site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    workflow = json.loads((ROOT / "simple_workflow.json").read_text())
    workflow["4"]["inputs"]["ckpt_name"] = "v1-5-pruned-emaonly.safetensors"
    send_job.submit(workflow)  # nothing is known of the fleet
    send_job._nodes_read.clear()
    store_nodes(sender_site, object_info())
    for call in (send_job.submit, lambda one: send_job.submit_many([image_workflow(), one])):
        with pytest.raises(send_job.WorkflowProblemsError) as caught:
            call(workflow)
        (problem,) = caught.value.problems
        assert (problem.node_id, problem.title) == ("4", workflow["4"]["_meta"]["title"])
        assert "the closest is v1-5-pruned-emaonly-fp16.safetensors" in problem.remedy
    assert str(caught.value).startswith("workflow 2 cannot run on the fleet: node 4 ")
    send_job.submit(workflow, check=False)
    sender_site.s3.put_object(Bucket=sender_site.bucket, Key="models/checkpoints/v1-5-pruned-emaonly.safetensors")
    send_job.submit(workflow)  # the model came after the fleet was looked at
    with pytest.warns(UserWarning, match=r"node 10 Mine: image 'nope\.png'"):
        send_job.submit(image_workflow(more=saving("LoadImage", image="nope.png")))
    assert len(bodies(sender_site)) == 4

    monkeypatch.setattr(send_job, "NODES_AGE_S", 0)
    read = send_job._nodes_read[sender_site.bucket][2]
    calls: list[str] = []
    monkeypatch.setattr(cloud, "fault", lambda _, operation: calls.append(operation))
    with pytest.raises(send_job.WorkflowProblemsError):  # it is known still, by its ETag
        send_job.submit(image_workflow(more={"10": {"class_type": "New", "inputs": {}}}))
    assert send_job._nodes_read[sender_site.bucket][2] is read
    store_nodes(sender_site, object_info() | {"New": {"input": {}, "output": []}})
    send_job.submit(image_workflow(more={"10": {"class_type": "New", "inputs": {}}}))
    assert calls.count("GET") == 2
    monkeypatch.setattr(cloud, "fault", lambda service, _: Fault(403, "AccessDenied") if service == "s3" else None)
    send_job.submit(image_workflow(more={"10": {"class_type": "Nowhere", "inputs": {}}}))
    assert len(bodies(sender_site)) == 2


def test_the_command_line_checks(sender_site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    workflow = json.loads((ROOT / "simple_workflow.json").read_text())
    (tmp_path / "good.json").write_text(json.dumps(workflow))
    title = workflow["3"]["_meta"]["title"]
    workflow["3"]["inputs"] |= {"steps": 0, "sampler_name": "eular"}
    (tmp_path / "bad.json").write_text(json.dumps(workflow))
    good, bad = str(tmp_path / "good.json"), str(tmp_path / "bad.json")
    assert send_job.main(["--check", bad]) == 0
    assert capsys.readouterr().out.startswith(
        f"Its format is right; what {sender_site.env} has installed is not known"
    )
    store_nodes(sender_site, object_info())
    send_job._nodes_read.clear()
    assert send_job.main(["--check", good]) == 0
    assert capsys.readouterr().out == f"{sender_site.env} can run this workflow\n"
    assert send_job.main(["--check", bad]) == 1
    problems = capsys.readouterr().out.splitlines()[:-1]
    assert [line.split(": ")[:2] for line in problems] == [
        [f"node 3 {title}", "steps is 0"],
        [f"node 3 {title}", "sampler_name is 'eular'"],
    ]
    assert "the closest is euler, or it may be euler, euler_cfg_pp" in problems[1]
    assert send_job.main([bad]) == 2
    said = capsys.readouterr()
    assert said.err.splitlines() == [
        f"send_job.py: this workflow cannot run on {sender_site.env}, and was not sent:", *problems
    ]  # fmt: skip
    assert sender_site.depth() == (0, 0)
    assert send_job.main([bad, "--no-check"]) == 0
    assert sender_site.depth() == (1, 0)


# --- Inputs ----------------------------------------------------------------------------------------------


def test_an_input_is_uploaded_once_under_a_name_of_its_content(
    cloud: LocalCloud, sender_site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(cloud, "fault", lambda _, operation: calls.append(operation))
    photo, other = tmp_path / "my [photo] ü.png", tmp_path / "other" / "my [photo] ü.png"
    other.parent.mkdir()
    photo.write_bytes(b"one")
    other.write_bytes(b"two")
    name = send_job.upload_input(photo)
    assert re.fullmatch(r"my_photo_-[0-9a-f]{16}\.png", name)
    assert send_job.upload_input(str(photo)) == name
    assert calls.count("PUT") == 1
    assert send_job.upload_input(other) != name, "another file does not overwrite it under a waiting job"
    assert sender_site.s3.get_object(Bucket=sender_site.bucket, Key=f"input/{name}")["Body"].read() == b"one"
    with pytest.raises(FileNotFoundError):
        send_job.upload_input(tmp_path / "gone.png")


def test_an_input_of_the_command_line_is_uploaded_checked_and_named(
    sender_site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo, file = tmp_path / "photo.png", tmp_path / "mine.json"
    photo.write_bytes(b"picture")
    file.write_text(json.dumps(saving("LoadImage", image="example.png")))
    store_nodes(sender_site, object_info())
    sets = ["--set", f"10.image=@{photo}"]
    assert send_job.main([str(file), *sets, "--check"]) == 0
    assert sender_site.keys("input/") == [], "a check uploads nothing"
    capsys.readouterr()
    assert send_job.main([str(file), *sets]) == 0
    name = send_job.input_name(photo)
    assert capsys.readouterr().out.startswith(f"Uploaded {photo} as {name}\nMessage sent successfully")
    assert sender_site.keys("input/") == [f"input/{name}"]
    (body,) = bodies(sender_site)
    assert body["prompt"]["10"]["inputs"] == {"image": name}
    send_job.submit(body["prompt"])  # what the fleet is known to have is older than the upload
    assert send_job.main(["--input", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == send_job.input_name(file)


def test_without_its_input_no_job_is_sent(
    cloud: LocalCloud, sender_site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    denied = Fault(403, "AccessDenied")
    monkeypatch.setattr(cloud, "fault", lambda service, call: denied if (service, call) == ("s3", "PUT") else None)
    assert send_job.main(["--set", f"6.text=@{__file__}"]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"send_job.py: {__file__} cannot be uploaded to {sender_site.bucket}: ")
    assert sender_site.depth() == (0, 0)


# --- Waiting: receipts -----------------------------------------------------------------------------------


def client_error(status: int, code: str, operation: str = "GetObject") -> ClientError:
    answer = {"Error": {"Code": code, "Message": "no"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return ClientError(answer, operation)


class Bucket:
    """An S3 client with a clock of its own: each receipt appears at a second of it, errors come first."""

    class exceptions:  # noqa: N801
        NoSuchKey = KeyError

    def __init__(self, monkeypatch: pytest.MonkeyPatch, done_at: dict[str, float], *errors: Exception) -> None:
        self.now = 0.0
        self.done_at = done_at
        self.errors = list(errors)
        self.asked: list[tuple[float, str]] = []
        clock = types.SimpleNamespace(monotonic=lambda: self.now, sleep=self.sleep)
        monkeypatch.setattr(send_job, "time", clock)

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds

    def get_object(self, Bucket: str, Key: str) -> dict[str, Any]:  # noqa: N803
        assert Bucket == "bucket"
        job_id = Key.split("/")[1]
        self.asked.append((self.now, job_id))
        if self.errors:
            raise self.errors.pop(0)
        if self.now < self.done_at[job_id]:
            raise KeyError(Key)
        return {"Body": io.BytesIO(json.dumps(receipt(job_id)).encode())}

    def wait(self, **more: Any) -> list[tuple[float, str]]:
        """(when, which) of each receipt."""
        found = send_job.wait_for(self, "bucket", list(self.done_at), **more)
        return [(self.now, result["job_id"]) for result in found]


def test_receipts_come_as_they_appear(monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = Bucket(monkeypatch, {"a": 9, "b": 0, "c": 9})
    found = bucket.wait()
    assert found[0] == (0, "b")
    assert sorted(job for _, job in found[1:]) == ["a", "c"]
    assert 9 <= found[1][0] <= 9 + send_job.LONGEST_PAUSE_S
    assert Counter(job for _, job in bucket.asked)["b"] == 1, "a finished job is not looked for again"


def test_looks_grow_rare_while_nothing_comes_and_frequent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = Bucket(monkeypatch, {"a": 600, "b": 10_000})
    found = bucket.wait()
    moments = [moment for moment, job in bucket.asked if job == "b"]
    pauses = [later - sooner for sooner, later in itertools.pairwise(moments)]
    assert pauses[0] <= 1
    assert max(pauses) == send_job.LONGEST_PAUSE_S
    after = moments.index(found[0][0])
    assert pauses[after] == send_job.FIRST_PAUSE_S, "where one is done others will be soon"


def test_many_jobs_cost_no_more_looks_than_few(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = {f"job{number}": 0.0 if number == 99 else 1000.0 for number in range(100)}
    bucket = Bucket(monkeypatch, jobs)
    found = bucket.wait()
    assert len(found) == 100
    assert max(Counter(moment for moment, _ in bucket.asked).values()) == send_job.LOOKS_PER_ROUND
    assert found[0][1] == "job99", "everyone has a turn"
    assert found[0][0] < 60


def test_after_the_time_limit_one_last_look_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Bucket(monkeypatch, {"a": 7.0}).wait(timeout_s=7) == [(7, "a")]
    bucket = Bucket(monkeypatch, {"a": 7.1})
    with pytest.raises(send_job.WaitTimeoutError):
        bucket.wait(timeout_s=7)
    assert bucket.now == 7


@pytest.mark.parametrize(
    "error",
    [
        client_error(503, "SlowDown"),
        client_error(500, "InternalError"),
        client_error(400, "RequestTimeout"),
        client_error(400, "ThrottlingException"),
        EndpointConnectionError(endpoint_url="https://s3"),
        ResponseStreamingError(error="cut"),
    ],
    ids=str,
)
def test_what_passes_is_waited_through_and_said_once(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    said: list[str] = []
    bucket = Bucket(monkeypatch, {"a": 0, "b": 0}, error, error)
    assert sorted(job for _, job in bucket.wait(say=said.append)) == ["a", "b"]
    assert said == [f"Results cannot be read just now, waiting goes on: {error}"]
    assert [moment for moment, _ in bucket.asked[:3]] == [0, 0.75, 1.875], "one try a round"


@pytest.mark.parametrize(
    "error", [client_error(403, "AccessDenied"), client_error(404, "NoSuchBucket"), NoCredentialsError()], ids=str
)
def test_what_will_not_pass_ends_the_waiting(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    with pytest.raises(type(error)):
        Bucket(monkeypatch, {"a": 0}, error).wait()


# --- Waiting: what the fleet does ------------------------------------------------------------------------


class Group:
    """An Auto Scaling client: one group, its instances' states, its activities. Exceptions stand for answers."""

    def __init__(self, desired: int = 0, states: str = "", activities: object = (), *, there: bool = True) -> None:
        self.group = {
            "DesiredCapacity": desired,
            "Instances": [{"LifecycleState": state} for state in states.split()],
        }
        self.activities = activities
        self.there = there

    def describe_auto_scaling_groups(self, AutoScalingGroupNames: list[str]) -> dict[str, Any]:  # noqa: N803
        assert AutoScalingGroupNames == ["asg"]
        return {"AutoScalingGroups": [self.group] if self.there else []}

    def describe_scaling_activities(self, AutoScalingGroupName: str, MaxRecords: int) -> dict[str, Any]:  # noqa: N803
        assert (AutoScalingGroupName, MaxRecords) == ("asg", 20)
        if isinstance(self.activities, Exception):
            raise self.activities
        return {"Activities": self.activities}


def activity(status: str, age_s: float = 0, words: str | None = None, description: str = "") -> dict[str, Any]:
    """A launch as AWS describes it; with an instance unless it failed or only begins."""
    failed = status in ("Failed", "Cancelled")
    description = description or (
        f"Launching a new EC2 instance.  Status Reason: {words}" if failed else "Launching a new EC2 instance: i-0abc"
    )
    started = datetime.now(UTC) - timedelta(seconds=age_s)
    return {"StatusCode": status, "StartTime": started, "Description": description} | (
        {"StatusMessage": words} if words else {}
    )


FULL = (
    "We currently do not have sufficient g5.2xlarge capacity in the Availability Zone you requested (us-west-2a). "
    "Our system will be working on provisioning additional capacity. You can currently get g5.2xlarge capacity by not "
    "specifying an Availability Zone in your request or choosing us-west-2b, us-west-2c. Launching EC2 instance failed."
)
FULL_SAYS = (
    "AWS has no g5.2xlarge free in us-west-2a just now: it is tried again by itself; "
    "more types in INSTANCE_TYPES find room sooner"
)
QUOTA = (
    "You have requested more vCPU capacity than your current vCPU limit of 8 allows for the instance bucket that the "
    "specified instance type belongs to. Please visit http://aws.amazon.com/contact-us/ec2-request to request an "
    "adjustment to this limit. Launching EC2 instance failed."
)
QUOTA_SAYS = (
    "the account's quota of 8 vCPUs leaves no room for another instance: raise 'Running On-Demand G and VT instances' "
    "(for a type g…; other types have quotas of their own) in Service Quotas"
)
SPOT_SAYS = (
    "AWS has no spot instance of this kind free just now: it is tried again by itself; "
    "more types in INSTANCE_TYPES find room sooner"
)
NOT_READY_SAYS = (
    "the image is not ready yet: instances start by themselves once it is, some minutes after create_env.sh"
)


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        (FULL, FULL_SAYS),
        (f"Could not launch On-Demand Instances. InsufficientInstanceCapacity - {FULL}", FULL_SAYS),
        (QUOTA, QUOTA_SAYS),
        (f"Could not launch On-Demand Instances. VcpuLimitExceeded - {QUOTA}", QUOTA_SAYS),
        (QUOTA.replace("of 8", "of 0"), QUOTA_SAYS.replace("of 8", "of 0")),
        ("There is no Spot capacity available that matches your request. Launching EC2 instance failed.", SPOT_SAYS),
        (
            "Could not launch Spot Instances. UnfulfillableCapacity - Unable to fulfill capacity due to your request "
            "configuration. Please adjust your request and try again. Launching EC2 instance failed.",
            SPOT_SAYS,
        ),
        (
            "Could not launch On-Demand Instances. UnfulfillableCapacity - Unable to fulfill capacity due to your "
            "request configuration. Please adjust your request and try again. Launching EC2 instance failed.",
            SPOT_SAYS.replace("spot instance", "instance"),
        ),
        (
            "Could not launch Spot Instances. MaxSpotInstanceCountExceeded - Max spot instance count exceeded. "
            "Launching EC2 instance failed.",
            "the account's quota for spot instances is used up: raise 'All G and VT Spot Instance Requests' "
            "(for a type g…; other types have quotas of their own) in Service Quotas",
        ),
        (
            "Your requested instance type (g5.2xlarge) is not supported in your requested Availability Zone "
            "(us-west-2d). Please retry your request by not specifying an Availability Zone or choosing us-west-2a. "
            "Launching EC2 instance failed.",
            "there is no g5.2xlarge in us-west-2d: other zones are tried by themselves; "
            "more types in INSTANCE_TYPES find room sooner",
        ),
        ("AMI ami-0abc12 is pending, and cannot be run. Launching EC2 instance failed.", NOT_READY_SAYS),
        (
            "Could not launch On-Demand Instances. InvalidAMIID.Unavailable - The image ID 'ami-0abc12' is not "
            "available. Launching EC2 instance failed.",
            NOT_READY_SAYS,
        ),
        (
            "The image id '[ami-0abc12]' does not exist. Launching EC2 instance failed.",
            "the fleet's image ami-0abc12 does not exist any more: run create_env.sh again",
        ),
        (
            "The AMI ID ami-0abc12 does not exist. Launching EC2 instance failed.",
            "the fleet's image ami-0abc12 does not exist any more: run create_env.sh again",
        ),
        (
            "Instance became unhealthy while waiting for instance to be in InService state. Termination Reason: "
            "Client.InternalError: Client error on launch",
            "an instance ended as it started, most likely because its disk's key is refused: "
            "let the role AWSServiceRoleForAutoScaling use the KMS key",
        ),
        (
            "Value (comfy) for parameter iamInstanceProfile.name is invalid. Invalid IAM Instance Profile name. "
            "Launching EC2 instance failed.",
            "AWS cannot launch what the launch template says (Value (comfy) for parameter iamInstanceProfile.name is "
            "invalid): run create_env.sh again",
        ),
        (
            "The security group 'sg-0abc' does not exist. Launching EC2 instance failed.",
            "AWS cannot launch what the launch template says (The security group 'sg-0abc' does not exist): "
            "run create_env.sh again",
        ),
        (
            "Could not launch On-Demand Instances. InvalidParameterCombination - The specified instance type is not "
            "eligible for Free Tier. For a list, run 'describe-instance-types'. Launching EC2 instance failed.",
            "AWS launches no instance: InvalidParameterCombination - The specified instance type is not eligible for "
            "Free Tier",
        ),
        (
            "This account is currently blocked and not recognized as a valid account. Launching EC2 instance failed.",
            "AWS launches no instance: This account is currently blocked and not recognized as a valid account",
        ),
        ("x" * 1000, "AWS launches no instance: " + "x" * 300),
        ("{words} {0}", "AWS launches no instance: {words} {0}"),
    ],
)
def test_the_sentence_for_a_failed_launch(message: str, sentence: str) -> None:
    assert explain_launch_failure(message) == sentence


@pytest.mark.parametrize(
    ("activities", "problem"),
    [
        ([], None),
        ([activity("Failed", 5, FULL)], FULL_SAYS),
        ([activity("Cancelled", 5, FULL)], FULL_SAYS),
        ([activity("Cancelled", 5)], None),
        ([activity("Successful", 1), activity("Failed", 5, FULL)], None),
        ([activity("PreInService", 1), activity("Failed", 5, FULL)], None),
        ([activity("Failed", 1, FULL), activity("Successful", 5)], FULL_SAYS),
        ([activity("Failed", 1, QUOTA), activity("Failed", 5, FULL)], QUOTA_SAYS),
        ([activity("Failed", 5, FULL), activity("Failed", 1, QUOTA)], QUOTA_SAYS),
        # A try that is under way has no instance yet, and AWS lists it first.
        ([activity("WaitingForInstanceId", 1, description="Launching a new EC2 instance"),
          activity("Failed", 5, FULL)], FULL_SAYS),
        ([activity("Successful", 1, description="Terminating EC2 instance: i-0abc"),
          activity("Failed", 5, FULL)], FULL_SAYS),
        ([activity("Failed", 5, FULL, description="Terminating EC2 instance: i-0abc")], None),
        ([activity("Failed", LAUNCH_FAILURE_AGE_S + 5, FULL)], None),
    ],
)  # fmt: skip
def test_the_newest_launch_that_was_decided_tells(activities: list[dict[str, Any]], problem: str | None) -> None:
    assert capacity_problem(Group(activities=activities), "asg") == problem


DENIED = client_error(403, "AccessDenied", "DescribeScalingActivities")


@pytest.mark.parametrize(
    ("group", "news"),
    [
        (Group(there=False), None),
        (Group(2, "InService InService", [activity("Failed", 5, FULL)]), None),
        (Group(0), "No instance is wanted: raise the desired capacity of asg, or MAX_INSTANCES if it is 0"),
        (Group(2), "2 instances are asked of AWS"),
        (Group(1), "1 instance is asked of AWS"),
        (Group(3, "InService Pending Pending:Wait"), "2 instances are booting"),
        (Group(1, "Terminating:Wait Pending"), "1 instance is booting"),
        (Group(2, "Pending", [activity("Failed", 5, FULL)]), FULL_SAYS),
        (Group(2, "InService", [activity("Failed", 5, QUOTA)]), "T" + QUOTA_SAYS[1:]),
        (Group(1, "", DENIED), f"1 instance is asked of AWS; whether launches fail cannot be seen: {DENIED}"),
    ],
)
def test_what_is_said_of_the_group(group: Group, news: str | None) -> None:
    assert send_job.fleet_news(group, "asg") == news


class Watched:
    """A FleetWatch on stand-ins and a clock that tests move."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.looks = 100.0, 0
        self.depth: QueueDepth | Exception = QueueDepth(2, 0)
        self.news: str | Exception | None = "1 instance is booting"
        self.said: list[str] = []
        monkeypatch.setattr(send_job, "time", types.SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(send_job, "aws_client", lambda *_: None)
        monkeypatch.setattr(send_job, "fleet_news", lambda *_: self.answer(self.news))
        settings = types.SimpleNamespace(region="us-west-2", asg_name="asg")
        sender: Any = types.SimpleNamespace(settings=settings, depth=lambda _: self.answer(self.depth))
        self.watch = send_job.FleetWatch(sender, self.said.append)

    def answer(self, value: Any) -> Any:
        self.looks += 1
        if isinstance(value, Exception):
            raise value
        return value

    def look(self, unfinished: int = 2, after_s: float = send_job.FLEET_LOOK_S) -> list[str]:
        """What is said now."""
        self.now += after_s
        self.said.clear()
        self.watch.look(unfinished)
        return list(self.said)


def test_each_sentence_is_said_once_until_it_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch)
    assert watched.look() == ["On the queue: 2 waiting, 0 running", "1 instance is booting"]
    assert watched.look() == []
    watched.news = None
    assert watched.look() == []
    watched.news = "1 instance is booting"
    assert watched.look() == ["1 instance is booting"]
    watched.depth = QueueDepth(1, 1)
    assert watched.look() == ["On the queue: 1 waiting, 1 running"]


def test_queue_and_group_are_looked_at_rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch)
    watched.look()
    looks = watched.looks
    watched.look(after_s=send_job.FLEET_LOOK_S - 0.1)
    assert watched.looks == looks
    watched.look(after_s=0.1)
    assert watched.looks > looks


def test_nothing_is_said_of_the_group_when_every_job_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch)
    watched.depth = QueueDepth(0, 2)
    assert watched.look() == ["On the queue: 0 waiting, 2 running"]
    assert watched.look(unfinished=3) == ["1 instance is booting"]


def test_a_look_that_fails_is_said_once_and_waiting_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch)
    watched.news = client_error(403, "AccessDenied", "DescribeAutoScalingGroups")
    watched.depth = client_error(403, "AccessDenied", "GetQueueAttributes")
    assert watched.look() == [
        f"The queue cannot be looked at: {watched.depth}",
        f"The group cannot be looked at: {watched.news}",
    ]
    assert watched.look() == []
