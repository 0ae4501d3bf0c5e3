#!/usr/bin/env bash
# The fleet's image, which is one of the base machine.
#
# The image that the launch template's default version names is the one in use. An image's tag comfy-image says
# what a run is doing to it, so that the next one can go on where it was stopped: `coming` while --rebake moves the
# fleet to it, then `used`; `leaving` while --rollback moves the fleet away from it, then `left`.

IMAGE_WAIT_SECONDS=${IMAGE_WAIT_SECONDS:-7200}

# find_images: the environment's images, the oldest first, what is known of each, and the one in use, or None.
IMAGES=() IN_USE=""
declare -A STATE_OF=() MARK_OF=() SNAPSHOTS_OF=()
# choose_image: the one that the fleet is to have (empty until ensure_image has made it), its state, and the one that
# --rollback moves away from. ensure_image: whether it has made one.
IMAGE="" IMAGE_STATE="" ROLLED_BACK="" IMAGE_MADE=no

find_images() {
  local answer id state mark snapshots
  answer=$(ask "list the images of $ENV" aws ec2 describe-images --owners self \
    --filters "${OUR_FILTERS[@]}" \
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
  local reboot=$1 name device mark="" tags
  local -a mappings=()
  name=$ASG_NAME-image-$(date -u +%Y%m%dT%H%M%SZ)
  # A volume that the base keeps when it ends must not outlive every fleet instance.
  if [[ $DEVICES != None ]]; then
    mappings=(--block-device-mappings)
    for device in $DEVICES; do
      mappings+=("DeviceName=$device,Ebs={DeleteOnTermination=true}")
    done
  fi
  tags="{Key=comfy-env,Value=$ENV},{Key=comfy-prefix,Value=$PREFIX},{Key=Name,Value=$ASG_NAME}"
  [[ $ACTION != rebake ]] || mark="{Key=comfy-image,Value=coming},"
  IMAGE=ami-new IMAGE_STATE=pending IMAGE_MADE=yes
  if [[ $DRY_RUN == no ]]; then
    IMAGE=$(ask "make an image of $BASE_ID" aws ec2 create-image \
      --instance-id "$BASE_ID" \
      --name "$name" \
      --description "comfy-on-ec2: environment $ENV, made from $BASE_ID" \
      "--$reboot" \
      "${mappings[@]}" \
      --tag-specifications "ResourceType=image,Tags=[$mark$tags]" "ResourceType=snapshot,Tags=[$tags]" \
      --query ImageId --output text)
    made_now
  fi
  IMAGES+=("$IMAGE")
  STATE_OF[$IMAGE]=pending SNAPSHOTS_OF[$IMAGE]="" MARK_OF[$IMAGE]=None
  [[ $ACTION != rebake ]] || MARK_OF[$IMAGE]=coming
  report image "$IMAGE" "started ($name)"
}

# mark_image IMAGE MARK
mark_image() {
  [[ -v MARK_OF[$1] && ${MARK_OF[$1]} != "$2" ]] || return 0
  change "mark the image $1" aws ec2 create-tags --resources "$1" --tags "Key=comfy-image,Value=$2"
  MARK_OF[$1]=$2
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
    progress=$(ask "look at the snapshots of $ENV" aws ec2 describe-snapshots --owner-ids self \
      --filters "${OUR_FILTERS[@]}" Name=status,Values=pending \
      --query "join(' ', Snapshots[].Progress)" --output text)
    progress=${progress:-not known yet}
    [[ $progress == "$shown" ]] || report image "$IMAGE" "waiting until it can be used, some minutes: $progress"
    shown=$progress
    sleep "$POLL_SECONDS"
    look_at_image
  done
  [[ $IMAGE_STATE == available ]] || die "the image $IMAGE is $IMAGE_STATE: run this again to make another"
}

# look_at_image: sets IMAGE_STATE, and what is known of IMAGE. By a filter, because one that was begun a moment ago may
# not be known yet, which would be an error otherwise.
look_at_image() {
  local answer
  answer=$(ask "look at the image $IMAGE" aws ec2 describe-images --filters "Name=image-id,Values=$IMAGE" \
    --query "Images[0].[State, join(' ', (BlockDeviceMappings || \`[]\`)[?Ebs.SnapshotId].Ebs.SnapshotId)]" --output text)
  IFS=$'\t' read -r IMAGE_STATE "SNAPSHOTS_OF[$IMAGE]" <<<"$answer"
  if [[ $IMAGE_STATE == None ]] && ((SECONDS < FRESH_UNTIL)); then IMAGE_STATE=pending; fi
  STATE_OF[$IMAGE]=$IMAGE_STATE
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
  users=$(ask "list the instances of $ENV" aws ec2 describe-instances \
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
      change "remove the image $id" aws ec2 deregister-image --image-id "$id"
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
  answer=$(ask "list the snapshots of $ENV" aws ec2 describe-snapshots --owner-ids self \
    --filters "${OUR_FILTERS[@]}" "Name=tag:Name,Values=$ASG_NAME" \
    --query 'sort(Snapshots[].SnapshotId)' --output text)
  for id in $answer; do
    [[ $kept != *" $id "* ]] || continue
    if [[ $DRY_RUN == yes ]] || answer=$(delete_snapshot "$id"); then
      report snapshot "$id" removed
    else
      warn "the snapshot $id cannot be removed; is it part of another image?$(one_line "$answer")"
    fi
  done
}

# store_object_info: what the base's ComfyUI has installed, its image has: send_job.py checks workflows against
# that before the first instance, which keeps it up to date, has been there, and the editor opens with it. Nothing
# else depends on it.
store_object_info() {
  local key=output/object_info.json.gz file stats digest
  [[ $IMAGE_MADE == yes && $COMFYUI_ANSWERS == yes ]] || return 0
  file=$(mktemp) stats=$(mktemp)
  if digest=$(python3 -c '
import gzip, hashlib, json, sys, urllib.error, urllib.request
def ask(path):
    return json.load(urllib.request.urlopen(sys.argv[1] + path, timeout=60))
try:
    replaced = ask("/node_replacements")
except urllib.error.HTTPError:  # before ComfyUI 0.14
    replaced = {}
nodes = {name: {"replaced_by": by} for name, by in replaced.items()} | ask("/object_info")
text = json.dumps(nodes, sort_keys=True).encode()
open(sys.argv[2], "wb").write(gzip.compress(text))
open(sys.argv[3], "w").write(json.dumps(ask("/system_stats")))
print(hashlib.sha256(text).hexdigest())' "http://${COMFY_ADDRESS:-127.0.0.1:8188}" "$file" "$stats" 2>/dev/null) \
    && { [[ $DRY_RUN == yes ]] || aws s3api put-object --bucket "$S3_BUCKET" --key "$key" --body "$file" \
      --content-type application/gzip --metadata "sha256=$digest" >/dev/null; } \
    && { [[ $DRY_RUN == yes ]] || aws s3api put-object --bucket "$S3_BUCKET" --key input/jobs/serve/system_stats \
      --body "$stats" --content-type application/json >/dev/null; }; then
    report nodes "s3://$S3_BUCKET/$key" updated
  else
    warn "what ComfyUI has installed is not stored, so workflows are checked only once an instance has been there"
  fi
  rm -f "$file" "$stats"
}
