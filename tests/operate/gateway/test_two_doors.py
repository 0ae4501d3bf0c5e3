"""Several processes on one environment answer the same, whichever is asked, and whichever is killed."""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Iterator

import pytest
from gateway_tools import Client, Door, types_of
from workplace import await_that, image_workflow


@pytest.fixture
def other(door: Door) -> Iterator[Door]:
    """A second serve on the same environment."""
    second = Door(door.site, f"serve-{uuid.uuid4().hex[:6]}")
    yield second
    if second.process.poll() is None:
        second.kill()


def test_what_is_posted_at_one_is_known_at_the_other(client: Client, other: Door) -> None:
    there = Client(other.address, client.client_id)
    there.listen()
    slow = client.run(image_workflow(2))
    waiting = client.run(image_workflow(8))
    # A client that has its answer may ask anybody, at once.
    queue = there.get("/queue")
    assert {slow, waiting} <= {item[1] for item in queue["queue_running"] + queue["queue_pending"]}
    assert there.get(f"/api/jobs/{waiting}")["status"] in ("pending", "in_progress")
    heard = there.hear(slow)
    assert types_of(heard)[-1] == "executing"
    entry = client.get(f"/history/{slow}")[slow]
    assert entry == there.get(f"/history/{slow}")[slow], "who has heard of the end finds it everywhere"
    assert entry["prompt"][2]["2"]["class_type"] == "StandinSleep"
    there.call("POST", f"/api/jobs/{waiting}/cancel")
    await_that("it is off both queues", lambda: not any(
        waiting in json.dumps(each.get("/queue")) for each in (client, there)
    ))  # fmt: skip
    there.hang_up()


def test_one_is_killed_in_the_middle_and_nothing_is_lost_or_doubled(client: Client, other: Door) -> None:
    """Half of the jobs are posted at one that dies meanwhile. Who got no answer posts again, elsewhere."""
    site = other.site
    wanted = [str(uuid.uuid4()) for _ in range(12)]
    there = Client(other.address)
    answered: list[str] = []

    def post_there() -> None:
        for job_id in wanted:
            try:
                assert there.post(image_workflow(), prompt_id=job_id).status_code == 200
            except OSError:
                return
            answered.append(job_id)

    posting = threading.Thread(target=post_there)
    posting.start()
    await_that("some are posted", lambda: len(answered) >= 4)
    other.kill()
    posting.join()
    for job_id in wanted:
        if job_id not in answered:
            client.run(image_workflow(), prompt_id=job_id)
    for job_id in wanted:
        assert client.history(job_id)["status"]["status_str"] == "success"
        assert site.runs(job_id) == 1, "an id is run once"
    await_that("the queue is empty", lambda: not client.get("/queue")["queue_pending"])
    third = Door(site, "serve-third")
    again = Client(third.address)
    assert set(wanted) <= set(again.get("/history", max_items="1000")), "one that starts anew knows them all"
    third.kill()


def test_a_client_that_comes_back_hears_what_goes_on(client: Client) -> None:
    client.listen()
    job_id = client.run(image_workflow(12))
    while client.next()["type"] != "execution_start":
        pass
    client.hang_up()
    client.listen()
    heard = client.hear(job_id)
    assert "executed" in types_of(heard)
    assert "execution_success" in types_of(heard)
    assert all(message["data"].get("prompt_id") == job_id for message in heard if message["type"] != "status"), (
        "each names its job"
    )


def test_a_stranger_hears_nothing_but_how_many_jobs_there_are(client: Client, door: Door) -> None:
    stranger = Client(door.address)
    stranger.listen()
    job_id = client.run(image_workflow())
    client.history(job_id)
    await_that("the stranger hears of the queue", lambda: stranger.next()["type"] == "status")
    last = client.run(image_workflow())
    client.history(last)
    assert {message["type"] for message in stranger.messages} == {"status"}
    stranger.hang_up()
