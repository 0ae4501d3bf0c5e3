"""send_job.py as business code imports it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from local_cloud import REGION, Fault
from places import ROOT
from sender_tools import bodies, receipt, store, store_progress
from workplace import Site, image_workflow
from workshop import Calls

import comfy_utils
import fleet
import send_job
from comfy_utils import (
    InvalidMessageError,
    SettingsError,
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
import asyncio, json, uuid, send_job

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
    # The jobs are sent after a few ticks: on a busy machine they would else end before anybody waits.
    job_ids = [str(uuid.uuid4()) for _ in range(2)]
    waiting = asyncio.gather(*(asyncio.to_thread(send_job.wait, job_id) for job_id in job_ids))
    for _ in range(5):
        await asyncio.sleep(0.01)
    assert not waiting.done()
    for job_id in job_ids:
        send_job.submit(good, job_id=job_id)
    return await waiting

results = asyncio.run(together())
assert [result["status"] for result in results] == ["succeeded"] * 2
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


@pytest.fixture
def bare_site(sender_site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    """A site that is known by the process environment only, as in a container: no file, no account."""
    monkeypatch.setattr(comfy_utils, "HERE", tmp_path)
    monkeypatch.setattr(comfy_utils, "_accounts", [])
    for name, value in {"ENV": sender_site.env, "PREFIX": sender_site.prefix, "AWS_REGION": REGION}.items():
        monkeypatch.setenv(name, value)
    return sender_site


def test_without_a_settings_file_aws_is_asked_once_whose_the_credentials_are(
    bare_site: Site, calls: Calls, capsys: pytest.CaptureFixture[str]
) -> None:
    with ThreadPoolExecutor(4) as pool:
        ids = list(pool.map(lambda _: send_job.submit_command("true"), range(4)))
    store(bare_site, ids[0])
    assert send_job.result(ids[0]) == receipt(ids[0])
    assert fleet.main(["dead", "--json"]) == 0, capsys.readouterr().err
    assert calls.seen.count("GetCallerIdentity") == 1
    assert {body["job_id"] for body in bodies(bare_site)} == set(ids)


@pytest.mark.usefixtures("bare_site")
def test_an_account_that_aws_does_not_tell_is_asked_for_again(calls: Calls) -> None:
    calls.next("GetCallerIdentity", Fault(403, "ExpiredToken"))
    with pytest.raises(
        SettingsError, match=r"ACCOUNT_ID is not set, and AWS does not say .*ExpiredToken.*12 digits$"
    ):
        send_job.submit_command("true")
    assert send_job.result(new_job_id()) is None


def test_cancelling_leaves_word_for_the_worker(sender_site: Site) -> None:
    job_id = new_job_id()
    send_job.cancel(job_id)
    assert sender_site.keys("input/") == [f"input/jobs/{job_id}.cancel"]
