#!/usr/bin/env bash
#
# The whole story on this machine, no AWS account needed: a base machine becomes a fleet, six jobs run
# on it, it goes back to zero and is removed.
#
# Usage: tests/demo.sh
#
# Needs Python 3.11+ and Bash. The images are in demo-output/ at the end. To use a real ComfyUI:
#   COMFYUI_DIR=~/ComfyUI COMFYUI_PYTHON=~/venv/bin/python COMFYUI_ARGS=--cpu \
#     DEMO_WORKFLOW=my_workflow.json tests/demo.sh
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=tests/lib.sh
source "$ROOT/tests/lib.sh"

case ${1:-} in
  '') ;;
  -h | --help)
    show_help
    exit
    ;;
  *) die "unknown argument '$1': it takes none, see --help" ;;
esac

prepare_venv "$ROOT"
exec python "$ROOT/tests/demo.py"
