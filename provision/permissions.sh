#!/usr/bin/env bash
# Who may do what: the policies of the workers, of who sends jobs and of who runs these scripts; the workers' role.

PROFILE="" # ensure_profile: the instance profile of the workers

# print_policy WHO NAME: needs no AWS call, so that who has no permission yet can ask for one.
print_policy() {
  local who=$1 name=$2 policy
  (($# <= 2)) || die "the argument '$3' is one too many: see --help"
  [[ $who == worker || $who == sender || $who == operator ]] \
    || die "'$who' is no one's policy: use --print-policy worker, sender or operator"
  if [[ -z $name ]]; then
    name=$(load_env "$HERE/env" && printf '%s' "${ENV:-base}")
  fi
  choose_env "$name"
  check_profile
  policy=$(policy_of "$who")
  python3 -m json.tool <<<"$policy"
}

# policy_of WHO: worker, the instances; sender, who sends jobs, waits for them and fetches their results; or operator,
# who runs create_env.sh, delete_env.sh and fleet.py.
#
# A worker only reads models/, so that no job can change what all others load; on the base machine designers change
# everything through the mounted bucket. What it deletes in input/jobs/ is a job's inputs and its cancel.
#
# An operator makes and removes only what carries the environment's names or tags, and of base removes nothing. Images
# and snapshots have no account in their ARN. RunInstances is asked for when a group is made or changed, too: whether
# its maker could launch what the template says. Of a role or a profile that is not there yet AWS does not know the
# path. A service-linked role is for the account's first group and its first Spot instance. fleet.py's commands for dead
# letters need nearly all of SQS.
policy_of() {
  local -a templates=("policies/$1.json")
  case $1:$ENV in
    worker:base | operator:base) templates=("policies/$1-base.json") ;;
    operator:*)
      # Another profile's role most likely has its name, as where the console has made both.
      [[ -z $INSTANCE_PROFILE ]] || templates+=(policies/operator-profile.json)
      [[ -z $ALARM_TOPIC ]] || templates+=(policies/operator-topic.json)
      ;;
  esac
  fill "${templates[@]}"
}

# ensure_profile: sets PROFILE to the one that INSTANCE_PROFILE names, or to one with a role that may do what
# policy_of says and nothing else.
ensure_profile() {
  local answer path policy trust found state="already there"
  if [[ -n $INSTANCE_PROFILE ]]; then
    PROFILE=$INSTANCE_PROFILE
    answer=$(aws iam get-instance-profile --instance-profile-name "$PROFILE" 2>&1) \
      || die "cannot use the instance profile $PROFILE, see INSTANCE_PROFILE in $HERE/env:$(one_line "$answer")"
    report profile "$PROFILE" "already there"
    return
  fi
  PROFILE=$WORKER_ROLE
  policy=$(policy_of worker)
  path=$(ask_iam aws iam get-role --role-name "$WORKER_ROLE" --query Role.Path --output text)
  if [[ $path == None ]]; then
    trust=$(fill policies/trust.json)
    change "create the role $WORKER_ROLE" aws iam create-role \
      --role-name "$WORKER_ROLE" \
      --path "$WORKER_PATH" \
      --description "comfy-on-ec2: the instances of the environment $ENV in $REGION" \
      --assume-role-policy-document "$trust" \
      --tags "${OUR_TAGS[@]}" "Key=Name,Value=$WORKER_ROLE"
    made_now
    state=created
  elif [[ $path != "$WORKER_PATH" ]]; then
    die "the role $WORKER_ROLE is not this environment's (its path is $path, not $WORKER_PATH): write another ASG_NAME in $HERE/env, such as one with \${REGION}, or name an instance profile in INSTANCE_PROFILE"
  fi
  found=$(ask_iam aws iam get-role-policy --role-name "$WORKER_ROLE" --policy-name worker --query PolicyDocument --output json)
  if [[ ${found//[[:space:]]/} != "${policy//[[:space:]]/}" ]]; then
    change "set the policy of the role $WORKER_ROLE" aws iam put-role-policy \
      --role-name "$WORKER_ROLE" \
      --policy-name worker \
      --policy-document "$policy"
    [[ $state == created ]] || state=updated
  fi
  found=$(ask_iam aws iam get-instance-profile --instance-profile-name "$WORKER_ROLE" \
    --query "InstanceProfile.join(' ', [Path, Roles[0].RoleName || 'None'])" --output text)
  if [[ $found == None ]]; then
    change "create the instance profile $WORKER_ROLE" aws iam create-instance-profile \
      --instance-profile-name "$WORKER_ROLE" \
      --path "$WORKER_PATH" \
      --tags "${OUR_TAGS[@]}" "Key=Name,Value=$WORKER_ROLE"
    made_now
  fi
  if [[ $found != *" $WORKER_ROLE" ]]; then
    change "put the role into the instance profile $WORKER_ROLE" aws iam add-role-to-instance-profile \
      --instance-profile-name "$WORKER_ROLE" \
      --role-name "$WORKER_ROLE"
    [[ $state == created ]] || state=updated
  fi
  report profile "$WORKER_ROLE" "$state"
}

# ask_iam aws iam ...: prints the answer, or None where IAM has no such thing.
ask_iam() {
  local answer
  if answer=$("$@" 2>&1); then
    printf '%s' "$answer"
  elif [[ $answer == *NoSuchEntity* ]]; then
    printf None
  else
    die "cannot look at the role $WORKER_ROLE; where you may not, name an instance profile in INSTANCE_PROFILE in $HERE/env:$(one_line "$answer")"
  fi
}
