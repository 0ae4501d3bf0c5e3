#!/usr/bin/env bash
#
# Lint and tests: shellcheck, shfmt, ruff, mypy, pytest.
#
# Usage: tests/run.sh [--full] [--seed N] [PYTEST ARGUMENT ...]
#
# Where a script is killed after any of its AWS calls, or faults fall at random, a sample is tested; it is
# chosen by a seed, which is printed and can be given back. --full tests every point, which takes some
# ten minutes on two cores. Needs Python 3.11+ and Bash. Example: tests/run.sh -k callback
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=tests/lib.sh
source "$ROOT/tests/lib.sh"

main() {
  if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    show_help
    return
  fi
  prepare_venv "$ROOT"
  cd "$ROOT"

  # Whatever a test forgets to set, nothing may ever reach a real AWS address.
  export AWS_ENDPOINT_URL=http://127.0.0.1:9 AWS_EC2_METADATA_SERVICE_ENDPOINT=http://127.0.0.1:9
  # What Python has compiled is kept: the tests start hundreds of processes.
  export PYTHONDONTWRITEBYTECODE=

  # The checks run beside the tests, and are heard in the end.
  local said checks code=0
  said=$(mktemp)
  lint &>"$said" &
  checks=$!
  # Once, and not once in each process: pytest rewrites the assertions of all tests and keeps what it has written.
  (($# > 0)) || pytest --collect-only -qq &>/dev/null || true # what is wrong is told below
  pytest --numprocesses 8 --dist worksteal "$@" || code=$?
  wait "$checks" || code=1
  cat "$said"
  rm "$said"
  return "$code"
}

# lint: the checks beside each other, as they take a third of the time so. All are heard, one after the other.
lint() {
  local scripts said pids=() number code=0
  mapfile -t scripts < <(find . -name '.?*' ! -name .ci -prune -o \( -name '*.sh' -o -path '*/bin/*' -o -path ./.ci/run \) -print)
  said=$(mktemp -d)
  shellcheck --external-sources "${scripts[@]}" &>"$said/0" &
  pids+=($!)
  shfmt -i 2 -ci -bn -d "${scripts[@]}" &>"$said/1" &
  pids+=($!)
  { ruff check --quiet . && ruff format --quiet --check .; } &>"$said/2" &
  pids+=($!)
  mypy . &>"$said/3" &
  pids+=($!)
  for number in "${!pids[@]}"; do
    wait "${pids[number]}" || code=1
    cat "$said/$number"
  done
  rm -r "$said"
  return "$code"
}

main "$@"
