"""The pages for users are short, plain and true: sentences, links, commands and scripts."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.main import get_command

from cllm_export.cli.entry import app
from cllm_export.tensorrt.library import TENSORRT, version_numbers
from cllm_export.training.options import TuneOptions

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "cllm_export"
README = ROOT / "README.md"
ARCHITECTURE = ROOT / "ARCHITECTURE.md"
PAGES = (README, *sorted((ROOT / "docs").glob("*.md")))
BESIDE_CODE = [page for name in ("benchmarks", "examples") for page in sorted((ROOT / name).glob("**/README.md"))]
CHECKED = (*PAGES, ARCHITECTURE, ROOT / "CONTRIBUTING.md", *BESIDE_CODE)
"""Pages whose links, commands and scripts must exist."""
PROSE = dict.fromkeys(PAGES, 22) | {ARCHITECTURE: 25}
"""The most words that a sentence of a page may have, as the mean of the page."""
MOST_LINES = {README: 150, ARCHITECTURE: 150}
"""What everybody reads is short; the rest is in docs/."""

FENCE = re.compile(r"^```[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?:(?<=\n\n)|\A)(?: {4}[^\n]*(?:\n|\Z)|\n(?= {4}))+")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
SPAN = re.compile(r"`([^`\n]+)`")
COMMAND = re.compile(r"(?:\bcllm-export|-m cllm_export) ([a-z][a-z-]*)\b(.*)")
SCRIPT = re.compile(r"\b(?:benchmarks|examples)/[\w/]+\.(?:py|sh|yaml)\b")
MODULE = re.compile(r"(?<![\w./-])(?:[\w-]+/)+\w+\.py\b")
"""A Python file with its folder, wherever on a page."""
PLACE = re.compile(r"(?:[a-z_0-9]+/)+|\w+\.py")
"""A folder, or a Python file without one: a span of this form alone is a place. Capitals are placeholders."""
SENTENCE_END = re.compile(r"(?<=[.!?])[)*\"]*\s+(?=[\"(*`\[]*[A-Z0-9`\[])")

each_page = pytest.mark.parametrize("page", CHECKED, ids=[str(page.relative_to(ROOT)) for page in CHECKED])


def _spaced(text: str) -> str:
    """The page with an empty line after each heading, where an indented block may begin without one."""
    return re.sub(r"^(#+ .*\n)", r"\1\n", text, flags=re.MULTILINE)


def blocks_of(text: str) -> list[str]:
    """The code blocks of a page, fenced and indented, with continued lines joined."""
    fenced = FENCE.findall(text)
    indented = INDENTED.findall(_spaced(FENCE.sub("", text)))
    return [re.sub(r"\\\n\s*", " ", block) for block in (*fenced, *indented)]


def prose_of(text: str) -> Iterator[str]:
    """The paragraphs and list items of a page: no code, table or heading."""
    text = INDENTED.sub("\n", _spaced(FENCE.sub("\n", text)))
    paragraph: list[str] = []
    for line in [*text.splitlines(), ""]:
        is_item = re.match(r"\s*(?:[-*]|\d+\.) ", line)
        is_prose = line.strip() and not line.startswith(("#", "|", "<", "!["))
        if paragraph and (is_item or not is_prose):
            yield " ".join(paragraph)
            paragraph = []
        if is_prose:
            paragraph.append(re.sub(r"^\s*(?:[-*]|\d+\.) ", "", line).strip())


def sentences_of(text: str) -> list[str]:
    return [sentence for paragraph in prose_of(text) for sentence in SENTENCE_END.split(paragraph)]


def count_words(sentence: str) -> int:
    """Words of a sentence; a span of code is one, and the target of a link none."""
    plain = SPAN.sub("code", re.sub(r"\]\([^)]*\)", "]", sentence))
    return len([word for word in plain.split() if re.search(r"\w", word)])


def anchors_of(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def calls_of(text: str) -> Iterator[tuple[str, list[str]]]:
    """Every command in code with its options: in blocks by its full name, in spans of prose by either."""
    names = set(get_command(app).commands)
    lines = [line for block in blocks_of(text) for line in block.splitlines()]
    for span in SPAN.findall(INDENTED.sub("", _spaced(FENCE.sub("", text)))):
        is_call = span.split()[0] in names and " --" in span
        lines.append(f"cllm-export {span}" if is_call else span)
    for line in lines:
        for part in re.split(r"&&|\||;", line):
            if match := COMMAND.search(part):
                words = shlex.split(match[2].replace("...", ""), comments=True)
                yield match[1], [word.split("=")[0] for word in words if word.startswith("-") and word != "-"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("One two. Three `a b c` four.\n\n- five\n  six\n- seven\n", [2, 3, 2, 1]),
        ("# No\n\n| no | no |\n\n    no\n    no\n\nyes [it is](x/y.md)\n", [3]),
        ("```\nno no\n```\nn = 1.5 is 2 words. No?\n", [5, 1]),
    ],
)
def test_counts_the_words_of_sentences(text: str, words: list[int]) -> None:
    assert [count_words(sentence) for sentence in sentences_of(text)] == words


def test_finds_the_options_of_commands() -> None:
    """A command is found in a block and in a span, over continued lines and without comments."""
    block = "    x cllm-export bench B --limit 1 \\\n        --sweep=4  # --no\n"
    page = f"Use `build --force`.\n\n{block}\n`python -m cllm_export tune`\n"
    assert list(calls_of(page)) == [("bench", ["--limit", "--sweep"]), ("build", ["--force"]), ("tune", [])]


@pytest.mark.parametrize("page", MOST_LINES, ids=[page.name for page in MOST_LINES])
def test_pages_for_everybody_are_short(page: Path) -> None:
    assert len(page.read_text(encoding="utf-8").splitlines()) <= MOST_LINES[page]


@pytest.mark.parametrize("page", PROSE, ids=[page.name for page in PROSE])
def test_sentences_are_short(page: Path) -> None:
    """The mean sentence of a page is short enough to be read once."""
    counts = [count_words(sentence) for sentence in sentences_of(page.read_text(encoding="utf-8"))]
    assert sum(counts) / len(counts) < PROSE[page], f"{page.name}: {sum(counts) / len(counts):.1f} words a sentence"


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    """A relative link names a file, and its anchor a heading of that file."""
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if link.startswith(("http:", "https:")):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{page.name} links to {link}"
        assert not anchor or anchor in anchors_of(target), f"{page.name} links to {link}"


@each_page
def test_commands_exist(page: Path) -> None:
    """Every command of a page exists, and has the options that the page gives it."""
    commands = get_command(app).commands
    for name, options in calls_of(page.read_text(encoding="utf-8")):
        assert name in commands, f"{page.name}: cllm-export {name}"
        known = {flag for option in commands[name].params for flag in (*option.opts, *option.secondary_opts)}
        assert set(options) <= known | {"--help", "--debug"}, f"{page.name}: cllm-export {name} {options}"


@each_page
def test_scripts_exist(page: Path) -> None:
    """Every script and example of a page is a file of the repository."""
    for script in SCRIPT.findall(page.read_text(encoding="utf-8")):
        assert (ROOT / script).is_file(), f"{page.name}: {script}"


def places_of(text: str) -> set[str]:
    """The files and folders of the source that a page names: files anywhere, folders and bare names as a span."""
    return {*MODULE.findall(text), *filter(PLACE.fullmatch, SPAN.findall(text))}


def is_place(name: str) -> bool:
    """Whether the repository or the package has this file or folder; of a bare file name, whether any folder has it."""
    if "/" in name:
        return any((root / name).exists() for root in (ROOT, PACKAGE))
    return any(next(folder.rglob(name), None) for folder in (PACKAGE, ROOT / "tests", ROOT / "benchmarks"))


@pytest.mark.parametrize(
    ("text", "places"),
    [
        ("`runtime/load.py` and `load.py`, not load.py", {"runtime/load.py", "load.py"}),
        ("    a: exporter/graph/trace.py\n", {"exporter/graph/trace.py"}),
        ("`bundle/`, `a/b`, `plans/KEY/`, `ENV/bin/python x`, `x.py y`", {"bundle/"}),
    ],
)
def test_finds_the_places_of_a_page(text: str, places: set[str]) -> None:
    assert places_of(text) == places


@pytest.mark.parametrize("page", PROSE, ids=[page.name for page in PROSE])
def test_places_exist(page: Path) -> None:
    """Every file and folder of the source that a page names is where the page says, after each move."""
    missing = {name for name in places_of(page.read_text(encoding="utf-8")) if not is_place(name)}
    assert not missing, f"{page.name}: {missing}"


def test_the_architecture_names_every_folder() -> None:
    text = ARCHITECTURE.read_text(encoding="utf-8")
    folders = {path.parent.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py")} - {"."}
    assert not {folder for folder in folders if not re.search(rf"^    {folder}/ ", text, re.MULTILINE)}


def test_every_page_is_reached_from_the_readme() -> None:
    linked = set(LINK.findall(README.read_text(encoding="utf-8")))
    assert {f"docs/{page.name}" for page in PAGES[1:]} <= {link.partition("#")[0] for link in linked}


def table_of(text: str, first: str) -> list[list[str]]:
    """The cells of the table whose first heading this is, row by row."""
    rows = text.partition(f"| {first} |")[2].partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_the_table_of_systems_follows_from_the_floors() -> None:
    """A system works if its TensorRT and its Python are new enough. A JetPack for each of 5, 6 and 7 is there."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    oldest_python = version_numbers(project["requires-python"])
    rows = table_of((ROOT / "docs" / "tensorrt.md").read_text(encoding="utf-8"), "system")
    jetpacks = [row for row in rows if row[0].startswith("JetPack") and re.match(r"\d", row[1])]
    assert {row[0].split()[1].split(".")[0] for row in jetpacks} == {"5", "6", "7"}
    for system, tensorrt, python, works in jetpacks:
        newest = version_numbers(tensorrt.split(",")[-1])
        fits = newest >= TENSORRT.oldest and version_numbers(python) >= oldest_python
        assert works.startswith("yes" if fits else "no: "), system
    assert {"Windows", "Linux, x86-64, RTX cards, TensorRT for RTX"} <= {row[0] for row in rows}


def test_the_page_on_training_states_the_defaults() -> None:
    """What it calls the default is the default of ``tune``."""
    text = " ".join((ROOT / "docs" / "train.md").read_text(encoding="utf-8").split())
    options = TuneOptions(steps=1)
    assert f"**Start with {options.block_sizes[0]}.** It is the default here." in text
    stated = re.search(r"AdamW: (\S+)\*\*, the default", text)
    assert stated is not None
    assert float(stated[1]) == options.learning_rate
    assert f"falls over the last {options.decay:.0%} of a run".replace("%", " %") in text
    assert f"our default is {options.autoregressive_weight:.0f}." in text


def test_reading_the_command_line_needs_no_torch() -> None:
    """What these tests import stays light."""
    code = "import sys, cllm_export.cli.entry; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT).returncode == 0
