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
from audit import Audit
from chaos import Delivery, Done, Receipt
from places import TESTS
from plan import ENDLESS, FAULTS, INSTANCES, KINDS, Job, plan_faults, plan_jobs
from workplace import Sample, await_that

LIMIT_S = 500
JOBS, JOBS_IN_FULL = 24, 300


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
        for name in ("LOST", "FALSELY DONE", "RECEIPTS CHANGED", "UNEXPLAINED RE-RUNS", "HEALTHY REPLACED"):
            assert re.search(rf"^{name} +0$", run.stdout, re.MULTILINE), told
        assert re.search(rf"^receipts per job +1 for {jobs} jobs$", run.stdout, re.MULTILINE), told
        ends = ("succeeded", "failed rightly", "gave up rightly")
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
        await_that("the instances run", lambda: run.poll() is not None or len(services()) >= 2 * INSTANCES)
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
    assert plan_jobs(1, 300) == plan_jobs(1, 300) != plan_jobs(2, 300)
    assert plan_faults(1, 300) == plan_faults(1, 300) != plan_faults(2, 300)


@pytest.mark.parametrize("count", [10, 60, 300, 5000])
def test_the_plan_has_so_many_jobs_and_every_kind(count: int) -> None:
    jobs = plan_jobs(3, count)
    assert len({id(job) for job in jobs}) == len({job.id for job in jobs}) == count
    kinds = {job.kind for job in jobs}
    if count >= 60:
        assert set(KINDS) <= kinds
        assert max(Counter(job.id for job in jobs).values()) == 2
    if count >= 300:
        assert {fault.kind for fault in plan_faults(3, count)} == set(FAULTS)


def test_jobs_that_end_comfyui_stand_far_from_each_other() -> None:
    places = [place for place, job in enumerate(plan_jobs(3, 5000)) if job.must.ends_comfyui]
    assert len(places) > 100
    assert min(third - first for first, third in zip(places, places[2:], strict=False)) > 10


# --- The audit: one job, and what is known of it ------------------------------------------------------------

A, B = "i-a", "i-b"


def audit_of(
    job: Job,
    *,
    error: str | None = None,
    receipt: bool = True,
    ledger: str = "1 start 11, 2 success 11",
    deliveries: list[Delivery] | None = None,
    faults: list[Done] | None = None,
    dead: bool = False,
    keys: tuple[str, ...] = (),
    receipts: int = 1,
    accepted: bytes | None = b"the receipt",
    unhealthy: float | None = None,
) -> Audit:
    """The audit of one job of which this is known. Process 11 is A's ComfyUI, 22 B's."""
    entries = [entry.split() for entry in ledger.split(", ") if entry]
    entries = [[*entry, job.id][:4] for entry in entries]
    lines = [
        json.dumps({
            "time": float(at), "event": event, "prompt_id": job_id, "pid": int(pid),
            "folder": f"/instances/{ {'11': A, '22': B}.get(pid, 'i-c') }/ComfyUI",
        })
        for at, event, pid, job_id in entries
    ]  # fmt: skip
    outputs = [{"s3_key": f"output/{job.id}/soak/x.png"}]
    said = (
        {"status": "failed", "error": {"kind": error, "message": ""}}
        if error
        else {"status": "succeeded", "error": None}
    )
    body = json.dumps({**said, "outputs": outputs}).encode()
    etag = hashlib.md5(body).hexdigest()
    read = SimpleNamespace(get_object=lambda **_: {"Body": SimpleNamespace(read=lambda: body)})
    heard = accepted and (job.callback or accepted != b"the receipt")
    cloud = SimpleNamespace(
        deliveries=deliveries or [Delivery(0.5, A, "m1", lost=False)],
        receipts={job.id: [Receipt(5.0 + n, etag) for n in range(receipts)]} if receipt else {},
        machines={},
        unhealthy=[(unhealthy, A)] if unhealthy else [],
    )
    known: Any = SimpleNamespace(
        cloud=cloud,
        jobs=[job],
        job_of=dict.fromkeys(job.message_ids, job.id),
        faults=faults or [],
        receiver=SimpleNamespace(
            accepted={job.id: [body if accepted == b"the receipt" else accepted]} if heard else {}
        ),
        s3=read,
        left=0,
        started=0.0,
        ledger=SimpleNamespace(read_text=lambda: "\n".join(lines)),
    )
    audit = Audit(known)
    objects = {f"output/{job.id}/result.json": 9, **dict.fromkeys(keys or [outputs[0]["s3_key"]], 9)}
    audit.read_bucket = lambda: objects if receipt else {}  # type: ignore[method-assign]
    audit.read_dlq = lambda: {"m1"} if dead else set()  # type: ignore[method-assign]
    audit.run()
    return audit


def lines_of(audit: Audit) -> dict[str, int]:
    """The table's lines that are not 0."""
    wrongs = {name: len(found) for name, found in audit.wrongs.items() if found}
    sick = {"sick replaced": audit.sick_replaced} if audit.sick_replaced else {}
    return dict(audit.rights) | wrongs | audit.explained | sick


def a_job(**changes: Any) -> Job:
    """A job that can succeed, sent once."""
    return Job(**{"id": "j", "kind": "image", "body": "", "message_ids": ["m1"], **changes})


TWICE = "1 start 11, 2 start 22, 3 success 22"
RECEIVED_TWICE = [Delivery(0.5, A, "m1", lost=False), Delivery(1.9, B, "m1", lost=False)]
KILLED = [Done(0.6, "worker killed", A, 0.6)]
THRICE = [Delivery(0.5 + n, A, "m1", lost=False) for n in range(3)]
DIED = "1.6 start 11 other, 1.8 died 11 other"
DIED_TWICE = "1 start 11, 2 died 11, 3 start 22, 4 died 22"
EACH = [Delivery(at, A, "m1", lost=False) for at in (0.5, 2.5, 4.5)]  # before each of those and one more
SENT_TWICE = [Delivery(0.5, A, "m1", lost=False), Delivery(1.9, B, "m2", lost=False)]


@pytest.mark.parametrize(
    ("job", "known", "lines"),
    [
        (a_job(), {}, {"succeeded": 1}),
        (a_job(), {"receipt": False, "ledger": ""}, {"LOST": 1}),
        (a_job(), {"receipt": False, "ledger": "", "dead": True, "faults": KILLED}, {"LOST": 1}),
        (a_job(), {"ledger": "1 start 11, 2 error 11"}, {"FALSELY DONE": 1}),
        (a_job(), {"keys": ("output/j/other.png",)}, {"FALSELY DONE": 1}),
        (a_job(kind="broken image"), {}, {"FALSELY DONE": 1}),
        (a_job(), {"error": "execution_error"}, {"WRONGLY FAILED": 1}),
        (a_job(kind="broken image"), {"error": "execution_error"}, {"failed rightly": 1}),
        (a_job(kind="missing model"), {"error": "execution_error"}, {"WRONGLY FAILED": 1}),
        # Given up: rightly so where a fault ended the last attempt, and the message is dead ...
        (a_job(), {"error": "gave_up", "dead": True, "faults": KILLED}, {"gave up rightly": 1, "in DLQ rightly": 1}),
        (a_job(), {"error": "gave_up", "faults": KILLED}, {"WRONGLY FAILED": 1}),
        (a_job(), {"error": "gave_up", "dead": True}, {"WRONGLY FAILED": 1, "IN DLQ WRONGLY": 1}),
        (a_job(), {"dead": True}, {"succeeded": 1, "IN DLQ WRONGLY": 1}),
        # also where its message came in the answer that a worker did not live to read, or was given back unbegun,
        *[
            (
                a_job(),
                {"error": "gave_up", "dead": True, "faults": [fault], "ledger": ""},
                {"gave up rightly": 1, "in DLQ rightly": 1},
            )
            for fault in (Done(0.45, "worker killed", A, 0.45), Done(0.6, "instance terminated", A, 0.6))
        ],
        (
            a_job(),
            {"error": "gave_up", "dead": True, "faults": [Done(0.45, "worker killed", B, 0.45)], "ledger": ""},
            {"WRONGLY FAILED": 1, "IN DLQ WRONGLY": 1},
        ),
        (
            a_job(kind="kills its workers"),
            {"error": "gave_up", "dead": True, "faults": KILLED, "ledger": ""},
            {"failed rightly": 1, "in DLQ rightly": 1},
        ),
        # ... and where we have ended ComfyUI under it, twice or at the last attempt.
        (a_job(), {"error": "comfyui_died"}, {"WRONGLY FAILED": 1}),
        (a_job(), {"error": "comfyui_died", "faults": [Done(0.6, "ComfyUI killed", A, 0.6)]}, {"WRONGLY FAILED": 1}),
        (
            a_job(),
            {"error": "comfyui_died", "faults": [Done(0.6, "ComfyUI killed", A, 0.6)], "dead": True},
            {"gave up rightly": 1, "in DLQ rightly": 1},
        ),
        (
            a_job(),
            {"error": "comfyui_died", "faults": 2 * [Done(0.6, "ComfyUI killed", A, 0.6)]},
            {"gave up rightly": 1},
        ),
        # A job that fails by itself: so often, and no oftener.
        (
            a_job(kind="ends ComfyUI"),
            {"error": "comfyui_died", "ledger": DIED_TWICE, "deliveries": EACH[:2]},
            {"failed rightly": 1},
        ),
        (
            a_job(kind="ends ComfyUI"),
            {"error": "comfyui_died", "ledger": f"{DIED_TWICE}, 5 start 33, 6 died 33", "deliveries": EACH},
            {"failed rightly": 1, "UNEXPLAINED RE-RUNS": 1},
        ),
        (
            a_job(kind="ends ComfyUI"),
            {"error": "comfyui_died", "ledger": f"{DIED_TWICE}, 5 start 33, 6 died 33", "deliveries": EACH[::2]},
            {"failed rightly": 1, "ComfyUI ended unheard": 1},
        ),
        (
            a_job(kind="out of memory"),
            {"error": "out_of_memory", "deliveries": THRICE, "dead": True},
            {"failed rightly": 1, "in DLQ rightly": 1},
        ),
        # Callbacks
        (a_job(callback=True), {}, {"succeeded": 1}),
        (a_job(callback=True), {"accepted": None}, {"succeeded": 1, "CALLBACKS WRONG": 1}),
        (a_job(callback=True), {"accepted": b"{}"}, {"succeeded": 1, "CALLBACKS WRONG": 1}),
        (a_job(), {"accepted": b"{}"}, {"succeeded": 1, "CALLBACKS WRONG": 1}),
        (
            a_job(callback=True),
            {"accepted": None, "error": "gave_up", "dead": True, "faults": KILLED},
            {"gave up rightly": 1, "in DLQ rightly": 1, "CALLBACKS WRONG": 1},
        ),
        (
            a_job(kind="callback refused", callback=True, refusals=ENDLESS),
            {"accepted": None, "deliveries": THRICE, "dead": True},
            {"succeeded": 1, "in DLQ rightly": 1},
        ),
        (a_job(kind="callback refused", callback=True, refusals=ENDLESS), {}, {"succeeded": 1, "CALLBACKS WRONG": 1}),
        # Instances: sick is one whose ComfyUI we have ended since it last ran a job to its end, at 2.
        (a_job(), {"unhealthy": 4.0}, {"succeeded": 1, "HEALTHY REPLACED": 1}),
        (
            a_job(),
            {"unhealthy": 4.0, "faults": [Done(3, "ComfyUI killed", A, 3)]},
            {"succeeded": 1, "sick replaced": 1},
        ),
        (
            a_job(),
            {"unhealthy": 4.0, "faults": [Done(1, "ComfyUI killed", A, 1)]},
            {"succeeded": 1, "HEALTHY REPLACED": 1},
        ),
        (
            a_job(),
            {"unhealthy": 4.0, "faults": [Done(3, "worker killed", A, 3)]},
            {"succeeded": 1, "HEALTHY REPLACED": 1},
        ),
        (a_job(), {"receipts": 2}, {"succeeded": 1, "RECEIPTS CHANGED": 1}),
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
        # ... or where a job behind it ended ComfyUI before its end was heard,
        (
            a_job(),
            {
                "ledger": f"1 start 11, 1.5 success 11, 2.2 start 22, 3 success 22, {DIED}",
                "deliveries": RECEIVED_TWICE,
            },
            {"succeeded": 1, "ComfyUI ended behind it": 1},
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
                Done(1.3, "worker killed", B, 1.3),
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
    assert lines_of(audit_of(job, **known)) == lines


def test_the_audit_measures_how_long_the_dead_wait() -> None:
    audit = audit_of(a_job(), error="gave_up", dead=True, faults=KILLED)
    assert audit.answers_s == {"killed": [pytest.approx(5.0 - 0.6)], "died": []}
    audit = audit_of(a_job(kind="ends ComfyUI"), error="comfyui_died", ledger=DIED_TWICE)
    assert audit.answers_s == {"killed": [], "died": [pytest.approx(5.0 - 4.0)]}
