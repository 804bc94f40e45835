#!/usr/bin/env bash
# Model-checks the protocol with SPIN: the design must hold, and each variant that is broken on
# purpose must be rejected, so that the check is known to be able to fail.
set -euo pipefail
spec=$(cd "$(dirname "$0")" && pwd)/lockstep.pml
if ! command -v spin >/dev/null; then
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "spin is missing: installing the Debian package"
    apt-get update -qq && apt-get install -y -qq spin >/dev/null
  else
    echo "spin is missing: install it (Debian and Ubuntu: apt-get install spin) and run this again" >&2
    exit 1
  fi
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"

# check NAME EXPECTED FLAGS...: EXPECTED is "holds" or "rejected".
check() {
  local name=$1 expected=$2; shift 2
  # shellcheck disable=SC2086
  spin "$@" -a "$spec" >/dev/null
  cc -O2 -w -DSAFETY -DCOLLAPSE -DMEMLIM=6000 -DVECTORSZ=2048 -o pan pan.c
  ./pan -m2000000 >out 2>&1 || true
  local errors states verdict
  errors=$(sed -n 's/.*errors: \([0-9]*\).*/\1/p' out)
  states=$(sed -n 's/ *\([0-9.e+]*\) states, stored.*/\1/p' out)
  # A search that was cut short proves nothing.
  if grep -qE 'max search depth too small|out of memory|aborting' out || [ -z "$errors" ]; then
    cat out; echo "FAIL  $name: the search did not finish" >&2; exit 1
  fi
  verdict=holds; [ "$errors" = 0 ] || verdict=rejected
  printf '%-46s %12s states  %s\n' "$name" "$states" "$verdict"
  if [ "$verdict" != "$expected" ]; then
    cat out; echo "FAIL  $name: expected: $expected" >&2; exit 1
  fi
}

check "the design, 3 operations"                       holds    -DOPS=3
check "the design, 2 operations, the index loses 1"    holds    -DOPS=2 -DLOSSES=1
if [ "${1:-}" = long ]; then
  check "the design, 4 operations"                     holds    -DOPS=4
  check "the design, 3 operations, the index loses 2"  holds    -DOPS=3 -DLOSSES=2
fi
check "broken: ids are reused"                         rejected -DOPS=4 -DREUSE_IDS
check "broken: the switch does not wait"               rejected -DOPS=4 -DEARLY_SWITCH
check "broken: entries die at acceptance"              rejected -DOPS=4 -DDEAD_EARLY
check "broken: a delete keeps serving"                 rejected -DOPS=4 -DKEEP_SERVING
