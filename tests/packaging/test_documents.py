"""The TOML in the documents is right, what they link to exists, and generated pages are up to date."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from twinkle import config

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / "README.md",
    *sorted(ROOT.glob("docs/**/*.md")),
    ROOT / "examples/README.md",
    ROOT / "sitecustomize_template/README.md",
]
DECISIONS = sorted(ROOT.glob("docs/decisions/*.md"))
# Other tools' files, shown for what they say to Twinkle.
FOREIGN = ("[project.",)
SHAPE = ["Question", "Candidates", "Measured", "Decision", "Consequences"]


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


def examples() -> list[object]:
    found = []
    for page in PAGES:
        for index, text in enumerate(re.findall(r"^```toml\n(.*?)^```", page.read_text(), re.DOTALL | re.M)):
            if not text.startswith(FOREIGN):
                found.append(pytest.param(text, id=f"{named(page)}-{index}"))
    return found


@pytest.mark.parametrize("text", examples())
def test_toml_of_a_document_is_a_right_configuration(tmp_path, text):
    path = tmp_path / "twinkle.toml"
    path.write_text(text)
    settings = config.load([str(path)], {}, cwd=str(tmp_path))
    assert any(settings.records())


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_of_a_document_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_anchors_of_a_document_are_headings(page):
    lost = []
    for link, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#([^)]+)\)", page.read_text()):
        headings = re.findall(r"^#+ (.*)$", (page.parent / link if link else page).read_text(), re.M)
        slugs = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
        lost += [f"{link}#{anchor}"] if anchor not in slugs else []
    assert lost == []


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_files_that_a_document_names_exist(page):
    paths = re.findall(
        r"`((?:twinkle|tests|docs|benchmarks|examples)/[\w./-]+\.(?:py|md|toml))`", page.read_text()
    )
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_architecture_names_every_folder_and_root_module():
    page = (ROOT / "docs/architecture.md").read_text()
    names = [f"{path.parent.name}/" for path in ROOT.glob("twinkle/*/__init__.py")]
    names += [path.name for path in ROOT.glob("twinkle/*.py")]
    assert [name for name in names if f"`{name}`" not in page] == []


@pytest.mark.parametrize("page", DECISIONS, ids=named)
def test_decisions_have_one_shape(page):
    text = page.read_text()
    assert text.startswith(f"# {page.name[:4]}: ")
    headings = re.findall(r"^## (.*)$", text, re.M)
    assert headings == [heading for heading in SHAPE if heading in headings]
    assert {"Question", "Candidates", "Decision", "Consequences"} <= set(headings)


def test_the_page_of_coverage_is_what_its_data_gives(tmp_path):
    pytest.importorskip("transformers")
    data, page = ROOT / "benchmarks/results/coverage.json", tmp_path / "coverage.md"
    subprocess.run(
        [sys.executable, ROOT / "benchmarks/coverage.py", "--from", data, "--write", page],
        check=True,
        capture_output=True,
    )
    assert page.read_text() == (ROOT / "docs/coverage.md").read_text()


def test_the_totals_of_coverage_count_its_families():
    data = json.loads((ROOT / "benchmarks/results/coverage.json").read_text())
    with_kernel, without = data["families"], data["families_without_kernel"]
    for op, total in data["totals"].items():
        families = {name for table in (with_kernel, without) for name, ops in table.items() if op in ops}
        assert total["families"] == len(families), op
        assert total.get("wired", len(families)) == sum(op in ops for ops in with_kernel.values()), op
