"""What sender and worker share: settings, messages, capacity, the ComfyUI client.

Importing this module costs nothing: boto3, requests and websocket-client are imported where they are
used. The formats are described in docs/jobs.md and docs/results.md; ComfyUI's behaviour is stated where relied on.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote_plus

Workflow = dict[str, dict[str, Any]]
"""An API-format workflow: node id -> {"class_type", "inputs", ...}."""

HERE = Path(__file__).resolve().parent
HOOK_NAME = "comfy-terminating"
"""The termination lifecycle hook that create_env.sh makes with the group."""
VERSION_TAG = "comfy-version"
"""The tag in which create_env.sh tells the group's instances which version of the launch template counts."""

MAX_MESSAGE_BYTES = 1024 * 1024
"""SQS refuses a larger message; a larger workflow travels by the bucket."""
MAX_INPUTS = 100
OBJECT_INFO_KEY = "output/object_info.json.gz"
"""Where the fleet's /object_info lies, gzip'd: the nodes and models against which senders check a workflow."""


# --- Settings --------------------------------------------------------------------------------------------


class SettingsError(Exception):
    """The settings cannot be used; the text is one sentence naming the setting and the remedy."""


@dataclass(frozen=True)
class Settings:
    """The file `env`, converted and checked. Every variable is explained in env.example."""

    env: str
    prefix: str
    account_id: str
    region: str
    s3_bucket: str
    sqs_name: str
    asg_name: str
    backlogsize_per_instance: int
    scale_cooldown_s: int
    comfy_home: Path
    comfy_address: str
    visibility_timeout_s: int
    max_receives: int
    job_timeout_s: int
    stall_timeout_s: int
    input_limit_mb: int
    exec_cmd: str
    exec_cmd_beside: bool
    warmup_workflow: Path | None
    callback_url: str
    callback_secret: str = field(repr=False)

    @property
    def output_dir(self) -> Path:
        """Where ComfyUI writes on this machine; the same rule as in start_service.sh.

        The base machine's output folder is the bucket's own, which designers see. A fleet instance
        writes to its local disk and the worker uploads: Mountpoint cannot seek, so video savers fail
        on it, and every save through it makes the GPU wait for S3.
        """
        return self.comfy_home / ("ComfyUI/output" if self.env == "base" else "job-output")


# NAME=value as both Bash and python-dotenv read it; load_env in provision/common.sh has the same rule.
_REFERENCE = re.compile(r"\$\{([A-Z][A-Z0-9_]*)\}")
_LINE = re.compile(
    r"([A-Z][A-Z0-9_]*)="
    r"(?:(?:[A-Za-z0-9_./:@%+,=-]|\$\{[A-Z][A-Z0-9_]*\})*"
    r'|"(?:[^"\\$`]|\$\{[A-Z][A-Z0-9_]*\})*")\s*'
)
_IGNORED_LINE = re.compile(r"\s*(#.*)?")
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?")

_DEFAULTS = {
    "ENV": "base",
    "PREFIX": "simple-comfy",
    "S3_BUCKET": "${PREFIX}-${ACCOUNT_ID}-${REGION}-${ENV}",
    "SQS_NAME": "${PREFIX}-${ENV}-queue",
    "ASG_NAME": "${PREFIX}-${ENV}-asg",
    "BACKLOGSIZE_PER_INSTANCE": "3",
    "SCALE_COOLDOWN": "180",
    "COMFY_HOME": str(HERE),
    "COMFY_ADDRESS": "127.0.0.1:8188",
    "VISIBILITY_TIMEOUT": "120",
    "MAX_RECEIVES": "3",
    "JOB_TIMEOUT": "3600",
    "STALL_TIMEOUT": "900",
    "INPUT_LIMIT_MB": "200",
    "EXEC_CMD": "base",
    "EXEC_CMD_BESIDE": "no",
    "WARMUP_WORKFLOW": "",
    "CALLBACK_URL": "",
    "CALLBACK_SECRET": "",
}


def load_settings(
    env: str | None = None, path: Path | None = None, environ: Mapping[str, str] | None = None
) -> Settings:
    """Read the settings file beside this module (or `path`).

    The process environment wins over the file, and `env` (the environment's name) over both. Raises
    SettingsError.
    """
    path = path or HERE / "env"
    fixed = dict(os.environ if environ is None else environ)
    if env is not None:
        fixed["ENV"] = env
    values: dict[str, str] = {}
    home = {"COMFY_HOME": _DEFAULTS["COMFY_HOME"]}  # other settings may refer to it
    for name, raw in [*_read_env_file(path), *_DEFAULTS.items()]:
        if name not in values:
            values[name] = fixed[name] if name in fixed else _expand(name, raw, home | fixed | values, path)
    return _check(values | {n: fixed[n] for n in ("ACCOUNT_ID", "REGION") if n in fixed}, path)


def _read_env_file(path: Path) -> Iterator[tuple[str, str]]:
    from dotenv import dotenv_values

    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise SettingsError(f"there is no settings file {path}: copy env.example to it and fill it in") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"cannot read the settings file {path} ({error}): make it readable text") from None
    seen: set[str] = set()
    for number, line in enumerate(text.splitlines(), 1):
        match = _LINE.fullmatch(line)
        if match and match[1] in seen:
            raise SettingsError(f"{path} line {number} sets {match[1]} a second time: take one of the lines out")
        if match:
            seen.add(match[1])
        elif not _IGNORED_LINE.fullmatch(line):
            raise SettingsError(
                f"{path} line {number} ({line.partition('=')[0]}) is malformed: "
                'write NAME=value or NAME="two words", where only ${NAME} expands'
            )
    for name, value in dotenv_values(stream=io.StringIO(text), interpolate=False).items():
        yield name, value or ""


def _expand(name: str, raw: str, known: Mapping[str, str], path: Path) -> str:
    def value_of(match: re.Match[str]) -> str:
        if match[1] not in known:
            raise SettingsError(f"{name} uses ${{{match[1]}}}, which is not set: set it in {path}, above")
        return known[match[1]]

    return _REFERENCE.sub(value_of, raw)


def _check(values: Mapping[str, str], path: Path) -> Settings:
    def text(name: str, pattern: str, allowed: str) -> str:
        value = values.get(name, "")
        if not re.fullmatch(pattern, value):
            raise SettingsError(f"{name}={value!r} cannot be used: set it in {path} to {allowed}")
        return value

    def number(name: str, low: int, high: int) -> int:
        value = values[name]
        if not (re.fullmatch(r"[0-9]{1,9}", value) and low <= int(value) <= high):
            raise SettingsError(f"{name}={value!r} cannot be used: set it in {path} to a number from {low} to {high}")
        return int(value)

    return Settings(
        prefix=text("PREFIX", _NAME.pattern, "lowercase letters, digits and hyphens"),
        env=text("ENV", _NAME.pattern, "lowercase letters, digits and hyphens"),
        account_id=text("ACCOUNT_ID", r"[0-9]{12}", "your account's 12 digits"),
        region=text("REGION", r"[a-z]{2}(-[a-z]+)+-[0-9]", "a region such as us-west-2"),
        s3_bucket=text("S3_BUCKET", r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", "a bucket name of 3 to 63 characters"),
        sqs_name=text("SQS_NAME", r"[A-Za-z0-9_-]{1,76}", "a queue name of up to 76 letters, digits, - and _"),
        asg_name=text("ASG_NAME", r"[A-Za-z0-9_-]{1,100}", "a group name of up to 100 letters, digits, - and _"),
        backlogsize_per_instance=number("BACKLOGSIZE_PER_INSTANCE", 1, 100_000),
        scale_cooldown_s=number("SCALE_COOLDOWN", 0, 86_400),
        comfy_home=Path(text("COMFY_HOME", r"/.*", "an absolute folder")),
        comfy_address=text("COMFY_ADDRESS", r"[A-Za-z0-9.-]+:[0-9]{1,5}", "HOST:PORT"),
        visibility_timeout_s=number("VISIBILITY_TIMEOUT", 3, 43_200),
        max_receives=number("MAX_RECEIVES", 1, 1000),
        # A receive lasts 12 hours at most, and the job has to end within it.
        job_timeout_s=number("JOB_TIMEOUT", 1, 42_000),
        stall_timeout_s=number("STALL_TIMEOUT", 2, 42_000),
        input_limit_mb=number("INPUT_LIMIT_MB", 1, 100_000),
        exec_cmd=text("EXEC_CMD", r"base|always|never", "base, always or never"),
        exec_cmd_beside=text("EXEC_CMD_BESIDE", r"yes|no", "yes or no") == "yes",
        warmup_workflow=Path(values["COMFY_HOME"], values["WARMUP_WORKFLOW"]) if values["WARMUP_WORKFLOW"] else None,
        callback_url=text("CALLBACK_URL", r"(https?://\S+)?", "an http(s) address, or leave it out"),
        callback_secret=values["CALLBACK_SECRET"],
    )


# --- Messages --------------------------------------------------------------------------------------------


class InvalidMessageError(Exception):
    """A message that is no job; the text says why, and what to send instead.

    `job_id` and `callback_url` are set as far as the message has usable ones, so that its sender hears of it.
    """

    job_id: str | None = None
    callback_url: str | None = None


class InvalidWorkflowError(InvalidMessageError):
    """A workflow that cannot be sent to ComfyUI; the text says why, and what to do."""


class NothingToRunError(Exception):
    """A message that asks for nothing, such as S3's own test event: it is deleted and makes no result."""


@dataclass(frozen=True)
class Job:
    """One queue message, understood: exactly one of workflow, workflow_key and command is set."""

    id: str
    workflow: Workflow | None = None
    workflow_key: str | None = None
    command: str | None = None
    callback_url: str | None = None
    inputs: Mapping[str, str] = field(default_factory=dict)
    """Files the worker fetches first: name that the workflow uses -> http(s) or s3:// address."""
    source: str | None = None
    """s3://bucket/key of the file whose arrival, told by S3, is this job."""


def is_job_id(value: object) -> bool:
    """Whether `value` is a lowercase canonical UUID, the only prompt id newer ComfyUI servers accept."""
    return isinstance(value, str) and bool(
        re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}", value)
    )


def new_job_id() -> str:
    """A fresh job id."""
    import uuid  # which imports more than all else here

    return str(uuid.uuid4())


def large_workflow_key(job_id: str) -> str:
    """The S3 key of a workflow too large for a message."""
    return f"input/jobs/{job_id}.json"


def result_key(job_id: str) -> str:
    """The S3 key of a job's receipt."""
    return f"output/{job_id}/result.json"


def cancel_key(job_id: str) -> str:
    """The S3 key of the empty object that cancels a job."""
    return f"input/jobs/{job_id}.cancel"


def check_workflow(workflow: object) -> Workflow:
    """Return `workflow` if it has the API format, else raise InvalidWorkflowError."""
    if isinstance(workflow, dict) and "nodes" in workflow and "links" in workflow:
        raise InvalidWorkflowError("this workflow is saved in UI format: export it with Save (API Format)")
    if not isinstance(workflow, dict) or not workflow:
        raise InvalidWorkflowError("this is no workflow: export one with Save (API Format)")
    for node_id, node in workflow.items():
        if not (isinstance(node, dict) and isinstance(node.get("class_type"), str)):
            raise InvalidWorkflowError(
                f"node {node_id!r:.40} has no class_type, so this is no API-format workflow: "
                "export it with Save (API Format)"
            )
        if not isinstance(node.get("inputs", {}), dict):
            raise InvalidWorkflowError(f"the inputs of node {node_id!r:.40} are not an object: export it again")
    return workflow


def parse_message(body: str, message_id: str) -> Job:
    """Understand a message body of any of the shapes the queue takes.

    1. an API-format workflow itself, 2. {"exec_cmd": "shell command"}, 3. {"prompt": workflow,
    "job_id": ..., "callback_url": ..., "inputs": ...}, where {"workflow_key": "input/jobs/<job_id>.json"}
    stands for a workflow too large for a message, 4. what S3 sends when a file has come into input/jobs/. The
    extras but inputs may stand beside exec_cmd as well. Without a job_id `message_id`, a UUID too, serves.
    Raises InvalidMessageError and NothingToRunError.
    """
    try:
        message = json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise InvalidMessageError("the message is not JSON: send a workflow saved with Save (API Format)") from None
    if not isinstance(message, dict):
        raise InvalidMessageError("the message is JSON but no object: send a workflow saved with Save (API Format)")
    if isinstance(message.get("Records"), list) or message.get("Event") == "s3:TestEvent":
        return _parse_s3_event(message)
    kinds = [key for key in ("prompt", "workflow_key", "exec_cmd") if key in message]
    if not kinds:
        return Job(message_id, workflow=check_workflow(message))
    job_id, callback_url = message.get("job_id", message_id), message.get("callback_url")
    try:
        return _parse_job(message, kinds, job_id, callback_url)
    except InvalidMessageError as error:
        error.job_id = job_id if is_job_id(job_id) else None
        error.callback_url = callback_url if _is_http_url(callback_url) else None
        raise


def _parse_job(message: dict[str, Any], kinds: list[str], job_id: object, callback_url: object) -> Job:
    if not isinstance(job_id, str) or not is_job_id(job_id):
        raise InvalidMessageError(
            f"job_id {job_id!r:.60} is no lowercase UUID: leave it out or use str(uuid.uuid4())"
        )
    if callback_url is not None and not _is_http_url(callback_url):
        raise InvalidMessageError(f"callback_url {callback_url!r:.60} is no http(s) address")
    if len(kinds) > 1:
        raise InvalidMessageError(f"the message has both {kinds[0]} and {kinds[1]}: send one of them")
    inputs = check_inputs(message.get("inputs") or {})
    job = Job(job_id, callback_url=str(callback_url) if callback_url else None, inputs=inputs)
    if "exec_cmd" in message and inputs:
        raise InvalidMessageError("inputs stand beside exec_cmd: they are fetched for workflows only")
    if "exec_cmd" in message:
        if not isinstance(message["exec_cmd"], str) or not message["exec_cmd"].strip():
            raise InvalidMessageError("exec_cmd is not a shell command: send a string")
        return replace(job, command=message["exec_cmd"])
    if "workflow_key" in message:
        key = large_workflow_key(job_id)
        if message["workflow_key"] != key:
            raise InvalidMessageError(
                f"workflow_key {message['workflow_key']!r:.60} is not this job's: it must be {key}"
            )
        return replace(job, workflow_key=key)
    return replace(job, workflow=check_workflow(message["prompt"]))


def check_inputs(inputs: object) -> dict[str, str]:
    """The `inputs` of a message: names that stay inside a folder, and addresses of a kind that can be fetched."""
    if not isinstance(inputs, dict) or len(inputs) > MAX_INPUTS:
        raise InvalidMessageError(f"inputs is no object of at most {MAX_INPUTS} names and addresses")
    for name, address in inputs.items():
        # A name that ends in ] would be taken for one of ComfyUI's "name [output]".
        is_plain = re.fullmatch(r"[^./\\][^/\\]*(?<!\])", name) and name.isprintable()
        if not is_plain or len(name.encode()) > 200:
            raise InvalidMessageError(
                f"inputs has the name {name!r:.60}: use a file name of at most 200 bytes "
                "without slashes, no dot first and no ] last"
            )
        if not (
            _is_http_url(address) or (isinstance(address, str) and re.fullmatch(r"s3://[a-z0-9.-]+/.+", address))
        ):
            raise InvalidMessageError(f"the input {name!r:.60} has no http(s):// or s3://bucket/key address")
    return inputs


# A message or a workflow file of these names is on its way by another message already.
_OWN_KEY = re.compile(r"input/jobs/[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}[./].*")


def _parse_s3_event(message: dict[str, Any]) -> Job:
    """The job of a file that came into input/jobs/, from S3's event message (its structure, 2.x, is S3's).

    The id is the same for the same event, which S3 may tell of twice. Files that send_job.py and the worker put
    there for a job, whose names begin with its id, ask for nothing, nor does anything else.
    """
    import uuid

    records = message.get("Records")
    if not records or not isinstance(records, list):
        raise NothingToRunError("S3's test event")
    if len(records) > 1:  # S3 itself sends one
        raise InvalidMessageError(f"the S3 event tells of {len(records)} files: send a message for each")
    try:
        event, file = records[0]["eventName"], records[0]["s3"]["object"]
        key = unquote_plus(file["key"])
        source = f"s3://{records[0]['s3']['bucket']['name']}/{key}"
        job_id = str(uuid.uuid5(uuid.NAMESPACE_URL, f"{source}#{file.get('sequencer') or records[0]['eventTime']}"))
    except (KeyError, TypeError, AttributeError, ValueError):
        raise InvalidMessageError("the message has Records but is no S3 event: send a workflow instead") from None
    if not str(event).startswith("ObjectCreated:"):
        raise NothingToRunError(f"{event} of {source}")
    if not (key.startswith("input/jobs/") and key.endswith(".json")) or _OWN_KEY.fullmatch(key):
        raise NothingToRunError(f"{source} is no workflow dropped into input/jobs/")
    return Job(job_id, workflow_key=key, source=source)


def _is_http_url(value: object) -> bool:
    return isinstance(value, str) and bool(re.fullmatch(r"https?://\S+", value))


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def own_outputs(workflow: Workflow, job_id: str) -> Workflow:
    """A copy of `workflow` whose every filename_prefix begins with the job's own folder.

    So a job's files lie together, and two instances never overwrite each other's counters. Raises
    InvalidWorkflowError for a prefix that climbs out of that folder.
    """
    owned = {}
    for node_id, node in workflow.items():
        inputs = dict(node.get("inputs", {}))
        prefix = inputs.get("filename_prefix")
        if isinstance(prefix, str):
            if ".." in re.split(r"[/\\]", prefix):
                raise InvalidWorkflowError(
                    f"node {node_id}: filename_prefix {prefix!r:.80} leaves the job's folder: take out the '..'"
                )
            inputs["filename_prefix"] = f"{job_id}/{prefix.lstrip('/')}"
        owned[node_id] = {**node, "inputs": inputs}
    return owned


def iso(moment: datetime) -> str:
    """ISO 8601 in UTC, to the millisecond, as all files in the bucket have it."""
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


# --- AWS -------------------------------------------------------------------------------------------------


_sessions: dict[str, Any] = {}
_session_lock = threading.Lock()  # boto3 makes no two clients at the same time of one session


def aws_client(service: str, region: str) -> Any:
    """A boto3 client with bounded waits. Endpoints and credentials come from the standard chain."""
    import boto3
    from botocore.config import Config

    # A long poll answers within 20 s; 30 s without a byte is a dead connection.
    config = Config(
        connect_timeout=5,
        read_timeout=30,
        retries={"mode": "standard", "total_max_attempts": 4},
        tcp_keepalive=True,
        max_pool_connections=30,
    )
    with _session_lock:
        if region not in _sessions:  # one for all clients, because each reads AWS's descriptions anew
            _sessions[region] = boto3.session.Session(region_name=region)
        return _sessions[region].client(service, config=config)


def error_code(error: Exception) -> str:
    """The AWS error code (`AccessDenied`, ...) of a botocore ClientError, also of one that made an upload fail.

    "" for any other error.
    """
    from boto3.exceptions import S3UploadFailedError

    cause = error.__context__ if isinstance(error, S3UploadFailedError) else error
    response = getattr(cause, "response", None)
    return str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""


class QueueDepth(NamedTuple):
    """SQS's approximate counts: messages waiting, and messages some worker holds."""

    visible: int
    in_flight: int


def queue_depth(sqs: Any, queue_url: str) -> QueueDepth:
    """Ask SQS how many messages there are. The counts lag by up to a minute."""
    names = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"]
    values = sqs.get_queue_attributes(QueueUrl=queue_url, AttributeNames=names)["Attributes"]
    return QueueDepth(*(int(values[name]) for name in names))


def desired_capacity(
    depth: QueueDepth, *, backlog_per_instance: int, min_instances: int, max_instances: int, long_jobs: int = 0
) -> int:
    """How many instances the queue calls for.

    ceil(visible / backlog) + long_jobs, at least one while anything waits or runs, within the limits. A running job
    has its worker, and one that will soon take the next; but each of the `long_jobs` among them keeps a whole worker
    from those that wait. Only workers know of long jobs, senders say 0. Pure, so that equal answers make duplicate
    calls harmless. tests/bench/bench_scaling.py measures the formula against others.
    """
    wanted = math.ceil(depth.visible / backlog_per_instance) + min(long_jobs, depth.in_flight)
    if depth.visible or depth.in_flight:
        wanted = max(wanted, 1)
    return max(min_instances, min(wanted, max_instances))


class Group(NamedTuple):
    """What scaling needs to know of an Auto Scaling group."""

    desired: int
    min_size: int
    max_size: int
    in_service: list[str]
    """Ids of the instances that are in service, so neither booting nor on their way out."""
    outdated: tuple[str, ...] = ()
    """Those among them that were launched from an earlier template version than the group's tag comfy-version names."""


def read_group(autoscaling: Any, asg_name: str) -> Group | None:
    """Ask AWS how the group stands; None where there is no such group."""
    answer = autoscaling.describe_auto_scaling_groups(AutoScalingGroupNames=[asg_name])
    for group in answer["AutoScalingGroups"]:
        there = [item for item in group["Instances"] if item["LifecycleState"] == "InService"]
        # create_env.sh sets the tag last, and its version numbers only grow, also with --rollback.
        version = next((tag["Value"] for tag in group.get("Tags", []) if tag["Key"] == VERSION_TAG), "0")
        outdated = [
            item["InstanceId"]
            for item in there
            if int(item.get("LaunchTemplate", {}).get("Version", version)) < int(version)
        ]
        in_service = [item["InstanceId"] for item in there]
        return Group(group["DesiredCapacity"], group["MinSize"], group["MaxSize"], in_service, tuple(outdated))
    return None


class Capacity(NamedTuple):
    """The group's desired capacity before a look at it, and after; `missing` of its instances are not in service.

    `group` is how it stood when it was looked at.
    """

    before: int
    after: int
    missing: int
    group: Group


def raise_capacity(
    autoscaling: Any, asg_name: str, depth: QueueDepth, backlog_per_instance: int, long_jobs: int = 0
) -> Capacity | None:
    """Raise the group's desired capacity to what the queue calls for; never lower it.

    Returns None where there is no such group. One absolute step without cooldown, decided on a desired capacity
    that was read just before it; a failed read raises and changes nothing.
    """
    group = read_group(autoscaling, asg_name)
    if group is None:
        return None
    wanted = desired_capacity(
        depth,
        backlog_per_instance=backlog_per_instance,
        min_instances=group.min_size,
        max_instances=group.max_size,
        long_jobs=long_jobs,
    )
    if wanted > group.desired:
        autoscaling.set_desired_capacity(AutoScalingGroupName=asg_name, DesiredCapacity=wanted, HonorCooldown=False)
    after = max(wanted, group.desired)
    return Capacity(group.desired, after, missing=after - len(group.in_service), group=group)


LAUNCH_FAILURE_AGE_S = 900
"""Seconds after which a failed launch says nothing about now."""

# What AWS says in a failed launch's StatusMessage (EC2 Auto Scaling user guide, "Troubleshoot", and RunInstances'
# error messages), and what we say. The first match wins.
_LAUNCH_FAILURES = (
    (
        r"sufficient (?P<type>\S+) capacity in the Availability Zone you requested \((?P<zone>[\w-]+)\)",
        "AWS has no {type} free in {zone} just now: it is tried again by itself; "
        "more types in INSTANCE_TYPES find room sooner",
    ),
    (
        r"vCPU limit of (?P<limit>\d+)",
        "the account's quota of {limit} vCPUs leaves no room for another instance: raise 'Running On-Demand "
        "G and VT instances' (for a type g…; other types have quotas of their own) in Service Quotas",
    ),
    (
        r"max ?spot ?instance ?count ?exceeded",
        "the account's quota for spot instances is used up: raise 'All G and VT Spot Instance Requests' "
        "(for a type g…; other types have quotas of their own) in Service Quotas",
    ),
    (
        r"no spot capacity available|spot instances\..*(?:UnfulfillableCapacity|InsufficientInstanceCapacity)",
        "AWS has no spot instance of this kind free just now: it is tried again by itself; "
        "more types in INSTANCE_TYPES find room sooner",
    ),
    (
        r"UnfulfillableCapacity|InsufficientInstanceCapacity|unable to fulfill capacity|sufficient \S+ capacity",
        "AWS has no instance of this kind free just now: it is tried again by itself; "
        "more types in INSTANCE_TYPES find room sooner",
    ),
    (
        r"instance type \((?P<type>[\w.-]+)\) is not supported in your requested Availability Zone \((?P<zone>[\w-]+)\)",
        "there is no {type} in {zone}: other zones are tried by themselves; "
        "more types in INSTANCE_TYPES find room sooner",
    ),
    (
        r"is pending, and cannot be run|InvalidAMIID\.Unavailable|image id '\S+' is not available",
        "the image is not ready yet: instances start by themselves once it is, some minutes after create_env.sh",
    ),
    (
        r"(?:image|AMI) id \W*(?P<image>ami-\w+)\W* does not exist",
        "the fleet's image {image} does not exist any more: run create_env.sh again",
    ),
    (
        r"Client\.InternalError",
        "an instance ended as it started, most likely because its disk's key is refused: "
        "let the role AWSServiceRoleForAutoScaling use the KMS key",
    ),
    (
        r"launch template|instance ?profile|security group\b.* does not exist|key pair\b.* does not exist|subnet\b.* does not exist",
        "AWS cannot launch what the launch template says ({words}): run create_env.sh again",
    ),
)


def explain_launch_failure(message: str) -> str:
    """Why a launch failed and what helps, in one sentence, from its scaling activity's StatusMessage.

    Where the reason is not known it is AWS's own first sentence.
    """
    words = re.sub(r"^Could not launch [\w-]+ Instances\.\s+", "", " ".join(message.split()))
    words = re.split(r"\.\s|\.$", words)[0][:300]
    for pattern, sentence in _LAUNCH_FAILURES:
        if match := re.search(pattern, message, re.IGNORECASE):
            return sentence.format(**match.groupdict(), words=words)
    return f"AWS launches no instance: {words}"


def capacity_problem(autoscaling: Any, asg_name: str) -> str | None:
    """Why instances that are wanted do not come, in one sentence with the remedy; None where nothing is known.

    The newest launch decides that failed or got its instance, unless it was LAUNCH_FAILURE_AGE_S ago; one that
    has only begun says nothing yet. Raises what boto3 raises, also where DescribeScalingActivities is refused.
    """
    answer = autoscaling.describe_scaling_activities(AutoScalingGroupName=asg_name, MaxRecords=20)
    since = datetime.now(UTC) - timedelta(seconds=LAUNCH_FAILURE_AGE_S)
    decided = [
        activity
        for activity in answer["Activities"]
        if activity["StartTime"] >= since
        and activity.get("Description", "").startswith("Launching a new EC2 instance")
        and (activity["StatusCode"] in ("Failed", "Cancelled") or ": i-" in activity["Description"])
    ]
    newest = max(decided, key=lambda activity: activity["StartTime"], default=None)
    if newest is None or newest["StatusCode"] not in ("Failed", "Cancelled"):
        return None
    # A launch that was cancelled because nobody wants the instance any more carries no message.
    return explain_launch_failure(newest["StatusMessage"]) if newest.get("StatusMessage") else None


# --- ComfyUI ---------------------------------------------------------------------------------------------


class ComfyGoneError(Exception):
    """ComfyUI does not answer, or has lost the job by a restart: worth another try."""


class ComfySlowError(ComfyGoneError):
    """ComfyUI took the call but does not answer in time: a node may keep its whole interpreter busy."""


class ComfyStalledError(ComfyGoneError):
    """ComfyUI answers but nothing moves: its executor is dead, and only a restart helps."""


class WorkflowRefusedError(Exception):
    """ComfyUI refused the workflow; carries the `error` of the result."""

    def __init__(self, error: dict[str, Any]) -> None:
        super().__init__(error["message"])
        self.error = error


class JobTimeoutError(Exception):
    """The job ran longer than it may; it has been interrupted."""


class JobStoppedError(Exception):
    """The caller asked to stop; the job has been interrupted."""


class JobCancelledError(JobStoppedError):
    """The job's sender has cancelled it. A `should_stop` raises it, and `run` interrupts the job as for any stop."""


class Finished(NamedTuple):
    """A job that ended: its history entry, and what was said besides.

    `node_errors` are those of branches dropped when it was accepted. `blocked` is the text of an
    `execution_error` although the history says success: an ExecutionBlocker held a branch back.
    """

    entry: dict[str, Any]
    node_errors: dict[str, Any]
    blocked: str | None


class OutputFile(NamedTuple):
    """A file as the history names it; `kind` is the key it stood under (images, gifs, audio, ...)."""

    node_id: str
    kind: str
    filename: str
    subfolder: str
    type: str


class ComfyUI:
    """A ComfyUI server. Its history decides what became of a job; the websocket is for progress and speed.

    Several threads may run jobs at the same time: the server runs them one after the other, and one websocket
    tells of all of them.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self._session: Any = None
        self._line: _Line | None = None
        self._line_lock = threading.Lock()

    def is_ready(self) -> bool:
        """Whether the server answers."""
        try:
            return bool(self._call("GET", "/system_stats").status_code == 200)
        except ComfyGoneError:
            return False

    def run(
        self,
        workflow: Workflow,
        prompt_id: str,
        *,
        timeout_s: float,
        stall_s: float = math.inf,
        on_progress: Callable[[dict[str, Any]], None] = lambda _: None,
        should_stop: Callable[[], bool] = lambda: False,
        should_withdraw: Callable[[], bool] = lambda: False,
        before_first_submit: Callable[[], None] = lambda: None,
        again: bool = False,
    ) -> Finished:
        """Run a workflow to its end and return its history entry.

        A job with this id that the server already has is adopted, not run twice, unless `again` says
        that its end is known and it is to run once more. One that was interrupted before we came had been
        given back to be run again, and is. `before_first_submit` is called where the server knows nothing of
        the job, so that nothing in its cache names a file of an earlier try. `on_progress` hears its events, the
        first being `execution_start`: behind other jobs it may wait for long, and neither runs out of time nor
        stalls. `should_stop` is asked every second, `should_withdraw` as long as it has not started. Raises
        WorkflowRefusedError, ComfyGoneError, ComfyStalledError (no event for `stall_s` while it is said to run),
        JobTimeoutError and JobStoppedError (both after interrupting the job or taking it out of the queue).
        """
        watch = _Watch(prompt_id, timeout_s, stall_s, on_progress, should_stop, should_withdraw)
        node_errors: dict[str, Any] = {}
        try:
            known = again or self.history(prompt_id) is not None or self.place(prompt_id) is not None
            entry = self._await_end(watch) if known and not again else None
            if not known:
                before_first_submit()
            if entry is None or _is_interrupted(entry):
                if should_stop() or should_withdraw():
                    raise JobStoppedError
                watch.line = self._listen(watch)
                with suppress(ComfySlowError):  # whether it was accepted, history and queue will tell
                    watch.number, node_errors = self._submit(workflow, prompt_id, watch.line.client_id)
                entry = self._await_end(watch)
                if watch.number is None and _is_interrupted(entry):
                    raise ComfyGoneError(f"ComfyUI on {self.address} has not taken the job")
        except (JobTimeoutError, JobStoppedError):
            self.cancel(prompt_id)
            raise
        finally:
            if watch.line is not None:
                watch.line.watches.pop(prompt_id, None)
        return Finished(entry, node_errors, watch.error_event if error_of(entry) is None else None)

    def history(self, prompt_id: str) -> dict[str, Any] | None:
        """The job's history entry; None while it is pending, running or unknown."""
        entry = self._json("GET", f"/history/{prompt_id}").get(prompt_id)
        return entry if isinstance(entry, dict) else None

    def place(self, prompt_id: str) -> str | None:
        """Where the job stands in the queue: "running", "pending", or None."""
        queue = self._json("GET", "/queue")
        for place in ("running", "pending"):
            if any(item[1] == prompt_id for item in queue[f"queue_{place}"]):
                return place
        return None

    def cancel(self, prompt_id: str) -> None:
        """Take the job out of the queue, or interrupt it if it runs. Best effort; no other job is touched."""
        with suppress(ComfyGoneError):
            self._call("POST", "/queue", {"delete": [prompt_id]})
            if self.place(prompt_id) == "running":  # asked, because old servers interrupt whatever runs
                self._call("POST", "/interrupt", {"prompt_id": prompt_id})

    def _withdraw(self, watch: _Watch) -> None:
        """Take the job out of the queue and raise JobStoppedError, unless it has started just now."""
        with suppress(ComfyGoneError):
            self._call("POST", "/queue", {"delete": [watch.prompt_id]})
            if self.place(watch.prompt_id) is not None or self.history(watch.prompt_id) is not None:
                watch.note_start()
                return
        raise JobStoppedError

    def free(self) -> None:
        """Ask the server to unload models and free memory before the next job."""
        self._call("POST", "/free", {"unload_models": True, "free_memory": True})

    def object_info(self) -> dict[str, Any]:
        """Every installed node class with its inputs, and the installed models as their allowed values."""
        return self._json("GET", "/object_info", timeout_s=60)

    def download(self, file: OutputFile, target: Path) -> None:
        """Save a file the server made."""
        query = {"filename": file.filename, "subfolder": file.subfolder, "type": file.type}
        with self._call("GET", "/view", params=query, stream=True) as answer:
            if answer.status_code != 200:
                raise ComfyGoneError(
                    f"ComfyUI on {self.address} does not have {file.filename} (HTTP {answer.status_code})"
                )
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("wb") as out:
                for chunk in answer.iter_content(1 << 20):
                    out.write(chunk)

    def _submit(self, workflow: Workflow, prompt_id: str, client_id: str) -> tuple[Any, dict[str, Any]]:
        body = {"prompt": workflow, "prompt_id": prompt_id, "client_id": client_id}
        answer = self._call("POST", "/prompt", body, timeout_s=60)
        if answer.status_code == 200:
            accepted = answer.json()
            if accepted.get("prompt_id") != prompt_id:
                raise ComfyGoneError(f"ComfyUI gave the job another id than {prompt_id}: it is too old")
            return accepted["number"], accepted.get("node_errors") or {}
        if answer.status_code == 400:
            raise WorkflowRefusedError(refusal_of(answer.json()))
        if answer.status_code > 500:
            raise ComfyGoneError(f"ComfyUI on {self.address} answered HTTP {answer.status_code}")
        message = f"ComfyUI answered HTTP {answer.status_code} to this workflow: export it with Save (API Format)"
        raise WorkflowRefusedError(job_error("invalid_workflow", message, detail=answer.text[:4096]))

    def _await_end(self, watch: _Watch) -> dict[str, Any]:
        """Wait for the history entry of the run being watched."""
        while True:
            watch.check()
            if not watch.has_started and watch.should_withdraw():
                self._withdraw(watch)
            if not watch.has_news():
                continue
            try:
                entry = self.history(watch.prompt_id)
                if entry is not None and watch.number is not None and entry["prompt"][0] == watch.number:
                    return entry
                # First the queue, then the history: a job that has left the one is in the other already.
                place = self.place(watch.prompt_id)
                if place is None:
                    entry = self.history(watch.prompt_id)
            except ComfySlowError:
                continue
            if place is not None:
                watch.note_place(place)
            elif entry is not None and watch.number in (None, entry["prompt"][0]):
                return entry
            else:
                raise ComfyGoneError(f"ComfyUI on {self.address} no longer has the job: it was restarted")

    def _listen(self, watch: _Watch) -> _Line:
        """The websocket, opened anew where it has died, which from now on tells the watch of its job."""
        import websocket

        with self._line_lock:
            if self._line is None or not self._line.watch(watch):
                client_id = new_job_id()  # a fresh one: the server may forget a second socket of the same id
                try:
                    socket = websocket.create_connection(
                        f"ws://{self.address}/ws?clientId={client_id}",
                        timeout=10,
                        skip_utf8_validation=True,  # json does it, and in no time
                    )
                except (websocket.WebSocketException, OSError) as error:
                    raise ComfyGoneError(f"ComfyUI on {self.address} does not answer: {error}") from error
                socket.settimeout(None)
                self._line = _Line(socket, client_id)
                self._line.watch(watch)
            return self._line

    def _json(self, method: str, path: str, timeout_s: float = 10) -> dict[str, Any]:
        answer = self._call(method, path, timeout_s=timeout_s)
        try:
            value = answer.json() if answer.status_code == 200 else None
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise ComfyGoneError(f"ComfyUI on {self.address} answered HTTP {answer.status_code} to {path}")
        return value

    def _call(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        params: Mapping[str, str] | None = None,
        timeout_s: float = 10,
        stream: bool = False,
    ) -> Any:
        import requests

        if self._session is None:
            self._session = requests.Session()
            self._session.trust_env = False  # ComfyUI is never behind a proxy
        try:
            return self._session.request(
                method,
                f"http://{self.address}{path}",
                json=body,
                params=params,
                timeout=(5, timeout_s),
                stream=stream,
            )
        except requests.ReadTimeout as error:
            raise ComfySlowError(f"ComfyUI on {self.address} has not answered in {timeout_s:.0f} s") from error
        except requests.RequestException as error:
            raise ComfyGoneError(f"ComfyUI on {self.address} does not answer: {error}") from error


SILENCE_S = 2.0
"""Seconds without news of a job after which history and queue are asked."""
QUEUED_SILENCE_S = 10.0
"""The same of one that stands in the queue: there may be many, and each question costs the one that runs."""
LAST_WORD_S = 0.05
"""So long after a job's last event comes the word that its history is written."""


class _Line:
    """One websocket and the thread that reads it, always, because a server waits for a client that does not."""

    def __init__(self, socket: Any, client_id: str) -> None:
        self.client_id = client_id
        self.watches: dict[str, _Watch] = {}
        self._socket = socket
        self._is_open = True
        self._lock = threading.Lock()
        threading.Thread(target=self._read, name="websocket", daemon=True).start()

    def watch(self, watch: _Watch) -> bool:
        """Tell the watch of its job from now on; False where the line is dead."""
        with self._lock:
            if self._is_open:
                self.watches[watch.prompt_id] = watch
            return self._is_open

    def _read(self) -> None:
        import websocket

        try:
            while True:
                frame = self._socket.recv()
                if isinstance(frame, str) and frame:  # bytes are previews
                    event: dict[str, Any] = json.loads(frame)
                    watch = self.watches.get(event.get("data", {}).get("prompt_id"))
                    if watch is not None:
                        watch.events.put(event)
        except (websocket.WebSocketException, OSError, ValueError, AttributeError):
            pass  # what it would have told history and queue tell, too
        with self._lock:
            self._is_open = False
        for watch in list(self.watches.values()):
            watch.events.put(None)
        with suppress(websocket.WebSocketException, OSError):
            self._socket.close()


class _Watch:
    """One run of a job, as far as its websocket tells of it."""

    def __init__(
        self,
        prompt_id: str,
        timeout_s: float,
        stall_s: float,
        on_progress: Callable[[dict[str, Any]], None],
        should_stop: Callable[[], bool],
        should_withdraw: Callable[[], bool],
    ) -> None:
        import queue

        self.prompt_id = prompt_id
        self.timeout_s = timeout_s
        self.stall_s = stall_s
        self.on_progress = on_progress
        self.should_stop = should_stop
        self.should_withdraw = should_withdraw
        self.events: Any = queue.SimpleQueue()  # None: the line is dead
        self.line: _Line | None = None  # None: it died, or the job was adopted; then only history and queue tell
        self.number: Any = None  # the run's number in the history; None: any run will do
        self.error_event: str | None = None
        self.has_started = False
        self._ended = False
        self._ended_at = 0.0
        self._started = self._asked = self._moved = time.monotonic()

    def check(self) -> None:
        """Raise what ends the watch: a stop, the time limit, a stall."""
        now = time.monotonic()
        if self.should_stop():
            raise JobStoppedError
        if self.has_started and now > self._started + self.timeout_s:
            raise JobTimeoutError
        if self.line is not None and self.has_started and now > self._moved + self.stall_s:
            raise ComfyStalledError(f"ComfyUI has said nothing of the running job for {self.stall_s:.0f} s")

    def note_start(self) -> None:
        """Take in that the job runs: from now on it may run out of time, and stall."""
        if not self.has_started:
            self.has_started = True
            self._started = self._moved = time.monotonic()
            self.on_progress({"type": "execution_start", "data": {"prompt_id": self.prompt_id}})

    def note_place(self, place: str) -> None:
        """Take in that the job is still in the queue."""
        if place == "running":
            self.note_start()
        if time.monotonic() > self._ended_at + SILENCE_S:  # the error of an ExecutionBlocker does not end the run
            self._ended = False

    def has_news(self) -> bool:
        """Wait for an event, up to a second, and say whether history and queue are to be asked."""
        import queue

        is_over = False
        if self.line is None:
            time.sleep(0.2)
            is_over = True
        else:
            try:
                event = self.events.get(timeout=LAST_WORD_S if self._ended else 1 if self.has_started else 0.2)
            except queue.Empty:
                is_over = self._ended
            else:
                if event is None:
                    self.line = None
                    return False
                self._moved = time.monotonic()
                # Said of failures, too, and only once the history is written: it is time to ask.
                is_over = event["type"] == "executing" and event["data"].get("node") is None
                self._take(event)
        is_queued = self.number is not None and not self.has_started
        if is_over or time.monotonic() > self._asked + (QUEUED_SILENCE_S if is_queued else SILENCE_S):
            self._asked = time.monotonic()
            return True
        return False

    def _take(self, event: dict[str, Any]) -> None:
        self.note_start()
        if event["type"] in ("executing", "progress", "progress_state"):
            self.on_progress(event)
        elif event["type"] in ("execution_success", "execution_error", "execution_interrupted"):
            self._ended = True
            self._ended_at = time.monotonic()
            if event["type"] == "execution_error":
                data = event["data"]
                self.error_event = (
                    f"node {data.get('node_id')} {data.get('node_type')}: {data.get('exception_message')}"
                )


def _is_interrupted(entry: Mapping[str, Any]) -> bool:
    return (error_of(entry) or {}).get("kind") == "interrupted"


def error_of(entry: Mapping[str, Any]) -> dict[str, Any] | None:
    """The `error` of a job's result, read from its history entry; None for a success."""
    status = entry.get("status") or {}
    if status.get("status_str") == "success":
        return None
    for name, data in reversed(status.get("messages") or []):
        if name == "execution_error":
            node_id, node_type = data.get("node_id"), data.get("node_type")
            exception = str(data.get("exception_type", ""))
            kind = "out_of_memory" if exception.endswith("OutOfMemoryError") else "execution_error"
            message = f"node {node_id} {node_type}: {str(data.get('exception_message', '')).strip() or exception}"
            detail = f"{exception}\n{''.join(data.get('traceback') or [])}"
            return job_error(kind, message, node_id=node_id, node_type=node_type, detail=detail[-4096:])
        if name == "execution_interrupted":
            node_id, node_type = data.get("node_id"), data.get("node_type")
            message = f"interrupted at node {node_id} {node_type}"
            return job_error("interrupted", message, node_id=node_id, node_type=node_type)
    return job_error(
        "execution_error", f"ComfyUI's history calls the job {status.get('status_str')!r} without a reason"
    )


def refusal_of(answer: Mapping[str, Any]) -> dict[str, Any]:
    """The `error` of a job's result, read from ComfyUI's 400 answer to POST /prompt."""
    error, node_errors = answer.get("error") or {}, answer.get("node_errors") or {}
    if not isinstance(error, dict):
        error = {"message": str(error)}
    reasons = explain_node_errors(node_errors)
    if not reasons:
        reasons = [" ".join(str(error[key]) for key in ("message", "details") if error.get(key))]
    return job_error("invalid_workflow", "; ".join(reasons), node_errors=node_errors, detail=error.get("type"))


def explain_node_errors(node_errors: Mapping[str, Any]) -> list[str]:
    """One sentence for each thing ComfyUI found wrong, such as
    "node 4 CheckpointLoaderSimple: ckpt_name 'x' is not installed, have: a, b"."""
    sentences = []
    for node_id, node in node_errors.items():
        for error in node.get("errors", []):
            info = error.get("extra_info") or {}
            name = info.get("input_name", "")
            if error.get("type") == "value_not_in_list":
                allowed = (info.get("input_config") or [[]])[0]
                have = ", ".join(map(str, allowed)) if isinstance(allowed, list) and allowed else "none"
                text = f"{name} {info.get('received_value')!r} is not installed, have: {have:.400}"
            else:
                text = " ".join(str(error[key]) for key in ("message", "details") if error.get(key))
            sentences.append(f"node {node_id} {node.get('class_type')}: {text}")
    return sentences


def job_error(
    kind: str,
    message: str,
    *,
    node_id: str | None = None,
    node_type: str | None = None,
    node_errors: Mapping[str, Any] | None = None,
    detail: str | None = None,
) -> dict[str, Any]:
    """The `error` of a result: its kind, one sentence for people, and what is known besides."""
    return {
        "kind": kind,
        "message": message,
        "node_id": node_id,
        "node_type": node_type,
        "node_errors": dict(node_errors or {}),
        "detail": detail,
    }


def outputs_of(entry: Mapping[str, Any]) -> tuple[list[OutputFile], dict[str, dict[str, Any]]]:
    """The files a history entry names, and node id -> values that are not files (text, numbers).

    An item is a file only if it is a dict with a filename; items may also be booleans, strings or
    null. `animated: [true]` only describes the files beside it.
    """
    files: list[OutputFile] = []
    values: dict[str, dict[str, Any]] = {}
    for node_id, output in (entry.get("outputs") or {}).items():
        for kind, items in output.items():
            rest = []
            for item in items if isinstance(items, list) else [items]:
                if isinstance(item, dict) and isinstance(item.get("filename"), str):
                    subfolder, type_ = str(item.get("subfolder") or ""), str(item.get("type") or "output")
                    files.append(OutputFile(node_id, kind, item["filename"], subfolder, type_))
                else:
                    rest.append(item)
            if rest and kind != "animated":
                values.setdefault(node_id, {})[kind] = rest
    return files, values
