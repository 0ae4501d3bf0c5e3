#!/usr/bin/env bash
# What every script says and reads: problems, help, reports, the settings file. start_service.sh needs no other room.

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) # the folder of the scripts and of env

DRY_RUN=no  # a script's --dry-run: yes
PROBLEMS=() # what the checks have found

# die SENTENCE: after the problems found so far.
die() {
  problem "$*"
  die_of_problems
}

# problem SENTENCE: what would surely fail. The checks go on, so that all problems are told together.
problem() {
  PROBLEMS+=("$*")
}

die_of_problems() {
  local sentence
  ((${#PROBLEMS[@]})) || return 0
  for sentence in "${PROBLEMS[@]}"; do
    printf '%s: %s\n' "${0##*/}" "$sentence" >&2
  done
  exit 1
}

# warn SENTENCE: what somebody may have good reasons for.
warn() {
  printf '%s: warning: %s\n' "${0##*/}" "$*" >&2
}

# usage: the comment at the top of the script that was started.
usage() {
  sed -n '3,/^[^#]/s/^# \{0,1\}//p' "$0"
}

# report KIND NAME STATE: one aligned line for every step. With --dry-run, what a step would have done
# is told as what is to be done.
report() {
  local state=$3
  if [[ $DRY_RUN == yes && $state =~ ^(created|updated|removed|started|copied|replaced) ]]; then
    state="to be $state"
  fi
  printf '%-9s %-52s %s\n' "$1" "$2" "$state"
}

# instances COUNT: in words.
instances() {
  if (($1 == 1)); then printf '1 instance'; else printf '%s instances' "$1"; fi
}

# one_line TEXT: after a blank, as the end of a sentence.
one_line() {
  local text=${1//$'\n'/ }
  printf ' %s' "${text#"${text%%[! ]*}"}"
}

# listed WORD...: with commas between them.
listed() {
  local IFS=,
  printf '%s' "$*"
}

# load_env FILE: exports the settings in FILE. What the process environment already has wins. Only
# lines that Bash and python-dotenv read alike are taken (comfy_utils.py checks by the same rule);
# a value is never printed, because it may be a secret.
load_env() {
  local file=$1 line name value rest number=0
  local -A seen=()
  local reference='\$\{([A-Z][A-Z0-9_]*)\}'
  local bare="([A-Za-z0-9_./:@%+,=-]|$reference)*"
  local quoted="\"([^\"\\\\\$\`]|$reference)*\""
  [[ -r $file && ! -d $file ]] || die "cannot read the settings file $file: copy env.example to it and fill it in"
  while IFS= read -r line || [[ -n $line ]]; do
    number=$((number + 1))
    [[ $line =~ ^[[:space:]]*(#.*)?$ ]] && continue
    [[ $line =~ ^([A-Z][A-Z0-9_]*)=($bare|$quoted)[[:space:]]*$ ]] \
      || die "$file line $number (${line%%=*}) is malformed: write NAME=value or NAME=\"two words\", where only \${NAME} expands"
    name=${BASH_REMATCH[1]} value=${BASH_REMATCH[2]} rest=${BASH_REMATCH[2]}
    [[ ! -v seen[$name] ]] || die "$file line $number sets $name a second time: take one of the lines out"
    seen[$name]=yes
    [[ -v $name ]] && continue
    while [[ $rest =~ $reference ]]; do
      [[ -v ${BASH_REMATCH[1]} ]] || die "$file line $number ($name) uses \${${BASH_REMATCH[1]}}, which is not set: set it on a line above"
      rest=${rest#*"${BASH_REMATCH[0]}"}
    done
    eval "export $name=$value"
  done <"$file"
}
