#!/bin/sh
# Lock requirement sets: every package with its hashes, for Python 3.11 to 3.13, naming no registry.
#
#   files/requirements/lock.sh                         every set that has a lock already
#   files/requirements/lock.sh cpu cuda                these sets
#   files/requirements/lock.sh cpu-official -- --index URL --index-strategy unsafe-best-match
#
# What follows `--` goes to `uv pip compile`; `-- --upgrade` takes newer versions, without it a lock keeps the versions it has.
set -eu
cd "$(dirname "$0")"
sets=""
while [ $# -gt 0 ]; do
    if [ "$1" = "--" ]; then
        shift
        break
    fi
    sets="$sets $1"
    shift
done
if [ -z "$sets" ]; then
    for lock in *.txt; do sets="$sets ${lock%.txt}"; done
fi
for set in $sets; do
    if [ ! -e "$set.in" ]; then
        echo "lock.sh: no $set.in here; the sets are: $(ls ./*.in | sed 's|^\./||; s|\.in$||' | tr '\n' ' ')" >&2
        exit 2
    fi
    override=""
    if [ -e "$set.override" ]; then override="--override=$set.override"; fi
    echo "lock.sh: $set" >&2
    # shellcheck disable=SC2086  # $override is one word or none
    uv pip compile "$set.in" $override --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
        --no-header --quiet --output-file "$set.txt" "$@"
done
