#!/bin/sh
# Debian packages of the programs that tests need and this machine lacks, one a line.
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin
while read -r program package; do
    command -v "$program" >/dev/null 2>&1 || echo "$package"
done <<'END'
mosquitto mosquitto
strace strace
systemd-analyze systemd
git git
qemu-aarch64-static qemu-user-static
qemu-x86_64-static qemu-user-static
END
