"""provision/template.sh: what a fleet instance runs at its first boot."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from aws_fixtures import ENV_FILE, Bundle
from places import CLOUD


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (ENV_FILE, ENV_FILE.replace("ENV=base", "ENV=pro")),
        ("# mine\nENV=test\nMY_ENV=base\nX=y", "# mine\nENV=pro\nMY_ENV=base\nX=y"),
        ("REGION=us-west-2\nS3_BUCKET=a-${ENV}\n", "ENV=pro\nREGION=us-west-2\nS3_BUCKET=a-${ENV}\n"),
    ],
    ids=["as shipped", "another ENV", "no ENV line"],
)
def test_user_data_chooses_the_environment_and_forgets_the_logs(
    bundle: Bundle, tmp_path: Path, before: str, after: str
) -> None:
    user_data = bundle.run_function("user_data", "template").stdout
    assert "home=${COMFY_HOME:-/home/ubuntu/comfy}" in user_data
    home = tmp_path / "comfy"
    (home / "logs" / "old").mkdir(parents=True)
    (home / "logs" / "parse_job.log").write_text("the base machine's")
    (home / "ComfyUI").mkdir()
    (home / "env").write_text(before)
    (home / "env").chmod(0o600)
    for _ in range(2):
        subprocess.run(
            ["bash", "-c", user_data],
            env={
                "PATH": f"{CLOUD}/bin:{os.environ['PATH']}",
                "COMFY_HOME": str(home),
                "LOCAL_INSTANCE_DIR": "/of/i-0123456789abcdef0",
            },
            check=True,
        )
        assert (home / "env").read_text() == after
        assert (home / "env").stat().st_mode & 0o777 == 0o600
        assert {path.name for path in home.iterdir()} == {"env", "logs", "ComfyUI", "first-boot"}
        assert (home / "first-boot").read_text() == "i-0123456789abcdef0\n"
        assert list((home / "logs").iterdir()) == []
