#!/usr/bin/env bash
# The launch template: what an instance of the fleet is.

VERSION="" # ensure_template: the version of the template that counts

# ensure_template: sets VERSION. A version's description holds a digest of its data, which is how the next run sees
# whether the settings have changed. Going back to older data makes a new version too, so that a greater number is
# always the later one.
ensure_template() {
  local data answer number is_default label default=0 state="already there" description
  data=$(template_data)
  description="comfy-on-ec2 $ENV $(digest "$data")"
  VERSION=""
  if ! answer=$(aws ec2 describe-launch-template-versions --launch-template-name "$TEMPLATE_NAME" \
    --query "sort_by(LaunchTemplateVersions, &VersionNumber)[].[VersionNumber, DefaultVersion, VersionDescription]" \
    --output text 2>&1); then
    [[ $answer == *NotFound* ]] || die "cannot look at the launch template $TEMPLATE_NAME:$(one_line "$answer")"
    change "create the launch template $TEMPLATE_NAME" aws ec2 create-launch-template \
      --launch-template-name "$TEMPLATE_NAME" \
      --version-description "$description" \
      --launch-template-data "$data" \
      --tag-specifications \
      "ResourceType=launch-template,Tags=[{Key=comfy-env,Value=$ENV},{Key=comfy-prefix,Value=$PREFIX},{Key=Name,Value=$ASG_NAME}]"
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
    change "make version $VERSION of the launch template $TEMPLATE_NAME its default" aws ec2 modify-launch-template \
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
  VERSION=$(ask "add a version to the launch template $TEMPLATE_NAME" aws ec2 create-launch-template-version \
    --launch-template-name "$TEMPLATE_NAME" \
    --version-description "$1" \
    --launch-template-data "$2" \
    --query LaunchTemplateVersion.VersionNumber --output text)
}

# template_data: what is not named in it stays as the image has it. The order counts in the digest: another one would
# be a new version, for which every instance is replaced.
template_data() {
  local user_data
  local -a templates=(launch-template/machine.json)
  user_data=$(user_data | base64 -w 0)
  [[ $SECURITY_GROUPS == None ]] || templates+=(launch-template/groups.json)
  templates+=(launch-template/profile.json)
  [[ $KEY_NAME == None ]] || templates+=(launch-template/key.json)
  [[ -z $VOLUME_INIT_RATE ]] || templates+=(launch-template/volume.json)
  fill "${templates[@]}" launch-template/user-data.json USER_DATA="$user_data"
}

# user_data: what a fleet instance runs at its first boot, before its services start.
user_data() {
  fill launch-template/user-data.sh BASE_HOME="$COMFY_HOME"
}
