"""How a wait ends for a job of which nobody can write a result any more, by a clock that the tests turn."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
from local_cloud import Fault, LocalCloud
from sender_tools import Bucket, client_error, store
from workplace import Site

import send_job
from comfy_utils import load_settings, new_job_id

GONE: Exception = client_error(400, "AWS.SimpleQueueService.NonExistentQueue", "GetQueueAttributes")
REFUSED: Exception = client_error(403, "AccessDenied", "GetQueueAttributes")
KEPT_S = 600


class Queue:
    """An SQS client for a wait: what the queue holds, or is answered instead, follows from the bucket's clock."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, bucket: Bucket, held: Callable[[float], int | Exception], **more: int
    ) -> None:
        self.bucket, self.held = bucket, held
        self.looks: list[float] = []
        self.said: list[str] = []
        monkeypatch.setattr(send_job, "aws_client", lambda service, _: self if service == "sqs" else None)
        known = {"visibility_timeout_s": 120, "max_receives": 3} | more
        settings: Any = types.SimpleNamespace(region="r", sqs_name="q", env="pro", **known)
        self.watch = send_job.LostWatch(send_job.Sender(settings), self.said.append)

    def get_queue_url(self, QueueName: str) -> dict[str, str]:  # noqa: N803
        return {"QueueUrl": f"https://sqs/{QueueName}"}

    def get_queue_attributes(self, QueueUrl: str, AttributeNames: list[str]) -> dict[str, Any]:  # noqa: N803
        assert QueueUrl == "https://sqs/q"
        self.looks.append(self.bucket.now)
        held = self.held(self.bucket.now)
        if isinstance(held, Exception):
            raise held
        values = {"MessageRetentionPeriod": KEPT_S, "ApproximateNumberOfMessagesNotVisible": held}
        return {"Attributes": {name: str(values.get(name, 0)) for name in AttributeNames}}

    def wait(self, **more: Any) -> list[tuple[float, str]]:
        """(when, which) of each receipt."""
        return self.bucket.wait(why_lost=self.watch.look, **more)


NEVER = 1e9
FULL_S = send_job.LONGEST_RECEIVE_S + KEPT_S


@pytest.mark.parametrize(
    ("held", "settings", "least_s", "words"),
    [
        (lambda _: 0, {"visibility_timeout_s": 400}, 1200, "the queue q has been empty for"),
        (lambda _: 0, {"visibility_timeout_s": 3, "max_receives": 1}, 600, "(./fleet.py dead --env pro)"),
        (lambda _: GONE, {}, 0, "there is no queue q"),
        (lambda now: GONE if now > 500 else 1, {}, 500, "there is no queue q"),
        (lambda now: 1 if now < 300 else 0, {}, 900, "has been empty"),
        (lambda now: 1 if 300 < now < 340 else 0, {}, 910, "has been empty"),
        (lambda now: REFUSED if 300 < now < 340 else 0, {}, 910, "has been empty"),
        (lambda _: 1, {}, FULL_S, "q keeps no message for so long"),
    ],
)
def test_a_job_that_nobody_can_answer_is_lost(
    held: Callable[[float], int | Exception], settings: dict[str, int], least_s: float, words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    bucket = Bucket(monkeypatch, {"a": NEVER})
    queue = Queue(monkeypatch, bucket, held, **settings)
    with pytest.raises(send_job.JobLostError) as lost:
        queue.wait()
    assert lost.value.job_ids == ["a"]
    assert str(lost.value).startswith("1 job (a) will get no result: ")
    assert words in str(lost.value)
    assert least_s < bucket.now < least_s + 4 * send_job.LOST_LOOK_S
    assert bucket.asked[-1] == (queue.looks[-1], "a"), "one more look after that at the queue"
    pauses = [later - sooner for sooner, later in zip([0.0, *queue.looks], queue.looks, strict=False)]
    assert min(pauses) >= send_job.LOST_LOOK_S, "seldom, and not at once"


@pytest.mark.parametrize(
    "held",
    [
        lambda now: 0 if now < 600 else 1,  # sent when the wait had begun long before
        lambda now: 0 if now % 300 < 150 else 1,
        lambda _: REFUSED,
        lambda now: REFUSED if now % 300 < 35 else 0,
    ],
)
def test_a_job_that_may_be_answered_is_waited_for(
    held: Callable[[float], int | Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = Queue(monkeypatch, Bucket(monkeypatch, {"a": 5000}), held)
    ((moment, job),) = queue.wait()
    assert (moment >= 5000, job) == (True, "a")
    refusals = [said for said in queue.said if "cannot be looked at" in said]
    assert len(refusals) == any(isinstance(held(now), Exception) for now in queue.looks), "said once"


def test_results_that_are_there_are_told_before_the_others_are_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many jobs not all have been looked for when the queue has been empty for long."""
    monkeypatch.setattr(send_job, "LOOKS_PER_ROUND", 1)
    jobs = {f"job{number}": 0.0 for number in range(1500)} | {"lost1": NEVER, "lost2": NEVER}
    bucket = Bucket(monkeypatch, jobs)
    told: list[str] = []
    queue = Queue(monkeypatch, bucket, lambda _: 0)

    def tell() -> None:
        for result in send_job.wait_for(bucket, "bucket", list(jobs), why_lost=queue.watch.look):
            told.append(result["job_id"])

    with pytest.raises(send_job.JobLostError, match=r"2 jobs \(lost\d and others\)") as lost:
        tell()
    assert sorted(lost.value.job_ids) == ["lost1", "lost2"]
    assert sorted([*told, *lost.value.job_ids]) == sorted(jobs)
    assert sum(moment == bucket.now for moment, _ in bucket.asked) > 10, "or the test would show nothing"


def test_a_receipt_that_comes_last_of_all_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = Bucket(monkeypatch, {"a": NEVER})

    def held(now: float) -> int | Exception:
        bucket.done_at["a"] = now
        return GONE

    queue = Queue(monkeypatch, bucket, held)
    assert queue.wait() == [(bucket.now, "a")]
    assert len(queue.looks) == 1


def test_while_receipts_cannot_be_read_no_job_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = Bucket(monkeypatch, {"a": NEVER})

    def held(now: float) -> int | Exception:
        if len(queue.looks) == 1:  # the one more look does not succeed
            bucket.errors.append(client_error(503, "SlowDown"))
        bucket.done_at["a"] = now + 10
        return GONE

    queue = Queue(monkeypatch, bucket, held)
    ((moment, _),) = queue.wait()
    assert moment >= queue.looks[0] + 10


def test_an_address_that_was_refused_once_is_looked_up_again(monkeypatch: pytest.MonkeyPatch) -> None:
    queue = Queue(monkeypatch, Bucket(monkeypatch, {"a": NEVER}), lambda _: 0)
    with monkeypatch.context() as patch:
        patch.setattr(Queue, "get_queue_url", None)
        with pytest.raises(TypeError):
            queue.watch._sender.keeps()
    assert queue.watch._sender.keeps() == (KEPT_S, 0)


def test_the_queue_is_asked_once_what_it_holds(sender_site: Site) -> None:
    site = sender_site
    sender = send_job.Sender(load_settings())
    assert sender.keeps() == (345_600, 0)
    for delay_s in (0, 0, 900):
        site.sqs.send_message(QueueUrl=site.queue_url, MessageBody="x", DelaySeconds=delay_s)
    site.sqs.receive_message(QueueUrl=site.queue_url)
    assert sender.keeps() == (345_600, 3), "waiting, held, and delayed"


def test_the_command_line_and_business_code_hear_of_it(
    sender_site: Site, cloud: LocalCloud, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    site = sender_site
    done, lost = new_job_id(), new_job_id()
    store(site, done)
    monkeypatch.setattr(send_job, "LOST_LOOK_S", 0.2)
    monkeypatch.setattr(cloud, "fault", lambda _, call: Fault(400, "AccessDenied") if "Queue" in call else None)
    assert send_job.main(["--wait", "--status", lost, "--timeout", "3"]) == 3
    said = capsys.readouterr()
    assert said.out.count("a lost job would be waited for") == 1
    assert f"come back with: ./send_job.py --env {site.env} --wait --status {lost}" in said.err
    monkeypatch.setattr(cloud, "fault", lambda *_: None)
    site.sqs.delete_queue(QueueUrl=site.queue_url)
    assert send_job.main(["--wait", "--status", lost, done]) == 1
    said = capsys.readouterr()
    assert f"Job {done} succeeded" in said.out
    assert said.err == (
        f"send_job.py: 1 job ({lost}) will get no result: there is no queue {site.prefix}-{site.env}-queue: "
        f"make the environment again (./create_env.sh {site.env}), and send again what is to run\n"
    )
    with pytest.raises(send_job.JobLostError, match="there is no queue"):
        send_job.wait(lost)
    assert send_job.wait(done)["job_id"] == done
