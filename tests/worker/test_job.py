"""What becomes of a message: real worker processes against the local cloud and the ComfyUI stand-in."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from typing import Any

import pytest
from PIL import Image
from places import ROOT
from workplace import Site, await_that, image_workflow
from workshop import make_worker, remembering_receiver, with_node

from comfy_utils import new_job_id
from worker.lease import Lease


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


def test_what_an_execution_blocker_said_is_a_warning(busy_site: Site) -> None:
    result = busy_site.await_result(busy_site.send(with_node("StandinBlock")))
    assert result["status"] == "succeeded"
    assert result["warnings"] == ["blocked: node 4 StandinBlock: Execution Blocked: not today"]


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


def test_text_that_is_no_unicode_does_not_stop_the_result(busy_site: Site) -> None:
    body = '{"prompt": {"1": {"class_type": "X\\ud800", "inputs": {}}}}'
    result = busy_site.await_result(busy_site.send(body))
    assert result["error"]["kind"] == "invalid_message"
    assert "half a character" in result["error"]["message"]
    assert json.dumps(result)


def test_a_number_that_is_no_json_is_refused(busy_site: Site) -> None:
    body = '{"1": {"class_type": "X", "inputs": {"a": NaN}}}'
    assert busy_site.await_result(busy_site.send(body))["error"]["kind"] == "invalid_message"


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


# --- What goes beside a workflow ---------------------------------------------------------------------------

SECRET = 'comfyui-0123456789/"ü'


@pytest.mark.parametrize("out", ["text", "error", "block"])
def test_the_key_of_an_api_node_reaches_it_and_nobody_else(busy_site: Site, out: str) -> None:
    with remembering_receiver(refuse=0) as (url, called):
        more = {"4": {"class_type": "StandinApi", "inputs": {"image": ["1", 0], "out": out}}}
        body = {"prompt": image_workflow(0.1, more=more), "callback_url": url, "api_key": 1}
        job_id = busy_site.send(body | {"extra_data": {"api_key_comfy_org": SECRET}})
        result = busy_site.await_result(job_id)
        busy_site.await_empty_queue()
    hidden = "Unauthorized: the key *** is not known"
    found = {"text": result["values"], "error": result["error"], "block": result["warnings"]}[out]
    assert hidden in json.dumps(found), "it reached the node, and the rest of what that said is there"
    assert result["warnings"][0] == "unknown key 'api_key': not used"
    assert (result["status"] == "failed") == (out == "error")
    (_, told), *_ = called
    assert json.loads(told) == result
    log = busy_site.log()
    assert job_id in log
    stored = busy_site.s3.get_object(Bucket=busy_site.bucket, Key=f"output/{job_id}/result.json")["Body"].read()
    for secret in (SECRET, json.dumps(SECRET)[1:-1]):
        assert secret not in log + stored.decode() + told.decode() + json.dumps(result, ensure_ascii=False)


def workflow_of_picture(site: Site, result: dict[str, Any]) -> Any:
    """The workflow that a job's picture carries."""
    (output,) = [output for output in result["outputs"] if output["type"] == "output"]
    body = site.s3.get_object(Bucket=site.bucket, Key=output["s3_key"])["Body"].read()
    return json.loads(Image.open(io.BytesIO(body)).info.get("workflow", "null"))


def test_a_picture_carries_the_workflow_that_came_beside_it(busy_site: Site) -> None:
    """In the message, or by the bucket where a message has no room for it."""
    drawn = {"nodes": [{"id": 1, "type": "SaveImage"}], "links": []}
    job_id, key = new_job_id(), "input/jobs/{}.json"
    extra_data = {"extra_pnginfo": {"workflow": drawn}}
    first = busy_site.send({"prompt": image_workflow(), "extra_data": extra_data})
    api = {"4": {"class_type": "StandinApi", "inputs": {"image": ["1", 0], "out": "text"}}}
    file = {"prompt": image_workflow(more=api), "extra_data": extra_data, "callback_url": "https://x/"}
    busy_site.s3.put_object(Bucket=busy_site.bucket, Key=key.format(job_id), Body=json.dumps(file).encode())
    busy_site.send(
        {"workflow_key": key.format(job_id), "job_id": job_id, "extra_data": {"api_key_comfy_org": SECRET}}
    )
    assert workflow_of_picture(busy_site, busy_site.await_result(first)) == drawn
    result = busy_site.await_result(job_id)
    assert workflow_of_picture(busy_site, result) == drawn
    assert result["values"]["4"]["text"] == ["Unauthorized: the key *** is not known"]
    assert result["warnings"] == ["the key 'callback_url' is not used here: put it into a message"]


def test_a_number_that_cannot_be_sent_is_the_messages_fault(busy_site: Site) -> None:
    """Nothing is put back, and the next job runs on the same instance."""
    job_id = busy_site.send('{"1": {"class_type": "EmptyImage", "inputs": {"width": 1e999}}}')
    result = busy_site.await_result(job_id)
    assert (result["error"]["kind"], result["attempt"]) == ("invalid_message", 1)
    assert result["error"]["message"].startswith("node 1 EmptyImage: its input width is inf, which JSON cannot say")
    assert busy_site.await_result(busy_site.send(image_workflow()))["status"] == "succeeded"
    assert f"Message {job_id} is put back" not in busy_site.log()


def test_a_message_in_an_envelope_runs_under_the_envelopes_id(busy_site: Site) -> None:
    told = new_job_id()
    for _ in range(2):  # SNS may deliver twice
        busy_site.send({"Type": "Notification", "MessageId": told, "TopicArn": "arn:aws:sns:us-west-2:1:jobs",
                        "Message": json.dumps({"prompt": image_workflow()})})  # fmt: skip
    assert busy_site.await_result(told)["status"] == "succeeded"
    busy_site.await_empty_queue()
    assert busy_site.runs(told) == 1


def test_an_attempt_that_is_stopped_before_it_begins_is_noted_under_the_jobs_own_id(
    make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    site = make_site(MAX_RECEIVES="1")
    worker = make_worker(site, monkeypatch)
    worker.shutdown.stop.set()
    job_id = new_job_id()
    site.send({"prompt": image_workflow(), "job_id": job_id})
    (message,) = worker.queue.receive(1, 0)
    worker.jobs.process(Lease(worker.queue, message, 60))
    assert site.keys("output/") == [f"output/{job_id}/attempts.json", f"output/{job_id}/result.json"]
