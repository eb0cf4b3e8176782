#!/bin/sh
# Verifies systemd/ as it will be installed: the unit alone and with each board's drop-in.
#
# `systemd-analyze verify` wants the unit's program and the targets it orders itself by. Both are put into a temporary
# root: the targets are this machine's own, the program is a stand-in, because what is checked is the unit, not the
# installation. Anything that verify prints counts: an unknown directive is only a warning to it.
set -u
cd "$(dirname "$0")/.."
max_exposure=2.0

if ! command -v systemd-analyze >/dev/null 2>&1; then
    echo "systemd-analyze not found: the unit files were NOT checked" >&2
    if [ "${CI:-}" = true ]; then exit 1; else exit 0; fi
fi

root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
mkdir -p "$root/usr/lib/systemd/system" "$root/etc/systemd/system/edge-agent.service.d" "$root/opt/edge-agent/current/bin"
ln -s usr/lib "$root/lib"
for directory in /usr/lib/systemd/system /lib/systemd/system; do
    [ -d "$directory" ] && cp -P "$directory"/*.target "$directory"/*.slice "$root/usr/lib/systemd/system/" && break
done
printf '#!/bin/sh\n' >"$root/opt/edge-agent/current/bin/edge-agent"
chmod 755 "$root/opt/edge-agent/current/bin/edge-agent"
cp systemd/edge-agent.service "$root/etc/systemd/system/"
board=$root/etc/systemd/system/edge-agent.service.d/board.conf

status=0
for dropin in none systemd/boards/*.conf; do
    if [ "$dropin" = none ]; then name="edge-agent.service"; else
        name="edge-agent.service with $(basename "$dropin")"
        cp "$dropin" "$board"
    fi
    said=$(systemd-analyze verify --root="$root" edge-agent.service 2>&1)
    if [ $? -ne 0 ] || [ -n "$said" ]; then
        echo "$name: $said" >&2
        status=1
        continue
    fi
    exposure=$(systemd-analyze security --offline=yes --root="$root" --no-pager edge-agent.service |
        sed -n 's/.*Overall exposure level for edge-agent.service: \([0-9.]*\).*/\1/p')
    if awk -v found="$exposure" -v limit="$max_exposure" 'BEGIN { exit !(found != "" && found <= limit) }'; then
        echo "$name: verified, exposure $exposure (limit $max_exposure)"
    else
        echo "$name: exposure ${exposure:-unknown} exceeds $max_exposure" >&2
        status=1
    fi
done
exit $status
