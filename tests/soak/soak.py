#!/usr/bin/env python3
"""The chaos run that soak.sh starts: `soak.py JOBS SEED`.

A group of three instances on the local cloud (real start_service.sh, worker, leases; ComfyUI is the
stand-in) works off JOBS jobs while faults happen. The seed decides the jobs, which of them are sent twice,
whose callback is refused how often, and which fault happens after how many receipts; the n-th call of an
AWS operation is answered with a fault or not by the seed, too. Only the clock is not repeatable.

What jobs there are stands in plan.py: among them some that end ComfyUI whenever they run or once, hang it, need
too much memory, have a callback that is never accepted, or whose worker is killed at each attempt. Workers look at
the dead letters more often than in real life, wait less for a job that does not let go, and Spot gives less notice.

The whole traffic between instances and AWS passes through `ChaosCloud`, which notes who received which
message and every write of a receipt; the stand-in's ledger holds what ComfyUI really ran. audit.py prints the table:

sent                 different jobs sent; some of them twice, with the same id
succeeded            a receipt (result.json) says so, and it is true: see `falsely done`
failed rightly       a job that cannot succeed has a receipt that says `failed`, with the right kind of error
gave up rightly      the receipt of any job says `gave_up`, and a fault ended its last attempt; or `comfyui_died`,
                     and we have ended its ComfyUI twice, or once at its last attempt
receipts per job     how often each job's result.json was written
in DLQ rightly       jobs with a message in the dead-letter queue each of whose receives was interrupted by a fault,
                     lost, on an instance that was leaving, or one of those that such a job fails by itself
LOST                 no receipt: every job has one in the end, dead letters, too
FALSELY DONE         a receipt says `succeeded`, but the job cannot succeed, the ledger has no success of it,
                     or a file that the receipt names is missing or empty in the bucket
RECEIPTS CHANGED     written twice, or read at the end with other bytes than were first written
UNEXPLAINED RE-RUNS  a second start in the ledger that no fault explains. Explained is one where a worker,
                     its ComfyUI or its access to AWS was taken away while it held the message (or the worker
                     stood still for longer than its lease); or where the
                     job was sent twice and the second copy was received before the first one's receipt; or where
                     the next job ended ComfyUI within a second, so that the end of this one was not heard. Never
                     explained: a start on a message received after the receipt stood, and a second start in
                     one and the same ComfyUI process that had not interrupted the first, because a job that
                     ComfyUI still has is to be adopted. Cut sockets, a ComfyUI that stands still for two
                     seconds, single AWS errors, lost answers and lifecycle terminations explain nothing. A job
                     that fails by itself may start as often as that and its faults together, but no more
WRONGLY FAILED       any other receipt that says `failed`
IN DLQ WRONGLY       jobs with any other message there
CALLBACKS WRONG      a job with a callback_url without an accepted, signed callback, or one whose body is not the
                     receipt; or a callback that nobody asked for
HEALTHY REPLACED     an instance was declared Unhealthy, and we had not ended its ComfyUI since that last ran a job
                     to its end
STRAY FILES          an object in the bucket outside models/, input/ and the output/ of a job or instance, but for
                     output/object_info.json.gz
STILL IN QUEUE       a message that was not settled within the limit of two minutes and a second for each job
sick replaced        an instance was declared Unhealthy, and we had
recovery             from a fault that interrupted a job to that job's receipt
killed to answer     from the kill of the worker that held a job's last attempt to the job's receipt, which another
                     worker writes when the dead letter comes to it; VISIBILITY_TIMEOUT is part of it
died to answer       from the last time that a job ended ComfyUI to its receipt

Those in capitals must be 0, and the exit code says so.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import requests
from moto.backends import get_backend

sys.path.extend(str(Path(__file__).resolve().parents[1] / part) for part in ("cloud", "demo"))
from audit import Audit
from chaos import BUCKET, QUEUE, SECRET, ChaosCloud, Done, Receiver
from demo import CHECKPOINT, make_base_folder, scratch_folder, tell
from local_cloud import ACCOUNT_ID, REGION, Machine
from plan import ENDLESS, INSTANCES, WITHOUT_ID, Job, PlannedFault, plan_faults, plan_jobs

GROUP = "simple-comfy-soak-asg"
MAX_RECEIVES = 3
IN_QUEUE_LIMIT = 50  # so many messages are on the way at most; the rest is sent as these go
SPOT_NOTICE_S = 7.0  # two minutes in real life
LOOKS_S = "2.0, 10.0"  # between two looks at the dead letters; one to five minutes in real life
INTERRUPT_S = "10"  # until a job that does not let go of ComfyUI costs it a restart; a minute in real life
OUTAGE_S = 3.0
FREEZE_S = 10.0  # longer than the lease
STOPPING_S = 0.5  # what a receive brings that was under way when the worker was stopped is taken away from it, too
NEVER = float("inf")
SETTINGS = f"""
VISIBILITY_TIMEOUT=8
MAX_RECEIVES={MAX_RECEIVES}
STALL_TIMEOUT=8
JOB_TIMEOUT=30
CALLBACK_SECRET="{SECRET}"
"""


class Soak:
    """The run: sends, injects faults by the plan, and waits until the queue is empty."""

    def __init__(self, folder: Path, count: int, seed: int) -> None:
        self.order = plan_jobs(seed, count)
        self.jobs = list({id(job): job for job in self.order}.values())
        self.plan = plan_faults(seed, count)
        self.limit_s = 120 + count
        self.folder = folder
        self.killers: dict[str, float] = {}  # a message whose receives end its worker -> how long after
        self.ledger = folder / "ledger"
        self.cloud = ChaosCloud(folder / "cloud", seed)
        self.cloud.on_delivery = self.kill_worker_of
        self.receiver = Receiver(self.jobs)
        self.sqs, self.s3, self.ec2 = (self.cloud.client(name) for name in ("sqs", "s3", "ec2"))
        self.autoscaling = self.cloud.client("autoscaling")
        self.faults: list[Done] = []
        self.later: list[tuple[float, Callable[[], Any]]] = []
        self.condemned: set[str] = set()
        self.job_of: dict[str, str] = {}  # message -> job
        self.queue_url = self.dlq_url = ""
        self.left = 0  # messages
        self.started = self.duration_s = 0.0

    def prepare(self) -> None:
        """An environment `soak`: bucket, queues, image, and the group, at its full size from the start."""
        os.environ |= {"STANDIN_LEDGER": str(self.ledger), "STANDIN_STEP_SECONDS": "0.01"}
        os.environ.pop("COMFYUI_DIR", None)
        self.ledger.touch()
        base = self.folder / "base"
        make_base_folder(base)
        speed_up(base / "worker/dead_letters.py", "LOOK_S, LONGEST_PAUSE_S", LOOKS_S)
        speed_up(base / "worker/comfy_care.py", "INTERRUPT_S", INTERRUPT_S)
        settings = (base / "env").read_text() + SETTINGS
        (base / "env").write_text(re.sub("(?m)^SCALE_COOLDOWN=.*", "SCALE_COOLDOWN=3600", settings))
        self.s3.create_bucket(Bucket=BUCKET, CreateBucketConfiguration={"LocationConstraint": REGION})
        self.s3.put_object(Bucket=BUCKET, Key=f"models/checkpoints/{CHECKPOINT}", Body=b"weights")
        self.s3.put_object(Bucket=BUCKET, Key="input/broken.png", Body=b"no picture")
        self.dlq_url = self.sqs.create_queue(QueueName=f"{QUEUE}-dlq")["QueueUrl"]
        attributes = self.sqs.get_queue_attributes(QueueUrl=self.dlq_url, AttributeNames=["QueueArn"])["Attributes"]
        redrive = {"deadLetterTargetArn": attributes["QueueArn"], "maxReceiveCount": MAX_RECEIVES}
        queue = self.sqs.create_queue(QueueName=QUEUE, Attributes={"RedrivePolicy": json.dumps(redrive)})
        self.queue_url = queue["QueueUrl"]

        image_id = self.ec2.create_image(InstanceId=self.cloud.make_base(base).instance_id, Name="soak")["ImageId"]
        print_user_data = "for room in common fill template; do source provision/$room.sh; done; ENV=soak COMFY_HOME=/home/ubuntu/comfy user_data"
        user_data = subprocess.run(["/bin/bash", "-c", print_user_data], cwd=base, check=True, capture_output=True)
        template = {"ImageId": image_id, "UserData": base64.b64encode(user_data.stdout).decode()}
        self.ec2.create_launch_template(LaunchTemplateName="soak", LaunchTemplateData=template)
        self.autoscaling.create_auto_scaling_group(
            AutoScalingGroupName=GROUP,
            LaunchTemplate={"LaunchTemplateName": "soak", "Version": "$Default"},
            MinSize=0,
            MaxSize=INSTANCES,
            DesiredCapacity=INSTANCES,
            VPCZoneIdentifier=self.ec2.describe_subnets()["Subnets"][0]["SubnetId"],
        )
        self.autoscaling.put_lifecycle_hook(
            LifecycleHookName="comfy-terminating",
            AutoScalingGroupName=GROUP,
            LifecycleTransition="autoscaling:EC2_INSTANCE_TERMINATING",
            HeartbeatTimeout=300,
            DefaultResult="CONTINUE",
        )

    def run(self) -> None:
        """Send and disturb until everything is settled, or the limit is reached."""
        self.started = time.time()
        waiting = list(self.order)
        next_look = next_word = 0.0
        while time.time() < self.started + self.limit_s:
            receipts = len(self.cloud.receipts)
            while waiting and self.left < IN_QUEUE_LIMIT:
                self.send(waiting.pop(0))
                self.left += 1
            for due in [item for item in self.later if item[0] <= time.time()]:
                self.later.remove(due)
                due[1]()
            if self.plan and self.plan[0].after <= receipts and self.inject(self.plan[0]):
                self.plan.pop(0)
            if time.time() > next_look:
                next_look = time.time() + 1
                self.left = self.depth()
                if not waiting and not self.left and not self.unanswered():
                    break
            if time.time() > next_word:
                next_word = time.time() + 10
                tell(f"{time.time() - self.started:4.0f} s: {receipts} of {len(self.jobs)} jobs have their receipt")
            time.sleep(0.05)
        self.cloud.chaos = False
        self.duration_s = time.time() - self.started

    def send(self, job: Job) -> None:
        """Put the job on the queue."""
        if job.large is not None:
            self.s3.put_object(Bucket=BUCKET, Key=f"input/jobs/{job.id}.json", Body=job.large.encode())
        body = job.body.replace("@CALLBACK@", self.receiver.url).replace("@FOLDER@", str(self.folder))
        if job.kill_after_s is not None:
            self.killers[body] = job.kill_after_s
        message_id = self.sqs.send_message(QueueUrl=self.queue_url, MessageBody=body)["MessageId"]
        job.message_ids.append(message_id)
        if job.kind in WITHOUT_ID:
            job.id = message_id
        self.job_of[message_id] = job.id

    def depth(self) -> int:
        """Messages waiting, held or put back."""
        names = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"]
        answer = self.sqs.get_queue_attributes(QueueUrl=self.queue_url, AttributeNames=names)["Attributes"]
        return sum(int(answer[name]) for name in names)

    def unanswered(self) -> bool:
        """Whether a job has no receipt yet, or somebody who would take its callback has not heard of it."""
        return any(
            job.id not in self.cloud.receipts
            or (job.callback and job.refusals < ENDLESS and not self.receiver.accepted.get(job.id))
            for job in self.jobs
        )

    def inject(self, fault: PlannedFault) -> bool:
        """Let the fault happen to an instance; False where none is there for it now."""
        group = get_backend("autoscaling")[ACCOUNT_ID][REGION].autoscaling_groups[GROUP]
        in_service = {state.instance_id for state in group.instance_states if state.lifecycle_state == "InService"}
        if fault.mid_job:
            in_service &= self.holders()
        live = [
            machine
            for machine in list(self.cloud.machines.values())
            if machine.instance_id in in_service - self.condemned
            and {"comfy-manage", "comfyui"} <= machine.state()["services"].keys()
        ]
        if not live:
            return False
        machine = live[fault.rank % len(live)]
        now = time.time()
        self.faults.append(Done(now, fault.kind, machine.instance_id, self.strike(fault, machine, now)))
        return True

    def holders(self) -> set[str]:
        """The instances whose latest message has no receipt yet, and which no fault has hit since."""
        latest = {delivery.instance_id: delivery for delivery in self.cloud.deliveries[-100:]}
        hit_at = {fault.instance_id: fault.at for fault in self.faults}
        return {
            where
            for where, delivery in latest.items()
            if self.job_of.get(delivery.message_id) not in self.cloud.receipts and delivery.at > hit_at.get(where, 0)
        }

    def strike(self, fault: PlannedFault, machine: Machine, now: float) -> float:
        """Do it; returns when the fault is over."""
        worker, comfyui = machine.services["comfy-manage"], machine.services["comfyui"]
        instance_id = machine.instance_id
        if fault.kind == "worker killed":
            worker.kill()
        elif fault.kind == "worker stopped":
            worker.terminate()
            return now + STOPPING_S
        elif fault.kind == "ComfyUI killed":
            comfyui.kill()
        elif fault.kind == "ComfyUI paused":
            self.freeze(comfyui, now + fault.seconds)
        elif fault.kind == "worker frozen":
            self.freeze(worker, now + FREEZE_S)
            return now + FREEZE_S
        elif fault.kind == "sockets cut":
            with suppress(requests.RequestException):
                requests.post(f"http://127.0.0.1:{machine.comfy_port}/standin/cut-sockets", timeout=2)
        elif fault.kind == "AWS outage":
            self.cloud.outages[instance_id] = now + OUTAGE_S
            return now + OUTAGE_S
        elif fault.kind == "instance terminated":
            self.condemned.add(instance_id)
            self.autoscaling.terminate_instance_in_auto_scaling_group(
                InstanceId=instance_id, ShouldDecrementDesiredCapacity=False
            )
        elif fault.kind == "spot notice":
            self.condemned.add(instance_id)
            machine.metadata["spot/instance-action"] = json.dumps({"action": "terminate", "time": "soon"})
            self.later.append((now + SPOT_NOTICE_S, lambda: self.ec2.terminate_instances(InstanceIds=[instance_id])))
            return NEVER
        return now

    def kill_worker_of(self, instance_id: str, body: str) -> None:
        """Where the message kills its workers: at once, or later and with it all that runs on the instance."""
        after_s = self.killers.get(body)
        machine = self.cloud.machines.get(instance_id)
        if after_s is None or machine is None:
            return

        def kill(kind: str, *services: str) -> None:
            self.faults.append(Done(time.time(), kind, instance_id, time.time()))
            for service in services:
                machine.services[service].kill()
            shutil.rmtree(machine.folder / "held", ignore_errors=True)  # the next worker is another's

        if after_s:
            both = ("instance killed", "comfy-manage", "comfyui")
            threading.Timer(after_s, kill, both).start()
        else:
            kill("worker killed", "comfy-manage")

    def freeze(self, process: subprocess.Popen[bytes], until: float) -> None:
        """Let the process stand still."""
        process.send_signal(signal.SIGSTOP)
        self.later.append((until, lambda: process.send_signal(signal.SIGCONT)))

    def end(self) -> None:
        """Let no process stay stopped, and let nothing disturb the end."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        for _, action in self.later:
            with suppress(Exception):
                action()
        self.receiver.server.shutdown()


def speed_up(room: Path, name: str, value: str) -> None:
    """Give a constant of the workers another value."""
    text, found = re.subn(rf"(?m)^{name} = .*", f"{name} = {value}", room.read_text())
    assert found == 1, f"{room} has no {name}"
    room.write_text(text)


def main() -> int:
    """Run and print; 0 when everything that must be 0 is."""
    count, seed = int(sys.argv[1]), int(sys.argv[2])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that all processes are ended
    try:
        with scratch_folder() as folder:
            soak = Soak(folder, count, seed)
            with soak.cloud:
                try:
                    soak.prepare()
                    soak.run()
                    audit = Audit(soak)
                    audit.run()
                finally:
                    soak.end()
            audit.print_table(seed)
            if any(audit.wrongs.values()):
                sys.exit(1)
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
