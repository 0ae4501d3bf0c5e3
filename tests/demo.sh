#!/usr/bin/env bash
#
# The whole story on this machine, no AWS account needed: a base machine becomes a fleet, six jobs (or as
# many as you say) run on it, it goes back to zero and is removed.
#
# Usage: tests/demo.sh [JOBS]
#
# Needs Python 3.11+ and Bash. The images are in demo-output/ at the end, and report.html, which draws what
# happened. To use a real ComfyUI:
#   COMFYUI_DIR=~/ComfyUI COMFYUI_PYTHON=~/venv/bin/python COMFYUI_ARGS=--cpu \
#     DEMO_WORKFLOW=my_workflow.json tests/demo.sh
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=tests/lib.sh
source "$ROOT/tests/lib.sh"

jobs=${1:-6}
if [[ $jobs == -h || $jobs == --help ]]; then
  show_help
  exit
fi
[[ $jobs =~ ^[1-9][0-9]{0,2}$ && $# -le 1 ]] || die "unknown argument '$*': give a number of jobs from 1 to 999, see --help"

prepare_venv "$ROOT"
exec python "$ROOT/tests/demo/demo.py" "$jobs"
