"""What a test reads off a page: its tags and text. And a picture of a few bytes."""

from __future__ import annotations

from html.parser import HTMLParser

import numpy as np

from ops.sheets import png


class Page(HTMLParser):
    """Every attribute and the text of a page whose tags all close."""

    VOID = frozenset({"meta", "img", "br", "line"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def dot(red: int) -> bytes:
    """A picture of one colour."""
    return png(np.full((4, 4, 3), (red, 0, 0), np.uint8))
