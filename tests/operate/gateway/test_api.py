"""The Comfy API v2, by its own SDK, unchanged, on a fleet of two instances."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import requests
from blake3 import blake3
from comfy_low.errors import BlobNotFound, HashMismatch
from comfy_sdk import (
    AsyncComfy,
    Comfy,
    IdempotencyKeyReuse,
    InvalidWorkflow,
    Job,
    JobFailed,
    MissingAsset,
    NotFound,
    OutputReady,
    Progress,
    StatusChange,
    Unauthorized,
)
from comfy_sdk.exceptions import ComfyError
from gateway_tools import Door, start_instance
from gateway_walk import picture
from workplace import LIMIT_S, await_that, image_workflow

from comfy_utils import load_settings, watched_key
from operate.gateway.api_shapes import deleted_at
from operate.gateway.assets import days_of
from operate.gateway.claims import Claims
from operate.gateway.cloud import Cloud

SECRET = "comfyui-0123456789abcdef-a-secret"


@pytest.fixture(scope="module")
def fleet(door: Door, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    """The door before two instances."""
    started = start_instance(door.site, tmp_path_factory.mktemp("second"))
    yield door
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def sdk(fleet: Door, monkeypatch: pytest.MonkeyPatch) -> Iterator[Comfy]:
    """The SDK, told of the fleet's address by its one variable."""
    monkeypatch.setenv("COMFY_BASE_URL", fleet.url)
    with Comfy() as client:
        yield client


def is_running(job: Job) -> bool:
    return job.refresh().status == "running"


def load(image: Any) -> dict[str, Any]:
    """A workflow that loads a picture and saves it again."""
    return {
        "1": {"class_type": "LoadImage", "inputs": {"image": image}},
        "9": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "x"}},
    }


def test_the_example_of_its_readme(sdk: Comfy, tmp_path: Path) -> None:
    photo, saved = tmp_path / "photo.png", tmp_path / "saved.png"
    photo.write_bytes(picture("red", 24))
    workflow = sdk.workflows.from_json(load("to be set"))
    asset = sdk.assets.from_file(photo)
    workflow.set_input("1", "image", asset)
    job = sdk.run(workflow)
    (output,) = job.get_outputs("9")
    output.to_file(saved)
    assert saved.read_bytes()[16:24] == photo.read_bytes()[16:24], "as large as it was"
    assert (output.type, output.content_type, output.size_bytes) == ("image", "image/png", saved.stat().st_size)
    assert output.job_id == job.id
    assert output.to_bytes(range=(1, 3)) == b"PNG"
    graph = sdk.jobs.get(job.id).get_workflow()
    assert graph.format == "api"
    # What it ran can be run again, also with what it has made.
    again = sdk.run(sdk.workflows.from_json(graph.graph))
    ref = {"__type": "core/ASSET", "info": {"id": again.outputs[0].id}}
    assert sdk.run(sdk.workflows.from_json(load(ref))).status == "succeeded"
    link = output.get_download_url()
    assert requests.get(link.url, timeout=LIMIT_S).content == saved.read_bytes()


def test_the_same_from_asynchronous_code(fleet: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMFY_BASE_URL", fleet.url)

    async def run() -> None:
        async with AsyncComfy() as client:
            asset = client.assets.from_bytes(picture("blue", 16), filename="blue.png")
            workflow = client.workflows.from_json(load(asset))
            job = await client.submit(workflow, metadata={"of": "async"})
            await job.result()
            data = await job.outputs[0].to_bytes()
            assert data[:4] == b"\x89PNG"
            events = [event async for event in job.events()]
            assert [type(event) for event in events] == [OutputReady, StatusChange], "of one that has ended, the end"
            assert [each.id async for each in client.list_jobs(metadata={"of": "async"})] == [job.id]
            await asset.delete()
            with pytest.raises(ComfyError):
                await client.jobs.get(str(uuid.uuid4()))

    asyncio.run(run())


def test_the_same_bytes_are_stored_once_and_their_hash_is_computed_here(sdk: Comfy, fleet: Door) -> None:
    site, data = fleet.site, picture("green", 40) + os.urandom(9 * 1024 * 1024)
    before = len(site.keys("input/assets/"))
    first = sdk.assets.from_bytes(data, filename="one.png")
    first.commit()
    assert first.created_new
    assert first.hash == f"blake3:{blake3(data).hexdigest()}"
    assert first.expires_at is None
    same, other = (sdk.assets.from_bytes(data, filename=name) for name in ("one.png", "two.png"))
    assert same.commit() == first.id != other.commit()
    assert not same.created_new
    assert not other.created_new
    answer = upload(fleet, data, "three.png")  # which does not ask first
    assert (answer.status_code, answer.json()["created_new"]) == (200, False)
    assert len(site.keys("input/assets/")) == before + 1
    assert not site.s3.list_multipart_uploads(Bucket=site.bucket).get("Uploads"), "nothing is left half done"
    with pytest.raises(HashMismatch):
        sdk._low.post_assets(BytesIO(b"others"), "image/png", "four.png", expected_hash=first.hash)
    assert len(site.keys("input/assets/")) == before + 1
    with pytest.raises(BlobNotFound):
        sdk._low.asset_from_hash("blake3:" + "0" * 64)
    # The bytes stay as long as one has them.
    first.delete()
    assert sdk.assets.from_bytes(data, filename="one.png").commit()
    ids = [sdk.assets.from_bytes(data, filename=name).commit() for name in ("one.png", "two.png", "three.png")]
    for asset_id in ids:
        sdk.assets.delete(asset_id)
    assert len(site.keys("input/assets/")) == before
    with pytest.raises(NotFound):
        sdk.assets.delete(ids[0])
    with pytest.raises(MissingAsset) as caught:
        sdk.submit(sdk.workflows.from_json(load({"__type": "core/ASSET", "info": {"id": ids[0]}})))
    assert caught.value.details == {"missing_ids": [ids[0]]}


def test_an_upload_is_found_by_its_name_and_the_newest_counts(sdk: Comfy) -> None:
    name = f"{uuid.uuid4().hex}.png"
    for size in (8, 12):
        sdk.assets.from_bytes(picture("red", size), filename=name).commit()
        job = sdk.run(sdk.workflows.from_json(load(name)))
        assert int.from_bytes(job.outputs[0].to_bytes()[16:20]) == size


def test_events_come_to_the_end(sdk: Comfy) -> None:
    job = sdk.submit(sdk.workflows.from_json(image_workflow(6)))
    events = list(job.events())
    said = [event.status for event in events if isinstance(event, StatusChange)]
    assert said[0] in ("queued", "running")
    assert said[-1] == "succeeded"
    assert isinstance(events[-1], StatusChange)
    assert isinstance(events[-2], OutputReady)
    progress = [event for event in events if isinstance(event, Progress)]
    assert progress
    assert all(0 <= event.value <= 1 and event.nodes_total == 3 for event in progress)


def test_the_worker_hears_of_a_job_whose_events_are_opened_while_it_runs(sdk: Comfy, door: Door) -> None:
    job = sdk.submit(sdk.workflows.from_json(image_workflow(600)))
    await_that("it runs", lambda: door.site.runs(job.id))
    assert not door.site.keys(watched_key(job.id)), "nobody watches it"
    events = job.events()
    next(events)
    await_that("the worker can know", lambda: door.site.keys(watched_key(job.id)))
    job.cancel()
    assert list(events)[-1] == StatusChange("canceled")
    await_that("the mark is gone", lambda: not door.site.keys(watched_key(job.id)))


def test_a_refused_workflow_is_told_with_its_node(sdk: Comfy) -> None:
    workflow = image_workflow()
    del workflow["3"]["inputs"]["images"]
    with pytest.raises(InvalidWorkflow) as caught:
        sdk.submit(sdk.workflows.from_json(workflow))
    assert caught.value.details is not None
    (reason,) = caught.value.details["node_errors"]["3"]
    assert (reason["field"], reason["reason"]) == ("images", "missing_input")
    workflow["3"]["class_type"] = "NotInstalled"
    with pytest.raises(InvalidWorkflow, match="NotInstalled") as caught:
        sdk.submit(sdk.workflows.from_json(workflow))
    assert "3" in (caught.value.details or {})["node_errors"]


def test_a_failed_job_names_its_node(sdk: Comfy) -> None:
    with pytest.raises(JobFailed) as caught:
        sdk.run(sdk.workflows.from_json(load("broken.png")))
    error: Any = caught.value.error
    assert (error.code, error.node_id, error.class_type) == ("node_execution_error", "1", "LoadImage")
    assert error.message.startswith("cannot identify image file")


def test_jobs_are_cancelled_while_they_wait_and_while_they_run(sdk: Comfy) -> None:
    running = []
    for _ in range(2):  # sent at once, one instance might take both, and keep the second waiting for a minute
        running.append(sdk.submit(sdk.workflows.from_json(image_workflow(300))))
        await_that("it runs", partial(is_running, running[-1]))
    waiting = sdk.submit(sdk.workflows.from_json(image_workflow()))
    assert waiting.refresh().status == "queued"
    assert waiting._model.queue_position == 1
    assert waiting.cancel().status == "canceled"
    for job in running:
        assert job.cancel().status in ("canceling", "canceled")
    for job in running:
        assert list(job.events())[-1] == StatusChange("canceled")
        assert job.cancel().status == "canceled", "which changes nothing any more"
        assert (job.outputs, job.error) == ([], None)
    assert {each.id: each.status for each in sdk.list_jobs()}[waiting.id] == "canceled"


def test_labels_find_jobs_in_pages_the_newest_in_front(sdk: Comfy) -> None:
    run = uuid.uuid4().hex
    ids = [
        sdk.submit(sdk.workflows.from_json(image_workflow()), metadata={"run": run, "number": str(number % 2)}).id
        for number in range(5)
    ]
    found = list(sdk.list_jobs(metadata={"run": run}, limit=2))
    assert [each.id for each in found] == ids[::-1], "three pages"
    assert found[0].metadata == {"run": run, "number": "0"} == sdk.jobs.get(ids[4]).metadata
    assert [each.id for each in sdk.list_jobs(metadata={"run": run, "number": "1"})] == [ids[3], ids[1]]
    await_that(
        "all have ended", lambda: {each.status for each in sdk.list_jobs(metadata={"run": run})} == {"succeeded"}
    )
    assert list(sdk.list_jobs(metadata={"run": run, "number": "2"})) == []
    for wrong, code in (({"x": "\n"}, "invalid_metadata_filter"), ({"": "x"}, "invalid_metadata_filter")):
        with pytest.raises(ComfyError) as caught:
            list(sdk.list_jobs(metadata=wrong))
        assert caught.value.code == code
    with pytest.raises(ComfyError) as caught:
        sdk.submit(sdk.workflows.from_json(image_workflow()), metadata={f"n{n}": "" for n in range(17)})
    assert (caught.value.code, caught.value.http_status) == ("metadata_invalid", 422)


def test_fifty_jobs_at_once_succeed_and_run_once(sdk: Comfy, fleet: Door) -> None:
    jobs = [sdk.submit(sdk.workflows.from_json(image_workflow())) for _ in range(50)]
    assert {job.wait(LIMIT_S).status for job in jobs} == {"succeeded"}
    assert all(fleet.site.runs(job.id) == 1 for job in jobs)


def test_a_key_makes_one_job_across_processes_and_restarts(
    fleet: Door, sdk: Comfy, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, site = f"a key {uuid.uuid4()}", fleet.site
    bad = image_workflow()
    del bad["3"]
    with pytest.raises(InvalidWorkflow):  # makes no job, so the key is free
        sdk.submit(sdk.workflows.from_json(bad), idempotency_key=key)
    job = sdk.submit(sdk.workflows.from_json(image_workflow()), idempotency_key=key, metadata={"key": key})
    with pytest.raises(IdempotencyKeyReuse):
        sdk.submit(sdk.workflows.from_json(image_workflow()), idempotency_key=key)
    other = Door(site, "second-serve", more=fleet.more)
    monkeypatch.setenv("COMFY_BASE_URL", other.url)
    with Comfy() as second:
        with pytest.raises(IdempotencyKeyReuse):
            second.submit(second.workflows.from_json(image_workflow()), idempotency_key=key)
        assert second.jobs.get(job.id).wait(LIMIT_S).status == "succeeded"
        assert [each.id for each in second.list_jobs(metadata={"key": key})] == [job.id]
        assert second.jobs.get(job.id).outputs[0].id == sdk.jobs.get(job.id).outputs[0].id
    other.kill()


def test_a_key_for_api_nodes_travels_with_the_job_and_nowhere_else(sdk: Comfy, fleet: Door) -> None:
    site = fleet.site
    asks = {"4": {"class_type": "StandinApi", "inputs": {"image": ["1", 0], "out": "text"}}}
    job = sdk.run(sdk.workflows.from_json(image_workflow(more=asks)), api_key=SECRET)
    (text,) = job.get_outputs("4")
    assert text.type == "text"
    assert text.to_bytes() == b"Unauthorized: the key *** is not known", "ComfyUI has had it"
    shown = json.dumps([requests.get(f"{fleet.url}/api/v2/jobs{path}", timeout=LIMIT_S).json()
                        for path in ("", f"/{job.id}", f"/{job.id}/workflow")])  # fmt: skip
    assert job.id in shown
    assert SECRET not in shown
    assert SECRET not in fleet.log.read_text() + site.log()
    for key in [key for key in (*site.keys("input/jobs/"), *site.keys(f"output/{job.id}/")) if job.id in key]:
        assert SECRET.encode() not in site.s3.get_object(Bucket=site.bucket, Key=key)["Body"].read()


def test_with_a_token_the_sdk_brings_it_as_its_key(
    fleet: Door, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = "a-token-of-thirty-two-characters"
    (tmp_path / "token").write_text(token)
    site = fleet.site
    rule = {"ID": "x", "Status": "Enabled", "Filter": {"Prefix": "input/assets/"}, "Expiration": {"Days": 3}}
    site.s3.put_bucket_lifecycle_configuration(Bucket=site.bucket, LifecycleConfiguration={"Rules": [rule]})
    guarded = Door(fleet.site, "guarded", "--token-file", str(tmp_path / "token"), "--no-redirect", more=fleet.more)
    monkeypatch.setenv("COMFY_BASE_URL", guarded.url)
    with Comfy() as client, pytest.raises(Unauthorized):
        list(client.list_jobs())
    assert requests.get(f"{guarded.url}/api/v2/health", timeout=LIMIT_S).json() == {"status": "healthy"}
    url = f"{guarded.url}/api/v2/jobs"
    assert requests.get(url, headers={"X-API-Key": token}, timeout=LIMIT_S).status_code == 200
    assert requests.get(url, timeout=LIMIT_S).json()["error"]["code"] == "unauthorized"
    with Comfy(api_key=token) as client:
        asset = client.assets.from_bytes(b"0123456789", filename="ten.bin")
        link = asset.get_download_url()
        assert link.url == f"{url.removesuffix('jobs')}assets/{asset.id}/content", "which is no redirect"
        headers = {"Authorization": f"Bearer {token}", "Range": "bytes=2-4"}
        part = requests.get(link.url, headers=headers, timeout=LIMIT_S)
        assert (part.status_code, part.content, part.headers["Content-Range"]) == (206, b"234", "bytes 2-4/10")
        headers["Range"] = "bytes=10-"
        assert requests.get(link.url, headers=headers, timeout=LIMIT_S).status_code == 416
        assert asset.expires_at == deleted_at(datetime.now(UTC), 3), "which S3 does by the rule"
        asset.delete()
    guarded.kill()
    site.s3.delete_bucket_lifecycle(Bucket=site.bucket)


def test_what_is_wrong_is_said_in_the_contracts_shape(fleet: Door) -> None:
    good = image_workflow()
    for body, status, code in (
        (b"no json", 422, "invalid_request"),
        ({"workflow": {"nodes": [], "links": [], "last_node_id": 1}}, 422, "workflow_format_ui"),
        ({"workflow": {}}, 422, "invalid_workflow"),
        ({}, 422, "invalid_workflow"),
        ({"workflow": good, "webhook_url": "http://x"}, 422, "invalid_request"),
        ({"workflow": good, "extra_data": {"other": "x"}}, 422, "invalid_request"),
        ({"workflow": good, "extra_data": {"api_key_comfy_org": None}}, 422, "invalid_request"),
        ({"workflow": good, "metadata": "a label"}, 422, "metadata_invalid"),
        ({"workflow": good, "metadata": {"a": 1}}, 422, "metadata_invalid"),
        ({"workflow": load({"__type": "core/ASSET"})}, 422, "missing_asset"),
    ):
        text = body if isinstance(body, bytes) else json.dumps(body)
        answer = requests.post(f"{fleet.url}/api/v2/jobs", data=text, timeout=LIMIT_S)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (status, code), body
        assert error["message"]
    for method, path, status, code in (
        ("GET", "/jobs/none", 404, "not_found"),
        ("GET", f"/jobs/{uuid.uuid4()}/events", 404, "not_found"),
        ("POST", f"/jobs/{uuid.uuid4()}/cancel", 404, "not_found"),
        ("GET", "/jobs?cursor=x", 400, "invalid_cursor"),
        ("GET", "/jobs?limit=0", 400, "invalid_request"),
        ("GET", "/assets/x/content", 404, "not_found"),
        ("PUT", "/jobs", 405, "method_not_allowed"),
        ("GET", "/nothing", 404, "not_found"),
        ("POST", "/assets", 422, "invalid_request"),
        ("POST", "/assets/from-hash", 404, "blob_not_found"),
    ):
        answer = requests.request(method, f"{fleet.url}/api/v2{path}", timeout=LIMIT_S)
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), path
    form = b'--b\r\nContent-Disposition: form-data; name="\x1f\xf1"\r\n\r\nx\r\n--b--\r\n'
    for path, status in (("/api/v2/assets", 422), ("/upload/image", 400)):
        kind = {"Content-Type": "multipart/form-data; boundary=b"}
        answer = requests.post(fleet.url + path, data=form, headers=kind, timeout=LIMIT_S)
        assert answer.status_code == status, "the name of a field is no header"
    for path in ("", "models/loras/x.safetensors", "../x.png", "/etc/x.png"):
        answer = upload(fleet, b"x", path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (422, "invalid_request"), path


def test_an_upload_that_breaks_off_leaves_nothing(fleet: Door) -> None:
    site, before = fleet.site, fleet.site.keys("input/assets/")

    def under_way() -> list[Any]:
        return list(site.s3.list_multipart_uploads(Bucket=site.bucket).get("Uploads", []))

    host, port = fleet.address.split(":")
    with socket.create_connection((host, int(port)), LIMIT_S) as line:
        head = "POST /api/v2/assets HTTP/1.1\r\nHost: x\r\nContent-Length: 99000000\r\n"
        head += "Content-Type: multipart/form-data; boundary=b\r\nIdempotency-Key: broken-off\r\n\r\n"
        head += '--b\r\nContent-Disposition: form-data; name="file"; filename="x.bin"\r\n\r\n'
        line.sendall(head.encode() + b"x" * (9 * 1024 * 1024))
        await_that("a part is stored", under_way)
    await_that("nothing is left half done", lambda: not under_way())
    assert site.keys("input/assets/") == before
    await_that("its key is free", lambda: upload(fleet, b"", "x.bin", {"Idempotency-Key": "broken-off"}).ok)
    answer = upload(fleet, b"", "x.bin", {"Idempotency-Key": "broken-off"})
    assert answer.json()["error"]["code"] == "idempotency_key_reuse"


@pytest.mark.parametrize(
    ("rule", "days"),
    [
        ({"Filter": {"Prefix": "output/"}}, 7),
        ({"Filter": {"Prefix": ""}}, 7),
        ({"Prefix": "out"}, 7),
        ({"Filter": {}}, 7),
        ({"Filter": {"Prefix": "output/x"}}, None),
        ({"Filter": {"Prefix": "input/"}}, None),
        ({"Filter": {"And": {"Prefix": "output/", "Tags": []}}}, None),
        ({"Filter": {"Tag": {"Key": "x", "Value": "y"}}}, None),
        ({"Filter": {"Prefix": "output/"}, "Status": "Disabled"}, None),
    ],
)
def test_a_rule_counts_where_it_deletes_all_that_lies_below(rule: dict[str, Any], days: int | None) -> None:
    aborts = {"Status": "Enabled", "Filter": {"Prefix": ""}, "AbortIncompleteMultipartUpload": {}}
    rules = [aborts, {"Status": "Enabled", "Expiration": {"Days": 7}} | rule]
    assert days_of(rules, "output/") == days


def test_s3_deletes_at_the_midnight_that_follows() -> None:
    assert deleted_at(datetime(2026, 1, 1, 0, 0, tzinfo=UTC), 2) == datetime(2026, 1, 3, tzinfo=UTC)
    assert deleted_at(datetime(2026, 1, 1, 0, 1, tzinfo=UTC), 2) == datetime(2026, 1, 4, tzinfo=UTC)


def test_a_key_counts_for_a_day(fleet: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load_settings(path=fleet.site.folder / "env", environ={})
    for name, value in fleet.site.environment().items():
        monkeypatch.setenv(name, value)

    async def run() -> None:
        cloud = Cloud(settings)
        claims = Claims(cloud)
        assert [await claims.take("jobs", "one") for _ in range(2)] == [True, False]
        await claims.let_go("jobs", "one")
        assert await claims.take("jobs", "one")
        assert await claims.take("assets", "one"), "which is another"
        monkeypatch.setattr("operate.gateway.claims.KEPT_S", -1)
        assert await claims.take("jobs", "one")
        cloud.end()

    asyncio.run(run())


def upload(fleet: Door, data: bytes, path: str, headers: dict[str, str] | None = None) -> requests.Response:
    """An upload as a form whose file comes first."""
    return requests.post(
        f"{fleet.url}/api/v2/assets",
        files={"file": ("", data, "image/png")},
        data={"file_path": path, "content_type": "image/png"},
        headers=headers,
        timeout=LIMIT_S,
    )
