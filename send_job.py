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

import gc
import json
import math
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
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
    explain_node_errors,
    is_job_id,
    large_workflow_key,
    load_settings,
    new_job_id,
    outputs_of,
    own_outputs,
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
        with meaning(f"workflow {number}"):
            bodies.append({"prompt": check_workflow(workflow)})
    if not bodies:
        return []
    sender = Sender(load_settings(env))
    fleet = FleetCheck(sender.settings) if check else None
    for number, body in enumerate(bodies, 1):
        with meaning(f"workflow {number}"):
            warn_of(fleet.check(body["prompt"]) if fleet else ())
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

    @classmethod
    def of(cls, node_id: str, node: dict[str, Any], text: str, remedy: str, certain: bool = True) -> Problem:
        """A problem with a node, under the title that it has in the workflow."""
        meta = node.get("_meta")
        title = meta.get("title") if isinstance(meta, dict) else None
        return cls(node_id, title or node["class_type"], text, remedy, certain)

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


@contextmanager
def meaning(what: str) -> Iterator[None]:
    """Have an InvalidMessageError say what of the many is meant."""
    try:
        yield
    except WorkflowProblemsError as error:
        raise WorkflowProblemsError(what, error.problems) from None
    except InvalidMessageError as error:
        raise type(error)(f"{what}: {error}") from None


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
    try:
        return run(options, Teller(as_json=options.json))
    except (InvalidMessageError, SettingsError) as error:
        complain(str(error))
        return 2
    except (ComfyGoneError, JobTimeoutError) as error:
        complain(str(error))
        return 1
    except OSError as error:
        if error.filename is None:  # such as a broken pipe
            raise
        complain(f"cannot read {error.filename}: {error.strerror}")
        return 2


def run(options: argparse.Namespace, teller: Teller) -> int:
    """Do what the command line asks for; returns the exit code."""
    uploads: dict[str, Path] = {}
    bodies = [] if options.status or options.input else make_bodies(options, uploads)
    if options.direct:
        return run_direct(options.direct, [body["prompt"] for body in bodies], options.save or Path("output"))
    sender = Sender(load_settings(options.env))
    if options.input:
        return run_upload(sender.settings, {input_name(path): path for path in options.input}, teller)
    if options.status and not options.wait:
        return run_status(sender, options.status, teller, options.save)
    if options.status:
        return run_wait(sender, options.status, options.timeout, teller, options.save)
    if options.check:
        return run_check(FleetCheck(sender.settings, uploads), bodies[0]["prompt"], teller)
    if "prompt" in bodies[0] and not options.no_check:  # they differ in their seeds only
        try:
            for problem in FleetCheck(sender.settings, uploads).check(bodies[0]["prompt"]):
                complain(str(problem))
        except WorkflowProblemsError as error:
            complain(f"this workflow cannot run on {sender.settings.env}, and was not sent:")
            print(*error.problems, sep="\n", file=sys.stderr)
            return 2
    if uploads and run_upload(sender.settings, uploads, teller):
        return 1
    job_ids, code = run_send(sender, bodies, options.callback_url, teller)
    if options.wait and job_ids:
        return run_wait(sender, job_ids, options.timeout, teller, options.save) or code
    return code


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked for what belongs together."""
    parser = make_parser()
    for argument in sys.argv[1:] if arguments is None else arguments:
        if moved := MOVED.get(argument.partition("=")[0]):
            parser.error(f"{argument} is now: ./fleet.py {moved}")
    options = parser.parse_args(arguments)
    command, direct, timeout = options.exec_cmd, options.direct, options.timeout
    only = next((f"--{name}" for name in ("status", "input", "check") if getattr(options, name)), None)
    others = [name for name in ("status", "input", "check") if getattr(options, name)][1:]
    files = [assignment for assignment in options.assignments if re.match("[^=]*=@(?!@)", assignment)]
    gone = [str(path) for path in options.input or [] if not path.is_file()]
    no_ids = [job_id for job_id in options.status or [] if not is_job_id(job_id)]
    for refused, sentence in (
        (not 1 <= options.count <= 100_000, f"--count {options.count}: send between 1 and 100000 jobs"),
        (command is not None and (options.workflow or options.assignments or direct),
         "--exec-cmd sends a command: leave out WORKFLOW.json, --set and --direct"),
        (command is not None and not command.strip(), "--exec-cmd is empty: name a shell command"),
        (direct and (options.wait or options.json), "--direct waits by itself and prints text: leave out --wait and --json"),
        (only and (others or direct or command is not None),
         f"{only} sends nothing: leave out --direct and --exec-cmd, and others of its kind"),
        (only and only != "--check" and (options.workflow or options.assignments),
         f"{only} sends nothing: leave out WORKFLOW.json and --set"),
        (only and only != "--status" and options.wait, f"{only} sends nothing to wait for: leave out --wait"),
        (direct and files, "--direct uploads nothing: name a file in ComfyUI's input folder instead of @FILE"),
        (gone, f"--input {' '.join(gone[:1])}: there is no such file"),
        (no_ids, f"--status {' '.join(no_ids[:1]):.60}: job ids are lowercase UUIDs, as printed when a job is sent"),
        (options.save and not (options.wait or options.status or direct), "--save needs results: add --wait"),
        (timeout is not None and not options.wait, "--timeout bounds --wait: add it, or leave out --timeout"),
        (timeout is not None and not 0 < timeout < math.inf,
         f"--timeout {timeout or 0:g}: wait for more than 0 seconds, or leave it out to wait on"),
    ):  # fmt: skip
        if refused:
            parser.error(sentence)
    return options


def make_parser() -> argparse.ArgumentParser:
    """What may stand on the command line."""
    import argparse

    parser = argparse.ArgumentParser(
        prog="send_job.py",
        description="Send jobs to the fleet: a workflow saved with Save (API Format), or a shell command.",
        epilog="example: ./send_job.py my_workflow.json --set 6.text='a red fox' --count 4 --env pro",
    )
    add = parser.add_argument
    add("workflow", nargs="?", type=Path, metavar="WORKFLOW.json", help="default: the demo workflow")
    add("--set", dest="assignments", action="append", default=[], metavar="NODE.INPUT=VALUE",
        help="change an input, such as 6.text='a red fox' or 10.image=@photo.png, which uploads the file; may be "
        "repeated")  # fmt: skip
    add("--count", type=int, default=1, metavar="N", help="send N jobs, each with a fresh seed")
    add("--env", metavar="NAME", help="the environment, instead of ENV in the settings")
    add("--input", nargs="+", type=Path, metavar="FILE",
        help="send nothing, but upload files to the bucket's input/ and tell their names there")  # fmt: skip
    add("--check", action="store_true",
        help="send nothing, but say what the fleet's ComfyUI would refuse; exits with 1 then")  # fmt: skip
    add("--no-check", action="store_true", help="send without that check")
    add("--exec-cmd", metavar="CMD", help="send a shell command instead of a workflow")
    add("--callback-url", metavar="URL", help="POST the result there")
    add("--wait", action="store_true", help="wait for the results and tell of each; exits with 1 when a job failed")
    add("--timeout", type=float, metavar="SECONDS",
        help="with --wait: stop waiting then and exit with 3; without it a job that ended in the dead-letter queue, "
        "which gets no result, is waited for without end")  # fmt: skip
    add("--direct", metavar="HOST:PORT", help="run on this ComfyUI instead, without AWS, and save the files")
    add("--status", nargs="+", metavar="JOB_ID",
        help="send nothing, but tell how these jobs stand; with --wait stay until they have ended; exits with 3 when "
        "one has not ended")  # fmt: skip
    add("--save", type=Path, metavar="DIR",
        help="with --wait, --status and --direct: save the files in DIR/JOB_ID/ (--direct: output)")  # fmt: skip
    add("--json", action="store_true", help="print an object a line, for programs")
    return parser


MOVED = {"--fleet": "status", "--dead": "dead", "--redrive": "redrive", "--purge-dead": "purge", "--report": "report"}
"""What this program once did besides, and the command of fleet.py that does it."""


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
        complain(f"{len(job_ids)} of {len(bodies)} jobs sent to {sender.settings.sqs_name}: {reason}")
    if job_ids:
        sender.raise_capacity(len(job_ids), say=teller.line)
    return job_ids, 0 if len(job_ids) == len(bodies) else 1


def run_wait(
    sender: Sender, job_ids: Sequence[str], timeout_s: float | None, teller: Teller, save: Path | None
) -> int:
    """Tell of each job's end until all have ended, and save their files; returns the exit code."""
    s3, bucket = aws_client("s3", sender.settings.region), sender.settings.s3_bucket
    waiting = Waiting(sender, s3, job_ids, teller)
    unsaved = 0

    def give_up(reason: str) -> None:
        teller.change("")
        left = list(waiting.unfinished)
        goes, which = ("goes", left[0]) if len(left) == 1 else ("go", "JOB_ID …")
        complain(
            f"{reason}: {len(left)} of {count(waiting.total, 'job')} had no result yet and {goes} on; "
            f"come back with: ./send_job.py --env {sender.settings.env} --wait --status {which}"
        )

    try:
        for result in wait_for(s3, bucket, job_ids, timeout_s=timeout_s, after_round=waiting.show, say=teller.line):
            waiting.take(result)
            unsaved += save is not None and not save_files(result, save, teller, s3, bucket)
        waiting.say_how_far()
    except KeyboardInterrupt:
        give_up("interrupted")
        return 130
    except WaitTimeoutError:
        give_up(f"not done after {timeout_s:g} s")
        return 3
    except Exception as error:
        denied = error_code(error) == "AccessDenied"
        remedy = f" (s3:GetObject and s3:ListBucket on {bucket} are needed)" if denied else ""
        give_up(f"results cannot be read: {one_line(error)}{remedy}")
        return 1
    return 1 if waiting.failed or unsaved else 0


def run_status(sender: Sender, job_ids: Sequence[str], teller: Teller, save: Path | None) -> int:
    """Tell how jobs stand, and save the files of those that ended; returns 0, 1 when one failed, 3 when one goes on."""
    s3, bucket = aws_client("s3", sender.settings.region), sender.settings.s3_bucket
    codes = {0}
    try:
        for job_id in job_ids:
            result = read_result(s3, bucket, job_id)
            progress = None if result else read_progress(s3, bucket, job_id)
            if result:
                saved = save is None or save_files(result, save, teller, s3, bucket)
                codes.add(0 if result["status"] == "succeeded" and saved else 1)
                teller.event("result", tell_result(result), result=result)
            elif progress:
                codes.add(3)
                text = f"Job {job_id} is running: {tell_progress(progress)}, at {progress['updated_at']}"
                teller.event("progress", text, progress=progress)
            else:
                codes.add(3)
                text = f"Job {job_id} has neither result nor progress: it waits, has just begun, or never was"
                teller.event("info", text, job_id=job_id, text=text)
    except Exception as error:
        complain(f"results cannot be read: {one_line(error)}")
        return 1
    return 1 if 1 in codes else max(codes)


def save_files(result: JobResult, folder: Path, teller: Teller, s3: Any, bucket: str) -> bool:
    """Download a job's files and tell of each; a failure is told, too, and returns False."""
    try:
        for path in download_files(s3, bucket, result, folder):
            teller.event("saved", f"Saved {path}", job_id=result["job_id"], path=str(path))
    except Exception as error:
        teller.change("")
        complain(f"the files of job {result['job_id']} are not saved: {one_line(error)}")
        return False
    return True


def run_check(fleet: FleetCheck, workflow: Workflow, teller: Teller) -> int:
    """Say what is wrong with a workflow; returns 1 when the fleet's ComfyUI would refuse it."""
    env = fleet.env
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
            complain(f"{path} cannot be uploaded to {settings.s3_bucket}: {one_line(error)}")
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
            for warning in explain_node_errors(finished.node_errors):
                print(f"Dropped: {warning}", file=sys.stderr)
            for file in outputs_of(finished.entry)[0]:
                # Below the job's folder whatever the server says.
                parts = [
                    each for each in Path(file.subfolder, file.filename).parts if each not in (job_id, "..", "/")
                ]
                target = folder.joinpath(job_id, *parts)
                comfy.download(file, target)
                print(f"Saved {target}")
        except WorkflowRefusedError as refused:
            error = refused.error
        if error:
            failed += 1
            complain(f"job {job_id} failed: {error['message']}")
    return 1 if failed else 0


def complain(text: str) -> None:
    """Say what went wrong."""
    print(f"send_job.py: {text}", file=sys.stderr)


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


def message_of(body: dict[str, Any], job_id: str | None, callback_url: str | None) -> Message:
    """A job as a message. Raises InvalidMessageError."""
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
        message = message_of(body, job_id, callback_url)
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
            with meaning(f"job {number}"):
                messages.append(message_of(body, job_ids[number - 1] if job_ids else None, callback_url))
        ids = [message.job_id for message in messages]
        if len(set(ids)) < len(ids):
            twice = next(job_id for number, job_id in enumerate(ids) if job_id in ids[:number])
            raise InvalidMessageError(f"job_id {twice} is there twice: an id is run once, give each job its own")
        self._queue()
        with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
            refused = dict(
                item for refusals in pool.map(self.send_batch, batches(messages)) for item in refusals.items()
            )
        if refused:
            unsent = [job_id for job_id in ids if job_id in refused]
            raise NotAllSentError([job_id for job_id in ids if job_id not in refused], unsent, refused[unsent[0]])
        return ids

    def _upload(self, message: Message) -> None:
        """Store a workflow that is too large for its message, where the message says."""
        if message.by_bucket is not None:
            aws_client("s3", self.settings.region).put_object(
                Bucket=self.settings.s3_bucket,
                Key=large_workflow_key(message.job_id),
                Body=json.dumps(message.by_bucket, ensure_ascii=False).encode(),
            )

    def send_batch(self, batch: list[Message]) -> dict[str, str]:
        """Send what goes into one request; returns why, by job id, for those that are not known to be sent."""
        unsent = {message.job_id: message for message in batch}
        refused: dict[str, str] = {}
        reasons: dict[str, str] = {}
        try:
            for message in batch:
                self._upload(message)
            for attempt in range(BATCH_TRIES):
                if attempt:
                    import random

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


def read_result(s3: Any, bucket: str, job_id: str) -> JobResult | None:
    """The job's result.json, None while it has none. Raises what boto3 raises."""
    stored: JobResult | None = read_json(s3, bucket, result_key(job_id))
    return stored


def read_progress(s3: Any, bucket: str, job_id: str) -> JobProgress | None:
    """The job's progress.json, None while it has none or where S3 does not give it just now."""
    try:
        stored: JobProgress | None = read_json(s3, bucket, f"output/{job_id}/progress.json")
    except Exception as error:
        if not will_pass(error):
            raise
        return None
    return stored


def read_json(s3: Any, bucket: str, key: str) -> Any:
    """A JSON object in the bucket, None where there is none. Raises what boto3 raises, and ValueError."""
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


# --- What is shown of waiting ----------------------------------------------------------------------------

FLEET_LOOK_S = 15.0
"""Between two looks at queue and group."""


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
            import shutil

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
        if not (self._progress and self._first):
            return ""
        progress, (first, since) = self._progress, self._first
        if "usual_run_s" in progress and "started_at" in progress:
            ran_s = (datetime.now(UTC) - datetime.fromisoformat(progress["started_at"])).total_seconds()
            if ran_s < progress["usual_run_s"]:
                return f", about {progress['usual_run_s'] - ran_s:.0f} s left"
        steps = progress.get("value", 0) - first.get("value", 0)
        if steps <= 0:
            return ""
        left = progress.get("max", 0) - progress.get("value", 0)
        return f", about {(time.monotonic() - since) / steps * left:.0f} s left in this node"

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

NODES_AGE_S = 60.0
"""So long it is believed without asking S3 whether it has changed."""

_nodes_read: dict[str, tuple[float, str, dict[str, Any] | None]] = {}  # bucket -> when, ETag, what was in it


class FleetCheck:
    """Checks workflows against what is installed on one environment's fleet; `coming` inputs will be uploaded."""

    def __init__(self, settings: Settings, coming: Collection[str] = ()) -> None:
        self.env, self.bucket, self.region = settings.env, settings.s3_bucket, settings.region
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
    names = {node_id: node["class_type"] for node_id, node in workflow.items()}
    unknown = [
        Problem.of(
            node_id, workflow[node_id], f"there is no node {name}",
            f"{_closest(name, nodes)}install it on the base machine and run create_env.sh again",
        )
        for node_id, name in names.items()
        if name not in nodes
    ]  # fmt: skip
    if unknown:  # wherever it stands
        return unknown
    outputs = [node_id for node_id, name in names.items() if nodes[name].get("output_node")]
    if not outputs:
        return [Problem(None, None, "it has no output node", "add one that saves something, such as SaveImage")]
    branches = [_upstream(output, workflow, nodes) for output in outputs]
    found = {
        node_id: [
            Problem.of(node_id, workflow[node_id], *trouble)
            for trouble in _troubles_of(workflow[node_id], workflow, nodes, may_have)
        ]
        for branch in branches
        for node_id in branch
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


MISSING = object()
Trouble = tuple[str, str, bool]
"""What is wrong with an input of a node, what helps, and whether that is certain."""


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


def _troubles_of(
    node: dict[str, Any], workflow: Workflow, nodes: dict[str, Any], may_have: Callable[[str], bool]
) -> Iterator[Trouble]:
    ours = _validates_alike(nodes[node["class_type"]])
    for name, kind, options, value in _inputs_of(node, nodes):
        if str(kind).startswith("COMFY_"):  # its inputs depend on others
            continue
        if value is MISSING:
            yield f"{name} is missing", "connect it or give it a value", True
        elif isinstance(value, list):
            yield from _troubles_of_link(name, kind, value, workflow, nodes, ours=ours)
        else:
            plain = value["__value__"] if isinstance(value, dict) and "__value__" in value else value
            yield from _troubles_of_value(name, kind, options, plain, may_have, ours=ours)


def _troubles_of_link(
    name: str, kind: Any, link: list[Any], workflow: Workflow, nodes: dict[str, Any], *, ours: bool
) -> Iterator[Trouble]:
    if len(link) != 2:
        yield f"{name} is no link", 'write ["node id", number of its output]', True
        return
    source, slot = link
    if not isinstance(source, str) or source not in workflow:
        have = ", ".join(list(workflow)[:20])
        yield f"{name} links to node {source}, which is not there", f"the nodes are {have}", True
        return
    info = nodes[workflow[source]["class_type"]]
    made, alike = info.get("output") or [], _validates_alike(info)
    if not isinstance(slot, int) or not -len(made) <= slot < len(made):
        have = count(len(made), "output")
        yield f"{name} links to output {slot} of node {source}, which has {have}", "count its outputs from 0", alike
        return
    types = [set(re.split(r"\s*,\s*", one)) if isinstance(one, str) else set() for one in (made[slot], kind)]
    doubt = "*" in types[0] | types[1] or not all(types) or any(one.startswith("COMFY_") for one in types[0])
    if not doubt and not types[0] & types[1]:
        text = f"{name} is {kind}, but output {slot} of node {source} is {made[slot]}"
        yield text, f"link it to an output that is {kind}", alike and ours


def _troubles_of_value(
    name: str, kind: Any, options: dict[str, Any], value: Any, may_have: Callable[[str], bool], *, ours: bool
) -> Iterator[Trouble]:
    number = value
    if kind in ("INT", "FLOAT"):
        try:
            number = int(value) if kind == "INT" else float(value)
        except (TypeError, ValueError, OverflowError):
            yield f"{name} is {value!r:.80}", f"give {'a whole number' if kind == 'INT' else 'a number'}", True
            return
    if isinstance(number, int | float) and kind not in ("STRING", "BOOLEAN"):
        low, high = options.get("min", -math.inf), options.get("max", math.inf)
        is_range = isinstance(low, int | float) and isinstance(high, int | float)
        if is_range and (number < low or number > high):
            yield f"{name} is {number}", f"give a number from {low} to {high}", ours
            return
    allowed = kind if isinstance(kind, list) else options.get("options") if kind == "COMBO" else None
    if not isinstance(allowed, list) or value in allowed:
        return
    certain = ours and kind != "COMBO"  # which older servers do not look at
    if not (isinstance(value, str) and re.search(r"\.\w{2,12}(?: \[\w+\])?$", value)):
        have = ", ".join(map(str, allowed[:20])) or "nothing"
        yield f"{name} is {value!r:.80}", f"{_closest(value, allowed)}it may be {have}", certain
    elif not may_have(value):
        where = "models/, in the folder of its kind"
        if value.endswith((".latent", "]")) or any(option.endswith("_upload") for option in options):
            # ComfyUI looks for such a file itself, and lists only those that lie in input/ and are of a kind.
            where, certain = "input/", certain and not re.search(r"[/\\\]]", value) and _is_media(value)
        yield (
            f"{name} {value!r:.200} is not installed",
            f"{_closest(value, allowed)}put it into the bucket's {where}",
            certain,
        )


def _is_media(file: str) -> bool:
    from mimetypes import guess_type

    return str(guess_type(file)[0]).startswith(("image/", "video/", "audio/"))


def _validates_alike(info: dict[str, Any]) -> bool:
    """Whether a node is one of ComfyUI's own, of which we know that it validates values no other way than by its inputs."""
    return not str(info.get("python_module", "")).startswith(("custom_nodes", "comfy_api_nodes"))


def _closest(name: object, names: Iterable[object]) -> str:
    from difflib import get_close_matches

    found = get_close_matches(str(name), list(map(str, names)))
    return f"the closest {'is' if len(found) == 1 else 'are'} {', '.join(found)}, or " if found else ""


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
        with meaning(str(path)):
            return check_workflow(json.loads(path.read_text(encoding="utf-8")))
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
    if not (isinstance(inputs[name], str) and value.startswith("@")):
        inputs[name] = _like(inputs[name], value, target)
    elif value.startswith("@@"):
        inputs[name] = value[1:]
    else:
        try:
            inputs[name] = input_name(Path(value[1:]))
        except OSError as error:
            raise InvalidWorkflowError(
                f"--set {assignment}: cannot read it: {error.strerror}; write @@ where the text begins with an @"
            ) from None
        uploads[inputs[name]] = Path(value[1:])
    return node_id, name


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
    import copy
    import random

    fresh = copy.deepcopy(workflow)
    for node_id, node in fresh.items():
        for name, value in node.get("inputs", {}).items():
            is_seed = name in {"seed", "noise_seed"} and isinstance(value, int) and not isinstance(value, bool)
            if is_seed and (node_id, name) not in keep:
                node["inputs"][name] = random.getrandbits(50)  # exact in JavaScript too, which reads these files
    return fresh


if __name__ == "__main__":
    # boto3 and AWS's descriptions are many objects and no garbage: looking for some takes a tenth of the time.
    gc.set_threshold(100_000)
    sys.exit(main())
