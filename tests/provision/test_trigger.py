"""provision/trigger.sh."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from aws_fixtures import Aws, Bundle
from environment_pro import (
    BUCKET,
    QUEUE,
)
from local_cloud import ACCOUNT_ID, REGION


def trigger(bundle: Bundle, wanted: str, dry_run: str = "no", **environment: str) -> str:
    """Run the two steps of create_env.sh that make the trigger, and return the line that they report."""
    ran = bundle.run_function(
        f"DRY_RUN={dry_run}; look_at_trigger '{wanted}'; ensure_trigger", "queues", "trigger", **environment
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    return ran.stdout


def test_the_trigger_is_added_kept_repaired_and_taken_away(bundle: Bundle, aws: Aws) -> None:
    sqs, s3 = aws.client("sqs"), aws.client("s3")
    aws.make_bucket(BUCKET)
    url = sqs.create_queue(QueueName=QUEUE)["QueueUrl"]
    other = {
        "QueueArn": f"arn:aws:sqs:{REGION}:{ACCOUNT_ID}:{QUEUE}",
        "Events": ["s3:ObjectRemoved:*"],
        "Id": "theirs",
    }
    s3.put_bucket_notification_configuration(
        Bucket=BUCKET,
        NotificationConfiguration={"QueueConfigurations": [other]},
    )

    def events() -> dict[str, Any]:
        answer = s3.get_bucket_notification_configuration(Bucket=BUCKET)
        return {entry["Id"]: entry for entry in answer["QueueConfigurations"]}

    def statements() -> list[dict[str, Any]]:
        answer = sqs.get_queue_attributes(QueueUrl=url, AttributeNames=["Policy"])
        policy = answer.get("Attributes", {}).get("Policy")
        return json.loads(policy)["Statement"] if policy else []

    assert trigger(bundle, "") == "", "nobody asked for it"
    assert (list(events()), statements()) == (["theirs"], [])

    path = bundle.break_call("put-bucket-notification-configuration", "Unable to validate the following", times=2)
    said = trigger(bundle, "yes", PATH=path)
    assert said.count("waiting until the queue's new policy counts") == 1
    assert said.endswith("created\n")
    ours = events()["comfy-jobs"]
    assert (ours["QueueArn"], ours["Events"]) == (other["QueueArn"], ["s3:ObjectCreated:*"])
    rules = {rule["Name"].lower(): rule["Value"] for rule in ours["Filter"]["Key"]["FilterRules"]}
    assert rules == {"prefix": "input/jobs/", "suffix": ".json"}
    assert "theirs" in events()
    (statement,) = statements()
    assert statement.pop("Sid").startswith("ComfyTrigger")
    assert statement == {
        "Effect": "Allow",
        "Principal": {"Service": "s3.amazonaws.com"},
        "Action": "sqs:SendMessage",
        "Resource": other["QueueArn"],
        "Condition": {
            "ArnEquals": {"aws:SourceArn": f"arn:aws:s3:::{BUCKET}"},
            "StringEquals": {"aws:SourceAccount": ACCOUNT_ID},
        },
    }

    assert "already there" in trigger(bundle, ""), "it stays without being asked for again"
    theirs = {"Sid": "x", "Effect": "Deny", "Principal": "*", "Action": "sqs:*", "Resource": "*"}
    policy = json.dumps({"Version": "2012-10-17", "Statement": [theirs]})
    sqs.set_queue_attributes(QueueUrl=url, Attributes={"Policy": policy})
    assert "updated" in trigger(bundle, "")
    assert [found["Sid"][:12] for found in statements()] == ["x", "ComfyTrigger"]
    assert "to be removed" in trigger(bundle, "no", dry_run="yes")
    assert "comfy-jobs" in events()
    assert "removed" in trigger(bundle, "no")
    assert (list(events()), statements()) == (["theirs"], [theirs])
    assert "already there" in trigger(bundle, "no")


def test_trigger_and_eventbridge_leave_each_other_and_what_is_somebody_elses(bundle: Bundle, aws: Aws) -> None:
    sqs, s3 = aws.client("sqs"), aws.client("s3")
    aws.make_bucket(BUCKET)
    sqs.create_queue(QueueName=QUEUE)
    arn = f"arn:aws:sqs:{REGION}:{ACCOUNT_ID}:{QUEUE}"
    theirs = {"QueueArn": arn, "Events": ["s3:ObjectRemoved:*"], "Id": "theirs"}
    s3.put_bucket_notification_configuration(
        Bucket=BUCKET, NotificationConfiguration={"QueueConfigurations": [theirs]}
    )
    for trigger, events, dry_run, said, is_triggered, is_told in (
        ("", "", "no", [], False, False),
        ("", "yes", "yes", ["to be created"], False, False),
        ("", "yes", "no", ["created"], False, True),
        ("yes", "", "no", ["created", "already there"], True, True),
        ("", "no", "no", ["already there", "removed"], True, False),
        ("no", "yes", "no", ["removed", "created"], False, True),
        ("no", "no", "no", ["already there", "removed"], False, False),
    ):
        steps = f"DRY_RUN={dry_run}; look_at_trigger '{trigger}' '{events}'; ensure_trigger; ensure_events"
        ran = bundle.run_function(steps, "queues", "trigger")
        assert (ran.returncode, ran.stderr) == (0, "")
        states = [re.split(f"{BUCKET}/input/jobs/ +| to EventBridge +", line)[1] for line in ran.stdout.splitlines()]
        assert states == said, (trigger, events)
        found = s3.get_bucket_notification_configuration(Bucket=BUCKET)
        ids = {entry["Id"] for entry in found["QueueConfigurations"]}
        assert ids == {"theirs"} | ({"comfy-jobs"} if is_triggered else set()), (trigger, events)
        assert ("EventBridgeConfiguration" in found) == is_told, (trigger, events)


@pytest.mark.slow
@pytest.mark.sampled("stories", 3)
def test_with_the_option_an_environment_is_made_with_its_trigger(bundle: Bundle, aws: Aws) -> None:
    base = aws.make_base()
    ran = bundle.run("create_env.sh", "pro", base.instance_id, "--s3-trigger", "--events")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert f"A workflow that is dropped into s3://{BUCKET}/input/jobs/ runs." in ran.stdout
    assert f"EventBridge hears of each result.json in s3://{BUCKET}, for rules of yours." in ran.stdout
    assert aws.everything("pro")["bucket events"] == {"QueueConfigurations", "EventBridgeConfiguration"}
    s3, sqs = aws.client("s3"), aws.client("sqs")
    url = sqs.get_queue_url(QueueName=QUEUE)["QueueUrl"]
    for key in ("input/jobs/a b.json", "input/jobs/note.txt", "input/other.json"):
        s3.put_object(Bucket=BUCKET, Key=key, Body=b"{}")
    messages = sqs.receive_message(QueueUrl=url, MaxNumberOfMessages=10)["Messages"]
    tested, told = (json.loads(message["Body"]) for message in messages)
    assert tested["Event"] == "s3:TestEvent"
    assert [record["s3"]["object"]["key"] for record in told["Records"]] == ["input%2Fjobs%2Fa+b.json"]
