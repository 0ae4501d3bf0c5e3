"""Jobs that are dead: what became of them, sending them anew, deleting them.

A message that was received MAX_RECEIVES times without an end lies in the dead-letter queue, <queue>-dlq. Its worker, or
another one within minutes, has written the job's receipt, which is never changed.
"""

from __future__ import annotations

import json
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from comfy_utils import (
    InvalidMessageError,
    Job,
    NothingToRunError,
    Settings,
    attempts_key,
    aws_client,
    count,
    error_code,
    large_workflow_key,
    one_line,
    queue_depth,
    result_key,
    say,
)
from ground.messages import parse_message
from operate.words import refusal
from send_job import JobResult, Message, Sender, batches, message_of, read_json, read_result

PEEK_S = 30
"""So long a message that is looked at, or sent back, is hidden from others."""
READS_AT_ONCE = 8
NO_ANSWER = "no answer yet: a worker that idles writes it within minutes, and one comes with the next job"
FINAL = ("invalid_message", "invalid_workflow", "execution_error", "interrupted", "timeout", "cancelled",
         "command_failed", "command_refused")  # fmt: skip
"""The errors of jobs that have run to their end, as those that succeeded: dead is only the word of it."""


# --- The commands ----------------------------------------------------------------------------------------


def list_dead(settings: Settings, *, as_json: bool) -> int:
    """List the dead-letter queue; returns the exit code."""
    dead = read_dead(settings)
    if as_json:
        print(json.dumps(dead))
    else:
        for line in tell_dead(dead):
            say(line)
    return 0


def redrive(settings: Settings, *, as_json: bool) -> int:
    """Send the dead jobs anew; returns the exit code."""
    sender = Sender(settings)
    tell: Callable[[str], None] = (lambda _: None) if as_json else say
    done = send_anew(sender, tell)
    sent, queue = len(done.sent), settings.sqs_name
    tell(f"{count(sent, 'job')} sent to {queue}")
    if done.hidden:
        tell(tell_hidden(done.hidden))
    capacity = sender.raise_capacity(sent, say=tell) if sent else None
    if as_json:
        told = {"queue": queue, "sent": done.sent, "unsent": done.unsent, "undeleted": done.undeleted}
        wanted = capacity.after if capacity else None
        print(json.dumps(told | {"hidden": done.hidden, "instances_wanted": wanted}))
    for reason, number in Counter(done.unsent.values()).items():
        say(f"fleet.py: {count(number, 'job')} could not be sent: {reason}", to=sys.stderr)
    for reason, number in Counter(done.undeleted.values()).items():
        stay = f"{count(number, 'dead letter')} could not be deleted after it was sent"
        say(f"fleet.py: {stay}: {reason}; do it again, an id is run once", to=sys.stderr)
    return 1 if done.unsent or done.undeleted else 0


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
            say("fleet.py: nothing was deleted", to=sys.stderr)
            return 1
    sqs.purge_queue(QueueUrl=url)
    if as_json:
        print(json.dumps({"queue": queue, "deleted": number}))
    else:
        say(f"{jobs} deleted from {queue}; AWS takes up to a minute for it")
    return 0


# --- What is dead, and why -------------------------------------------------------------------------------


def read_dead(settings: Settings) -> dict[str, Any]:
    """The dead jobs, oldest first. What cannot be read of them is None, and `not_seen` says why."""
    sqs, s3 = aws_client("sqs", settings.region), aws_client("s3", settings.region)
    url = dead_letters(sqs, settings)
    there = sum(queue_depth(sqs, url))
    messages = peek(sqs, url)
    not_seen: dict[str, None] = {}

    def read(key: str) -> Any:
        try:
            return read_json(s3, settings.s3_bucket, key)
        except Exception as error:
            not_seen[f"results and attempts cannot be read: {refusal(error, 's3')}"] = None
            return None

    def describe(message: dict[str, Any]) -> dict[str, Any]:
        job_id, kind, problem = job_of(message)
        known = read(attempts_key(job_id))
        known = known if isinstance(known, dict) else {}
        return {
            "job_id": job_id,
            "kind": kind,
            "problem": problem,
            "sent_at": f"{sent_at(message):%Y-%m-%dT%H:%M:%SZ}",
            "receives": int(message["Attributes"]["ApproximateReceiveCount"]),
            "result": read(result_key(job_id)),
            "answered_at": known.get("answered_at"),
            "attempts": with_logs(known.get("attempts"), settings.s3_bucket),
        }

    with ThreadPoolExecutor(READS_AT_ONCE) as pool:
        jobs = list(pool.map(describe, messages))
    hidden = max(0, there - len(jobs))
    return {"queue": f"{settings.sqs_name}-dlq", "jobs": jobs, "hidden": hidden, "not_seen": list(not_seen)}


def with_logs(attempts: Any, bucket: str) -> list[dict[str, Any]]:
    """What is known of a job's attempts, each with the address of the log of its instance's worker."""
    return [
        attempt | {"log": f"s3://{bucket}/output/{attempt.get('instance_id')}/parse_job.log"}
        for attempt in (attempts if isinstance(attempts, list) else [])
        if isinstance(attempt, dict)
    ]


def tell_dead(dead: dict[str, Any]) -> list[str]:
    """The dead jobs, as lines for people."""
    lines = [f"{count(len(dead['jobs']), 'job')} in {dead['queue']}", *(f"  {each}" for each in dead["not_seen"])]
    for job in dead["jobs"]:
        kind = f"no job ({job['problem']})" if job["problem"] else job["kind"]
        lines.append(f"  {job['job_id']}  {kind}, sent {datetime.fromisoformat(job['sent_at']):%Y-%m-%d %H:%M} UTC")
        lines.append(f"      {tell_answer(job['result'], job['answered_at'])}")
        for each in job["attempts"]:
            which = f"attempt {each.get('attempt')} at {each.get('at')} on {each.get('instance_id')}"
            lines.append(f"      {which}: {each.get('message')}")
        lines += [f"      {log}" for log in dict.fromkeys(each["log"] for each in job["attempts"])]
    if dead["hidden"]:
        lines.append(f"  {tell_hidden(dead['hidden'])}")
    return lines


def tell_answer(result: JobResult | None, answered_at: str | None) -> str:
    """What a dead job's receipt says, and whether its callback is made, in one line."""
    if result is None:
        return NO_ANSWER
    error = result["error"]
    told = f"failed, {error['kind']}: {error['message']}" if error else "succeeded"
    return f"{told} ({f'answered at {answered_at}' if answered_at else 'its callback was not accepted yet'})"


def tell_hidden(hidden: int) -> str:
    """That some could not be received, because somebody else has them."""
    return (
        f"{hidden} more {'is' if hidden == 1 else 'are'} being looked at just now: ask again (SQS counts late, too)"
    )


def job_of(message: dict[str, Any]) -> tuple[str, str | None, str | None]:
    """A message's job id, and what kind of job it is, or else why it is none."""
    try:
        job = parse_message(message["Body"], message["MessageId"])
    except Exception as error:  # it is dead, so it may be anything
        return getattr(error, "job_id", None) or message["MessageId"], None, one_line(error)
    return job.id, "command" if job.command is not None else "workflow", None


def has_ended(result: JobResult) -> bool:
    """Whether the job has run to its end, so that another run would end the same."""
    return result["error"] is None or result["error"]["kind"] in FINAL


# --- Sending anew ----------------------------------------------------------------------------------------


class StaysError(Exception):
    """A dead letter is left where it is; the text says why."""


@dataclass
class Redriven:
    """What became of the dead letters."""

    sent: list[dict[str, str]] = field(default_factory=list)
    """Of each job that was sent the id it had (`dead`) and the one it has now (`job_id`)."""
    unsent: dict[str, str] = field(default_factory=dict)
    """Why others were not, by message id."""
    undeleted: dict[str, str] = field(default_factory=dict)
    """Why letters of jobs that were sent are still there, by message id."""
    hidden: int = 0
    """How many could not be received, because somebody else has them."""


def send_anew(sender: Sender, tell: Callable[[str], None]) -> Redriven:
    """Send each dead job anew, and say of each under which id.

    Its letter is deleted only after the new message was accepted. Where that is cut, the next redrive sends a message
    with the same new id, and an id is run once. SQS's own redrive is not used because a job that has its receipt is not
    run again under its id. What the queue refuses ends it, as it would refuse the others, too.
    """
    sqs, s3 = aws_client("sqs", sender.settings.region), aws_client("s3", sender.settings.region)
    url = dead_letters(sqs, sender.settings)
    there = queue_depth(sqs, url)
    left = max(10, there.visible)  # not without end: some may come back at once
    done = Redriven()
    held: dict[str, dict[str, Any]] = {}  # by message id; hidden, so that none is received twice
    seen: set[str] = set()
    goes_on = True
    try:
        while goes_on and left > 0 and (messages := receive_some(sqs, url)):
            fresh = [message for message in messages if message["MessageId"] not in seen]
            seen.update(message["MessageId"] for message in fresh)
            held |= {message["MessageId"]: message for message in messages}
            left -= max(1, len(fresh))
            goes_on = send_some(sender, s3, fresh, done, tell)
            gone = [held[each["MessageId"]] for each in fresh if each["MessageId"] not in done.unsent]
            done.undeleted |= delete(sqs, url, gone)
            for message_id in {message["MessageId"] for message in gone} - done.undeleted.keys():
                del held[message_id]
            goes_on = goes_on and not done.undeleted
    finally:
        with suppress(Exception):  # they come back by themselves, only later
            give_back(sqs, url, list(held.values()))
    done.hidden = max(0, sum(there) - len(seen))
    return done


def send_some(
    sender: Sender, s3: Any, letters: Sequence[dict[str, Any]], done: Redriven, tell: Callable[[str], None]
) -> bool:
    """Send the jobs of these letters, noted in `done`; returns False where the queue has refused one."""
    dead_ids: dict[str, str] = {}
    made: dict[str, Message] = {}  # by its job id: two letters of one job are one new job
    letters_of: dict[str, list[str]] = {}
    for letter in letters:
        try:
            dead_id, message = renew(s3, sender.settings, letter)
        except Exception as error:
            done.unsent[letter["MessageId"]] = refusal(error, "s3")
            continue
        dead_ids[message.job_id], made[message.job_id] = dead_id, message
        letters_of.setdefault(message.job_id, []).append(letter["MessageId"])
    refused: dict[str, str] = {}
    for batch in batches(list(made.values())):
        refused |= sender.send_batch(batch)
    for job_id, dead_id in dead_ids.items():
        if job_id in refused:
            done.unsent |= dict.fromkeys(letters_of[job_id], refused[job_id])
            continue
        done.sent.append({"dead": dead_id, "job_id": job_id})
        tell(f"{dead_id} → {f'{job_id} (it has ended: only its callback is made)' if job_id == dead_id else job_id}")
    return not refused


def renew(s3: Any, settings: Settings, letter: dict[str, Any]) -> tuple[str, Message]:
    """A dead letter's job id, and the message to be sent for it.

    It is a new job, unless the old one has ended and only its callback is missing: then it is the old one, of which a
    worker makes the callback and nothing else. Raises StaysError, InvalidMessageError and what boto3 raises.
    """
    bucket, text = settings.s3_bucket, letter["Body"]
    try:
        job = parse_message(text, letter["MessageId"])
    except (InvalidMessageError, NothingToRunError) as error:
        raise StaysError(f"it is no job, purge deletes it: {error}") from None
    body = body_of(job)
    result = read_result(s3, bucket, job.id)
    if result and has_ended(result):
        if parse_message(text, new_id_of(job.id)).id == job.id:  # it says so itself
            return job.id, Message(job.id, text, len(text.encode()))
        return job.id, message_of(body, job.id, job.callback_url)
    new_id = new_id_of(job.id)
    if job.workflow_key:
        if job.source not in (None, f"s3://{bucket}/{job.workflow_key}"):
            raise StaysError(f"{job.source} is not in this environment's bucket {bucket}")
        body["workflow_key"] = large_workflow_key(new_id)
        copy(s3, bucket, job.workflow_key, large_workflow_key(new_id))
    return job.id, message_of(body | {"retry_of": job.id}, new_id, job.callback_url)


def new_id_of(job_id: str) -> str:
    """The id under which a dead job is sent anew: always the same, so that it is run once."""
    return str(uuid.uuid5(uuid.UUID(job_id), "redrive"))


def body_of(job: Job) -> dict[str, Any]:
    """What a message says of the job, but for its id and its callback."""
    body = {
        "prompt": job.workflow,
        "workflow_key": job.workflow_key,
        "exec_cmd": job.command,
        "inputs": dict(job.inputs),
        "extra_data": dict(job.extra_data),
        "retry_of": job.retry_of,
    }
    return {name: value for name, value in body.items() if value}


def copy(s3: Any, bucket: str, key: str, new_key: str) -> None:
    """Copy a workflow within the bucket, without its tags, which takes permissions of their own."""
    try:
        s3.copy_object(
            Bucket=bucket, Key=new_key, CopySource={"Bucket": bucket, "Key": key}, TaggingDirective="REPLACE"
        )
    except s3.exceptions.NoSuchKey:
        raise StaysError(f"its workflow {key} is not in {bucket} any more: put it back, or purge") from None
    except Exception as error:
        if error_code(error) != "AccessDenied":
            raise
        needs = "s3:GetObject and s3:PutObject on input/jobs/*"
        raise StaysError(f"its workflow {key} could not be copied: {needs} are needed") from None


def delete(sqs: Any, url: str, messages: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Delete received messages; returns why not, by message id."""
    if not messages:
        return {}
    try:
        answer = sqs.delete_message_batch(QueueUrl=url, Entries=entries_of(messages))
    except Exception as error:
        return dict.fromkeys((message["MessageId"] for message in messages), refusal(error, "sqs"))
    return {entry["Id"]: f"{entry['Code']}: {entry.get('Message', '')}" for entry in answer.get("Failed", [])}


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
