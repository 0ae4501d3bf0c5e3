"""A machine of the fleet, as start_service.sh sees it, and a bucket for it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import boto3
import pytest
from aws_cli_server import AWS_CLI_SOCKET
from local_cloud import metadata_handler
from places import CLOUD, ROOT, link_scripts

PATIENCE_SECONDS = 30.0

INSTANCE_STORE = "Amazon EC2 NVMe Instance Storage"

CLOSED = "http://127.0.0.1:9"

INSTANCE_ID = "i-0123456789abcdef0"

ENV_FILE = """\
ENV=base
REGION=us-west-2
S3_BUCKET=bucket-of-${ENV}
"""

# Both say what they were started with; COMFY_HOME is exported by the script.
REPORT = """\
import json, os, sys
from pathlib import Path
print("words on stdout")
print("words on stderr", file=sys.stderr)
report = {"argv": sys.argv, "cwd": os.getcwd(), "pid": os.getpid(), "env": dict(os.environ)}
Path(os.environ["STATE"], "started.tmp").write_text(json.dumps(report))
Path(os.environ["STATE"], "started.tmp").rename(Path(os.environ["STATE"], "started.json"))
"""

LAST_WORDS = """
import signal, time
def stop(*_):
    print("last words")
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
Path(os.environ["STATE"], "ready").touch()
while True:
    time.sleep(1)
"""

# lsblk, wipefs, mkfs.ext4 and mount over one table of disks, disks.json: name -> its columns.
DISKS = f"""\
#!{sys.executable}
import json, os, sys
from pathlib import Path
state = Path(os.environ["STATE"])
disks = json.loads((state / "disks.json").read_text())
tool, words = Path(sys.argv[0]).name, sys.argv[1:]
if tool == "lsblk":
    columns = words[words.index("--output") + 1].split(",")
    wanted = words[-1] if words[-1].startswith("/") else None
    for name, disk in disks.items():
        if wanted in (None, name):
            rows = [disk | {{"NAME": name}}]
            if "--nodeps" not in words:
                rows += [{{"NAME": "└─" + child}} for child in disk.get("children", [])]
            for row in rows:
                print(*(row.get(column, "").ljust(12) for column in columns))
    sys.exit()
with (state / "calls").open("a") as calls:
    print(tool, *words, file=calls)
device = next(word for word in words if word.startswith("/dev/"))
disk = disks[device]
if tool == "wipefs":
    print(disk.get("signature", disk.get("FSTYPE", "")), end="")
elif tool == "mkfs.ext4":
    if disk.get("broken"):
        sys.exit("mkfs.ext4: input/output error")
    disk |= {{"FSTYPE": "ext4", "LABEL": words[words.index("-L") + 1]}}
elif tool == "mount":
    disk["MOUNTPOINT"] = words[-1]
    with (state / "mounted").open("a") as mounted:
        print(words[-1], file=mounted)
(state / "disks.json").write_text(json.dumps(disks))
"""

STUBS = {
    "mount-s3": 'echo "${@: -1}" >>"$STATE/mounted"',
    "mountpoint": 'grep -qxsF "$2" "$STATE/mounted"',
    "fusermount": ': >"$STATE/unmounted"',
    "aws": "",
}


def await_true(what: str, condition: Callable[[], object]) -> None:
    """Waits until the condition holds; fails the test after PATIENCE_SECONDS."""
    end = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        if time.monotonic() > end:
            pytest.fail(f"waited in vain until {what}")
        time.sleep(0.02)


class Machine:
    """A comfy folder with the real scripts, a pretended ComfyUI and worker, and stubs in PATH."""

    def __init__(self, folder: Path) -> None:
        self.home = folder / "comfy"
        self.comfyui = self.home / "ComfyUI"
        self.stubs = folder / "stubs"
        self.state = folder / "state"
        for made in (self.comfyui, self.home / "venv/bin", self.stubs, self.state):
            made.mkdir(parents=True)
        link_scripts(self.home)
        (self.home / "env").write_text(ENV_FILE)
        (self.home / "venv/bin/python").symlink_to(sys.executable)
        (self.comfyui / "main.py").write_text(REPORT)
        (self.home / "parse_job.py").write_text(REPORT)
        for name, body in STUBS.items():
            self.stub(name, body)
        # It eats its standard input, as the real one does where it uses a pseudo-terminal.
        self.stub("sudo", 'shift\ncat >/dev/null\nexec "$@"', record=False)
        for name in ("lsblk", "wipefs", "mkfs.ext4", "mount"):
            (self.stubs / name).write_text(DISKS)
            (self.stubs / name).chmod(0o755)
        self.disks({})
        path = (self.stubs, CLOUD / "bin", Path(sys.executable).parent, os.environ["PATH"])
        self.environ = {
            "PATH": ":".join(map(str, path)),
            "HOME": str(folder),
            "STATE": str(self.state),
            "LOCAL_VENV": str(Path(sys.executable).parent.parent),
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_ENDPOINT_URL": CLOSED,
            "S3_ENDPOINT_URL": CLOSED,
            "AWS_EC2_METADATA_SERVICE_ENDPOINT": CLOSED,
            "COPY_PAUSE_SECONDS": "0",
        }

    def stub(self, name: str, body: str, record: bool = True) -> None:
        note = f'echo "{name} $*" >>"$STATE/calls"\n' if record else ""
        (self.stubs / name).write_text(f"#!/usr/bin/env bash\n{note}{body}\n")
        (self.stubs / name).chmod(0o755)

    def disks(self, table: dict[str, dict[str, object]]) -> None:
        (self.state / "disks.json").write_text(json.dumps(table))

    def settings(self, **values: str) -> None:
        lines = [f'{name}="{value}"' for name, value in values.items()]
        lines += [line for line in ENV_FILE.splitlines() if line.partition("=")[0] not in values]
        (self.home / "env").write_text("\n".join(lines) + "\n")

    def start(self, *words: str, **environ: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [self.home / "start_service.sh", *words],
            env=self.environ | environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, *words: str, **environ: str) -> subprocess.CompletedProcess[str]:
        process = self.start(*words, **environ)
        try:
            stdout, stderr = process.communicate(timeout=PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            pytest.fail(f"still running: {process.communicate()}")
        return subprocess.CompletedProcess(words, process.returncode, stdout, stderr)

    def runs(self, *words: str, **environ: str) -> dict[str, Any]:
        """Runs the service to its end, which must be good, and returns what it was started with."""
        result = self.run(*words, **environ)
        assert result.returncode == 0, result.stdout + result.stderr
        return self.started()

    def started(self) -> dict[str, Any]:
        report: dict[str, Any] = json.loads((self.state / "started.json").read_text())
        return report

    def fails(self, *words: str, **environ: str) -> str:
        """Runs a service that must refuse to start, and returns all it said."""
        result = self.run(*words, **environ)
        assert result.returncode == 1, result.stdout + result.stderr
        assert not (self.state / "started.json").exists()
        return result.stdout + result.stderr

    def calls(self, name: str) -> list[str]:
        calls = self.state / "calls"
        lines = calls.read_text().splitlines() if calls.exists() else []
        return [line for line in lines if line.split()[0] == name]

    def link(self, name: str) -> str:
        return str((self.comfyui / name).readlink())


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.fixture
def metadata(machine: Machine) -> Iterator[dict[str, str]]:
    """What EC2 says of the machine, a fleet instance whose user data has run."""
    user_data = (ROOT / "provision/templates/launch-template/user-data.sh").read_text()
    said = {
        "instance-id": INSTANCE_ID,
        "placement/region": "us-west-2",
        "autoscaling/target-lifecycle-state": "InService",
        "user-data": user_data,
    }
    ec2 = SimpleNamespace(instance_id=INSTANCE_ID, metadata=said)
    with ThreadingHTTPServer(("127.0.0.1", 0), metadata_handler(ec2)) as server:  # type: ignore[arg-type]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        machine.environ["AWS_EC2_METADATA_SERVICE_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"
        yield said
        server.shutdown()


def boot_report(machine: Machine) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((machine.home / "logs/boot.json").read_text())
    return report


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


class Bucket:
    """A real bucket on the S3 server."""

    def __init__(self, endpoint: str, name: str) -> None:
        self.name = name
        self.client = boto3.client(
            "s3",
            endpoint_url=endpoint,
            region_name="us-west-2",
            aws_access_key_id="test",
            aws_secret_access_key="test",
        )
        self.client.create_bucket(Bucket=name, CreateBucketConfiguration={"LocationConstraint": "us-west-2"})

    def put(self, key: str, text: str) -> None:
        self.client.put_object(Bucket=self.name, Key=key, Body=text.encode())

    def delete(self, key: str) -> None:
        self.client.delete_object(Bucket=self.name, Key=key)


@pytest.fixture
def bucket(s3_server: str, machine: Machine) -> Bucket:
    """A bucket with two models in it, which the machine reaches by the real tools."""
    (machine.stubs / "aws").unlink()
    machine.environ |= {"AWS_ENDPOINT_URL": s3_server, AWS_CLI_SOCKET: os.environ[AWS_CLI_SOCKET]}
    made = Bucket(s3_server, f"bucket-{uuid.uuid4()}")
    made.put("models/checkpoints/a.safetensors", "one")
    made.put("models/loras/b c.safetensors", "two")
    made.put("models/vae/", "")  # the console's way to make a folder
    made.put("output/large.png", "not for here")
    return made
