"""What the scenes have in common: a base machine made after README's words, and the fleet that was made of it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from local_cloud import ACCOUNT_ID, REGION, LocalCloud
from places import ROOT, copy_comfyui
from real_machine import LEDGER, RealMachine
from workplace import await_that, group_of, image_workflow

BUCKET = f"simple-comfy-{ACCOUNT_ID}-{REGION}-pro"
BASE_BUCKET = f"simple-comfy-{ACCOUNT_ID}-{REGION}-base"
GROUP = "simple-comfy-pro-asg"
QUEUE = "simple-comfy-pro-queue"
CHECKPOINT = "v1-5-pruned-emaonly-fp16.safetensors"
REPOSITORY = "/srv/comfy-on-ec2"


def readme_block(first_words: str) -> str:
    """The one block of commands in the README that begins so."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (block,) = [block for block in blocks if block.startswith(first_words)]
    return str(block)


def typed(block: str) -> str:
    """A script that runs a block line by line, as it is typed, and ends at the first line that fails."""
    return "".join(f"{line}\n[[ $? == 0 ]] || exit 1\n" for line in block.splitlines())


def make_repository(folder: Path) -> None:
    """The project as it is here, changes that are not committed included, for `git clone`."""
    listed = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, capture_output=True, text=True, check=True).stdout.split("\0"):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    git = ["git", "-C", str(folder), "-c", "user.name=me", "-c", "user.email=me@localhost"]
    for words in (["init", "--quiet"], ["add", "--all"], ["commit", "--quiet", "--message", "the project"]):
        subprocess.run([*git, *words], check=True)


class Stage:
    """The base machine and the fleet `pro`. It is made once for all scenes, which is a scene by itself."""

    def __init__(self, cloud: LocalCloud, folder: Path) -> None:
        self.cloud = cloud
        self.s3, self.sqs, self.autoscaling = (cloud.client(name) for name in ("s3", "sqs", "autoscaling"))
        base = cloud.make_base(folder)
        assert isinstance(base, RealMachine)
        self.base = base
        self._instance: RealMachine | None = None
        with telling(base):
            base.shared = {
                Path(os.environ["MACHINE_PLACE"]) / "repository": REPOSITORY,
                Path(os.environ["MACHINE_WHEELS"]): "/srv/wheels",
            }
            base.insert_disk()
            base.seed()
            base.power_on()
            base.await_boot()
            install_comfyui(base)
            block = readme_block("git clone <this repository>").replace("<this repository>", REPOSITORY)
            self.installed = base.run(f"export MY_ACCOUNT={ACCOUNT_ID}\n{typed(block)}", said="yes\n")
            self.made = self.on_base("sed -i s/^SCALE_COOLDOWN=.*/SCALE_COOLDOWN=600/ env && ./create_env.sh pro")

    def on_base(self, script: str, **more: Any) -> str:
        """What a designer types in ~/comfy, with the virtual environment active."""
        return self.base.run(f"cd comfy && source venv/bin/activate && {script}", **more)

    def launch(self, prepare: Callable[[RealMachine], None] | None = None) -> RealMachine:
        """A new instance of the fleet, the only one, which boots by itself; `prepare` changes its disk before."""
        self.clear()
        known = set(self.cloud.machines)
        RealMachine.before_boot = prepare
        self.autoscaling.set_desired_capacity(AutoScalingGroupName=GROUP, DesiredCapacity=1)
        return self.await_another(known)

    def healthy(self) -> RealMachine:
        """An instance that works, left so by the scene before or new."""
        if self._instance is None or not self._instance.is_on():
            self._instance = self.launch()
            assert self.await_receipt(self.send())["status"] == "succeeded"
        return self._instance

    def await_worker(self, machine: RealMachine, before: int = 0) -> None:
        """Wait until a worker takes jobs there, where so many have been before."""
        await_that(f"a worker of {machine.instance_id} takes jobs", lambda: workers_of(machine) > before)

    def await_another(self, known: set[str]) -> RealMachine:
        """The next instance that is not one of those known."""

        def another() -> RealMachine | None:
            new = [machine for name, machine in list(self.cloud.machines.items()) if name not in known]
            return new[0] if new and isinstance(new[0], RealMachine) else None

        machine: RealMachine = await_that("there is another instance", another)
        return machine

    def clear(self) -> None:
        """End the fleet's instances as a power cut does."""
        RealMachine.before_boot, self._instance = None, None
        self.autoscaling.set_desired_capacity(AutoScalingGroupName=GROUP, DesiredCapacity=0)
        await_that("the group has no instance", self.is_empty)

    def is_empty(self) -> bool:
        """End the instances that there are; whether there were none. One may be on its way when this is asked first."""
        machines = self.on()
        for machine in machines:
            machine.end()
        instances = [instance["InstanceId"] for instance in group_of(self.cloud, GROUP)["Instances"]]
        if instances:
            self.cloud.client("ec2").terminate_instances(InstanceIds=instances)
        return not machines and not instances

    def forget_failed_boots(self) -> None:
        """The operator's hand, after instances that could not work: they are not counted, and the group launches."""
        tag = {"ResourceId": GROUP, "ResourceType": "auto-scaling-group", "Key": "comfy-failed-boots"}
        self.autoscaling.delete_tags(Tags=[tag])
        self.autoscaling.resume_processes(AutoScalingGroupName=GROUP, ScalingProcesses=["Launch"])

    def on(self) -> list[RealMachine]:
        """The fleet's instances that have not been ended."""
        found = [machine for machine in list(self.cloud.machines.values()) if isinstance(machine, RealMachine)]
        return [machine for machine in found if machine is not self.base and machine.is_on()]

    # --- Jobs -----------------------------------------------------------------------------------------------

    def queue_url(self, name: str = QUEUE) -> str:
        """Where the fleet's jobs are."""
        return str(self.sqs.get_queue_url(QueueName=name)["QueueUrl"])

    def send(self, seconds: float = 0.0) -> str:
        """Put a job of so many seconds on the fleet's queue. It needs a model. Returns its id."""
        loader = {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": CHECKPOINT}}
        encoder = {"class_type": "CLIPTextEncode", "inputs": {"clip": ["4", 1], "text": "a fox"}}
        more = {"4": loader, "5": encoder, "6": {"class_type": "PreviewAny", "inputs": {"source": ["5", 0]}}}
        body = json.dumps(image_workflow(seconds, more))
        return str(self.sqs.send_message(QueueUrl=self.queue_url(), MessageBody=body)["MessageId"])

    def receipt(self, job_id: str, bucket: str = BUCKET) -> dict[str, Any] | None:
        """The job's receipt, None while there is none."""
        try:
            body = self.s3.get_object(Bucket=bucket, Key=f"output/{job_id}/result.json")["Body"].read()
        except self.s3.exceptions.NoSuchKey:
            return None
        receipt: dict[str, Any] = json.loads(body)
        return receipt

    def await_receipt(self, job_id: str) -> dict[str, Any]:
        """Wait for the job's end, however it is."""
        receipt: dict[str, Any] = await_that(f"job {job_id} has ended", lambda: self.receipt(job_id))
        return receipt

    def runs(self, machine: RealMachine, job_id: str) -> int:
        """How often ComfyUI there has begun this job."""
        ledger = machine.root / LEDGER.lstrip("/")
        entries = [json.loads(line) for line in ledger.read_text().splitlines()] if ledger.exists() else []
        return sum(entry["prompt_id"] == job_id and entry["event"] == "start" for entry in entries)

    def denied(self, machine: RealMachine) -> list[str]:
        """What the machine's role was not allowed to do."""
        return [message for message in self.cloud.denied if machine.instance_id in message]

    def keys(self, prefix: str, bucket: str = BUCKET) -> list[str]:
        """What lies in the bucket."""
        found = self.s3.list_objects_v2(Bucket=bucket, Prefix=prefix).get("Contents", [])
        return [item["Key"] for item in found]


def workers_of(machine: RealMachine) -> int:
    """How many workers have come up there."""
    return machine.journal("comfy-manage").count("takes jobs from")


def runs_on(machine: RealMachine, job_id: str) -> Callable[[], bool]:
    """Whether a worker there has begun with a job."""
    return lambda: f"Job {job_id}: attempt" in machine.journal("comfy-manage")


def install_comfyui(machine: RealMachine) -> None:
    """What README begins with: a ComfyUI that works in the home of `ubuntu`, with a model and an input."""
    folder = machine.root / "home/ubuntu/ComfyUI"
    folder.mkdir()
    copy_comfyui(folder)
    shutil.copy(Path(__file__).with_name("comfyui-requirements.txt"), folder / "requirements.txt")
    files = {f"models/checkpoints/{CHECKPOINT}": "weights", "input/example.png": "", "output/old.png": ""}
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text(text)
    machine.run("chown --recursive ubuntu:ubuntu /home/ubuntu/ComfyUI", user="root")


@contextmanager
def telling(machine: RealMachine) -> Iterator[None]:
    """Where the block fails, what the machine said is printed."""
    try:
        yield
    except BaseException:
        print(machine.ended_badly())
        raise
