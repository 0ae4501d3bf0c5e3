#!/usr/bin/env bash
# The end of an environment's jobs: no new ones, and those that are there are run (delete_env.sh --drain).

# How long to wait for the jobs, and how long a queue must look empty to be so: AWS counts its messages with a delay
# of up to a minute.
DRAIN_WAIT_SECONDS=${DRAIN_WAIT_SECONDS:-43200}
DRAIN_QUIET_SECONDS=${DRAIN_QUIET_SECONDS:-90}

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
  local policy attributes
  policy=$(fill policies/queue.json policies/queue-draining.json)
  attributes=$(fill queue/policy.json POLICY="$policy")
  change "close the queue $SQS_NAME to new jobs" aws sqs set-queue-attributes \
    --queue-url "$1" \
    --attributes "$attributes"
  report drain "$SQS_NAME" "takes no more jobs (./create_env.sh $ENV opens it again)"
}

# start_first_instance: where messages wait and none is wanted. Workers start the others.
start_first_instance() {
  local wanted
  wanted=$(ask "look at the group $ASG_NAME" aws autoscaling describe-auto-scaling-groups \
    --auto-scaling-group-names "$ASG_NAME" --query 'AutoScalingGroups[0].DesiredCapacity' --output text)
  [[ $wanted == 0 ]] || return 0
  change "start an instance of $ASG_NAME" aws autoscaling set-desired-capacity \
    --auto-scaling-group-name "$ASG_NAME" --desired-capacity 1
}
