"""start_service.sh, the systemd units and the local cloud's stand-ins for what they call."""

import configparser
import http.server
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import boto3
import pytest
from places import CLOUD, ROOT, copy_scripts

from worker.reports import finish_boot_report

PATIENCE_SECONDS = 30.0
INSTANCE_STORE = "Amazon EC2 NVMe Instance Storage"
CLOSED = "http://127.0.0.1:9"

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
        copy_scripts(self.home)
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


# --- The command line and the settings ---------------------------------------------------------


@pytest.mark.parametrize("words", [[], ["worker"], ["comfyui", "now"], [""], ["--help", "x"]])
def test_misuse_shows_the_usage(machine: Machine, words: list[str]) -> None:
    result = machine.run(*words)
    assert (result.returncode, result.stdout) == (2, "")
    assert "Usage: start_service.sh comfyui | comfy-manage" in result.stderr


@pytest.mark.parametrize("word", ["-h", "--help"])
def test_help_is_the_header(machine: Machine, word: str) -> None:
    result = machine.run(word)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.strip().startswith("Starts one of an instance's two services.")
    assert "set -e" not in result.stdout


def test_sourcing_the_script_does_nothing(machine: Machine) -> None:
    done = subprocess.run(
        ["bash", "-c", 'source "$1" && declare -F main', "bash", machine.home / "start_service.sh"],
        env=machine.environ,
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("main\n", "")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"COPY_MODEL_TO_LOCAL": "rsync"}, ["COPY_MODEL_TO_LOCAL=rsync", "awscli, s5cmd or nothing"]),
        ({"ENV": "Pro"}, ["ENV=Pro", "lowercase"]),
        ({"COMFY_ADDRESS": "8188"}, ["COMFY_ADDRESS=8188", "HOST:PORT"]),
        ({"COMFY_HOME": "/no/such/folder"}, ["COMFY_HOME=/no/such/folder", "not a folder"]),
        ({"REGION": ""}, ["REGION is not set", "REGION=us-west-2"]),
        ({"S3_BUCKET": ""}, ["S3_BUCKET is not set", "env.example"]),
        ({"COMFYUI_PYTHON": "/no/python"}, ["/no/python", "COMFYUI_PYTHON"]),
    ],
)
@pytest.mark.parametrize("by", ["file", "environment"])
def test_a_bad_setting_is_refused_by_name(
    machine: Machine, settings: dict[str, str], said: list[str], by: str
) -> None:
    if by == "file":
        machine.settings(**settings)
    answer = machine.fails("comfyui", **(settings if by == "environment" else {}))
    assert all(part in answer for part in said), answer
    assert machine.calls("mount-s3") == []


def test_a_missing_settings_file_is_named(machine: Machine) -> None:
    (machine.home / "env").unlink()
    for service in ("comfyui", "comfy-manage"):
        assert f"{machine.home}/env" in machine.fails(service)


def test_a_malformed_settings_file_is_refused_with_its_line(machine: Machine) -> None:
    (machine.home / "env").write_text(ENV_FILE + "COMFYUI_ARGS=$(reboot)\n")
    answer = machine.fails("comfyui")
    assert "line 4" in answer
    assert "COMFYUI_ARGS" in answer


def test_a_missing_program_is_named(machine: Machine) -> None:
    (machine.comfyui / "main.py").unlink()
    assert f"no ComfyUI in {machine.comfyui}" in machine.fails("comfyui")
    (machine.home / "parse_job.py").unlink()
    assert "parse_job.py" in machine.fails("comfy-manage")
    (machine.home / "venv/bin/python").unlink()
    assert "venv/bin/python" in machine.fails("comfy-manage")


# --- cloud-init --------------------------------------------------------------------------------


def test_env_is_read_only_when_cloud_init_is_done(machine: Machine) -> None:
    (machine.home / "env").unlink()
    machine.stub("cloud-init", f'exec "{CLOUD}/bin/cloud-init" "$@"')
    process = machine.start("comfyui", LOCAL_INSTANCE_DIR=str(machine.state))
    await_true("cloud-init is asked", lambda: machine.calls("cloud-init"))
    machine.settings(ENV="pro")
    (machine.state / "cloud-init.done").touch()
    stdout, stderr = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 0, stdout + stderr
    assert machine.started()["env"]["ENV"] == "pro"
    assert machine.calls("cloud-init") == ["cloud-init status --wait"]


def test_a_degraded_cloud_init_is_good_enough(machine: Machine) -> None:
    machine.stub("cloud-init", "exit 2")
    assert machine.runs("comfyui")["env"]["ENV"] == "base"


def test_a_failed_cloud_init_starts_nothing(machine: Machine) -> None:
    machine.stub("cloud-init", "exit 1")
    for service in ("comfyui", "comfy-manage"):
        answer = machine.fails(service)
        assert "cloud-init failed (exit code 1)" in answer
        assert "reboot" in answer


# --- comfyui: how ComfyUI is started -----------------------------------------------------------


def test_comfyui_on_the_base_machine(machine: Machine) -> None:
    report = machine.runs("comfyui")
    assert report["argv"] == ["main.py", "--listen", "0.0.0.0", "--port", "8188"]
    assert report["cwd"] == str(machine.comfyui)
    assert report["env"]["AWS_REGION"] == report["env"]["AWS_DEFAULT_REGION"] == "us-west-2"
    assert report["env"]["COMFY_HOME"] == str(machine.home)


def test_comfyui_on_a_fleet_instance(machine: Machine) -> None:
    machine.settings(ENV="pro")
    output = machine.home / "job-output"
    listen = ["--listen", "127.0.0.1", "--port", "8188"]
    assert machine.runs("comfyui")["argv"] == ["main.py", *listen, "--output-directory", str(output)]
    assert output.is_dir()
    assert machine.calls("mount-s3")[0].split()[-2] == "bucket-of-pro"


def test_comfyui_obeys_its_settings(machine: Machine) -> None:
    python = machine.home / "other-python"
    python.symlink_to(sys.executable)
    machine.settings(
        COMFY_ADDRESS="127.0.0.1:8200",
        COMFY_LISTEN="10.0.0.5",
        COMFYUI_ARGS="--cpu  --name=* --verbose",
        COMFYUI_PYTHON="${COMFY_HOME}/other-python",
    )
    (machine.home / "venv/bin/python").unlink()
    words = machine.runs("comfyui")["argv"][1:]
    assert words == ["--listen", "10.0.0.5", "--port", "8200", "--cpu", "--name=*", "--verbose"]


def test_comfy_home_may_be_another_folder(machine: Machine, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(machine.home, other, symlinks=True)
    machine.settings(COMFY_HOME=str(other))
    report = machine.runs("comfyui")
    assert report["cwd"] == str(other / "ComfyUI")
    assert report["env"]["COMFY_HOME"] == str(other)


# --- comfyui: the log --------------------------------------------------------------------------


def test_comfyui_replaces_the_script_and_its_output_is_logged(machine: Machine) -> None:
    process = machine.start("comfyui")
    stdout, stderr = process.communicate(timeout=PATIENCE_SECONDS)
    assert (process.returncode, stderr) == (0, "")
    assert machine.started()["pid"] == process.pid
    log = (machine.home / "logs/comfyui.log").read_text()
    assert log == stdout
    for words in ("starting ComfyUI for ENV=base", "words on stdout", "words on stderr"):
        assert words in log
    machine.run("comfyui")
    assert (machine.home / "logs/comfyui.log").read_text().startswith(log)


def test_a_refusal_is_logged_too(machine: Machine) -> None:
    machine.stub("mount-s3", "exit 1")
    assert "cannot mount" in machine.fails("comfyui")
    assert "cannot mount" in (machine.home / "logs/comfyui.log").read_text()


def test_the_log_has_comfyuis_last_words_when_all_are_told_to_stop(machine: Machine) -> None:
    (machine.comfyui / "main.py").write_text(REPORT + LAST_WORDS)
    process = machine.start("comfyui")
    await_true("ComfyUI is ready", (machine.state / "ready").exists)
    os.killpg(process.pid, signal.SIGTERM)  # as systemd does to the control group
    stdout, _ = process.communicate(timeout=PATIENCE_SECONDS)
    assert "last words" in stdout
    assert "last words" in (machine.home / "logs/comfyui.log").read_text()


def test_the_log_goes_on_when_nobody_reads_the_output_any_more(machine: Machine) -> None:
    (machine.comfyui / "main.py").write_text(REPORT + LAST_WORDS)
    process = machine.start("comfyui")
    await_true("ComfyUI is ready", (machine.state / "ready").exists)
    assert process.stdout is not None
    process.stdout.close()
    process.terminate()
    assert process.wait(timeout=PATIENCE_SECONDS) == 0
    log = machine.home / "logs/comfyui.log"
    await_true("its last words are in the log", lambda: "last words" in log.read_text())


def test_a_large_log_is_put_aside(machine: Machine) -> None:
    log = machine.home / "logs/comfyui.log"
    log.parent.mkdir()
    log.touch()
    os.truncate(log, 51 * 2**20)
    machine.runs("comfyui")
    assert log.with_name("comfyui.log.1").stat().st_size == 51 * 2**20
    assert log.stat().st_size < 10_000


def test_comfyui_starts_without_a_log_folder(machine: Machine) -> None:
    (machine.home / "logs").write_text("a file in the way")
    result = machine.run("comfyui")
    assert result.returncode == 0
    assert f"cannot write {machine.home}/logs/comfyui.log: going on without it" in result.stdout
    assert "words on stderr" in result.stderr


def test_comfyui_runs_on_when_the_disk_is_full(machine: Machine) -> None:
    (machine.home / "logs").mkdir()
    (machine.home / "logs/comfyui.log").symlink_to("/dev/full")
    result = machine.run("comfyui")
    assert result.returncode == 0, result.stderr
    assert "words on stdout" in result.stdout
    assert machine.started()


# --- How long the boot takes -------------------------------------------------------------------


def boot_report(machine: Machine) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((machine.home / "logs/boot.json").read_text())
    return report


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
    machine.runs("comfyui")
    uptime_s = float(Path("/proc/uptime").read_text().split()[0])
    assert boot_report(machine)["phases"]["system"] == pytest.approx(uptime_s, abs=PATIENCE_SECONDS)


@pytest.mark.parametrize("garbage", ["", "[]", "{}", '{"phases": {}, "comfyui_started_at": "now"}'])
def test_a_boot_report_that_is_none_is_left_alone(tmp_path: Path, garbage: str) -> None:
    assert finish_boot_report(tmp_path) is None
    (tmp_path / "boot.json").write_text(garbage)
    assert finish_boot_report(tmp_path) is None
    assert (tmp_path / "boot.json").read_text() == garbage


# --- comfyui: the bucket and the links ---------------------------------------------------------


def test_the_bucket_is_mounted_once(machine: Machine) -> None:
    machine.runs("comfyui")
    machine.runs("comfyui")
    mount = f"mount-s3 --allow-delete --allow-overwrite bucket-of-base {machine.home}/s3"
    assert machine.calls("mount-s3") == [mount]
    assert machine.calls("fusermount") == []


def test_a_failed_mount_starts_nothing(machine: Machine) -> None:
    machine.stub("mount-s3", "echo no such bucket >&2; exit 1")
    answer = machine.fails("comfyui")
    assert "no such bucket" in answer
    assert "cannot mount the bucket bucket-of-base" in answer


def test_a_dead_mount_is_unmounted_first(machine: Machine) -> None:
    dead = "stat: cannot statx '$1': Transport endpoint is not connected"
    machine.stub("stat", f'[[ $1 != *s3 || -e $STATE/unmounted ]] || {{ echo "{dead}" >&2; exit 1; }}\necho 0')
    machine.runs("comfyui")
    calls = (machine.state / "calls").read_text().splitlines()
    order = [call.split()[0] for call in calls if call.split()[0] in ("fusermount", "mount-s3")]
    assert order == ["fusermount", "mount-s3"]
    assert machine.calls("fusermount") == [f"fusermount -uz {machine.home}/s3"]


def test_comfyuis_folders_are_links_into_the_mount(machine: Machine) -> None:
    for empty in ("input", "output"):
        (machine.comfyui / empty).mkdir()
    machine.runs("comfyui")
    for name in ("models", "input", "output"):
        assert machine.link(name) == f"../s3/{name}"
        assert (machine.home / "s3" / name).is_dir()
    result = machine.run("comfyui")
    assert "now points" not in result.stdout


def test_what_somebody_put_there_is_left_alone(machine: Machine, tmp_path: Path) -> None:
    (machine.comfyui / "models").mkdir()
    (machine.comfyui / "models/my.safetensors").write_text("mine")
    (machine.comfyui / "input").symlink_to(tmp_path / "not-mounted-yet")
    (machine.comfyui / "output").symlink_to(tmp_path)
    result = machine.run("comfyui")
    assert result.returncode == 0
    assert (machine.comfyui / "models/my.safetensors").read_text() == "mine"
    assert machine.link("input") == str(tmp_path / "not-mounted-yet")
    assert machine.link("output") == str(tmp_path)
    assert result.stdout.count("left alone") == 3


@pytest.mark.parametrize("old", ["{home}/local/models", "../local/models", "{home}/s3/old", "../s3/gone"])
def test_our_own_links_are_pointed_anew(machine: Machine, old: str) -> None:
    (machine.comfyui / "models").symlink_to(old.format(home=machine.home))
    machine.runs("comfyui")
    assert machine.link("models") == "../s3/models"


def test_links_survive_a_copy_of_the_folder(machine: Machine, tmp_path: Path) -> None:
    machine.runs("comfyui")
    shutil.copytree(machine.home, tmp_path / "copy", symlinks=True)
    (tmp_path / "copy/s3/models/x").touch()
    assert (tmp_path / "copy/ComfyUI/models/x").exists()
    assert not (machine.comfyui / "models/x").exists()


# --- comfyui: models on local disk -------------------------------------------------------------


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
    machine.environ |= {"AWS_ENDPOINT_URL": s3_server}
    made = Bucket(s3_server, f"bucket-{uuid.uuid4()}")
    made.put("models/checkpoints/a.safetensors", "one")
    made.put("models/loras/b c.safetensors", "two")
    made.put("models/vae/", "")  # the console's way to make a folder
    made.put("output/large.png", "not for here")
    return made


def tree(folder: Path) -> dict[str, str]:
    found = (path for path in folder.rglob("*") if path.is_file() and path.name != ".s5cmd")
    return {str(path.relative_to(folder)): path.read_text() for path in found}


@pytest.mark.parametrize("tool", ["awscli", "s5cmd"])
@pytest.mark.parametrize("env", ["base", "pro"])
def test_models_are_copied(machine: Machine, bucket: Bucket, tool: str, env: str) -> None:
    machine.settings(ENV=env, COPY_MODEL_TO_LOCAL=tool)
    copy = machine.home / "local/models"
    machine.runs("comfyui", S3_BUCKET=bucket.name)
    assert machine.link("models") == "../local/models"
    assert tree(copy) == {"checkpoints/a.safetensors": "one", "loras/b c.safetensors": "two"}

    # Replaced by one of the same size, added, removed, and put here by a designer.
    os.utime(copy / "checkpoints/a.safetensors", (0, time.time() - 60))
    bucket.put("models/checkpoints/a.safetensors", "ONE")
    bucket.put("models/new.safetensors", "three")
    bucket.delete("models/loras/b c.safetensors")
    (copy / "mine.safetensors").write_text("mine")
    machine.runs("comfyui", S3_BUCKET=bucket.name)
    kept = {"loras/b c.safetensors": "two", "mine.safetensors": "mine"} if env == "base" else {}
    assert tree(copy) == {"checkpoints/a.safetensors": "ONE", "new.safetensors": "three"} | kept
    downloads = (machine.home / "logs/comfyui.log").read_text().count("download: ")
    assert downloads == (4 if tool == "awscli" else 0), "what s5cmd has fetched is fetched again"


@pytest.mark.parametrize("tool", ["awscli", "s5cmd"])
def test_a_bucket_without_models_is_no_failure(machine: Machine, bucket: Bucket, tool: str) -> None:
    for key in ("checkpoints/a.safetensors", "loras/b c.safetensors", "vae/"):
        bucket.delete(f"models/{key}")
    machine.settings(COPY_MODEL_TO_LOCAL=tool)
    machine.runs("comfyui", S3_BUCKET=bucket.name)
    assert tree(machine.home / "local/models") == {}


class Refusing(http.server.BaseHTTPRequestHandler):
    """An S3 that answers every request with an error that is not worth a retry."""

    def do_GET(self) -> None:
        body = b"<Error><Code>InvalidRequest</Code><Message>not today</Message></Error>"
        self.send_response(400)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_args: object) -> None:
        pass


@pytest.fixture
def serve() -> Iterator[Callable[..., http.server.ThreadingHTTPServer]]:
    """Serves a handler on a free port of 127.0.0.1, or on an unused socket bound before."""
    servers = []

    def start(
        handler: type[http.server.BaseHTTPRequestHandler], bound: socket.socket | None = None
    ) -> http.server.ThreadingHTTPServer:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler, bind_and_activate=bound is None)
        if bound is not None:
            server.socket.close()
            server.socket = bound
            server.server_activate()
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("tool", ["awscli", "s5cmd"])
def test_a_failed_copy_starts_nothing_and_removes_nothing(
    machine: Machine, tool: str, serve: Callable[..., http.server.ThreadingHTTPServer]
) -> None:
    if tool == "awscli":
        (machine.stubs / "aws").unlink()
    copy = machine.home / "local/models"
    copy.mkdir(parents=True)
    (copy / "a.safetensors").write_text("one")
    machine.settings(ENV="pro", COPY_MODEL_TO_LOCAL=tool)
    port = serve(Refusing).server_address[1]
    answer = machine.fails("comfyui", AWS_ENDPOINT_URL=f"http://127.0.0.1:{port}")
    assert "cannot copy s3://bucket-of-pro/models/" in answer
    assert answer.count("trying again") == 2
    assert tree(copy) == {"a.safetensors": "one"}


def test_a_copy_that_fails_once_is_repeated(machine: Machine) -> None:
    machine.stub("aws", '[[ $(grep -c ^aws "$STATE/calls") != 1 ]]')
    machine.settings(COPY_MODEL_TO_LOCAL="awscli")
    machine.runs("comfyui")
    assert len(machine.calls("aws")) == 2


def test_a_missing_tool_is_named(machine: Machine) -> None:
    machine.settings(COPY_MODEL_TO_LOCAL="s5cmd")
    kept = machine.state / "path"
    kept.mkdir()
    for name in ("bash", "env", "dirname", "grep", "mkdir", "touch", "stat", "tee", "rm", "python3"):
        (kept / name).symlink_to(shutil.which(name) or pytest.skip(f"no {name} here"))
    answer = machine.fails("comfyui", PATH=f"{machine.stubs}:{kept}")
    assert "cannot run s5cmd" in answer
    assert "COPY_MODEL_TO_LOCAL=awscli" in answer


class Counting(http.server.BaseHTTPRequestHandler):
    """An S3 with forty small models. It answers once `enough` are asked for at once, or when it is tired of waiting."""

    asked = most = enough = 0
    limit_s = 0.0
    lock = threading.Lock()
    go_on = threading.Event()

    def do_GET(self) -> None:
        if "list-type" in self.path:
            stamp = "<LastModified>2026-01-01T00:00:00.000Z</LastModified>"
            keys = (f"<Contents><Key>models/m{n}</Key><Size>1</Size>{stamp}</Contents>" for n in range(40))
            self.answer(
                f"<ListBucketResult><IsTruncated>false</IsTruncated>{''.join(keys)}</ListBucketResult>".encode()
            )
            return
        kind = type(self)
        with kind.lock:
            kind.asked += 1
            kind.most = max(kind.most, kind.asked)
            if kind.asked >= kind.enough:
                kind.go_on.set()
        if not kind.go_on.wait(kind.limit_s):
            kind.go_on.set()
        with kind.lock:
            kind.asked -= 1
        self.answer(b"m")

    def do_HEAD(self) -> None:
        self.answer(b"m")

    def answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"e"')
        self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_args: object) -> None:
        pass


@pytest.mark.parametrize("own_settings", [False, True])
def test_the_copy_asks_for_many_models_at_once(
    machine: Machine, serve: Callable[..., http.server.ThreadingHTTPServer], own_settings: bool
) -> None:
    """Unless the machine has a configuration of the AWS CLI, with which its credentials may come."""
    (machine.stubs / "aws").unlink()
    machine.settings(COPY_MODEL_TO_LOCAL="awscli")
    Counting.enough, Counting.limit_s = 17, 20.0
    if own_settings:
        (machine.home.parent / ".aws").mkdir()
        (machine.home.parent / ".aws/config").write_text("[default]\ns3 =\n  max_concurrent_requests = 4\n")
        Counting.enough, Counting.limit_s = 5, 3.0
    Counting.most = 0
    Counting.go_on.clear()
    port = serve(Counting).server_address[1]
    machine.runs("comfyui", AWS_ENDPOINT_URL=f"http://127.0.0.1:{port}")
    assert len(tree(machine.home / "local/models")) == 40
    assert Counting.most <= 4 if own_settings else Counting.most >= 17, Counting.most


def test_the_bucket_is_mounted_while_models_are_copied_and_comfyui_waits_for_them(machine: Machine) -> None:
    machine.settings(COPY_MODEL_TO_LOCAL="awscli")
    machine.stub("aws", f'until [[ -L "{machine.comfyui}/output" ]]; do sleep 0.05; done; touch "$STATE/copied"')
    main = machine.comfyui / "main.py"
    main.write_text(main.read_text() + 'assert Path(os.environ["STATE"], "copied").exists()\n')
    machine.runs("comfyui")


def test_real_models_are_moved_aside_for_the_copy(machine: Machine) -> None:
    machine.settings(COPY_MODEL_TO_LOCAL="awscli")
    for text in ("first", "second"):
        models = machine.comfyui / "models"
        models.unlink(missing_ok=True)
        models.mkdir()
        (models / "x").write_text(text)
        machine.runs("comfyui")
        assert machine.link("models") == "../local/models"
        assert (machine.comfyui / "models.before-copy/x").read_text() == text
    assert (machine.comfyui / "models.before-copy.~1~/x").read_text() == "first"


def test_without_the_copy_models_are_the_mounts_again(machine: Machine) -> None:
    machine.settings(COPY_MODEL_TO_LOCAL="awscli")
    machine.runs("comfyui")
    assert machine.link("models") == "../local/models"
    machine.settings()
    machine.runs("comfyui")
    assert machine.link("models") == "../s3/models"
    assert len(machine.calls("aws")) == 1


# --- comfyui: the instance store ---------------------------------------------------------------

Disks = dict[str, dict[str, object]]
ROOT_DISK: Disks = {"/dev/nvme0n1": {"MODEL": "Amazon Elastic Block Store", "children": ["nvme0n1p1"]}}
BLANK: dict[str, object] = {"MODEL": INSTANCE_STORE}
OURS: dict[str, object] = BLANK | {"FSTYPE": "ext4", "LABEL": "comfy-local"}


@pytest.mark.parametrize(
    ("disks", "formatted", "mounted"),
    [
        ({}, None, None),
        ({"/dev/nvme1n1": BLANK}, "/dev/nvme1n1", "/dev/nvme1n1"),
        ({"/dev/nvme1n1": OURS}, None, "/dev/nvme1n1"),
        ({"/dev/nvme1n1": BLANK, "/dev/nvme2n1": OURS}, None, "/dev/nvme2n1"),
        ({"/dev/nvme1n1": BLANK | {"FSTYPE": "xfs"}}, None, None),
        ({"/dev/nvme1n1": BLANK | {"FSTYPE": "ext4", "LABEL": "comfy-local-2"}}, None, None),
        ({"/dev/nvme1n1": BLANK | {"FSTYPE": "xfs"}, "/dev/nvme2n1": BLANK}, "/dev/nvme2n1", "/dev/nvme2n1"),
        ({"/dev/nvme1n1": BLANK | {"children": ["nvme1n1p1"]}}, None, None),
        ({"/dev/nvme1n1": OURS | {"MOUNTPOINT": "/data"}}, None, None),
        ({"/dev/nvme1n1": BLANK | {"MOUNTPOINT": "/data"}}, None, None),
        ({"/dev/nvme1n1": BLANK | {"signature": "offset 0x1fe dos"}}, None, None),
        ({"/dev/nvme1n1": BLANK | {"MODEL": "Amazon Elastic Block Store"}}, None, None),
        ({"/dev/nvme1n1": BLANK | {"MODEL": INSTANCE_STORE + " 2"}}, None, None),
        ({"/dev/nvme1n1": BLANK | {"broken": True}}, "/dev/nvme1n1", None),
    ],
)
def test_only_a_blank_instance_store_is_formatted(
    machine: Machine, disks: Disks, formatted: str | None, mounted: str | None
) -> None:
    machine.disks({**ROOT_DISK, **disks})
    machine.settings(COPY_MODEL_TO_LOCAL="awscli")
    machine.runs("comfyui")
    format_calls = [f"mkfs.ext4 -q -L comfy-local {formatted}"] if formatted else []
    mount_calls = [f"mount -o noatime {mounted} {machine.home}/local"] if mounted else []
    assert machine.calls("mkfs.ext4") == format_calls
    assert machine.calls("mount") == mount_calls
    assert machine.link("models") == "../local/models"


def test_an_instance_store_is_found_again(machine: Machine) -> None:
    machine.disks({**ROOT_DISK, "/dev/nvme1n1": BLANK})
    machine.settings(COPY_MODEL_TO_LOCAL="awscli")
    machine.runs("comfyui")
    machine.runs("comfyui")
    assert len(machine.calls("mount")) == 1, "a restart of the service mounts it again"
    # After a reboot it has our file system but is not mounted.
    (machine.state / "mounted").unlink()
    machine.disks({**ROOT_DISK, "/dev/nvme1n1": OURS})
    machine.runs("comfyui")
    assert len(machine.calls("mount")) == 2
    assert len(machine.calls("mkfs.ext4")) == 1


def test_without_sudo_the_root_disk_is_used(machine: Machine) -> None:
    machine.stub("sudo", "echo sudo: a password is required >&2; exit 1")
    machine.disks({"/dev/nvme1n1": BLANK, "/dev/nvme2n1": OURS})
    machine.settings(COPY_MODEL_TO_LOCAL="awscli")
    machine.runs("comfyui")
    assert machine.calls("mkfs.ext4") == machine.calls("mount") == []


def test_without_the_copy_an_instance_store_is_the_mounts_cache(machine: Machine) -> None:
    machine.disks({"/dev/nvme1n1": BLANK})
    machine.runs("comfyui")
    cache = machine.home / "local/cache"
    options = f"--allow-delete --allow-overwrite --cache {cache} --metadata-ttl minimal"
    assert machine.calls("mount-s3") == [f"mount-s3 {options} bucket-of-base {machine.home}/s3"]
    assert cache.stat().st_mode & 0o777 == 0o700
    assert machine.link("models") == "../s3/models"


@pytest.mark.parametrize("copy", ["", "awscli"])
def test_there_is_no_cache_where_there_is_no_use_for_it(machine: Machine, copy: str) -> None:
    machine.disks({"/dev/nvme1n1": BLANK if copy else BLANK | {"FSTYPE": "xfs"}})
    machine.settings(COPY_MODEL_TO_LOCAL=copy)
    machine.runs("comfyui")
    assert [call.split()[1:-2] for call in machine.calls("mount-s3")] == [["--allow-delete", "--allow-overwrite"]]


def test_a_mountpoint_that_knows_no_such_cache_does_without(machine: Machine) -> None:
    machine.disks({"/dev/nvme1n1": OURS})
    machine.stub("mount-s3", '[[ $* != *minimal* ]] && echo "${@: -1}" >>"$STATE/mounted"')
    result = machine.run("comfyui")
    assert result.returncode == 0, result.stderr
    assert "mounting without it" in result.stdout
    assert machine.started()


@pytest.mark.skipif(not shutil.which("lsblk"), reason="no lsblk here")
@pytest.mark.parametrize(
    "words",
    [
        "--nodeps --noheadings --paths --output NAME,MODEL",
        "--noheadings --output NAME,FSTYPE,LABEL,MOUNTPOINT",
        "--nodeps --noheadings --raw --output LABEL,MOUNTPOINT",
    ],
)
def test_the_real_lsblk_knows_our_options(words: str) -> None:
    assert f"lsblk {words}" in (ROOT / "start_service.sh").read_text()
    done = subprocess.run(["lsblk", *words.split()], capture_output=True, text=True, check=False)
    assert "unknown" not in done.stderr
    assert "unrecognized" not in done.stderr


# --- comfy-manage ------------------------------------------------------------------------------


def test_the_worker_is_started_at_once_and_waits_for_comfyui_itself(machine: Machine) -> None:
    process = machine.start("comfy-manage")
    stdout, stderr = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 0, stdout + stderr
    report = machine.started()
    assert (report["argv"], report["cwd"]) == (["parse_job.py"], str(machine.home))
    assert report["pid"] == process.pid
    assert report["env"]["AWS_REGION"] == "us-west-2"
    assert "words on stdout" in stdout


def test_systemd_hears_that_the_worker_is_up_before_cloud_init_is_waited_for(machine: Machine) -> None:
    machine.stub("systemd-notify", "")
    machine.stub("cloud-init", 'until [[ -e "$STATE/done" ]]; do sleep 0.05; done')
    process = machine.start("comfy-manage", NOTIFY_SOCKET=str(machine.state / "nobody"), WATCHDOG_SECONDS="0.1")
    calls = machine.state / "calls"
    await_true("cloud-init is waited for", lambda: calls.exists() and "cloud-init" in calls.read_text())
    await_true("systemd was told", lambda: "systemd-notify --ready" in calls.read_text())
    (machine.state / "done").touch()
    process.terminate()
    process.wait(timeout=PATIENCE_SECONDS)


def test_the_watchdog_is_left_to_the_worker(machine: Machine) -> None:
    machine.stub("systemd-notify", "")
    (machine.home / "parse_job.py").write_text(REPORT + LAST_WORDS)
    machine.stub("cloud-init", 'until grep -q WATCHDOG=1 "$STATE/calls"; do sleep 0.05; done')
    process = machine.start("comfy-manage", NOTIFY_SOCKET=str(machine.state / "nobody"), WATCHDOG_SECONDS="0.1")
    await_true("the worker runs", (machine.state / "ready").exists)

    def told() -> int:
        return (machine.state / "calls").read_text().count("WATCHDOG=1")

    before, end = told(), time.monotonic() + 2
    await_true("some time has passed", lambda: time.monotonic() > end)
    assert told() <= before + 1, "one may have been under way"
    process.terminate()
    process.wait(timeout=PATIENCE_SECONDS)


# --- The systemd units -------------------------------------------------------------------------

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
    assert '"sudo"' not in (ROOT / "parse_job.py").read_text()
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


# --- The stand-ins -----------------------------------------------------------------------------


def test_the_mount_stand_in_copies_and_marks(machine: Machine, bucket: Bucket) -> None:
    for name in ("mount-s3", "mountpoint"):
        (machine.stubs / name).unlink()
    machine.runs("comfyui", S3_BUCKET=bucket.name)
    mount = machine.home / "s3"
    assert (machine.comfyui / "models/checkpoints/a.safetensors").read_text() == "one"
    assert not (mount / "output/large.png").exists()

    def call(*words: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(words, env=machine.environ, capture_output=True, text=True, check=False)

    assert call("mountpoint", "-q", mount).returncode == 0
    assert call("mountpoint", "-q", machine.home).returncode != 0
    again = call("mount-s3", bucket.name, mount)
    assert (again.returncode, "already mounted" in again.stderr) == (1, True)

    # An image of the machine carries the copied files, but not the mount.
    image = machine.home.with_name("image")
    shutil.copytree(mount, image)
    assert call("mountpoint", "-q", image).returncode != 0
    bucket.delete("models/checkpoints/a.safetensors")
    mounted = call("mount-s3", "--allow-delete", "--allow-overwrite", bucket.name, image)
    assert mounted.returncode == 0, mounted.stderr
    assert call("mountpoint", "-q", image).returncode == 0
    assert not (image / "models/checkpoints/a.safetensors").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--allow-delet", "b-1", "."], "'--allow-delet'"),
        (["no-such-bucket-here", "."], "no-such-bucket-here"),
        (["b-1", "/no/such/folder"], "/no/such/folder"),
        (["b-1"], "required"),
    ],
)
def test_the_mount_stand_in_refuses(machine: Machine, s3_server: str, words: list[str], said: str) -> None:
    (machine.stubs / "aws").unlink()
    environ = machine.environ | {"AWS_ENDPOINT_URL": s3_server, "AWS_DEFAULT_REGION": "us-west-2"}
    done = subprocess.run(
        [CLOUD / "bin/mount-s3", *words],
        env=environ,
        cwd=machine.state,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert said in done.stderr


def test_the_cloud_init_stand_in_refuses_what_it_does_not_play(machine: Machine) -> None:
    done = subprocess.run([CLOUD / "bin/cloud-init", "clean"], env=machine.environ, check=False)
    assert done.returncode == 2
