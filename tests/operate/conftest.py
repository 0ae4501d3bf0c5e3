"""Sites for tests of the operator's commands."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from workplace import Site

import fleet
from comfy_utils import load_settings


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch) -> Callable[[Site], None]:
    """Gives this process a site's settings."""

    def become(site: Site) -> None:
        for name, value in site.environment().items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(fleet, "load_settings", lambda _: load_settings(None, site.folder / "env"))

    return become
