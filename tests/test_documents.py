"""The documentation: one sentence a line, a narrow README, anchors and names that exist, the changelog's headings."""

import importlib
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "csrc" / "README.md",
    *sorted((ROOT / "examples").glob("*/README.md")),
    *sorted((ROOT / "docs").glob("**/*.md")),
]
#: Columns of README.md, so that its source can be read in a terminal.
README_COLUMNS = 160


def prose(text: str) -> list[tuple[int, str]]:
    """Number and text of every line but those of code, tables and headings; inline code becomes one letter."""
    lines, in_code, before = [], False, ""
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("```"):
            in_code = not in_code
        # four spaces after an empty line are code, otherwise the continuation of a list's item
        indented = line.startswith("    ") and (not before or before == "code")
        if not in_code and not indented and not line.startswith(("```", "|", "#", "<", "![")):
            lines.append((number, re.sub(r"`[^`]*`", "X", line)))
        before = "code" if indented else line.strip()
    return lines


def sentence_ends(line: str) -> int:
    """How often a sentence ends inside of the line and another one begins."""
    line = re.sub(r"^\s*(?:[-*]|\d+\.)\s+(?:\*\*[^*]*[.:]\*\*\s)?", "", line)
    return len(re.findall(r"(?<!\be\.g)(?<!\bi\.e)(?<!\bvs)[.!?][)\"”]?\s+[\[(\"“*]*[A-Z0-9]", line))


@pytest.mark.parametrize(
    ("line", "ends"),
    [
        ("One sentence, with 2.5 us and a.b.", 0),
        ("- **Title.** One sentence.", 0),
        ("1. One sentence (e.g. This).", 0),
        ("One sentence. Another.", 1),
        ("(One sentence.) Another. X is a third.", 2),
    ],
)
def test_sentence_ends_are_found(line: str, ends: int) -> None:
    assert sentence_ends(line) == ends


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_line_holds_one_sentence(document: Path) -> None:
    assert [f"{number}: {line}" for number, line in prose(document.read_text()) if sentence_ends(line)] == []


def test_readme_fits_a_terminal() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    widths = {number: len(line) for number, line in enumerate(lines, 1)}
    assert {number: width for number, width in widths.items() if width > README_COLUMNS} == {}


def anchors(document: Path) -> set[str]:
    """Anchors of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "document", [*DOCUMENTS, ROOT / "CHANGELOG.md"], ids=lambda path: path.relative_to(ROOT).as_posix()
)
def test_anchors_of_links_exist(document: Path) -> None:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", document.read_text(), flags=re.DOTALL)
    targets = [re.match(r"(?![a-z]+:)([^#]*)#(.+)", target) for target in re.findall(r"\]\(([^)\s]+)\)", text)]
    found = [(document.parent / match[1] if match[1] else document, match[2]) for match in targets if match]
    assert [f"{path.name}#{anchor}" for path, anchor in found if anchor not in anchors(path)] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_names_of_the_package_exist(document: Path) -> None:
    for name in sorted(set(re.findall(r"\bsharedllm_ext(?:\.[A-Za-z_]\w*)+", document.read_text()))):
        found: object = importlib.import_module("sharedllm_ext")
        path = "sharedllm_ext"
        for part in name.split(".")[1:]:
            path += f".{part}"
            # a module that nothing has imported yet is no attribute of its package
            try:
                found = getattr(found, part, None) or importlib.import_module(path)
            except ModuleNotFoundError as error:
                if error.name != "lm_eval":
                    raise
                # a module over a package that need not be there
                found = importlib.util.find_spec(path)
        assert found is not None


def test_changes_stand_under_their_kind() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    newest = re.split(r"^## .*\n", text, flags=re.MULTILINE)[1]
    assert newest.startswith("### "), newest[:60]
    headings = re.findall(r"^### (.*)$", newest, re.MULTILINE)
    assert headings == [kind for kind in ("Added", "Changed", "Removed", "Fixed") if kind in headings]


def glossary() -> list[tuple[str, str]]:
    """Term and place of every row of the glossary."""
    text = (ROOT / "csrc" / "README.md").read_text()
    table = text.split("## Glossary\n")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]
    return [(term, place) for term, _, place in rows[2:]]


@pytest.mark.parametrize(("term", "place"), glossary(), ids=lambda text: text.split("`")[0][:20].strip())
def test_the_glossary_names_what_there_is(term: str, place: str) -> None:
    names = re.findall(r"`([^`]+)`", place)
    # in csrc, or in the repository
    paths = [next((p for p in (ROOT / "csrc" / x, ROOT / x) if p.exists()), ROOT / x) for x in names if "/" in x]
    assert paths, f"{term}: expected a file, got {place}"
    assert [path.relative_to(ROOT).as_posix() for path in paths if not path.exists()] == []
    source = "".join(file.read_text() for path in paths for file in ([path] if path.is_file() else path.iterdir()))
    assert [name for name in names if "/" not in name and not re.search(rf"\b{name}\b", source)] == []
