"""start_service.sh: models on the local disk."""

from __future__ import annotations

import http.server
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from machine import (
    Bucket,
    Machine,
    bucket,
    machine,
    s3_server,
)

__all__ = ["bucket", "machine", "s3_server"]


def tree(folder: Path) -> dict[str, str]:
    found = (path for path in folder.rglob("*") if path.is_file() and path.name != ".s5cmd")
    return {str(path.relative_to(folder)): path.read_text() for path in found}


@pytest.mark.parametrize("tool", ["awscli", "s5cmd"])
@pytest.mark.parametrize("env", ["base", "pro"])
def test_models_are_copied(machine: Machine, bucket: Bucket, tool: str, env: str) -> None:
    machine.settings(ENV=env, COPY_MODEL_TO_LOCAL=tool)
    copy = machine.home / "local/models"
    machine.runs("comfyui", S3_BUCKET=bucket.name)
    assert machine.link("models") == "../local/models"
    assert tree(copy) == {"checkpoints/a.safetensors": "one", "loras/b c.safetensors": "two"}

    # Replaced by one of the same size, added, removed, and put here by a designer.
    os.utime(copy / "checkpoints/a.safetensors", (0, time.time() - 60))
    bucket.put("models/checkpoints/a.safetensors", "ONE")
    bucket.put("models/new.safetensors", "three")
    bucket.delete("models/loras/b c.safetensors")
    (copy / "mine.safetensors").write_text("mine")
    machine.runs("comfyui", S3_BUCKET=bucket.name)
    kept = {"loras/b c.safetensors": "two", "mine.safetensors": "mine"} if env == "base" else {}
    assert tree(copy) == {"checkpoints/a.safetensors": "ONE", "new.safetensors": "three"} | kept
    downloads = (machine.home / "logs/comfyui.log").read_text().count("download: ")
    assert downloads == (4 if tool == "awscli" else 0), "what s5cmd has fetched is fetched again"


@pytest.mark.parametrize("tool", ["awscli", "s5cmd"])
def test_a_bucket_without_models_is_no_failure(machine: Machine, bucket: Bucket, tool: str) -> None:
    for key in ("checkpoints/a.safetensors", "loras/b c.safetensors", "vae/"):
        bucket.delete(f"models/{key}")
    machine.settings(COPY_MODEL_TO_LOCAL=tool)
    machine.runs("comfyui", S3_BUCKET=bucket.name)
    assert tree(machine.home / "local/models") == {}


class Refusing(http.server.BaseHTTPRequestHandler):
    """An S3 that answers every request with an error that is not worth a retry."""

    def do_GET(self) -> None:
        body = b"<Error><Code>InvalidRequest</Code><Message>not today</Message></Error>"
        self.send_response(400)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_args: object) -> None:
        pass


@pytest.fixture
def serve() -> Iterator[Callable[..., http.server.ThreadingHTTPServer]]:
    """Serves a handler on a free port of 127.0.0.1, or on an unused socket bound before."""
    servers = []

    def start(
        handler: type[http.server.BaseHTTPRequestHandler], bound: socket.socket | None = None
    ) -> http.server.ThreadingHTTPServer:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler, bind_and_activate=bound is None)
        if bound is not None:
            server.socket.close()
            server.socket = bound
            server.server_activate()
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("tool", ["awscli", "s5cmd"])
def test_a_failed_copy_starts_nothing_and_removes_nothing(
    machine: Machine, tool: str, serve: Callable[..., http.server.ThreadingHTTPServer]
) -> None:
    if tool == "awscli":
        (machine.stubs / "aws").unlink()
    copy = machine.home / "local/models"
    copy.mkdir(parents=True)
    (copy / "a.safetensors").write_text("one")
    machine.settings(ENV="pro", COPY_MODEL_TO_LOCAL=tool)
    port = serve(Refusing).server_address[1]
    answer = machine.fails("comfyui", AWS_ENDPOINT_URL=f"http://127.0.0.1:{port}")
    assert "cannot copy s3://bucket-of-pro/models/" in answer
    assert answer.count("trying again") == 2
    assert tree(copy) == {"a.safetensors": "one"}


def test_a_copy_that_fails_once_is_repeated(machine: Machine) -> None:
    machine.stub("aws", '[[ $(grep -c ^aws "$STATE/calls") != 1 ]]')
    machine.settings(COPY_MODEL_TO_LOCAL="awscli")
    machine.runs("comfyui")
    assert len(machine.calls("aws")) == 2


def test_a_missing_tool_is_named(machine: Machine) -> None:
    machine.settings(COPY_MODEL_TO_LOCAL="s5cmd")
    kept = machine.state / "path"
    kept.mkdir()
    for name in ("bash", "env", "dirname", "grep", "mkdir", "touch", "stat", "tee", "rm", "python3"):
        (kept / name).symlink_to(shutil.which(name) or pytest.skip(f"no {name} here"))
    answer = machine.fails("comfyui", PATH=f"{machine.stubs}:{kept}")
    assert "cannot run s5cmd" in answer
    assert "COPY_MODEL_TO_LOCAL=awscli" in answer


class Counting(http.server.BaseHTTPRequestHandler):
    """An S3 with forty small models. It answers once `enough` are asked for at once, or when it is tired of waiting."""

    asked = most = enough = 0
    limit_s = 0.0
    lock = threading.Lock()
    go_on = threading.Event()

    def do_GET(self) -> None:
        if "list-type" in self.path:
            stamp = "<LastModified>2026-01-01T00:00:00.000Z</LastModified>"
            keys = (f"<Contents><Key>models/m{n}</Key><Size>1</Size>{stamp}</Contents>" for n in range(40))
            self.answer(
                f"<ListBucketResult><IsTruncated>false</IsTruncated>{''.join(keys)}</ListBucketResult>".encode()
            )
            return
        kind = type(self)
        with kind.lock:
            kind.asked += 1
            kind.most = max(kind.most, kind.asked)
            if kind.asked >= kind.enough:
                kind.go_on.set()
        if not kind.go_on.wait(kind.limit_s):
            kind.go_on.set()
        with kind.lock:
            kind.asked -= 1
        self.answer(b"m")

    def do_HEAD(self) -> None:
        self.answer(b"m")

    def answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"e"')
        self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_args: object) -> None:
        pass


@pytest.mark.parametrize("own_settings", [False, True])
def test_the_copy_asks_for_many_models_at_once(
    machine: Machine, serve: Callable[..., http.server.ThreadingHTTPServer], own_settings: bool
) -> None:
    """Unless the machine has a configuration of the AWS CLI, with which its credentials may come."""
    (machine.stubs / "aws").unlink()
    machine.settings(COPY_MODEL_TO_LOCAL="awscli")
    Counting.enough, Counting.limit_s = 17, 20.0
    if own_settings:
        (machine.home.parent / ".aws").mkdir()
        (machine.home.parent / ".aws/config").write_text("[default]\ns3 =\n  max_concurrent_requests = 4\n")
        Counting.enough, Counting.limit_s = 5, 3.0
    Counting.most = 0
    Counting.go_on.clear()
    port = serve(Counting).server_address[1]
    machine.runs("comfyui", AWS_ENDPOINT_URL=f"http://127.0.0.1:{port}")
    assert len(tree(machine.home / "local/models")) == 40
    assert Counting.most <= 4 if own_settings else Counting.most >= 17, Counting.most


def test_the_bucket_is_mounted_while_models_are_copied_and_comfyui_waits_for_them(machine: Machine) -> None:
    machine.settings(COPY_MODEL_TO_LOCAL="awscli")
    machine.stub("aws", f'until [[ -L "{machine.comfyui}/output" ]]; do sleep 0.05; done; touch "$STATE/copied"')
    main = machine.comfyui / "main.py"
    main.write_text(main.read_text() + 'assert Path(os.environ["STATE"], "copied").exists()\n')
    machine.runs("comfyui")


def test_real_models_are_moved_aside_for_the_copy(machine: Machine) -> None:
    machine.settings(COPY_MODEL_TO_LOCAL="awscli")
    for text in ("first", "second"):
        models = machine.comfyui / "models"
        models.unlink(missing_ok=True)
        models.mkdir()
        (models / "x").write_text(text)
        machine.runs("comfyui")
        assert machine.link("models") == "../local/models"
        assert (machine.comfyui / "models.before-copy/x").read_text() == text
    assert (machine.comfyui / "models.before-copy.~1~/x").read_text() == "first"


def test_without_the_copy_models_are_the_mounts_again(machine: Machine) -> None:
    machine.settings(COPY_MODEL_TO_LOCAL="awscli")
    machine.runs("comfyui")
    assert machine.link("models") == "../local/models"
    machine.settings()
    machine.runs("comfyui")
    assert machine.link("models") == "../s3/models"
    assert len(machine.calls("aws")) == 1
