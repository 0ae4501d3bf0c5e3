"""Fills the environment's variables into templates and prints them as one document: fill.py TEMPLATE ..."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

PLACEHOLDER = re.compile(r"\$\{([A-Z][A-Z0-9_]*)(:each|:number)?\}")


def main(templates: list[Path]) -> None:
    """Print the document."""
    if templates[0].suffix == ".sh":
        text = templates[0].read_text()
        print(PLACEHOLDER.sub(lambda found: shlex.quote(value_of(found[1], os.environ)), text), end="")
        return
    document: Any = {}
    for template in templates:
        document = joined(document, filled(json.loads(template.read_text()), os.environ))
    print(json.dumps(document, separators=(",", ":")))


def filled(node: Any, values: Mapping[str, str]) -> Any:
    """A part of a template with its values."""
    if isinstance(node, dict):
        return {key: filled(value, values) for key, value in node.items()}
    if isinstance(node, list):
        return [one for item in node for one in each(item, values)]
    if not isinstance(node, str):
        return node
    text = PLACEHOLDER.sub(lambda found: value_of(found[1], values), node)
    whole = PLACEHOLDER.fullmatch(node)
    return int(text) if whole and whole[2] == ":number" else text


def each(item: Any, values: Mapping[str, str]) -> Iterator[Any]:
    """An item of a list, once for each word of the name with :each in it, if it has one."""
    own = [item, *item.values()] if isinstance(item, dict) else [item]
    found = [match for text in own if isinstance(text, str) for match in PLACEHOLDER.finditer(text)]
    names = [match[1] for match in found if match[2] == ":each"]
    for word in value_of(names[0], values).split() if names else [""]:
        yield filled(item, {**values, names[0]: word} if names else values)


def value_of(name: str, values: Mapping[str, str]) -> str:
    """The value, which must not be empty."""
    if not values.get(name, "").strip():
        sys.exit(f"fill.py: {name} has no value")
    return values[name]


def joined(one: Any, other: Any) -> Any:
    """Both as one: the members of objects, the items of lists."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one | {key: joined(one[key], value) if key in one else value for key, value in other.items()}
    return one + other if isinstance(one, list) and isinstance(other, list) else other


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[1:]])
