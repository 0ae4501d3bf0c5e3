"""start_service.sh: the mounted bucket, and the links into it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from machine import (
    Machine,
    machine,
)

__all__ = ["machine"]


def test_the_bucket_is_mounted_once(machine: Machine) -> None:
    machine.runs("comfyui")
    machine.runs("comfyui")
    mount = f"mount-s3 --allow-delete --allow-overwrite bucket-of-base {machine.home}/s3"
    assert machine.calls("mount-s3") == [mount]
    assert machine.calls("fusermount") == []


def test_a_failed_mount_starts_nothing(machine: Machine) -> None:
    machine.stub("mount-s3", "echo no such bucket >&2; exit 1")
    answer = machine.fails("comfyui")
    assert "no such bucket" in answer
    assert "cannot mount the bucket bucket-of-base" in answer


def test_a_dead_mount_is_unmounted_first(machine: Machine) -> None:
    dead = "stat: cannot statx '$1': Transport endpoint is not connected"
    machine.stub("stat", f'[[ $1 != *s3 || -e $STATE/unmounted ]] || {{ echo "{dead}" >&2; exit 1; }}\necho 0')
    machine.runs("comfyui")
    calls = (machine.state / "calls").read_text().splitlines()
    order = [call.split()[0] for call in calls if call.split()[0] in ("fusermount", "mount-s3")]
    assert order == ["fusermount", "mount-s3"]
    assert machine.calls("fusermount") == [f"fusermount -uz {machine.home}/s3"]


def test_comfyuis_folders_are_links_into_the_mount(machine: Machine) -> None:
    for empty in ("input", "output"):
        (machine.comfyui / empty).mkdir()
    machine.runs("comfyui")
    for name in ("models", "input", "output"):
        assert machine.link(name) == f"../s3/{name}"
        assert (machine.home / "s3" / name).is_dir()
    result = machine.run("comfyui")
    assert "now points" not in result.stdout


def test_what_somebody_put_there_is_left_alone(machine: Machine, tmp_path: Path) -> None:
    (machine.comfyui / "models").mkdir()
    (machine.comfyui / "models/my.safetensors").write_text("mine")
    (machine.comfyui / "input").symlink_to(tmp_path / "not-mounted-yet")
    (machine.comfyui / "output").symlink_to(tmp_path)
    result = machine.run("comfyui")
    assert result.returncode == 0
    assert (machine.comfyui / "models/my.safetensors").read_text() == "mine"
    assert machine.link("input") == str(tmp_path / "not-mounted-yet")
    assert machine.link("output") == str(tmp_path)
    assert result.stdout.count("left alone") == 3


@pytest.mark.parametrize("old", ["{home}/local/models", "../local/models", "{home}/s3/old", "../s3/gone"])
def test_our_own_links_are_pointed_anew(machine: Machine, old: str) -> None:
    (machine.comfyui / "models").symlink_to(old.format(home=machine.home))
    machine.runs("comfyui")
    assert machine.link("models") == "../s3/models"


def test_links_survive_a_copy_of_the_folder(machine: Machine, tmp_path: Path) -> None:
    machine.runs("comfyui")
    shutil.copytree(machine.home, tmp_path / "copy", symlinks=True)
    (tmp_path / "copy/s3/models/x").touch()
    assert (tmp_path / "copy/ComfyUI/models/x").exists()
    assert not (machine.comfyui / "models/x").exists()
