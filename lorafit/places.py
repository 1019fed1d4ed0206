"""Where a model may run: this machine, a graphics card by name, or any amount of memory."""

from __future__ import annotations

import re
from dataclasses import dataclass

from lorafit.config import byte_count, nearest
from lorafit.errors import ConfigError
from lorafit.machine import SPARE, available
from lorafit.machine import memory as taken

# Memory in GB; 10^12 dense operations a second in bf16 with sums in fp32, in fp32 for those without bf16, where training is in
# fp32; GB a second of its memory. As the makers' data sheets have them, rounded.
NO_BF16 = {"T4", "V100", "RTX 2080 Ti"}
GPUS: dict[str, tuple[int, float, float]] = {
    "T4": (16, 8, 320),
    "V100": (32, 16, 900),
    "RTX 2080 Ti": (11, 13, 616),
    "RTX 3060": (12, 25, 360),
    "RTX 3070": (8, 41, 448),
    "RTX 3080": (10, 60, 760),
    "RTX 3090": (24, 71, 936),
    "RTX 4060": (8, 30, 272),
    "RTX 4060 Ti 16GB": (16, 44, 288),
    "RTX 4070": (12, 58, 504),
    "RTX 4080": (16, 97, 717),
    "RTX 4090": (24, 165, 1008),
    "RTX 5090": (32, 210, 1792),
    "A10": (24, 125, 600),
    "L4": (24, 60, 300),
    "A40": (48, 150, 696),
    "RTX A6000": (48, 155, 768),
    "L40S": (48, 362, 864),
    "A100 40GB": (40, 312, 1555),
    "A100 80GB": (80, 312, 2039),
    "H100": (80, 989, 3350),
    "H200": (141, 989, 4800),
    "B200": (180, 2250, 8000),
}
REACHED = 0.25  # of those operations, in training: an H100 reached 0.26 with Llama-3.2-1B's shape (docs/speed.md)
REACHED_MEMORY = (
    0.5  # of those bytes, making numbers of 4 bits: an H100 reached 0.3 to 0.7 with Llama-2-7B's weights (there too)
)


@dataclass(frozen=True)
class Place:
    """`memory` in bytes that a run may take there. `rate`: operations a second that training reaches, None where unknown, and
    `bytes_a_second` of its memory. `here`: this very machine."""

    name: str
    memory: int
    gpu: bool = False
    rate: float | None = None
    bytes_a_second: float | None = None
    here: bool = False
    bf16: bool = True


def this_machine(memory: int | None = None) -> Place:
    """What this process has of this machine's memory and what is left but for a reserve; or `memory` bytes."""
    left = int(available() * (1 - SPARE)) + taken()
    return Place("this machine", left if memory is None else min(memory, left), here=True)


def here(device: str, memory: int | None = None) -> Place:
    """Where a run with this `device` takes its memory on this machine, or `memory` bytes of it."""
    import torch  # here: a name that isn't known is refused before seconds of imports

    from lorafit.model.load import pick_device

    place = pick_device(device)
    if place.type != "cuda":
        return this_machine(memory)
    left, _ = torch.cuda.mem_get_info(place)
    return Place(torch.cuda.get_device_name(place), memory if memory is not None else int(left), gpu=True, here=True)


def find(text: str, memory: int | None = None) -> Place:
    """What `--for` means: `cpu`, the name of a GPU, or a size. ConfigError with the nearest name for anything else."""
    if text.lower() == "cpu":
        return this_machine(memory)
    for name, (size, rate, speed) in GPUS.items():
        if _plain(text) in (_plain(name), _plain(name).removesuffix("gb")):
            most = int(size * 1e9 * (1 - SPARE / 2))
            return Place(
                name,
                min(most, memory or most),
                gpu=True,
                rate=rate * 1e12 * REACHED,
                bytes_a_second=speed * 1e9 * REACHED_MEMORY,
                bf16=name not in NO_BF16,
            )
    if re.match(r"[0-9.]+\s*[KMGT](i?B)?$", text, re.IGNORECASE):
        most = int(byte_count("--for", text) * (1 - SPARE))
        return Place(f"a machine with {text}", min(most, memory or most))
    if family := [name for name in GPUS if _plain(text) and _plain(name).startswith(_plain(text))]:
        raise ConfigError(f"--for {text}: several are known; say which: {', '.join(family)}")
    short = {_plain(name): name for name in GPUS}
    hint = nearest(_plain(text), list(short))
    for plain, name in short.items():
        hint = re.sub(rf"\b{plain}\b", name, hint)
    raise ConfigError(f"--for {text}: neither cpu, nor a size such as 16G, nor a GPU known here; {hint}")


def _plain(name: str) -> str:
    """A GPU's name as people shorten it."""
    return re.sub(r"nvidia|geforce|rtx|tesla|[^a-z0-9]", "", name.lower())
