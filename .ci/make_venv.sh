#!/bin/sh
# Creates a virtual environment with the newest suitable Python. Usage: make_venv.sh DIRECTORY
set -eu
directory=$1

suitable() { command -v "$1" >/dev/null 2>&1 && "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; }

# The system's own python3 first: its venv package is the one that apt offers.
for candidate in ${PYTHON:-} python3 python3.13 python3.12 python3.11; do
    if suitable "$candidate"; then python=$candidate; break; fi
done
if [ -z "${python:-}" ]; then
    echo "No Python 3.11, 3.12 or 3.13 found. On Debian 12, Ubuntu 24.04 or Raspberry Pi OS:" >&2
    echo "    sudo apt-get update && sudo apt-get install -y python3 python3-venv" >&2
    exit 1
fi

if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    echo "$python has no venv module." >&2
    "$(dirname "$0")/debian_packages.sh" "python$version-venv" || true
    if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        echo "Install it and try again:" >&2
        echo "    sudo apt-get update && sudo apt-get install -y python$version-venv" >&2
        exit 1
    fi
fi
echo "creating $directory with $("$python" --version)"
"$python" -m venv "$directory"
