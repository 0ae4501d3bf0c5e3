"""Holds a real ComfyUI against what ours is built on: the stand-in's recordings, and the check before sending.

    tests/.venv/bin/python tests/real/contracts.py ~/ComfyUI ~/ComfyUI/venv/bin/python [ARGUMENT...]

Arguments go to ComfyUI's main.py, such as --cpu. The tests of the stand-in's protocol are run with the real server in
its place. Then it is asked for its verdict on each workflow of tests/sender/verdicts.json, but those that end a server,
and the check, which knows this server's nodes, must call none of them wrong that it runs. Ends with 1 where something
is not as it should be.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from server import HERE, parser_of, start

TESTS = HERE.parent
sys.path[:0] = [str(TESTS / "cloud"), str(TESTS / "sender"), str(TESTS.parent)]
os.environ |= {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_EC2_METADATA_SERVICE_ENDPOINT": "http://127.0.0.1:9"}

import record_verdicts  # noqa: E402 - the paths above
from local_cloud import free_port  # noqa: E402

from ground.comfyui import ComfyUI  # noqa: E402
from sender.check import find_problems, place_of  # noqa: E402


def main() -> int:
    """Start the server, and hold it against both; returns the exit code."""
    args = parser_of(__doc__).parse_args()
    port = free_port()
    address = f"127.0.0.1:{port}"
    with tempfile.TemporaryDirectory() as folder:
        odd_nodes = sorted((TESTS / "sender/odd_nodes").glob("*.py"))
        servers: list[subprocess.Popen[bytes]] = []

        def start_anew() -> None:
            for process in servers:
                process.kill()
                process.wait()
            servers[:] = [start(args, Path(folder, "base"), port, odd_nodes)]

        try:
            start_anew()
            failed = hold_the_protocol(address)
            failed += hold_the_check(address, start_anew)
        finally:
            for process in servers:
                process.kill()
                process.wait()
    return 1 if failed else 0


def hold_the_protocol(address: str) -> int:
    """The contract tests of the stand-in; returns whether one failed."""
    print("the stand-in's recordings, replayed:", flush=True)
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider"]
    rooms = [TESTS / "cloud/test_comfyui_recordings.py", TESTS / "cloud/test_comfyui_standin.py"]
    ran = subprocess.run(
        [*command, *rooms], cwd=TESTS.parent, env=os.environ | {"COMFY_ADDRESS": address}, check=False
    )
    return int(ran.returncode != 0)


def hold_the_check(address: str, start_anew: Callable[[], None]) -> int:
    """The check against this server's verdicts; returns how many workflows it calls wrong that run.

    Whether some workflows end the thread that runs jobs depends on what the server has cached: then it is started anew.
    """
    recorded = json.loads(record_verdicts.VERDICTS.read_text(encoding="utf-8"))
    nodes = ComfyUI(address).object_info()
    files = {place_of(name) for name in record_verdicts.FILES}
    for name, make in record_verdicts.FILES.items():
        record_verdicts.upload(f"http://{address}", name, make())
    asked, refused, died, false_alarms = 0, 0, 0, []
    for name, row in recorded["rows"].items():
        if any(row[version].get("ran") == record_verdicts.DIED for version in recorded["servers"]):
            continue
        asked += 1
        told: dict[str, Any] = record_verdicts.verdict_of(f"http://{address}", row["prompt"])
        if told.get("ran") == record_verdicts.DIED:
            died += 1
            start_anew()
            continue
        refused += told["status"] != 200
        found = find_problems(row["prompt"], nodes, lambda file: place_of(file) in files)
        if told["status"] == 200 and any(problem.certain for problem in found):
            false_alarms.append(f"! {name}: it runs, and the check says: {found}")
    print(
        f"the check: {asked} workflows, of which the server refused {refused} and ended at {died}; "
        f"{len(false_alarms)} that it ran are refused by the check"
    )
    print("\n".join(false_alarms), end="\n" if false_alarms else "", flush=True)
    return len(false_alarms)


if __name__ == "__main__":
    sys.exit(main())
