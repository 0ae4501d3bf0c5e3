#!/usr/bin/env bash
# ComfyUI's models, input and output on the base machine: to its bucket (create_env.sh base --move-data).

# move_data YES: ComfyUI's models, input and output go to the bucket, and links into the mounted bucket take their
# place, as start_service.sh makes them. A folder is only moved aside, to models.moved; that is removed when it was
# compared with the bucket once more, and somebody said yes.
move_data() {
  local yes=$1 name folder moved
  for name in models input output; do
    folder=$COMFY_HOME/ComfyUI/$name moved=$COMFY_HOME/ComfyUI/$name.moved
    [[ $DRY_RUN == no || -L $folder || ! -d $folder || -z $(ls -A "$folder") ]] || moved=$folder
    move_folder "$name" "$folder"
    if [[ -d $moved ]]; then
      free_disk "$name" "$moved" "$yes"
    elif [[ $DRY_RUN == no ]]; then
      rm -f -- "$folder.copied"
    fi
  done
}

# move_folder NAME FOLDER
move_folder() {
  local name=$1 folder=$2
  if [[ -L $folder ]]; then
    report folder "ComfyUI/$name" "already there: a link to $(readlink "$folder")"
    return
  fi
  if [[ -d $folder && -n $(ls -A "$folder") ]]; then
    [[ ! -e $folder.moved ]] \
      || die "$folder has files again, though it was moved to $folder.moved before: put the files of both into one of them, rename it to $name, and run this again"
    check_files "$folder"
    copy_folder "$name" "$folder"
    [[ $DRY_RUN == yes ]] || mv --no-target-directory "$folder" "$folder.moved" \
      || die "cannot move $folder aside, see above: its files are in the bucket and here"
  fi
  if [[ $DRY_RUN == no ]]; then
    [[ ! -d $folder ]] || rmdir "$folder"
    # A relative link stays right when the whole folder is moved or copied.
    ln --symbolic --relative "$COMFY_HOME/s3/$name" "$folder"
  fi
  report folder "ComfyUI/$name" "replaced by a link to s3/$name"
}

# check_files FOLDER: that all in it can be read, and has a place in S3.
check_files() {
  local folder=$1 odd
  # With -L a link counts as what it leads to, and as a link only where it leads nowhere.
  odd=$(find -L "$folder" \( ! -type f ! -type d -o ! -readable -o -name $'*[\n\t]*' \) -print) \
    || die "cannot read all of $folder: mend what is named above, and run this again"
  [[ -z $odd ]] \
    || die "these cannot be copied to S3, mend or remove them first (broken links, pipes, files that $(id -un) may not read, names with a tab or line break):$(one_line "$(head -n 5 <<<"$odd")")"
}

# copy_folder NAME FOLDER: to the bucket. Returns when every file is there with its size. The list FOLDER.copied holds
# the files as they were before they were copied: what has changed since is copied again, in this run or in the next.
copy_folder() {
  local name=$1 folder=$2 list=$2.copied target=s3://$S3_BUCKET/$1 try changed path
  local -a quietly=(--only-show-errors)
  [[ ! -t 1 ]] || quietly=()
  [[ -f $list ]] || refuse_conflicts "$name" "$folder"
  report files "ComfyUI/$name" "copying what is new, of $(du -shL "$folder" | cut -f 1) ..."
  if [[ $DRY_RUN == no ]]; then
    if [[ ! -f $list ]]; then
      list_files "$folder" >"$list.new"
      mv "$list.new" "$list"
    fi
    # --size-only: nothing that has its size there is ever overwritten.
    aws s3 sync --size-only "${quietly[@]}" "$folder" "$target" \
      || die "cannot copy all of $folder to $target, see AWS's words above: nothing was removed, run this again"
    for ((try = 1; ; try++)); do
      list_files "$folder" >"$list.new"
      changed=$(LC_ALL=C comm -13 "$list" "$list.new" | cut -f 2)
      [[ -n $changed ]] || break
      ((try <= 3)) \
        || die "files in $folder change all the time: stop what writes there (sudo systemctl stop comfyui comfy-manage), and run this again"
      while IFS= read -r path; do
        [[ $path == */ ]] || change "copy $folder/$path" aws s3 cp --only-show-errors "$folder/$path" "$target/$path"
      done <<<"$changed"
      mv "$list.new" "$list"
    done
    mv "$list.new" "$list"
    while IFS= read -r path; do
      change "make the folder $target/$path" aws s3api put-object --bucket "$S3_BUCKET" --key "$name/$path"
    done < <(cut -f 2 "$list" | grep '/$')
    changed=$(missing_files "$name" "$list")
    [[ -z $changed ]] \
      || die "these files of $folder did not arrive in $target with their size, so nothing was removed, run this again:$(one_line "$(head -n 5 <<<"$changed")")"
  fi
  report files "$target" "copied: $(list_files "$folder" | wc -l), each there with its size"
}

# list_files FOLDER: size, path and time of change of every file, sorted; a folder with nothing in it ends in /.
list_files() {
  find -L "$1" -mindepth 1 \( -type f -printf '%s\t%P\t%T@\n' -o -type d -empty -printf '0\t%P/\t-\n' \) | LC_ALL=C sort
}

# bucket_files NAME: size and path of every file below NAME/ in the bucket, sorted.
bucket_files() {
  local answer
  answer=$(ask "list s3://$S3_BUCKET/$1" aws s3api list-objects-v2 --bucket "$S3_BUCKET" --prefix "$1/" \
    --query 'Contents[].[Size, Key]' --output text) || exit
  sed -n "s|^\([0-9]*\)\t$1/|\1\t|p" <<<"$answer" | LC_ALL=C sort
}

# missing_files NAME LIST: size and path of what the bucket has not, or not with this size. What cannot be found out
# counts as missing.
missing_files() {
  local here there
  if here=$(cut -f 1,2 "$2" | LC_ALL=C sort) && there=$(bucket_files "$1") \
    && LC_ALL=C comm -23 <(printf '%s\n' "$here") <(printf '%s\n' "$there"); then
    return
  fi
  printf 'not known, see above\n'
}

# refuse_conflicts NAME FOLDER: before the first copy. Which of two files with one name is the right one, only their
# owner knows.
refuse_conflicts() {
  local name=$1 folder=$2 there conflicts
  [[ $BUCKET_STATE != created ]] || return 0
  there=$(bucket_files "$name")
  conflicts=$(awk -F '\t' 'NR == FNR { size[$2] = $1; next } $2 in size && size[$2] != $1 { print $2 }' \
    <(list_files "$folder") - <<<"$there")
  [[ -z $conflicts ]] \
    || die "these files are in $folder and, with another size, in s3://$S3_BUCKET/$name: rename or remove one of each first:$(one_line "$(head -n 5 <<<"$conflicts")")"
}

# free_disk NAME MOVED YES: removes MOVED, if all that is in it was copied and is in the bucket still.
free_disk() {
  local name=$1 moved=$2 yes=$3 size changed missing answer="" list=$COMFY_HOME/ComfyUI/$1.copied
  size=$(du -sh "$moved" | cut -f 1)
  if [[ $DRY_RUN == no ]]; then
    # Without empty folders, of which a removal that was stopped leaves some.
    list_files "$moved" | sed $'/\\/\t-$/d' >"$list.new"
    touch "$list" # where it was lost, nothing is known to be copied
    changed=$(LC_ALL=C comm -13 "$list" "$list.new")
    missing=$(missing_files "$name" "$list.new")
    rm "$list.new"
    if [[ -n $changed$missing ]]; then
      warn "$moved has files that are not in the bucket, or not as they are here: it is kept; copy what is worth it to s3://$S3_BUCKET/$name, then remove it yourself"
      return
    fi
    if [[ $yes == no && -t 0 ]]; then
      printf 'All of %s is in the bucket. Remove it, which frees %s? Type yes: ' "$moved" "$size"
      read -r answer || printf '\n'
      [[ $answer != yes ]] || yes=yes
    fi
  fi
  if [[ $yes == no ]]; then
    report folder "ComfyUI/$name.moved" "kept, takes $size: run this again with --yes to remove it"
    return
  fi
  [[ $DRY_RUN == yes ]] || rm --recursive --force --one-file-system -- "$moved" "$list"
  report folder "ComfyUI/$name.moved" "removed, frees $size"
}
