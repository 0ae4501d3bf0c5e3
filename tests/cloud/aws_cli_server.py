"""Starts the server of aws_cli.py: a cloud's own, or one that all test processes share."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from places import CLOUD

AWS_CLI_SOCKET = "LOCAL_AWS_CLI"  # names it in the environment of those who may use it
SYSTEM_PYTHON = "/usr/bin/python3"


@cache
def aws_clis() -> dict[int, str]:
    """The Pythons that can import an AWS CLI, by its version: 1 is a test package, 2 one of Debian."""
    found = {1: sys.executable}
    if not Path(SYSTEM_PYTHON).exists():
        return found
    say = "import awscli; print(awscli.__version__.partition('.')[0])"
    ran = subprocess.run([SYSTEM_PYTHON, "-c", say], capture_output=True, text=True, check=False)
    if ran.stdout.strip() == "2":
        found[2] = SYSTEM_PYTHON
    return found


class AwsCliServer:
    """It runs until `end`, and no longer than this process. Callers wait at its socket while it still imports."""

    def __init__(self, version: int | None = None) -> None:
        """Of this version, or the latest there is."""
        self.version = version or max(aws_clis())
        self._folder = Path(tempfile.mkdtemp(prefix="aws-cli-"))  # short: a socket's path may have 107 characters
        self.socket = str(self._folder / "socket")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(self.socket)
            listener.listen(64)
            self._process = subprocess.Popen(
                [aws_clis()[self.version], str(CLOUD / "aws_cli.py"), str(listener.fileno())],
                stdin=subprocess.PIPE,
                pass_fds=[listener.fileno()],
                start_new_session=True,
            )

    def end(self) -> None:
        """End it with all calls that are under way."""
        self._process.communicate()  # it ends when its standard input does
        shutil.rmtree(self._folder)
