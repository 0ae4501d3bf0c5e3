#!/usr/bin/env bash
#
# Boots a machine of nothing but systemd, and ends at once. Where that cannot be, its last line says why.
set -euo pipefail

cd "$MACHINE_PLACE"
mkdir layer work root
mount -t overlay overlay -o "lowerdir=$MACHINE_ROOT,upperdir=layer,workdir=work" root
timeout 120 systemd-nspawn --boot --directory root --machine probe --register=no --keep-unit \
  --network-namespace-path=/proc/self/ns/net --resolv-conf=off --timezone=off --link-journal=no --console=pipe \
  --bind="$MACHINE_PLACE/fuse:/dev/fuse" -- --unit=poweroff.target </dev/null
