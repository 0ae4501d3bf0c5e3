"""comfy_utils.py: settings, messages, scaling, and what is read from ComfyUI's answers."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast

import pytest
from places import CLOUD, ROOT
from workplace import Site, await_that, image_workflow

import comfy_utils
from comfy_utils import (
    InvalidMessageError,
    InvalidWorkflowError,
    Job,
    NothingToRunError,
    QueueDepth,
    SettingsError,
    desired_capacity,
    is_job_id,
    load_settings,
)
from ground.answers import OutputFile, error_of, explain_node_errors, outputs_of, refusal_of
from ground.comfyui import ComfyGoneError, ComfyUI, JobStoppedError, JobTimeoutError, WorkflowRefusedError, _Watch
from ground.messages import parse_message
from ground.savers import CACHE_BREAKER, own_outputs

RECORDINGS = json.loads((CLOUD / "recordings.json").read_text())
MESSAGE_ID = "11111111-2222-3333-4444-555555555555"
JOB_ID = "aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee"
SNS_ID = "99999999-8888-7777-6666-555555555555"
WORKFLOW: dict[str, Any] = {"1": {"class_type": "SaveImage", "inputs": {"filename_prefix": "x"}}}
UI_FORMAT: dict[str, Any] = {
    "last_node_id": 1,
    "nodes": [{"id": 1, "type": "SaveImage"}],
    "links": [],
    "version": 0.4,
}
MINIMAL_ENV = "ACCOUNT_ID=123456789012\nREGION=us-west-2\n"


# --- Settings --------------------------------------------------------------------------------------------


def settings_of(tmp_path: Path, text: str, env: str | None = None, **environ: str) -> comfy_utils.Settings:
    path = tmp_path / "env"
    path.write_text(text)
    return load_settings(env, path, environ)


def test_two_lines_are_enough(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, MINIMAL_ENV)
    assert settings.env == "base"
    assert settings.s3_bucket == "simple-comfy-123456789012-us-west-2-base"
    assert settings.sqs_name == "simple-comfy-base-queue"
    assert settings.asg_name == "simple-comfy-base-asg"
    assert (settings.visibility_timeout_s, settings.max_receives, settings.job_timeout_s) == (120, 3, 3600)


def test_env_example_says_the_defaults(tmp_path: Path) -> None:
    example = (ROOT / "env.example").read_text()
    uncommented = "\n".join(
        line[1:] if line.startswith("#") and line[1:2].isupper() and "=" in line else line
        for line in example.splitlines()
        if not line.startswith(("#COMFY_HOME", "#CALLBACK_URL"))
    )
    assert settings_of(tmp_path, uncommented) == settings_of(tmp_path, MINIMAL_ENV)


def test_bash_reads_the_same_values(tmp_path: Path) -> None:
    text = (ROOT / "env.example").read_text() + 'COMFYUI_ARGS="--cpu --x=${ENV}"\n'
    (tmp_path / "env").write_text(text)
    script = f'source {ROOT}/provision/common.sh; load_env {tmp_path}/env; echo "$S3_BUCKET $SQS_NAME $COMFYUI_ARGS"'
    bash = {"ENV": "pro", "PATH": "/usr/bin:/bin"}
    said = subprocess.run(["bash", "-c", script], env=bash, capture_output=True, text=True, check=True).stdout
    settings = load_settings(None, tmp_path / "env", bash)
    assert said == f"{settings.s3_bucket} {settings.sqs_name} --cpu --x=pro\n"


def test_process_environment_wins_and_names_follow(tmp_path: Path) -> None:
    text = (ROOT / "env.example").read_text()
    assert settings_of(tmp_path, text, ENV="dev").sqs_name == "simple-comfy-dev-queue"
    assert settings_of(tmp_path, text, "pro", ENV="dev").sqs_name == "simple-comfy-pro-queue"
    assert settings_of(tmp_path, text, SQS_NAME="mine").sqs_name == "mine"


def test_the_secret_is_never_shown(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, MINIMAL_ENV + "CALLBACK_SECRET=hush\n")
    assert settings.callback_secret == "hush"
    assert "hush" not in repr(settings)
    with pytest.raises(SettingsError) as error:
        settings_of(tmp_path, MINIMAL_ENV + "CALLBACK_SECRET=hush hush\n")
    assert "hush" not in str(error.value)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("ENV=Pro", "ENV='Pro'"),
        ("ACCOUNT_ID=123", "ACCOUNT_ID='123'"),
        ("REGION=oregon", "REGION='oregon'"),
        ("VISIBILITY_TIMEOUT=soon", "VISIBILITY_TIMEOUT='soon'"),
        ("VISIBILITY_TIMEOUT=43201", "a number from 3 to 43200"),
        ("EXEC_CMD=yes", "base, always or never"),
        ("COMFY_ADDRESS=8188", "HOST:PORT"),
        ("COMFY_ADDRESS=localhost:65536", "HOST:PORT"),
        ("COMFY_ADDRESS=.:8188", "HOST:PORT"),
        ("CALLBACK_URL=ftp://x/", "http(s)"),
        ("BACKLOGSIZE_PER_INSTANCE=0", "a number from 1"),
        ("PREFIX=a b", "malformed"),
        ("PREFIX=$(id)", "malformed"),
        ("PREFIX=$HOME", "malformed"),
        ("PREFIX='x'", "malformed"),
        ("PREFIX=a\nPREFIX=b", "sets PREFIX a second time"),
        ("SQS_NAME=${NOPE}-queue", "${NOPE}, which is not set"),
    ],
)
def test_a_bad_line_is_refused_by_name(tmp_path: Path, line: str, said: str) -> None:
    name = line.partition("=")[0]
    rest = "".join(known + "\n" for known in MINIMAL_ENV.splitlines() if not known.startswith(name))
    with pytest.raises(SettingsError, match=name) as error:
        settings_of(tmp_path, rest + line + "\n")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_bash_refuses_a_second_line_too(tmp_path: Path) -> None:
    (tmp_path / "env").write_text("PREFIX=a\n# PREFIX=c\nPREFIX=b\n")
    script = f"source {ROOT}/provision/common.sh; load_env {tmp_path}/env"
    ran = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert "line 3 sets PREFIX a second time: take one of the lines out" in ran.stderr


def test_a_missing_file_says_what_to_do(tmp_path: Path) -> None:
    for path, environ in ((tmp_path / "env", {}), (None, {"COMFY_SETTINGS": str(tmp_path / "env")})):
        with pytest.raises(SettingsError, match=r"copy env\.example"):
            load_settings(None, path, environ)


WHERE = {"ACCOUNT_ID": "123456789012", "REGION": "us-west-2"}


@pytest.mark.parametrize(
    ("environ", "bucket"),
    [
        (WHERE, "simple-comfy-123456789012-us-west-2-base"),
        (WHERE | {"ENV": "pro", "PREFIX": "x"}, "x-123456789012-us-west-2-pro"),
        (WHERE | {"REGION": "", "AWS_REGION": "eu-west-1"}, "simple-comfy-123456789012-eu-west-1-base"),
        (WHERE | {"AWS_REGION": "eu-west-1"}, "simple-comfy-123456789012-us-west-2-base"),
        ({"ACCOUNT_ID": "123456789012", "AWS_REGION": "eu-west-1", "AWS_DEFAULT_REGION": "us-east-1"},
         "simple-comfy-123456789012-eu-west-1-base"),
        ({"ACCOUNT_ID": "123456789012", "AWS_REGION": "", "AWS_DEFAULT_REGION": "us-east-1"},
         "simple-comfy-123456789012-us-east-1-base"),
        ({"S3_BUCKET": "mine", "AWS_REGION": "eu-west-1"}, "mine"),  # and AWS, which is not there, is not asked
        (WHERE | {"COMFY_SETTINGS": "other", "ENV": "pro"}, "file-pro"),
        ({"COMFY_SETTINGS": "other", "AWS_REGION": "eu-west-1"}, "file-dev"),
    ],
)  # fmt: skip
def test_the_process_environment_alone_is_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], bucket: str
) -> None:
    monkeypatch.setattr(comfy_utils, "HERE", tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "env").mkdir()  # a virtual environment of this name is no settings file
    (tmp_path / "other").write_text("ENV=dev\nS3_BUCKET=file-${ENV}\nREGION=\n")
    settings = load_settings(None, None, environ)
    assert settings.s3_bucket == bucket
    assert settings.region == (environ.get("REGION") or environ.get("AWS_REGION") or environ["AWS_DEFAULT_REGION"])


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({}, ["REGION is not set: set it, or AWS_REGION, in {place} to a region such as us-west-2",
              "ACCOUNT_ID is not set, and AWS cannot be asked without a region: set either in {place}"]),
        ({"ACCOUNT_ID": "123456789012", "MAX_RECEIVES": "x"},
         ["REGION is not set: set it, or AWS_REGION, in {place} to a region such as us-west-2",
          "MAX_RECEIVES='x' cannot be used: set it in {place} to a number from 1 to 1000"]),
        (WHERE | {"ENV": "Pro", "ACCOUNT_ID": "7"},
         ["ENV='Pro' cannot be used: set it in {place} to lowercase letters, digits and hyphens",
          "ACCOUNT_ID='7' cannot be used: set it in {place} to your account's 12 digits"]),
        (WHERE | {"S3_BUCKET": "X", "SQS_NAME": "a b"},
         ["S3_BUCKET='X' cannot be used: set it in {place} to a bucket name of 3 to 63 characters",
          "SQS_NAME='a b' cannot be used: set it in {place} to a queue name of up to 76 letters, digits, - and _"]),
    ],
)  # fmt: skip
def test_all_that_is_missing_or_wrong_is_named_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], said: list[str]
) -> None:
    monkeypatch.setattr(comfy_utils, "HERE", tmp_path)
    place = f"the process environment (or in {tmp_path}/env, or in a file that COMFY_SETTINGS names)"
    with pytest.raises(SettingsError) as error:
        load_settings(None, None, environ)
    assert str(error.value) == "; ".join(said).replace("{place}", place)


# --- Messages --------------------------------------------------------------------------------------------


def in_sns(message: object) -> dict[str, object]:
    """What SNS puts on a queue that is subscribed without raw delivery."""
    about = {"TopicArn": "arn:aws:sns:us-west-2:123456789012:jobs", "Timestamp": "2026-01-01T00:00:00.000Z",
             "MessageAttributes": {"kind": {"Type": "String", "Value": "render"}}}  # fmt: skip
    return {"Type": "Notification", "MessageId": SNS_ID, **about, "Message": json.dumps(message)}


@pytest.mark.parametrize(
    ("body", "job"),
    [
        (WORKFLOW, Job(MESSAGE_ID, workflow=WORKFLOW)),
        ({"exec_cmd": "ls"}, Job(MESSAGE_ID, command="ls")),
        ({"exec_cmd": "ls", "job_id": JOB_ID}, Job(JOB_ID, command="ls")),
        ({"prompt": WORKFLOW}, Job(MESSAGE_ID, workflow=WORKFLOW)),
        ({"exec_cmd": "ls", "retry_of": JOB_ID}, Job(MESSAGE_ID, command="ls", retry_of=JOB_ID)),
        (
            {"prompt": WORKFLOW, "job_id": JOB_ID, "callback_url": "https://x/y"},
            Job(JOB_ID, workflow=WORKFLOW, callback_url="https://x/y"),
        ),
        (
            {"workflow_key": f"input/jobs/{JOB_ID}.json", "job_id": JOB_ID},
            Job(JOB_ID, workflow_key=f"input/jobs/{JOB_ID}.json"),
        ),
        (
            {"prompt": WORKFLOW, "extra_data": {"api_key_comfy_org": "hush"}, "retry_of": JOB_ID},
            Job(MESSAGE_ID, workflow=WORKFLOW, extra_data={"api_key_comfy_org": "hush"}, retry_of=JOB_ID),
        ),
        ({"prompt": WORKFLOW, "extra_data": None}, Job(MESSAGE_ID, workflow=WORKFLOW)),
        ({"prompt": WORKFLOW, "live": True}, Job(MESSAGE_ID, workflow=WORKFLOW, live=True)),
        ({"prompt": WORKFLOW, "live": "when watched"}, Job(MESSAGE_ID, workflow=WORKFLOW, live="when watched")),
        ({"prompt": WORKFLOW, "live": 1}, Job(MESSAGE_ID, workflow=WORKFLOW)),
        # As programs made for ComfyUI send it.
        ({"prompt": WORKFLOW, "client_id": "x", "prompt_id": JOB_ID}, Job(JOB_ID, workflow=WORKFLOW)),
        ({"prompt": {"prompt": WORKFLOW, "client_id": "x"}, "job_id": JOB_ID}, Job(JOB_ID, workflow=WORKFLOW)),
        # Nodes may be called as they like.
        ({"prompt": WORKFLOW["1"], "exec_cmd": WORKFLOW["1"]},
         Job(MESSAGE_ID, workflow={"prompt": WORKFLOW["1"], "exec_cmd": WORKFLOW["1"]})),
        # The envelope's id is what its publisher was told.
        (in_sns(WORKFLOW), Job(SNS_ID, workflow=WORKFLOW)),
        (in_sns({"exec_cmd": "ls", "job_id": JOB_ID}), Job(JOB_ID, command="ls")),
        (in_sns(in_sns({"prompt": WORKFLOW})), Job(SNS_ID, workflow=WORKFLOW)),
        ({"version": "0", "id": SNS_ID, "detail-type": "Render", "source": "shop", "detail": {"prompt": WORKFLOW}},
         Job(SNS_ID, workflow=WORKFLOW)),
        # ComfyUI itself writes it so into pictures.
        ({"1": {**WORKFLOW["1"], "is_changed": [float("nan")]}}, Job(MESSAGE_ID, workflow=WORKFLOW)),
        ({"1": {**WORKFLOW["1"], "is_changed": float("nan")}}, Job(MESSAGE_ID, workflow=WORKFLOW)),
        ({"1": {**WORKFLOW["1"], "is_changed": ["x"]}},
         Job(MESSAGE_ID, workflow={"1": {**WORKFLOW["1"], "is_changed": ["x"]}})),
    ],
)  # fmt: skip
def test_every_shape_of_message_is_understood(body: object, job: Job) -> None:
    assert parse_message(json.dumps(body), MESSAGE_ID) == job
    assert parse_message("\ufeff" + json.dumps(body), MESSAGE_ID) == job


@pytest.mark.parametrize(
    ("more", "warnings"),
    [
        ({"pormpt": 1}, ["unknown key 'pormpt': not used"]),
        ({"\ud800\x1b": 1}, [r"unknown key '\ud800\x1b': not used"]),
        ({"number": 1, "front": True}, ["the key 'number' is not used: jobs run as SQS hands them out",
                                        "the key 'front' is not used: jobs run as SQS hands them out"]),
        ({"partial_execution_targets": ["1"]}, ["the key 'partial_execution_targets' is not used: every output is made; "
                                                "take out the nodes of the others"]),
        ({"workflow": {"nodes": []}}, ["the key 'workflow' is not used: what pictures are to carry goes into extra_data, "
                                       "as extra_pnginfo.workflow"]),
        ({"prompt_id": "x"}, ["prompt_id 'x' is no lowercase UUID: not used"]),
        ({"prompt_id": SNS_ID, "job_id": JOB_ID}, ["the key 'prompt_id' is not used: the job has a job_id, which is "
                                                   "ComfyUI's prompt_id as well"]),
        ({f"k{number}": 1 for number in range(1000)}, [*(f"unknown key 'k{number}': not used" for number in range(10)),
                                                       "990 more unknown keys: not used"]),
    ],
)  # fmt: skip
def test_what_is_not_used_is_said(more: dict[str, object], warnings: list[str]) -> None:
    job = parse_message(json.dumps({"prompt": WORKFLOW, **more}), MESSAGE_ID)
    assert list(job.warnings) == warnings
    assert job.id == more.get("job_id", MESSAGE_ID)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("", "not JSON"),
        ("{", "not JSON (Expecting property name enclosed in double quotes at line 1, column 2)"),
        ("[" * 900_000, "more than 100 levels"),
        ('{"prompt": ' * 101 + "1" + "}" * 101, "more than 100 levels"),
        ('{"1": ' + "9" * 5000 + "}", "a number of more digits than can be read"),
        ('"{}"', "no object: this is a text and no workflow"),
        (json.dumps(json.dumps(WORKFLOW)), "send the object itself, not its text"),
        (
            json.dumps({"prompt": json.dumps(WORKFLOW)}),
            "this is a text that holds the workflow as JSON: send the object",
        ),
        (json.dumps({"input": {"workflow": WORKFLOW, "images": []}}), "stands under input.workflow: send it as"),
        (json.dumps({"workflow": WORKFLOW, "job_id": JOB_ID}), 'stands under workflow: send it as {"prompt"'),
        (
            json.dumps({"workflow": json.dumps(WORKFLOW)}),
            "stands under workflow, as a text that holds JSON: send it as",
        ),
        (json.dumps({"output": WORKFLOW, "workflow": UI_FORMAT}), "stands under output: send it as"),
        (json.dumps({"data": {"workflow": UI_FORMAT}}), "under data.workflow is a workflow saved in UI format"),
        (json.dumps({"prompt": [WORKFLOW]}), "this is no workflow, but a list"),
        (json.dumps({"prompt": 7}), "this is no workflow, but a number"),
        (
            json.dumps({**WORKFLOW, "job_id": JOB_ID}),
            "'job_id' is no node, as it has no class_type: send {\"prompt\"",
        ),
        (json.dumps({**WORKFLOW, "version": 0.4}), "'version' is no node, as it has no class_type: take it out"),
        (json.dumps(in_sns("x")), "this is a text and no workflow"),
        (json.dumps({**in_sns(1), "Message": "{"}), "the Message in SNS's envelope is not JSON"),
        (json.dumps({"detail-type": "x", "source": "aws.autoscaling", "detail": {"x": 1}}), "no API-format workflow"),
        # What Python's JSON reads and nothing can write again.
        (
            '{"3": {"class_type": "K", "inputs": {"cfg": 1e999}}}',
            "node 3 K: its input cfg is inf, which JSON cannot say",
        ),
        ('{"3": {"class_type": "K", "inputs": {"a": [-Infinity]}}}', "node 3 K: its input a is -inf, which JSON"),
        ('{"3": {"class_type": "K", "_meta": {"title": NaN}}}', "node 3 K: its _meta is nan, which JSON cannot say"),
        (
            '{"3": {"class_type": "K", "inputs": {"t": "\\ud83d"}}}',
            "node 3 K: its input t has half a character in it",
        ),
        (
            '{"3": {"class_type": "K", "inputs": {"\\ud83d": 1}}}',
            "node 3 K: its inputs has half a character in a name",
        ),
        ('{"prompt": {"3": {"class_type": "K"}}, "extra_data": {"a": {"b": 1e999}}}', "extra_data: a.b is inf"),
        ('{"prompt": {"3": {"class_type": "K"}}, "extra_data": [1]}', "extra_data is no object"),
        ('{"exec_cmd": "ls", "extra_data": {"a": 1}}', "extra_data stands beside exec_cmd"),
        ('{"exec_cmd": "a\\u0000b"}', "a character that no command can have"),
        ('{"exec_cmd": "a\\ud800b"}', "a character that no command can have"),
        ('{"prompt": {"3": {"class_type": "K"}}, "callback_url": "https://x/\\ud800"}', "is no http(s) address"),
        ('{"\\ud800": {"class_type": "K"}}', "has half a character in it"),
        ("[]", "no object"),
        ("7", "no object"),
        ("{}", "no workflow"),
        ('{"nodes": [], "links": []}', "UI format"),
        ('{"prompt": {"nodes": [], "links": []}}', "UI format"),
        ('{"prompt": null}', "no workflow"),
        ('{"1": {"inputs": {}}}', "no class_type"),
        ('{"1": {"class_type": "X", "inputs": []}}', "the inputs of node '1' are not an object"),
        ('{"exec_cmd": 7}', "not a shell command"),
        ('{"exec_cmd": "ls", "prompt": {}}', "both"),
        (json.dumps({"prompt": WORKFLOW, "job_id": "../../etc"}), "no lowercase UUID"),
        (json.dumps({"prompt": WORKFLOW, "job_id": JOB_ID.upper()}), "no lowercase UUID"),
        (json.dumps({"prompt": WORKFLOW, "job_id": JOB_ID + "\n"}), "no lowercase UUID"),
        (json.dumps({"prompt": WORKFLOW, "callback_url": "file:///etc/passwd"}), "no http"),
        (json.dumps({"workflow_key": "models/x", "job_id": JOB_ID}), "not this job's"),
        *(
            (json.dumps({"prompt": WORKFLOW, "job_id": JOB_ID, "retry_of": value}), "is no other job's id")
            for value in ("x", 7, "", JOB_ID, MESSAGE_ID.replace("1", "A"), ["x"])
        ),
    ],
)
def test_what_is_no_job_is_refused_with_a_reason(body: str, said: str) -> None:
    with pytest.raises(InvalidMessageError) as error:
        parse_message(body, MESSAGE_ID)
    assert said in str(error.value)
    assert len(str(error.value)) < 300


# --- Inputs, and what S3 tells -------------------------------------------------------------------------------

LOADS: dict[str, Any] = {"1": {"class_type": "LoadImage", "inputs": {"image": "photo.png"}}}


@pytest.mark.parametrize("name", ["photo.png", "写真 1 (2).png", "no-ending", "a" * 200])
@pytest.mark.parametrize("address", ["https://x/y.png?z=1", "http://x", "s3://bucket/some key.png"])
def test_inputs_have_a_name_and_an_address(name: str, address: str) -> None:
    job = parse_message(json.dumps({"prompt": LOADS, "inputs": {name: address}}), MESSAGE_ID)
    assert job == Job(MESSAGE_ID, workflow=LOADS, inputs={name: address})


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        (["https://x"], "inputs is no object"),
        ({f"{n}.png": "https://x" for n in range(101)}, "inputs is no object of at most 100"),
        *(
            ({name: "https://x"}, "inputs has the name")
            for name in (
                "",
                ".",
                "..",
                "../x",
                "a/b",
                "a\\b",
                "/x",
                ".hidden",
                "x\n",
                "x\0",
                "\ud800",
                "é" * 101,
                "x [output]",
            )
        ),
        *(
            ({"x": address}, "the input 'x' has no http(s):// or s3://bucket/key address")
            for address in (
                "",
                "x.png",
                "file:///etc/passwd",
                "s3://bucket",
                "s3:///key",
                None,
                7,
                ["https://x"],
                "s3://bucket/\ud800",
                "https://x/\ud800",
            )
        ),
    ],
)
def test_other_inputs_are_refused(inputs: object, said: str) -> None:
    with pytest.raises(InvalidMessageError) as error:
        parse_message(json.dumps({"prompt": LOADS, "job_id": JOB_ID, "inputs": inputs}), MESSAGE_ID)
    assert said in str(error.value)
    assert error.value.job_id == JOB_ID


def test_a_command_has_no_inputs() -> None:
    with pytest.raises(InvalidMessageError, match="for workflows only"):
        parse_message('{"exec_cmd": "ls", "inputs": {"x": "https://x"}}', MESSAGE_ID)


def event(key: object = "input/jobs/x.json", name: str = "ObjectCreated:Put", sequencer: str = "0055AED6") -> Any:
    """S3's message, shortened."""
    file = {"key": key, "size": 1024, "eTag": "d41d8cd98f00b204e9800998ecf8427e", "sequencer": sequencer}
    s3 = {"s3SchemaVersion": "1.0", "bucket": {"name": "b", "arn": "arn:aws:s3:::b"}, "object": file}
    return {"eventVersion": "2.1", "eventName": name, "eventTime": "2026-01-01T00:00:00.000Z", "s3": s3}


def test_a_file_that_came_into_the_bucket_is_a_job_with_the_events_id() -> None:
    first, again, later = (
        parse_message(
            json.dumps({"Records": [event("input/jobs/a+b/%C3%A9%2B1.json", sequencer=number)]}), MESSAGE_ID
        )
        for number in ("1", "1", "2")
    )
    assert first == again
    assert first.workflow_key == "input/jobs/a b/é+1.json"
    assert first.source == "s3://b/input/jobs/a b/é+1.json"
    assert is_job_id(first.id)
    assert first.id not in (later.id, MESSAGE_ID)
    file = {"bucket": {"name": "b"}, "object": {"key": "input/jobs/a b/é+1.json", "sequencer": "1"}}
    told = {"detail-type": "Object Created", "source": "aws.s3", "id": SNS_ID, "detail": file}
    assert parse_message(json.dumps(told), MESSAGE_ID) == first, "by EventBridge, where the key stands as it is"
    by_sns = in_sns({"Records": [event("input/jobs/a+b/%C3%A9%2B1.json", sequencer="1")]})
    assert parse_message(json.dumps(by_sns), MESSAGE_ID) == first


@pytest.mark.parametrize(
    "message",
    [
        {"Service": "Amazon S3", "Event": "s3:TestEvent", "Time": "2026-01-01T00:00:00.000Z", "Bucket": "b"},
        {"Records": []},
        *(
            {"Records": [event(key)]}
            for key in (
                f"input/jobs/{JOB_ID}.json",
                f"input/jobs/{JOB_ID}/1f/data.json",
                f"output/{JOB_ID}/result.json",
                "input/jobs/photo.png",
            )
        ),
        {"Records": [event(name="ObjectRemoved:Delete")]},
        {
            "detail-type": "Object Deleted",
            "source": "aws.s3",
            "detail": {"bucket": {"name": "b"}, "object": {"key": "input/jobs/x.json", "sequencer": "1"}},
        },
    ],
)
def test_messages_that_ask_for_nothing(message: object) -> None:
    with pytest.raises(NothingToRunError):
        parse_message(json.dumps(message), MESSAGE_ID)


@pytest.mark.parametrize(
    ("records", "said"),
    [
        ([event(), event()], "tells of 2 files"),
        (["x"], "no S3 event"),
        ([{"eventName": "ObjectCreated:Put"}], "no S3 event"),
        ([event(key=7)], "no S3 event"),
        ([event(key="\ud800")], "no S3 event"),
    ],
)
def test_what_looks_like_an_event_and_is_none(records: list[Any], said: str) -> None:
    with pytest.raises(InvalidMessageError, match=said):
        parse_message(json.dumps({"Records": records}), MESSAGE_ID)
    with pytest.raises(InvalidMessageError, match="no event of S3"):
        parse_message(json.dumps({"detail-type": [], "source": "aws.s3", "detail": {}}), MESSAGE_ID)


def test_the_sender_of_what_is_no_job_hears_of_it() -> None:
    body = {"prompt": {"nodes": [], "links": []}, "job_id": JOB_ID, "callback_url": "https://x/y"}
    with pytest.raises(InvalidMessageError) as error:
        parse_message(json.dumps(body), MESSAGE_ID)
    assert (error.value.job_id, error.value.callback_url) == (JOB_ID, "https://x/y")
    with pytest.raises(InvalidMessageError) as error:
        parse_message(json.dumps(body | {"job_id": "../x", "callback_url": "file:///x"}), MESSAGE_ID)
    assert (error.value.job_id, error.value.callback_url) == (None, None)
    for told in ({"workflow": WORKFLOW, "job_id": JOB_ID}, {"prompt": 1, "prompt_id": JOB_ID}):
        with pytest.raises(InvalidMessageError) as error:
            parse_message(json.dumps(told), MESSAGE_ID)
        assert error.value.job_id == JOB_ID
    for text in ("{", '{"prompt": 1}'):
        with pytest.raises(InvalidMessageError) as error:
            parse_message(json.dumps({**in_sns(1), "Message": text}), MESSAGE_ID)
        assert error.value.job_id == SNS_ID


def test_outputs_go_to_the_jobs_own_folder() -> None:
    assert own_outputs(WORKFLOW, JOB_ID)["1"]["inputs"]["filename_prefix"] == f"{JOB_ID}/x"
    assert WORKFLOW["1"]["inputs"] == {"filename_prefix": "x"}, "the original is left alone"
    linked = {"1": {"class_type": "SaveImage", "inputs": {"filename_prefix": ["2", 0]}}}
    assert own_outputs(linked, JOB_ID)["1"]["inputs"] == {"filename_prefix": ["2", 0], CACHE_BREAKER: JOB_ID}


def test_only_what_may_show_files_is_made_to_run_again() -> None:
    """What all others made may be served from ComfyUI's cache, such as loaded models."""
    workflow = {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "x"}},
        "2": {"class_type": "Image Save", "inputs": {"images": ["1", 0], "filename_prefix": "x"}},
        "3": {"class_type": "PreviewImage", "inputs": {"images": ["2", 0]}},
        "4": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "x"}},
    }
    owned = own_outputs(workflow, JOB_ID)
    assert [node_id for node_id, node in owned.items() if CACHE_BREAKER in node["inputs"]] == ["2", "3", "4"]
    assert owned["4"]["inputs"]["filename_prefix"] == "x", "beside one that writes where it likes all is left alone"
    del workflow["2"]
    owned = own_outputs(workflow, JOB_ID)
    assert [node_id for node_id, node in owned.items() if CACHE_BREAKER in node["inputs"]] == ["1", "3"]
    assert owned["4"]["inputs"]["filename_prefix"] == f"{JOB_ID}/x"


@pytest.mark.parametrize("prefix", ["../x", "a/../../x", "..", "a\\..\\..\\x"])
def test_a_prefix_cannot_leave_the_jobs_folder(prefix: str) -> None:
    with pytest.raises(InvalidWorkflowError, match="leaves the job's folder"):
        own_outputs({"1": {"class_type": "SaveImage", "inputs": {"filename_prefix": prefix}}}, JOB_ID)


# --- Scaling ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("visible", "in_flight", "long_jobs", "wanted"),
    [
        (0, 0, 0, 0),
        (1, 0, 0, 1),
        (3, 0, 0, 1),
        (4, 0, 0, 2),
        (60, 0, 0, 20),
        (1000, 0, 0, 20),
        (0, 1, 0, 1),
        (0, 9, 0, 1),
        (3, 9, 0, 1),
        (4, 9, 0, 2),
        (3, 9, 1, 2),
        (3, 3, 3, 4),
        (0, 0, 3, 0),
    ],
)
def test_desired_capacity(visible: int, in_flight: int, long_jobs: int, wanted: int) -> None:
    depth = QueueDepth(visible, in_flight)
    for least in (0, 2):
        capacity = desired_capacity(
            depth, backlog_per_instance=3, min_instances=least, max_instances=20, long_jobs=long_jobs
        )
        assert capacity == max(least, wanted)


# --- What ComfyUI said -----------------------------------------------------------------------------------


def entry_of(case: str) -> dict[str, Any]:
    for exchange in RECORDINGS[case]["http"]:
        if exchange.get("request", {}).get("path", "").startswith("/history/") and exchange["body"]:
            entry: dict[str, Any] = next(iter(exchange["body"].values()))
            return entry
    raise LookupError(case)


@pytest.mark.parametrize("case", ["success", "cached", "video", "latent", "batch_animated", "partial_node_errors"])
def test_recorded_successes(case: str) -> None:
    assert error_of(entry_of(case)) is None
    assert outputs_of(entry_of(case))[0]


@pytest.mark.parametrize("case", ["execution_error", "execution_error_after_output"])
def test_recorded_node_errors(case: str) -> None:
    error = error_of(entry_of(case))
    assert error is not None
    assert (error["kind"], error["node_type"]) == ("execution_error", "LoadImage")
    assert error["message"].endswith("cannot identify image file '/home/ubuntu/comfy/ComfyUI/input/broken.png'")


def test_a_recorded_interrupt() -> None:
    assert (error_of(entry_of("interrupted")) or {})["kind"] == "interrupted"


def test_out_of_memory_is_told_from_other_errors() -> None:
    data = {"node_id": "3", "node_type": "KSampler", "exception_type": "torch.OutOfMemoryError"}
    entry = {"status": {"status_str": "error", "messages": [["execution_error", data]]}}
    assert (error_of(entry) or {})["kind"] == "out_of_memory"


def test_an_entry_without_a_status_is_no_success() -> None:
    assert error_of({"outputs": {}}) is not None


def test_only_dicts_with_a_filename_are_files() -> None:
    named = {"filename": "a.png", "subfolder": "", "type": "output"}
    items = [named, True, None, "text", {"filename": None}]
    files, values = outputs_of({"outputs": {"1": {"images": items, "animated": [True]}, "2": {"text": ["hi"]}}})
    assert [file.filename for file in files] == ["a.png"]
    assert values == {"1": {"images": [True, None, "text", {"filename": None}]}, "2": {"text": ["hi"]}}


def test_a_line_is_heard_out_where_pictures_come_over_it() -> None:
    """History may tell of the end before the reading thread has come so far."""
    last_word = {"type": "executing", "data": {"node": None, "prompt_id": JOB_ID}}
    for on_picture, left in ((lambda *_: None, 0), (None, 1)):
        watch = _Watch(JOB_ID, 60, 60, lambda _: None, lambda: False, lambda: False)
        watch.line, watch.on_picture = cast("Any", "a line"), on_picture
        teller = threading.Timer(0.2, lambda events=watch.events: events.put(last_word))
        teller.start()
        watch.hear_out()
        teller.join()
        assert watch.events.qsize() == left


def test_node_errors_become_sentences() -> None:
    refused = RECORDINGS["validation_missing_model"]["http"][0]["body"]["node_errors"]
    assert explain_node_errors(refused) == [
        "node 4 CheckpointLoaderSimple: ckpt_name 'absent.safetensors' is not installed, have: none"
    ]
    refused = RECORDINGS["validation_missing_input_file"]["http"][0]["body"]["node_errors"]
    assert explain_node_errors(refused) == [
        "node 1 LoadImage: Custom validation failed for node image - Invalid image file: nope.png"
    ]


@pytest.mark.parametrize(
    ("declared", "value", "details", "said"),
    [
        ([["area", "lanczos"], {}], "sharp", "", "x is 'sharp', and may be: area, lanczos"),
        (["COMBO", {"multiselect": False, "options": ["8-bit", "16-bit"]}], "9", "", "x is '9', and may be: 8-bit, 16-bit"),
        (None, "eular", "x: 'eular' not in (list of length 44)", "x is 'eular', and may be: 44 others"),
        (None, "a.pth", "x: 'a.pth' not in (list of length 44)", "x 'a.pth' is not installed, have: 44 others"),
        ([[], {"tooltip": "The model."}], "a.pth", "", "x 'a.pth' is not installed, have: none"),
        (["COMBO", {"options": []}], "a.pth", "", "x 'a.pth' is not installed, have: none"),
        (["COMBO", {"options": ["b.pth"]}], "a", "", "x 'a' is not installed, have: b.pth"),
        (["COMBO", {}], "", "", "x '' is not installed, have: none"),
        (["COMBO"], 5, "", "x 5 is not installed, have: none"),
    ],
)  # fmt: skip
def test_an_unknown_choice_is_told_with_what_may_be_chosen(
    declared: Any, value: Any, details: str, said: str
) -> None:
    """As 0.3.64 and 0.33.0 put it."""
    info = {"input_name": "x", "input_config": declared, "received_value": value}
    error = {"type": "value_not_in_list", "message": "Value not in list", "details": details, "extra_info": info}
    assert explain_node_errors({"1": {"class_type": "Y", "errors": [error]}}) == [f"node 1 Y: {said}"]


def test_a_node_that_is_not_installed_is_told_by_its_class() -> None:
    recorded = RECORDINGS["validation_unknown_node"]["http"][0]
    said = [refusal_of(recorded[body])["message"] for body in ("body", "body since 0.12")]
    assert said == [
        "Cannot execute because node NoSuchNode does not exist. Node ID '#1'",
        "Node 'NoSuchNode' not found. The custom node may not be installed. Node ID '#1'",
    ]
    titled = json.loads(json.dumps(recorded["body since 0.12"]).replace("Node 'NoSuchNode'", "Node 'Mine'"))
    assert refusal_of(titled)["message"] == (
        "Node 'Mine' not found. The custom node may not be installed. Node ID '#1': it is a NoSuchNode"
    )


def test_a_link_to_nowhere_is_told() -> None:
    info = {"input_name": "source", "exception_message": "'77'", "exception_type": "KeyError"}
    error = {
        "type": "exception_during_inner_validation",
        "message": "Exception when validating inner node",
        "details": "'77'",
        "extra_info": info,
    }
    assert explain_node_errors({"1": {"class_type": "Y", "errors": [error]}}) == [
        "node 1 Y: there is no '77': is it linked to a node that is not there?"
    ]


# --- The ComfyUI client, against the stand-in ------------------------------------------------------------


@pytest.fixture(scope="module")
def comfy(busy_site: Site) -> ComfyUI:
    return ComfyUI(f"127.0.0.1:{busy_site.port}")


def test_a_workflow_is_run_and_its_progress_told(comfy: ComfyUI) -> None:
    workflow = json.loads((ROOT / "simple_workflow.json").read_text())
    events: list[dict[str, Any]] = []
    finished = comfy.run(own_outputs(workflow, JOB_ID), JOB_ID, timeout_s=60, on_progress=events.append)
    assert error_of(finished.entry) is None
    assert any(event["type"] == "progress" and event["data"]["max"] == 20 for event in events)


def test_a_finished_job_is_adopted_not_run_again(comfy: ComfyUI, busy_site: Site) -> None:
    job_id = comfy_utils.new_job_id()
    for _ in range(2):
        finished = comfy.run(image_workflow(), job_id, timeout_s=60)
        assert error_of(finished.entry) is None
    assert busy_site.runs(job_id) == 1


def test_a_running_job_is_adopted(comfy: ComfyUI, busy_site: Site) -> None:
    job_id = comfy_utils.new_job_id()
    first = threading.Thread(target=comfy.run, args=(image_workflow(2), job_id), kwargs={"timeout_s": 60})
    first.start()
    await_that("the job is queued", lambda: comfy.place(job_id))
    finished = ComfyUI(comfy.address).run(image_workflow(2), job_id, timeout_s=60)
    first.join()
    assert error_of(finished.entry) is None
    assert busy_site.runs(job_id) == 1


def test_a_refusal_carries_the_reason(comfy: ComfyUI) -> None:
    workflow = image_workflow() | {"4": {"class_type": "NoSuchNode", "inputs": {}}}
    with pytest.raises(WorkflowRefusedError, match="NoSuchNode") as refused:
        comfy.run(workflow, comfy_utils.new_job_id(), timeout_s=60)
    assert refused.value.error["kind"] == "invalid_workflow"


@pytest.mark.parametrize("how", ["stop", "timeout"])
def test_a_stopped_job_does_not_go_on(comfy: ComfyUI, busy_site: Site, how: str) -> None:
    job_id = comfy_utils.new_job_id()
    arguments: dict[str, Any] = (
        {"timeout_s": 0.5} if how == "timeout" else {"timeout_s": 60, "should_stop": lambda: True}
    )
    with pytest.raises((JobStoppedError, JobTimeoutError)):
        comfy.run(image_workflow(60), job_id, **arguments)
    await_that("the job has left the queue", lambda: comfy.place(job_id) is None)
    assert busy_site.runs(job_id, "success") == 0


# --- Odd answers, and calls that cannot be made --------------------------------------------------------------


@pytest.fixture(scope="module")
def odd() -> Iterator[tuple[ComfyUI, dict[str, tuple[int, str]]]]:
    """A server that answers each path with what is set for it."""
    answers: dict[str, tuple[int, str]] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, text = answers.get(self.path.partition("?")[0], (404, ""))
            self.send_response(status)
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        def do_POST(self) -> None:
            self.do_GET()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield ComfyUI(f"127.0.0.1:{server.server_port}"), answers
    server.shutdown()


@pytest.mark.parametrize("text", ["", "<html>", "[]", "null", "7", '"x"', "[" * 5000])
@pytest.mark.parametrize(
    "call",
    [
        lambda comfy: comfy._submit(WORKFLOW, JOB_ID, "x", None),
        lambda comfy: comfy.place(JOB_ID),
        lambda comfy: comfy.history(JOB_ID),
        lambda comfy: comfy.object_info(),
    ],
    ids=["submit", "place", "history", "object_info"],
)
def test_an_odd_answer_is_the_servers_fault(
    odd: tuple[ComfyUI, dict[str, tuple[int, str]]], call: Callable[[ComfyUI], object], text: str
) -> None:
    comfy, answers = odd
    answers |= dict.fromkeys(("/prompt", "/queue", f"/history/{JOB_ID}", "/object_info"), (200, text))
    with pytest.raises(ComfyGoneError, match=f"^ComfyUI on {comfy.address} "):
        call(comfy)
    answers |= {"/prompt": (200, "{}"), "/queue": (200, "{}")}
    with pytest.raises(ComfyGoneError, match="another id than"):
        comfy._submit(WORKFLOW, JOB_ID, "x", None)
    with pytest.raises(ComfyGoneError, match="does not say what is in its queue"):
        comfy.place(JOB_ID)
    answers["/queue"] = (
        200,
        json.dumps({"queue_running": [None, 7, [], [1, [JOB_ID]]], "queue_pending": [[0, JOB_ID]]}),
    )
    assert comfy.place(JOB_ID) == "pending"


@pytest.mark.parametrize(
    ("status", "text", "said"),
    [
        (400, "{}", "ComfyUI refused this workflow and gave no reason"),
        (400, '{"error": "no", "node_errors": []}', "no"),
        (400, '{"error": ["no"], "node_errors": {"1": 7, "2": {"errors": {}}}}', "['no']"),
        (400, json.dumps({"error": {"message": "no", "details": {"a": 1}, "type": 7}, "node_errors": None}), "no {'a': 1}"),
        (400, json.dumps({"node_errors": {"1": {"errors": [7, {"type": "value_not_in_list", "extra_info": "x"}]}}}),
         "node 1 None: "),
        (400, json.dumps({"node_errors": {"1": {"class_type": "X", "errors": [
            {"type": "value_not_in_list", "extra_info": {"input_name": "a", "input_config": {"0": 1}}}]}}}), "node 1 X: a"),
        (400, "<html>Bad Request</html>", "ComfyUI answered HTTP 400 to this workflow"),
        (413, "too large", "ComfyUI answered HTTP 413 to this workflow"),
        (500, "", "ComfyUI answered HTTP 500 to this workflow"),
    ],
)  # fmt: skip
def test_a_refusal_in_any_words_is_final(
    odd: tuple[ComfyUI, dict[str, tuple[int, str]]], status: int, text: str, said: str
) -> None:
    comfy, answers = odd
    answers["/prompt"] = status, text
    with pytest.raises(WorkflowRefusedError) as refused:
        comfy._submit(WORKFLOW, JOB_ID, "x", None)
    assert refused.value.error["message"].startswith(said)
    assert refused.value.error["kind"] == "invalid_workflow"


def test_an_odd_history_is_read_as_far_as_it_goes(odd: tuple[ComfyUI, dict[str, tuple[int, str]]]) -> None:
    comfy, answers = odd
    for odd_value in (
        "null",
        "7",
        '"x"',
        "[]",
        "{}",
        "[null]",
        '{"messages": [null, [], ["a"], [1, {}], ["execution_error", 7]]}',
    ):
        entry = {name: json.loads(odd_value) for name in ("prompt", "outputs", "status")}
        answers[f"/history/{JOB_ID}"] = 200, json.dumps({JOB_ID: entry})
        found = comfy.history(JOB_ID)
        assert found is not None
        assert found["prompt"][0] in (None, "x")
        assert outputs_of(found)[0] == []
        assert error_of(found) is not None
    data = {"node_id": 7, "node_type": None, "exception_type": ["x"], "traceback": 7, "timestamp": 10**30}
    status = {"status_str": "error", "messages": [["execution_error", data]]}
    answers[f"/history/{JOB_ID}"] = 200, json.dumps({JOB_ID: {"status": status}})
    error = error_of(comfy.history(JOB_ID) or {})
    assert error is not None
    assert (error["message"], error["node_id"], error["detail"]) == ("node 7 None: ['x']", "7", "['x']\n")


@pytest.mark.parametrize(
    "value", [float("inf"), "\ud800", {1, 2}, 10**5000], ids=["inf", "half a character", "a set", "long"]
)
def test_what_cannot_be_sent_is_never_the_servers_fault(
    odd: tuple[ComfyUI, dict[str, tuple[int, str]]], value: object
) -> None:
    workflow: Any = {"1": {"class_type": "X", "inputs": {"a": value}}}
    if value == "\ud800":  # JSON writes it as it came, and a file could not be asked for
        file = OutputFile("1", "images", str(value), "", "output")
        with pytest.raises(ComfyGoneError, match="names a file that nobody can ask for"):
            odd[0].download(file, Path("never"))
        return
    with pytest.raises(InvalidWorkflowError, match="cannot be written as JSON"):
        odd[0]._submit(workflow, JOB_ID, "x", None)


# --- Imports ---------------------------------------------------------------------------------------------


def test_importing_brings_no_aws() -> None:
    code = "import sys, send_job; print([m for m in ('boto3', 'requests', 'websocket') if m in sys.modules])"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert said == "[]\n"
