#!/bin/sh
# Installs Debian packages where root, or sudo without a password, allows it. Usage: debian_packages.sh PACKAGE...
# Exit status 1 says that something is still missing; the caller decides whether that matters.
set -u
[ $# -gt 0 ] || exit 0

if ! command -v apt-get >/dev/null 2>&1; then
    echo "not a Debian system; install by hand: $*" >&2
    exit 1
fi
if [ "$(id -u)" = 0 ]; then sudo=""
elif command -v sudo >/dev/null 2>&1 && sudo -n true 2>/dev/null; then sudo="sudo -n"
else
    echo "neither root nor password-less sudo; install by hand:" >&2
    echo "    sudo apt-get update && sudo apt-get install -y --no-install-recommends $*" >&2
    exit 1
fi

# Packages such as mosquitto start a service when installed; tests start their own on a free port.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    printf '#!/bin/sh\nexit 101\n' | $sudo tee "$policy" >/dev/null && $sudo chmod 755 "$policy"
    trap '$sudo rm -f "$policy"' EXIT INT TERM
fi
echo "installing Debian packages: $*"
$sudo apt-get update -qq &&
    $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null
