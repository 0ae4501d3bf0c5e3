"""fleet.py report: images, instances, the page as a file."""

from __future__ import annotations

import base64
import io
import json
import re
import sys
import zlib
from collections.abc import Callable
from datetime import UTC, datetime

import pytest
from local_cloud import LocalCloud, Machine
from PIL import Image
from report_tools import T0, WORKFLOW, figures, iso, png, receipt, texts, tree
from workplace import Site, await_that, group_of

from comfy_utils import load_settings, new_job_id
from operate import report
from operate.report_page import Life

# --- What images say of their making ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "made_of"),
    [
        (png(WORKFLOW), ("a red fox, 日本", "7, 9")),
        (png(WORKFLOW, workflow="{}"), ("a red fox, 日本", "7, 9")),
        (png({"1": {"class_type": "x", "inputs": {"seed": True, "negative": 5, "text": 5}}}), ("", "")),
        (png("no JSON"), ("", "")),
        (png("[]"), ("", "")),
        (png("[" * 100_000), ("", "")),
        (png(WORKFLOW)[:40], ("", "")),
        (b"", ("", "")),
        (b"\x89PNG\r\n\x1a\n" + b"\xff" * 64, ("", "")),
        (zlib.compress(b"no image"), ("", "")),
    ],
)
def test_prompt_and_seed_come_from_the_image(body: bytes, made_of: tuple[str, str]) -> None:
    assert report.made_from(body) == made_of


# --- The command -----------------------------------------------------------------------------------------


def test_a_report_of_jobs_that_ran(busy_site: Site) -> None:
    sender = [sys.executable, "send_job.py"]
    sent = busy_site.run(*sender, "--count", "2", "--set", "6.text=a <b>fox</b>", "--wait")
    job_ids = re.findall(r"sent successfully: (\S+)", sent.stdout)
    failing = busy_site.send({"prompt": {"1": {"class_type": "NoSuchNode", "inputs": {}}}})
    busy_site.await_result(failing)
    ran = busy_site.run(
        sys.executable, "fleet.py", "report", *job_ids, failing, "--price", "3600", "--output", "pages/report.html"
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "Report of 3 jobs: pages/report.html\n", "")
    root = tree((busy_site.folder / "pages/report.html").read_text())
    assert figures(root)["jobs succeeded"] == ("2 of 3", "1 failed")
    assert figures(root)["cost"][1] == "$3600/h", "of an instance whose type is not known"
    assert texts(root, ".//article/p[1]")[:2] == ["a <b>fox</b>"] * 2
    for image in root.iter("img"):
        body = base64.b64decode(image.get("src", "").removeprefix("data:image/png;base64,"))
        assert Image.open(io.BytesIO(body)).size == (512, 512)


def test_large_images_lie_beside_the_page(make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch) -> None:
    site = make_site()
    body = png(WORKFLOW)
    result = receipt(0, 1, 2)
    for number, name in enumerate(("a/../../x.PNG", "y.png", "clip.mp4")):
        key = f"output/{result['job_id']}/{number}"
        site.s3.put_object(Bucket=site.bucket, Key=key, Body=body)
        result["outputs"].append({"filename": name, "type": "output", "s3_key": key})
    result["outputs"].append({"filename": "gone.png", "type": "output", "s3_key": "output/gone.png"})
    monkeypatch.setattr(report, "EMBEDDED_BYTES", len(body) - 1)
    page = site.folder / "pages/report.html"
    report.write_report(site.s3, site.bucket, "x", [result], {}, page)
    sources = [image.get("src", "") for image in tree(page.read_text()).iter("img")]
    assert sources == [f"report-files/{result['job_id']}-{number}.png" for number in (1, 2)]
    assert [(page.parent / source).read_bytes() for source in sources] == [body, body]
    monkeypatch.setattr(report, "EMBEDDED_BYTES", len(body))
    monkeypatch.setattr(report, "PAGE_BYTES", 2 * len(body) - 1)
    report.write_report(site.s3, site.bucket, "x", [result], {}, page)
    sources = [image.get("src", "") for image in tree(page.read_text()).iter("img")]
    assert [source[:5] for source in sources] == ["data:", "repor"], "all of them would be more than a page may have"


def test_what_was_an_instance_is_known_when_it_is_gone(cloud: LocalCloud, fleet: tuple[Site, Machine]) -> None:
    site, machine = fleet
    group = f"{site.prefix}-{site.env}-asg"
    boot = {"booted_at": iso(0), "phases": {}, "total": 30.5}
    site.s3.put_object(Bucket=site.bucket, Key=f"output/{machine.instance_id}/boot.json", Body=json.dumps(boot))
    site.start_comfyui()
    site.start_worker()
    await_that("the idle worker has left", lambda: group_of(cloud, group)["Instances"] == [])
    settings = load_settings(path=site.folder / "env", environ={})
    before = datetime.now(UTC).timestamp() - 600
    autoscaling = cloud.client("autoscaling")
    lives = report.read_lives(site.s3, autoscaling, settings, [machine.instance_id, "i-other"])
    life = lives[machine.instance_id]
    assert (life.type, life.price, life.ready) == ("g5.2xlarge", 1.212, T0 + 30.5)
    assert life.launched is not None
    assert life.ended is not None
    assert before < life.launched < life.ended
    assert lives["i-other"] == Life()


def test_a_job_without_result_is_left_out(make_site: Callable[..., Site]) -> None:
    site = make_site()
    job_id = new_job_id()
    ran = site.run(sys.executable, "fleet.py", "report", job_id)
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr == f"fleet.py: job {job_id} has no result yet: it is left out\n"
    assert not (site.folder / "report.html").exists()
