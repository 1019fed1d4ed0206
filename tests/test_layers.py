"""Imports inside lorafit only point down the layers of docs/architecture.md, and `lorafit --help` imports nothing heavy."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "lorafit"

# A module imports modules that stand before it, or of its own package. A row is a layer.
LAYERS = [
    ["errors", "config", "log", "files", "machine"],
    ["data"],
    ["packing", "batches"],
    ["native"],
    ["model"],
    ["methods"],
    ["route", "adapter", "peft_files", "host"],
    ["train"],
    [
        "generate",
        "evaluate",
        "run",
        "charts",
        "tried",
        "advice",
        "doctor",
        "report",
        "places",
        "plan",
        "pace",
        "session",
    ],
    ["export", "adapters"],
    ["talk", "fit", "tune"],
    ["bench"],
    ["verbs", "cli", "__main__"],
]
ORDER = [module for layer in LAYERS for module in layer]


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Line and top-level module of every import of lorafit, those inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "lorafit" and len(parts) > 1 and parts[1] != "__version__":
                yield node.lineno, parts[1]


def test_imports_only_point_down():
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        for line, other in imported(path):
            if other != own and ORDER.index(other) > ORDER.index(own):
                wrong.append(f"{path.relative_to(PACKAGE)}:{line}: {own} imports {other}")
    assert not wrong, "\n".join(wrong)


def test_every_module_has_a_layer():
    found = {path.stem for path in PACKAGE.glob("*.py")} | {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert found - {"__init__"} == set(ORDER)


def test_help_imports_nothing_heavy():
    code = """
import contextlib, io, sys
from lorafit.cli import VERBS, main
for words in [["--help"], *([verb, "--help"] for verb in VERBS)]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        main(words)
print(sorted({"torch", "transformers", "numpy", "pyarrow", "peft"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_what_can_be_refused_early_is_refused_before_heavy_imports(tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text("{}")
    lines = [
        (["train", str(data), "--no-such"], "torch"),
        (["plan", str(data), "--for", "RTX 9999"], "torch"),
        (["plan", str(data), "--for", "0G"], "torch"),
        (["advise", str(data), "--for", "RTX 9999"], "torch"),
        (["plan", str(tmp_path / "none.jsonl")], "torch"),
        (["train", str(data), "epoch=2"], "lorafit.fit"),  # methods, which have settings of their own, need torch
        (["tune", str(data), "epoch=2"], "lorafit.fit"),
        (["plan", str(data), "epoch=2"], "lorafit.fit"),
    ]
    code = f"""
import sys
from lorafit.cli import main
for words, late in {lines!r}:
    assert main(words) == 2
    assert late not in sys.modules, words
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    said = done.stderr.splitlines()
    assert len(said) == len(lines)
    assert "--no-such" in said[0] and "unknown setting 'epoch'; did you mean 'epochs'?" in said[-1]
