"""send_job.py --direct: on a ComfyUI at hand."""

from __future__ import annotations

import json
import time

from workplace import Site, image_workflow


def test_direct_runs_without_any_aws_and_saves_the_files(busy_site: Site) -> None:
    (busy_site.folder / "mine.json").write_text(json.dumps(image_workflow()))
    address = f"127.0.0.1:{busy_site.port}"
    ran = busy_site.run("env", "-u", "AWS_ENDPOINT_URL", "python", "send_job.py", "mine.json", "--direct", address,
                        "--save", "saved", "--count", "2")  # fmt: skip
    assert (ran.returncode, ran.stderr) == (0, "")
    saved = [line.removeprefix("Saved ") for line in ran.stdout.splitlines()]
    assert len(saved) == 2
    for name in saved:
        assert (busy_site.folder / name).read_bytes().startswith(b"\x89PNG")


def test_direct_tells_a_failure(busy_site: Site) -> None:
    more = {"4": {"class_type": "LoadImage", "inputs": {"image": "broken.png"}},
            "5": {"class_type": "SaveImage", "inputs": {"images": ["4", 0], "filename_prefix": "y"}}}  # fmt: skip
    (busy_site.folder / "bad.json").write_text(json.dumps(image_workflow(more=more)))
    ran = busy_site.run("python", "send_job.py", "bad.json", "--direct", f"127.0.0.1:{busy_site.port}")
    assert ran.returncode == 1
    assert "node 4 LoadImage" in ran.stderr


def test_direct_needs_a_comfyui_that_answers(busy_site: Site) -> None:
    started = time.monotonic()
    ran = busy_site.run("python", "send_job.py", "--direct", "127.0.0.1:9")
    assert ran.returncode == 1
    assert ran.stderr.startswith("send_job.py: ComfyUI on 127.0.0.1:9 does not answer")
    assert time.monotonic() - started < 60
