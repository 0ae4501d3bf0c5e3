"""The audit: what was promised, held against what was done."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from chaos import BUCKET, QUEUE, Delivery, Done
from local_cloud import ACCOUNT_ID, REGION
from moto.backends import get_backend
from plan import ENDLESS, INSTANCES, Job

if TYPE_CHECKING:
    from soak import Soak

KILLS = ("worker killed", "instance killed")  # after which nobody says a word of the job
ANSWERED_S = 0.5
"""So long after a worker was killed a message may still come to it, in the answer that is on its way."""
INTERRUPTING = (*KILLS, "ComfyUI killed", "worker stopped", "AWS outage", "worker frozen", "spot notice")
NEVER = float("inf")


class Start(NamedTuple):
    """A run that ComfyUI began, from the ledger."""

    at: float
    process: str  # its instance and its process id, which another instance's ComfyUI may get later
    ending: str | None  # success, error, interrupted, died (by itself); None where the process was killed
    ended_at: float = NEVER


WRONGS = ("LOST", "FALSELY DONE", "RECEIPTS CHANGED", "UNEXPLAINED RE-RUNS", "WRONGLY FAILED", "IN DLQ WRONGLY",
          "CALLBACKS WRONG", "HEALTHY REPLACED", "STRAY FILES", "STILL IN QUEUE")  # fmt: skip


class Audit:
    """Compares what was promised with what was done."""

    def __init__(self, soak: Soak) -> None:
        self.soak = soak
        self.cloud = soak.cloud
        self.rights = Counter[str]()
        self.wrongs: dict[str, list[str]] = {name: [] for name in WRONGS}
        self.explained = Counter[str]()
        self.recovery_s: list[float] = []
        self.answers_s: dict[str, list[float]] = {
            "killed": [],
            "died": [],
        }  # from the last attempt's death to the receipt
        self.sick_replaced = 0
        self.deliveries: dict[str, list[Delivery]] = defaultdict(list)
        for delivery in self.cloud.deliveries:
            self.deliveries[soak.job_of[delivery.message_id]].append(delivery)
        self.objects: dict[str, int] = {}
        self.dead: set[str] = set()
        self.starts: dict[str, list[Start]] = {}
        self.died_at: dict[str, float] = {}  # when a job ended the process of a ComfyUI

    def run(self) -> None:
        """Read what is there, and look at every job."""
        self.objects, self.dead, self.starts = self.read_bucket(), self.read_dlq(), self.read_ledger()
        for job in self.soak.jobs:
            self.look_at(job)
        self.look_for_replaced()
        self.look_for_strays()
        self.wrongs["STILL IN QUEUE"] += ["a message"] * self.soak.left

    def read_bucket(self) -> dict[str, int]:
        """Every key of the bucket and its size."""
        pages = self.soak.s3.get_paginator("list_objects_v2").paginate(Bucket=BUCKET)
        return {item["Key"]: item["Size"] for page in pages for item in page.get("Contents", [])}

    def read_dlq(self) -> set[str]:
        """The ids of the messages in the dead-letter queue, also of those that a worker looks at."""
        return {message.id for message in get_backend("sqs")[ACCOUNT_ID][REGION].queues[f"{QUEUE}-dlq"]._messages}

    def read_ledger(self) -> dict[str, list[Start]]:
        """What ComfyUI really ran."""
        starts: dict[str, list[Start]] = defaultdict(list)
        for line in self.soak.ledger.read_text().splitlines():
            entry = json.loads(line)
            runs = starts[entry["prompt_id"]]
            process = f"{Path(entry['folder']).parent.name}/{entry['pid']}"
            if entry["event"] == "start":
                runs.append(Start(entry["time"], process, None))
                continue
            for place, run in enumerate(runs):
                if run.process == process and run.ending is None:
                    runs[place] = run._replace(ending=entry["event"], ended_at=entry["time"])
            if entry["event"] == "died":
                self.died_at[process] = entry["time"]
        return starts

    def look_at(self, job: Job) -> None:
        """Find the job's place in the table, and check its callback, its message and its re-runs."""
        story = f"{job.id} ({job.kind})"
        key = f"output/{job.id}/result.json"
        if key not in self.objects:
            self.wrongs["LOST"].append(f"{story}: {self.describe(job)}")
            return
        body = self.soak.s3.get_object(Bucket=BUCKET, Key=key)["Body"].read()
        receipt = json.loads(body)
        self.look_at_receipt(job, story, receipt)
        written = self.cloud.receipts.get(job.id, [])
        if len(written) != 1 or written[0].etag.strip('"') != hashlib.md5(body).hexdigest():
            self.wrongs["RECEIPTS CHANGED"].append(f"{story}: written {len(written)} times")
        self.look_at_callbacks(job, story, body)
        dead = self.dead_messages(job)
        if dead:
            if all(self.may_be_dead(job, message_id) for message_id in dead):
                self.rights["in DLQ rightly"] += 1
            else:
                self.wrongs["IN DLQ WRONGLY"].append(f"{story}: {self.describe(job)}")
        self.look_at_starts(job, story)
        if not job.own_failures and job.kill_after_s is None:
            self.measure_recovery(job)
        self.measure_answer(job, (receipt["error"] or {}).get("kind"))

    def look_at_receipt(self, job: Job, story: str, receipt: dict[str, Any]) -> None:
        """Is what the receipt says true?"""
        error = (receipt["error"] or {}).get("kind")
        if receipt["status"] == "succeeded":
            files = [output["s3_key"] for output in receipt["outputs"]]
            missing = [name for name in files if not self.objects.get(name)]
            ran = any(start.ending == "success" for start in self.starts[job.id])
            if job.must.expect != "succeeded" or not ran or missing or not files:
                self.wrongs["FALSELY DONE"].append(f"{story}: really run: {ran}, files {files}, missing {missing}")
            else:
                self.rights["succeeded"] += 1
        elif error in job.must.error_kinds:
            self.rights["failed rightly"] += 1
        elif self.is_excused(job, error):
            self.rights["gave up rightly"] += 1
        else:
            what = f"{error}: {receipt['error'].get('message')}"
            self.wrongs["WRONGLY FAILED"].append(f"{story}: {what}; {self.describe(job)}")

    def is_excused(self, job: Job, error: str | None) -> bool:
        """Whether faults alone have brought a job to this error."""
        dead = [message_id for message_id in self.dead_messages(job) if self.may_be_dead(job, message_id)]
        if error == "gave_up":
            return any(self.excuse(job, self.receives(job, message_id)[-1]) for message_id in dead)
        if error == "comfyui_died":
            kills = [fault.kind for d in self.deliveries[job.id] for fault in self.faults_during(job, d)]
            deaths = kills.count("ComfyUI killed") + (job.must.own_failures if job.must.ends_comfyui else 0)
            return deaths >= (1 if dead else 2)
        return False

    def look_at_callbacks(self, job: Job, story: str, receipt: bytes) -> None:
        """Whoever is called gets the receipt and nothing else."""
        bodies = self.soak.receiver.accepted.get(job.id, [])
        is_due = job.callback and job.refusals < ENDLESS
        if set(bodies) != ({receipt} if is_due else set()):
            self.wrongs["CALLBACKS WRONG"].append(f"{story}: {len(bodies)} accepted, {bodies.count(receipt)} of them the receipt")  # fmt: skip

    def look_at_starts(self, job: Job, story: str) -> None:
        """Every start after the first needs an explanation, those of a job that fails by itself but a count."""
        starts = self.starts[job.id]
        if job.must.own_failures:
            faults = [fault for delivery in self.deliveries[job.id] for fault in self.faults_during(job, delivery)]
            times = 2 if job.kind == "out of memory" else 1  # which is tried once more on freed memory
            # Where a job ends ComfyUI, the one before, whose end was not heard any more, may be taken for it; and one
            # that waits for its turn, also to be tried on freed memory, is handed to the next ComfyUI anew.
            unheard = sum(
                first.process in self.died_at
                and first.process != second.process
                and not any(first.at < d.at <= second.at for d in self.deliveries[job.id])
                for first, second in pairwise(starts)
            )
            self.explained.update({"ComfyUI ended unheard": unheard} if unheard else {})
            may = times * (job.must.own_failures + len(faults) + unheard) + (job.must.expect == "succeeded")
            if len(starts) > may:
                self.wrongs["UNEXPLAINED RE-RUNS"].append(f"{story}: {self.describe(job)}")
            return
        for number, start in enumerate(starts[1:], 1):
            reason = self.explain(job, starts[:number], start)
            if reason:
                self.explained[reason] += 1
            else:
                self.wrongs["UNEXPLAINED RE-RUNS"].append(f"{story}: start {number + 1} of {self.describe(job)}")

    def explain(self, job: Job, earlier: list[Start], start: Start) -> str | None:
        """Why a job was started once more, None where nothing explains it."""
        instance_id, _, _ = start.process.partition("/")
        before = [delivery for delivery in self.deliveries[job.id] if delivery.at <= start.at and not delivery.lost]
        ours = [delivery for delivery in before if delivery.instance_id == instance_id]
        receipt_at = self.receipt_at(job)
        if not ours or ours[-1].at > receipt_at:
            return None
        same = [other for other in earlier if other.process == start.process]
        if same and same[-1].ending != "interrupted":
            # Out of memory is tried once more on the same machine, when ComfyUI has freed its own.
            return "out of memory" if job.kind == "short of memory" and same[-1].ending == "error" else None
        if (last := earlier[-1]).ending in ("success", "error") and 0 <= self.died_at.get(
            last.process, NEVER
        ) - last.ended_at < 1:
            return "ComfyUI ended behind it"  # and its end was not heard any more
        for delivery in before:
            fault = self.interruption(job, delivery, min(start.at, receipt_at))
            if fault is not None:
                return fault[1]
        if len({delivery.message_id for delivery in before}) > 1:
            return "sent twice"
        return None

    def interruption(self, job: Job, delivery: Delivery, limit: float = NEVER) -> tuple[float, str] | None:
        """When and how a fault took the message from the instance, before its next receive and the limit."""
        faults = [(fault.at, fault.kind) for fault in self.faults_during(job, delivery) if fault.at <= limit]
        return min(faults, default=None)

    def faults_during(self, job: Job, delivery: Delivery) -> list[Done]:
        """The faults that can have taken the message from the instance, before its next receive."""
        return [
            fault
            for fault in self.soak.faults
            if fault.kind in INTERRUPTING
            and fault.instance_id == delivery.instance_id
            and fault.at <= self.received_again_at(job, delivery)
            and fault.until + (ANSWERED_S if fault.kind in KILLS else 0) >= delivery.at
        ]

    def dead_messages(self, job: Job) -> list[str]:
        """The job's messages that are in the dead-letter queue."""
        return [message_id for message_id in job.message_ids if message_id in self.dead]

    def receives(self, job: Job, message_id: str) -> list[Delivery]:
        """When the message was received, by whom."""
        return [delivery for delivery in self.deliveries[job.id] if delivery.message_id == message_id]

    def received_again_at(self, job: Job, delivery: Delivery) -> float:
        """When the message was received the next time."""
        return min((d.at for d in self.receives(job, delivery.message_id) if d.at > delivery.at), default=NEVER)

    def excuse(self, job: Job, delivery: Delivery) -> bool:
        """Whether a fault ended the receive, or the instance was leaving, which gives back what it has not begun."""
        leaving_at = {f.instance_id: f.at for f in self.soak.faults if f.kind == "instance terminated"}
        is_leaving = leaving_at.get(delivery.instance_id, NEVER) < self.received_again_at(job, delivery)
        return delivery.lost or self.interruption(job, delivery) is not None or is_leaving

    def may_be_dead(self, job: Job, message_id: str) -> bool:
        """Whether each receive of the message came to nothing, by a fault or by what the job itself does."""
        unexcused = [delivery for delivery in self.receives(job, message_id) if not self.excuse(job, delivery)]
        return len(unexcused) <= job.own_failures

    def measure_recovery(self, job: Job) -> None:
        """How long a job that was interrupted took until its receipt: once for each receive."""
        receipt_at = self.receipt_at(job)
        for delivery in self.deliveries[job.id] if receipt_at < NEVER else []:
            fault = self.interruption(job, delivery, receipt_at)
            if fault is not None and fault[0] >= delivery.at:
                self.recovery_s.append(receipt_at - fault[0])

    def measure_answer(self, job: Job, error: str | None) -> None:
        """How long a job whose last attempt died waited for its receipt."""
        last = self.deliveries[job.id][-1]
        kills = [fault.at for fault in self.faults_during(job, last) if fault.kind in KILLS]
        died = [start.ended_at for start in self.starts[job.id] if start.ending == "died"]
        if self.dead_messages(job) and kills and min(kills) < self.receipt_at(job):
            self.answers_s["killed"].append(self.receipt_at(job) - min(kills))
        elif error == "comfyui_died" and died:
            self.answers_s["died"].append(self.receipt_at(job) - max(died))

    def receipt_at(self, job: Job) -> float:
        """When the job's receipt was written."""
        written = self.cloud.receipts.get(job.id)
        return written[0].at if written else NEVER

    def look_for_replaced(self) -> None:
        """An instance may be declared Unhealthy where we have ended its ComfyUI since that ran a job to its end."""
        for at, instance_id in self.cloud.unhealthy:
            runs = [
                start
                for starts in self.starts.values()
                for start in starts
                if start.process.startswith(f"{instance_id}/")
            ]
            well_at = max(
                (run.ended_at for run in runs if run.ending == "success" and run.ended_at < at), default=0.0
            )
            ours = [
                fault for fault in self.soak.faults if fault.instance_id == instance_id and well_at < fault.at < at
            ]
            if any(fault.kind == "ComfyUI killed" for fault in ours):
                self.sick_replaced += 1
            else:
                self.wrongs["HEALTHY REPLACED"].append(f"{instance_id} at {at - self.soak.started:.2f}")

    def look_for_strays(self) -> None:
        """Nobody may write outside the folders of jobs and instances."""
        folders = {job.id for job in self.soak.jobs} | set(self.cloud.machines) | {"object_info.json.gz"}
        for key in self.objects:
            top, _, rest = key.partition("/")
            first = rest.split("/")[0]
            is_known = (top == "output" and first in folders) or (top, first) == ("editor", "of-instances")
            if top not in ("models", "input") and not is_known:
                self.wrongs["STRAY FILES"].append(key)
        if len([key for key in self.objects if key.startswith("models/")]) > 1:
            self.wrongs["STRAY FILES"].append("something was written below models/")

    def describe(self, job: Job) -> str:
        """All that is known of a job, in the order of time."""
        zero = self.soak.started
        story = [(d.at, f"{'lost' if d.lost else 'received'} by {d.instance_id}") for d in self.deliveries[job.id]]
        story += [(s.at, f"started by {s.process}: {s.ending}") for s in self.starts[job.id]]
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

        def seconds(values: list[float]) -> str:
            if not values:
                return "of none"
            p50, p95, most = (sorted(values)[int(share * (len(values) - 1))] for share in (0.5, 0.95, 1))
            return f"p50 {p50:.1f} s, p95 {p95:.1f} s, max {most:.1f} s, of {len(values)}"

        errors, faults = self.cloud.errors, Counter(fault.kind for fault in soak.faults)
        receipts = Counter(len(self.cloud.receipts.get(job.id, [])) for job in soak.jobs)
        rows = [("sent", f"{len(soak.jobs)} jobs, {copies} of them twice")]
        rows += [(name, str(self.rights[name])) for name in ("succeeded", "failed rightly", "gave up rightly")]
        rows += [("receipts per job", ", ".join(f"{count} for {jobs} jobs" for count, jobs in receipts.items()))]
        rows += [("in DLQ rightly", str(self.rights["in DLQ rightly"]))]
        rows += [(name, str(len(stories))) for name, stories in self.wrongs.items()]
        rows += [
            ("sick replaced", str(self.sick_replaced)),
            ("re-runs explained", f"{self.explained.total()} ({of(self.explained)})"),
            ("recovery", f"{seconds(self.recovery_s)}"),
            ("killed to answer", f"{seconds(self.answers_s['killed'])}"),
            ("died to answer", f"{seconds(self.answers_s['died'])}"),
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
