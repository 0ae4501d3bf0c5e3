#!/usr/bin/env bash
#
# The scripts on real machines, no AWS account needed: Debian with systemd as its first process, cloud-init, a bucket
# mounted in user space and the AWS CLI v2, beside the local cloud in a network of its own. Ends everything it
# started.
#
# Usage: tests/machine.sh [PYTEST ARGUMENT ...]
#
# Needs root, and the Debian packages mmdebstrap, systemd-container, iproute2 and fuse3. Where something is missing
# every scene is counted as skipped, with the reason. The first run makes the machines' root in tests/.cache, in about
# a minute. Example: tests/machine.sh -k first_boot
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=tests/lib.sh
source "$ROOT/tests/lib.sh"
# shellcheck source=tests/machine/root.sh
source "$ROOT/tests/machine/root.sh"

main() {
  local code=0
  if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    show_help
    return
  fi
  prepare_venv "$ROOT"
  cd "$ROOT"
  export AWS_ENDPOINT_URL=http://127.0.0.1:9 AWS_EC2_METADATA_SERVICE_ENDPOINT=http://127.0.0.1:9
  export PYTHONPATH=$ROOT/tests/machine:$ROOT/tests/cloud
  export MACHINE_RUN=$$ MACHINE_MISSING="" MACHINE_PLACE
  MACHINE_MISSING=$(what_is_missing)
  MACHINE_PLACE=$(mktemp -d)
  trap clean_up EXIT
  if [[ -z $MACHINE_MISSING ]]; then
    if prepare_root; then
      MACHINE_MISSING=$(why_no_machine_boots)
    else
      MACHINE_MISSING="the root of the machines cannot be made: see the message above"
    fi
  fi
  if [[ -n $MACHINE_MISSING ]]; then
    pytest "${SCENES[@]}" "$@" || code=$?
  else
    in_own_namespaces "$ROOT/tests/machine/inside.sh" \
      pytest --basetemp "$MACHINE_PLACE/pytest" "${SCENES[@]}" "$@" || code=$?
  fi
  printf '%s: %d min %d s in all\n' "${0##*/}" $((SECONDS / 60)) $((SECONDS % 60))
  return "$code"
}

# What the scenes are given, and how they are found: tests/run.sh does not find them.
SCENES=(-p scenery -p no:cacheprovider -o "python_files=scene_*.py" "$ROOT/tests/machine")

# what_is_missing: prints the first thing without which no machine can be booted, and how to get it.
what_is_missing() {
  local command package
  if ((EUID != 0)); then
    printf 'this takes root: sudo %s' "$0"
    return
  fi
  while read -r command package; do
    if ! command -v "$command" >/dev/null; then
      printf '%s is not installed: apt-get install %s' "$command" "$package"
      return
    fi
  done <<'EOF'
mmdebstrap mmdebstrap
systemd-nspawn systemd-container
ip iproute2
unshare util-linux
EOF
  [[ -e /dev/fuse ]] || printf 'there is no /dev/fuse: load the kernel module fuse'
}

# in_own_namespaces COMMAND...: with a network, mounts and processes that end with it, whatever becomes of this script.
in_own_namespaces() {
  setpriv --pdeathsig KILL unshare --net --mount --pid --fork --kill-child --mount-proc -- "$@"
}

# why_no_machine_boots: prints why, where one cannot be booted in here, as in most containers.
why_no_machine_boots() {
  local said
  said=$(in_own_namespaces "$ROOT/tests/machine/inside.sh" "$ROOT/tests/machine/probe.sh" 2>&1) \
    || printf 'no machine can be booted here: %s' "$(tail -n 1 <<<"$said")"
}

# clean_up: the rest ends by itself. A run that was killed has left its control groups.
clean_up() {
  local group run
  rmdir "$MACHINE_PLACE"
  for group in /sys/fs/cgroup/{,*/}comfy-*-i-*; do
    run=${group##*/comfy-} run=${run%%-*}
    if [[ -d $group ]] && { ((run == $$)) || ! kill -0 "$run" 2>/dev/null; }; then
      find "$group" -depth -type d -exec rmdir {} + 2>/dev/null || true
    fi
  done
}

main "$@"
