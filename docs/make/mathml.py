"""A hook of MkDocs: formulas become MathML, which browsers draw themselves, without a script from another host."""

import html
import re

from latex2mathml import converter

_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_content(content: str, **_: object) -> str:
    """The page's HTML with its formulas converted."""

    def converted(match: re.Match) -> str:
        display = "block" if match[2] == "[" else "inline"
        return converter.convert(html.unescape(match[3]), display=display)

    return _FORMULA.sub(converted, content)
