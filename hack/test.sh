#!/usr/bin/env bash
# Runs the stages of `make test` (all, or those named), with a progress line for each and a summary at the end.
set -uo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH:/usr/sbin:/sbin"

lint() {
  ruff check . && ruff format --check . && mypy && lint-imports
}
unit() { python -m pytest -q -n 2 tests -m "not kernel and not ipvs and not controlplane and not vm"; }
# Tests in namespaces mostly wait: for packets that must not come, for agents to notice.
kernel() {
  python -m pytest -q -n 3 tests -m "kernel and not ipvs and not vm and not controlplane" \
    --ignore tests/conformance --ignore tests/takeover --ignore tests/load
}
scenes() { python -m pytest -q -n 2 tests/conformance -m "not ipvs"; }
# On this kernel where it has IPVS, else in two VMs, because the usual kind has one processor: one with the scenes and what looks
# at agents from outside, one with the rest.
ipvs() {
  python -m hack.vm run --fresh -- uname -sr || return  # makes the VM ready, where one is needed
  export HACK_VM_MEMORY=${HACK_VM_MEMORY:-2048}
  local looking=(tests/conformance tests/trace tests/compare tests/snapshot tests/controlplane) others=0 looked
  python -m hack.vm run --fresh -- python -m pytest -v -n 3 "${looking[@]}" -m ipvs & looked=$!
  python -m hack.vm run --fresh -- python -m pytest -v -n 3 tests -m ipvs \
    "${looking[@]/#/--ignore=}" --ignore=tests/takeover --ignore=tests/load || others=1
  wait "$looked" && return "$others"
}
controlplane() {
  python hack/controlplane/build.py || return
  python -m pytest -q -n 2 tests/controlplane tests/operator tests/deploy/test_apply.py -m "controlplane and not ipvs"
}
# With a real kube-proxy, and both modes; all its pairs with IPVS mode: `make takeover-ipvs`.
takeover() { python hack/controlplane/build.py && python -m pytest -q -n 4 tests/takeover -m "not ipvs"; }
takeover-ipvs() { python hack/controlplane/build.py && python -m hack.vm run --fresh -- python -m pytest -v -n 3 tests/takeover -m ipvs; }
# Both mostly wait, for programs that start and end.
peers() {
  python hack/controlplane/build.py || return
  local informers failed=0
  controlplane & informers=$!
  takeover || failed=1
  wait "$informers" && return "$failed"
}
# The short form; `make soak` is the long one, with every event in every mode. Alone on the machine, because it is about time.
load() {
  python -m pytest -q tests/load -m "not ipvs" -k "nft or kill or generator" &&
    python -m hack.vm run --fresh -- python -m pytest -v tests/load -m ipvs -k "switch or kill"
}

stages=("$@")
[ $# -gt 0 ] || stages=(lint unit kernel scenes ipvs peers load)
begin=$SECONDS failed=() number=0
for stage in "${stages[@]}"; do
  number=$((number + 1)) start=$SECONDS
  printf '=== [%d/%d] %s\n' "$number" "${#stages[@]}" "$stage"
  if "$stage"; then verdict=passed; else verdict=FAILED; failed+=("$stage"); fi
  printf '=== [%d/%d] %s %s in %d s\n' "$number" "${#stages[@]}" "$stage" "$verdict" $((SECONDS - start))
done
total=$((SECONDS - begin))
if [ ${#failed[@]} -gt 0 ]; then
  printf 'make test: FAILED in %d s: %s\n' "$total" "${failed[*]}"
  exit 1
fi
printf 'make test: all stages passed in %d s\n' "$total"
