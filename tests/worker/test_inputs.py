"""What a job brings along: its workflow, its inputs, and workflows that are dropped into the bucket."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from local_cloud import LocalCloud
from workplace import LIMIT_S, Site, await_that, image_workflow
from workshop import dripping_server, make_worker, start

from comfy_utils import InvalidWorkflowError, Job, new_job_id
from ground.comfyui import JobStoppedError
from worker import inputs
from worker.errors import PutBackError
from worker.inputs import use_inputs
from worker.retry import within


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
    start(site)
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


def test_the_workflow_gets_the_names_that_its_inputs_have_here() -> None:
    workflow = {
        "1": workflow_of("photo.png")["1"],
        "2": {"class_type": "X", "inputs": {"a": ["1", 0], "b": "photo.png2", "c": 1}},
    }
    changed = use_inputs(workflow, {"photo.png": "jobs/x/photo.png"})
    assert changed["1"]["inputs"]["image"] == "jobs/x/photo.png"
    assert changed["2"] == workflow["2"]
    assert workflow["1"]["inputs"]["image"] == "photo.png", "the original is left alone"
    with pytest.raises(InvalidWorkflowError, match="no node has an input of that value"):
        use_inputs(workflow, {"photo.png": "a", "foto.png": "b"})


def test_an_input_that_never_ends_is_put_back() -> None:
    drip = threading.Event()
    with pytest.raises(PutBackError, match=r"it has not come within 0\.3 s"):
        within("it has not come", 0.3, lambda: bool(drip.wait(LIMIT_S)), lambda: False)
    with pytest.raises(JobStoppedError):
        within("it has not come", LIMIT_S, lambda: bool(drip.wait(LIMIT_S)), lambda: True)
    drip.set()


def test_inputs_that_drip_have_one_limit_in_all(
    make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Headers, too. The connection is cut then, and no other is made."""
    site = make_site()
    worker = make_worker(site, monkeypatch)
    monkeypatch.setattr(inputs, "INPUTS_LIMIT_S", 0.5)
    workflow = {**workflow_of("a.png"), "3": {"class_type": "LoadImage", "inputs": {"image": "b.png"}}}
    with dripping_server() as (url, cut):
        job = Job(new_job_id(), workflow=workflow, inputs={"a.png": url, "b.png": f"{url}/2"})
        with pytest.raises(PutBackError, match=r"the inputs have not come within 0\.5 s"):
            worker.jobs.inputs.fetch(job, workflow, lambda: False)
        assert cut.wait(LIMIT_S)
        await_that("its thread ends", lambda: not any(thread.name == "within" for thread in threading.enumerate()))
    assert list(site.folder.glob("ComfyUI/input/jobs/*/*")) == [], "what has come of it is removed"


# --- Workflows dropped into the bucket -------------------------------------------------------------------


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
    start(site)
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
