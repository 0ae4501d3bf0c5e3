"""start_service.sh: how long the boot takes."""

from __future__ import annotations

import json
import time
from datetime import datetime
from pathlib import Path

import pytest
from machine import (
    PATIENCE_SECONDS,
    Machine,
    boot_report,
    machine,
)

from worker.reports import finish_boot_report

__all__ = ["machine"]


@pytest.mark.parametrize(("copy", "more"), [("", []), ("awscli", ["models"])])
def test_the_seconds_of_the_boot_are_written_down(machine: Machine, copy: str, more: list[str]) -> None:
    machine.settings(COPY_MODEL_TO_LOCAL=copy)
    machine.stub("cloud-init", "sleep 0.3")
    machine.stub("mount-s3", 'sleep 0.2; echo "${@: -1}" >>"$STATE/mounted"')
    machine.stub("aws", "sleep 0.6")
    booted_at = int(time.time()) - 7
    machine.runs("comfyui", BOOTED_AT=str(booted_at))
    report, phases = boot_report(machine), boot_report(machine)["phases"]
    assert datetime.fromisoformat(report["booted_at"]).timestamp() == booted_at
    assert list(phases) == ["system", "cloud_init", "mount", *more]
    least = {"system": 7.0, "cloud_init": 0.3, "mount": 0.2}
    assert all(phases[name] >= seconds for name, seconds in least.items())
    assert sum(phases.values()) == pytest.approx(report["comfyui_started_at"] - booted_at, abs=0.001)
    if copy:
        assert phases["mount"] + phases["models"] >= 0.6, "the copy runs beside the mount"

    started = time.time()
    finished = finish_boot_report(machine.home / "logs")
    assert finished is not None
    assert boot_report(machine) == finished
    assert list(finished["phases"]) == [*phases, "comfyui"]
    assert finished["phases"]["comfyui"] >= started - report["comfyui_started_at"] - 0.001
    assert finished["total"] == pytest.approx(sum(finished["phases"].values()), abs=0.001)
    assert finished["total"] == pytest.approx(time.time() - booted_at, abs=5)
    assert finish_boot_report(machine.home / "logs") is None, "only the first answer after a boot counts"

    machine.runs("comfyui")
    assert boot_report(machine) == finished, "a restart of the service is no boot"
    (machine.home / "logs/boot.json").write_text(json.dumps(finished | {"boot_id": "the boot before"}))
    machine.runs("comfyui")
    assert boot_report(machine)["boot_id"] == report["boot_id"]
    assert "total" not in boot_report(machine)


def test_without_the_local_cloud_the_boot_begins_with_the_kernel(machine: Machine) -> None:
    machine.runs("comfyui", BOOT_LIMIT_MS=str(10**12))  # this machine may have been on for long
    uptime_s = float(Path("/proc/uptime").read_text().split()[0])
    assert boot_report(machine)["phases"]["system"] == pytest.approx(uptime_s, abs=PATIENCE_SECONDS)


def test_services_that_are_first_started_hours_later_are_no_part_of_the_boot(machine: Machine) -> None:
    machine.runs("comfyui", BOOTED_AT=str(int(time.time()) - 7200))
    assert boot_report(machine)["phases"]["system"] < PATIENCE_SECONDS


@pytest.mark.parametrize("garbage", ["", "[]", "{}", '{"phases": {}, "comfyui_started_at": "now"}'])
def test_a_boot_report_that_is_none_is_left_alone(tmp_path: Path, garbage: str) -> None:
    assert finish_boot_report(tmp_path) is None
    (tmp_path / "boot.json").write_text(garbage)
    assert finish_boot_report(tmp_path) is None
    assert (tmp_path / "boot.json").read_text() == garbage
