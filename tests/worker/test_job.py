"""What becomes of a message: real worker processes against the local cloud and the ComfyUI stand-in."""

from __future__ import annotations

import json

import pytest
from places import ROOT
from workplace import Site, await_that, image_workflow
from workshop import with_node

from comfy_utils import new_job_id


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
    assert result["error"]["kind"] == "invalid_workflow"
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
