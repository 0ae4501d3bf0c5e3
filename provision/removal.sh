#!/usr/bin/env bash
# How each kind of piece is removed.

# How long to wait until AWS has ended the instances, and until it lists a deleted queue no more.
GONE_WAIT_SECONDS=${GONE_WAIT_SECONDS:-1200}
FORGET_WAIT_SECONDS=${FORGET_WAIT_SECONDS:-90}
DELETE_BATCH=${DELETE_BATCH:-1000} # how many files S3 takes in one call to delete

REFUSED=no # remove_kind: yes where a piece could not be removed

confirm() {
  local answer=""
  [[ $KEEP_BUCKET == yes ]] || printf 'All files in %s are lost for ever. ' "$S3_BUCKET"
  printf 'Type %s to remove the environment: ' "$ENV"
  read -r answer || printf '\n'
  [[ $answer == "$ENV" ]] || die "'$answer' is not $ENV: nothing was removed"
}

# remove_kind KIND FOUND: everything in FOUND that is of that kind and ours. A refusal is reported and
# the rest goes on; the look at the end decides.
remove_kind() {
  local kind=$1 found=$2 name answer
  while IFS=$'\t' read -r _ name _; do
    [[ -n $name ]] || continue
    if answer=$(remove "$kind" "$name" 2>&1); then
      report "$kind" "${name##*/}" "${answer:-removed}"
    else
      report "$kind" "${name##*/}" "not removed:$(one_line "$answer")"
      REFUSED=yes
    fi
  done <<<"$(of_kind "$kind" "$(ours "$found")")"
}

# remove KIND NAME: prints nothing, or what has become of it.
remove() {
  case $1 in
    alarm) aws cloudwatch delete-alarms --alarm-names "$2" ;;
    dashboard) aws cloudwatch delete-dashboards --dashboard-names "$2" ;;
    instance) aws ec2 terminate-instances --instance-ids "$2" >/dev/null && printf 'ending' ;;
    template) aws ec2 delete-launch-template --launch-template-name "$2" >/dev/null ;;
    image) aws ec2 deregister-image --image-id "$2" >/dev/null ;;
    snapshot) delete_snapshot "$2" ;;
    volume) aws ec2 delete-volume --volume-id "$2" ;;
    group | queue | profile | role | bucket) "remove_$1" "$2" ;;
  esac
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

remove_queue() {
  local answer
  answer=$(aws sqs delete-queue --queue-url "$1" 2>&1) && return
  if is_no_queue "$answer"; then printf 'already gone' && return; fi
  printf '%s\n' "$answer"
  return 1
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

# look_at_the_end: prints what is left. AWS may list what has just been deleted for a minute, which is waited for
# unless a removal was refused.
look_at_the_end() {
  local found deadline=$((SECONDS + FORGET_WAIT_SECONDS))
  while true; do
    found=$(look | to_go) || exit
    if [[ -z $(ours "$found") || $REFUSED == yes ]] || ((SECONDS >= deadline)); then
      printf '%s' "$found"
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
