"""What sender and worker share: settings, workflows and messages, words for a terminal, AWS, capacity.

Importing this module costs nothing: boto3, requests and websocket-client are imported where they are
used. The formats are described in docs/jobs.md and docs/results.md.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple, NotRequired, TypedDict, TypeVar

T = TypeVar("T")
Workflow = dict[str, dict[str, Any]]
"""An API-format workflow: node id -> {"class_type", "inputs", ...}."""

HERE = Path(__file__).resolve().parent
LAUNCHING_HOOK_NAME = "comfy-launching"
HOOK_NAME = "comfy-terminating"
"""The termination lifecycle hook that create_env.sh makes with the group."""
VERSION_TAG = "comfy-version"
FAILED_BOOTS_TAG = "comfy-failed-boots"
"""The tag in which create_env.sh tells the group's instances which version of the launch template counts."""

MAX_MESSAGE_BYTES = 1024 * 1024
"""SQS refuses a larger message; a larger workflow travels by the bucket."""
MAX_INPUTS = 100
MAX_LEVELS = 100
"""A message or workflow nested deeper is refused: ComfyUI copies it by a recursion, which would end its executor."""
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
_PORT = r"(?:[0-9]{1,4}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5])"
_REGION = r"[a-z]{2}(-[a-z]+)+-[0-9]"
ADDRESS = rf"[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?:{_PORT}"
"""A HOST:PORT at which ComfyUI may answer, as a pattern."""

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
    """Read the settings from the process environment and a file: `path`, or the one that COMFY_SETTINGS names, or else
    `env` beside this module, if it is there.

    The process environment wins over the file, and `env` (the environment's name) over both. REGION may come from
    AWS_REGION or AWS_DEFAULT_REGION, and ACCOUNT_ID, where a name needs it, from AWS, which is asked once in a process.
    Raises SettingsError, which names all that is missing or wrong at once.
    """
    fixed = dict(os.environ if environ is None else environ)
    if env is not None:
        fixed["ENV"] = env
    if path is None and fixed.get("COMFY_SETTINGS"):
        path = Path(fixed["COMFY_SETTINGS"])
    beside = HERE / "env"
    if path is None and beside.exists() and not beside.is_dir():  # a folder is somebody's virtual environment
        path = beside
    place = str(path) if path else f"the process environment (or in {beside}, or in a file that COMFY_SETTINGS names)"
    lines = list(_read_env_file(path)) if path else []
    # Empty is as good as missing.
    known = {name: value for name, value in fixed.items() if value or name not in FROM_AWS}
    lines = [(name, raw) for name, raw in lines if raw or name not in FROM_AWS]
    unset = FROM_AWS - known.keys() - dict(lines).keys()
    if "REGION" in unset:
        known["REGION"] = fixed.get("AWS_REGION") or fixed.get("AWS_DEFAULT_REGION") or ""
    if "ACCOUNT_ID" in unset:
        known["ACCOUNT_ID"] = UNASKED
    values = {name: known[name] for name in FROM_AWS & known.keys()}
    home = {"COMFY_HOME": _DEFAULTS["COMFY_HOME"]}  # other settings may refer to it
    for name, raw in [*lines, *_DEFAULTS.items()]:
        if name not in values:
            values[name] = known[name] if name in known else _expand(name, raw, home | known | values, place)
    if _needs_account(values) and re.fullmatch(_REGION, values["REGION"]):
        account = _ask_for_account(values["REGION"], place)
        values = {name: value.replace(UNASKED, account) for name, value in values.items()}
    return _check(values, place)


FROM_AWS = frozenset(("ACCOUNT_ID", "REGION"))
"""The settings that have no default, but may come from AWS."""
UNASKED = "${ACCOUNT_ID}"
"""Stands for the account until AWS is asked for it, which needs the region."""


def _needs_account(values: Mapping[str, str]) -> bool:
    """Whether AWS is to be asked: only where a name has the account in it."""
    return any(UNASKED in value for name, value in values.items() if name != "ACCOUNT_ID")


def _ask_for_account(region: str, place: str) -> str:
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        return account_of_credentials(region)
    except (BotoCoreError, ClientError) as error:
        raise SettingsError(
            f"ACCOUNT_ID is not set, and AWS does not say whose the credentials are ({printable(str(error))}): "
            f"set it in {place} to your account's 12 digits"
        ) from error


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


def _expand(name: str, raw: str, known: Mapping[str, str], place: str) -> str:
    def value_of(match: re.Match[str]) -> str:
        if match[1] not in known:
            raise SettingsError(f"{name} uses ${{{match[1]}}}, which is not set: set it in {place}, above")
        return known[match[1]]

    return _REFERENCE.sub(value_of, raw)


def _check(values: Mapping[str, str], place: str) -> Settings:
    wrong: list[str] = []

    def text(name: str, pattern: str, allowed: str) -> str:
        value = values[name]
        if not re.fullmatch(pattern, value):
            wrong.append(f"{name}={value!r} cannot be used: set it in {place} to {allowed}")
        return value

    def number(name: str, low: int, high: int) -> int:
        value = values[name]
        if re.fullmatch(r"[0-9]{1,9}", value) and low <= int(value) <= high:
            return int(value)
        wrong.append(f"{name}={value!r} cannot be used: set it in {place} to a number from {low} to {high}")
        return low

    prefix = text("PREFIX", _NAME.pattern, "lowercase letters, digits and hyphens")
    env = text("ENV", _NAME.pattern, "lowercase letters, digits and hyphens")
    if values["REGION"]:
        text("REGION", _REGION, "a region such as us-west-2")
    else:
        wrong.append(f"REGION is not set: set it, or AWS_REGION, in {place} to a region such as us-west-2")
    if values["ACCOUNT_ID"] != UNASKED:
        text("ACCOUNT_ID", r"[0-9]{12}", "your account's 12 digits")
    elif _needs_account(values):
        wrong.append(f"ACCOUNT_ID is not set, and AWS cannot be asked without a region: set either in {place}")
    names_are_checked = not wrong  # else theirs would be the same mistakes again

    def name_of(name: str, pattern: str, allowed: str) -> str:
        return text(name, pattern, allowed) if names_are_checked else ""

    settings = Settings(
        prefix=prefix,
        env=env,
        region=values["REGION"],
        s3_bucket=name_of("S3_BUCKET", r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", "a bucket name of 3 to 63 characters"),
        sqs_name=name_of("SQS_NAME", r"[A-Za-z0-9_-]{1,76}", "a queue name of up to 76 letters, digits, - and _"),
        asg_name=name_of("ASG_NAME", r"[A-Za-z0-9_-]{1,100}", "a group name of up to 100 letters, digits, - and _"),
        backlogsize_per_instance=number("BACKLOGSIZE_PER_INSTANCE", 1, 100_000),
        scale_cooldown_s=number("SCALE_COOLDOWN", 0, 86_400),
        comfy_home=Path(text("COMFY_HOME", r"/.*", "an absolute folder")),
        comfy_address=text("COMFY_ADDRESS", ADDRESS, "HOST:PORT"),
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
    if wrong:
        raise SettingsError("; ".join(wrong))
    return settings


# --- Messages --------------------------------------------------------------------------------------------


class InvalidMessageError(Exception):
    """A message that is no job; the text says why, and what to send instead.

    `job_id` and `callback_url` are set as far as the message has usable ones, so that its sender hears of it.
    """

    job_id: str | None = None
    callback_url: str | None = None


class InvalidWorkflowError(InvalidMessageError):
    """A workflow that cannot be sent to ComfyUI; the text says why, and what to do."""


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
    input_name: str | None = None

    @classmethod
    def of(
        cls, node_id: str, node: dict[str, Any], text: str, remedy: str, certain: bool = True, name: str | None = None
    ) -> Problem:
        """A problem with a node, or with its input `name`, under the title that the node has in the workflow."""
        meta = node.get("_meta")
        title = meta.get("title") if isinstance(meta, dict) else None
        return cls(node_id, title or node["class_type"], text, remedy, certain, name)

    def __str__(self) -> str:
        node = f"node {self.node_id} {self.title}: " if self.node_id else ""
        return f"{node}{self.text}: {self.remedy}"


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
    extra_data: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """What ComfyUI gets beside the workflow, keys for API nodes among it: never to be shown or stored."""
    source: str | None = None
    """s3://bucket/key of the file whose arrival, told by S3, is this job."""
    retry_of: str | None = None
    """The id of the dead job that was sent again as this one."""
    live: bool | Literal["when watched"] = False
    """Somebody follows each of its steps, or may say so by `watched_key`: files are stored while it runs, and
    progress.json is written twice a second and not every five once somebody does."""
    warnings: tuple[str, ...] = ()
    """What stands in the message and is not used."""


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


def progress_key(job_id: str) -> str:
    """The S3 key of what is known of a job while it runs."""
    return f"output/{job_id}/progress.json"


def attempts_key(job_id: str) -> str:
    """The S3 key of what is known of a job's attempts that did not end."""
    return f"output/{job_id}/attempts.json"


def cancel_key(job_id: str) -> str:
    """The S3 key of the empty object that cancels a job."""
    return f"input/jobs/{job_id}.cancel"


def watched_key(job_id: str) -> str:
    """The S3 key of the empty object that says of a job which is live when watched that somebody watches it."""
    return f"input/jobs/{job_id}.watched"


ENDED = "input/jobs/ended/"
"""Below it lies an empty object for each job that has its receipt, whose name begins with the time: a listing from the
last one that is known gives the news, however many jobs there are. Without .json, which S3's trigger would take."""
_ENDED = re.compile(re.escape(ENDED) + r"(\d{13})-([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})")


def ended_key(ended_ms: int, job_id: str = "") -> str:
    """The S3 key that lists a job among the ended ones; without an id what sorts before all of that time."""
    return f"{ENDED}{ended_ms:013d}-{job_id}"


def parse_ended_key(key: str) -> tuple[int, str] | None:
    """When which job ended, in milliseconds; None for a key of another kind."""
    match = _ENDED.fullmatch(key)
    return (int(match[1]), match[2]) if match else None


EXPORT = "export it with Export (API), which older editors call Save (API Format)"


def check_workflow(workflow: object) -> Workflow:
    """Return `workflow` if it has the API format and can be sent, else raise InvalidWorkflowError.

    Left out is only an `is_changed` that is no number: a remark of ComfyUI's own, which it writes into the workflow
    that pictures carry, and which its editor leaves out as well (Comfy-Org/ComfyUI issues 6915 and 8548).
    """
    if not isinstance(workflow, dict) or not any(map(is_node, workflow.values())):
        raise InvalidWorkflowError(explain_no_workflow(workflow))
    checked: Workflow = {}
    for node_id, node in workflow.items():
        if not is_node(node):
            remedy = f"take it out, or {EXPORT}"
            if node_id in KNOWN_KEYS:
                remedy = f'send {{"prompt": the workflow, "{node_id}": …}}'
            raise InvalidWorkflowError(f"{node_id!r:.40} is no node, as it has no class_type: {remedy}")
        if not is_text(str(node_id)):
            raise InvalidWorkflowError(f"the id of node {node_id!r:.40} has half a character in it: write it anew")
        if not isinstance(node.get("inputs", {}), dict):
            raise InvalidWorkflowError(f"the inputs of node {node_id!r:.40} are not an object: {EXPORT}")
        if "is_changed" in node and _find_unsendable(node["is_changed"]):
            node = {name: value for name, value in node.items() if name != "is_changed"}  # noqa: PLW2901
        if found := _find_unsendable(node):
            place, what = found
            is_input = len(place) > 1 and place[0] == "inputs"
            where = f"its input {place[1]}" if is_input else f"its {place[0]}" if place else "it"
            raise InvalidWorkflowError(f"node {node_id!s:.40} {node['class_type']:.80}: {where:.100} {what}")
        checked[node_id] = node
    return checked


def check_extra_data(extra_data: object) -> dict[str, Any]:
    """Return what is to go beside a workflow to ComfyUI, else raise InvalidMessageError, which shows nothing of it."""
    if extra_data is None:
        return {}
    if not isinstance(extra_data, dict):
        raise InvalidMessageError('extra_data is no object: send one, such as {"extra_pnginfo": {…}}')
    if found := _find_unsendable(extra_data):
        place, what = found
        raise InvalidMessageError(f"extra_data: {'.'.join(place[:4]):.100} {what}")
    return extra_data


def is_node(node: object) -> bool:
    """Whether it has the form of a workflow's node."""
    return isinstance(node, dict) and isinstance(node.get("class_type"), str)


def is_link(value: object) -> bool:
    """What ComfyUI takes for a link in any input, known or not."""
    return (
        isinstance(value, list)
        and len(value) == 2
        and isinstance(value[0], str)
        and isinstance(value[1], int | float)
    )


def _is_ui_format(value: object) -> bool:
    return isinstance(value, dict) and isinstance(value.get("nodes"), list)


def explain_no_workflow(value: object) -> str:
    """What was found instead of a workflow, and what to change, in one sentence."""
    if _is_ui_format(value):
        return f"this workflow is saved in UI format, which has nodes and links: {EXPORT}"
    if isinstance(value, str):
        held = _json_or_none(value)
        if isinstance(held, dict) and any(map(is_node, held.values())):
            return "this is a text that holds the workflow as JSON: send the object itself, not its text"
        return f"this is a text and no workflow: {EXPORT}"
    if not isinstance(value, dict) or not value:
        return f"this is no workflow, but {_KINDS.get(type(value), 'empty')}: {EXPORT}"
    ways: list[tuple[tuple[str, ...], Any]] = [((str(key),), item) for key, item in value.items()]
    for way, item in ways:
        place = ".".join(way)[:100]
        held = _json_or_none(item) if isinstance(item, str) else item
        if _is_ui_format(held):
            return f"under {place} is a workflow saved in UI format, which has nodes and links: {EXPORT}"
        if isinstance(held, dict) and any(map(is_node, held.values())):
            as_text = ", as a text that holds JSON" if held is not item else ""
            return f'the workflow stands under {place}{as_text}: send it as {{"prompt": the workflow}}'
        if isinstance(item, dict) and len(way) < 3:
            ways += [((*way, str(key)), below) for key, below in item.items()]
    first = next(iter(value))
    return f"node {first!r:.40} has no class_type, so this is no API-format workflow: {EXPORT}"


_KINDS = {list: "a list", int: "a number", float: "a number", bool: "true or false", type(None): "null"}


def _json_or_none(text: str) -> Any:
    """What a text that looks like an object holds, None where it is no JSON."""
    with suppress(ValueError, RecursionError):
        return json.loads(text) if text.lstrip().startswith("{") else None
    return None


def _find_unsendable(value: object) -> tuple[list[str], str] | None:
    """The way to the first thing in a JSON value that cannot be sent, and what it is; None where there is none.

    Python's JSON reads numbers and texts that it, or UTF-8, cannot write again.
    """
    ahead: list[tuple[tuple[Any, ...], int, object]] = [((), 0, value)]
    while ahead:
        way, level, item = ahead.pop()
        what = ""
        if isinstance(item, float) and not math.isfinite(item):
            what = f"is {item}, which JSON cannot say: give a finite number"
        elif isinstance(item, str) and not is_text(item):
            what = "has half a character in it, which cannot be sent: write the text anew"
        elif level > MAX_LEVELS:
            what = f"has more than {MAX_LEVELS} levels: nest it less"
        elif isinstance(item, dict):
            ahead += [((way, str(key)), level + 1, below) for key, below in item.items()]
            if not all(map(is_text, map(str, item))):
                what = "has half a character in a name, which cannot be sent: write the name anew"
        elif isinstance(item, list | tuple):
            ahead += [((way, str(number)), level + 1, below) for number, below in enumerate(item)]
        if what:
            place: list[str] = []
            while way:
                way, key = way
                place.insert(0, key)
            return place, what
    return None


def is_text(text: str) -> bool:
    """Whether UTF-8 can write it, which it cannot where half of a surrogate pair stands alone."""
    return text.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in text)


KNOWN_KEYS = frozenset(
    ("prompt", "workflow_key", "exec_cmd", "job_id", "callback_url", "inputs", "extra_data", "retry_of", "prompt_id",
     "client_id", "live")
)  # fmt: skip
"""What may stand in a message; client_id, which stands in all that is made for ComfyUI, names a websocket, to which
nobody could listen."""


def load_json(what: str, text: str | bytes) -> Any:
    """Read JSON that others have written. Raises InvalidWorkflowError, in which nothing of it is repeated."""
    try:
        value = json.loads(text.lstrip("\ufeff") if isinstance(text, str) else text)
    except json.JSONDecodeError as error:
        raise InvalidWorkflowError(
            f"{what} is not JSON ({error.msg} at line {error.lineno}, column {error.colno}): "
            "send a workflow exported for the API"
        ) from None
    except UnicodeDecodeError:
        raise InvalidWorkflowError(
            f"{what} is not JSON, nor any text: send a workflow exported for the API"
        ) from None
    except ValueError:
        raise InvalidWorkflowError(
            f"{what} has a number of more digits than can be read: write a shorter one"
        ) from None
    except RecursionError:
        raise InvalidWorkflowError(f"{what} has more than {MAX_LEVELS} levels: nest it less") from None
    level = [value]
    for _ in range(MAX_LEVELS):
        level = [
            below
            for item in level
            if isinstance(item, dict | list)
            for below in (item.values() if isinstance(item, dict) else item)
        ]
        if not level:
            return value
    raise InvalidWorkflowError(f"{what} has more than {MAX_LEVELS} levels: nest it less")


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
        is_s3 = isinstance(address, str) and re.fullmatch(r"s3://[a-z0-9.-]+/.+", address) and is_text(address)
        if not (is_http_url(address) or is_s3):
            raise InvalidMessageError(f"the input {name!r:.60} has no http(s):// or s3://bucket/key address")
    return inputs


def is_http_url(value: object) -> bool:
    """Whether it is an address that a callback or an input may have."""
    return isinstance(value, str) and value.isprintable() and bool(re.fullmatch(r"https?://\S+", value))


# --- What comes back -------------------------------------------------------------------------------------


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
    retry_of: NotRequired[str]
    """Of a job that `fleet.py redrive` has sent: the dead one that it repeats."""
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


# --- Words -----------------------------------------------------------------------------------------------


LINE_CHARACTERS = 1000
_ESCAPES = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]|(?:\x1b[\]PX^_]|[\x9d\x90])[^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)?"
)
"""What colours a terminal's text, or names its window."""


def printable(text: str, most: int = LINE_CHARACTERS) -> str:
    """Words from outside as one line that a terminal shows and does not obey: without escape sequences, line breaks,
    marks that turn the reading direction, and all after `most` characters."""
    text = "".join(letter if letter.isprintable() else " " for letter in _ESCAPES.sub("", text))
    return text if len(text) <= most else f"{text[:most]} … ({len(text) - most} more characters)"


def say(text: str, *, to: Any = None, before: str = "", end: str = "\n") -> None:
    """Print a line, whatever is in it: the one way to a terminal for all words that may be from outside."""
    out = to or sys.stdout
    encoding = getattr(out, "encoding", None) or "utf-8"
    print(before + printable(text).encode(encoding, "replace").decode(encoding), end=end, file=out, flush=True)


def one_line(error: Exception) -> str:
    """An error's text, which may have several lines, in one."""
    return " ".join(str(error).split()) or repr(error)


def count(number: int, thing: str) -> str:
    """`1 job`, `2 jobs`."""
    return f"{number} {thing}{'' if number == 1 else 's'}"


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


_accounts: list[str] = []
_account_lock = threading.Lock()


def account_of_credentials(region: str) -> str:
    """The account whose credentials this process has; AWS is asked once. Raises what boto3 raises."""
    with _account_lock:
        if not _accounts:
            _accounts.append(str(aws_client("sts", region).get_caller_identity()["Account"]))
        return _accounts[0]


def error_code(error: Exception) -> str:
    """The AWS error code (`AccessDenied`, ...) of a botocore ClientError, also of one that made an upload fail.

    "" for any other error.
    """
    from boto3.exceptions import S3UploadFailedError

    cause = error.__context__ if isinstance(error, S3UploadFailedError) else error
    response = getattr(cause, "response", None)
    return str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""


def is_refused_condition(error: Exception) -> bool:
    """Whether S3 has stored nothing because the object is not as the call's IfMatch or IfNoneMatch wants it, or is just
    being written."""
    return error_code(error) in ("PreconditionFailed", "ConditionalRequestConflict")


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
    failed_boots: str | None = None
    """The tag comfy-failed-boots, "VERSION COUNT", of instances that did not come to work: see boot/giving_up.sh."""


def read_group(autoscaling: Any, asg_name: str) -> Group | None:
    """Ask AWS how the group stands; None where there is no such group."""
    answer = autoscaling.describe_auto_scaling_groups(AutoScalingGroupNames=[asg_name])
    for group in answer["AutoScalingGroups"]:
        there = [item for item in group["Instances"] if item["LifecycleState"] == "InService"]
        # create_env.sh sets the tag last, and its version numbers only grow, also with --rollback.
        tags = {tag["Key"]: tag["Value"] for tag in group.get("Tags", [])}
        version = tags.get(VERSION_TAG, "0")
        outdated = [
            item["InstanceId"]
            for item in there
            if int(item.get("LaunchTemplate", {}).get("Version", version)) < int(version)
        ]
        in_service = [item["InstanceId"] for item in there]
        desired, least, most = group["DesiredCapacity"], group["MinSize"], group["MaxSize"]
        return Group(desired, least, most, in_service, tuple(outdated), tags.get(FAILED_BOOTS_TAG))
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
