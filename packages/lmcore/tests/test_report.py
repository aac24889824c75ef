"""The page is one file: nothing is fetched, text is escaped, figures are inline and reproducible."""

import matplotlib
import pytest

from lmcore.report import Page, svg

matplotlib.use("Agg")
import matplotlib.pyplot as plt


@pytest.fixture
def figure():
    drawn, axes = plt.subplots()
    axes.plot([1, 2, 3])
    yield drawn
    plt.close(drawn)


def test_page_is_self_contained(tmp_path, figure):
    page = Page("Title <b>", "Lead & all")
    page.section("Section")
    page.text("a < b")
    page.table([{"name": "x<y", "value": 0.123456, "none": None}, {"name": "z", "value": 2, "none": 1}], "Caption")
    page.table([])
    page.figure(figure, 'A "line"')
    page.write(tmp_path / "index.html")
    text = (tmp_path / "index.html").read_text()
    assert "Title &lt;b&gt;" in text
    assert "x&lt;y" in text
    assert "0.1235" in text
    assert 'aria-label="A &quot;line&quot;"' in text
    assert "<svg" in text
    assert "src=" not in text
    assert "<link" not in text


def test_same_figure_gives_the_same_bytes(figure):
    assert svg(figure) == svg(figure)
