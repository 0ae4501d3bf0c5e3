#!/usr/bin/env bash
# An environment's settings, and what everything that belongs to it is called.

# choose_env NAME: checks NAME and sets everything that depends on it: the settings, the names and the ARNs. Every
# script calls it, so that they can never disagree about a name.
choose_env() {
  local name=$1 base setting
  [[ -n $name ]] || die "which environment? Give its name: ${0##*/} NAME (more with --help)"
  [[ $name =~ ^[a-z0-9]([a-z0-9-]*[a-z0-9])?$ ]] \
    || die "the environment's name '$name' is not allowed: use lowercase letters, digits and hyphens, with a letter or digit at both ends"

  # In a shell of its own, because a setting that is already set wins over the file.
  base=$(read_settings base && printf '%s\t%s\t%s' "$S3_BUCKET" "$SQS_NAME" "$ASG_NAME")
  IFS=$'\t' read -r BASE_S3_BUCKET BASE_SQS_NAME BASE_ASG_NAME <<<"$base"
  read_settings "$name"
  if [[ $name != base ]]; then
    for setting in S3_BUCKET SQS_NAME ASG_NAME; do
      base=BASE_$setting
      [[ ${!setting} != "${!base}" ]] \
        || die "$setting is '${!setting}' for both base and $name: write it with \${ENV} in $HERE/env, and do not set it in your shell"
    done
  fi
  check_names

  DLQ_NAME=$SQS_NAME-dlq
  TEMPLATE_NAME=$ASG_NAME-template
  ALARM_NAME=$ASG_NAME-first-instance # its scaling policy too
  WORKER_ROLE=$ASG_NAME-worker        # its instance profile too
  # The names of roles are one region's and all regions': the path, which nobody can change, says whose.
  WORKER_PATH=/$PREFIX/$REGION/$ENV/
  OUR_FILTERS=("Name=tag:comfy-env,Values=$ENV" "Name=tag:comfy-prefix,Values=$PREFIX")
  OUR_TAGS=("Key=comfy-env,Value=$ENV" "Key=comfy-prefix,Value=$PREFIX")
  case $REGION in # until check_account asks AWS
    cn-*) set_partition aws-cn ;;
    us-gov-*) set_partition aws-us-gov ;;
    *) set_partition aws ;;
  esac
  # AWS_REGION too: AWS CLI v2 prefers it.
  export AWS_DEFAULT_REGION=$REGION AWS_REGION=$REGION AWS_RETRY_MODE=standard AWS_PAGER=""
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
  : "${S3_BUCKET:=$PREFIX-$ACCOUNT_ID-$REGION-$ENV}" "${SQS_NAME:=$PREFIX-$ENV-queue}" "${ASG_NAME:=$PREFIX-$ENV-asg}"
  : "${COMFY_HOME:=/home/ubuntu/comfy}" "${INSTANCE_PROFILE:=}" "${INSTANCE_TYPE:=g5.2xlarge}" "${INSTANCE_TYPES:=}"
  : "${MIN_INSTANCES:=0}" "${MAX_INSTANCES:=20}" "${SPOT_PERCENT:=0}" "${WARM_POOL:=0}" "${VOLUME_INIT_RATE:=}"
  : "${VISIBILITY_TIMEOUT:=120}" "${MAX_RECEIVES:=3}" "${ALARM_AGE:=1800}" "${ALARM_TOPIC:=}"
}

check_names() {
  [[ $PREFIX =~ ^[a-z0-9]([a-z0-9-]*[a-z0-9])?$ ]] \
    || problem "PREFIX is '$PREFIX': use lowercase letters, digits and hyphens in $HERE/env"
  ((${#S3_BUCKET} <= 63)) \
    || problem "the bucket's name '$S3_BUCKET' has ${#S3_BUCKET} characters and S3 allows 63: choose a shorter name than '$ENV'"
  [[ $S3_BUCKET =~ ^[a-z0-9][a-z0-9.-]+[a-z0-9]$ ]] \
    || problem "S3_BUCKET is '$S3_BUCKET': use 3 to 63 lowercase letters, digits, dots and hyphens in $HERE/env"
  [[ $SQS_NAME =~ ^[A-Za-z0-9_-]{1,76}$ ]] \
    || problem "SQS_NAME is '$SQS_NAME': use at most 76 letters, digits, hyphens and underscores in $HERE/env"
  [[ $ASG_NAME =~ ^[A-Za-z0-9_-]{1,100}$ ]] \
    || problem "ASG_NAME is '$ASG_NAME': use at most 100 letters, digits, hyphens and underscores in $HERE/env"
  die_of_problems
}

# set_partition NAME: the part of AWS's world that the account is in (aws, aws-cn ...), how its host names end, and
# the ARNs in it.
set_partition() {
  PARTITION=$1 DNS_SUFFIX=amazonaws.com
  [[ $1 != aws-cn ]] || DNS_SUFFIX=amazonaws.com.cn
  QUEUE_ARN=arn:$PARTITION:sqs:$REGION:$ACCOUNT_ID:$SQS_NAME DLQ_ARN=arn:$PARTITION:sqs:$REGION:$ACCOUNT_ID:$DLQ_NAME
  BUCKET_ARN=arn:$PARTITION:s3:::$S3_BUCKET
  GROUP_ARN="arn:$PARTITION:autoscaling:$REGION:$ACCOUNT_ID:autoScalingGroup:*:autoScalingGroupName/$ASG_NAME"
}

# check_account: the credentials are there and belong to ACCOUNT_ID. Sets PARTITION.
check_account() {
  local identity account arn partition
  command -v aws >/dev/null \
    || die "the AWS CLI is not installed: install it, see https://docs.aws.amazon.com/cli/latest/userguide/getting-started-install.html"
  identity=$(ask "find out whose credentials these are; give this machine an instance profile, or run aws configure" \
    aws sts get-caller-identity --query '[Account,Arn]' --output text)
  IFS=$'\t' read -r account arn <<<"$identity"
  [[ $account == "$ACCOUNT_ID" ]] \
    || die "the credentials belong to account $account, but ACCOUNT_ID is $ACCOUNT_ID: correct $HERE/env or use other credentials"
  IFS=: read -r _ partition _ <<<"$arn"
  set_partition "$partition"
}
