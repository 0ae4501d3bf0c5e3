"""Messages that are sent at the worst moment, on a fleet that create_env.sh has made: somebody comes all the same."""

from __future__ import annotations

import json
import subprocess
import threading
import time
import uuid
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from demo import make_base_folder
from local_cloud import ACCOUNT_ID, REGION, Fault, LocalCloud
from workplace import LIMIT_S, Sample, await_that, group_of, image_workflow

pytestmark = pytest.mark.slow

PERIOD_S = 2.0
"""The alarm looks every minute on AWS, and sooner here; the rest of the chain takes as long as it takes."""
RUN_WITHIN_S = 120.0
SEND = ("./send_job.py", "job.json", "--env", "pro")


class Fleet:
    """An environment made by create_env.sh, whose instances boot and work, and its base machine."""

    def __init__(self, cloud: LocalCloud, folder: Path) -> None:
        self.cloud, self.folder = cloud, folder
        self.prefix = f"x{uuid.uuid4().hex[:8]}"
        self.group_name = f"{self.prefix}-pro-asg"
        make_base_folder(folder)
        settings = (folder / "env").read_text()
        (folder / "env").write_text(settings.replace("PREFIX=simple-comfy", f"PREFIX={self.prefix}"))
        self.s3, self.sqs = cloud.client("s3"), cloud.client("sqs")
        self.cloudwatch = cloud.client("cloudwatch")
        where = {"LocationConstraint": REGION}
        self.s3.create_bucket(Bucket=f"{self.prefix}-{ACCOUNT_ID}-{REGION}-base", CreateBucketConfiguration=where)
        (folder / "job.json").write_text(json.dumps(image_workflow()))
        self.base = cloud.make_base(folder)
        self.run("./create_env.sh", "pro")
        self.queue_url = self.sqs.get_queue_url(QueueName=f"{self.prefix}-pro-queue")["QueueUrl"]

    def run(self, *command: str) -> str:
        """Run a shipped script on the base machine to its end, and return what it prints."""
        ran = self.start(*command)
        printed, _ = ran.communicate(timeout=LIMIT_S)
        assert ran.returncode == 0, printed
        return printed

    def start(self, *command: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env=self.base.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def send(self) -> str:
        """Put a job on the queue and nudge nobody."""
        job_id = str(uuid.uuid4())
        body = json.dumps({"prompt": image_workflow(), "job_id": job_id})
        self.sqs.send_message(QueueUrl=self.queue_url, MessageBody=body)
        return job_id

    def waiting(self) -> list[int]:
        """How many messages are visible, and how many in flight."""
        names = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"]
        answer = self.sqs.get_queue_attributes(QueueUrl=self.queue_url, AttributeNames=names)["Attributes"]
        return [int(answer[name]) for name in names]

    def group(self) -> dict[str, Any]:
        return group_of(self.cloud, self.group_name)

    def results(self) -> dict[str, dict[str, Any]]:
        """Every receipt there is, by job id."""
        bucket = f"{self.prefix}-{ACCOUNT_ID}-{REGION}-pro"
        found = {}
        for item in self.s3.list_objects_v2(Bucket=bucket, Prefix="output/").get("Contents", []):
            if item["Key"].endswith("/result.json"):
                result = json.loads(self.s3.get_object(Bucket=bucket, Key=item["Key"])["Body"].read())
                found[result["job_id"]] = result
        return found

    def await_one_more(self, before: set[str]) -> dict[str, Any]:
        """The receipt of the one job that has none in `before`, which has to come in time."""
        await_that("the job is done", lambda: self.results().keys() - before, limit_s=RUN_WITHIN_S)
        (job_id,) = self.results().keys() - before
        return self.results()[job_id]

    def hold(self, ask: Callable[[str, str], Fault | None] = lambda *_: None) -> None:
        """Have every call asked about: the answer is what it is answered instead. Without `ask`, no more."""
        self.cloud.fault = ask

    def await_nobody(self) -> None:
        """Until the group is back at zero."""
        await_that("nobody is there", lambda: not self.group()["Instances"])
        assert self.group()["DesiredCapacity"] == 0


@pytest.mark.sampled("stories", 3)
def test_nobody_waits_for_ever(
    cloud: LocalCloud, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sample: Sample
) -> None:
    """One story, because a whole fleet takes its time."""
    monkeypatch.setattr(cloud, "metrics_period_s", PERIOD_S)
    monkeypatch.setattr(cloud, "fault", cloud.fault)  # is put back in the end
    fleet = Fleet(cloud, tmp_path / "base")
    check_a_sender_that_may_not_scale(fleet)
    check_a_sender_that_dies_before_it_has_nudged(fleet)
    for moment in sample(("before its last look", "after its last look"), 1):
        check_a_message_that_finds_the_last_worker_on_its_way_out(fleet, moment)
    fleet.cloudwatch.enable_alarm_actions(AlarmNames=[f"{fleet.group_name}-first-instance"])
    check_a_workflow_that_is_dropped_into_the_bucket(fleet)
    check_an_environment_is_removed_while_jobs_run(fleet)


def check_a_sender_that_may_not_scale(fleet: Fleet) -> None:
    fleet.hold(lambda service, _: Fault(403, "AccessDenied") if service == "autoscaling" else None)
    printed = fleet.run(*SEND)
    fleet.hold()
    assert "Capacity was not raised: An error occurred (AccessDenied)" in printed
    result = fleet.await_one_more(set())
    assert result["status"] == "succeeded"
    fleet.await_nobody()
    check_that_the_boot_was_written_down(fleet, result["instance_id"])


def check_that_the_boot_was_written_down(fleet: Fleet, instance_id: str) -> None:
    """With the logs, which are there after the instance is gone."""
    bucket, key = f"{fleet.prefix}-{ACCOUNT_ID}-{REGION}-pro", f"output/{instance_id}/boot.json"
    report = json.loads(fleet.s3.get_object(Bucket=bucket, Key=key)["Body"].read())
    seconds = [report["phases"][phase] for phase in ("system", "cloud_init", "mount")]
    assert min(seconds) >= 0
    booted_at = datetime.fromisoformat(report["booted_at"]).timestamp()
    assert booted_at == fleet.cloud.machines[instance_id].booted_at
    assert booted_at + sum(seconds) == pytest.approx(report["comfyui_started_at"], abs=0.002)


def check_a_sender_that_dies_before_it_has_nudged(fleet: Fleet) -> None:
    before = set(fleet.results())
    alarm = [f"{fleet.group_name}-first-instance"]
    fleet.cloudwatch.disable_alarm_actions(AlarmNames=alarm)
    fleet.hold(lambda _, operation: Fault(500, "X", 60) if operation == "GetQueueAttributes" else None)
    sender = fleet.start(*SEND)
    await_that("the message is there", lambda: fleet.waiting() == [1, 0])
    sender.kill()
    sender.communicate()
    fleet.hold()

    minutes = fleet.cloud.minutes
    await_that("minutes pass", lambda: fleet.cloud.minutes >= minutes + 3)
    assert fleet.group()["DesiredCapacity"] == 0, "without the alarm nobody comes"
    fleet.cloudwatch.enable_alarm_actions(AlarmNames=alarm)
    assert fleet.await_one_more(before)["status"] == "succeeded"
    fleet.await_nobody()


def check_a_message_that_finds_the_last_worker_on_its_way_out(fleet: Fleet, moment: str) -> None:
    before = set(fleet.results())
    # While it leaves, a worker stores its logs, looks at the queue once more, and lets its group go on.
    held, alarms = {
        "before its last look": ("PUT", fleet.cloudwatch.disable_alarm_actions),
        "after its last look": ("CompleteLifecycleAction", fleet.cloudwatch.enable_alarm_actions),
    }[moment]
    alarms(AlarmNames=[f"{fleet.group_name}-first-instance"])
    is_leaving, arrived, may_go_on = threading.Event(), threading.Event(), threading.Event()

    def hold(_: str, operation: str) -> None:
        if operation == "TerminateInstanceInAutoScalingGroup":
            is_leaving.set()
        if is_leaving.is_set() and operation == held:
            arrived.set()
            may_go_on.wait(LIMIT_S)

    fleet.hold(hold)
    fleet.run(*SEND)
    first = fleet.await_one_more(before)
    assert arrived.wait(LIMIT_S)
    (instance,) = fleet.group()["Instances"]
    assert (instance["LifecycleState"], fleet.group()["DesiredCapacity"]) == ("Terminating:Wait", 0)
    job_id, sent = fleet.send(), time.monotonic()
    may_go_on.set()
    result = fleet.await_one_more(before | {first["job_id"]})
    assert time.monotonic() - sent < RUN_WITHIN_S
    assert (result["job_id"], result["status"]) == (job_id, "succeeded")
    assert result["instance_id"] != first["instance_id"]
    fleet.await_nobody()


def check_a_workflow_that_is_dropped_into_the_bucket(fleet: Fleet) -> None:
    before = set(fleet.results())
    bucket, key = f"{fleet.prefix}-{ACCOUNT_ID}-{REGION}-pro", "input/jobs/poster.json"
    fleet.run("./create_env.sh", "pro", "--s3-trigger")
    fleet.s3.put_object(Bucket=bucket, Key=key, Body=json.dumps(image_workflow()).encode())
    result = fleet.await_one_more(before)
    assert (result["status"], result["source"]) == ("succeeded", f"s3://{bucket}/{key}")
    fleet.await_nobody()
    assert fleet.waiting() == [0, 0], "S3's test event is deleted quietly"


def check_an_environment_is_removed_while_jobs_run(fleet: Fleet) -> None:
    workflow = fleet.folder / "long.json"
    workflow.write_text(json.dumps(image_workflow(600)))
    fleet.run("./send_job.py", str(workflow), "--env", "pro", "--count", "4")
    await_that("two of them run", lambda: fleet.waiting() == [2, 2])
    ids = [instance["InstanceId"] for instance in fleet.group()["Instances"]]
    printed = fleet.run("./delete_env.sh", "pro", "--yes")
    assert "Nothing is left of the environment pro." in printed
    machines = [fleet.cloud.machines[instance_id] for instance_id in ids]
    await_that("their processes are gone", lambda: not any(machine.state()["services"] for machine in machines))
    assert [fleet.cloud.instance_state(instance_id) for instance_id in ids] == ["terminated"] * 2
    assert fleet.base.is_on()
