"""What the fleet's ComfyUI would refuse of a workflow, found before a GPU is paid for.

It says what ComfyUI's own validation would (execution.py, validate_prompt and validate_inputs), from /object_info, which
tells each node's inputs but not whether a node validates some of them in its own way. So what custom nodes are given is
only doubted. tests/sender/verdicts.json holds it against real servers.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any, NamedTuple

from comfy_utils import (
    OBJECT_INFO_KEY,
    Problem,
    Settings,
    Workflow,
    WorkflowProblemsError,
    aws_client,
    error_code,
    is_link,
)

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
        """Whether the fleet has this input or model by now, or may have it: what is known of it may be old."""
        name, place = place_of(file)
        if name in self.coming:
            return True
        if place != "input":
            # Only the base machine keeps what it made where ComfyUI finds it again.
            return self.env == "base" and (place == "temp" or self.is_there(f"output/{name}"))
        if self.is_there(f"input/{name}"):
            return True
        try:
            if self._models is None:
                pages = self.s3.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix="models/")
                self._models = [item["Key"] for page in pages for item in page.get("Contents", [])]
        except Exception:
            return True
        return any(key.endswith(f"/{name}") for key in self._models)

    def is_there(self, key: str) -> bool:
        """Whether the bucket has it, or does not say."""
        try:
            self.s3.head_object(Bucket=self.bucket, Key=key)
        except Exception as error:
            return error_code(error) != "404"
        return True


# --- Workflows -------------------------------------------------------------------------------------------


def find_problems(workflow: Workflow, nodes: dict[str, Any], may_have: Callable[[str], bool]) -> list[Problem]:
    """What ComfyUI finds wrong, `certain` only where it refuses the workflow because of it, or dies of it.

    It looks at nodes that an output node depends on; as long as one output is left it drops the others. `nodes` is
    its /object_info, and `may_have` says whether a file that is not in there may be there after all.
    """
    unreplaced = list(_troubles_of_replacing(workflow, nodes))
    if unreplaced:
        return unreplaced
    workflow = _replaced(workflow, nodes)
    names = {node_id: node["class_type"] for node_id, node in workflow.items()}
    unknown = [
        Problem.of(
            node_id, workflow[node_id], f"there is no node {name}",
            f"{_closest(name, nodes)}install it on the base machine and run create_env.sh again",
        )
        for node_id, name in names.items()
        if "input" not in nodes.get(name, {})
    ]  # fmt: skip
    if unknown:  # wherever it stands
        return unknown
    outputs = [node_id for node_id, name in names.items() if nodes[name].get("output_node")]
    if not outputs:
        return [Problem(None, None, "it has no output node", "add one that saves something, such as SaveImage")]
    graph = _Graph(workflow, nodes, may_have)
    branches = {output: graph.upstream(output) for output in outputs}
    bad = {output for output, branch in branches.items() if any(graph.refuses(node_id) for node_id in branch)}
    needed = dict.fromkeys(node_id for branch in branches.values() for node_id in branch)
    problems = [problem for node_id in needed for problem in graph.of(node_id)]
    if len(bad) < len(outputs):
        problems = [problem._replace(certain=False) for problem in problems]
    return problems + graph.fatal(output for output in outputs if output not in bad)


class _Graph:
    """A workflow whose nodes are all known, and what is wrong with each of them."""

    def __init__(self, workflow: Workflow, nodes: dict[str, Any], may_have: Callable[[str], bool]) -> None:
        self.workflow, self.nodes, self.may_have = workflow, nodes, may_have
        self._found: dict[str, list[Problem]] = {}

    def info(self, node_id: str) -> dict[str, Any]:
        """What is known of a node's class."""
        known: dict[str, Any] = self.nodes[self.workflow[node_id]["class_type"]]
        return known

    def sources(self, node_id: str) -> list[str]:
        """The nodes that it is linked to, by inputs that it knows."""
        node = self.workflow[node_id]
        values = [each.value for each in inputs_of(node, self.info(node_id)) if isinstance(each.value, list)]
        return [
            value[0]
            for value in values
            if len(value) == 2 and isinstance(value[0], str) and value[0] in self.workflow
        ]

    def upstream(self, output: str) -> list[str]:
        """The output node and all it depends on."""
        found = [output]
        for node_id in found:
            found += [source for source in dict.fromkeys(self.sources(node_id)) if source not in found]
        return found

    def of(self, node_id: str) -> list[Problem]:
        """What is wrong with a node."""
        if node_id not in self._found:
            node = self.workflow[node_id]
            self._found[node_id] = [Problem.of(node_id, node, *trouble) for trouble in self._troubles_of(node_id)]
        return self._found[node_id]

    def refuses(self, node_id: str) -> bool:
        """Whether ComfyUI refuses all that depends on this node."""
        return any(problem.certain for problem in self.of(node_id))

    def fatal(self, outputs: Iterable[str]) -> list[Problem]:
        """Links to nowhere by inputs that nobody validates: the thread of ComfyUI that runs jobs ends when it meets one."""
        found, problems = list(outputs), []
        for node_id in found:
            node = self.workflow[node_id]
            for name, value in node.get("inputs", {}).items():
                if not is_link(value) or value[0] in found:
                    continue
                if value[0] in self.workflow:
                    found.append(value[0])
                    continue
                text = f"{name} links to node {value[0]}, which is not there"
                problems.append(
                    Problem.of(node_id, node, text, f"take it out: {node['class_type']} has no such input")
                )
        return problems

    def _troubles_of(self, node_id: str) -> Iterator[Trouble]:
        node, info = self.workflow[node_id], self.info(node_id)
        if "inputs" not in node:
            yield "it has no inputs", 'give it its inputs, or {"inputs": {}} where it has none', True
            return
        circle = self._circle_of(node_id)
        if circle:
            yield f"it depends on itself: {' -> '.join(circle)}", "take out one of these links", True
        known = list(inputs_of(node, info))
        for each in known:
            for trouble in self._troubles_of_input(each, node, info):
                yield *trouble[:3], each.name
        if is_own(info) and node["class_type"] not in TAKES_ALL:
            names = {each.name for each in known} | (info["input"].get("hidden") or {}).keys()
            for name, value in node["inputs"].items():
                if name not in names and is_link(value) and value[0] in self.workflow:
                    yield f"it has no input {name}", "take out that link, or the node fails", False

    def _troubles_of_input(self, each: Input, node: dict[str, Any], info: dict[str, Any]) -> Iterator[Trouble]:
        if each.kind == DYNAMIC_COMBO:
            # ComfyUI asks for no choice; the node then fails, unless it can do without, as with one in another's choice.
            keys = [option["key"] for option in each.options["options"]]
            if "." not in each.name and each.value not in keys:
                text = "is missing" if each.value is MISSING else f"is {each.value!r:.80}"
                yield f"{each.name} {text}", _may_be(each.value, keys), False
        elif each.value is MISSING:
            yield f"{each.name} is missing", "connect it or give it a value", True
        elif isinstance(each.value, list):
            yield from self._troubles_of_link(each, node, info)
        else:
            value = each.value
            value = value["__value__"] if isinstance(value, dict) and "__value__" in value else value
            yield from _troubles_of_value(each, value, node["class_type"], info, self.may_have)

    def _troubles_of_link(self, each: Input, node: dict[str, Any], info: dict[str, Any]) -> Iterator[Trouble]:
        name = each.name
        if len(each.value) != 2:
            yield f"{name} is no link", 'write ["node id", number of its output]', True
            return
        source, slot = each.value
        if not isinstance(source, str) or source not in self.workflow:
            have = ", ".join(list(self.workflow)[:20])
            yield f"{name} links to node {source}, which is not there", f"the nodes are {have}", True
            return
        source_info = self.info(source)
        made, known = source_info.get("output") or [], is_own(source_info)
        if not isinstance(slot, int) or not -len(made) <= slot < len(made):
            have = f"{len(made)} output{'' if len(made) == 1 else 's'}"
            text = f"{name} links to output {slot} of node {source}, which has {have}"
            yield text, "count its outputs from 0", known or not isinstance(slot, int)
        elif not _fits(made[slot], each.kind):
            words = [_words(one) for one in (each.kind, made[slot])]
            text = f"{name} is {words[0]}, but output {slot} of node {source} is {words[1]}"
            yield text, f"link it to an output that is {words[0]}", known and is_own(info)
        elif _is_file(each, node["class_type"]):
            yield (
                f"{name} is linked",
                "write the name of the file: it is looked for before anything runs",
                is_own(info),
            )

    def _circle_of(self, start: str) -> list[str]:
        """The way from a node back to itself, [] where there is none."""
        ways = [[start]]
        seen = set()
        for way in ways:
            for source in self.sources(way[-1]):
                if source == start:
                    return [*way, start]
                if source not in seen:
                    seen.add(source)
                    ways.append([*way, source])
        return []


# --- Nodes -----------------------------------------------------------------------------------------------

MISSING = object()
AUTOGROW, DYNAMIC_COMBO, MATCH_TYPE = "COMFY_AUTOGROW_V3", "COMFY_DYNAMICCOMBO_V3", "COMFY_MATCHTYPE_V3"
TAKES_ALL = frozenset({"CustomCombo"})
"""ComfyUI's own nodes that validate, and take, all they are given."""
OWN_WAY = {
    "Load3D": ("width", "height"),
    "Load3DAdvanced": ("width", "height"),
    "ModelAttentionBackend": ("attention",),
    "SelectModelDevice": ("device",),
    "SelectCLIPDevice": ("device",),
    "SelectVAEDevice": ("device",),
}
"""Inputs of ComfyUI's own nodes whose value the node itself validates, other than files."""

Trouble = tuple[str, str, bool] | tuple[str, str, bool, str]
"""What is wrong with a node, what helps, and whether that is certain; of an input also its name."""


class Input(NamedTuple):
    """An input that a node knows: its type (a list: the values it may have) and its value, or MISSING."""

    name: str
    kind: Any
    options: dict[str, Any]
    value: Any


def is_own(info: dict[str, Any]) -> bool:
    """Whether a node is one of ComfyUI's own, of which we know what it validates in its own way."""
    return not str(info.get("python_module", "")).startswith(("custom_nodes", "comfy_api_nodes"))


def inputs_of(node: dict[str, Any], info: dict[str, Any]) -> Iterator[Input]:
    """Each input that the node knows, of optional ones only those that are there.

    Inputs that the node does not know are ignored, as ComfyUI does.
    """
    given = node.get("inputs", {})
    for name, (config, required) in _expanded(info.get("input") or {}, given, "").items():
        options = config[1] if len(config) > 1 and isinstance(config[1], dict) else {}
        if name in given or required:
            yield Input(name, config[0], options, given.get(name, MISSING))


def _expanded(known: dict[str, Any], given: dict[str, Any], prefix: str) -> dict[str, tuple[list[Any], bool]]:
    """Name -> how it is declared, and whether it is required: of dynamic inputs those that the given ones make."""
    found: dict[str, tuple[list[Any], bool]] = {}
    for category in ("required", "optional"):
        for name, config in (known.get(category) or {}).items():
            if not (isinstance(config, list) and config):
                continue
            full, required = prefix + name, category == "required"
            if config[0] == AUTOGROW:
                found |= _grown(config[1]["template"], f"{full}.")
            elif not str(config[0]).startswith("COMFY_") or config[0] in (DYNAMIC_COMBO, MATCH_TYPE):
                found[full] = config, required
            if config[0] == DYNAMIC_COMBO and full in given:
                for option in config[1]["options"]:
                    if option["key"] == given[full]:
                        found |= _expanded(option["inputs"], given, f"{full}.")
    return found


def _grown(template: dict[str, Any], prefix: str) -> dict[str, tuple[list[Any], bool]]:
    """All inputs of one that grows."""
    names = template.get("names") or [f"{template['prefix']}{number}" for number in range(template["max"])]
    category, declared = next((category, each) for category, each in template["input"].items() if each)
    config = next(iter(declared.values()))
    return {
        prefix + name: (config, category == "required" and number < template["min"])
        for number, name in enumerate(names)
    }


def _fits(made: Any, kind: Any) -> bool:
    """Whether an output of a type may be linked to an input of a type, each a name, several, or a list of choices."""
    if made == kind or (isinstance(made, list) and kind == "COMBO"):
        return True
    types = [{name.strip() for name in one.split(",")} if isinstance(one, str) else set() for one in (made, kind)]
    return bool(types[0] & types[1]) or not {"*", MATCH_TYPE}.isdisjoint(types[0] | types[1])


def _words(kind: Any) -> str:
    """A type, for people."""
    return f"one of {', '.join(map(str, kind[:5]))}" if isinstance(kind, list) else str(kind)


# --- Values ----------------------------------------------------------------------------------------------


def _troubles_of_value(
    each: Input, value: Any, class_type: str, info: dict[str, Any], may_have: Callable[[str], bool]
) -> Iterator[Trouble]:
    name, kind, ours = each.name, each.kind, is_own(info)
    if kind in ("INT", "FLOAT"):
        try:
            value = int(value) if kind == "INT" else float(value)
        except (TypeError, ValueError, OverflowError):
            yield f"{name} is {value!r:.80}", f"give {'a whole number' if kind == 'INT' else 'a number'}", True
            return
    if class_type in TAKES_ALL or name in OWN_WAY.get(class_type, ()):
        return
    low, high = each.options.get("min", -math.inf), each.options.get("max", math.inf)
    is_range = {"min", "max"} & each.options.keys() and isinstance(low, int | float) and isinstance(high, int | float)
    if is_range and kind not in ("STRING", "BOOLEAN"):
        if not isinstance(value, int | float):
            yield f"{name} is {value!r:.80}", "give a number", ours
            return
        if value < low or value > high:
            yield f"{name} is {value}", f"give a number from {low} to {high}", ours
            return
    if _is_file(each, class_type):
        yield from _troubles_of_file(each, value, ours, may_have)
    elif isinstance(kind, list) or kind == "COMBO":
        # Servers of before 0.7 do not look at the choices of a COMBO; those of 0.11 and later tell of this.
        certain = ours and (kind != "COMBO" or "search_aliases" in info)
        yield from _troubles_of_choice(each, value, certain, may_have)


def _troubles_of_choice(each: Input, value: Any, certain: bool, may_have: Callable[[str], bool]) -> Iterator[Trouble]:
    allowed = each.kind if isinstance(each.kind, list) else each.options.get("options") or []
    if "remote" in each.options:  # the editor asks a server which there are
        return
    values = value if isinstance(value, list) and each.options.get("multiselect") else [value]
    for one in values:
        if one in allowed:
            continue
        if not _looks_like_file(one):
            yield f"{each.name} is {one!r:.80}", _may_be(one, allowed), certain
        elif not may_have(one):
            remedy = f"{_closest(one, allowed)}put it into the bucket's models/, in the folder of its kind"
            yield f"{each.name} {one!r:.200} is not installed", remedy, certain


def _is_file(each: Input, class_type: str) -> bool:
    """Whether it names a file that ComfyUI looks for itself: it lists only those that lie in input/ and are of a kind."""
    return class_type == "LoadLatent" or any(option.endswith("_upload") for option in each.options)


def _troubles_of_file(each: Input, value: Any, ours: bool, may_have: Callable[[str], bool]) -> Iterator[Trouble]:
    allowed = each.kind if isinstance(each.kind, list) else each.options.get("options") or []
    if value in allowed:
        return
    if not isinstance(value, str):
        yield f"{each.name} is {value!r:.80}", "give the name of a file", ours
        return
    name, place = place_of(value)
    if may_have(value):
        return
    if place == "input":
        # A folder passes, too; and where a path leads that goes up or begins at the root, nobody knows.
        certain = ours and _looks_like_file(name) and not name.startswith("/") and ".." not in name.split("/")
        remedy = f"{_closest(value, allowed)}put it into the bucket's input/"
    else:
        certain, remedy = False, f"instances keep nothing in {place}/: put it into the bucket's input/"
    yield f"{each.name} {value!r:.200} is not installed", remedy, certain


def place_of(file: str) -> tuple[str, str]:
    """A file's name and where it lies, as ComfyUI reads `x.png [output]`: it takes off the blank without a look."""
    for place in ("input", "output", "temp"):
        if file.endswith(f"[{place}]"):
            return file[: -len(f" [{place}]")], place
    return file, "input"


def _looks_like_file(value: Any) -> bool:
    return isinstance(value, str) and re.search(r"\.\w{2,12}(?: \[\w+\])?$", value) is not None


def _may_be(value: Any, allowed: list[Any]) -> str:
    closest = "" if value is MISSING else _closest(value, allowed)
    return f"{closest}it may be {', '.join(map(str, allowed[:20])) or 'nothing'}"


def _closest(name: object, names: Iterable[object]) -> str:
    from difflib import get_close_matches

    found = get_close_matches(str(name), list(map(str, names)))
    return f"the closest {'is' if len(found) == 1 else 'are'} {', '.join(found)}, or " if found else ""


# --- Nodes that others took the place of -----------------------------------------------------------------


def _replacement_of(node: dict[str, Any], nodes: Mapping[str, Any]) -> dict[str, Any] | None:
    """What ComfyUI puts in a node's place (its /node_replacements, the first), None where it leaves the node."""
    replacements = nodes.get(node["class_type"], {}).get("replaced_by") or [None]
    known: dict[str, Any] | None = replacements[0]
    return known if known and "inputs" in node and "input" in nodes.get(known["new_node_id"], {}) else None


def _troubles_of_replacing(workflow: Workflow, nodes: Mapping[str, Any]) -> Iterator[Problem]:
    """What ComfyUI fails over before it validates anything."""
    for node_id, node in workflow.items():
        if replacement := _replacement_of(node, nodes):
            wanted = [mapped["old_id"] for mapped in replacement.get("input_mapping") or [] if "old_id" in mapped]
            missing = [f"its input {name}" for name in wanted if name not in node["inputs"]]
            if "_meta" not in node:
                missing.append('its _meta, such as {"title": "x"}')
            if missing:
                text = f"{' and '.join(missing)} must be there"
                remedy = f"ComfyUI needs that to put {replacement['new_node_id']} in its place"
                yield Problem.of(node_id, node, text, remedy)


def _replaced(workflow: Workflow, nodes: Mapping[str, Any]) -> Workflow:
    """The workflow as ComfyUI makes it of this one."""
    import copy

    replacements = {node_id: _replacement_of(node, nodes) for node_id, node in workflow.items()}
    if not any(replacements.values()):
        return workflow
    made = copy.deepcopy(workflow)
    links = [value for node in made.values() for value in node.get("inputs", {}).values() if is_link(value)]
    for node_id, replacement in replacements.items():
        if not replacement:
            continue
        old = made[node_id]["inputs"]
        made[node_id]["class_type"] = replacement["new_node_id"]
        made[node_id]["inputs"] = {
            mapped["new_id"]: mapped["set_value"] if "set_value" in mapped else old[mapped["old_id"]]
            for mapped in replacement.get("input_mapping") or []
        }
        slots = {mapped["old_idx"]: mapped["new_idx"] for mapped in replacement.get("output_mapping") or []}
        for link in links:
            if link[0] == node_id:
                link[1] = slots.get(link[1], link[1])
    return made
