#!/usr/bin/env bash
# Makes .venv from a lockfile, with a Python of its own; again is nothing.
#
#   launch/setup.sh cpu | cuda | tpu
set -euo pipefail
cd "$(dirname "$0")/.."

lock=launch/locks/requirements-${1:-}.txt
if [[ ! -f $lock ]]; then
  echo "setup.sh: found ${1:-nothing}, wanted cpu, cuda or tpu" >&2
  exit 2
fi
sum=$(sha256sum "$lock")
[[ $(cat .venv/locked 2>/dev/null || true) == "$sum" ]] && exit 0

export PATH=$HOME/.local/bin:$PATH
command -v uv >/dev/null || python3 -m pip install --quiet --user uv
uv venv --quiet --clear --python 3.11 .venv
uv pip install --quiet --python .venv/bin/python --require-hashes -r "$lock"
echo "$sum" >.venv/locked
