"""parse_job.py: real worker processes against moto and the ComfyUI stand-in."""

from __future__ import annotations

import gzip
import hashlib
import hmac
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import requests
from local_cloud import Fault, LocalCloud, Machine
from places import ROOT
from workplace import LIMIT_S, Site, await_that, group_of, image_workflow

import parse_job
from comfy_utils import InvalidWorkflowError, JobStoppedError, Metadata, load_settings, new_job_id

NO_RESULT_YET = None


# --- What becomes of a message ---------------------------------------------------------------------------


def test_a_raw_workflow_as_the_originals_users_send_it(busy_site: Site) -> None:
    body = (ROOT / "simple_workflow.json").read_text()
    sent = busy_site.run("aws", "sqs", "send-message", "--queue-url", busy_site.queue_url, "--message-body", body)
    job_id = json.loads(sent.stdout)["MessageId"]
    result = busy_site.await_result(job_id)
    assert result["status"] == "succeeded"
    assert result["error"] is None
    assert (result["job_id"], result["env"], result["attempt"]) == (job_id, busy_site.env, 1)
    (output,) = result["outputs"]
    assert output == {
        "node_id": "9",
        "kind": "images",
        "filename": "ComfyUI_00001_.png",
        "subfolder": job_id,
        "type": "output",
        "s3_key": f"output/{job_id}/ComfyUI_00001_.png",
    }
    image = busy_site.s3.get_object(Bucket=busy_site.bucket, Key=output["s3_key"])
    assert image["ContentType"] == "image/png"
    assert image["Body"].read().startswith(b"\x89PNG")
    timings = result["timings"]
    assert timings["sent_at"] <= timings["started_at"] <= timings["finished_at"]
    assert timings["wait_s"] >= 0
    assert timings["run_s"] > 0
    busy_site.await_empty_queue()
    await_that("the local copy is gone", lambda: not (busy_site.folder / "job-output" / job_id).exists())


def test_a_job_with_an_id_and_every_kind_of_output(busy_site: Site) -> None:
    job_id = new_job_id()
    more = {
        "4": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
        "5": {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}},
        "6": {"class_type": "CreateVideo", "inputs": {"images": ["1", 0], "fps": 8.0}},
        "7": {
            "class_type": "SaveVideo",
            "inputs": {"video": ["6", 0], "filename_prefix": "video/x", "format": "auto", "codec": "auto"},
        },
    }
    busy_site.send({"prompt": image_workflow(more=more), "job_id": job_id})
    result = busy_site.await_result(job_id)
    assert result["status"] == "succeeded"
    keys = {output["node_id"]: output["s3_key"] for output in result["outputs"]}
    assert keys["3"] == f"output/{job_id}/x_00001_.png"
    assert keys["4"].startswith(f"output/{job_id}/temp/ComfyUI_temp_")
    assert keys["7"] == f"output/{job_id}/video/x_00001_.mp4"
    assert list(result["values"]) == ["5"]
    assert set(busy_site.keys(f"output/{job_id}/")) == {*keys.values(), f"output/{job_id}/result.json"}


def test_a_node_error_is_final_at_the_first_try(busy_site: Site) -> None:
    more = {
        "4": {"class_type": "LoadImage", "inputs": {"image": "broken.png"}},
        "5": {"class_type": "SaveImage", "inputs": {"images": ["4", 0], "filename_prefix": "y"}},
    }
    job_id = busy_site.send(image_workflow(more=more))
    result = busy_site.await_result(job_id)
    assert result["status"] == "failed"
    assert (result["error"]["kind"], result["error"]["node_id"]) == ("execution_error", "4")
    assert "cannot identify image file" in result["error"]["message"]
    assert "UnidentifiedImageError" in result["error"]["detail"]
    busy_site.await_empty_queue()
    assert busy_site.runs(job_id) == 1


def test_a_refused_workflow_says_what_is_missing(busy_site: Site) -> None:
    workflow = json.loads((ROOT / "simple_workflow.json").read_text())
    workflow["4"]["inputs"]["ckpt_name"] = "absent.safetensors"
    result = busy_site.await_result(busy_site.send(workflow))
    assert result["error"]["kind"] == "invalid_workflow"
    assert result["error"]["message"] == (
        "node 4 CheckpointLoaderSimple: ckpt_name 'absent.safetensors' is not installed, "
        "have: v1-5-pruned-emaonly-fp16.safetensors"
    )


def test_a_dropped_branch_is_a_warning(busy_site: Site) -> None:
    more = {
        "4": {"class_type": "LoadImage", "inputs": {"image": "nope.png"}},
        "5": {"class_type": "SaveImage", "inputs": {"images": ["4", 0], "filename_prefix": "y"}},
    }
    result = busy_site.await_result(busy_site.send(image_workflow(more=more)))
    assert result["status"] == "succeeded"
    assert len(result["outputs"]) == 1
    (warning,) = result["warnings"]
    assert "node 4 LoadImage" in warning
    assert "nope.png" in warning


@pytest.mark.parametrize(
    "body",
    [
        "not json",
        "[]",
        "7",
        "[" * 50_000,
        '{"nodes": [], "links": []}',
        '{"prompt": {"1": {"class_type": "X", "inputs": {}}}, "job_id": "../../x"}',
    ],
)
def test_what_is_no_job_fails_under_its_message_id(busy_site: Site, body: str) -> None:
    result = busy_site.await_result(busy_site.send(body))
    assert (result["status"], result["error"]["kind"]) == ("failed", "invalid_message")
    busy_site.await_empty_queue()


def test_a_malformed_message_with_a_good_id_fails_under_that(busy_site: Site) -> None:
    job_id = new_job_id()
    busy_site.send({"prompt": {"nodes": [], "links": []}, "job_id": job_id})
    assert busy_site.await_result(job_id)["error"]["kind"] == "invalid_message"


def test_a_prefix_that_climbs_is_refused(busy_site: Site) -> None:
    workflow = image_workflow()
    workflow["3"]["inputs"]["filename_prefix"] = "../../../x"
    result = busy_site.await_result(busy_site.send(workflow))
    assert result["error"]["kind"] == "invalid_workflow"


def test_a_workflow_too_large_for_a_message_comes_from_the_bucket(busy_site: Site) -> None:
    job_id = new_job_id()
    key = f"input/jobs/{job_id}.json"
    busy_site.s3.put_object(Bucket=busy_site.bucket, Key=key, Body=json.dumps(image_workflow()).encode())
    busy_site.send({"workflow_key": key, "job_id": job_id})
    assert busy_site.await_result(job_id)["status"] == "succeeded"


def test_a_workflow_that_is_not_in_the_bucket_fails(busy_site: Site) -> None:
    job_id = new_job_id()
    busy_site.send({"workflow_key": f"input/jobs/{job_id}.json", "job_id": job_id})
    assert busy_site.await_result(job_id)["error"]["kind"] == "invalid_workflow"


def test_out_of_memory_is_tried_again_on_freed_memory(busy_site: Site) -> None:
    more = {
        "4": {"class_type": "StandinOutOfMemory", "inputs": {"image": ["1", 0], "times": 1}},
        "5": {"class_type": "SaveImage", "inputs": {"images": ["4", 0], "filename_prefix": "y"}},
    }
    job_id = busy_site.send(image_workflow(more=more))
    result = busy_site.await_result(job_id)
    assert (result["status"], result["attempt"]) == ("succeeded", 1)
    assert busy_site.runs(job_id) == 2


def test_a_job_that_has_its_result_is_not_run_again(busy_site: Site) -> None:
    job_id = new_job_id()
    for _ in range(2):
        busy_site.send({"prompt": image_workflow(), "job_id": job_id})
    first = busy_site.await_result(job_id)
    busy_site.await_empty_queue()
    assert busy_site.result(job_id) == first
    assert busy_site.runs(job_id) == 1


def test_a_job_that_finished_on_another_instance_is_not_run_here(busy_site: Site) -> None:
    job_id = new_job_id()
    receipt = {"job_id": job_id, "status": "succeeded", "error": None}
    key = f"output/{job_id}/result.json"
    busy_site.s3.put_object(Bucket=busy_site.bucket, Key=key, Body=json.dumps(receipt).encode())
    busy_site.send({"prompt": image_workflow(), "job_id": job_id})
    busy_site.await_empty_queue()
    assert busy_site.runs(job_id) == 0
    assert busy_site.result(job_id) == receipt


def test_commands_are_refused_on_the_fleet(busy_site: Site) -> None:
    result = busy_site.await_result(busy_site.send({"exec_cmd": f"touch {busy_site.folder}/made"}))
    assert result["error"]["kind"] == "command_refused"
    assert not (busy_site.folder / "made").exists()


# --- The base machine: commands, and no group ------------------------------------------------------------


@pytest.fixture(scope="module")
def base_site(cloud: LocalCloud, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    site = Site(cloud, tmp_path_factory.mktemp("base") / "comfy", ENV="base", JOB_TIMEOUT="2")
    site.start_comfyui()
    site.start_worker()
    yield site
    site.end()


@pytest.mark.parametrize(
    ("command", "status", "kind", "exit_code", "output"),
    [
        ("echo hello $COMFY_JOB_ID | cut -c1-5", "succeeded", None, 0, "hello\n"),
        ("echo out; echo err >&2; exit 3", "failed", "command_failed", 3, "out\nerr\n"),
        ("yes | head -c 100000; printf end", "succeeded", None, 0, "y\n" * 2046 + "\nend"),
        ("sleep 60 & echo first; wait", "failed", "timeout", None, "first\n"),
    ],
)
def test_commands_on_the_base_machine(
    base_site: Site, command: str, status: str, kind: str | None, exit_code: int | None, output: str
) -> None:
    result = base_site.await_result(base_site.send({"exec_cmd": command}))
    assert (result["status"], (result["error"] or {}).get("kind")) == (status, kind)
    said = result["values"]["command"]
    assert said["exit_code"] == exit_code
    assert said["output"] == output[-4096:] or (len(said["output"]) == 4096 and said["output"].endswith("end"))


def test_a_commands_children_end_with_it(base_site: Site) -> None:
    base_site.await_result(base_site.send({"exec_cmd": "sleep 600 & echo $!"}))
    job_id = base_site.send({"exec_cmd": "sleep 600 & echo $!"})
    pid = int(base_site.await_result(job_id)["values"]["command"]["output"])
    await_that("the child is gone", lambda: not _alive(pid))


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def test_files_on_the_base_machine_stay_where_designers_see_them(base_site: Site) -> None:
    job_id = base_site.send(image_workflow())
    assert base_site.await_result(job_id)["status"] == "succeeded"
    base_site.await_empty_queue()
    assert (base_site.folder / "ComfyUI/output" / job_id / "x_00001_.png").is_file()


def test_a_job_over_its_time_is_interrupted_and_failed(base_site: Site) -> None:
    job_id = base_site.send(image_workflow(600))
    assert base_site.await_result(job_id)["error"]["kind"] == "timeout"
    assert base_site.await_result(base_site.send(image_workflow()))["status"] == "succeeded"


def test_scaling_is_off_without_a_group_and_said_once(base_site: Site) -> None:
    base_site.await_result(base_site.send(image_workflow()))
    await_that("it is said", lambda: "scaling is off" in base_site.log())
    base_site.await_result(base_site.send(image_workflow()))
    assert base_site.log().count("scaling is off") == 1


# --- Faults ----------------------------------------------------------------------------------------------


def test_a_long_job_is_held_and_not_run_twice(make_site: Callable[..., Site]) -> None:
    site = make_site(VISIBILITY_TIMEOUT="3")
    site.start_comfyui()
    job_id = site.send(image_workflow(8))
    for _ in range(2):
        site.start_worker()
    result = site.await_result(job_id)
    assert (result["status"], result["attempt"]) == ("succeeded", 1)
    assert site.runs(job_id) == 1
    site.await_empty_queue()
    assert "attempt 2" not in site.log()


def test_a_killed_workers_job_is_adopted(make_site: Callable[..., Site]) -> None:
    site = make_site(VISIBILITY_TIMEOUT="3")
    site.start_comfyui()
    worker = site.start_worker()
    job_id = site.send(image_workflow(6))
    await_that("the job runs", lambda: site.runs(job_id))
    os.killpg(worker.pid, signal.SIGKILL)
    worker.wait()
    site.start_worker()
    result = site.await_result(job_id)
    assert (result["status"], result["attempt"]) == ("succeeded", 2)
    assert site.runs(job_id) == 1


def test_sigterm_gives_the_job_back_at_once(make_site: Callable[..., Site]) -> None:
    site = make_site()
    site.start_comfyui()
    worker = site.start_worker()
    job_id = site.send(image_workflow(600))
    await_that("the job runs", lambda: site.runs(job_id))
    worker.terminate()
    assert worker.wait(LIMIT_S) == 0
    assert site.depth() == (1, 0), "the message is visible again, long before its lease would have ended"
    assert site.result(job_id) is NO_RESULT_YET
    await_that("ComfyUI was interrupted", lambda: site.runs(job_id, "interrupted"))
    assert "parse_job.log" in " ".join(site.keys("output/"))


def test_an_interrupted_job_is_run_again_not_called_done(make_site: Callable[..., Site]) -> None:
    site = make_site()
    site.start_comfyui()
    worker = site.start_worker()
    job_id = site.send(image_workflow(4))
    await_that("the job runs", lambda: site.runs(job_id))
    worker.terminate()
    worker.wait(LIMIT_S)
    site.start_worker()
    result = site.await_result(job_id)
    assert (result["status"], result["attempt"]) == ("succeeded", 2)
    assert site.runs(job_id, "success") == 1


def test_an_interrupt_that_takes_effect_later_is_no_end_either(make_site: Callable[..., Site]) -> None:
    site = make_site()
    site.variables["STANDIN_NODE_SECONDS"] = "6"  # so long each ImageBlur hears of no interrupt
    site.start_comfyui()
    worker = site.start_worker()
    blur = {"class_type": "ImageBlur", "inputs": {"image": ["1", 0], "blur_radius": 1, "sigma": 1.0}}
    save = {"class_type": "SaveImage", "inputs": {"images": ["4", 0], "filename_prefix": "y"}}
    job_id = site.send(image_workflow(0, {"4": blur, "5": save}))
    await_that("the job runs", lambda: site.runs(job_id))
    worker.terminate()
    worker.wait(LIMIT_S)
    site.start_worker()
    result = site.await_result(job_id)
    assert (result["status"], result["attempt"]) == ("succeeded", 2)


def test_comfyui_dies_and_the_job_is_run_again(make_site: Callable[..., Site]) -> None:
    site = make_site()
    comfyui = site.start_comfyui()
    site.start_worker()
    early = {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "early"}}
    job_id = site.send(image_workflow(4, {"4": early}))
    saved = site.folder / "job-output" / job_id / "early_00001_.png"
    await_that("a file is saved", saved.exists)
    comfyui.kill()
    comfyui.wait()
    await_that("the worker noticed", lambda: "is put back" in site.log())
    assert site.result(job_id) is NO_RESULT_YET
    site.start_comfyui()
    result = site.await_result(job_id)
    assert (result["status"], result["attempt"]) == ("succeeded", 2)
    files = sorted(output["filename"] for output in result["outputs"])
    assert files == ["early_00001_.png", "x_00001_.png"], "nothing of the try that was cut short"


def test_a_job_that_kills_comfyui_each_time_ends_in_the_dead_letter_queue(make_site: Callable[..., Site]) -> None:
    site = make_site()
    site.keep_comfyui()
    site.start_worker()
    crash = {"4": {"class_type": "StandinCrash", "inputs": {"image": ["1", 0]}},
             "5": {"class_type": "SaveImage", "inputs": {"images": ["4", 0], "filename_prefix": "y"}}}  # fmt: skip
    job_id = site.send(image_workflow(more=crash))
    await_that("the message is in the DLQ", lambda: site.depth(site.dlq_url)[0] == 1)
    assert site.result(job_id) is NO_RESULT_YET
    assert site.log().count("is put back") == 3


def test_the_first_result_stands(make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch) -> None:
    site = make_site()
    for name, value in site.environment().items():
        monkeypatch.setenv(name, value)
    worker = parse_job.Worker(load_settings(None, site.folder / "env"), Metadata())
    first = {"job_id": new_job_id(), "status": "succeeded"}
    assert worker.store_result(first) == first
    second = {**first, "status": "failed"}
    assert worker.store_result(second) == first
    assert site.result(first["job_id"]) == first


def test_worker_json_tells_what_the_worker_does(
    make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    site = make_site()
    for name, value in site.environment().items():
        monkeypatch.setenv(name, value)
    worker = parse_job.Worker(load_settings(None, site.folder / "env"), Metadata())
    worker.queue_url = site.queue_url

    def told() -> list[dict[str, Any]]:
        body = site.s3.get_object(Bucket=site.bucket, Key=f"output/{worker.instance_id}/worker.json")["Body"].read()
        news: dict[str, Any] = json.loads(body)
        assert news.keys() == {"instance_id", "instance_type", "jobs", "updated_at"}
        return list(news["jobs"])

    assert worker.tell_of_jobs()
    assert told() == [], "idle, and that is said as well"
    job_id = new_job_id()
    lease: Any = SimpleNamespace(attempt=1)
    cancel: Any = SimpleNamespace(should_stop=worker.should_stop)
    with worker.running_job(job_id, lease, cancel, alone=False):
        assert not worker.tell_of_jobs(), "it may stand behind another one"
        worker.note_running(job_id)
        assert worker.tell_of_jobs()
        assert not worker.tell_of_jobs(), "there is nothing new"
        (begun,) = told()
        assert begun.keys() == {"job_id", "since"}
        progress = parse_job.Progress({"7": {"class_type": "KSampler", "inputs": {}}}, job_id, worker.instance_id)
        progress.note({"type": "progress", "data": {"node": "7", "value": 3, "max": 20}})
        worker.store_progress(progress)
        assert worker.tell_of_jobs()
        assert told() == [begun | {"job_id": job_id, "node_title": "KSampler", "value": 3, "max": 20}]
    assert worker.tell_of_jobs()
    assert told() == []


def test_progress_says_how_long_such_a_job_ran_before(make_site: Callable[..., Site]) -> None:
    site = make_site()
    site.start_comfyui()
    site.start_worker()
    first = site.send(image_workflow(1))
    ran_s = site.await_result(first)["timings"]["run_s"]
    second = site.send(image_workflow(20))
    key = f"output/{second}/progress.json"
    await_that("it tells of itself", lambda: site.keys(key))
    news = json.loads(site.s3.get_object(Bucket=site.bucket, Key=key)["Body"].read())
    assert 1 <= news["usual_run_s"] <= ran_s + 0.1, "the receipt's figure has the upload in it"
    started_at = datetime.fromisoformat(news["started_at"]).timestamp()
    assert started_at == pytest.approx(started_and_ended(site, second)[0], abs=10)


# --- Callbacks -------------------------------------------------------------------------------------------


class Receiver:
    """A server that refuses the first callbacks and remembers all."""

    def __init__(self, refuse: int) -> None:
        self.calls: list[tuple[dict[str, str], bytes]] = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receiver.calls.append((dict(self.headers), body))
                self.send_response(503 if len(receiver.calls) <= refuse else 204)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/done"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


def test_a_refused_callback_is_repeated_without_running_the_job_again(make_site: Callable[..., Site]) -> None:
    receiver = Receiver(refuse=parse_job.CALLBACK_TRIES)  # so that the queue brings it again
    site = make_site(CALLBACK_SECRET="hush", VISIBILITY_TIMEOUT="3")
    site.start_comfyui()
    site.start_worker()
    job_id = new_job_id()
    site.send({"prompt": image_workflow(), "job_id": job_id, "callback_url": receiver.url})
    await_that("the accepted callback", lambda: len(receiver.calls) == parse_job.CALLBACK_TRIES + 1)
    site.await_empty_queue()
    assert site.runs(job_id) == 1
    headers, body = receiver.calls[-1]
    assert json.loads(body) == site.result(job_id)
    signed = f"{headers['X-Comfy-Timestamp']}.".encode() + body
    assert headers["X-Comfy-Signature"] == "sha256=" + hmac.new(b"hush", signed, hashlib.sha256).hexdigest()
    assert "hush" not in site.log()
    receiver.server.shutdown()


@pytest.mark.parametrize(
    "url",
    ["http://169.254.169.254/latest", "http://[fe80::1]/", "http://[::ffff:169.254.169.254]/", "file:///etc/passwd"],
)
def test_callbacks_never_go_to_link_local_addresses(url: str) -> None:
    with pytest.raises(ValueError, match=r"link-local|no http"):
        parse_job.refuse_link_local(url)


# --- Lifecycle -------------------------------------------------------------------------------------------


def test_an_idle_worker_ends_its_instance(cloud: LocalCloud, fleet: tuple[Site, Machine]) -> None:
    site, machine = fleet
    group = f"{site.prefix}-{site.env}-asg"
    site.start_comfyui()
    site.start_worker()
    job_id = site.send(image_workflow())
    assert site.await_result(job_id)["instance_id"] == machine.instance_id
    await_that("the group is empty", lambda: not group_of(cloud, group)["Instances"])
    assert group_of(cloud, group)["DesiredCapacity"] == 0
    assert f"output/{machine.instance_id}/parse_job.log" in site.keys("output/")


def test_a_job_is_finished_before_the_instance_goes(
    cloud: LocalCloud, fleet: tuple[Site, Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    site, machine = fleet
    calls: list[str] = []
    monkeypatch.setattr(cloud, "fault", lambda _, operation: calls.append(operation))
    site.start_comfyui()
    site.start_worker()
    job_id = site.send(image_workflow(8))
    await_that("the job runs", lambda: site.runs(job_id))
    await_that("the worker has looked at the capacity", lambda: "DescribeAutoScalingGroups" in calls)
    cloud.client("autoscaling").terminate_instance_in_auto_scaling_group(
        InstanceId=machine.instance_id, ShouldDecrementDesiredCapacity=True
    )
    assert group_of(cloud, f"{site.prefix}-{site.env}-asg")["DesiredCapacity"] == 0
    waiting = site.send(image_workflow())
    assert site.await_result(job_id)["status"] == "succeeded"
    assert site.runs(job_id) == 1
    await_that("the instance is gone", lambda: cloud.instance_state(machine.instance_id) == "terminated")
    assert site.result(waiting) is NO_RESULT_YET, "nothing new is taken"
    group = group_of(cloud, f"{site.prefix}-{site.env}-asg")
    assert group["DesiredCapacity"] == 1, "the last look at the queue starts another instance"


def test_a_spot_notice_gives_the_job_back_at_once(fleet: tuple[Site, Machine]) -> None:
    site, machine = fleet
    site.start_comfyui()
    site.start_worker()
    job_id = site.send(image_workflow(600))
    await_that("the job runs", lambda: site.runs(job_id))
    started = time.monotonic()
    machine.metadata["spot/instance-action"] = '{"action": "terminate", "time": "2026-01-01T00:00:00Z"}'
    await_that("the message is back", lambda: site.depth() == (1, 0))
    assert time.monotonic() - started < 60
    await_that("the logs are stored", lambda: f"output/{machine.instance_id}/parse_job.log" in site.keys("output/"))


def test_a_hook_that_is_not_completed_runs_out(cloud: LocalCloud, fleet: tuple[Site, Machine]) -> None:
    _, machine = fleet
    cloud.client("autoscaling").terminate_instance_in_auto_scaling_group(
        InstanceId=machine.instance_id, ShouldDecrementDesiredCapacity=True
    )
    assert machine.metadata["autoscaling/target-lifecycle-state"] == "Terminated"
    cloud.terminations[machine.instance_id].deadline = 0
    await_that("the instance is gone", lambda: cloud.instance_state(machine.instance_id) == "terminated")


# --- Hooks for business code -----------------------------------------------------------------------------


def test_a_failing_hook_changes_nothing_for_the_job(make_site: Callable[..., Site]) -> None:
    site = make_site()
    script = site.folder / "parse_job.py"
    hook = 'def on_job_done(result: Result) -> None:\n    print("HOOK", result["job_id"])\n    raise OSError\n'
    script.write_text(script.read_text().replace("def on_job_done(result: Result) -> None:\n", hook, 1))
    site.start_comfyui()
    site.start_worker()
    job_id = site.send(image_workflow())
    assert site.await_result(job_id)["status"] == "succeeded"
    site.await_empty_queue()
    assert f"HOOK {job_id}" in site.log()
    assert "on_job_done failed" in site.log()


# --- Start -----------------------------------------------------------------------------------------------


def test_bad_settings_are_refused_at_start(make_site: Callable[..., Site]) -> None:
    site = make_site(EXEC_CMD="sometimes")
    ran = site.run("python", "parse_job.py")
    assert ran.returncode == 2
    assert ran.stderr.startswith("parse_job.py: EXEC_CMD='sometimes' cannot be used")


def test_an_unwritable_log_folder_does_not_stop_jobs(make_site: Callable[..., Site]) -> None:
    site = make_site()
    (site.folder / "logs").rmdir()
    (site.folder / "logs").write_text("in the way")
    site.start_comfyui()
    site.start_worker()
    assert site.await_result(site.send(image_workflow()))["status"] == "succeeded"


# --- Lanes: the next job stands in ComfyUI's queue while one runs -----------------------------------------


def pending(site: Site) -> list[str]:
    """The jobs that stand in ComfyUI's queue behind the one that runs."""
    queue = requests.get(f"http://127.0.0.1:{site.port}/queue", timeout=LIMIT_S).json()
    return [item[1] for item in queue["queue_pending"]]


def started_and_ended(site: Site, job_id: str) -> tuple[float, float]:
    """When ComfyUI began and ended a job, as its ledger has it."""
    entries = [
        entry for entry in map(json.loads, site.ledger.read_text().splitlines()) if entry["prompt_id"] == job_id
    ]
    return entries[0]["time"], entries[-1]["time"]


def fetch_ahead(site: Site, seconds: float, *bodies: object) -> tuple[str, list[str]]:
    """A job of `seconds` that runs, and those that were fetched ahead meanwhile and stand behind it."""
    site.await_result(site.send(image_workflow()))  # so that the worker knows jobs to be short
    site.await_empty_queue()
    first = site.send(image_workflow(seconds))
    ids = [site.send(body) for body in bodies or (image_workflow(),)]
    await_that("the first runs", lambda: site.runs(first))
    return first, ids


def fetch_one_ahead(site: Site, seconds: float, body: object = None) -> tuple[str, str]:
    """Likewise one workflow, which is known to stand there."""
    first, (second,) = fetch_ahead(site, seconds, body or image_workflow())
    await_that("the second stands in ComfyUI's queue", lambda: second in pending(site))
    return first, second


def test_the_next_job_stands_in_comfyuis_queue_and_times_are_honest(make_site: Callable[..., Site]) -> None:
    site = make_site(JOB_TIMEOUT="4")
    site.start_comfyui()
    site.start_worker()
    first, second = fetch_one_ahead(site, 3, image_workflow(2))  # it may run for 4 s, and is in hand for 5
    result = site.await_result(second)
    assert (result["status"], result["attempt"]) == ("succeeded", 1)
    _, first_ended = started_and_ended(site, first)
    started, _ = started_and_ended(site, second)
    timings = result["timings"]
    said = datetime.fromisoformat(timings["started_at"]).timestamp()
    assert first_ended <= started
    assert said == pytest.approx(started, abs=0.05)
    assert timings["wait_s"] > 2
    assert timings["run_s"] >= 2
    assert site.await_result(first)["attempt"] == 1


def test_sigterm_gives_both_jobs_back_and_the_second_never_ran(make_site: Callable[..., Site]) -> None:
    site = make_site()
    site.start_comfyui()
    worker = site.start_worker()
    first, second = fetch_one_ahead(site, 600)
    worker.terminate()
    assert worker.wait(LIMIT_S) == 0
    assert site.depth() == (2, 0)
    await_that("ComfyUI was interrupted", lambda: site.runs(first, "interrupted"))
    assert pending(site) == []
    assert site.runs(second) == 0


def test_a_worker_that_drains_gives_the_next_job_back_and_finishes_the_first(
    cloud: LocalCloud, fleet: tuple[Site, Machine]
) -> None:
    site, machine = fleet
    site.start_comfyui()
    site.start_worker()
    first, second = fetch_one_ahead(site, 15)
    cloud.client("autoscaling").terminate_instance_in_auto_scaling_group(
        InstanceId=machine.instance_id, ShouldDecrementDesiredCapacity=True
    )
    await_that("the second is given back", lambda: site.depth() == (1, 1))
    assert site.result(first) is NO_RESULT_YET
    assert site.await_result(first)["status"] == "succeeded"
    await_that("the instance is gone", lambda: cloud.instance_state(machine.instance_id) == "terminated")
    assert (site.runs(first), site.runs(second)) == (1, 0)


def test_a_job_over_its_time_takes_no_other_with_it(make_site: Callable[..., Site]) -> None:
    site = make_site(JOB_TIMEOUT="3")
    site.start_comfyui()
    site.start_worker()
    first, second = fetch_one_ahead(site, 600, image_workflow(1))
    assert site.await_result(first)["error"]["kind"] == "timeout"
    result = site.await_result(second)
    assert (result["status"], result["attempt"]) == ("succeeded", 1)
    assert (site.runs(second), site.runs(second, "interrupted")) == (1, 0)


def test_out_of_memory_leaves_the_job_behind_it_alone(make_site: Callable[..., Site]) -> None:
    site = make_site()
    site.start_comfyui()
    site.start_worker()
    more = {
        "4": {"class_type": "StandinOutOfMemory", "inputs": {"image": ["2", 0], "times": 1}},
        "5": {"class_type": "SaveImage", "inputs": {"images": ["4", 0], "filename_prefix": "y"}},
    }
    site.await_result(site.send(image_workflow()))
    first = site.send(image_workflow(2, more))
    second = site.send(image_workflow(1))
    results = [site.await_result(job_id) for job_id in (first, second)]
    assert [(result["status"], result["attempt"]) for result in results] == [("succeeded", 1)] * 2
    assert (site.runs(first), site.runs(second)) == (2, 1)


def test_comfyui_dies_with_two_jobs_and_that_counts_once(fleet: tuple[Site, Machine]) -> None:
    site, machine = fleet
    comfyui = site.start_comfyui()
    site.start_worker()
    first, second = fetch_one_ahead(site, 15)
    comfyui.kill()
    comfyui.wait()
    await_that("the first is put back", lambda: "is put back" in site.log())
    site.start_comfyui()
    results = [site.await_result(job_id) for job_id in (second, first)]
    assert [(result["error"], result["attempt"]) for result in results] == [(None, 1), (None, 2)]
    assert site.log().count("is put back") == 1, "the one that never ran has used up no attempt"
    assert "declared Unhealthy" not in site.log()
    assert machine.is_on()
    assert (site.runs(first), site.runs(second)) == (2, 1)


def test_behind_a_job_that_turns_out_long_nobody_waits(make_site: Callable[..., Site]) -> None:
    site = make_site()
    script = site.folder / "parse_job.py"
    script.write_text(script.read_text().replace("AHEAD_LIMIT_S = 60", "AHEAD_LIMIT_S = 3"))
    site.start_comfyui()
    site.start_worker()
    first, second = fetch_one_ahead(site, 600)
    await_that("the second is given back", lambda: site.depth() == (1, 1))
    assert (site.runs(first), site.runs(second)) == (1, 0)


def test_the_same_job_twice_in_hand_is_run_once(make_site: Callable[..., Site]) -> None:
    site = make_site()
    site.start_comfyui()
    site.start_worker()
    job_id = new_job_id()
    fetch_ahead(site, 1, *[{"prompt": image_workflow(1), "job_id": job_id}] * 3)
    assert site.await_result(job_id)["attempt"] == 1
    site.await_empty_queue()
    assert site.runs(job_id) == 1


@pytest.mark.parametrize("beside", ["no", "yes"])
def test_a_command_runs_alone_unless_it_is_asked_to_run_beside(make_site: Callable[..., Site], beside: str) -> None:
    site = make_site(EXEC_CMD="always", EXEC_CMD_BESIDE=beside)
    site.start_comfyui()
    site.start_worker()
    first, (command, second) = fetch_ahead(site, 4, {"exec_cmd": "sleep 1; date +%s.%N"}, image_workflow(1))
    results = {job_id: site.await_result(job_id) for job_id in (first, command, second)}
    ended = float(results[command]["values"]["command"]["output"])
    runs = [started_and_ended(site, job_id) for job_id in (first, second)]
    overlaps = [began < ended and ended - 1 < over for began, over in runs]
    assert any(overlaps) == (beside == "yes"), (runs, ended)


# --- The first job ---------------------------------------------------------------------------------------


def test_the_worker_waits_for_comfyui_ready_to_receive(make_site: Callable[..., Site]) -> None:
    site = make_site(WARMUP_WORKFLOW="warm-up.json", STALL_TIMEOUT="2")
    (site.folder / "warm-up.json").write_text(json.dumps(image_workflow()))
    job_id = site.send(image_workflow())
    site.start_worker()
    await_that("it waits", lambda: "Waiting for ComfyUI" in site.log())
    assert "Restarting ComfyUI" not in site.log(), "it may copy models for long"
    assert site.depth() == (1, 0)
    site.start_comfyui()
    answered_at = time.time()
    started_at = datetime.fromisoformat(site.await_result(job_id)["timings"]["started_at"]).timestamp()
    assert started_at - answered_at < 5, "0.1 s and the warm-up on a quiet machine: see bench_worker.py"
    assert 0 < site.log().find("Warmed up with") < site.log().find("attempt 1")
    site.await_empty_queue()
    await_that("what the warm-up made is thrown away", lambda: not list((site.folder / "job-output").iterdir()))


def test_a_warm_up_that_fails_does_not_stop_the_worker(make_site: Callable[..., Site]) -> None:
    site = make_site(WARMUP_WORKFLOW="absent.json")
    site.start_comfyui()
    site.start_worker()
    assert site.await_result(site.send(image_workflow()))["status"] == "succeeded"
    assert f"Cannot warm up with WARMUP_WORKFLOW={site.folder}/absent.json" in site.log()


# --- Files -----------------------------------------------------------------------------------------------


def test_a_large_file_never_lies_in_memory(make_site: Callable[..., Site]) -> None:
    site = make_site()
    site.start_comfyui()
    worker = site.start_worker()
    site.await_result(site.send(image_workflow()))
    before = peak_mb(worker.pid)
    job_id = site.send(image_workflow(2))
    await_that("the job runs", lambda: site.runs(job_id))
    video = site.folder / "job-output" / job_id / "video.mp4"
    video.parent.mkdir(exist_ok=True)
    with video.open("wb") as file:
        file.truncate(300 * 2**20)
    result = site.await_result(job_id)
    size = site.s3.head_object(Bucket=site.bucket, Key=f"output/{job_id}/video.mp4")
    assert size["ContentLength"] == 300 * 2**20
    assert size["ETag"].strip('"').endswith("-38"), "in parts of 8 MB"
    assert len(result["outputs"]) == 2
    assert peak_mb(worker.pid) - before < 120


def peak_mb(pid: int) -> float:
    """The most memory a process has used."""
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024


# --- Restarting ComfyUI ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shown", ["0", "", "-1", "[not set]"])
def test_where_systemd_has_no_comfyui_nothing_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shown: str
) -> None:
    """To os.kill, 0 and -1 are whole groups of processes, this one among them."""
    (tmp_path / "systemctl").write_text(f"#!/bin/sh\necho '{shown}'\n")
    (tmp_path / "systemctl").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    killed: list[int] = []
    monkeypatch.setattr(os, "kill", lambda pid, _: killed.append(pid))
    worker = SimpleNamespace(answered_at=0.0, restarted_at=0.0, turn=threading.Condition())
    parse_job.Worker.restart_comfyui(worker, time.monotonic())  # type: ignore[arg-type]
    assert killed == []
    assert worker.answered_at > 0


# --- Cancel ----------------------------------------------------------------------------------------------


def cancel(site: Site, job_id: str) -> None:
    site.s3.put_object(Bucket=site.bucket, Key=f"input/jobs/{job_id}.cancel", Body=b"")


def test_a_queued_job_that_was_cancelled_is_never_run(busy_site: Site) -> None:
    job_id = new_job_id()
    cancel(busy_site, job_id)
    busy_site.send({"prompt": image_workflow(), "job_id": job_id})
    result = busy_site.await_result(job_id)
    assert (result["status"], result["error"]["kind"]) == ("failed", "cancelled")
    busy_site.await_empty_queue()
    await_that("the marker is gone", lambda: not busy_site.keys(f"input/jobs/{job_id}"))
    assert busy_site.runs(job_id) == 0


def test_a_running_job_is_cancelled_and_its_sender_hears_of_it(make_site: Callable[..., Site]) -> None:
    receiver = Receiver(refuse=0)
    site = make_site()
    site.start_comfyui()
    site.start_worker()
    job_id, next_id = new_job_id(), new_job_id()
    site.send({"prompt": image_workflow(600), "job_id": job_id, "callback_url": receiver.url})
    await_that("the job runs", lambda: site.runs(job_id))
    cancel(site, job_id)
    result = site.await_result(job_id)
    assert (result["status"], result["error"]["kind"], result["attempt"]) == ("failed", "cancelled", 1)
    await_that("the callback", lambda: receiver.calls)
    assert json.loads(receiver.calls[0][1]) == result
    await_that("it was interrupted", lambda: site.runs(job_id, "interrupted"))
    site.send({"prompt": image_workflow(), "job_id": next_id})
    assert site.await_result(next_id)["status"] == "succeeded"
    site.await_empty_queue()
    assert not (site.folder / "job-output" / job_id).exists()
    receiver.server.shutdown()


def test_a_cancel_is_for_one_job_only(make_site: Callable[..., Site]) -> None:
    site = make_site()
    site.start_comfyui()
    site.start_worker()
    first, second = new_job_id(), new_job_id()
    for job_id, seconds in ((first, 10), (second, 600)):
        site.send({"prompt": image_workflow(seconds), "job_id": job_id})
    await_that("the first runs", lambda: site.runs(first))
    cancel(site, second)
    assert site.await_result(second)["error"]["kind"] == "cancelled"
    assert site.await_result(first)["status"] == "succeeded"
    assert site.runs(second) == 0


def test_a_running_command_is_cancelled_with_its_children(make_site: Callable[..., Site]) -> None:
    site = make_site(ENV="base")
    site.start_comfyui()
    site.start_worker()
    job_id = new_job_id()
    site.send({"exec_cmd": "sleep 600 & echo $! | tee pid; wait", "job_id": job_id})
    pid = await_that("it runs", lambda: (file := site.folder / "pid").exists() and file.read_text().strip())
    cancel(site, job_id)
    result = site.await_result(job_id)
    assert result["error"]["kind"] == "cancelled"
    assert result["values"]["command"]["output"] == f"{pid}\n"
    await_that("the child is gone", lambda: not _alive(int(pid)))


def test_a_cancel_after_the_end_changes_nothing(busy_site: Site) -> None:
    job_id = new_job_id()
    busy_site.send({"prompt": image_workflow(), "job_id": job_id})
    result = busy_site.await_result(job_id)
    cancel(busy_site, job_id)
    busy_site.send({"prompt": image_workflow(), "job_id": job_id})
    busy_site.await_empty_queue()
    assert busy_site.result(job_id) == result
    assert result["status"] == "succeeded"


def test_no_job_waits_for_a_look_that_fails(
    cloud: LocalCloud, make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    site = make_site()
    monkeypatch.setattr(
        cloud, "fault", lambda _, operation: Fault(403, "AccessDenied") if operation == "HEAD" else None
    )
    site.start_comfyui()
    site.start_worker()
    assert site.await_result(site.send(image_workflow()))["status"] == "succeeded"


# --- A job's inputs --------------------------------------------------------------------------------------


class FileServer:
    """Somebody's server: a picture, and every way in which one can disappoint."""

    def __init__(self, picture: bytes) -> None:
        self.asked: list[str] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.asked.append(self.path)
                first = server.asked.count(self.path) == 1
                name = self.path.partition("?")[0].strip("/")
                status = {"missing": 404, "moved": 302, "busy": 503 if first else 200}.get(name, 200)
                self.send_response(status)
                if status == 302:
                    self.send_header("Location", "/photo")
                self.end_headers()
                with suppress(OSError):
                    self.wfile.write(b"x" * 3_000_000 if name == "large" else picture)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture(scope="module")
def input_site(cloud: LocalCloud, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Site, FileServer]]:
    """A site that takes inputs of at most 1 MB, and a server of inputs; the picture lies in the bucket, too."""
    site = Site(cloud, tmp_path_factory.mktemp("inputs") / "comfy", INPUT_LIMIT_MB="1")
    site.start_comfyui()
    site.start_worker()
    job_id = site.send(image_workflow())
    (output,) = site.await_result(job_id)["outputs"]
    picture = site.s3.get_object(Bucket=site.bucket, Key=output["s3_key"])["Body"].read()
    site.s3.put_object(Bucket=site.bucket, Key="input/a b.png", Body=picture)
    server = FileServer(picture)
    yield site, server
    site.end()
    server.server.shutdown()


def workflow_of(name: str) -> dict[str, Any]:
    """A workflow that loads a picture and saves it."""
    return {
        "1": {"class_type": "LoadImage", "inputs": {"image": name}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "x"}},
    }


@pytest.mark.parametrize(
    ("address", "attempt"),
    [("URL/photo?signature=hush", 1), ("URL/busy", 2), ("s3://BUCKET/input/a b.png", 1)],
    ids=["http", "unavailable at first", "s3"],
)
def test_inputs_are_fetched_and_removed(input_site: tuple[Site, FileServer], address: str, attempt: int) -> None:
    site, server = input_site
    job_id, address = new_job_id(), address.replace("URL", server.url).replace("BUCKET", site.bucket)
    site.send({"prompt": workflow_of("photo.png"), "job_id": job_id, "inputs": {"photo.png": address}})
    result = site.await_result(job_id)
    assert (result["error"], result["attempt"]) == (None, attempt)
    assert [output["filename"] for output in result["outputs"]] == ["x_00001_.png"]
    site.await_empty_queue()
    await_that("the input is gone", lambda: not (site.folder / "ComfyUI/input/jobs" / job_id).exists())
    assert "hush" not in site.log()


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("URL/missing?signature=hush", "the input photo.png was answered with HTTP 404"),
        ("URL/moved", "was answered with HTTP 302, and redirects are not followed"),
        ("URL/large", "the input photo.png is larger than INPUT_LIMIT_MB=1"),
        ("http://169.254.169.254/latest/meta-data/", "169.254.169.254 is a link-local address"),
        ("http://[::1", "has an address that cannot be read from"),
        ("s3://BUCKET/input/none.png", "the input photo.png is not there: s3://"),
        ("s3://elsewhere/x.png", "is in the bucket elsewhere: the fleet reads its own"),
    ],
)
def test_an_input_that_cannot_be_had_is_final_at_the_first_try(
    input_site: tuple[Site, FileServer], address: str, said: str
) -> None:
    site, server = input_site
    job_id, address = new_job_id(), address.replace("URL", server.url).replace("BUCKET", site.bucket)
    site.send({"prompt": workflow_of("photo.png"), "job_id": job_id, "inputs": {"photo.png": address}})
    result = site.await_result(job_id)
    assert (result["error"]["kind"], result["attempt"]) == ("invalid_workflow", 1)
    assert said in result["error"]["message"]
    site.await_empty_queue()
    await_that("nothing is left of it", lambda: not (site.folder / "ComfyUI/input/jobs" / job_id).exists())
    assert "hush" not in json.dumps(result) + site.log()


def test_an_input_that_no_node_uses_is_refused(input_site: tuple[Site, FileServer]) -> None:
    site, server = input_site
    body = {"prompt": workflow_of("foto.png"), "inputs": {"photo.png": f"{server.url}/unused"}}
    result = site.await_result(site.send(body))
    assert result["error"]["message"].startswith("inputs has 'photo.png', but no node has an input of that value")
    assert "/unused" not in server.asked


def test_a_name_that_resolves_anew_leads_nowhere(
    input_site: tuple[Site, FileServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, server = input_site
    monkeypatch.setattr(parse_job, "refuse_link_local", lambda _: None)  # the name was checked when it was harmless
    monkeypatch.setattr(parse_job, "is_link_local", lambda address: address == "127.0.0.1")
    with pytest.raises(InvalidWorkflowError, match="link-local"), parse_job.open_url("x", f"{server.url}/rebound"):
        pass
    assert "link-local" in parse_job.post_result(f"{server.url}/rebound", {}, "")
    assert "/rebound" not in server.asked


def test_an_input_that_never_ends_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parse_job, "INPUTS_LIMIT_S", 0.3)
    drip = threading.Event()
    with pytest.raises(parse_job.PutBackError):
        parse_job.within(0.3, lambda: bool(drip.wait(LIMIT_S)), lambda: False)
    with pytest.raises(JobStoppedError):
        parse_job.within(LIMIT_S, lambda: bool(drip.wait(LIMIT_S)), lambda: True)
    drip.set()


# --- Workflows dropped into the bucket --------------------------------------------------------------------


@pytest.fixture(scope="module")
def trigger_site(cloud: LocalCloud, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A site whose bucket tells its queue what comes, as create_env.sh --s3-trigger wires it."""
    site = Site(cloud, tmp_path_factory.mktemp("trigger") / "comfy")
    rules = [{"Name": "prefix", "Value": "input/jobs/"}, {"Name": "suffix", "Value": ".json"}]
    arn = site.sqs.get_queue_attributes(QueueUrl=site.queue_url, AttributeNames=["QueueArn"])["Attributes"][
        "QueueArn"
    ]
    events = {"QueueArn": arn, "Events": ["s3:ObjectCreated:*"], "Filter": {"Key": {"FilterRules": rules}}}
    site.s3.put_bucket_notification_configuration(
        Bucket=site.bucket, NotificationConfiguration={"QueueConfigurations": [events]}
    )
    assert site.depth() == (1, 0), "S3's test event"
    site.start_comfyui()
    site.start_worker()
    site.await_empty_queue()
    yield site
    site.end()


def results_of(site: Site, source: str) -> list[dict[str, Any]]:
    """The receipts of the jobs that came from a file in the bucket."""
    keys = [key for key in site.keys("output/") if key.endswith("/result.json")]
    results = [json.loads(site.s3.get_object(Bucket=site.bucket, Key=key)["Body"].read()) for key in keys]
    return [result for result in results if result.get("source") == source]


def test_a_workflow_dropped_into_the_bucket_runs(trigger_site: Site) -> None:
    site, key = trigger_site, "input/jobs/night shift/é+1.json"
    site.s3.put_object(Bucket=site.bucket, Key=key, Body=json.dumps(image_workflow()).encode())
    (result,) = await_that("its receipt", lambda: results_of(site, f"s3://{site.bucket}/{key}"))
    assert (result["status"], len(result["outputs"])) == ("succeeded", 1)
    site.await_empty_queue()


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"{", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b'{"nodes": [], "links": []}', "UI format"),
        (b" " * (16 * 1024 * 1024 + 1), "more than 16777216 bytes"),
    ],
    ids=["half", "no text", "UI format", "too large"],
)
def test_a_dropped_file_that_is_no_workflow_fails(trigger_site: Site, body: bytes, said: str) -> None:
    site, key = trigger_site, f"input/jobs/{len(body)}.json"
    site.s3.put_object(Bucket=site.bucket, Key=key, Body=body)
    (result,) = await_that("its receipt", lambda: results_of(site, f"s3://{site.bucket}/{key}"))
    assert result["error"]["kind"] == "invalid_workflow"
    assert said in result["error"]["message"]


def test_what_send_job_puts_there_itself_is_run_once(trigger_site: Site) -> None:
    site, job_id = trigger_site, new_job_id()
    before = site.keys("output/")
    key = f"input/jobs/{job_id}.json"
    site.s3.put_object(Bucket=site.bucket, Key=key, Body=json.dumps(image_workflow()).encode())
    site.send({"workflow_key": key, "job_id": job_id})
    assert site.await_result(job_id)["status"] == "succeeded"
    site.await_empty_queue()
    assert site.depth(site.dlq_url) == (0, 0), "S3's events of it were deleted quietly"
    after = [key for key in site.keys("output/") if key not in before and key.endswith("result.json")]
    assert after == [f"output/{job_id}/result.json"]


def s3_event(bucket: str, key: str, **more: str) -> dict[str, Any]:
    """What S3 sends, as far as it is read."""
    file = {"key": key, "size": 2, "sequencer": "0055AED6DCD90281E5"}
    record = {"eventName": "ObjectCreated:Put", "eventTime": "2026-01-01T00:00:00.000Z", "eventSource": "aws:s3"}
    return {"Records": [record | {"s3": {"bucket": {"name": bucket}, "object": file}} | more]}


def test_an_event_that_comes_twice_is_run_once_and_a_file_that_is_gone_fails(busy_site: Site) -> None:
    site, source = busy_site, f"s3://{busy_site.bucket}/input/jobs/gone.json"
    for _ in range(2):
        site.send(s3_event(site.bucket, "input/jobs/gone.json"))
    (result,) = await_that("its receipt", lambda: results_of(site, source))
    assert result["error"]["message"] == f"there is no input/jobs/gone.json in {site.bucket}"
    site.await_empty_queue()
    assert results_of(site, source) == [result]


def test_an_event_of_another_bucket_is_refused(busy_site: Site) -> None:
    busy_site.send(s3_event("elsewhere", "input/jobs/x.json"))
    (result,) = await_that("its receipt", lambda: results_of(busy_site, "s3://elsewhere/input/jobs/x.json"))
    assert "is not in this environment's bucket" in result["error"]["message"]


# --- What ComfyUI can do ----------------------------------------------------------------------------------


def test_the_fleets_object_info_is_stored_when_it_has_changed(make_site: Callable[..., Site]) -> None:
    site = make_site()
    place = {"Bucket": site.bucket, "Key": "output/object_info.json.gz"}

    def stored_at() -> Any:
        return site.keys(place["Key"]) and site.s3.head_object(**place)["LastModified"]

    site.start_comfyui()
    first = site.start_worker()
    await_that("it is stored", stored_at)
    described = json.loads(gzip.decompress(site.s3.get_object(**place)["Body"].read()))
    assert described["KSampler"]["input"]["required"]["steps"][0] == "INT"
    first.terminate()
    first.wait(LIMIT_S)

    # Stored again it would lose the mark.
    site.s3.copy_object(
        **place,
        CopySource=place,
        Metadata=site.s3.head_object(**place)["Metadata"] | {"mark": "x"},
        MetadataDirective="REPLACE",
    )
    second = site.start_worker()
    await_that("it was looked at", lambda: "knows what ComfyUI can do" in site.log())
    assert site.s3.head_object(**place)["Metadata"]["mark"] == "x"
    second.terminate()
    second.wait(LIMIT_S)

    (site.folder / "ComfyUI/models/checkpoints/new.safetensors").touch()
    site.start_worker()
    await_that("it is stored again", lambda: "mark" not in site.s3.head_object(**place)["Metadata"])
    body = site.s3.get_object(**place)["Body"].read()
    assert b"new.safetensors" in gzip.decompress(body)
