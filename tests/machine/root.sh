#!/usr/bin/env bash
#
# What machine.sh makes once and keeps in tests/.cache; sourced, not run.

SUITE=bookworm
# What Ubuntu's image for EC2 has, as far as the scripts use it, and what the base machine's page installs. s3fs stands
# in for Mountpoint.
PACKAGES=systemd-sysv,dbus,cloud-init,python3-venv,sudo,git,curl,procps,awscli,s3fs,fuse3,ca-certificates

# prepare_root: sets MACHINE_ROOT, the root that all machines have below their own layer, and MACHINE_WHEELS, the Python
# packages that are installed on one. Fails where they cannot be had.
prepare_root() {
  local cache=$ROOT/tests/.cache recipe lock code=0
  recipe=$({ printf '%s\n' "$SUITE $PACKAGES" && declare -f make_root && cat "$ROOT/requirements.txt" \
    "$ROOT/tests/machine/comfyui-requirements.txt"; } | cksum)
  export MACHINE_ROOT=$cache/machine-${recipe%% *}/root MACHINE_WHEELS=$cache/machine-${recipe%% *}/wheels
  mkdir -p "$cache"
  exec {lock}>"$cache/lock"
  flock "$lock"
  if [[ ! -d $MACHINE_ROOT ]]; then
    printf 'Making the root of the machines in tests/.cache (once, about a minute) ...\n'
    rm -rf "$cache"/machine-*
    mkdir "$cache/machine-new"
    { make_root "$cache/machine-new" && mv "$cache/machine-new" "${MACHINE_ROOT%/root}"; } || code=1
  fi
  exec {lock}>&-
  return "$code"
}

make_root() {
  local mirrors
  mapfile -t mirrors < <(host_mirrors)
  mmdebstrap --quiet --variant=apt --include="$PACKAGES" --aptopt='Apt::Install-Recommends "false"' \
    --dpkgopt=force-unsafe-io --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/doc/*' \
    "$SUITE" "$1/root" "${mirrors[@]}" \
    && pip download --quiet --quiet --disable-pip-version-check --only-binary=:all: --python-version 3.11 \
      --dest "$1/wheels" -r "$ROOT/requirements.txt" -r "$ROOT/tests/machine/comfyui-requirements.txt"
}

# host_mirrors: where this host has Debian from, if it is one. Else mmdebstrap knows where Debian is.
host_mirrors() {
  local uri release
  while read -r uri release; do
    printf 'deb %s %s main\n' "$uri" "$release"
  done < <(apt-get indextargets --format "\$(REPO_URI) \$(RELEASE)" "Created-By: Packages" "Component: main" "Origin: Debian" \
    | grep -E " $SUITE(-|\$)")
}
