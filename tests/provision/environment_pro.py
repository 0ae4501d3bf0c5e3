"""The environment pro, as create_env.sh makes it: its names, and what the tests of several rooms look at."""

from __future__ import annotations

import json
from typing import Any

from aws_fixtures import Bundle, tags_of
from local_cloud import ACCOUNT_ID, REGION

BASE_BUCKET = f"simple-comfy-{ACCOUNT_ID}-{REGION}-base"

BUCKET = f"simple-comfy-{ACCOUNT_ID}-{REGION}-pro"

ALARM = "simple-comfy-pro-asg-first-instance"

GROUP = "simple-comfy-pro-asg"
TEMPLATE = f"{GROUP}-template"

QUEUE = "simple-comfy-pro-queue"

WORKER = "simple-comfy-pro-asg-worker"

PATH_OF_WORKER = f"/simple-comfy/{REGION}/pro/"

NO_INSTANCE = "i-0123456789abcdef0"


def run_well(bundle: Bundle, *arguments: str) -> list[str]:
    """Run create_env.sh, which must succeed without a warning. Returns the lines it reports."""
    ran = bundle.run("create_env.sh", *arguments)
    assert (ran.returncode, ran.stderr) == (0, "")
    return ran.stdout.partition("\n\n")[0].splitlines()[1:]


def refused(bundle: Bundle, *arguments: str, **environment: str) -> str:
    """Run create_env.sh, which must refuse in a sentence for each problem and make nothing. Returns them."""
    ran = bundle.run("create_env.sh", *arguments, **environment)
    assert ran.returncode != 0
    assert ran.stdout == ""
    assert all(line.startswith("create_env.sh: ") for line in ran.stderr.splitlines()), ran.stderr
    assert bundle.aws.everything("pro") == {}
    assert not bundle.aws.client("s3").list_objects_v2(Bucket=BASE_BUCKET, Prefix="none").get("Contents")
    return ran.stderr


def image_ids(found: dict[str, Any]) -> list[str]:
    """The environment's images, the oldest first."""
    return [image["ImageId"] for image in sorted(found["images"], key=lambda image: str(image["CreationDate"]))]


def image_in_use(found: dict[str, Any]) -> str:
    """The image of the template's default version, which the group must know."""
    (version,) = [version for version in found["versions"] if version["DefaultVersion"]]
    assert tags_of(found["groups"][0]["Tags"])["comfy-version"] == str(version["VersionNumber"])
    return str(version["LaunchTemplateData"]["ImageId"])


def check_only_tls(policy: str, resources: list[str]) -> None:
    (statement,) = json.loads(policy)["Statement"]
    assert (statement["Effect"], statement["Principal"]) == ("Deny", "*")
    assert statement["Condition"] == {"Bool": {"aws:SecureTransport": "false"}}
    assert statement["Resource"] == resources
