"""The AWS calls that a worker's test counts, or has fail."""

from __future__ import annotations

import pytest
from local_cloud import LocalCloud
from workshop import Calls


@pytest.fixture
def calls(cloud: LocalCloud, monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Every call of this test to the local cloud."""
    calls = Calls()
    monkeypatch.setattr(cloud, "fault", calls)
    return calls
