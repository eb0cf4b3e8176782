#!/bin/sh
# Makes a directory with an arm64 Debian Python and the device's dependencies as their official aarch64 wheels.
# Usage: arm64_root.sh [DIRECTORY]   (default: build/arm64-root)
#
# Nothing of it is run while it is made, so neither root rights nor binfmt_misc are needed: apt resolves and downloads
# into a state of its own, from the sources that this machine is configured with; packages are unpacked, not installed;
# pip unpacks wheels. Programs in it run by `qemu-aarch64-static -L DIRECTORY/cpus/CPU DIRECTORY/usr/bin/python3`.
set -eu
cd "$(dirname "$0")/.."
root=${1:-build/arm64-root}
python=${PYTHON:-.venv/bin/python}

dependencies=$("$python" -c 'import tomllib; print("\n".join(tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"]))')
recipe=$( (cat "$0"; echo "$dependencies"; cat /etc/os-release) | sha256sum | cut -d ' ' -f 1)
if [ "$(cat "$root/recipe" 2>/dev/null)" = "$recipe" ]; then
    echo "$root is up to date"
    exit 0
fi

for program in apt-get dpkg-deb qemu-aarch64-static; do
    command -v "$program" >/dev/null || { echo "$program not found" >&2; exit 1; }
done
mkdir -p "$(dirname "$root")"
new=$(cd "$(dirname "$root")" && pwd)/.$(basename "$root").partial
rm -rf "$new"
trap 'rm -rf "$new"' EXIT
state=$new/apt
mkdir -p "$state/lists/partial" "$state/cache/archives/partial"
: >"$state/status"

foreign_apt() {
    apt-get -qq -o APT::Architecture=arm64 -o APT::Architectures::=arm64 -o APT::Install-Recommends=false \
        -o Dir::State="$state" -o Dir::State::status="$state/status" -o Dir::Cache="$state/cache" \
        -o Acquire::Languages=none "$@"
}
echo "downloading arm64 packages"
# Sources of other vendors may have nothing for arm64; whether something is missing shows in the next step.
foreign_apt update || true
foreign_apt --yes --download-only install python3 libstdc++6 >/dev/null

mkdir -p "$new/usr/bin" "$new/usr/lib" "$new/usr/sbin"
ln -s usr/bin usr/lib usr/sbin "$new"
for package in "$state"/cache/archives/*.deb; do
    dpkg-deb --fsys-tarfile "$package" |
        tar -C "$new" --keep-directory-symlink --exclude='./usr/share/doc' --exclude='./usr/share/man' -xf -
done
glibc=$(dpkg-deb -f "$state"/cache/archives/libc6_*.deb Version | sed 's/^2\.\([0-9]*\).*/\1/')
version=$(readlink "$new/usr/bin/python3" | sed 's/^python//')
rm -rf "$state"

echo "downloading aarch64 wheels for Python $version, glibc 2.$glibc"
platforms="--platform manylinux2014_aarch64 $(seq -f '--platform manylinux_2_%g_aarch64' 17 "$glibc")"
# Lines of requirements, not shell words: some of them hold spaces or comparison signs.
echo "$dependencies" >"$new/requirements.txt"
# shellcheck disable=SC2086
"$python" -m pip install --quiet --quiet --disable-pip-version-check --no-warn-conflicts --no-compile --target "$new/site" \
    --only-binary=:all: --python-version "$version" --implementation cp $platforms --requirement "$new/requirements.txt"

# The emulator shows the real kernel's /proc, in which ONNX Runtime would look for an Arm and crash. So each board's own
# is laid over it: those of a Raspberry Pi 4 and of a Raspberry Pi 5.
board() {
    face=$new/cpus/$1
    mkdir -p "$face/proc" "$face/sys/devices/system/cpu"
    ln -s ../../usr ../../lib ../../bin "$face"
    echo 0 | tee "$face/sys/devices/system/cpu/possible" >"$face/sys/devices/system/cpu/present"
    printf 'processor\t: 0\nBogoMIPS\t: 108.00\nFeatures\t: %s\nCPU implementer\t: 0x41\nCPU architecture: 8\nCPU variant\t: %s\nCPU part\t: %s\nCPU revision\t: %s\n\n' \
        "$5" "$2" "$3" "$4" >"$face/proc/cpuinfo"
}
board cortex-a72 0x0 0xd08 3 'fp asimd evtstrm crc32 cpuid'
board cortex-a76 0x4 0xd0b 1 'fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp'

ORT_DISABLE_TELEMETRY=1 PYTHONPATH=$new/site PYTHONDONTWRITEBYTECODE=1 \
    qemu-aarch64-static -cpu cortex-a72 -L "$new/cpus/cortex-a72" "$new/usr/bin/python3" -c '
import platform, onnxruntime
print(f"{platform.machine()}: Python {platform.python_version()}, onnxruntime {onnxruntime.__version__}")'
echo "$recipe" >"$new/recipe"
rm -rf "$root"
mv "$new" "$root"
