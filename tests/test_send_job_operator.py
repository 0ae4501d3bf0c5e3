"""send_job.py for those who keep the fleet: how it stands, dead jobs, the report."""

from __future__ import annotations

import base64
import io
import json
import re
import sys
import zlib
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any
from xml.etree import ElementTree

import pytest
from conftest import Site, await_that, group_of
from local_cloud import LocalCloud, Machine
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import send_job
from comfy_utils import load_settings, new_job_id
from send_job import Life, Picture

T0 = 1_795_561_200.0


def iso(seconds: float) -> str:
    return datetime.fromtimestamp(T0 + seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def receipt(sent: float, started: float, finished: float, **more: Any) -> dict[str, Any]:
    """A job's result.json, its times in seconds after T0."""
    times = {"sent_at": iso(sent), "started_at": iso(started), "finished_at": iso(finished)}
    known: dict[str, Any] = {
        "job_id": new_job_id(),
        "status": "succeeded",
        "instance_id": "i-1",
        "outputs": [],
        "error": None,
    }
    return known | {"timings": times} | more


def draw(results: list[dict[str, Any]], pictures: Any = None, lives: Any = None) -> ElementTree.Element:
    """The page as a tree, which it is only when it is well formed."""
    return tree(send_job.draw_report("Environment pro", results, pictures or {}, lives or {}))


def tree(page: str) -> ElementTree.Element:
    """The page parsed; self-contained is checked on the way."""
    doctype, _, rest = page.partition("\n")
    assert doctype == "<!doctype html>"
    root = ElementTree.fromstring(rest)
    for element in root.iter():
        assert element.tag != "script"
        for name, value in element.items():
            assert not name.startswith("on"), "no handler"
            if name in ("src", "href"):
                assert re.match(r"data:image/|data:,$|#|report-files/", value), f"{value:.80} lies elsewhere"
    assert "url(" not in rest
    assert "@import" not in rest
    return root


def texts(root: ElementTree.Element, path: str) -> list[str]:
    return ["".join(element.itertext()) for element in root.iterfind(path)]


def figures(root: ElementTree.Element) -> dict[str, tuple[str, str]]:
    """The numbers at the top: name -> (value, what stands below)."""
    rows = root.iterfind(".//dl[@class='figures']/div")
    return {name: (value, more) for name, value, more in ([*map("".join, map(_itertext, row))] for row in rows)}


def _itertext(element: ElementTree.Element) -> list[str]:
    return list(element.itertext())


def widths(root: ElementTree.Element, kind: str) -> list[tuple[float, float]]:
    """Begin and width, in percent, of everything of that kind on the instances' lanes."""
    styles = [element.get("style", "") for element in root.iter() if kind in element.get("class", "").split()]
    found = [re.fullmatch(r"left:([\d.]+)%;width:([\d.]+)%", style) for style in styles]
    return [(float(match[1]), float(match[2])) for match in found if match]


# --- The page --------------------------------------------------------------------------------------------


def test_times_places_and_costs_are_those_of_the_receipts() -> None:
    results = [
        receipt(0, 50, 60, instance_id="i-1"),
        receipt(0, 60, 80, instance_id="i-1"),
        receipt(0, 40, 70, instance_id="i-2"),
    ]
    lives = {
        "i-1": Life(T0 + 10, T0 + 45, T0 + 100, "g5.2xlarge", 1.212),
        "i-2": Life(T0 + 20, T0 + 30, T0 + 75, "g5.2xlarge", 1.212),
    }
    root = draw(results, lives=lives)
    assert figures(root) == {
        "jobs succeeded": ("3 of 3", "none failed"),
        "all done in": ("80.0 s", "first after 60.0 s"),
        "wait, median": ("50.0 s", "95 % at most 60.0 s"),
        "run, median": ("20.0 s", "95 % at most 30.0 s"),
        "instance time busy": ("41 %", "60.0 s of 2 min 25 s"),  # 90 s and 55 s alive
        "cost": ("$0.0505", "g5.2xlarge $1.212/h"),  # the second is billed for a minute
    }
    assert widths(root, "idle") == [(10, 90), (20, 55)], "from launch to end, the window being 100 s"
    assert widths(root, "booting") == [(10, 35), (20, 10)]
    assert sorted(widths(root, "bar")) == [(40, 30), (50, 10), (60, 20)]
    (waiting,) = [path.get("d") for path in root.iter("path") if path.get("class") == "waiting"]
    assert waiting == "M0,100H0.00V66.67H0.00V33.33H0.00V0.00H40.00V33.33H50.00V66.67H60.00V100.00H100V100Z"
    assert [label for label in texts(root, ".//small") if "peak" in label] == ["peak 3", "peak 2"]


def test_jobs_that_overlap_on_an_instance_are_busy_time_once() -> None:
    root = draw([receipt(0, 0, 10), receipt(0, 9, 20), receipt(0, 12, 15)])
    assert figures(root)["instance time busy"] == ("100 %", "20.0 s of 20.0 s")


@pytest.mark.parametrize(
    ("lives", "cost"),
    [
        ({}, "price unknown"),
        ({"i-1": Life(type="p9.huge")}, "price unknown"),
        ({"i-1": Life(type="g5.2xlarge", price=3.6)}, "$0.0200"),  # nothing is known of its launch: its jobs' time
        ({"i-1": Life(T0 - 1000, None, None, "", 3.6)}, "$0.0300"),  # and still there
        ({"i-1": Life(T0, None, T0 + 3630, "", 3.6)}, "$0.6300"),  # as far as the page goes
    ],
)
def test_the_price_is_that_of_what_is_known(lives: dict[str, Life], cost: str) -> None:
    assert figures(draw([receipt(0, 10, 30)], lives=lives))["cost"][0] == cost


def test_no_price_is_invented() -> None:
    assert send_job.price_of("g5.2xlarge", "us-west-2") == 1.212
    assert send_job.price_of("g5.2xlarge", "eu-central-1") is None
    assert send_job.price_of("p9.huge", "us-west-2") is None


EVIL = "</p><script>alert(1)</script><img src=x onerror=alert(1)>\"' style='x' &amp; \0\x1b\ud800 \ufffe 日本"


def test_what_others_have_written_is_text() -> None:
    error = {"kind": EVIL, "message": EVIL}
    results = [
        receipt(0, 1, 2, status="failed", error=error, instance_id=EVIL),
        receipt(0, 1, 2, outputs=[{"filename": EVIL, "type": "output"}]),
        receipt(0, 1, 2),
    ]
    picture = Picture("data:image/png;base64,AA==", EVIL, EVIL, EVIL)
    root = tree(send_job.draw_report(EVIL, results, {results[2]["job_id"]: [picture]}, {EVIL: Life(type=EVIL)}))
    clean = EVIL.replace("\0\x1b", "").replace("\ud800", "?").replace(" \ufffe ", "  ")
    assert texts(root, ".//h1") == [clean]
    failed, named, drawn = root.iterfind(".//article")
    assert texts(failed, ".//p[@class='error']") == [f"{clean} {clean}"]
    assert texts(named, ".//p[@class='none']") == [clean]
    assert [each.get("alt") for each in drawn.iter("img")] == [clean]


def test_pages_of_none_and_of_many_jobs() -> None:
    assert texts(draw([]), ".//header/p") == ["No jobs"]
    failed = {"status": "failed", "error": {"kind": "execution_error", "message": "no"}}
    results = [
        receipt(n / 10, 5 * n, 5 * n + 4, instance_id=f"i-{n % 20}", **(failed if n % 9 == 0 else {}))
        for n in range(60)
    ]
    root = draw(results)
    assert texts(root, ".//header/p")[0].endswith("60 jobs on 20 instances")
    assert figures(root)["jobs succeeded"] == ("53 of 60", "7 failed")
    assert len(widths(root, "bar")) == len(list(root.iterfind(".//article"))) == 60
    anchors = {f"#{article.get('id')}" for article in root.iterfind(".//article")}
    assert {bar.get("href") for bar in root.iter("a") if "bar" in bar.get("class", "")} == anchors


def test_receipts_of_the_same_moment_are_drawn() -> None:
    (bar,) = widths(draw([receipt(0, -1, 0)]), "bar")  # the instance's clock is behind
    assert bar == (0, 0)


@pytest.mark.parametrize(
    ("long_s", "first", "last"),
    [(13, "0 s", "12 s"), (100, "0 s", "1.5 min"), (600, "0 s", "10 min"), (500_000, "0 s", "120 h")],
)
def test_the_axis_has_round_times(long_s: float, first: str, last: str) -> None:
    ticks = list(send_job.Span(0, long_s).ticks())
    assert 3 <= len(ticks) <= 7
    assert (send_job.round_time(ticks[0]), send_job.round_time(ticks[-1])) == (first, last)


# --- What images say of their making -----------------------------------------------------------------------


def png(prompt: Any, **more: str) -> bytes:
    """A PNG as ComfyUI saves it."""
    info, out = PngInfo(), io.BytesIO()
    for name, text in {**more, "prompt": prompt if isinstance(prompt, str) else json.dumps(prompt)}.items():
        info.add_text(name, text)
    Image.new("RGB", (8, 8)).save(out, "PNG", pnginfo=info)
    return out.getvalue()


WORKFLOW = {
    "3": {"class_type": "KSampler", "inputs": {"seed": 7, "positive": ["6", 0], "negative": ["7", 0]}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": " a red fox, 日本 "}},
    "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "watermark"}},
    "8": {"class_type": "RandomNoise", "inputs": {"noise_seed": 9, "text": ["6", 0]}},
}


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
    assert send_job.made_from(body) == made_of


# --- The command -----------------------------------------------------------------------------------------


def test_a_report_of_jobs_that_ran(busy_site: Site) -> None:
    sender = [sys.executable, "send_job.py"]
    sent = busy_site.run(*sender, "--count", "2", "--set", "6.text=a <b>fox</b>", "--wait")
    job_ids = re.findall(r"sent successfully: (\S+)", sent.stdout)
    failing = busy_site.send({"prompt": {"1": {"class_type": "NoSuchNode", "inputs": {}}}})
    busy_site.await_result(failing)
    ran = busy_site.run(*sender, "--report", *job_ids, failing, "--price", "3600", "--output", "pages/report.html")
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
    monkeypatch.setattr(send_job, "EMBEDDED_BYTES", len(body) - 1)
    page = site.folder / "pages/report.html"
    send_job.write_report(site.s3, site.bucket, "x", [result], {}, page)
    sources = [image.get("src", "") for image in tree(page.read_text()).iter("img")]
    assert sources == [f"report-files/{result['job_id']}-{number}.png" for number in (1, 2)]
    assert [(page.parent / source).read_bytes() for source in sources] == [body, body]
    monkeypatch.setattr(send_job, "EMBEDDED_BYTES", len(body))
    monkeypatch.setattr(send_job, "PAGE_BYTES", 2 * len(body) - 1)
    send_job.write_report(site.s3, site.bucket, "x", [result], {}, page)
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
    lives = send_job.read_lives(site.s3, autoscaling, settings, [machine.instance_id, "i-other"])
    life = lives[machine.instance_id]
    assert (life.type, life.price, life.ready) == ("g5.2xlarge", 1.212, T0 + 30.5)
    assert life.launched is not None
    assert life.ended is not None
    assert before < life.launched < life.ended
    assert lives["i-other"] == Life()


def test_a_job_without_result_is_left_out(make_site: Callable[..., Site]) -> None:
    site = make_site()
    job_id = new_job_id()
    ran = site.run(sys.executable, "send_job.py", "--report", job_id)
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr == f"send_job.py: job {job_id} has no result yet: it is left out\n"
    assert not (site.folder / "report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--report", "x/../y"], "that is no job id"), (["--report", new_job_id(), "--price", "-1"], "--price -1")],
)
def test_misuse_is_refused(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        send_job.main(arguments)
    assert words in capsys.readouterr().err
