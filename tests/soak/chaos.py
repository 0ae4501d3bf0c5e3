"""The local cloud with errors and a witness, and the receiver of callbacks."""

from __future__ import annotations

import hashlib
import hmac
import io
import json
import random
import re
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

from local_cloud import ACCOUNT_ID, REGION, Fault, LocalCloud
from plan import Job

BUCKET = f"simple-comfy-{ACCOUNT_ID}-{REGION}-soak"
QUEUE = "simple-comfy-soak-queue"
SECRET = "the receiver knows it"
AWS_ERROR_SHARE = 0.05


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


class Done(NamedTuple):
    """A fault that happened to an instance."""

    at: float
    kind: str
    instance_id: str
    until: float


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
        self.on_delivery: Callable[[str, str], None] = lambda _instance_id, _body: None  # before the message arrives
        self.unhealthy: list[tuple[float, str]] = []  # when an instance was declared Unhealthy
        self.receipts: dict[str, list[Receipt]] = defaultdict(list)
        self.calls = Counter[str]()
        self.errors = Counter[str]()
        self.error_times: dict[str, list[float]] = defaultdict(list)  # instance -> when a call of it failed
        self._count_lock = threading.Lock()

    def boot(self, state: Any, target: str) -> None:
        super().boot(state, target)
        metadata = self.machines[state.instance_id].metadata
        role = "iam/security-credentials/comfy"
        metadata[role] = metadata[role].replace('"AccessKeyId": "local"', f'"AccessKeyId": "{state.instance_id}"')

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
            if operation == "ReceiveMessage" and json.loads(body)["QueueUrl"].endswith(QUEUE):
                self._note_deliveries(instance_id, answer, lost=error is not None)
            self._note(instance_id, operation, environ["PATH_INFO"], headers)
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

    def _note_deliveries(self, instance_id: str, answer: bytes, *, lost: bool) -> None:
        for message in json.loads(answer).get("Messages", []):
            self.deliveries.append(Delivery(time.time(), instance_id, message["MessageId"], lost))
            if not lost:
                self.on_delivery(instance_id, message["Body"])

    def _note(self, instance_id: str, operation: str, path: str, headers: Any) -> None:
        if operation == "SetInstanceHealth":
            self.unhealthy.append((time.time(), instance_id))
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
