"""The held-out pictures with their captions before and after, as cards, and the filters over them.

A card is in the page once; a filter is a radio button whose style rule hides the cards without its class. So the page
needs no script, and keys do what they do in any form.
"""

import base64
import io
from collections.abc import Iterator, Sequence
from typing import Any

from balcap_jax.cli.files import read_bytes
from balcap_jax.report.changes import means_of
from balcap_jax.report.run import KINDS, MINIATURE, JudgedCaption, JudgedImage, Row, Run, label_text, scale_of

SPREAD = 8  # cards that are shown first
MOST = 200  # cards of a page
FEW = 12  # cards of the largest changes
WHOLE = 48  # cards that all have their sampled captions too; of more only those of the filters by rank
MAX_IMAGE_BYTES = 4 << 20  # a picture beyond this is named, not embedded: the page should open on a phone
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PLAIN_BYTES = 48 << 10  # a picture beyond this is embedded smaller, as a JPEG
_SHOWN_PIXELS = 400  # longer side of such a picture
_NOT_RANKED = "not ranked: no b-CapScore"


def _ranking(run: Run) -> tuple[str, list[str], dict[str, float]]:
    """(kind, images from the highest change in b-CapScore to the lowest, their changes).

    With one label it is b-CapScore itself. The captions are greedy ones, and sampled ones where those have no score.
    """
    for kind in KINDS:
        changes = {}
        for image_id in run.image_ids:
            scores = [image.b_capscore if image else None for image in run.images(image_id, kind).values()]
            if scores and None not in scores:
                changes[image_id] = scores[-1] - scores[0] if len(scores) > 1 else scores[0]
        if changes:
            return kind, sorted(changes, key=lambda image_id: -changes[image_id]), changes
    return "", [], {}


def choose_images(run: Run, count: int = SPREAD) -> list[tuple[str, str]]:
    """(image id, why it was chosen): evenly spread over the ranking by change in b-CapScore, best and worst included.

    The change is that of greedy captions, and of sampled ones where those have none. Images without a score in both
    evaluations can't be ranked; they are chosen only where no image can be.
    """
    kind, ranked, _ = _ranking(run)
    if not ranked:
        return [(image_id, _NOT_RANKED) for image_id in run.image_ids[:count]]
    median, last = (len(ranked) - 1) // 2, len(ranked) - 1
    upper, lower = max(count // 2 - 1, 1), max(count - count // 2, 1)
    places = {round(median * k / upper) for k in range(upper + 1)}
    places |= {median + round((last - median) * k / lower) for k in range(lower + 1)}
    what = f"{'change in ' if len(run.labels) > 1 else ''}b-CapScore of {KINDS[kind]} captions"
    named = {median: f"median {what}", last: f"lowest {what}", 0: f"highest {what}"}
    return [(ranked[p], named.get(p, f"rank {p + 1} of {len(ranked)} by {what}")) for p in sorted(places)]


def gallery(runs: Sequence[Run]) -> dict[str, list[dict[str, Any]]]:
    """{"cards", "filters"}; a run that shares images with an earlier run is shown on the same cards.

    Cards go from the largest loss to the largest gain, those that cannot be ranked last. A card's "filters" are the
    keys of those that let it through.
    """
    cards: dict[str, dict[str, Any]] = {}
    for run in runs:
        if cards.keys().isdisjoint(run.image_ids):
            for image_id, why, filters in _chosen(run):
                names = {"id": image_id, "why": why, "chosen_in": run.name}
                cards[image_id] = names | {"columns": [], "picture": None, "passes": filters}
        for image_id, card in cards.items():
            images = {kind: run.images(image_id, kind) for kind in KINDS}
            card["passes"] |= set(_traits(run, image_id))
            for label in run.labels:
                parts = [(KINDS[kind], images[kind][label]) for kind in KINDS if images[kind][label]]
                if not parts:
                    continue
                (kind, first), folded = parts[0], parts[1:]
                if card["picture"] is None:
                    card |= {"picture": _picture(run, first), "image": first}
                column = {"run": run.name, "label": label_text(label), "kind": kind, "image": first}
                card["columns"].append(column | {"folded": folded})
    shown = [card for card in cards.values() if card["columns"]]
    for card in shown:
        card["is_whole"] = len(shown) <= WHOLE or not card["passes"].isdisjoint(("spread", "worst", "best"))
    return {"cards": shown, "filters": _filters(shown)}


def _chosen(run: Run) -> Iterator[tuple[str, str, set[str]]]:
    """(image id, why, filters by rank) of the cards of a run, the largest loss first."""
    _, ranked, changes = _ranking(run)
    spread, most = dict(choose_images(run)), dict(choose_images(run, MOST))
    whys = most | spread
    unranked = [image_id for image_id in run.image_ids if image_id not in changes][: max(MOST - len(whys), 0)]
    is_change = len(run.labels) > 1
    worst = [image_id for image_id in reversed(ranked[-FEW:]) if is_change and changes[image_id] < 0]
    best = [image_id for image_id in ranked[:FEW] if is_change and changes[image_id] > 0]
    whys |= {name: f"rank {ranked.index(name) + 1} of {len(ranked)}" for name in (*worst, *best) if name not in whys}
    named = {"spread": spread, "worst": worst, "best": best}
    for image_id in (*reversed(ranked), *unranked):
        if image_id in whys or image_id in unranked:
            filters = {name for name, members in named.items() if image_id in members}
            yield image_id, whys.get(image_id, _NOT_RANKED), filters


def _traits(run: Run, image_id: str) -> Iterator[str]:
    """The filters that one run's captions of an image pass, by what they are."""
    for kind in KINDS:
        found = run.images(image_id, kind)
        if any(found.values()):  # Greedy captions where there are any: they are the ones in view.
            yield from _fell(list(found.values()))
            break
    for kind in KINDS:
        image = run.images(image_id, kind).get(run.labels[-1]) if run.labels else None
        for caption in image.captions if image else ():
            yield from _faults(caption)


def _fell(images: Sequence[JudgedImage | None]) -> Iterator[str]:
    before, after = images[0], images[-1]
    if len(images) < 2 or not before or not after:
        return
    others = {row.key for row in MINIATURE}
    names = {name: None for caption in after.captions for name in caption.rewards if name not in others}
    for name in names:
        row = Row(name, name, scale_of(name))
        means = [means_of({"": image}, row).get("") for image in (before, after)]
        if None not in means and means[1] < means[0] - 1e-6:
            yield f"fell {name}"


def _faults(caption: JudgedCaption) -> Iterator[str]:
    if caption.failures:
        yield "failed"
    if caption.in_band is False:
        yield "out of band"
    if caption.truncated:
        yield "truncated"
    if caption.suspicious:
        yield "suspicious"
    for name, has in caption.habits.items():
        if has:
            yield f"habit {name}"


_TITLES = {
    "spread": "spread over the ranking",
    "worst": "worst regressions",
    "best": "largest gains",
    "failed": "a judge’s call failed",
    "out of band": "out of the length band",
    "truncated": "truncated",
    "suspicious": "speaks to its judge",
}


def _filters(cards: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Radio buttons in order: {"title", "count"}; a card's "classes" are the numbers of those that it passes.

    What no card passes is left out. Titles hold names of rewards and habits, which are untrusted; numbers are not.
    """
    passed = dict.fromkeys(name for card in cards for name in sorted(card["passes"]))
    order = ["spread", "all", "worst", "best", *(name for name in passed if name.startswith("fell "))]
    order += ["failed", "out of band", "truncated", "suspicious", *(n for n in passed if n.startswith("habit "))]
    filters = []
    for card in cards:
        card["passes"].add("all")
        card["classes"] = []
    if not any("spread" in card["passes"] for card in cards) or len(cards) <= SPREAD:
        order.remove("spread")
    for name in order:
        members = [card for card in cards if name in card["passes"]]
        if not members:
            continue
        word, _, rest = name.partition(" ")
        title = _TITLES.get(name) or {"all": "all", "fell": f"{rest} fell", "habit": f"habit: {rest}"}[word]
        for card in members:
            card["classes"].append(len(filters))
        filters.append({"title": title, "count": len(members)})
    return filters


def uncovered(caption: JudgedCaption, image: JudgedImage) -> list[str] | None:
    """Reference units that the caption misses; None when the judge's marks don't fit the units."""
    if caption.covered is None or len(caption.covered) != len(image.reference_units):
        return None
    return [unit for unit, covered in zip(image.reference_units, caption.covered, strict=True) if not covered]


def _picture(run: Run, image: JudgedImage) -> str:
    """A data URL of the image's PNG, or "" with a note. Paths that leave samples/ are refused: ids are untrusted."""
    if not image.image:
        return ""
    samples = (run.path / "samples").resolve()
    try:
        file = (samples / image.image).resolve()
        if not file.is_relative_to(samples):
            run.notes.append(f"picture {image.image}: outside samples/, not shown")
        elif file.stat().st_size > MAX_IMAGE_BYTES:
            run.notes.append(f"picture {image.image}: more than {MAX_IMAGE_BYTES >> 20} MiB, not shown")
        elif not (data := read_bytes(file)).startswith(PNG_SIGNATURE):
            run.notes.append(f"picture {image.image}: not a PNG, not shown")
        else:
            return _data_url(data)
    except (OSError, ValueError) as error:
        run.notes.append(f"picture {image.image}: not readable ({getattr(error, 'strerror', None) or error})")
    return ""


def _data_url(png: bytes) -> str:
    """A picture as it is, or smaller where two hundred of its size would make the page slow to open.

    Raises OSError or ValueError where it cannot be read.
    """
    if len(png) <= _PLAIN_BYTES:
        return "data:image/png;base64," + base64.b64encode(png).decode()
    from PIL import Image  # only here: most pages have small pictures alone

    try:
        with Image.open(io.BytesIO(png), formats=["PNG"]) as picture:
            picture.thumbnail((_SHOWN_PIXELS, _SHOWN_PIXELS))
            smaller = io.BytesIO()
            picture.convert("RGB").save(smaller, format="JPEG", quality=82)
    except (Image.DecompressionBombError, SyntaxError) as error:
        raise ValueError(str(error)) from error
    return "data:image/jpeg;base64," + base64.b64encode(smaller.getvalue()).decode()
