#!/usr/bin/env bash
#
# Makes an environment from the base machine, or brings one up to date: image, launch template,
# Auto Scaling group, alarms, dashboard, bucket, queues, and a role for its instances.
#
# Usage: ./create_env.sh base [--move-data [--yes]] [--dry-run]
#        ./create_env.sh NAME [INSTANCE_ID] [--rebake | --rollback] [--keep N] [--reboot]
#                        [--with-output] [--s3-trigger | --no-s3-trigger] [--wait] [--dry-run]
#        ./create_env.sh --print-policy worker|sender|operator [NAME]
#
#   base           prepare the base machine itself: its bucket and queues
#   --move-data    run there: move ComfyUI's models/, input/ and output/ to the bucket, and put links
#                  into the mounted bucket in their place
#   --yes          then remove the folders that were moved from the disk, without a question
#
#   NAME           the environment: lowercase letters, digits and hyphens, such as pro
#   INSTANCE_ID    the base machine; needed only where this is not run on the base machine itself
#   --rebake       make a new image of the base machine and move the fleet to it when it is available;
#                  an instance is replaced when it has no job
#   --rollback     move the fleet back to the image before
#   --keep N       remove images that are no longer used, all but the latest N, which are kept for
#                  --rollback (default: 1 with --rebake, else nothing is removed)
#   --reboot       reboot the base machine for an image that is consistent to the last byte
#   --with-output  copy the base bucket's output/ as well
#   --s3-trigger   from now on, run every workflow that is dropped into the bucket's input/jobs/
#   --no-s3-trigger  do so no more
#   --wait         wait until the image is available, so that the fleet can start
#
#   --dry-run      say what would be made, changed or removed, and do nothing of it
#   --print-policy print the IAM policy, as small as AWS allows, of an instance, of who sends jobs, or of
#                  who runs this script and delete_env.sh; without NAME for the ENV in the settings
#
# Example: ./create_env.sh pro
#
# The settings are read from the file env beside this script. Running it again is safe: what is
# there stays, changed settings are applied, an interrupted run is completed, and files that are new
# or changed in the base bucket are copied; no file is ever deleted in a bucket. The image that the
# environment uses stays in use until --rebake or --rollback.
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
PROFILE_WAIT_SECONDS=${PROFILE_WAIT_SECONDS:-120}
POLL_SECONDS=${POLL_SECONDS:-10}

DRY_RUN=no  # --dry-run: yes
PROBLEMS=() # what the checks have found
COMFYUI_ANSWERS=no IMAGE_MADE=no S3_TRIGGER=""

# die SENTENCE: after the problems found so far.
die() {
  problem "$*"
  die_of_problems
}

# problem SENTENCE: what would surely fail. The checks go on, so that all problems are told together.
problem() {
  PROBLEMS+=("$*")
}

die_of_problems() {
  local sentence
  ((${#PROBLEMS[@]})) || return 0
  for sentence in "${PROBLEMS[@]}"; do
    printf '%s: %s\n' "${0##*/}" "$sentence" >&2
  done
  exit 1
}

# warn SENTENCE: what somebody may have good reasons for.
warn() {
  printf '%s: warning: %s\n' "${0##*/}" "$*" >&2
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
  : "${VOLUME_INIT_RATE:=}"
  : "${ALARM_AGE:=1800}"
  : "${ALARM_TOPIC:=}"
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
    || problem "PREFIX is '$PREFIX': use lowercase letters, digits and hyphens in $HERE/env"
  ((${#S3_BUCKET} <= 63)) \
    || problem "the bucket's name '$S3_BUCKET' has ${#S3_BUCKET} characters and S3 allows 63: choose a shorter name than '$name'"
  [[ $S3_BUCKET =~ ^[a-z0-9][a-z0-9.-]+[a-z0-9]$ ]] \
    || problem "S3_BUCKET is '$S3_BUCKET': use 3 to 63 lowercase letters, digits, dots and hyphens in $HERE/env"
  [[ $SQS_NAME =~ ^[A-Za-z0-9_-]{1,76}$ ]] \
    || problem "SQS_NAME is '$SQS_NAME': use at most 76 letters, digits, hyphens and underscores in $HERE/env"
  [[ $ASG_NAME =~ ^[A-Za-z0-9_-]{1,100}$ ]] \
    || problem "ASG_NAME is '$ASG_NAME': use at most 100 letters, digits, hyphens and underscores in $HERE/env"
  die_of_problems

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

# check_number NAME LEAST MOST: a setting is a whole number in that range.
check_number() {
  local name=$1 least=$2 most=$3
  if [[ ! ${!name} =~ ^(0|[1-9][0-9]{0,8})$ ]] || ((${!name} < least || ${!name} > most)); then
    problem "$name is '${!name}': set it in $HERE/env to a whole number from $least to $most"
  fi
}

check_queue_settings() {
  check_number VISIBILITY_TIMEOUT 3 43200
  check_number MAX_RECEIVES 1 1000
}

check_fleet_settings() {
  local most=10000
  check_number MAX_INSTANCES 1 "$most"
  ((${#PROBLEMS[@]})) || most=$MAX_INSTANCES
  check_number MIN_INSTANCES 0 "$most"
  check_number WARM_POOL 0 "$most"
  check_number SPOT_PERCENT 0 100
  check_number ALARM_AGE 60 1209600
  [[ -z $VOLUME_INIT_RATE ]] || check_number VOLUME_INIT_RATE 100 300
  check_queue_settings
  [[ $WARM_POOL == 0 || $SPOT_PERCENT == 0 ]] \
    || problem "WARM_POOL is $WARM_POOL and SPOT_PERCENT is $SPOT_PERCENT, but AWS keeps no Spot instances in a warm pool: set one of them in $HERE/env to 0"
  [[ -z $ALARM_TOPIC || $ALARM_TOPIC =~ ^arn:aws[a-z-]*:sns:$REGION:[0-9]{12}:[A-Za-z0-9_-]{1,256}$ ]] \
    || problem "ALARM_TOPIC is '$ALARM_TOPIC': set it in $HERE/env to the ARN of an SNS topic in $REGION, such as arn:aws:sns:$REGION:$ACCOUNT_ID:alarms"
  choose_types
  check_profile
  [[ $COMFY_HOME == /* ]] \
    || problem "COMFY_HOME is '$COMFY_HOME': set it in $HERE/env to a folder on the base machine, starting with /"
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
    || problem "INSTANCE_TYPE is '$INSTANCE_TYPE': set it in $HERE/env to an EC2 instance type, such as g5.2xlarge"
  read -r -a TYPES <<<"$INSTANCE_TYPES"
  ((${#TYPES[@]} <= 40)) \
    || problem "INSTANCE_TYPES has ${#TYPES[@]} types and AWS allows 40: take some out in $HERE/env"
  for type in "${TYPES[@]}"; do
    [[ $type =~ $pattern ]] \
      || problem "INSTANCE_TYPES has '$type': set it in $HERE/env to EC2 instance types, such as \"g5.2xlarge g6.2xlarge\""
    [[ ! -v seen[$type] ]] || problem "INSTANCE_TYPES has $type twice: take one out in $HERE/env"
    seen[$type]=yes
  done
  if ((${#TYPES[@]} == 0)) && [[ $SPOT_PERCENT != 0 ]]; then
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

# try_aws WHAT ARG...: prints the answer of a call that only checks. A refusal is a warning, and fails.
try_aws() {
  local what=$1
  shift
  aws "$@" && return
  warn "cannot $what, see AWS's words above, so that is not checked"
  return 1
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

# inspect_base INSTANCE_ID: sets VPC (empty where there is no such machine), SECURITY_GROUPS, KEY_NAME,
# DEVICES and ROOT_DEVICE (None where the base has none), and ARCHITECTURE.
inspect_base() {
  local id=$1 answer state platform
  VPC=""
  if [[ ! $id =~ ^i-([0-9a-f]{8}|[0-9a-f]{17})$ ]]; then
    problem "'$id' is not an instance id: it looks like i-0123456789abcdef0"
    return
  fi
  # By a filter, not by --instance-ids: an unknown id is then an empty answer and not an error.
  answer=$(ask_aws "look at the base machine $id" ec2 describe-instances \
    --filters "Name=instance-id,Values=$id" \
    --query "Reservations[0].Instances[0].[State.Name, VpcId, KeyName, Platform, Architecture,
      join(' ', SecurityGroups[].GroupId) || 'None', join(' ', BlockDeviceMappings[].DeviceName) || 'None',
      RootDeviceName]" \
    --output text)
  IFS=$'\t' read -r state VPC KEY_NAME platform ARCHITECTURE SECURITY_GROUPS DEVICES ROOT_DEVICE <<<"$answer"
  if [[ $state == None ]]; then
    VPC=""
    problem "there is no instance $id in $REGION: give the id of the base machine, and check REGION in $HERE/env"
    return
  fi
  [[ $state == running || $state == stopped ]] \
    || problem "the instance $id is $state: an image can be made of it when it is running or stopped"
  [[ $platform == None ]] \
    || problem "the instance $id runs $platform: the base machine is one with Ubuntu"
}

# check_here: what can be seen where this runs on the base machine itself.
check_here() {
  local file
  grep -qsE '^ID(_LIKE)?=.*(ubuntu|debian)' /etc/os-release \
    || warn "this machine does not run Ubuntu, for which the services and their instructions are made"
  for file in env start_service.sh parse_job.py ComfyUI/main.py; do
    [[ -f $COMFY_HOME/$file ]] \
      || problem "there is no $COMFY_HOME/$file, so no instance of the fleet could work: put it there, or correct COMFY_HOME in $HERE/env"
  done
  if python3 -c 'import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=5)' \
    "http://${COMFY_ADDRESS:-127.0.0.1:8188}/system_stats" 2>/dev/null; then
    COMFYUI_ANSWERS=yes
  else
    warn "ComfyUI does not answer on ${COMFY_ADDRESS:-127.0.0.1:8188}: see that it works here before the fleet does as it does (journalctl -u comfyui)"
  fi
}

# choose_subnets: sets SUBNETS and ZONES, comma-separated, SUBNETS_ARE and, of private subnets, ROUTE_TABLES. A
# subnet is private when its route table, which is the VPC's main one where it has none of its own, has no route
# to an internet gateway.
choose_subnets() {
  local answer tables gateway table members subnet zone
  local -A gateway_of=() table_of=() zones=() used=()
  local -a all=() private=()
  answer=$(ask_aws "list the subnets of $VPC" ec2 describe-subnets \
    --filters "Name=vpc-id,Values=$VPC" Name=state,Values=available \
    --query 'sort_by(Subnets, &SubnetId)[].[SubnetId, AvailabilityZone]' --output text)
  # One line for each table: the internet gateway or None, the table, then the subnets that use it.
  tables=$(ask_aws "list the route tables of $VPC" ec2 describe-route-tables \
    --filters "Name=vpc-id,Values=$VPC" \
    --query "RouteTables[].[Routes[?starts_with(not_null(GatewayId, ''), 'igw-')].GatewayId | [0], RouteTableId,
      join(' ', Associations[?SubnetId || Main].not_null(SubnetId, 'main'))]" \
    --output text)
  while IFS=$'\t' read -r gateway table members; do
    for subnet in $members; do
      gateway_of[$subnet]=$gateway table_of[$subnet]=$table
    done
  done <<<"$tables"
  while read -r subnet zone; do
    [[ -n $subnet ]] || continue
    all+=("$subnet") zones[$zone]=yes
    [[ ${gateway_of[$subnet]:-${gateway_of[main]:-None}} != igw-* ]] || continue
    private+=("$subnet") used[${table_of[$subnet]:-${table_of[main]}}]=yes
  done <<<"$answer"
  ((${#all[@]})) || problem "the base machine's VPC $VPC has no subnet that is available: make one for the fleet"
  ROUTE_TABLES="${!used[*]}"
  SUBNETS_ARE=private
  if ((${#private[@]} == 0)); then
    SUBNETS_ARE="no subnet is private, so all are used"
    private=("${all[@]}")
  fi
  SUBNETS=$(listed "${private[@]}")
  ZONES=$(printf '%s\n' "${!zones[@]}" | sort | paste -s -d ,)
}

# listed WORD...: with commas between them.
listed() {
  local IFS=,
  printf '%s' "$*"
}

# check_endpoint: the way to S3 that costs nothing. From a public subnet it is free without.
check_endpoint() {
  local answer table
  local -a without=()
  answer=$(try_aws "look at the endpoints of $VPC" ec2 describe-vpc-endpoints \
    --filters "Name=vpc-id,Values=$VPC" Name=vpc-endpoint-type,Values=Gateway \
    --query "VpcEndpoints[?ends_with(ServiceName, '.s3') && (State=='available' || State=='Available')].RouteTableIds[]" --output text) || return 0
  for table in $ROUTE_TABLES; do
    [[ $answer == *"$table"* ]] || without+=("$table")
  done
  ((${#without[@]} == 0)) \
    || warn "the fleet's subnets have no gateway endpoint for S3, so every model is paid for at the NAT gateway: aws ec2 create-vpc-endpoint --region $REGION --vpc-id $VPC --service-name com.amazonaws.$REGION.s3 --route-table-ids ${without[*]}"
}

# check_types: that the fleet's types are to be had where the subnets are, and fit the base machine.
check_types() {
  local type answer offered vcpus architectures
  local -a wanted=("${TYPES[@]:-$INSTANCE_TYPE}") missing=()
  local -A vcpus_of=()
  offered=$(try_aws "list the instance types of $ZONES" ec2 describe-instance-type-offerings \
    --location-type availability-zone \
    --filters "Name=instance-type,Values=$(listed "${wanted[@]}")" "Name=location,Values=$ZONES" \
    --query 'InstanceTypeOfferings[].InstanceType' --output text) || return 0
  for type in "${wanted[@]}"; do
    [[ $offered =~ (^|[[:space:]])$type($|[[:space:]]) ]] || missing+=("$type")
  done
  if ((${#missing[@]} == ${#wanted[@]})); then
    problem "AWS has no ${missing[*]} in $ZONES, where the subnets are: choose another INSTANCE_TYPE in $HERE/env, or make a subnet in another zone"
  elif ((${#missing[@]})); then
    warn "AWS has no ${missing[*]} in $ZONES, where the subnets are: only the other types of INSTANCE_TYPES are used"
  fi
  # By a filter, because an unknown type is an error otherwise.
  answer=$(try_aws "look at the instance types" ec2 describe-instance-types \
    --filters "Name=instance-type,Values=$(listed "${wanted[@]}")" \
    --query "InstanceTypes[].[InstanceType, VCpuInfo.DefaultVCpus, join(' ', ProcessorInfo.SupportedArchitectures)]" \
    --output text) || return 0
  while IFS=$'\t' read -r type vcpus architectures; do
    vcpus_of[${type:-none}]=$vcpus
    [[ -z $type || $ARCHITECTURE == None || " $architectures " == *" $ARCHITECTURE "* ]] \
      || problem "$type does not run the base machine's $ARCHITECTURE: choose another instance type in $HERE/env"
  done <<<"$answer"
  type=${wanted[0]}
  [[ $MAX_INSTANCES$SPOT_PERCENT =~ ^[0-9]+$ && -n ${vcpus_of[$type]:-} ]] || return 0
  check_quota "$type" on-demand $(((MAX_INSTANCES * (100 - SPOT_PERCENT) + 99) / 100)) "${vcpus_of[$type]}"
  check_quota "$type" spot $(((MAX_INSTANCES * SPOT_PERCENT + 99) / 100)) "${vcpus_of[$type]}"
}

# check_quota TYPE on-demand|spot COUNT VCPUS: that the account may run so many, each with so many vCPUs.
check_quota() {
  local type=$1 kind=$2 count=$3 vcpus=$4 code="" quota
  ((count)) || return 0
  case $kind:${type%%[0-9]*}:$type in
    on-demand:g:* | on-demand:gr:* | on-demand:vt:*) code=L-DB2E81BA ;;
    spot:g:* | spot:gr:* | spot:vt:*) code=L-3819A6DF ;;
    on-demand:p:*) code=L-417A185B ;;
    spot:p:p[234]*) code=L-7212CCBC ;;
    on-demand:[acdhimrtz]:*) code=L-1216C47A ;;
    spot:[acdhimrtz]:*) code=L-34B43A08 ;;
  esac
  if [[ -z $code ]]; then
    warn "whether the account may run $count $type ($kind) is not checked: see Service Quotas, Amazon EC2"
    return
  fi
  quota=$(try_aws "look at the quota $code" service-quotas get-service-quota --service-code ec2 --quota-code "$code" \
    --region "$REGION" --query Quota.Value --output text) || return 0
  quota=${quota%.*}
  ((count * vcpus <= quota)) \
    || warn "MAX_INSTANCES is $MAX_INSTANCES, but the account may run only $((quota / vcpus)) $type ($kind) at a time, because its quota is $quota vCPUs: aws service-quotas request-service-quota-increase --region $REGION --service-code ec2 --quota-code $code --desired-value $((count * vcpus))"
}

check_base_bucket() {
  local answer
  answer=$(aws s3api head-bucket --bucket "$BASE_S3_BUCKET" --expected-bucket-owner "$ACCOUNT_ID" 2>&1) && return
  if [[ $answer == *"(404)"* ]]; then
    problem "the base machine's bucket $BASE_S3_BUCKET does not exist: run ./create_env.sh base first, and check S3_BUCKET in $HERE/env"
  else
    problem "cannot read the base machine's bucket $BASE_S3_BUCKET, see S3_BUCKET in $HERE/env:$(one_line "$answer")"
  fi
}

# check_everything ID: all that can be known before anything is made.
check_everything() {
  local id=$1
  check_fleet_settings
  check_account
  if [[ -z $id ]]; then
    id=$(find_instance_id)
    check_here
  fi
  BASE_ID=$id
  inspect_base "$BASE_ID"
  if [[ -n $VPC ]]; then
    choose_subnets
    check_endpoint
    check_types
  fi
  check_topic
  check_base_bucket
  look_at_trigger
  choose_image
  die_of_problems
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
  [[ $DRY_RUN == no ]] || return 0
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

ensure_bucket() {
  local owner state="already there"
  local -a location=()
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
  BUCKET_STATE=$state
}

# copy_files WITH_OUTPUT: what is new or changed in the base bucket.
copy_files() {
  local with_output=$1 copied
  local -a exclude=(--exclude "input/jobs/*") how=(sync) # input/jobs/ holds the base's own queued jobs
  [[ $with_output == yes ]] || exclude+=(--exclude "output/*")
  report files "s3://$BASE_S3_BUCKET" "copying what is new ..."
  if [[ $DRY_RUN == yes ]]; then
    how=(sync --dryrun)
    # sync would look into the bucket that is not there yet.
    [[ $BUCKET_STATE != created ]] || how=(cp --recursive --dryrun)
  fi
  copied=$(ask_aws "copy s3://$BASE_S3_BUCKET to s3://$S3_BUCKET (run this again: what was copied stays)" \
    s3 "${how[@]}" "s3://$BASE_S3_BUCKET" "s3://$S3_BUCKET" --no-progress "${exclude[@]}")
  copied=$(grep -cE '^(\(dryrun\) )?copy: ' <<<"$copied") || copied=0
  if ((copied)); then
    report files "s3://$S3_BUCKET" "copied: $copied"
  else
    report files "s3://$S3_BUCKET" "already there"
  fi
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

# --- S3 trigger ------------------------------------------------------------------------------

# look_at_trigger: sets S3_TRIGGER to yes where nobody has asked and there is one: it stays, so that it need
# not be asked for each time. Sets TRIGGER_FOUND for ensure_trigger.
look_at_trigger() {
  local answer
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
  [[ $ENV == base ]] || allow "s3:DeleteObject" "$BUCKET_ARN/input/jobs/*" # a job's inputs and its cancel
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
  local queue_actions="sqs:CreateQueue sqs:TagQueue sqs:ListQueueTags sqs:GetQueueUrl sqs:GetQueueAttributes sqs:SetQueueAttributes"
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
    tag:GetResources servicequotas:GetServiceQuota cloudwatch:GetMetricData" "*"
  # send_job.py --dead, --redrive and --purge-dead besides: nearly all there is.
  [[ $ENV == base ]] || queue_actions="sqs:*"
  allow "$queue_actions" "$QUEUE_ARN $DLQ_ARN"
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
    # --rebake and --rollback mark images with a tag.
    allow "ec2:CreateTags ec2:CreateLaunchTemplateVersion ec2:ModifyLaunchTemplate ec2:DeleteLaunchTemplate ec2:RunInstances \
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

    [[ -z $ALARM_TOPIC ]] || allow "sns:GetTopicAttributes" "$ALARM_TOPIC"
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

# The image that the launch template's default version names is the one in use. An image's tag comfy-image says
# what a run is doing to it, so that the next one can go on where it was stopped: `coming` while --rebake moves the
# fleet to it, then `used`; `leaving` while --rollback moves the fleet away from it, then `left`.

# find_images: sets IN_USE (None without one), IMAGES, the oldest first, and STATE_OF, MARK_OF, SNAPSHOTS_OF each.
find_images() {
  local answer id state mark snapshots
  IMAGES=()
  declare -gA STATE_OF=() MARK_OF=() SNAPSHOTS_OF=()
  answer=$(ask_aws "list the images of $ENV" ec2 describe-images --owners self \
    --filters "Name=tag:comfy-env,Values=$ENV" "Name=tag:comfy-prefix,Values=$PREFIX" \
    --query "sort_by(Images, &CreationDate)[].[ImageId, State, Tags[?Key=='comfy-image'].Value | [0],
      join(' ', (BlockDeviceMappings || \`[]\`)[?Ebs.SnapshotId].Ebs.SnapshotId)]" \
    --output text)
  while IFS=$'\t' read -r id state mark snapshots; do
    [[ -n $id ]] || continue
    IMAGES+=("$id")
    STATE_OF[$id]=$state MARK_OF[$id]=$mark SNAPSHOTS_OF[$id]=$snapshots
  done <<<"$answer"
  if ! IN_USE=$(aws ec2 describe-launch-template-versions --launch-template-name "$TEMPLATE_NAME" \
    --versions "\$Default" --query 'LaunchTemplateVersions[0].LaunchTemplateData.ImageId' --output text 2>&1); then
    [[ $IN_USE == *NotFound* ]] || die "cannot look at the launch template $TEMPLATE_NAME:$(one_line "$IN_USE")"
    IN_USE=None
  fi
  IN_USE=${IN_USE##*$'\n'} # the last line, in case the CLI had a warning
}

# choose_image: sets IMAGE, empty where one is to be made, and IMAGE_STATE, and for --rollback ROLLED_BACK, the image
# to move away from.
choose_image() {
  local id state mark
  find_images
  IMAGE="" ROLLED_BACK=$IN_USE
  for id in "${IMAGES[@]}"; do
    [[ ${MARK_OF[$id]} != leaving ]] || ROLLED_BACK=$id
  done
  for id in "${IMAGES[@]}"; do
    state=${STATE_OF[$id]} mark=${MARK_OF[$id]}
    if [[ $ACTION == rollback ]]; then
      [[ $id != "$ROLLED_BACK" ]] || break
      [[ $state/$mark != available/@(None|used) ]] || IMAGE=$id
    elif [[ $state == @(pending|available) && ($mark == coming || $ACTION/$mark == update/@(None|used)) ]]; then
      IMAGE=$id # of a run that was stopped
    fi
  done
  if [[ $ACTION == update && -v STATE_OF[$IN_USE] ]]; then
    IMAGE=$IN_USE
  fi
  [[ $ACTION != rollback || (-n $IMAGE && $IN_USE != None) ]] \
    || problem "there is no earlier image of $ENV to go back to: --rebake --keep N keeps more of them"
  IMAGE_STATE=${STATE_OF[${IMAGE:-none}]:-pending}
}

# ensure_image REBOOT: a new image is begun here and ends by itself; a group does not need it before its first
# instance.
ensure_image() {
  local reboot=$1 id
  if [[ -z $IMAGE ]]; then
    make_image "$reboot"
  else
    report image "$IMAGE" "already there ($IMAGE_STATE)"
  fi
  if [[ $ACTION == rollback ]]; then
    mark_image "$ROLLED_BACK" leaving
    report image "$ROLLED_BACK" "replaced by $IMAGE, the one before"
  fi
  for id in "${IMAGES[@]}"; do
    [[ $ACTION/${MARK_OF[$id]} != update/coming || $id == "$IMAGE" ]] \
      || report image "$id" "waits for the --rebake that was stopped: run it again"
  done
}

make_image() {
  local reboot=$1 name device tags image_tags
  local -a devices=()
  name=$ASG_NAME-image-$(date -u +%Y%m%dT%H%M%SZ)
  # A volume that the base keeps when it ends must not outlive every fleet instance.
  if [[ $DEVICES != None ]]; then
    devices=(--block-device-mappings)
    for device in $DEVICES; do
      devices+=("DeviceName=$device,Ebs={DeleteOnTermination=true}")
    done
  fi
  tags=$(tags_json "$ASG_NAME") image_tags=$tags
  [[ $ACTION != rebake ]] || image_tags="[{\"Key\":\"comfy-image\",\"Value\":\"coming\"},${tags#[}"
  IMAGE=ami-new IMAGE_STATE=pending IMAGE_MADE=yes
  if [[ $DRY_RUN == no ]]; then
    IMAGE=$(ask_aws "make an image of $BASE_ID" ec2 create-image \
      --instance-id "$BASE_ID" \
      --name "$name" \
      --description "comfy-on-ec2: environment $ENV, made from $BASE_ID" \
      "--$reboot" \
      "${devices[@]}" \
      --tag-specifications "{\"ResourceType\":\"image\",\"Tags\":$image_tags}" "{\"ResourceType\":\"snapshot\",\"Tags\":$tags}" \
      --query ImageId \
      --output text)
  fi
  IMAGES+=("$IMAGE")
  STATE_OF[$IMAGE]=pending SNAPSHOTS_OF[$IMAGE]="" MARK_OF[$IMAGE]=None
  [[ $ACTION != rebake ]] || MARK_OF[$IMAGE]=coming
  report image "$IMAGE" "started ($name)"
}

# mark_image IMAGE MARK
mark_image() {
  [[ -v MARK_OF[$1] && ${MARK_OF[$1]} != "$2" ]] || return 0
  run_aws "mark the image $1" ec2 create-tags --resources "$1" --tags "Key=comfy-image,Value=$2"
  MARK_OF[$1]=$2
}

# store_object_info: what the base's ComfyUI has installed, its image has: send_job.py checks workflows against
# that before the first instance, which keeps it up to date, has been there. Nothing depends on it.
store_object_info() {
  local key=output/object_info.json.gz file digest
  [[ $IMAGE_MADE == yes && $COMFYUI_ANSWERS == yes ]] || return 0
  file=$(mktemp)
  if digest=$(python3 -c '
import gzip, hashlib, json, sys, urllib.request
text = json.dumps(json.load(urllib.request.urlopen(sys.argv[1], timeout=60)), sort_keys=True).encode()
open(sys.argv[2], "wb").write(gzip.compress(text))
print(hashlib.sha256(text).hexdigest())' "http://${COMFY_ADDRESS:-127.0.0.1:8188}/object_info" "$file" 2>/dev/null) \
    && { [[ $DRY_RUN == yes ]] || aws s3api put-object --bucket "$S3_BUCKET" --key "$key" --body "$file" \
      --content-type application/gzip --metadata "sha256=$digest" >/dev/null; }; then
    report nodes "s3://$S3_BUCKET/$key" updated
  else
    warn "what ComfyUI has installed is not stored, so workflows are checked only once an instance has been there"
  fi
  rm -f "$file"
}

# look_at_image: sets IMAGE_STATE, and what is known of IMAGE.
look_at_image() {
  local answer
  answer=$(ask_aws "look at the image $IMAGE" ec2 describe-images --image-ids "$IMAGE" \
    --query "Images[0].[State, join(' ', (BlockDeviceMappings || \`[]\`)[?Ebs.SnapshotId].Ebs.SnapshotId)]" --output text)
  IFS=$'\t' read -r IMAGE_STATE "SNAPSHOTS_OF[$IMAGE]" <<<"$answer"
  STATE_OF[$IMAGE]=$IMAGE_STATE
}

# wait_for_image: tells how far it is. Its snapshots are the environment's only ones that are not complete.
wait_for_image() {
  local progress shown="" deadline=$((SECONDS + IMAGE_WAIT_SECONDS))
  if [[ $DRY_RUN == yes ]]; then
    IMAGE_STATE=available STATE_OF[$IMAGE]=available
    return
  fi
  look_at_image
  while [[ $IMAGE_STATE == pending ]]; do
    ((SECONDS < deadline)) \
      || die "the image $IMAGE is still pending after $IMAGE_WAIT_SECONDS seconds: run this again later, it goes on by itself"
    progress=$(ask_aws "look at the snapshots of $ENV" ec2 describe-snapshots --owner-ids self \
      --filters "Name=tag:comfy-env,Values=$ENV" "Name=tag:comfy-prefix,Values=$PREFIX" Name=status,Values=pending \
      --query "join(' ', Snapshots[].Progress)" --output text)
    progress=${progress:-not known yet}
    [[ $progress == "$shown" ]] || report image "$IMAGE" "waiting until it can be used, some minutes: $progress"
    shown=$progress
    sleep "$POLL_SECONDS"
    look_at_image
  done
  [[ $IMAGE_STATE == available ]] || die "the image $IMAGE is $IMAGE_STATE: run this again to make another"
}

# settle_images KEEP: what remains to be done when the fleet has moved. Old images are removed where KEEP is a number.
# The marks come last: until then a run that is stopped is gone on with, and not begun anew.
settle_images() {
  local keep=$1 id
  [[ -z $keep ]] || remove_old_images "$keep"
  for id in "${IMAGES[@]}"; do
    case ${MARK_OF[$id]}:$id in
      coming:"$IMAGE") mark_image "$id" used ;;
      leaving:"$IMAGE") ;; # a --rollback that was stopped before it moved the fleet
      leaving:*) mark_image "$id" left ;;
    esac
  done
}

# remove_old_images KEEP: all but the one in use, one that --rebake goes on with, the latest KEEP that --rollback can
# go to, and those that an instance was started from.
remove_old_images() {
  local keep=$1 i id users kept=" "
  ((${#IMAGES[@]})) || return 0
  users=$(ask_aws "list the instances of $ENV" ec2 describe-instances \
    --filters "Name=image-id,Values=$(listed "${IMAGES[@]}")" \
    Name=instance-state-name,Values=pending,running,shutting-down,stopping,stopped \
    --query 'Reservations[].Instances[].ImageId' --output text)
  for ((i = ${#IMAGES[@]} - 1; i >= 0; i--)); do
    id=${IMAGES[i]}
    if [[ $id == "$IMAGE" || ${MARK_OF[$id]}/${STATE_OF[$id]} == coming/@(pending|available) ]]; then
      kept+="${SNAPSHOTS_OF[$id]} "
    elif [[ ${STATE_OF[$id]}/${MARK_OF[$id]} == available/@(None|used) ]] && ((keep > 0)); then
      report image "$id" "kept for --rollback"
      kept+="${SNAPSHOTS_OF[$id]} " keep=$((keep - 1))
    elif [[ $users == *"$id"* ]]; then
      report image "$id" "is used by an instance: --keep $1 removes it later"
      kept+="${SNAPSHOTS_OF[$id]} "
    else
      run_aws "remove the image $id" ec2 deregister-image --image-id "$id"
      report image "$id" removed
    fi
  done
  remove_snapshots "$kept"
}

# remove_snapshots KEPT: those of our images that are not in the list, also where an earlier run was stopped before.
remove_snapshots() {
  local kept=$1 id answer
  # An image that is being made may not tell its snapshots yet.
  [[ " ${STATE_OF[*]} " != *" pending "* ]] || return 0
  answer=$(ask_aws "list the snapshots of $ENV" ec2 describe-snapshots --owner-ids self \
    --filters "Name=tag:comfy-env,Values=$ENV" "Name=tag:comfy-prefix,Values=$PREFIX" "Name=tag:Name,Values=$ASG_NAME" \
    --query 'sort(Snapshots[].SnapshotId)' --output text)
  for id in $answer; do
    [[ $kept != *" $id "* ]] || continue
    if [[ $DRY_RUN == yes ]] || aws ec2 delete-snapshot --snapshot-id "$id"; then
      report snapshot "$id" removed
    else
      warn "the snapshot $id cannot be removed, see AWS's words above: is it part of another image?"
    fi
  done
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
  # What is not named here stays as the image has it.
  [[ -z $VOLUME_INIT_RATE ]] \
    || data+=",\"BlockDeviceMappings\":[{\"DeviceName\":\"$ROOT_DEVICE\",\"Ebs\":{\"VolumeInitializationRate\":$VOLUME_INIT_RATE,\"DeleteOnTermination\":true}}]"
  data+=",\"UserData\":\"$(user_data | base64 -w 0)\"}"
  printf '%s' "$data"
}

# ensure_template: sets VERSION. A version's description holds a digest of its data, which is how the next run sees
# whether the settings have changed. Going back to older data makes a new version too, so that a greater number is
# always the later one.
ensure_template() {
  local data digest answer number is_default label default=0 state="already there" description
  data=$(template_data)
  digest=$(sha256sum <<<"$data")
  description="comfy-on-ec2 $ENV ${digest:0:16}"
  VERSION=""
  if ! answer=$(aws ec2 describe-launch-template-versions --launch-template-name "$TEMPLATE_NAME" \
    --query "sort_by(LaunchTemplateVersions, &VersionNumber)[].[VersionNumber, DefaultVersion, VersionDescription]" \
    --output text 2>&1); then
    [[ $answer == *NotFound* ]] || die "cannot look at the launch template $TEMPLATE_NAME:$(one_line "$answer")"
    run_aws "create the launch template $TEMPLATE_NAME" ec2 create-launch-template \
      --launch-template-name "$TEMPLATE_NAME" \
      --version-description "$description" \
      --launch-template-data "$data" \
      --tag-specifications "{\"ResourceType\":\"launch-template\",\"Tags\":$(tags_json "$ASG_NAME")}"
    VERSION=1
    report template "$TEMPLATE_NAME" created
    return
  fi
  while IFS=$'\t' read -r number is_default label; do
    [[ $is_default != True ]] || default=$number VERSION=""
    [[ $label != "$description" ]] || VERSION=$number # the default, or of a run that was stopped right after it
  done <<<"$answer"
  if [[ $VERSION != "$default" ]]; then
    # No launch may meet an image that is not ready.
    [[ $IMAGE_STATE != pending ]] || wait_for_image
    [[ -n $VERSION ]] || add_version "$description" "$data"
    run_aws "make version $VERSION of the launch template $TEMPLATE_NAME its default" ec2 modify-launch-template \
      --launch-template-name "$TEMPLATE_NAME" \
      --default-version "$VERSION"
    state=updated
  fi
  report template "$TEMPLATE_NAME" "$state"
}

# add_version DESCRIPTION DATA: sets VERSION.
add_version() {
  VERSION=new
  [[ $DRY_RUN == no ]] || return 0
  VERSION=$(ask_aws "add a version to the launch template $TEMPLATE_NAME" ec2 create-launch-template-version \
    --launch-template-name "$TEMPLATE_NAME" \
    --version-description "$1" \
    --launch-template-data "$2" \
    --query LaunchTemplateVersion.VersionNumber \
    --output text)
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
  local answer min max subnets launches protected suspended metric pool version status state="already there" most=$MAX_INSTANCES
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
      Tags[?Key=='comfy-version'].Value | [0], Status]" \
    --output text)
  IFS=$'\t' read -r min max INSTANCES subnets launches protected suspended metric pool version status <<<"$answer"
  if [[ $min == None ]]; then
    create_group
    INSTANCES=$MIN_INSTANCES suspended=None metric=None pool=None version=$VERSION state=created
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
  # The worker of an instance with an older version leaves when it has no job. After the template, so that no instance
  # ever looks older than what would replace it.
  if [[ $version != "$VERSION" ]]; then
    run_aws "set the version of the group $ASG_NAME" autoscaling create-or-update-tags --tags \
      "ResourceId=$ASG_NAME,ResourceType=auto-scaling-group,Key=comfy-version,Value=$VERSION,PropagateAtLaunch=false"
    state=updated
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

# --- Watching --------------------------------------------------------------------------------

# ensure_alarms: the first adds an instance when messages wait and none is wanted; no FILL in it, which
# would make a 0 of a data point that is only late, so that the alarm never rings, or rings while the
# fleet works. The others tell ALARM_TOPIC, if there is one.
ensure_alarms() {
  ensure_policy
  ensure_alarm first-instance "messages wait and no instance is wanted" "$POLICY_ARN" 1 notBreaching \
    "IF(visible > 0 AND desired < 1, 1, 0)" \
    "$(queue_metric visible 60 ApproximateNumberOfMessagesVisible "$SQS_NAME")" \
    "$(group_metric desired 60 GroupDesiredCapacity)"
  # SQS publishes nothing of a queue that was empty and left alone for six hours: that is no alarm.
  ensure_alarm dead-letters "messages lie in the dead-letter queue" "$ALARM_TOPIC" 1 notBreaching \
    "IF(visible > 0, 1, 0)" \
    "$(queue_metric visible 60 ApproximateNumberOfMessagesVisible "$DLQ_NAME")"
  # The age counts messages in flight too: a long job alone, for which nobody waits, is no alarm.
  ensure_alarm oldest-message "messages wait and the oldest is older than $ALARM_AGE seconds" "$ALARM_TOPIC" 1 notBreaching \
    "IF(visible > 0 AND age > $ALARM_AGE, 1, 0)" \
    "$(queue_metric visible 60 ApproximateNumberOfMessagesVisible "$SQS_NAME")" \
    "$(queue_metric age 60 ApproximateAgeOfOldestMessage "$SQS_NAME")"
  ensure_alarm not-in-service "fewer instances than wanted are in service, for 15 minutes" "$ALARM_TOPIC" 15 notBreaching \
    "IF(serving < desired, 1, 0)" \
    "$(group_metric desired 60 GroupDesiredCapacity)" \
    "$(group_metric serving 60 GroupInServiceInstances)"
  # Here what SQS does not publish is 0: where no worker polls either, the instance is idle all the more.
  # And where nothing is known of the group, the alarm stays as it is.
  ensure_alarm idle-hour "more than $(instances "$MIN_INSTANCES") in service and no message, for an hour" "$ALARM_TOPIC" 12 ignore \
    "IF(serving > $MIN_INSTANCES AND (FILL(visible, 0) + FILL(running, 0)) < 1, 1, 0)" \
    "$(group_metric serving 300 GroupInServiceInstances)" \
    "$(queue_metric visible 300 ApproximateNumberOfMessagesVisible "$SQS_NAME")" \
    "$(queue_metric running 300 ApproximateNumberOfMessagesNotVisible "$SQS_NAME")"
}

# ensure_policy: sets POLICY_ARN. A step of +1 and no exact capacity: a sender may have raised it meanwhile.
# Looked up without the group, which --dry-run may not find.
ensure_policy() {
  local answer is
  answer=$(ask_aws "look at the scaling policy $ALARM_NAME" autoscaling describe-policies \
    --policy-names "$ALARM_NAME" \
    --query "ScalingPolicies[?AutoScalingGroupName=='$ASG_NAME'].[PolicyARN, join(' ', [PolicyType, AdjustmentType,
      to_string(StepAdjustments[].ScalingAdjustment), to_string(EstimatedInstanceWarmup)])] | [0] || ['None', 'None']" \
    --output text)
  IFS=$'\t' read -r POLICY_ARN is <<<"$answer"
  if [[ $DRY_RUN == yes || $is == "StepScaling ChangeInCapacity [1] $WARMUP_SECONDS" ]]; then return; fi
  POLICY_ARN=$(ask_aws "set the scaling policy $ALARM_NAME" autoscaling put-scaling-policy \
    --auto-scaling-group-name "$ASG_NAME" \
    --policy-name "$ALARM_NAME" \
    --policy-type StepScaling \
    --adjustment-type ChangeInCapacity \
    --step-adjustments "MetricIntervalLowerBound=0,ScalingAdjustment=1" \
    --estimated-instance-warmup "$WARMUP_SECONDS" \
    --query PolicyARN --output text)
}

# ensure_alarm NAME MEANING ACTION PERIODS ABSENT EXPRESSION METRIC...: an alarm that rings when EXPRESSION
# was 1 in so many periods in a row. ABSENT is what data that is missing counts for.
ensure_alarm() {
  local name=$ASG_NAME-$1 meaning=$2 action=$3 periods=$4 absent=$5 expression=$6 metrics found digest state=updated
  shift 6
  metrics=$(printf '%s,' "$@")
  local -a alarm=(--comparison-operator GreaterThanOrEqualToThreshold
    --threshold 1
    --evaluation-periods "$periods"
    --treat-missing-data "$absent"
    --metrics "[$metrics{\"Id\":\"rings\",\"Label\":\"$meaning\",\"ReturnData\":true,\"Expression\":\"$expression\"}]")
  [[ -z $action ]] || alarm+=(--alarm-actions "$action")
  found=$(ask_aws "look at the alarm $name" cloudwatch describe-alarms \
    --alarm-names "$name" \
    --query 'MetricAlarms[].AlarmDescription | [0]' --output text)
  # As in the launch template, a digest shows the next run what has changed.
  digest=$(sha256sum <<<"${alarm[*]}")
  if [[ $found == *" ${digest:0:16}" ]]; then
    report alarm "$name" "already there"
    return
  fi
  run_aws "set the alarm $name" cloudwatch put-metric-alarm \
    --alarm-name "$name" \
    --alarm-description "comfy-on-ec2 $ENV: $meaning ${digest:0:16}" \
    "${alarm[@]}" \
    --tags "$(tags_json "$name")"
  [[ $found != None ]] || state=created
  report alarm "$name" "$state"
}

# queue_metric ID PERIOD METRIC QUEUE
queue_metric() {
  metric_query "$1" "$2" AWS/SQS "$3" QueueName "$4"
}

# group_metric ID PERIOD METRIC
group_metric() {
  metric_query "$1" "$2" AWS/AutoScaling "$3" AutoScalingGroupName "$ASG_NAME"
}

metric_query() {
  printf '{"Id":"%s","ReturnData":false,"MetricStat":{"Stat":"Maximum","Period":%s,"Metric":{"Namespace":"%s","MetricName":"%s","Dimensions":[{"Name":"%s","Value":"%s"}]}}}' "$@"
}

# check_topic: a topic that does not exist would be told nothing, and nobody would know. Who may not look
# is believed.
check_topic() {
  local answer
  if [[ -n $ALARM_TOPIC ]] && ! answer=$(aws sns get-topic-attributes --topic-arn "$ALARM_TOPIC" 2>&1) && [[ $answer == *NotFound* ]]; then
    problem "ALARM_TOPIC is '$ALARM_TOPIC', but there is no such topic: create it, or correct it in $HERE/env"
  fi
}

ensure_dashboard() {
  local body answer state=updated
  body=$(dashboard_body)
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
  run_aws "set the dashboard $ASG_NAME" cloudwatch put-dashboard --dashboard-name "$ASG_NAME" --dashboard-body "$body"
  report dashboard "$ASG_NAME" "$state"
}

# dashboard_body: three widgets a row, below the states of the alarms. What the workers publish is in the
# namespace PREFIX/ENV.
dashboard_body() {
  local ours=$PREFIX/$ENV alarm alarms="" phase
  local -a phases=()
  for alarm in first-instance dead-letters oldest-message not-in-service idle-hour; do
    alarms+=",\"arn:$PARTITION:cloudwatch:$REGION:$ACCOUNT_ID:alarm:$ASG_NAME-$alarm\""
  done
  for phase in system cloud_init mount models comfyui; do
    phases+=("$(plot "\"label\":\"$phase\"" "$ours" BootSeconds Phase "$phase")")
  done
  printf '{"widgets":[{"type":"alarm","x":0,"y":0,"width":24,"height":2,"properties":{"title":"Alarms","alarms":[%s]}}' "${alarms#,}"
  widget 0 "Messages" '"stat":"Maximum"' \
    "$(plot '"label":"waiting"' AWS/SQS ApproximateNumberOfMessagesVisible QueueName "$SQS_NAME")" \
    "$(plot '"label":"running"' AWS/SQS ApproximateNumberOfMessagesNotVisible QueueName "$SQS_NAME")" \
    "$(plot '"label":"dead letters"' AWS/SQS ApproximateNumberOfMessagesVisible QueueName "$DLQ_NAME")"
  widget 1 "Age of the oldest message (seconds)" '"stat":"Maximum"' \
    "$(plot '"label":"oldest message"' AWS/SQS ApproximateAgeOfOldestMessage QueueName "$SQS_NAME")"
  widget 2 "Instances" '"stat":"Maximum"' \
    "$(plot '"label":"wanted"' AWS/AutoScaling GroupDesiredCapacity AutoScalingGroupName "$ASG_NAME")" \
    "$(plot '"label":"in service"' AWS/AutoScaling GroupInServiceInstances AutoScalingGroupName "$ASG_NAME")"
  widget 3 "Jobs per minute" '"stat":"Sum"' \
    "$(plot '"id":"rate","label":"jobs per minute","expression":"60 * (FILL(succeeded, 0) + FILL(failed, 0)) / PERIOD(succeeded)"')" \
    "$(plot '"id":"succeeded","visible":false' "$ours" JobsSucceeded)" \
    "$(plot '"id":"failed","visible":false' "$ours" JobsFailed)"
  widget 4 "Wait (seconds)" '"stat":"p50"' \
    "$(plot '"label":"p50"' "$ours" WaitSeconds)" "$(plot '"label":"p95","stat":"p95"' "$ours" WaitSeconds)"
  widget 5 "Run (seconds)" '"stat":"p50"' \
    "$(plot '"label":"p50"' "$ours" RunSeconds)" "$(plot '"label":"p95","stat":"p95"' "$ours" RunSeconds)"
  widget 6 "Failed jobs" '"stat":"Sum"' "$(plot '"label":"failed"' "$ours" JobsFailed)"
  widget 7 "GPU busy (percent)" '"stat":"Average","yAxis":{"left":{"min":0,"max":100}}' \
    "$(plot '"label":"busy"' "$ours" BusyShare)"
  widget 8 "Boot (seconds)" '"stat":"Average","stacked":true' "${phases[@]}"
  printf ']}'
}

# widget NUMBER TITLE PROPERTIES PLOT...
widget() {
  local number=$1 title=$2 properties=$3 plots
  shift 3
  plots=$(printf ',%s' "$@")
  printf ',\n{"type":"metric","x":%d,"y":%d,"width":8,"height":6,"properties":{"region":"%s","title":"%s","view":"timeSeries","period":60,%s,"metrics":[%s]}}' \
    $((8 * (number % 3))) $((2 + 6 * (number / 3))) "$REGION" "$title" "$properties" "${plots#,}"
}

# plot OPTIONS [NAMESPACE METRIC [DIMENSION VALUE]]
plot() {
  local options=$1
  shift
  printf '['
  (($# == 0)) || printf '"%s",' "$@"
  printf '{%s}]' "$options"
}

# --- The base machine's files ------------------------------------------------------------------

# move_data YES: ComfyUI's models, input and output go to the bucket, and links into the mounted bucket take their
# place, as start_service.sh makes them. A folder is only moved aside, to models.moved; that is removed when it was
# compared with the bucket once more, and somebody said yes.
move_data() {
  local yes=$1 name folder moved
  for name in models input output; do
    folder=$COMFY_HOME/ComfyUI/$name moved=$COMFY_HOME/ComfyUI/$name.moved
    [[ $DRY_RUN == no || -L $folder || ! -d $folder || -z $(ls -A "$folder") ]] || moved=$folder
    move_folder "$name" "$folder"
    if [[ -d $moved ]]; then
      free_disk "$name" "$moved" "$yes"
    elif [[ $DRY_RUN == no ]]; then
      rm -f -- "$folder.copied"
    fi
  done
}

# move_folder NAME FOLDER
move_folder() {
  local name=$1 folder=$2
  if [[ -L $folder ]]; then
    report folder "ComfyUI/$name" "already there: a link to $(readlink "$folder")"
    return
  fi
  if [[ -d $folder && -n $(ls -A "$folder") ]]; then
    [[ ! -e $folder.moved ]] \
      || die "$folder has files again, though it was moved to $folder.moved before: put the files of both into one of them, rename it to $name, and run this again"
    check_files "$folder"
    copy_folder "$name" "$folder"
    [[ $DRY_RUN == yes ]] || mv --no-target-directory "$folder" "$folder.moved" \
      || die "cannot move $folder aside, see above: its files are in the bucket and here"
  fi
  if [[ $DRY_RUN == no ]]; then
    [[ ! -d $folder ]] || rmdir "$folder"
    # A relative link stays right when the whole folder is moved or copied.
    ln --symbolic --relative "$COMFY_HOME/s3/$name" "$folder"
  fi
  report folder "ComfyUI/$name" "replaced by a link to s3/$name"
}

# check_files FOLDER: that all in it can be read, and has a place in S3.
check_files() {
  local folder=$1 odd
  # With -L a link counts as what it leads to, and as a link only where it leads nowhere.
  odd=$(find -L "$folder" \( ! -type f ! -type d -o ! -readable -o -name $'*[\n\t]*' \) -print) \
    || die "cannot read all of $folder: mend what is named above, and run this again"
  [[ -z $odd ]] \
    || die "these cannot be copied to S3, mend or remove them first (broken links, pipes, files that $(id -un) may not read, names with a tab or line break):$(one_line "$(head -n 5 <<<"$odd")")"
}

# copy_folder NAME FOLDER: to the bucket. Returns when every file is there with its size. The list FOLDER.copied holds
# the files as they were before they were copied: what has changed since is copied again, in this run or in the next.
copy_folder() {
  local name=$1 folder=$2 list=$2.copied target=s3://$S3_BUCKET/$1 try changed path
  local -a quietly=(--only-show-errors)
  [[ ! -t 1 ]] || quietly=()
  [[ -f $list ]] || refuse_conflicts "$name" "$folder"
  report files "ComfyUI/$name" "copying what is new, of $(du -shL "$folder" | cut -f 1) ..."
  if [[ $DRY_RUN == no ]]; then
    if [[ ! -f $list ]]; then
      list_files "$folder" >"$list.new"
      mv "$list.new" "$list"
    fi
    # --size-only: nothing that has its size there is ever overwritten.
    aws s3 sync --size-only "${quietly[@]}" "$folder" "$target" \
      || die "cannot copy all of $folder to $target, see AWS's words above: nothing was removed, run this again"
    for ((try = 1; ; try++)); do
      list_files "$folder" >"$list.new"
      changed=$(LC_ALL=C comm -13 "$list" "$list.new" | cut -f 2)
      [[ -n $changed ]] || break
      ((try <= 3)) \
        || die "files in $folder change all the time: stop what writes there (sudo systemctl stop comfyui comfy-manage), and run this again"
      while IFS= read -r path; do
        [[ $path == */ ]] || run_aws "copy $folder/$path" s3 cp --only-show-errors "$folder/$path" "$target/$path"
      done <<<"$changed"
      mv "$list.new" "$list"
    done
    mv "$list.new" "$list"
    while IFS= read -r path; do
      run_aws "make the folder $target/$path" s3api put-object --bucket "$S3_BUCKET" --key "$name/$path"
    done < <(cut -f 2 "$list" | grep '/$')
    changed=$(missing_files "$name" "$list")
    [[ -z $changed ]] \
      || die "these files of $folder did not arrive in $target with their size, so nothing was removed, run this again:$(one_line "$(head -n 5 <<<"$changed")")"
  fi
  report files "$target" "copied: $(list_files "$folder" | wc -l), each there with its size"
}

# list_files FOLDER: size, path and time of change of every file, sorted; a folder with nothing in it ends in /.
list_files() {
  find -L "$1" -mindepth 1 \( -type f -printf '%s\t%P\t%T@\n' -o -type d -empty -printf '0\t%P/\t-\n' \) | LC_ALL=C sort
}

# bucket_files NAME: size and path of every file below NAME/ in the bucket, sorted.
bucket_files() {
  local answer
  answer=$(ask_aws "list s3://$S3_BUCKET/$1" s3api list-objects-v2 --bucket "$S3_BUCKET" --prefix "$1/" \
    --query 'Contents[].[Size, Key]' --output text) || exit
  sed -n "s|^\([0-9]*\)\t$1/|\1\t|p" <<<"$answer" | LC_ALL=C sort
}

# missing_files NAME LIST: size and path of what the bucket has not, or not with this size. What cannot be found out
# counts as missing.
missing_files() {
  local here there
  if here=$(cut -f 1,2 "$2" | LC_ALL=C sort) && there=$(bucket_files "$1") \
    && LC_ALL=C comm -23 <(printf '%s\n' "$here") <(printf '%s\n' "$there"); then
    return
  fi
  printf 'not known, see above\n'
}

# refuse_conflicts NAME FOLDER: before the first copy. Which of two files with one name is the right one, only their
# owner knows.
refuse_conflicts() {
  local name=$1 folder=$2 there conflicts
  [[ $BUCKET_STATE != created ]] || return 0
  there=$(bucket_files "$name")
  conflicts=$(awk -F '\t' 'NR == FNR { size[$2] = $1; next } $2 in size && size[$2] != $1 { print $2 }' \
    <(list_files "$folder") - <<<"$there")
  [[ -z $conflicts ]] \
    || die "these files are in $folder and, with another size, in s3://$S3_BUCKET/$name: rename or remove one of each first:$(one_line "$(head -n 5 <<<"$conflicts")")"
}

# free_disk NAME MOVED YES: removes MOVED, if all that is in it was copied and is in the bucket still.
free_disk() {
  local name=$1 moved=$2 yes=$3 size changed missing answer="" list=$COMFY_HOME/ComfyUI/$1.copied
  size=$(du -sh "$moved" | cut -f 1)
  if [[ $DRY_RUN == no ]]; then
    # Without empty folders, of which a removal that was stopped leaves some.
    list_files "$moved" | sed $'/\\/\t-$/d' >"$list.new"
    touch "$list" # where it was lost, nothing is known to be copied
    changed=$(LC_ALL=C comm -13 "$list" "$list.new")
    missing=$(missing_files "$name" "$list.new")
    rm "$list.new"
    if [[ -n $changed$missing ]]; then
      warn "$moved has files that are not in the bucket, or not as they are here: it is kept; copy what is worth it to s3://$S3_BUCKET/$name, then remove it yourself"
      return
    fi
    if [[ $yes == no && -t 0 ]]; then
      printf 'All of %s is in the bucket. Remove it, which frees %s? Type yes: ' "$moved" "$size"
      read -r answer || printf '\n'
      [[ $answer != yes ]] || yes=yes
    fi
  fi
  if [[ $yes == no ]]; then
    report folder "ComfyUI/$name.moved" "kept, takes $size: run this again with --yes to remove it"
    return
  fi
  [[ $DRY_RUN == yes ]] || rm --recursive --force --one-file-system -- "$moved" "$list"
  report folder "ComfyUI/$name.moved" "removed, frees $size"
}

# --- Summary ---------------------------------------------------------------------------------

# say_dry_run: what stands in place of a summary then; fails when the run was no dry one.
say_dry_run() {
  [[ $DRY_RUN == yes ]] \
    && printf '\nThis is what would be done. Nothing was made, changed or removed (--dry-run).\n'
}

summarise() {
  local size
  if say_dry_run; then return; fi
  printf '\nEnvironment %s is ready: %s wanted now, %s to %s %s as jobs come and go.\n' \
    "$ENV" "$(instances "$INSTANCES")" "$MIN_INSTANCES" "$MAX_INSTANCES" "$(either_type)"
  ((SPOT_PERCENT == 0)) || printf 'Spot instances are %s %% of them.\n' "$SPOT_PERCENT"
  ((WARM_POOL == 0)) \
    || printf 'A warm pool keeps %s stopped and ready, of which the disks are paid for.\n' "$(instances "$WARM_POOL")"
  if ((MIN_INSTANCES == 0)); then
    size=$(ask_aws "look at the image $IMAGE" ec2 describe-images --image-ids "$IMAGE" \
      --query "sum((Images[0].BlockDeviceMappings || \`[]\`)[?Ebs.VolumeSize].Ebs.VolumeSize)" --output text)
    printf 'Idle, it costs no instance: only the storage of its files and its image (%s GB at most), and one to four USD a month for its alarms and dashboard.\n' \
      "${size%.*}"
  else
    printf 'Idle, it costs %s day and night, because MIN_INSTANCES is %s.\n' "$(instances "$MIN_INSTANCES")" "$MIN_INSTANCES"
  fi
  [[ $IMAGE_STATE != pending ]] \
    || printf 'The image goes on by itself; jobs can be sent now and are run once it is available.\n'
  [[ $S3_TRIGGER != yes ]] || printf 'A workflow that is dropped into s3://%s/input/jobs/ runs.\n' "$S3_BUCKET"
  show_links
  printf 'Next: ./send_job.py --env %s\n' "$ENV"
}

# show_links: where the environment is seen in the AWS console.
show_links() {
  local console=console.aws.amazon.com suffix=amazonaws.com
  case $PARTITION in
    aws-cn) console=console.amazonaws.cn suffix=amazonaws.com.cn ;;
    aws-us-gov) console=console.amazonaws-us-gov.com ;;
  esac
  printf 'Files      https://%s/s3/buckets/%s?region=%s\n' "$console" "$S3_BUCKET" "$REGION"
  printf 'Queue      https://%s/sqs/v3/home?region=%s#/queues/https%%3A%%2F%%2Fsqs.%s.%s%%2F%s%%2F%s\n' \
    "$console" "$REGION" "$REGION" "$suffix" "$ACCOUNT_ID" "$SQS_NAME"
  [[ $ENV != base ]] || return 0
  printf 'Fleet      https://%s/ec2/home?region=%s#AutoScalingGroupDetails:id=%s;view=activity\n' \
    "$console" "$REGION" "$ASG_NAME"
  printf 'Dashboard  https://%s/cloudwatch/home?region=%s#dashboards/dashboard/%s\n' "$console" "$REGION" "$ASG_NAME"
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

# --- Main ------------------------------------------------------------------------------------

# parse_arguments ARG...: sets NAME, ID, ACTION (update, rebake or rollback), KEEP and the other options.
parse_arguments() {
  local of_base="" of_fleet=""
  NAME="" ID="" ACTION=update KEEP="" REBOOT=no-reboot WITH_OUTPUT=no WAIT=no MOVE_DATA=no YES=no S3_TRIGGER=""
  while (($#)); do
    case $1 in
      --move-data | --yes) of_base=$1 ;;
      --rebake | --rollback | --keep | --reboot | --with-output | --s3-trigger | --no-s3-trigger | --wait) of_fleet=$1 ;;
    esac
    case $1 in
      -h | --help) usage && exit ;;
      --print-policy) print_policy "${2:-}" "${3:-$NAME}" "${@:4}" && exit ;;
      --dry-run) DRY_RUN=yes ;;
      --move-data) MOVE_DATA=yes ;;
      --yes) YES=yes ;;
      --rebake | --rollback)
        [[ $ACTION == update ]] || die "--rebake and --rollback are opposites: give one of them"
        ACTION=${1#--}
        ;;
      --keep)
        [[ ${2:-} =~ ^(0|[1-9][0-9]{0,2})$ ]] || die "--keep is followed by the number of images to keep, 0 to 999, not by '${2:-}'"
        KEEP=$2
        shift
        ;;
      --reboot) REBOOT=reboot ;;
      --with-output) WITH_OUTPUT=yes ;;
      --s3-trigger) S3_TRIGGER=yes ;;
      --no-s3-trigger) S3_TRIGGER=no ;;
      --wait) WAIT=yes ;;
      -*) die "the option '$1' is not known: see --help" ;;
      *)
        if [[ -z $NAME ]]; then NAME=$1; elif [[ -z $ID ]]; then ID=$1; else die "the argument '$1' is one too many: see --help"; fi
        ;;
    esac
    shift
  done
  [[ $NAME == base || -z $of_base ]] || die "$of_base belongs to ./create_env.sh base: see --help"
  [[ $NAME != base || -z $of_fleet$ID ]] || die "${of_fleet:-$ID} is not for base, the machine that environments are made from: see --help"
  [[ $ACTION != rebake || -n $KEEP ]] || KEEP=1
}

# prepare_base: what the base machine itself needs: a bucket and queues, no image and no group.
prepare_base() {
  check_queue_settings
  [[ $MOVE_DATA == no || -d $COMFY_HOME/ComfyUI ]] \
    || problem "there is no $COMFY_HOME/ComfyUI: --move-data is run on the base machine; if it is this one, correct COMFY_HOME in $HERE/env"
  check_account
  die_of_problems

  printf 'The base machine, in %s of account %s\n' "$REGION" "$ACCOUNT_ID"
  ensure_queues
  ensure_bucket
  [[ $MOVE_DATA == no ]] || move_data "$YES"
  if say_dry_run; then return; fi
  printf '\nThe bucket and the queues of the base machine are ready.\n'
  show_links
  printf 'Next: sudo systemctl restart comfyui comfy-manage, and when all works there: ./create_env.sh pro\n'
}

make_fleet() {
  check_everything "$ID"

  printf 'Environment %s from the base machine %s, in %s of account %s\n' "$ENV" "$BASE_ID" "$REGION" "$ACCOUNT_ID"
  report subnets "$SUBNETS" "$SUBNETS_ARE"
  ensure_queues
  ensure_profile
  ensure_image "$REBOOT"
  ensure_bucket
  ensure_trigger
  [[ $ACTION == rollback ]] || copy_files "$WITH_OUTPUT" # going back is to be fast
  ensure_template
  ensure_group
  ensure_alarms
  ensure_dashboard
  store_object_info
  settle_images "$KEEP"
  [[ $WAIT == no ]] || wait_for_image
  summarise
}

main() {
  parse_arguments "$@"
  choose_env "$NAME"
  if [[ $ENV == base ]]; then prepare_base; else make_fleet; fi
}

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
  main "$@"
fi
