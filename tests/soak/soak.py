#!/usr/bin/env python3
"""The chaos run that soak.sh starts: `soak.py JOBS SEED`.

A group of three instances on the local cloud (real start_service.sh, worker, leases; ComfyUI is the
stand-in) works off JOBS jobs while faults happen. The seed decides the jobs, which of them are sent twice,
whose callback is refused how often, and which fault happens after how many receipts; the n-th call of an
AWS operation is answered with a fault or not by the seed, too. Only the clock is not repeatable.

The whole traffic between instances and AWS passes through `ChaosCloud`, which notes who received which
message and every write of a receipt; the stand-in's ledger holds what ComfyUI really ran. The table:

sent                 different jobs sent; some of them twice, with the same id
succeeded            a receipt (result.json) says so, and it is true: see `falsely done`
failed rightly       a job that cannot succeed has a receipt that says `failed`, with the right kind of error
in DLQ rightly       a message in the dead-letter queue which kills every ComfyUI that runs it, or each of
                     whose receives was interrupted by a fault, lost, or on an instance that was leaving
LOST                 neither a receipt nor a message in the dead-letter queue
FALSELY DONE         a receipt says `succeeded`, but the job cannot succeed, the ledger has no success of it,
                     or a file that the receipt names is missing or empty in the bucket
RECEIPTS CHANGED     written twice, or read at the end with other bytes than were first written
UNEXPLAINED RE-RUNS  a second start in the ledger that no fault explains. Explained is one where a worker,
                     its ComfyUI or its access to AWS was taken away while it held the message (or the worker
                     stood still for longer than its lease); or where the
                     job was sent twice and the second copy was received before the first one's receipt. Never
                     explained: a start on a message received after the receipt stood, and a second start in
                     one and the same ComfyUI process that had not interrupted the first, because a job that
                     ComfyUI still has is to be adopted. Cut sockets, a ComfyUI that stands still for two
                     seconds, single AWS errors, lost answers and lifecycle terminations explain nothing.
WRONGLY FAILED       a job that can succeed has a receipt that says `failed`, or a failed one says a wrong kind
IN DLQ WRONGLY       any other message there
CALLBACKS WRONG      a job with a callback_url, its message gone, without an accepted, signed callback whose
                     body is the receipt
STRAY FILES          an object in the bucket outside models/, input/ and the output/ of a job or instance, but for
                     output/object_info.json.gz
STILL IN QUEUE       a message that was not settled within the limit of two minutes and a second for each job
recovery             from a fault that interrupted a job to that job's receipt

Those in capitals must be 0, and the exit code says so.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import io
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import requests
from moto.backends import get_backend

sys.path.extend(str(Path(__file__).resolve().parents[1] / part) for part in ("cloud", "demo"))
from demo import CHECKPOINT, make_base_folder, scratch_folder, tell
from local_cloud import ACCOUNT_ID, REGION, Fault, LocalCloud, Machine
from places import ROOT

BUCKET = f"simple-comfy-{ACCOUNT_ID}-{REGION}-soak"
QUEUE = "simple-comfy-soak-queue"
GROUP = "simple-comfy-soak-asg"
SECRET = "the receiver knows it"
INSTANCES = 3
MAX_RECEIVES = 3
IN_QUEUE_LIMIT = 50  # so many messages are on the way at most; the rest is sent as these go
JOBS_PER_FAULT = 10
AWS_ERROR_SHARE = 0.05
SPOT_NOTICE_S = 7.0  # two minutes in real life
OUTAGE_S = 3.0
FREEZE_S = 10.0  # longer than the lease
STOPPING_S = 0.5  # what a receive brings that was under way when the worker was stopped is taken away from it, too
NEVER = float("inf")
SETTINGS = f"""
VISIBILITY_TIMEOUT=8
MAX_RECEIVES={MAX_RECEIVES}
STALL_TIMEOUT=8
JOB_TIMEOUT=120
CALLBACK_SECRET="{SECRET}"
"""


# --- The plan: jobs and faults, by the seed alone ----------------------------------------------------------


@dataclass
class Job:
    """One job to send, and what must become of it."""

    id: str  # where the message carries none, the message's own id as soon as it is sent
    kind: str
    body: str
    expect: str  # succeeded, failed or dead
    error_kinds: tuple[str, ...] = ()
    callback: bool = False
    refusals: int = 0  # how often its callback is refused
    large: str | None = None  # a workflow that travels by the bucket
    message_ids: list[str] = field(default_factory=list)


class PlannedFault(NamedTuple):
    """What happens after so many receipts, to which of the instances that live then."""

    after: int
    kind: str
    rank: int
    seconds: float
    mid_job: bool  # wait for an instance that has a job in hand


KINDS: dict[str, tuple[int, str, tuple[str, ...]]] = {
    # kind of job: (share, what must become of it, as which kind of error)
    "image": (60, "succeeded", ()),
    "sampler": (8, "succeeded", ()),
    "bare workflow": (6, "succeeded", ()),
    "large": (3, "succeeded", ()),
    "dropped branch": (3, "succeeded", ()),
    "short of memory": (2, "succeeded", ()),
    "broken image": (4, "failed", ("execution_error",)),
    "missing model": (4, "failed", ("invalid_workflow",)),
    "command": (3, "failed", ("command_refused",)),
    "climbing prefix": (1, "failed", ("invalid_workflow", "invalid_message")),
    "UI format": (1, "failed", ("invalid_workflow", "invalid_message")),
    "not JSON": (1, "failed", ("invalid_message",)),
    "climbing id": (1, "failed", ("invalid_message",)),
    "list": (1, "failed", ("invalid_message",)),
    "deep": (1, "failed", ("invalid_message",)),
}
WITHOUT_ID = ("bare workflow", "not JSON", "climbing id", "list", "deep")
JOBS_PER_POISON = 150
POISON = ("StandinCrash", "StandinCrash", "StandinDeadExecutor")  # in turn

FAULTS = {
    # kind of fault: its share
    "worker killed": 8,
    "ComfyUI killed": 6,
    "sockets cut": 5,
    "worker stopped": 3,
    "ComfyUI paused": 3,
    "AWS outage": 2,
    "worker frozen": 2,
    "instance terminated": 2,
    "spot notice": 2,
}
INTERRUPTING = ("worker killed", "ComfyUI killed", "worker stopped", "AWS outage", "worker frozen", "spot notice")


def plan_jobs(seed: int, count: int) -> list[Job]:
    """The jobs in the order they are sent. A job that is in the list twice is sent twice."""
    chance = random.Random(f"jobs {seed}")
    kinds = list(KINDS)[: max(0, count - 1)]  # each kind once
    kinds += chance.choices(list(KINDS), [share for share, *_ in KINDS.values()], k=max(0, count - len(kinds)))
    chance.shuffle(kinds)
    jobs = [make_job(chance, kind, *KINDS[kind][1:]) for kind in kinds]
    # Poison goes first, because it is given back for longer and longer until it is in the dead-letter queue.
    poisons = max(1, count // JOBS_PER_POISON)
    for number, place in enumerate(chance.sample(range(10 * poisons if count > 1000 else 10), poisons)):
        jobs[place] = make_job(chance, POISON[number % len(POISON)], "dead", ())
    order = [(float(place), job) for place, job in enumerate(jobs)]
    for place, job in enumerate(jobs):
        if job.expect == "succeeded" and job.kind not in WITHOUT_ID and chance.random() < 0.1:
            order.append((place + chance.uniform(0, 30), job))
    return [job for _, job in sorted(order, key=lambda item: item[0])]


def make_job(chance: random.Random, kind: str, expect: str, error_kinds: tuple[str, ...]) -> Job:
    """A job of this kind."""
    job = Job(str(uuid.UUID(int=chance.getrandbits(128), version=4)), kind, "", expect, error_kinds)
    inputs = {"width": 32, "height": 32, "batch_size": 1, "color": chance.randrange(0xFFFFFF)}
    workflow: dict[str, Any] = {
        "1": {"class_type": "EmptyImage", "inputs": inputs},
        "2": {"class_type": "StandinSleep", "inputs": {"seconds": chance.uniform(0.02, 0.3), "image": ["1", 0]}},
        "3": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "soak"}},
    }
    message: Any = {"prompt": workflow, "job_id": job.id}
    missing_model = {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "missing.safetensors"}}
    if kind == "sampler":
        workflow = json.loads((ROOT / "simple_workflow.json").read_text())
        workflow["3"]["inputs"] |= {"seed": chance.randrange(2**32), "steps": chance.randrange(2, 8)}
        workflow["5"]["inputs"] |= {"width": 64, "height": 64}
        message["prompt"] = workflow
    elif kind == "short of memory":
        workflow["2"] = {"class_type": "StandinOutOfMemory", "inputs": {"image": ["1", 0], "times": 1}}
    elif kind == "broken image":
        workflow["1"] = {"class_type": "LoadImage", "inputs": {"image": "broken.png"}}
    elif kind == "missing model":
        text = {"class_type": "CLIPTextEncode", "inputs": {"text": "", "clip": ["4", 1]}}
        message["prompt"] = {"4": missing_model, "5": text, "6": preview(["5", 0])}
    elif kind == "dropped branch":
        workflow |= {"4": missing_model, "5": preview(["4", 0])}
    elif kind == "climbing prefix":
        workflow["3"]["inputs"]["filename_prefix"] = "../../models/soak"
    elif kind == "UI format":
        message["prompt"] = {"nodes": [], "links": [], "version": 0.4}
    elif kind == "climbing id":
        message["job_id"] = f"../{job.id}"
    elif kind == "command":
        message = {"exec_cmd": "true", "job_id": job.id}
    elif kind == "bare workflow":
        message = workflow
    elif kind == "large":
        job.large = json.dumps(workflow)
        message = {"workflow_key": f"input/jobs/{job.id}.json", "job_id": job.id}
    elif kind in POISON:
        workflow["2"] = {"class_type": kind, "inputs": {"image": ["1", 0]}}
    job.callback = kind not in WITHOUT_ID and chance.random() < 0.3
    job.refusals = chance.choice([0, 0, 0, 1, 1, 2, 3]) if job.callback else 0
    if job.callback:
        message["callback_url"] = f"@CALLBACK@/{job.id}"
    job.body = {"not JSON": "{not JSON", "list": "[1, 2]", "deep": "[" * 100_000}.get(kind) or json.dumps(message)
    return job


def preview(source: list[Any]) -> dict[str, Any]:
    """A node that shows anything as text."""
    return {"class_type": "PreviewAny", "inputs": {"source": source}}


def plan_faults(seed: int, count: int) -> list[PlannedFault]:
    """The faults, the first one first: each kind once where there are so many, then by its share."""
    chance = random.Random(f"faults {seed}")
    kinds = list(FAULTS)
    chance.shuffle(kinds)
    number = count // JOBS_PER_FAULT
    kinds = kinds[:number] + chance.choices(list(FAULTS), list(FAULTS.values()), k=max(0, number - len(kinds)))
    chance.shuffle(kinds)
    places = sorted(chance.randrange(round(0.9 * count)) for _ in kinds)
    return [
        PlannedFault(place, kind, chance.randrange(INSTANCES), chance.uniform(0.5, 2.5), chance.random() < 0.6)
        for place, kind in zip(places, kinds, strict=True)
    ]


# --- The cloud, with errors and a witness ------------------------------------------------------------------


class Delivery(NamedTuple):
    """A message that an instance has received."""

    at: float
    instance_id: str
    message_id: str
    lost: bool  # the answer did not arrive


class Receipt(NamedTuple):
    """A result.json as it was written."""

    at: float
    etag: str


class ChaosCloud(LocalCloud):
    """The local cloud, which fails some of the instances' calls and notes what they do.

    An instance is known by its access key, which is its id; the soak's own calls are left in peace.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        super().__init__(folder, restart_s=0.2)
        self.seed = seed
        self.chaos = True
        self.outages: dict[str, float] = {}  # instance -> until when no call of it is answered
        self.deliveries: list[Delivery] = []
        self.receipts: dict[str, list[Receipt]] = defaultdict(list)
        self.calls = Counter[str]()
        self.errors = Counter[str]()
        self.error_times: dict[str, list[float]] = defaultdict(list)  # instance -> when a call of it failed
        self._count_lock = threading.Lock()

    def _boot(self, instance: Any) -> None:
        super()._boot(instance)
        metadata = self.machines[instance.id].metadata
        role = "iam/security-credentials/comfy"
        metadata[role] = metadata[role].replace('"AccessKeyId": "local"', f'"AccessKeyId": "{instance.id}"')

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        caller = re.search(r"Credential=([^/]+)/[0-9]+/[^/]+/(\w+)/", environ.get("HTTP_AUTHORIZATION", ""))
        if caller is None:
            return super().__call__(environ, start_response)
        instance_id, service = caller.groups()
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        target = environ.get("HTTP_X_AMZ_TARGET", "").rpartition(".")[2]
        action = re.search(rb"\bAction=(\w+)", body) if service not in ("s3", "sqs") else None
        operation = action[1].decode() if action else target or environ["REQUEST_METHOD"]
        error = self._choose_error(instance_id, service, operation) if self.chaos else None
        if error is not None and error.code != "answer lost":
            return self._answer_fault(error, start_response, service, json_protocol=bool(target))

        environ["wsgi.input"] = io.BytesIO(body)
        answered: list[Any] = []
        answer = b"".join(super().__call__(environ, lambda *args: answered.append(args)))
        status, headers, *_ = answered[-1]
        if status.startswith("200"):
            self._note(instance_id, operation, environ["PATH_INFO"], headers, answer, lost=error is not None)
        if error is not None:
            return self._answer_fault(
                Fault(500, "InternalError"), start_response, service, json_protocol=bool(target)
            )
        start_response(*answered[-1])
        return [answer]

    def _choose_error(self, instance_id: str, service: str, operation: str) -> Fault | None:
        if not instance_id.startswith("i-"):
            return None
        with self._count_lock:
            self.calls[f"{service} {operation}"] += 1
            number = self.calls[f"{service} {operation}"]
        if time.time() < self.outages.get(instance_id, 0):
            return Fault(503, "ServiceUnavailable")
        chance = random.Random(f"{self.seed} {service} {operation} {number}")
        if chance.random() > AWS_ERROR_SHARE:
            return None
        throttled = Fault(503, "SlowDown") if service == "s3" else Fault(400, "ThrottlingException")
        kinds = {
            "throttled": throttled,
            "500": Fault(500, "InternalError"),
            "503": Fault(503, "ServiceUnavailable"),
            "slow, then 503": Fault(503, "ServiceUnavailable", after_s=1.0),
            "answer lost": Fault(500, "answer lost"),
        }
        kind = chance.choices(list(kinds), [4, 3, 3, 1, 2])[0]
        with self._count_lock:
            self.errors[kind] += 1
            self.error_times[instance_id].append(time.time())
        return kinds[kind]

    def _note(self, instance_id: str, operation: str, path: str, headers: Any, answer: bytes, *, lost: bool) -> None:
        if operation == "ReceiveMessage":
            for message in json.loads(answer).get("Messages", []):
                self.deliveries.append(Delivery(time.time(), instance_id, message["MessageId"], lost))
        receipt = re.fullmatch(rf"/{BUCKET}/output/([^/]+)/result\.json", path)
        if receipt and operation in ("PUT", "DELETE"):
            etag = {name.lower(): value for name, value in headers}.get("etag", "deleted")
            self.receipts[receipt[1]].append(Receipt(time.time(), etag))


class Receiver:
    """Takes the callbacks, refuses some of them at first, and accepts none with a wrong signature."""

    def __init__(self, jobs: Iterable[Job]) -> None:
        self.refusals = {job.id: job.refusals for job in jobs}
        self.accepted: dict[str, list[bytes]] = defaultdict(list)
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                self.send_response(receiver.take(self.path[1:], body, dict(self.headers)))
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def take(self, job_id: str, body: bytes, headers: dict[str, str]) -> int:
        """The status of the answer."""
        signed = f"{headers.get('X-Comfy-Timestamp', '')}.".encode() + body
        signature = hmac.new(SECRET.encode(), signed, hashlib.sha256).hexdigest()
        if headers.get("X-Comfy-Signature") != f"sha256={signature}":
            return 401
        if self.refusals.get(job_id, 0) > 0:
            self.refusals[job_id] -= 1
            return 503
        self.accepted[job_id].append(body)
        return 204


# --- The run -----------------------------------------------------------------------------------------------


class Done(NamedTuple):
    """A fault that happened."""

    at: float
    kind: str
    instance_id: str
    until: float


class Soak:
    """The run: sends, injects faults by the plan, and waits until the queue is empty."""

    def __init__(self, folder: Path, count: int, seed: int) -> None:
        self.order = plan_jobs(seed, count)
        self.jobs = list({id(job): job for job in self.order}.values())
        self.plan = plan_faults(seed, count)
        self.limit_s = 120 + count
        self.folder = folder
        self.ledger = folder / "ledger"
        self.cloud = ChaosCloud(folder / "cloud", seed)
        self.receiver = Receiver(self.jobs)
        self.sqs, self.s3, self.ec2 = (self.cloud.client(name) for name in ("sqs", "s3", "ec2"))
        self.autoscaling = self.cloud.client("autoscaling")
        self.faults: list[Done] = []
        self.later: list[tuple[float, Callable[[], Any]]] = []
        self.condemned: set[str] = set()
        self.job_of: dict[str, str] = {}  # message -> job
        self.comfy_pids: dict[int, str] = {}  # ComfyUI's process -> its instance
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
        print_user_data = "source ./create_env.sh; ENV=soak COMFY_HOME=/home/ubuntu/comfy user_data"
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
            self.note_processes()
            if time.time() > next_look:
                next_look = time.time() + 1
                self.left = self.depth()
                if not waiting and not self.left:
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
        body = job.body.replace("@CALLBACK@", self.receiver.url)
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

    def note_processes(self) -> None:
        """Remember whose ComfyUI each process was."""
        for machine in list(self.cloud.machines.values()):
            process = machine.services.get("comfyui")
            if process is not None:
                self.comfy_pids[process.pid] = machine.instance_id

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


# --- The audit ---------------------------------------------------------------------------------------------


class Start(NamedTuple):
    """A run that ComfyUI began, from the ledger."""

    at: float
    pid: int
    ending: str | None  # success, error, interrupted; None where the process died


WRONGS = ("LOST", "FALSELY DONE", "RECEIPTS CHANGED", "UNEXPLAINED RE-RUNS", "WRONGLY FAILED", "IN DLQ WRONGLY",
          "CALLBACKS WRONG", "STRAY FILES", "STILL IN QUEUE")  # fmt: skip


class Audit:
    """Compares what was promised with what was done."""

    def __init__(self, soak: Soak) -> None:
        self.soak = soak
        self.cloud = soak.cloud
        self.rights = Counter[str]()
        self.wrongs: dict[str, list[str]] = {name: [] for name in WRONGS}
        self.explained = Counter[str]()
        self.recovery_s: list[float] = []
        self.deliveries: dict[str, list[Delivery]] = defaultdict(list)
        for delivery in self.cloud.deliveries:
            self.deliveries[soak.job_of[delivery.message_id]].append(delivery)
        self.objects: dict[str, int] = {}
        self.dead: set[str] = set()
        self.starts: dict[str, list[Start]] = {}

    def run(self) -> None:
        """Read what is there, and look at every job."""
        self.objects, self.dead, self.starts = self.read_bucket(), self.read_dlq(), self.read_ledger()
        for job in self.soak.jobs:
            self.look_at(job)
        self.look_for_strays()
        self.wrongs["STILL IN QUEUE"] += ["a message"] * self.soak.left

    def read_bucket(self) -> dict[str, int]:
        """Every key of the bucket and its size."""
        pages = self.soak.s3.get_paginator("list_objects_v2").paginate(Bucket=BUCKET)
        return {item["Key"]: item["Size"] for page in pages for item in page.get("Contents", [])}

    def read_dlq(self) -> set[str]:
        """The ids of the messages in the dead-letter queue."""
        found: set[str] = set()
        call = {"QueueUrl": self.soak.dlq_url, "MaxNumberOfMessages": 10, "VisibilityTimeout": 600}
        while messages := self.soak.sqs.receive_message(**call).get("Messages"):
            found |= {message["MessageId"] for message in messages}
        return found

    def read_ledger(self) -> dict[str, list[Start]]:
        """What ComfyUI really ran."""
        starts: dict[str, list[Start]] = defaultdict(list)
        for line in self.soak.ledger.read_text().splitlines():
            entry = json.loads(line)
            runs = starts[entry["prompt_id"]]
            if entry["event"] == "start":
                runs.append(Start(entry["time"], entry["pid"], None))
                continue
            for place, run in enumerate(runs):
                if run.pid == entry["pid"] and run.ending is None:
                    runs[place] = run._replace(ending=entry["event"])
        return starts

    def look_at(self, job: Job) -> None:
        """Find the job's place in the table, and check its callback and its re-runs."""
        story = f"{job.id} ({job.kind})"
        key = f"output/{job.id}/result.json"
        written = self.cloud.receipts.get(job.id, [])
        dead = [message_id for message_id in job.message_ids if message_id in self.dead]
        if key in self.objects:
            body = self.soak.s3.get_object(Bucket=BUCKET, Key=key)["Body"].read()
            self.look_at_receipt(job, story, json.loads(body))
            if len(written) != 1 or written[0].etag.strip('"') != hashlib.md5(body).hexdigest():
                self.wrongs["RECEIPTS CHANGED"].append(f"{story}: written {len(written)} times")
            bodies = self.soak.receiver.accepted.get(job.id, [])
            if job.callback and len(dead) < len(job.message_ids) and body not in bodies:
                self.wrongs["CALLBACKS WRONG"].append(f"{story}: {len(bodies)} accepted, none is the receipt")
        elif not dead:
            self.wrongs["LOST"].append(f"{story}: {self.describe(job)}")
        elif job.expect == "dead" or all(self.was_interrupted(job, message_id) for message_id in dead):
            self.rights["in DLQ rightly"] += 1
        else:
            self.wrongs["IN DLQ WRONGLY"].append(f"{story}: {self.describe(job)}")
        if job.expect != "dead":
            self.look_at_starts(job, story)
            self.measure_recovery(job)

    def look_at_receipt(self, job: Job, story: str, receipt: dict[str, Any]) -> None:
        """Is what the receipt says true?"""
        error = (receipt["error"] or {}).get("kind")
        if receipt["status"] == "succeeded":
            files = [output["s3_key"] for output in receipt["outputs"]]
            missing = [name for name in files if not self.objects.get(name)]
            ran = any(start.ending == "success" for start in self.starts[job.id])
            if job.expect != "succeeded" or not ran or missing or not files:
                self.wrongs["FALSELY DONE"].append(f"{story}: really run: {ran}, files {files}, missing {missing}")
            else:
                self.rights["succeeded"] += 1
        elif job.expect == "failed" and error in job.error_kinds:
            self.rights["failed rightly"] += 1
        else:
            self.wrongs["WRONGLY FAILED"].append(f"{story}: {error}: {receipt['error'].get('message')}")

    def look_at_starts(self, job: Job, story: str) -> None:
        """Every start after the first needs an explanation."""
        starts = self.starts[job.id]
        for number, start in enumerate(starts[1:], 1):
            reason = self.explain(job, starts[:number], start)
            if reason:
                self.explained[reason] += 1
            else:
                self.wrongs["UNEXPLAINED RE-RUNS"].append(f"{story}: start {number + 1} of {self.describe(job)}")

    def explain(self, job: Job, earlier: list[Start], start: Start) -> str | None:
        """Why a job was started once more, None where nothing explains it."""
        instance_id = self.soak.comfy_pids.get(start.pid)
        before = [delivery for delivery in self.deliveries[job.id] if delivery.at <= start.at and not delivery.lost]
        ours = [delivery for delivery in before if delivery.instance_id == instance_id]
        receipt_at = self.receipt_at(job)
        if not ours or ours[-1].at > receipt_at:
            return None
        same = [other for other in earlier if other.pid == start.pid]
        if same and same[-1].ending != "interrupted":
            # Out of memory is tried once more on the same machine, when ComfyUI has freed its own.
            return "out of memory" if job.kind == "short of memory" and same[-1].ending == "error" else None
        for delivery in before:
            fault = self.interruption(job, delivery, min(start.at, receipt_at))
            if fault is not None:
                return fault[1]
        if len({delivery.message_id for delivery in before}) > 1:
            return "sent twice"
        return None

    def interruption(self, job: Job, delivery: Delivery, limit: float = NEVER) -> tuple[float, str] | None:
        """When and how a fault took the message from the instance, before its next receive and the limit."""
        again = [d.at for d in self.deliveries[job.id] if d.message_id == delivery.message_id and d.at > delivery.at]
        faults = [
            (fault.at, fault.kind)
            for fault in self.soak.faults
            if fault.kind in INTERRUPTING
            and fault.instance_id == delivery.instance_id
            and fault.at <= min([limit, *again])
            and fault.until >= delivery.at
        ]
        return min(faults, default=None)

    def was_interrupted(self, job: Job, message_id: str) -> bool:
        """Whether a fault ended each receive of the message, or it came to an instance that was leaving already."""
        leaving_at = {f.instance_id: f.at for f in self.soak.faults if f.kind == "instance terminated"}
        receives = [delivery for delivery in self.deliveries[job.id] if delivery.message_id == message_id]
        return all(
            delivery.lost
            or self.interruption(job, delivery)
            or leaving_at.get(delivery.instance_id, NEVER) <= delivery.at
            for delivery in receives
        )

    def measure_recovery(self, job: Job) -> None:
        """How long a job that was interrupted took until its receipt: once for each receive."""
        receipt_at = self.receipt_at(job)
        for delivery in self.deliveries[job.id] if receipt_at < NEVER else []:
            fault = self.interruption(job, delivery, receipt_at)
            if fault is not None and fault[0] >= delivery.at:
                self.recovery_s.append(receipt_at - fault[0])

    def receipt_at(self, job: Job) -> float:
        """When the job's receipt was written."""
        written = self.cloud.receipts.get(job.id)
        return written[0].at if written else NEVER

    def look_for_strays(self) -> None:
        """Nobody may write outside the folders of jobs and instances."""
        folders = {job.id for job in self.soak.jobs} | set(self.cloud.machines) | {"object_info.json.gz"}
        for key in self.objects:
            top, _, rest = key.partition("/")
            if top not in ("models", "input") and not (top == "output" and rest.split("/")[0] in folders):
                self.wrongs["STRAY FILES"].append(key)
        if len([key for key in self.objects if key.startswith("models/")]) > 1:
            self.wrongs["STRAY FILES"].append("something was written below models/")

    def describe(self, job: Job) -> str:
        """All that is known of a job, in the order of time."""
        zero = self.soak.started
        story = [(d.at, f"{'lost' if d.lost else 'received'} by {d.instance_id}") for d in self.deliveries[job.id]]
        pids = self.soak.comfy_pids
        story += [(s.at, f"started by {pids.get(s.pid)}/{s.pid}: {s.ending}") for s in self.starts[job.id]]
        story += [(r.at, "receipt") for r in self.cloud.receipts.get(job.id, [])]
        instances = {delivery.instance_id for delivery in self.deliveries[job.id]}
        span = (min(at for at, _ in story) - 2, max(at for at, _ in story) + 1) if story else (0, 0)
        for fault in self.soak.faults:
            if fault.instance_id in instances and span[0] < fault.at < span[1]:
                story.append((fault.at, f"{fault.kind} {fault.instance_id}"))
        return "; ".join(f"{at - zero:.2f} {what}" for at, what in sorted(story))

    def print_table(self, seed: int) -> None:
        """The one table."""
        soak = self.soak
        copies = len(soak.order) - len(soak.jobs)

        def of(counter: Counter[str]) -> str:
            return ", ".join(f"{name} {number}" for name, number in counter.most_common()) or "none"

        seconds = [0.0, *self.recovery_s, 0.0] if len(self.recovery_s) < 2 else self.recovery_s
        cuts = statistics.quantiles(seconds, n=20, method="inclusive")
        errors, faults = self.cloud.errors, Counter(fault.kind for fault in soak.faults)
        rows = [("sent", f"{len(soak.jobs)} jobs, {copies} of them twice")]
        rows += [(name, str(self.rights[name])) for name in ("succeeded", "failed rightly", "in DLQ rightly")]
        rows += [(name, str(len(stories))) for name, stories in self.wrongs.items()]
        rows += [
            ("re-runs explained", f"{self.explained.total()} ({of(self.explained)})"),
            ("recovery", f"p50 {cuts[9]:.1f} s, p95 {cuts[18]:.1f} s, of {len(self.recovery_s)} interruptions"),
            ("duration", f"{soak.duration_s:.0f} s, {INSTANCES} instances at a time, {len(self.cloud.machines) - 1} in all"),
            ("faults", f"{faults.total()} ({of(faults)})"),
            ("AWS errors", f"{errors.total()} of {self.cloud.calls.total()} calls ({of(errors)})"),
            ("seed", str(seed)),
        ]  # fmt: skip
        for name, value in rows:
            print(f"{name:<20} {value}")
        for name, stories in self.wrongs.items():
            for story in stories[:10]:
                print(f"{name}: {story}")


# --- Start -------------------------------------------------------------------------------------------------


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
