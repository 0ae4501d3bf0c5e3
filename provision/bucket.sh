#!/usr/bin/env bash
# The environment's bucket, and what comes into it from the base bucket.

BUCKET_WAIT_SECONDS=${BUCKET_WAIT_SECONDS:-600} # for the name of a bucket that was deleted a moment ago

BUCKET_STATE=""     # ensure_bucket: created, updated or already there
OURS=yes CHANGED=no # whether the bucket is to be secured, and whether it was

ensure_bucket() {
  local owner state="already there"
  OURS=yes CHANGED=no
  owner=$(bucket_owner)
  if [[ $owner == gone ]]; then
    create_bucket
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

create_bucket() {
  local answer deadline=$((SECONDS + BUCKET_WAIT_SECONDS)) said=no
  local -a location=()
  [[ $DRY_RUN == no ]] || return 0
  # S3 refuses the name of its oldest region here.
  [[ $REGION == us-east-1 ]] || location=(--create-bucket-configuration "LocationConstraint=$REGION")
  until answer=$(aws s3api create-bucket --bucket "$S3_BUCKET" "${location[@]}" 2>&1); do
    [[ $answer == *OperationAborted* ]] \
      || die "cannot create the bucket $S3_BUCKET; if another account has its name, change S3_BUCKET in $HERE/env:$(one_line "$answer")"
    ((SECONDS < deadline)) \
      || die "AWS still keeps the name of the deleted bucket $S3_BUCKET after $BUCKET_WAIT_SECONDS seconds, which may take an hour: run this again later"
    [[ $said == yes ]] || report bucket "$S3_BUCKET" "was deleted a moment ago: AWS frees its name within some minutes, waiting"
    said=yes
    sleep "$POLL_SECONDS"
  done
  made_now
}

# claim_bucket OWNER: the tag says that delete_env.sh may remove the bucket, so one that was made
# elsewhere gets it only while it is empty (as it is when an earlier run was stopped right here).
# Sets OURS to no for one that stays somebody else's.
claim_bucket() {
  local owner=$1 keys
  case $owner in
    gone) ;; # made a moment ago
    None)
      keys=$(ask "list the bucket $S3_BUCKET" aws s3api list-objects-v2 --bucket "$S3_BUCKET" --max-keys 1 \
        --query KeyCount --output text)
      if ((keys)); then
        report bucket "$S3_BUCKET" "has files but no comfy-env tag: used, but its settings stay as they are, and delete_env.sh will leave it alone"
        OURS=no
        return
      fi
      ;;
    *) die "the bucket $S3_BUCKET belongs to the environment $owner: write S3_BUCKET with \${ENV} in $HERE/env" ;;
  esac
  change "tag the bucket $S3_BUCKET" aws s3api put-bucket-tagging \
    --bucket "$S3_BUCKET" \
    --tagging "TagSet=[{Key=comfy-env,Value=$ENV},{Key=comfy-prefix,Value=$PREFIX},{Key=Name,Value=$S3_BUCKET}]"
}

# secure_bucket: only what is not there is set: a key, a policy or lifecycle rules of somebody else stay.
secure_bucket() {
  local document
  if bucket_lacks public-access-block \
    'PublicAccessBlockConfiguration | BlockPublicAcls && IgnorePublicAcls && BlockPublicPolicy && RestrictPublicBuckets'; then
    change "set the public-access-block of the bucket $S3_BUCKET" aws s3api put-public-access-block \
      --bucket "$S3_BUCKET" \
      --public-access-block-configuration \
      BlockPublicAcls=true,IgnorePublicAcls=true,BlockPublicPolicy=true,RestrictPublicBuckets=true
  fi
  if bucket_lacks bucket-encryption \
    'ServerSideEncryptionConfiguration.Rules[0].ApplyServerSideEncryptionByDefault.SSEAlgorithm'; then
    document=$(fill bucket/encryption.json)
    change "set the bucket-encryption of the bucket $S3_BUCKET" aws s3api put-bucket-encryption \
      --bucket "$S3_BUCKET" \
      --server-side-encryption-configuration "$document"
  fi
  if bucket_lacks bucket-policy Policy; then
    document=$(fill policies/bucket.json)
    change "set the bucket-policy of the bucket $S3_BUCKET" aws s3api put-bucket-policy \
      --bucket "$S3_BUCKET" \
      --policy "$document"
  fi
  if bucket_lacks bucket-lifecycle-configuration 'Rules[0].Status'; then
    document=$(fill bucket/lifecycle.json)
    change "set the bucket-lifecycle-configuration of the bucket $S3_BUCKET" aws s3api put-bucket-lifecycle-configuration \
      --bucket "$S3_BUCKET" \
      --lifecycle-configuration "$document"
  fi
}

# bucket_lacks SETTING QUERY: QUERY finds nothing in it. Then it sets CHANGED.
bucket_lacks() {
  local setting=$1 query=$2 answer
  until answer=$(aws s3api "get-$setting" --bucket "$S3_BUCKET" --query "$query" --output text 2>&1); do
    ! is_late "$answer" || continue
    [[ $answer == *NoSuch*Configuration* || $answer == *NoSuchBucketPolicy* || $answer == *NotFoundError* ]] \
      || die "cannot look at the $setting of the bucket $S3_BUCKET:$(one_line "$answer")"
    answer=None
    break
  done
  [[ $answer == None || $answer == False ]] && CHANGED=yes
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
  copied=$(ask "copy s3://$BASE_S3_BUCKET to s3://$S3_BUCKET (run this again: what was copied stays)" \
    aws s3 "${how[@]}" "s3://$BASE_S3_BUCKET" "s3://$S3_BUCKET" --no-progress "${exclude[@]}")
  copied=$(grep -cE '^(\(dryrun\) )?copy: ' <<<"$copied") || copied=0
  if ((copied)); then
    report files "s3://$S3_BUCKET" "copied: $copied"
  else
    report files "s3://$S3_BUCKET" "already there"
  fi
}
