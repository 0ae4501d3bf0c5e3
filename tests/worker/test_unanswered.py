"""Dead letters whose workers were killed without a word."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from local_cloud import Fault, LocalCloud
from workplace import LIMIT_S, Site, await_that, image_workflow
from workshop import NO_RESULT_YET, Calls, Fleet, make_worker, remembering_receiver, start

from comfy_utils import iso, new_job_id


def die(site: Site, body: object) -> str:
    """Put a message where SQS puts those that were received too often; returns its id."""
    text = body if isinstance(body, str) else json.dumps(body)
    return str(site.sqs.send_message(QueueUrl=site.dlq_url, MessageBody=text)["MessageId"])


def test_several_workers_write_one_receipt(make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch) -> None:
    site = make_site()
    with remembering_receiver(refuse=0) as (url, heard):
        ids = [new_job_id() for _ in range(12)]
        for job_id in ids:
            die(site, {"prompt": image_workflow(), "job_id": job_id, "callback_url": url})
        workers = [make_worker(site, monkeypatch) for _ in range(4)]
        looks = [threading.Thread(target=worker.dead_letters.look) for worker in workers]
        for look in looks:
            look.start()
        for look in looks:
            look.join(LIMIT_S)
        bodies = [json.loads(body) for _, body in heard]
        for job_id in ids:
            result = site.result(job_id)
            assert result
            assert result["error"]["kind"] == "gave_up"
            told = [body for body in bodies if body["job_id"] == job_id]
            assert told
            assert all(body == result for body in told)
        make_worker(site, monkeypatch).dead_letters.look()
        assert len(heard) == len(bodies), "another worker knows that they were answered"
        assert site.depth(site.dlq_url) == (12, 0), "they stay, for whoever wants to send them again"


@pytest.mark.parametrize("fault", ["PUT", "GET", "ReceiveMessage", "ChangeMessageVisibility"])
def test_a_look_that_fails_is_made_up_for(
    make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch, calls: Calls, fault: str
) -> None:
    site = make_site()
    job_id = die(site, image_workflow())
    worker = make_worker(site, monkeypatch)
    calls.next(fault, Fault(403, "AccessDenied"))
    worker.dead_letters.look()
    monkeypatch.setattr(worker.dead_letters.queue, "visibility_timeout_s", 1)

    def is_answered() -> Any:
        worker.dead_letters.look()
        return site.result(job_id)

    assert await_that("it is answered", is_answered)["error"]["kind"] == "gave_up"


def test_one_that_cannot_be_read_is_answered_under_the_id_it_has(
    make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    site = make_site()
    job_id = new_job_id()
    bodies = ["{", {"prompt": 7, "job_id": job_id}, {"Event": "s3:TestEvent"}]
    first, _, _ = [die(site, body) for body in bodies]
    make_worker(site, monkeypatch).dead_letters.look()
    for each in (first, job_id):
        result = site.result(each)
        assert result
        assert result["error"]["kind"].startswith("invalid_")
    assert sum(site.depth(site.dlq_url)) == 2, "what asks for nothing is deleted"


def test_one_that_still_runs_is_left_until_it_does_no_more(
    make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its worker has lost the message, as when it was cut off from SQS, and not the job."""
    site = make_site()
    job_id = die(site, image_workflow())
    worker = make_worker(site, monkeypatch)

    def tell_progress(age_s: float) -> None:
        news = {"updated_at": iso(datetime.now(UTC) - timedelta(seconds=age_s))}
        site.s3.put_object(Bucket=site.bucket, Key=f"output/{job_id}/progress.json", Body=json.dumps(news))

    tell_progress(5)
    assert worker.dead_letters.look(), "it is worth looking again soon"
    assert site.result(job_id) is NO_RESULT_YET
    tell_progress(90)
    worker.dead_letters.look()
    assert site.result(job_id)


def test_what_is_known_of_the_attempts_is_told(
    make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    site = make_site()
    job_id = die(site, image_workflow())
    worker = make_worker(site, monkeypatch)
    worker.attempts.note(job_id, 2, {"kind": "gave_up", "message": "the inputs did not come"})
    worker.dead_letters.look()
    result = site.result(job_id)
    assert result
    assert result["error"]["message"] == "no attempt came to an end; the last that is known: the inputs did not come"
    assert result["error"]["detail"].startswith("attempt 2, 20")


def test_without_a_dead_letter_queue_there_is_none_to_look_at(
    make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    site = make_site()
    worker = make_worker(site, monkeypatch)
    site.sqs.delete_queue(QueueUrl=site.dlq_url)
    caplog.set_level(logging.WARNING)
    assert not worker.dead_letters.look()
    assert caplog.text == ""


def test_a_worker_looks_once_more_before_it_leaves(cloud: LocalCloud, fleet: Fleet) -> None:
    site, machine = fleet
    start(site)
    assert site.await_result(site.send(image_workflow()))  # by now it has looked at first
    job_id = die(site, image_workflow())
    await_that("it leaves", lambda: cloud.instance_state(machine.instance_id) == "terminated")
    assert site.result(job_id)
    assert "Hands the instance back" in site.log().partition(f"Job {job_id} is answered")[0]


def test_a_job_that_was_sent_again_has_its_first_answered_too(make_site: Callable[..., Site]) -> None:
    site = make_site()
    start(site)
    before = new_job_id()
    result = site.await_result(site.send({"prompt": image_workflow(), "retry_of": before}))
    assert (result["status"], result["retry_of"]) == ("succeeded", before)
    first = site.result(before)
    assert first
    assert (first["error"]["kind"], "retry_of" in first) == ("gave_up", False)
    assert result["job_id"] in first["error"]["message"]
