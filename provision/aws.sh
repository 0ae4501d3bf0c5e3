#!/usr/bin/env bash
# How AWS is called. Behind each of these words and its first argument stands a plain `aws` command.

POLL_SECONDS=${POLL_SECONDS:-10} # between two looks at something that is waited for

# AWS knows some things late: what was made a moment ago may be unknown, and what was removed may still be there.
FRESH_SECONDS=${FRESH_SECONDS:-60}
FRESH_UNTIL=0 # made_now

# made_now: something was made that the next calls name.
made_now() {
  FRESH_UNTIL=$((SECONDS + FRESH_SECONDS))
}

# is_late ANSWER: waits a little where AWS does not know yet what was made a moment ago. Fails for any other answer.
is_late() {
  [[ $1 =~ \((NoSuchBucket|NoSuchEntity|InvalidAMIID.NotFound)\)|"Dead letter target does not exist" ]] \
    && ((SECONDS < FRESH_UNTIL)) && sleep "$POLL_SECONDS"
}

# change WHAT aws ...: a call that changes something and whose answer is not needed. Dies with AWS's words
# when it is refused. Not made with --dry-run.
change() {
  local what=$1 answer
  shift
  [[ $DRY_RUN == no ]] || return 0
  until answer=$("$@" 2>&1); do
    is_late "$answer" || die "cannot $what:$(one_line "$answer")"
  done
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

# delete_snapshot ID: a snapshot counts as in use for a while after its image has gone. Prints AWS's words where it stays.
delete_snapshot() {
  local answer deadline=$((SECONDS + FRESH_SECONDS))
  until answer=$(aws ec2 delete-snapshot --snapshot-id "$1" 2>&1); do
    if [[ $answer != *InvalidSnapshot.InUse* ]] || ((SECONDS >= deadline)); then
      printf '%s\n' "$answer"
      return 1
    fi
    sleep "$POLL_SECONDS"
  done
}
