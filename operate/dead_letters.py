"""Jobs that are dead: what became of them, sending them back, deleting them.

A message that was received MAX_RECEIVES times without an end lies in the dead-letter queue, <queue>-dlq.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from comfy_utils import MAX_MESSAGE_BYTES, Settings, aws_client, parse_message, queue_depth
from operate.words import printable, refusal
from send_job import Message, Sender, batches, count, one_line, read_result

PEEK_S = 30
"""So long a message that is looked at, or sent back, is hidden from others."""
LOGS_READ, LOG_BYTES = 20, 256 * 1024
"""So many of the newest logs are searched for what became of dead jobs, so much of each one's end."""


# --- The commands ----------------------------------------------------------------------------------------


def list_dead(settings: Settings, *, as_json: bool) -> int:
    """List the dead-letter queue; returns the exit code."""
    dead = read_dead(settings)
    print(json.dumps(dead) if as_json else "\n".join(tell_dead(dead)))
    return 0


def redrive(settings: Settings, *, as_json: bool) -> int:
    """Send the dead jobs back to their queue, under the ids they had; returns the exit code."""
    sender = Sender(settings)
    sent, unsent = send_back(sender)
    if not as_json:
        print(f"{count(sent, 'job')} sent back to {settings.sqs_name}")
    capacity = sender.raise_capacity(sent, say=(lambda _: None) if as_json else print) if sent else None
    if as_json:
        wanted = capacity.after if capacity else None
        print(json.dumps({"queue": settings.sqs_name, "sent": sent, "unsent": unsent, "instances_wanted": wanted}))
    if unsent:
        reason = next(iter(unsent.values()))
        print(f"fleet.py: {count(len(unsent), 'job')} could not be sent back: {reason}", file=sys.stderr)
    return 1 if unsent else 0


def purge(settings: Settings, *, sure: bool, as_json: bool) -> int:
    """Delete the dead jobs, if that is what is wanted; returns the exit code."""
    sqs = aws_client("sqs", settings.region)
    url = dead_letters(sqs, settings)
    number = sum(queue_depth(sqs, url))
    jobs, queue = count(number, "job"), f"{settings.sqs_name}-dlq"
    if not sure:
        try:
            answer = input(f"{jobs} in {queue} will be lost. Type {settings.env} to delete them: ")
        except EOFError:
            answer = ""
        if answer.strip() != settings.env:
            print("fleet.py: nothing was deleted", file=sys.stderr)
            return 1
    sqs.purge_queue(QueueUrl=url)
    told = f"{jobs} deleted from {queue}; AWS takes up to a minute for it"
    print(json.dumps({"queue": queue, "deleted": number}) if as_json else told)
    return 0


# --- What is dead, and why -------------------------------------------------------------------------------


def read_dead(settings: Settings) -> dict[str, Any]:
    """The dead jobs, oldest first. What cannot be read of them is None, and `not_seen` says why."""
    sqs, s3 = aws_client("sqs", settings.region), aws_client("s3", settings.region)
    messages = peek(sqs, dead_letters(sqs, settings))
    dead: dict[str, Any] = {"queue": f"{settings.sqs_name}-dlq", "jobs": [], "not_seen": []}
    stories: dict[str, tuple[str, str]] = {}
    if messages:
        try:
            since = min(map(sent_at, messages)).replace(microsecond=0)  # S3 knows whole seconds
            stories = read_stories(s3, settings.s3_bucket, since)
        except Exception as error:
            dead["not_seen"] = [f"the workers' logs cannot be searched: {refusal(error, 's3')}"]
    for message in messages:
        job_id, kind, problem = job_of(message)
        reason, log = stories.get(message["MessageId"], (None, None))
        result = None
        with suppress(Exception):
            result = read_result(s3, settings.s3_bucket, job_id)
        dead["jobs"].append(
            {"job_id": job_id, "kind": kind, "problem": problem, "sent_at": f"{sent_at(message):%Y-%m-%dT%H:%M:%SZ}",
             "receives": int(message["Attributes"]["ApproximateReceiveCount"]), "reason": reason,
             "log": log and f"s3://{settings.s3_bucket}/{log}", "result": result}
        )  # fmt: skip
    return dead


def tell_dead(dead: dict[str, Any]) -> list[str]:
    """The dead jobs, as lines for people."""
    lines = [f"{count(len(dead['jobs']), 'job')} in {dead['queue']}", *(f"  {each}" for each in dead["not_seen"])]
    for job in dead["jobs"]:
        kind = f"no job ({printable(job['problem'])})" if job["problem"] else job["kind"]
        lines.append(f"  {job['job_id']}  {kind}, sent {datetime.fromisoformat(job['sent_at']):%Y-%m-%d %H:%M} UTC")
        unknown = (
            f"received {job['receives']} times, and no word of it in the logs: they are stored every few minutes"
        )
        lines.append(f"      {printable(job['reason'] or unknown)}")
        if job["result"] is not None:
            failure = job["result"]["error"]
            ended = f"failed: {failure['message']}" if failure else "succeeded"
            lines.append(f"      its result is stored all the same, {printable(ended)}")
        if job["log"]:
            lines.append(f"      {job['log']}")
    return lines


def job_of(message: dict[str, Any]) -> tuple[str, str | None, str | None]:
    """A message's job id, and what kind of job it is, or else why it is none."""
    try:
        job = parse_message(message["Body"], message["MessageId"])
    except Exception as error:  # it is dead, so it may be anything
        return getattr(error, "job_id", None) or message["MessageId"], None, one_line(error)
    return job.id, "command" if job.command is not None else "workflow", None


def read_stories(s3: Any, bucket: str, since: datetime) -> dict[str, tuple[str, str]]:
    """Why messages were put back the last time, by message id, and the key of the worker's log that says so."""
    pages = s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix="output/i-")
    logs = [item for page in pages for item in page.get("Contents", []) if "/parse_job.log" in item["Key"]]
    logs = sorted((item for item in logs if item["LastModified"] >= since), key=lambda item: item["LastModified"])
    stories = {}
    for item in logs[-LOGS_READ:]:
        stored = s3.get_object(Bucket=bucket, Key=item["Key"], Range=f"bytes=-{LOG_BYTES}")["Body"].read()
        for message_id, attempt, reason in re.findall(
            r"Message (\S+) is put back for \d+ s after (attempt \d+ of \d+): (.*)", stored.decode(errors="replace")
        ):
            stories[message_id] = (f"{attempt}: {reason}", item["Key"])
    return stories


# --- Sending back ----------------------------------------------------------------------------------------


def send_back(sender: Sender) -> tuple[int, dict[str, str]]:
    """Send the dead jobs to their queue; returns how many were, and by message id why others could not be.

    Each is deleted only after it was sent, so one may be there twice but none gets lost, and an id is run once. SQS's
    own redrive is not used because it gives new message ids, which are the job ids of messages without a job_id.
    """
    sqs = aws_client("sqs", sender.settings.region)
    url = dead_letters(sqs, sender.settings)
    left = max(10, queue_depth(sqs, url).visible)  # not without end: some may come back at once
    sent = 0
    unsent: dict[str, str] = {}
    while left > 0 and not unsent and (messages := receive_some(sqs, url, min(10, left))):
        left -= len(messages)
        for batch in batches([with_its_id(message) for message in messages]):
            unsent |= sender.send_batch(batch)
        done = [message for message in messages if message["MessageId"] not in unsent]
        if done:
            sqs.delete_message_batch(QueueUrl=url, Entries=entries_of(done))
        give_back(sqs, url, [message for message in messages if message["MessageId"] in unsent])
        sent += len(done)
    return sent, unsent


def with_its_id(message: dict[str, Any]) -> Message:
    """A message to be sent again. One without a job_id has its message's id written into it, which is its job id."""
    text, message_id = message["Body"], message["MessageId"]
    with suppress(Exception):  # what is no job goes back as it is
        job, body = parse_message(text, message_id), json.loads(text)
        if job.id == message_id and "job_id" not in body:
            body = {"prompt": body} if job.workflow is not None and "prompt" not in body else body
            owned = json.dumps(body | {"job_id": message_id}, ensure_ascii=False)
            text = owned if len(owned.encode()) <= MAX_MESSAGE_BYTES else text
    return Message(message_id, text, len(text.encode()))


# --- The queue -------------------------------------------------------------------------------------------


def dead_letters(sqs: Any, settings: Settings) -> str:
    """The dead-letter queue's address."""
    return str(sqs.get_queue_url(QueueName=f"{settings.sqs_name}-dlq")["QueueUrl"])


def peek(sqs: Any, url: str) -> list[dict[str, Any]]:
    """The messages of a queue, oldest first, which are given back at once."""
    found: dict[str, dict[str, Any]] = {}
    limit = time.monotonic() + PEEK_S / 2
    try:
        while time.monotonic() < limit and (messages := receive_some(sqs, url)):
            found |= {message["MessageId"]: message for message in messages}
    finally:
        give_back(sqs, url, list(found.values()))
    return sorted(found.values(), key=sent_at)


def receive_some(sqs: Any, url: str, most: int = 10) -> list[dict[str, Any]]:
    """Messages, hidden from others for PEEK_S."""
    answer = sqs.receive_message(
        QueueUrl=url,
        MaxNumberOfMessages=most,
        WaitTimeSeconds=1,
        VisibilityTimeout=PEEK_S,
        MessageSystemAttributeNames=["ApproximateReceiveCount", "SentTimestamp"],
    )
    return list(answer.get("Messages", []))


def give_back(sqs: Any, url: str, messages: Sequence[dict[str, Any]]) -> None:
    """Let messages be received by others at once."""
    for first in range(0, len(messages), 10):
        entries = [entry | {"VisibilityTimeout": 0} for entry in entries_of(messages[first : first + 10])]
        sqs.change_message_visibility_batch(QueueUrl=url, Entries=entries)


def entries_of(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What a batch call wants to know of received messages."""
    return [{"Id": message["MessageId"], "ReceiptHandle": message["ReceiptHandle"]} for message in messages]


def sent_at(message: dict[str, Any]) -> datetime:
    """When a message was sent."""
    return datetime.fromtimestamp(int(message["Attributes"]["SentTimestamp"]) / 1000, UTC)
