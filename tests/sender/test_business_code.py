"""send_job.py as business code imports it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable

import pytest
from places import ROOT
from sender_tools import receipt, store, store_progress
from workplace import Site, image_workflow

import send_job
from comfy_utils import (
    InvalidMessageError,
    new_job_id,
)


def test_importing_it_imports_nothing_of_aws_nor_of_the_command_line() -> None:
    slow = ("boto3", "botocore", "requests", "websocket", "dotenv", "argparse", "logging", "uuid", "random", "shutil",
            "gzip", "difflib", "mimetypes", "concurrent.futures")  # fmt: skip
    program = f"import sys, send_job; print([name for name in {slow} if name in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n"


def test_business_code_sends_waits_and_downloads(busy_site: Site) -> None:
    program = """
import asyncio, json, send_job

good = json.load(open("good.json"))
job_id = send_job.submit(good)
result = send_job.wait(job_id, timeout=80)
assert result == send_job.result(job_id), result
(path,) = send_job.download(result, "mine")
assert path.read_bytes().startswith(b"\\x89PNG")
try:
    send_job.wait(send_job.submit_command("exit 3"), timeout=80)
except send_job.JobFailed as failed:
    assert failed.error["kind"] == "command_refused", failed.error
    assert failed.result["error"] == failed.error
    assert failed.error["message"] in str(failed)

async def together():
    ticks = 0
    waiting = asyncio.gather(*(asyncio.to_thread(send_job.wait, send_job.submit(good)) for _ in range(2)))
    while not waiting.done():
        ticks += 1
        await asyncio.sleep(0.01)
    return await waiting, ticks

results, ticks = asyncio.run(together())
assert [result["status"] for result in results] == ["succeeded"] * 2
assert ticks > 3, ticks
print("all is well")
"""
    (busy_site.folder / "good.json").write_text(json.dumps(image_workflow(0.5)))
    ran = busy_site.run("python", "-c", program)
    assert (ran.stdout, ran.stderr) == ("all is well\n", "")


def test_progress_is_told_once_and_waiting_ends_with_the_receipt(sender_site: Site) -> None:
    job_id = new_job_id()
    store_progress(sender_site, job_id, value=5)
    heard: list[float] = []

    def note(progress: send_job.JobProgress) -> None:
        heard.append(progress["value"])
        if progress["value"] == 5:
            store_progress(sender_site, job_id, value=6)
        else:
            store(sender_site, job_id)

    assert send_job.wait(job_id, on_progress=note, timeout=80) == receipt(job_id)
    assert heard == [5, 6]


@pytest.mark.usefixtures("sender_site")
def test_a_wait_that_takes_too_long_is_a_timeout() -> None:
    job_id = new_job_id()
    assert send_job.result(job_id) is None
    with pytest.raises(TimeoutError, match=r"1 job had no result after 0\.1 s"):
        send_job.wait(job_id, timeout=0.1)


@pytest.mark.parametrize("call", [send_job.wait, send_job.result, send_job.cancel])
def test_what_is_no_job_id_becomes_no_key(call: Callable[[str], object]) -> None:
    with pytest.raises(InvalidMessageError, match=r"'\.\./x' is no job id"):
        call("../x")


@pytest.mark.parametrize("key", ["", "output/", "output/x", "input/x/y", "output/../y", "output/x//y", "output/x/..", "/output/x/y"])  # fmt: skip
def test_a_key_that_is_no_file_of_a_job_is_not_saved(key: str) -> None:
    with pytest.raises(ValueError, match="is no file of a job"):
        send_job.local_parts(key)
    assert send_job.local_parts("output/x/y z/ü.png") == ["x", "y z", "ü.png"]


def test_cancelling_leaves_word_for_the_worker(sender_site: Site) -> None:
    job_id = new_job_id()
    send_job.cancel(job_id)
    assert sender_site.keys("input/") == [f"input/jobs/{job_id}.cancel"]
