#!/usr/bin/env bash
# The Auto Scaling group, with its hooks and its warm pool.

# The worker (worker/lifecycle.py) answers to the hooks by these names.
LIFECYCLE_HOOK=comfy-terminating
LIFECYCLE_SECONDS=300
LAUNCHING_HOOK=comfy-launching
LAUNCHING_SECONDS=900                             # until the worker runs, which then asks for more
PROFILE_WAIT_SECONDS=${PROFILE_WAIT_SECONDS:-120} # until AWS knows a new instance profile

INSTANCES=""        # ensure_group: the capacity that the group is to have now
GROUP_STATE=""      # ensure_group: created, updated or already there
declare -A GROUP=() # look_at_group: what the group is like; None where there is none
# choose_launch: the options that say what the group launches, and how look_at_group sees it.
LAUNCH=() LAUNCHES=""

ensure_group() {
  choose_launch
  look_at_group
  GROUP_STATE="already there"
  if [[ ${GROUP[min]} == None ]]; then
    create_group
    INSTANCES=$MIN_INSTANCES GROUP_STATE=created GROUP[version]=$VERSION
    [[ $WARM_POOL == 0 || $DRY_RUN == yes ]] || ensure_hooks
  elif [[ ${GROUP[status]} == Delete* ]]; then
    die "the group $ASG_NAME is being deleted: wait until ./delete_env.sh $ENV has ended, then run this again"
  else
    change_group
    ensure_hooks
  fi
  # The worker of an instance with an older version leaves when it has no job. After the template, so that no instance
  # ever looks older than what would replace it.
  if [[ ${GROUP[version]} != "$VERSION" ]]; then
    change_part "set the version of the group $ASG_NAME" aws autoscaling create-or-update-tags --tags \
      "ResourceId=$ASG_NAME,ResourceType=auto-scaling-group,Key=comfy-version,Value=$VERSION,PropagateAtLaunch=false"
  fi
  # Instances that did not come to work have stopped it (boot/giving_up.sh). They are counted anew.
  if [[ ${GROUP[failed]} != None ]]; then
    change_part "forget what failed in the group $ASG_NAME" aws autoscaling delete-tags --tags \
      "ResourceId=$ASG_NAME,ResourceType=auto-scaling-group,Key=comfy-failed-boots"
    if [[ ${GROUP[stopped]} != None ]]; then
      change_part "let the group $ASG_NAME launch again" aws autoscaling resume-processes \
        --auto-scaling-group-name "$ASG_NAME" \
        --scaling-processes Launch
    fi
  fi
  # Rebalancing zones would end a busy instance to start another elsewhere.
  if [[ ${GROUP[suspended]} == None ]]; then
    change_part "suspend rebalancing in the group $ASG_NAME" aws autoscaling suspend-processes \
      --auto-scaling-group-name "$ASG_NAME" \
      --scaling-processes AZRebalance
  fi
  # Without its metrics the alarm does not know that nobody is there.
  if [[ ${GROUP[metric]} == None ]]; then
    change_part "switch on the metrics of the group $ASG_NAME" aws autoscaling enable-metrics-collection \
      --auto-scaling-group-name "$ASG_NAME" \
      --granularity 1Minute \
      --metrics GroupDesiredCapacity GroupInServiceInstances GroupPendingInstances GroupTotalInstances
  fi
  report group "$ASG_NAME" "$GROUP_STATE"
  ((WARM_POOL == 0)) || ensure_pool "${GROUP[pool]}"
}

# change_part WHAT aws ...: as change does, of a group that may be new.
change_part() {
  change "$@"
  [[ $GROUP_STATE == created ]] || GROUP_STATE=updated
}

look_at_group() {
  local answer i
  local -a names=(min max wanted subnets launches protected suspended metric pool version status stopped failed) found
  answer=$(ask "look at the group $ASG_NAME" aws autoscaling describe-auto-scaling-groups \
    --auto-scaling-group-names "$ASG_NAME" \
    --query "AutoScalingGroups[0].[MinSize, MaxSize, DesiredCapacity, VPCZoneIdentifier || 'None',
      MixedInstancesPolicy && MixedInstancesPolicy.join(' ', [
          LaunchTemplate.LaunchTemplateSpecification.join(':', [LaunchTemplateName, to_string(Version)]),
          join(' ', LaunchTemplate.Overrides[].InstanceType),
          InstancesDistribution.join(' ', [OnDemandAllocationStrategy, to_string(OnDemandBaseCapacity),
            to_string(OnDemandPercentageAboveBaseCapacity), SpotAllocationStrategy])])
        || LaunchTemplate && LaunchTemplate.join(':', [LaunchTemplateName, to_string(Version)]),
      NewInstancesProtectedFromScaleIn, SuspendedProcesses[?ProcessName=='AZRebalance'].ProcessName | [0],
      EnabledMetrics[?Metric=='GroupDesiredCapacity'].Metric | [0],
      WarmPoolConfiguration && WarmPoolConfiguration.join(' ', [to_string(MinSize),
        to_string(MaxGroupPreparedCapacity), PoolState, not_null(Status, 'Kept')]),
      Tags[?Key=='comfy-version'].Value | [0], Status,
      SuspendedProcesses[?ProcessName=='Launch'].ProcessName | [0], Tags[?Key=='comfy-failed-boots'].Value | [0]]" \
    --output text)
  IFS=$'\t' read -r -a found <<<"$answer"
  for i in "${!names[@]}"; do
    GROUP[${names[i]}]=${found[i]:-None}
  done
}

# choose_launch: $Default, not $Latest: a version counts only once it was made the default, which is also how to go back
# to an older one.
choose_launch() {
  local mixed on_demand=$((100 - SPOT_PERCENT))
  LAUNCHES="$TEMPLATE_NAME:\$Default"
  if ((${#TYPES[@]} == 0)); then
    LAUNCH=(--launch-template "LaunchTemplateName=$TEMPLATE_NAME,Version=\$Default")
    return
  fi
  LAUNCHES+=" ${TYPES[*]} prioritized 0 $on_demand price-capacity-optimized"
  mixed=$(fill mixed-instances.json TYPES="${TYPES[*]}" ON_DEMAND_PERCENT="$on_demand")
  LAUNCH=(--mixed-instances-policy "$mixed")
}

# change_group: sets INSTANCES. What is there already may be busy.
change_group() {
  local most=$MAX_INSTANCES
  INSTANCES=${GROUP[wanted]}
  # AWS would lower the desired capacity to a smaller maximum, and with it take busy instances.
  if ((most < INSTANCES)); then
    most=$INSTANCES
    report group "$ASG_NAME" "$INSTANCES instances are wanted: maximum $MAX_INSTANCES cannot be set yet, run this again later"
  fi
  # AWS refuses Spot instances to a group that has a warm pool.
  if ((WARM_POOL == 0)) && [[ ${GROUP[pool]} == *Kept ]]; then
    delete_pool
  fi
  if [[ ${GROUP[min]}/${GROUP[max]}/${GROUP[launches]}/${GROUP[protected]} != "$MIN_INSTANCES/$most/$LAUNCHES/True" ||
    $(sorted "${GROUP[subnets]}") != "$(sorted "$SUBNETS")" ]]; then
    change_part "change the group $ASG_NAME" aws autoscaling update-auto-scaling-group \
      --auto-scaling-group-name "$ASG_NAME" \
      "${LAUNCH[@]}" \
      --min-size "$MIN_INSTANCES" \
      --max-size "$most" \
      --vpc-zone-identifier "$SUBNETS" \
      --new-instances-protected-from-scale-in
    INSTANCES=$((INSTANCES > MIN_INSTANCES ? INSTANCES : MIN_INSTANCES))
  fi
}

# create_group: with its hook, so that no instance can ever end without it.
create_group() {
  local answer deadline=$((SECONDS + PROFILE_WAIT_SECONDS))
  local -a command=(aws autoscaling create-auto-scaling-group
    --auto-scaling-group-name "$ASG_NAME"
    "${LAUNCH[@]}"
    --min-size "$MIN_INSTANCES"
    --max-size "$MAX_INSTANCES"
    --desired-capacity "$MIN_INSTANCES"
    --vpc-zone-identifier "$SUBNETS"
    --health-check-type EC2
    --new-instances-protected-from-scale-in
    --lifecycle-hook-specification-list
    "LifecycleHookName=$LIFECYCLE_HOOK,LifecycleTransition=autoscaling:EC2_INSTANCE_TERMINATING,HeartbeatTimeout=$LIFECYCLE_SECONDS,DefaultResult=CONTINUE"
    --tags
    "Key=comfy-env,Value=$ENV,PropagateAtLaunch=false"
    "Key=comfy-prefix,Value=$PREFIX,PropagateAtLaunch=false"
    "Key=Name,Value=$ASG_NAME,PropagateAtLaunch=false"
    "Key=comfy-version,Value=$VERSION,PropagateAtLaunch=false")
  [[ $DRY_RUN == no ]] || return 0
  ((MIN_INSTANCES == 0)) || wait_for_image
  # AWS tries the template first: it may not know a new instance profile for some seconds, and may
  # refuse an image that is not ready.
  until answer=$("${command[@]}" 2>&1); do
    if [[ $answer == *"Invalid IAM Instance Profile"* ]] && ((SECONDS < deadline)); then
      sleep "$POLL_SECONDS"
    elif [[ $IMAGE_STATE == pending ]]; then
      wait_for_image
    else
      die "cannot create the group $ASG_NAME:$(one_line "$answer")"
    fi
  done
}

# ensure_hooks: the launching hook is for groups with a warm pool only: without it AWS stops an instance of the pool as
# soon as it runs, in the middle of its first boot, which is not done again. The worker completes it when ComfyUI answers.
ensure_hooks() {
  ensure_hook "$LIFECYCLE_HOOK" TERMINATING "$LIFECYCLE_SECONDS"
  if ((WARM_POOL > 0)); then
    ensure_hook "$LAUNCHING_HOOK" LAUNCHING "$LAUNCHING_SECONDS"
  elif [[ $(hook_of "$LAUNCHING_HOOK") != "" ]]; then
    change_part "remove the launching hook of $ASG_NAME" aws autoscaling delete-lifecycle-hook \
      --auto-scaling-group-name "$ASG_NAME" \
      --lifecycle-hook-name "$LAUNCHING_HOOK"
  fi
}

# ensure_hook NAME TRANSITION SECONDS
ensure_hook() {
  [[ $(hook_of "$1") != "autoscaling:EC2_INSTANCE_$2 $3 CONTINUE" ]] || return 0
  change_part "set the lifecycle hook $1 of $ASG_NAME" aws autoscaling put-lifecycle-hook \
    --auto-scaling-group-name "$ASG_NAME" \
    --lifecycle-hook-name "$1" \
    --lifecycle-transition "autoscaling:EC2_INSTANCE_$2" \
    --heartbeat-timeout "$3" \
    --default-result CONTINUE
}

# hook_of NAME: prints what it is like; nothing where there is none.
hook_of() {
  ask "look at the lifecycle hook $1 of $ASG_NAME" aws autoscaling describe-lifecycle-hooks \
    --auto-scaling-group-name "$ASG_NAME" \
    --lifecycle-hook-names "$1" \
    --query "LifecycleHooks[].join(' ', [LifecycleTransition, to_string(HeartbeatTimeout), DefaultResult])" \
    --output text
}

# ensure_pool POOL: POOL is how ensure_group has found it.
ensure_pool() {
  local pool=$1
  if [[ $pool == "$WARM_POOL $WARM_POOL Stopped Kept" ]]; then
    report pool "$ASG_NAME" "already there"
    return
  fi
  # Its instances are started at once, to be stopped when they have booted.
  [[ $IMAGE_STATE != pending ]] || wait_for_image
  # The size is fixed, whatever the desired capacity, only where both numbers are the same.
  change "keep a warm pool of $WARM_POOL in the group $ASG_NAME" aws autoscaling put-warm-pool \
    --auto-scaling-group-name "$ASG_NAME" \
    --pool-state Stopped \
    --min-size "$WARM_POOL" \
    --max-group-prepared-capacity "$WARM_POOL"
  if [[ $pool == None ]]; then
    report pool "$ASG_NAME" created
  else
    report pool "$ASG_NAME" updated
  fi
}

delete_pool() {
  change "remove the warm pool of $ASG_NAME" aws autoscaling delete-warm-pool \
    --auto-scaling-group-name "$ASG_NAME" \
    --force-delete
  report pool "$ASG_NAME" removed
}

# sorted LIST: a comma-separated list in a fixed order.
sorted() {
  tr , '\n' <<<"$1" | sort
}
