#!/usr/bin/env bash
# An instance that cannot work does not stay: it tells its group, which replaces it. And a fault that every instance
# would have does not become an endless row of paid launches.

GIVE_UP_SECONDS=${GIVE_UP_SECONDS:-900}
FAILED_BOOTS=3
FAILED_TAG=comfy-failed-boots # of the group: "VERSION COUNT", the launch template's, and how often it failed in a row

STARTING=$HERE/logs/starting

# note_start: since when this instance has not worked, as "BOOT_ID SECONDS": a service starts, and no worker has seen
# ComfyUI answer since. Then the worker removes it (worker/reports.py).
note_start() {
  local boot_id
  read -r boot_id </proc/sys/kernel/random/boot_id
  if [[ -r $STARTING && $(<"$STARTING") == "$boot_id "* ]]; then return; fi
  if ! mkdir -p "${STARTING%/*}" 2>/dev/null || ! printf '%s %s\n' "$boot_id" "$EPOCHSECONDS" 2>/dev/null >"$STARTING"; then
    say "cannot write $STARTING: should this instance not come to work, nobody is told"
  fi
}

# starting_since: seconds since 1970.
starting_since() {
  local since=$EPOCHSECONDS
  [[ ! -r $STARTING ]] || read -r _ since <"$STARTING"
  printf '%s' "$since"
}

# give_up_if_due: at each start of a service, which systemd repeats for ever. It goes on all the same: should it work
# after all, nothing is lost.
give_up_if_due() {
  local waited
  waited=$((EPOCHSECONDS - $(starting_since)))
  ((waited >= GIVE_UP_SECONDS)) || return 0
  know_instance
  # The base machine is in no group; what is being terminated leaves already.
  [[ $LIFECYCLE_STATE == InService || $LIFECYCLE_STATE == Warmed:* ]] || return 0
  say "this instance has not come to work in $waited s: it gives up"
  if (give_up); then rm -f "$STARTING"; fi # else again at the next start
}

give_up() {
  local answer group version failed count=0 suspended
  # Settings that cannot be read may be what is wrong.
  if (load_settings) 2>/dev/null; then load_settings; else export AWS_DEFAULT_REGION=$INSTANCE_REGION AWS_REGION=$INSTANCE_REGION; fi
  store_logs
  answer=$(find_group) || return
  IFS=$'\t' read -r group version failed suspended <<<"$answer"
  if [[ -z $group ]]; then
    say "no group has $INSTANCE_ID: it is left to you"
    return 1
  fi
  [[ $failed != "$version "* ]] || count=${failed#* }
  count=$((count + 1))
  # Before the group is told, or this instance might be replaced without being counted.
  tell_aws create-or-update-tags --tags \
    "ResourceId=$group,ResourceType=auto-scaling-group,Key=$FAILED_TAG,Value=$version $count,PropagateAtLaunch=false" || return
  if ((count >= FAILED_BOOTS)) && [[ $suspended == None ]]; then
    say "$count instances of version $version in a row have not come to work: the group launches no more"
    tell_aws suspend-processes --auto-scaling-group-name "$group" --scaling-processes Launch || return
  fi
  tell_aws set-instance-health --instance-id "$INSTANCE_ID" --health-status Unhealthy --no-should-respect-grace-period
}

# find_group: prints the group that has this instance, the version of the launch template that it was made from, the
# group's FAILED_TAG and whether it launches. A group does not list what is in its warm pool, so its name is used where
# that can be read.
find_group() {
  local of="AutoScalingGroups[?Instances[?InstanceId=='$INSTANCE_ID']]"
  local -a named=()
  if [[ -n ${ASG_NAME:-} ]]; then named=(--auto-scaling-group-names "$ASG_NAME") of=AutoScalingGroups; fi
  tell_aws describe-auto-scaling-groups "${named[@]}" --output text --query "$of | [].[AutoScalingGroupName,
    not_null(Instances[?InstanceId=='$INSTANCE_ID'].LaunchTemplate.Version | [0], Tags[?Key=='comfy-version'].Value | [0]),
    Tags[?Key=='$FAILED_TAG'].Value | [0], SuspendedProcesses[?ProcessName=='Launch'].ProcessName | [0]]"
}

# tell_aws OPERATION OPTION...: of Auto Scaling.
tell_aws() {
  timeout 120 aws autoscaling "$@" || {
    say "cannot $1: see above; it is tried again"
    return 1
  }
}

# store_logs: where the worker stores them. What the services have said before they had a log is in the journal.
store_logs() {
  local file
  if [[ -z ${S3_BUCKET:-} ]]; then
    say "the settings do not say which bucket the logs belong into"
    return
  fi
  journalctl --boot --lines 2000 --output short-iso --unit comfyui --unit comfy-manage >"$HERE/logs/journal.log" 2>/dev/null || true
  for file in "$HERE"/logs/*.log; do
    [[ -s $file ]] || continue
    timeout 60 aws s3 cp --only-show-errors "$file" "s3://$S3_BUCKET/output/$INSTANCE_ID/${file##*/}" || say "cannot store $file"
  done
}
