#!/bin/bash
# First boot of an instance of the environment ${ENV}.
set -eu
home=${COMFY_HOME:-${BASE_HOME}}

# The image holds the base machine's settings; the environment is chosen by this one line.
if grep -q '^ENV=' "$home/env"; then
  sed -i --follow-symlinks 's/^ENV=.*/ENV=${ENV}/' "$home/env"
else
  sed -i --follow-symlinks '1i ENV=${ENV}' "$home/env"
fi

# The image holds the base machine's logs too, which must not be uploaded as this instance's.
rm -rf -- "${home:?}/logs"/*

# The services wait for this, whatever else cloud-init does or fails to do. Nothing may come after it.
cloud-init query instance_id >"$home/first-boot.new"
mv "$home/first-boot.new" "$home/first-boot"
