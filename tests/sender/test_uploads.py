"""Files that a workflow needs, put into the bucket."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from fleet_nodes import object_info, saving, store_nodes
from local_cloud import Fault, LocalCloud
from sender_tools import bodies
from workplace import Site

import send_job


def test_an_input_is_uploaded_once_under_a_name_of_its_content(
    cloud: LocalCloud, sender_site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(cloud, "fault", lambda _, operation: calls.append(operation))
    photo, other = tmp_path / "my [photo] ü.png", tmp_path / "other" / "my [photo] ü.png"
    other.parent.mkdir()
    photo.write_bytes(b"one")
    other.write_bytes(b"two")
    name = send_job.upload_input(photo)
    assert re.fullmatch(r"my_photo_-[0-9a-f]{16}\.png", name)
    assert send_job.upload_input(str(photo)) == name
    assert calls.count("PUT") == 1
    assert send_job.upload_input(other) != name, "another file does not overwrite it under a waiting job"
    assert sender_site.s3.get_object(Bucket=sender_site.bucket, Key=f"input/{name}")["Body"].read() == b"one"
    with pytest.raises(FileNotFoundError):
        send_job.upload_input(tmp_path / "gone.png")


def test_an_input_of_the_command_line_is_uploaded_checked_and_named(
    sender_site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo, file = tmp_path / "photo.png", tmp_path / "mine.json"
    photo.write_bytes(b"picture")
    file.write_text(json.dumps(saving("LoadImage", image="example.png")))
    store_nodes(sender_site, object_info())
    sets = ["--set", f"10.image=@{photo}"]
    assert send_job.main([str(file), *sets, "--check"]) == 0
    assert sender_site.keys("input/") == [], "a check uploads nothing"
    capsys.readouterr()
    assert send_job.main([str(file), *sets]) == 0
    name = send_job.input_name(photo)
    assert capsys.readouterr().out.startswith(f"Uploaded {photo} as {name}\nMessage sent successfully")
    assert sender_site.keys("input/") == [f"input/{name}"]
    (body,) = bodies(sender_site)
    assert body["prompt"]["10"]["inputs"] == {"image": name}
    send_job.submit(body["prompt"])  # what the fleet is known to have is older than the upload
    assert send_job.main(["--input", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == send_job.input_name(file)


def test_without_its_input_no_job_is_sent(
    cloud: LocalCloud, sender_site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    denied = Fault(403, "AccessDenied")
    monkeypatch.setattr(cloud, "fault", lambda service, call: denied if (service, call) == ("s3", "PUT") else None)
    assert send_job.main(["--set", f"6.text=@{__file__}"]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"send_job.py: {__file__} cannot be uploaded to {sender_site.bucket}: ")
    assert sender_site.depth() == (0, 0)
