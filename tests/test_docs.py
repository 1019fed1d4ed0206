"""The documents say what is there: files, links, verbs, settings, code that runs; and no path of anyone's machine."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lorafit import fit
from lorafit.cli import VERBS
from lorafit.config import defaults
from lorafit.log import Terminal
from lorafit.methods import METHODS, settings

ROOT = Path(__file__).parent.parent
READMES = ["README.md", "README.zh.md"]
PAGES = [ROOT / "CHANGELOG.md", *(ROOT / name for name in READMES), *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(name: str, kind: str) -> list[str]:
    """The fenced blocks of a kind in a page."""
    return re.findall(rf"^```{kind}\n(.*?)^```$", (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def listed(tree: str) -> list[str]:
    """The files in an indented tree, as paths."""
    folders: list[str] = []
    found = []
    for line in tree.splitlines():
        name = line.split()[0]
        folders = folders[: (len(line) - len(line.lstrip())) // 2]
        if name.endswith("/"):
            folders.append(name)
        else:
            found.append("".join(folders) + name)
    return found


@pytest.mark.parametrize("name", READMES)
def test_the_file_tree_is_the_one_on_disk(name):
    found = listed(next(block for block in blocks(name, "") if block.startswith("lorafit/")))
    there = {
        str(path.relative_to(ROOT))
        for folder in ("lorafit", "examples", "docs")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert len(found) == len(set(found))
    assert set(found) == there


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith("https://"):
            assert (page.parent / target.partition("#")[0]).exists(), target


@pytest.mark.parametrize("name", READMES)
def test_every_verb_is_there(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `lorafit (\w+)`", text, re.MULTILINE)) == set(VERBS)


def test_commands_use_verbs_and_settings_that_exist():
    known = {*defaults(), *(name for kind in METHODS.values() for name in settings(kind)), "user", "key"}
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for verb in re.findall(r"(?:`|^    )lorafit ([a-z]+)", text, re.MULTILINE):
            assert verb in VERBS, f"{page.name}: {verb}"
        for key in re.findall(r"`(?:lorafit [^`]*? )?([a-z_]+)=[^`(]*`", text):
            assert key in known, f"{page.name}: {key}"


def test_each_method_has_a_row_with_its_formula():
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    for name, kind in METHODS.items():
        (row,) = [line for line in text.splitlines() if line.startswith("| `") and f"`{name}`" in line.split("|")[1]]
        assert kind.formula and row.split("|")[2].strip() == kind.formula, name


@pytest.fixture(scope="module")
def run(tiny_model, data_file, tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("readme")
    settings = {"model": str(tiny_model), "out": str(place / "runs" / "data-1"), "steps": 1, "samples": 0}
    return fit.fit(fit.read_config(str(data_file), settings), Terminal(quiet=True)).folder


@pytest.mark.parametrize("name", READMES)
@pytest.mark.filterwarnings("ignore")
def test_the_python_blocks_run(name, run, tiny_model, monkeypatch, capsys):
    monkeypatch.chdir(run.parent.parent)
    found = blocks(name, "python")
    assert len(found) == 2
    for block in found:
        assert len([line for line in block.splitlines() if line.strip()]) <= 15
        exec(block.replace('"smollm2"', repr(str(tiny_model))), {})
    assert float(capsys.readouterr().out.split()[-1]) > 0


def test_no_page_or_module_names_a_place_on_a_machine():
    texts = [*PAGES, *(p for f in ("lorafit", "examples") for p in (ROOT / f).rglob("*") if p.suffix != ".pyc")]
    place = re.compile(r"(?<![\w.~<])/(work|tmp|root|home|mnt|Users)/")
    wrong = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in texts
        if path.is_file()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if place.search(line)
    ]
    assert not wrong, "\n".join(wrong)
