"""provision/base_files.sh: the base machine's files go to its bucket."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from aws_fixtures import Aws, Bundle
from environment_pro import (
    BASE_BUCKET,
    run_well,
)
from places import CLOUD
from workplace import Sample


@pytest.fixture
def comfy_home(bundle: Bundle) -> Path:
    """A base machine's folder with files in ComfyUI, of which one lies elsewhere."""
    comfyui = bundle.folder / "ComfyUI"
    (comfyui / "models" / "loras").mkdir(parents=True)
    (comfyui / "models" / "checkpoints").mkdir()
    (comfyui / "models" / "checkpoints" / "a model.safetensors").write_text("weights")
    (bundle.folder / "elsewhere.safetensors").write_text("more weights")
    (comfyui / "models" / "linked.safetensors").symlink_to(bundle.folder / "elsewhere.safetensors")
    (comfyui / "input").mkdir()
    (comfyui / "output").mkdir()
    (comfyui / "output" / "日本.png").write_text("picture")
    bundle.set(COMFY_HOME=str(bundle.folder))
    return bundle.folder


MOVED = {
    "models/checkpoints/a model.safetensors": "weights",
    "models/linked.safetensors": "more weights",
    "models/loras/": "",
    "output/日本.png": "picture",
}


def look_of(folder: Path) -> dict[str, str]:
    """Every file and link below ComfyUI and what it holds."""
    return {
        str(path.relative_to(folder)): str(path.readlink()) if path.is_symlink() else path.read_text()
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


LINKED = {name: f"../s3/{name}" for name in ("models", "input", "output")}


def test_base_gets_a_bucket_and_queues(bundle: Bundle, aws: Aws) -> None:
    foretold = run_well(bundle, "base", "--dry-run")
    assert aws.everything("base") == {}
    lines = run_well(bundle, "base")
    assert [line.replace("to be ", "") for line in foretold] == lines
    found = aws.everything("base")
    assert set(found) >= {"bucket", "simple-comfy-base-queue", "simple-comfy-base-queue-dlq"}
    assert not {"images", "groups", "templates"} & set(found)
    assert set(found["bucket access"].values()) == {True}
    assert all(line.endswith("already there") for line in run_well(bundle, "base"))
    assert aws.everything("base") == found


@pytest.mark.slow
@pytest.mark.sampled("stories", 3)
def test_data_is_moved_to_the_bucket_by_any_number_of_runs_that_are_killed(
    bundle: Bundle, aws: Aws, comfy_home: Path, sample: Sample
) -> None:
    options = ("base", "--move-data", "--yes")
    before = look_of(comfy_home / "ComfyUI")
    foretold = run_well(bundle, *options, "--dry-run")
    assert aws.everything("base") == {}
    assert look_of(comfy_home / "ComfyUI") == before
    kept = shutil.copytree(comfy_home, comfy_home.parent / "kept", symlinks=True)
    lines = run_well(bundle, *options)
    assert [re.sub(" +", " ", line.replace("to be ", "")) for line in foretold] == [
        re.sub(" +", " ", line) for line in lines
    ]
    assert aws.files(BASE_BUCKET) == MOVED
    assert look_of(comfy_home / "ComfyUI") == LINKED
    assert (comfy_home / "elsewhere.safetensors").read_text() == "more weights"

    def begin_again() -> None:
        aws.reset()
        shutil.rmtree(comfy_home)
        shutil.copytree(kept, comfy_home, symlinks=True)

    begin_again()
    calls = bundle.run_killed("create_env.sh", *options, after=1000)
    assert calls
    for call in sample(range(1, calls + 1), 1):
        begin_again()
        assert bundle.run_killed("create_env.sh", *options, after=call) is None
        there = set(aws.files(BASE_BUCKET).values()) if aws.client("s3").list_buckets()["Buckets"] else set()
        here = {path.read_text() for path in (comfy_home / "ComfyUI").rglob("*") if path.is_file()}
        assert here | there >= {"weights", "more weights", "picture"}, f"a file was lost after call {call}"
        run_well(bundle, *options)
        assert aws.files(BASE_BUCKET) == MOVED
        assert look_of(comfy_home / "ComfyUI") == LINKED


def meddle(bundle: Bundle, words: str, command: str) -> str:
    """A PATH on which `command` runs once, right after the first AWS call with these words."""
    folder = bundle.folder.parent / "meddling"
    folder.mkdir()
    stub = folder / "aws"
    stub.write_text(
        f"""#!/usr/bin/env bash
'{CLOUD}/bin/aws' "$@" || exit
if [[ " $* " == *" {words} "* ]] && mkdir '{folder}/done' 2>/dev/null; then {command}; fi
"""
    )
    stub.chmod(0o755)
    return f"{folder}:{bundle.aws.environment()['PATH']}"


def test_a_file_that_changes_while_it_is_copied_is_copied_again(bundle: Bundle, aws: Aws, comfy_home: Path) -> None:
    path = meddle(bundle, "s3 sync", f"printf WEIGHTS >'{comfy_home}/ComfyUI/models/checkpoints/a model.safetensors'")
    ran = bundle.run("create_env.sh", "base", "--move-data", PATH=path)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert aws.files(BASE_BUCKET) == MOVED | {"models/checkpoints/a model.safetensors": "WEIGHTS"}
    moved = comfy_home / "ComfyUI" / "models.moved" / "checkpoints" / "a model.safetensors"
    assert moved.read_text() == "WEIGHTS", "without --yes, and nobody to ask, the folder stays beside the link"
    assert "run this again with --yes to remove it" in ran.stdout
    late = moved.with_name("late.safetensors")
    late.write_text("written after the last look")
    ran = bundle.run("create_env.sh", "base", "--move-data", "--yes")
    assert f"{comfy_home}/ComfyUI/models.moved has files that are not in the bucket" in ran.stderr
    assert late.exists()
    late.unlink()
    path = bundle.break_call("s3api list-objects-v2", "AccessDenied")
    bundle.run("create_env.sh", "base", "--move-data", "--yes", PATH=path)
    assert moved.exists(), "what cannot be looked up counts as missing"
    run_well(bundle, "base", "--move-data", "--yes")
    assert look_of(comfy_home / "ComfyUI") == LINKED


def test_a_file_that_did_not_arrive_keeps_the_folder(bundle: Bundle, comfy_home: Path) -> None:
    path = meddle(bundle, "s3 sync", f"aws s3 rm --quiet s3://{BASE_BUCKET}/models/linked.safetensors")
    before = look_of(comfy_home / "ComfyUI" / "models")
    ran = bundle.run("create_env.sh", "base", "--move-data", "--yes", PATH=path)
    assert ran.returncode == 1
    assert "did not arrive in" in ran.stderr
    assert "12\tlinked.safetensors" in ran.stderr
    assert look_of(comfy_home / "ComfyUI" / "models") == before
    run_well(bundle, "base", "--move-data", "--yes")


def test_what_s3_cannot_hold_or_has_otherwise_is_told_before_anything_is_copied(
    bundle: Bundle, aws: Aws, comfy_home: Path
) -> None:
    models = comfy_home / "ComfyUI" / "models"
    (models / "broken.safetensors").symlink_to("gone")
    ran = bundle.run("create_env.sh", "base", "--move-data")
    assert ran.returncode == 1
    assert f"{models}/broken.safetensors" in ran.stderr
    (models / "broken.safetensors").unlink()
    (models / "loop").symlink_to(models)
    assert "cannot read all of" in bundle.run("create_env.sh", "base", "--move-data").stderr
    (models / "loop").unlink()
    aws.client("s3").put_object(Bucket=BASE_BUCKET, Key="models/linked.safetensors", Body=b"another")
    ran = bundle.run("create_env.sh", "base", "--move-data")
    assert "and, with another size, in" in ran.stderr
    assert ran.stderr.rstrip().endswith("linked.safetensors")
    assert aws.files(BASE_BUCKET) == {"models/linked.safetensors": "another"}
