"""send_job.py for those who keep the fleet: how it stands, dead jobs, the report."""

from __future__ import annotations

import base64
import io
import json
import re
import signal
import subprocess
import sys
import zlib
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from xml.etree import ElementTree

import pytest
from local_cloud import ACCOUNT_ID, REGION, Fault, LocalCloud, Machine, free_port
from moto.backends import get_backend
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from workplace import LIMIT_S, Site, await_that, group_of, image_workflow

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
    (policy,) = [meta.get("content", "") for meta in root.iter("meta") if meta.get("http-equiv")]
    assert policy.startswith("default-src 'none'; img-src 'self' data: file:;")
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


EVIL = "</p><script>alert(1)</script><img src=x onerror=alert(1)>\"' style='x' &amp; \0\x1b\ud800 \ufffe 日本<\""


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
    result["outputs"].append({"filename": "gone.png", "type": "output", "s3_key": "output/gone.png"})
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
    [
        (["--report", "x/../y"], "that is no job id"),
        (["--report", new_job_id(), "--price", "-1"], "--price -1"),
        (["--fleet", "--dead"], "not allowed with"),
        (["--watch"], "to --fleet: add it"),
        (["--dead", "--yes"], "belongs to --purge-dead"),
        (["x.json", "--redrive"], "send no job"),
        (["--dead", "--exec-cmd", "true"], "send no job"),
    ],
)
def test_misuse_is_refused(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        send_job.main(arguments)
    assert words in capsys.readouterr().err


# --- The fleet at a glance -------------------------------------------------------------------------------


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch) -> Callable[[Site], None]:
    """Gives this process a site's settings."""

    def become(site: Site) -> None:
        for name, value in site.environment().items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(send_job, "load_settings", lambda _: load_settings(None, site.folder / "env"))

    return become


def put_metrics(cloud: LocalCloud, site: Site) -> None:
    """What the workers and SQS publish: of this hour, and of the one before."""
    now = datetime.now(UTC)
    data = [
        {"MetricName": name, "Value": value, "Timestamp": now - timedelta(minutes=age), "Unit": "Count"}
        for name, value, age in (
            ("JobsSucceeded", 40, 50), ("JobsSucceeded", 2, 1), ("JobsSucceeded", 1000, 70), ("JobsFailed", 3, 30),
        )
    ]  # fmt: skip
    cloud.client("cloudwatch").put_metric_data(Namespace=f"{site.prefix}/{site.env}", MetricData=data)
    backend = get_backend("cloudwatch")[ACCOUNT_ID][REGION]
    queue = [{"Name": "QueueName", "Value": f"{site.prefix}-{site.env}-queue"}]
    for age, value in ((2, 100.0), (1, 90.0)):  # nobody but AWS may publish there
        when = now - timedelta(minutes=age)
        name = "ApproximateAgeOfOldestMessage"
        datum = {
            "MetricName": name,
            "Value": value,
            "Timestamp": when.replace(tzinfo=None),
            "Dimensions": queue,
            "Unit": "Seconds",
        }
        backend.put_metric_data("AWS/SQS", [datum])


def put_worker(site: Site, instance_id: str, jobs: list[dict[str, Any]]) -> None:
    news = {"instance_id": instance_id, "instance_type": "g5.2xlarge", "jobs": jobs, "updated_at": iso(0)}
    site.s3.put_object(Bucket=site.bucket, Key=f"output/{instance_id}/worker.json", Body=json.dumps(news))


def test_the_fleet_at_a_glance(
    cloud: LocalCloud, fleet: tuple[Site, Machine], monkeypatch: pytest.MonkeyPatch, ours: Callable[[Site], None],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    site, machine = fleet
    ours(site)
    put_metrics(cloud, site)
    for _ in range(3):
        site.send(image_workflow())
    site.sqs.receive_message(QueueUrl=site.queue_url)
    site.sqs.send_message(QueueUrl=site.dlq_url, MessageBody="x")
    assert send_job.main(["--fleet", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["queue"] == {"waiting": 2, "in_flight": 1, "dead": 1}
    assert found["oldest_s"] == 90
    assert found["last_hour"] == {"succeeded": 42, "failed": 3}
    assert found["group"] == {"wanted": 1, "least": 0, "most": 5}
    (instance,) = found["instances"]
    assert 0 <= instance.pop("age_s") < 100
    one = {"instance_id": machine.instance_id, "type": "g5.2xlarge", "jobs": [], "usd_per_hour": 1.212}
    assert instance == one | {"state": "booting"}, "its worker has not begun"
    assert (found["usd_per_hour"], found["scaling_errors"], found["not_seen"]) == (1.212, [], [])

    job = {"job_id": new_job_id(), "since": iso(0), "node_title": "K采样器\x1b[2J", "value": 12, "max": 20}
    put_worker(site, machine.instance_id, [job])
    monkeypatch.setattr(cloud, "launch_failure", "We currently do not have sufficient g5.2xlarge capacity in the "
                        "Availability Zone you requested (us-west-2a). Launching EC2 instance failed.")  # fmt: skip
    cloud.client("autoscaling").set_desired_capacity(
        AutoScalingGroupName=f"{site.prefix}-{site.env}-asg", DesiredCapacity=2
    )
    assert send_job.main(["--fleet", site.env, "--price", "2"]) == 0
    title, queue, hour, instances, one_line, scaling = capsys.readouterr().out.splitlines()
    assert title.startswith(f"Environment {site.env} in us-west-2, 20")
    assert queue == "queue      2 waiting, 1 in flight, 1 dead; the oldest for 90.0 s"
    assert hour == "last hour  42 succeeded, 3 failed"
    assert instances == "instances  1 there, 2 wanted (0 to 5): 1 busy; $2 an hour on demand"
    assert re.fullmatch(
        rf"  {machine.instance_id}  g5\.2xlarge   busy +[\d.]+ s  {job['job_id']} for \d.*, K采样器 \[2J 12 of 20",
        one_line,
    ), one_line
    assert re.match(r"scaling    [\d.]+ s ago: AWS has no g5.2xlarge free in us-west-2a just now", scaling)


def test_a_missing_permission_costs_its_line_only(
    cloud: LocalCloud, fleet: tuple[Site, Machine], monkeypatch: pytest.MonkeyPatch, ours: Callable[[Site], None],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    site, machine = fleet
    ours(site)
    put_worker(site, machine.instance_id, [])
    refused = {
        "DescribeInstances": Fault(403, "UnauthorizedOperation"),
        "GetMetricData": Fault(403, "AccessDenied"),
        "DescribeScalingActivities": Fault(403, "AccessDenied"),
    }
    monkeypatch.setattr(cloud, "fault", lambda _, operation: refused.get(operation))
    assert send_job.main(["--fleet"]) == 0
    _, queue, hour, instances, one, *rest = capsys.readouterr().out.splitlines()
    assert queue == "queue      0 waiting, 0 in flight, 0 dead"
    assert hour == "last hour  not known"
    assert instances == "instances  1 there, 1 wanted (0 to 5): 1 idle; $1.212 an hour on demand"
    assert one == f"  {machine.instance_id}  g5.2xlarge   idle"
    assert rest == [
        "not seen   not allowed: cloudwatch:GetMetricData",
        "not seen   not allowed: autoscaling:DescribeScalingActivities",
        "not seen   not allowed: ec2:DescribeInstances",
    ]
    monkeypatch.setattr(cloud, "fault", lambda service, _: Fault(403, "AccessDenied") if service == "s3" else None)
    assert send_job.main(["--fleet"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[3] == "instances  1 there, 1 wanted (0 to 5): 1 in service; $1.212 an hour on demand"
    assert lines[-1] == "not seen   not allowed: s3:GetObject"
    monkeypatch.setattr(cloud, "fault", lambda *_: Fault(403, "AccessDenied"))
    assert send_job.main(["--fleet"]) == 1
    assert capsys.readouterr().out.splitlines()[1:4] == [
        "queue      not seen",
        "last hour  not known",
        "instances  not seen",
    ]


def test_watching_prints_what_changes_where_nobody_can_see_it_redrawn(make_site: Callable[..., Site]) -> None:
    site = make_site()
    process = subprocess.Popen(
        [sys.executable, "send_job.py", "--fleet", "--watch"],
        cwd=site.folder,
        env=site.environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        lines = [process.stdout.readline()]
        site.send("x")
        lines.append(process.stdout.readline())
        process.send_signal(signal.SIGINT)
        assert process.wait(LIMIT_S) == 130
        assert process.stdout.read() == ""
    finally:
        process.kill()
        process.wait()
    group = "there is no group: scaling is off"
    assert [line.partition(" ")[2] for line in lines] == [
        f"0 waiting, 0 in flight, 0 dead; {group}\n",
        f"1 waiting, 0 in flight, 0 dead; {group}\n",
    ]


@pytest.mark.parametrize(
    ("lifecycle", "health", "jobs", "begun", "state"),
    [
        ("Pending:Wait", "Healthy", [], False, "booting"),
        ("InService", "Healthy", [], False, "booting"),
        ("InService", "Healthy", [], True, "idle"),
        ("InService", "Healthy", [{}], True, "busy"),
        ("InService", "HEALTHY", [], None, "in service"),
        ("InService", "Unhealthy", [{}], True, "unhealthy"),
        ("Terminating:Wait", "Healthy", [{}], True, "leaving"),
        ("Warmed:Stopped", "Healthy", [], True, "warm"),
    ],
)
def test_an_instance_in_one_word(
    lifecycle: str, health: str, jobs: list[Any], begun: bool | None, state: str
) -> None:
    assert send_job.state_of({"LifecycleState": lifecycle, "HealthStatus": health}, jobs, begun) == state


# --- Dead jobs -------------------------------------------------------------------------------------------


def dead(site: Site) -> list[str]:
    """The bodies in the dead-letter queue, which stay there."""
    messages = send_job.peek(site.sqs, site.dlq_url)
    return [message["Body"] for message in messages]


def test_a_dead_job_tells_its_story_and_can_be_sent_again(
    cloud: LocalCloud, fleet: tuple[Site, Machine], ours: Callable[[Site], None], capsys: pytest.CaptureFixture[str]
) -> None:
    site, machine = fleet
    ours(site)
    arn = site.sqs.get_queue_attributes(QueueUrl=site.dlq_url, AttributeNames=["QueueArn"])["Attributes"]["QueueArn"]
    policy = json.dumps({"deadLetterTargetArn": arn, "maxReceiveCount": 1})
    site.sqs.set_queue_attributes(QueueUrl=site.queue_url, Attributes={"RedrivePolicy": policy})
    job_id, refusing = new_job_id(), f"http://127.0.0.1:{free_port()}/"
    body = json.dumps({"prompt": image_workflow(), "job_id": job_id, "callback_url": refusing})
    site.send(body)
    site.start_comfyui()
    site.start_worker()
    await_that("the job is dead", lambda: site.depth(site.dlq_url) == (1, 0))
    await_that(
        "the idle worker has left", lambda: group_of(cloud, f"{site.prefix}-{site.env}-asg")["Instances"] == []
    )
    capsys.readouterr()
    assert send_job.main(["--dead"]) == 0
    title, job, reason, result, log = capsys.readouterr().out.splitlines()
    assert title == f"1 job in {site.prefix}-{site.env}-queue-dlq"
    assert re.fullmatch(rf"  {job_id}  workflow, sent \d{{4}}-\d\d-\d\d \d\d:\d\d UTC", job)
    assert re.match(rf"      attempt 1 of 3: the callback of job {job_id} failed: .*refused", reason)
    assert result == "      its result is stored all the same, succeeded"
    assert log == f"      s3://{site.bucket}/output/{machine.instance_id}/parse_job.log"
    assert dead(site) == [body], "looking leaves it there, for all to see"

    assert send_job.main(["--redrive"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == f"1 job sent back to {site.prefix}-{site.env}-queue"
    assert dead(site) == []
    (again,) = site.sqs.receive_message(QueueUrl=site.queue_url)["Messages"]
    assert again["Body"] == body
    assert group_of(cloud, f"{site.prefix}-{site.env}-asg")["DesiredCapacity"] == 1, "there is somebody to take it"


def test_job_ids_stay_and_nothing_is_lost_when_dead_jobs_are_sent_back(
    cloud: LocalCloud, make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch, ours: Callable[[Site], None],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    site = make_site()
    ours(site)
    own, workflow = new_job_id(), image_workflow()
    bodies: list[Any] = [
        workflow,
        {"prompt": workflow},
        {"exec_cmd": "true"},
        {"prompt": workflow, "job_id": own},
        [1],
    ]
    bodies += [{"prompt": image_workflow(n)} for n in range(15)]
    ids = [site.sqs.send_message(QueueUrl=site.dlq_url, MessageBody=json.dumps(body))["MessageId"] for body in bodies]
    monkeypatch.setattr(
        cloud, "fault", lambda _, operation: Fault(400, "AccessDenied") if operation == "SendMessageBatch" else None
    )
    assert send_job.main(["--redrive"]) == 1
    assert "10 jobs could not be sent back" in capsys.readouterr().err
    assert (site.depth(), site.depth(site.dlq_url)) == ((0, 0), (20, 0)), "all can be received at once"
    monkeypatch.setattr(send_job, "PEEK_S", 1)
    monkeypatch.setattr(
        cloud, "fault", lambda _, operation: Fault(400, "AccessDenied") if operation == "DeleteMessageBatch" else None
    )
    assert send_job.main(["--redrive"]) == 1
    assert capsys.readouterr().err == "send_job.py: not allowed: sqs:DeleteMessageBatch\n"
    assert site.depth() == (10, 0), "the first ten are in both queues"
    monkeypatch.setattr(cloud, "fault", lambda *_: None)
    site.sqs.purge_queue(QueueUrl=site.queue_url)
    await_that("they can be received again", lambda: site.depth(site.dlq_url) == (20, 0))
    assert send_job.main(["--redrive"]) == 0
    assert site.depth(site.dlq_url) == (0, 0)
    messages = send_job.peek(site.sqs, site.queue_url)
    found = {message["Body"] for message in messages}
    assert found == {
        json.dumps({"prompt": workflow, "job_id": ids[0]}),
        json.dumps({"prompt": workflow, "job_id": ids[1]}),
        json.dumps({"exec_cmd": "true", "job_id": ids[2]}),
        json.dumps({"prompt": workflow, "job_id": own}),
        "[1]",
        *(json.dumps(body | {"job_id": name}) for body, name in zip(bodies[5:], ids[5:], strict=True)),
    }


def test_dead_jobs_are_deleted_only_when_that_is_meant(
    make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch, ours: Callable[[Site], None],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    site = make_site()
    ours(site)
    site.sqs.send_message(QueueUrl=site.dlq_url, MessageBody="x\x1b[2J")
    asked: list[str] = []

    def answer(text: str) -> Callable[[str], str]:
        def give(question: str) -> str:
            asked.append(question)
            return text

        return give

    def close(_: str) -> str:
        raise EOFError

    for refusing in (answer(""), answer("yes"), close):
        monkeypatch.setattr("builtins.input", refusing)
        assert send_job.main(["--purge-dead"]) == 1
        assert len(dead(site)) == 1
    queue = f"{site.prefix}-{site.env}-queue-dlq"
    assert asked == [f"1 job in {queue} will be lost. Type {site.env} to delete them: "] * 2
    capsys.readouterr()
    assert send_job.main(["--dead"]) == 0
    _, job, reason = capsys.readouterr().out.splitlines()
    assert "no job (the message is not JSON" in job
    assert "no word of it in the logs" in reason
    monkeypatch.setattr("builtins.input", answer(f" {site.env} "))
    assert send_job.main(["--purge-dead"]) == 0
    assert dead(site) == []

    other = make_site()
    ours(other)
    other.sqs.send_message(QueueUrl=other.dlq_url, MessageBody="x")
    monkeypatch.setattr("builtins.input", close)
    assert send_job.main(["--purge-dead", "--yes"]) == 0
    assert dead(other) == []
    other.sqs.delete_queue(QueueUrl=other.dlq_url)
    capsys.readouterr()
    assert send_job.main(["--fleet"]) == 0
    assert "no dead-letter queue" in capsys.readouterr().out
