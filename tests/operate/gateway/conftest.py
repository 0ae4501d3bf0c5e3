"""One fleet with a door for all tests of this process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from gateway_tools import Client, Door
from local_cloud import LocalCloud
from workplace import Site, await_that
from workshop import speed_up

from comfy_utils import OBJECT_INFO_KEY


@pytest.fixture(scope="session")
def door(cloud: LocalCloud, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    """A serve before a fleet of one worker, which has stored what it can do."""
    site = Site(cloud, tmp_path_factory.mktemp("gateway") / "comfy")
    site.variables["STANDIN_NODE_SECONDS"] = "12"  # of an ImageBlur, which is interrupted
    # What a client hears while its job runs comes of the job's being live.
    speed_up(site, "worker/progress.py", {"PROGRESS_S = 5\n": "PROGRESS_S = 3600\n"})
    install_custom_node(site)
    site.start_comfyui()
    site.start_worker()
    await_that("the nodes are stored", lambda: site.keys(OBJECT_INFO_KEY))
    yield Door(site, more=sender_of(cloud, site))
    site.end()


def install_custom_node(site: Site) -> None:
    """One that brings files for the editor, and routes of its own."""
    folder = site.folder / "ComfyUI/custom_nodes/a-pack"
    for name, text in CUSTOM_NODE.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


CUSTOM_NODE = {
    "__init__.py": "from server import PromptServer\nWEB_DIRECTORY = './web'\n"
    "@PromptServer.instance.routes.get('/pack/api/{name}')\nasync def answer(request): ...\n",
    "web/js/a.js": "import '../../../scripts/app.js'; // ü\n" + "// long\n" * 500,
    "web/js/b.css": "b { color: red }",
    "web/.secret": "not for pages",
    "web/setup.py": "not for pages",
}


def sender_of(cloud: LocalCloud, site: Site) -> dict[str, str]:
    """The environment of one who may do what the sender's policy says, and no more."""
    printed = site.run("./create_env.sh", "--print-policy", "sender", site.env)
    assert (printed.returncode, printed.stderr) == (0, "")
    return cloud.allow_only(f"sender-{site.env}", printed.stdout)


@pytest.fixture
def client(door: Door) -> Iterator[Client]:
    """Somebody who knows the fleet's address."""
    client = Client(door.address)
    yield client
    client.hang_up()


@pytest.fixture
def neighbour(door: Door) -> Iterator[Client]:
    """Somebody who knows a ComfyUI's address: that of the worker's own."""
    client = Client(f"127.0.0.1:{door.site.port}")
    yield client
    client.hang_up()
