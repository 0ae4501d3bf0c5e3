"""What the chaos run plans by its seed alone: the jobs, how each must end, and the faults."""

from __future__ import annotations

import json
import random
import uuid
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from places import ROOT

INSTANCES = 3
JOBS_PER_FAULT = 10
ENDLESS = 10**9


class Kind(NamedTuple):
    """A kind of job: how often it comes, and what must become of it."""

    share: float
    expect: str  # what the receipt says: succeeded or failed
    error_kinds: tuple[str, ...] = ()
    own_failures: int = 0  # so many attempts come to nothing without any fault of ours
    ends_comfyui: bool = False


KINDS = {
    "image": Kind(60, "succeeded"),
    "sampler": Kind(8, "succeeded"),
    "bare workflow": Kind(6, "succeeded"),
    "large": Kind(3, "succeeded"),
    "dropped branch": Kind(3, "succeeded"),
    "short of memory": Kind(2, "succeeded"),
    "broken image": Kind(4, "failed", ("execution_error",)),
    "missing model": Kind(4, "failed", ("invalid_workflow",)),
    "command": Kind(3, "failed", ("command_refused",)),
    "climbing prefix": Kind(1, "failed", ("invalid_workflow", "invalid_message")),
    "UI format": Kind(1, "failed", ("invalid_workflow", "invalid_message")),
    "not JSON": Kind(1, "failed", ("invalid_message",)),
    "climbing id": Kind(1, "failed", ("invalid_message",)),
    "list": Kind(1, "failed", ("invalid_message",)),
    "deep": Kind(1, "failed", ("invalid_message",)),
    "ends ComfyUI at once": Kind(1, "failed", ("comfyui_died",), 2, ends_comfyui=True),
    "ends ComfyUI": Kind(1, "failed", ("comfyui_died",), 2, ends_comfyui=True),
    "ends ComfyUI once": Kind(1, "succeeded", (), 1, ends_comfyui=True),
    "hangs ComfyUI": Kind(0.5, "failed", ("comfyui_died", "timeout"), 2, ends_comfyui=True),
    "out of memory": Kind(1, "failed", ("out_of_memory",), 3),
    "callback refused": Kind(1, "succeeded", (), 3),
    # Taken over from a killed worker it is silent for longer than STALL_TIMEOUT.
    "kills its workers": Kind(1, "failed", ("gave_up", "comfyui_died")),
    "kills its workers, not JSON": Kind(0.5, "failed", ("invalid_message",)),
}
WITHOUT_ID = ("bare workflow", "not JSON", "climbing id", "list", "deep", "kills its workers, not JSON")
COMING_AGAIN = ("out of memory", "callback refused", "kills its workers", "kills its workers, not JSON")
"""To be received thrice takes half a minute."""

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


@dataclass
class Job:
    """One job to send, and what must become of it."""

    id: str  # where the message carries none, the message's own id as soon as it is sent
    kind: str
    body: str
    callback: bool = False
    refusals: int = 0  # how often its callback is refused
    large: str | None = None  # a workflow that travels by the bucket
    kill_after_s: float | None = None  # each receive of it ends its worker: at 0 the message does not even arrive
    message_ids: list[str] = field(default_factory=list)

    @property
    def must(self) -> Kind:
        """What must become of it."""
        return KINDS[self.kind]

    @property
    def own_failures(self) -> int:
        """So many attempts may come to nothing without any fault; a callback is tried three times in each."""
        return max(self.must.own_failures, min(3, self.refusals // 3))


class PlannedFault(NamedTuple):
    """What happens after so many receipts, to which of the instances that live then."""

    after: int
    kind: str
    rank: int
    seconds: float
    mid_job: bool  # wait for an instance that has a job in hand


def plan_jobs(seed: int, count: int) -> list[Job]:
    """The jobs in the order they are sent. A job that is in the list twice is sent twice."""
    chance = random.Random(f"jobs {seed}")
    each = list(KINDS)
    if len(each) > count // 2:
        each = chance.sample(each, count // 2)
    shares = [kind.share for kind in KINDS.values()]
    kinds = each + chance.choices(list(KINDS), shares, k=count - len(each))
    chance.shuffle(kinds)
    jobs = [make_job(chance, kind) for kind in spread(chance, kinds)]
    order = [(float(place), job) for place, job in enumerate(jobs)]
    for place, job in enumerate(jobs):
        if job.must.expect == "succeeded" and job.kind not in WITHOUT_ID and chance.random() < 0.1:
            order.append((place + chance.uniform(0, 30), job))
    return [job for _, job in sorted(order, key=lambda item: item[0])]


def spread(chance: random.Random, kinds: list[str]) -> list[str]:
    """The same, with those that end ComfyUI far from each other, and early those that come again and again.

    Three in a row at which ComfyUI ends are a reason to replace the instance; here no healthy one is to be replaced.
    """
    ending = [kind for kind in kinds if KINDS[kind].ends_comfyui]
    coming = [kind for kind in kinds if kind in COMING_AGAIN]
    mixed = [kind for kind in kinds if kind not in (*ending, *coming)]
    for kind in coming:
        mixed.insert(chance.randrange(1 + len(kinds) // 2), kind)
    apart = len(kinds) / max(1, len(ending))
    for number, kind in enumerate(ending):
        mixed.insert(int(number * apart + chance.uniform(0, apart / 2)), kind)
    return mixed


def make_job(chance: random.Random, kind: str) -> Job:
    """A job of this kind."""
    job = Job(str(uuid.UUID(int=chance.getrandbits(128), version=4)), kind, "")
    job.callback = kind == "callback refused" or (kind not in WITHOUT_ID and chance.random() < 0.3)
    job.refusals = chance.choice([0, 0, 0, 1, 1, 2, 3]) if job.callback else 0
    message = make_message(chance, job)
    if kind == "callback refused":
        job.refusals = ENDLESS
    if kind == "kills its workers":
        job.kill_after_s = chance.choice([0.0, 0.2, 0.5, 1.5])
    if kind == "kills its workers, not JSON":
        job.kill_after_s = 0.0
    if job.callback:
        message["callback_url"] = f"@CALLBACK@/{job.id}"
    unreadable = {"not JSON": "{not JSON", "list": "[1, 2]", "deep": "[" * 100_000}
    unreadable["kills its workers, not JSON"] = f"{{not JSON {job.id}"
    job.body = unreadable.get(kind) or json.dumps(message)
    return job


def make_message(chance: random.Random, job: Job) -> Any:
    """What a job of its kind asks for."""
    kind = job.kind
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
        workflow["2"] = standin("OutOfMemory", times=1)
    elif kind == "out of memory":
        workflow["2"] = standin("OutOfMemory")
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
    elif kind == "ends ComfyUI at once":
        workflow["2"] = standin("Crash", seconds=0.0)
    elif kind == "ends ComfyUI":
        workflow["2"] = standin("Crash", seconds=chance.uniform(0.2, 1.5))
    elif kind == "ends ComfyUI once":
        workflow["2"] = standin("Crash", seconds=chance.choice([0.0, 0.5]), once=f"@FOLDER@/once-{job.id}")
    elif kind == "hangs ComfyUI":
        workflow["2"] = standin("DeadExecutor")
    elif kind == "kills its workers":
        workflow["2"]["inputs"]["seconds"] = 10.0  # it never comes to its end, so nobody finds it in the history
    return message


def standin(node: str, **inputs: Any) -> dict[str, Any]:
    """One of the stand-in's own nodes behind the image."""
    return {"class_type": f"Standin{node}", "inputs": {"image": ["1", 0], **inputs}}


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
