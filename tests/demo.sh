#!/usr/bin/env bash
#
# The whole story on this machine, no AWS account needed: a base machine becomes a fleet, six jobs (or as
# many as you say) run on it, it goes back to zero and is removed.
#
# Usage: tests/demo.sh [JOBS]
#        tests/demo.sh --editor [PORT]
#
# With --editor it is a fleet to play with: ComfyUI's own editor in your browser, at 127.0.0.1:PORT (8288 without), until
# Ctrl-C.
#
# Needs Python 3.11+ and Bash. The images are in demo-output/ at the end, and report.html, which draws what
# happened. To use a real ComfyUI:
#   COMFYUI_DIR=~/ComfyUI COMFYUI_PYTHON=~/venv/bin/python COMFYUI_ARGS=--cpu tests/demo.sh
# Its own virtual environment, if there is one in its folder, needs no COMFYUI_PYTHON. DEMO_WORKFLOW=my_workflow.json
# names another workflow; without, and without the example's model, one is sent that needs none.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=tests/lib.sh
source "$ROOT/tests/lib.sh"

if [[ ${1:-} == --editor ]]; then
  port=${2:-8288}
  [[ $port =~ ^[0-9]{1,5}$ && $# -le 2 ]] || die "unknown argument '${*:2}': give a port, see --help"
  prepare_venv "$ROOT"
  exec python "$ROOT/tests/demo/editor_demo.py" "$port"
fi

jobs=${1:-6}
if [[ $jobs == -h || $jobs == --help ]]; then
  show_help
  exit
fi
[[ $jobs =~ ^[1-9][0-9]{0,2}$ && $# -le 1 ]] || die "unknown argument '$*': give a number of jobs from 1 to 999, see --help"

prepare_venv "$ROOT"
exec python "$ROOT/tests/demo/demo.py" "$jobs"
