"""boot/giving_up.sh: an instance that cannot work leaves, and a fault that all of them have costs three of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from local_cloud import LocalCloud
from local_cloud import Machine as Instance
from machine import Machine, machine, metadata
from workplace import Site, group_of

from ground.launches import capacity_problem
from worker.group import Membership
from worker.reports import Reports

__all__ = ["machine", "metadata"]

Fleet = tuple[Site, Instance]
AT_ONCE = {"GIVE_UP_SECONDS": "0"}


class Group:
    """A fleet in the local cloud whose instances cannot work: they have no virtual environment."""

    def __init__(self, cloud: LocalCloud, site: Site, machine: Machine, said: dict[str, str]) -> None:
        self.cloud, self.site, self.machine, self.said = cloud, site, machine, said
        self.name = f"{site.prefix}-{site.env}-asg"
        self.autoscaling = cloud.client("autoscaling")
        (machine.home / "venv/bin/python").unlink()
        (machine.stubs / "aws").unlink()  # the real one
        machine.environ |= cloud.environment() | {
            "AWS_EC2_METADATA_SERVICE_ENDPOINT": machine.environ["AWS_EC2_METADATA_SERVICE_ENDPOINT"]
        }
        machine.settings(ENV=site.env, S3_BUCKET=site.bucket, ASG_NAME=self.name)

    def state(self) -> dict[str, Any]:
        """How it stands."""
        return group_of(self.cloud, self.name)

    def tag(self) -> str | None:
        """What failed."""
        return {tag["Key"]: tag["Value"] for tag in self.state()["Tags"]}.get("comfy-failed-boots")

    def suspended(self) -> list[str]:
        """What it does no more."""
        return [process["ProcessName"] for process in self.state()["SuspendedProcesses"]]

    def newest(self) -> str:
        """The instance that was launched last."""
        in_service = [each for each in self.state()["Instances"] if each["LifecycleState"] == "InService"]
        return str(in_service[-1]["InstanceId"])

    def fail(self, service: str = "comfy-manage", **environ: str) -> str:
        """The newest instance's service refuses to start; returns what it said."""
        self.said["instance-id"] = self.newest()
        (self.machine.home / "logs/starting").unlink(missing_ok=True)
        (self.machine.home / "first-boot").write_text(self.newest())
        return self.machine.fails(service, **(AT_ONCE | environ))


@pytest.fixture
def group(cloud: LocalCloud, fleet: Fleet, machine: Machine, metadata: dict[str, str]) -> Group:
    return Group(cloud, fleet[0], machine, metadata)


def test_an_instance_that_cannot_work_is_replaced_with_its_logs_in_the_bucket(group: Group) -> None:
    (group.machine.home / "logs").mkdir()
    (group.machine.home / "logs/comfyui.log").write_text("why\n")
    first = group.newest()
    answer = group.fail()
    assert "it gives up" in answer
    assert "venv/bin/python" in answer, "and goes on trying"
    body = group.site.s3.get_object(Bucket=group.site.bucket, Key=f"output/{first}/comfyui.log")["Body"].read()
    assert body == b"why\n"
    assert group.newest() != first
    assert (group.tag(), group.suspended()) == ("1 1", [])


def test_three_in_a_row_are_enough(group: Group) -> None:
    for _ in range(3):
        group.fail()
    assert (group.tag(), group.suspended()) == ("1 3", ["Launch"])
    assert not [each for each in group.state()["Instances"] if each["LifecycleState"] == "InService"]
    assert group.state()["DesiredCapacity"] == 1, "what is wanted stays, so the alarm rings"
    problem = capacity_problem(group.autoscaling, group.name)
    assert problem is not None
    assert "3 instances in a row, of version 1 of the launch template, did not come to work" in problem
    assert "run create_env.sh again" in problem


def test_one_that_works_voids_the_count(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    group.fail()
    group.fail()
    monkeypatch.setattr("worker.group.random.Random", lambda _: None)
    settings: Any = type("Settings", (), {"asg_name": group.name, "scale_cooldown_s": 180})
    rooms: Any = (settings, group.autoscaling, None, None, None, None, group.newest())
    Membership(*rooms)._read_group()
    assert group.tag() is None
    group.fail()
    assert (group.tag(), group.suspended()) == ("1 1", [])


def test_another_version_is_counted_anew(group: Group) -> None:
    tag = {"ResourceId": group.name, "ResourceType": "auto-scaling-group", "PropagateAtLaunch": False}
    group.autoscaling.create_or_update_tags(Tags=[tag | {"Key": "comfy-failed-boots", "Value": "7 2"}])
    group.fail()
    assert (group.tag(), group.suspended()) == ("1 1", [])


def test_with_settings_that_cannot_be_read_it_is_told_all_the_same(group: Group) -> None:
    first = group.newest()
    (group.machine.home / "env").write_text("ENV=$(reboot)\n")
    answer = group.fail(AWS_DEFAULT_REGION="")
    assert "which bucket the logs belong into" in answer
    assert group.newest() != first


def test_what_is_not_counted_is_not_replaced(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else an instance that may not write the count would be replaced for ever."""
    from local_cloud import Fault

    refused = Fault(403, "AccessDenied")
    monkeypatch.setattr(
        group.cloud, "fault", lambda _, operation: refused if operation == "CreateOrUpdateTags" else None
    )
    first = group.newest()
    assert "cannot create-or-update-tags" in group.fail()
    assert (group.newest(), group.tag()) == (first, None)
    assert (group.machine.home / "logs/starting").exists(), "it is tried again at the next start"


@pytest.mark.parametrize("state", ["None", "Terminated"])
def test_who_is_in_no_group_or_leaves_already_tells_nobody(group: Group, state: str) -> None:
    group.said["autoscaling/target-lifecycle-state"] = state
    first = group.newest()
    assert "gives up" not in group.fail()
    assert group.newest() == first


def test_it_has_its_time(group: Group) -> None:
    assert "gives up" not in group.fail(GIVE_UP_SECONDS="900")
    before = (group.machine.home / "logs/starting").read_text()
    group.machine.fails("comfy-manage")
    assert (group.machine.home / "logs/starting").read_text() == before, "all starts count from the first"


def test_a_worker_that_sees_comfyui_answer_ends_the_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "starting").write_text("boot 1\n")
    reports: Any = object.__new__(Reports)
    reports._folder = tmp_path
    reports._settings = type("Settings", (), {"comfy_address": "127.0.0.1:9"})
    reports._metrics = type("Metrics", (), {"add_boot": lambda *_: None})()
    comfy = type("ComfyUI", (), {"__init__": lambda *_: None, "is_ready": lambda _: True})
    monkeypatch.setattr("worker.reports.ComfyUI", comfy)
    reports.tell_of_comfyui(None)
    assert not (tmp_path / "starting").exists()
