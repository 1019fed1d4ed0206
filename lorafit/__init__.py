"""lorafit: fit low-rank adapters to a frozen language model on the machine you have."""

__version__ = "0.1.0"
