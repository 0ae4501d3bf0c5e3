"""What breaks on a machine, and what becomes of its jobs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from real_machine import SEED, RealMachine
from stage import BUCKET, GROUP, Stage, runs_on, telling, workers_of
from workplace import await_that, group_of


def test_a_mount_that_dies_costs_no_job(stage: Stage) -> None:
    machine = stage.healthy()
    assert stage.await_receipt(stage.send())["status"] == "succeeded"
    machine.run("pkill --signal KILL --exact s3fs", user="root")
    assert "Transport endpoint is not connected" in machine.try_to("ls comfy/s3").stderr
    receipts = [stage.await_receipt(job) for job in [stage.send() for _ in range(3)]]
    assert [receipt["status"] for receipt in receipts] == ["succeeded"] * 3
    assert machine.run("findmnt -no FSTYPE comfy/s3") == "fuse.s3fs\n"


def test_after_a_power_cut_a_job_is_run_again(stage: Stage) -> None:
    machine = stage.launch(lambda machine: machine.set(VISIBILITY_TIMEOUT=15))
    stage.await_worker(machine)
    job = stage.send(seconds=5)
    await_that("the job runs", runs_on(machine, job))
    machine.pull_the_plug()
    machine.power_on()
    stage.await_worker(machine, before=1)
    receipt = stage.await_receipt(job)
    assert receipt["status"] == "succeeded"
    assert workers_of(machine) == 2


def test_a_module_of_cloud_init_that_fails_keeps_nobody_from_work(stage: Stage) -> None:
    # There is no such locale on the machine, so cloud-init's module `locale` fails, long before the user data runs.
    machine = stage.launch(
        lambda machine: machine.write(f"{SEED}/vendor-data", "#cloud-config\nlocale: xx_XX.UTF-8\n")
    )
    assert stage.await_receipt(stage.send())["status"] == "succeeded"
    machine.await_boot()
    assert "status: error" in machine.try_to("cloud-init status").stdout
    assert machine.run("grep ^ENV= comfy/env") == "ENV=pro\n"


def break_venv(machine: RealMachine) -> None:
    (machine.home / "venv/bin/python").unlink()


def break_bucket(machine: RealMachine) -> None:
    machine.set(S3_BUCKET="somebody-elses-bucket")


@pytest.mark.parametrize(
    ("broken", "why"), [(break_venv, "make the virtual environment"), (break_bucket, "cannot mount the bucket")]
)
def test_an_instance_that_cannot_work_tells_its_group_and_why(
    stage: Stage, broken: Callable[[RealMachine], None], why: str
) -> None:
    def prepare(machine: RealMachine) -> None:
        broken(machine)
        machine.drop_in(GIVE_UP_SECONDS=8)

    machine = stage.launch(prepare)

    def states() -> list[str]:
        instances = group_of(stage.cloud, GROUP)["Instances"]
        return [i["LifecycleState"] for i in instances if i["InstanceId"] == machine.instance_id]

    try:
        with telling(machine):
            await_that("it leaves the group", lambda: states() != ["InService"])
            assert "gives up" in machine.journal()
            assert why in machine.journal()
            if broken is break_venv:  # else there is no bucket to store them in
                log = stage.s3.get_object(Bucket=BUCKET, Key=f"output/{machine.instance_id}/journal.log")
                assert why in log["Body"].read().decode()
    finally:
        # Should three in a row have come to nothing, the group would launch no more.
        stage.clear()
        stage.forget_failed_boots()
