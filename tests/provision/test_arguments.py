"""The arguments of create_env.sh."""

from __future__ import annotations

from pathlib import Path

import pytest
from aws_fixtures import Aws, Bundle
from environment_pro import (
    BASE_BUCKET,
    NO_INSTANCE,
    refused,
)
from local_cloud import REGION


@pytest.fixture
def with_base_bucket(aws: Aws) -> None:
    aws.make_bucket(BASE_BUCKET)


@pytest.mark.usefixtures("with_base_bucket")
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "which environment? Give its name: create_env.sh NAME"),
        (["Pro"], "the environment's name 'Pro' is not allowed: use lowercase letters"),
        (["pro_1"], "'pro_1' is not allowed"),
        (["-"], "the option '-' is not known"),
        (["pro-"], "'pro-' is not allowed"),
        (["x" * 40], "has 76 characters and S3 allows 63: choose a shorter name than"),
        (["base", NO_INSTANCE], f"{NO_INSTANCE} is not for base, the machine that environments are made from"),
        (["base", "--rebake"], "--rebake is not for base"),
        (["base", "--move-data"], "there is no /home/ubuntu/comfy/ComfyUI: --move-data is run on the base machine"),
        (["pro", "--move-data"], "--move-data belongs to ./create_env.sh base"),
        (["pro", "--rebake", "--rollback"], "--rebake and --rollback are opposites: give one of them"),
        (["pro", "--keep"], "--keep is followed by the number of images to keep, 0 to 999, not by ''"),
        (
            ["pro", "--subnets", "a,b"],
            "--subnets is followed by subnets with commas between them, or by auto, not by 'a,b'",
        ),
        (["base", "--subnets", "auto"], "--subnets is not for base"),
        (["pro", "--fast"], "the option '--fast' is not known: see --help"),
        (["pro", NO_INSTANCE, "more"], "the argument 'more' is one too many"),
        (["pro", "web-1"], "'web-1' is not an instance id: it looks like i-"),
        (["pro", NO_INSTANCE], f"there is no instance {NO_INSTANCE} in {REGION}: give the id"),
        (["pro"], "this is not an EC2 instance"),
    ],
)
def test_bad_arguments(bundle: Bundle, arguments: list[str], sentence: str) -> None:
    assert sentence in refused(bundle, *arguments)


@pytest.mark.usefixtures("with_base_bucket")
def test_no_settings_file(bundle: Bundle) -> None:
    bundle.env_file.unlink()
    assert f"cannot read the settings file {bundle.env_file}: copy env.example" in refused(bundle, "pro")
    bundle.env_file.mkdir()  # what not even root can read as a file
    assert f"cannot read the settings file {bundle.env_file}" in refused(bundle, "pro")


@pytest.mark.usefixtures("with_base_bucket")
def test_no_aws_cli(bundle: Bundle, tmp_path: Path) -> None:
    for tool in ("bash", "dirname", "env"):
        (tmp_path / tool).symlink_to(f"/usr/bin/{tool}")
    assert "the AWS CLI is not installed: install it, see https://" in refused(bundle, "pro", PATH=str(tmp_path))


def test_help(bundle: Bundle) -> None:
    ran = bundle.run("create_env.sh", "--help")
    assert ran.returncode == 0
    assert "Usage: ./create_env.sh base [--move-data [--yes]] [--dry-run]" in ran.stdout
    assert ran.stdout.rstrip().endswith("until --rebake or --rollback.")
