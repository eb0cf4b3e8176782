#!/bin/sh
# Makes a virtual environment in which ONNX Runtime is Intel's build of it, with the device's other dependencies.
# Usage: openvino_venv.sh [DIRECTORY]   (default: build/openvino)
#
# Its module is called onnxruntime too and would replace the one that everything else uses, hence the extra environment.
# The build has OpenVINO inside. Intel's separate packages are left out, and with them openvino-telemetry, which reports
# home by default.
set -eu
cd "$(dirname "$0")/.."
directory=${1:-build/openvino}
python=${PYTHON:-.venv/bin/python}

# Every dependency of the device but ONNX Runtime itself.
dependencies=$("$python" -c 'import tomllib
for line in tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"]:
    if not line.startswith("onnxruntime"): print(line)')
recipe=$( (cat "$0"; echo "$dependencies") | sha256sum | cut -d ' ' -f 1)
if [ "$(cat "$directory/recipe" 2>/dev/null)" = "$recipe" ]; then
    echo "$directory is up to date"
    exit 0
fi

rm -rf "$directory"
mkdir -p "$(dirname "$directory")"
"$python" -m venv "$directory"
echo "$dependencies" | "$directory/bin/pip" --disable-pip-version-check --quiet install onnxruntime-openvino==1.24.1 -r /dev/stdin
echo "$recipe" >"$directory/recipe"
echo "$directory is ready: $("$directory/bin/python" -c 'import onnxruntime; print(onnxruntime.__version__, *onnxruntime.get_available_providers())')"
