#!/usr/bin/env bash
# What there is of an environment, by its names and by its tags, and whose it is.

KINDS=(alarm dashboard group instance queue template image snapshot volume profile role bucket)

SEES_TAGS=yes # see_tags: no where AWS lets this caller not look

# see_tags: whether the tagging API may be asked, which is in none of the FullAccess policies of the services themselves.
see_tags() {
  local answer
  answer=$(find_tagged 2>&1) && return
  [[ $answer == *AccessDenied* ]] || die "cannot find what is tagged as $ENV:$(one_line "$answer")"
  SEES_TAGS=no
  warn "tag:GetResources is not allowed: what is tagged as $ENV but has another name than the settings say is not found, if it is an alarm, a queue or a bucket"
}

# find_tagged: the ARNs of what has our tags. Buckets are in all answers, alarms and queues of this region.
find_tagged() {
  [[ $SEES_TAGS == yes ]] || return 0
  aws resourcegroupstaggingapi get-resources \
    --tag-filters "Key=comfy-env,Values=$ENV" "Key=comfy-prefix,Values=$PREFIX" \
    --resource-type-filters cloudwatch:alarm sqs:queue s3 \
    --query 'ResourceTagMappingList[].ResourceARN' --output text
}

# look: prints KIND, NAME and OWNER of every piece that is there, tab-separated. OWNER is the
# environment in its comfy-env tag, or None. What is the base machine's by its name is its own whatever
# its tags say.
look() {
  local tagged
  tagged=$(ask "find what is tagged as $ENV" find_tagged) || exit # the settings may have other names now
  {
    look_at_alarms "$tagged" || exit
    look_at_dashboard || exit
    look_at_fleet || exit
    look_at_queues "$tagged" || exit
    ask "list the launch templates of $ENV" aws ec2 describe-launch-templates --filters "${OUR_FILTERS[@]}" \
      --query "LaunchTemplates[].['template', LaunchTemplateName, '$ENV']" --output text || exit
    ask "look at the launch template $TEMPLATE_NAME" aws ec2 describe-launch-templates \
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
  names=$(ask "list the alarms of $ASG_NAME" aws cloudwatch describe-alarms --alarm-name-prefix "$ASG_NAME-" \
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
  ask "look at the group $ASG_NAME" aws autoscaling describe-auto-scaling-groups \
    --auto-scaling-group-names "$ASG_NAME" --query "$query" --output text || exit
  ask "list the groups of $ENV" aws autoscaling describe-auto-scaling-groups --filters "${OUR_FILTERS[@]}" \
    --query "$query" --output text || exit
  ask "list the instances of $ENV" aws ec2 describe-instances --filters "${OUR_FILTERS[@]}" \
    Name=tag-key,Values=aws:ec2launchtemplate:id \
    Name=instance-state-name,Values=pending,running,shutting-down,stopping,stopped \
    --query "Reservations[].Instances[].['instance', InstanceId, '$ENV']" \
    --output text || exit
}

# look_at_queues TAGGED
look_at_queues() {
  local urls url name owner
  urls=$(ask "list the queues" aws sqs list-queues --queue-name-prefix "$SQS_NAME" --query QueueUrls --output text) || exit
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
  images=$(ask "list the images of $ENV" aws ec2 describe-images --owners self --filters "${OUR_FILTERS[@]}" \
    --query "Images[].[ImageId, join(' ', BlockDeviceMappings[?Ebs.SnapshotId].Ebs.SnapshotId)]" \
    --output text) || exit
  snapshots=$(ask "list the snapshots of $ENV" aws ec2 describe-snapshots --owner-ids self --filters "${OUR_FILTERS[@]}" \
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
  ask "list the volumes of $ENV" aws ec2 describe-volumes --filters "${OUR_FILTERS[@]}" Name=status,Values=available \
    --query "Volumes[].['volume', VolumeId, '$ENV']" --output text || exit
}

# look_at_role: by the path, which is the environment's own and cannot be changed.
look_at_role() {
  ask "list the instance profiles of $ENV" aws iam list-instance-profiles --path-prefix "$WORKER_PATH" \
    --query "InstanceProfiles[?Path=='$WORKER_PATH'].['profile', InstanceProfileName, '$ENV']" --output text || exit
  ask "list the roles of $ENV" aws iam list-roles --path-prefix "$WORKER_PATH" \
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
