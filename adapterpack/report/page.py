"""The page around a report: one file that asks for nothing from anywhere.

A strict content security policy names the only style sheet and the only script by their SHA-256: even markup that
slipped in could load or run nothing.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

from adapterpack.report import grid, palette
from adapterpack.report.html import Html, join, tag
from adapterpack.version import __version__


@dataclass(frozen=True)
class Section:
    """A part of the page with a heading, which the menu at the top names.

    Attributes:
        anchor: Its id.
        title: Its heading.
        body: What it holds.
        lead: A sentence under the heading.
    """

    anchor: str
    title: str
    body: Html
    lead: object = None

    def html(self) -> Html:
        heading = tag("h2", self.title, id=f"{self.anchor}-h")
        lead = None if self.lead is None else tag("p", self.lead, class_="lead")
        return tag("section", heading, lead, self.body, id=self.anchor, aria_labelledby=f"{self.anchor}-h")


def page(title: str, head: Html, sections: Sequence[Section], *, when: str | None = None) -> str:
    """The whole file.

    Args:
        title: Of the window.
        head: What stands on top: the verdict, with the one `h1`.
        sections: In order.
        when: A date to be told at the end; without it the same facts give the same bytes.
    """
    style = files(__package__).joinpath("style.css").read_text("utf-8") + palette.css() + grid.css()
    script = files(__package__).joinpath("script.js").read_text("utf-8")
    policy = (
        f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; base-uri 'none';"
        " form-action 'none'"
    )
    links = [tag("li", tag("a", s.title, href=f"#{s.anchor}")) for s in sections]
    foot = f"Made by adapterpack {__version__}" + (f", {when}" if when else "")
    whole = tag(
        "html",
        tag(
            "head",
            tag("meta", charset="utf-8"),
            tag("meta", http_equiv="Content-Security-Policy", content=policy),
            tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
            tag("meta", name="color-scheme", content="light dark"),
            tag("meta", name="referrer", content="no-referrer"),
            tag("title", title),
            tag("style", Html(style)),
        ),
        tag(
            "body",
            tag("a", "Skip to the contents", href="#main", class_="skip"),
            tag("header", head),
            tag("nav", tag("ul", *links), aria_label="Contents"),
            tag("main", join(s.html() for s in sections), id="main", tabindex=-1),
            tag("footer", tag("p", foot)),
            tag("script", Html(script)),
        ),
        lang="en",
    )
    return f"<!DOCTYPE html>\n{whole}\n"


def _digest(content: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}"
