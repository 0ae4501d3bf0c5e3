"""provision/templates: each is filled by its room, and what comes of it is what AWS takes."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from aws_fixtures import ENV_FILE
from botocore.model import Shape
from botocore.session import Session
from botocore.validate import ParamValidator
from dashboard_schema import SCHEMA
from environment_pro import ALARM
from local_cloud import ACCOUNT_ID, REGION
from places import ROOT, copy_scripts

TEMPLATES = ROOT / "provision/templates"
TOPIC = f"arn:aws:sns:{REGION}:{ACCOUNT_ID}:operators"
ROOMS = "common aws names fill checks queues bucket trigger permissions image template group watching drain"
FACTS = f"""
choose_env pro
IMAGE=ami-0123456789abcdef0 SECURITY_GROUPS="sg-1 sg-2" KEY_NAME=operator ROOT_DEVICE=/dev/sda1 PROFILE=a-profile
VOLUME_INIT_RATE=200 INSTANCE_TYPES="g5.xlarge g6.xlarge" SPOT_PERCENT=70 INSTANCE_PROFILE=company ALARM_TOPIC={TOPIC}
POLICY_ARN=arn:aws:autoscaling:us-west-2:{ACCOUNT_ID}:scalingPolicy:1:autoScalingGroupName/g:policyName/p
choose_types
report() {{ :; }}
ask() {{ echo None; }}
change() {{ printf '%s' "${{@: -1}}"; }} # what AWS would get last
env() {{
  printf '%s\\n' "$@" | sed -n 's|^.*/provision/templates/||p' >>used
  command env "$@"
}}
"""

ALARMS = ("first-instance", "dead-letters", "oldest-message", "not-in-service", "idle-hour")
DOCUMENTS = {
    "worker": "policy_of worker",
    "worker of base": "ENV=base policy_of worker",
    "sender": "policy_of sender",
    "operator": "policy_of operator",
    "operator of base": "ENV=base policy_of operator",
    "trust": "fill policies/trust.json",
    "queue": 'secure_queue False None; queue_attributes "$SQS_NAME"',
    "queue that is drained": "close_queue url",
    "queue with a trigger": "put_events() { :; }; TRIGGER=yes; ensure_trigger",
    "event": "fill bucket/event.json",
    "bucket policy": "fill policies/bucket.json",
    "encryption": "fill bucket/encryption.json",
    "lifecycle": "fill bucket/lifecycle.json",
    "launch template": "template_data",
    "mixed instances": 'choose_launch; echo "${LAUNCH[1]}"',
    "dashboard": "fill dashboard.json",
    **{f"alarm {name}": f"alarm_input {name} digest" for name in ALARMS},
}
"""What AWS gets, and how the rooms make it."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    copy_scripts(folder)
    (folder / "env").write_text(ENV_FILE)
    return folder


def run(folder: Path, shell: str) -> subprocess.CompletedProcess[str]:
    sources = "".join(f"source provision/{room}.sh; " for room in ROOMS.split())
    command = ["bash", "-c", f"set -euo pipefail; {sources} {FACTS}\n{shell}"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def made(folder: Path) -> dict[str, Any]:
    """Every document."""
    ran = run(folder, "".join(f"( {shell} ); printf '\\036'\n" for shell in DOCUMENTS.values()))
    assert (ran.returncode, ran.stderr) == (0, "")
    texts = ran.stdout.split("\x1e")[:-1]
    return dict(zip(DOCUMENTS, map(json.loads, texts), strict=True))


def test_every_template_is_filled_by_a_room(made: dict[str, Any], folder: Path) -> None:
    templates = [path for path in TEMPLATES.rglob("*") if path.suffix in (".json", ".sh")]
    assert set((folder / "used").read_text().split()) == {str(path.relative_to(TEMPLATES)) for path in templates}
    assert "${" not in json.dumps(made)
    assert made[f"alarm {ALARMS[0]}"]["AlarmName"] == ALARM


@pytest.mark.parametrize("template", sorted(TEMPLATES.rglob("*.json")), ids=lambda path: path.stem)
def test_a_template_is_a_document_of_its_own(template: Path) -> None:
    """With no placeholder of another form, which nobody would fill in."""
    text = template.read_text()
    json.loads(text)
    assert text.count("${") == len(re.findall(r"\$\{[A-Z][A-Z0-9_]*(?::each|:number)?\}", text))
    assert text.count(":number}") == text.count(':number}"') == len(re.findall(r'"\$\{\w+:number\}"', text))


# --- Policies ------------------------------------------------------------------------------------------------

KNOWN = {
    # It looks at all alarms by the beginning of their names, and AWS has no resource for that.
    ("operator", "RESOURCE_STAR", "cloudwatch:DescribeAlarms"),
    ("operator of base", "RESOURCE_STAR", "cloudwatch:DescribeAlarms"),
    # sqs:* on the environment's queues is meant; ListQueues is allowed elsewhere.
    ("operator", "RESOURCE_MISMATCH", "sqs:ListQueues"),
    # CreateImage needs the instance, which has no tags of ours, and what is made, which gets them: two statements.
    ("operator", "RESOURCE_MISMATCH", "ec2:CreateImage"),
    # Who makes the base bucket may set its policy and its rules, and so could have its files removed.
    ("operator of base", "RESOURCE_POLICY_PRIVILEGE_ESCALATION", "s3:PutBucketPolicy"),
    ("operator of base", "RESOURCE_POLICY_PRIVILEGE_ESCALATION", "s3:PutLifecycleConfiguration"),
    # It is the policy of a role, which is its own resource.
    ("trust", "MALFORMED", "neither Resource nor NotResource"),
}
POLICIES: dict[str, Callable[[Any], Any]] = {
    **{name: lambda made: made for name in DOCUMENTS if re.match("worker|sender|operator|trust|bucket policy", name)},
    **{name: lambda made: json.loads(made["Policy"]) for name in DOCUMENTS if name.startswith("queue")},
}


def findings(policy: Any) -> list[tuple[str, str]]:
    with warnings.catch_warnings():  # here, because it reads 10 MB
        warnings.simplefilter("ignore")  # it uses a part of setuptools that is going to go
        from parliament import analyze_policy_string
    return [(found.issue, str(found.detail)) for found in analyze_policy_string(json.dumps(policy)).findings]


@pytest.mark.parametrize("name", POLICIES)
def test_parliament_finds_nothing_in_a_policy_but_what_is_meant(made: dict[str, Any], name: str) -> None:
    known = [(issue, words) for of, issue, words in KNOWN if of == name]
    found = findings(POLICIES[name](made[name]))
    assert [one for one in found if not any(one[0] == issue and words in one[1] for issue, words in known)] == []
    assert len(found) >= len(known), "what is known is found still"


def test_parliament_sees_a_mistake(made: dict[str, Any]) -> None:
    policy = copy.deepcopy(made["sender"])
    policy["Statement"][1]["Action"] = "sqs:SendMesage"
    assert [issue for issue, _ in findings(policy)] == ["UNKNOWN_ACTION"]


# --- What is held against AWS's own models ---------------------------------------------------------------------


def member(service: str, operation: str, *names: str) -> Shape:
    """A part of an operation's input, by botocore's model."""
    shape = Session().get_service_model(service).operation_model(operation).input_shape
    for name in names:
        shape = shape.member if name == "[]" else shape.members[name]
    return shape


MODELS = {
    "queue": ("sqs", "SetQueueAttributes", "Attributes"),
    "queue that is drained": ("sqs", "SetQueueAttributes", "Attributes"),
    "event": ("s3", "PutBucketNotificationConfiguration", "NotificationConfiguration", "QueueConfigurations", "[]"),
    "encryption": ("s3", "PutBucketEncryption", "ServerSideEncryptionConfiguration"),
    "lifecycle": ("s3", "PutBucketLifecycleConfiguration", "LifecycleConfiguration"),
    "launch template": ("ec2", "CreateLaunchTemplate", "LaunchTemplateData"),
    "mixed instances": ("autoscaling", "CreateAutoScalingGroup", "MixedInstancesPolicy"),
    **{f"alarm {name}": ("cloudwatch", "PutMetricAlarm") for name in ALARMS},
}


def mistakes(value: Any, shape: Any) -> list[str]:
    """What botocore's validation says, and values and names that an enumeration does not have."""
    report = ParamValidator().validate(value, shape)
    found = [report.generate_report()] if report.has_errors() else []

    def look(value: Any, shape: Any) -> None:
        if shape.type_name == "structure" and isinstance(value, dict):
            for key in value.keys() & shape.members.keys():
                look(value[key], shape.members[key])
        elif shape.type_name == "list" and isinstance(value, list):
            for item in value:
                look(item, shape.member)
        elif shape.type_name == "map" and isinstance(value, dict):
            for key, item in value.items():
                look(key, shape.key)
                look(item, shape.value)
        elif value not in (getattr(shape, "enum", None) or [value]):
            found.append(f"{value!r} is not one of {shape.enum}")

    look(value, shape)
    return found


@pytest.mark.parametrize("name", MODELS)
def test_botocore_knows_every_field(made: dict[str, Any], name: str) -> None:
    assert mistakes(made[name], member(*MODELS[name])) == []


def test_botocore_sees_mistakes(made: dict[str, Any]) -> None:
    alarm = made["alarm idle-hour"] | {
        "Treshold": 1,
        "Threshold": "1",
        "TreatMissingData": "ignore",
        "ComparisonOperator": ">",
    }
    found = "".join(mistakes(alarm, member(*MODELS["alarm idle-hour"])))
    assert all(word in found for word in ("Treshold", "Invalid type for parameter Threshold", "'>' is not one of"))


def test_the_dashboard_is_one_as_cloudwatch_documents_it(made: dict[str, Any]) -> None:
    jsonschema.validate(made["dashboard"], SCHEMA)
    widgets = made["dashboard"]["widgets"]
    assert all(widget["x"] + widget["width"] <= 24 for widget in widgets)
    for place, wrong in (("width", 25), ("type", "metrics"), ("properties", {"title": "no metrics"})):
        body = {"widgets": [widgets[1] | {place: wrong}]}
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(body, SCHEMA)
