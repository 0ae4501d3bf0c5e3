"""What ComfyUI says of a job, in its history and its refusals: read as far as it has the form it should have."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeGuard, TypeVar

T = TypeVar("T")


class OutputFile(NamedTuple):
    """A file as the history names it; `kind` is the key it stood under (images, gifs, audio, ...)."""

    node_id: str
    kind: str
    filename: str
    subfolder: str
    type: str


def json_of(answer: Any) -> Any:
    """What an answer says, None where that is no JSON."""
    try:
        return answer.json()
    except (ValueError, RecursionError):
        return None


def well_formed_entry(entry: Mapping[str, Any]) -> dict[str, Any]:
    """A history entry in which prompt, outputs and status have the form that they are read in, whatever was said."""
    prompt, outputs, status = entry.get("prompt"), entry.get("outputs"), entry.get("status")
    status = dict(status) if isinstance(status, dict) else {}
    messages = status.get("messages")
    status["messages"] = [
        [message[0], message[1] if _is_moment(message[1].get("timestamp")) else {**message[1], "timestamp": None}]
        for message in (messages if isinstance(messages, list) else [])
        if isinstance(message, list)
        and len(message) == 2
        and isinstance(message[0], str)
        and isinstance(message[1], dict)
    ]
    return {
        **entry,
        "prompt": prompt if isinstance(prompt, list) and prompt else [None],
        "outputs": {
            node_id: output if isinstance(output, dict) else {"output": output}
            for node_id, output in (outputs.items() if isinstance(outputs, dict) else ())
        },
        "status": status,
    }


def _is_moment(value: object) -> bool:
    """Whether it is a time in milliseconds since 1970 that a calendar knows."""
    return type(value) is int and 0 <= value < 250_000_000_000_000


def well_formed_node_errors(value: object) -> dict[str, Any]:
    """ComfyUI's node_errors as far as they have the form in which they are read."""
    formed = {}
    for node_id, node in value.items() if isinstance(value, dict) else ():
        errors = node.get("errors") if isinstance(node, dict) else None
        if isinstance(errors, list):
            formed[node_id] = {
                **node,
                "errors": [_well_formed_error(error) for error in errors if isinstance(error, dict)],
            }
    return formed


def _well_formed_error(error: dict[str, Any]) -> dict[str, Any]:
    info = error.get("extra_info")
    info = dict(info) if isinstance(info, dict) else {}
    config = info.get("input_config")
    if not isinstance(config, list) or not all(isinstance(options, dict) for options in config[1:]):
        info.pop("input_config", None)
    return {**error, "extra_info": info}


SECRET_CHARACTERS = 8
"""A shorter text in extra_data is no secret: it would be found in all kinds of words."""


def without_secrets(value: T, extra_data: Mapping[str, Any] | None) -> T:
    """A JSON value in which *** stands for each text of a job's extra_data.

    Not for those below extra_pnginfo, which are the workflow's own and stand in every picture.
    """
    secrets: set[str] = set()
    ahead = [item for name, item in (extra_data or {}).items() if name != "extra_pnginfo"]
    for item in ahead:
        if isinstance(item, str) and len(item) >= SECRET_CHARACTERS:
            secrets.add(json.dumps(item)[1:-1])
        elif isinstance(item, dict | list):
            ahead += item.values() if isinstance(item, dict) else item
    if not secrets:
        return value
    text = json.dumps(value)
    for secret in sorted(secrets, key=len, reverse=True):  # one may begin with another
        text = text.replace(secret, "***")
    hidden: T = json.loads(text)
    return hidden


def is_interrupted(entry: Mapping[str, Any]) -> bool:
    return (error_of(entry) or {}).get("kind") == "interrupted"


def error_of(entry: Mapping[str, Any]) -> dict[str, Any] | None:
    """The `error` of a job's result, read from its history entry; None for a success."""
    status = entry.get("status") or {}
    if status.get("status_str") == "success":
        return None
    for name, data in reversed(status.get("messages") or []):
        node_id, node_type = _as_text(data.get("node_id")), _as_text(data.get("node_type"))
        if name == "execution_error":
            exception = _as_text(data.get("exception_type")) or ""
            kind = "out_of_memory" if exception.endswith("OutOfMemoryError") else "execution_error"
            message = (
                f"node {node_id} {node_type}: {(_as_text(data.get('exception_message')) or '').strip() or exception}"
            )
            traceback = data.get("traceback")
            detail = f"{exception}\n{''.join(map(str, traceback if isinstance(traceback, list) else []))}"
            return job_error(kind, message, node_id=node_id, node_type=node_type, detail=detail[-4096:])
        if name == "execution_interrupted":
            message = f"interrupted at node {node_id} {node_type}"
            return job_error("interrupted", message, node_id=node_id, node_type=node_type)
    return job_error(
        "execution_error", f"ComfyUI's history calls the job {status.get('status_str')!r} without a reason"
    )


def _as_text(value: object) -> str | None:
    """What ComfyUI says as a text, whatever it is; None for nothing."""
    return None if value is None else str(value)


def refusal_of(answer: Mapping[str, Any]) -> dict[str, Any]:
    """The `error` of a job's result, read from ComfyUI's 400 answer to POST /prompt."""
    error, node_errors = answer.get("error") or {}, well_formed_node_errors(answer.get("node_errors"))
    if not isinstance(error, dict):
        error = {"message": str(error)}
    reasons = explain_node_errors(node_errors)
    if not reasons:
        reasons = [" ".join(str(error[key]) for key in ("message", "details") if error.get(key))]
        info = error.get("extra_info")
        class_type = info.get("class_type") if isinstance(info, dict) else None
        if class_type and str(class_type) not in reasons[0]:  # since 0.12 it says a node's title instead
            reasons[0] += f": it is a {class_type}"
    message = "; ".join(reasons) or "ComfyUI refused this workflow and gave no reason"
    return job_error("invalid_workflow", message, node_errors=node_errors, detail=_as_text(error.get("type")))


def explain_node_errors(node_errors: Mapping[str, Any]) -> list[str]:
    """One sentence for each thing ComfyUI found wrong, such as
    "node 4 CheckpointLoaderSimple: ckpt_name 'x' is not installed, have: a, b"."""
    sentences = []
    for node_id, node in node_errors.items():
        for error in node.get("errors", []):
            info = error.get("extra_info") or {}
            text = " ".join(str(error[key]) for key in ("message", "details") if error.get(key))
            if error.get("type") == "value_not_in_list":
                text = _explain_choice(info, str(error.get("details")))
            elif info.get("exception_type") == "KeyError":
                text = f"there is no {error.get('details')}: is it linked to a node that is not there?"
            sentences.append(f"node {node_id} {node.get('class_type')}: {text}")
    return sentences


def _explain_choice(info: Mapping[str, Any], details: str) -> str:
    """A value that is not among those allowed: what is, where ComfyUI tells that, which it does of at most 20.

    It declares them as [[choice, ...], {...}] or, by newer nodes, as ["COMBO", {"options": [choice, ...]}].
    """
    name, value, config = info.get("input_name", ""), info.get("received_value"), info.get("input_config")
    allowed = None
    if isinstance(config, list) and config:
        allowed = config[0] if isinstance(config[0], list) else (config[1:] or [{}])[0].get("options", [])
    if allowed is None:
        length = re.search(r"list of length (\d+)", details)
        have = f"{length[1]} others" if length else "others"
    else:
        have = ", ".join(map(str, allowed)) or "none"
    if any(map(is_file_name, (value, *(allowed or [])))) or allowed == []:
        return f"{name} {value!r} is not installed, have: {have:.400}"
    return f"{name} is {value!r}, and may be: {have:.400}"


def missing_files(workflow: Mapping[str, Any], node_errors: Mapping[str, Any]) -> list[str]:
    """The files that ComfyUI did not find, as the workflow names them; a choice that looks like one may be none."""
    names = []
    for node_id, node in node_errors.items():
        inputs = (workflow.get(node_id) or {}).get("inputs") or {}
        for error in node.get("errors", []):
            value = inputs.get((error.get("extra_info") or {}).get("input_name"))
            if error.get("type") in ("value_not_in_list", "custom_validation_failed") and is_file_name(value):
                names.append(value)
    return list(dict.fromkeys(names))


def is_file_name(value: object) -> TypeGuard[str]:
    return isinstance(value, str) and re.search(r"\.\w{2,12}$", value) is not None


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
    """The files a history entry names, each once, and node id -> values that are not files (text, numbers).

    A file is a dict with a filename that a file can have, in one of ComfyUI's folders; it may stand in a list in a
    list. All else is a value: booleans, strings, null, whatever a node shows. `animated: [true]` only describes the
    files beside it.
    """
    files: dict[OutputFile, None] = {}
    values: dict[str, dict[str, Any]] = {}

    def sort(node_id: str, kind: str, item: Any) -> list[Any]:
        """Note the files in an item; returns what is left of it, as a list of none or one."""
        if isinstance(item, list):
            rest = [left for each in item for left in sort(node_id, kind, each)]
            return [rest] if rest or not item else []
        file = _named_file(node_id, kind, item)
        if file is None:
            return [_writable(item)]
        files[file] = None
        return []

    for node_id, output in (entry.get("outputs") or {}).items():
        for kind, items in (output if isinstance(output, dict) else {"output": output}).items():
            rest = [
                left for item in (items if isinstance(items, list) else [items]) for left in sort(node_id, kind, item)
            ]
            if rest and kind != "animated":
                values.setdefault(node_id, {})[kind] = rest
    return list(files), values


def _named_file(node_id: str, kind: str, item: object) -> OutputFile | None:
    if not isinstance(item, dict):
        return None
    name, subfolder, type_ = item.get("filename"), item.get("subfolder") or "", item.get("type") or "output"
    if not (isinstance(name, str) and name and isinstance(subfolder, str) and type_ in ("output", "temp", "input")):
        return None
    try:
        path = os.fsencode(f"{subfolder}/{name}")
    except UnicodeEncodeError:
        return None
    is_possible = b"\0" not in path and len(path) < 4096 and max(map(len, path.split(b"/"))) <= 255
    return OutputFile(node_id, kind, name, subfolder, type_) if is_possible else None


def _writable(value: Any) -> Any:
    """A value with each number that JSON cannot write as a text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _writable(each) for key, each in value.items()}
    return [_writable(each) for each in value] if isinstance(value, list) else value
