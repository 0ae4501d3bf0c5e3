#!/usr/bin/env bash
#
# (skeleton) create_env.sh
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

die() {
  printf '%s: %s\n' "${0##*/}" "$*" >&2
  exit 1
}

# load_env FILE: exports the settings in FILE. What the process environment already has wins. Only
# lines that Bash and python-dotenv read alike are taken (comfy_utils.py checks by the same rule);
# a value is never printed, because it may be a secret.
load_env() {
  local file=$1 line name value rest number=0
  local reference='\$\{([A-Z][A-Z0-9_]*)\}'
  local bare="([A-Za-z0-9_./:@%+,=-]|$reference)*"
  local quoted="\"([^\"\\\\\$\`]|$reference)*\""
  [[ -r $file ]] || die "cannot read the settings file $file: copy env.example to it and fill it in"
  while IFS= read -r line || [[ -n $line ]]; do
    number=$((number + 1))
    [[ $line =~ ^[[:space:]]*(#.*)?$ ]] && continue
    [[ $line =~ ^([A-Z][A-Z0-9_]*)=($bare|$quoted)[[:space:]]*$ ]] ||
      die "$file line $number (${line%%=*}) is malformed: write NAME=value or NAME=\"two words\", where only \${NAME} expands"
    name=${BASH_REMATCH[1]} value=${BASH_REMATCH[2]} rest=${BASH_REMATCH[2]}
    [[ -v $name ]] && continue
    while [[ $rest =~ $reference ]]; do
      [[ -v ${BASH_REMATCH[1]} ]] || die "$file line $number ($name) uses \${${BASH_REMATCH[1]}}, which is not set: set it on a line above"
      rest=${rest#*"${BASH_REMATCH[0]}"}
    done
    eval "export $name=$value"
  done <"$file"
}
