"""Sites for tests of the sender."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator

import pytest
from workplace import Site

import send_job
from comfy_utils import (
    load_settings,
)


@pytest.fixture
def sender_site(make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch) -> Site:
    """A site whose settings this process has, too."""
    site = make_site()
    for name, value in site.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(send_job, "load_settings", lambda _=None: load_settings(site.env, site.folder / "env"))
    return site


@pytest.fixture
def sending(make_site: Callable[..., Site]) -> Iterator[Callable[..., tuple[Site, subprocess.Popen[str]]]]:
    """Starts send_job.py in a new site, to be watched as it runs."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str, site: Site | None = None) -> tuple[Site, subprocess.Popen[str]]:
        site = site or make_site()
        # A shell that starts tests in the background has them ignore Ctrl-C, and their children with them.
        command = ["env", "--default-signal=INT", "python", "send_job.py", *arguments]
        process = subprocess.Popen(
            command,
            cwd=site.folder,
            env=site.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return site, process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()
