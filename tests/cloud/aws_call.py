"""One call of the AWS CLI, handed to the server of aws_cli.py: arguments, environment, working directory and streams.

A script makes a hundred calls, so this starts with as little as there is: without json and array, and with the part
of socket that is built in. For the same reason it ends without tidying up.
"""

import os
import sys
from _socket import AF_UNIX, SCM_RIGHTS, SOL_SOCKET, socket

folder = os.getcwdb()  # noqa: PTH109 - pathlib would double the start-up
environment = [name + b"=" + value for name, value in os.environb.items()]
arguments = [os.fsencode(argument) for argument in sys.argv[1:]]
request = b"\0".join([folder, b"%d" % len(arguments), *arguments, *environment])
connection = socket(AF_UNIX)
connection.connect(os.environ["LOCAL_AWS_CLI"])
streams = b"".join(number.to_bytes(4, sys.byteorder) for number in (0, 1, 2))
connection.sendmsg([len(request).to_bytes(8)], [(SOL_SOCKET, SCM_RIGHTS, streams)])
connection.sendall(request)
answer = connection.recv(1)
os._exit(answer[0] if answer else 255)
