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

# shellcheck source=create_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/create_env.sh" # names, settings, die, report

KEEP_BUCKET=no # --keep-bucket: yes

# How long to wait until AWS has ended the instances, and until it lists a deleted queue no more.
GONE_WAIT_SECONDS=${GONE_WAIT_SECONDS:-1200}
FORGET_WAIT_SECONDS=${FORGET_WAIT_SECONDS:-90}
# How long --drain waits for the jobs, and how long a queue must look empty to be so: AWS counts its
# messages with a delay of up to a minute.
DRAIN_WAIT_SECONDS=${DRAIN_WAIT_SECONDS:-43200}
DRAIN_QUIET_SECONDS=${DRAIN_QUIET_SECONDS:-90}
# How many files S3 takes in one call to delete.
DELETE_BATCH=${DELETE_BATCH:-1000}

# --- Looking ---------------------------------------------------------------------------------

# look: prints KIND, NAME and OWNER of every piece that is there, tab-separated. OWNER is the
# environment in its comfy-env tag, or None. What is the base machine's by its name is its own whatever
# its tags say.
look() {
  local tagged
  # By tag, because the settings may have other names now. Buckets are in all answers, alarms and queues
  # of this region.
  tagged=$(ask_aws "find what is tagged as $ENV" resourcegroupstaggingapi get-resources \
    --tag-filters "Key=comfy-env,Values=$ENV" "Key=comfy-prefix,Values=$PREFIX" \
    --resource-type-filters cloudwatch:alarm sqs:queue s3 \
    --query 'ResourceTagMappingList[].ResourceARN' --output text) || exit
  {
    look_at_alarms "$tagged" || exit
    look_at_dashboard || exit
    look_at_fleet || exit
    look_at_queues "$tagged" || exit
    ask_aws "list the launch templates of $ENV" ec2 describe-launch-templates "${OUR_TAGS[@]}" \
      --query "LaunchTemplates[].['template', LaunchTemplateName, '$ENV']" --output text || exit
    ask_aws "look at the launch template $TEMPLATE_NAME" ec2 describe-launch-templates \
      --filters "Name=launch-template-name,Values=$TEMPLATE_NAME" \
      --query "LaunchTemplates[].['template', LaunchTemplateName, Tags[?Key=='comfy-env'].Value | [0]]" \
      --output text || exit
    look_at_images || exit
    look_at_volumes || exit
    look_at_role || exit
    look_at_buckets "$tagged" || exit
  } | awk '!seen[$0]++' | keep_base # once each, in this order
}

# keep_base: the lines of its input, in which base is the owner of what has base's names.
keep_base() {
  local kind name owner
  while IFS=$'\t' read -r kind name owner; do
    case $kind:${name##*/} in
      bucket:"$BASE_S3_BUCKET" | queue:"$BASE_SQS_NAME" | queue:"$BASE_SQS_NAME"-dlq) owner=base ;;
      *:"$BASE_ASG_NAME" | *:"$BASE_ASG_NAME"-template | *:"$BASE_ASG_NAME"-worker) owner=base ;;
    esac
    printf '%s\t%s\t%s\n' "$kind" "$name" "$owner"
  done
}

# names_in ARNS SERVICE: the last part of the ARNs that are of this service, one a line.
names_in() {
  tr '[:space:]' '\n' <<<"$1" | sed -n "s/^arn:[^:]*:$2:\([^:]*:\)*\([^:/]*\)\$/\2/p"
}

# look_at_alarms TAGGED: by name those that begin as ours do, so that one without tags is told of.
look_at_alarms() {
  local names name owner
  names=$(ask_aws "list the alarms of $ASG_NAME" cloudwatch describe-alarms --alarm-name-prefix "$ASG_NAME-" \
    --query 'MetricAlarms[].AlarmName' --output text) || exit
  for name in $(names_in "$1" cloudwatch) $names; do
    if ! owner=$(aws cloudwatch list-tags-for-resource \
      --resource-arn "arn:$PARTITION:cloudwatch:$REGION:$ACCOUNT_ID:alarm:$name" \
      --query "Tags[?Key=='comfy-env'].Value | [0]" --output text 2>&1); then
      [[ $owner == *NotFound* ]] || die "cannot look at the tags of the alarm $name:$(one_line "$owner")"
    # An environment called pro-asg-x has alarms that begin as those of pro do.
    elif [[ ${owner##*$'\n'} == "$ENV" || ${owner##*$'\n'} == None ]]; then
      printf 'alarm\t%s\t%s\n' "$name" "${owner##*$'\n'}"
    fi
  done
}

# look_at_dashboard: AWS has no tags for dashboards, so this one goes by its name.
look_at_dashboard() {
  local answer
  if answer=$(aws cloudwatch get-dashboard --dashboard-name "$ASG_NAME" 2>&1); then
    printf 'dashboard\t%s\t%s\n' "$ASG_NAME" "$ENV"
  else
    [[ $answer == *NotFound* ]] || die "cannot look at the dashboard $ASG_NAME:$(one_line "$answer")"
  fi
}

# look_at_fleet: the group, and the instances by tag, so that one which has left its group is found too.
# Only what a launch template has started: AWS itself notes that, and of the base machine it does not.
look_at_fleet() {
  local query="AutoScalingGroups[].['group', AutoScalingGroupName, Tags[?Key=='comfy-env'].Value | [0]]"
  ask_aws "look at the group $ASG_NAME" autoscaling describe-auto-scaling-groups \
    --auto-scaling-group-names "$ASG_NAME" --query "$query" --output text || exit
  ask_aws "list the groups of $ENV" autoscaling describe-auto-scaling-groups "${OUR_TAGS[@]}" \
    --query "$query" --output text || exit
  ask_aws "list the instances of $ENV" ec2 describe-instances "${OUR_TAGS[@]}" \
    Name=tag-key,Values=aws:ec2launchtemplate:id \
    Name=instance-state-name,Values=pending,running,shutting-down,stopping,stopped \
    --query "Reservations[].Instances[].['instance', InstanceId, '$ENV']" \
    --output text || exit
}

# look_at_queues TAGGED
look_at_queues() {
  local urls url name owner
  urls=$(ask_aws "list the queues" sqs list-queues --queue-name-prefix "$SQS_NAME" --query QueueUrls --output text) || exit
  for name in $(names_in "$1" sqs); do
    if url=$(aws sqs get-queue-url --queue-name "$name" --query QueueUrl --output text 2>&1); then
      urls+=" $url"
    else
      is_no_queue "$url" || die "cannot look at the queue $name:$(one_line "$url")"
    fi
  done
  for url in $urls; do
    # Not one whose name only begins like ours; those found by their tags may have any name.
    [[ $url == */"$SQS_NAME" || $url == */"$DLQ_NAME" || "$1 " == *:"${url##*/}"[[:space:]]* ]] || continue
    if owner=$(aws sqs list-queue-tags --queue-url "$url" --query 'Tags."comfy-env"' --output text 2>&1); then
      printf 'queue\t%s\t%s\n' "$url" "${owner##*$'\n'}"
    # One that was deleted a moment ago may still be listed.
    else
      is_no_queue "$owner" || die "cannot look at the queue $url:$(one_line "$owner")"
    fi
  done
}

is_no_queue() {
  [[ $1 == *NonExistentQueue* || $1 == *QueueDoesNotExist* ]]
}

# look_at_images: our own images that carry our tags, and the snapshots behind them. A snapshot whose
# image has gone already is found by its tags.
look_at_images() {
  local images snapshots image ids id
  images=$(ask_aws "list the images of $ENV" ec2 describe-images --owners self "${OUR_TAGS[@]}" \
    --query "Images[].[ImageId, join(' ', BlockDeviceMappings[?Ebs.SnapshotId].Ebs.SnapshotId)]" \
    --output text) || exit
  snapshots=$(ask_aws "list the snapshots of $ENV" ec2 describe-snapshots --owner-ids self "${OUR_TAGS[@]}" \
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

# look_at_volumes: those that no instance has. The others go with their instances.
look_at_volumes() {
  ask_aws "list the volumes of $ENV" ec2 describe-volumes "${OUR_TAGS[@]}" Name=status,Values=available \
    --query "Volumes[].['volume', VolumeId, '$ENV']" --output text || exit
}

# look_at_role: by the path, which is the environment's own and cannot be changed.
look_at_role() {
  ask_aws "list the instance profiles of $ENV" iam list-instance-profiles --path-prefix "$WORKER_PATH" \
    --query "InstanceProfiles[?Path=='$WORKER_PATH'].['profile', InstanceProfileName, '$ENV']" --output text || exit
  ask_aws "list the roles of $ENV" iam list-roles --path-prefix "$WORKER_PATH" \
    --query "Roles[?Path=='$WORKER_PATH'].['role', RoleName, '$ENV']" --output text || exit
}

# look_at_buckets TAGGED
look_at_buckets() {
  local name owner
  for name in "$S3_BUCKET" $(names_in "$1" s3); do
    owner=$(S3_BUCKET=$name bucket_owner) || exit
    # Without a tag it is ours while it is empty: create_env.sh was stopped before it could tag it.
    if [[ $owner == None ]] && is_empty "$name"; then owner=$ENV; fi
    [[ $owner == gone ]] || printf 'bucket\t%s\t%s\n' "$name" "$owner"
  done
}

is_empty() {
  local answer
  answer=$(aws s3api list-object-versions --bucket "$1" --max-keys 1 --no-paginate \
    --query '[Versions, DeleteMarkers][] | length(@)' --output text) && [[ $answer == 0 ]]
}

# of_kind KIND FOUND: the lines of FOUND that are of that kind.
of_kind() {
  sed -n "/^$1\t/p" <<<"$2"
}

# ours FOUND: the lines of FOUND that may be removed.
ours() {
  sed -n "/\t$ENV\$/p" <<<"$1"
}

KINDS=(alarm dashboard group instance queue template image snapshot volume profile role bucket)

show() {
  local found=$1 kind name owner
  for kind in "${KINDS[@]}"; do
    if [[ -z $(of_kind "$kind" "$found") ]]; then
      report "$kind" "$(expected_name "$kind")" "already gone"
      continue
    fi
    while IFS=$'\t' read -r _ name owner; do
      if [[ $owner == base ]]; then
        report "$kind" "${name##*/}" "left alone: it is the base machine's, although its tags say $ENV"
      elif [[ $owner != "$ENV" ]]; then
        report "$kind" "${name##*/}" "left alone: no tag comfy-env=$ENV, so create_env.sh did not make it"
      elif [[ $kind == bucket && $KEEP_BUCKET == yes ]]; then
        report "$kind" "$name" "kept$(how_much "$kind" "$name")"
      else
        report "$kind" "${name##*/}" "to be removed$(how_much "$kind" "$name")"
      fi
    done < <(of_kind "$kind" "$found")
  done
}

# how_much KIND NAME: what is in it, for those that hold something. Where AWS does not say, its words
# stand above, and the rest goes on.
how_much() {
  local kind=$1 name=$2 answer count bytes waiting running
  case $kind in
    group)
      count=$(aws autoscaling describe-auto-scaling-groups --auto-scaling-group-names "$name" \
        --query 'AutoScalingGroups[0].Instances | length(@)' --output text) || return 0
      printf ', with %s' "$(instances "$count")"
      ;;
    queue)
      answer=$(count_messages "$name") || return 0
      IFS=$'\t' read -r waiting running <<<"$answer"
      printf ', with %s messages waiting and %s being worked on' "$waiting" "$running"
      ;;
    bucket)
      answer=$(aws s3api list-object-versions --bucket "$name" --query 'Versions[].[Size]' --output text | sum_sizes) || return 0
      read -r count bytes <<<"$answer"
      printf ', with %s files or versions, %s' "$count" "$(numfmt --to=si --suffix=B "$bytes")"
      ;;
  esac
}

# sum_sizes: how many numbers its input has, and their sum.
sum_sizes() {
  awk '/^[0-9]+$/ { count++; sum += $1 } END { printf "%.0f %.0f\n", count, sum }'
}

# count_messages URL: waiting, and being worked on.
count_messages() {
  aws sqs get-queue-attributes --queue-url "$1" --attribute-names ApproximateNumberOfMessages \
    ApproximateNumberOfMessagesDelayed ApproximateNumberOfMessagesNotVisible \
    --query 'Attributes.[sum([ApproximateNumberOfMessages, ApproximateNumberOfMessagesDelayed][].to_number(@)),
      ApproximateNumberOfMessagesNotVisible]' --output text
}

expected_name() {
  case $1 in
    alarm) printf '%s' "$ALARM_NAME" ;;
    dashboard | group) printf '%s' "$ASG_NAME" ;;
    profile | role) printf '%s' "$WORKER_ROLE" ;;
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

remove_dashboard() {
  aws cloudwatch delete-dashboards --dashboard-names "$1"
}

remove_group() {
  local status
  status=$(aws autoscaling describe-auto-scaling-groups --auto-scaling-group-names "$1" \
    --query 'AutoScalingGroups[0].Status' --output text) || return
  if [[ $status != None ]]; then
    printf 'AWS is removing it already'
    return
  fi
  # Without waiting for its instances to end, or for their hooks. Its policies and its warm pool go with it.
  aws autoscaling delete-auto-scaling-group --auto-scaling-group-name "$1" --force-delete || return
  printf 'being removed'
}

remove_instance() {
  aws ec2 terminate-instances --instance-ids "$1" >/dev/null || return
  printf 'ending'
}

remove_queue() {
  local answer
  answer=$(aws sqs delete-queue --queue-url "$1" 2>&1) && return
  if is_no_queue "$answer"; then printf 'already gone' && return; fi
  printf '%s\n' "$answer"
  return 1
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

remove_volume() {
  aws ec2 delete-volume --volume-id "$1"
}

# remove_profile NAME: AWS wants it empty.
remove_profile() {
  local role
  role=$(aws iam get-instance-profile --instance-profile-name "$1" \
    --query 'InstanceProfile.Roles[].RoleName | [0]' --output text) || return
  [[ $role == None ]] || aws iam remove-role-from-instance-profile --instance-profile-name "$1" --role-name "$role" || return
  aws iam delete-instance-profile --instance-profile-name "$1"
}

# remove_role NAME: with the policies in it, and without those that an operator has attached.
remove_role() {
  local policies policy
  policies=$(aws iam list-role-policies --role-name "$1" --query 'PolicyNames' --output text) || return
  for policy in ${policies/#None/}; do
    aws iam delete-role-policy --role-name "$1" --policy-name "$policy" || return
  done
  policies=$(aws iam list-attached-role-policies --role-name "$1" --query 'AttachedPolicies[].PolicyArn' --output text) || return
  for policy in ${policies/#None/}; do
    aws iam detach-role-policy --role-name "$1" --policy-arn "$policy" || return
  done
  aws iam delete-role --role-name "$1"
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
      report fleet "$ASG_NAME" "still ending after $GONE_WAIT_SECONDS seconds:$(cut -f 2 <<<"$fleet" | paste -s -d ' ' | sed 's/^/ /'); why is in EC2, Auto Scaling group, Activity"
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
    FOUND=$(look | to_go)
    if [[ -z $(ours "$FOUND") || $REFUSED == yes ]] || ((SECONDS >= deadline)); then
      return
    fi
    sleep "$POLL_SECONDS"
  done
}

# to_go: of what look prints, the lines that are to be gone in the end.
to_go() {
  local kept="^$"
  [[ $KEEP_BUCKET == no ]] || kept="^bucket"$'\t'
  sed -e "/\tbase\$/d" -e "/$kept/d"
}

# --- Draining --------------------------------------------------------------------------------

# drain FOUND: the queue takes nothing new, so that no job comes between the last look and the end, and
# what is in it is run. The dead-letter queue does not count.
drain() {
  local found=$1 url waiting running state said="" quiet_since="" deadline=$((SECONDS + DRAIN_WAIT_SECONDS))
  url=$(ours "$found" | cut -f 2 | grep "/$SQS_NAME\$") || return 0
  [[ -n $(of_kind group "$(ours "$found")") ]] \
    || die "there is no group that could run what is in $SQS_NAME: leave out --drain"
  close_queue "$url"
  while true; do
    state=$(count_messages "$url") || die "cannot count the messages in $SQS_NAME: see AWS's words above"
    IFS=$'\t' read -r waiting running <<<"$state"
    if [[ $state != "$said" ]]; then
      report drain "$SQS_NAME" "$waiting messages waiting, $running being worked on"
      said=$state
    fi
    if ((waiting + running > 0)); then
      quiet_since=""
      ((SECONDS < deadline)) \
        || die "$SQS_NAME is not empty after $DRAIN_WAIT_SECONDS seconds and nothing was removed: run this again to go on waiting, or ./create_env.sh $ENV to have it take jobs again"
      ((waiting == 0)) || start_first_instance
    else
      quiet_since=${quiet_since:-$SECONDS}
      ((SECONDS - quiet_since < DRAIN_QUIET_SECONDS)) || return 0
    fi
    sleep "$POLL_SECONDS"
  done
}

# close_queue URL: nobody may send to it any more. create_env.sh opens it again.
close_queue() {
  local arn=arn:$PARTITION:sqs:$REGION:$ACCOUNT_ID:$SQS_NAME policy
  policy="{$(only_tls sqs "$arn"),{\"Sid\":\"Draining\",\"Effect\":\"Deny\",\"Principal\":\"*\",\"Action\":\"sqs:SendMessage\",\"Resource\":\"$arn\"}]}"
  run_aws "close the queue $SQS_NAME to new jobs" sqs set-queue-attributes --queue-url "$1" \
    --attributes "{\"Policy\":\"${policy//\"/\\\"}\"}"
  report drain "$SQS_NAME" "takes no more jobs (./create_env.sh $ENV opens it again)"
}

# start_first_instance: where messages wait and none is wanted. Workers start the others.
start_first_instance() {
  local wanted
  wanted=$(ask_aws "look at the group $ASG_NAME" autoscaling describe-auto-scaling-groups \
    --auto-scaling-group-names "$ASG_NAME" --query 'AutoScalingGroups[0].DesiredCapacity' --output text)
  [[ $wanted == 0 ]] || return 0
  run_aws "start an instance of $ASG_NAME" autoscaling set-desired-capacity \
    --auto-scaling-group-name "$ASG_NAME" --desired-capacity 1
}

# --- Main ------------------------------------------------------------------------------------

ask() {
  local answer=""
  [[ $KEEP_BUCKET == yes ]] || printf 'All files in %s are lost for ever. ' "$S3_BUCKET"
  printf 'Type %s to remove the environment: ' "$ENV"
  read -r answer || printf '\n'
  [[ $answer == "$ENV" ]] || die "'$answer' is not $ENV: nothing was removed"
}

main() {
  local name="" yes=no drain=no fleet_refused left
  while (($#)); do
    case $1 in
      -h | --help) usage && exit ;;
      --drain) drain=yes ;;
      --keep-bucket) KEEP_BUCKET=yes ;;
      --dry-run) DRY_RUN=yes ;;
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
  [[ $yes == yes || $DRY_RUN == yes || -t 0 ]] \
    || die "there is no terminal to ask on: add --yes to remove $ENV without a question"
  check_account

  printf 'Environment %s in %s of account %s\n' "$ENV" "$REGION" "$ACCOUNT_ID"
  FOUND=$(look)
  REFUSED=no
  show "$FOUND"
  if [[ $DRY_RUN == yes ]]; then
    printf 'Nothing was removed, because of --dry-run.\n'
    return
  fi
  FOUND=$(to_go <<<"$FOUND")
  if [[ -n $(ours "$FOUND") ]]; then
    [[ $yes == yes ]] || ask
    if [[ $drain == yes ]]; then
      drain "$FOUND"
      FOUND=$(look | to_go) # hours may have gone by
    fi
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
    look_at_the_end
  fi
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

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
  main "$@"
fi
