"""Parses an HTML page strictly, and checks what every page of ours must keep."""

import base64
import hashlib
import itertools
import re
from html.parser import HTMLParser

VOID = {"meta", "img", "input", "br", "hr", "link"}
ADDRESSES = ("src", "href", "xlink:href", "srcset", "action", "data", "poster", "formaction", "background")


class Element:
    def __init__(self, tag, attrs, parent):
        self.tag, self.attrs, self.parent, self.content = tag, attrs, parent, []

    def all(self, tag=None, **attrs):
        """The elements inside with this tag and these attributes; ``class_`` is one of several classes."""
        found = []
        for child in (c for c in self.content if isinstance(c, Element)):
            if tag in (None, child.tag) and all(child.has(k.strip("_"), v) for k, v in attrs.items()):
                found.append(child)
            found += child.all(tag, **attrs)
        return found

    def one(self, tag=None, **attrs):
        (element,) = self.all(tag, **attrs)
        return element

    def has(self, name, value):
        mine = self.attrs.get(name)
        return mine is not None and value in (mine.split() if name == "class" else [mine])

    def inside(self, tag):
        return self.parent is not None and (self.parent.tag == tag or self.parent.inside(tag))

    @property
    def text(self):
        parts = (c if isinstance(c, str) else c.text for c in self.content)
        return " ".join(" ".join(parts).split())


class Parser(HTMLParser):
    def __init__(self):
        super().__init__()
        self.top = self.here = Element("", {}, None)

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"<{tag}> has an attribute twice: {attrs}"
        element = Element(tag, {k: v or "" for k, v in attrs}, self.here)
        self.here.content.append(element)
        if tag not in VOID:
            self.here = element

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.here = self.here.parent

    def handle_endtag(self, tag):
        assert tag == self.here.tag, f"</{tag}> closes <{self.here.tag}>"
        self.here = self.here.parent

    def handle_data(self, data):
        self.here.content.append(data)


def parsed(text):
    parser = Parser()
    parser.feed(text)
    parser.close()
    assert parser.here is parser.top, f"<{parser.here.tag}> is not closed"
    return parser.top


def checked(text):
    """The page in ``text``, which must need nothing but itself, run no foreign script, and be for everybody."""
    page = parsed(text)
    everything = page.all()
    _needs_nothing_else(page, everything, text)
    _allows_its_own_script_alone(page)
    ids = [e.attrs["id"] for e in everything if "id" in e.attrs]
    assert len(set(ids)) == len(ids)
    assert page.one("html").attrs["lang"] == "en"
    assert len(page.all("h1")) == 1
    assert all(e.attrs.get("alt", "").strip() for e in page.all("img"))
    assert all(e.attrs.get("aria-label") or e.has("aria-hidden", "true") for e in page.all("svg"))
    assert all(e.attrs["for"] in ids for e in page.all("label"))
    assert all(e.text or e.all("img") for e in page.all("a")), "a link without words"
    levels = [int(e.tag[1]) for e in everything if re.fullmatch("h[1-6]", e.tag)]
    assert all(b <= a + 1 for a, b in itertools.pairwise(levels)), "a heading skips a level"
    shown = " ".join(e.text for e in page.all("main") + page.all("header"))
    recipes = "".join(e.text for e in page.all("pre"))
    for word in ("nan", "inf", "None", "NaN", "Infinity"):
        assert len(re.findall(rf"\b{word}\b", shown)) == len(re.findall(rf"\b{word}\b", recipes)), word
    assert not re.search(r"=\"[^\"]*\bnan\b", re.sub(r'alt="[^"]*"', "", text)), "a drawing with a NaN"
    for table in page.all("table"):
        widths = {len(row.all("th") + row.all("td")) for row in table.all("tr")}
        assert len(widths) == 1, "a table with rows of several lengths"
        assert widths.pop() <= 6, "more columns than fit beside each other"
        headings = [th.text for th in table.one("thead").all("th")][1:]
        for row in table.one("tbody").all("tr"):
            assert [td.attrs["data-label"] for td in row.all("td")] == headings, "cards lack their headings"
    return page


def _needs_nothing_else(page, everything, text):
    ids = {e.attrs["id"] for e in everything if "id" in e.attrs}
    for element in everything:
        assert not [name for name in element.attrs if name.startswith("on")], element.attrs
        assert "style" not in element.attrs, "the policy refuses style attributes"
        for name in ADDRESSES:
            if (address := element.attrs.get(name)) is None:
                continue
            if element.tag == "img":
                assert re.match(r"data:image/(png|jpeg);base64,[\w+/]+=*$", address)
            else:
                assert address.startswith("#"), address
                assert address[1:] in ids, f"{address} leads nowhere"
    outside = {"link", "iframe", "object", "embed", "base", "form", "video", "audio", "image", "use"}
    assert not outside & {e.tag for e in everything}
    style = page.one("style").text
    assert not re.search(r"url\(|@import|@font-face|expression", style)
    assert not re.search(
        r"\b(fetch|XMLHttpRequest|import|WebSocket|eval|innerHTML)\b", page.one("script").text
    )


def _allows_its_own_script_alone(page):
    (policy,) = [e for e in page.all("meta") if e.has("http-equiv", "Content-Security-Policy")]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.attrs["content"].split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["img-src"] == "data:"
    for tag in ("style", "script"):
        text = "".join(page.one(tag).content)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert rules[f"{tag}-src"] == f"'sha256-{digest}'", f"the browser would refuse our {tag}"


def rows_of(table):
    """Name of the row -> heading -> cell, an element."""
    headings = [th.text for th in table.one("thead").all("th")][1:]
    return {
        "".join(c for c in row.one("th").content if isinstance(c, str)).strip(): dict(
            zip(headings, row.all("td"), strict=True)
        )
        for row in table.one("tbody").all("tr")
    }
