"""boot/first_boot.sh: the services of a fleet instance wait for its user data, and for nothing else of cloud-init's."""

from __future__ import annotations

import pytest
from machine import INSTANCE_ID, PATIENCE_SECONDS, Machine, await_true, machine, metadata

__all__ = ["machine", "metadata"]


def leave_mark(machine: Machine, instance_id: str = INSTANCE_ID) -> None:
    """The user data's last step."""
    (machine.home / "first-boot").write_text(f"{instance_id}\n")


@pytest.mark.usefixtures("metadata")
@pytest.mark.parametrize("service", ["comfyui", "comfy-manage"])
@pytest.mark.parametrize("mark", ["none", "of the image"])
def test_a_service_waits_for_the_mark_of_its_own_instance(machine: Machine, service: str, mark: str) -> None:
    machine.stub("cloud-init", "exit 1")  # locale was seen to fail, and makes it say so for ever
    if mark == "of the image":
        leave_mark(machine, "i-0fedcba9876543210")
    process = machine.start(service)
    await_true("it has asked what it is", (machine.home / "logs/starting").exists)
    assert process.poll() is None
    machine.settings(ENV="pro")
    leave_mark(machine)
    stdout, stderr = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 0, stdout + stderr
    assert machine.started()["env"]["ENV"] == "pro"


@pytest.mark.usefixtures("metadata")
def test_without_the_mark_nothing_starts(machine: Machine) -> None:
    """ENV may be the base machine's, whose jobs this instance would take."""
    machine.stub("cloud-init", "exit 0")
    for service in ("comfyui", "comfy-manage"):
        answer = machine.fails(service, FIRST_BOOT_SECONDS="1")
        assert "the user data has not come to its end in 1 s" in answer
        assert "cloud-init-output.log" in answer


@pytest.mark.parametrize("user_data", [None, "#!/bin/sh\napt-get update\n", "\x1f\x8b"])
def test_the_base_machine_waits_for_no_mark(
    machine: Machine, metadata: dict[str, str], user_data: str | None
) -> None:
    """Its cloud-init may have failed as well."""
    del metadata["autoscaling/target-lifecycle-state"], metadata["user-data"]
    if user_data is not None:
        metadata["user-data"] = user_data
    machine.stub("cloud-init", "exit 1")
    assert machine.runs("comfyui")["env"]["ENV"] == "base"


def test_a_cloud_init_that_never_ends_keeps_the_base_machine_waiting_for_a_while_only(
    machine: Machine, metadata: dict[str, str]
) -> None:
    del metadata["user-data"]
    machine.stub("cloud-init", "exec sleep 1000")
    assert machine.runs("comfyui", FIRST_BOOT_SECONDS="1")["env"]["ENV"] == "base"
