#!/usr/bin/env bash
# What create_env.sh says in the end.

summarise() {
  local size
  if say_dry_run; then return; fi
  printf '\nEnvironment %s is ready: %s wanted now, %s to %s %s as jobs come and go.\n' \
    "$ENV" "$(instances "$INSTANCES")" "$MIN_INSTANCES" "$MAX_INSTANCES" "$(either_type)"
  ((SPOT_PERCENT == 0)) || printf 'Spot instances are %s %% of them.\n' "$SPOT_PERCENT"
  ((WARM_POOL == 0)) \
    || printf 'A warm pool keeps %s stopped and ready, of which the disks are paid for.\n' "$(instances "$WARM_POOL")"
  if ((MIN_INSTANCES == 0)); then
    size=$(ask "look at the image $IMAGE" aws ec2 describe-images --filters "Name=image-id,Values=$IMAGE" \
      --query "sum((Images[0].BlockDeviceMappings || \`[]\`)[?Ebs.VolumeSize].Ebs.VolumeSize)" --output text)
    printf 'Idle, it costs no instance: only the storage of its files and its image (%s GB at most), and one to four USD a month for its alarms and dashboard.\n' \
      "${size%.*}"
  else
    printf 'Idle, it costs %s day and night, because MIN_INSTANCES is %s.\n' "$(instances "$MIN_INSTANCES")" "$MIN_INSTANCES"
  fi
  [[ $IMAGE_STATE != pending ]] \
    || printf 'The image goes on by itself; jobs can be sent now and are run once it is available.\n'
  [[ $TRIGGER != yes ]] || printf 'A workflow that is dropped into s3://%s/input/jobs/ runs.\n' "$S3_BUCKET"
  [[ $EVENTS != yes ]] || printf 'EventBridge hears of each result.json in s3://%s, for rules of yours.\n' "$S3_BUCKET"
  show_links
  printf 'Next: ./send_job.py --env %s\n' "$ENV"
}

# say_dry_run: what stands in place of a summary then; fails when the run was no dry one.
say_dry_run() {
  [[ $DRY_RUN == yes ]] \
    && printf '\nThis is what would be done. Nothing was made, changed or removed (--dry-run).\n'
}

# show_links: where the environment is seen in the AWS console.
show_links() {
  local console=console.aws.amazon.com
  case $PARTITION in
    aws-cn) console=console.amazonaws.cn ;;
    aws-us-gov) console=console.amazonaws-us-gov.com ;;
  esac
  printf 'Files      https://%s/s3/buckets/%s?region=%s\n' "$console" "$S3_BUCKET" "$REGION"
  printf 'Queue      https://%s/sqs/v3/home?region=%s#/queues/https%%3A%%2F%%2Fsqs.%s.%s%%2F%s%%2F%s\n' \
    "$console" "$REGION" "$REGION" "$DNS_SUFFIX" "$ACCOUNT_ID" "$SQS_NAME"
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
