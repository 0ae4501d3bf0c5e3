"""send_job.py as a user runs it: what is sent, what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from local_cloud import LocalCloud
from places import ROOT
from sender_tools import bodies, make_group
from workplace import Site, image_workflow

import send_job
from comfy_utils import (
    InvalidWorkflowError,
    is_job_id,
    load_settings,
)


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


def test_it_works_when_copied_elsewhere(make_site: Callable[..., Site], tmp_path: Path) -> None:
    site = make_site()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("send_job.py", "comfy_utils.py", "env"):
        shutil.copy2(site.folder / name, elsewhere)
    shutil.copy2(site.folder / "simple_workflow.json", tmp_path / "mine.json")
    site.folder = elsewhere
    ran = site.run(
        "python",
        "-c",
        "import json, send_job; print(send_job.submit(json.load(open('../mine.json'))), "
        f"send_job.submit_command('true', env='{site.env}'))",
    )
    ids = ran.stdout.split()
    assert all(map(is_job_id, ids)), ran.stderr
    assert {body["job_id"] for body in bodies(site)} == set(ids)
    ran = site.run("python", "send_job.py", "../mine.json")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert len(bodies(site)) == 1


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
    ("arguments", "now"),
    [(["--fleet"], "status"), (["--fleet=pro", "--watch"], "status"), (["--dead", "--env", "pro"], "dead"),
     (["--redrive"], "redrive"), (["--purge-dead", "--yes"], "purge"), (["--report", "x", "--price", "1"], "report")],
)  # fmt: skip
def test_what_the_operator_did_here_is_named(
    arguments: list[str], now: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        send_job.main(arguments)
    assert f"send_job.py: error: {arguments[0]} is now: ./fleet.py {now}\n" in capsys.readouterr().err


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
