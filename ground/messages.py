"""What a queue message asks for, in whichever of its shapes it comes; worker and operator read them alike."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any
from urllib.parse import unquote_plus

from comfy_utils import (
    KNOWN_KEYS,
    InvalidMessageError,
    InvalidWorkflowError,
    Job,
    NothingToRunError,
    check_extra_data,
    check_inputs,
    check_workflow,
    explain_no_workflow,
    is_http_url,
    is_job_id,
    is_node,
    is_text,
    large_workflow_key,
    load_json,
)

UNUSED_KEYS = {
    "number": "jobs run as SQS hands them out",
    "front": "jobs run as SQS hands them out",
    "partial_execution_targets": "every output is made; take out the nodes of the others",
    "workflow": "what pictures are to carry goes into extra_data, as extra_pnginfo.workflow",
}
"""Keys that ComfyUI's own POST /prompt or people use, and why they change nothing here."""
WARNED_KEYS = 10


def parse_message(body: str, message_id: str) -> Job:
    """Understand a message body of any of the shapes the queue takes.

    1. an API-format workflow itself, 2. {"exec_cmd": "shell command"}, 3. {"prompt": workflow, "job_id": ...,
    "callback_url": ..., "inputs": ..., "extra_data": ...}, as ComfyUI's POST /prompt takes it, where
    {"workflow_key": "input/jobs/<job_id>.json"} stands for a workflow too large for a message, 4. what S3 sends when a
    file has come into input/jobs/; each of them in an envelope of SNS or EventBridge as well. The extras but inputs
    and extra_data may stand beside exec_cmd, too, and so may "retry_of", the id of the dead job that is sent anew,
    and "live": true, where somebody follows each step, or "when watched".
    Without a job_id or a prompt_id the envelope's id or `message_id`, UUIDs too, serve. Raises InvalidMessageError and NothingToRunError.
    """
    message, own_id = open_message(load_json("the message", body), message_id)
    try:
        if not isinstance(message, dict):
            remedy = "send a workflow exported for the API"
            found = explain_no_workflow(message) if isinstance(message, str) else remedy
            raise InvalidMessageError(f"the message is JSON but no object: {found}")
        if isinstance(message.get("Records"), list) or message.get("Event") == "s3:TestEvent":
            return _parse_s3_event(message)
        if message.get("source") == "aws.s3" and isinstance(message.get("detail"), dict):
            return _parse_eventbridge_event(message)
        kinds = [
            key for key in ("prompt", "workflow_key", "exec_cmd") if key in message and not is_node(message[key])
        ]
        if not kinds:
            return Job(own_id, workflow=check_workflow(message))
        return _parse_job(message, kinds, own_id)
    except InvalidMessageError as error:
        told = message if isinstance(message, dict) else {}
        job_id, callback_url = told.get("job_id", told.get("prompt_id")), told.get("callback_url")
        error.job_id = job_id if is_job_id(job_id) else own_id if own_id != message_id else None
        error.callback_url = callback_url if is_http_url(callback_url) else None
        raise


def open_message(message: Any, own_id: str) -> tuple[Any, str]:
    """What a message says without what was put around it, and the id that serves where it names none.

    An envelope of SNS or EventBridge has an id of its own, which its publisher was told, and which is the same when it
    is delivered twice. In {"prompt": {"prompt": workflow}} the inner one counts. Raises InvalidMessageError.
    """
    while isinstance(message, dict):
        prompt, rest = message.get("prompt"), {key: message[key] for key in message if key != "prompt"}
        if message.get("Type") == "Notification" and isinstance(message.get("Message"), str):
            own_id = str(message["MessageId"]) if is_job_id(message.get("MessageId")) else own_id
            try:
                message = load_json("the Message in SNS's envelope", message["Message"])
            except InvalidWorkflowError as error:
                error.job_id = own_id
                raise
        elif {"detail-type", "source", "detail"} <= message.keys() and message["source"] != "aws.s3":
            own_id = str(message["id"]) if is_job_id(message.get("id")) else own_id
            message = message["detail"]
        elif (
            isinstance(prompt, dict)
            and isinstance(prompt.get("prompt"), dict)
            and not any(map(is_node, prompt.values()))
        ):
            message = prompt | rest
        else:
            break
    return message, own_id


def _parse_job(message: dict[str, Any], kinds: list[str], own_id: str) -> Job:
    job_id, callback_url, warnings = message.get("job_id"), message.get("callback_url"), warn_of_keys(message)
    if job_id is None and (prompt_id := message.get("prompt_id")) is not None:
        job_id = prompt_id if is_job_id(prompt_id) else None
        if job_id is None:
            warnings += (f"prompt_id {prompt_id!r:.60} is no lowercase UUID: not used",)
    if job_id is None:
        job_id = own_id
    if not isinstance(job_id, str) or not is_job_id(job_id):
        raise InvalidMessageError(
            f"job_id {job_id!r:.60} is no lowercase UUID: leave it out or use str(uuid.uuid4())"
        )
    if callback_url is not None and not is_http_url(callback_url):
        raise InvalidMessageError(f"callback_url {callback_url!r:.60} is no http(s) address")
    retry_of = message.get("retry_of")
    if retry_of is not None and (not is_job_id(retry_of) or retry_of == job_id):
        raise InvalidMessageError(f"retry_of {retry_of!r:.60} is no other job's id, a lowercase UUID: leave it out")
    if len(kinds) > 1:
        raise InvalidMessageError(f"the message has both {kinds[0]} and {kinds[1]}: send one of them")
    inputs, extra_data = check_inputs(message.get("inputs") or {}), check_extra_data(message.get("extra_data"))
    job = Job(
        job_id,
        callback_url=callback_url,
        inputs=inputs,
        extra_data=extra_data,
        retry_of=retry_of,
        live="when watched" if message.get("live") == "when watched" else message.get("live") is True,
        warnings=warnings,
    )
    if "exec_cmd" in kinds:
        for name, given in (("inputs", inputs), ("extra_data", extra_data)):
            if given:
                raise InvalidMessageError(f"{name} stands beside exec_cmd, but is for workflows only: take it out")
        return replace(job, command=check_command(message["exec_cmd"]))
    if "workflow_key" in kinds:
        key = large_workflow_key(job_id)
        if message["workflow_key"] != key:
            raise InvalidMessageError(
                f"workflow_key {message['workflow_key']!r:.60} is not this job's: it must be {key}"
            )
        return replace(job, workflow_key=key)
    return replace(job, workflow=check_workflow(message["prompt"]))


def parse_workflow_file(value: Any, job: Job) -> tuple[Job, tuple[str, ...]]:
    """The job with the workflow, and what else there is, that a file's JSON says; and what in it is not used.

    A file is a workflow, or {"prompt": workflow, "extra_data": ...}, before which goes what the job has already.
    Raises InvalidWorkflowError.
    """
    message, _ = open_message(value, job.id)
    if not isinstance(message, dict) or "prompt" not in message or is_node(message["prompt"]):
        return replace(job, workflow=check_workflow(message)), ()
    workflow = check_workflow(message["prompt"])
    try:
        extra_data = check_extra_data(message.get("extra_data")) | dict(job.extra_data)
    except InvalidMessageError as error:
        raise InvalidWorkflowError(str(error)) from None
    beside = {key: message[key] for key in message if key not in ("prompt", "extra_data")}
    warnings = warn_of_keys(beside, known=("client_id", "job_id", "prompt_id"))
    return replace(job, workflow=workflow, extra_data=extra_data), warnings


def warn_of_keys(message: Mapping[str, Any], known: Collection[str] = KNOWN_KEYS) -> tuple[str, ...]:
    """A sentence for each key of a message that changes nothing, of WARNED_KEYS at most."""
    unused = [key for key in message if key not in known]
    warnings = [
        f"the key {key!r:.60} is not used: {UNUSED_KEYS[key]}"
        if key in UNUSED_KEYS
        else f"the key {key!r:.60} is not used here: put it into a message"
        if key in KNOWN_KEYS
        else f"unknown key {key!r:.60}: not used"
        for key in unused[:WARNED_KEYS]
    ]
    if "job_id" in message and message.get("prompt_id") not in (None, message["job_id"]):
        warnings.append("the key 'prompt_id' is not used: the job has a job_id, which is ComfyUI's prompt_id as well")
    if len(unused) > WARNED_KEYS:
        warnings.append(f"{len(unused) - WARNED_KEYS} more unknown keys: not used")
    return tuple(warnings)


def check_command(command: object) -> str:
    """Return a shell command that can be run, else raise InvalidMessageError."""
    if not isinstance(command, str) or not command.strip():
        raise InvalidMessageError("exec_cmd is not a shell command: send a string")
    if "\0" in command or not is_text(command):
        raise InvalidMessageError("exec_cmd has a character that no command can have: take it out")
    return command


# --- What S3 tells ---------------------------------------------------------------------------------------

# A message or a workflow file of these names is on its way by another message already.
_OWN_KEY = re.compile(r"input/jobs/[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}[./].*")


def _parse_s3_event(message: dict[str, Any]) -> Job:
    """The job of a file that came into input/jobs/, from S3's event message (its structure, 2.x, is S3's).

    The id is the same for the same event, which S3 may tell of twice. Files that send_job.py and the worker put
    there for a job, whose names begin with its id, ask for nothing, nor does anything else.
    """
    records = message.get("Records")
    if not records or not isinstance(records, list):
        raise NothingToRunError("S3's test event")
    if len(records) > 1:  # S3 itself sends one
        raise InvalidMessageError(f"the S3 event tells of {len(records)} files: send a message for each")
    try:
        event, s3 = records[0]["eventName"], records[0]["s3"]
        return _job_of_file(str(event), s3, unquote_plus(s3["object"]["key"]), records[0].get("eventTime"))
    except (KeyError, TypeError, AttributeError, ValueError):
        raise InvalidMessageError("the message has Records but is no S3 event: send a workflow instead") from None


def _parse_eventbridge_event(message: dict[str, Any]) -> Job:
    """The same from what EventBridge says of a bucket, where a key stands as it is."""
    try:
        event = {"Object Created": "ObjectCreated:"}.get(message["detail-type"], message["detail-type"])
        return _job_of_file(str(event), message["detail"], message["detail"]["object"]["key"], message.get("time"))
    except (KeyError, TypeError, AttributeError, ValueError):
        raise InvalidMessageError("the message is no event of S3: send a workflow instead") from None


def _job_of_file(event: str, file: Mapping[str, Any], key: str, when: object) -> Job:
    """The job of a file that S3 told of; raises KeyError and the like where it is told in another way."""
    import uuid

    source = f"s3://{file['bucket']['name']}/{key}"
    job_id = str(uuid.uuid5(uuid.NAMESPACE_URL, f"{source}#{file['object'].get('sequencer') or str(when)}"))
    if not event.startswith("ObjectCreated:"):
        raise NothingToRunError(f"{event} of {source}")
    if not (key.startswith("input/jobs/") and key.endswith(".json")) or _OWN_KEY.fullmatch(key):
        raise NothingToRunError(f"{source} is no workflow dropped into input/jobs/")
    return Job(job_id, workflow_key=key, source=source)
