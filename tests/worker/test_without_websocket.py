"""A ComfyUI whose websocket is of no use, though all its calls work: the same result, and nobody is blamed."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable

import pytest
import requests
import websocket
from workplace import LIMIT_S, Site, await_that, image_workflow
from workshop import speed_up, start, with_node

from ground import comfyui


def set_sockets(site: Site, mode: str) -> None:
    """Have the site's ComfyUI treat its websockets so."""
    address = f"http://127.0.0.1:{site.port}/standin/sockets"
    requests.post(address, json={"mode": mode}, timeout=LIMIT_S).raise_for_status()


@pytest.mark.slow
@pytest.mark.sampled("websockets", 2)
@pytest.mark.parametrize("mode", ["refuse", "mute", "close"])
def test_jobs_run_all_the_same(make_site: Callable[..., Site], mode: str) -> None:
    site = make_site(STALL_TIMEOUT="2", SCALE_COOLDOWN="2")
    speed_up(site, "worker/progress.py", {"PROGRESS_S = 5": "PROGRESS_S = 1"})
    start(site)
    set_sockets(site, mode)
    slow = site.send(image_workflow(4))
    await_that("it runs", lambda: site.runs(slow))
    quick = [site.send(image_workflow()) for _ in range(5)]
    failing = site.send(with_node("StandinBroken"))
    results = [site.await_result(job_id) for job_id in (slow, *quick)]
    assert [(result["status"], result["attempt"], len(result["outputs"])) for result in results] == [
        ("succeeded", 1, 1)
    ] * 6
    assert site.await_result(failing)["error"]["kind"] == "invalid_workflow"
    assert [site.runs(job_id) for job_id in (slow, *quick)] == [1] * 6
    assert site.s3.get_object(Bucket=site.bucket, Key=f"output/{slow}/progress.json")
    assert "Restarting ComfyUI" not in site.log()
    assert site.log().count("has no websocket for us") == (mode != "close")


def test_a_websocket_that_falls_silent_in_the_middle_costs_nothing(make_site: Callable[..., Site]) -> None:
    site = make_site()
    start(site)
    job_id = site.send(image_workflow(3))
    await_that("its first events have come", lambda: site.keys(f"output/{job_id}/progress.json") or site.runs(job_id))
    set_sockets(site, "mute")
    result = site.await_result(job_id)
    assert (result["status"], result["attempt"], site.runs(job_id)) == ("succeeded", 1, 1)


def test_a_line_that_has_gone_without_a_word_is_no_stall(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its server answers no ping, so the job is followed by queue and history instead."""
    watch = comfyui._Watch("a", 60, 0.1, lambda _: None, lambda: False, lambda: False)
    monkeypatch.setattr(comfyui, "PONG_S", 0.05)
    near, far = socket.socketpair()
    client = websocket.WebSocket()
    client.sock, client.connected = near, True
    watch.line = comfyui._Line(client, "c")
    assert watch.line.watch(watch)
    watch._take({"type": "executing", "data": {"node": "1"}})
    time.sleep(0.2)
    watch.check()
    await_that("the line is given up", lambda: not watch.has_news() and watch.line is None)
    far.close()
