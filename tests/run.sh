#!/usr/bin/env bash
#
# Lint and tests: shellcheck, shfmt, ruff, mypy, pytest.
#
# Usage: tests/run.sh [PYTEST ARGUMENT ...]
#
# Needs Python 3.11+ and Bash. Example: tests/run.sh -k callback
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=tests/lib.sh
source "$ROOT/tests/lib.sh"

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
  show_help
  exit
fi
prepare_venv "$ROOT"
cd "$ROOT"

# Whatever a test forgets to set, nothing may ever reach a real AWS address.
export AWS_ENDPOINT_URL=http://127.0.0.1:9 AWS_EC2_METADATA_SERVICE_ENDPOINT=http://127.0.0.1:9

scripts=(create_env.sh delete_env.sh start_service.sh .ci/run tests/*.sh tests/cloud/bin/*)
shellcheck --external-sources "${scripts[@]}"
shfmt -i 2 -ci -bn -d "${scripts[@]}"
ruff check --quiet .
ruff format --quiet --check .
mypy ./*.py operate tests
exec pytest --numprocesses 5 --dist worksteal --quiet "$@"
