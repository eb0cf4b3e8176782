"""Checkpoint to signed bundle: the ``edge-export`` command."""

import os

# Both must be set before the libraries are first imported: what is exported must not leave the plant, and a
# checkpoint is a local folder, never a name to look up.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
