#!/usr/bin/env bash
# The documents that AWS gets: templates/, in which fill.py fills in names.

# fill TEMPLATE... [NAME=VALUE...]: prints one document made of the templates, with a value in place of every ${NAME}:
# a given one, or else that of the variable NAME.
fill() {
  local name
  local -a templates=() given=() values=()
  for name in "$@"; do
    if [[ $name == *=* ]]; then given+=("$name"); else templates+=("$HERE/provision/templates/$name"); fi
  done
  while read -r name; do
    name=${name:2}
    values+=("$name=${!name-}")
  done < <(grep --only-matching --no-filename --extended-regexp '\$\{[A-Z][A-Z0-9_]*' "${templates[@]}")
  env "${values[@]}" "${given[@]}" python3 -IS "$HERE/provision/fill.py" "${templates[@]}" \
    || die "cannot make what AWS gets of ${templates[*]#"$HERE/"}: see above"
}

# digest TEXT: as many characters as tell two documents apart.
digest() {
  local sum
  sum=$(sha256sum <<<"$1")
  printf '%s' "${sum:0:16}"
}
