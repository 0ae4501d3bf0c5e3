#!/usr/bin/env bash
# The base machine, which environments are made from.

# What inspect_base finds of BASE_ID. VPC is empty where there is no such machine; SECURITY_GROUPS, DEVICES and KEY_NAME
# are None where the machine has none.
BASE_ID="" VPC="" SECURITY_GROUPS="" KEY_NAME="" DEVICES="" ROOT_DEVICE="" ARCHITECTURE=""
COMFYUI_ANSWERS=no # check_here: yes

# find_instance_id: of the machine this runs on.
find_instance_id() {
  local answer
  answer=$(cd "$HERE" && PYTHONDONTWRITEBYTECODE=1 python3 -c \
    'from worker.metadata import Metadata; print(Metadata().get("instance-id"))' 2>&1) \
    || die "this is not an EC2 instance, so far as can be seen (${answer##*$'\n'}): give the base machine's id, ${0##*/} $ENV i-..."
  printf '%s' "${answer##*$'\n'}"
}

# inspect_base INSTANCE_ID
inspect_base() {
  local id=$1 answer state platform
  BASE_ID=$id VPC=""
  if [[ ! $id =~ ^i-([0-9a-f]{8}|[0-9a-f]{17})$ ]]; then
    problem "'$id' is not an instance id: it looks like i-0123456789abcdef0"
    return
  fi
  # By a filter, not by --instance-ids: an unknown id is then an empty answer and not an error.
  answer=$(ask "look at the base machine $id" aws ec2 describe-instances \
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
  for file in env start_service.sh provision/common.sh parse_job.py worker/job.py ground/messages.py ComfyUI/main.py; do
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
