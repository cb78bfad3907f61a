#!/usr/bin/env bash
# Runs the checks on a fresh machine: finds a Python, gives it an environment that lives as long as
# the run, and does there what the README says, `pip install nox && nox`. Arguments are nox's.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=
for candidate in python3 python3.13 python3.12 python3.11; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        python=$candidate
        break
    fi
done
if [[ -z $python ]]; then
    echo "isoform's checks need Python 3.11 or newer, and no python3 on PATH is one." >&2
    exit 1
fi

# Where byte code may not be kept, every import of torch compiles it again, for seconds each.
unset PYTHONDONTWRITEBYTECODE

environment=$(mktemp -d)
trap 'rm -rf "$environment"' EXIT
"$python" -m venv "$environment"
source "$environment/bin/activate"

pip install nox && nox "$@"
