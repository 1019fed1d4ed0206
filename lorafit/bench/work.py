"""What both sides are given: model, token ids of every document of every step, rank and learning rate, as one JSON file.

Every token but a document's first is learned. Both sides start from the same adapter, which is written by the first worker
that doesn't find it.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lorafit.data import Chat, Example, Tokens, prepare
from lorafit.model.load import load_tokenizer, stop_ids

Document = list[int]

# Documents when the user names no data: log-normal lengths like those of Alpaca's rows under a chat template.
MEDIAN, SPREAD, SHORTEST, LONGEST = 160, 0.7, 48, 750
UNMATCHED = ("none", "w8a8")  # ways to store the base in which the other side has it in 16 or 32 bits, as it comes
TEXT = Path(__file__).parent.parent / "demo.jsonl"


@dataclass(frozen=True)
class Work:
    """One training to measure. `model` is a folder, `start` the folder of the adapter that all sides start from."""

    model: str
    precision: str
    steps: list[list[Document]]
    start: str
    held_out: list[Document]
    r: int = 16
    lr: float = 2e-4
    max_tokens: int = 512  # what the mode that pads every row to one length pads to
    share: bool = True  # our side computes once what documents of a step begin with
    quant: str = "none"  # how both sides store the base; in UNMATCHED the other one stores it as it comes
    checkpointing: bool = False  # our side recomputes activations in the backward

    @property
    def coded_there(self) -> bool:
        """The other side's base is quantised too."""
        return self.quant not in UNMATCHED

    @property
    def tokens(self) -> int:
        """Real tokens of all steps, padding never among them."""
        return sum(len(document) for step in self.steps for document in step)

    @property
    def targets(self) -> int:
        """Learned tokens of all steps: a document's first has nothing to be predicted from."""
        return sum(len(document) - 1 for step in self.steps for document in step)

    def but(self, **changes: Any) -> Work:
        """The same work with these fields changed."""
        return replace(self, **changes)

    def write(self, path: Path) -> Path:
        """As a file that a worker can read."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")
        return path


def read(path: Path) -> Work:
    """The reverse of `Work.write`."""
    return Work(**json.loads(path.read_text(encoding="utf-8")))


def as_tokens(documents: Sequence[Document]) -> list[Tokens]:
    """Documents as training rows, every token learned."""
    return [
        Tokens(np.array(ids, dtype=np.int32), np.ones(len(ids), dtype=bool), line, Example((), text="", line=line))
        for line, ids in enumerate(documents, 1)
    ]


def batches(documents: Sequence[Document], size: int) -> list[list[Document]]:
    """Steps of `size` documents, in order; the last may have fewer."""
    return [list(documents[i : i + size]) for i in range(0, len(documents), size)]


def from_file(data: str, model: Path, max_tokens: int) -> list[Document]:
    """The rows of a data file in its order, under the model's chat template, cut at `max_tokens`. DataError as in check."""
    chat = Chat.of(load_tokenizer(model), generation_eos=stop_ids(model))
    made = prepare(
        data, chat, held_out_share=0, learn="all", max_tokens=max_tokens, long="truncate", skip_bad_rows=True
    )
    return [[int(i) for i in row.ids] for row in made.train]


def alpaca_like(number: int, model: Path, most: int = LONGEST, seed: int = 0) -> list[Document]:
    """Documents of lengths like Alpaca's, at most `most`, cut from the text of lorafit's own demo."""
    draw = random.Random(seed)
    wanted = [draw.lognormvariate(0, SPREAD) * MEDIAN for _ in range(number)]
    return of_lengths([round(min(LONGEST, most, max(SHORTEST, length))) for length in wanted], model, seed)


def of_lengths(lengths: Sequence[int], model: Path, seed: int = 0) -> list[Document]:
    """Documents of exactly these lengths, cut from the text of lorafit's own demo, each from another place in it."""
    draw = random.Random(seed)
    text = [i for row in from_file(str(TEXT), model, LONGEST) for i in row]
    starts = [draw.randrange(len(text)) for _ in lengths]
    return [[text[(start + i) % len(text)] for i in range(n)] for start, n in zip(starts, lengths, strict=True)]
