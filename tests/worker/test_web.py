"""Addresses that come with a message: callbacks, and where none of them may lead."""

from __future__ import annotations

import hashlib
import hmac
import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from workplace import LIMIT_S, Site, await_that, image_workflow
from workshop import dripping_server, make_worker, receiver, remembering_receiver, start

from comfy_utils import InvalidWorkflowError, Job, new_job_id
from worker import results, web
from worker.errors import PutBackError
from worker.results import CALLBACK_TRIES


def test_a_refused_callback_is_repeated_without_running_the_job_again(make_site: Callable[..., Site]) -> None:
    # All tries are refused at first, so that the queue brings it again.
    with remembering_receiver(refuse=CALLBACK_TRIES) as (url, called):
        site = make_site(CALLBACK_SECRET="hush", VISIBILITY_TIMEOUT="3")
        start(site)
        job_id = new_job_id()
        site.send({"prompt": image_workflow(), "job_id": job_id, "callback_url": url})
        await_that("the accepted callback", lambda: len(called) == CALLBACK_TRIES + 1)
        site.await_empty_queue()
        assert site.runs(job_id) == 1
        headers, body = called[-1]
        assert json.loads(body) == site.result(job_id)
        signed = f"{headers['X-Comfy-Timestamp']}.".encode() + body
        assert headers["X-Comfy-Signature"] == "sha256=" + hmac.new(b"hush", signed, hashlib.sha256).hexdigest()
        assert "hush" not in site.log()


def test_the_gpu_does_not_wait_for_a_callback(make_site: Callable[..., Site]) -> None:
    site = make_site()
    release = threading.Event()
    called = threading.Event()

    def be_slow(handler: BaseHTTPRequestHandler, _: bytes) -> None:
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

    def redirect(handler: BaseHTTPRequestHandler, _: bytes) -> None:
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


def test_an_answer_that_drips_has_one_limit_in_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each byte is within the time that a read may take. Neither the connection nor its thread is left behind."""
    monkeypatch.setattr(web, "POST_LIMIT_S", 0.5)
    others = set(threading.enumerate())
    with dripping_server() as (url, cut):
        assert web.post_result(url, {}, "") == "it was not answered within 0.5 s"
        assert cut.wait(LIMIT_S)
        ours = [thread for thread in threading.enumerate() if thread.name == "within" and thread not in others]
        await_that("its thread ends", lambda: not any(thread.is_alive() for thread in ours))


def test_a_callback_that_drips_is_put_back(make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch) -> None:
    site = make_site()
    worker = make_worker(site, monkeypatch)
    monkeypatch.setattr(web, "POST_LIMIT_S", 0.2)
    monkeypatch.setattr(results, "backoff_s", lambda _: 0.0)
    with dripping_server() as (url, _), pytest.raises(PutBackError, match=r"not answered within 0\.2 s"):
        worker.results.call_back(Job(new_job_id(), callback_url=url), {})


@pytest.mark.parametrize(
    "url",
    ["http://169.254.169.254/latest", "http://[fe80::1]/", "http://[::ffff:169.254.169.254]/", "file:///etc/passwd"],
)
def test_callbacks_never_go_to_link_local_addresses(url: str) -> None:
    with pytest.raises(ValueError, match=r"link-local|no http"):
        web.refuse_link_local(url)


def test_a_name_that_resolves_anew_leads_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def handle(self) -> None:
            if self.connection.recv(1):
                asked.append("something")

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/rebound"
    monkeypatch.setattr(web, "refuse_link_local", lambda _: None)  # the name was checked when it was harmless
    monkeypatch.setattr(web, "is_link_local", lambda address: address == "127.0.0.1")
    with pytest.raises(InvalidWorkflowError, match="link-local"), web.open_url("x", url, web.Connections()):
        pass
    assert "link-local" in web.post_result(url, {}, "")
    server.shutdown()
    assert not asked
