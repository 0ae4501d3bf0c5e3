#!/usr/bin/env bash
# Checks before anything is made: of the settings, and of what AWS has for them.

TYPES=() # the instance types of a mixed group; empty where the group has the launch template's one type

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

# check_types: that the fleet's types are to be had where the subnets are, and fit the base machine.
check_types() {
  local type answer offered vcpus architectures
  local -a wanted=("${TYPES[@]:-$INSTANCE_TYPE}") missing=()
  local -A vcpus_of=()
  offered=$(try "list the instance types of $ZONES" aws ec2 describe-instance-type-offerings \
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
  answer=$(try "look at the instance types" aws ec2 describe-instance-types \
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
  if ! quota=$(aws service-quotas get-service-quota --service-code ec2 --quota-code "$code" \
    --region "$REGION" --query Quota.Value --output text 2>&1); then
    warn "whether the account may run $count $type ($kind) is not checked, see Service Quotas, Amazon EC2:$(one_line "$quota")"
    return
  fi
  quota=${quota##*$'\n'} # the last line, in case the CLI had a warning
  quota=${quota%.*}
  ((count * vcpus <= quota)) \
    || warn "MAX_INSTANCES is $MAX_INSTANCES, but the account may run only $((quota / vcpus)) $type ($kind) at a time, because its quota is $quota vCPUs: aws service-quotas request-service-quota-increase --region $REGION --service-code ec2 --quota-code $code --desired-value $((count * vcpus))"
}

# check_cli: that the AWS CLI knows what a setting asks for. It refuses what is newer than itself.
check_cli() {
  local skeleton version
  [[ -n $VOLUME_INIT_RATE ]] || return 0
  skeleton=$(aws ec2 create-launch-template --generate-cli-skeleton input) || return 0
  [[ $skeleton != *VolumeInitializationRate* ]] || return 0
  version=$(aws --version)
  problem "VOLUME_INIT_RATE is $VOLUME_INIT_RATE, which this AWS CLI does not know ($version): install a newer one, or take the setting out of $HERE/env"
}

# check_topic: a topic that does not exist would be told nothing, and nobody would know. Who may not look
# is believed.
check_topic() {
  local answer
  if [[ -n $ALARM_TOPIC ]] && ! answer=$(aws sns get-topic-attributes --topic-arn "$ALARM_TOPIC" 2>&1) && [[ $answer == *NotFound* ]]; then
    problem "ALARM_TOPIC is '$ALARM_TOPIC', but there is no such topic: create it, or correct it in $HERE/env"
  fi
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
