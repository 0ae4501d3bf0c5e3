#!/usr/bin/env bash
# The first boot of a fleet instance: its user data writes ENV into the settings, which the services wait for.

FIRST_BOOT_SECONDS=${FIRST_BOOT_SECONDS:-600}

# wait_for_first_boot: until the settings can be trusted. The user data's last step is a mark with the instance's id,
# which counts whatever cloud-init's other modules say: one of those that fails (`locale` was seen) makes `cloud-init
# status` fail, by some versions before the user data has run. The mark of an image is another instance's.
wait_for_first_boot() {
  local mark=$HERE/first-boot limit
  command -v cloud-init >/dev/null || return 0
  know_instance
  if [[ $LAUNCHED_BY == template ]]; then
    limit=$((SECONDS + FIRST_BOOT_SECONDS))
    until [[ -r $mark && $(<"$mark") == "$INSTANCE_ID" ]]; do
      # Else this instance might take the base machine's jobs.
      ((SECONDS < limit)) \
        || die "the user data has not come to its end in $FIRST_BOOT_SECONDS s, so ENV in $HERE/env cannot be trusted: see /var/log/cloud-init-output.log; an instance that is replaced boots anew"
      pause 0.2
    done
  elif [[ -n $INSTANCE_ID ]]; then
    # The base machine. Somebody's own user data may prepare disks.
    timeout "$FIRST_BOOT_SECONDS" cloud-init status --wait >/dev/null || say "cloud-init has not ended well: going on without it"
  else
    wait_for_cloud_init
  fi
}

# wait_for_cloud_init: EC2 does not tell what this is. 2: it finished, with errors it recovered from.
wait_for_cloud_init() {
  local code=0
  timeout "$FIRST_BOOT_SECONDS" cloud-init status --wait >/dev/null || code=$?
  ((code == 0 || code == 2)) \
    || die "cloud-init failed (exit code $code), and the instance metadata service does not answer, so ENV in $HERE/env cannot be trusted: see 'cloud-init status --long', mend it and reboot"
}
