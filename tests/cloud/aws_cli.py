"""The real AWS CLI without its start-up: a server that has it imported runs each call in a fork of itself.

Starting the CLI takes half a second of processor time, and the scripts call it dozens of times. A local cloud
starts the server, or the tests one for all their clouds (aws_cli_server.py); bin/aws is the caller, by way of
aws_call.py, and gets the exit code. A caller that is killed takes its call with it. The configuration files of the
AWS CLI are read once, so a test that has its own starts the CLI itself. Works with version 1 and version 2.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
import sys
import threading
from typing import Any

import awscli.clidriver

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


def serve(listener: socket.socket) -> None:
    """Answer callers until the process at the other end of standard input is gone."""
    driver = awscli.clidriver.create_clidriver()
    warm(driver)
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


def warm(driver: Any) -> None:
    """Read and build before the forks what each call would else read and build again."""
    commands = driver.create_help_command().command_table
    for service in SERVICES:
        commands["s3api" if service == "s3" else service].create_help_command()
        # With keys of its own, or the session would keep those of the server for all who call.
        driver.session.create_client(service, "us-west-2", aws_access_key_id="x", aws_secret_access_key="x")
    # Where a service has nothing to read the CLI would look for it in every folder, each time.
    driver.session.get_component("data_loader").list_available_services("paginators-1")
    gc.freeze()
    gc.disable()


def run(driver: Any, connection: socket.socket) -> None:
    """In a process of its own: one call."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    length, streams, _, _ = socket.recv_fds(connection, 8, 3)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    request = connection.recv(int.from_bytes(length), socket.MSG_WAITALL).split(b"\0")
    folder, arguments = request[0], [os.fsdecode(argument) for argument in request[2 : 2 + int(request[1])]]
    variables = [os.fsdecode(variable).partition("=") for variable in request[2 + int(request[1]) :]]

    def await_caller() -> None:
        if not connection.recv(1):
            os._exit(130)

    threading.Thread(target=await_caller, daemon=True).start()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update({name: value for name, _, value in variables})
    sys.argv = ["aws", *arguments]
    code = 255
    try:
        # Version 2 turns what a call raises into its exit code outside of the driver.
        entry = getattr(awscli.clidriver, "AWSCLIEntryPoint", lambda driver: driver)
        code = entry(driver).main(arguments)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 255
    finally:
        try:
            sys.stdout.flush()
        finally:
            connection.sendall(bytes([code & 255]))
            os._exit(0)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
