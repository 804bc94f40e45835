#!/usr/bin/env bash
# Applies each mutant to a copy of the checkout and runs the tests that must fail with it, in
# the order of its "# killer:" lines (package, -run pattern, further arguments), until one does.
# Arguments name mutants; without any, all are run. Exits 1 if a mutant survives.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../../../.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
(cd "$root" && git ls-files -z --cached --others --exclude-standard | tar --null --ignore-failed-read -cf - -T - 2>/dev/null) | tar -xf - -C "$work"
cd "$work" && git init -q . # so that git apply looks here

names=("$@")
if [ ${#names[@]} = 0 ]; then
  for f in "$here"/*.diff; do names+=("$(basename "$f" .diff)"); done
fi
survivors=0
for name in "${names[@]}"; do
  diff=$here/$name.diff
  if ! git apply -C1 --recount "$diff"; then
    echo "ERROR     $name: the defect does not fit the code any more; write it anew" >&2
    survivors=$((survivors + 1))
    continue
  fi
  killer=
  while read -r pkg pattern args; do
    # shellcheck disable=SC2086
    out=$(go test -count=1 -timeout 10m "$pkg" -run "$pattern" $args 2>&1)
    status=$?
    if grep -qE '\[(build|setup) failed\]|no tests to run' <<<"$out"; then
      echo "$out" | tail -20 >&2
      echo "ERROR     $name: $pkg does not build, or has no test $pattern" >&2
      break
    fi
    if [ $status != 0 ]; then
      killer=$pkg:$(grep -oE '^ *--- FAIL: [^ ]+' <<<"$out" | tail -1 | sed 's/.*: //')
      why=$(grep -oE 'P[1-8]: .{0,90}' <<<"$out" | head -1)
      break
    fi
  done < <(sed -n 's/^# killer: //p' "$diff")
  if [ -n "$killer" ]; then
    printf 'killed    %-34s %s %s\n' "$name" "$killer" "$why"
  else
    printf 'SURVIVED  %s: %s\n' "$name" "$(sed -n '1s/^# //p' "$diff")"
    survivors=$((survivors + 1))
  fi
  git apply -C1 --recount -R "$diff"
done
[ $survivors = 0 ]
