"""The two services under systemd: what a stop, a restart and the watchdog do to them, and a shutdown."""

from __future__ import annotations

from real_machine import RealMachine
from stage import Stage, runs_on, workers_of
from workplace import await_that

UGLY = ("SIGKILL", "Killing process", "left-over process", "remains running", "status=1/FAILURE", "result 'timeout'")
"""What systemd says where a unit had to be ended by force, or left something behind."""


def test_restarting_comfyui_mounts_anew_and_leaves_the_worker_alone(stage: Stage) -> None:
    machine = stage.healthy()
    worker, mount = machine.property("comfy-manage", "MainPID"), machine.run("pgrep -x s3fs", user="root")
    machine.run("systemctl restart comfyui", user="root")
    assert stage.await_receipt(stage.send())["status"] == "succeeded"
    assert machine.property("comfy-manage", "MainPID") == worker
    assert machine.run("pgrep -x s3fs", user="root") not in (mount, "")
    assert machine.run("findmnt -no FSTYPE comfy/s3") == "fuse.s3fs\n"


def test_at_a_stop_nothing_has_to_be_killed(stage: Stage) -> None:
    machine = stage.healthy()
    job = stage.send(seconds=8)
    await_that("the job runs", runs_on(machine, job))
    seen = len(machine.journal().splitlines())
    workers = workers_of(machine)
    machine.run("systemctl stop comfy-manage comfyui", user="root")
    said = machine.journal().splitlines()[seen:]
    assert [line for line in said if any(word in line for word in UGLY)] == []
    for unit in ("comfyui", "comfy-manage"):
        assert machine.property(unit, "ActiveState") == "inactive", said
    assert machine.try_to("pgrep -u ubuntu --list-full", user="root").stdout == ""
    # Whether s3fs unmounts in time is its own affair: a dead mount is mended by the next start.
    machine.run("systemctl start comfyui comfy-manage", user="root")
    stage.await_worker(machine, workers)
    assert stage.await_receipt(job)["status"] == "succeeded"
    assert machine.run("findmnt -no FSTYPE comfy/s3") == "fuse.s3fs\n"


def test_a_worker_that_hangs_is_replaced_and_its_job_is_not_lost(stage: Stage) -> None:
    def watch_closely(machine: RealMachine) -> None:
        folder = "/etc/systemd/system/comfy-manage.service.d"
        machine.write(f"{folder}/watchdog.conf", "[Service]\nWatchdogSec=15\nTimeoutAbortSec=1\n")
        machine.drop_in(WATCHDOG_SECONDS=1)

    machine = stage.launch(watch_closely)
    stage.await_worker(machine)
    job = stage.send(seconds=8)
    await_that("the job runs", runs_on(machine, job))
    machine.run(f"kill -STOP {machine.property('comfy-manage', 'MainPID')}", user="root")
    await_that("the watchdog has bitten", lambda: "Watchdog timeout" in machine.journal("comfy-manage"))
    stage.await_worker(machine, before=1)
    assert stage.await_receipt(job)["status"] == "succeeded"
    # Once the new worker was there it took the job over from the one before, and did not wait for the queue.
    assert stage.runs(machine, job) == 1


def test_at_a_shutdown_the_worker_goes_before_comfyui(stage: Stage) -> None:
    machine = stage.healthy()
    job = stage.send(seconds=8)
    await_that("the job runs", runs_on(machine, job))
    machine.shut_down()
    lines = [line for line in machine.journal().splitlines() if "systemd[1]:" in line]
    worker = max(n for n, line in enumerate(lines) if "Stopped comfy-manage.service" in line)
    comfyui = max(n for n, line in enumerate(lines) if "Stopping comfyui.service" in line)
    assert worker < comfyui
    assert [line for line in lines[worker - 5 :] if any(word in line for word in UGLY)] == []
    was_running = stage.receipt(job) is None
    stage.clear()
    stage.healthy()
    receipt = stage.await_receipt(job)
    assert receipt["status"] == "succeeded"
    assert receipt["attempt"] == (2 if was_running else 1), "it was given back, for another instance"
