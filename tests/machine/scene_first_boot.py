"""An instance of the fleet, from nothing to a job done, and its boots."""

from __future__ import annotations

import json

from stage import GROUP, Stage, workers_of
from workplace import await_that, group_of


def test_a_job_starts_an_instance_which_does_it(stage: Stage) -> None:
    stage.clear()
    assert "succeeded in" in stage.on_base("./send_job.py --env pro --wait")
    (machine,) = stage.on()
    machine.await_boot()
    # The user data is the launch template's, and it has run as cloud-init runs it.
    assert "ENV=pro" in machine.run("grep ^ENV= comfy/env")
    assert "status: done" in machine.run("cloud-init status")
    assert machine.run("systemctl --failed --plain --no-legend", user="root") == ""
    assert machine.run("findmnt -no FSTYPE comfy/s3") == "fuse.s3fs\n"
    phases = json.loads(machine.run("cat comfy/logs/boot.json"))["phases"]
    assert list(phases) == ["system", "cloud_init", "mount", "comfyui"]
    assert all(0 <= seconds < 600 for seconds in phases.values()), phases
    assert [i["LifecycleState"] for i in group_of(stage.cloud, GROUP)["Instances"]] == ["InService"]
    # Its role may do all that it did.
    assert stage.denied(machine) == []


def test_at_the_second_boot_the_services_come_back_and_user_data_is_not_run_again(stage: Stage) -> None:
    machine = stage.healthy()
    workers = workers_of(machine)
    # User data empties this folder.
    machine.run("touch comfy/logs/mine")
    machine.reboot()
    stage.await_worker(machine, workers)
    assert stage.await_receipt(stage.send())["status"] == "succeeded"
    assert machine.run("ls comfy/logs/mine") == "comfy/logs/mine\n"
    assert machine.run("grep ^ENV= comfy/env") == "ENV=pro\n"


def test_an_idle_instance_ends_itself(stage: Stage) -> None:
    machine = stage.launch(lambda machine: machine.set(SCALE_COOLDOWN=2))
    job = stage.send()
    await_that("it is gone", lambda: stage.cloud.instance_state(machine.instance_id) == "terminated")
    assert stage.await_receipt(job)["status"] == "succeeded"
    assert group_of(stage.cloud, GROUP)["DesiredCapacity"] == 0
    logs = stage.keys(f"output/{machine.instance_id}/")
    assert f"output/{machine.instance_id}/parse_job.log" in logs, logs
    assert stage.denied(machine) == []
