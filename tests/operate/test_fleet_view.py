"""fleet.py status: how a fleet stands."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from local_cloud import ACCOUNT_ID, REGION, Fault, LocalCloud, Machine
from moto.backends import get_backend
from report_tools import iso
from workplace import LIMIT_S, Site, image_workflow

from comfy_utils import new_job_id
from fleet import main
from operate.fleet_view import state_of


def put_metrics(cloud: LocalCloud, site: Site) -> None:
    """What the workers and SQS publish: of this hour, and of the one before."""
    now = datetime.now(UTC)
    data = [
        {"MetricName": name, "Value": value, "Timestamp": now - timedelta(minutes=age), "Unit": "Count"}
        for name, value, age in (
            ("JobsSucceeded", 40, 50), ("JobsSucceeded", 2, 1), ("JobsSucceeded", 1000, 70), ("JobsFailed", 3, 30),
        )
    ]  # fmt: skip
    cloud.client("cloudwatch").put_metric_data(Namespace=f"{site.prefix}/{site.env}", MetricData=data)
    backend = get_backend("cloudwatch")[ACCOUNT_ID][REGION]
    queue = [{"Name": "QueueName", "Value": f"{site.prefix}-{site.env}-queue"}]
    for age, value in ((2, 100.0), (1, 90.0)):  # nobody but AWS may publish there
        when = now - timedelta(minutes=age)
        name = "ApproximateAgeOfOldestMessage"
        datum = {
            "MetricName": name,
            "Value": value,
            "Timestamp": when.replace(tzinfo=None),
            "Dimensions": queue,
            "Unit": "Seconds",
        }
        backend.put_metric_data("AWS/SQS", [datum])


def put_worker(site: Site, instance_id: str, jobs: list[dict[str, Any]]) -> None:
    news = {"instance_id": instance_id, "instance_type": "g5.2xlarge", "jobs": jobs, "updated_at": iso(0)}
    site.s3.put_object(Bucket=site.bucket, Key=f"output/{instance_id}/worker.json", Body=json.dumps(news))


def test_the_fleet_at_a_glance(
    cloud: LocalCloud, fleet: tuple[Site, Machine], monkeypatch: pytest.MonkeyPatch, ours: Callable[[Site], None],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    site, machine = fleet
    ours(site)
    put_metrics(cloud, site)
    for _ in range(3):
        site.send(image_workflow())
    site.sqs.receive_message(QueueUrl=site.queue_url)
    site.sqs.send_message(QueueUrl=site.dlq_url, MessageBody="x")
    assert main(["status", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["queue"] == {"waiting": 2, "in_flight": 1, "dead": 1}
    assert found["oldest_s"] == 90
    assert found["last_hour"] == {"succeeded": 42, "failed": 3}
    assert found["group"] == {"wanted": 1, "least": 0, "most": 5}
    (instance,) = found["instances"]
    assert 0 <= instance.pop("age_s") < 100
    one = {"instance_id": machine.instance_id, "type": "g5.2xlarge", "jobs": [], "usd_per_hour": 1.212}
    assert instance == one | {"state": "booting"}, "its worker has not begun"
    assert (found["usd_per_hour"], found["scaling_errors"], found["not_seen"]) == (1.212, [], [])

    job = {"job_id": new_job_id(), "since": iso(0), "node_title": "K采样器\x1b[2J\n", "value": 12, "max": 20}
    put_worker(site, machine.instance_id, [job])
    monkeypatch.setattr(cloud, "launch_failure", "We currently do not have sufficient g5.2xlarge capacity in the "
                        "Availability Zone you requested (us-west-2a). Launching EC2 instance failed.")  # fmt: skip
    cloud.client("autoscaling").set_desired_capacity(
        AutoScalingGroupName=f"{site.prefix}-{site.env}-asg", DesiredCapacity=2
    )
    assert main(["status", "--env", site.env, "--price", "2"]) == 0
    title, queue, hour, instances, one_line, scaling = capsys.readouterr().out.splitlines()
    assert title.startswith(f"Environment {site.env} in us-west-2, 20")
    assert queue == "queue      2 waiting, 1 in flight, 1 dead; the oldest for 90.0 s"
    assert hour == "last hour  42 succeeded, 3 failed"
    assert instances == "instances  1 there, 2 wanted (0 to 5): 1 busy; $2 an hour on demand"
    assert re.fullmatch(
        rf"  {machine.instance_id}  g5\.2xlarge   busy +[\d.]+ s  {job['job_id']} for \d.*, K采样器 12 of 20",
        one_line,
    ), one_line
    assert re.match(r"scaling    [\d.]+ s ago: AWS has no g5.2xlarge free in us-west-2a just now", scaling)


def test_a_missing_permission_costs_its_line_only(
    cloud: LocalCloud, fleet: tuple[Site, Machine], monkeypatch: pytest.MonkeyPatch, ours: Callable[[Site], None],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    site, machine = fleet
    ours(site)
    put_worker(site, machine.instance_id, [])
    refused = {
        "DescribeInstances": Fault(403, "UnauthorizedOperation"),
        "GetMetricData": Fault(403, "AccessDenied"),
        "DescribeScalingActivities": Fault(403, "AccessDenied"),
    }
    monkeypatch.setattr(cloud, "fault", lambda _, operation: refused.get(operation))
    assert main(["status"]) == 0
    _, queue, hour, instances, one, *rest = capsys.readouterr().out.splitlines()
    assert queue == "queue      0 waiting, 0 in flight, 0 dead"
    assert hour == "last hour  not known"
    assert instances == "instances  1 there, 1 wanted (0 to 5): 1 idle; $1.212 an hour on demand"
    assert one == f"  {machine.instance_id}  g5.2xlarge   idle"
    assert rest == [
        "not seen   not allowed: cloudwatch:GetMetricData",
        "not seen   not allowed: autoscaling:DescribeScalingActivities",
        "not seen   not allowed: ec2:DescribeInstances",
    ]
    monkeypatch.setattr(cloud, "fault", lambda service, _: Fault(403, "AccessDenied") if service == "s3" else None)
    assert main(["status"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[3] == "instances  1 there, 1 wanted (0 to 5): 1 in service; $1.212 an hour on demand"
    assert lines[-1] == "not seen   not allowed: s3:GetObject"
    monkeypatch.setattr(cloud, "fault", lambda *_: Fault(403, "AccessDenied"))
    assert main(["status"]) == 1
    assert capsys.readouterr().out.splitlines()[1:4] == [
        "queue      not seen",
        "last hour  not known",
        "instances  not seen",
    ]


def test_watching_prints_what_changes_where_nobody_can_see_it_redrawn(make_site: Callable[..., Site]) -> None:
    site = make_site()
    process = subprocess.Popen(
        [sys.executable, "fleet.py", "status", "--watch"],
        cwd=site.folder,
        env=site.environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        lines = [process.stdout.readline()]
        site.send("x")
        lines.append(process.stdout.readline())
        process.send_signal(signal.SIGINT)
        assert process.wait(LIMIT_S) == 130
        assert process.stdout.read() == ""
    finally:
        process.kill()
        process.wait()
    group = "there is no group: scaling is off"
    assert [line.partition(" ")[2] for line in lines] == [
        f"0 waiting, 0 in flight, 0 dead; {group}\n",
        f"1 waiting, 0 in flight, 0 dead; {group}\n",
    ]


@pytest.mark.parametrize(
    ("lifecycle", "health", "jobs", "begun", "state"),
    [
        ("Pending:Wait", "Healthy", [], False, "booting"),
        ("InService", "Healthy", [], False, "booting"),
        ("InService", "Healthy", [], True, "idle"),
        ("InService", "Healthy", [{}], True, "busy"),
        ("InService", "HEALTHY", [], None, "in service"),
        ("InService", "Unhealthy", [{}], True, "unhealthy"),
        ("Terminating:Wait", "Healthy", [{}], True, "leaving"),
        ("Warmed:Stopped", "Healthy", [], True, "warm"),
    ],
)
def test_an_instance_in_one_word(
    lifecycle: str, health: str, jobs: list[Any], begun: bool | None, state: str
) -> None:
    assert state_of({"LifecycleState": lifecycle, "HealthStatus": health}, jobs, begun) == state
