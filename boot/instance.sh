#!/usr/bin/env bash
# What EC2 says of the instance that this is.

# Set by know_instance: its id and region; the lifecycle state that its group wants of it, None where it is in none;
# `template` where an environment's launch template gave it its user data, else `somebody`. The id is empty where EC2
# does not answer.
# shellcheck disable=SC2034 # other rooms read them
INSTANCE_ID="" INSTANCE_REGION="" LIFECYCLE_STATE=None LAUNCHED_BY=somebody

# shellcheck disable=SC2034
# know_instance: asks once. Python asks, because the worker does it so, and only the system's is there for sure.
know_instance() {
  local answer
  [[ -z $INSTANCE_ID ]] || return 0
  answer=$(cd "$HERE" && PYTHONDONTWRITEBYTECODE=1 python3 -c '
from worker.metadata import Metadata

metadata = Metadata()
of_template = "# First boot of an instance of the environment" in (metadata.user_data() or "")
print(*map(metadata.get, ("instance-id", "placement/region", "autoscaling/target-lifecycle-state")))
print("template" if of_template else "somebody")
' 2>/dev/null) || return 0
  read -r INSTANCE_ID INSTANCE_REGION LIFECYCLE_STATE LAUNCHED_BY <<<"${answer//$'\n'/ }"
}
