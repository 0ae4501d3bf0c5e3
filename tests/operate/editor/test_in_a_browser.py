"""ComfyUI's own editor in a real browser, before a fleet that begins at zero instances.

The pictures in docs/ are made by: SCREENS=docs pytest tests/operate/editor
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from drawn import portrait, retouch
from editor_tools import Designer, open_browser
from fleet_nodes import RECORDINGS, object_info, store_nodes
from gateway_tools import Door
from gateway_walk import picture
from local_cloud import LocalCloud, Machine
from workplace import Site, await_that, group_of
from workshop import speed_up

from comfy_utils import iso
from ground.comfyui import SYSTEM_STATS_KEY
from operate.gateway.editor_userdata import CHANGED


class Fleet:
    """A group of no instances. The one that is launched boots when the test says so."""

    def __init__(self, cloud: LocalCloud, site: Site) -> None:
        self.cloud, self.site = cloud, site
        self.name = f"{site.prefix}-{site.env}-asg"
        cloud.client("ec2").create_launch_template(
            LaunchTemplateName=self.name,
            LaunchTemplateData={"ImageId": cloud.client("ec2").describe_images()["Images"][0]["ImageId"], "InstanceType": "g5.2xlarge"},
        )  # fmt: skip
        cloud.client("autoscaling").create_auto_scaling_group(
            AutoScalingGroupName=self.name,
            LaunchTemplate={"LaunchTemplateName": self.name},
            MinSize=0,
            MaxSize=5,
            DesiredCapacity=0,
            AvailabilityZones=["us-west-2a"],
            NewInstancesProtectedFromScaleIn=True,
        )

    def instances(self) -> list[dict[str, Any]]:
        return list(group_of(self.cloud, self.name)["Instances"])

    def boot(self) -> None:
        """What is left of the boot: ComfyUI and the worker come."""
        (instance,) = await_that("an instance is launched", self.instances)
        machine: Machine = await_that("it is there", lambda: self.cloud.machines.get(instance["InstanceId"]))
        self.site.metadata_endpoint = machine.metadata_endpoint
        now = time.time()
        report = {
            "booted_at": iso(datetime.fromtimestamp(now, UTC)),
            "comfyui_started_at": now,
            "phases": {"system": 0.0},
        }
        (self.site.folder / "logs/boot.json").write_text(json.dumps(report))
        self.site.start_comfyui()
        self.site.start_worker()

    def mount(self, name: str) -> None:
        """What Mountpoint does with an input, as soon as it is there."""
        await_that(f"{name} is uploaded", lambda: self.site.keys(f"input/{name}"))
        self.site.s3.download_file(self.site.bucket, f"input/{name}", str(self.site.folder / "ComfyUI/input" / name))


@pytest.fixture
def fleet(cloud: LocalCloud, tmp_path: Path) -> Iterator[Fleet]:
    site = Site(cloud, tmp_path / "comfy", SCALE_COOLDOWN="3600")  # it does not leave, however slow this machine is
    site.variables |= {"STANDIN_STEP_SECONDS": "0.1"}
    speed_up(site, "operate/gateway/nodes.py", {"FILES_S = 60.0, 10.0": "FILES_S = 60.0, 0.5"})
    speed_up(site, "operate/gateway/fleet_news.py", {"LIFE_S = 30.0": "LIFE_S = 1.0"})
    store_nodes(
        site, {name: node for name, node in object_info().items() if "category" in node}
    )  # all but pretended ones
    for key, body in {
        SYSTEM_STATS_KEY: json.dumps(RECORDINGS["system_stats"]["body"]).encode(),
        "editor/user/workflows/portrait.json": portrait(),
        "editor/user/workflows/retouch.json": retouch("broken.png"),
        "models/checkpoints/v1-5-pruned-emaonly-fp16.safetensors": b"",
        "input/broken.png": b"no picture",
    }.items():
        site.s3.put_object(Bucket=site.bucket, Key=key, Body=body)
    yield Fleet(cloud, site)
    site.end()


def saved(fleet: Fleet, name: str) -> str:
    """A workflow as it lies in the bucket."""
    key = f"editor/user/workflows/{name}.json"
    return str(fleet.site.s3.get_object(Bucket=fleet.site.bucket, Key=key)["Body"].read(), "utf-8")


@pytest.mark.slow
def test_a_designers_day(fleet: Fleet, cloud: LocalCloud) -> None:
    printed = fleet.site.run("./create_env.sh", "--print-policy", "sender", fleet.site.env)
    door = Door(fleet.site, more=cloud.allow_only(f"sender-{fleet.site.env}", printed.stdout))
    with open_browser() as browser:
        her = Designer(browser, door.url)
        wakes_the_fleet(her, fleet)
        sees_and_mends_a_failure(her, fleet)
        interrupts(her)
        her.come_back()
        her.gallery(2)
        works_with_somebody(her, him := Designer(browser, door.url), fleet)
        looks_from_a_telephone(him)
        assert her.complaints == [], "what a real ComfyUI's console would not have"


def wakes_the_fleet(her: Designer, fleet: Fleet) -> None:
    """From zero instances to a picture."""
    her.open("portrait")
    her.change("CLIPTextEncode", "text", "a blue fox")
    assert fleet.instances() == []
    her.run()
    her.page.locator("#fleet-line", has_text="The first instance is coming").wait_for()
    page = her.page.context.new_page()
    page.goto(f"{her.url}/fleet?lang=zh")
    page.get_by_text("第一个实例正在到来").wait_for()
    assert fleet.instances()[0]["InstanceId"] in page.content()
    page.close()
    her.picture_of_the_screen("editor-waking.png")
    fleet.boot()
    her.sees_picture()
    her.picture_of_the_screen("editor-done.png")
    her.sees("document.querySelector('#fleet-line').style.display === 'none'")
    her.gallery(1)
    her.save()
    await_that("it is saved", lambda: "a blue fox" in saved(fleet, "portrait"))


def sees_and_mends_a_failure(her: Designer, fleet: Fleet) -> None:
    """A node fails, the editor says so; another input, brought by hand, and it works."""
    her.open("retouch")
    her.run()
    error = her.page.get_by_test_id("error-overlay")
    error.get_by_text("Load Image failed").wait_for()
    her.picture_of_the_screen("editor-failed.png")
    her.page.get_by_test_id("error-overlay-dismiss").click()
    her.drop("LoadImage", "good.png", picture("teal", 64))
    fleet.mount("good.png")
    her.run()
    assert "retouched" in her.sees_picture()


def interrupts(her: Designer) -> None:
    """A long one is seen to go on, and ended by hand."""
    her.open("portrait")
    her.change("KSampler", "steps", "5000")
    her.run()
    her.sees_progress()
    her.picture_of_the_screen("editor-running.png")
    her.page.get_by_label("Cancel current run").click()
    await_that("it is ended", lambda: her.page.evaluate(
        "fetch('/api/jobs?status=cancelled').then((answer) => answer.json()).then((found) => found.jobs.length)") == 1
    )  # fmt: skip


def works_with_somebody(her: Designer, him: Designer, fleet: Fleet) -> None:
    """Another browser sees what was saved; of two who save the later one is told."""
    him.open("portrait")
    him.sees("app.graph._nodes.some((node) => node.widgets?.some((each) => each.value === 'a blue fox'))")
    him.gallery(2)
    him.change("CLIPTextEncode", "text", "a fox of his")
    him.save()
    await_that("his is saved", lambda: "a fox of his" in saved(fleet, "portrait"))
    her.open("portrait")
    her.change("CLIPTextEncode", "text", "a fox of hers")
    her.save()
    her.page.get_by_text(CHANGED.partition(".")[0]).first.wait_for()
    assert "a fox of his" in saved(fleet, "portrait")
    her.complaints = [each for each in her.complaints if "409" not in each]
    assert him.complaints == []


def looks_from_a_telephone(him: Designer) -> None:
    """The fleet's page has all there is to know, and is not wider than a telephone."""
    him.page.set_viewport_size({"width": 390, "height": 844})
    words = ("g5.2xlarge", "succeeded", "failed", "interrupted", "$", "A boot usually takes")

    def tells_all() -> bool:
        him.page.goto(f"{him.url}/fleet")
        text = him.page.locator("main").inner_text()
        return all(word in text for word in words) and "not known" not in text

    await_that("all is told", tells_all)
    shown = "[...document.images].filter((each) => each.naturalWidth > 0).length"
    await_that("both pictures are shown", lambda: him.page.evaluate(shown) == 2)  # the page itself may run no script
    assert him.page.evaluate("document.documentElement.scrollWidth") <= 390
    him.picture_of_the_screen("fleet.png")
    assert him.complaints == []
