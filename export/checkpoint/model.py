"""The checkpoint as transformers runs it: the original that everything else is held against."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM

from edge_agent.errors import PermanentError
from export.checkpoint.source import Checkpoint


def load_model(checkpoint: Checkpoint) -> Any:
    """Load in fp32, safetensors only, no code of its own.

    Raises:
        PermanentError: ``export.reference_failed``.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(
            checkpoint.path,
            dtype=torch.float32,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            # On the CPU the plain attention is the fastest for short texts (measured), and the same everywhere.
            attn_implementation="eager",
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise PermanentError("export.reference_failed", f"transformers cannot load the checkpoint: {error}") from error
    return model.eval()
