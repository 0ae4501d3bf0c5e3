"""The local cloud's stand-ins for what start_service.sh calls."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from machine import (
    Bucket,
    Machine,
    bucket,
    machine,
    s3_server,
)
from places import CLOUD

__all__ = ["bucket", "machine", "s3_server"]


def test_the_mount_stand_in_copies_and_marks(machine: Machine, bucket: Bucket) -> None:
    for name in ("mount-s3", "mountpoint"):
        (machine.stubs / name).unlink()
    machine.runs("comfyui", S3_BUCKET=bucket.name)
    mount = machine.home / "s3"
    assert (machine.comfyui / "models/checkpoints/a.safetensors").read_text() == "one"
    assert not (mount / "output/large.png").exists()

    def call(*words: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(words, env=machine.environ, capture_output=True, text=True, check=False)

    assert call("mountpoint", "-q", mount).returncode == 0
    assert call("mountpoint", "-q", machine.home).returncode != 0
    again = call("mount-s3", bucket.name, mount)
    assert (again.returncode, "already mounted" in again.stderr) == (1, True)

    # An image of the machine carries the copied files, but not the mount.
    image = machine.home.with_name("image")
    shutil.copytree(mount, image)
    assert call("mountpoint", "-q", image).returncode != 0
    bucket.delete("models/checkpoints/a.safetensors")
    mounted = call("mount-s3", "--allow-delete", "--allow-overwrite", bucket.name, image)
    assert mounted.returncode == 0, mounted.stderr
    assert call("mountpoint", "-q", image).returncode == 0
    assert not (image / "models/checkpoints/a.safetensors").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--allow-delet", "b-1", "."], "'--allow-delet'"),
        (["no-such-bucket-here", "."], "no-such-bucket-here"),
        (["b-1", "/no/such/folder"], "/no/such/folder"),
        (["b-1"], "required"),
    ],
)
def test_the_mount_stand_in_refuses(machine: Machine, s3_server: str, words: list[str], said: str) -> None:
    (machine.stubs / "aws").unlink()
    environ = machine.environ | {"AWS_ENDPOINT_URL": s3_server, "AWS_DEFAULT_REGION": "us-west-2"}
    done = subprocess.run(
        [CLOUD / "bin/mount-s3", *words],
        env=environ,
        cwd=machine.state,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert said in done.stderr


def test_the_cloud_init_stand_in_refuses_what_it_does_not_play(machine: Machine) -> None:
    done = subprocess.run([CLOUD / "bin/cloud-init", "clean"], env=machine.environ, check=False)
    assert done.returncode == 2
