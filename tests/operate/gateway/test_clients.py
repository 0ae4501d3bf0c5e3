"""Clients that others have written, unchanged, on a fleet of three instances: the official SDK by the official proxy,
and ComfyUI's own example of a script."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import websocket
from comfy_sdk import Comfy, InvalidWorkflow, JobFailed
from gateway_tools import Door, start_instance
from gateway_walk import picture
from local_cloud import free_port
from workplace import LIMIT_S, Site, await_that, image_workflow


@pytest.fixture(scope="module")
def fleet_of_three(door: Door, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Path]]:
    """The input folders of the door's instance and of two more on the same environment."""
    site = door.site
    started: list[subprocess.Popen[bytes]] = []
    folders = [site.folder / "ComfyUI/input"]
    for number in range(2):
        folder = tmp_path_factory.mktemp(f"instance{number}")
        started += start_instance(site, folder)
        folders.append(folder / "ComfyUI/input")
    yield folders
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def sdk(door: Door, fleet_of_three: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Comfy]:
    """The SDK, told of the proxy, which was told of the fleet's address."""
    assert len(fleet_of_three) == 3
    port, folder = free_port(), tmp_path_factory.mktemp("proxy")
    command = [str(Path(sys.executable).with_name("comfy-api-proxy")), "--comfyui", door.url, "--port", str(port)]
    with (folder / "log").open("wb") as log:
        proxy = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        try:
            return requests.get(f"{url}/api/v2/health", timeout=LIMIT_S).status_code < 500
        except requests.ConnectionError:
            return False

    await_that("the proxy answers", answers)
    before = os.environ.get("COMFY_BASE_URL")
    os.environ["COMFY_BASE_URL"] = url
    try:
        client = Comfy()
    finally:
        os.environ.pop("COMFY_BASE_URL") if before is None else os.environ.update(COMFY_BASE_URL=before)
    with client:
        yield client
    proxy.kill()
    proxy.wait()


def bring_inputs(site: Site, folders: list[Path]) -> None:
    """What Mountpoint does: the bucket's inputs are in each instance's folder."""
    for key in site.keys("input/"):
        if not key.startswith("input/jobs/"):
            for folder in folders:
                path = folder / key.removeprefix("input/")
                path.parent.mkdir(parents=True, exist_ok=True)
                site.s3.download_file(site.bucket, key, str(path))


def end_of(job: Any) -> str:
    """How a job ended. The proxy calls one "expired" that ends between its two questions (its own fault, before a
    real ComfyUI as well), and knows better when it is asked again."""

    def status() -> str:
        return str(job.refresh().status)

    await_that("the job has ended", lambda: status() in ("succeeded", "failed", "canceled"))
    return str(job.status)


def test_a_job_runs_and_its_pictures_are_those_of_the_bucket(sdk: Comfy, door: Door) -> None:
    job = sdk.submit(sdk.workflows.from_json(image_workflow(0.5)))
    assert end_of(job) == "succeeded"
    (output,) = job.get_outputs("3")
    site = door.site
    (key,) = [key for key in site.keys("output/") if key.endswith(output.name) and str(job.id) in key]
    assert output.to_bytes() == site.s3.get_object(Bucket=site.bucket, Key=key)["Body"].read()


def test_its_events_come_until_it_ends(sdk: Comfy) -> None:
    job = sdk.submit(sdk.workflows.from_json(image_workflow(3)))
    kinds = [type(event).__name__ for event in job.events()]
    assert kinds
    assert end_of(job) == "succeeded"


def test_a_running_job_is_cancelled(sdk: Comfy) -> None:
    job = sdk.submit(sdk.workflows.from_json(image_workflow(60)))
    await_that("it runs", lambda: job.refresh().status == "running")
    job.cancel()
    assert end_of(job) == "canceled"


def test_a_bad_workflow_is_refused_with_its_node(sdk: Comfy) -> None:
    workflow = image_workflow()
    del workflow["3"]["inputs"]["images"]
    with pytest.raises(InvalidWorkflow) as caught:
        sdk.submit(sdk.workflows.from_json(workflow))
    assert "3" in repr(vars(caught.value))


def test_a_failing_node_fails_the_job_with_its_reason(sdk: Comfy) -> None:
    workflow = {
        "1": {"class_type": "LoadImage", "inputs": {"image": "broken.png"}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "x"}},
    }
    job = sdk.submit(sdk.workflows.from_json(workflow))
    assert end_of(job) == "failed"
    assert job.error.node_id == "1"
    assert "identify" in job.error.message
    with pytest.raises(JobFailed):
        job.result()


def test_an_uploaded_picture_is_used(sdk: Comfy, door: Door, fleet_of_three: list[Path]) -> None:
    asset = sdk.assets.from_bytes(picture("red", 24), filename="mine.png")
    asset.commit()
    bring_inputs(door.site, fleet_of_three)
    workflow = sdk.workflows.from_json({
        "1": {"class_type": "LoadImage", "inputs": {"image": "to be set"}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "x"}},
    })  # fmt: skip
    workflow.set_input("1", "image", asset)
    job = sdk.submit(workflow)
    assert end_of(job) == "succeeded"
    assert job.get_outputs("2")[0].to_bytes()[16:24] == picture("red", 24)[16:24], "as large as it was"


def test_fifty_jobs_at_once_are_spread_over_the_instances(sdk: Comfy, door: Door) -> None:
    jobs = [sdk.submit(sdk.workflows.from_json(image_workflow(0.5))) for _ in range(50)]
    assert {end_of(job) for job in jobs} == {"succeeded"}
    ran = [json.loads(line) for line in door.site.ledger.read_text().splitlines()]
    ids = {str(job.id) for job in jobs}
    starts = [(entry["pid"], entry["prompt_id"]) for entry in ran if entry["event"] == "start"]
    ours = [(pid, job_id) for pid, job_id in starts if any(job_id in each or each in job_id for each in ids)]
    assert len(ours) == len(set(ours)) == 50, "each ran once"
    assert len({pid for pid, _ in ours}) == 3


def test_a_script_after_comfyuis_own_example_gets_its_pictures(door: Door, fleet_of_three: list[Path]) -> None:
    """As script_examples/websockets_api_example.py does it: post, listen until nothing is at work, ask the history,
    fetch each picture."""
    assert fleet_of_three
    client_id = str(uuid.uuid4())
    line = websocket.WebSocket()
    line.connect(f"ws://{door.address}/ws?clientId={client_id}")  # type: ignore[no-untyped-call]
    line.settimeout(LIMIT_S)
    body = json.dumps({"prompt": image_workflow(0.5), "client_id": client_id}).encode()
    job_id = requests.post(f"http://{door.address}/prompt", data=body, timeout=LIMIT_S).json()["prompt_id"]
    while True:
        said = line.recv()
        if isinstance(said, str):
            message = json.loads(said)
            if message["type"] == "executing" and message["data"]["node"] is None:
                assert message["data"]["prompt_id"] == job_id
                break
    line.close()
    history = requests.get(f"http://{door.address}/history/{job_id}", timeout=LIMIT_S).json()[job_id]
    pictures = [
        requests.get(f"http://{door.address}/view", params=image, timeout=LIMIT_S).content
        for output in history["outputs"].values()
        for image in output.get("images", [])
    ]
    assert [each[:4] for each in pictures] == [b"\x89PNG"]


def test_a_script_after_comfyuis_other_example_gets_its_pictures_over_the_websocket(
    door: Door, fleet_of_three: list[Path]
) -> None:
    """As script_examples/websockets_api_example_ws_images.py does it: binary frames while that node is at work."""
    assert fleet_of_three
    client_id, node = str(uuid.uuid4()), "save_image_websocket_node"
    line = websocket.create_connection(f"ws://{door.address}/ws?clientId={client_id}", timeout=LIMIT_S)
    workflow = image_workflow(0.5) | {node: {"class_type": "SaveImageWebsocket", "inputs": {"images": ["2", 0]}}}
    body = json.dumps({"prompt": workflow, "client_id": client_id}).encode()
    job_id = requests.post(f"http://{door.address}/prompt", data=body, timeout=LIMIT_S).json()["prompt_id"]
    at_work, pictures = "", []
    while True:
        said = line.recv()
        if isinstance(said, bytes):
            if at_work == node:
                pictures.append(said[8:])
            continue
        message = json.loads(said)
        if message["type"] == "executing" and message["data"]["prompt_id"] == job_id:
            if message["data"]["node"] is None:
                break
            at_work = message["data"]["node"]
    line.close()
    assert [each[:4] for each in pictures] == [b"\x89PNG"]
