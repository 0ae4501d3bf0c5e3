#!/usr/bin/env bash
# The alarms, the policy by which one of them starts an instance, and the dashboard.

# While the first instance boots, and until the metrics show it, the alarm adds no second one.
WARMUP_SECONDS=300

POLICY_ARN="" # ensure_policy

# ensure_alarms: first-instance adds an instance when messages wait and none is wanted. The others tell ALARM_TOPIC,
# if there is one.
#
# There is no FILL in first-instance: it would make a 0 of a data point that is only late, so that the alarm never
# rings, or rings while the fleet works. SQS publishes nothing of a queue that was empty and left alone for six hours:
# that is no alarm in dead-letters. The age in oldest-message counts messages in flight too: a long job alone, for which
# nobody waits, is no alarm. In idle-hour what SQS does not publish is 0: where no worker polls either, the instance
# is idle all the more; and where nothing is known of the group, the alarm stays as it is.
ensure_alarms() {
  local name
  ensure_policy
  for name in first-instance dead-letters oldest-message not-in-service idle-hour; do
    ensure_alarm "$name"
  done
}

# ensure_policy: sets POLICY_ARN. A step of +1 and no exact capacity: a sender may have raised it meanwhile.
# Looked up without the group, which --dry-run may not find.
ensure_policy() {
  local answer is
  answer=$(ask "look at the scaling policy $ALARM_NAME" aws autoscaling describe-policies \
    --policy-names "$ALARM_NAME" \
    --query "ScalingPolicies[?AutoScalingGroupName=='$ASG_NAME'].[PolicyARN, join(' ', [PolicyType, AdjustmentType,
      to_string(StepAdjustments[].ScalingAdjustment), to_string(EstimatedInstanceWarmup)])] | [0] || ['None', 'None']" \
    --output text)
  IFS=$'\t' read -r POLICY_ARN is <<<"$answer"
  if [[ $DRY_RUN == yes || $is == "StepScaling ChangeInCapacity [1] $WARMUP_SECONDS" ]]; then return; fi
  POLICY_ARN=$(ask "set the scaling policy $ALARM_NAME" aws autoscaling put-scaling-policy \
    --auto-scaling-group-name "$ASG_NAME" \
    --policy-name "$ALARM_NAME" \
    --policy-type StepScaling \
    --adjustment-type ChangeInCapacity \
    --step-adjustments "MetricIntervalLowerBound=0,ScalingAdjustment=1" \
    --estimated-instance-warmup "$WARMUP_SECONDS" \
    --query PolicyARN --output text)
}

# ensure_alarm NAME: as in the launch template, a digest shows the next run what has changed.
ensure_alarm() {
  local name=$ASG_NAME-$1 alarm found digest state=updated
  found=$(ask "look at the alarm $name" aws cloudwatch describe-alarms \
    --alarm-names "$name" \
    --query 'MetricAlarms[].AlarmDescription | [0]' --output text)
  alarm=$(alarm_input "$1" none)
  digest=$(digest "$alarm")
  if [[ $found == *" $digest" ]]; then
    report alarm "$name" "already there"
    return
  fi
  alarm=$(alarm_input "$1" "$digest")
  change "set the alarm $name" aws cloudwatch put-metric-alarm --cli-input-json "$alarm"
  [[ $found != None ]] || state=created
  report alarm "$name" "$state"
}

# alarm_input NAME DIGEST: all that put-metric-alarm is told.
alarm_input() {
  local -a templates=("alarms/$1.json")
  [[ $1 == first-instance || -z $ALARM_TOPIC ]] || templates+=(alarms/topic.json)
  fill "${templates[@]}" DIGEST="$2" LEAST_INSTANCES="$(instances "$MIN_INSTANCES")"
}

# ensure_dashboard: what the workers publish is in the namespace PREFIX/ENV.
ensure_dashboard() {
  local body answer state=updated
  body=$(fill dashboard.json)
  if answer=$(aws cloudwatch get-dashboard --dashboard-name "$ASG_NAME" --query DashboardBody --output text 2>&1); then
    if [[ ${answer//[[:space:]]/} == "${body//[[:space:]]/}" ]]; then
      report dashboard "$ASG_NAME" "already there"
      return
    fi
  elif [[ $answer == *NotFound* ]]; then
    state=created
  else
    die "cannot look at the dashboard $ASG_NAME:$(one_line "$answer")"
  fi
  change "set the dashboard $ASG_NAME" aws cloudwatch put-dashboard \
    --dashboard-name "$ASG_NAME" \
    --dashboard-body "$body"
  report dashboard "$ASG_NAME" "$state"
}
