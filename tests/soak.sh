#!/usr/bin/env bash
#
# A chaos run on the local cloud, no AWS account needed: real workers do real jobs while they and
# their ComfyUI are killed, sockets cut, AWS calls fail, instances are taken away. At the end it is
# counted what was really executed against what was promised.
#
# Usage: tests/soak.sh [JOBS] [SEED]
#
# JOBS is 300 and SEED 1 where not given; the same seed gives the same jobs and the same faults.
# Exits with 0 when nothing was lost, falsely called done, changed or run twice without a reason.
# What each line of the printed table means is said at the top of tests/soak/soak.py.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=tests/lib.sh
source "$ROOT/tests/lib.sh"

main() {
  local value
  case ${1:-} in
    -h | --help)
      show_help
      return
      ;;
  esac
  (($# <= 2)) || die "too many arguments: it takes JOBS and SEED, see --help"
  for value in "$@"; do
    [[ $value =~ ^[0-9]{1,6}$ ]] || die "'$value' is not a number: it takes JOBS and SEED, see --help"
  done
  ((10#${1:-300} >= 10)) || die "JOBS=$1 is too few: 10 or more"
  prepare_venv "$ROOT"
  exec python "$ROOT/tests/soak/soak.py" "${1:-300}" "${2:-1}"
}

main "$@"
