"""What EC2 says of an instance, and where there is no EC2."""

from __future__ import annotations

from pathlib import Path

import pytest
from local_cloud import LocalCloud

from worker.metadata import Metadata, MetadataError


def test_metadata_is_read_by_imdsv2(cloud: LocalCloud, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = cloud.make_base(tmp_path)
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", machine.metadata_endpoint)
    assert Metadata().get("instance-id") == machine.instance_id
    assert Metadata().get("spot/instance-action") is None
    metadata = Metadata()
    metadata._token = "expired"
    assert metadata.get("instance-id") == machine.instance_id


def test_no_metadata_service_is_an_error_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(MetadataError):
        Metadata().get("instance-id")
