"""docs/results.md is what the benchmarks wrote, and shows pictures that are there."""

import json
import re

from benchmarks.harness import RESULTS
from benchmarks.results import page as results


def test_the_page_is_what_the_benchmarks_wrote():
    page = (results.DOCS / "results.md").read_text()
    assert page == results.text(), "python -m benchmarks.results.page"
    for name in results.SECTIONS:
        assert (RESULTS / f"{name}.md").read_text().strip() in page


def test_every_section_says_how_it_was_measured():
    for name in results.SECTIONS:
        raw = json.loads((RESULTS / f"{name}.json").read_text())
        assert {"processor", "cores", "torch", "commit", "command"} <= raw["machine"].keys(), name
        text = (RESULTS / f"{name}.md").read_text()
        assert raw["machine"]["command"] in text
        assert f"commit {raw['machine']['commit']}" in text


def test_links_and_pictures_lead_somewhere():
    page = (results.DOCS / "results.md").read_text()
    headings = {results._anchor(heading) for heading in re.findall(r"^## (.*)$", page, re.M)}
    for target in re.findall(r"\]\(([^)]*)\)", page):
        if target.startswith("#"):
            assert target[1:] in headings
        else:
            assert (results.DOCS / target).exists(), target
