#!/usr/bin/env bash
#
# Makes an environment from the base machine, or brings one up to date: image, launch template,
# Auto Scaling group, alarms, dashboard, bucket, queues, and a role for its instances.
#
# Usage: ./create_env.sh base [--move-data [--yes]] [--dry-run]
#        ./create_env.sh NAME [INSTANCE_ID] [--rebake | --rollback] [--keep N] [--reboot]
#                        [--with-output] [--subnets LIST] [--s3-trigger | --no-s3-trigger]
#                        [--events | --no-events] [--wait] [--dry-run]
#        ./create_env.sh --print-policy worker|sender|operator [NAME]
#
#   base           prepare the base machine itself: its bucket and queues
#   --move-data    run there: move ComfyUI's models/, input/ and output/ to the bucket, and put links
#                  into the mounted bucket in their place
#   --yes          then remove the folders that were moved from the disk, without a question
#
#   NAME           the environment: lowercase letters, digits and hyphens, such as pro
#   INSTANCE_ID    the base machine; needed only where this is not run on the base machine itself
#   --rebake       make a new image of the base machine and move the fleet to it when it is available;
#                  an instance is replaced when it has no job
#   --rollback     move the fleet back to the image before
#   --keep N       remove images that are no longer used, all but the latest N, which are kept for
#                  --rollback (default: 1 with --rebake, else nothing is removed)
#   --reboot       reboot the base machine for an image that is consistent to the last byte
#   --with-output  copy the base bucket's output/ as well
#   --subnets LIST from now on, these subnets and no others: subnet-…,subnet-…, or auto: those that are found
#   --s3-trigger   from now on, run every workflow that is dropped into the bucket's input/jobs/
#   --no-s3-trigger  do so no more
#   --events       from now on, tell EventBridge of all that comes into the bucket, such as each result.json
#   --no-events    do so no more
#   --wait         wait until the image is available, so that the fleet can start
#
#   --dry-run      say what would be made, changed or removed, and do nothing of it
#   --print-policy print the IAM policy, as small as AWS allows, of an instance, of who sends jobs, or of
#                  who runs this script and delete_env.sh; without NAME for the ENV in the settings
#
# Example: ./create_env.sh pro
#
# The settings are read from the file env beside this script. Running it again is safe: what is
# there stays, changed settings are applied, an interrupted run is completed, and files that are new
# or changed in the base bucket are copied; no file is ever deleted in a bucket. The image that the
# environment uses stays in use until --rebake or --rollback.
set -euo pipefail

# shellcheck source=provision/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/provision/common.sh" # HERE, die, report
for room in aws names fill checks base_machine network queues bucket trigger permissions image template \
  group watching base_files summary; do
  # shellcheck source=/dev/null
  source "$HERE/provision/$room.sh"
done

# The arguments. ACTION is update, rebake or rollback.
NAME="" ID="" ACTION=update KEEP="" REBOOT=no-reboot WITH_OUTPUT=no ASKED_SUBNETS="" S3_TRIGGER="" EVENTS_ASKED="" WAIT=no MOVE_DATA=no YES=no

parse_arguments() {
  local of_base="" of_fleet=""
  while (($#)); do
    case $1 in
      --move-data | --yes) of_base=$1 ;;
      --rebake | --rollback | --keep | --reboot | --with-output | --subnets | --s3-trigger | --no-s3-trigger | --events | --no-events | --wait) of_fleet=$1 ;;
    esac
    case $1 in
      -h | --help) usage && exit ;;
      --print-policy)
        print_policy "${2:-}" "${3:-$NAME}" "${@:4}"
        exit
        ;;
      --dry-run) DRY_RUN=yes ;;
      --move-data) MOVE_DATA=yes ;;
      --yes) YES=yes ;;
      --rebake | --rollback)
        [[ $ACTION == update ]] || die "--rebake and --rollback are opposites: give one of them"
        ACTION=${1#--}
        ;;
      --keep)
        [[ ${2:-} =~ ^(0|[1-9][0-9]{0,2})$ ]] || die "--keep is followed by the number of images to keep, 0 to 999, not by '${2:-}'"
        KEEP=$2
        shift
        ;;
      --reboot) REBOOT=reboot ;;
      --with-output) WITH_OUTPUT=yes ;;
      --subnets)
        [[ ${2:-} =~ ^(auto|subnet-[0-9a-f]{8,17}(,subnet-[0-9a-f]{8,17})*)$ ]] \
          || die "--subnets is followed by subnets with commas between them, or by auto, not by '${2:-}'"
        ASKED_SUBNETS=$2
        shift
        ;;
      --s3-trigger) S3_TRIGGER=yes ;;
      --no-s3-trigger) S3_TRIGGER=no ;;
      --events) EVENTS_ASKED=yes ;;
      --no-events) EVENTS_ASKED=no ;;
      --wait) WAIT=yes ;;
      -*) die "the option '$1' is not known: see --help" ;;
      *)
        if [[ -z $NAME ]]; then NAME=$1; elif [[ -z $ID ]]; then ID=$1; else die "the argument '$1' is one too many: see --help"; fi
        ;;
    esac
    shift
  done
  [[ $NAME == base || -z $of_base ]] || die "$of_base belongs to ./create_env.sh base: see --help"
  [[ $NAME != base || -z $of_fleet$ID ]] || die "${of_fleet:-$ID} is not for base, the machine that environments are made from: see --help"
  [[ $ACTION != rebake || -n $KEEP ]] || KEEP=1
}

# check_everything ID: all that can be known before anything is made.
check_everything() {
  local id=$1
  check_fleet_settings
  check_account
  check_cli
  if [[ -z $id ]]; then
    id=$(find_instance_id)
    check_here
  fi
  inspect_base "$id"
  if [[ -n $VPC ]]; then
    choose_subnets "$ASKED_SUBNETS"
    check_endpoint
    check_types
  fi
  check_topic
  check_base_bucket
  look_at_trigger "$S3_TRIGGER" "$EVENTS_ASKED"
  choose_image
  die_of_problems
}

# prepare_base: what the base machine itself needs: a bucket and queues, no image and no group.
prepare_base() {
  check_queue_settings
  [[ $MOVE_DATA == no || -d $COMFY_HOME/ComfyUI ]] \
    || problem "there is no $COMFY_HOME/ComfyUI: --move-data is run on the base machine; if it is this one, correct COMFY_HOME in $HERE/env"
  check_account
  die_of_problems

  printf 'The base machine, in %s of account %s\n' "$REGION" "$ACCOUNT_ID"
  ensure_queues
  ensure_bucket
  [[ $MOVE_DATA == no ]] || move_data "$YES"
  if say_dry_run; then return; fi
  printf '\nThe bucket and the queues of the base machine are ready.\n'
  show_links
  if systemctl cat comfyui.service comfy-manage.service &>/dev/null; then
    printf 'Next: sudo systemctl restart comfyui comfy-manage'
  else
    printf 'Next: sudo cp systemd/*.service /etc/systemd/system/ && sudo systemctl daemon-reload && sudo systemctl enable --now comfyui comfy-manage'
  fi
  printf ', and when all works there: ./create_env.sh pro\n'
}

make_fleet() {
  check_everything "$ID"

  printf 'Environment %s from the base machine %s, in %s of account %s\n' "$ENV" "$BASE_ID" "$REGION" "$ACCOUNT_ID"
  report subnets "$SUBNETS" "$SUBNETS_ARE"
  ensure_queues
  ensure_profile
  ensure_image "$REBOOT"
  ensure_bucket
  ensure_trigger
  ensure_events
  [[ $ACTION == rollback ]] || copy_files "$WITH_OUTPUT" # going back is to be fast
  ensure_template
  ensure_group
  remember_subnets "$ASKED_SUBNETS"
  ensure_alarms
  ensure_dashboard
  store_object_info
  settle_images "$KEEP"
  [[ $WAIT == no ]] || wait_for_image
  summarise
}

main() {
  parse_arguments "$@"
  choose_env "$NAME"
  if [[ $ENV == base ]]; then prepare_base; else make_fleet; fi
}

main "$@"
