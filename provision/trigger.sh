#!/usr/bin/env bash
# The bucket's events: a workflow that is dropped into its input/jobs/ runs (the S3 trigger), and EventBridge hears of
# all that comes into it, each job's result.json among it.

TRIGGER_ID=comfy-jobs # the bucket's event configuration that is ours

TRIGGER=""       # look_at_trigger: yes or no as somebody wants it, empty where nobody does and there is none
TRIGGER_FOUND="" # look_at_trigger: what it is now, or None
EVENTS=""        # look_at_trigger: yes or no as somebody wants it, empty where nobody says and EventBridge hears nothing
EVENTS_FOUND=""  # look_at_trigger: True where EventBridge hears of the bucket's events, else False
EVENTS_PUT=no    # put_events: whether it has set both

# look_at_trigger ASKED EVENTS: each yes, no or empty. Where nobody has asked and there is one it stays, so that it need
# not be asked for each time.
look_at_trigger() {
  local answer
  TRIGGER=$1 EVENTS=${2:-}
  if answer=$(aws s3api get-bucket-notification-configuration --bucket "$S3_BUCKET" \
    --expected-bucket-owner "$ACCOUNT_ID" \
    --query "[QueueConfigurations[?Id=='$TRIGGER_ID'].join(' ', [QueueArn, join(' ', Events),
      join(' ', sort(not_null(Filter.Key.FilterRules[].Value, \`[]\`)))]) | [0], EventBridgeConfiguration != null]" \
    --output text 2>&1); then
    answer=${answer##*$'\n'} # the last line, in case the CLI had a warning
    TRIGGER_FOUND=${answer%%$'\t'*} EVENTS_FOUND=${answer##*$'\t'}
  elif [[ $answer == *NoSuchBucket* ]]; then
    TRIGGER_FOUND=None EVENTS_FOUND=False
  else
    die "cannot look at the events of the bucket $S3_BUCKET:$(one_line "$answer")"
  fi
  [[ -n $TRIGGER || $TRIGGER_FOUND == None ]] || TRIGGER=yes
  [[ -n $EVENTS || $EVENTS_FOUND == False ]] || EVENTS=yes
}

# ensure_trigger: adds it or takes it away, once queue and bucket are there.
ensure_trigger() {
  local state="already there" ours sid found url wanted
  [[ -n $TRIGGER ]] || return 0
  # The statement's name holds a digest, because AWS may give the rest back in a spelling of its own.
  ours=$(fill policies/queue-trigger.json SID=ComfyTrigger)
  sid=ComfyTrigger$(digest "$ours")
  ours=$(fill policies/queue-trigger.json SID="$sid")
  wanted="$QUEUE_ARN s3:ObjectCreated:* .json input/jobs/"
  case $TRIGGER/$TRIGGER_FOUND in
    no/None | "yes/$wanted") ;;
    no/*) state=removed ;;
    yes/None) state=created ;;
    *) state=updated ;;
  esac
  if [[ $DRY_RUN == no ]]; then
    url=$(ask "find the queue $SQS_NAME" aws sqs get-queue-url --queue-name "$SQS_NAME" --query QueueUrl --output text)
    found=$(ask "look at the policy of the queue $SQS_NAME" aws sqs get-queue-attributes --queue-url "$url" \
      --attribute-names Policy --query Attributes.Policy --output text)
    if [[ $TRIGGER == yes && $found != *"$sid"* ]]; then
      set_trigger_policy "$url" "$found" "$ours"
      [[ $state != "already there" ]] || state=updated
    elif [[ $TRIGGER == no && $found == *ComfyTrigger* ]]; then
      set_trigger_policy "$url" "$found" ""
      state=removed
    fi
    [[ $TRIGGER/$TRIGGER_FOUND == "yes/$wanted" || $TRIGGER/$TRIGGER_FOUND == no/None ]] || put_events
  fi
  report trigger "s3://$S3_BUCKET/input/jobs/" "$state"
}

# ensure_events: EventBridge hears of what comes into the bucket, or does so no more. Who listens is no business of ours.
ensure_events() {
  local state="already there"
  case $EVENTS/$EVENTS_FOUND in
    yes/False) state=created ;;
    no/True) state=removed ;;
  esac
  [[ -n $EVENTS ]] || return 0
  # Once, because S3 sends the trigger's queue a test message each time, which may start an instance.
  [[ $state == "already there" || $DRY_RUN == yes || $EVENTS_PUT == yes ]] || put_events
  report events "s3://$S3_BUCKET to EventBridge" "$state"
}

# set_trigger_policy URL FOUND OURS: the queue's policy is FOUND (None: it has none) with the statements of the policy
# OURS in place of an earlier one of ours; what others have put there stays.
set_trigger_policy() {
  local url=$1 attributes
  attributes=$(python3 -c '
import json, sys
found, ours = (json.loads(text)["Statement"] if text.startswith("{") else [] for text in sys.argv[1:])
theirs = found if isinstance(found, list) else [found]
theirs = [one for one in theirs if not one.get("Sid", "").startswith("ComfyTrigger")]
policy = json.dumps({"Version": "2012-10-17", "Statement": theirs + ours}) if theirs + ours else ""
print(json.dumps({"Policy": policy}))' "$2" "$3")
  change "set the policy of the queue $SQS_NAME" aws sqs set-queue-attributes \
    --queue-url "$url" \
    --attributes "$attributes"
}

# put_events: AWS replaces the whole configuration, so the new one holds what others have put there, and both of ours.
# S3 tries the queue, whose new policy may count only after a minute.
put_events() {
  local ours="" bridge="" events answer deadline=$((SECONDS + QUEUE_WAIT_SECONDS)) said=no
  [[ $TRIGGER != yes ]] || ours=$(fill bucket/event.json)
  # shellcheck disable=SC2016 # JMESPath's backticks
  [[ $EVENTS != yes ]] || bridge=', EventBridgeConfiguration: `{}`'
  events=$(ask "look at the events of the bucket $S3_BUCKET" aws s3api get-bucket-notification-configuration \
    --bucket "$S3_BUCKET" \
    --query "{TopicConfigurations: not_null(TopicConfigurations, \`[]\`),
      LambdaFunctionConfigurations: not_null(LambdaFunctionConfigurations, \`[]\`),
      QueueConfigurations: [QueueConfigurations[?Id!='$TRIGGER_ID'], \`[$ours]\`][]$bridge}" \
    --output json)
  until answer=$(aws s3api put-bucket-notification-configuration --bucket "$S3_BUCKET" \
    --notification-configuration "$events" 2>&1); do
    [[ $answer == *"Unable to validate"* && $SECONDS -lt $deadline ]] \
      || die "cannot set the events of the bucket $S3_BUCKET:$(one_line "$answer")"
    [[ $said == yes ]] || report trigger "s3://$S3_BUCKET/input/jobs/" "waiting until the queue's new policy counts ..."
    said=yes
    sleep "$POLL_SECONDS"
  done
  EVENTS_PUT=yes
}
