"""What `pip install .` gives business code: the sender and nothing else, in an environment that is not ours."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from local_cloud import ACCOUNT_ID, REGION
from places import ROOT
from sender_tools import bodies
from workplace import LIMIT_S, Site, image_workflow

import send_job

FILES = {
    "send_job/__init__.py", "send_job/py.typed",
    "comfy_utils/__init__.py", "comfy_utils/py.typed", "comfy_utils/simple_workflow.json",
    *(str(path.relative_to(ROOT)) for room in ("sender", "ground") for path in (ROOT / room).glob("*.py")),
}  # fmt: skip


def run(*command: str | Path, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
    """Run a command that must succeed without a word of complaint, and return what it prints."""
    ran = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert (ran.returncode, ran.stderr) == (0, ""), ran.stdout
    return ran.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, as pip makes it of this folder."""
    out = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", out],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (made,) = out.iterdir()
    return made


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin/ of an empty environment into which the wheel was installed. boto3 comes from ours, or it would be fetched."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin/python"
    pip: list[str | Path] = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python]
    run(*pip, "install", "--quiet", "--no-index", "--no-deps", "--no-compile", wheel)
    (site_packages,) = folder.glob("lib/python3*/site-packages")
    (site_packages / "boto3_and_the_like.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python.parent


def test_the_wheel_has_the_sender_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        assert {name for name in archive.namelist() if ".dist-info/" not in name} == FILES


def test_what_pip_installs_besides_is_what_the_project_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = {line for line in (ROOT / "requirements.txt").read_text().splitlines() if not line.startswith("#")}
    assert {*project["dependencies"], *project["optional-dependencies"]["direct"]} == asked
    assert [line.partition(">")[0] for line in project["dependencies"]] == ["boto3", "python-dotenv"]


def test_it_sends_from_an_empty_folder(installed: Path, make_site: Callable[..., Site], tmp_path: Path) -> None:
    site = make_site()
    empty = tmp_path / "empty"
    empty.mkdir()
    mine, workflow = tmp_path / "mine.json", image_workflow()
    mine.write_text(json.dumps(workflow))
    known = {"ENV": site.env, "PREFIX": site.prefix, "REGION": REGION, "ACCOUNT_ID": ACCOUNT_ID}
    variables = site.environment() | known

    def there(command: str, *arguments: str | Path) -> str:
        return run(installed / command, *arguments, cwd=empty, env=variables)

    shutil.copy2(Path(__file__).parent / "ten_lines.py", tmp_path)
    by_import = there("python", tmp_path / "ten_lines.py", mine).strip()
    by_command = re.findall(r"successfully: (\S+)", there("send-job", "--count", "2"))
    sent = {body["job_id"]: body["prompt"] for body in bodies(site)}
    assert sent.pop(by_import) == workflow
    assert sent.keys() == set(by_command), "the demo workflow is there, too"
    assert there("send-job", "--help").startswith("usage: send-job ")
    where = there("python", "-c", "import send_job, sender.check as s; print(send_job.__file__, s.__file__)")
    assert where.count(str(installed.parent)) == 2, where
    assert list(empty.iterdir()) == []


def test_a_users_program_is_checked_against_its_types(installed: Path, tmp_path: Path) -> None:
    shutil.copy2(Path(__file__).parent / "ten_lines.py", tmp_path)
    (tmp_path / "wrong.py").write_text("import send_job\n\nsend_job.wait(7).gone\n")
    mypy: list[str | Path] = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--python-executable",
        installed / "python",
        "--config-file=",
    ]
    ran = subprocess.run(
        [*mypy, "ten_lines.py", "wrong.py"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    lines = [line for line in ran.stdout.splitlines() if ": error: " in line]
    assert [line.partition(":")[0] for line in lines] == ["wrong.py"] * 2, ran.stdout + ran.stderr


def test_direct_says_which_packages_it_needs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "websocket", None)
    assert send_job.main(["--direct", "127.0.0.1:9"]) == 2
    said = capsys.readouterr().err
    assert said == (
        "send_job.py: --direct needs the packages requests and websocket-client: "
        "pip install requests websocket-client\n"
    )
