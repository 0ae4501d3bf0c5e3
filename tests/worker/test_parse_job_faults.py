"""parse_job.py when ComfyUI, AWS or a callback's receiver misbehave. Each test fails without its defence."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import requests
from botocore.exceptions import ClientError
from local_cloud import Fault, LocalCloud, Machine
from workplace import LIMIT_S, Site, await_that, group_of, image_workflow

import parse_job
from comfy_utils import Metadata, OutputFile, load_settings, new_job_id


def with_node(class_type: str, **inputs: Any) -> dict[str, Any]:
    """An image workflow with one more node of a class, and a saver behind it."""
    return image_workflow(
        more={
            "4": {"class_type": class_type, "inputs": {"image": ["1", 0], **inputs}},
            "5": {"class_type": "SaveImage", "inputs": {"images": ["4", 0], "filename_prefix": "y"}},
        }
    )


def make_worker(site: Site, monkeypatch: pytest.MonkeyPatch) -> parse_job.Worker:
    """A worker in this process, not running."""
    for name, value in site.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("COMFY_HOME", str(site.folder))
    worker = parse_job.Worker(load_settings(None, site.folder / "env"), Metadata())
    worker.queue_url = site.queue_url
    return worker


# --- ComfyUI ---------------------------------------------------------------------------------------------


def test_what_an_execution_blocker_said_is_a_warning(busy_site: Site) -> None:
    result = busy_site.await_result(busy_site.send(with_node("StandinBlock")))
    assert result["status"] == "succeeded"
    assert result["warnings"] == ["blocked: node 4 StandinBlock: Execution Blocked: not today"]


def test_a_named_file_that_is_gone_is_no_success(
    make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = make_worker(make_site(), monkeypatch)
    outputs, missing = worker.store_files(new_job_id(), [OutputFile("9", "images", "gone.png", "x", "output")])
    assert outputs == []
    assert missing == ["node 9: its file x/gone.png is not there"]


@pytest.mark.parametrize("subfolder", ["../..", "/etc", "a/../../.."])
def test_a_file_outside_comfyuis_folders_is_never_read(
    make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch, subfolder: str
) -> None:
    worker = make_worker(make_site(), monkeypatch)
    assert worker.local_path(OutputFile("9", "images", "passwd", subfolder, "output")) is None
    assert worker.local_path(OutputFile("9", "images", "x", "", "input")) is None


def test_files_without_an_entry_in_the_history_are_stored(
    make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    site = make_site()
    worker = make_worker(site, monkeypatch)
    job_id = new_job_id()
    folder = site.folder / "job-output" / job_id / "loras"
    folder.mkdir(parents=True)
    (folder / "x.safetensors").write_bytes(b"weights")
    outputs, _ = worker.store_files(job_id, [])
    assert [(output["node_id"], output["s3_key"]) for output in outputs] == [
        (None, f"output/{job_id}/loras/x.safetensors")
    ]
    assert site.keys(f"output/{job_id}/") == [f"output/{job_id}/loras/x.safetensors"]


def test_files_are_uploaded_side_by_side_and_named_in_order(
    make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    site = make_site()
    worker = make_worker(site, monkeypatch)
    job_id = new_job_id()
    folder = site.folder / "job-output" / job_id
    folder.mkdir(parents=True)
    named = [OutputFile("9", "images", f"{number}.png", job_id, "output") for number in range(4)]
    for file in named:
        (folder / file.filename).write_text(file.filename)
    together = threading.Barrier(4)  # opens only when all four are under way
    put = worker.s3.put_object

    def put_object(**arguments: Any) -> Any:
        together.wait(LIMIT_S)
        return put(**arguments)

    monkeypatch.setattr(worker.s3, "put_object", put_object)
    outputs, _ = worker.store_files(job_id, named)
    assert [output["s3_key"] for output in outputs] == [f"output/{job_id}/{number}.png" for number in range(4)]
    assert len(site.keys(f"output/{job_id}/")) == 4


def test_a_file_that_mountpoint_has_written_costs_one_head(
    make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch, faults: Faults
) -> None:
    site = make_site(ENV="base")
    worker = make_worker(site, monkeypatch)
    job_id = new_job_id()
    path = site.folder / "ComfyUI/output" / job_id / "x.png"
    path.parent.mkdir()
    path.write_bytes(b"a picture")
    site.s3.put_object(Bucket=site.bucket, Key=f"output/{job_id}/x.png", Body=b"a picture")
    heads, puts, gets = (faults.count("s3", method) for method in ("HEAD", "PUT", "GET"))
    outputs, _ = worker.store_files(job_id, [])
    assert [output["s3_key"] for output in outputs] == [f"output/{job_id}/x.png"]
    assert (heads(), puts(), gets()) == (1, 0, 0)
    path.write_bytes(b"another one")
    worker.store_files(job_id, [])
    assert puts() == 1, "another size"


def test_a_log_is_uploaded_only_when_it_has_changed(
    make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch, faults: Faults
) -> None:
    site = make_site()
    worker = make_worker(site, monkeypatch)
    log = site.folder / "logs/parse_job.log"
    log.write_text("one\n")
    puts = faults.count("s3", "PUT")
    for _ in range(2):
        worker.upload_logs()
    assert puts() == 1
    with log.open("a") as file:
        file.write("two\n")
    worker.upload_logs()
    assert puts() == 2


def test_a_job_outlives_its_socket(busy_site: Site) -> None:
    job_id = busy_site.send(image_workflow(3))
    await_that("the job runs", lambda: busy_site.runs(job_id))
    requests.post(f"http://127.0.0.1:{busy_site.port}/standin/cut-sockets", timeout=LIMIT_S).raise_for_status()
    result = busy_site.await_result(job_id)
    assert (result["status"], result["attempt"]) == ("succeeded", 1)
    assert busy_site.runs(job_id) == 1


def test_a_dead_executor_is_restarted_and_the_job_run_again(make_site: Callable[..., Site]) -> None:
    site = make_site(STALL_TIMEOUT="3")
    site.keep_comfyui()
    site.start_worker()
    workflow = with_node("StandinDeadExecutor")
    job_id = site.send(workflow)
    await_that("ComfyUI is restarted", lambda: "Restarting ComfyUI" in site.log())
    assert site.result(job_id) is None
    await_that("it is run again", lambda: site.runs(job_id) >= 2)
    assert site.await_result(site.send(image_workflow()))["status"] == "succeeded"


def test_a_comfyui_that_fails_twice_costs_the_instance_its_place(
    cloud: LocalCloud, fleet: tuple[Site, Machine]
) -> None:
    site, machine = fleet
    site.keep_comfyui()
    site.start_worker()
    site.send(with_node("StandinCrash"))
    await_that("the instance is declared Unhealthy", lambda: "declared Unhealthy" in site.log())
    await_that("the instance is replaced", lambda: cloud.instance_state(machine.instance_id) == "terminated")
    group = group_of(cloud, f"{site.prefix}-{site.env}-asg")
    assert group["DesiredCapacity"] == 1
    assert machine.instance_id not in [instance["InstanceId"] for instance in group["Instances"]]
    await_that("the message is back", lambda: site.depth() == (1, 0))


def test_a_comfyui_that_is_only_slow_does_not_lose_its_job(make_site: Callable[..., Site]) -> None:
    site = make_site()
    comfyui = site.start_comfyui()
    site.start_worker()
    job_id = site.send(image_workflow(3))
    await_that("the job runs", lambda: site.runs(job_id))
    os.kill(comfyui.pid, 19)  # SIGSTOP: connections are taken, nothing is answered
    threading.Timer(13, lambda: os.kill(comfyui.pid, 18)).start()  # longer than a call's limit of 10 s
    result = site.await_result(job_id)
    assert (result["status"], result["attempt"]) == ("succeeded", 1)
    assert site.runs(job_id) == 1


def test_out_of_memory_again_and_again_ends_in_the_dead_letter_queue(make_site: Callable[..., Site]) -> None:
    site = make_site()
    site.start_comfyui()
    site.start_worker()
    job_id = site.send(with_node("StandinOutOfMemory", times=1000))
    await_that("the message is in the DLQ", lambda: site.depth(site.dlq_url)[0] == 1)
    assert site.result(job_id) is None
    assert site.runs(job_id) == 4, "twice at first, and once more each time it came back"


# --- Leases and duplicates -------------------------------------------------------------------------------


def test_the_same_message_at_two_instances_gives_one_receipt(make_site: Callable[..., Site]) -> None:
    first, second = make_site(), make_site()
    for setting in ("prefix", "env"):  # the second instance joins the first one's environment
        setattr(second, setting, getattr(first, setting))
    text = (first.folder / "env").read_text().replace(str(first.port), str(second.port))
    (second.folder / "env").write_text(text)
    for site in (first, second):
        site.start_comfyui()
        site.start_worker()
    await_that("both work", lambda: all("takes jobs from" in site.log() for site in (first, second)))
    job_id = new_job_id()
    for _ in range(2):
        first.send({"prompt": image_workflow(2), "job_id": job_id})
    receipt = first.await_result(job_id)
    first.await_empty_queue()
    assert first.result(job_id) == receipt
    assert "stored its result first" in first.log() + second.log()


def test_a_lost_lease_keeps_the_result_and_leaves_the_message(make_site: Callable[..., Site], faults: Faults) -> None:
    site = make_site(VISIBILITY_TIMEOUT="6")
    site.start_comfyui()
    faults.next("sqs", "ChangeMessageVisibility", Fault(400, "InvalidParameterValue"), times=1)
    deletes = faults.count("sqs", "DeleteMessage")
    site.start_worker()
    job_id = site.send(image_workflow(3))
    assert site.await_result(job_id)["attempt"] == 1
    await_that("the message came again and was deleted", deletes)  # moto's counts may both be 0 as a lease ends
    site.await_empty_queue()
    assert "its lease was lost" in site.log()
    assert deletes() == 1, "the message was deleted only by the receive that owned it"
    assert site.runs(job_id) == 1


def test_a_lease_that_cannot_be_extended_at_first_is_tried_again(
    make_site: Callable[..., Site], faults: Faults
) -> None:
    site = make_site(VISIBILITY_TIMEOUT="9")
    site.start_comfyui()
    faults.next("sqs", "ChangeMessageVisibility", Fault(403, "AccessDenied"), times=3)
    for _ in range(2):
        site.start_worker()
    job_id = site.send(image_workflow(12))
    assert site.await_result(job_id)["attempt"] == 1
    site.await_empty_queue()
    assert "Extending the lease again" in site.log()
    assert "attempt 2" not in site.log()


def test_a_lease_never_asks_for_more_than_twelve_hours(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    class Sqs:
        def change_message_visibility(self, **arguments: Any) -> None:
            asked.append(arguments["VisibilityTimeout"])

    monkeypatch.setattr(parse_job, "RECEIVE_LIMIT_S", 4)
    message = {
        "MessageId": "m",
        "ReceiptHandle": "r",
        "Attributes": {"ApproximateReceiveCount": "1", "SentTimestamp": "0"},
    }
    lease = parse_job.Lease(Sqs(), "", message, 3)
    await_that("three extensions", lambda: len(asked) >= 3)
    lease.end()
    assert asked[:3] == [1, 0, 0]


# --- AWS -------------------------------------------------------------------------------------------------


class Faults:
    """What the local cloud is to answer instead, a number of times."""

    def __init__(self) -> None:
        self._left: dict[tuple[str, str], tuple[Fault, int]] = {}
        self._seen: Counter[tuple[str, str]] = Counter()

    def next(self, service: str, operation: str, fault: Fault, times: int) -> None:
        """Answer the next `times` calls of this operation with the fault."""
        self._left[service, operation] = (fault, times)

    def count(self, service: str, operation: str) -> Callable[[], int]:
        """A look at how many calls of the operation there were since."""
        before = self._seen[service, operation]
        return lambda: self._seen[service, operation] - before

    def __call__(self, service: str, operation: str) -> Fault | None:
        key = (service, operation)
        self._seen[key] += 1
        fault, times = self._left.get(key, (None, 0))
        if times <= 0 or fault is None:
            return None
        self._left[key] = (fault, times - 1)
        return fault


@pytest.fixture
def faults(cloud: LocalCloud) -> Iterator[Faults]:
    faults = Faults()
    cloud.fault = faults
    yield faults
    cloud.fault = lambda _service, _operation: None


OPERATIONS = [
    ("sqs", "GetQueueUrl"),
    ("sqs", "ReceiveMessage"),
    ("sqs", "ChangeMessageVisibility"),
    ("sqs", "GetQueueAttributes"),
    ("sqs", "DeleteMessage"),
    ("s3", "GET"),
    ("s3", "PUT"),
    ("autoscaling", "DescribeAutoScalingGroups"),
]


@pytest.mark.parametrize("code", ["ThrottlingException", "InternalError", "AccessDenied"])
def test_every_aws_call_may_fail_and_nothing_is_lost(
    make_site: Callable[..., Site], faults: Faults, code: str
) -> None:
    site = make_site(VISIBILITY_TIMEOUT="3")
    site.start_comfyui()
    status = {"ThrottlingException": 400, "InternalError": 500, "AccessDenied": 403}[code]
    for service, operation in OPERATIONS:
        faults.next(service, operation, Fault(status, code), times=2)
    site.start_worker()
    job_id = site.send(image_workflow(2))
    assert site.await_result(job_id)["status"] == "succeeded"
    site.await_empty_queue()
    assert site.runs(job_id) == 1


@pytest.mark.parametrize(
    ("service", "operation", "permission"),
    [
        ("sqs", "ReceiveMessage", "sqs:ReceiveMessage"),
        ("sqs", "DeleteMessage", "sqs:DeleteMessage"),
        ("s3", "GET", "s3:GetObject and s3:ListBucket"),
        ("s3", "PUT", "s3:PutObject"),
        ("autoscaling", "DescribeAutoScalingGroups", "autoscaling:DescribeAutoScalingGroups"),
    ],
)
def test_a_refused_call_names_the_permission_and_does_not_spin(
    make_site: Callable[..., Site], faults: Faults, service: str, operation: str, permission: str
) -> None:
    site = make_site()
    site.start_comfyui()
    faults.next(service, operation, Fault(403, "AccessDenied"), times=1000)
    calls = faults.count(service, operation)
    site.start_worker()
    site.send(image_workflow())
    await_that("the permission is named", lambda: f"this instance's role needs {permission})" in site.log())
    started, before = time.monotonic(), calls()
    await_that("some seconds pass", lambda: time.monotonic() > started + 3)
    assert calls() - before < 10, "it waits between its tries"


def test_a_full_disk_does_not_stop_jobs(make_site: Callable[..., Site]) -> None:
    site = make_site()
    (site.folder / "logs/parse_job.log").symlink_to("/dev/full")
    site.start_comfyui()
    site.start_worker()
    assert site.await_result(site.send(image_workflow()))["status"] == "succeeded"


# --- Callbacks -------------------------------------------------------------------------------------------


@contextmanager
def receiver(answer: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[str]:
    """A server for callbacks; yields its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            answer(self)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/done"
    server.shutdown()


def test_the_gpu_does_not_wait_for_a_callback(make_site: Callable[..., Site]) -> None:
    site = make_site()
    release = threading.Event()
    called = threading.Event()

    def be_slow(handler: BaseHTTPRequestHandler) -> None:
        called.set()
        release.wait(8)
        handler.send_response(200)
        handler.end_headers()

    with receiver(be_slow) as url:
        site.start_comfyui()
        site.start_worker()
        site.send({"prompt": image_workflow(), "callback_url": url})
        assert called.wait(LIMIT_S)
        job_id = site.send(image_workflow())
        assert site.await_result(job_id)["status"] == "succeeded"
        assert not release.is_set(), "the second job ended while the first one's callback was under way"
        assert sum(site.depth()) >= 1
        release.set()
        site.await_empty_queue()


def test_a_redirect_is_not_followed_and_not_accepted(make_site: Callable[..., Site]) -> None:
    site = make_site()
    followed = threading.Event()

    def redirect(handler: BaseHTTPRequestHandler) -> None:
        if handler.path == "/elsewhere":
            followed.set()
        handler.send_response(307)
        handler.send_header("Location", "/elsewhere")
        handler.end_headers()

    with receiver(redirect) as url:
        site.start_comfyui()
        site.start_worker()
        job_id = site.send({"prompt": image_workflow(), "callback_url": url})
        await_that("it is put back", lambda: "is put back" in site.log())
        assert "it was answered with HTTP 307" in site.log()
        assert site.await_result(job_id)["status"] == "succeeded"
        assert not followed.is_set()
        assert sum(site.depth()) == 1


# --- The process -----------------------------------------------------------------------------------------


def test_a_commands_children_end_when_the_worker_is_stopped(make_site: Callable[..., Site]) -> None:
    site = make_site(EXEC_CMD="always")
    site.start_comfyui()
    worker = site.start_worker()
    site.send({"exec_cmd": "sleep 600 & echo $! > child; wait"})
    child = site.folder / "child"
    pid = int(await_that("the command runs", lambda: child.exists() and child.read_text().strip()))
    worker.terminate()
    assert worker.wait(LIMIT_S) == 0
    await_that("the child is gone", lambda: not Path(f"/proc/{pid}").exists() or "Z" in _state(pid))
    assert site.depth() == (1, 0)


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "Z"


def test_systemd_hears_that_the_worker_lives_until_its_lane_hangs(
    make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    worker = make_worker(make_site(), monkeypatch)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(LIMIT_S)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        hang = threading.Event()
        lanes = [threading.Thread(target=hang.wait, name=name, daemon=True) for name in ("one", "other")]
        worker.turned_at = {lane.name: time.monotonic() for lane in lanes}
        for lane in lanes:
            lane.start()
        watch = threading.Thread(target=worker.watch, args=(lanes,), daemon=True)
        watch.start()
        assert systemd.recv(100) == b"WATCHDOG=1"
        worker.turned_at["other"] -= parse_job.TURN_LIMIT_S + 1
        systemd.settimeout(2)
        await_that("it hears no more", lambda: not _hears(systemd))
        hang.set()
        watch.join(LIMIT_S)


def _hears(systemd: socket.socket) -> bool:
    try:
        return bool(systemd.recv(100))
    except TimeoutError:
        return False


def test_text_that_is_no_unicode_does_not_stop_the_result(busy_site: Site) -> None:
    body = '{"prompt": {"1": {"class_type": "X\\ud800", "inputs": {}}}}'
    result = busy_site.await_result(busy_site.send(body))
    assert result["error"]["kind"] == "invalid_workflow"
    assert json.dumps(result)


def test_a_number_that_is_no_json_is_refused(busy_site: Site) -> None:
    body = '{"1": {"class_type": "X", "inputs": {"a": NaN}}}'
    assert busy_site.await_result(busy_site.send(body))["error"]["kind"] == "invalid_message"


def test_only_aws_refusals_ask_for_permissions() -> None:
    refused = ClientError({"Error": {"Code": "AccessDenied", "Message": "no"}}, "SetInstanceHealth")
    assert parse_job.explain(refused).endswith("(this instance's role needs autoscaling:SetInstanceHealth)")
    assert "role" not in parse_job.explain(ClientError({"Error": {"Code": "Throttling"}}, "GetObject"))
    assert parse_job.explain(OSError("no\nspace")) == "no space"
