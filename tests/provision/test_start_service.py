"""start_service.sh: its settings, how it starts ComfyUI and the worker, and ComfyUI's log."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from machine import (
    ENV_FILE,
    LAST_WORDS,
    PATIENCE_SECONDS,
    REPORT,
    Machine,
    await_true,
    machine,
)
from places import CLOUD

__all__ = ["machine"]


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


def test_env_is_read_only_when_cloud_init_is_done(machine: Machine) -> None:
    (machine.home / "env").unlink()
    """Where EC2 does not say what this is."""
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


def test_the_worker_is_started_at_once_and_waits_for_comfyui_itself(machine: Machine) -> None:
    process = machine.start("comfy-manage")
    stdout, stderr = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 0, stdout + stderr
    report = machine.started()
    assert (report["argv"], report["cwd"]) == (["parse_job.py"], str(machine.home))
    assert report["pid"] == process.pid
    assert report["env"]["AWS_REGION"] == "us-west-2"
    assert report["env"]["MALLOC_TRIM_THRESHOLD_"] == "131072"
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
