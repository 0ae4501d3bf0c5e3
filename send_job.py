#!/usr/bin/env python3
"""Submits jobs and fetches their results: from business code by `import send_job`, or from the command line
(`send_job.py --help`).

    job_id = send_job.submit(workflow)
    result = send_job.wait(job_id, timeout=3600)
    paths = send_job.download(result, "pictures")

    for result in send_job.as_completed(job_ids):
        ...

These calls block; for asyncio there are `await wait_async(job_id)` and `async for … in as_completed_async(job_ids)`. Works when copied elsewhere
with only comfy_utils.py and `env` (and the demo workflow) beside it; the process environment may stand for `env`.
"""

from __future__ import annotations

import gc
import json
import math
import re
import sys
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from comfy_utils import (
    ADDRESS,
    ENDED,
    HERE,
    MAX_MESSAGE_BYTES,
    OBJECT_INFO_KEY,
    Capacity,
    InvalidMessageError,
    InvalidWorkflowError,
    QueueDepth,
    Settings,
    SettingsError,
    Workflow,
    aws_client,
    cancel_key,
    check_extra_data,
    check_inputs,
    check_workflow,
    count,
    ended_key,
    error_code,
    is_job_id,
    is_node,
    large_workflow_key,
    load_json,
    load_settings,
    new_job_id,
    one_line,
    parse_ended_key,
    printable,
    progress_key,
    queue_depth,
    raise_capacity,
    result_key,
    say,
)

# Business code finds these here, too.
from comfy_utils import JobError as JobError  # noqa: PLC0414
from comfy_utils import JobOutput as JobOutput  # noqa: PLC0414
from comfy_utils import JobProgress as JobProgress  # noqa: PLC0414
from comfy_utils import JobResult as JobResult  # noqa: PLC0414
from comfy_utils import JobTimings as JobTimings  # noqa: PLC0414
from comfy_utils import Problem as Problem  # noqa: PLC0414
from comfy_utils import WorkflowProblemsError as WorkflowProblemsError  # noqa: PLC0414

if TYPE_CHECKING:
    import argparse

    from sender.check import FleetCheck
    from sender.outlook import Outlook

DEMO_WORKFLOW = HERE / "simple_workflow.json"


# --- For business code -----------------------------------------------------------------------------------


def submit(
    workflow: Workflow,
    *,
    inputs: Mapping[str, str] | None = None,
    extra_data: Mapping[str, Any] | None = None,
    job_id: str | None = None,
    callback_url: str | None = None,
    check: bool = True,
    env: str | None = None,
) -> str:
    """Send one API-format workflow to the fleet, raise its capacity, and return the job id.

    The result will stand in s3://<bucket>/output/<job_id>/result.json. `inputs` says from which http(s) or s3
    address the worker is to fetch files that the workflow names, such as {"photo.png": "https://..."}. `extra_data` is
    what ComfyUI's POST /prompt takes under that name; its texts, but for those in `extra_pnginfo`, which pictures carry,
    are secrets that neither logs nor results show. `env` names another environment than the settings do;
    `callback_url` is POSTed the result. The workflow is checked against the nodes and models of the fleet, where they
    are known, unless `check` is False: WorkflowProblemsError names all that ComfyUI would refuse, and what it may
    refuse, or drop, becomes a Python warning. Raises InvalidWorkflowError, InvalidMessageError, SettingsError, and what
    boto3 raises when the message could not be sent. A capacity that could not be raised is no error: the job is on the queue, and the fleet's other nets start
    an instance.
    """
    sender = Sender(load_settings(env))
    body: dict[str, Any] = {"prompt": check_workflow(workflow)}
    if inputs:
        body["inputs"] = check_inputs(dict(inputs))
    body |= extra_of(extra_data)
    if check and (fleet := fleet_check(sender.settings, inputs or (), warn_in_python)):
        warn_of(fleet.check(workflow))
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
    extra_data: Mapping[str, Any] | None = None,
    job_ids: Sequence[str] | None = None,
    callback_url: str | None = None,
    check: bool = True,
    env: str | None = None,
) -> list[str]:
    """Send many workflows, as `submit` sends one, and return their ids in the same order.

    They travel ten to a request and several requests at once, and the capacity is raised once for all. All
    are checked before the first is sent: InvalidWorkflowError and InvalidMessageError say which is meant, counting
    from 1. Raises NotAllSentError, which names them, when some could not be sent. With `job_ids` of yours, one for
    each workflow, it is harmless to send the same jobs again: an id is run once. All get the same `extra_data`.
    """
    bodies: list[dict[str, Any]] = []
    extra = extra_of(extra_data)
    for number, workflow in enumerate(workflows, 1):
        with meaning(f"workflow {number}"):
            bodies.append({"prompt": check_workflow(workflow)} | extra)
    if not bodies:
        return []
    sender = Sender(load_settings(env))
    fleet = fleet_check(sender.settings, (), warn_in_python) if check else None
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
    when it failed, WaitTimeoutError (a TimeoutError) after `timeout` seconds, JobLostError when nobody can write a
    result any more, by what is seen of the queue, and what boto3 raises when results cannot be read; what passes,
    such as a broken line, is waited through. The job itself goes on in any case. One look for a result is one S3
    request, every half a second at first and every five seconds later; one for the queue comes every half a minute.
    """
    s3, bucket = _bucket(job_id, env)
    lost = LostWatch(Sender(load_settings(env)))
    last: JobProgress | None = None

    def look_for_progress() -> None:
        nonlocal last
        progress = read_progress(s3, bucket, job_id) if on_progress else None
        if on_progress and progress and progress != last:
            last = progress
            on_progress(progress)

    (ended,) = wait_for(s3, bucket, [job_id], timeout_s=timeout, after_round=look_for_progress, why_lost=lost.look)
    if ended["error"]:
        raise JobFailed(ended, ended["error"])
    return ended


def as_completed(
    job_ids: Iterable[str], *, timeout: float | None = None, env: str | None = None
) -> Iterator[JobResult]:
    """Yield the result of each of these jobs once it has ended, failed ones, too, in the order in which they are found.

    However many they are, they cost some five requests to S3 a second at most. Raises InvalidMessageError at
    once for what is no job id. In the loop: WaitTimeoutError when `timeout` seconds have gone by and not all have ended,
    JobLostError when those that are left will get no result, and what boto3 raises, as `wait` does.
    """
    job_ids = check_job_ids(job_ids)
    settings = load_settings(env)
    s3, lost = aws_client("s3", settings.region), LostWatch(Sender(settings))
    return wait_for(s3, settings.s3_bucket, job_ids, timeout_s=timeout, why_lost=lost.look)


async def wait_async(job_id: str, *, timeout: float | None = None, env: str | None = None) -> JobResult:
    """As `wait`, for asyncio: all who wait in one event loop share one look-out, and no thread waits for any of them."""
    (ended,) = [each async for each in as_completed_async([job_id], timeout=timeout, env=env)]
    if ended["error"]:
        raise JobFailed(ended, ended["error"])
    return ended


def as_completed_async(
    job_ids: Iterable[str], *, timeout: float | None = None, env: str | None = None
) -> AsyncIterator[JobResult]:
    """As `as_completed`, for asyncio: `async for result in send_job.as_completed_async(job_ids)`."""
    return _as_completed_async(check_job_ids(job_ids), timeout, env)


async def _as_completed_async(job_ids: list[str], timeout: float | None, env: str | None) -> AsyncIterator[JobResult]:
    import asyncio

    try:
        from sender.lookout import Lookout, shared
    except ImportError:
        raise ImportError(
            "to wait in asyncio the folder sender/ has to lie beside send_job.py: copy it there"
        ) from None
    settings = await asyncio.to_thread(load_settings, env)

    def make() -> tuple[Receipts, LostWatch]:
        return Receipts(aws_client("s3", settings.region), settings.s3_bucket), LostWatch(Sender(settings))

    lookout = shared(settings, lambda: Lookout(make, lambda job_id, reason: JobLostError([job_id], reason)))
    futures = [lookout.wait_for(job_id) for job_id in job_ids]
    lost: list[JobLostError] = []
    try:
        for future in asyncio.as_completed(futures, timeout=timeout):
            try:
                ended: JobResult = await future
            except JobLostError as error:
                lost.append(error)
                continue
            yield ended
    except TimeoutError:
        left = sum(not future.done() for future in futures)
        raise WaitTimeoutError(f"{count(left, 'job')} had no result after {timeout:g} s") from None
    finally:
        for each in futures:
            each.cancel()
    if lost:
        raise JobLostError([error.job_ids[0] for error in lost], lost[0].reason)


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
    """The job failed. `error` says why, `result` is all of its result; as a text it is one line that can be printed."""

    def __init__(self, result: JobResult, error: JobError) -> None:
        super().__init__(printable(f"job {result['job_id']} failed: {error['message']}"))
        self.result = result
        self.error = error


class WaitTimeoutError(TimeoutError):
    """Jobs had no result yet when the time was up."""


class JobLostError(Exception):
    """Nobody can write the results of these jobs any more. The text says what was seen, and what to do."""

    def __init__(self, job_ids: Sequence[str], reason: str) -> None:
        more = " and others" if len(job_ids) > 1 else ""
        super().__init__(f"{count(len(job_ids), 'job')} ({job_ids[0]}{more}) will get no result: {reason}")
        self.job_ids = list(job_ids)
        self.reason = reason


class NotAllSentError(Exception):
    """Some jobs could not be put on the queue, or nobody knows that they were: sending those again is harmless."""

    def __init__(self, sent: list[str], unsent: list[str], reason: str) -> None:
        super().__init__(f"{len(sent)} of {len(sent) + len(unsent)} jobs were sent: {reason}")
        self.sent = sent
        """The ids of those that are on the queue, in the order in which they were given."""
        self.unsent = unsent
        """The ids of the others."""
        self.reason = reason


@contextmanager
def meaning(what: str) -> Iterator[None]:
    """Have an InvalidMessageError say what of the many is meant."""
    try:
        yield
    except WorkflowProblemsError as error:
        raise WorkflowProblemsError(what, error.problems) from None
    except InvalidMessageError as error:
        raise type(error)(f"{what}: {error}") from None


def extra_of(extra_data: Mapping[str, Any] | None) -> dict[str, Any]:
    """What of a message is its extra_data, nothing where there is none. Raises InvalidMessageError."""
    checked = check_extra_data(None if extra_data is None else dict(extra_data))
    return {"extra_data": checked} if checked else {}


def _submit(sender: Sender, body: dict[str, Any], job_id: str | None, callback_url: str | None) -> str:
    job_id = sender.send(body, job_id, callback_url)
    sender.raise_capacity(1)
    return job_id


def check_job_ids(job_ids: Iterable[str]) -> list[str]:
    """The ids, each once, in their order. Raises InvalidMessageError for what is none."""
    ids = list(dict.fromkeys([job_ids] if isinstance(job_ids, str) else job_ids))
    for job_id in ids:
        if not is_job_id(job_id):
            raise InvalidMessageError(f"{job_id!r:.60} is no job id: they are lowercase UUIDs")
    return ids


def _bucket(job_id: str, env: str | None) -> tuple[Any, str]:
    """An S3 client and the bucket's name, for a job whose id may be part of a key."""
    check_job_ids([job_id])
    settings = load_settings(env)
    return aws_client("s3", settings.region), settings.s3_bucket


# --- Command line ----------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns 0 when all was sent (with --direct and --wait: succeeded), 1 for a failure,
    2 for bad input, 3 when --timeout was up, 130 when waiting was interrupted."""
    if arguments is None:
        # boto3 and AWS's descriptions are many objects and no garbage: looking for some takes a tenth of the time.
        gc.set_threshold(100_000)
    options = parse_arguments(arguments)
    try:
        return run(options, Teller(as_json=options.json))
    except (InvalidMessageError, SettingsError) as error:
        complain(str(error))
        return 2
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
        return run_directly(options.direct, bodies, options.save or Path("output"))
    sender = Sender(load_settings(options.env))
    if options.input:
        return run_upload(sender.settings, {input_name(path): path for path in options.input}, teller)
    if options.status and not options.wait:
        return run_status(sender, options.status, teller, options.save)
    if options.status:
        return run_wait(sender, options.status, options.timeout, teller, options.save)
    if options.check:
        fleet = fleet_check(sender.settings, uploads, lambda _: None)
        if fleet:
            return run_check(fleet, bodies[0]["prompt"], teller)
        complain("--check needs the folder sender/ beside send_job.py: copy it there, too")
        return 2
    if "prompt" in bodies[0] and not options.no_check:  # they differ in their seeds only
        try:
            fleet = fleet_check(sender.settings, uploads, complain)
            for problem in fleet.check(bodies[0]["prompt"]) if fleet else ():
                complain(str(problem))
        except WorkflowProblemsError as error:
            complain(f"this workflow cannot run on {sender.settings.env}, and was not sent:")
            for problem in error.problems:
                say(str(problem), to=sys.stderr)
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
        (options.extra_data and (command is not None or only), "--extra-data goes with a workflow that is sent"),
        (direct and not re.fullmatch(ADDRESS, direct), f"--direct {direct!s:.60}: name HOST:PORT, such as 127.0.0.1:8188"),
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
        prog=program(),
        description="Send jobs to the fleet: a workflow saved with Save (API Format), or a shell command.",
        epilog=f"example: {program('./')} my_workflow.json --set 6.text='a red fox' --count 4 --env pro",
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
    add("--extra-data", type=Path, metavar="FILE",
        help="send this JSON object along to ComfyUI: extra_pnginfo for pictures, keys for API nodes")  # fmt: skip
    add("--callback-url", metavar="URL", help="POST the result there")
    add("--wait", action="store_true", help="wait for the results and tell of each; exits with 1 when a job failed")
    add("--timeout", type=float, metavar="SECONDS",
        help="with --wait: stop waiting then and exit with 3; without it until each has its result, or is seen to "
        "get none")  # fmt: skip
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
    extra_data: dict[str, Any] = {}
    if options.extra_data:
        value = read_file("extra data", options.extra_data)
        with meaning(str(options.extra_data)):
            extra_data = check_extra_data(value)
    body = read_workflow(options.workflow or DEMO_WORKFLOW, extra_data)
    workflow = body["prompt"]
    chosen = {set_input(workflow, assignment, uploads) for assignment in options.assignments}
    check_workflow(workflow)  # such as 3.cfg=1e999
    # A workflow of one's own, sent once, keeps the seed it was saved with.
    if options.workflow and options.count == 1:
        return [body]
    return [body | {"prompt": fresh_seeds(workflow, chosen)} for _ in range(options.count)]


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
    waiting, lost = Waiting(sender, s3, job_ids, teller), LostWatch(sender, teller.line)
    unsaved = 0

    def give_up(reason: str) -> None:
        teller.change("")
        left = list(waiting.unfinished)
        goes, which = ("goes", left[0]) if len(left) == 1 else ("go", "JOB_ID …")
        complain(
            f"{reason}: {len(left)} of {count(waiting.total, 'job')} had no result yet and {goes} on; "
            f"come back with: {program('./')} --env {sender.settings.env} --wait --status {which}"
        )

    try:
        for result in wait_for(
            s3, bucket, job_ids, timeout_s=timeout_s, after_round=waiting.show, why_lost=lost.look, say=teller.line
        ):
            waiting.take(result)
            unsaved += save is not None and not save_files(result, save, teller, s3, bucket)
        waiting.say_how_far()
    except KeyboardInterrupt:
        give_up("interrupted")
        return 130
    except WaitTimeoutError:
        give_up(f"not done after {timeout_s:g} s")
        return 3
    except JobLostError as error:
        teller.change("")
        complain(str(error))
        return 1
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


def run_directly(address: str, bodies: Sequence[dict[str, Any]], folder: Path) -> int:
    """Run workflows on a ComfyUI at hand; returns the exit code."""
    try:
        import requests  # noqa: F401  pip installs the sender without these two
        import websocket  # noqa: F401

        from sender.direct import run_direct
    except ImportError as error:
        if error.name in ("requests", "websocket"):
            complain(
                "--direct needs the packages requests and websocket-client: pip install requests websocket-client"
            )
            return 2
        complain("--direct needs the folders sender/ and ground/ beside send_job.py: copy them there, too")
        return 2
    return run_direct(address, bodies, folder, complain)


def program(folder: str = "") -> str:
    """What this program is called: `send-job` where pip has installed it, else send_job.py, in this `folder`."""
    return "send-job" if Path(sys.argv[0]).name == "send-job" else f"{folder}send_job.py"


def complain(text: str) -> None:
    """Say what went wrong."""
    say(f"{program()}: {text}", to=sys.stderr)


# --- Sending ---------------------------------------------------------------------------------------------

REQUESTS_AT_ONCE = 8
BATCH_TRIES = 4
"""How often what SQS refused of a batch, through no fault of ours, is sent again."""


class Message(NamedTuple):
    """One job as it travels: its text and the bytes of it, and what goes by the bucket where that is too large."""

    job_id: str
    text: str
    size: int
    by_bucket: dict[str, Any] | None = None


def message_of(body: dict[str, Any], job_id: str | None, callback_url: str | None) -> Message:
    """A job as a message. Raises InvalidMessageError."""
    job_id = job_id or new_job_id()
    if not is_job_id(job_id):
        raise InvalidMessageError(
            f"job_id {job_id!r:.60} is no lowercase UUID: leave it out or use str(uuid.uuid4())"
        )
    extras = {"job_id": job_id} | ({"callback_url": callback_url} if callback_url else {})
    text = as_json(body | extras)
    size = len(text.encode())
    if size <= MAX_MESSAGE_BYTES:
        return Message(job_id, text, size)
    if "prompt" not in body:
        raise InvalidMessageError(f"the command is longer than a message may be ({MAX_MESSAGE_BYTES} bytes)")
    by_bucket, rest = body["prompt"], {name: value for name, value in body.items() if name != "prompt"}
    text = as_json({"workflow_key": large_workflow_key(job_id)} | rest | extras)
    if len(text.encode()) > MAX_MESSAGE_BYTES and "extra_pnginfo" in rest.get("extra_data", {}):
        # It is no secret, and large. The rest stays in the message, which is gone when the job is done.
        extra_data = dict(rest["extra_data"])
        by_bucket = {"prompt": body["prompt"], "extra_data": {"extra_pnginfo": extra_data.pop("extra_pnginfo")}}
        text = as_json({"workflow_key": large_workflow_key(job_id)} | rest | {"extra_data": extra_data} | extras)
    size = len(text.encode())
    if size > MAX_MESSAGE_BYTES:
        raise InvalidMessageError(
            f"what goes with the workflow, {size} bytes, is more than a message may have ({MAX_MESSAGE_BYTES} bytes): "
            "only the workflow and extra_pnginfo of extra_data may be larger"
        )
    return Message(job_id, text, size, by_bucket)


def as_json(value: dict[str, Any]) -> str:
    """A message as text. Raises InvalidMessageError, which repeats nothing of it."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()
    except UnicodeEncodeError:
        reason = "half a character cannot be sent"
    except (TypeError, ValueError, RecursionError) as error:
        reason = str(error)
    else:
        return text
    raise InvalidMessageError(
        f"the job cannot be written as JSON ({reason}): use text, lists, dicts and finite numbers"
    )


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
                Body=as_json(message.by_bucket).encode(),
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

    def keeps(self) -> tuple[int, int]:
        """How many seconds the queue keeps a message, and how many there are: waiting, held, not yet to be seen."""
        kinds = ("", "NotVisible", "Delayed")
        names = ["MessageRetentionPeriod", *(f"ApproximateNumberOfMessages{kind}" for kind in kinds)]
        values = self._queue().get_queue_attributes(QueueUrl=self._queue_url, AttributeNames=names)["Attributes"]
        keeps_s, *there = (int(values[name]) for name in names)
        return keeps_s, sum(there)

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
        if not self._queue_url:
            self._sqs = aws_client("sqs", self.settings.region)
            self._queue_url = self._sqs.get_queue_url(QueueName=self.settings.sqs_name)["QueueUrl"]
        return self._sqs


# --- Waiting ---------------------------------------------------------------------------------------------

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 5.0
"""Between two rounds of looks for receipts; it grows while nothing comes."""
LOOKS_PER_ROUND = 20
"""Most jobs whose receipt is looked for without a hint in LONGEST_PAUSE_S, so that many cost no more requests than few."""
LIST_BACK_MS, LIST_OVERLAP_MS = 3_600_000, 60_000
"""So far back the list of ended jobs is read at first, and later: another clock may be behind, an object late."""


def read_result(s3: Any, bucket: str, job_id: str) -> JobResult | None:
    """The job's result.json, None while it has none. Raises what boto3 raises."""
    stored: JobResult | None = read_json(s3, bucket, result_key(job_id))
    return stored


def read_progress(s3: Any, bucket: str, job_id: str) -> JobProgress | None:
    """The job's progress.json, None while it has none or where S3 does not give it just now."""
    try:
        stored: JobProgress | None = read_json(s3, bucket, progress_key(job_id))
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


class Receipts:
    """Looks for the receipts of jobs in rounds.

    A few are looked at one by one. Of many those that have ended are found in the list that workers keep, one request
    a round; and because a worker may have died between receipt and list, some are looked at besides, each in its turn.
    """

    def __init__(
        self, s3: Any, bucket: str, job_ids: Iterable[str] = (), say: Callable[[str], None] = lambda _: None
    ) -> None:
        self._s3, self._bucket, self._say = s3, bucket, say
        self._looked: dict[str, float] = dict.fromkeys(job_ids, -math.inf)  # when each was looked at last
        self._looked_at, self._pause_s, self._newest_ms = -math.inf, FIRST_PAUSE_S, 0
        self._has_said = False
        self.found = self.trouble = False
        """Whether the last round has found something, or could not be ended."""

    @property
    def unfinished(self) -> list[str]:
        """The jobs without a receipt."""
        return list(self._looked)

    def add(self, job_id: str) -> None:
        """Look for this one, too, and first."""
        self._looked[job_id] = -math.inf
        self._pause_s = FIRST_PAUSE_S

    def discard(self, job_id: str) -> None:
        """Look for it no longer."""
        self._looked.pop(job_id, None)

    def look(self, *, at_all: bool = False) -> Iterator[JobResult]:
        """One round of looks; yields what is found. Raises what boto3 raises where that will not pass."""
        self.found = self.trouble = False
        try:
            for job_id in self._whom_to_look_at(at_all):
                result = read_result(self._s3, self._bucket, job_id)
                if result is None:
                    self._looked[job_id] = time.monotonic()
                    continue
                del self._looked[job_id]
                self.found = True
                yield result
        except Exception as error:
            if not will_pass(error):
                raise
            if not self._has_said:
                self._say(f"Results cannot be read just now, waiting goes on: {one_line(error)}")
            self._has_said = self.trouble = True
        self._pause_s = FIRST_PAUSE_S if self.found else min(self._pause_s * 1.5, LONGEST_PAUSE_S)

    def pause_s(self) -> float:
        """How long to wait until the next round: it grows while nothing comes."""
        return self._pause_s

    def _whom_to_look_at(self, at_all: bool) -> list[str]:
        by_turn = sorted(self._looked, key=self._looked.__getitem__)
        if at_all or len(by_turn) <= LOOKS_PER_ROUND:
            return by_turn
        now = time.monotonic()
        share = min((now - self._looked_at) / LONGEST_PAUSE_S, 1)
        self._looked_at = now
        listed = self._newly_listed()
        others = [job_id for job_id in by_turn if job_id not in listed]
        return [job_id for job_id in by_turn if job_id in listed] + others[: math.ceil(share * LOOKS_PER_ROUND)]

    def _newly_listed(self) -> set[str]:
        """The jobs in the list of ended ones, from a little before the last one that is known, at first an hour."""
        now_ms, listed = int(time.time() * 1000), set()
        after = ended_key((self._newest_ms or now_ms - LIST_BACK_MS) - LIST_OVERLAP_MS)
        while after:
            page = self._s3.list_objects_v2(Bucket=self._bucket, Prefix=ENDED, StartAfter=after)
            after = ""
            for item in page.get("Contents", []):
                if page["IsTruncated"]:
                    after = item["Key"]
                if found := parse_ended_key(item["Key"]):
                    listed.add(found[1])
                    self._newest_ms = max(self._newest_ms, min(found[0], now_ms))  # a clock may be ahead
        return listed


def wait_for(
    s3: Any,
    bucket: str,
    job_ids: Iterable[str],
    *,
    timeout_s: float | None = None,
    after_round: Callable[[], None] = lambda: None,
    why_lost: Callable[[], str | None] = lambda: None,
    say: Callable[[str], None] = lambda _: None,
) -> Iterator[JobResult]:
    """Yield the result.json of every job as it appears, in the order they are found.

    `after_round` is called each time the receipts were looked for and some are missing still. What passes
    (throttling, 5xx, network) is waited through and said once. Raises WaitTimeoutError after `timeout_s`
    seconds, JobLostError for those that are missing at one more look after `why_lost` has said why no more will come,
    and what boto3 raises when it will not pass, such as a refused access.
    """
    receipts = Receipts(s3, bucket, job_ids, say)
    end = None if timeout_s is None else time.monotonic() + timeout_s
    reason = None
    while receipts.unfinished:
        yield from receipts.look(at_all=bool(reason))
        left = receipts.unfinished
        if not left:
            return
        if reason and not receipts.trouble:
            raise JobLostError(left, reason)
        after_round()
        reason = why_lost()
        if reason:
            continue
        pause_s = receipts.pause_s()
        if end is not None:
            left_s = end - time.monotonic()
            if left_s <= 0:
                raise WaitTimeoutError(f"{count(len(left), 'job')} had no result after {timeout_s:g} s")
            pause_s = min(pause_s, left_s)
        time.sleep(pause_s)


LOST_LOOK_S = 30.0
"""Between two looks at the queue."""
LEAST_EMPTY_S = 600.0
"""So long the queue has to be seen empty at least: workers look every five minutes for dead jobs to answer."""
LONGEST_RECEIVE_S = 12 * 3600.0


class LostWatch:
    """Looks at the queue while receipts are missing, and says when nobody can write them any more."""

    def __init__(self, sender: Sender, say: Callable[[str], None] = lambda _: None) -> None:
        self._sender, self._say = sender, say
        self._began = time.monotonic()
        self._next_look = self._began + LOST_LOOK_S
        self._empty_since: float | None = None
        self._said = False
        self.before = -math.inf
        """Whoever waits since then at least waits in vain, once that was said."""

    def look(self) -> str | None:
        """Look, unless that was less than LOST_LOOK_S ago; returns why no result will come, if that is seen.

        Raises nothing: where the queue cannot be looked at, which is said once, one waits on.
        """
        now, settings = time.monotonic(), self._sender.settings
        if now < self._next_look:
            return None
        self._next_look = now + LOST_LOOK_S
        try:
            keeps_s, left = self._sender.keeps()
        except Exception as error:
            self._empty_since = None
            if error_code(error) in ("AWS.SimpleQueueService.NonExistentQueue", "QueueDoesNotExist"):
                self.before = now
                remedy = f"make the environment again (./create_env.sh {settings.env}), and send again what is to run"
                return f"there is no queue {settings.sqs_name}: {remedy}"
            if not self._said:
                self._say(f"The queue cannot be looked at, a lost job would be waited for: {one_line(error)}")
            self._said = True
            return None
        if left:
            self._empty_since = None
        elif self._empty_since is None:
            self._empty_since = now
        elif now - self._empty_since > (
            least_s := max(LEAST_EMPTY_S, settings.visibility_timeout_s * settings.max_receives)
        ):
            self.before = now - least_s
            return (
                f"the queue {settings.sqs_name} has been empty for {now - self._empty_since:.0f} s: see whether it is "
                f"among the dead (./fleet.py dead --env {settings.env}), or else send it again"
            )
        if now - self._began > keeps_s + LONGEST_RECEIVE_S:
            self.before = now - keeps_s - LONGEST_RECEIVE_S
            return f"{settings.sqs_name} keeps no message for so long: send again what is to run"
        return None


def will_pass(error: Exception) -> bool:
    """Whether an AWS error is one of the network, of a busy or of a broken service, so worth another try."""
    from botocore.exceptions import ConnectionError as NoConnectionError
    from botocore.exceptions import HTTPClientError, IncompleteReadError

    if isinstance(error, NoConnectionError | HTTPClientError | IncompleteReadError):
        return True
    status = (getattr(error, "response", None) or {}).get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return status >= 500 or error_code(error) in ("SlowDown", "Throttling", "ThrottlingException", "RequestTimeout")


# --- What is shown of waiting ----------------------------------------------------------------------------

ERASE = "\r\x1b[K"
"""Empties the line on a terminal."""


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
        if self.as_json:
            print(json.dumps({"event": kind} | data), flush=True)
        else:
            say(words, before=ERASE if self.live else "")

    def change(self, text: str) -> None:
        """Let the line that changes be this; without one nothing happens."""
        if self.live:
            import shutil

            say(cut(printable(text), shutil.get_terminal_size().columns - 1), before=ERASE, end="")


class Waiting:
    """The jobs waited for: how many have ended, and what is shown of the others, by sender/outlook.py if it is there."""

    def __init__(self, sender: Sender, s3: Any, job_ids: Sequence[str], teller: Teller) -> None:
        self.s3 = s3
        self.bucket = sender.settings.s3_bucket
        self.teller = teller
        self.total = len(job_ids)
        self.unfinished = dict.fromkeys(job_ids)
        self.failed = 0
        self.outlook: Outlook | None = None
        with suppress(ImportError):
            from sender.outlook import Outlook

            say_news = (lambda _: None) if teller.live else teller.line
            self.outlook = Outlook(sender.settings, sender.depth, say_news, tell_progress)
        self._told = -1
        self._progress: JobProgress | None = None

    def take(self, result: JobResult) -> None:
        """Count and tell a result."""
        del self.unfinished[result["job_id"]]
        self.failed += result["status"] != "succeeded"
        if self.outlook:
            self.outlook.runs_s.append(result["timings"]["run_s"])
        self.teller.event("result", tell_result(result), result=result)

    def show(self) -> None:
        """Show how far it is, after each round of looks."""
        self.say_how_far()
        if self.outlook:
            self.outlook.look(len(self.unfinished))
        if self.total == 1 and (self.teller.live or self.teller.as_json):
            progress = read_progress(self.s3, self.bucket, next(iter(self.unfinished)))
            if self.teller.as_json and progress and progress != self._progress:
                self.teller.event("progress", "", progress=progress)
            self._progress = progress
        self.teller.change(self.line())

    def line(self) -> str:
        """The line that changes."""
        if not self.outlook:
            return self.how_far()
        if self.total == 1:
            return self.outlook.of_one(self._progress)
        return self.outlook.of_many(self.how_far(), self.total, len(self.unfinished))

    def say_how_far(self) -> None:
        """On no terminal: one line whenever the number of finished jobs has changed."""
        if not self.teller.live and self._told != len(self.unfinished):
            self._told = len(self.unfinished)
            self.teller.line(self.how_far())

    def how_far(self) -> str:
        done = self.total - len(self.unfinished)
        return f"{done} of {count(self.total, 'job')} done" + (f", {self.failed} failed" if self.failed else "")


def cut(text: str, columns: int) -> str:
    """As much of the beginning as fits; Chinese characters, as in titles of nodes, take two columns."""
    from unicodedata import east_asian_width

    for place, character in enumerate(text):
        columns -= 2 if east_asian_width(character) in "WF" else 1
        if columns < 0:
            return text[:place]
    return text


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

_UNCHECKED = "workflows are sent unchecked: the folder sender/ is not beside send_job.py, copy it there, too"
_told_of_no_check = False


def fleet_check(settings: Settings, coming: Collection[str], warn: Callable[[str], None]) -> FleetCheck | None:
    """The check of one environment, to which `coming` inputs will be uploaded. Where send_job.py was carried away
    without the room that checks there is none, which `warn` is told once."""
    global _told_of_no_check  # noqa: PLW0603
    try:
        from sender.check import FleetCheck
    except ImportError:
        if not _told_of_no_check:
            _told_of_no_check = True
            warn(_UNCHECKED)
        return None
    return FleetCheck(settings, coming)


def warn_of(problems: Sequence[Problem]) -> None:
    """Say what may go wrong as Python warnings."""
    for problem in problems:
        warn_in_python(str(problem))


def warn_in_python(text: str) -> None:
    """Say it as a Python warning of the code that called submit or submit_many."""
    import warnings

    warnings.warn(text, stacklevel=4)


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


def read_workflow(path: Path, extra_data: Mapping[str, Any]) -> dict[str, Any]:
    """What a workflow file asks for, as a message; `extra_data` goes before what stands in the file.

    It is an API-format workflow, or has one under "prompt", as ComfyUI's POST /prompt takes it. Raises
    InvalidWorkflowError naming file and remedy.
    """
    value = read_file("workflow", path)
    is_wrapped = isinstance(value, dict) and "prompt" in value and not is_node(value["prompt"])
    beside = value if is_wrapped else {}
    with meaning(str(path)):
        workflow = check_workflow(beside.get("prompt", value))
        extra_data = check_extra_data(beside.get("extra_data")) | dict(extra_data)
    if unused := beside.keys() - {"prompt", "extra_data", "client_id", "prompt_id"}:
        complain(f"{path}: only prompt and extra_data are sent, and not {', '.join(sorted(unused))}")
    return {"prompt": workflow} | extra_of(extra_data)


def read_file(what: str, path: Path) -> Any:
    """Read a JSON file; raises InvalidWorkflowError."""
    try:
        return load_json(str(path), path.read_bytes())
    except OSError as error:
        raise InvalidWorkflowError(f"cannot read the {what} {path}: {error.strerror}") from None


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
    sys.exit(main())
