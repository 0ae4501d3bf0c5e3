"""comfy_utils.py: settings, messages, scaling, and what is read from ComfyUI's answers."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from places import CLOUD, ROOT
from workplace import Site, await_that, image_workflow

import comfy_utils
from comfy_utils import (
    ComfyUI,
    InvalidMessageError,
    InvalidWorkflowError,
    Job,
    JobStoppedError,
    JobTimeoutError,
    NothingToRunError,
    QueueDepth,
    SettingsError,
    WorkflowRefusedError,
    desired_capacity,
    error_of,
    explain_node_errors,
    is_job_id,
    load_settings,
    outputs_of,
    own_outputs,
    parse_message,
)

RECORDINGS = json.loads((CLOUD / "recordings.json").read_text())
MESSAGE_ID = "11111111-2222-3333-4444-555555555555"
JOB_ID = "aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee"
WORKFLOW = {"1": {"class_type": "SaveImage", "inputs": {"filename_prefix": "x"}}}
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
    with pytest.raises(SettingsError, match=r"copy env\.example"):
        load_settings(None, tmp_path / "env", {})


# --- Messages --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "job"),
    [
        (WORKFLOW, Job(MESSAGE_ID, workflow=WORKFLOW)),
        ({"exec_cmd": "ls"}, Job(MESSAGE_ID, command="ls")),
        ({"exec_cmd": "ls", "job_id": JOB_ID}, Job(JOB_ID, command="ls")),
        ({"prompt": WORKFLOW}, Job(MESSAGE_ID, workflow=WORKFLOW)),
        (
            {"prompt": WORKFLOW, "job_id": JOB_ID, "callback_url": "https://x/y"},
            Job(JOB_ID, workflow=WORKFLOW, callback_url="https://x/y"),
        ),
        (
            {"workflow_key": f"input/jobs/{JOB_ID}.json", "job_id": JOB_ID},
            Job(JOB_ID, workflow_key=f"input/jobs/{JOB_ID}.json"),
        ),
    ],
)
def test_every_shape_of_message_is_understood(body: object, job: Job) -> None:
    assert parse_message(json.dumps(body), MESSAGE_ID) == job


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[" * 900_000, "not JSON"),
        ("[]", "no object"),
        ("7", "no object"),
        ("{}", "no workflow"),
        ('{"nodes": [], "links": []}', "UI format"),
        ('{"prompt": {"nodes": [], "links": []}}', "UI format"),
        ('{"prompt": null}', "no workflow"),
        ('{"1": {"inputs": {}}}', "no class_type"),
        ('{"1": {"class_type": "X", "inputs": []}}', "not an object"),
        ('{"exec_cmd": 7}', "not a shell command"),
        ('{"exec_cmd": "ls", "prompt": {}}', "both"),
        (json.dumps({"prompt": WORKFLOW, "job_id": "../../etc"}), "no lowercase UUID"),
        (json.dumps({"prompt": WORKFLOW, "job_id": JOB_ID.upper()}), "no lowercase UUID"),
        (json.dumps({"prompt": WORKFLOW, "job_id": JOB_ID + "\n"}), "no lowercase UUID"),
        (json.dumps({"prompt": WORKFLOW, "callback_url": "file:///etc/passwd"}), "no http"),
        (json.dumps({"workflow_key": "models/x", "job_id": JOB_ID}), "not this job's"),
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
            for address in ("", "x.png", "file:///etc/passwd", "s3://bucket", "s3:///key", None, 7, ["https://x"])
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


def test_the_sender_of_what_is_no_job_hears_of_it() -> None:
    body = {"prompt": {"nodes": [], "links": []}, "job_id": JOB_ID, "callback_url": "https://x/y"}
    with pytest.raises(InvalidMessageError) as error:
        parse_message(json.dumps(body), MESSAGE_ID)
    assert (error.value.job_id, error.value.callback_url) == (JOB_ID, "https://x/y")
    with pytest.raises(InvalidMessageError) as error:
        parse_message(json.dumps(body | {"job_id": "../x", "callback_url": "file:///x"}), MESSAGE_ID)
    assert (error.value.job_id, error.value.callback_url) == (None, None)


def test_outputs_go_to_the_jobs_own_folder() -> None:
    assert own_outputs(WORKFLOW, JOB_ID)["1"]["inputs"]["filename_prefix"] == f"{JOB_ID}/x"
    assert WORKFLOW["1"]["inputs"] == {"filename_prefix": "x"}, "the original is left alone"
    linked = {"1": {"class_type": "SaveImage", "inputs": {"filename_prefix": ["2", 0]}}}
    assert own_outputs(linked, JOB_ID) == linked


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


def test_node_errors_become_sentences() -> None:
    refused = RECORDINGS["validation_missing_model"]["http"][0]["body"]["node_errors"]
    assert explain_node_errors(refused) == [
        "node 4 CheckpointLoaderSimple: ckpt_name 'absent.safetensors' is not installed, have: none"
    ]
    refused = RECORDINGS["validation_missing_input_file"]["http"][0]["body"]["node_errors"]
    assert explain_node_errors(refused) == [
        "node 1 LoadImage: Custom validation failed for node image - Invalid image file: nope.png"
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


# --- Imports ---------------------------------------------------------------------------------------------


def test_importing_brings_no_aws() -> None:
    code = "import sys, send_job; print([m for m in ('boto3', 'requests', 'websocket') if m in sys.modules])"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert said == "[]\n"
