"""start_service.sh: the instance store."""

from __future__ import annotations

import shutil
import subprocess

import pytest
from machine import (
    INSTANCE_STORE,
    Machine,
    machine,
)
from places import ROOT

__all__ = ["machine"]

Disks = dict[str, dict[str, object]]

ROOT_DISK: Disks = {"/dev/nvme0n1": {"MODEL": "Amazon Elastic Block Store", "children": ["nvme0n1p1"]}}

BLANK: dict[str, object] = {"MODEL": INSTANCE_STORE}

OURS: dict[str, object] = BLANK | {"FSTYPE": "ext4", "LABEL": "comfy-local"}


@pytest.mark.parametrize(
    ("disks", "formatted", "mounted"),
    [
        ({}, None, None),
        ({"/dev/nvme1n1": BLANK}, "/dev/nvme1n1", "/dev/nvme1n1"),
        ({"/dev/nvme1n1": OURS}, None, "/dev/nvme1n1"),
        ({"/dev/nvme1n1": BLANK, "/dev/nvme2n1": OURS}, None, "/dev/nvme2n1"),
        ({"/dev/nvme1n1": BLANK | {"FSTYPE": "xfs"}}, None, None),
        ({"/dev/nvme1n1": BLANK | {"FSTYPE": "ext4", "LABEL": "comfy-local-2"}}, None, None),
        ({"/dev/nvme1n1": BLANK | {"FSTYPE": "xfs"}, "/dev/nvme2n1": BLANK}, "/dev/nvme2n1", "/dev/nvme2n1"),
        ({"/dev/nvme1n1": BLANK | {"children": ["nvme1n1p1"]}}, None, None),
        ({"/dev/nvme1n1": OURS | {"MOUNTPOINT": "/data"}}, None, None),
        ({"/dev/nvme1n1": BLANK | {"MOUNTPOINT": "/data"}}, None, None),
        ({"/dev/nvme1n1": BLANK | {"signature": "offset 0x1fe dos"}}, None, None),
        ({"/dev/nvme1n1": BLANK | {"MODEL": "Amazon Elastic Block Store"}}, None, None),
        ({"/dev/nvme1n1": BLANK | {"MODEL": INSTANCE_STORE + " 2"}}, None, None),
        ({"/dev/nvme1n1": BLANK | {"broken": True}}, "/dev/nvme1n1", None),
    ],
)
def test_only_a_blank_instance_store_is_formatted(
    machine: Machine, disks: Disks, formatted: str | None, mounted: str | None
) -> None:
    machine.disks({**ROOT_DISK, **disks})
    machine.settings(COPY_MODEL_TO_LOCAL="awscli")
    machine.runs("comfyui")
    format_calls = [f"mkfs.ext4 -q -L comfy-local {formatted}"] if formatted else []
    mount_calls = [f"mount -o noatime {mounted} {machine.home}/local"] if mounted else []
    assert machine.calls("mkfs.ext4") == format_calls
    assert machine.calls("mount") == mount_calls
    assert machine.link("models") == "../local/models"


def test_an_instance_store_is_found_again(machine: Machine) -> None:
    machine.disks({**ROOT_DISK, "/dev/nvme1n1": BLANK})
    machine.settings(COPY_MODEL_TO_LOCAL="awscli")
    machine.runs("comfyui")
    machine.runs("comfyui")
    assert len(machine.calls("mount")) == 1, "a restart of the service mounts it again"
    # After a reboot it has our file system but is not mounted.
    (machine.state / "mounted").unlink()
    machine.disks({**ROOT_DISK, "/dev/nvme1n1": OURS})
    machine.runs("comfyui")
    assert len(machine.calls("mount")) == 2
    assert len(machine.calls("mkfs.ext4")) == 1


def test_without_sudo_the_root_disk_is_used(machine: Machine) -> None:
    machine.stub("sudo", "echo sudo: a password is required >&2; exit 1")
    machine.disks({"/dev/nvme1n1": BLANK, "/dev/nvme2n1": OURS})
    machine.settings(COPY_MODEL_TO_LOCAL="awscli")
    machine.runs("comfyui")
    assert machine.calls("mkfs.ext4") == machine.calls("mount") == []


def test_without_the_copy_an_instance_store_is_the_mounts_cache(machine: Machine) -> None:
    machine.disks({"/dev/nvme1n1": BLANK})
    machine.runs("comfyui")
    cache = machine.home / "local/cache"
    options = f"--allow-delete --allow-overwrite --cache {cache} --metadata-ttl minimal"
    assert machine.calls("mount-s3") == [f"mount-s3 {options} bucket-of-base {machine.home}/s3"]
    assert cache.stat().st_mode & 0o777 == 0o700
    assert machine.link("models") == "../s3/models"


@pytest.mark.parametrize("copy", ["", "awscli"])
def test_there_is_no_cache_where_there_is_no_use_for_it(machine: Machine, copy: str) -> None:
    machine.disks({"/dev/nvme1n1": BLANK if copy else BLANK | {"FSTYPE": "xfs"}})
    machine.settings(COPY_MODEL_TO_LOCAL=copy)
    machine.runs("comfyui")
    assert [call.split()[1:-2] for call in machine.calls("mount-s3")] == [["--allow-delete", "--allow-overwrite"]]


def test_a_mountpoint_that_knows_no_such_cache_does_without(machine: Machine) -> None:
    machine.disks({"/dev/nvme1n1": OURS})
    machine.stub("mount-s3", '[[ $* != *minimal* ]] && echo "${@: -1}" >>"$STATE/mounted"')
    result = machine.run("comfyui")
    assert result.returncode == 0, result.stderr
    assert "mounting without it" in result.stdout
    assert machine.started()


@pytest.mark.skipif(not shutil.which("lsblk"), reason="no lsblk here")
@pytest.mark.parametrize(
    "words",
    [
        "--nodeps --noheadings --paths --output NAME,MODEL",
        "--noheadings --output NAME,FSTYPE,LABEL,MOUNTPOINT",
        "--nodeps --noheadings --raw --output LABEL,MOUNTPOINT",
    ],
)
def test_the_real_lsblk_knows_our_options(words: str) -> None:
    assert f"lsblk {words}" in (ROOT / "start_service.sh").read_text()
    done = subprocess.run(["lsblk", *words.split()], capture_output=True, text=True, check=False)
    assert "unknown" not in done.stderr
    assert "unrecognized" not in done.stderr
