"""provision/image.sh: new images, and the way back."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from aws_fixtures import Aws, Bundle, tags_of
from environment_pro import (
    BUCKET,
    image_ids,
    image_in_use,
    run_well,
)
from workplace import Sample

from comfy_utils import OBJECT_INFO_KEY
from ground.comfyui import SYSTEM_STATS_KEY, ComfyUI


@pytest.mark.slow
@pytest.mark.sampled("stories", 3)
def test_a_rebake_and_a_rollback_that_are_killed_after_each_change_are_gone_on_with(
    bundle: Bundle, aws: Aws, sample: Sample
) -> None:
    base = aws.make_base(looks_until_available=2)
    run_well(bundle, "pro", base.instance_id)
    (first,) = image_ids(aws.everything("pro"))

    rebake = ("create_env.sh", "pro", base.instance_id, "--rebake", "--keep", "0")
    changes = (
        "ec2 create-image",
        "ec2 create-launch-template-version",
        "ec2 modify-launch-template",
        "autoscaling create-or-update-tags",
        "ec2 deregister-image",
    )
    for words in sample(changes, 1):
        assert bundle.run_killed(*rebake, after=words) is None, words
        if words == "ec2 create-launch-template-version":
            lines = run_well(bundle, "pro", base.instance_id)
            assert image_in_use(aws.everything("pro")) == first, "a plain run does not move the fleet"
            assert any("waits for the --rebake that was stopped" in line for line in lines)
    run_well(bundle, *rebake[1:])
    found = aws.everything("pro")
    (second,) = image_ids(found)
    assert second != first
    assert image_in_use(found) == second
    assert len(found["versions"]) == 2
    assert len(found["snapshots"]) == 1, "the snapshot whose image had gone when it was killed has gone too"

    run_well(bundle, *rebake[1:4])
    third = image_ids(aws.everything("pro"))[-1]
    rollback = ("create_env.sh", "pro", base.instance_id, "--rollback")
    for words in sample(("ec2 create-tags", *changes[1:4]), 1):
        assert bundle.run_killed(*rollback, after=words) is None, words
    run_well(bundle, *rollback[1:])
    found = aws.everything("pro")
    assert image_ids(found) == [second, third]
    assert image_in_use(found) == second
    assert len(found["versions"]) == 4


@pytest.mark.slow
@pytest.mark.sampled("stories", 3)
def test_the_fleet_moves_to_new_images_and_back(bundle: Bundle, aws: Aws) -> None:
    base = aws.make_base(looks_until_available=3)

    def run(*options: str) -> list[str]:
        return run_well(bundle, "pro", base.instance_id, *options)

    def run_foretold(*options: str) -> list[str]:
        """A run that --dry-run, which changes nothing, foretells line by line."""
        before = aws.everything("pro")
        foretold = [foreseen(line) for line in run_well(bundle, "pro", base.instance_id, *options, "--dry-run")]
        assert aws.everything("pro") == before
        lines = run(*options)
        told = [foreseen(line) for line in lines if "waiting until it can be used" not in line]
        assert told == foretold
        return lines

    def foreseen(line: str) -> str:
        return re.sub(r"ami-\S+|snap-\S+|20\d{6}T\d{6}Z", "*", line.replace("to be ", "")).replace(" ", "")

    assert "waiting until it can be used, some minutes: 33%" in str(run_foretold("--wait"))
    (first,) = image_ids(aws.everything("pro"))
    ec2 = aws.client("ec2")
    (busy,) = ec2.run_instances(ImageId=first, MinCount=1, MaxCount=1)["Instances"]
    shown = str(run_foretold("--rebake"))
    assert "waiting until it can be used, some minutes: 33%" in shown
    assert "waiting until it can be used, some minutes: 66%" in shown
    second = image_in_use(aws.everything("pro"))
    assert image_ids(aws.everything("pro")) == [first, second], "one is kept"
    run_foretold("--rollback")
    assert image_in_use(aws.everything("pro")) == first
    run()
    assert image_in_use(aws.everything("pro")) == first, "not undone by a plain run, though there is a newer image"
    refused_rollback = bundle.run("create_env.sh", "pro", base.instance_id, "--rollback")
    assert "there is no earlier image of pro to go back to" in refused_rollback.stderr
    bundle.set(MAX_INSTANCES="7")
    run_foretold("--rebake", "--keep", "0")
    found = aws.everything("pro")
    third = image_in_use(found)
    assert image_ids(found) == [first, third], "what was rolled back is gone, what an instance uses stays"
    assert [tags_of(image["Tags"]).get("comfy-image") for image in found["images"]] == [None, "used"]
    ec2.terminate_instances(InstanceIds=[busy["InstanceId"]])
    run("--keep", "0")
    found = aws.everything("pro")
    assert image_ids(found) == [third]
    assert len(found["snapshots"]) == 1
    assert found["groups"][0]["MaxSize"] == 7


def test_what_the_bases_comfyui_has_is_stored_when_its_image_is_made(bundle: Bundle, aws: Aws) -> None:
    answers: dict[str, dict[str, Any]] = {
        "/object_info": {"KSampler": {"input": {"required": {"steps": ["INT"]}}}, "Ä": {}},
        "/system_stats": {"system": {"comfyui_version": "0.33.0"}},
        "/node_replacements": {"Ä": [{"new_node_id": "C"}], "Old": [{"new_node_id": "New"}]},
    }
    described = answers["/object_info"] | {"Old": {"replaced_by": [{"new_node_id": "New"}]}}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path in answers else 404)
            self.end_headers()
            self.wfile.write(json.dumps(answers.get(self.path)).encode())

        def log_message(self, *_: object) -> None:
            pass

    aws.make_bucket(BUCKET, files=())
    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"127.0.0.1:{server.server_port}"
    shell = "COMFYUI_ANSWERS=yes; store_object_info; echo none; IMAGE_MADE=yes; store_object_info"
    ran = bundle.run_function(shell, "image", COMFY_ADDRESS=address)
    assert ComfyUI(address).object_info() == described, "what a worker would store"
    assert (ran.returncode, ran.stderr) == (0, "")
    assert re.fullmatch(f"none\nnodes +s3://{BUCKET}/{OBJECT_INFO_KEY} +updated\n", ran.stdout)
    stored = aws.client("s3").get_object(Bucket=BUCKET, Key=OBJECT_INFO_KEY)
    text = gzip.decompress(stored["Body"].read())
    assert json.loads(text) == described
    stats = aws.client("s3").get_object(Bucket=BUCKET, Key=SYSTEM_STATS_KEY)["Body"].read()
    assert json.loads(stats) == answers["/system_stats"], "the editor asks for it"
    # By the same digest the workers see that they need not store it again.
    assert stored["Metadata"]["sha256"] == hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()

    del answers["/node_replacements"]  # as a server of before 0.14
    assert bundle.run_function(shell, "image", COMFY_ADDRESS=address).stderr == ""
    stored = aws.client("s3").get_object(Bucket=BUCKET, Key=OBJECT_INFO_KEY)
    assert (
        json.loads(gzip.decompress(stored["Body"].read()))
        == ComfyUI(address).object_info()
        == answers["/object_info"]
    )

    server.shutdown()
    server.server_close()
    ran = bundle.run_function("IMAGE_MADE=yes COMFYUI_ANSWERS=yes; store_object_info", "image", COMFY_ADDRESS=address)
    assert (ran.returncode, ran.stdout) == (0, "")
    assert "what ComfyUI has installed is not stored" in ran.stderr
