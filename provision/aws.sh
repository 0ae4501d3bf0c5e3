#!/usr/bin/env bash
# How AWS is called. Behind each of these words and its first argument stands a plain `aws` command.

POLL_SECONDS=${POLL_SECONDS:-10} # between two looks at something that is waited for

# change WHAT aws ...: a call that changes something and whose answer is not needed. Dies with AWS's words
# when it is refused. Not made with --dry-run.
change() {
  local what=$1 answer
  shift
  [[ $DRY_RUN == no ]] || return 0
  answer=$("$@" 2>&1) || die "cannot $what:$(one_line "$answer")"
}

# ask WHAT aws ...: prints the answer of a call, which mostly only looks; one that changes something is
# guarded by DRY_RUN where it stands. Dies after AWS's words when it is refused.
ask() {
  local what=$1
  shift
  "$@" || die "cannot $what: see AWS's words above"
}

# try WHAT aws ...: prints the answer of a call that only checks. A refusal is a warning, and fails.
try() {
  local what=$1
  shift
  "$@" && return
  warn "cannot $what, see AWS's words above, so that is not checked"
  return 1
}
