#!/usr/bin/env bash
#
# What demo.sh and run.sh share; sourced, not run.
#
# prepare_venv makes tests/.venv with everything in tests/requirements.txt, or reuses it when that
# file has not changed, and puts it first in PATH. With PYTHON=... another interpreter than python3
# is used.

die() {
  printf '%s: %s\n' "${0##*/}" "$*" >&2
  exit 1
}

# show_help: the comment at the top of the script that was started.
show_help() {
  sed -n '3,/^[^#]/s/^# \{0,1\}//p' "$0"
}

prepare_venv() {
  local root=$1 python=${PYTHON:-python3} venv=$1/tests/.venv stamp lock
  command -v "$python" >/dev/null || die "$python is not installed: install Python 3.11 or newer (Ubuntu: apt install python3 python3-venv)"
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
    || die "$("$python" -V) is too old: install Python 3.11 or newer, or name one with PYTHON=python3.12"
  stamp=$("$python" -c 'import sys; print(*sys.version_info[:2])' && cksum <"$root/tests/requirements.txt")
  exec {lock}>"$root/tests/.venv.lock"
  flock "$lock" # two at a time would take each other's half-made environment for their own
  if [[ ! -f $venv/stamp || $(<"$venv/stamp") != "$stamp" ]]; then
    "$python" -c 'import ensurepip, venv' 2>/dev/null \
      || die "Python's venv module is missing: install python3-venv (Ubuntu: apt install python3-venv)"
    printf 'Installing the test tools into tests/.venv (once, about a minute) ...\n'
    rm -rf "$venv"
    "$python" -m venv "$venv" || die "cannot make the virtual environment $venv: see the message above"
    "$venv/bin/pip" install --quiet --disable-pip-version-check -r "$root/tests/requirements.txt" \
      || die "cannot install tests/requirements.txt: is the Python package index reachable from here?"
    printf '%s\n' "$stamp" >"$venv/stamp"
  fi
  exec {lock}>&-
  PATH=$root/tests/cloud/bin:$venv/bin:$PATH
  export PATH
}
