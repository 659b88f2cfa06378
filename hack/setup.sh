#!/usr/bin/env bash
# Makes a fresh Debian machine ready: system packages, and .venv from the lock file. Does nothing where all is there.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() { printf 'setup: %s\n' "$*" >&2; exit 1; }

missing=()
need() { command -v "$1" >/dev/null 2>&1 || PATH="$PATH:/usr/sbin:/sbin" command -v "$1" >/dev/null 2>&1 || missing+=("$2"); }
need iptables-nft iptables
need iptables-legacy iptables
need ipset ipset
need conntrack conntrack
need nft nftables              # kube-proxy's nftables mode, whose table is taken over
need ip iproute2
need sysctl procps
need curl curl
need python3 python3
command -v gcc >/dev/null 2>&1 || missing+=(gcc libc6-dev)   # python-iptables builds a small C helper
python=$(command -v python3 || echo /usr/bin/python3)
if [ -x "$python" ]; then
  "$python" -c 'import ensurepip, venv' 2>/dev/null || missing+=(python3-venv)
  "$python" -c 'import sysconfig, pathlib, sys; sys.exit(not pathlib.Path(sysconfig.get_path("include"), "Python.h").exists())' \
    || missing+=(python3-dev)
else
  missing+=(python3-venv python3-dev)
fi

if [ ${#missing[@]} -gt 0 ]; then
  mapfile -t missing < <(printf '%s\n' "${missing[@]}" | sort -u)
  echo "setup: installing ${missing[*]}"
  [ "$(id -u)" = 0 ] || fail "root is needed to install: ${missing[*]}"
  command -v apt-get >/dev/null || fail "no apt-get here; please install: ${missing[*]}"
  log=$(mktemp)
  { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${missing[@]}"; } \
    >"$log" 2>&1 || { tail -20 "$log" >&2; fail "apt-get failed, see above"; }
  rm -f "$log"
fi

python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail "Python 3.11 or newer is needed, this is $(python3 --version)"
want=$(cat requirements.lock pyproject.toml | sha256sum | cut -c1-16)
if [ "$(cat .venv/.ready 2>/dev/null)" != "$want" ]; then
  echo "setup: making .venv"
  [ -x .venv/bin/python ] || python3 -m venv .venv
  .venv/bin/pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
  .venv/bin/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
  # Compiled once, also where PYTHONDONTWRITEBYTECODE would have every start compile anew.
  .venv/bin/python -m compileall -q nodeproxy hack .venv/lib/python3*/site-packages >/dev/null 2>&1 || true
  echo "$want" >.venv/.ready
fi
