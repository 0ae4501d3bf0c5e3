"""send_job.py as a user runs it: what is sent, what is refused."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from local_cloud import LocalCloud
from places import ROOT
from sender_tools import bodies, make_group, store, store_progress
from workplace import Site, image_workflow

import comfy_utils
import send_job
from comfy_utils import (
    InvalidMessageError,
    InvalidWorkflowError,
    is_job_id,
    load_settings,
    new_job_id,
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


def test_extra_data_goes_beside_the_workflow(
    sender_site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site, workflow = sender_site, image_workflow()
    extra_data = {"api_key_comfy_org": "hush-hush", "extra_pnginfo": {"workflow": {"nodes": []}}}
    (tmp_path / "extra.json").write_text(json.dumps(extra_data))
    # As ComfyUI's editor sends it, and saved by a shell that begins files with a mark.
    beside = {"client_id": "x", "number": 1, "extra_data": {"api_key_comfy_org": "other", "more": 1}}
    (tmp_path / "mine.json").write_text(json.dumps({"prompt": workflow, **beside}), encoding="utf-8-sig")
    command = [str(tmp_path / "mine.json"), "--extra-data", str(tmp_path / "extra.json")]
    assert send_job.main(command) == 0
    (body,) = bodies(site)
    assert (body["prompt"], body["extra_data"]) == (workflow, {"more": 1} | extra_data)
    said = capsys.readouterr()
    assert said.err == f"send_job.py: {tmp_path}/mine.json: only prompt and extra_data are sent, and not number\n"
    assert send_job.main([*command, "--count", "2"]) == 0
    assert [body["extra_data"] for body in bodies(site)] == [{"more": 1} | extra_data] * 2
    send_job.submit(workflow, extra_data=extra_data)
    send_job.submit_many([workflow] * 2, extra_data=extra_data)
    assert [body["extra_data"] for body in bodies(site)] == [extra_data] * 3
    send_job.submit(workflow, extra_data={})
    assert "extra_data" not in bodies(site)[0]
    assert "hush" not in said.out + capsys.readouterr().out


def test_what_is_too_large_goes_by_the_bucket_but_for_secrets(sender_site: Site) -> None:
    large, workflow = "x" * 600_000, image_workflow()
    large_workflow = image_workflow(more={"9": {"class_type": "PreviewAny", "inputs": {"source": large}}})
    key, drawn = {"api_key_comfy_org": "hush-hush"}, {"workflow": {"nodes": [large]}}
    first = send_job.submit(large_workflow, extra_data=key | {"extra_pnginfo": drawn})
    (body,) = bodies(sender_site)
    place = f"input/jobs/{first}.json"
    assert body == {"workflow_key": place, "extra_data": key | {"extra_pnginfo": drawn}, "job_id": first}
    assert stored_at(sender_site, place) == large_workflow, "the message has room for the rest"
    drawn["workflow"]["nodes"] *= 2
    second = send_job.submit(workflow, extra_data=key | {"extra_pnginfo": drawn})
    (body,) = bodies(sender_site)
    place = f"input/jobs/{second}.json"
    assert body == {"workflow_key": place, "extra_data": key, "job_id": second}
    assert stored_at(sender_site, place) == {"prompt": workflow, "extra_data": {"extra_pnginfo": drawn}}
    with pytest.raises(InvalidMessageError, match="only the workflow and extra_pnginfo of extra_data may be larger"):
        send_job.submit(workflow, extra_data={"other": large * 2})
    assert bodies(sender_site) == []


def stored_at(site: Site, key: str) -> Any:
    return json.loads(site.s3.get_object(Bucket=site.bucket, Key=key)["Body"].read())


def deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("value", "said"),
    [(float("nan"), "its input a is nan"), ("\ud800", "its input a has half a character"), (deep(5000), "more than 100"),
     ({1}, "the job cannot be written as JSON (Object of type set is not"), (10**5000, "the job cannot be written as JSON")],
    ids=["nan", "half a character", "deep", "a set", "long"],
)  # fmt: skip
def test_what_no_message_can_say_is_refused_before_it_is_sent(sender_site: Site, value: object, said: str) -> None:
    workflow: Any = {"1": {"class_type": "X", "inputs": {"a": value}}}
    with pytest.raises(InvalidMessageError) as refused:
        send_job.submit(workflow)
    assert said in str(refused.value)
    with pytest.raises(InvalidMessageError):
        send_job.submit(image_workflow(), extra_data={"a": value})
    assert sender_site.depth() == (0, 0)


# --- Words from outside --------------------------------------------------------------------------------------

BAD_WORDS = "\x1b[31mred\x1b[0m\x1b]0;title\x07 two\nlines\r\u202etxt.exe " + "x" * 100_000


def test_words_from_outside_are_one_line_that_a_terminal_only_shows(
    sender_site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    """The receipt stays as it is, and --json prints all of it, in ASCII."""
    job_id, other = new_job_id(), new_job_id()
    error = {"kind": "execution_error", "message": BAD_WORDS, "node_id": "1"}
    store(sender_site, job_id, status="failed", error=error)
    store_progress(sender_site, other, node_title=BAD_WORDS, value=3)
    shown = "red two lines  txt.exe xxx"
    for command in (["--status", job_id], ["--wait", "--status", job_id], ["--status", other]):
        send_job.main(command)
        said = capsys.readouterr()
        (line,) = [line for line in said.out.splitlines() if shown in line]
        assert line.isprintable()
        assert line.endswith(" more characters)")
        assert len(line) < 1100
    send_job.main(["--status", job_id, "--json"])
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["result"]["error"] == error
    assert line.isascii()
    with pytest.raises(send_job.JobFailed) as failed:
        send_job.wait(job_id)
    assert shown in str(failed.value)
    assert str(failed.value).isprintable()
    assert failed.value.error["message"] == BAD_WORDS


def test_a_terminal_that_cannot_write_a_letter_gets_another(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr("sys.stdout", out)
    comfy_utils.say("K采样器 é")
    out.seek(0)
    assert out.read() == "K??? é\n"


@pytest.mark.parametrize(
    ("words", "shown"),
    [("", ""), ("a  b", "a  b"), ("日本 🦊 é", "日本 🦊 é"), ("a\tb\u2028c\x00d", "a b c d"), ("\x9b31mred", "red"),
     ("\x1b[38;5;1mred", "red"), ("\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\", "link"), ("\x1bPq#\x1b\\x", "x"),
     ("\x1b", " "), ("\ud800", " "), ("x" * 1000, "x" * 1000), ("x" * 1001, "x" * 1000 + " … (1 more characters)")],
)  # fmt: skip
def test_what_is_left_of_words(words: str, shown: str) -> None:
    assert comfy_utils.printable(words) == shown


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
        "import json, send_job; mine = json.load(open('../mine.json'))\n"
        "print(send_job.submit(mine), *send_job.submit_many([mine]), "
        f"send_job.submit_command('true', env='{site.env}'))",
    )
    ids = ran.stdout.split()
    assert len(ids) == 3, ran.stderr
    assert all(map(is_job_id, ids))
    assert {body["job_id"] for body in bodies(site)} == set(ids)
    unchecked = "workflows are sent unchecked: the folder sender/ is not beside send_job.py, copy it there, too"
    assert (ran.stderr.count(unchecked), ran.stderr.count("Warning")) == (1, 1)
    (elsewhere / "sender").mkdir()  # a package of the same name that is somebody else's
    (elsewhere / "sender" / "__init__.py").touch()
    ran = site.run("python", "send_job.py", "../mine.json")
    assert (ran.returncode, ran.stderr) == (0, f"send_job.py: {unchecked}\n")
    ran = site.run("python", "send_job.py", "../mine.json", "--no-check")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert len(bodies(site)) == 2
    ran = site.run("python", "send_job.py", "--exec-cmd", "true", "--wait", "--timeout", "0.1")
    assert (ran.returncode, ran.stdout.splitlines()[-1]) == (3, "0 of 1 job done"), ran.stderr
    ran = site.run("python", "send_job.py", "../mine.json", "--check")
    assert (ran.returncode, ran.stderr) == (
        2, "send_job.py: --check needs the folder sender/ beside send_job.py: copy it there, too\n"
    )  # fmt: skip
    ran = site.run("python", "send_job.py", "../mine.json", "--direct", "127.0.0.1:9")
    assert (ran.returncode, ran.stderr) == (
        2, "send_job.py: --direct needs the folders sender/ and ground/ beside send_job.py: copy them there, too\n"
    )  # fmt: skip


# --- Bad input: one sentence, nothing sent ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["missing.json"], 2, "cannot read the workflow missing.json: No such file or directory"),
        (["text.json"], 2, "text.json is not JSON"),
        (["list.json"], 2, "list.json: this is no workflow, but a list: export it with Export (API), which older"),
        (
            ["ui.json"],
            2,
            "ui.json: this workflow is saved in UI format, which has nodes and links: export it with Export",
        ),
        (
            ["runpod.json"],
            2,
            'runpod.json: the workflow stands under input.workflow: send it as {"prompt": the workflow}',
        ),
        (["--set", "3.cfg=1e999"], 2, "node 3 KSampler: its input cfg is inf, which JSON cannot say: give a finite"),
        (["--extra-data", "missing.json"], 2, "cannot read the extra data missing.json: No such file or directory"),
        (["--extra-data", "list.json"], 2, "list.json: extra_data is no object"),
        (["--extra-data", "odd.json"], 2, "odd.json: extra_data: key.0 is inf, which JSON cannot say"),
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
    (site.folder / "runpod.json").write_text('{"input": {"workflow": {"1": {"class_type": "X"}}}}')
    (site.folder / "odd.json").write_text('{"key": [1e999]}')
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
     ["--direct", "x:1", "--set", "1.image=@x"], ["--direct", "http://x:1"], ["--direct", "x:65536"],
     ["--extra-data", "x.json", "--exec-cmd", "ls"], ["--extra-data", "x.json", "--check"], ["--status", "x"], ["--exec-cmd", "ls", "--status", "0f8fad5b-d9cb-469f-a165-70867728950e"]],
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
