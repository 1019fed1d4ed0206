"""lorafit: fit low-rank adapters to a frozen language model on the machine you have."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# Public names and where they live. They are imported when first used, so that `import lorafit` costs nothing.
_PUBLIC = {
    "METHODS": "lorafit.methods",
    "Chat": "lorafit.data",
    "Config": "lorafit.config",
    "Example": "lorafit.data",
    "Host": "lorafit.host",
    "Job": "lorafit.train.loop",
    "LorafitError": "lorafit.errors",
    "Message": "lorafit.data",
    "Method": "lorafit.methods",
    "Plan": "lorafit.batches",
    "Route": "lorafit.route",
    "Run": "lorafit.run",
    "Tokens": "lorafit.data",
    "encode": "lorafit.data",
    "load": "lorafit.model.load",
    "open_session": "lorafit.session",
    "prepare": "lorafit.data",
    "read": "lorafit.data",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'lorafit' has no attribute '{name}'")
