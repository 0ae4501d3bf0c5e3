#!/usr/bin/env bash
#
# Removes an environment: alarms, dashboard, group and instances, queues, launch template, image and
# snapshots, the instances' role, and the bucket with every file in it.
#
# Usage: ./delete_env.sh NAME [--drain] [--keep-bucket] [--dry-run] [--yes]
#
#   NAME           the environment, as given to create_env.sh
#   --drain        first take no more jobs, and wait until those that are there have been run
#   --keep-bucket  keep the bucket and its files; create_env.sh takes it up again
#   --dry-run      only show what would be removed
#   --yes          do not ask (for scripts)
#
# Example: ./delete_env.sh pro
#
# Shows what it will remove, with how much in it, and asks for the name. Removes only what carries the
# environment's tags (also under names that the settings no longer have), goes on when a piece is
# refused, looks again at the end, and exits non-zero naming what is left. Running it again is safe.
# The base machine, its bucket and its queues are never touched.
set -euo pipefail

# shellcheck source=provision/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/provision/common.sh" # HERE, die, report
for room in aws names fill bucket inventory drain removal; do
  # shellcheck source=/dev/null
  source "$HERE/provision/$room.sh"
done

NAME="" YES=no DRAIN=no KEEP_BUCKET=no # the arguments
FOUND=""                               # what there is, or is left, to remove

parse_arguments() {
  while (($#)); do
    case $1 in
      -h | --help) usage && exit ;;
      --drain) DRAIN=yes ;;
      --keep-bucket) KEEP_BUCKET=yes ;;
      --dry-run) DRY_RUN=yes ;;
      --yes) YES=yes ;;
      -*) die "the option '$1' is not known: see --help" ;;
      *)
        [[ -z $NAME ]] || die "the argument '$1' is one too many: see --help"
        NAME=$1
        ;;
    esac
    shift
  done
  [[ $NAME != base ]] || die "base is the machine that environments are made from: it is never removed by this script"
}

remove_everything() {
  local fleet_refused
  remove_kind alarm "$FOUND" # first, so that it starts nothing any more
  remove_kind group "$FOUND"
  remove_kind instance "$FOUND"
  fleet_refused=$REFUSED
  remove_kind queue "$FOUND"
  remove_kind template "$FOUND"
  remove_kind image "$FOUND"
  remove_kind snapshot "$FOUND"
  remove_kind dashboard "$FOUND"
  [[ $fleet_refused == yes ]] || wait_until_gone
  remove_kind volume "$(look_at_volumes)" # whose instance had to end first
  remove_kind profile "$FOUND"
  remove_kind role "$FOUND"
  remove_kind bucket "$FOUND"
}

say_what_is_left() {
  local left
  if [[ -n $FOUND ]]; then
    left=$(cut -f 1,2 <<<"$FOUND" | paste -s -d , - | sed 's/\t/ /g; s/,/, /g')
    die "of the environment $ENV is left: $left (see above why; run this again, or remove it by hand)"
  fi
  if [[ $KEEP_BUCKET == yes ]]; then
    printf 'Nothing is left of the environment %s but its bucket %s, which ./create_env.sh %s takes up again.\n' "$ENV" "$S3_BUCKET" "$ENV"
  else
    printf 'Nothing is left of the environment %s.\n' "$ENV"
  fi
}

main() {
  parse_arguments "$@"
  choose_env "$NAME"
  [[ $YES == yes || $DRY_RUN == yes || -t 0 ]] \
    || die "there is no terminal to ask on: add --yes to remove $ENV without a question"
  check_account

  printf 'Environment %s in %s of account %s\n' "$ENV" "$REGION" "$ACCOUNT_ID"
  see_tags
  FOUND=$(look)
  show "$FOUND"
  if [[ $DRY_RUN == yes ]]; then
    printf 'Nothing was removed, because of --dry-run.\n'
    return
  fi
  FOUND=$(to_go <<<"$FOUND")
  if [[ -n $(ours "$FOUND") ]]; then
    [[ $YES == yes ]] || confirm
    if [[ $DRAIN == yes ]]; then
      drain "$FOUND"
      FOUND=$(look | to_go) # hours may have gone by
    fi
    remove_everything
    FOUND=$(look_at_the_end)
  fi
  say_what_is_left
}

main "$@"
