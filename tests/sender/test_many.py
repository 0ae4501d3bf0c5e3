"""Many jobs at once: batches, refusals, large workflows, inputs."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from local_cloud import Fault, LocalCloud
from places import ROOT
from sender_tools import bodies, make_group
from workplace import Site, image_workflow

import send_job
from comfy_utils import (
    MAX_MESSAGE_BYTES,
    InvalidMessageError,
    load_settings,
    new_job_id,
)


def test_many_workflows_are_ten_to_a_request_and_one_decision(
    cloud: LocalCloud, sender_site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    desired = make_group(cloud, sender_site)
    calls: list[str] = []
    monkeypatch.setattr(cloud, "fault", lambda _, operation: calls.append(operation))
    workflows = [image_workflow(number) for number in range(25)]
    ids = send_job.submit_many(workflows, callback_url="https://x/y")
    assert calls.count("SendMessageBatch") == 3
    assert calls.count("DescribeAutoScalingGroups") == calls.count("SetDesiredCapacity") == 1
    assert desired() == 5, "the group's maximum, for ceil(25 / 3)"
    sent = {body["job_id"]: body for body in bodies(sender_site)}
    assert [sent[job_id]["prompt"] for job_id in ids] == workflows, "ids come back in the order of the workflows"
    assert {body["callback_url"] for body in sent.values()} == {"https://x/y"}
    assert send_job.submit_many([]) == []


def test_what_sqs_refuses_of_a_batch_is_sent_again_unless_it_is_our_fault(
    sender_site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    settings = load_settings(None, sender_site.folder / "env")
    sender = send_job.Sender(settings)
    real = sender._queue()
    asked: list[list[str]] = []
    ids = [new_job_id() for _ in range(4)]

    class Moody:
        def send_message_batch(self, QueueUrl: str, Entries: list[dict[str, str]]) -> dict[str, Any]:  # noqa: N803
            asked.append([entry["Id"] for entry in Entries])
            failed = [
                {"Id": ids[1], "Code": "ServiceUnavailable", "SenderFault": False},
                {"Id": ids[2], "Code": "InvalidMessageContents", "Message": "bad", "SenderFault": True},
                {"Id": ids[3], "Code": "InternalError", "SenderFault": False},
            ]
            failed = [entry for entry in failed if entry["Id"] in asked[-1]][: None if len(asked) == 1 else 1]
            good = [entry for entry in Entries if entry["Id"] not in [item["Id"] for item in failed]]
            answer = real.send_message_batch(QueueUrl=QueueUrl, Entries=good) if good else {}
            return {**answer, "Failed": failed}

    sender._sqs = Moody()
    with pytest.raises(send_job.NotAllSentError) as caught:
        sender.send_many([{"exec_cmd": "true"}] * 4, ids)
    assert asked == [ids, [ids[1], ids[3]]] + [[ids[1]]] * (send_job.BATCH_TRIES - 2)
    assert caught.value.sent == [ids[0], ids[3]]
    assert caught.value.unsent == [ids[1], ids[2]]
    assert str(caught.value) == "2 of 4 jobs were sent: ServiceUnavailable: "
    assert {body["job_id"] for body in bodies(sender_site)} == {ids[0], ids[3]}


def test_a_refused_request_names_what_was_not_sent(
    cloud: LocalCloud, sender_site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    desired = make_group(cloud, sender_site)
    monkeypatch.setattr(send_job, "REQUESTS_AT_ONCE", 1)
    answers = [None, Fault(403, "AccessDenied")]
    monkeypatch.setattr(
        cloud, "fault", lambda _, operation: answers.pop(0) if operation == "SendMessageBatch" else None
    )
    ids = [new_job_id() for _ in range(12)]
    with pytest.raises(send_job.NotAllSentError, match=r"10 of 12 jobs were sent: .*AccessDenied") as caught:
        send_job.submit_many([image_workflow()] * 12, job_ids=ids)
    assert (caught.value.sent, caught.value.unsent) == (ids[:10], ids[10:])
    assert desired() == 4, "what was sent is to be run"


def test_large_workflows_among_many(sender_site: Site) -> None:
    large, small = image_workflow(), image_workflow()
    large["1"]["_meta"] = {"title": "x" * 1_100_000}
    ids = send_job.submit_many([small, large, small])
    sent = {body["job_id"]: body for body in bodies(sender_site)}
    assert sent[ids[1]] == {"workflow_key": f"input/jobs/{ids[1]}.json", "job_id": ids[1]}
    stored = sender_site.s3.get_object(Bucket=sender_site.bucket, Key=f"input/jobs/{ids[1]}.json")["Body"].read()
    assert json.loads(stored) == large


def test_the_addresses_of_inputs_travel_with_the_job(sender_site: Site) -> None:
    inputs = {"photo.png": "https://example.com/some.png?signature=x"}
    small, large = image_workflow(), image_workflow()
    large["1"]["_meta"] = {"title": "x" * 1_100_000}
    ids = [send_job.submit(workflow, inputs=inputs) for workflow in (small, large)]
    sent = {body["job_id"]: body for body in bodies(sender_site)}
    assert [sent[job_id]["inputs"] for job_id in ids] == [inputs, inputs]
    with pytest.raises(InvalidMessageError, match=r"inputs has the name '../photo.png'"):
        send_job.submit(small, inputs={"../photo.png": "https://example.com/x"})
    assert sender_site.depth() == (0, 2)


def test_batches_fit_into_a_request() -> None:
    half = MAX_MESSAGE_BYTES // 2
    sizes = [half, half, 1, 1, *[2] * 12]
    messages = [send_job.Message(str(number), "", size) for number, size in enumerate(sizes)]
    made = list(send_job.batches(messages))
    assert [len(batch) for batch in made] == [2, 10, 4]
    assert [message for batch in made for message in batch] == messages


@pytest.mark.parametrize(
    ("workflows", "job_ids", "sentence"),
    [
        ([image_workflow(), {"nodes": [], "links": []}], None, "workflow 2: this workflow is saved in UI format"),
        (
            [image_workflow(math.nan)],
            None,
            "workflow 1: node 2 StandinSleep: its input seconds is nan, which JSON cannot say",
        ),
        ([image_workflow(more={"7": {"class_type": "X", "inputs": {"path": ROOT}}})], None, "Path is not JSON"),
        ([image_workflow()], ["x", "y"], "there are 2 job_ids for 1 jobs: give one for each"),
        ([image_workflow()] * 2, ["0f8fad5b-d9cb-469f-a165-70867728950e", "X"], "job 2: job_id 'X' is no lowercase"),
        ([image_workflow()] * 2, ["0f8fad5b-d9cb-469f-a165-70867728950e"] * 2, "70867728950e is there twice"),
    ],
)
def test_bad_input_among_many_is_refused_before_anything_is_sent(
    sender_site: Site, workflows: list[Any], job_ids: list[str] | None, sentence: str
) -> None:
    with pytest.raises(InvalidMessageError, match=sentence):
        send_job.submit_many(workflows, job_ids=job_ids)
    assert sender_site.depth() == (0, 0)
