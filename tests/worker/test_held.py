"""worker/held.py: the next worker on a machine goes on with what a killed one had in hand."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from workplace import Site, await_that, image_workflow
from workshop import make_worker

from worker.held import Held


def kill_worker(site: Site) -> None:
    """As the kernel does it when memory runs out, or systemd when a worker hangs."""
    worker = site.processes[-1]
    os.killpg(worker.pid, signal.SIGKILL)
    worker.wait()


def left(site: Site) -> list[str]:
    """The ids of the messages that are noted."""
    return [path.name for path in (site.folder / "held").glob("*/*")]


def hold(folder: Path, *messages: dict[str, Any], instance: str = "i-1", queue: str = "q") -> None:
    """What a worker leaves that has these messages in hand and is killed."""
    held = Held(folder, instance, queue)
    for message in messages:
        held.note(message, 1.0, taken_over=False)
    die(held)


def die(held: Held) -> None:
    """With a process its locks go."""
    os.close(held._lock)


MESSAGE = {"MessageId": "m-1", "ReceiptHandle": "r-1", "Body": "{}", "Attributes": {}}


def test_a_job_that_comfyui_ended_while_nobody_looked_is_answered_at_once(make_site: Callable[..., Site]) -> None:
    """Its message would come back after an hour only."""
    site = make_site(VISIBILITY_TIMEOUT="3600")
    site.start_comfyui()
    site.start_worker()
    job_id, behind = site.send(image_workflow(2)), site.send(image_workflow(0.1))
    await_that("it runs", lambda: site.runs(job_id))
    await_that("it is noted", lambda: left(site))  # the other one, too, where it is in hand already
    kill_worker(site)
    await_that("ComfyUI has done it", lambda: site.runs(job_id, "success"))
    site.start_worker()
    results = [site.await_result(each) for each in (job_id, behind)]
    assert [(result["status"], result["attempt"]) for result in results] == [("succeeded", 1)] * 2
    assert [site.runs(each) for each in (job_id, behind)] == [1, 1]
    site.await_empty_queue()
    await_that("nothing is noted any more", lambda: not left(site))


def test_where_comfyui_is_gone_as_well_the_message_is_for_anyone_at_once(make_site: Callable[..., Site]) -> None:
    site = make_site(VISIBILITY_TIMEOUT="3600")
    comfyui = site.start_comfyui()
    site.start_worker()
    job_id = site.send(image_workflow(30))
    await_that("it runs", lambda: site.runs(job_id))
    kill_worker(site)
    comfyui.kill()
    comfyui.wait()
    site.start_worker()
    await_that("its message waits", lambda: site.depth() == (1, 0))
    await_that("nothing is noted any more", lambda: not left(site))


def test_a_message_that_is_no_longer_ours_is_left_alone(
    make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was deleted, or has been received by another worker, since the worker was killed."""
    site = make_site()
    worker = make_worker(site, monkeypatch)
    site.send(image_workflow())
    (message,) = worker.queue.receive(1, 5)
    worker.queue.delete(message["ReceiptHandle"])
    hold(site.folder / "held", message, instance=worker.instance_id, queue=worker.queue.name)
    monkeypatch.setattr(worker.care.comfy, "is_ready", lambda: True)
    worker.intake._take_over()
    assert (worker.in_hand.leases, left(site)) == ([], [])


def test_a_job_that_kills_its_worker_is_taken_over_once(tmp_path: Path) -> None:
    """Then its attempts are used up as those of any other."""
    folder = tmp_path / "held"
    hold(folder, MESSAGE)
    second = Held(folder, "i-1", "q")
    assert [note["message"] for note in second.left_behind()] == [MESSAGE]
    die(second)
    assert list(folder.glob("*/m-1")), "noted once more"
    assert list(Held(folder, "i-1", "q").left_behind()) == []
    assert not list(folder.glob("*/m-1"))


@pytest.mark.parametrize("whose", [{"instance": "i-2"}, {"queue": "another"}])
def test_notes_that_came_with_an_image_are_nobodys(tmp_path: Path, whose: dict[str, str]) -> None:
    hold(tmp_path / "held", MESSAGE, **whose)
    assert list(Held(tmp_path / "held", "i-1", "q").left_behind()) == []
    assert not list((tmp_path / "held").glob("*/m-1"))


def test_a_worker_that_lives_keeps_what_it_has(tmp_path: Path) -> None:
    first = Held(tmp_path / "held", "i-1", "q")
    first.note(MESSAGE, 1.0, taken_over=False)
    assert list(Held(tmp_path / "held", "i-1", "q").left_behind()) == []
    assert list((tmp_path / "held").glob("*/m-1"))
    first.forget("m-1")
    assert not list((tmp_path / "held").glob("*/m-1"))


def test_half_a_note_is_none(tmp_path: Path) -> None:
    hold(tmp_path / "held", MESSAGE)
    (path,) = (tmp_path / "held").glob("*/m-1")
    path.write_text(path.read_text()[:20])
    assert list(Held(tmp_path / "held", "i-1", "q").left_behind()) == []


def test_a_folder_that_cannot_be_written_stops_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "held").write_text("a file")
    held = Held(tmp_path / "held", "i-1", "q")
    held.note(MESSAGE, 1.0, taken_over=False)
    held.forget("m-1")
    assert list(held.left_behind()) == []
    assert "would not know what it held" in caplog.text
