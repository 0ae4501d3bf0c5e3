#!/usr/bin/env bash
#
# Makes an environment from the base machine, or brings one up to date: image, launch template,
# Auto Scaling group, alarm, bucket and queues.
#
# Usage: ./create_env.sh NAME [INSTANCE_ID] [--reboot] [--with-output] [--s3-trigger | --no-s3-trigger]
#
#   NAME             the environment: lowercase letters, digits and hyphens, such as pro
#   INSTANCE_ID      the base machine; needed only where this is not run on the base machine itself
#   --reboot         reboot the base machine for an image that is consistent to the last byte
#   --with-output    copy the base bucket's output/ as well
#   --s3-trigger     from now on, run every workflow that is dropped into the bucket's input/jobs/
#   --no-s3-trigger  do so no more
#
# Example: ./create_env.sh pro
#
# The settings are read from the file env beside this script. Running it again is safe: what is
# there stays, changed settings are applied, an interrupted run is completed, and files that are new
# or changed in the base bucket are copied; nothing is ever deleted. An image that the environment
# has is used again.
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

# The worker (parse_job.py) answers to the hook by this name.
LIFECYCLE_HOOK=comfy-terminating
LIFECYCLE_SECONDS=300
RETENTION_SECONDS=1209600 # 14 days, the longest a queue allows
MESSAGE_BYTES=1048576     # the largest message a queue allows
LONG_POLL_SECONDS=20
TRIGGER_ID=comfy-jobs # the bucket's event configuration that is ours
# While the first instance boots, and until the metrics show it, the alarm adds no second one.
WARMUP_SECONDS=300

# How long to wait for AWS, and how long between two looks.
IMAGE_WAIT_SECONDS=${IMAGE_WAIT_SECONDS:-7200}
QUEUE_WAIT_SECONDS=${QUEUE_WAIT_SECONDS:-90}
POLL_SECONDS=${POLL_SECONDS:-10}

DRY_RUN=no # --dry-run: yes

die() {
  printf '%s: %s\n' "${0##*/}" "$*" >&2
  exit 1
}

# usage: the comment at the top of the script that was started.
usage() {
  sed -n '3,/^[^#]/s/^# \{0,1\}//p' "$0"
}

# report KIND NAME STATE: one aligned line for every step. With --dry-run, what a step would have done
# is told as what is to be done.
report() {
  local state=$3
  if [[ $DRY_RUN == yes && $state =~ ^(created|updated|removed|started|copied|replaced) ]]; then
    state="to be $state"
  fi
  printf '%-9s %-52s %s\n' "$1" "$2" "$state"
}

# --- Settings --------------------------------------------------------------------------------

# load_env FILE: exports the settings in FILE. What the process environment already has wins. Only
# lines that Bash and python-dotenv read alike are taken (comfy_utils.py checks by the same rule);
# a value is never printed, because it may be a secret.
load_env() {
  local file=$1 line name value rest number=0
  local -A seen=()
  local reference='\$\{([A-Z][A-Z0-9_]*)\}'
  local bare="([A-Za-z0-9_./:@%+,=-]|$reference)*"
  local quoted="\"([^\"\\\\\$\`]|$reference)*\""
  [[ -r $file && ! -d $file ]] || die "cannot read the settings file $file: copy env.example to it and fill it in"
  while IFS= read -r line || [[ -n $line ]]; do
    number=$((number + 1))
    [[ $line =~ ^[[:space:]]*(#.*)?$ ]] && continue
    [[ $line =~ ^([A-Z][A-Z0-9_]*)=($bare|$quoted)[[:space:]]*$ ]] \
      || die "$file line $number (${line%%=*}) is malformed: write NAME=value or NAME=\"two words\", where only \${NAME} expands"
    name=${BASH_REMATCH[1]} value=${BASH_REMATCH[2]} rest=${BASH_REMATCH[2]}
    [[ ! -v seen[$name] ]] || die "$file line $number sets $name a second time: take one of the lines out"
    seen[$name]=yes
    [[ -v $name ]] && continue
    while [[ $rest =~ $reference ]]; do
      [[ -v ${BASH_REMATCH[1]} ]] || die "$file line $number ($name) uses \${${BASH_REMATCH[1]}}, which is not set: set it on a line above"
      rest=${rest#*"${BASH_REMATCH[0]}"}
    done
    eval "export $name=$value"
  done <"$file"
}

# read_settings NAME: the settings as environment NAME has them. ENV is set first, so that every name
# in the file that holds ${ENV} follows, whatever ENV the file or the caller's shell has.
read_settings() {
  export ENV=$1
  load_env "$HERE/env"
  [[ ${ACCOUNT_ID:-} =~ ^[0-9]{12}$ ]] \
    || die "ACCOUNT_ID is '${ACCOUNT_ID:-}': set it in $HERE/env to the 12 digits of your AWS account"
  [[ ${REGION:-} =~ ^[a-z]+(-[a-z]+)+-[0-9]+$ ]] \
    || die "REGION is '${REGION:-}': set it in $HERE/env to your AWS region, such as us-west-2"
  : "${PREFIX:=simple-comfy}"
  : "${S3_BUCKET:=$PREFIX-$ACCOUNT_ID-$REGION-$ENV}"
  : "${SQS_NAME:=$PREFIX-$ENV-queue}"
  : "${ASG_NAME:=$PREFIX-$ENV-asg}"
  : "${INSTANCE_TYPE:=g5.2xlarge}"
  : "${INSTANCE_TYPES:=}"
  : "${SPOT_PERCENT:=0}"
  : "${WARM_POOL:=0}"
  : "${MIN_INSTANCES:=0}"
  : "${MAX_INSTANCES:=20}"
  : "${COMFY_HOME:=/home/ubuntu/comfy}"
  : "${VISIBILITY_TIMEOUT:=120}"
  : "${MAX_RECEIVES:=3}"
}

# choose_env NAME: checks NAME and sets everything that depends on it. Called by both scripts, so
# that they can never disagree about a name.
choose_env() {
  local name=$1 base setting
  [[ -n $name ]] || die "which environment? Give its name: ${0##*/} NAME (more with --help)"
  [[ $name =~ ^[a-z0-9]([a-z0-9-]*[a-z0-9])?$ ]] \
    || die "the environment's name '$name' is not allowed: use lowercase letters, digits and hyphens, with a letter or digit at both ends"

  # In a shell of its own, because a setting that is already set wins over the file.
  base=$(read_settings base && printf '%s\t%s\t%s' "$S3_BUCKET" "$SQS_NAME" "$ASG_NAME")
  # shellcheck disable=SC2034 # the loop below reads them by name
  IFS=$'\t' read -r BASE_S3_BUCKET BASE_SQS_NAME BASE_ASG_NAME <<<"$base"
  read_settings "$name"
  if [[ $name != base ]]; then
    for setting in S3_BUCKET SQS_NAME ASG_NAME; do
      base=BASE_$setting
      [[ ${!setting} != "${!base}" ]] \
        || die "$setting is '${!setting}' for both base and $name: write it with \${ENV} in $HERE/env, and do not set it in your shell"
    done
  fi

  [[ $PREFIX =~ ^[a-z0-9]([a-z0-9-]*[a-z0-9])?$ ]] \
    || die "PREFIX is '$PREFIX': use lowercase letters, digits and hyphens in $HERE/env"
  ((${#S3_BUCKET} <= 63)) \
    || die "the bucket's name '$S3_BUCKET' has ${#S3_BUCKET} characters and S3 allows 63: choose a shorter name than '$name'"
  [[ $S3_BUCKET =~ ^[a-z0-9][a-z0-9.-]+[a-z0-9]$ ]] \
    || die "S3_BUCKET is '$S3_BUCKET': use 3 to 63 lowercase letters, digits, dots and hyphens in $HERE/env"
  [[ $SQS_NAME =~ ^[A-Za-z0-9_-]{1,76}$ ]] \
    || die "SQS_NAME is '$SQS_NAME': use at most 76 letters, digits, hyphens and underscores in $HERE/env"
  [[ $ASG_NAME =~ ^[A-Za-z0-9_-]{1,100}$ ]] \
    || die "ASG_NAME is '$ASG_NAME': use at most 100 letters, digits, hyphens and underscores in $HERE/env"

  DLQ_NAME=$SQS_NAME-dlq
  TEMPLATE_NAME=$ASG_NAME-template
  ALARM_NAME=$ASG_NAME-first-instance # its scaling policy too
  # AWS_REGION too: AWS CLI v2 prefers it.
  export AWS_DEFAULT_REGION=$REGION AWS_REGION=$REGION AWS_RETRY_MODE=standard AWS_PAGER=""
}

# check_number NAME LEAST MOST: refuses a setting that is not a whole number in that range.
check_number() {
  local name=$1 least=$2 most=$3
  if [[ ! ${!name} =~ ^(0|[1-9][0-9]{0,8})$ ]] || ((${!name} < least || ${!name} > most)); then
    die "$name is '${!name}': set it in $HERE/env to a whole number from $least to $most"
  fi
}

check_fleet_settings() {
  check_number MAX_INSTANCES 1 10000
  check_number MIN_INSTANCES 0 "$MAX_INSTANCES"
  check_number VISIBILITY_TIMEOUT 3 43200
  check_number MAX_RECEIVES 1 1000
  check_number SPOT_PERCENT 0 100
  check_number WARM_POOL 0 "$MAX_INSTANCES"
  ((WARM_POOL == 0 || SPOT_PERCENT == 0)) \
    || die "WARM_POOL is $WARM_POOL and SPOT_PERCENT is $SPOT_PERCENT, but AWS keeps no Spot instances in a warm pool: set one of them in $HERE/env to 0"
  choose_types
  [[ $COMFY_HOME == /* ]] \
    || die "COMFY_HOME is '$COMFY_HOME': set it in $HERE/env to a folder on the base machine, starting with /"
}

# choose_types: sets TYPES, which is empty where the group has the launch template's one type.
choose_types() {
  local type pattern='^[a-z0-9-]+\.[a-z0-9-]+$'
  local -A seen=()
  [[ $INSTANCE_TYPE =~ $pattern ]] \
    || die "INSTANCE_TYPE is '$INSTANCE_TYPE': set it in $HERE/env to an EC2 instance type, such as g5.2xlarge"
  read -r -a TYPES <<<"$INSTANCE_TYPES"
  ((${#TYPES[@]} <= 40)) \
    || die "INSTANCE_TYPES has ${#TYPES[@]} types and AWS allows 40: take some out in $HERE/env"
  for type in "${TYPES[@]}"; do
    [[ $type =~ $pattern ]] \
      || die "INSTANCE_TYPES has '$type': set it in $HERE/env to EC2 instance types, such as \"g5.2xlarge g6.2xlarge\""
    [[ ! -v seen[$type] ]] || die "INSTANCE_TYPES has $type twice: take one out in $HERE/env"
    seen[$type]=yes
  done
  if ((${#TYPES[@]} == 0 && SPOT_PERCENT > 0)); then
    TYPES=("$INSTANCE_TYPE")
  fi
}

# --- AWS calls -------------------------------------------------------------------------------

# run_aws WHAT ARG...: a call that changes something and whose answer is not needed. Dies with AWS's words
# when it is refused. Not made with --dry-run.
run_aws() {
  local what=$1 answer
  shift
  [[ $DRY_RUN == no ]] || return 0
  answer=$(aws "$@" 2>&1) || die "cannot $what:$(one_line "$answer")"
}

# ask_aws WHAT ARG...: prints the answer of a call, which mostly only looks; one that changes something is
# guarded by DRY_RUN where it stands. Dies after AWS's words when it is refused.
ask_aws() {
  local what=$1
  shift
  aws "$@" || die "cannot $what: see AWS's words above"
}

one_line() {
  local text=${1//$'\n'/ }
  printf ' %s' "${text#"${text%%[! ]*}"}"
}

# tags_json NAME: the tags of everything that belongs to the environment.
tags_json() {
  printf '[{"Key":"comfy-env","Value":"%s"},{"Key":"comfy-prefix","Value":"%s"},{"Key":"Name","Value":"%s"}]' \
    "$ENV" "$PREFIX" "$1"
}

# check_account: the credentials are there and belong to ACCOUNT_ID. Sets PARTITION (aws, aws-cn ...).
check_account() {
  local identity account arn
  command -v aws >/dev/null \
    || die "the AWS CLI is not installed: install it, see https://docs.aws.amazon.com/cli/latest/userguide/getting-started-install.html"
  identity=$(ask_aws "find out whose credentials these are; give this machine an instance profile, or run aws configure" \
    sts get-caller-identity --query '[Account,Arn]' --output text)
  IFS=$'\t' read -r account arn <<<"$identity"
  [[ $account == "$ACCOUNT_ID" ]] \
    || die "the credentials belong to account $account, but ACCOUNT_ID is $ACCOUNT_ID: correct $HERE/env or use other credentials"
  IFS=: read -r _ PARTITION _ <<<"$arn"
}

# --- What the environment is made from ---------------------------------------------------------

# find_instance_id: of the machine this runs on.
find_instance_id() {
  local answer
  answer=$(cd "$HERE" && PYTHONDONTWRITEBYTECODE=1 python3 -c \
    'from comfy_utils import Metadata; print(Metadata().get("instance-id"))' 2>&1) \
    || die "this is not an EC2 instance, so far as can be seen (${answer##*$'\n'}): give the base machine's id, ${0##*/} $ENV i-..."
  printf '%s' "${answer##*$'\n'}"
}

# inspect_base INSTANCE_ID: sets VPC, SECURITY_GROUPS, PROFILE, KEY_NAME and DEVICES (None where the
# base has none).
inspect_base() {
  local id=$1 answer state
  [[ $id =~ ^i-([0-9a-f]{8}|[0-9a-f]{17})$ ]] \
    || die "'$id' is not an instance id: it looks like i-0123456789abcdef0"
  # By a filter, not by --instance-ids: an unknown id is then an empty answer and not an error.
  answer=$(ask_aws "look at the base machine $id" ec2 describe-instances \
    --filters "Name=instance-id,Values=$id" \
    --query "Reservations[0].Instances[0].[State.Name, VpcId, KeyName, IamInstanceProfile.Arn,
      join(' ', SecurityGroups[].GroupId) || 'None', join(' ', BlockDeviceMappings[].DeviceName) || 'None']" \
    --output text)
  IFS=$'\t' read -r state VPC KEY_NAME PROFILE SECURITY_GROUPS DEVICES <<<"$answer"
  [[ $state != None ]] \
    || die "there is no instance $id in $REGION: give the id of the base machine, and check REGION in $HERE/env"
  [[ $state == running || $state == stopped ]] \
    || die "the instance $id is $state: an image can be made of it when it is running or stopped"
  if [[ $PROFILE == None ]]; then
    printf 'Warning: the base machine %s has no instance profile, so the fleet will have no AWS permissions unless its image holds credentials.\n' "$id" >&2
  fi
}

# choose_subnets: sets SUBNETS, comma-separated, and SUBNETS_ARE. A subnet is private when its route
# table, which is the VPC's main one where it has none of its own, has no route to an internet gateway.
choose_subnets() {
  local answer subnets tables gateway members subnet
  local -A gateway_of=()
  local -a private=()
  answer=$(ask_aws "list the subnets of $VPC" ec2 describe-subnets \
    --filters "Name=vpc-id,Values=$VPC" Name=state,Values=available \
    --query 'sort(Subnets[].SubnetId)' --output text)
  read -r -a subnets <<<"$answer"
  ((${#subnets[@]})) || die "the base machine's VPC $VPC has no subnet that is available: make one for the fleet"
  # One line for each table: the internet gateway or None, then the subnets that use it.
  tables=$(ask_aws "list the route tables of $VPC" ec2 describe-route-tables \
    --filters "Name=vpc-id,Values=$VPC" \
    --query "RouteTables[].[Routes[?starts_with(not_null(GatewayId, ''), 'igw-')].GatewayId | [0],
      join(' ', Associations[?SubnetId || Main].not_null(SubnetId, 'main'))]" \
    --output text)
  while IFS=$'\t' read -r gateway members; do
    for subnet in $members; do
      gateway_of[$subnet]=$gateway
    done
  done <<<"$tables"
  for subnet in "${subnets[@]}"; do
    [[ ${gateway_of[$subnet]:-${gateway_of[main]:-None}} == igw-* ]] || private+=("$subnet")
  done
  SUBNETS_ARE=private
  if ((${#private[@]} == 0)); then
    SUBNETS_ARE="no subnet is private, so all are used"
    private=("${subnets[@]}")
  fi
  SUBNETS=$(
    IFS=,
    printf '%s' "${private[*]}"
  )
}

check_base_bucket() {
  local answer
  answer=$(aws s3api head-bucket --bucket "$BASE_S3_BUCKET" --expected-bucket-owner "$ACCOUNT_ID" 2>&1) && return
  [[ $answer == *"(404)"* ]] \
    || die "cannot read the base machine's bucket $BASE_S3_BUCKET, see S3_BUCKET in $HERE/env:$(one_line "$answer")"
  die "the base machine's bucket $BASE_S3_BUCKET does not exist: set up the base machine first, and check S3_BUCKET in $HERE/env"
}

# --- Queues ----------------------------------------------------------------------------------

ensure_queues() {
  local urls dlq_arn=arn:$PARTITION:sqs:$REGION:$ACCOUNT_ID:$DLQ_NAME
  urls=$(ask_aws "list the queues" sqs list-queues --queue-name-prefix "$SQS_NAME" --query QueueUrls --output text)
  ensure_queue "$DLQ_NAME" "$urls" ""
  ensure_queue "$SQS_NAME" "$urls" "$dlq_arn"
}

# ensure_queue NAME URLS DLQ_ARN: URLS are the queues that exist, DLQ_ARN is empty for the
# dead-letter queue itself.
ensure_queue() {
  local name=$1 urls=$2 dlq_arn=$3 url attributes
  attributes=$(printf '"VisibilityTimeout":"%s","ReceiveMessageWaitTimeSeconds":"%s","MessageRetentionPeriod":"%s","MaximumMessageSize":"%s"' \
    "$VISIBILITY_TIMEOUT" "$LONG_POLL_SECONDS" "$RETENTION_SECONDS" "$MESSAGE_BYTES")
  if [[ -n $dlq_arn ]]; then
    attributes+=$(printf ',"RedrivePolicy":"{\\"deadLetterTargetArn\\":\\"%s\\",\\"maxReceiveCount\\":\\"%s\\"}"' \
      "$dlq_arn" "$MAX_RECEIVES")
  fi
  for url in $urls; do
    [[ $url == */"$name" ]] || continue
    if queue_is_as_wanted "$name" "$url" "$dlq_arn"; then
      report queue "$name" "already there"
    else
      run_aws "change the queue $name" sqs set-queue-attributes --queue-url "$url" --attributes "{$attributes}"
      report queue "$name" updated
    fi
    return
  done
  create_queue "$name" "{$attributes}"
  report queue "$name" created
}

# queue_is_as_wanted NAME URL DLQ_ARN
queue_is_as_wanted() {
  local name=$1 url=$2 dlq_arn=$3 answer numbers redrive
  answer=$(ask_aws "look at the queue $name" sqs get-queue-attributes --queue-url "$url" --attribute-names All \
    --query "Attributes.[join('/', [VisibilityTimeout, ReceiveMessageWaitTimeSeconds, MessageRetentionPeriod,
      MaximumMessageSize]), RedrivePolicy]" \
    --output text) || exit
  IFS=$'\t' read -r numbers redrive <<<"$answer"
  [[ $numbers == "$VISIBILITY_TIMEOUT/$LONG_POLL_SECONDS/$RETENTION_SECONDS/$MESSAGE_BYTES" ]] || return 1
  # AWS gives the policy back in its own spelling: with or without spaces, 3 or "3".
  redrive=${redrive//[ \"]/}
  [[ -z $dlq_arn || ($redrive == *"deadLetterTargetArn:$dlq_arn"[,\}]* && $redrive == *"maxReceiveCount:$MAX_RECEIVES"[,\}]*) ]]
}

# create_queue NAME ATTRIBUTES: AWS refuses a name for 60 seconds after its queue was deleted.
create_queue() {
  local name=$1 attributes=$2 answer deadline=$((SECONDS + QUEUE_WAIT_SECONDS)) said=no
  until answer=$(aws sqs create-queue --queue-name "$name" --attributes "$attributes" \
    --tags "comfy-env=$ENV,comfy-prefix=$PREFIX,Name=$name" 2>&1); do
    [[ $answer == *QueueDeletedRecently* ]] || die "cannot create the queue $name:$(one_line "$answer")"
    ((SECONDS < deadline)) \
      || die "AWS still keeps the name of the deleted queue $name after $QUEUE_WAIT_SECONDS seconds: run this again in a minute"
    [[ $said == yes ]] || report queue "$name" "deleted a moment ago: AWS frees its name within a minute, waiting"
    said=yes
    sleep "$POLL_SECONDS"
  done
}

# --- Bucket ----------------------------------------------------------------------------------

# ensure_bucket WITH_OUTPUT
ensure_bucket() {
  local with_output=$1 owner copied state="already there"
  local -a location=() exclude=(--exclude "input/jobs/*")
  owner=$(bucket_owner)
  if [[ $owner == gone ]]; then
    # S3 refuses the name of its oldest region here.
    [[ $REGION == us-east-1 ]] || location=(--create-bucket-configuration "LocationConstraint=$REGION")
    run_aws "create the bucket $S3_BUCKET; if another account has its name, change S3_BUCKET in $HERE/env" \
      s3api create-bucket --bucket "$S3_BUCKET" "${location[@]}"
    state=created
  fi
  [[ $owner == "$ENV" ]] || claim_bucket "$owner"
  run_aws "block public access to the bucket $S3_BUCKET" s3api put-public-access-block --bucket "$S3_BUCKET" \
    --public-access-block-configuration \
    BlockPublicAcls=true,IgnorePublicAcls=true,BlockPublicPolicy=true,RestrictPublicBuckets=true
  report bucket "$S3_BUCKET" "$state"

  # input/jobs/ holds the base's own queued jobs.
  [[ $with_output == yes ]] || exclude+=(--exclude "output/*")
  report files "s3://$BASE_S3_BUCKET" "copying what is new ..."
  copied=$(ask_aws "copy s3://$BASE_S3_BUCKET to s3://$S3_BUCKET (run this again: what was copied stays)" \
    s3 sync "s3://$BASE_S3_BUCKET" "s3://$S3_BUCKET" --no-progress "${exclude[@]}")
  report files "s3://$S3_BUCKET" "$(sed -n '/^copy: /p' <<<"$copied" | wc -l) copied"
}

# claim_bucket OWNER: the tag says that delete_env.sh may remove the bucket, so one that was made
# elsewhere gets it only while it is empty (as it is when an earlier run was stopped right here).
claim_bucket() {
  local owner=$1 keys
  case $owner in
    gone) ;; # made a moment ago
    None)
      keys=$(ask_aws "list the bucket $S3_BUCKET" s3api list-objects-v2 --bucket "$S3_BUCKET" --max-keys 1 \
        --query KeyCount --output text)
      if ((keys)); then
        report bucket "$S3_BUCKET" "has files but no comfy-env tag: used, but delete_env.sh will leave it alone"
        return
      fi
      ;;
    *) die "the bucket $S3_BUCKET belongs to the environment $owner: write S3_BUCKET with \${ENV} in $HERE/env" ;;
  esac
  run_aws "tag the bucket $S3_BUCKET" s3api put-bucket-tagging --bucket "$S3_BUCKET" \
    --tagging "{\"TagSet\":$(tags_json "$S3_BUCKET")}"
}

# bucket_owner: the environment in the bucket's tag, None without one, `gone` without a bucket.
bucket_owner() {
  local answer
  if answer=$(aws s3api get-bucket-tagging --bucket "$S3_BUCKET" --expected-bucket-owner "$ACCOUNT_ID" \
    --query "TagSet[?Key=='comfy-env'].Value | [0]" --output text 2>&1); then
    printf '%s' "${answer##*$'\n'}" # the last line, in case the CLI had a warning
  elif [[ $answer == *NoSuchTagSet* ]]; then
    printf None
  elif [[ $answer == *NoSuchBucket* ]]; then
    printf gone
  else
    die "cannot look at the bucket $S3_BUCKET; if another account has its name, change S3_BUCKET in $HERE/env:$(one_line "$answer")"
  fi
}

# --- S3 trigger ------------------------------------------------------------------------------

# look_at_trigger ASKED: sets S3_TRIGGER: yes, no, or empty where nobody asked and there is none. One
# that is found stays, so that it need not be asked for each time. Sets TRIGGER_FOUND for ensure_trigger.
look_at_trigger() {
  local asked=$1 answer
  if answer=$(aws s3api get-bucket-notification-configuration --bucket "$S3_BUCKET" \
    --expected-bucket-owner "$ACCOUNT_ID" \
    --query "QueueConfigurations[?Id=='$TRIGGER_ID'].join(' ', [QueueArn, join(' ', Events),
      join(' ', sort(not_null(Filter.Key.FilterRules[].Value, \`[]\`)))]) | [0]" \
    --output text 2>&1); then
    TRIGGER_FOUND=${answer##*$'\n'} # the last line, in case the CLI had a warning
  elif [[ $answer == *NoSuchBucket* ]]; then
    TRIGGER_FOUND=None
  else
    die "cannot look at the events of the bucket $S3_BUCKET:$(one_line "$answer")"
  fi
  S3_TRIGGER=$asked
  [[ -n $S3_TRIGGER || $TRIGGER_FOUND == None ]] || S3_TRIGGER=yes
}

# trigger_grant QUEUE_ARN: what lets S3 put events of this bucket, and of no other, on the queue.
trigger_grant() {
  printf '"Effect":"Allow","Principal":{"Service":"s3.amazonaws.com"},"Action":"sqs:SendMessage","Resource":"%s"' "$1"
  printf ',"Condition":{"ArnEquals":{"aws:SourceArn":"arn:%s:s3:::%s"},"StringEquals":{"aws:SourceAccount":"%s"}}' \
    "$PARTITION" "$S3_BUCKET" "$ACCOUNT_ID"
}

# ensure_trigger: adds it or takes it away, once queue and bucket are there.
ensure_trigger() {
  local arn=arn:$PARTITION:sqs:$REGION:$ACCOUNT_ID:$SQS_NAME state="already there" grant sid ours found url wanted
  [[ -n $S3_TRIGGER ]] || return 0
  # The statement's name holds a digest, because AWS may give the rest back in a spelling of its own.
  grant=$(trigger_grant "$arn")
  sid=$(sha256sum <<<"$grant")
  sid=ComfyTrigger${sid:0:16}
  ours="[{\"Sid\":\"$sid\",$grant}]"
  wanted="$arn s3:ObjectCreated:* .json input/jobs/"
  case $S3_TRIGGER/$TRIGGER_FOUND in
    no/None | "yes/$wanted") ;;
    no/*) state=removed ;;
    yes/None) state=created ;;
    *) state=updated ;;
  esac
  if [[ $DRY_RUN == no ]]; then
    url=$(ask_aws "find the queue $SQS_NAME" sqs get-queue-url --queue-name "$SQS_NAME" --query QueueUrl --output text)
    found=$(ask_aws "look at the policy of the queue $SQS_NAME" sqs get-queue-attributes --queue-url "$url" \
      --attribute-names Policy --query Attributes.Policy --output text)
    if [[ $S3_TRIGGER == yes && $found != *"$sid"* ]]; then
      set_trigger_policy "$url" "$found" "$ours"
      [[ $state != "already there" ]] || state=updated
    elif [[ $S3_TRIGGER == no && $found == *ComfyTrigger* ]]; then
      set_trigger_policy "$url" "$found" "[]"
      state=removed
    fi
    [[ $S3_TRIGGER/$TRIGGER_FOUND == "yes/$wanted" || $S3_TRIGGER/$TRIGGER_FOUND == no/None ]] || put_events "$arn"
  fi
  report trigger "s3://$S3_BUCKET/input/jobs/" "$state"
}

# set_trigger_policy URL FOUND OURS: the queue's policy is FOUND (None: it has none) with the statements OURS
# in place of an earlier one of ours; what others have put there stays.
set_trigger_policy() {
  local url=$1 attributes
  attributes=$(python3 -c '
import json, sys
found, ours = (json.loads(text) for text in ("[]" if sys.argv[1] == "None" else sys.argv[1], sys.argv[2]))
theirs = found["Statement"] if found else []
theirs = theirs if isinstance(theirs, list) else [theirs]
theirs = [one for one in theirs if not one.get("Sid", "").startswith("ComfyTrigger")]
policy = json.dumps({"Version": "2012-10-17", "Statement": theirs + ours}) if theirs + ours else ""
print(json.dumps({"Policy": policy}))' "$2" "$3")
  run_aws "set the policy of the queue $SQS_NAME" sqs set-queue-attributes --queue-url "$url" \
    --attributes "$attributes"
}

# put_events QUEUE_ARN: AWS replaces the whole configuration, so the new one holds what others have put
# there, and EventBridge, which costs nothing until somebody makes a rule there. S3 tries the queue, whose
# new policy may count only after a minute.
put_events() {
  local arn=$1 ours="" events answer deadline=$((SECONDS + QUEUE_WAIT_SECONDS)) said=no
  if [[ $S3_TRIGGER == yes ]]; then
    ours='{"Id":"'$TRIGGER_ID'","QueueArn":"'$arn'","Events":["s3:ObjectCreated:*"],"Filter":{"Key":{"FilterRules":[
      {"Name":"prefix","Value":"input/jobs/"},{"Name":"suffix","Value":".json"}]}}}'
  fi
  events=$(ask_aws "look at the events of the bucket $S3_BUCKET" s3api get-bucket-notification-configuration \
    --bucket "$S3_BUCKET" \
    --query "{TopicConfigurations: not_null(TopicConfigurations, \`[]\`),
      LambdaFunctionConfigurations: not_null(LambdaFunctionConfigurations, \`[]\`),
      QueueConfigurations: [QueueConfigurations[?Id!='$TRIGGER_ID'], \`[$ours]\`][],
      EventBridgeConfiguration: \`{}\`}" \
    --output json)
  until answer=$(aws s3api put-bucket-notification-configuration --bucket "$S3_BUCKET" \
    --notification-configuration "$events" 2>&1); do
    [[ $answer == *"Unable to validate"* && $SECONDS -lt $deadline ]] \
      || die "cannot set the events of the bucket $S3_BUCKET:$(one_line "$answer")"
    [[ $said == yes ]] || report trigger "s3://$S3_BUCKET/input/jobs/" "waiting until the queue's new policy counts ..."
    said=yes
    sleep "$POLL_SECONDS"
  done
}

# --- Image -----------------------------------------------------------------------------------

# ensure_image INSTANCE_ID REBOOT: sets IMAGE and IMAGE_STATE. The image is begun here and ends by
# itself; the group does not need it before its first instance.
ensure_image() {
  local id=$1 reboot=$2 answer name device tags
  local -a devices=()
  answer=$(ask_aws "list the images of $ENV" ec2 describe-images --owners self \
    --filters "Name=tag:comfy-env,Values=$ENV" "Name=tag:comfy-prefix,Values=$PREFIX" Name=state,Values=pending,available \
    --query 'sort_by(Images, &CreationDate)[-1].[ImageId, State]' --output text)
  read -r IMAGE IMAGE_STATE <<<"$answer"
  if [[ $IMAGE != None ]]; then
    report image "$IMAGE" "already there ($IMAGE_STATE)"
    return
  fi
  name=$ASG_NAME-image-$(date -u +%Y%m%dT%H%M%SZ)
  # A volume that the base keeps when it ends must not outlive every fleet instance.
  if [[ $DEVICES != None ]]; then
    devices=(--block-device-mappings)
    for device in $DEVICES; do
      devices+=("DeviceName=$device,Ebs={DeleteOnTermination=true}")
    done
  fi
  tags=$(tags_json "$ASG_NAME")
  IMAGE=$(ask_aws "make an image of $id" ec2 create-image \
    --instance-id "$id" \
    --name "$name" \
    --description "comfy-on-ec2: environment $ENV, made from $id" \
    "--$reboot" \
    "${devices[@]}" \
    --tag-specifications "{\"ResourceType\":\"image\",\"Tags\":$tags}" "{\"ResourceType\":\"snapshot\",\"Tags\":$tags}" \
    --query ImageId \
    --output text)
  IMAGE_STATE=pending
  report image "$IMAGE" "started ($name)"
}

# look_at_image: sets IMAGE_STATE.
look_at_image() {
  IMAGE_STATE=$(ask_aws "look at the image $IMAGE" ec2 describe-images --image-ids "$IMAGE" \
    --query 'Images[0].State' --output text)
}

wait_for_image() {
  local deadline=$((SECONDS + IMAGE_WAIT_SECONDS))
  look_at_image
  [[ $IMAGE_STATE != pending ]] || report image "$IMAGE" "waiting until it can be used (some minutes) ..."
  while [[ $IMAGE_STATE == pending ]]; do
    ((SECONDS < deadline)) \
      || die "the image $IMAGE is still pending after $IMAGE_WAIT_SECONDS seconds: run this again later, it goes on by itself"
    sleep "$POLL_SECONDS"
    look_at_image
  done
  [[ $IMAGE_STATE == available ]] || die "the image $IMAGE is $IMAGE_STATE: run this again to make another"
}

# --- Launch template -------------------------------------------------------------------------

# user_data: what a fleet instance runs at its first boot, before its services start.
user_data() {
  cat <<END
#!/bin/bash
# First boot of an instance of the environment $ENV.
set -eu
home=\${COMFY_HOME:-$(printf '%q' "$COMFY_HOME")}

# The image holds the base machine's settings; the environment is chosen by this one line.
if grep -q '^ENV=' "\$home/env"; then
  sed -i --follow-symlinks 's/^ENV=.*/ENV=$ENV/' "\$home/env"
else
  sed -i --follow-symlinks '1i ENV=$ENV' "\$home/env"
fi

# The image holds the base machine's logs too, which must not be uploaded as this instance's.
rm -rf -- "\${home:?}/logs"/*
END
}

template_data() {
  local data tags group ids=""
  tags=$(tags_json "$PREFIX-$ENV")
  data="{\"ImageId\":\"$IMAGE\",\"InstanceType\":\"$INSTANCE_TYPE\""
  data+=',"MetadataOptions":{"HttpEndpoint":"enabled","HttpTokens":"required","HttpPutResponseHopLimit":1}'
  data+=",\"TagSpecifications\":[{\"ResourceType\":\"instance\",\"Tags\":$tags},{\"ResourceType\":\"volume\",\"Tags\":$tags}]"
  if [[ $SECURITY_GROUPS != None ]]; then
    for group in $SECURITY_GROUPS; do
      ids+=",\"$group\""
    done
    data+=",\"SecurityGroupIds\":[${ids#,}]"
  fi
  [[ $PROFILE == None ]] || data+=",\"IamInstanceProfile\":{\"Arn\":\"$PROFILE\"}"
  [[ $KEY_NAME == None ]] || data+=",\"KeyName\":\"$KEY_NAME\""
  data+=",\"UserData\":\"$(user_data | base64 -w 0)\"}"
  printf '%s' "$data"
}

# ensure_template: a version's description holds a digest of its data, which is how the next run
# sees whether the settings have changed.
ensure_template() {
  local data digest answer version is_default found="" description
  data=$(template_data)
  digest=$(sha256sum <<<"$data")
  description="comfy-on-ec2 $ENV ${digest:0:16}"
  if ! answer=$(aws ec2 describe-launch-template-versions --launch-template-name "$TEMPLATE_NAME" \
    --query "LaunchTemplateVersions[?VersionDescription=='$description'].[VersionNumber, DefaultVersion]" \
    --output text 2>&1); then
    [[ $answer == *NotFound* ]] || die "cannot look at the launch template $TEMPLATE_NAME:$(one_line "$answer")"
    run_aws "create the launch template $TEMPLATE_NAME" ec2 create-launch-template \
      --launch-template-name "$TEMPLATE_NAME" \
      --version-description "$description" \
      --launch-template-data "$data" \
      --tag-specifications "{\"ResourceType\":\"launch-template\",\"Tags\":$(tags_json "$ASG_NAME")}"
    report template "$TEMPLATE_NAME" created
    return
  fi
  while read -r version is_default; do
    case $is_default in
      True) report template "$TEMPLATE_NAME" "already there" && return ;;
      False) found=$version ;; # an earlier run was stopped right after it
    esac
  done <<<"$answer"
  if [[ -z $found ]]; then
    found=$(ask_aws "add a version to the launch template $TEMPLATE_NAME" ec2 create-launch-template-version \
      --launch-template-name "$TEMPLATE_NAME" \
      --version-description "$description" \
      --launch-template-data "$data" \
      --query LaunchTemplateVersion.VersionNumber \
      --output text)
  fi
  run_aws "make version $found of the launch template $TEMPLATE_NAME its default" ec2 modify-launch-template \
    --launch-template-name "$TEMPLATE_NAME" \
    --default-version "$found"
  report template "$TEMPLATE_NAME" "updated (version $found)"
}

# --- Group -----------------------------------------------------------------------------------

# choose_launch: sets LAUNCH, the options that say what the group launches, and LAUNCHES, how
# ensure_group sees it. $Default, not $Latest: a version counts only once it was made the default,
# which is also how to go back to an older one.
choose_launch() {
  local type types="" on_demand=$((100 - SPOT_PERCENT)) spot=price-capacity-optimized
  LAUNCHES="$TEMPLATE_NAME:\$Default"
  if ((${#TYPES[@]} == 0)); then
    LAUNCH=(--launch-template "LaunchTemplateName=$TEMPLATE_NAME,Version=\$Default")
    return
  fi
  for type in "${TYPES[@]}"; do
    types+=",{\"InstanceType\":\"$type\"}"
  done
  LAUNCHES+=" ${TYPES[*]} prioritized 0 $on_demand $spot"
  LAUNCH=(--mixed-instances-policy "{
    \"LaunchTemplate\": {
      \"LaunchTemplateSpecification\": {\"LaunchTemplateName\": \"$TEMPLATE_NAME\", \"Version\": \"\$Default\"},
      \"Overrides\": [${types#,}]
    },
    \"InstancesDistribution\": {
      \"OnDemandAllocationStrategy\": \"prioritized\",
      \"OnDemandBaseCapacity\": 0,
      \"OnDemandPercentageAboveBaseCapacity\": $on_demand,
      \"SpotAllocationStrategy\": \"$spot\"
    }
  }")
}

# ensure_group: sets INSTANCES, the capacity the group is to have now.
ensure_group() {
  local answer min max subnets launches protected suspended metric pool status state="already there" most=$MAX_INSTANCES
  choose_launch
  answer=$(ask_aws "look at the group $ASG_NAME" autoscaling describe-auto-scaling-groups \
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
      Status]" \
    --output text)
  IFS=$'\t' read -r min max INSTANCES subnets launches protected suspended metric pool status <<<"$answer"
  if [[ $min == None ]]; then
    create_group
    INSTANCES=$MIN_INSTANCES suspended=None metric=None pool=None state=created
  elif [[ $status == Delete* ]]; then
    die "the group $ASG_NAME is being deleted: wait until ./delete_env.sh $ENV has ended, then run this again"
  else
    # AWS would lower the desired capacity to a smaller maximum, and with it take busy instances.
    if ((most < INSTANCES)); then
      most=$INSTANCES
      report group "$ASG_NAME" "$INSTANCES instances are wanted: maximum $MAX_INSTANCES cannot be set yet, run this again later"
    fi
    # AWS refuses Spot instances to a group that has a warm pool.
    if ((WARM_POOL == 0)) && [[ $pool == *Kept ]]; then
      delete_pool
    fi
    if [[ $min/$max/$launches/$protected != "$MIN_INSTANCES/$most/$LAUNCHES/True" ||
      $(sorted "$subnets") != "$(sorted "$SUBNETS")" ]]; then
      run_aws "change the group $ASG_NAME" autoscaling update-auto-scaling-group \
        --auto-scaling-group-name "$ASG_NAME" \
        "${LAUNCH[@]}" \
        --min-size "$MIN_INSTANCES" \
        --max-size "$most" \
        --vpc-zone-identifier "$SUBNETS" \
        --new-instances-protected-from-scale-in
      INSTANCES=$((INSTANCES > MIN_INSTANCES ? INSTANCES : MIN_INSTANCES)) state=updated
    fi
    if ! hook_is_as_wanted; then
      run_aws "set the lifecycle hook of $ASG_NAME" autoscaling put-lifecycle-hook \
        --auto-scaling-group-name "$ASG_NAME" \
        --lifecycle-hook-name "$LIFECYCLE_HOOK" \
        --lifecycle-transition autoscaling:EC2_INSTANCE_TERMINATING \
        --heartbeat-timeout "$LIFECYCLE_SECONDS" \
        --default-result CONTINUE
      state=updated
    fi
  fi
  # Rebalancing zones would end a busy instance to start another elsewhere.
  if [[ $suspended == None ]]; then
    run_aws "suspend rebalancing in the group $ASG_NAME" autoscaling suspend-processes \
      --auto-scaling-group-name "$ASG_NAME" \
      --scaling-processes AZRebalance
    [[ $state == created ]] || state=updated
  fi
  # Without its metrics the alarm does not know that nobody is there.
  if [[ $metric == None ]]; then
    run_aws "switch on the metrics of the group $ASG_NAME" autoscaling enable-metrics-collection \
      --auto-scaling-group-name "$ASG_NAME" \
      --granularity 1Minute \
      --metrics GroupDesiredCapacity GroupInServiceInstances GroupPendingInstances GroupTotalInstances
    [[ $state == created ]] || state=updated
  fi
  report group "$ASG_NAME" "$state"
  ((WARM_POOL == 0)) || ensure_pool "$pool"
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
  run_aws "keep a warm pool of $WARM_POOL in the group $ASG_NAME" autoscaling put-warm-pool \
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
  run_aws "remove the warm pool of $ASG_NAME" autoscaling delete-warm-pool \
    --auto-scaling-group-name "$ASG_NAME" \
    --force-delete
  report pool "$ASG_NAME" removed
}

# create_group: with its hook, so that no instance can ever end without it.
create_group() {
  local answer
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
    "Key=Name,Value=$ASG_NAME,PropagateAtLaunch=false")
  ((MIN_INSTANCES == 0)) || wait_for_image
  answer=$("${command[@]}" 2>&1) && return
  # AWS tries the template first and may refuse an image that is not ready.
  [[ $IMAGE_STATE == pending ]] || die "cannot create the group $ASG_NAME:$(one_line "$answer")"
  wait_for_image
  answer=$("${command[@]}" 2>&1) || die "cannot create the group $ASG_NAME:$(one_line "$answer")"
}

hook_is_as_wanted() {
  local answer
  answer=$(ask_aws "look at the lifecycle hook of $ASG_NAME" autoscaling describe-lifecycle-hooks \
    --auto-scaling-group-name "$ASG_NAME" \
    --lifecycle-hook-names "$LIFECYCLE_HOOK" \
    --query "LifecycleHooks[].join(' ', [LifecycleTransition, to_string(HeartbeatTimeout), DefaultResult])" \
    --output text) || exit
  [[ $answer == "autoscaling:EC2_INSTANCE_TERMINATING $LIFECYCLE_SECONDS CONTINUE" ]]
}

# sorted LIST: a comma-separated list in a fixed order.
sorted() {
  tr , '\n' <<<"$1" | sort
}

# --- Alarm -----------------------------------------------------------------------------------

# ensure_alarm: adds an instance when messages wait and none is wanted. No FILL in the expression: it
# would make a 0 of a data point that is only late, so that the alarm never rings, or rings while the
# fleet works. A step of +1 and no exact capacity: a sender may have raised it meanwhile.
ensure_alarm() {
  local arn found digest description state=updated
  local -a policy=(--policy-type StepScaling
    --adjustment-type ChangeInCapacity
    --step-adjustments "MetricIntervalLowerBound=0,ScalingAdjustment=1"
    --estimated-instance-warmup "$WARMUP_SECONDS")
  local -a alarm=(--comparison-operator GreaterThanOrEqualToThreshold
    --threshold 1
    --evaluation-periods 1
    --treat-missing-data notBreaching
    --metrics "[
      $(alarm_metric visible AWS/SQS ApproximateNumberOfMessagesVisible QueueName "$SQS_NAME"),
      $(alarm_metric desired AWS/AutoScaling GroupDesiredCapacity AutoScalingGroupName "$ASG_NAME"),
      {\"Id\": \"alone\", \"Label\": \"messages wait and no instance is wanted\", \"ReturnData\": true,
       \"Expression\": \"IF(visible > 0 AND desired < 1, 1, 0)\"}]")
  arn=$(ask_aws "look at the scaling policy $ALARM_NAME" autoscaling describe-policies \
    --auto-scaling-group-name "$ASG_NAME" \
    --policy-names "$ALARM_NAME" \
    --query 'ScalingPolicies[].PolicyARN | [0]' --output text)
  found=$(ask_aws "look at the alarm $ALARM_NAME" cloudwatch describe-alarms \
    --alarm-names "$ALARM_NAME" \
    --query 'MetricAlarms[].AlarmDescription | [0]' --output text)
  # As in the launch template, a digest shows the next run what has changed.
  digest=$(sha256sum <<<"${policy[*]} ${alarm[*]} $arn")
  if [[ $arn != None && $found == *" ${digest:0:16}" ]]; then
    report alarm "$ALARM_NAME" "already there"
    return
  fi
  arn=$(ask_aws "set the scaling policy $ALARM_NAME" autoscaling put-scaling-policy \
    --auto-scaling-group-name "$ASG_NAME" \
    --policy-name "$ALARM_NAME" \
    "${policy[@]}" \
    --query PolicyARN --output text)
  digest=$(sha256sum <<<"${policy[*]} ${alarm[*]} $arn")
  description="comfy-on-ec2 $ENV: starts the first instance when nobody else has ${digest:0:16}"
  run_aws "set the alarm $ALARM_NAME" cloudwatch put-metric-alarm \
    --alarm-name "$ALARM_NAME" \
    --alarm-description "$description" \
    --alarm-actions "$arn" \
    "${alarm[@]}" \
    --tags "$(tags_json "$ALARM_NAME")"
  [[ $found != None ]] || state=created
  report alarm "$ALARM_NAME" "$state"
}

# alarm_metric ID NAMESPACE METRIC DIMENSION VALUE
alarm_metric() {
  printf '{"Id": "%s", "ReturnData": false, "MetricStat": {"Stat": "Maximum", "Period": 60, "Metric": {
    "Namespace": "%s", "MetricName": "%s", "Dimensions": [{"Name": "%s", "Value": "%s"}]}}}' "$@"
}

# --- Main ------------------------------------------------------------------------------------

summarise() {
  printf '\nEnvironment %s is ready: %s wanted now, %s to %s %s as jobs come and go.\n' \
    "$ENV" "$(instances "$INSTANCES")" "$MIN_INSTANCES" "$MAX_INSTANCES" "$(either_type)"
  ((SPOT_PERCENT == 0)) || printf 'Spot instances are %s %% of them.\n' "$SPOT_PERCENT"
  ((WARM_POOL == 0)) \
    || printf 'A warm pool keeps %s stopped and ready, of which the disks are paid for.\n' "$(instances "$WARM_POOL")"
  if ((MIN_INSTANCES == 0)); then
    printf 'Idle, it costs no instance: only the storage of its files and its image, and some cents for its alarm.\n'
  else
    printf 'Idle, it costs %s day and night, because MIN_INSTANCES is %s.\n' "$(instances "$MIN_INSTANCES")" "$MIN_INSTANCES"
  fi
  [[ $IMAGE_STATE != pending ]] \
    || printf 'The image goes on by itself; jobs can be sent now and are run once it is available.\n'
  [[ $S3_TRIGGER != yes ]] || printf 'A workflow that is dropped into s3://%s/input/jobs/ runs.\n' "$S3_BUCKET"
  printf 'Next: ./send_job.py --env %s\n' "$ENV"
}

# either_type: the types in the order in which they are tried.
either_type() {
  local -a types=("${TYPES[@]:-$INSTANCE_TYPE}")
  printf '%s' "${types[0]}"
  ((${#types[@]} == 1)) || printf ' or %s' "${types[@]:1}"
}

instances() {
  if (($1 == 1)); then printf '1 instance'; else printf '%s instances' "$1"; fi
}

main() {
  local name="" id="" reboot=no-reboot with_output=no trigger=""
  while (($#)); do
    case $1 in
      -h | --help) usage && exit ;;
      --reboot) reboot=reboot ;;
      --with-output) with_output=yes ;;
      --s3-trigger) trigger=yes ;;
      --no-s3-trigger) trigger=no ;;
      -*) die "the option '$1' is not known: see --help" ;;
      *)
        if [[ -z $name ]]; then name=$1; elif [[ -z $id ]]; then id=$1; else die "the argument '$1' is one too many: see --help"; fi
        ;;
    esac
    shift
  done
  [[ $name != base ]] || die "base is the machine that environments are made from: choose another name, such as pro"
  choose_env "$name"
  check_fleet_settings
  check_account
  [[ -n $id ]] || id=$(find_instance_id)
  inspect_base "$id"
  choose_subnets
  check_base_bucket
  look_at_trigger "$trigger"

  printf 'Environment %s from the base machine %s, in %s of account %s\n' "$ENV" "$id" "$REGION" "$ACCOUNT_ID"
  report subnets "$SUBNETS" "$SUBNETS_ARE"
  ensure_queues
  ensure_image "$id" "$reboot"
  ensure_bucket "$with_output"
  ensure_trigger
  ensure_template
  ensure_group
  ensure_alarm
  summarise
}

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
  main "$@"
fi
