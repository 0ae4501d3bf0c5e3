"""The systemd units."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from machine import (
    machine,
)
from places import ROOT

__all__ = ["machine"]

UNITS = {"comfyui.service": "comfyui", "comfy-manage.service": "comfy-manage"}


@pytest.mark.parametrize(("unit", "service"), UNITS.items())
def test_the_units_say_what_they_must(unit: str, service: str) -> None:
    parser = configparser.ConfigParser(interpolation=None)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read(ROOT / "systemd" / unit)
    assert parser["Service"]["ExecStart"] == f"/home/ubuntu/comfy/start_service.sh {service}"
    assert parser["Service"]["WorkingDirectory"] == "/home/ubuntu/comfy"
    assert parser["Service"]["User"] == "ubuntu"
    assert (parser["Service"]["Restart"], parser["Service"]["RestartSec"]) == ("always", "5")
    assert (parser["Service"]["RestartSteps"], parser["Service"]["RestartMaxDelaySec"]) == ("5", "30")
    assert parser["Unit"]["StartLimitIntervalSec"] == "0"
    assert parser["Install"]["WantedBy"] == "multi-user.target"
    assert parser["Unit"]["After"] == "network-online.target", "After=cloud-init makes a cycle"
    assert "EnvironmentFile" not in parser["Service"], "systemd does not expand ${NAME}"


def test_the_worker_cannot_become_root_and_comfyuis_mounts_are_seen() -> None:
    worker, comfyui = configparser.ConfigParser(interpolation=None), configparser.ConfigParser(interpolation=None)
    worker.read(ROOT / "systemd/comfy-manage.service")
    comfyui.read(ROOT / "systemd/comfyui.service")
    assert worker["Service"]["NoNewPrivileges"] == worker["Service"]["PrivateTmp"] == "yes"
    for file in (ROOT / "parse_job.py", *(ROOT / "worker").glob("*.py")):
        assert '"sudo"' not in file.read_text()
    forbidden = re.compile("private|protect|readonly|readwrite|inaccessible|mountflags|nonewpriv|restrict|system")
    assert [name for name in comfyui["Service"] if forbidden.match(name)] == []


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd-analyze here")
def test_systemd_accepts_the_units(tmp_path: Path) -> None:
    for unit in UNITS:
        text = (ROOT / "systemd" / unit).read_text()
        text = text.replace("User=ubuntu", "User=root").replace("/home/ubuntu/comfy", str(ROOT))
        (tmp_path / unit).write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", *(tmp_path / unit for unit in UNITS)],
        capture_output=True,
        text=True,
        check=False,
    )
    complaints = [line for line in done.stderr.splitlines() if any(unit in line for unit in UNITS)]
    said = subprocess.run(["systemd-analyze", "--version"], capture_output=True, text=True, check=True).stdout
    if int(said.split()[1]) < 254:  # Ubuntu 24.04 has 255
        complaints = [line for line in complaints if not re.search("'Restart(Steps|MaxDelaySec)'.*ignoring", line)]
    assert complaints == []
