#!/usr/bin/env bash
#
# Runs a command in the network, mounts and processes of its own that machine.sh has made: loopback is brought up, and
# MACHINE_PLACE is memory, which is gone in the end.
#
# Usage: inside.sh COMMAND [ARGUMENT ...]
set -euo pipefail

export TEST_LIMIT_S=${TEST_LIMIT_S:-240} # how long anything is awaited, as the host may be busy
ip link set lo up
mount -t tmpfs -o mode=755,size=75% machines "$MACHINE_PLACE"
mknod --mode=666 "$MACHINE_PLACE/fuse" c 10 229
"$@"
