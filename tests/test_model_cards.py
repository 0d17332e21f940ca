"""The reviewed model cards: metadata that the Hub reads, links that lead somewhere, figures of the pages that they name."""

import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

FOLDER = Path(__file__).parents[1] / "model_cards"
CARDS = sorted(path for path in FOLDER.glob("*.md") if path.name != "README.md")


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.stem)
def test_a_card(path):
    data = ModelCard.load(path).data
    assert data.license == "apache-2.0" and "hf_gdc" in data.tags and data.pipeline_tag and data.library_name
    assert f"({path.name})" in (FOLDER / "README.md").read_text()
    text = path.read_text()
    assert "**Limits.**" in text
    pages = ""
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        assert (FOLDER / link).is_file(), link
        pages += (FOLDER / link).read_text()
    pages += (FOLDER.parent / "README.md").read_text()
    for row in re.findall(r"^\|.*\|$", text, flags=re.M):
        for number in re.findall(r"(?<![\w.])-?\d+\.\d+(?:e-?\d+)?", row):
            assert number in pages, f"{number} stands on none of the pages"
