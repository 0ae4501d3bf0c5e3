#!/usr/bin/env bash
# The documents that AWS gets: templates/, in which names are filled in.
#
# A template in JSON is valid JSON. In its strings "${NAME}" stands for a value; a string that is only "${NAME:number}"
# becomes a number; an item of a list with "${NAME:each}" is there once for each word of the value. Several templates
# become one document: their members together, and the items of lists that have the same name. In a template for a
# shell a value is quoted as a shell needs it. A value that is missing or empty is refused.

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
