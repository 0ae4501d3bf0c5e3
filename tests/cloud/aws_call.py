"""One call of the AWS CLI, handed to the server of aws_cli.py: arguments, environment, working directory and streams.

A script makes a hundred calls, so this starts with as little as there is: without json, and with the part of
socket that is built in.
"""

import array
import os
import sys
from _socket import AF_UNIX, SCM_RIGHTS, SOL_SOCKET, socket

folder = os.getcwdb()  # noqa: PTH109 - pathlib would double the start-up
environment = [name + b"=" + value for name, value in os.environb.items()]
arguments = [os.fsencode(argument) for argument in sys.argv[1:]]
request = b"\0".join([folder, b"%d" % len(arguments), *arguments, *environment])
connection = socket(AF_UNIX)
connection.connect(os.environ["LOCAL_AWS_CLI"])
connection.sendmsg([len(request).to_bytes(8)], [(SOL_SOCKET, SCM_RIGHTS, array.array("i", [0, 1, 2]))])
connection.sendall(request)
answer = connection.recv(1)
sys.exit(answer[0] if answer else 255)
