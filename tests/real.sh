#!/usr/bin/env bash
#
# A real ComfyUI instead of the stand-in: the demo, what the tests know of its protocol and of the check, its own
# output nodes, and how long it waits for the worker between two jobs.
#
# Usage: tests/real.sh DIR [PYTHON [ARGUMENT ...]]
#
# DIR is ComfyUI's folder, PYTHON its Python (DIR/venv/bin/python), and each ARGUMENT goes to its main.py. It needs no
# model. Takes some five minutes and ends with 1 where something is not as it should be; run it on a machine that has
# nothing else to do. Example: tests/real.sh ~/ComfyUI ~/venv/bin/python --cpu
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=tests/lib.sh
source "$ROOT/tests/lib.sh"

main() {
  local comfyui python code=0
  if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    show_help
    return
  fi
  (($#)) || die "name the folder of a ComfyUI, see --help"
  comfyui=$1
  [[ -f $comfyui/main.py ]] || die "$comfyui has no main.py: name the folder of a ComfyUI"
  comfyui=$(cd "$comfyui" && pwd)
  python=${2:-$comfyui/venv/bin/python}
  [[ -x $python ]] || die "$python is no Python: name that of this ComfyUI after its folder"
  shift $(($# < 2 ? $# : 2))
  prepare_venv "$ROOT"
  # Whatever a program forgets to set, nothing may ever reach a real AWS address.
  export AWS_ENDPOINT_URL=http://127.0.0.1:9 AWS_EC2_METADATA_SERVICE_ENDPOINT=http://127.0.0.1:9

  export COMFYUI_DIR=$comfyui COMFYUI_PYTHON=$python COMFYUI_ARGS=$*
  step "$ROOT/tests/demo.sh" || code=1
  unset COMFYUI_DIR COMFYUI_PYTHON COMFYUI_ARGS
  for program in contracts outputs waiting; do
    step python "$ROOT/tests/real/$program.py" "$comfyui" "$python" "$@" || code=1
  done
  return "$code"
}

# step COMMAND...: one of them, and how it ended.
step() {
  local code=0 since=$SECONDS
  printf '\n--- %s\n' "$*"
  "$@" || code=$?
  printf -- '--- exit code %s after %s s\n' "$code" $((SECONDS - since))
  return "$code"
}

main "$@"
