"""The rooms of provision/ and boot/: who opens which, and whose what is."""

from __future__ import annotations

import re
from collections import Counter

import pytest
from places import ROOT

DOORS = ("create_env.sh", "delete_env.sh", "start_service.sh")
TEXTS = {path.stem: path.read_text() for path in (ROOT / "provision").glob("*.sh")}
BOOT = {path.stem: path.read_text() for path in (ROOT / "boot").glob("*.sh")}
TEXTS |= BOOT | {name: (ROOT / name).read_text() for name in DOORS}
FUNCTION = r"^([a-z_]+)\(\) \{$"


def opened(door: str) -> list[str]:
    """The rooms that a door opens, in order."""
    text = TEXTS[door].replace("\\\n", "")
    return (
        re.findall(r"^source .*/provision/(\w+)\.sh", text, re.M)
        + " ".join(re.findall(r"^for room in (.*); do$", text, re.M)).split()
    )


def functions(name: str) -> list[str]:
    return re.findall(FUNCTION, TEXTS[name], re.M)


def test_rooms_are_opened_by_doors_alone() -> None:
    assert {*opened("start_service.sh")} == {"common", *BOOT}, "an instance needs no more of provision/"
    assert {*opened("create_env.sh"), *opened("delete_env.sh")} == TEXTS.keys() - set(DOORS) - BOOT.keys()
    for name in TEXTS.keys() - set(DOORS):
        assert not re.search(r"^\s*(source|\.) ", TEXTS[name], re.M), f"{name} opens another room"


@pytest.mark.parametrize("door", DOORS)
def test_a_door_opens_what_it_needs(door: str) -> None:
    """And what a room needs is in a room that was opened before, or beside it."""
    rooms = [door, *opened(door)]
    known = {function for name in rooms for function in functions(name)}
    others = {function for name in TEXTS for function in functions(name)} - known
    for name in opened(door):
        calls = set(re.findall(r"(?:^|\$\(|\bif !? ?|&& |\|\| )\s*([a-z]+_[a-z_]+)\b", TEXTS[name], re.M))
        assert not calls & others, f"{door} does not open what {name}.sh calls"


def test_every_function_has_one_name_and_a_use() -> None:
    rooms = Counter(function for name in TEXTS.keys() - {"start_service.sh"} for function in functions(name))
    assert [name for name, count in rooms.items() if count > 1 and name not in ("main", "parse_arguments")] == []
    whole = "\n".join(TEXTS.values())
    for name in (*rooms, *functions("start_service.sh")):
        words = len(re.findall(rf"(?<![\w-]){name}(?![\w-])", re.sub(r"^\s*#.*", "", whole, flags=re.M)))
        # The removal of a kind is called by the kind's name.
        assert words > 1 or name.startswith("remove_"), f"nobody calls {name}"


def test_nobody_writes_what_another_room_owns() -> None:
    """DRY_RUN is an option of two doors, and stands where the calls to AWS and the reports see it."""
    owners = {
        variable: name
        for name, text in TEXTS.items()
        for line in re.findall(r"^(?:declare -A )?([A-Z][A-Z_]*=.*)", text, re.M)
        for variable in re.findall(r"\b([A-Z][A-Z_]*)=", re.sub(r"\$\{.*?\}|#.*|\".*?\"", "", line))
        if name != "start_service.sh" and variable != "DRY_RUN"
    }
    assert {"IMAGE", "SUBNETS", "PROFILE", "ACTION", "TYPES", "VERSION", "STATE_OF"} <= owners.keys()
    for name, text in TEXTS.items():
        if name == "start_service.sh":
            continue
        code = re.sub(r"\$\([^\n]*|\"[^\"\n]*\"|#.*", "", text)
        written = set(re.findall(r"(?<![\w=$-])([A-Z][A-Z_]*)(?:\[[^\]\n]*\])?\+?=(?!=)", code))
        others = {one for one in written if owners.get(one, name) not in (name,)}
        # A name that both doors give their own arguments.
        assert others <= {"NAME", "YES"}, f"{name} writes {others}"
