#!/usr/bin/env python3
"""Submits jobs and fetches their results: from business code by `import send_job`, or from the command line
(`send_job.py --help`).

    job_id = send_job.submit(workflow)
    result = send_job.wait(job_id, timeout=3600)
    paths = send_job.download(result, "pictures")

All calls block; in asyncio `await asyncio.to_thread(send_job.wait, job_id)` does not. Works when copied elsewhere
with only comfy_utils.py and `env` (and the demo workflow) beside it.
"""

from __future__ import annotations

import copy
import gc
import itertools
import json
import math
import random
import re
import shutil
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, NotRequired, TypedDict

from comfy_utils import (
    HERE,
    MAX_MESSAGE_BYTES,
    OBJECT_INFO_KEY,
    Capacity,
    ComfyGoneError,
    ComfyUI,
    InvalidMessageError,
    InvalidWorkflowError,
    JobTimeoutError,
    QueueDepth,
    Settings,
    SettingsError,
    Workflow,
    WorkflowRefusedError,
    aws_client,
    cancel_key,
    capacity_problem,
    check_inputs,
    check_workflow,
    error_code,
    error_of,
    explain_launch_failure,
    explain_node_errors,
    is_job_id,
    large_workflow_key,
    load_settings,
    new_job_id,
    outputs_of,
    own_outputs,
    parse_message,
    queue_depth,
    raise_capacity,
    result_key,
)

if TYPE_CHECKING:
    import argparse

DEMO_WORKFLOW = HERE / "simple_workflow.json"


# --- For business code -----------------------------------------------------------------------------------


def submit(
    workflow: Workflow,
    *,
    inputs: Mapping[str, str] | None = None,
    job_id: str | None = None,
    callback_url: str | None = None,
    check: bool = True,
    env: str | None = None,
) -> str:
    """Send one API-format workflow to the fleet, raise its capacity, and return the job id.

    The result will stand in s3://<bucket>/output/<job_id>/result.json. `inputs` says from which http(s) or s3
    address the worker is to fetch files that the workflow names, such as {"photo.png": "https://..."}. `env` names
    another environment than the settings file does; `callback_url` is POSTed the result. The workflow is checked against the
    nodes and models of the fleet, where they are known, unless `check` is False: WorkflowProblemsError names
    all that ComfyUI would refuse, and what it may refuse, or drop, becomes a Python warning. Raises
    InvalidWorkflowError, InvalidMessageError, SettingsError, and what boto3 raises when the message could not be
    sent. A capacity that could not be raised is no error: the job is on the queue, and the fleet's other nets start
    an instance.
    """
    sender = Sender(load_settings(env))
    body: dict[str, Any] = {"prompt": check_workflow(workflow)}
    if inputs:
        body["inputs"] = check_inputs(dict(inputs))
    if check:
        warn_of(FleetCheck(sender.settings, inputs or ()).check(workflow))
    return _submit(sender, body, job_id, callback_url)


def submit_command(
    command: str,
    *,
    job_id: str | None = None,
    callback_url: str | None = None,
    env: str | None = None,
) -> str:
    """Send a shell command, as `submit` sends a workflow. Workers refuse it outside ENV=base by default."""
    return _submit(Sender(load_settings(env)), {"exec_cmd": command}, job_id, callback_url)


def submit_many(
    workflows: Iterable[Workflow],
    *,
    job_ids: Sequence[str] | None = None,
    callback_url: str | None = None,
    check: bool = True,
    env: str | None = None,
) -> list[str]:
    """Send many workflows, as `submit` sends one, and return their ids in the same order.

    They travel ten to a request and several requests at once, and the capacity is raised once for all. All
    are checked before the first is sent: InvalidWorkflowError and InvalidMessageError say which is meant, counting
    from 1. Raises NotAllSentError, which names them, when some could not be sent. With `job_ids` of yours, one for
    each workflow, it is harmless to send the same jobs again: an id is run once.
    """
    bodies = []
    for number, workflow in enumerate(workflows, 1):
        try:
            bodies.append({"prompt": check_workflow(workflow)})
        except InvalidWorkflowError as error:
            raise InvalidWorkflowError(f"workflow {number}: {error}") from None
    if not bodies:
        return []
    sender = Sender(load_settings(env))
    if check:
        fleet = FleetCheck(sender.settings)
        for number, body in enumerate(bodies, 1):
            try:
                warn_of(fleet.check(body["prompt"]))
            except WorkflowProblemsError as error:
                raise WorkflowProblemsError(f"workflow {number}", error.problems) from None
    try:
        sent = sender.send_many(bodies, job_ids, callback_url)
    except NotAllSentError as error:
        if error.sent:
            sender.raise_capacity(len(error.sent))
        raise
    sender.raise_capacity(len(sent))
    return sent


def upload_input(path: str | Path, *, env: str | None = None) -> str:
    """Put a file into the bucket's input/ and return the name by which a workflow's LoadImage and the like find it.

    The name has the file's content in it, so that files of the same name do not overwrite each other under waiting
    jobs, and the same file is uploaded once. Raises OSError and what boto3 raises.
    """
    settings, name = load_settings(env), input_name(Path(path))
    upload_file(aws_client("s3", settings.region), settings.s3_bucket, Path(path), name)
    return name


def wait(
    job_id: str,
    *,
    timeout: float | None = None,
    on_progress: Callable[[JobProgress], None] | None = None,
    env: str | None = None,
) -> JobResult:
    """Wait until the job has succeeded, and return its result.

    `on_progress` is called with each news of the running job; they come every five seconds at most. Raises JobFailed
    when it failed, WaitTimeoutError (a TimeoutError) after `timeout` seconds, and what boto3 raises when results
    cannot be read; what passes, such as a broken line, is waited through. The job itself goes on in any case. One
    look for a result is one S3 request, every half a second at first and every five seconds later. Without a timeout
    a job that went to the dead-letter queue, which gets no result, is waited for without end.
    """
    s3, bucket = _bucket(job_id, env)
    last: JobProgress | None = None

    def look_for_progress() -> None:
        nonlocal last
        progress = read_progress(s3, bucket, job_id) if on_progress else None
        if on_progress and progress and progress != last:
            last = progress
            on_progress(progress)

    (ended,) = wait_for(s3, bucket, [job_id], timeout_s=timeout, after_round=look_for_progress)
    if ended["error"]:
        raise JobFailed(ended, ended["error"])
    return ended


def result(job_id: str, *, env: str | None = None) -> JobResult | None:
    """The job's result, also that of a failed one; None while it has none. Raises what boto3 raises."""
    return read_result(*_bucket(job_id, env), job_id)


def download(result: JobResult, folder: str | Path) -> list[Path]:
    """Save the files of a job in `folder`/<job_id>/ and return their paths. Raises OSError and what boto3 raises."""
    return download_files(*_bucket(result["job_id"], result["env"]), result, Path(folder))


def cancel(job_id: str, *, env: str | None = None) -> None:
    """Ask for the job not to be run: the worker drops it when its turn comes, or interrupts it. `wait` then raises
    JobFailed, whose error's kind is `cancelled`; a job that has its result keeps it. Raises what boto3 raises."""
    s3, bucket = _bucket(job_id, env)
    s3.put_object(Bucket=bucket, Key=cancel_key(job_id))


class JobFailed(Exception):  # noqa: N818
    """The job failed. `error` says why, `result` is all of its result."""

    def __init__(self, result: JobResult, error: JobError) -> None:
        super().__init__(f"job {result['job_id']} failed: {error['message']}")
        self.result = result
        self.error = error


class WaitTimeoutError(TimeoutError):
    """Jobs had no result yet when the time was up."""


class NotAllSentError(Exception):
    """Some jobs could not be put on the queue, or nobody knows that they were: sending those again is harmless."""

    def __init__(self, sent: list[str], unsent: list[str], reason: str) -> None:
        super().__init__(f"{len(sent)} of {len(sent) + len(unsent)} jobs were sent: {reason}")
        self.sent = sent
        """The ids of those that are on the queue, in the order in which they were given."""
        self.unsent = unsent
        """The ids of the others."""
        self.reason = reason


class WorkflowProblemsError(InvalidWorkflowError):
    """The fleet's ComfyUI would refuse this workflow; `problems` is all that is wrong with it."""

    def __init__(self, what: str, problems: Sequence[Problem]) -> None:
        super().__init__(f"{what} cannot run on the fleet: " + "; ".join(map(str, problems)))
        self.problems = problems


class Problem(NamedTuple):
    """One thing about a workflow that the fleet's ComfyUI refuses, or may refuse where `certain` is False."""

    node_id: str | None
    title: str | None
    text: str
    remedy: str
    certain: bool = True

    def __str__(self) -> str:
        node = f"node {self.node_id} {self.title}: " if self.node_id else ""
        return f"{node}{self.text}: {self.remedy}"


class JobResult(TypedDict):
    """A job's result: what stands in its result.json."""

    job_id: str
    status: Literal["succeeded", "failed"]
    env: str
    instance_id: str
    attempt: int
    outputs: list[JobOutput]
    values: dict[str, dict[str, Any]]
    """Outputs that are not files, such as text: node id -> name -> list."""
    warnings: list[str]
    error: JobError | None
    source: NotRequired[str]
    """Of a job that was dropped into the bucket: which file it was."""
    timings: JobTimings


class JobOutput(TypedDict):
    """A file that a job made; `kind` is images, gifs, audio, …, `type` output or temp."""

    node_id: str | None
    """None for a file that the history does not name, such as a saved checkpoint."""
    kind: str
    filename: str
    subfolder: str
    type: str
    s3_key: str


class JobError(TypedDict):
    """Why a job failed: what kind of error it is, and one sentence for people."""

    kind: str
    message: str
    node_id: str | None
    node_type: str | None
    node_errors: dict[str, Any]
    detail: str | None


class JobTimings(TypedDict):
    """When it was, in ISO 8601, and how long it waited and ran, in seconds."""

    sent_at: str
    started_at: str
    finished_at: str
    wait_s: float
    run_s: float


class JobProgress(TypedDict):
    """How far a running job is; `value` and `max` are the steps of a node that counts some."""

    job_id: str
    status: Literal["running"]
    instance_id: str
    node_id: NotRequired[str]
    node_title: str | None
    nodes: int
    nodes_done: NotRequired[int]
    value: NotRequired[float]
    max: NotRequired[float]
    started_at: NotRequired[str]
    usual_run_s: NotRequired[float]
    """How long the last job with the same nodes ran on that instance."""
    updated_at: str


def _submit(sender: Sender, body: dict[str, Any], job_id: str | None, callback_url: str | None) -> str:
    job_id = sender.send(body, job_id, callback_url)
    sender.raise_capacity(1)
    return job_id


def _bucket(job_id: str, env: str | None) -> tuple[Any, str]:
    """An S3 client and the bucket's name, for a job whose id may be part of a key."""
    if not is_job_id(job_id):
        raise InvalidMessageError(f"{job_id!r:.60} is no job id: they are lowercase UUIDs")
    settings = load_settings(env)
    return aws_client("s3", settings.region), settings.s3_bucket


# --- Command line ----------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns 0 when all was sent (with --direct and --wait: succeeded), 1 for a failure,
    2 for bad input, 3 when --timeout was up, 130 when waiting was interrupted."""
    options = parse_arguments(arguments)
    if is_for_operator(options):
        return run_operator(options)
    teller = Teller(as_json=options.json)
    uploads: dict[str, Path] = {}
    try:
        bodies = [] if options.status or options.input else make_bodies(options, uploads)
        if options.direct:
            return run_direct(options.direct, [body["prompt"] for body in bodies], options.save or Path("output"))
        sender = Sender(load_settings(options.env))
        if options.input:
            return run_upload(sender.settings, {input_name(path): path for path in options.input}, teller)
        if options.check:
            return run_check(FleetCheck(sender.settings, uploads), bodies[0]["prompt"], sender.settings.env, teller)
        if bodies and "prompt" in bodies[0] and not options.no_check:  # they differ in their seeds only
            for problem in FleetCheck(sender.settings, uploads).check(bodies[0]["prompt"]):
                print(f"send_job.py: {problem}", file=sys.stderr)
    except WorkflowProblemsError as error:
        print(f"send_job.py: this workflow cannot run on {sender.settings.env}, and was not sent:", file=sys.stderr)
        print(*error.problems, sep="\n", file=sys.stderr)
        return 2
    except (InvalidMessageError, SettingsError) as error:
        print(f"send_job.py: {error}", file=sys.stderr)
        return 2
    except (ComfyGoneError, JobTimeoutError) as error:
        print(f"send_job.py: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"send_job.py: cannot read {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    if uploads and run_upload(sender.settings, uploads, teller):
        return 1
    if options.status and not options.wait:
        try:
            return run_status(sender, options.status, teller, options.save)
        except Exception as error:
            print(f"send_job.py: results cannot be read: {one_line(error)}", file=sys.stderr)
            return 1
    job_ids, code = (options.status, 0) if options.status else run_send(sender, bodies, options.callback_url, teller)
    if options.wait and job_ids:
        return run_wait(sender, job_ids, options.timeout, teller, options.save) or code
    return code


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked for what belongs together."""
    import argparse

    parser = argparse.ArgumentParser(
        prog="send_job.py",
        description="Send jobs to the fleet: a workflow saved with Save (API Format), or a shell command.",
        epilog="example: ./send_job.py my_workflow.json --set 6.text='a red fox' --count 4 --env pro",
    )
    parser.add_argument("workflow", nargs="?", type=Path, metavar="WORKFLOW.json", help="default: the demo workflow")
    parser.add_argument("--set", dest="assignments", action="append", default=[], metavar="NODE.INPUT=VALUE",
                        help="change an input, such as 6.text='a red fox' or 10.image=@photo.png, which uploads the "
                        "file; may be repeated")  # fmt: skip
    parser.add_argument("--count", type=int, default=1, metavar="N", help="send N jobs, each with a fresh seed")
    parser.add_argument("--env", metavar="NAME", help="the environment, instead of ENV in the settings")
    parser.add_argument("--input", nargs="+", type=Path, metavar="FILE",
                        help="send nothing, but upload files to the bucket's input/ and tell their names there")  # fmt: skip
    parser.add_argument("--check", action="store_true",
                        help="send nothing, but say what the fleet's ComfyUI would refuse; exits with 1 then")  # fmt: skip
    parser.add_argument("--no-check", action="store_true", help="send without that check")
    parser.add_argument("--exec-cmd", metavar="CMD", help="send a shell command instead of a workflow")
    parser.add_argument("--callback-url", metavar="URL", help="POST the result there")
    parser.add_argument("--wait", action="store_true",
                        help="wait for the results and tell of each; exits with 1 when a job failed")  # fmt: skip
    parser.add_argument("--timeout", type=float, metavar="SECONDS",
                        help="with --wait: stop waiting then and exit with 3; without it a job that ended in the "
                        "dead-letter queue, which gets no result, is waited for without end")  # fmt: skip
    parser.add_argument(
        "--direct", metavar="HOST:PORT", help="run on this ComfyUI instead, without AWS, and save the files"
    )
    parser.add_argument("--status", nargs="+", metavar="JOB_ID",
                        help="send nothing, but tell how these jobs stand; with --wait stay until they have ended; "
                        "exits with 3 when one has not ended")  # fmt: skip
    parser.add_argument("--save", type=Path, metavar="DIR",
                        help="with --wait, --status and --direct: save the files in DIR/JOB_ID/ (--direct: output)")  # fmt: skip
    parser.add_argument(
        "--json", action="store_true", help="print an object a line, for programs (--fleet: one object)"
    )
    add_operator_arguments(parser)
    parsed = parser.parse_args(arguments)
    check_operator_arguments(parser, parsed)
    if not 1 <= parsed.count <= 100_000:
        parser.error(f"--count {parsed.count}: send between 1 and 100000 jobs")
    if parsed.exec_cmd is not None and (parsed.workflow or parsed.assignments or parsed.direct):
        parser.error("--exec-cmd sends a command: leave out WORKFLOW.json, --set and --direct")
    if parsed.exec_cmd is not None and not parsed.exec_cmd.strip():
        parser.error("--exec-cmd is empty: name a shell command")
    if parsed.direct and (parsed.wait or parsed.json):
        parser.error("--direct waits by itself and prints text: leave out --wait and --json")
    only = [f"--{name}" for name in ("status", "input", "check") if getattr(parsed, name)]
    if only and (len(only) > 1 or parsed.direct or parsed.exec_cmd is not None):
        parser.error(f"{only[0]} sends nothing: leave out --direct and --exec-cmd, and others of its kind")
    if only and only != ["--check"] and (parsed.workflow or parsed.assignments):
        parser.error(f"{only[0]} sends nothing: leave out WORKFLOW.json and --set")
    if only and only != ["--status"] and parsed.wait:
        parser.error(f"{only[0]} sends nothing to wait for: leave out --wait")
    if parsed.direct and any(re.match("[^=]*=@(?!@)", assignment) for assignment in parsed.assignments):
        parser.error("--direct uploads nothing: name a file in ComfyUI's input folder instead of @FILE")
    for path in parsed.input or []:
        if not path.is_file():
            parser.error(f"--input {path}: there is no such file")
    for job_id in parsed.status or []:
        if not is_job_id(job_id):
            parser.error(f"--status {job_id:.60}: job ids are lowercase UUIDs, as printed when a job is sent")
    if parsed.save and not (parsed.wait or parsed.status or parsed.direct):
        parser.error("--save needs results: add --wait")
    if parsed.timeout is not None and not parsed.wait:
        parser.error("--timeout bounds --wait: add it, or leave out --timeout")
    if parsed.timeout is not None and not 0 < parsed.timeout < math.inf:
        parser.error(f"--timeout {parsed.timeout:g}: wait for more than 0 seconds, or leave it out to wait on")
    return parsed


def make_bodies(options: argparse.Namespace, uploads: dict[str, Path]) -> list[dict[str, Any]]:
    """The message bodies the command line asks for, all checked before the first is sent; fills `uploads`."""
    if options.exec_cmd is not None:
        return [{"exec_cmd": options.exec_cmd}] * options.count
    workflow = read_workflow(options.workflow or DEMO_WORKFLOW)
    chosen = {set_input(workflow, assignment, uploads) for assignment in options.assignments}
    # A workflow of one's own, sent once, keeps the seed it was saved with.
    if options.workflow and options.count == 1:
        return [{"prompt": workflow}]
    return [{"prompt": fresh_seeds(workflow, chosen)} for _ in range(options.count)]


def run_send(
    sender: Sender, bodies: Sequence[dict[str, Any]], callback_url: str | None, teller: Teller
) -> tuple[list[str], int]:
    """Send the jobs and raise the capacity; returns the ids of those that were sent, and the exit code."""
    job_ids: list[str] = []
    try:
        job_ids = sender.send_many(bodies, callback_url=callback_url)
    except NotAllSentError as error:
        job_ids, reason = error.sent, error.reason
    except Exception as error:
        reason = str(error)
    for job_id in job_ids:
        teller.event("sent", f"Message sent successfully: {job_id}", job_id=job_id)
    if len(job_ids) == len(bodies):
        teller.line("Job submitted successfully")
    else:
        queue = sender.settings.sqs_name
        print(f"send_job.py: {len(job_ids)} of {len(bodies)} jobs sent to {queue}: {reason}", file=sys.stderr)
    if job_ids:
        sender.raise_capacity(len(job_ids), say=teller.line)
    return job_ids, 0 if len(job_ids) == len(bodies) else 1


def run_wait(
    sender: Sender,
    job_ids: Sequence[str],
    timeout_s: float | None,
    teller: Teller | None = None,
    save: Path | None = None,
) -> int:
    """Tell of each job's end until all have ended, and save their files; returns the exit code."""
    teller = teller or Teller()
    settings = sender.settings
    s3 = aws_client("s3", settings.region)
    waiting = Waiting(sender, s3, job_ids, teller)
    unsaved = 0

    def give_up(reason: str) -> None:
        teller.change("")
        left = list(waiting.unfinished)
        one = len(left) == 1
        print(
            f"send_job.py: {reason}: {len(left)} of {count(waiting.total, 'job')} had no result yet and "
            f"{'goes' if one else 'go'} on; come back with: "
            f"./send_job.py --env {settings.env} --wait --status {left[0] if one else 'JOB_ID …'}",
            file=sys.stderr,
        )

    try:
        found = wait_for(
            s3, settings.s3_bucket, job_ids, timeout_s=timeout_s, after_round=waiting.show, say=teller.line
        )
        for result in found:
            waiting.take(result)
            unsaved += save is not None and not save_files(result, save, teller, s3, settings.s3_bucket)
        waiting.say_how_far()
    except KeyboardInterrupt:
        give_up("interrupted")
        return 130
    except WaitTimeoutError:
        give_up(f"not done after {timeout_s:g} s")
        return 3
    except Exception as error:
        remedy = (
            f" (s3:GetObject and s3:ListBucket on {settings.s3_bucket} are needed)"
            if error_code(error) == "AccessDenied"
            else ""
        )
        give_up(f"results cannot be read: {one_line(error)}{remedy}")
        return 1
    return 1 if waiting.failed or unsaved else 0


def run_status(sender: Sender, job_ids: Sequence[str], teller: Teller, save: Path | None) -> int:
    """Tell how jobs stand, and save the files of those that ended; returns 0, 1 when one failed, 3 when one goes on."""
    s3, bucket = aws_client("s3", sender.settings.region), sender.settings.s3_bucket
    codes = {0}
    for job_id in job_ids:
        result = read_result(s3, bucket, job_id)
        if result:
            saved = save is None or save_files(result, save, teller, s3, bucket)
            codes.add(0 if result["status"] == "succeeded" and saved else 1)
            teller.event("result", tell_result(result), result=result)
        elif progress := read_progress(s3, bucket, job_id):
            codes.add(3)
            text = f"Job {job_id} is running: {tell_progress(progress)}, at {progress['updated_at']}"
            teller.event("progress", text, progress=progress)
        else:
            codes.add(3)
            text = f"Job {job_id} has neither result nor progress: it waits, has just begun, or never was"
            teller.event("info", text, job_id=job_id, text=text)
    return 1 if 1 in codes else max(codes)


def save_files(result: JobResult, folder: Path, teller: Teller, s3: Any, bucket: str) -> bool:
    """Download a job's files and tell of each; a failure is told, too, and returns False."""
    try:
        for path in download_files(s3, bucket, result, folder):
            teller.event("saved", f"Saved {path}", job_id=result["job_id"], path=str(path))
    except Exception as error:
        teller.change("")
        print(f"send_job.py: the files of job {result['job_id']} are not saved: {one_line(error)}", file=sys.stderr)
        return False
    return True


def run_check(fleet: FleetCheck, workflow: Workflow, env: str, teller: Teller) -> int:
    """Say what is wrong with a workflow; returns 1 when the fleet's ComfyUI would refuse it."""
    if fleet.nodes is None:
        teller.line(f"Its format is right; what {env} has installed is not known: {OBJECT_INFO_KEY} cannot be read")
        return 0
    try:
        problems, code = fleet.check(workflow), 0
    except WorkflowProblemsError as error:
        problems, code = list(error.problems), 1
    for problem in problems:
        teller.event("problem", f"{'' if problem.certain else 'Perhaps: '}{problem}", **problem._asdict())
    teller.line(f"{env} would refuse this workflow" if code else f"{env} can run this workflow")
    return code


def run_upload(settings: Settings, uploads: dict[str, Path], teller: Teller) -> int:
    """Put files into the bucket's input/ and tell their names there; returns the exit code."""
    s3 = aws_client("s3", settings.region)
    for name, path in uploads.items():
        try:
            upload_file(s3, settings.s3_bucket, path, name)
        except Exception as error:
            print(
                f"send_job.py: {path} cannot be uploaded to {settings.s3_bucket}: {one_line(error)}", file=sys.stderr
            )
            return 1
        teller.event("uploaded", f"Uploaded {path} as {name}", path=str(path), name=name)
    return 0


def run_direct(address: str, workflows: Sequence[Workflow], folder: Path) -> int:
    """Run workflows on a ComfyUI at hand, without any AWS, and save their files; returns the exit code."""
    comfy, failed = ComfyUI(address), 0
    for workflow in workflows:
        job_id = new_job_id()
        try:
            finished = comfy.run(own_outputs(workflow, job_id), job_id, timeout_s=86_400)
            error = error_of(finished.entry)
            files, _ = outputs_of(finished.entry)
            for warning in explain_node_errors(finished.node_errors):
                print(f"Dropped: {warning}", file=sys.stderr)
            for file in files:
                # Below the job's folder whatever the server says.
                parts = [
                    part for part in Path(file.subfolder, file.filename).parts if part not in (job_id, "..", "/")
                ]
                target = folder.joinpath(job_id, *parts)
                comfy.download(file, target)
                print(f"Saved {target}")
        except WorkflowRefusedError as refused:
            error = refused.error
        if error:
            failed += 1
            print(f"send_job.py: job {job_id} failed: {error['message']}", file=sys.stderr)
    return 1 if failed else 0


class Teller:
    """Where the command line says what it has to say.

    Lines that stay; on a terminal one line below them that changes; with --json an object a line instead of both.
    """

    def __init__(self, *, as_json: bool = False) -> None:
        self.as_json = as_json
        self.live = sys.stdout.isatty() and not as_json

    def line(self, text: str) -> None:
        """Say something that stays."""
        self.event("info", text, text=text)

    def event(self, kind: str, words: str, /, **data: Any) -> None:
        """Say it in words, or as an object of this kind with `data`."""
        erase = "\r\x1b[K" if self.live else ""
        print(json.dumps({"event": kind} | data) if self.as_json else erase + words, flush=True)

    def change(self, text: str) -> None:
        """Let the line that changes be this; without one nothing happens."""
        if self.live:
            print(f"\r\x1b[K{cut(text, shutil.get_terminal_size().columns - 1)}", end="", flush=True)


class Waiting:
    """What is shown of the jobs waited for: of many a bar, of one what it does."""

    def __init__(self, sender: Sender, s3: Any, job_ids: Sequence[str], teller: Teller) -> None:
        self.s3 = s3
        self.bucket = sender.settings.s3_bucket
        self.teller = teller
        self.total = len(job_ids)
        self.unfinished = dict.fromkeys(job_ids)
        self.failed = 0
        self.fleet = FleetWatch(sender, (lambda _: None) if teller.live else teller.line)
        self._runs_s: list[float] = []
        self._told = -1
        self._progress: JobProgress | None = None
        self._first: tuple[JobProgress, float] | None = None  # the first news of the node at work, and when

    def take(self, result: JobResult) -> None:
        """Count and tell a result."""
        del self.unfinished[result["job_id"]]
        self.failed += result["status"] != "succeeded"
        self._runs_s.append(result["timings"]["run_s"])
        self.teller.event("result", tell_result(result), result=result)

    def show(self) -> None:
        """Show how far it is, after each round of looks."""
        self.say_how_far()
        self.fleet.look(len(self.unfinished))
        if self.total == 1 and (self.teller.live or self.teller.as_json):
            progress = read_progress(self.s3, self.bucket, next(iter(self.unfinished)))
            if self.teller.as_json and progress and progress != self._progress:
                self.teller.event("progress", "", progress=progress)
            self._note(progress)
        self.teller.change(self.line_of_one() if self.total == 1 else self.line_of_many())

    def say_how_far(self) -> None:
        """On no terminal: one line whenever the number of finished jobs has changed."""
        if not self.teller.live and self._told != len(self.unfinished):
            self._told = len(self.unfinished)
            self.teller.line(self.how_far())

    def how_far(self) -> str:
        done = self.total - len(self.unfinished)
        return f"{done} of {count(self.total, 'job')} done" + (f", {self.failed} failed" if self.failed else "")

    def _note(self, progress: JobProgress | None) -> None:
        if progress and not (self._first and self._first[0].get("node_id") == progress.get("node_id")):
            self._first = progress, time.monotonic()
        self._progress = progress

    def time_left(self) -> str:
        """`, about 12 s left`, by how long such jobs run or else by the pace of the node at work; "" where unknown."""
        progress = self._progress
        if progress and "usual_run_s" in progress and "started_at" in progress:
            ran_s = (datetime.now(UTC) - datetime.fromisoformat(progress["started_at"])).total_seconds()
            if ran_s < progress["usual_run_s"]:
                return f", about {progress['usual_run_s'] - ran_s:.0f} s left"
        left_s = self.left_in_node_s()
        return "" if left_s is None else f", about {left_s:.0f} s left in this node"

    def left_in_node_s(self) -> float | None:
        """Seconds until the node at work is through, by the pace of its steps so far; None while that is unknown."""
        if not (self._progress and self._first):
            return None
        first, since = self._first
        steps = self._progress.get("value", 0) - first.get("value", 0)
        left = self._progress.get("max", 0) - self._progress.get("value", 0)
        return (time.monotonic() - since) / steps * left if steps > 0 else None

    def line_of_one(self) -> str:
        """`waiting, about 2 ahead: 1 instance is booting`, later `running: KSampler 12/20 (60 %)`."""
        if self._progress:
            return f"running: {tell_progress(self._progress)}{self.time_left()}"
        depth, news = self.fleet.depth, self.fleet.said.get("group" if self.fleet.depth else "queue")
        return f"waiting{f', about {max(depth.visible - 1, 0)} ahead' if depth else ''}" + (
            f": {news}" if news else ""
        )

    def line_of_many(self) -> str:
        """`[████░░░░] 2 of 4 jobs done, about 25 s left. On the queue: 1 waiting, 1 running. 1 instance is booting`."""
        filled = 20 * (self.total - len(self.unfinished)) // self.total
        text = f"[{'█' * filled}{'░' * (20 - filled)}] {self.how_far()}"
        if self._runs_s and self.fleet.depth and self.fleet.depth.in_flight:
            # As long as past runs took, on as many workers as are at it now.
            left_s = len(self.unfinished) * sum(self._runs_s) / len(self._runs_s) / self.fleet.depth.in_flight
            text += f", about {left_s:.0f} s left"
        return ". ".join([text, *filter(None, self.fleet.said.values())])


# --- Sending ---------------------------------------------------------------------------------------------

REQUESTS_AT_ONCE = 8
BATCH_TRIES = 4
"""How often what SQS refused of a batch, through no fault of ours, is sent again."""


class Message(NamedTuple):
    """One job as it travels: its text and the bytes of it, and the workflow itself where that is too large."""

    job_id: str
    text: str
    size: int
    by_bucket: Workflow | None = None


def batches(messages: Sequence[Message]) -> Iterator[list[Message]]:
    """The messages in order, in lists that fit into one SendMessageBatch: ten, and not larger than one may be."""
    batch: list[Message] = []
    for message in messages:
        if batch and (len(batch) == 10 or sum(other.size for other in batch) + message.size > MAX_MESSAGE_BYTES):
            yield batch
            batch = []
        batch.append(message)
    if batch:
        yield batch


class Sender:
    """Sends to one environment's queue."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._sqs: Any = None
        self._queue_url = ""

    def send(self, body: dict[str, Any], job_id: str | None = None, callback_url: str | None = None) -> str:
        """Put one job on the queue and return its id. A workflow too large for a message goes by S3."""
        message = self._message(body, job_id, callback_url)
        self._upload(message)
        self._queue().send_message(QueueUrl=self._queue_url, MessageBody=message.text)
        return message.job_id

    def send_many(
        self, bodies: Sequence[dict[str, Any]], job_ids: Sequence[str] | None = None, callback_url: str | None = None
    ) -> list[str]:
        """Put many jobs on the queue and return their ids, in order. Raises NotAllSentError."""
        from concurrent.futures import ThreadPoolExecutor

        if job_ids is not None and len(job_ids) != len(bodies):
            raise InvalidMessageError(f"there are {len(job_ids)} job_ids for {len(bodies)} jobs: give one for each")
        messages = []
        for number, body in enumerate(bodies, 1):
            try:
                messages.append(self._message(body, job_ids[number - 1] if job_ids else None, callback_url))
            except InvalidMessageError as error:
                raise InvalidMessageError(f"job {number}: {error}") from None
        ids = [message.job_id for message in messages]
        if len(set(ids)) < len(ids):
            twice = next(job_id for number, job_id in enumerate(ids) if job_id in ids[:number])
            raise InvalidMessageError(f"job_id {twice} is there twice: an id is run once, give each job its own")
        self._queue()
        with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
            refused = dict(
                item for refusals in pool.map(self._send_batch, batches(messages)) for item in refusals.items()
            )
        if refused:
            unsent = [job_id for job_id in ids if job_id in refused]
            raise NotAllSentError([job_id for job_id in ids if job_id not in refused], unsent, refused[unsent[0]])
        return ids

    def _message(self, body: dict[str, Any], job_id: str | None, callback_url: str | None) -> Message:
        job_id = job_id or new_job_id()
        if not is_job_id(job_id):
            raise InvalidMessageError(
                f"job_id {job_id!r:.60} is no lowercase UUID: leave it out or use str(uuid.uuid4())"
            )
        extras = {"job_id": job_id} | ({"callback_url": callback_url} if callback_url else {})
        try:
            text = json.dumps(body | extras, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise InvalidMessageError(
                f"the job cannot be written as JSON ({error}): use text, lists, dicts and finite numbers"
            ) from None
        size = len(text.encode())
        if size <= MAX_MESSAGE_BYTES:
            return Message(job_id, text, size)
        if "prompt" not in body:
            raise InvalidMessageError(f"the command is longer than a message may be ({MAX_MESSAGE_BYTES} bytes)")
        rest = {name: value for name, value in body.items() if name != "prompt"}
        text = json.dumps({"workflow_key": large_workflow_key(job_id)} | rest | extras)
        return Message(job_id, text, len(text.encode()), by_bucket=body["prompt"])

    def _upload(self, message: Message) -> None:
        """Store a workflow that is too large for its message, where the message says."""
        if message.by_bucket is not None:
            aws_client("s3", self.settings.region).put_object(
                Bucket=self.settings.s3_bucket,
                Key=large_workflow_key(message.job_id),
                Body=json.dumps(message.by_bucket, ensure_ascii=False).encode(),
            )

    def _send_batch(self, batch: list[Message]) -> dict[str, str]:
        """Send what goes into one request; returns why, by job id, for those that are not known to be sent."""
        unsent = {message.job_id: message for message in batch}
        refused: dict[str, str] = {}
        reasons: dict[str, str] = {}
        try:
            for message in batch:
                self._upload(message)
            for attempt in range(BATCH_TRIES):
                if attempt:
                    time.sleep(random.uniform(0.5, 1) * 0.5 * 2**attempt)
                entries = [{"Id": message.job_id, "MessageBody": message.text} for message in unsent.values()]
                answer = self._queue().send_message_batch(QueueUrl=self._queue_url, Entries=entries)
                for entry in answer.get("Successful", []):
                    del unsent[entry["Id"]]
                reasons = {}
                for entry in answer.get("Failed", []):
                    reason = f"{entry['Code']}: {entry.get('Message', '')}"
                    if entry["SenderFault"]:  # it would be refused again
                        refused[entry["Id"]] = reason
                        del unsent[entry["Id"]]
                    else:
                        reasons[entry["Id"]] = reason
                if not unsent:
                    break
        except Exception as error:  # boto3 has tried again where that helps
            reasons = dict.fromkeys(unsent, str(error))
        return refused | reasons

    def depth(self, just_sent: int) -> QueueDepth:
        """The queue's depth, in which what was just sent counts although SQS's counters lag."""
        depth = queue_depth(self._queue(), self._queue_url)
        return depth._replace(visible=max(depth.visible, just_sent))

    def raise_capacity(self, just_sent: int, say: Callable[[str], None] = lambda _: None) -> Capacity | None:
        """Raise the group to what the queue calls for, once for all jobs just sent.

        None where there is no group, or where it could not be asked: the message is on its way, and
        not being allowed to scale must not look like not having sent it.
        """
        try:
            depth = self.depth(just_sent)
            say(f"Current queue size: {depth.visible + depth.in_flight}")
            group = aws_client("autoscaling", self.settings.region)
            capacity = raise_capacity(group, self.settings.asg_name, depth, self.settings.backlogsize_per_instance)
        except Exception as error:
            say(f"Capacity was not raised: {error}")
            return None
        if capacity is None:
            say(f"There is no group {self.settings.asg_name}: scaling is off")
            return None
        say(f"Current instance count: {capacity.before}")
        if capacity.after > capacity.before:
            if capacity.before == 0:
                say("Starting first instance...")
            say(f"Adjusted ASG capacity to {capacity.after}")
        return capacity

    def _queue(self) -> Any:
        if self._sqs is None:
            self._sqs = aws_client("sqs", self.settings.region)
            self._queue_url = self._sqs.get_queue_url(QueueName=self.settings.sqs_name)["QueueUrl"]
        return self._sqs


# --- Waiting ---------------------------------------------------------------------------------------------

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 5.0
"""Between two rounds of looks for receipts; it grows while nothing comes."""
LOOKS_PER_ROUND = 20
"""Most jobs whose receipt is looked for in one round, so that many jobs cost no more requests than few."""
FLEET_LOOK_S = 15.0
"""Between two looks at queue and group."""


def read_result(s3: Any, bucket: str, job_id: str) -> JobResult | None:
    """The job's result.json, None while it has none. Raises what boto3 raises."""
    stored: JobResult | None = _read_json(s3, bucket, result_key(job_id))
    return stored


def read_progress(s3: Any, bucket: str, job_id: str) -> JobProgress | None:
    """The job's progress.json, None while it has none or where S3 does not give it just now."""
    try:
        stored: JobProgress | None = _read_json(s3, bucket, f"output/{job_id}/progress.json")
    except Exception as error:
        if not will_pass(error):
            raise
        return None
    return stored


def _read_json(s3: Any, bucket: str, key: str) -> Any:
    try:
        return json.loads(s3.get_object(Bucket=bucket, Key=key)["Body"].read())
    except s3.exceptions.NoSuchKey:
        return None


def download_files(s3: Any, bucket: str, result: JobResult, folder: Path) -> list[Path]:
    """Save the files of a job in `folder`/<job_id>/; boto3 fetches the parts of a large one at the same time."""
    keys = [output["s3_key"] for output in result["outputs"]]
    targets = [folder.joinpath(*local_parts(key)) for key in keys]
    for key, target in zip(keys, targets, strict=True):
        target.parent.mkdir(parents=True, exist_ok=True)
        s3.download_file(bucket, key, str(target))
    return targets


def local_parts(key: str) -> list[str]:
    """The parts of the path at which the object of a job, output/<job_id>/…, is saved: never above its folder."""
    first, *parts = key.split("/")
    if first != "output" or len(parts) < 2 or {"", ".", ".."} & set(parts) or "\\" in key:
        raise ValueError(f"{key!r:.200} is no file of a job: it is not saved")
    return parts


def wait_for(
    s3: Any,
    bucket: str,
    job_ids: Sequence[str],
    *,
    timeout_s: float | None = None,
    after_round: Callable[[], None] = lambda: None,
    say: Callable[[str], None] = lambda _: None,
) -> Iterator[JobResult]:
    """Yield the result.json of every job as it appears, in the order they are found.

    `after_round` is called each time the receipts were looked for and some are missing still. What passes
    (throttling, 5xx, network) is waited through and said once. Raises WaitTimeoutError after `timeout_s`
    seconds, and what boto3 raises when it will not pass, such as a refused access.
    """
    unfinished = deque(dict.fromkeys(job_ids))
    end = None if timeout_s is None else time.monotonic() + timeout_s
    pause_s, trouble = FIRST_PAUSE_S, False
    while unfinished:
        found = False
        for _ in range(min(len(unfinished), LOOKS_PER_ROUND)):
            try:
                result = read_result(s3, bucket, unfinished[0])
            except Exception as error:
                if not will_pass(error):
                    raise
                if not trouble:
                    say(f"Results cannot be read just now, waiting goes on: {one_line(error)}")
                trouble = True
                break
            if result is None:
                unfinished.rotate(-1)
                continue
            unfinished.popleft()
            found = True
            yield result
        if not unfinished:
            return
        after_round()
        pause_s = FIRST_PAUSE_S if found else min(pause_s * 1.5, LONGEST_PAUSE_S)
        if end is not None:
            left_s = end - time.monotonic()
            if left_s <= 0:
                raise WaitTimeoutError(f"{count(len(unfinished), 'job')} had no result after {timeout_s:g} s")
            pause_s = min(pause_s, left_s)
        time.sleep(pause_s)


def will_pass(error: Exception) -> bool:
    """Whether an AWS error is one of the network, of a busy or of a broken service, so worth another try."""
    from botocore.exceptions import ConnectionError as NoConnectionError
    from botocore.exceptions import HTTPClientError, IncompleteReadError

    if isinstance(error, NoConnectionError | HTTPClientError | IncompleteReadError):
        return True
    status = (getattr(error, "response", None) or {}).get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return status >= 500 or error_code(error) in ("SlowDown", "Throttling", "ThrottlingException", "RequestTimeout")


def one_line(error: Exception) -> str:
    """An error's text, which may have several lines, in one."""
    return " ".join(str(error).split()) or repr(error)


class FleetWatch:
    """Says how the queue stands and what waiting jobs wait for: each sentence once until it changes."""

    def __init__(self, sender: Sender, say: Callable[[str], None]) -> None:
        self.sender = sender
        self._say = say
        self.said: dict[str, str | None] = {}
        """What was said last, of `queue` and of `group`."""
        self.depth: QueueDepth | None = None
        self._next_look = 0.0

    def look(self, unfinished: int) -> None:
        """Look at queue and group, unless that was less than FLEET_LOOK_S ago. Raises nothing."""
        if time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + FLEET_LOOK_S
        try:
            self.depth = depth = self.sender.depth(0)
            news = f"On the queue: {depth.visible} waiting, {depth.in_flight} running"
            all_run = depth.in_flight >= unfinished
        except Exception as error:
            self.depth = None
            news, all_run = f"The queue cannot be looked at: {one_line(error)}", False
        self._tell("queue", news)
        try:
            settings = self.sender.settings
            group = None if all_run else fleet_news(aws_client("autoscaling", settings.region), settings.asg_name)
        except Exception as error:
            group = f"The group cannot be looked at: {one_line(error)}"
        self._tell("group", group)

    def _tell(self, topic: str, sentence: str | None) -> None:
        if sentence and sentence != self.said.get(topic):
            self._say(sentence)
        self.said[topic] = sentence


def fleet_news(autoscaling: Any, asg_name: str) -> str | None:
    """What keeps the group from having the instances it should have, in one sentence; None when it has them.

    None also where there is no such group. Raises what boto3 raises, but needs no permission to see why
    launches fail.
    """
    groups = autoscaling.describe_auto_scaling_groups(AutoScalingGroupNames=[asg_name])["AutoScalingGroups"]
    if not groups:
        return None
    desired = groups[0]["DesiredCapacity"]
    if desired == 0:
        return f"No instance is wanted: raise the desired capacity of {asg_name}, or MAX_INSTANCES if it is 0"
    states = [instance["LifecycleState"] for instance in groups[0]["Instances"]]
    missing = desired - states.count("InService")
    if missing <= 0:
        return None
    unseen = ""
    try:
        problem = capacity_problem(autoscaling, asg_name)
        if problem:
            return problem[0].upper() + problem[1:]
    except Exception as error:
        unseen = f"; whether launches fail cannot be seen: {one_line(error)}"
    booting = sum(state.startswith("Pending") for state in states)
    if booting:
        return f"{count(booting, 'instance')} {'is' if booting == 1 else 'are'} booting{unseen}"
    return f"{count(missing, 'instance')} {'is' if missing == 1 else 'are'} asked of AWS{unseen}"


def cut(text: str, columns: int) -> str:
    """As much of the beginning as fits; Chinese characters, as in titles of nodes, take two columns."""
    from unicodedata import east_asian_width

    for place, character in enumerate(text):
        columns -= 2 if east_asian_width(character) in "WF" else 1
        if columns < 0:
            return text[:place]
    return text


def count(number: int, thing: str) -> str:
    """`1 job`, `2 jobs`."""
    return f"{number} {thing}{'' if number == 1 else 's'}"


def tell_result(result: JobResult) -> str:
    """How a job ended, in one line."""
    if result["error"]:
        return f"Job {result['job_id']} failed: {result['error']['message']}"
    timings = result["timings"]
    return (
        f"Job {result['job_id']} succeeded in {timings['run_s']:.1f} s, "
        f"waited {timings['wait_s']:.1f} s: {count(len(result['outputs']), 'file')}"
    )


def tell_progress(progress: JobProgress) -> str:
    """How far a running job is: `KSampler 12/20 (60 %), 3 of 7 nodes done`."""
    words = [progress["node_title"] or "running"]
    steps, done = progress.get("max"), progress.get("value")
    if steps and done is not None:
        words[0] += f" {done:g}/{steps:g} ({100 * done / steps:.0f} %)"
    if "nodes_done" in progress:
        words.append(f"{progress['nodes_done']} of {count(progress['nodes'], 'node')} done")
    return ", ".join(words)


# --- Check before a GPU is paid for ----------------------------------------------------------------------
#
# What ComfyUI's own validation would say (execution.py, validate_prompt and validate_inputs), from /object_info, which
# tells each node's inputs but not whether a node validates some of them in its own way. So what custom nodes are given
# is doubted only, and so is all about types that are made at run time.

"""Where the answer of the fleet's ComfyUI to GET /object_info lies in the bucket."""
NODES_AGE_S = 60.0
"""So long it is believed without asking S3 whether it has changed."""

_nodes_read: dict[str, tuple[float, str, dict[str, Any] | None]] = {}  # bucket -> when, ETag, what was in it


class FleetCheck:
    """Checks workflows against what is installed on one environment's fleet; `coming` inputs will be uploaded."""

    def __init__(self, settings: Settings, coming: Collection[str] = ()) -> None:
        self.bucket = settings.s3_bucket
        self.region = settings.region
        self.nodes = self.read_nodes()
        """The fleet's /object_info; None where it is not known, and then nothing is found."""
        self.coming = coming
        self._models: list[str] | None = None

    def check(self, workflow: Workflow) -> list[Problem]:
        """Raise WorkflowProblemsError if ComfyUI would refuse it; return what may go wrong otherwise."""
        problems = find_problems(workflow, self.nodes, self.may_have) if self.nodes else []
        refused = [problem for problem in problems if problem.certain]
        if refused:
            raise WorkflowProblemsError("this workflow", refused)
        return problems

    @cached_property
    def s3(self) -> Any:
        """Made when it is needed: it takes as long as two round trips."""
        return aws_client("s3", self.region)

    def read_nodes(self) -> dict[str, Any] | None:
        """The fleet's /object_info; None where it is not stored or cannot be read, which is no reason not to send."""
        import gzip

        now = time.monotonic()
        read_at, tag, nodes = _nodes_read.get(self.bucket, (-math.inf, "", None))
        if now - read_at < NODES_AGE_S:
            return nodes
        try:
            condition = {"IfNoneMatch": tag} if tag else {}
            answer = self.s3.get_object(Bucket=self.bucket, Key=OBJECT_INFO_KEY, **condition)
            tag, nodes = answer["ETag"], dict(json.loads(gzip.decompress(answer["Body"].read())))
        except Exception as error:
            if error_code(error) not in ("304", "NotModified"):
                tag, nodes = "", None
        _nodes_read[self.bucket] = now, tag, nodes
        return nodes

    def may_have(self, file: str) -> bool:
        """Whether the bucket has this input or model by now, or may have it: what is known of the fleet may be old."""
        name = re.sub(r" \[\w+\]$", "", file).replace("\\", "/")
        if name in self.coming:
            return True
        try:
            self.s3.head_object(Bucket=self.bucket, Key=f"input/{name}")
            return True
        except Exception as error:
            if error_code(error) != "404":
                return True
        try:
            if self._models is None:
                pages = self.s3.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix="models/")
                self._models = [item["Key"] for page in pages for item in page.get("Contents", [])]
        except Exception:
            return True
        return any(key.endswith(f"/{name}") for key in self._models)


def find_problems(workflow: Workflow, nodes: dict[str, Any], may_have: Callable[[str], bool]) -> list[Problem]:
    """What ComfyUI finds wrong, `certain` only where it refuses the workflow because of it.

    It looks at nodes that an output node depends on; as long as one output is left it drops the others. `nodes` is
    its /object_info, and `may_have` says whether a file that is not in there may be there after all.
    """
    unknown = [
        _problem(
            node_id, node, f"there is no node {node['class_type']}",
            f"{_closest(node['class_type'], list(nodes))}install it on the base machine and run create_env.sh again",
        )
        for node_id, node in workflow.items()
        if node["class_type"] not in nodes
    ]  # fmt: skip
    if unknown:  # wherever it stands
        return unknown
    outputs = [node_id for node_id, node in workflow.items() if nodes[node["class_type"]].get("output_node")]
    if not outputs:
        return [Problem(None, None, "it has no output node", "add one that saves something, such as SaveImage")]
    branches = [_upstream(output, workflow, nodes) for output in outputs]
    found = {
        node_id: list(_problems_of(node_id, workflow, nodes, may_have))
        for node_id in dict.fromkeys(node_id for branch in branches for node_id in branch)
    }
    is_left = any(not any(problem.certain for node_id in branch for problem in found[node_id]) for branch in branches)
    problems = [problem for node_problems in found.values() for problem in node_problems]
    return [problem._replace(certain=False) for problem in problems] if is_left else problems


def _upstream(output: str, workflow: Workflow, nodes: dict[str, Any]) -> list[str]:
    """The output node and all it depends on, by inputs that its nodes know."""
    found, seen = [output], {output}
    for node_id in found:
        for _, _, _, value in _inputs_of(workflow[node_id], nodes):
            source = value[0] if isinstance(value, list) and len(value) == 2 else None
            if isinstance(source, str) and source in workflow and source not in seen:
                found.append(source)
                seen.add(source)
    return found


def _inputs_of(node: dict[str, Any], nodes: dict[str, Any]) -> Iterator[tuple[str, Any, dict[str, Any], Any]]:
    """Each input that the node knows: name, type (a list: the values it may have), options, and its value or MISSING.

    Of optional ones only those that are there. Inputs that the node does not know are ignored, as ComfyUI does.
    """
    known, given = nodes[node["class_type"]].get("input") or {}, node.get("inputs", {})
    for category in ("required", "optional"):
        for name, config in (known.get(category) or {}).items():
            if not (isinstance(config, list) and config):
                continue
            options = config[1] if len(config) > 1 and isinstance(config[1], dict) else {}
            if name in given or category == "required":
                yield name, config[0], options, given.get(name, MISSING)


MISSING = object()


def _problems_of(
    node_id: str, workflow: Workflow, nodes: dict[str, Any], may_have: Callable[[str], bool]
) -> Iterator[Problem]:
    node = workflow[node_id]
    ours = _validates_alike(nodes[node["class_type"]])
    for name, kind, options, value in _inputs_of(node, nodes):
        if str(kind).startswith("COMFY_"):  # its inputs depend on others
            continue
        if value is MISSING:
            yield _problem(node_id, node, f"{name} is missing", "connect it or give it a value")
        elif isinstance(value, list):
            yield from _problems_of_link(node_id, name, kind, value, workflow, nodes)
        else:
            plain = value["__value__"] if isinstance(value, dict) and "__value__" in value else value
            trouble = _trouble_with(name, kind, options, plain, may_have, ours=ours)
            if trouble:
                text, remedy, certain = trouble
                yield _problem(node_id, node, text, remedy, certain=certain)


def _problems_of_link(
    node_id: str, name: str, kind: Any, link: list[Any], workflow: Workflow, nodes: dict[str, Any]
) -> Iterator[Problem]:
    node = workflow[node_id]
    if len(link) != 2:
        yield _problem(node_id, node, f"{name} is no link", 'write ["node id", number of its output]')
        return
    source, slot = link
    if not isinstance(source, str) or source not in workflow:
        have = ", ".join(list(workflow)[:20])
        yield _problem(node_id, node, f"{name} links to node {source}, which is not there", f"the nodes are {have}")
        return
    info = nodes[workflow[source]["class_type"]]
    made = info.get("output") or []
    alike = _validates_alike(info)
    if not isinstance(slot, int) or not -len(made) <= slot < len(made):
        text = f"{name} links to output {slot} of node {source}, which has {count(len(made), 'output')}"
        yield _problem(node_id, node, text, "count its outputs from 0", certain=alike)
        return
    types = [set(re.split(r"\s*,\s*", one)) if isinstance(one, str) else set() for one in (made[slot], kind)]
    doubt = "*" in types[0] | types[1] or not all(types) or any(one.startswith("COMFY_") for one in types[0])
    if not doubt and not types[0] & types[1]:
        text = f"{name} is {kind}, but output {slot} of node {source} is {made[slot]}"
        certain = alike and _validates_alike(nodes[node["class_type"]])
        yield _problem(node_id, node, text, f"link it to an output that is {kind}", certain=certain)


def _trouble_with(
    name: str, kind: Any, options: dict[str, Any], value: Any, may_have: Callable[[str], bool], *, ours: bool
) -> tuple[str, str, bool] | None:
    """What is wrong with a value, what helps, and whether that is certain; None if nothing is."""
    number = value
    if kind in ("INT", "FLOAT"):
        try:
            number = int(value) if kind == "INT" else float(value)
        except (TypeError, ValueError, OverflowError):
            return f"{name} is {value!r:.80}", f"give {'a whole number' if kind == 'INT' else 'a number'}", True
    if isinstance(number, int | float) and kind not in ("STRING", "BOOLEAN"):
        low, high = options.get("min", -math.inf), options.get("max", math.inf)
        is_range = isinstance(low, int | float) and isinstance(high, int | float)
        if is_range and (number < low or number > high):
            return f"{name} is {number}", f"give a number from {low} to {high}", ours
    allowed = kind if isinstance(kind, list) else options.get("options") if kind == "COMBO" else None
    if not isinstance(allowed, list) or value in allowed:
        return None
    certain = ours and kind != "COMBO"  # which older servers do not look at
    if not (isinstance(value, str) and re.search(r"\.\w{2,12}(?: \[\w+\])?$", value)):
        have = ", ".join(map(str, allowed[:20])) or "nothing"
        return f"{name} is {value!r:.80}", f"{_closest(value, allowed)}it may be {have}", certain
    if may_have(value):
        return None
    where = "models/, in the folder of its kind"
    if value.endswith((".latent", "]")) or any(option.endswith("_upload") for option in options):
        # ComfyUI looks for such a file itself, and lists only those that lie in input/ and are of a kind.
        certain = certain and not re.search(r"[/\\\]]", value) and _is_media(value)
        where = "input/"
    remedy = f"{_closest(value, allowed)}put it into the bucket's {where}"
    return f"{name} {value!r:.200} is not installed", remedy, certain


def _is_media(file: str) -> bool:
    from mimetypes import guess_type

    return str(guess_type(file)[0]).startswith(("image/", "video/", "audio/"))


def _validates_alike(info: dict[str, Any]) -> bool:
    """Whether a node is one of ComfyUI's own, of which we know that it validates values no other way than by its inputs."""
    return not str(info.get("python_module", "")).startswith(("custom_nodes", "comfy_api_nodes"))


def _closest(name: Any, names: list[Any]) -> str:
    from difflib import get_close_matches

    found = get_close_matches(str(name), list(map(str, names)))
    return (
        f"the closest is {found[0]}, or "
        if len(found) == 1
        else f"the closest are {', '.join(found)}, or "
        if found
        else ""
    )


def _problem(node_id: str, node: dict[str, Any], text: str, remedy: str, *, certain: bool = True) -> Problem:
    meta = node.get("_meta")
    title = meta.get("title") if isinstance(meta, dict) else None
    return Problem(node_id, title or node["class_type"], text, remedy, certain)


def warn_of(problems: Sequence[Problem]) -> None:
    """Say what may go wrong as Python warnings."""
    import warnings

    for problem in problems:
        warnings.warn(str(problem), stacklevel=3)


# --- Inputs ----------------------------------------------------------------------------------------------


def input_name(path: Path) -> str:
    """The name of a file in input/: its own as far as it is plain, and the beginning of its content's SHA-256."""
    import hashlib

    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    stem = re.sub(r"[^A-Za-z0-9_-]+", "_", path.stem)[:80]
    return f"{stem}-{digest[:16]}{re.sub(r'[^A-Za-z0-9.]', '', path.suffix)}"


def upload_file(s3: Any, bucket: str, path: Path, name: str) -> None:
    """Put a file into the bucket's input/ under its input_name, unless it is there."""
    key = f"input/{name}"
    try:
        s3.head_object(Bucket=bucket, Key=key)
    except Exception as error:
        if error_code(error) not in ("404", "403"):  # the latter where only PutObject is allowed
            raise
        s3.upload_file(str(path), bucket, key)


# --- Workflows -------------------------------------------------------------------------------------------


def read_workflow(path: Path) -> Workflow:
    """Read an API-format workflow file; raises InvalidWorkflowError naming the file and the remedy."""
    try:
        return check_workflow(json.loads(path.read_text(encoding="utf-8")))
    except InvalidWorkflowError as error:
        raise InvalidWorkflowError(f"{path}: {error}") from None
    except OSError as error:
        raise InvalidWorkflowError(f"cannot read the workflow {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InvalidWorkflowError(f"{path} is not JSON ({error}): export it with Save (API Format)") from None


def set_input(workflow: Workflow, assignment: str, uploads: dict[str, Path]) -> tuple[str, str]:
    """Apply one NODE.INPUT=VALUE in place and return (node id, input name).

    The value takes the type of the one it replaces: text stays text, a number must be a number; a link
    or a list may be replaced by any JSON. Instead of text, @FILE is the name of a file that is added to `uploads`,
    and @@ begins a text with an @. Raises InvalidWorkflowError.
    """
    target, equals, value = assignment.partition("=")
    node_id, dot, name = target.partition(".")
    if not (equals and dot):
        raise InvalidWorkflowError(f"--set {assignment}: write NODE.INPUT=VALUE, such as 6.text='a red fox'")
    if node_id not in workflow:
        raise InvalidWorkflowError(f"--set {target}: there is no node {node_id}; the nodes are {', '.join(workflow)}")
    inputs = workflow[node_id].get("inputs", {})
    if name not in inputs:
        have = ", ".join(inputs) or "none"
        raise InvalidWorkflowError(f"--set {target}: node {node_id} has no input {name}; its inputs are {have}")
    if isinstance(inputs[name], str) and value.startswith("@"):
        inputs[name] = value[1:] if value.startswith("@@") else _coming_input(value[1:], target, uploads)
    else:
        inputs[name] = _like(inputs[name], value, target)
    return node_id, name


def _coming_input(file: str, target: str, uploads: dict[str, Path]) -> str:
    try:
        name = input_name(Path(file))
    except OSError as error:
        raise InvalidWorkflowError(
            f"--set {target}=@{file}: cannot read it: {error.strerror}; write @@ where the text begins with an @"
        ) from None
    uploads[name] = Path(file)
    return name


def _like(old: Any, text: str, target: str) -> Any:
    if isinstance(old, str):
        return text
    try:
        new = json.loads(text)
    except ValueError:
        new = text
    if isinstance(old, bool):
        if not isinstance(new, bool):
            raise InvalidWorkflowError(f"--set {target}={text}: the input is true or false")
    elif isinstance(old, int | float) and (isinstance(new, bool) or not isinstance(new, int | float)):
        raise InvalidWorkflowError(f"--set {target}={text}: the input is a number, such as {old}")
    return new


def fresh_seeds(workflow: Workflow, keep: set[tuple[str, str]]) -> Workflow:
    """A copy with a new random seed in every seed input but those in `keep`."""
    fresh = copy.deepcopy(workflow)
    for node_id, node in fresh.items():
        for name, value in node.get("inputs", {}).items():
            is_seed = name in {"seed", "noise_seed"} and isinstance(value, int) and not isinstance(value, bool)
            if is_seed and (node_id, name) not in keep:
                node["inputs"][name] = random.getrandbits(50)  # exact in JavaScript too, which reads these files
    return fresh


# --- Operating -------------------------------------------------------------------------------------------

WATCH_S = 5.0
"""Between two looks of --fleet --watch; an hour of it costs about 2 US cents of CloudWatch."""
HOUR_S = 3600
PEEK_S = 30
"""So long a message that is looked at, or sent back, is hidden from others."""
LOGS_READ, LOG_BYTES = 20, 256 * 1024
"""So many of the newest logs are searched for what became of dead jobs, so much of each one's end."""


def add_operator_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command line has for those who keep the fleet."""
    group = parser.add_argument_group("instead of sending")
    one = group.add_mutually_exclusive_group()
    one.add_argument(
        "--fleet",
        nargs="?",
        const="",
        metavar="NAME",
        help="how queue and instances stand, here or in environment NAME",
    )
    one.add_argument("--dead", action="store_true", help="the jobs in the dead-letter queue, and why they are there")
    one.add_argument("--redrive", action="store_true", help="send the dead jobs back to the queue")
    one.add_argument("--purge-dead", action="store_true", help="delete the dead jobs, after a question")
    one.add_argument("--report", nargs="+", metavar="JOB_ID", help="draw a page of jobs that have ended")
    group.add_argument("--watch", action="store_true", help="with --fleet: look again every few seconds")
    group.add_argument("--yes", action="store_true", help="with --purge-dead: do not ask")
    group.add_argument("--output", type=Path, default=Path("report.html"), metavar="FILE.html",
                       help="with --report: the page (default: report.html)")  # fmt: skip
    group.add_argument("--price", type=float, metavar="USD", help="with --fleet and --report: an instance's hour")


def check_operator_arguments(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse what cannot be meant."""
    for job_id in options.report or ():
        if not is_job_id(job_id):
            parser.error(f"--report {job_id:.60}: that is no job id, such as {new_job_id()}")
    if options.price is not None and not 0 <= options.price < math.inf:
        parser.error(f"--price {options.price:g}: give USD per hour, such as 1.212")
    if options.watch and options.fleet is None:
        parser.error("--watch belongs to --fleet: add it, or leave out --watch")
    if options.yes and not options.purge_dead:
        parser.error("--yes belongs to --purge-dead: add it, or leave out --yes")
    if is_for_operator(options) and (options.workflow or options.wait or options.exec_cmd or options.direct):
        parser.error("--fleet, --dead, --redrive, --purge-dead and --report send no job: leave out the rest")


def is_for_operator(options: argparse.Namespace) -> bool:
    """Whether nothing is to be sent."""
    return options.fleet is not None or options.dead or options.redrive or options.purge_dead or bool(options.report)


def run_operator(options: argparse.Namespace) -> int:
    """Do what the operator asks for; returns the exit code."""
    try:
        sender = Sender(load_settings(options.fleet or options.env))
    except SettingsError as error:
        print(f"send_job.py: {error}", file=sys.stderr)
        return 2
    try:
        if options.fleet is not None:
            return run_fleet(sender.settings, options)
        if options.report:
            return run_report(sender, options.report, options.output, options.price)
        if options.dead:
            return run_dead(sender)
        return run_redrive(sender) if options.redrive else run_purge(sender, sure=options.yes)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        print(f"send_job.py: {refusal(error, 'sqs')}", file=sys.stderr)
        return 1


def refusal(error: Exception, service: str) -> str:
    """An error in one line; of a refused access only what is not allowed."""
    code = error_code(error)
    if "AccessDenied" in code or code in ("UnauthorizedOperation", "AuthorizationError"):
        return f"not allowed: {service}:{getattr(error, 'operation_name', '')}"
    return one_line(error)


# --- The fleet at a glance


def run_fleet(settings: Settings, options: argparse.Namespace) -> int:
    """Show how the fleet stands, once or again and again; returns the exit code."""
    shown = ""
    while True:
        fleet = read_fleet(settings, options.price)
        if options.json:
            print(json.dumps(fleet), flush=True)
        elif not options.watch:
            print("\n".join(tell_fleet(fleet)))
        elif sys.stdout.isatty():
            print("\x1b[H\x1b[J" + "\n".join(tell_fleet(fleet)), flush=True)
        elif (line := tell_fleet_shortly(fleet)) != shown:
            shown = line
            print(f"{fleet['at']} {line}", flush=True)
        if not options.watch:
            return 1 if fleet["queue"] is None and fleet["group"] is None else 0
        time.sleep(WATCH_S)


def read_fleet(settings: Settings, price: float | None = None) -> dict[str, Any]:
    """How queue and instances stand. What cannot be read is None, and `not_seen` says why."""
    now = datetime.now(UTC)
    fleet: dict[str, Any] = {
        "env": settings.env, "region": settings.region, "at": now.isoformat(timespec="seconds").replace("+00:00", "Z"),
        "queue": None, "oldest_s": None, "last_hour": None, "group": None, "instances": [], "usd_per_hour": None,
        "scaling_errors": [], "not_seen": [],
    }  # fmt: skip

    @contextmanager
    def part(service: str) -> Iterator[Any]:
        """The rest is shown without what this block reads, where it fails."""
        try:
            yield aws_client(service, settings.region)
        except Exception as error:
            fleet["not_seen"] = list(dict.fromkeys([*fleet["not_seen"], refusal(error, service)]))

    with part("sqs") as sqs:
        fleet["queue"] = read_queues(sqs, settings.sqs_name)
    with part("cloudwatch") as cloudwatch:
        fleet["oldest_s"], fleet["last_hour"] = read_metrics(cloudwatch, settings, now)
    group: dict[str, Any] = {}
    with part("autoscaling") as autoscaling:
        answer = autoscaling.describe_auto_scaling_groups(AutoScalingGroupNames=[settings.asg_name])
        for group in answer["AutoScalingGroups"]:
            fleet["group"] = {
                name: group[key]
                for name, key in (("wanted", "DesiredCapacity"), ("least", "MinSize"), ("most", "MaxSize"))
            }
        if group:
            fleet["scaling_errors"] = read_scaling_errors(autoscaling, settings.asg_name, now)
    launched: dict[str, datetime] = {}
    if group.get("Instances"):
        with part("ec2") as ec2:
            pages = ec2.get_paginator("describe_instances").paginate(
                Filters=[{"Name": "tag:aws:autoscaling:groupName", "Values": [settings.asg_name]}]
            )
            launched = {
                instance["InstanceId"]: instance["LaunchTime"]
                for page in pages
                for reservation in page["Reservations"]
                for instance in reservation["Instances"]
            }
    for instance in group.get("Instances", ()):
        instance_id, kind = instance["InstanceId"], instance.get("InstanceType", "")
        jobs, begun = [], None
        with part("s3") as s3:
            try:
                jobs = read_json(s3, settings.s3_bucket, f"output/{instance_id}/worker.json")["jobs"]
                begun = True
            except s3.exceptions.NoSuchKey:
                begun = False
        age_s = round((now - launched[instance_id]).total_seconds()) if instance_id in launched else None
        fleet["instances"].append(
            {"instance_id": instance_id, "type": kind, "state": state_of(instance, jobs, begun), "age_s": age_s,
             "jobs": jobs, "usd_per_hour": price_of(kind, settings.region) if price is None else price}
        )  # fmt: skip
    prices = [each["usd_per_hour"] for each in fleet["instances"]]
    if group and None not in prices:
        fleet["usd_per_hour"] = round(sum(prices), 4)
    return fleet


def read_queues(sqs: Any, name: str) -> dict[str, int | None]:
    """How many messages wait, are held, and are dead; None for those of a dead-letter queue that is not there."""
    depth = queue_depth(sqs, sqs.get_queue_url(QueueName=name)["QueueUrl"])
    dead = None
    with suppress(sqs.exceptions.QueueDoesNotExist):
        dead = sum(queue_depth(sqs, sqs.get_queue_url(QueueName=f"{name}-dlq")["QueueUrl"]))
    return {"waiting": depth.visible, "in_flight": depth.in_flight, "dead": dead}


def read_metrics(cloudwatch: Any, settings: Settings, now: datetime) -> tuple[int | None, dict[str, int] | None]:
    """The oldest message's age in seconds, and how many jobs succeeded and failed in the last hour, None where no
    worker has published any."""
    own = f"{settings.prefix}/{settings.env}"
    queue = [{"Name": "QueueName", "Value": settings.sqs_name}]
    queries = [
        {"Id": name.lower(), "MetricStat": {"Stat": statistic, "Period": 60, "Metric": {
            "Namespace": space, "MetricName": name, "Dimensions": dimensions}}}
        for name, statistic, space, dimensions in (
            ("ApproximateAgeOfOldestMessage", "Maximum", "AWS/SQS", queue),
            ("JobsSucceeded", "Sum", own, []),
            ("JobsFailed", "Sum", own, []),
        )
    ]  # fmt: skip
    answer = cloudwatch.get_metric_data(
        MetricDataQueries=queries,
        StartTime=now - timedelta(seconds=HOUR_S),
        EndTime=now + timedelta(seconds=60),
        ScanBy="TimestampDescending",
    )
    values = {result["Id"]: result["Values"] for result in answer["MetricDataResults"]}
    ages, succeeded, failed = (values.get(query["Id"], []) for query in queries)
    hour = {"succeeded": round(sum(succeeded)), "failed": round(sum(failed))} if succeeded or failed else None
    return round(ages[0]) if ages else None, hour


def read_scaling_errors(autoscaling: Any, asg_name: str, now: datetime) -> list[dict[str, Any]]:
    """Why launches failed in the last hour, each reason once, the latest first."""
    errors: dict[str, int] = {}
    answer = autoscaling.describe_scaling_activities(AutoScalingGroupName=asg_name, MaxRecords=100)
    for activity in answer["Activities"]:
        age_s = round((now - activity["StartTime"]).total_seconds())
        if activity["StatusCode"] == "Failed" and activity.get("StatusMessage") and age_s < HOUR_S:
            errors.setdefault(explain_launch_failure(activity["StatusMessage"]), age_s)
    return [{"age_s": age_s, "message": message} for message, age_s in errors.items()]


def state_of(instance: dict[str, Any], jobs: list[dict[str, Any]], begun: bool | None) -> str:
    """An instance of a group in one word; `begun` says whether its worker has, None where that cannot be seen."""
    state = str(instance["LifecycleState"])
    if state.startswith("Warmed"):
        return "warm"
    if state.startswith("Terminat"):
        return "leaving"
    if instance.get("HealthStatus", "Healthy").lower() != "healthy":
        return "unhealthy"
    if state.startswith("Pending") or begun is False:
        return "booting"
    if begun is None:
        return "in service"
    return "busy" if jobs else "idle"


def tell_fleet(fleet: dict[str, Any]) -> list[str]:
    """How the fleet stands, as lines for people."""
    lines = [f"Environment {fleet['env']} in {fleet['region']}, {fleet['at']}", f"queue      {tell_queue(fleet)}"]
    if fleet["oldest_s"] and (fleet["queue"] or {}).get("waiting"):
        lines[-1] += f"; the oldest for {duration(fleet['oldest_s'])}"
    hour = fleet["last_hour"]
    lines.append(
        f"last hour  {hour['succeeded']} succeeded, {hour['failed']} failed" if hour else "last hour  not known"
    )
    lines.append(f"instances  {tell_instances(fleet)}")
    for each in fleet["instances"]:
        age = duration(each["age_s"]) if each["age_s"] is not None else ""
        jobs = "; ".join(map(tell_job, each["jobs"]))
        lines.append(f"  {each['instance_id']:19}  {each['type']:12} {each['state']:10} {age:>12}  {jobs}".rstrip())
    lines += [f"scaling    {duration(each['age_s'])} ago: {each['message']}" for each in fleet["scaling_errors"]]
    return lines + [f"not seen   {each}" for each in fleet["not_seen"]]


def tell_fleet_shortly(fleet: dict[str, Any]) -> str:
    """How the fleet stands, in one line."""
    return f"{tell_queue(fleet)}; {tell_instances(fleet)}" + "".join(f"; {each}" for each in fleet["not_seen"])


def tell_queue(fleet: dict[str, Any]) -> str:
    """`3 waiting, 2 running, 0 dead`."""
    queue = fleet["queue"]
    if queue is None:
        return "not seen"
    dead = "no dead-letter queue" if queue["dead"] is None else f"{queue['dead']} dead"
    return f"{queue['waiting']} waiting, {queue['in_flight']} in flight, {dead}"


def tell_instances(fleet: dict[str, Any]) -> str:
    """`2 of 2 wanted (0 to 20): 1 busy, 1 booting; $2.42 an hour`."""
    group, there = fleet["group"], fleet["instances"]
    if group is None:
        refused = any("autoscaling" in each for each in fleet["not_seen"])
        return "not seen" if refused else "there is no group: scaling is off"
    told = f"{len(there)} there, {group['wanted']} wanted ({group['least']} to {group['most']})"
    if there:
        told += ": " + ", ".join(f"{n} {state}" for state, n in Counter(each["state"] for each in there).items())
        price = fleet["usd_per_hour"]
        told += "; price unknown, give --price" if price is None else f"; ${price:g} an hour on demand"
    return told


def tell_job(job: dict[str, Any]) -> str:
    """What an instance does with a job."""
    step = f" {job['value']} of {job['max']}" if job.get("max") else ""
    title = " ".join(str(job.get("node_title") or "").split())
    running_s = max(0.0, time.time() - moment(job["since"]))
    return printable(f"{job['job_id']} for {duration(running_s)}" + (f", {title}{step}" if title else ""))


def printable(text: str) -> str:
    """Text that others have written, without what a terminal would obey."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


# --- Jobs that are dead


def run_dead(sender: Sender) -> int:
    """List the dead-letter queue; returns the exit code."""
    settings = sender.settings
    sqs = aws_client("sqs", settings.region)
    messages = peek(sqs, dead_letters(sqs, settings))
    print(f"{count(len(messages), 'job')} in {settings.sqs_name}-dlq")
    s3 = aws_client("s3", settings.region)
    stories: dict[str, tuple[str, str]] = {}
    if messages:
        try:
            stories = read_stories(s3, settings.s3_bucket, min(map(sent_at, messages)))
        except Exception as error:
            print(f"  the workers' logs cannot be searched: {refusal(error, 's3')}")
    for message in messages:
        job_id, kind = job_of(message)
        print(f"  {job_id}  {kind}, sent {sent_at(message):%Y-%m-%d %H:%M} UTC")
        reason, log = stories.get(message["MessageId"], ("", ""))
        result: Receipt | None = None
        with suppress(Exception):
            result = read_result(s3, settings.s3_bucket, job_id)
        if not reason:
            received = message["Attributes"]["ApproximateReceiveCount"]
            reason = f"received {received} times, and no word of it in the logs: they are stored every few minutes"
        print(f"      {printable(reason)}")
        if result is not None:
            failure = result["error"]
            ended = f"failed: {failure['message']}" if failure else "succeeded"
            print(f"      its result is stored all the same, {printable(ended)}")
        if log:
            print(f"      s3://{settings.s3_bucket}/{log}")
    return 0


def run_redrive(sender: Sender) -> int:
    """Send the dead jobs back to their queue, under the ids they had; returns the exit code.

    Each is deleted only after it was sent, so one may be there twice but none gets lost, and an id is run once. SQS's
    own redrive is not used because it gives new message ids, which are the job ids of messages without a job_id.
    """
    settings = sender.settings
    sqs = aws_client("sqs", settings.region)
    url = dead_letters(sqs, settings)
    left = max(10, queue_depth(sqs, url).visible)  # not without end: some may come back at once
    sent = 0
    unsent: dict[str, str] = {}
    while left > 0 and not unsent and (messages := receive_some(sqs, url, min(10, left))):
        left -= len(messages)
        for batch in batches([with_its_id(message) for message in messages]):
            unsent |= sender._send_batch(batch)
        done = [message for message in messages if message["MessageId"] not in unsent]
        if done:
            sqs.delete_message_batch(QueueUrl=url, Entries=entries_of(done))
        give_back(sqs, url, [message for message in messages if message["MessageId"] in unsent])
        sent += len(done)
    print(f"{count(sent, 'job')} sent back to {settings.sqs_name}")
    if sent:
        sender.raise_capacity(sent, say=print)
    if unsent:
        reason = next(iter(unsent.values()))
        print(f"send_job.py: {count(len(unsent), 'job')} could not be sent back: {reason}", file=sys.stderr)
    return 1 if unsent else 0


def run_purge(sender: Sender, *, sure: bool) -> int:
    """Delete the dead jobs, if that is what is wanted; returns the exit code."""
    settings = sender.settings
    sqs = aws_client("sqs", settings.region)
    url = dead_letters(sqs, settings)
    number = count(sum(queue_depth(sqs, url)), "job")
    if not sure:
        try:
            answer = input(f"{number} in {settings.sqs_name}-dlq will be lost. Type {settings.env} to delete them: ")
        except EOFError:
            answer = ""
        if answer.strip() != settings.env:
            print("send_job.py: nothing was deleted", file=sys.stderr)
            return 1
    sqs.purge_queue(QueueUrl=url)
    print(f"{number} deleted from {settings.sqs_name}-dlq; AWS takes up to a minute for it")
    return 0


def dead_letters(sqs: Any, settings: Settings) -> str:
    """The dead-letter queue's address."""
    return str(sqs.get_queue_url(QueueName=f"{settings.sqs_name}-dlq")["QueueUrl"])


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


def job_of(message: dict[str, Any]) -> tuple[str, str]:
    """A message's job id, and what kind of job it is."""
    try:
        job = parse_message(message["Body"], message["MessageId"])
    except Exception as error:  # it is dead, so it may be anything
        return getattr(error, "job_id", None) or message["MessageId"], f"no job ({printable(one_line(error))})"
    return job.id, "command" if job.command is not None else "workflow"


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


def read_stories(s3: Any, bucket: str, since: datetime) -> dict[str, tuple[str, str]]:
    """Why messages were put back the last time, by message id, and the key of the worker's log that says so."""
    pages = s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix="output/i-")
    logs = [item for page in pages for item in page.get("Contents", []) if "/parse_job.log" in item["Key"]]
    logs = sorted((item for item in logs if item["LastModified"] >= since), key=lambda item: item["LastModified"])
    stories = {}
    for item in logs[-LOGS_READ:]:
        text = (
            s3.get_object(Bucket=bucket, Key=item["Key"], Range=f"bytes=-{LOG_BYTES}")["Body"]
            .read()
            .decode(errors="replace")
        )
        for message_id, attempt, reason in re.findall(
            r"Message (\S+) is put back for \d+ s after (attempt \d+ of \d+): (.*)", text
        ):
            stories[message_id] = (f"{attempt}: {reason}", item["Key"])
    return stories


# --- Report ----------------------------------------------------------------------------------------------
# One page of jobs that have ended, from their receipts. draw_report is a pure function; demo.py uses it, too.

PRICES_USD_H = {
    "g4dn.xlarge": 0.526, "g4dn.2xlarge": 0.752, "g4dn.4xlarge": 1.204, "g4dn.8xlarge": 2.176,
    "g5.xlarge": 1.006, "g5.2xlarge": 1.212, "g5.4xlarge": 1.624, "g5.8xlarge": 2.448,
    "g6.xlarge": 0.8048, "g6.2xlarge": 0.9776, "g6.4xlarge": 1.3232, "g6.8xlarge": 2.0144,
    "g6e.xlarge": 1.861, "g6e.2xlarge": 2.24208, "g6e.4xlarge": 3.00424, "g6e.8xlarge": 4.52856,
}  # fmt: skip
"""On demand, Linux, shared tenancy, alike in PRICE_REGIONS: AWS's public price list (AmazonEC2), as copies of it had
them for us-east-1 on 2026-09-24 and for us-west-2 on 2025-11-30."""
PRICE_REGIONS = ("us-east-1", "us-west-2")
BILLED_AT_LEAST_S = 60
AFTERWARDS_S = 600
"""So long after the last job the page shows instances that idle and leave."""
EMBEDDED_BYTES = 256 * 1024
"""A larger image lies beside the page instead of in it, as do all once those in it have PAGE_BYTES together."""
PAGE_BYTES = 16 * 1024 * 1024
IMAGE_TYPES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp",
               ".gif": "image/gif"}  # fmt: skip


Receipt = Mapping[str, Any]
"""What stands in a job's result.json."""


class Picture(NamedTuple):
    """An image of a job: its address (a data: URI, or relative to the page) and what its file says of its making."""

    source: str
    name: str
    prompt: str = ""
    seed: str = ""


class Life(NamedTuple):
    """What is known of an instance, in seconds since 1970, and its USD per hour."""

    launched: float | None = None
    ready: float | None = None
    ended: float | None = None
    type: str = ""
    price: float | None = None


def run_report(sender: Sender, job_ids: Sequence[str], page: Path, price: float | None) -> int:
    """Draw the page of these jobs; returns the exit code."""
    settings = sender.settings
    results = []
    try:
        s3 = aws_client("s3", settings.region)
        for job_id in dict.fromkeys(job_ids):
            result = read_result(s3, settings.s3_bucket, job_id)
            if result is None:
                print(f"send_job.py: job {job_id} has no result yet: it is left out", file=sys.stderr)
            else:
                results.append(result)
        if results:
            instances = dict.fromkeys(result["instance_id"] for result in results)
            autoscaling = aws_client("autoscaling", settings.region)
            lives = read_lives(s3, autoscaling, settings, list(instances), price)
            write_report(s3, settings.s3_bucket, f"Environment {settings.env}", results, lives, page)
    except Exception as error:
        print(f"send_job.py: no report: {refusal(error, 's3')}", file=sys.stderr)
        return 1
    if results:
        print(f"Report of {count(len(results), 'job')}: {page}")
    return 0 if len(results) == len(set(job_ids)) else 1


def write_report(
    s3: Any,
    bucket: str,
    title: str,
    results: Sequence[Receipt],
    lives: Mapping[str, Life],
    page: Path,
    note: str = "",
) -> None:
    """Fetch the jobs' images and write the page. Raises what boto3 raises, and OSError."""
    from base64 import b64encode
    from urllib.parse import quote

    folder = page.with_name(f"{page.stem}-files")
    room = PAGE_BYTES
    pictures: dict[str, list[Picture]] = {}
    for result in results:
        for output in result["outputs"]:
            kind = IMAGE_TYPES.get(Path(output["filename"]).suffix.lower())
            if kind is None or output["type"] != "output":
                continue
            try:
                body = s3.get_object(Bucket=bucket, Key=output["s3_key"])["Body"].read()
            except s3.exceptions.NoSuchKey:
                continue  # somebody has tidied up
            if len(body) <= min(EMBEDDED_BYTES, room):
                room -= len(body)
                source = f"data:{kind};base64,{b64encode(body).decode()}"
            else:
                folder.mkdir(parents=True, exist_ok=True)
                number = len(pictures.get(result["job_id"], ())) + 1
                file = folder / f"{result['job_id']}-{number}{Path(output['filename']).suffix.lower()}"
                file.write_bytes(body)
                source = quote(f"{folder.name}/{file.name}")
            picture = Picture(source, output["filename"], *made_from(body))
            pictures.setdefault(result["job_id"], []).append(picture)
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(draw_report(title, results, pictures, lives, note), encoding="utf-8")


def read_lives(
    s3: Any, autoscaling: Any, settings: Settings, instance_ids: Sequence[str], price: float | None = None
) -> dict[str, Life]:
    """What can be known of instances, also of those that are gone: from the group's activities, which AWS keeps for
    six weeks, and from what the workers left in the bucket. What cannot be read is left out."""
    lives = dict.fromkeys(instance_ids, Life(price=price))
    for instance_id in instance_ids:
        with suppress(Exception):
            kind = read_json(s3, settings.s3_bucket, f"output/{instance_id}/worker.json")["instance_type"] or ""
            lives[instance_id] = Life(type=kind, price=price_of(kind, settings.region) if price is None else price)
        with suppress(Exception):
            boot = read_json(s3, settings.s3_bucket, f"output/{instance_id}/boot.json")
            lives[instance_id] = lives[instance_id]._replace(ready=moment(boot["booted_at"]) + boot["total"])
    with suppress(Exception):
        pages = autoscaling.get_paginator("describe_scaling_activities")
        for activity in itertools.chain.from_iterable(
            page["Activities"]
            for page in pages.paginate(AutoScalingGroupName=settings.asg_name, PaginationConfig={"MaxItems": 10_000})
        ):
            match = re.match(r"(Launching a new|Terminating) EC2 instance: (\S+)", activity["Description"])
            if not match or match[2] not in lives:
                continue
            if match[1] == "Terminating":
                ended = activity["EndTime"].timestamp() if "EndTime" in activity else None
                lives[match[2]] = lives[match[2]]._replace(ended=ended)
            else:
                lives[match[2]] = lives[match[2]]._replace(launched=activity["StartTime"].timestamp())
            if all(life.launched for life in lives.values()):
                break  # the newest come first, so there is nothing more to learn
    return lives


def read_json(s3: Any, bucket: str, key: str) -> Any:
    """A JSON object in the bucket. Raises what boto3 raises, and ValueError."""
    return json.loads(s3.get_object(Bucket=bucket, Key=key)["Body"].read())


class Ran(NamedTuple):
    """One job of a report: its number on the page, its times, its receipt."""

    number: int
    sent: float
    started: float
    finished: float
    result: Receipt

    @classmethod
    def of(cls, number: int, result: Receipt) -> Ran:
        """The job of a receipt. Instances' clocks differ a little: none starts before it was sent."""
        sent, started, finished = (
            moment(result["timings"][f"{name}_at"]) for name in ("sent", "started", "finished")
        )
        started = max(sent, started)
        return cls(number, sent, started, max(started, finished), result)

    def times(self) -> str:
        """How long it waited and ran, in words."""
        return f"waited {duration(self.started - self.sent)}, ran {duration(self.finished - self.started)}"


class Lane(NamedTuple):
    """One instance of a report: its time on the page, where it was ready, its jobs."""

    instance_id: str
    begin: float
    ready: float
    end: float
    jobs: list[Ran]

    def busy(self) -> Iterator[tuple[float, float]]:
        """When it had a job, without overlaps: jobs may overlap a little where one is finished beside the next."""
        free = self.begin
        for job in self.jobs:
            if job.finished > free:
                yield max(job.started, free), job.finished
                free = job.finished


def draw_report(
    title: str,
    results: Iterable[Receipt],
    pictures: Mapping[str, Sequence[Picture]],
    lives: Mapping[str, Life],
    note: str = "",
) -> str:
    """One HTML page, with nothing from elsewhere, of jobs that have ended: timeline, costs, images.

    `pictures` by job id and `lives` by instance id, as far as they are known; `note` is for its end.
    """
    from string import Template

    ended = sorted(results, key=lambda result: (result["timings"]["sent_at"], result["timings"]["started_at"]))
    jobs = [Ran.of(number, result) for number, result in enumerate(ended, 1)]
    parts = dict.fromkeys(("about", "figures", "chart", "cards", "notes"), "")
    if jobs:
        last = max(job.finished for job in jobs)
        ends = [life.ended for life in lives.values() if life.ended]
        begin, end = min(job.sent for job in jobs), min(max([last, *ends]), last + AFTERWARDS_S)
        span = Span(begin, max(end, begin + 1))
        lanes = sorted(draw_lanes(jobs, lives, span), key=lambda lane: (lane.begin, lane.instance_id))
        parts["figures"], parts["notes"] = draw_figures(jobs, lanes, lives, span)
        parts["notes"] += f"<p>{plain(note)}</p>" if note else ""
        parts["chart"] = draw_chart(jobs, lanes, span)
        parts["cards"] = "\n".join(draw_card(job, pictures.get(job.result["job_id"], ())) for job in jobs)
        when = datetime.fromtimestamp(begin, UTC)
        there = f"{count(len(jobs), 'job')} on {count(len(lanes), 'instance')}"
        parts["about"] = f"{when.day} {when:%B %Y, %H:%M} UTC, {there}"
    return Template(REPORT_PAGE).substitute(parts, title=plain(title), about=parts["about"] or "No jobs")


def draw_lanes(jobs: Sequence[Ran], lives: Mapping[str, Life], span: Span) -> Iterator[Lane]:
    """Each instance's lane. Of one that nothing is known of: from its first job to its last."""
    for instance_id in dict.fromkeys([*(job.result["instance_id"] for job in jobs), *lives]):
        own = sorted((job for job in jobs if job.result["instance_id"] == instance_id), key=lambda job: job.started)
        life = lives.get(instance_id, Life())
        first, last = (own[0].started, max(job.finished for job in own)) if own else (span.end, span.begin)
        begin = max(span.begin, min(first, life.launched or first))
        end = min(span.end, max(last, life.ended or (span.end if life.launched else last)))
        if begin < end or own:
            yield Lane(instance_id, begin, min(max(life.ready or begin, begin), first, end), end, own)


def draw_figures(
    jobs: Sequence[Ran], lanes: Sequence[Lane], lives: Mapping[str, Life], span: Span
) -> tuple[str, str]:
    """The numbers at the top of the page, and the notes at its end."""
    waits = [job.started - job.sent for job in jobs]
    runs = [job.finished - job.started for job in jobs]
    good = sum(job.result["status"] == "succeeded" for job in jobs)
    alive_s = sum(lane.end - lane.begin for lane in lanes)
    busy_s = sum(end - begin for lane in lanes for begin, end in lane.busy())
    cost: float | None = 0.0
    for lane in lanes:
        life = lives.get(lane.instance_id, Life())
        from_launch = life.launched is not None and life.launched >= span.begin
        billed_s = max(lane.end - lane.begin, BILLED_AT_LEAST_S if from_launch else 0)
        cost = None if cost is None or life.price is None else cost + billed_s * life.price / 3600
    kinds = Counter((life.type, life.price) for life in (lives.get(lane.instance_id, Life()) for lane in lanes))
    of = ", ".join(f"{number} {kind or 'of unknown type'}" for (kind, _), number in kinds.items())
    rates = ", ".join(f"{kind} ${price:g}/h".strip() for kind, price in kinds if price is not None)
    failed = len(jobs) - good
    figures = [
        ("jobs succeeded", f"{good}<small> of {len(jobs)}</small>", f"{failed} failed" if failed else "none failed"),
        ("all done in", duration(max(job.finished for job in jobs) - span.begin), f"first after {duration(min(job.finished for job in jobs) - span.begin)}"),
        ("wait, median", duration(percentile(waits, 0.5)), f"95 % at most {duration(percentile(waits, 0.95))}"),
        ("run, median", duration(percentile(runs, 0.5)), f"95 % at most {duration(percentile(runs, 0.95))}"),
        ("instance time busy", f"{100 * busy_s / alive_s if alive_s else 100:.0f} %", f"{duration(busy_s)} of {duration(alive_s)}"),
        ("cost", "price unknown" if cost is None else usd(cost), plain(rates or of)),
    ]  # fmt: skip
    drawn = "".join(f"<div><dt>{what}</dt><dd>{value}</dd><dd>{more}</dd></div>\n" for what, value, more in figures)
    notes = [
        "Busy: the share of the instances' time on this page in which they had one of its jobs.",
        "Cost: that time at the on-demand price; EC2 bills "
        f"{BILLED_AT_LEAST_S} seconds at least for each launch. Storage, requests and Spot discounts are left out.",
    ]
    if cost is None:
        notes.append(f"Price unknown ({plain(of)}): give it with --price.")
    return drawn, "\n".join(f"<p>{note}</p>" for note in notes)


def draw_chart(jobs: Sequence[Ran], lanes: Sequence[Lane], span: Span) -> str:
    """The timeline: jobs that wait, instances that boot, work and idle, and each instance's jobs."""
    waiting = [change for job in jobs for change in ((job.sent, 1), (job.started, -1))]
    busy = [change for lane in lanes for begin, end in lane.busy() for change in ((begin, 1), (end, -1))]
    boots = [change for lane in lanes for change in ((lane.begin, 1), (lane.ready, -1))]
    alive = [change for lane in lanes for change in ((lane.begin, 1), (lane.end, -1))]
    depth, most = peak(waiting), peak(alive)
    layers = (
        span.area(alive, most, "idle") + span.area([*busy, *boots], most, "booting") + span.area(busy, most, "busy")
    )
    rows = [
        ("Jobs waiting", f"peak {depth}", span.area(waiting, depth, "waiting"), "How many jobs waited on the queue"),
        ("Instances", f"peak {most}", layers, "How many instances were busy, booting and idle"),
    ]
    drawn = [
        f'<div class="row tall"><div class="name">{name}<small>{more}</small></div><div class="plot">'
        f'<svg viewBox="0 0 100 100" preserveAspectRatio="none" role="img" aria-label="{about}: {more}">{areas}</svg>'
        "</div></div>"
        for name, more, areas, about in rows
    ]
    for lane in lanes:
        place = f"left:{span.at(lane.begin):.3f}%;width:{span.at(lane.end) - span.at(lane.begin):.3f}%"
        boot = f"left:{span.at(lane.begin):.3f}%;width:{span.at(lane.ready) - span.at(lane.begin):.3f}%"
        bars = [f'<span class="life idle" style="{place}"></span>']
        if lane.ready > lane.begin:
            bars.append(f'<span class="life booting" style="{boot}" title="booting, {duration(lane.ready - lane.begin)}"></span>')  # fmt: skip
        bars += [draw_bar(job, span) for job in lane.jobs]
        name = lane.instance_id
        drawn.append(
            f'<div class="row"><div class="name" title="{plain(name)}">'
            f"<code><span>{plain(name[:-5])}</span>{plain(name[-5:])}</code>"
            f'<small>{count(len(lane.jobs), "job")}</small></div><div class="plot">{"".join(bars)}</div></div>'
        )
    ticks = [
        f'<span class="tick" style="left:{span.at(span.begin + tick):.3f}%"><i>{round_time(tick)}</i></span>'
        for tick in span.ticks()
    ]
    return f'<div class="ticks" aria-hidden="true">{"".join(ticks)}</div>\n' + "\n".join(drawn)


def draw_bar(job: Ran, span: Span) -> str:
    """A job on its instance's lane, which leads to its card."""
    left = span.at(job.started)
    kind = "busy" if job.result["status"] == "succeeded" else "failed"
    told = (
        f"<b>job {job.number}{'' if kind == 'busy' else ' failed'}</b> <code>{plain(job.result['job_id'])}</code>"
        f"{job.times()}"
    )
    label = f"job {job.number}{'' if kind == 'busy' else ' failed'}, {job.times()}"
    return (
        f'<a class="bar {kind}{" east" if left > 30 else ""}" href="#job{job.number}" aria-label="{label}" '
        f'style="left:{left:.3f}%;width:{span.at(job.finished) - left:.3f}%"><span>{told}</span></a>'
    )


def draw_card(job: Ran, pictures: Sequence[Picture]) -> str:
    """A job in the gallery: its images and what they were made of, or what became of it instead."""
    result = job.result
    anchor = f"#job{job.number}"
    parts = [
        f'<a href="{plain(each.source) if not each.source.startswith("data:") else anchor}">'
        f'<img src="{plain(each.source)}" alt="{plain(each.prompt or each.name)}" loading="lazy" /></a>'
        for each in pictures
    ]
    if result["status"] != "succeeded":
        error = result["error"] or {}
        parts.append(f'<p class="error"><b>{plain(error.get("kind"))}</b> {plain(error.get("message"))}</p>')
    elif not pictures:
        names = ", ".join(str(output["filename"]) for output in result["outputs"])
        parts.append(f'<p class="none">{plain(names) or "no file"}</p>')
    prompt = "\n".join(dict.fromkeys(each.prompt for each in pictures if each.prompt))
    seeds = ", ".join(dict.fromkeys(each.seed for each in pictures if each.seed))
    facts = [("seed", plain(seeds)), ("on", f"<code>{plain(result['instance_id'])}</code>")]
    facts.append(("job", f"<code>{plain(result['job_id'])}</code>"))
    listed = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts if value)
    return (
        f'<article id="job{job.number}"><div class="pictures p{min(len(parts), 2)}">{"".join(parts)}</div>'
        f"<h3>{job.number}</h3>{f'<p>{plain(prompt)}</p>' if prompt else ''}"
        f'<p class="times">{job.times()}</p>'
        f"<dl>{listed}</dl></article>"
    )


def price_of(instance_type: str, region: str) -> float | None:
    """USD per hour on demand; None where it is not known."""
    return PRICES_USD_H.get(instance_type) if region in PRICE_REGIONS else None


def made_from(png: bytes) -> tuple[str, str]:
    """Prompt and seeds of a PNG as ComfyUI saves it, with the workflow in its tEXt chunk `prompt`; "" without."""
    place = 8
    while png[place + 4 : place + 8] not in (b"", b"IDAT"):
        size = int.from_bytes(png[place : place + 4], "big")
        if png[place + 4 : place + 8] == b"tEXt":
            keyword, _, text = png[place + 8 : place + 8 + size].partition(b"\0")
            if keyword == b"prompt":
                with suppress(ValueError, RecursionError, InvalidWorkflowError):
                    return prompt_and_seed(check_workflow(json.loads(text)))
        place += size + 12
    return "", ""


def prompt_and_seed(workflow: Workflow) -> tuple[str, str]:
    """The texts that stand in a workflow, but for negative ones, and its seeds."""
    inputs = {node_id: node.get("inputs", {}) for node_id, node in workflow.items()}
    links = [each["negative"] for each in inputs.values() if isinstance(each.get("negative"), list)]
    negative = {str(link[0]) for link in links if link}
    texts = [each.get("text") for node_id, each in inputs.items() if node_id not in negative]
    seeds = [each.get(name) for each in inputs.values() for name in ("seed", "noise_seed")]
    prompt = "\n".join(text.strip() for text in texts if isinstance(text, str) and text.strip())
    return prompt, ", ".join(str(seed) for seed in seeds if type(seed) is int)


def moment(text: str) -> float:
    """An ISO 8601 time as seconds since 1970."""
    return datetime.fromisoformat(text).timestamp()


def plain(value: object) -> str:
    """Anything as text in HTML: it may come from a prompt, a node or a message, so from anybody."""
    from html import escape

    text = re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufffe\uffff]", "", str(value))
    return escape(text.encode("utf-8", "replace").decode())


def duration(seconds: float) -> str:
    """`3.2 s`, `4 min 5 s`, `2 h 3 min`."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def round_time(seconds: float) -> str:
    """`75 s`, `2 min`, `1.5 h` for a round number of seconds."""
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= size and seconds * 2 % size == 0:
            return f"{seconds / size:g} {unit}"
    return f"{seconds:g} s"


def usd(amount: float) -> str:
    """`$1.21`, `$0.0404`."""
    return f"${amount:,.2f}" if amount >= 1 else f"${amount:.4f}"


def percentile(values: Iterable[float], share: float) -> float:
    """The value that this share of the values does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


class Span(NamedTuple):
    """The stretch of time that a page shows."""

    begin: float
    end: float

    def at(self, seconds: float) -> float:
        """Where a moment is, in percent."""
        return 100 * (min(max(seconds, self.begin), self.end) - self.begin) / (self.end - self.begin)

    def ticks(self) -> Iterator[float]:
        """At most seven round numbers of seconds since the beginning."""
        long = self.end - self.begin
        steps = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 43200)
        step = next((step for step in steps if step * 6.5 >= long), math.ceil(long / 6 / 86400) * 86400)
        return (float(step * number) for number in range(int(long / step) + 1))

    def area(self, changes: Sequence[tuple[float, int]], highest: int, kind: str) -> str:
        """An SVG path of a number that changes in steps, in a box of 100 by 100."""
        path, level = "M0,100", 0
        for when, change in sorted(changes):
            level += change
            path += f"H{self.at(when):.2f}V{100 - 100 * level / max(1, highest):.2f}"
        return f'<path class="{kind}" d="{path}H100V100Z" />'


def peak(changes: Iterable[tuple[float, int]]) -> int:
    """The highest number that such changes lead to."""
    return max(itertools.accumulate((change for _, change in sorted(changes)), initial=0))


REPORT_PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8" />
<meta name="viewport" content="width=device-width, initial-scale=1" />
<meta name="color-scheme" content="light dark" />
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src 'self' data: file:; style-src 'unsafe-inline'" />
<title>$title</title>
<link rel="icon" href="data:," />
<style>
:root {
  --paper: #faf9f6; --card: #fff; --ink: #1c1e21; --quiet: #5c6166; --line: #e4e1da;
  --busy: #2f7a68; --booting: #d9a03f; --idle: #dedad1; --waiting: #5b7fb8; --failed: #b8382f;
  --name: 12rem;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #131518; --card: #1b1e22; --ink: #e9e7e2; --quiet: #a2a7ad; --line: #2b2f35;
    --busy: #4fae95; --booting: #c98f35; --idle: #343941; --waiting: #7d9fd6; --failed: #f0776b;
  }
}
* { box-sizing: border-box; margin: 0; }
html { scroll-behavior: smooth; }
@media (prefers-reduced-motion: reduce) { html { scroll-behavior: auto; } }
body { background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; font-variant-numeric: tabular-nums; }
main { max-width: 76rem; margin: 0 auto; padding: 3.5rem 2rem 5rem; overflow-x: clip; }
a { color: inherit; }
code { font: .8125em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
small { font-size: .8125rem; color: var(--quiet); font-weight: 400; }
h1 { font-size: 2.25rem; line-height: 1.2; font-weight: 650; letter-spacing: -.02em; text-wrap: balance; overflow-wrap: anywhere; }
h2 { font-size: 1.125rem; font-weight: 650; margin: 3.5rem 0 1rem; }
header p { color: var(--quiet); margin-top: .5rem; }
.figures { display: grid; grid-template-columns: repeat(6, auto); margin-top: 2.5rem; border-block: 1px solid var(--line); }
.figures div { padding: 1.125rem 1rem 1.125rem 0; }
.figures dt, .figures dd:last-child { font-size: .8125rem; color: var(--quiet); }
.figures dd:nth-child(2) { font-size: 1.625rem; line-height: 1.35; font-weight: 600; letter-spacing: -.015em; }
.figures dd small { font-size: 1rem; letter-spacing: 0; }
.legend { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; font-size: .8125rem; color: var(--quiet); margin-bottom: 1rem; }
.legend span::before { content: ""; display: inline-block; width: .75rem; height: .75rem; border-radius: 3px; margin-right: .45rem; vertical-align: -1px; background: var(--swatch); }
.chart { position: relative; padding-bottom: 1.75rem; }
.ticks { position: absolute; inset: 0 0 0 var(--name); }
.tick { position: absolute; inset-block: 0 1.5rem; border-left: 1px solid var(--line); }
.tick i { position: absolute; top: 100%; transform: translateX(-50%); font: .75rem/1.5rem system-ui, sans-serif; color: var(--quiet); white-space: nowrap; }
.tick:first-child i { transform: none; }
.row { display: grid; grid-template-columns: var(--name) 1fr; align-items: center; min-height: 2rem; }
.row .name { display: flex; justify-content: space-between; align-items: baseline; gap: .5rem; padding-right: 1rem; white-space: nowrap; font-size: .875rem; }
.row .plot { position: relative; height: 1.25rem; }
.row.tall { margin-bottom: 1rem; }
.row.tall .name { flex-direction: column; gap: 0; }
.row.tall .plot { height: 5rem; }
svg { display: block; width: 100%; height: 100%; }
path.waiting { fill: var(--waiting); } path.busy { fill: var(--busy); } path.booting { fill: var(--booting); } path.idle { fill: var(--idle); }
.life, .bar { position: absolute; inset-block: 0; border-radius: 3px; }
.life.idle { background: var(--idle); }
.life.booting { background: var(--booting); border-radius: 3px 0 0 3px; }
.bar { min-width: 3px; background: var(--busy); box-shadow: inset -1px 0 var(--paper), inset 1px 0 var(--paper); }
.bar.failed { background: repeating-linear-gradient(-45deg, var(--failed) 0 5px, var(--paper) 5px 7px); }
.bar:hover, .bar:focus-visible { filter: brightness(1.15); outline: 2px solid var(--ink); outline-offset: 1px; z-index: 2; }
.bar span { display: none; position: absolute; top: calc(100% + 8px); left: 0; width: max-content; max-width: 14rem; padding: .5rem .75rem; border-radius: 6px; background: var(--ink); color: var(--paper); font-size: .75rem; line-height: 1.45; pointer-events: none; }
.bar.east span { left: auto; right: 0; }
.bar:hover span, .bar:focus-visible span { display: block; }
.bar code { display: block; overflow-wrap: anywhere; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(16rem, 1fr)); gap: 1.25rem; }
article { position: relative; background: var(--card); border: 1px solid var(--line); border-radius: 10px; overflow: hidden; padding-bottom: .875rem; scroll-margin: 1rem; }
article:target { grid-column: span 2; outline: 2px solid var(--busy); outline-offset: 2px; }
.pictures { display: grid; gap: 2px; background: var(--line); }
.pictures.p2 { grid-template-columns: 1fr 1fr; }
.pictures a { display: block; aspect-ratio: 1; }
img { display: block; width: 100%; height: 100%; object-fit: cover; }
article h3 { position: absolute; top: .625rem; left: .625rem; min-width: 1.75rem; padding: 0 .5rem; border-radius: 99px; background: var(--card); font-size: .8125rem; line-height: 1.75rem; font-weight: 600; text-align: center; }
article > p { margin: .75rem 1rem 0; font-size: .9375rem; line-height: 1.45; white-space: pre-line; display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 3; overflow: hidden; overflow-wrap: anywhere; }
article:target > p { -webkit-line-clamp: none; }
article .times { font-size: .875rem; font-weight: 600; }
article dl { display: grid; grid-template-columns: auto 1fr; gap: 0 .625rem; margin: .375rem 1rem 0; font-size: .75rem; }
article dl div { display: contents; }
article dl { color: var(--quiet); }
article dd { overflow-wrap: anywhere; }
article dl code { font-size: .6875rem; }
.error, .none { grid-column: 1 / -1; display: grid; align-content: center; min-height: 8rem; padding: 3rem 1rem 1rem; background: var(--card); font-size: .9375rem; overflow-wrap: anywhere; }
.error b, .error { color: var(--failed); }
.none { color: var(--quiet); }
footer { margin-top: 3.5rem; padding-top: 1.25rem; border-top: 1px solid var(--line); font-size: .8125rem; color: var(--quiet); }
@media (max-width: 64rem) { .figures { grid-template-columns: repeat(3, 1fr); } }
@media (max-width: 40rem) {
  :root { --name: 4.25rem; }
  main { padding: 2rem 1.25rem 3rem; }
  h1 { font-size: 1.75rem; }
  .figures { grid-template-columns: 1fr 1fr; }
  .figures dd:nth-child(2) { font-size: 1.375rem; }
  .figures dd:last-child { font-size: .75rem; white-space: nowrap; }
  .row .name { font-size: .75rem; padding-right: .5rem; white-space: normal; line-height: 1.25; }
  .row:not(.tall) small { display: none; }
  .name code span { display: none; }
  .gallery { grid-template-columns: 1fr 1fr; gap: .75rem; }
  article:not(:target) dl { display: none; }
  article > p { margin-inline: .75rem; font-size: .8125rem; }
  article .times { font-size: .75rem; }
}
</style>
</head>
<body>
<main>
<header><h1>$title</h1><p>$about</p></header>
<dl class="figures">
$figures</dl>
<section aria-labelledby="timeline">
<h2 id="timeline">Timeline</h2>
<p class="legend"><span style="--swatch:var(--waiting)">waiting</span><span style="--swatch:var(--booting)">booting</span><span style="--swatch:var(--busy)">a job that ran</span><span style="--swatch:var(--failed)">failed</span><span style="--swatch:var(--idle)">idle</span></p>
<div class="chart">
$chart
</div>
</section>
<section aria-labelledby="jobs">
<h2 id="jobs">Jobs</h2>
<div class="gallery">
$cards
</div>
</section>
<footer>
$notes
</footer>
</main>
</body>
</html>
"""


if __name__ == "__main__":
    # boto3 and AWS's descriptions are many objects and no garbage: looking for some takes a tenth of the time.
    gc.set_threshold(100_000)
    sys.exit(main())
