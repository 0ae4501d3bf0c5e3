"""The chaos run of soak.sh, and that its audit sees what is wrong."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import soak
from places import TESTS
from soak import Audit, Delivery, Done, Job, Receipt
from workplace import Sample, await_that

LIMIT_S = 500
JOBS, JOBS_IN_FULL = 60, 300


@pytest.mark.slow
def test_jobs_survive_the_faults(sample: Sample, request: pytest.FixtureRequest) -> None:
    jobs = JOBS_IN_FULL if request.config.option.full else JOBS
    for seed in sample(range(1, 4), 1):
        run = subprocess.run(
            [sys.executable, TESTS / "soak/soak.py", str(jobs), str(seed)],
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
        told = run.stdout + run.stderr
        assert run.returncode == 0, told
        for name in ("LOST", "FALSELY DONE", "RECEIPTS CHANGED", "UNEXPLAINED RE-RUNS"):
            assert re.search(rf"^{name} +0$", run.stdout, re.MULTILINE), told
        ends = ("succeeded", "failed rightly", "in DLQ rightly")
        counted = [re.search(rf"^{name} +(\d+)$", run.stdout, re.MULTILINE) for name in ends]
        assert sum(int(count[1]) for count in counted if count) == jobs, told


@pytest.mark.slow
def test_a_signal_ends_everything_it_started(sample: Sample, tmp_path: Path) -> None:
    for number in sample((signal.SIGTERM, signal.SIGINT), 1):
        check_that_a_signal_ends_everything(number, tmp_path)


def check_that_a_signal_ends_everything(number: signal.Signals, tmp_path: Path) -> None:
    environment = os.environ | {"TMPDIR": str(tmp_path)}

    def services() -> list[str]:
        mark = f"COMFY_HOME={tmp_path}".encode()
        return [path.parent.name for path in Path("/proc").glob("[0-9]*/environ") if mark in read(path)]

    run = subprocess.Popen(
        [sys.executable, TESTS / "soak/soak.py", "50", "1"],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        await_that("the instances run", lambda: run.poll() is not None or len(services()) >= 2 * soak.INSTANCES)
        run.send_signal(number)
        assert run.wait(LIMIT_S) == 128 + number
    finally:
        run.kill()
    await_that("everything has ended", lambda: not services())


def read(path: Path) -> bytes:
    """What is in a file of /proc, as long as it is there."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["many"], "'many' is not a number"),
        (["300", "1", "2"], "too many arguments"),
        (["9"], "JOBS=9 is too few"),
        (["--fast"], "'--fast' is not a number"),
    ],
)
def test_wrong_arguments_are_refused(arguments: list[str], said: str) -> None:
    run = subprocess.run([TESTS / "soak.sh", *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert (run.returncode, run.stdout) == (1, "")
    assert said in run.stderr


def test_help_is_printed() -> None:
    run = subprocess.run([TESTS / "soak.sh", "--help"], capture_output=True, text=True, timeout=60, check=True)
    assert "Usage: tests/soak.sh [JOBS] [SEED]" in run.stdout


def test_the_seed_decides_everything() -> None:
    assert soak.plan_jobs(1, 300) == soak.plan_jobs(1, 300) != soak.plan_jobs(2, 300)
    assert soak.plan_faults(1, 300) == soak.plan_faults(1, 300) != soak.plan_faults(2, 300)


@pytest.mark.parametrize("count", [10, 300, 5000])
def test_the_plan_has_so_many_jobs_and_every_kind(count: int) -> None:
    jobs = soak.plan_jobs(3, count)
    assert len({id(job) for job in jobs}) == len({job.id for job in jobs}) == count
    kinds = {job.kind for job in jobs}
    assert "StandinCrash" in kinds
    if count >= 300:
        assert set(soak.KINDS) <= kinds
        assert max(Counter(job.id for job in jobs).values()) == 2
        assert {fault.kind for fault in soak.plan_faults(3, count)} == set(soak.FAULTS)


# --- The audit: one job, and what is known of it ------------------------------------------------------------

A, B = "i-a", "i-b"


def audit_of(
    job: Job,
    *,
    status: str | None = "succeeded",
    ledger: str = "1 start 11, 2 success 11",
    deliveries: list[Delivery] | None = None,
    faults: list[Done] | None = None,
    dead: bool = False,
    keys: tuple[str, ...] = (),
    receipts: int = 1,
    accepted: bool = True,
) -> dict[str, Any]:
    """The table's lines that are not 0, for one job of which this is known. Process 11 is A's ComfyUI, 22 B's."""
    entries = [entry.split() for entry in ledger.split(", ") if entry]
    lines = [json.dumps({"time": float(at), "event": event, "prompt_id": job.id, "pid": int(pid)}) for at, event, pid in entries]  # fmt: skip
    outputs = [{"s3_key": f"output/{job.id}/soak/x.png"}]
    error = None if status == "succeeded" else {"kind": "execution_error", "message": ""}
    body = json.dumps({"status": status, "error": error, "outputs": outputs}).encode()
    etag = hashlib.md5(body).hexdigest()
    read = SimpleNamespace(get_object=lambda **_: {"Body": SimpleNamespace(read=lambda: body)})
    cloud = SimpleNamespace(
        deliveries=deliveries or [Delivery(0.5, A, "m1", lost=False)],
        receipts={job.id: [Receipt(5.0 + n, etag) for n in range(receipts)]} if status else {},
        machines={},
    )
    known: Any = SimpleNamespace(
        cloud=cloud,
        jobs=[job],
        job_of=dict.fromkeys(job.message_ids, job.id),
        comfy_pids={11: A, 22: B},
        faults=faults or [],
        receiver=SimpleNamespace(accepted={job.id: [body]} if accepted else {}),
        s3=read,
        left=0,
        started=0.0,
        ledger=SimpleNamespace(read_text=lambda: "\n".join(lines)),
    )
    audit = Audit(known)
    objects = {f"output/{job.id}/result.json": 9, **dict.fromkeys(keys or [outputs[0]["s3_key"]], 9)}
    audit.read_bucket = lambda: objects if status else {}  # type: ignore[method-assign]
    audit.read_dlq = lambda: {"m1"} if dead else set()  # type: ignore[method-assign]
    audit.run()
    return dict(audit.rights) | {name: len(found) for name, found in audit.wrongs.items() if found} | audit.explained


def a_job(**changes: Any) -> Job:
    """A job that can succeed, sent once."""
    return Job(**{"id": "j", "kind": "image", "body": "", "expect": "succeeded", "message_ids": ["m1"], **changes})


TWICE = "1 start 11, 2 start 22, 3 success 22"
RECEIVED_TWICE = [Delivery(0.5, A, "m1", lost=False), Delivery(1.9, B, "m1", lost=False)]
SENT_TWICE = [Delivery(0.5, A, "m1", lost=False), Delivery(1.9, B, "m2", lost=False)]


@pytest.mark.parametrize(
    ("job", "known", "lines"),
    [
        (a_job(), {}, {"succeeded": 1}),
        (a_job(), {"status": None, "ledger": ""}, {"LOST": 1}),
        (a_job(), {"ledger": "1 start 11, 2 error 11"}, {"FALSELY DONE": 1}),
        (a_job(), {"keys": ("output/j/other.png",)}, {"FALSELY DONE": 1}),
        (a_job(expect="failed"), {}, {"FALSELY DONE": 1}),
        (a_job(expect="dead"), {}, {"FALSELY DONE": 1}),
        (a_job(), {"status": "failed"}, {"WRONGLY FAILED": 1}),
        (a_job(expect="failed", error_kinds=("execution_error",)), {"status": "failed"}, {"failed rightly": 1}),
        (a_job(expect="failed", error_kinds=("invalid_workflow",)), {"status": "failed"}, {"WRONGLY FAILED": 1}),
        (a_job(expect="dead"), {"status": None, "dead": True}, {"in DLQ rightly": 1}),
        (a_job(), {"status": None, "dead": True}, {"IN DLQ WRONGLY": 1}),
        (
            a_job(),
            {"status": None, "dead": True, "faults": [Done(0.6, "worker killed", A, 0.6)]},
            {"in DLQ rightly": 1},
        ),
        (a_job(), {"receipts": 2}, {"succeeded": 1, "RECEIPTS CHANGED": 1}),
        (a_job(callback=True), {"accepted": False}, {"succeeded": 1, "CALLBACKS WRONG": 1}),
        (a_job(), {"keys": ("output/j/soak/x.png", "elsewhere/x")}, {"succeeded": 1, "STRAY FILES": 1}),
        # Started again: rightly so after a fault that took the message away, or where it was sent twice ...
        (
            a_job(),
            {"ledger": TWICE, "deliveries": RECEIVED_TWICE, "faults": [Done(1.5, "worker killed", A, 1.5)]},
            {"succeeded": 1, "worker killed": 1},
        ),
        (
            a_job(message_ids=["m1", "m2"]),
            {"ledger": TWICE, "deliveries": SENT_TWICE},
            {"succeeded": 1, "sent twice": 1},
        ),
        # ... but not without one, after one of another instance, one too late, or a harmless one,
        (a_job(), {"ledger": TWICE, "deliveries": RECEIVED_TWICE}, {"succeeded": 1, "UNEXPLAINED RE-RUNS": 1}),
        *[
            (
                a_job(),
                {"ledger": TWICE, "deliveries": RECEIVED_TWICE, "faults": [fault]},
                {"succeeded": 1, "UNEXPLAINED RE-RUNS": 1},
            )
            for fault in (
                Done(1.5, "worker killed", B, 1.5),
                Done(1.95, "worker killed", A, 1.95),
                Done(1.5, "sockets cut", A, 1.5),
                Done(1.5, "instance terminated", A, 1.5),
            )
        ],
        # nor in a ComfyUI that has the job already, nor on a message that came when the receipt stood.
        (
            a_job(),
            {"ledger": "1 start 11, 2 success 11, 3 start 11", "faults": [Done(1.5, "worker killed", A, 1.5)]},
            {"succeeded": 1, "UNEXPLAINED RE-RUNS": 1},
        ),
        (
            a_job(message_ids=["m1", "m2"]),
            {
                "ledger": "1 start 11, 2 success 11, 7 start 22",
                "deliveries": [Delivery(0.5, A, "m1", lost=False), Delivery(6.5, B, "m2", lost=False)],
            },
            {"succeeded": 1, "UNEXPLAINED RE-RUNS": 1},
        ),
    ],
)
def test_the_audit_sees(job: Job, known: dict[str, Any], lines: dict[str, int]) -> None:
    assert audit_of(job, **known) == lines
