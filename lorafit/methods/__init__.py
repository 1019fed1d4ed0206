"""The registry: a method is one file and one line here."""

from __future__ import annotations

from lorafit.config import nearest
from lorafit.errors import ConfigError
from lorafit.methods.adalora import AdaLoRA
from lorafit.methods.base import Matrix, Method, Observer, Scaled, Stepper, settings
from lorafit.methods.dora import DoRA
from lorafit.methods.eva import EVA
from lorafit.methods.full import Full
from lorafit.methods.ia3 import IA3
from lorafit.methods.loftq import LoftQ
from lorafit.methods.lora import LoRA
from lorafit.methods.lora_plus import LoRAPlus
from lorafit.methods.olora import OLoRA
from lorafit.methods.pissa import PiSSA
from lorafit.methods.qrlora import QRLoRA
from lorafit.methods.reflora import RefLoRA, RefLoRAS
from lorafit.methods.rslora import RsLoRA
from lorafit.methods.scalora import ScaLoRA

METHODS: dict[str, type[Method]] = {
    "lora": LoRA,
    "rslora": RsLoRA,
    "lora+": LoRAPlus,
    "dora": DoRA,
    "ia3": IA3,
    "qrlora": QRLoRA,
    "full": Full,
    "pissa": PiSSA,
    "olora": OLoRA,
    "loftq": LoftQ,
    "eva": EVA,
    "adalora": AdaLoRA,
    "reflora": RefLoRA,
    "reflora-s": RefLoRAS,
    "scalora": ScaLoRA,
}


def find(name: str) -> type[Method]:
    """The method of that name. ConfigError with the nearest name otherwise."""
    if name not in METHODS:
        raise ConfigError(f"unknown method '{name}'; {nearest(name, list(METHODS))}")
    return METHODS[name]


__all__ = ["METHODS", "Matrix", "Method", "Observer", "Scaled", "Stepper", "find", "settings"]
