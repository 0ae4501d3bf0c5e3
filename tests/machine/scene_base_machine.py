"""The base machine, made after README's words."""

from __future__ import annotations

import re

from stage import BASE_BUCKET, CHECKPOINT, Stage
from workplace import await_that


def test_the_lines_of_the_readme_make_a_base_machine(stage: Stage) -> None:
    base = stage.base
    for unit in ("comfyui", "comfy-manage"):
        assert base.property(unit, "UnitFileState") == "enabled"
        assert base.property(unit, "ActiveState") == "active"
    await_that("the bucket is mounted", lambda: "fuse.s3fs" in base.try_to("findmnt -no FSTYPE comfy/s3").stdout)
    # --move-data has moved the designer's files; ComfyUI sees them through the mount.
    assert stage.keys("models/checkpoints/", BASE_BUCKET) == [f"models/checkpoints/{CHECKPOINT}"]
    assert base.run(f"cat ComfyUI/models/checkpoints/{CHECKPOINT}") == "weights"
    assert base.run("readlink -f ComfyUI/models") == "/home/ubuntu/comfy/s3/models\n"


def test_systemd_has_nothing_against_the_installed_units(stage: Stage) -> None:
    done = stage.base.try_to("systemd-analyze verify comfyui.service comfy-manage.service", user="root")
    # Newer than Debian's systemd, and ignored by it.
    known = re.compile(r"Unknown key 'Restart(Steps|MaxDelaySec)'")
    said = [line for line in done.stderr.splitlines() if "/comfy" in line]
    assert [line for line in said if known.search(line)], f"it has not read them: {done.stdout}{done.stderr}"
    assert [line for line in said if not known.search(line)] == []


def test_the_readmes_first_job_succeeds(stage: Stage) -> None:
    assert "succeeded in" in stage.on_base("./send_job.py --wait --save pictures")
    assert stage.on_base("find pictures -name '*.png'").count(".png") == 1


def test_a_fleet_is_made_of_it(stage: Stage) -> None:
    assert "Environment pro is ready" in stage.made
    assert stage.cloud.client("ec2").describe_images(Owners=["self"])["Images"]
