"""The local cloud of a test process, and the environments that tests make on it."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from aws_cli_server import AWS_CLI_SOCKET, AwsCliServer, aws_clis
from local_cloud import LocalCloud, Machine
from places import written_in_place
from workplace import Sample, Site, await_that, group_of
from workshop import Calls

import comfy_utils

# Nothing may ever reach a real AWS address, whatever a test forgets to set.
for _name in ("AWS_ENDPOINT_URL", "AWS_EC2_METADATA_SERVICE_ENDPOINT"):
    os.environ[_name] = "http://127.0.0.1:9"
os.environ.setdefault("AWS_ACCESS_KEY_ID", "local")
os.environ.setdefault("AWS_SECRET_ACCESS_KEY", "local")
# A script's background job ignores Ctrl-C, and so would every process that is started here.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    """How much of what takes minutes is tested."""
    parser.addoption("--full", action="store_true", help="go through every point where a test else takes a sample")
    parser.addoption("--seed", type=int, help="take the samples that an earlier run with this seed took")


def pytest_configure(config: pytest.Config) -> None:
    """Choose a seed where none is given. The processes that run the tests take that of the one that started them."""
    if config.option.seed is None:
        config.option.seed = getattr(config, "workerinput", {}).get("seed", random.randrange(1_000_000))


def pytest_configure_node(node: Any) -> None:
    """Tell such a process the seed."""
    node.workerinput["seed"] = node.config.option.seed


def pytest_sessionstart(session: pytest.Session) -> None:
    """Start an AWS CLI for all processes that run the tests. They inherit where it is."""
    if AWS_CLI_SOCKET not in os.environ:
        server = AwsCliServer()
        os.environ[AWS_CLI_SOCKET] = server.socket
        session.config.add_cleanup(server.end)


def pytest_report_header(config: pytest.Config) -> list[str]:
    """What repeats this run."""
    chosen = "every point is tested (--full)" if config.option.full else f"samples: --seed {config.option.seed}"
    return [chosen, f"AWS CLI: version {max(aws_clis())}"]


def take_samples(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of the tests that are marked as alike keep as many as their mark says, chosen by the seed."""
    alike: dict[str, list[pytest.Item]] = {}
    sizes: dict[str, int] = {}
    for item in items:
        if mark := item.get_closest_marker("sampled"):
            group, sizes[group] = mark.args
            alike.setdefault(group, []).append(item)
    if config.option.full or config.option.keyword or any("::" in argument for argument in config.args):
        return  # all, or what was named
    left_out: set[pytest.Item] = set()
    for group, members in alike.items():
        chance = random.Random(f"{config.option.seed} {group}")
        left_out.update(chance.sample(members, max(0, len(members) - sizes[group])))
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=list(left_out))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deal the tests: each process is given a run of the list. It begins with its share of the slow ones.

    A module's other tests stay together, because what they share is then made in one process and not in each.
    """
    given = getattr(config, "workerinput", {}).get("workercount") or config.getoption("numprocesses", None)
    processes = int(given or 1)
    take_samples(config, items)
    slow = [item for item in items if item.get_closest_marker("slow")]
    modules: dict[Path, list[pytest.Item]] = {}
    for item in items:
        if not item.get_closest_marker("slow"):
            modules.setdefault(item.path, []).append(item)
    shares = [slow[number::processes] for number in range(processes)]
    for module in sorted(modules.values(), key=len, reverse=True):
        min(shares, key=len).extend(module)
    items[:] = [item for share in shares for item in share]


@pytest.fixture
def sample(request: pytest.FixtureRequest) -> Sample:
    """Some of the points a test could go through, by the seed."""
    options = request.config.option
    chance = random.Random(f"{options.seed} {request.node.nodeid}")

    def take(points: Sequence[Any], size: int) -> list[Any]:
        taken = range(len(points)) if options.full else chance.sample(range(len(points)), min(size, len(points)))
        return [points[number] for number in sorted(taken)]

    return take


@pytest.fixture(scope="session", autouse=True)
def scripts_stay_as_they_are() -> Iterator[None]:
    """No test changes the files that the others' folders link to."""
    yield
    assert written_in_place() == []


@pytest.fixture(scope="session")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCloud]:
    """The local cloud of this test process."""
    with LocalCloud(tmp_path_factory.mktemp("cloud")) as cloud:
        yield cloud


@pytest.fixture
def make_site(cloud: LocalCloud, tmp_path: Path) -> Iterator[Callable[..., Site]]:
    """Makes sites whose processes end with the test."""
    sites: list[Site] = []

    def make(**settings: str) -> Site:
        sites.append(Site(cloud, tmp_path / f"site{len(sites)}", **settings))
        return sites[-1]

    yield make
    for site in sites:
        site.end()


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch) -> Callable[[Site], None]:
    """Gives this process a site's settings."""

    def become(site: Site) -> None:
        for name, value in site.environment().items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(comfy_utils, "HERE", site.folder)

    return become


@pytest.fixture
def sender_site(make_site: Callable[..., Site], ours: Callable[[Site], None]) -> Site:
    """A site whose settings this process has, too."""
    site = make_site()
    ours(site)
    return site


@pytest.fixture(scope="module")
def busy_site(cloud: LocalCloud, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A fleet site with ComfyUI and a worker, shared by a module's tests, which must not disturb them."""
    site = Site(cloud, tmp_path_factory.mktemp("site") / "comfy")
    site.start_comfyui()
    site.start_worker()
    yield site
    site.end()


@pytest.fixture
def fleet(cloud: LocalCloud, make_site: Callable[..., Site]) -> tuple[Site, Machine]:
    """A site on an instance of a group with a hook. The group's own instances have no disk and do nothing."""
    site = make_site(SCALE_COOLDOWN="2")
    ec2, autoscaling = cloud.client("ec2"), cloud.client("autoscaling")
    group = f"{site.prefix}-{site.env}-asg"
    image = ec2.describe_images()["Images"][0]["ImageId"]
    ec2.create_launch_template(
        LaunchTemplateName=group, LaunchTemplateData={"ImageId": image, "InstanceType": "g5.2xlarge"}
    )
    autoscaling.create_auto_scaling_group(
        AutoScalingGroupName=group,
        LaunchTemplate={"LaunchTemplateName": group},
        MinSize=0,
        MaxSize=5,
        DesiredCapacity=1,
        AvailabilityZones=["us-west-2a"],
        NewInstancesProtectedFromScaleIn=True,
        LifecycleHookSpecificationList=[
            {
                "LifecycleHookName": "comfy-terminating",
                "LifecycleTransition": "autoscaling:EC2_INSTANCE_TERMINATING",
                "HeartbeatTimeout": 60,
                "DefaultResult": "CONTINUE",
            }
        ],
    )
    instance_id = group_of(cloud, group)["Instances"][0]["InstanceId"]
    machine: Machine = await_that("the machine is there", lambda: cloud.machines.get(instance_id))
    site.metadata_endpoint = machine.metadata_endpoint
    return site, machine


@pytest.fixture
def calls(cloud: LocalCloud, monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Every call of this test to the local cloud, one of which may be answered with a fault."""
    calls = Calls()
    monkeypatch.setattr(cloud, "fault", calls)
    return calls
