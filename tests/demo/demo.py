#!/usr/bin/env python3
"""The story that demo.sh tells. Every claim it prints has been checked; it exits non-zero when one fails."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

sys.path.extend(map(str, (Path(__file__).resolve().parents[2], Path(__file__).resolve().parents[1] / "cloud")))
import requests
import websocket
from local_cloud import ACCOUNT_ID, REGION, LocalCloud, Machine, free_port
from places import ROOT, TESTS, copy_comfyui, copy_scripts

from comfy_utils import load_settings
from operate.report import read_lives, write_report

OUTPUT = Path(os.environ.get("DEMO_FOLDER", ROOT)) / "demo-output"
BACKLOG = 3  # env.example's BACKLOGSIZE_PER_INSTANCE
MOST = 20  # its MAX_INSTANCES
CHECKPOINT = "v1-5-pruned-emaonly-fp16.safetensors"
BASE_BUCKET = f"simple-comfy-{ACCOUNT_ID}-{REGION}-base"
BUCKET = f"simple-comfy-{ACCOUNT_ID}-{REGION}-pro"
GROUP = "simple-comfy-pro-asg"


class DemoError(Exception):
    """A claim that turned out false."""


def tell(text: str) -> None:
    """One line of the story."""
    print(text, flush=True)


def check(claim: str, truth: bool, detail: object = "") -> None:
    """Print a claim that holds; raise DemoError for one that does not."""
    if not truth:
        raise DemoError(f"{claim}: not so. {detail}")
    tell(f"   ✓ {claim}")


def await_that(what: str, condition: Callable[[], Any], limit_s: float = 120) -> Any:
    """Wait until the condition holds and return its value."""
    deadline = time.monotonic() + limit_s
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise DemoError(f"{what}: still not so after {limit_s:.0f} s")
        time.sleep(0.2)
    return value


def make_base_folder(folder: Path) -> None:
    """The base machine's /home/ubuntu/comfy: the bundle, its env, ComfyUI and a venv."""
    folder.mkdir(parents=True)
    copy_scripts(folder)
    settings = (ROOT / "env.example").read_text().replace("SCALE_COOLDOWN=180", "SCALE_COOLDOWN=5")
    (folder / "venv").symlink_to(TESTS / ".venv")
    (folder / "logs").mkdir()
    (folder / "logs/parse_job.log").write_text("The base machine's own log.\n")
    comfyui = os.environ.get("COMFYUI_DIR")
    if comfyui:
        real = Path(comfyui).expanduser().resolve()
        if not (real / "main.py").is_file():
            raise DemoError(f"COMFYUI_DIR={comfyui}: there is no main.py, name the folder of a ComfyUI")
        copy_real_comfyui(real, folder / "ComfyUI")
        python = os.environ.get("COMFYUI_PYTHON") or python_of(real)
        settings += f'\nCOMFYUI_PYTHON={python}\nCOMFYUI_ARGS="{os.environ.get("COMFYUI_ARGS", "")}"\n'
    else:
        (folder / "ComfyUI").mkdir()
        copy_comfyui(folder / "ComfyUI")
    (folder / "env").write_text(settings)


def copy_real_comfyui(real: Path, target: Path) -> None:
    """A user's ComfyUI without what it works on; its models are linked.

    Folders named input, output or models are code further down (comfy_api/input, comfy/ldm/models).
    """

    def left_out(folder: str, names: list[str]) -> set[str]:
        out = {".git", "__pycache__"}
        if Path(folder) == real:
            out |= {"models", "input", "output", "temp", "user"}
            out |= {name for name in names if (real / name / "pyvenv.cfg").is_file()}
        return out & set(names)

    shutil.copytree(real, target, symlinks=True, ignore=left_out)
    (target / "models").symlink_to(real / "models")


def python_of(real: Path) -> str:
    """The Python of a user's ComfyUI: that of its virtual environment, if it lies in there."""
    for name in ("venv", ".venv"):
        if (python := real / name / "bin/python").is_file():
            return str(python)
    return str(TESTS / ".venv/bin/python")


def choose_workflow(base: Path) -> list[str]:
    """What to send: DEMO_WORKFLOW, or one that needs no model where a real ComfyUI has not that of the example."""
    if chosen := os.environ.get("DEMO_WORKFLOW"):
        return [str(Path(chosen).resolve())]
    has_model = not os.environ.get("COMFYUI_DIR") or (base / "ComfyUI/models/checkpoints" / CHECKPOINT).exists()
    return [] if has_model else [str(Path(__file__).with_name("without_models.json"))]


def fill_base_folder(folder: Path) -> None:
    """What a designer has on the disk: a model, and an old output that production does not need."""
    for name, text in {
        f"models/checkpoints/{CHECKPOINT}": "a stand-in for 2 GB of weights",
        "input/example.png": "",
        "output/old.png": "",
    }.items():
        (folder / "ComfyUI" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "ComfyUI" / name).write_text(text)


def start_comfyui(machine: Machine) -> None:
    """Start the base machine's ComfyUI as its service does, and wait until it answers. It ends with the cloud."""
    (machine.side / "cloud-init.done").touch()  # it has booted long ago
    with (machine.side / "comfyui.log").open("wb") as log:
        machine.services["comfyui"] = subprocess.Popen(
            ["./start_service.sh", "comfyui"],
            cwd=machine.folder,
            env=machine.environment(),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )

    def answers() -> bool:
        with suppress(OSError), socket.create_connection(("127.0.0.1", machine.comfy_port), 5):
            return True
        return False

    def answers_or_has_ended() -> bool:
        refuse_ended_comfyui(machine)
        return answers()

    await_that("the base machine's ComfyUI answers", answers_or_has_ended, limit_s=300)


def refuse_ended_comfyui(machine: Machine) -> None:
    """Raise DemoError where a machine that is on has a ComfyUI that has ended, with the last that it said."""
    process = machine.services.get("comfyui")
    if process is not None and process.poll() is not None and machine.is_on():
        lines = (machine.side / "comfyui.log").read_text(errors="replace").splitlines()[-15:]
        said = "\n".join(f"   {line}" for line in lines)
        raise DemoError(
            f"ComfyUI on {machine.instance_id} has ended with exit code {process.returncode}. It said last:\n{said}"
        )


def run_on_base(folder: Path, environment: dict[str, str], *command: str) -> list[str]:
    """Run one of the shipped scripts on the base machine, show and return what it prints."""
    tell(f"\n$ {' '.join(command)}")
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line.rstrip())
        tell(f"   {lines[-1]}")
    if process.wait() != 0:
        raise DemoError(f"{command[0]} ended with exit code {process.returncode}")
    return lines


def with_permissions_of(
    cloud: LocalCloud, who: str, name: str, base: Path, environment: dict[str, str]
) -> dict[str, str]:
    """The environment of one who may do on environment `name` what create_env.sh --print-policy says, and no more."""
    command = ["./create_env.sh", "--print-policy", who, name]
    policy = subprocess.run(command, cwd=base, env=environment, capture_output=True, text=True, check=True).stdout
    return environment | cloud.allow_only(f"{who}-{name}", policy)


def serve_a_client(base: Path, sender: dict[str, str], workflow: str) -> None:
    """A program that knows a ComfyUI at an address, as ComfyUI's own example does, is given the fleet's."""
    tell("\nA program that knows a ComfyUI at an address, and nothing of AWS, is given the fleet's:")
    port = free_port()
    command = ["./fleet.py", "serve", "--env", "pro", "--port", str(port)]
    tell(f"\n$ {' '.join(command)} &")
    serving = subprocess.Popen(command, cwd=base, env=sender, stdout=subprocess.PIPE, text=True)
    try:
        assert serving.stdout is not None
        tell(f"   {serving.stdout.readline().rstrip()}")
        said, pictures = use_as_comfyui(f"127.0.0.1:{port}", json.loads(Path(workflow).read_text()))
    finally:
        serving.terminate()
        serving.wait()
    check("its job woke the fleet, and it heard so: " + ", ".join(said), said[-1:] == ["execution_success"], said)
    check(f"it has fetched {len(pictures)} file from /view", len(pictures) > 0 and all(pictures))
    check("serve ended in order", serving.returncode == 0, serving.returncode)


def use_as_comfyui(address: str, workflow: dict[str, Any]) -> tuple[list[str], list[bytes]]:
    """Post, listen until nothing is at work, ask the history, fetch each file: what is heard, and the files."""
    client_id = str(uuid.uuid4())
    line = websocket.create_connection(f"ws://{address}/ws?clientId={client_id}", timeout=300)
    body = {"prompt": workflow, "client_id": client_id}
    job_id = requests.post(f"http://{address}/prompt", json=body, timeout=60).json()["prompt_id"]
    said: list[str] = []
    while True:
        message = json.loads(line.recv())
        if message["type"] == "executing" and message["data"] == {"node": None, "prompt_id": job_id}:
            break
        if message["type"].startswith("execution_") and message["type"] != "execution_cached":
            said.append(message["type"])
    line.close()
    history = requests.get(f"http://{address}/history/{job_id}", timeout=60).json()[job_id]
    files = [file for output in history["outputs"].values() for file in output.get("images", [])]
    return said, [requests.get(f"http://{address}/view", params=file, timeout=60).content for file in files]


def watch_jobs(cloud: LocalCloud, job_ids: list[str]) -> dict[str, dict[str, Any]]:
    """Show a bar until every job has its receipt; return the receipts."""
    s3 = cloud.client("s3")
    results: dict[str, dict[str, Any]] = {}
    timeline = Timeline(cloud)
    while len(results) < len(job_ids):
        for job_id in job_ids:
            if job_id not in results:
                try:
                    body = s3.get_object(Bucket=BUCKET, Key=f"output/{job_id}/result.json")["Body"].read()
                except s3.exceptions.NoSuchKey:
                    continue
                results[job_id] = json.loads(body)
        for machine in fleet_of(cloud):
            refuse_ended_comfyui(machine)
        bar = "█" * (30 * len(results) // len(job_ids))
        timeline.show(f"[{bar:░<30}] {len(results)}/{len(job_ids)} jobs done", is_last=len(results) == len(job_ids))
        if timeline.seconds() > 300:
            raise DemoError(f"only {len(results)} of {len(job_ids)} jobs ended within 300 s")
        time.sleep(0.3)
    return results


class Timeline:
    """One line for each change of the fleet, at most one in two seconds."""

    def __init__(self, cloud: LocalCloud) -> None:
        self.cloud = cloud
        self._started = time.monotonic()
        self._shown, self._shown_at = "", -10.0

    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self._started

    def show(self, what: str = "", *, is_last: bool = False) -> None:
        """Print how the fleet stands, after `what`."""
        wanted = sum(group["DesiredCapacity"] for group in groups(self.cloud))
        fleet = [machine for machine in fleet_of(self.cloud) if machine.is_on()]
        working = sum("comfy-manage" in machine.state()["services"] for machine in fleet)
        state = f"instances: {wanted} wanted, {len(fleet)} on, {working} with a worker"
        line = f"{what} · {state}" if what else state
        if line != self._shown and (is_last or self.seconds() >= self._shown_at + 2):
            self._shown, self._shown_at = line, self.seconds()
            tell(f"   {self.seconds():3.0f} s  {line}")


@contextmanager
def noting_boots(cloud: LocalCloud) -> Iterator[dict[str, float]]:
    """Note when each instance is ready to work, in seconds since 1970."""
    ready: dict[str, float] = {}
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.1):
            for machine in fleet_of(cloud):
                if machine.instance_id not in ready and is_ready(machine):
                    ready[machine.instance_id] = time.time()

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield ready
    finally:
        over.set()
        thread.join()


def is_ready(machine: Machine) -> bool:
    """Whether its worker takes jobs and its ComfyUI answers."""
    log = machine.side / "comfy-manage.log"
    with socket.socket() as probe:
        return (
            probe.connect_ex(("127.0.0.1", machine.comfy_port)) == 0
            and log.is_file()
            and "takes jobs from" in log.read_text()
        )


def fleet_of(cloud: LocalCloud) -> list[Machine]:
    """The fleet's instances: all but the base machine."""
    return [machine for machine in list(cloud.machines.values()) if machine.booted]


def save_images(s3: Any, results: dict[str, dict[str, Any]]) -> int:
    """Download every file the receipts name into demo-output/; return how many."""
    shutil.rmtree(OUTPUT, ignore_errors=True)
    OUTPUT.mkdir()
    count = 0
    for number, result in enumerate(results.values(), 1):
        for output in result["outputs"]:
            count += 1
            s3.download_file(BUCKET, output["s3_key"], str(OUTPUT / f"job{number}_{output['filename']}"))
    return count


def draw_page(cloud: LocalCloud, base: Path, results: dict[str, dict[str, Any]], ready: dict[str, float]) -> None:
    """What `fleet.py report` draws, with what only we know: since when each instance was ready."""
    settings = load_settings("pro", base / "env")
    s3 = cloud.client("s3")
    lives = read_lives(s3, cloud.client("autoscaling"), settings, list(ready))
    lives = {instance_id: life._replace(ready=ready[instance_id]) for instance_id, life in lives.items()}
    note = (
        "A rehearsal on one machine: AWS is played there, so nothing was paid; the price is that of real instances."
    )
    page, title = OUTPUT / "report.html", "Rehearsal of environment pro"
    write_report(s3, settings.s3_bucket, title, list(results.values()), lives, page, note)


def what_is_left(cloud: LocalCloud, fleet: list[str]) -> list[str]:
    """Everything of environment pro that still exists."""
    ec2 = cloud.client("ec2")
    left = [g["AutoScalingGroupName"] for g in groups(cloud)]
    left += [t["LaunchTemplateName"] for t in ec2.describe_launch_templates()["LaunchTemplates"]]
    left += [i["ImageId"] for i in ec2.describe_images(Owners=["self"])["Images"]]
    left += [s["SnapshotId"] for s in ec2.describe_snapshots(OwnerIds=["self"])["Snapshots"] if s.get("Tags")]
    left += [url for url in cloud.client("sqs").list_queues().get("QueueUrls", []) if "-base-queue" not in url]
    left += [b["Name"] for b in cloud.client("s3").list_buckets()["Buckets"] if b["Name"] != BASE_BUCKET]
    left += [i for i in fleet if cloud.instance_state(i) != "terminated"]
    iam = cloud.client("iam")
    left += [r["RoleName"] for r in iam.list_roles()["Roles"] if r["RoleName"] != "comfy"]
    left += [p["InstanceProfileName"] for p in iam.list_instance_profiles()["InstanceProfiles"] if p["InstanceProfileName"] != "comfy"]  # fmt: skip
    return left


def is_terminated(cloud: LocalCloud, instance_id: str) -> bool:
    """Whether the instance is gone."""
    return cloud.instance_state(instance_id) == "terminated"


def raises(cloud: LocalCloud) -> list[str]:
    """How the desired capacity was raised, from the group's activity history: "from 0 to 2", ..."""
    answer = cloud.client("autoscaling").describe_scaling_activities(AutoScalingGroupName=GROUP)
    causes = {re.sub("^At \\S+ ", "", activity["Cause"]) for activity in answer["Activities"]}
    found = [re.search(r"desired capacity (from (\d+) to (\d+))", cause) for cause in causes]
    return [match[1] for match in found if match and int(match[2]) < int(match[3])]


def groups(cloud: LocalCloud) -> list[dict[str, Any]]:
    """The Auto Scaling groups there are."""
    return list(cloud.client("autoscaling").describe_auto_scaling_groups()["AutoScalingGroups"])


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A temporary folder, kept for a look at its logs when the demo fails."""
    folder = Path(tempfile.mkdtemp(prefix="comfy-demo-"))
    try:
        yield folder
    except BaseException:
        tell(f"\nWhat the machines logged is in {folder}/cloud/machines")
        raise
    shutil.rmtree(folder)


def tell_story(folder: Path, jobs: int) -> None:
    """From a base machine to a fleet, some jobs, and back to nothing."""
    started = time.monotonic()
    kind = "your ComfyUI" if os.environ.get("COMFYUI_DIR") else "a stand-in for ComfyUI that speaks its protocol"
    tell("comfy-on-ec2, the whole story on this machine: AWS is played by moto, instances by process groups,")
    tell(f"and each of them runs {kind}. The scripts are the real ones.\n")
    with LocalCloud(folder / "cloud") as cloud:
        base = folder / "base"
        make_base_folder(base)
        if not os.environ.get("COMFYUI_DIR"):
            fill_base_folder(base)
        machine = cloud.make_base(base)
        environment = machine.environment()
        tell(f"The base machine is {machine.instance_id}. ComfyUI works there, with a model on its disk.")

        tell("Every call is checked against the policies that ./create_env.sh --print-policy prints.")
        keeper = with_permissions_of(cloud, "operator", "base", base, environment)
        operator, sender = (
            with_permissions_of(cloud, who, "pro", base, environment) for who in ("operator", "sender")
        )

        run_on_base(base, keeper, "./create_env.sh", "base", "--move-data", "--yes")
        start_comfyui(machine)
        run_on_base(base, operator, "./create_env.sh", "pro")
        check(
            "the fleet of pro exists and costs nothing: 0 instances",
            [g["DesiredCapacity"] for g in groups(cloud)] == [0],
        )

        workflow = choose_workflow(base)
        command = ["./send_job.py", *workflow, "--env", "pro", "--count", str(jobs)]
        said = run_on_base(base, sender, *command)
        job_ids = [line.split()[-1] for line in said if line.startswith("Message sent successfully:")]
        check(f"{jobs} jobs are on the queue", len(set(job_ids)) == jobs)
        wanted = min(math.ceil(jobs / BACKLOG), MOST)
        check(
            f"the group went from 0 to {wanted} in one step", raises(cloud) == [f"from 0 to {wanted}"], raises(cloud)
        )

        tell("\nThe instances boot and work:")
        with noting_boots(cloud) as ready:
            results = watch_jobs(cloud, job_ids)
        failed = [result["error"]["message"] for result in results.values() if result["status"] != "succeeded"]
        check(f"{jobs} jobs succeeded, each with its receipt in S3", not failed, failed)
        check("each was taken once", all(result["attempt"] == 1 for result in results.values()))
        fleet = [machine.instance_id for machine in fleet_of(cloud)]
        by_instance = {i: sum(r["instance_id"] == i for r in results.values()) for i in fleet}
        check(
            "run by " + ", ".join(f"{i} ({n})" for i, n in by_instance.items()),
            sum(by_instance.values()) == jobs and len(fleet) == wanted,
        )
        s3 = cloud.client("s3")
        count = save_images(s3, results)
        check(f"{count} files saved in demo-output/", count >= jobs)

        tell("\nNobody sends more, so the workers leave by themselves (after 5 s here, 180 s by default):")
        timeline = Timeline(cloud)
        while not all(is_terminated(cloud, instance_id) for instance_id in fleet):
            timeline.show()
            if timeline.seconds() > 300:
                raise DemoError("the group is not back at 0 instances within 300 s")
            time.sleep(0.3)
        timeline.show(is_last=True)
        (group,) = groups(cloud)
        check("the group is back at 0 instances", (group["DesiredCapacity"], group["Instances"]) == (0, []), group)
        for instance_id in fleet:
            keys = {o["Key"].split("/")[-1] for o in s3.list_objects_v2(Bucket=BUCKET, Prefix=f"output/{instance_id}/")["Contents"]}  # fmt: skip
            check(f"{instance_id} is terminated; its logs are in S3", {"parse_job.log", "comfyui.log"} <= keys, keys)

        draw_page(cloud, base, results, ready)
        tell("   ✓ what happened is drawn in demo-output/report.html")

        tell("\nA designer changes something on the base machine, and production is to have it:")
        run_on_base(base, operator, "./create_env.sh", "pro", "--rebake")
        versions = cloud.client("ec2").describe_launch_template_versions(LaunchTemplateName=f"{GROUP}-template")
        images = [version["LaunchTemplateData"]["ImageId"] for version in versions["LaunchTemplateVersions"]]
        in_use = [
            version["VersionNumber"] for version in versions["LaunchTemplateVersions"] if version["DefaultVersion"]
        ]
        check("the next instances start from the new image", in_use == [2] and len(set(images)) == 2, versions)

        serve_a_client(base, sender, workflow[0] if workflow else str(base / "simple_workflow.json"))
        fleet = [machine.instance_id for machine in fleet_of(cloud)]

        run_on_base(base, operator, "./delete_env.sh", "pro", "--yes")
        left = what_is_left(cloud, fleet)
        check("nothing of pro is left", not left, left)
        check("no call needed a permission that the policies do not give", not cloud.denied, cloud.denied)
        check("the base machine and its bucket are as they were", cloud.instance_state(machine.instance_id) == "running"
              and (base / "logs/parse_job.log").read_text() == "The base machine's own log.\n")  # fmt: skip
    tell(f"\nDone in {time.monotonic() - started:.0f} s. The images are in {OUTPUT}; look at report.html there")


def main() -> int:
    """Tell the story; 0 when every claim held."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that all processes are ended
    try:
        with scratch_folder() as folder:
            tell_story(folder, int(sys.argv[1]))
    except DemoError as error:
        print(f"\ndemo.sh: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
