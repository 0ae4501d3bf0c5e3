"""The systemd units."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from machine import (
    machine,
)
from places import ROOT

import fleet

__all__ = ["machine"]

UNITS = {"comfyui.service": "comfyui", "comfy-manage.service": "comfy-manage"}
ALL = [*UNITS, "comfy-gateway.service"]


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
    after = {"comfyui": "network-online.target", "comfy-manage": "network-online.target comfyui.service"}
    assert parser["Unit"]["After"] == after[service], "After=cloud-init makes a cycle"
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


def test_the_gateway_lets_nobody_in_without_a_token_and_is_asked_for_by_options_that_it_knows() -> None:
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(ROOT / "systemd/comfy-gateway.service")
    service = dict(parser["Service"])
    command = service["execstart"].split()
    assert command[:2] == ["/home/ubuntu/comfy/venv/bin/python", "fleet.py"]
    options = fleet.parse_arguments(command[2:])
    assert options.token_file
    assert not options.no_auth
    assert (service["user"], service["restart"], service["restartsec"]) == ("ubuntu", "always", "5")
    assert parser["Unit"]["StartLimitIntervalSec"] == "0"


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd-analyze here")
def test_systemd_accepts_the_units(tmp_path: Path) -> None:
    for unit in ALL:
        text = (ROOT / "systemd" / unit).read_text()
        text = text.replace("/home/ubuntu/comfy/venv/bin/python", sys.executable)
        text = text.replace("User=ubuntu", "User=root").replace("/home/ubuntu/comfy", str(ROOT))
        (tmp_path / unit).write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", *(tmp_path / unit for unit in ALL)],
        capture_output=True,
        text=True,
        check=False,
    )
    complaints = [line for line in done.stderr.splitlines() if any(unit in line for unit in ALL)]
    said = subprocess.run(["systemd-analyze", "--version"], capture_output=True, text=True, check=True).stdout
    if int(said.split()[1]) < 254:  # Ubuntu 24.04 has 255
        complaints = [line for line in complaints if not re.search("'Restart(Steps|MaxDelaySec)'.*ignoring", line)]
    assert complaints == []
