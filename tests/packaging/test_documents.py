"""The TOML in the documents is right, and the links in them lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from twinkle import config

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/*.md"), ROOT / "examples/README.md"])
# Other tools' files, shown for what they say to Twinkle.
FOREIGN = ("[project.",)


def examples() -> list[object]:
    found = []
    for page in PAGES:
        for index, text in enumerate(re.findall(r"^```toml\n(.*?)^```", page.read_text(), re.DOTALL | re.M)):
            if not text.startswith(FOREIGN):
                found.append(pytest.param(text, id=f"{page.relative_to(ROOT)}-{index}"))
    return found


@pytest.mark.parametrize("text", examples())
def test_toml_of_a_document_is_a_right_configuration(tmp_path, text):
    path = tmp_path / "twinkle.toml"
    path.write_text(text)
    settings = config.load([str(path)], {}, cwd=str(tmp_path))
    assert any(settings.records())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_a_document_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []
