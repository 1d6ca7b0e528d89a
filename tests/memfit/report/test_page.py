import json
import random
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from markupsafe import Markup

from memfit.errors import RunStateError
from memfit.report import plots
from memfit.report.blocks import Note, Section
from memfit.report.history import MAX_POINTS
from memfit.report.page import SECTIONS, render, write_report
from memfit.report.run_files import read_run

VOID = {"meta", "link", "br", "hr", "img", "input"}
HOSTILE = """<script>alert("x")</script>'"><img src=x onerror=alert(1)> {{ 7 * 7 }} & ümlaut"""


class Page(HTMLParser):
    """A parsed page: its elements, and its text by section."""

    def __init__(self, html):
        super().__init__()
        self.open, self.elements, self.texts, self.tables = [], [], {}, {}
        self.feed(html)
        self.close()
        assert self.open == [], f"unclosed: {self.open}"

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.elements.append((tag, attributes))
        if tag not in VOID:
            self.open.append((tag, attributes.get("id")))
        if tag == "tr":
            self.tables.setdefault(self.section, []).append([])
        if tag in ("td", "th"):
            self.tables[self.section][-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open[-1][0] == tag, f"</{tag}> closes {self.open[-1]}"
        self.open.pop()

    def handle_data(self, data):
        self.texts[self.section] = self.texts.get(self.section, "") + data
        if any(tag in ("td", "th") for tag, _ in self.open) and self.tables.get(self.section):
            self.tables[self.section][-1][-1] += data

    @property
    def section(self):
        for tag, key in self.open:
            if tag == "section":
                return key
            if tag in ("header", "title", "style"):
                return tag
        return "page"

    def row(self, section, *starts):
        """The first table row of a section whose first cells begin so."""
        found = [
            row
            for row in self.tables[section]
            if all(cell.startswith(start) for cell, start in zip(row, starts, strict=False))
        ]
        return found[0]


def page_of(run_dir):
    html = write_report(run_dir).read_text()
    return Page(html)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The page of a finished run, made once."""
    import importlib.util
    from pathlib import Path

    spec = importlib.util.spec_from_file_location("synthetic", Path(__file__).with_name("conftest.py"))
    synthetic = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(synthetic)
    return page_of(synthetic.build_run(tmp_path_factory.mktemp("run")))
