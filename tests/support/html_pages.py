"""What a page holds, read by the standard library's parser."""

import re
from html.parser import HTMLParser
from xml.etree import ElementTree


class Page(HTMLParser):
    """Text, tags, ids, handlers, and everything that could load something."""

    def __init__(self, source):
        super().__init__()
        self.source = source
        self.texts, self.tags, self.ids, self.links, self.attributes, self._open = [], [], [], [], [], []
        self.unbalanced = []
        # What only keeps a number on one line is no word of its own.
        self.feed(re.sub(r'<span class="whole">(.*?)</span>', r"\1", source))
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in ("meta", "img", "br"):
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]
        self.ids += [value for name, value in attrs if name == "id"]
        self.links += [value for name, value in attrs if name in ("href", "xlink:href", "src", "srcset", "data")]

    def handle_endtag(self, tag):
        if self._open[-1:] != [tag]:
            self.unbalanced.append((tag, self._open[-3:]))
        else:
            self._open.pop()

    def handle_data(self, data):
        if self._open[-1:] != ["style"]:
            self.texts.append(data)

    @property
    def drawings(self):
        return re.findall(r"<svg.*?</svg>", self.source, flags=re.DOTALL)

    @property
    def titles(self):
        """Of the charts, in the order of their names."""
        return sorted(re.findall(r"<figure><h3>(.*?)</h3><svg", self.source))

    @property
    def charts(self):
        """The names of the charts, by which their ids are kept apart."""
        return set(re.findall(r'<g id="([\w-]+)-figure_1">', self.source))


def assert_sound(source):
    """Self-contained, well-formed, and each chart with a name and ids of its own. Returns the page."""
    page = Page(source)
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in page.links)
    assert not {"script", "link", "img", "iframe", "object", "base", "form"} & set(page.tags)
    assert not [name for name in page.attributes if name.startswith("on")]
    assert "@import" not in source
    assert re.findall(r"url\((?!#)", source) == []
    assert not page.unbalanced
    assert len(page.ids) == len(set(page.ids)), "two charts share an id, so that one would clip or mark like the other"
    targets = {link[1:] for link in page.links if link.startswith("#")} | set(re.findall(r"url\(#([^)]+)\)", source))
    assert targets <= set(page.ids)
    for drawing in page.drawings:
        root = ElementTree.fromstring(drawing)
        assert root.get("role") == "img"
        assert len(root.get("aria-label")) > 20
        assert "currentColor" in drawing
        # Neither a placeholder of the drawing nor a formula that nobody set.
        assert not re.search(r"#010203|mathdefault|\bnan\b|\binf\b", drawing)
    assert "could not be made" not in page.text
    return page
