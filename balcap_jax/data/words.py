"""Splits text of any script into words: the lexical reward matches them, and lengths are counted in them."""

import functools
import unicodedata

# Scripts that put no blanks between words, by how Unicode names their characters. Without a dictionary each character
# counts as a word, as UAX #29 splits most of them and as BERT and sacreBLEU split Chinese.
_WITHOUT_BLANKS = (
    "CJK", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "BOPOMOFO", "THAI", "LAO", "KHMER", "MYANMAR", "TAI ", "NEW TAI",
    "JAVANESE", "BALINESE",
)  # fmt: skip


def words(text: str) -> list[str]:
    """Runs of letters, marks and digits without regard to case; characters of scripts without blanks one by one.

    Of ASCII text the words are those of Google's rouge_score without stemming. A text without any word, such as one of
    emoji, is split into its characters. So equal texts have equal words, and some unless they are blank.
    """
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return "".join(map(_in_words, text)).split() or list("".join(text.split()))


def count_words(text: str) -> int:
    """Whitespace words: the length unit of the gate (and of CapArena's published lengths).

    Characters of scripts without blanks count one each, and so do the marks of punctuation between them.
    """
    return len("".join(map(_apart, unicodedata.normalize("NFC", "".join(map(_full, text))))).split())


@functools.cache
def _in_words(character: str) -> str:
    category, name = unicodedata.category(character), unicodedata.name(character, "")
    # Soft hyphens, joiners and variation selectors change how a word looks, not which it is.
    if (category == "Cf" and name != "ZERO WIDTH SPACE") or name.startswith("VARIATION SELECTOR"):
        return ""
    return _apart(character) if category[0] in "LMN" else " "


@functools.cache
def _full(character: str) -> str:
    """The full form of a half-width, circled or squared character of a script without blanks; others as they are."""
    # Not all text is normalised: the full form of some marks begins with a blank.
    full = unicodedata.normalize("NFKC", character)
    is_short = unicodedata.name(character, "").startswith("HALFWIDTH") or any(map(_is_without_blanks, full))
    return full if is_short else character


@functools.cache
def _apart(character: str) -> str:
    return f" {character} " if _is_without_blanks(character) else character


def _is_without_blanks(character: str) -> bool:
    return unicodedata.name(character, "").startswith(_WITHOUT_BLANKS)
