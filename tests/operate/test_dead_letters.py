"""fleet.py dead, redrive and purge."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any

import pytest
from local_cloud import ACCOUNT_ID, REGION, Fault, LocalCloud, Machine, free_port
from report_tools import receipt
from workplace import Site, await_that, group_of, image_workflow
from workshop import Calls

import comfy_utils
from comfy_utils import Job, is_job_id, large_workflow_key, new_job_id
from fleet import main
from ground.messages import parse_message
from operate import dead_letters

WORKFLOW = image_workflow()
DENIED = Fault(400, "AccessDenied")


def dead(site: Site) -> list[str]:
    """The bodies in the dead-letter queue, which stay there."""
    messages = dead_letters.peek(site.sqs, site.dlq_url)
    return [message["Body"] for message in messages]


def bury(site: Site, body: object) -> str:
    """Put a message into the dead-letter queue; returns its id."""
    text = body if isinstance(body, str) else json.dumps(body)
    return str(site.sqs.send_message(QueueUrl=site.dlq_url, MessageBody=text)["MessageId"])


def put(site: Site, key: str, value: object) -> None:
    site.s3.put_object(Bucket=site.bucket, Key=key, Body=json.dumps(value))


def answer(site: Site, job_id: str, kind: str | None, message: str = "no") -> dict[str, Any]:
    """Write a job's receipt; `kind` is that of its error, None for a success."""
    error = kind and {"kind": kind, "message": message}
    result = receipt(0, 1, 2, job_id=job_id, status="failed" if error else "succeeded", error=error)
    put(site, f"output/{job_id}/result.json", result)
    return result


def drop(site: Site, name: str) -> dict[str, Any]:
    """Put a workflow into the bucket as a file; returns S3's message about it."""
    put(site, f"input/jobs/{name}", WORKFLOW)
    file = {"key": f"input/jobs/{name}".replace(" ", "+"), "sequencer": new_job_id()}
    record = {"eventName": "ObjectCreated:Put", "s3": {"bucket": {"name": site.bucket}, "object": file}}
    return {"Records": [record]}


def jobs_on(site: Site) -> dict[str, tuple[Job, str]]:
    """The jobs on the queue and their messages, by id; none is there twice."""
    messages = dead_letters.peek(site.sqs, site.queue_url)
    found = [(parse_message(message["Body"], message["MessageId"]), message["Body"]) for message in messages]
    assert len({job.id for job, _ in found}) == len(found)
    return {job.id: (job, body) for job, body in found}


def redriven(capsys: pytest.CaptureFixture[str], code: int = 0) -> dict[str, Any]:
    """What a redrive says to programs."""
    capsys.readouterr()
    assert main(["redrive", "--json"]) == code
    said: dict[str, Any] = json.loads(capsys.readouterr().out)
    return said


def test_a_dead_job_tells_its_story_and_its_callback_can_be_made_again(
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
    await_that("nobody looks at the job any more", lambda: site.depth(site.dlq_url) == (1, 0))
    capsys.readouterr()
    assert main(["dead"]) == 0
    title, job, result, attempt, log = capsys.readouterr().out.splitlines()
    assert title == f"1 job in {site.prefix}-{site.env}-queue-dlq"
    assert re.fullmatch(rf"  {job_id}  workflow, sent \d{{4}}-\d\d-\d\d \d\d:\d\d UTC", job)
    assert result == "      succeeded (its callback was not accepted yet)"
    assert re.match(rf"      attempt 1 at \S+ on {machine.instance_id}: the callback of job {job_id} failed", attempt)
    assert log == f"      s3://{site.bucket}/output/{machine.instance_id}/parse_job.log"
    assert dead(site) == [body], "looking leaves it there, for all to see"

    assert main(["redrive"]) == 0
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first == f"{job_id} → {job_id} (it has ended: only its callback is made)"
    assert second == f"1 job sent to {site.prefix}-{site.env}-queue"
    assert dead(site) == []
    (again,) = site.sqs.receive_message(QueueUrl=site.queue_url)["Messages"]
    assert again["Body"] == body
    assert group_of(cloud, f"{site.prefix}-{site.env}-asg")["DesiredCapacity"] == 1, "there is somebody to take it"


def test_each_kind_of_job_is_sent_anew_as_what_it_was(keeper: Site, capsys: pytest.CaptureFixture[str]) -> None:
    """With no more permissions than the pages say: those of a sender, and three on the dead-letter queue."""
    site = keeper
    own, large, failed = new_job_id(), new_job_id(), new_job_id()
    put(site, large_workflow_key(large), WORKFLOW)
    tags = {"TagSet": [{"Key": "project", "Value": "a"}]}  # which take permissions of their own to copy
    site.s3.put_object_tagging(Bucket=site.bucket, Key=large_workflow_key(large), Tagging=tags)
    bodies: list[Any] = [
        WORKFLOW,
        {"prompt": WORKFLOW, "job_id": own, "callback_url": "https://x/y", "inputs": {"a.png": "https://x/a.png"}},
        {"prompt": WORKFLOW, "retry_of": new_job_id()},
        {"exec_cmd": "true", "callback_url": "https://x/z"},
        {"workflow_key": large_workflow_key(large), "job_id": large, "inputs": {"a.png": "https://x/a.png"}},
        drop(site, "a café.json"),
        {"prompt": WORKFLOW, "job_id": failed},
    ]
    old = [parse_message(json.dumps(body), bury(site, body)) for body in bodies]
    answer(site, failed, "gave_up")
    assert main(["dead", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert (len(listed["jobs"]), listed["hidden"], listed["not_seen"]) == (len(bodies), 0, [])
    said = redriven(capsys)
    assert (said["unsent"], said["undeleted"], said["hidden"]) == ({}, {}, 0)
    names = {each["dead"]: each["job_id"] for each in said["sent"]}
    jobs = jobs_on(site)
    assert names.keys() == {job.id for job in old}
    assert jobs.keys() == set(names.values())
    assert jobs.keys().isdisjoint(names)
    for job in old:
        new_id = names[job.id]
        assert is_job_id(new_id)
        key = large_workflow_key(new_id) if job.workflow_key else None
        assert jobs[new_id][0] == replace(job, id=new_id, retry_of=job.id, workflow_key=key, source=None)
        if key:
            assert json.loads(site.s3.get_object(Bucket=site.bucket, Key=key)["Body"].read()) == WORKFLOW
    assert dead(site) == []


@pytest.fixture
def keeper(sender_site: Site, cloud: LocalCloud, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """A site on which this process has the sender's policy, and what docs/security.md tells of redrive besides."""
    site = sender_site
    printed = site.run("./create_env.sh", "--print-policy", "sender", site.env)
    assert (printed.returncode, printed.stderr) == (0, "")
    queue = f"arn:aws:sqs:{REGION}:{ACCOUNT_ID}:{site.prefix}-{site.env}-queue-dlq"
    actions = [f"sqs:{name}" for name in ("ReceiveMessage", "ChangeMessageVisibility", "DeleteMessage")]
    letters = {"Statement": [{"Effect": "Allow", "Action": actions, "Resource": queue}]}
    for name, value in cloud.allow_only("keeper", printed.stdout, json.dumps(letters)).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(comfy_utils, "_sessions", {})  # they keep their credentials
    before = list(cloud.denied)
    yield site
    assert cloud.denied == before


def test_all_that_a_job_has_is_sent_on() -> None:
    """A field that is new to Job has to be sent on, too, or told here why not."""
    sent_on = {"id", "workflow", "workflow_key", "command", "callback_url", "inputs", "extra_data", "retry_of"}
    # The file is copied, what is not used is not sent, and nobody's websocket waits for the new id.
    told_anew = {"source", "warnings", "live"}
    assert {each.name for each in fields(Job)} <= sent_on | told_anew


def test_of_a_job_that_has_ended_only_the_callback_is_made(
    sender_site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    site = sender_site
    own = new_job_id()
    named = json.dumps({"job_id": own, "prompt": WORKFLOW, "callback_url": "https://x/y"})
    event = drop(site, "x.json")
    bare, dropped = bury(site, WORKFLOW), parse_message(json.dumps(event), bury(site, event)).id
    bury(site, named)
    for job_id, kind in ((own, None), (bare, "execution_error"), (dropped, "cancelled")):
        answer(site, job_id, kind)
    said = redriven(capsys)
    assert said["unsent"] == {}
    assert {each["dead"]: each["job_id"] for each in said["sent"]} == {name: name for name in (own, bare, dropped)}
    jobs = jobs_on(site)
    assert jobs.keys() == {own, bare, dropped}
    assert [jobs[own][1], jobs[dropped][1]] == [named, json.dumps(event)], "as they were"
    assert jobs[bare][0] == Job(bare, workflow=WORKFLOW)


def test_what_is_no_job_and_what_cannot_be_copied_stays(
    sender_site: Site, cloud: LocalCloud, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    site = sender_site
    gone, other = new_job_id(), drop(site, "x.json")
    other["Records"][0]["s3"]["bucket"]["name"] = "elsewhere"
    stay = {
        bury(site, "x\x9b2J"): "it is no job, purge deletes it: the message is not JSON",
        bury(site, {"prompt": WORKFLOW, "job_id": "7"}): "it is no job, purge deletes it: job_id '7'",
        bury(site, {"workflow_key": large_workflow_key(gone), "job_id": gone}):
            f"its workflow {large_workflow_key(gone)} is not in {site.bucket} any more",
        bury(site, other): "s3://elsewhere/input/jobs/x.json is not in this environment's bucket",
    }  # fmt: skip
    good = [bury(site, image_workflow()) for _ in range(11)]
    said = redriven(capsys, code=1)
    assert {each["dead"] for each in said["sent"]} == set(good), "others go all the same"
    assert said["unsent"].keys() == stay.keys()
    for message_id, reason in stay.items():
        assert said["unsent"][message_id].startswith(reason)
    assert site.depth(site.dlq_url) == (4, 0), "all can be received at once"

    site.sqs.purge_queue(QueueUrl=site.dlq_url)
    large = new_job_id()
    put(site, large_workflow_key(large), WORKFLOW)
    bury(site, {"workflow_key": large_workflow_key(large), "job_id": large})
    monkeypatch.setattr(cloud, "fault", lambda _, call: Fault(403, "AccessDenied") if call == "PUT" else None)
    assert main(["redrive"]) == 1
    assert "s3:GetObject and s3:PutObject on input/jobs/* are needed" in capsys.readouterr().err
    monkeypatch.setattr(cloud, "fault", lambda _, call: Fault(403, "AccessDenied") if call == "GET" else None)
    assert main(["redrive"]) == 1
    said_to_people = capsys.readouterr()
    assert said_to_people.err == "fleet.py: 1 job could not be sent: not allowed: s3:GetObject\n"
    assert said_to_people.out == f"0 jobs sent to {site.prefix}-{site.env}-queue\n"
    assert site.depth(site.dlq_url) == (1, 0), "whether it has ended is not known, so it stays"


@pytest.mark.parametrize("point", ["SendMessageBatch", "DeleteMessageBatch", "the process, after sending"])
def test_a_redrive_that_is_cut_can_be_done_again_and_makes_no_second_job(
    point: str, sender_site: Site, calls: Calls, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    site = sender_site
    large = new_job_id()
    put(site, large_workflow_key(large), WORKFLOW)
    for _ in range(2):  # one job all the same
        bury(site, {"workflow_key": large_workflow_key(large), "job_id": large})
    ids = {bury(site, image_workflow()) for _ in range(11)} | {large}
    if point in ("SendMessageBatch", "DeleteMessageBatch"):
        calls.next(point, DENIED)
        cut = redriven(capsys, code=1)
        assert len(cut["unsent" if point == "SendMessageBatch" else "undeleted"]) == 10
        assert site.depth(site.dlq_url) == (13, 0), "all can be received at once"
    else:

        def interrupted(*_: object) -> dict[str, str]:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(dead_letters, "delete", interrupted)
            assert main(["redrive"]) == 130
        assert site.depth(site.dlq_url) == (13, 0)
    assert len(site.keys("input/jobs/")) == 2, "the large workflow was copied"
    before = {message["Body"] for message in dead_letters.peek(site.sqs, site.queue_url)}
    said = redriven(capsys)
    assert said["unsent"] | said["undeleted"] == {}
    names = {each["dead"]: each["job_id"] for each in said["sent"]}
    assert names.keys() == ids
    after = [message["Body"] for message in dead_letters.peek(site.sqs, site.queue_url)]
    assert {json.loads(body)["job_id"] for body in after} == set(names.values()), "each job once, by its id"
    assert before <= set(after)
    assert len(set(after)) == 12
    assert len(site.keys("input/jobs/")) == 2, "and to one place"
    assert dead(site) == []


def test_a_throttled_redrive_goes_on(sender_site: Site, calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    site = sender_site
    large = new_job_id()
    put(site, large_workflow_key(large), WORKFLOW)
    bury(site, {"workflow_key": large_workflow_key(large), "job_id": large})
    for operation in ("ReceiveMessage", "GET", "PUT", "SendMessageBatch", "DeleteMessageBatch"):
        calls.next(operation, Fault(400 if "Message" in operation else 503, "ThrottlingException"))
    said = redriven(capsys)
    assert (len(said["sent"]), said["unsent"], said["undeleted"]) == (1, {}, {})
    assert calls.faults_left() == 0


def test_a_letter_that_comes_again_is_tried_once(
    sender_site: Site, calls: Calls, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As where looking at many takes longer than each is hidden: it would be both sent and not."""
    large = new_job_id()
    put(sender_site, large_workflow_key(large), WORKFLOW)
    letter = bury(sender_site, {"workflow_key": large_workflow_key(large), "job_id": large})
    monkeypatch.setattr(dead_letters, "PEEK_S", 0)
    calls.next("PUT", DENIED)
    said = redriven(capsys, code=1)
    assert (said["sent"], list(said["unsent"])) == ([], [letter])
    assert calls.seen.count("PUT") == 1
    assert sender_site.depth(sender_site.dlq_url) == (1, 0)


def test_what_became_of_each_attempt_is_told(
    sender_site: Site, cloud: LocalCloud, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    site = sender_site
    died, silent, looked_at = (new_job_id() for _ in range(3))
    attempts = [
        {"attempt": number, "at": f"2026-11-24T23:3{number}:00.000Z", "instance_id": f"i-{machine}",
         "kind": "out_of_memory", "message": f"no room\x1b[2J {number}"}
        for number, machine in ((1, 1), (3, 1))
    ]  # fmt: skip
    put(
        site,
        f"output/{died}/attempts.json",
        {"attempts": [*attempts, "?"], "answered_at": "2026-11-25T00:00:00.000Z"},
    )
    put(site, f"output/{silent}/attempts.json", ["?"])
    result = answer(site, died, "gave_up", "no attempt came to an end\x1b[2J")
    for job_id in (looked_at, died, silent):
        bury(site, {"prompt": WORKFLOW, "job_id": job_id})
        if job_id == looked_at:
            site.sqs.receive_message(QueueUrl=site.dlq_url, VisibilityTimeout=600)
    assert main(["dead"]) == 0
    title, *lines, hidden = capsys.readouterr().out.splitlines()
    assert title.startswith("2 jobs in ")
    assert hidden.startswith("  1 more is being looked at just now: ask again")
    first, second = ([name in line for line in lines].index(True) for name in (died, silent))
    log = f"s3://{site.bucket}/output/i-1/parse_job.log"
    assert lines[first + 1 : first + 5] == [
        "      failed, gave_up: no attempt came to an end (answered at 2026-11-25T00:00:00.000Z)",
        "      attempt 1 at 2026-11-24T23:31:00.000Z on i-1: no room 1",
        "      attempt 3 at 2026-11-24T23:33:00.000Z on i-1: no room 3",
        f"      {log}",
    ]
    assert lines[second + 1] == f"      {dead_letters.NO_ANSWER}"
    assert len(lines) == 7

    def found() -> dict[str, Any]:
        assert main(["dead", "--json"]) == 0
        said: dict[str, Any] = json.loads(capsys.readouterr().out)
        return said

    said = found()
    jobs = {job["job_id"]: job for job in said["jobs"]}
    assert (said["hidden"], said["not_seen"]) == (1, [])
    assert jobs[died]["result"] == result
    assert jobs[died]["attempts"] == [attempt | {"log": log} for attempt in attempts]
    assert [jobs[name]["answered_at"] for name in (died, silent)] == ["2026-11-25T00:00:00.000Z", None]
    assert (jobs[silent]["result"], jobs[silent]["attempts"]) == (None, [])

    monkeypatch.setattr(cloud, "fault", lambda _, call: Fault(403, "AccessDenied") if call == "GET" else None)
    said = found()
    assert said["not_seen"] == ["results and attempts cannot be read: not allowed: s3:GetObject"]
    assert [(job["result"], job["attempts"]) for job in said["jobs"]] == [(None, [])] * 2


def test_dead_jobs_are_deleted_only_when_that_is_meant(
    make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch, ours: Callable[[Site], None],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    site = make_site()
    ours(site)
    site.sqs.send_message(QueueUrl=site.dlq_url, MessageBody="x\x9b2J")
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
    _, job, told = capsys.readouterr().out.splitlines()
    assert "no job (the message is not JSON" in job
    assert told == f"      {dead_letters.NO_ANSWER}"
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
