"""fleet.py dead, redrive and purge."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from local_cloud import Fault, LocalCloud, Machine, free_port
from workplace import Site, await_that, group_of, image_workflow

from comfy_utils import new_job_id
from fleet import main
from operate import dead_letters


def dead(site: Site) -> list[str]:
    """The bodies in the dead-letter queue, which stay there."""
    messages = dead_letters.peek(site.sqs, site.dlq_url)
    return [message["Body"] for message in messages]


def test_a_dead_job_tells_its_story_and_can_be_sent_again(
    cloud: LocalCloud, fleet: tuple[Site, Machine], ours: Callable[[Site], None], capsys: pytest.CaptureFixture[str]
) -> None:
    site, machine = fleet
    ours(site)
    arn = site.sqs.get_queue_attributes(QueueUrl=site.dlq_url, AttributeNames=["QueueArn"])["Attributes"]["QueueArn"]
    policy = json.dumps({"deadLetterTargetArn": arn, "maxReceiveCount": 1})
    site.sqs.set_queue_attributes(QueueUrl=site.queue_url, Attributes={"RedrivePolicy": policy})
    job_id, refusing = new_job_id(), f"http://127.0.0.1:{free_port()}/"
    body = json.dumps({"prompt": image_workflow(), "job_id": job_id, "callback_url": refusing})
    site.send(body)
    site.start_comfyui()
    site.start_worker()
    await_that("the job is dead", lambda: site.depth(site.dlq_url) == (1, 0))
    await_that(
        "the idle worker has left", lambda: group_of(cloud, f"{site.prefix}-{site.env}-asg")["Instances"] == []
    )
    capsys.readouterr()
    assert main(["dead"]) == 0
    title, job, reason, result, log = capsys.readouterr().out.splitlines()
    assert title == f"1 job in {site.prefix}-{site.env}-queue-dlq"
    assert re.fullmatch(rf"  {job_id}  workflow, sent \d{{4}}-\d\d-\d\d \d\d:\d\d UTC", job)
    assert re.match(rf"      attempt 1 of 3: the callback of job {job_id} failed: .*refused", reason)
    assert result == "      its result is stored all the same, succeeded"
    assert log == f"      s3://{site.bucket}/output/{machine.instance_id}/parse_job.log"
    assert dead(site) == [body], "looking leaves it there, for all to see"

    assert main(["redrive"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == f"1 job sent back to {site.prefix}-{site.env}-queue"
    assert dead(site) == []
    (again,) = site.sqs.receive_message(QueueUrl=site.queue_url)["Messages"]
    assert again["Body"] == body
    assert group_of(cloud, f"{site.prefix}-{site.env}-asg")["DesiredCapacity"] == 1, "there is somebody to take it"


def test_job_ids_stay_and_nothing_is_lost_when_dead_jobs_are_sent_back(
    cloud: LocalCloud, make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch, ours: Callable[[Site], None],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    site = make_site()
    ours(site)
    own, workflow = new_job_id(), image_workflow()
    bodies: list[Any] = [
        workflow,
        {"prompt": workflow},
        {"exec_cmd": "true"},
        {"prompt": workflow, "job_id": own},
        [1],
    ]
    bodies += [{"prompt": image_workflow(n)} for n in range(15)]
    ids = [site.sqs.send_message(QueueUrl=site.dlq_url, MessageBody=json.dumps(body))["MessageId"] for body in bodies]
    monkeypatch.setattr(
        cloud, "fault", lambda _, operation: Fault(400, "AccessDenied") if operation == "SendMessageBatch" else None
    )
    assert main(["redrive"]) == 1
    assert "10 jobs could not be sent back" in capsys.readouterr().err
    assert (site.depth(), site.depth(site.dlq_url)) == ((0, 0), (20, 0)), "all can be received at once"
    monkeypatch.setattr(dead_letters, "PEEK_S", 1)
    monkeypatch.setattr(
        cloud, "fault", lambda _, operation: Fault(400, "AccessDenied") if operation == "DeleteMessageBatch" else None
    )
    assert main(["redrive"]) == 1
    assert capsys.readouterr().err == "fleet.py: not allowed: sqs:DeleteMessageBatch\n"
    assert site.depth() == (10, 0), "the first ten are in both queues"
    monkeypatch.setattr(cloud, "fault", lambda *_: None)
    site.sqs.purge_queue(QueueUrl=site.queue_url)
    await_that("they can be received again", lambda: site.depth(site.dlq_url) == (20, 0))
    assert main(["redrive"]) == 0
    assert site.depth(site.dlq_url) == (0, 0)
    messages = dead_letters.peek(site.sqs, site.queue_url)
    found = {message["Body"] for message in messages}
    assert found == {
        json.dumps({"prompt": workflow, "job_id": ids[0]}),
        json.dumps({"prompt": workflow, "job_id": ids[1]}),
        json.dumps({"exec_cmd": "true", "job_id": ids[2]}),
        json.dumps({"prompt": workflow, "job_id": own}),
        "[1]",
        *(json.dumps(body | {"job_id": name}) for body, name in zip(bodies[5:], ids[5:], strict=True)),
    }


def test_dead_jobs_are_deleted_only_when_that_is_meant(
    make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch, ours: Callable[[Site], None],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    site = make_site()
    ours(site)
    site.sqs.send_message(QueueUrl=site.dlq_url, MessageBody="x\x1b[2J")
    asked: list[str] = []

    def answer(text: str) -> Callable[[str], str]:
        def give(question: str) -> str:
            asked.append(question)
            return text

        return give

    def close(_: str) -> str:
        raise EOFError

    for refusing in (answer(""), answer("yes"), close):
        monkeypatch.setattr("builtins.input", refusing)
        assert main(["purge"]) == 1
        assert len(dead(site)) == 1
    queue = f"{site.prefix}-{site.env}-queue-dlq"
    assert asked == [f"1 job in {queue} will be lost. Type {site.env} to delete them: "] * 2
    capsys.readouterr()
    assert main(["dead"]) == 0
    _, job, reason = capsys.readouterr().out.splitlines()
    assert "no job (the message is not JSON" in job
    assert "no word of it in the logs" in reason
    monkeypatch.setattr("builtins.input", answer(f" {site.env} "))
    assert main(["purge"]) == 0
    assert dead(site) == []

    other = make_site()
    ours(other)
    other.sqs.send_message(QueueUrl=other.dlq_url, MessageBody="x")
    monkeypatch.setattr("builtins.input", close)
    assert main(["purge", "--yes"]) == 0
    assert dead(other) == []
    other.sqs.delete_queue(QueueUrl=other.dlq_url)
    capsys.readouterr()
    assert main(["status"]) == 0
    assert "no dead-letter queue" in capsys.readouterr().out
