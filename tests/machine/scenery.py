"""The machines of the scenes, and the cloud around them."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from local_cloud import LocalCloud
from real_machine import RealMachine, lay_ground
from stage import Stage, make_repository

MISSING = os.environ.get("MACHINE_MISSING", "start the scenes by tests/machine.sh")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where no machine can be booted every scene says why."""
    for item in items:
        if MISSING and Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=MISSING))


@pytest.fixture(scope="session")
def real_cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCloud]:
    """A cloud whose instances are real machines."""
    place = Path(os.environ["MACHINE_PLACE"])
    lay_ground(place / "ground")
    make_repository(place / "repository")
    with LocalCloud(tmp_path_factory.mktemp("cloud"), machine=RealMachine) as cloud:
        yield cloud


@pytest.fixture(scope="session")
def stage(real_cloud: LocalCloud, tmp_path_factory: pytest.TempPathFactory) -> Stage:
    """A base machine made after README's words, and the fleet `pro` that was made of it."""
    return Stage(real_cloud, tmp_path_factory.mktemp("base") / "machine")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Where a scene fails, the instances that are on tell what happened there, and no other scene gets them."""
    report = yield
    stage = getattr(item, "funcargs", {}).get("stage")
    if report.when == "call" and report.failed and stage is not None:
        report.sections += [(machine.instance_id, machine.ended_badly()) for machine in stage.on()]
        with suppress(Exception):  # or nobody would read why it failed
            stage.clear()
    return report
