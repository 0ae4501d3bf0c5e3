#!/usr/bin/env bash
#
# Makes an environment from the base machine, or brings one up to date: image, launch template,
# Auto Scaling group, alarm, bucket, queues, and a role for its instances.
#
# Usage: ./create_env.sh NAME [INSTANCE_ID] [--reboot] [--with-output]
#        ./create_env.sh --print-policy worker|sender|operator [NAME]
#
#   NAME           the environment: lowercase letters, digits and hyphens, such as pro
#   INSTANCE_ID    the base machine; needed only where this is not run on the base machine itself
#   --reboot       reboot the base machine for an image that is consistent to the last byte
#   --with-output  copy the base bucket's output/ as well
#   --print-policy print the IAM policy, as small as AWS allows, of an instance, of who sends jobs, or of
#                  who runs this script and delete_env.sh; without NAME for the ENV in the settings
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
# While the first instance boots, and until the metrics show it, the alarm adds no second one.
WARMUP_SECONDS=300

# How long to wait for AWS, and how long between two looks.
IMAGE_WAIT_SECONDS=${IMAGE_WAIT_SECONDS:-7200}
QUEUE_WAIT_SECONDS=${QUEUE_WAIT_SECONDS:-90}
PROFILE_WAIT_SECONDS=${PROFILE_WAIT_SECONDS:-120}
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
  : "${INSTANCE_PROFILE:=}"
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

  case $REGION in # until check_account asks AWS
    cn-*) PARTITION=aws-cn ;;
    us-gov-*) PARTITION=aws-us-gov ;;
    *) PARTITION=aws ;;
  esac
  DLQ_NAME=$SQS_NAME-dlq
  TEMPLATE_NAME=$ASG_NAME-template
  ALARM_NAME=$ASG_NAME-first-instance # its scaling policy too
  WORKER_ROLE=$ASG_NAME-worker        # its instance profile too
  # The names of roles are one region's and all regions': the path, which nobody can change, says whose.
  WORKER_PATH=/$PREFIX/$REGION/$ENV/
  # shellcheck disable=SC2034 # delete_env.sh reads it
  OUR_TAGS=(--filters "Name=tag:comfy-env,Values=$ENV" "Name=tag:comfy-prefix,Values=$PREFIX")
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
  check_profile
  [[ $COMFY_HOME == /* ]] \
    || die "COMFY_HOME is '$COMFY_HOME': set it in $HERE/env to a folder on the base machine, starting with /"
}

check_profile() {
  [[ $INSTANCE_PROFILE =~ ^[A-Za-z0-9_+=,.@-]{0,128}$ ]] \
    || die "INSTANCE_PROFILE is '$INSTANCE_PROFILE': set it in $HERE/env to the name of an instance profile, which is no ARN, or to nothing"
  [[ -n $INSTANCE_PROFILE ]] || ((${#WORKER_ROLE} <= 64)) \
    || die "the role's name '$WORKER_ROLE' has ${#WORKER_ROLE} characters and IAM allows 64: choose a shorter ASG_NAME in $HERE/env"
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

# inspect_base INSTANCE_ID: sets VPC, SECURITY_GROUPS, KEY_NAME and DEVICES (None where the base has
# none).
inspect_base() {
  local id=$1 answer state
  [[ $id =~ ^i-([0-9a-f]{8}|[0-9a-f]{17})$ ]] \
    || die "'$id' is not an instance id: it looks like i-0123456789abcdef0"
  # By a filter, not by --instance-ids: an unknown id is then an empty answer and not an error.
  answer=$(ask_aws "look at the base machine $id" ec2 describe-instances \
    --filters "Name=instance-id,Values=$id" \
    --query "Reservations[0].Instances[0].[State.Name, VpcId, KeyName,
      join(' ', SecurityGroups[].GroupId) || 'None', join(' ', BlockDeviceMappings[].DeviceName) || 'None']" \
    --output text)
  IFS=$'\t' read -r state VPC KEY_NAME SECURITY_GROUPS DEVICES <<<"$answer"
  [[ $state != None ]] \
    || die "there is no instance $id in $REGION: give the id of the base machine, and check REGION in $HERE/env"
  [[ $state == running || $state == stopped ]] \
    || die "the instance $id is $state: an image can be made of it when it is running or stopped"
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
      run_aws "change the queue $name" sqs set-queue-attributes --queue-url "$url" --attributes "{$attributes$SECURITY}"
      report queue "$name" updated
    fi
    return
  done
  secure_queue "$name" False None
  create_queue "$name" "{$attributes$SECURITY}"
  report queue "$name" created
}

# secure_queue NAME ENCRYPTED POLICY: sets SECURITY, the attributes that a queue with these lacks. A key
# or a policy that somebody else gave it stays; one with which delete_env.sh drained it does not.
secure_queue() {
  local name=$1 encrypted=$2 policy=$3
  SECURITY=""
  [[ $encrypted == True ]] || SECURITY+=',"SqsManagedSseEnabled":"true"'
  if [[ $policy == None || $policy == *'"Draining"'* ]]; then
    policy="{$(only_tls sqs "arn:$PARTITION:sqs:$REGION:$ACCOUNT_ID:$name")]}"
    SECURITY+=",\"Policy\":\"${policy//\"/\\\"}\""
  fi
}

# only_tls SERVICE RESOURCE...: the beginning of a resource's policy, which refuses every call that is not
# encrypted on its way.
only_tls() {
  local service=$1 resources
  shift
  printf -v resources ',"%s"' "$@"
  printf '"Version":"2012-10-17","Statement":[{"Sid":"OnlyTls","Effect":"Deny","Principal":"*","Action":"%s:*","Resource":[%s],"Condition":{"Bool":{"aws:SecureTransport":"false"}}}' \
    "$service" "${resources#,}"
}

# queue_is_as_wanted NAME URL DLQ_ARN: sets SECURITY, as secure_queue does.
queue_is_as_wanted() {
  local name=$1 url=$2 dlq_arn=$3 answer numbers redrive encrypted policy
  answer=$(ask_aws "look at the queue $name" sqs get-queue-attributes --queue-url "$url" --attribute-names All \
    --query "Attributes.[join('/', [VisibilityTimeout, ReceiveMessageWaitTimeSeconds, MessageRetentionPeriod,
      MaximumMessageSize]), RedrivePolicy, SqsManagedSseEnabled=='true' || KmsMasterKeyId!=null, Policy]" \
    --output text) || exit
  IFS=$'\t' read -r numbers redrive encrypted policy <<<"$answer"
  secure_queue "$name" "$encrypted" "$policy"
  [[ -z $SECURITY ]] || return 1
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
  OURS=yes CHANGED=no
  owner=$(bucket_owner)
  if [[ $owner == gone ]]; then
    # S3 refuses the name of its oldest region here.
    [[ $REGION == us-east-1 ]] || location=(--create-bucket-configuration "LocationConstraint=$REGION")
    run_aws "create the bucket $S3_BUCKET; if another account has its name, change S3_BUCKET in $HERE/env" \
      s3api create-bucket --bucket "$S3_BUCKET" "${location[@]}"
    state=created
  fi
  [[ $owner == "$ENV" ]] || claim_bucket "$owner"
  if [[ $OURS == yes && $owner/$DRY_RUN != gone/yes ]]; then
    secure_bucket
    [[ $CHANGED == no || $state == created ]] || state=updated
  fi
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
# Sets OURS to no for one that stays somebody else's.
claim_bucket() {
  local owner=$1 keys
  case $owner in
    gone) ;; # made a moment ago
    None)
      keys=$(ask_aws "list the bucket $S3_BUCKET" s3api list-objects-v2 --bucket "$S3_BUCKET" --max-keys 1 \
        --query KeyCount --output text)
      if ((keys)); then
        report bucket "$S3_BUCKET" "has files but no comfy-env tag: used, but its settings stay as they are, and delete_env.sh will leave it alone"
        OURS=no
        return
      fi
      ;;
    *) die "the bucket $S3_BUCKET belongs to the environment $owner: write S3_BUCKET with \${ENV} in $HERE/env" ;;
  esac
  run_aws "tag the bucket $S3_BUCKET" s3api put-bucket-tagging --bucket "$S3_BUCKET" \
    --tagging "{\"TagSet\":$(tags_json "$S3_BUCKET")}"
}

# secure_bucket: sets CHANGED. Only what is not there is set: a key, a policy or lifecycle rules of
# somebody else stay.
secure_bucket() {
  local arn=arn:$PARTITION:s3:::$S3_BUCKET notifications
  give_bucket public-access-block \
    'PublicAccessBlockConfiguration | BlockPublicAcls && IgnorePublicAcls && BlockPublicPolicy && RestrictPublicBuckets' \
    --public-access-block-configuration \
    BlockPublicAcls=true,IgnorePublicAcls=true,BlockPublicPolicy=true,RestrictPublicBuckets=true
  give_bucket bucket-encryption \
    'ServerSideEncryptionConfiguration.Rules[0].ApplyServerSideEncryptionByDefault.SSEAlgorithm' \
    --server-side-encryption-configuration \
    '{"Rules":[{"ApplyServerSideEncryptionByDefault":{"SSEAlgorithm":"AES256"}}]}'
  give_bucket bucket-policy Policy --policy "{$(only_tls s3 "$arn" "$arn/*")]}"
  give_bucket bucket-lifecycle-configuration 'Rules[0].Status' --lifecycle-configuration \
    '{"Rules":[{"ID":"unfinished uploads","Status":"Enabled","Filter":{"Prefix":""},"AbortIncompleteMultipartUpload":{"DaysAfterInitiation":7}}]}'
  # All notifications are replaced at once, so those that are there go with it.
  # shellcheck disable=SC2016 # JMESPath's backticks
  notifications=$(ask_aws "look at the notifications of the bucket $S3_BUCKET" \
    s3api get-bucket-notification-configuration --bucket "$S3_BUCKET" --output json \
    --query 'merge(@, {EventBridgeConfiguration: `{}`})')
  give_bucket bucket-notification-configuration 'EventBridgeConfiguration != null' \
    --notification-configuration "$notifications"
}

# give_bucket SETTING QUERY OPTION VALUE: VALUE where QUERY finds nothing.
give_bucket() {
  local setting=$1 query=$2 option=$3 value=$4 answer
  if ! answer=$(aws s3api "get-$setting" --bucket "$S3_BUCKET" --query "$query" --output text 2>&1); then
    [[ $answer == *NoSuch*Configuration* || $answer == *NoSuchBucketPolicy* || $answer == *NotFoundError* ]] \
      || die "cannot look at the $setting of the bucket $S3_BUCKET:$(one_line "$answer")"
    answer=None
  fi
  [[ $answer == None || $answer == False ]] || return 0
  run_aws "set the $setting of the bucket $S3_BUCKET" s3api "put-$setting" --bucket "$S3_BUCKET" "$option" "$value"
  CHANGED=yes
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

# --- Permissions -----------------------------------------------------------------------------

# print_policy WHO [NAME]: needs no AWS call, so that who has no permission yet can ask for one.
print_policy() {
  local who=$1 name=$2
  (($# <= 2)) || die "the argument '$3' is one too many: see --help"
  [[ $who == worker || $who == sender || $who == operator ]] \
    || die "'$who' is no one's policy: use --print-policy worker, sender or operator"
  if [[ -z $name ]]; then
    name=$(load_env "$HERE/env" && printf '%s' "${ENV:-base}")
  fi
  choose_env "$name"
  check_profile
  "${who}_policy"
}

# set_arns: begins a policy, and sets what the statements are about.
set_arns() {
  STATEMENTS=()
  QUEUE_ARN=arn:$PARTITION:sqs:$REGION:$ACCOUNT_ID:$SQS_NAME
  DLQ_ARN=arn:$PARTITION:sqs:$REGION:$ACCOUNT_ID:$DLQ_NAME
  GROUP_ARN="arn:$PARTITION:autoscaling:$REGION:$ACCOUNT_ID:autoScalingGroup:*:autoScalingGroupName/$ASG_NAME"
  BUCKET_ARN=arn:$PARTITION:s3:::$S3_BUCKET
  EC2_SERVICE=ec2.amazonaws.com
  [[ $PARTITION != aws-cn ]] || EC2_SERVICE=ec2.amazonaws.com.cn
}

# allow ACTIONS RESOURCES [CONDITION]: adds a statement. Actions and resources are separated by blanks.
allow() {
  local condition=${3:+,$'\n      "Condition": {'$3\}}
  STATEMENTS+=("$(printf '    {\n      "Effect": "Allow",\n      "Action": %s,\n      "Resource": %s%s\n    }' \
    "$(json_list "$1")" "$(json_list "$2")" "$condition")")
}

# json_list WORDS: ["one", "two"], or "one" alone; IAM counts the characters of a policy.
json_list() {
  local list
  local -a words
  read -ra words <<<"$1"
  printf -v list '"%s", ' "${words[@]}"
  list=${list%, }
  if ((${#words[@]} == 1)); then printf '%s' "$list"; else printf '[%s]' "$list"; fi
}

policy_of_statements() {
  local statements
  printf -v statements '%s,\n' "${STATEMENTS[@]}"
  printf '{\n  "Version": "2012-10-17",\n  "Statement": [\n%s\n  ]\n}\n' "${statements%,*}"
}

# worker_policy: of an instance. models/ is read only, so that no job can change what all others load; on
# the base machine designers change everything through the mounted bucket.
worker_policy() {
  set_arns
  local written="$BUCKET_ARN/input/* $BUCKET_ARN/output/*" write="s3:PutObject s3:AbortMultipartUpload"
  [[ $ENV != base ]] || written="$BUCKET_ARN/*" write+=" s3:DeleteObject"
  allow "sqs:GetQueueUrl sqs:GetQueueAttributes sqs:ReceiveMessage sqs:ChangeMessageVisibility sqs:DeleteMessage" "$QUEUE_ARN"
  allow "autoscaling:DescribeAutoScalingGroups autoscaling:DescribeScalingActivities" "*"
  allow "autoscaling:SetDesiredCapacity autoscaling:TerminateInstanceInAutoScalingGroup autoscaling:SetInstanceHealth \
    autoscaling:CompleteLifecycleAction autoscaling:RecordLifecycleActionHeartbeat" "$GROUP_ARN"
  allow "s3:ListBucket" "$BUCKET_ARN"
  allow "s3:GetObject" "$BUCKET_ARN/*"
  allow "$write" "$written"
  allow "cloudwatch:PutMetricData" "*" "\"StringEquals\": {\"cloudwatch:namespace\": \"$PREFIX/$ENV\"}"
  policy_of_statements
}

# sender_policy: of who sends jobs, waits for them and fetches their results.
sender_policy() {
  set_arns
  allow "sqs:GetQueueUrl sqs:GetQueueAttributes" "$QUEUE_ARN $DLQ_ARN"
  allow "sqs:SendMessage" "$QUEUE_ARN"
  allow "autoscaling:DescribeAutoScalingGroups autoscaling:DescribeScalingActivities" "*"
  allow "autoscaling:SetDesiredCapacity" "$GROUP_ARN"
  allow "s3:ListBucket" "$BUCKET_ARN"
  allow "s3:GetObject" "$BUCKET_ARN/input/* $BUCKET_ARN/output/*"
  allow "s3:PutObject s3:AbortMultipartUpload" "$BUCKET_ARN/input/*"
  policy_of_statements
}

# operator_policy: of who runs this script and delete_env.sh. It makes and removes only what carries the
# environment's names or tags; of base it removes nothing.
operator_policy() {
  set_arns
  # Images and snapshots have no account in their ARN. Where tags decide, the ARNs need not.
  local any="arn:$PARTITION:ec2:$REGION:*" ec2=arn:$PARTITION:ec2:$REGION:$ACCOUNT_ID iam=arn:$PARTITION:iam::$ACCOUNT_ID
  local template="$ec2:launch-template/*"
  # Of what is not there yet AWS does not know the path.
  local roles="$iam:role$WORKER_PATH* $iam:role/$WORKER_ROLE"
  local profiles="$iam:instance-profile$WORKER_PATH* $iam:instance-profile/$WORKER_ROLE"
  local base=arn:$PARTITION:s3:::$BASE_S3_BUCKET alarms="arn:$PARTITION:cloudwatch:$REGION:$ACCOUNT_ID:alarm:$ASG_NAME-*"
  local new="\"aws:RequestTag/comfy-env\": \"$ENV\", \"aws:RequestTag/comfy-prefix\": \"$PREFIX\""
  local ours="\"StringEquals\": {\"aws:ResourceTag/comfy-env\": \"$ENV\", \"aws:ResourceTag/comfy-prefix\": \"$PREFIX\"}"

  # These take no resource.
  allow "ec2:DescribeInstances ec2:DescribeSubnets ec2:DescribeRouteTables ec2:DescribeVpcEndpoints ec2:DescribeImages \
    ec2:DescribeSnapshots ec2:DescribeVolumes ec2:DescribeLaunchTemplate* ec2:DescribeInstanceType* \
    autoscaling:Describe* cloudwatch:DescribeAlarms sqs:ListQueues iam:ListRoles iam:ListInstanceProfiles \
    tag:GetResources servicequotas:GetServiceQuota" "*"
  allow "sqs:CreateQueue sqs:TagQueue sqs:ListQueueTags sqs:GetQueueUrl sqs:GetQueueAttributes sqs:SetQueueAttributes" \
    "$QUEUE_ARN $DLQ_ARN"
  allow "s3:CreateBucket s3:ListBucket s3:GetBucket* s3:PutBucketTagging s3:PutBucketPublicAccessBlock \
    s3:PutBucketPolicy s3:PutBucketNotification s3:GetEncryptionConfiguration s3:PutEncryptionConfiguration \
    s3:GetLifecycleConfiguration s3:PutLifecycleConfiguration" "$BUCKET_ARN"
  allow "s3:GetObject s3:PutObject s3:PutObjectTagging s3:AbortMultipartUpload" "$BUCKET_ARN/*"
  if [[ $ENV != base ]]; then
    allow "s3:ListBucket" "$base"
    allow "s3:GetObject s3:GetObjectTagging" "$base/*"

    allow "ec2:CreateImage" "$ec2:instance/*"
    allow "ec2:CreateImage ec2:CreateLaunchTemplate" "$any:*" "\"StringEquals\": {$new}"
    allow "ec2:CreateTags" "$any:*" \
      "\"StringEquals\": {$new, \"ec2:CreateAction\": [\"CreateImage\", \"CreateLaunchTemplate\", \"RunInstances\"]}"
    allow "ec2:CreateLaunchTemplateVersion ec2:ModifyLaunchTemplate ec2:DeleteLaunchTemplate ec2:RunInstances \
      ec2:TerminateInstances ec2:DeleteVolume ec2:DeregisterImage ec2:DeleteSnapshot" "$any:*" "$ours"
    # Asked for when a group is made or changed: whether its maker could launch what the template says.
    allow "ec2:RunInstances" "$any:image/* $any:snapshot/* $ec2:instance/* $ec2:volume/* $ec2:network-interface/* $ec2:subnet/* \
      $ec2:security-group/* $ec2:key-pair/*" "\"ArnLike\": {\"ec2:LaunchTemplate\": \"$template\"}"
    allow "autoscaling:CreateAutoScalingGroup autoscaling:UpdateAutoScalingGroup autoscaling:DeleteAutoScalingGroup \
      autoscaling:CreateOrUpdateTags autoscaling:PutLifecycleHook autoscaling:SuspendProcesses \
      autoscaling:EnableMetricsCollection autoscaling:PutScalingPolicy autoscaling:PutWarmPool \
      autoscaling:DeleteWarmPool autoscaling:SetDesiredCapacity" "$GROUP_ARN"
    allow "cloudwatch:PutMetricAlarm cloudwatch:TagResource cloudwatch:ListTagsForResource cloudwatch:DeleteAlarms" "$alarms"
    allow "cloudwatch:GetDashboard cloudwatch:PutDashboard cloudwatch:DeleteDashboards" \
      "arn:$PARTITION:cloudwatch::$ACCOUNT_ID:dashboard/$ASG_NAME"

    allow "iam:GetRole iam:CreateRole iam:TagRole iam:GetRolePolicy iam:PutRolePolicy iam:ListRolePolicies \
      iam:ListAttachedRolePolicies iam:DeleteRolePolicy iam:DetachRolePolicy iam:DeleteRole" "$roles"
    allow "iam:GetInstanceProfile iam:CreateInstanceProfile iam:TagInstanceProfile iam:AddRoleToInstanceProfile \
      iam:RemoveRoleFromInstanceProfile iam:DeleteInstanceProfile" "$profiles"
    if [[ -n $INSTANCE_PROFILE ]]; then
      # Its role most likely has its name, as where the console has made both.
      roles+=" $iam:role/$INSTANCE_PROFILE"
      allow "iam:GetInstanceProfile" "$iam:instance-profile/$INSTANCE_PROFILE"
    fi
    allow "iam:PassRole" "$roles" "\"StringEquals\": {\"iam:PassedToService\": \"$EC2_SERVICE\"}"
    # For the account's first group and its first Spot instance.
    allow "iam:CreateServiceLinkedRole" "$iam:role/aws-service-role/*" \
      "\"StringEquals\": {\"iam:AWSServiceName\": [\"autoscaling.amazonaws.com\", \"spot.amazonaws.com\"]}"

    allow "sqs:DeleteQueue" "$QUEUE_ARN $DLQ_ARN"
    allow "s3:DeleteBucket s3:ListBucketVersions s3:ListBucketMultipartUploads" "$BUCKET_ARN"
    allow "s3:DeleteObject s3:DeleteObjectVersion" "$BUCKET_ARN/*"
  fi
  policy_of_statements
}

# ensure_profile: sets PROFILE, the instance profile of the workers: the one that INSTANCE_PROFILE names, or
# one with a role that may do what worker_policy says and nothing else.
ensure_profile() {
  local answer path policy found state="already there"
  if [[ -n $INSTANCE_PROFILE ]]; then
    PROFILE=$INSTANCE_PROFILE
    answer=$(aws iam get-instance-profile --instance-profile-name "$PROFILE" 2>&1) \
      || die "cannot use the instance profile $PROFILE, see INSTANCE_PROFILE in $HERE/env:$(one_line "$answer")"
    report profile "$PROFILE" "already there"
    return
  fi
  PROFILE=$WORKER_ROLE
  policy=$(worker_policy)
  set_arns
  path=$(ask_iam get-role --role-name "$WORKER_ROLE" --query Role.Path --output text)
  if [[ $path == None ]]; then
    run_aws "create the role $WORKER_ROLE" iam create-role \
      --role-name "$WORKER_ROLE" \
      --path "$WORKER_PATH" \
      --description "comfy-on-ec2: the instances of the environment $ENV in $REGION" \
      --assume-role-policy-document "{\"Version\":\"2012-10-17\",\"Statement\":[{\"Effect\":\"Allow\",\"Principal\":{\"Service\":\"$EC2_SERVICE\"},\"Action\":\"sts:AssumeRole\"}]}" \
      --tags "$(tags_json "$WORKER_ROLE")"
    state=created
  elif [[ $path != "$WORKER_PATH" ]]; then
    die "the role $WORKER_ROLE is not this environment's (its path is $path, not $WORKER_PATH): write another ASG_NAME in $HERE/env, such as one with \${REGION}, or name an instance profile in INSTANCE_PROFILE"
  fi
  found=$(ask_iam get-role-policy --role-name "$WORKER_ROLE" --policy-name worker --query PolicyDocument --output json)
  if [[ ${found//[[:space:]]/} != "${policy//[[:space:]]/}" ]]; then
    run_aws "set the policy of the role $WORKER_ROLE" iam put-role-policy \
      --role-name "$WORKER_ROLE" \
      --policy-name worker \
      --policy-document "$policy"
    [[ $state == created ]] || state=updated
  fi
  found=$(ask_iam get-instance-profile --instance-profile-name "$WORKER_ROLE" \
    --query "InstanceProfile.join(' ', [Path, Roles[0].RoleName || 'None'])" --output text)
  if [[ $found == None ]]; then
    run_aws "create the instance profile $WORKER_ROLE" iam create-instance-profile \
      --instance-profile-name "$WORKER_ROLE" \
      --path "$WORKER_PATH" \
      --tags "$(tags_json "$WORKER_ROLE")"
  fi
  if [[ $found != *" $WORKER_ROLE" ]]; then
    run_aws "put the role into the instance profile $WORKER_ROLE" iam add-role-to-instance-profile \
      --instance-profile-name "$WORKER_ROLE" \
      --role-name "$WORKER_ROLE"
    [[ $state == created ]] || state=updated
  fi
  report profile "$WORKER_ROLE" "$state"
}

# ask_iam ARG...: prints the answer, or None where IAM has no such thing.
ask_iam() {
  local answer
  if answer=$(aws iam "$@" 2>&1); then
    printf '%s' "$answer"
  elif [[ $answer == *NoSuchEntity* ]]; then
    printf None
  else
    die "cannot look at the role $WORKER_ROLE; where you may not, name an instance profile in INSTANCE_PROFILE in $HERE/env:$(one_line "$answer")"
  fi
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
  data+=",\"IamInstanceProfile\":{\"Name\":\"$PROFILE\"}"
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
    "Key=Name,Value=$ASG_NAME,PropagateAtLaunch=false")
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
  local name="" id="" reboot=no-reboot with_output=no
  while (($#)); do
    case $1 in
      -h | --help) usage && exit ;;
      --print-policy) print_policy "${2:-}" "${3:-$name}" "${@:4}" && exit ;;
      --reboot) reboot=reboot ;;
      --with-output) with_output=yes ;;
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

  printf 'Environment %s from the base machine %s, in %s of account %s\n' "$ENV" "$id" "$REGION" "$ACCOUNT_ID"
  report subnets "$SUBNETS" "$SUBNETS_ARE"
  ensure_queues
  ensure_profile
  ensure_image "$id" "$reboot"
  ensure_bucket "$with_output"
  ensure_template
  ensure_group
  ensure_alarm
  summarise
}

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
  main "$@"
fi
