#!/usr/bin/env bash
# The queue and its dead-letter queue.

RETENTION_SECONDS=1209600 # 14 days, the longest a queue allows
MESSAGE_BYTES=1048576     # the largest message a queue allows
LONG_POLL_SECONDS=20
QUEUE_WAIT_SECONDS=${QUEUE_WAIT_SECONDS:-90} # for a name or a policy that AWS has not taken up yet

SECURITY=() # secure_queue: the templates of what a queue lacks

ensure_queues() {
  local urls
  urls=$(ask "list the queues" aws sqs list-queues --queue-name-prefix "$SQS_NAME" --query QueueUrls --output text)
  ensure_queue "$DLQ_NAME" "$urls"
  ensure_queue "$SQS_NAME" "$urls"
}

# ensure_queue NAME URLS: URLS are the queues that exist.
ensure_queue() {
  local name=$1 urls=$2 url attributes
  for url in $urls; do
    [[ $url == */"$name" ]] || continue
    if queue_is_as_wanted "$name" "$url"; then
      report queue "$name" "already there"
    else
      attributes=$(queue_attributes "$name")
      change "change the queue $name" aws sqs set-queue-attributes --queue-url "$url" --attributes "$attributes"
      report queue "$name" updated
    fi
    return
  done
  secure_queue False None
  attributes=$(queue_attributes "$name")
  create_queue "$name" "$attributes"
  report queue "$name" created
}

# queue_attributes NAME: with those in SECURITY.
queue_attributes() {
  local name=$1 arn=$DLQ_ARN policy redrive=""
  local -a templates=(queue/settings.json)
  if [[ $name != "$DLQ_NAME" ]]; then
    arn=$QUEUE_ARN redrive=$(fill queue/redrive.json)
    templates+=(queue/dead-letters.json)
  fi
  policy=$(fill policies/queue.json QUEUE_ARN="$arn")
  fill "${templates[@]}" "${SECURITY[@]}" POLICY="$policy" REDRIVE="$redrive"
}

# secure_queue ENCRYPTED POLICY: sets SECURITY, for a queue with these. A key or a policy that somebody else gave it
# stays; one with which delete_env.sh drained it does not.
secure_queue() {
  local encrypted=$1 policy=$2
  SECURITY=()
  [[ $encrypted == True ]] || SECURITY+=(queue/encryption.json)
  [[ $policy != None && $policy != *'"Draining"'* ]] || SECURITY+=(queue/policy.json)
}

# queue_is_as_wanted NAME URL: sets SECURITY, as secure_queue does.
queue_is_as_wanted() {
  local name=$1 url=$2 answer numbers redrive encrypted policy
  answer=$(ask "look at the queue $name" aws sqs get-queue-attributes --queue-url "$url" --attribute-names All \
    --query "Attributes.[join('/', [VisibilityTimeout, ReceiveMessageWaitTimeSeconds, MessageRetentionPeriod,
      MaximumMessageSize]), RedrivePolicy, SqsManagedSseEnabled=='true' || KmsMasterKeyId!=null, Policy]" \
    --output text) || exit
  IFS=$'\t' read -r numbers redrive encrypted policy <<<"$answer"
  secure_queue "$encrypted" "$policy"
  ((${#SECURITY[@]} == 0)) || return 1
  [[ $numbers == "$VISIBILITY_TIMEOUT/$LONG_POLL_SECONDS/$RETENTION_SECONDS/$MESSAGE_BYTES" ]] || return 1
  # AWS gives the policy back in its own spelling: with or without spaces, 3 or "3".
  redrive=${redrive//[ \"]/}
  [[ $name == "$DLQ_NAME" || ($redrive == *"deadLetterTargetArn:$DLQ_ARN"[,\}]* && $redrive == *"maxReceiveCount:$MAX_RECEIVES"[,\}]*) ]]
}

create_queue() {
  local name=$1 attributes=$2 answer deadline=$((SECONDS + QUEUE_WAIT_SECONDS)) said=no
  [[ $DRY_RUN == no ]] || return 0
  until answer=$(aws sqs create-queue --queue-name "$name" --attributes "$attributes" \
    --tags "comfy-env=$ENV,comfy-prefix=$PREFIX,Name=$name" 2>&1); do
    ! is_late "$answer" || continue
    [[ $answer == *QueueDeletedRecently* ]] || die "cannot create the queue $name:$(one_line "$answer")"
    ((SECONDS < deadline)) \
      || die "AWS still keeps the name of the deleted queue $name after $QUEUE_WAIT_SECONDS seconds: run this again in a minute"
    [[ $said == yes ]] || report queue "$name" "deleted a moment ago: AWS frees its name within a minute, waiting"
    said=yes
    sleep "$POLL_SECONDS"
  done
  made_now
}
