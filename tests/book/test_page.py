"""A table as a static page: what a cell holds is text, never markup."""

import json
import re

import pandas as pd
import pytest

from steerkit.book import page


def test_the_rows_are_in_the_page_and_no_text_ends_its_script(tmp_path):
    rows = pd.DataFrame({"topic": ["love", "<b>"], "cost": [0.25, 1 / 3], "text": ["</script><script>alert(1)", 'she said "yes" & left']})
    text = page.table(rows, tmp_path / "t.html", title="Texts <of> love").read_text()
    data = re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.S)[1]
    assert json.loads(data) == {"columns": ["topic", "cost", "text"], "rows": rows.round(3).to_numpy().tolist()}
    assert text.count("<script") == 2 and "<title>Texts &lt;of&gt; love</title>" in text
    shown = page.show(tmp_path / "t.html")
    assert "srcdoc=" in shown._repr_html_() and "<script" not in shown._repr_html_() and str(shown) == "t.html: open it in a browser"


def test_a_table_without_rows_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Texts: expected at least one row"):
        page.table(pd.DataFrame({"a": []}), tmp_path / "t.html", title="Texts")
    assert not list(tmp_path.iterdir())
