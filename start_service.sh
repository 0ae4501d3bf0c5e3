#!/usr/bin/env bash
#
# Starts one of an instance's two services. systemd runs it (see systemd/), on the base machine
# and on every fleet instance alike.
#
# Usage: start_service.sh comfyui | comfy-manage
#
#   comfyui       mounts the bucket at s3/, copies the models to local disk where
#                 COPY_MODEL_TO_LOCAL asks for it, links ComfyUI's models/, input/ and output/,
#                 then becomes ComfyUI, which logs to logs/comfyui.log as well; how long each step
#                 took since the machine was switched on is written to logs/boot.json
#   comfy-manage  becomes the worker, parse_job.py, which waits until ComfyUI answers
#
# Example: ./start_service.sh comfyui
#
# Both first wait for the user data, which writes ENV into the file `env` at first boot, and only then
# read `env`. Everything done already is found and left as it is, so a restart is
# always safe. Only a blank instance store is ever formatted.
set -euo pipefail

# shellcheck source=provision/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/provision/common.sh" # HERE, die, load_env, usage
for room in instance first_boot giving_up; do
  # shellcheck source=/dev/null
  source "$HERE/boot/$room.sh"
done

INSTANCE_STORE_MODEL="Amazon EC2 NVMe Instance Storage"
INSTANCE_STORE_LABEL=comfy-local
COPY_TRIES=3
COPY_PAUSE_SECONDS=${COPY_PAUSE_SECONDS:-10}
COPY_REQUESTS=32                       # at once, of the AWS CLI; its own default is 10
COPY_PARTS=16                          # of one file at once, of s5cmd; its own default is 5
BOOT_LIMIT_MS=${BOOT_LIMIT_MS:-300000} # a later start of a service is not part of the boot
LOG_LIMIT_BYTES=$((50 * 1024 * 1024))
WATCHDOG_SECONDS=${WATCHDOG_SECONDS:-30}

say() {
  printf '%s: %s\n' "${0##*/}" "$*"
}

# pause SECONDS: without a process that a stop of the service would have to kill.
pause() {
  read -r -t "$1" -u "$NOTHING" || true
}
exec {NOTHING}<> <(:) # a pipe on which nothing comes and that is never closed

# --- How long the boot takes -----------------------------------------------------------------

# now_ms: milliseconds since 1970. Bash writes the comma or the point of the locale.
now_ms() {
  local now=${EPOCHREALTIME/[.,]/}
  printf '%s' "${now%???}"
}

# begin_phases: the boot begins when the kernel does, unless the services were first started long after that, as on the
# base machine by hand. BOOTED_AT, seconds since 1970, is for a machine that has no kernel of its own (the local cloud).
begin_phases() {
  local uptime since
  read -r uptime _ </proc/uptime # to the hundredth of a second
  BOOTED_MS=$(($(now_ms) - 10#${uptime/./} * 10))
  [[ -z ${BOOTED_AT:-} ]] || BOOTED_MS=${BOOTED_AT}000
  since=$(starting_since)000
  ((since < BOOTED_MS + BOOT_LIMIT_MS)) || BOOTED_MS=$since
  PHASE_END_MS=$BOOTED_MS PHASES=""
}

# end_phase NAME: what has passed since the end of the phase before was NAME.
end_phase() {
  local now
  now=$(now_ms)
  PHASES+=", \"$1\": $(as_seconds $((now - PHASE_END_MS)))"
  PHASE_END_MS=$now
}

as_seconds() {
  printf '%d.%03d' $(($1 / 1000)) $(($1 % 1000))
}

# write_boot_report: once a boot. The last phase, until ComfyUI answers, is the worker's to add.
write_boot_report() {
  local file=$COMFY_HOME/logs/boot.json boot_id booted_at
  read -r boot_id </proc/sys/kernel/random/boot_id
  ! grep -qs "$boot_id" "$file" || return 0
  booted_at=$(date --utc --date "@$((BOOTED_MS / 1000))" +%Y-%m-%dT%H:%M:%SZ)
  # Renamed in one step, because the worker may be reading.
  if ! printf '{"booted_at": "%s", "boot_id": "%s", "comfyui_started_at": %s, "phases": {%s}}\n' "$booted_at" "$boot_id" \
    "$(as_seconds "$PHASE_END_MS")" "${PHASES#, }" 2>/dev/null >"$file.new" || ! mv --force "$file.new" "$file"; then
    say "cannot write $file: going on without it"
  fi
}

# --- Settings --------------------------------------------------------------------------------

# check_setting NAME PATTERN ALLOWED: refuses a value that does not match.
check_setting() {
  [[ ${!1} =~ ^($2)$ ]] || die "$1=${!1} in $HERE/env is not allowed: use $3"
}

load_settings() {
  local listen=127.0.0.1
  # Other settings may refer to ${COMFY_HOME}, so it is set first, unless `env` does it.
  grep -qs '^COMFY_HOME=' "$HERE/env" || export COMFY_HOME=${COMFY_HOME:-$HERE}
  load_env "$HERE/env"
  [[ -n ${REGION:-} ]] || die "REGION is not set in $HERE/env: write for example REGION=us-west-2"
  [[ -n ${S3_BUCKET:-} ]] || die "S3_BUCKET is not set in $HERE/env: copy its line from env.example"
  export AWS_DEFAULT_REGION=$REGION AWS_REGION=$REGION
  export ENV=${ENV:-base} COMFY_ADDRESS=${COMFY_ADDRESS:-127.0.0.1:8188}
  COPY_MODEL_TO_LOCAL=${COPY_MODEL_TO_LOCAL:-}
  # ComfyUI has no login: only the base machine opens it, to designers behind its security group.
  [[ $ENV != base ]] || listen=0.0.0.0
  COMFY_LISTEN=${COMFY_LISTEN:-$listen}
  check_setting ENV '[a-z0-9-]+' "lowercase letters, digits and hyphens"
  check_setting COMFY_ADDRESS '[A-Za-z0-9.-]+:[0-9]+' "HOST:PORT, for example 127.0.0.1:8188"
  check_setting COPY_MODEL_TO_LOCAL '|awscli|s5cmd' "awscli, s5cmd or nothing"
  [[ -d $COMFY_HOME ]] || die "COMFY_HOME=$COMFY_HOME is not a folder: correct it in $HERE/env"
  COMFY_HOME=$(cd "$COMFY_HOME" && pwd)
  MOUNT=$COMFY_HOME/s3
  LOCAL=$COMFY_HOME/local
}

need_command() {
  command -v "$1" >/dev/null || die "cannot run $1 (PATH is $PATH): $2"
}

# --- comfyui: the bucket ---------------------------------------------------------------------

mount_bucket() {
  local answer
  # A killed mount-s3 leaves a mount that answers every call with this error.
  if ! answer=$(LC_ALL=C stat "$MOUNT" 2>&1) && [[ $answer == *"Transport endpoint is not connected"* ]]; then
    say "$MOUNT is a dead mount: unmounting it"
    fusermount -uz "$MOUNT" || die "cannot unmount the dead mount $MOUNT: try 'sudo umount --lazy $MOUNT'"
  fi
  mkdir -p "$MOUNT"
  if mountpoint -q "$MOUNT"; then
    say "$MOUNT is mounted already"
    return
  fi
  need_command mount-s3 "install Mountpoint for Amazon S3"
  # Models that are read through the mount are read again from an instance store. `minimal`, because
  # the cache would otherwise take a minute to see that an input has changed.
  if [[ -z $COPY_MODEL_TO_LOCAL ]] && prepare_local_disk; then
    install -d -m 700 "$LOCAL/cache"
    # It only makes things faster, and a Mountpoint older than 1.7 does not know the options.
    if mount_s3 --cache "$LOCAL/cache" --metadata-ttl minimal; then return; fi
    say "cannot mount with a cache in $LOCAL/cache: mounting without it"
  fi
  mount_s3 || die "cannot mount the bucket $S3_BUCKET at $MOUNT: see the message above; does the bucket exist, and may this instance's role use it?"
}

# mount_s3 OPTION...: region and endpoint reach it by AWS_REGION and AWS_ENDPOINT_URL.
mount_s3() {
  mount-s3 --allow-delete --allow-overwrite "$@" "$S3_BUCKET" "$MOUNT"
}

# link_folder NAME TARGET: makes ComfyUI/NAME a link to TARGET, unless somebody has put something
# of their own there.
link_folder() {
  local link=$COMFY_HOME/ComfyUI/$1 target=$2 home now
  home=$(realpath "$COMFY_HOME")
  mkdir -p "$target"
  if [[ -L $link ]]; then
    now=$(realpath --canonicalize-missing "$link")
    [[ $now != "$(realpath "$target")" ]] || return 0
    if [[ $now/ != "$home"/s3/* && $now/ != "$home"/local/* ]]; then
      say "$link points to $now: left alone"
      return
    fi
    rm "$link"
  elif [[ -d $link ]] && ! rmdir "$link" 2>/dev/null; then
    say "$link is a folder with files in it: left alone (to share them, move them to $target and start again)"
    return
  fi
  # A relative link stays right when the whole folder is moved or copied.
  ln --symbolic --relative "$target" "$link"
  say "$link now points to $target"
}

# --- comfyui: the instance store -------------------------------------------------------------

# is_blank DEVICE: no partitions, no file system, not mounted; and a look at the disk itself finds
# no signature either. In doubt: not blank.
is_blank() {
  local rows found
  mapfile -t rows < <(lsblk --noheadings --output NAME,FSTYPE,LABEL,MOUNTPOINT "$1")
  [[ ${#rows[@]} == 1 && ${rows[0]} =~ ^[^[:space:]]+[[:space:]]*$ ]] || return 1
  found=$(sudo -n wipefs "$1" </dev/null) || return 1
  [[ -z $found ]]
}

# find_instance_store: prints the first instance store that carries our label or, failing that,
# is blank; fails when there is none.
find_instance_store() {
  local device model blank=
  command -v lsblk >/dev/null || return 1
  while read -r device model; do
    [[ $model == "$INSTANCE_STORE_MODEL" ]] || continue
    if [[ $(lsblk --nodeps --noheadings --raw --output LABEL,MOUNTPOINT "$device") =~ ^${INSTANCE_STORE_LABEL}[[:space:]]*$ ]]; then
      printf '%s\n' "$device"
      return
    fi
    if [[ -z $blank ]] && is_blank "$device"; then blank=$device; fi
  done < <(lsblk --nodeps --noheadings --paths --output NAME,MODEL)
  [[ -n $blank ]] && printf '%s\n' "$blank"
}

# prepare_local_disk: mounts the instance store at local/. Fails when there is none we may use: then
# local/ is a folder on the root disk.
prepare_local_disk() {
  local device
  mkdir -p "$LOCAL"
  if mountpoint -q "$LOCAL"; then
    say "$LOCAL is mounted already"
    return
  fi
  if ! device=$(find_instance_store); then
    say "there is no free instance store"
    return 1
  fi
  if ! mount_instance_store "$device"; then
    say "cannot use the instance store $device (see above)"
    return 1
  fi
  say "the instance store $device is mounted at $LOCAL"
}

mount_instance_store() {
  if is_blank "$1"; then
    say "formatting the blank instance store $1"
    sudo -n mkfs.ext4 -q -L "$INSTANCE_STORE_LABEL" "$1" || return
  fi
  sudo -n mount -o noatime "$1" "$LOCAL" && sudo -n chown "$(id -u):$(id -g)" "$LOCAL"
}

# --- comfyui: models on local disk -----------------------------------------------------------

# fetch_models: makes local/models what s3://…/models/ is. A model that was removed from the bucket
# goes from a fleet instance too. It stays on the base machine, where a designer may have put into
# this very folder a model that is nowhere else.
fetch_models() {
  local source=s3://$S3_BUCKET/models/ target=$LOCAL/models endpoint=() delete=() config=()
  # s5cmd and older AWS CLIs do not read this variable.
  [[ -z ${AWS_ENDPOINT_URL:-} ]] || endpoint=(--endpoint-url "$AWS_ENDPOINT_URL")
  [[ $ENV == base ]] || delete=(--delete)
  if [[ $COPY_MODEL_TO_LOCAL == awscli ]]; then
    # Requests at once are set only in a configuration file. One that this machine has decides, because
    # its credentials may be in it.
    if [[ ! -s ${AWS_CONFIG_FILE:-$HOME/.aws/config} ]]; then
      printf '[default]\ns3 =\n  max_concurrent_requests = %s\n' "$COPY_REQUESTS" >"$LOCAL/aws-config"
      config=(env "AWS_CONFIG_FILE=$LOCAL/aws-config")
    fi
    # Without --exact-timestamps a model replaced by one of the same size is not noticed.
    "${config[@]}" aws "${endpoint[@]}" s3 sync --exact-timestamps --no-progress "${delete[@]}" "$source" "$target"
    return
  fi
  # s5cmd is fast, but when it cannot list the bucket it exits with 0, and with --delete it then
  # removes what is here (seen in 2.3.0). So: --exit-on-error, which fails on an empty folder, hence
  # the file; and the AWS CLI has the last word on what is there and what must go.
  touch "$target/.s5cmd" \
    && s5cmd "${endpoint[@]}" sync --exit-on-error --concurrency "$COPY_PARTS" "$source*" "$target/" \
    && aws "${endpoint[@]}" s3 sync --size-only --no-progress "${delete[@]}" "$source" "$target"
}

copy_models() {
  local try models=$COMFY_HOME/ComfyUI/models
  if ! prepare_local_disk; then say "models are copied to the root disk"; fi
  mkdir -p "$LOCAL/models"
  say "copying s3://$S3_BUCKET/models/ to $LOCAL/models"
  for ((try = 1; ; try++)); do
    if fetch_models; then break; fi
    ((try < COPY_TRIES)) \
      || die "cannot copy s3://$S3_BUCKET/models/ to $LOCAL/models in $COPY_TRIES tries: see the messages above; is the disk full (df -h $LOCAL)?"
    say "copying the models failed: trying again in $COPY_PAUSE_SECONDS s"
    pause "$COPY_PAUSE_SECONDS"
  done
  if [[ -d $models && ! -L $models ]] && ! rmdir "$models" 2>/dev/null; then
    say "moving the folder $models aside to models.before-copy"
    mv --backup=numbered --no-target-directory "$models" "$models.before-copy"
  fi
}

# --- comfyui: the server ---------------------------------------------------------------------

# log_to FILE: from here on output goes to FILE as well. ComfyUI matters more than its log: an
# unwritable folder only costs the file, and tee goes on when the disk is full. tee ignores
# SIGTERM so that it hears ComfyUI's last words; it ends when ComfyUI does.
log_to() {
  local file=$1
  if ! mkdir -p "${file%/*}" 2>/dev/null || ! touch "$file" 2>/dev/null; then
    say "cannot write $file: going on without it"
    return
  fi
  if (($(stat --format %s "$file") > LOG_LIMIT_BYTES)); then mv --force "$file" "$file.1"; fi
  exec > >(trap '' TERM && exec tee --append --output-error=warn-nopipe "$file") 2>&1
}

start_comfyui() {
  local arguments extra copying python=${COMFYUI_PYTHON:-$COMFY_HOME/venv/bin/python}
  log_to "$COMFY_HOME/logs/comfyui.log"
  [[ -f $COMFY_HOME/ComfyUI/main.py ]] || die "there is no ComfyUI in $COMFY_HOME/ComfyUI: install it there, or set COMFY_HOME in $HERE/env"
  need_command "$python" "make the virtual environment, or set COMFYUI_PYTHON in $HERE/env"
  # The copy goes on beside all that does not need it. ComfyUI does: it answers as soon as it runs, and
  # then jobs come; and some custom nodes look only once which models there are.
  if [[ -n $COPY_MODEL_TO_LOCAL ]]; then
    need_command aws "install the AWS CLI"
    [[ $COPY_MODEL_TO_LOCAL != s5cmd ]] || need_command s5cmd "install s5cmd 2.2 or newer, or set COPY_MODEL_TO_LOCAL=awscli"
    copy_models &
    copying=$!
  fi
  mount_bucket
  link_folder input "$MOUNT/input"
  link_folder output "$MOUNT/output"
  end_phase mount
  if [[ -n $COPY_MODEL_TO_LOCAL ]]; then
    # A new instance fetches each block of its disk from S3 when it is first read: those of PyTorch,
    # gigabytes of them, meanwhile.
    "$python" -c 'import torch' >/dev/null 2>&1 &
    wait "$copying" || exit 1 # it has said why
    link_folder models "$LOCAL/models"
    end_phase models
  else
    link_folder models "$MOUNT/models"
  fi

  arguments=(--listen "$COMFY_LISTEN" --port "${COMFY_ADDRESS##*:}")
  if [[ $ENV != base ]]; then
    # The worker uploads from here; on the base machine designers see output/ in the bucket.
    mkdir -p "$COMFY_HOME/job-output"
    arguments+=(--output-directory "$COMFY_HOME/job-output")
  fi
  read -ra extra <<<"${COMFYUI_ARGS:-}"
  cd "$COMFY_HOME/ComfyUI"
  export PYTHONUNBUFFERED=1 # or the log lags behind by a pipe's buffer
  write_boot_report
  say "starting ComfyUI for ENV=$ENV on $COMFY_LISTEN:${COMFY_ADDRESS##*:}"
  exec "$python" main.py "${arguments[@]}" "${extra[@]}"
}

# --- comfy-manage ----------------------------------------------------------------------------

# tell_systemd: that the service is up, and then again and again that it lives; until stop_telling,
# after which the worker does so itself.
tell_systemd() {
  [[ -n ${NOTIFY_SOCKET:-} ]] || return 0
  systemd-notify --ready
  # It reads a pipe that is closed when this script ends, however that comes about; until then the read times out. No
  # process is left that systemd would have to kill.
  exec {TELLER}> >(
    while read -r -t "$WATCHDOG_SECONDS" || (($? > 128)); do systemd-notify WATCHDOG=1; done >/dev/null 2>&1
  )
}

stop_telling() {
  [[ -z ${TELLER:-} ]] || exec {TELLER}>&-
}

# start_worker: at once, so that it has imported and connected everything when ComfyUI answers.
start_worker() {
  local python=$COMFY_HOME/venv/bin/python
  need_command "$python" "make the virtual environment and install requirements.txt in it"
  [[ -f $COMFY_HOME/parse_job.py ]] || die "there is no parse_job.py in $COMFY_HOME: set COMFY_HOME in $HERE/env to the folder of the scripts"
  say "starting the worker for ENV=$ENV, which waits for ComfyUI on $COMFY_ADDRESS"
  cd "$COMFY_HOME"
  stop_telling
  # Each job has threads of its own, which spread over eight heaps a core. By default glibc raises this limit by itself,
  # and each heap keeps what its largest jobs took, so that the worker would grow for thousands of jobs.
  MALLOC_TRIM_THRESHOLD_=131072 exec "$python" parse_job.py
}

main() {
  case $#:${1:-} in
    1:-h | 1:--help)
      usage
      return
      ;;
    1:comfyui | 1:comfy-manage) ;;
    *)
      usage >&2
      exit 2
      ;;
  esac
  note_start
  begin_phases
  end_phase system
  [[ $1 == comfyui ]] || tell_systemd
  give_up_if_due
  wait_for_first_boot
  end_phase cloud_init
  load_settings
  if [[ $1 == comfyui ]]; then start_comfyui; else start_worker; fi
}

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
  main "$@"
fi
