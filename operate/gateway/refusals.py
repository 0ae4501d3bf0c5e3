"""What the fleet's ComfyUI would refuse of a workflow, in the words and shapes of ComfyUI's own answer."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from comfy_utils import Problem, Settings, Workflow, is_link
from sender.check import MISSING, FleetCheck, Input, find_problems, inputs_of

CHECK_S = 10.0
"""So long the models that a check has listed are believed."""
MOST_OUTPUTS = 100
"""Each output node of a bad workflow is checked by itself, so many of them."""


class Verdict(NamedTuple):
    """What ComfyUI answers: the output nodes that run, and else the `error` and `node_errors` of its 400."""

    outputs: list[str]
    error: dict[str, Any] | None
    node_errors: dict[str, Any]


class Checker:
    """Checks workflows against what the fleet has. It blocks: for a thread."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._check: FleetCheck | None = None
        self._made_at = 0.0

    def judge(
        self, workflow: Workflow, targets: Collection[str] | None = None, coming: Collection[str] = ()
    ) -> Verdict:
        """What ComfyUI would say of a workflow, of which only `targets` are to run where that is not None, and for
        which the files named in `coming` will be there."""
        check = self._check
        if check is None or time.monotonic() - self._made_at > CHECK_S:
            self._check = check = FleetCheck(self._settings)
            self._made_at = time.monotonic()
        if check.nodes is None:  # no instance has been there yet: the first will judge it
            return Verdict([], None, {})
        may_have = check.may_have
        return judge(workflow, check.nodes, lambda file: file in coming or may_have(file), targets)


def judge(
    workflow: Workflow, nodes: dict[str, Any], may_have: Callable[[str], bool], targets: Collection[str] | None = None
) -> Verdict:
    """The same from known `nodes`."""
    for node_id, node in workflow.items():
        known = nodes.get(node["class_type"], {})
        if not {"input", "replaced_by"} & known.keys():
            return Verdict([], _missing_node(node_id, node), {})
    outputs = [
        node_id
        for node_id, node in workflow.items()
        if nodes[node["class_type"]].get("output_node") and (targets is None or node_id in targets)
    ]
    if not outputs:
        return Verdict([], make_error("prompt_no_outputs", "Prompt has no outputs"), {})
    problems = find_problems(upstream(workflow, outputs), nodes, may_have)
    if not problems:
        return Verdict(outputs, None, {})
    node_errors: dict[str, Any] = {}
    good: list[str] = []
    for output in outputs[:MOST_OUTPUTS]:
        bad = [each for each in find_problems(upstream(workflow, [output]), nodes, may_have) if each.certain]
        if not bad:
            good.append(output)
        for problem in bad:
            _add(node_errors, problem, output, workflow, nodes)
    good += outputs[MOST_OUTPUTS:]
    if good:
        return Verdict(good, None, node_errors)
    # Of the outputs themselves only: what stands further up is in node_errors alone.
    own = [node_errors[output] for output in outputs if output in node_errors]
    reasons = [f"{error['message']}: {error['details']}" for each in own for error in each["errors"]]
    error = make_error("prompt_outputs_failed_validation", "Prompt outputs failed validation", "\n".join(reasons))
    return Verdict([], error, node_errors)


def upstream(workflow: Workflow, outputs: Collection[str]) -> Workflow:
    """The part of a workflow that these nodes need, in its own order."""
    needed = dict.fromkeys(outputs)
    ahead = list(needed)
    for node_id in ahead:
        for value in workflow[node_id].get("inputs", {}).values():
            if is_link(value) and value[0] in workflow and value[0] not in needed:
                needed[value[0]] = None
                ahead.append(value[0])
    return {node_id: node for node_id, node in workflow.items() if node_id in needed}


def make_error(kind: str, message: str, details: str = "", **extra_info: Any) -> dict[str, Any]:
    """An error as ComfyUI shapes it."""
    return {"type": kind, "message": message, "details": details, "extra_info": extra_info}


def _missing_node(node_id: str, node: dict[str, Any]) -> dict[str, Any]:
    meta = node.get("_meta")
    title = meta.get("title", node["class_type"]) if isinstance(meta, dict) else node["class_type"]
    return make_error(
        "missing_node_type",
        f"Node '{title}' not found. The custom node may not be installed.",
        f"Node ID '#{node_id}'",
        node_id=node_id,
        class_type=node["class_type"],
        node_title=title,
    )


def _add(
    node_errors: dict[str, Any], problem: Problem, output: str, workflow: Workflow, nodes: dict[str, Any]
) -> None:
    node_id = problem.node_id or output
    node = workflow[node_id]
    entry = node_errors.setdefault(node_id, {"errors": [], "dependent_outputs": [], "class_type": node["class_type"]})
    error = _error_of(problem, workflow, nodes)
    if error not in entry["errors"]:
        entry["errors"].append(error)
    if output not in entry["dependent_outputs"]:
        entry["dependent_outputs"].append(output)


def _error_of(problem: Problem, workflow: Workflow, nodes: dict[str, Any]) -> dict[str, Any]:
    """A problem as ComfyUI puts it. What has no form of its own there is an exception, as it is there."""
    node = workflow[problem.node_id or ""] if problem.node_id else {}
    info = nodes.get(node.get("class_type", ""), {})
    each = next((one for one in inputs_of(node, info) if one.name == problem.input_name), None)
    if each is None:
        if problem.text.startswith("it depends on itself"):
            return make_error("dependency_cycle", "Dependency cycle detected", problem.text, node_id=problem.node_id)
        return make_error("exception_during_validation", "Exception when validating node", problem.text)
    if each.value is MISSING:
        return make_error("required_input_missing", "Required input is missing", each.name, input_name=each.name)
    about = {"input_name": each.name, "input_config": [each.kind, each.options]}
    if isinstance(each.value, list):
        return _error_of_link(each, problem, workflow, nodes, about)
    return _error_of_value(each, problem, about)


def _error_of_link(
    each: Input, problem: Problem, workflow: Workflow, nodes: dict[str, Any], about: dict[str, Any]
) -> dict[str, Any]:
    if len(each.value) != 2:
        message = "Bad linked input, must be a length-2 list of [node_id, slot_index]"
        return make_error("bad_linked_input", message, each.name, **about, received_value=each.value)
    source, slot = each.value
    if not isinstance(source, str) or source not in workflow:
        return make_error(
            "exception_during_validation", "Exception when validating node", repr(source), exception_type="KeyError"
        )
    made = nodes.get(workflow[source]["class_type"], {}).get("output") or []
    if not isinstance(slot, int) or not -len(made) <= slot < len(made):
        return make_error(
            "exception_during_validation",
            "Exception when validating node",
            problem.text,
            exception_type="IndexError",
        )
    return make_error(
        "return_type_mismatch",
        "Return type mismatch between linked nodes",
        f"{each.name}, received_type({made[slot]}) mismatch input_type({each.kind})",
        **about,
        received_type=made[slot],
        linked_node=each.value,
    )


def _error_of_value(each: Input, problem: Problem, about: dict[str, Any]) -> dict[str, Any]:
    name, kind, options, value = each
    about = {**about, "received_value": value}
    if kind in ("INT", "FLOAT"):
        try:
            value = int(value) if kind == "INT" else float(value)
        except (TypeError, ValueError, OverflowError) as error:
            message = f"Failed to convert an input value to a {kind} value"
            details = f"{name}, {value}, {error}"
            return make_error("invalid_input_type", message, details, **about, exception_message=str(error))
    if isinstance(value, int | float):
        if "min" in options and value < options["min"]:
            message = f"Value {value} smaller than min of {options['min']}"
            return make_error("value_smaller_than_min", message, name, **about)
        if "max" in options and value > options["max"]:
            message = f"Value {value} bigger than max of {options['max']}"
            return make_error("value_bigger_than_max", message, name, **about)
    if options.get("image_upload"):
        details = f"{name} - Invalid image file: {value}"
        return make_error("custom_validation_failed", "Custom validation failed for node", details, input_name=name)
    if isinstance(kind, list) or kind == "COMBO":
        choices = kind if isinstance(kind, list) else options.get("options", [])
        told = str(choices)
        if len(choices) > 20:
            told, about["input_config"] = f"(list of length {len(choices)})", None
        return make_error("value_not_in_list", "Value not in list", f"{name}: {value!r} not in {told}", **about)
    details = f"{name} - {problem.text}"
    return make_error("custom_validation_failed", "Custom validation failed for node", details, input_name=name)
