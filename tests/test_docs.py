"""The documents say what is there: files, links, verbs, settings, code that runs; and no path of anyone's machine."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lorafit import fit
from lorafit.cli import VERBS
from lorafit.config import defaults
from lorafit.log import Terminal
from lorafit.methods import METHODS, Method, settings
from lorafit.verbs.methods import described, page_of, shown

ROOT = Path(__file__).parent.parent
READMES = ["README.md", "README.zh.md"]
PAGES = [ROOT / "CHANGELOG.md", *(ROOT / name for name in READMES), *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(name: str, kind: str) -> list[str]:
    """The fenced blocks of a kind in a page."""
    return re.findall(rf"^```{kind}\n(.*?)^```$", (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def listed(tree: str) -> list[str]:
    """The files in an indented tree, as paths; those of a folder under which nothing is listed are all that it holds."""
    folders: list[str] = []
    found = []
    for line in tree.splitlines():
        name = line.split()[0]
        folders = folders[: (len(line) - len(line.lstrip())) // 2]
        found.append("".join(folders) + name)
        if name.endswith("/"):
            folders.append(name)
    whole = [name for name in found if name.endswith("/") and sum(other.startswith(name) for other in found) == 1]
    files = [name for name in found if not name.endswith("/")]
    return files + [
        str(path.relative_to(ROOT)) for name in whole for path in (ROOT / name).rglob("*") if path.is_file()
    ]


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


# --- the pages of the methods ------------------------------------------------------------------------------------------

LANGUAGES = {"docs": "en", "docs/zh": "zh"}
HEADINGS = {
    "en": ["Formula", "When to use it", "The trap", "Settings", "Goes with", "Example"],
    "zh": ["公式", "何时使用", "陷阱", "设置", "搭配", "示例"],
}
KINDS = {"en": ("experts", "embeddings", "base in 4 or 8 bits"), "zh": ("专家权重", "嵌入", "4 位或 8 位基座")}
YES = {"en": "yes", "zh": "是"}
QUANT = {
    "en": {"yes": "yes", "own codes": "yes, in codes of its own", "needed": "needed, in codes of its own"},
    "zh": {"yes": "是", "own codes": "是，编码是它自己的", "needed": "必需，编码是它自己的"},
}
EACH = pytest.mark.parametrize("method", METHODS)
IN_BOTH = pytest.mark.parametrize("folder", LANGUAGES)


def sections(folder: str, method: str) -> dict[str, str]:
    """A method's page by heading, in order; what stands before the first under ""."""
    text = (ROOT / folder / Path(page_of(method)).relative_to("docs")).read_text(encoding="utf-8")
    parts = re.split(r"^## (.*)\n", text, flags=re.MULTILINE)
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


def rows(text: str) -> list[list[str]]:
    """The cells of a table, without its head."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line != "| | |"]


@IN_BOTH
def test_each_method_has_a_page_and_no_page_lacks_its_method(folder):
    assert {path.name for path in (ROOT / folder / "methods").iterdir()} == {Path(page_of(m)).name for m in METHODS}


@IN_BOTH
@EACH
def test_a_page_has_its_headings_its_paper_and_its_formula(folder, method):
    found, language, kind = sections(folder, method), LANGUAGES[folder], METHODS[method]
    assert list(found) == ["", *HEADINGS[language]] and all(len(text.split("\n")) > 2 for text in found.values())
    assert not kind.paper or f"https://arxiv.org/abs/{kind.paper}" in found[""]
    (formula,) = re.findall(r"^    (.*)", found[HEADINGS[language][0]], re.MULTILINE)
    overview = (ROOT / folder / "methods.md").read_text(encoding="utf-8").splitlines()
    (row,) = [line.split("|") for line in overview if line.startswith("| [`") and f"[`{method}`]" in line.split("|")[1]]
    assert f"({Path(page_of(method)).relative_to('docs')})" in row[1]
    assert formula == row[2].strip() and (language == "zh" or formula == kind.formula)


@IN_BOTH
@EACH
def test_a_page_has_the_methods_settings_with_their_defaults(folder, method):
    text = sections(folder, method)[HEADINGS[LANGUAGES[folder]][3]]
    named = [[key.strip("`"), default] for key, default, _ in rows(text)[1:]]
    assert named == [[key, shown(default)] for key, (_, default) in settings(METHODS[method]).items()]
    (rate,) = re.findall(r"LoRA(?:'s| 的)(?: × ([\d.]+))?\W*\[advice.md\]", text)
    assert float(rate or 1) == METHODS[method].lr_factor
    assert f"`{','.join(METHODS[method].targets)}`" in text.split("[advice.md]")[1]


@IN_BOTH
@EACH
def test_a_page_says_what_the_method_goes_with(folder, method):
    language, known = LANGUAGES[folder], described(method)
    found = dict(rows(sections(folder, method)[HEADINGS[language][4]]))
    experts, embeddings, quant = KINDS[language]
    for label, there in ((experts, "experts" in known["kinds"]), (embeddings, "embedding" in known["kinds"])):
        assert (found[label] == YES[language]) == there, label
    assert (found["`dropout`"] == YES[language]) == known["dropout"]
    assert found[quant] == QUANT[language][known["quant"]]
    assert re.findall("`([^`]+)`", found["`export --format`"]) == known["formats"]
    assert ("`cat`" in found["`adapter combine`"]) == known["low_rank"]
    stored = found["stored as" if language == "en" else "存储为"]
    assert (stored == f"PEFT {known['peft']}") == (known["peft"] != "own format")


@IN_BOTH
@EACH
def test_the_example_of_a_page_is_a_training_that_could_begin(folder, method):
    (line,) = sections(folder, method)[HEADINGS[LANGUAGES[folder]][5]].strip().splitlines()
    verb, data, *words = line.split()[1:]
    config = fit.read_config(data, dict(word.split("=", 1) for word in words))
    assert verb == "train" and config.method == method


@IN_BOTH
def test_a_method_of_your_own_is_twenty_lines_and_a_law_abiding_method(folder, monkeypatch):
    """It adds what its matrix says, and nothing at first."""
    text = (ROOT / folder / "methods.md").read_text(encoding="utf-8")
    (block,) = [part for part in re.split(r"^(?=\S)", text, flags=re.MULTILINE) if "class Gain" in part]
    code = textwrap.dedent(block.split("\n", 1)[1])
    assert len([line for line in code.splitlines() if line.strip()]) <= 20
    monkeypatch.setitem(METHODS, "gain", Method)  # which puts the registry back
    exec(code, {})
    w, x = torch.randn(3, 4), torch.randn(5, 4)
    layer = METHODS["gain"](SimpleNamespace(shape=w.shape))
    assert settings(METHODS["gain"]) == {"spread": (float, 0.0)} and not layer.delta_weight(w).any()
    torch.nn.init.normal_(layer.g)
    added = layer(x, x @ w.T, lambda x, m: x @ m.T, lambda: w)
    torch.testing.assert_close(added, x @ layer.delta_weight(w).T, rtol=0, atol=1e-5)


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
