"""Instances of the warm pool boot to the end before they are stopped, and work as soon as they are started."""

from __future__ import annotations

import base64
import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from local_cloud import LocalCloud
from places import TESTS, copy_comfyui, copy_scripts
from workplace import Site, await_that, group_of, image_workflow

USER_DATA = (
    "for room in common fill template; do source provision/$room.sh; done; COMFY_HOME=/home/ubuntu/comfy user_data"
)
LAUNCHING = {"LifecycleHookName": "comfy-launching", "LifecycleTransition": "autoscaling:EC2_INSTANCE_LAUNCHING"}
ENDING = {"LifecycleHookName": "comfy-terminating", "LifecycleTransition": "autoscaling:EC2_INSTANCE_TERMINATING"}


class PooledFleet:
    """An environment whose group has a pool of one; its image is of a real base folder."""

    def __init__(self, cloud: LocalCloud, site: Site, folder: Path) -> None:
        self.cloud, self.site = cloud, site
        self.name = f"{site.prefix}-{site.env}-asg"
        self.autoscaling, ec2 = cloud.client("autoscaling"), cloud.client("ec2")
        folder.mkdir()
        copy_scripts(folder)
        (folder / "venv").symlink_to(TESTS / ".venv")
        (folder / "ComfyUI").mkdir()
        copy_comfyui(folder / "ComfyUI")
        settings = (site.folder / "env").read_text().replace(f"ENV={site.env}", "ENV=base")
        (folder / "env").write_text(f"{settings}S3_BUCKET={site.bucket}\nSCALE_COOLDOWN=600\n")
        image = ec2.create_image(InstanceId=cloud.make_base(folder).instance_id, Name=self.name)["ImageId"]
        user_data = subprocess.run(
            ["bash", "-c", f"ENV={site.env}; {USER_DATA}"], cwd=folder, check=True, capture_output=True
        ).stdout
        data = {
            "ImageId": image,
            "InstanceType": "g5.2xlarge",
            "UserData": base64.b64encode(user_data).decode(),
        }
        ec2.create_launch_template(LaunchTemplateName=self.name, LaunchTemplateData=data)

    def make(self, *hooks: dict[str, Any]) -> None:
        """Make the group and its pool."""
        self.autoscaling.create_auto_scaling_group(
            AutoScalingGroupName=self.name,
            LaunchTemplate={"LaunchTemplateName": self.name, "Version": "$Default"},
            MinSize=0,
            MaxSize=2,
            AvailabilityZones=["us-west-2a"],
            NewInstancesProtectedFromScaleIn=True,
        )
        for hook in hooks:
            self.autoscaling.put_lifecycle_hook(
                AutoScalingGroupName=self.name, HeartbeatTimeout=900, DefaultResult="CONTINUE", **hook
            )
        self.autoscaling.put_warm_pool(
            AutoScalingGroupName=self.name, PoolState="Stopped", MinSize=1, MaxGroupPreparedCapacity=1
        )

    def await_stopped(self) -> str:
        """Wait until the pool's instance is stopped; returns its id."""

        def stopped() -> str | None:
            pool = self.cloud.launches.pools[self.name]
            return next((each.instance_id for each in pool if each.lifecycle_state == "Warmed:Stopped"), None)

        instance_id: str = await_that("an instance stands by", stopped)
        return instance_id

    def folder_of(self, instance_id: str) -> Path:
        """Its disk."""
        return self.cloud.machines[instance_id].folder

    def end(self) -> None:
        """Remove group and pool, and wait until their workers are silent: other tests count calls."""
        ids = [each["InstanceId"] for each in group_of(self.cloud, self.name)["Instances"]]
        ids += [each.instance_id for each in self.cloud.launches.pools[self.name]]
        self.autoscaling.delete_warm_pool(AutoScalingGroupName=self.name)
        self.autoscaling.delete_auto_scaling_group(AutoScalingGroupName=self.name, ForceDelete=True)
        machines = [self.cloud.machines[instance_id] for instance_id in ids if instance_id in self.cloud.machines]
        await_that("they are silent", lambda: not any(machine.state()["services"] for machine in machines))


@pytest.fixture
def pooled(cloud: LocalCloud, make_site: Callable[..., Site], tmp_path: Path) -> Iterator[PooledFleet]:
    fleet = PooledFleet(cloud, make_site(), tmp_path / "base")
    yield fleet
    fleet.end()


@pytest.mark.slow
def test_an_instance_of_the_pool_boots_to_the_end_and_works_when_it_is_started(pooled: PooledFleet) -> None:
    pooled.make(LAUNCHING, ENDING)
    instance_id = pooled.await_stopped()
    folder = pooled.folder_of(instance_id)
    assert "mount" in json.loads((folder / "logs/boot.json").read_text())["phases"]
    assert (folder / "first-boot").read_text().strip() == instance_id
    reported = "Reported for work" in (folder / "logs/parse_job.log").read_text()
    assert reported, "ComfyUI has answered before it was stopped"
    job_id = pooled.site.send(image_workflow())
    pooled.autoscaling.set_desired_capacity(AutoScalingGroupName=pooled.name, DesiredCapacity=1)
    result = pooled.site.await_result(job_id)
    assert (result["status"], result["instance_id"]) == ("succeeded", instance_id)
    states = [each["LifecycleState"] for each in group_of(pooled.cloud, pooled.name)["Instances"]]
    assert states == ["InService"]
    log = (folder / "logs/parse_job.log").read_text()
    assert log.count("Reported for work") == 2, "into the pool, and into service"


@pytest.mark.slow
def test_without_the_launching_hook_its_first_boot_is_cut_off(pooled: PooledFleet) -> None:
    """As AWS does it; else this test of the hook would prove nothing."""
    pooled.make(ENDING)
    folder = pooled.folder_of(pooled.await_stopped())
    assert not (folder / "logs/boot.json").exists()
