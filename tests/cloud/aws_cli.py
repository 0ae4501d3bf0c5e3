"""The real AWS CLI without its start-up: a server that has it imported runs each call in a fork of itself.

Starting the CLI takes half a second of processor time, and the scripts call it dozens of times. The local cloud
starts the server; bin/aws is the caller, which hands over its arguments, environment, working directory and
standard streams, and gets the exit code. A caller that is killed takes its call with it.
"""

from __future__ import annotations

import array
import json
import os
import signal
import socket
import sys

VARIABLE = "LOCAL_AWS_CLI"
"""Names the server's socket in the environment of those who may use it."""
SERVICES = (
    "autoscaling",
    "cloudwatch",
    "ec2",
    "iam",
    "resourcegroupstaggingapi",
    "s3",
    "service-quotas",
    "sqs",
    "sts",
)


def call(path: str, arguments: list[str]) -> int:
    """Have the server at `path` run the CLI with these arguments; returns its exit code."""
    folder = os.getcwd()  # noqa: PTH109 - pathlib would double the start-up
    request = json.dumps({"arguments": arguments, "environment": dict(os.environ), "folder": folder})
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        streams = array.array("i", [0, 1, 2])
        connection.sendmsg([b"-"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)])
        connection.sendall(request.encode() + b"\n")
        answer = connection.recv(1)
    return answer[0] if answer else 255


def serve(listener: socket.socket) -> None:
    """Answer callers until the process at the other end of standard input is gone."""
    import threading

    import awscli.clidriver

    driver = awscli.clidriver.create_clidriver()
    for service in SERVICES:
        driver.session.get_component("data_loader").load_service_model(service, "service-2")
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for a call but its caller

    def await_end() -> None:
        while sys.stdin.buffer.read(1):
            pass
        os.killpg(0, signal.SIGKILL)  # calls under way, too

    threading.Thread(target=await_end, daemon=True).start()
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            run(driver, connection)
        connection.close()


def run(driver: object, connection: socket.socket) -> None:
    """In a process of its own: one call."""
    import threading

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _, streams, _, _ = socket.recv_fds(connection, 1, 3)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    request = json.loads(connection.makefile().readline())

    def await_caller() -> None:
        if not connection.recv(1):
            os._exit(130)

    threading.Thread(target=await_caller, daemon=True).start()
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv = ["aws", *request["arguments"]]
    code = 255
    try:
        code = driver.main(request["arguments"])  # type: ignore[attr-defined]
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 255
    finally:
        try:
            sys.stdout.flush()
        finally:
            connection.sendall(bytes([code & 255]))
            os._exit(0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(socket.socket(fileno=int(sys.argv[2])))
    sys.exit(call(os.environ[VARIABLE], sys.argv[1:]))
