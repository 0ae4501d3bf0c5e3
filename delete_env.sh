#!/usr/bin/env bash
#
# Removes an environment: alarm, group and instances, queues, launch template, image and snapshots, and
# the bucket with every file in it.
#
# Usage: ./delete_env.sh NAME [--yes]
#
#   NAME   the environment, as given to create_env.sh
#   --yes  do not ask (for scripts)
#
# Example: ./delete_env.sh pro
#
# Shows what it will remove and asks for the name. Removes only what carries the environment's tags,
# goes on when a piece is refused, looks again at the end, and exits non-zero naming what is left.
# Running it again is safe. The base machine, its bucket and its queues are never touched.
set -euo pipefail

# shellcheck source=create_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/create_env.sh" # names, settings, die, report

# How long to wait until AWS has ended the instances, and until it lists a deleted queue no more.
GONE_WAIT_SECONDS=${GONE_WAIT_SECONDS:-1200}
FORGET_WAIT_SECONDS=${FORGET_WAIT_SECONDS:-90}
# How many files S3 takes in one call to delete.
DELETE_BATCH=${DELETE_BATCH:-1000}

# --- Looking ---------------------------------------------------------------------------------

# look: prints KIND, NAME and OWNER of every piece that is there, tab-separated. OWNER is the
# environment in its comfy-env tag, or None.
look() {
  look_at_alarm || exit
  look_at_fleet || exit
  look_at_queues || exit
  ask_aws "look at the launch template $TEMPLATE_NAME" ec2 describe-launch-templates \
    --filters "Name=launch-template-name,Values=$TEMPLATE_NAME" \
    --query "LaunchTemplates[].['template', LaunchTemplateName, Tags[?Key=='comfy-env'].Value | [0]]" \
    --output text || exit
  look_at_images || exit
  look_at_bucket || exit
}

look_at_alarm() {
  local arn
  arn=$(ask_aws "look at the alarm $ALARM_NAME" cloudwatch describe-alarms \
    --alarm-names "$ALARM_NAME" \
    --query 'MetricAlarms[].AlarmArn | [0]' --output text) || exit
  [[ $arn != None ]] || return 0
  ask_aws "look at the tags of the alarm $ALARM_NAME" cloudwatch list-tags-for-resource \
    --resource-arn "$arn" \
    --query "['alarm', '$ALARM_NAME', Tags[?Key=='comfy-env'].Value | [0]]" --output text || exit
}

# look_at_fleet: the group, and the instances by tag, so that one which has left its group is found too.
look_at_fleet() {
  ask_aws "look at the group $ASG_NAME" autoscaling describe-auto-scaling-groups \
    --auto-scaling-group-names "$ASG_NAME" \
    --query "AutoScalingGroups[].['group', AutoScalingGroupName, Tags[?Key=='comfy-env'].Value | [0]]" \
    --output text || exit
  ask_aws "list the instances of $ENV" ec2 describe-instances \
    --filters "Name=tag:comfy-env,Values=$ENV" "Name=tag:comfy-prefix,Values=$PREFIX" \
    Name=instance-state-name,Values=pending,running,shutting-down,stopping,stopped \
    --query "Reservations[].Instances[].['instance', InstanceId, '$ENV']" \
    --output text || exit
}

look_at_queues() {
  local urls url owner
  urls=$(ask_aws "list the queues" sqs list-queues --queue-name-prefix "$SQS_NAME" --query QueueUrls --output text) || exit
  for url in $urls; do
    [[ $url == */"$SQS_NAME" || $url == */"$DLQ_NAME" ]] || continue
    if owner=$(aws sqs list-queue-tags --queue-url "$url" --query 'Tags."comfy-env"' --output text 2>&1); then
      printf 'queue\t%s\t%s\n' "$url" "${owner##*$'\n'}"
    # One that was deleted a moment ago may still be listed.
    elif [[ $owner != *NonExistentQueue* && $owner != *QueueDoesNotExist* ]]; then
      die "cannot look at the queue $url:$(one_line "$owner")"
    fi
  done
}

# look_at_images: our own images that carry our tags, and the snapshots behind them. A snapshot whose
# image has gone already is found by its tags.
look_at_images() {
  local images snapshots image ids id
  images=$(ask_aws "list the images of $ENV" ec2 describe-images --owners self \
    --filters "Name=tag:comfy-env,Values=$ENV" "Name=tag:comfy-prefix,Values=$PREFIX" \
    --query "Images[].[ImageId, join(' ', BlockDeviceMappings[?Ebs.SnapshotId].Ebs.SnapshotId)]" \
    --output text) || exit
  snapshots=$(ask_aws "list the snapshots of $ENV" ec2 describe-snapshots --owner-ids self \
    --filters "Name=tag:comfy-env,Values=$ENV" "Name=tag:comfy-prefix,Values=$PREFIX" \
    --query "join(' ', Snapshots[].SnapshotId)" \
    --output text) || exit
  while read -r image ids; do
    [[ -z $image ]] || printf 'image\t%s\t%s\n' "$image" "$ENV"
    snapshots+=" $ids"
  done <<<"$images"
  for id in $(tr ' ' '\n' <<<"$snapshots" | sort -u); do
    printf 'snapshot\t%s\t%s\n' "$id" "$ENV"
  done
}

look_at_bucket() {
  local owner
  owner=$(bucket_owner) || exit
  [[ $owner == gone ]] || printf 'bucket\t%s\t%s\n' "$S3_BUCKET" "$owner"
}

# of_kind KIND FOUND: the lines of FOUND that are of that kind.
of_kind() {
  sed -n "/^$1\t/p" <<<"$2"
}

# ours FOUND: the lines of FOUND that may be removed.
ours() {
  sed -n "/\t$ENV\$/p" <<<"$1"
}

show() {
  local found=$1 kind name owner
  for kind in alarm group instance queue template image snapshot bucket; do
    if [[ -z $(of_kind "$kind" "$found") ]]; then
      report "$kind" "$(expected_name "$kind")" "already gone"
      continue
    fi
    while IFS=$'\t' read -r _ name owner; do
      if [[ $owner == "$ENV" ]]; then
        report "$kind" "${name##*/}" "to be removed"
      else
        report "$kind" "${name##*/}" "left alone: no tag comfy-env=$ENV, so create_env.sh did not make it"
      fi
    done < <(of_kind "$kind" "$found")
  done
}

expected_name() {
  case $1 in
    alarm) printf '%s' "$ALARM_NAME" ;;
    group) printf '%s' "$ASG_NAME" ;;
    queue) printf '%s' "$SQS_NAME" ;;
    template) printf '%s' "$TEMPLATE_NAME" ;;
    bucket) printf '%s' "$S3_BUCKET" ;;
    *) printf -- '-' ;;
  esac
}

# --- Removing --------------------------------------------------------------------------------

# remove_kind KIND FOUND: everything in FOUND that is of that kind and ours. A refusal is reported and
# the rest goes on; the look at the end decides.
remove_kind() {
  local kind=$1 found=$2 name answer
  while IFS=$'\t' read -r _ name _; do
    [[ -n $name ]] || continue
    if answer=$("remove_$kind" "$name" 2>&1); then
      report "$kind" "${name##*/}" "${answer:-removed}"
    else
      report "$kind" "${name##*/}" "not removed:$(one_line "$answer")"
      REFUSED=yes
    fi
  done <<<"$(of_kind "$kind" "$(ours "$found")")"
}

remove_alarm() {
  aws cloudwatch delete-alarms --alarm-names "$1"
}

remove_group() {
  # Without waiting for its instances to end, or for their hooks. Its policies and its warm pool go with it.
  aws autoscaling delete-auto-scaling-group --auto-scaling-group-name "$1" --force-delete || return
  printf 'being removed'
}

remove_instance() {
  aws ec2 terminate-instances --instance-ids "$1" >/dev/null || return
  printf 'ending'
}

remove_queue() {
  aws sqs delete-queue --queue-url "$1"
}

remove_template() {
  aws ec2 delete-launch-template --launch-template-name "$1" >/dev/null
}

remove_image() {
  aws ec2 deregister-image --image-id "$1" >/dev/null
}

remove_snapshot() {
  aws ec2 delete-snapshot --snapshot-id "$1" >/dev/null
}

# remove_bucket NAME: with every version and delete marker (an unversioned file is the version
# "null"), and with every unfinished upload.
remove_bucket() {
  local bucket=$1 batch kept uploads id key size=$DELETE_BATCH count=0
  while ((size == DELETE_BATCH)); do
    batch=$(aws s3api list-object-versions --bucket "$bucket" --max-items "$DELETE_BATCH" --output json \
      --query '{Objects: [Versions, DeleteMarkers][].{Key: Key, VersionId: VersionId}}') || return
    size=$(grep -c '"VersionId": ' <<<"$batch")
    ((size > 0)) || break
    kept=$(aws s3api delete-objects --bucket "$bucket" --delete file:///dev/stdin \
      --query 'Errors[0].[Key, Message]' --output text <<<"$batch") || return
    if [[ $kept != None ]]; then
      printf 'S3 keeps the file %s\n' "$kept"
      return 1
    fi
    count=$((count + size))
  done
  uploads=$(aws s3api list-multipart-uploads --bucket "$bucket" \
    --query 'Uploads[].[UploadId, Key]' --output text) || return
  while IFS=$'\t' read -r id key; do
    [[ -n $key ]] || continue
    aws s3api abort-multipart-upload --bucket "$bucket" --key "$key" --upload-id "$id" || return
  done <<<"$uploads"
  aws s3api delete-bucket --bucket "$bucket" || return
  printf 'removed, and %s files or versions in it' "$count"
}

# wait_until_gone: until the group and the instances have really ended, so that nothing writes to the
# bucket any more and the same names can be used again.
wait_until_gone() {
  local fleet deadline=$((SECONDS + GONE_WAIT_SECONDS)) said=no
  while true; do
    fleet=$(look_at_fleet)
    [[ -n $(ours "$fleet") ]] || return 0
    if ((SECONDS >= deadline)); then
      report fleet "$ASG_NAME" "still ending after $GONE_WAIT_SECONDS seconds"
      return 0
    fi
    [[ $said == yes ]] || report fleet "$ASG_NAME" "waiting until its instances have ended ..."
    said=yes
    sleep "$POLL_SECONDS"
  done
}

# look_at_the_end: AWS may list what has just been deleted for a minute, which is waited for unless a
# removal was refused.
look_at_the_end() {
  local deadline=$((SECONDS + FORGET_WAIT_SECONDS))
  while true; do
    FOUND=$(look)
    if [[ -z $(ours "$FOUND") || $REFUSED == yes ]] || ((SECONDS >= deadline)); then
      return
    fi
    sleep "$POLL_SECONDS"
  done
}

# --- Main ------------------------------------------------------------------------------------

ask() {
  local answer=""
  printf 'All files in %s are lost for ever. Type %s to remove the environment: ' "$S3_BUCKET" "$ENV"
  read -r answer || printf '\n'
  [[ $answer == "$ENV" ]] || die "'$answer' is not $ENV: nothing was removed"
}

main() {
  local name="" yes=no fleet_refused left
  while (($#)); do
    case $1 in
      -h | --help) usage && exit ;;
      --yes) yes=yes ;;
      -*) die "the option '$1' is not known: see --help" ;;
      *)
        [[ -z $name ]] || die "the argument '$1' is one too many: see --help"
        name=$1
        ;;
    esac
    shift
  done
  [[ $name != base ]] || die "base is the machine that environments are made from: it is never removed by this script"
  choose_env "$name"
  [[ $yes == yes || -t 0 ]] || die "there is no terminal to ask on: add --yes to remove $ENV without a question"
  check_account

  printf 'Environment %s in %s of account %s\n' "$ENV" "$REGION" "$ACCOUNT_ID"
  FOUND=$(look)
  REFUSED=no
  show "$FOUND"
  if [[ -n $(ours "$FOUND") ]]; then
    [[ $yes == yes ]] || ask
    remove_kind alarm "$FOUND" # first, so that it starts nothing any more
    remove_kind group "$FOUND"
    remove_kind instance "$FOUND"
    fleet_refused=$REFUSED
    remove_kind queue "$FOUND"
    remove_kind template "$FOUND"
    remove_kind image "$FOUND"
    remove_kind snapshot "$FOUND"
    [[ $fleet_refused == yes ]] || wait_until_gone
    remove_kind bucket "$FOUND"
    look_at_the_end
  fi
  if [[ -n $FOUND ]]; then
    left=$(cut -f 1,2 <<<"$FOUND" | paste -s -d , - | sed 's/\t/ /g; s/,/, /g')
    die "of the environment $ENV is left: $left (see above why; run this again, or remove it by hand)"
  fi
  printf 'Nothing is left of the environment %s.\n' "$ENV"
}

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
  main "$@"
fi
