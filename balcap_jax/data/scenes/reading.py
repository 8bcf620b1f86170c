"""Reads any text in the caption English of the scenes world: sentences, atomic claims, slips of language.

The oracle judge is built on this module and knows nothing of how a text was made.

The reader maps each word to the letter of its class, so that a sentence becomes a short string. One regular expression
over that string says whether the sentence is grammatical. A separate scan gathers the claims. It does not ask for
grammar, so a broken sentence still states what it states.
"""

import dataclasses
import functools
import itertools
import re

from balcap_jax.data.scenes import language
from balcap_jax.data.scenes.language import SINGLE_VALUED, TOKEN, Claim, Subject
from balcap_jax.data.scenes.world import COLOURS, GROUNDS, PATTERNS, PLACES, SHAPES, SIZES, TEXTURES

# ---- one sentence: word classes, grammar, loose scan -----------------------------------------------------------------

_STOPS = frozenset(".!?;")
# A longer run of words without a stop is cut: no sentence of the language is longer, and the work stays bounded.
_LONGEST_SENTENCE = 24
_LONGEST_TEXT = 100  # characters of raw text kept in a claim

_CLASS_OF = {
    "a": "a", "an": "a", "the": "t", "is": "i", "are": "r", "at": "@", "in": "@", "holds": "h", "occupies": "o",
    "there": "e", "shapes": "k", "appear": "A", "we": "w", "see": "S", "and": "&", "background": "b", "lies": "l",
    "behind": "B", "it": "y", "to": "f", "of": "f", ",": ",", "above": "R", "below": "R", "centre": "p",
}  # fmt: skip
for _words, _class in (
    (SIZES, "z"), (COLOURS, "c"), (TEXTURES, "x"), (SHAPES, "s"), (GROUNDS, "g"), (PATTERNS, "q"),
    (language.NUMBERS, "n"),
):  # fmt: skip
    _CLASS_OF.update(dict.fromkeys(_words, _class))


def _words(text: str) -> tuple[str, ...]:
    return tuple(TOKEN.findall(text.lower()))


_REMARK_FORMS = frozenset(_words(text)[:-1] for text in language.REMARKS)
_ASIDE_FORMS = frozenset(_words(text)[:-1] for text in language.ASIDES)
_TAIL_FORMS = frozenset(_words(text) for text in language.REMARK_TAILS)
for _form in (*_REMARK_FORMS, *_TAIL_FORMS, *_ASIDE_FORMS):
    for _word in _form:
        _CLASS_OF.setdefault(_word, "m")  # a word that only remarks use
_ROWS, _COLUMNS = ("top", "middle", "bottom"), ("left", "centre", "right")
_PLACE_WORDS = frozenset(PLACES)
_VERBS = frozenset("irholAS")

_ADJECTIVES = "z?[cg]?[xq]?"
_NOUN = f"a{_ADJECTIVES}s"
_THE_NOUN = f"t{_ADJECTIVES}s"
_GRAMMAR = re.compile(
    "|".join(
        (
            "ernk", "nkA", "wSnk",  # openings
            f"{_NOUN}i@t?p", f"tph{_NOUN}", f"{_NOUN}otp", f"@t?pi{_NOUN}", f"ei{_NOUN}(?:@t?p)?",  # objects
            f"(?:{_THE_NOUN}|y)i(?:[zcx]|@t?p|R[ta]{_ADJECTIVES}s)",  # properties and relations
            "tbi(?:g&q|q&g|g|q)", "a(?:qg|gq|g|q)b(?:lB|iB)", "tgbiq", "tqbig",  # backgrounds
        )
    )
)  # fmt: skip


@dataclasses.dataclass(slots=True)
class _Mention:
    """A noun of a sentence with what the sentence says of it; `shape` is "" for an attribute without a noun."""

    shape: str = ""
    colours: list[str] = dataclasses.field(default_factory=list)
    definite: bool = False
    attributes: list[tuple[str, str]] = dataclasses.field(default_factory=list)  # (kind, value)


@dataclasses.dataclass(frozen=True, slots=True)
class _Reading:
    """What one sentence says by itself, whatever the sentences around it say. Cached per sentence."""

    mentions: tuple[_Mention, ...]
    relations: tuple[tuple[int, str, int], ...]  # (mention, relation, mention); mention -1 is the object before
    plain_claims: tuple[Claim, ...]  # count, ground, pattern
    remark: str
    findings: tuple[str, ...]
    unreadable: bool


def _classify(words: tuple[str, ...]) -> tuple[str, list[str]]:
    """One class letter and one value per word; places and relations of several words become one."""
    classes, values = [], []
    at, end = 0, len(words)
    while at < end:
        word = words[at]
        following = words[at + 1] if at + 1 < end else ""
        if word in _ROWS and following in _COLUMNS and f"{word} {following}" in _PLACE_WORDS:
            classes.append("p")
            values.append(f"{word} {following}")
            at += 2
        elif word in ("left", "right") and following == "of":
            if classes[-2:] == ["f", "t"]:  # "to the left of"
                del classes[-2:], values[-2:]
            classes.append("R")
            values.append(f"{word} of")
            at += 2
        else:
            classes.append(_CLASS_OF.get(word, "?"))
            values.append(word)
            at += 1
    return "".join(classes), values


def _scan(classes: str, values: list[str]) -> tuple[list[_Mention], list, list[Claim], bool]:
    """Gathers what a word string says, grammatical or not.

    Returns:
      (mentions, relations, plain claims, whether every word of a known class is part of one).
    """
    mentions: list[_Mention] = []
    relations, claims = [], []
    waiting: list[tuple[str, str]] = []  # attributes of this clause before its first noun
    clause_has_noun, pending_relation, clean = False, None, True
    kinds = {"z": "size", "x": "texture", "p": "place", "q": "texture"}
    about_background = "b" in classes or not any(letter in "scpzx" for letter in classes)
    run: list[int] = []  # adjectives directly before the next noun
    article = ""
    for at, letter in enumerate(classes + ","):  # The comma closes the last clause.
        if letter in "zcx" or (letter in "gq" and not about_background):
            run.append(at)
            continue
        if letter == "s":
            mentions.append(_Mention(shape=values[at], definite=article == "t"))
            clause_has_noun = True
        attributes = mentions[-1].attributes if clause_has_noun else waiting
        for i in run:  # Adjectives are about the noun that they precede, else about the noun before or the next one.
            if classes[i] not in "cg":
                attributes.append((kinds[classes[i]], values[i]))
            elif clause_has_noun:
                mentions[-1].colours.append(values[i])
            else:
                clean = False
        run = []
        if letter == "s":
            attributes += waiting
            waiting, article = [], ""
            if pending_relation is not None:
                relations.append((*pending_relation, len(mentions) - 1))
                pending_relation = None
        elif letter == "p":
            attributes.append(("place", values[at]))
        elif letter == "R":
            pending_relation = (len(mentions) - 1, values[at])
        elif letter == "n":
            if "k" in classes:
                claims.append(Claim("count", None, values[at], f"there are {values[at]} shapes"))
            else:
                clean = False
        elif letter in "gq":
            kind = "ground" if letter == "g" else "pattern"
            claims.append(Claim(kind, None, values[at], f"the background is {values[at]}"))
        elif letter == ",":
            if waiting:  # A clause of attributes alone is about the noun before, here or in an earlier sentence.
                if not mentions:
                    mentions.append(_Mention())
                mentions[-1].attributes += waiting
            waiting, clause_has_noun, article = [], False, ""
        elif letter in "at":
            article = letter
    return mentions, relations, claims, clean and pending_relation is None


@functools.lru_cache(maxsize=16384)
def _read_sentence(words: tuple[str, ...]) -> _Reading:
    """Reads one sentence given as lower-case words without its stop."""
    if words in _REMARK_FORMS or words in _ASIDE_FORMS:
        return _Reading((), (), (), " ".join(words), (), False)
    findings, remark = [], ""
    if "," in words:
        comma = len(words) - 1 - words[::-1].index(",")
        if words[comma + 1 :] in _TAIL_FORMS:
            remark, words = " ".join(words[comma + 1 :]), words[:comma]
    classes, values = _classify(words)
    if not remark and "m" in classes:  # a distorted remark
        remark = " ".join(word for word in words if word != ",")[:_LONGEST_TEXT]
    if not _GRAMMAR.fullmatch(classes):
        findings.append("broken" if _VERBS.intersection(classes) else "fragment")
    for word, following in itertools.pairwise(words):
        if word in ("a", "an") and (word == "an") != (following[0] in "aeiou"):
            findings.append("article")
    mentions, relations, claims, clean = _scan(classes, values)
    unreadable = not (mentions or claims or remark) or not clean or "?" in classes
    return _Reading(tuple(mentions), tuple(relations), tuple(claims), remark, tuple(findings), unreadable)


# ---- a whole caption -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Finding:
    """A slip of language: its name (the oracle's table says what it costs) and the number of its sentence."""

    name: str
    sentence: int


@dataclasses.dataclass(frozen=True)
class Parsed:
    """What a caption says.

    `sentences` are the raw texts. `claims` are unique, in order of appearance. `findings` are slips of language.
    `stated` maps (kind, subject) to every value that the caption gives it, for the kinds that allow one only.
    """

    sentences: tuple[str, ...]
    claims: tuple[Claim, ...]
    findings: tuple[Finding, ...]
    stated: dict[tuple, frozenset[str]] = dataclasses.field(repr=False)

    def states(self, claim: Claim) -> bool:
        """Whether the caption states the claim and does not contradict itself about it."""
        if claim not in self._claim_set:
            return False
        return claim.kind not in SINGLE_VALUED or len(self.stated[claim.kind, claim.subject]) == 1

    @functools.cached_property
    def _claim_set(self) -> frozenset[Claim]:
        return frozenset(self.claims)


def _split(caption: str) -> list[tuple[list[str], str]]:
    """Sentences as (tokens in their own case, closing mark). A run of words that is too long is cut: "run-on"."""
    sentences, current = [], []
    for token in TOKEN.findall(caption):
        if token in _STOPS:
            sentences.append((current, token))
            current = []
            continue
        if len(current) == _LONGEST_SENTENCE:
            sentences.append((current, "run-on"))
            current = []
        current.append(token)
    if current:
        sentences.append((current, ""))
    return sentences


@functools.lru_cache(maxsize=4096)
def parse(caption: str) -> Parsed:
    """Reads any text; never raises, and takes time linear in its length.

    A sentence (or a run of 24 words) that is not of this English becomes one "unparsable" claim.
    """
    reader = _CaptionReader()
    before = "."
    for tokens, stop in _split(caption):
        reader.add(tokens, before, stop)
        before = stop
    return reader.finish()


class _CaptionReader:
    """Ties sentences together: which object "the star" is, what earlier sentences state, and in which order."""

    def __init__(self):
        self.sentences: list[str] = []
        self.claims: dict[Claim, None] = {}
        self.findings: list[Finding] = []
        self.stated: dict[tuple, set[str]] = {}
        self.seen_sentences: set[tuple[str, ...]] = set()
        self.subjects: list[Subject] = []  # in order of introduction
        self.placed: set[Subject] = set()
        self.colours_of_shape: dict[str, list[str]] = {}
        self.last_cell = -1
        self.relations = 0
        self.counts: list[int] = []  # sentences that state the count / the background / introduce an object / remark
        self.backgrounds: list[int] = []
        self.objects: list[int] = []
        self.remarks: list[int] = []

    def find(self, name: str) -> None:
        """Notes a slip of language in the sentence that was added last."""
        self.findings.append(Finding(name, len(self.sentences) - 1))

    def add(self, tokens: list[str], before: str, stop: str) -> None:
        if not tokens:  # two stops in a row
            if self.sentences:
                self.find("stray mark")
            return
        words = tuple(token.lower() for token in tokens)
        here = len(self.sentences)
        self.sentences.append(" ".join(tokens)[:_LONGEST_TEXT])
        reading = _read_sentence(words)
        if stop == "":
            self.find("missing stop")
        elif stop == "run-on":
            self.find("run-on")
        if before not in (";", "run-on") and not tokens[0][0].isupper():
            self.find("lower-case start")
        for name in reading.findings:
            self.find(name)
        if reading.remark:
            if words not in _ASIDE_FORMS:  # An aside is good style.
                self.remarks.append(here)
            self.claim(Claim("remark", None, reading.remark, reading.remark))
        if words in self.seen_sentences:
            self.find("repeated sentence")
            return  # It adds no claim, and its repeated parts do not count a second time.
        self.seen_sentences.add(words)

        repeated = 0
        for claim in reading.plain_claims:
            repeated += self.claim(claim)
            (self.counts if claim.kind == "count" else self.backgrounds).append(here)
        unreadable = reading.unreadable
        subjects = []
        for mention in reading.mentions:
            subject, again = self.mention(mention, in_relation=bool(reading.relations))
            subjects.append(subject)
            repeated += again
            unreadable |= subject is None
        for first, relation, second in reading.relations:
            ends = (subjects[first] if first >= 0 else self.latest(), subjects[second])
            if ends[0] is None or ends[1] is None:
                unreadable = True
                continue
            repeated += self.claim(language.relation_claim(ends[0], relation, ends[1]))
            self.relations += 1
            if self.relations > 2:
                self.find("extra relation")
        if repeated:
            self.find("repeated claim")
        if unreadable:
            self.find("unparsable")
            text = self.sentences[-1].lower()
            self.claim(Claim("unparsable", None, text, text))

    def latest(self) -> Subject | None:
        return self.subjects[-1] if self.subjects else None

    def claim(self, claim: Claim) -> bool:
        """Records a claim. Returns whether an earlier part of the caption makes it."""
        if claim in self.claims:
            return True
        self.claims[claim] = None
        if claim.kind in SINGLE_VALUED:
            values = self.stated.setdefault((claim.kind, claim.subject), set())
            values.add(claim.value)
            if len(values) > 1:
                self.find("contradiction")
        return False

    def mention(self, mention: _Mention, in_relation: bool) -> tuple[Subject | None, int]:
        """Records a mention. Returns its subject, None where there is none, and how many claims repeat."""
        repeated = 0
        known = self.colours_of_shape.get(mention.shape, ())
        if not mention.shape:
            subject = self.latest()
            if subject is None:
                return None, 0
        elif mention.colours:
            subject = (mention.colours[0], mention.shape)
        elif mention.definite and len(known) == 1:
            subject = (known[0], mention.shape)
        else:
            subject = ("", mention.shape)
        if mention.shape:
            for colour in mention.colours[1:]:  # "A red green star" claims a red star and a green star.
                self.claim(language.object_claim((colour, mention.shape)))
                self.find("contradiction")
            if not self.claim(language.object_claim(subject)):
                self.subjects.append(subject)
                self.objects.append(len(self.sentences) - 1)
                if subject[0]:
                    self.colours_of_shape.setdefault(subject[1], []).append(subject[0])
                else:
                    self.find("vague object")
            elif in_relation:
                pass  # Relations name objects that are known already.
            elif not mention.definite:
                repeated += 1
            else:
                self.find("choppy")  # What this sentence states belongs into the object's own sentence.
                if subject != self.latest():
                    self.find("order jump")  # Back to an earlier object.
        for kind, value in mention.attributes:
            repeated += self.claim(language.attribute_claim(kind, subject, value))
            if kind == "place" and subject not in self.placed:
                self.placed.add(subject)
                cell = PLACES.index(value)
                if cell <= self.last_cell:
                    self.find("order jump")
                self.last_cell = cell
        return subject, repeated

    def finish(self) -> Parsed:
        last = len(self.sentences) - 1
        for subject, where in zip(self.subjects, self.objects, strict=True):
            if subject not in self.placed:
                self.findings.append(Finding("unplaced object", where))
        for where in self.remarks:
            self.findings.append(Finding("remark at the end" if where == last else "remark in between", where))
        if self.sentences:
            if not self.counts:
                self.findings.append(Finding("no opening", 0))
            elif self.counts[0] > 0:
                self.findings.append(Finding("late opening", self.counts[0]))
            if not self.backgrounds:
                self.findings.append(Finding("no background", last))
            elif self.objects and self.objects[0] < self.backgrounds[0] < self.objects[-1]:
                self.findings.append(Finding("misplaced background", self.backgrounds[0]))
        return Parsed(
            tuple(self.sentences),
            tuple(self.claims),
            tuple(self.findings),
            {key: frozenset(values) for key, values in self.stated.items()},
        )


@functools.lru_cache(maxsize=65536)
def claim_from_unit(unit: str) -> Claim:
    """The claim that a reference unit makes: the last and most specific one of its sentence."""
    claims = parse(unit).claims
    return claims[-1] if claims else Claim("unparsable", None, unit, unit)


def covers(parsed: Parsed, unit: str) -> bool:
    """Whether the caption states the reference unit (recall), judged from the two texts alone."""
    claim = claim_from_unit(unit)
    return claim.kind != "unparsable" and parsed.states(claim)
