"""What the results of the studies say: a table and a figure for each, from result files alone.

    <!-- ablate: NAME -->   ...   <!-- end: NAME -->

What stands between these two lines is written anew for each study NAME, for "primary" (the primary claims), "pilot" and
"cost", in the one page that has them; all else is the writer's.
"""

import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from balcap_jax.ablate import drawings, results
from balcap_jax.ablate.claims import PRIMARY, Values, assess, planned_seeds
from balcap_jax.ablate.plans import Plan
from balcap_jax.ablate.statistics import ALPHA, paired
from balcap_jax.ablate.studies import (
    BUDGET,
    CHECKED_SCALES,
    FLAWS,
    JUDGED,
    JUDGES,
    LEAVE_ONE_OUT,
    PILOT_EFFECT,
    RECIPE,
    SHARES,
    SPREAD,
    VOTED,
    VOTES,
    Study,
    asked,
    flawed,
    scaled,
)
from balcap_jax.ablate.table import BASE, METRICS, claims_markdown, differences, markdown, mean_and_spread, rows
from balcap_jax.ablate.variants import FULL, VARIANTS, Variant
from balcap_jax.cli.errors import UserError
from balcap_jax.cli.files import read_bytes, write_text

Results = Mapping[str, Mapping[int, Mapping[str, Any]]]  # arm -> seed -> result


def load(plan: Plan, study: Study, *, pilot: bool = False) -> dict[str, dict[int, dict[str, Any]]]:
    """The results of a study's arms that are of today's configs, those of pilots or the others.

    Raises:
      UserError: a file is no result of a study, or lacks evaluations.
    """
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for name in study.arms:
        seeds = results.seeds_of(plan.results, study.label(name), pilot=pilot)
        by_seed = {seed: plan.result(study, name, seed, warn=True) for seed in seeds}
        found[name] = {seed: result for seed, result in by_seed.items() if result}
        for seed, result in found[name].items():
            results.check_evaluated(result, results.path_of(plan.results, study.label(name), seed))
    return found


def values_of(found: Results, kind: str = "greedy") -> dict[str, dict[int, dict[str, float]]]:
    """{arm: {seed: metrics}} of evaluations after rl, and of BASE, which all arms share."""
    base = {
        seed: results.metrics_of(result, kind, "base")
        for by_seed in found.values()
        for seed, result in by_seed.items()
        if "base" in result[kind]
    }
    after = {
        arm: {seed: results.metrics_of(result, kind, "after") for seed, result in by_seed.items()}
        for arm, by_seed in found.items()
    }
    return {name: by_seed for name, by_seed in ({BASE: base} | after).items() if by_seed}


# ---- sections --------------------------------------------------------------------------------------------------------


def section(study: Study, found: Results, figure: str = "", arguments: Sequence[str] = ()) -> str:
    """Markdown of a study: how it was made, its tables, its comparisons, what is missing, and the figure's link.

    arguments: of the command that made it, beside --study and --out.
    """
    command = shlex.join(["balcap", "ablate", f"--study={study.name}", "--out=DIR", *arguments])
    command = f"```bash\n{command}\n```\n"
    if not any(found.values()):
        return f"{study.question}\n\n{command}\nNot yet run.\n"
    values = values_of(found)
    known = VARIANTS if study is LEAVE_ONE_OUT else {name: Variant(arm.about) for name, arm in study.arms.items()}
    table = rows(values, known)
    parts = [study.question, command, made(study, found)]
    if study is JUDGES:
        parts += judges_tables(found, values)
    else:
        parts += ["Greedy captions:", markdown(table)]
    if study is SPREAD:
        parts.append(worst_cases(values))
    if study is BUDGET:
        parts.append(bills(found, values))
    if any(row["claims"] for row in table):
        parts += ["What was claimed (ours: mean paired difference ± half of its 95% interval):", claims_markdown(table)]
    elif study is not JUDGES:
        parts.append(comparisons(study, values))
    if figure:
        parts.append(f"![{study.question}]({figure})")
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def made(study: Study, found: Results) -> str:
    """Seeds, time, machine and versions of the results of a study, and which runs are missing."""
    everything = [result for by_seed in found.values() for result in by_seed.values()]
    seeds = sorted({seed for by_seed in found.values() for seed in by_seed})
    seconds = sum(result["seconds"] for result in everything)
    wall = sum(result["seconds"] / result["jobs"] for result in everything)
    devices = " and ".join(sorted({result["device"] for result in everything}))
    jax = ", ".join(sorted({result["versions"].get("jax", "?") for result in everything}))
    text = (
        f"{len(everything)} runs, seeds {', '.join(map(str, seeds))}; {seconds / 60:.0f} min of runs, about "
        f"{wall / 60:.0f} min on the clock without bases (runs that studies share are counted in each), on {devices}; "
        f"jax {jax}. Mean ± standard deviation over seeds; **bold**: the 95% t interval of the paired difference to "
        "`full` leaves out 0."
    )
    return text + lacking(study, found)


def lacking(study: Study, found: Results) -> str:
    """Which runs of the study have no result, and which seeds are not the study's; "" where all is as planned."""
    gaps = {arm: [seed for seed in study.seeds if seed not in by_seed] for arm, by_seed in found.items()}
    everywhere = [seed for seed in study.seeds if all(seed in gap for gap in gaps.values())]
    texts = [f"seeds {', '.join(map(str, everywhere))} of all"] if everywhere else []
    for arm, gap in gaps.items():
        if rest := [str(seed) for seed in gap if seed not in everywhere]:
            texts.append(f"{arm} ({', '.join(rest)})")
    beyond = sorted({seed for by_seed in found.values() for seed in by_seed} - {*study.seeds})
    text = f" Missing: {'; '.join(texts)}." if texts else ""
    if beyond:
        text += f" Beside the plan, hence in no primary claim: seeds {', '.join(map(str, beyond))}."
    return text


def comparisons(study: Study, values: Values) -> str:
    """The study's metric of each arm against one: difference, 95% interval, and what could have been seen."""
    unit = METRICS[study.metric]
    lines = [
        f"{unit} against `{study.against}` (exploratory but for the primary claims; ± half of the 95% interval; seen: "
        "the effect that these seeds find with 80% probability):",
        "",
        f"| variant | what it is | {unit}, difference | p | seen |",
        "|---|---|---|---|---|",
    ]
    for name, arm in study.arms.items():
        found = differences(values, name, study.against, study.metric)
        if name != study.against and found:
            one = paired(found)
            lines.append(f"| {name} | {arm.about} | {_interval(one)} | {_p(one.p())} | {_number(one.detectable())} |")
    return "\n".join(lines)


def worst_cases(values: Values, metric: str = "b_capscore") -> str:
    """Of each estimator the lowest value over the scales, by the seeds that have a run at each of them."""
    lines = [
        f"Worst case over the scales {', '.join(f'{scale:g}' for scale in CHECKED_SCALES)}, by seed (the lowest of as "
        "many runs for c-GDPO, in which the scale cancels, as for GRPO; with fixed weights it cancels too, in one "
        "run):",
        "",
        f"| estimator | {METRICS[metric]}, worst | furthest from scale 1 |",
        "|---|---|---|",
    ]
    for name, arms in (
        (FULL, [scaled(FULL, scale) for scale in CHECKED_SCALES]),
        ("grpo", [scaled("grpo", scale) for scale in CHECKED_SCALES]),
        ("grpo_fixed", ["grpo_fixed"]),
    ):
        seeds = [
            seed for seed in values.get(name, {}) if all(metric in values.get(arm, {}).get(seed, {}) for arm in arms)
        ]
        if not seeds:
            lines.append(f"| {name} | - | - |")
            continue
        each = [[values[arm][seed][metric] for arm in arms] for seed in seeds]
        ones = [values[name][seed][metric] for seed in seeds]
        furthest = max(abs(value - one) for column, one in zip(each, ones, strict=True) for value in column)
        lines.append(f"| {name} | {_mean_text([min(column) for column in each])} | {furthest:.1f} |")
    return "\n".join(lines)


def bills(found: Results, values: Values, metric: str = "b_capscore") -> str:
    """What each share of questions costs and loses, and the cheapest that loses at most 1 point."""
    lines = ["| share asked | questions to the judge | b-CapScore | difference |", "|---|---|---|---|"]
    cheapest = None
    for share in sorted(SHARES, reverse=True):
        arm = asked(share)
        calls, changes = (
            [one["judge_calls"] for one in found.get(arm, {}).values()],
            differences(values, arm, FULL, metric),
        )
        if not changes:
            continue
        change = paired(changes)
        scores = [one[metric] for one in values[arm].values() if metric in one]
        lines.append(f"| {share:g} | {calls[0]:,} | {_mean_text(scores)} | {_interval(change) if share < 1 else ''} |")
        cheapest = share if change.mean >= -1 else cheapest
    if cheapest is not None:
        lines += ["", f"The cheapest within 1 point of the full bill, by the mean: a share of {cheapest:g}."]
    return "\n".join(lines)


def judges_tables(found: Results, values: Values, metric: str = "b_capscore") -> list[str]:
    """True b-CapScore after training with each judge, how much the judge flatters at the end, and votes."""
    flaws = ["", *FLAWS]
    head = f"| judge | {' | '.join(JUDGED)} |\n|---{'|---' * len(JUDGED)}|"

    def cells(flaw: str, text: Callable[[str], str]) -> str:
        return f"| {flaw or 'exact'} | {' | '.join(text(method) for method in JUDGED)} |"

    def score(arm: str) -> str:
        return _mean_text([one[metric] for one in values.get(arm, {}).values() if metric in one])

    def loss(flaw: str, method: str) -> str:
        found = differences(values, flawed(method, flaw), method, metric)
        return _interval(paired(found)) if found else "-"

    def flattery(arm: str) -> str:
        last = [result["trajectory"][-1] for result in found.get(arm, {}).values() if result.get("trajectory")]
        both = [one for one in last if metric in one["proxy"] and metric in one["true"]]
        return _mean_text([one["proxy"][metric] - one["true"][metric] for one in both])

    votes = ["| judge | one vote | three votes | difference |", "|---|---|---|---|"]
    for flaw in VOTED:
        one, three = flawed(FULL, flaw), flawed(FULL, flaw, VOTES)
        if change := differences(values, three, one, metric):
            votes.append(f"| {flaw} | {score(one)} | {score(three)} | {_interval(paired(change))} |")
    return [
        "True b-CapScore of greedy captions after training with that judge:",
        "\n".join([head, *(cells(flaw, lambda method, flaw=flaw: score(flawed(method, flaw))) for flaw in flaws)]),
        "Against the same method under the exact judge, ± half of the 95% interval:",
        "\n".join([head, *(cells(flaw, partial(loss, flaw)) for flaw in FLAWS)]),
        "What the judge says of the last updates' captions above what is true, in b-CapScore:",
        "\n".join([head, *(cells(flaw, lambda method, flaw=flaw: flattery(flawed(method, flaw))) for flaw in FLAWS)]),
        "Votes, for the full method:",
        "\n".join(votes),
    ]


def primary(values: Mapping[str, Values]) -> str:
    """The primary claims with their verdicts, and the table of what they compare; `values` by study."""
    strict = ALPHA / len(PRIMARY)
    claims = []
    lines = [
        f"| claim | compared | seeds | mean difference | p | seen at {ALPHA:g} | at {strict:g} |",
        "|---|---|---|---|---|---|---|",
    ]
    for number, one in enumerate(assess(values), 1):
        p = f" (p by Holm's rule {_p(one.adjusted)})" if one.adjusted is not None else ""
        claims.append(f"{number}. {one.claim.statement}: **{one.verdict}**{p}.")
        for part, found in zip(one.claim.parts, one.parts, strict=True):
            cells = [
                str(number),
                f"{METRICS[part.metric]}: {part.text()}",
                f"{found.n if found else 0} of {len(part.study.seeds)}",
                _interval(found) if found else "-",
                _p(found.p_above(-part.margin)) if found else "-",
                *(_number(found.detectable(alpha=level) if found else None) for level in (ALPHA, strict)),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    text = (
        "Paired t tests over seeds of greedy captions; a claim of several parts has the largest of their p values; "
        f"Holm over the {len(PRIMARY)} claims at {ALPHA:g}, and nothing is said before the last planned seed. Seen: "
        f"the effect that these seeds find with 80% probability, at {ALPHA:g} and at {strict:g}, which Holm's rule "
        "asks of the first claim; all parts of a claim together are found less often than each."
    )
    return "\n".join([*claims, "", text, "", *lines, ""])


def whole_cost(plan: Plan, found: Mapping[str, Results], studies: Sequence[Study]) -> str:
    """What all results together cost, a run of several studies and the bases once each."""
    runs = {
        (study.label(arm), seed): result
        for study in studies
        for arm, by_seed in found[study.name].items()
        for seed, result in by_seed.items()
    }
    planned = {(study.label(arm), seed) for study in studies for arm in study.arms for seed in study.seeds}
    runs = {key: result for key, result in runs.items() if key in planned}
    bases = results.bases(plan.results)

    def hours(of: Iterable[Mapping[str, Any]]) -> str:
        each = [(result["seconds"], result["jobs"]) for result in of]
        on_the_clock = sum(seconds / jobs for seconds, jobs in each)
        return f"{sum(seconds for seconds, _ in each) / 3600:.1f} h, about {on_the_clock / 3600:.1f} h on the clock"

    return (
        f"All studies: {len(runs)} of {len(planned)} planned runs, each counted once: "
        f"{hours(runs.values())}. Their {len(bases)} bases: {hours(bases)}.\n"
    )


def pilot(values: Mapping[str, Values]) -> str:
    """Seeds that the pilots' spread asks for; `values` by study."""
    planned = planned_seeds(values)
    if not planned:
        return "No pilot has two seeds of a primary comparison yet.\n"
    lines = [
        f"Seeds for 80% power at an effect of {PILOT_EFFECT:g} points, from the pilots' standard deviation of paired "
        f"differences; at {ALPHA:g}, and at {ALPHA / len(PRIMARY):g}, which Holm's rule asks of the first claim:",
        "",
        f"| study | compared | sd | pilot seeds | seeds at {ALPHA:g} | at {ALPHA / len(PRIMARY):g} | seen by the "
        "study's seeds |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in planned:
        part = one["part"]
        seeds = " | ".join("> 1000" if count is None else str(count) for count in one["seeds"])
        compared = f"{METRICS[part.metric]}: {part.text()}"
        sd, seen = one["sd"], one["detectable"]
        lines.append(f"| {part.study.name} | {compared} | {sd:.2f} | {one['n']} | {seeds} | {seen:.1f} |")
    return "\n".join(lines) + "\n"


def _interval(one: Any) -> str:
    half = one.half()
    return f"{one.mean:+.1f}" + ("" if half is None else f" ± {half:.1f}")


def _mean_text(values: Sequence[float]) -> str:
    if not values:
        return "-"
    mean, spread = mean_and_spread(values)
    return f"{mean:.1f}" + ("" if spread is None else f" ± {spread:.1f}")


def _p(value: float | None) -> str:
    return "-" if value is None else "< 0.0001" if value < 1e-4 else f"{value:.2g}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


# ---- files -----------------------------------------------------------------------------------------------------------


def sections(plan: Plan, studies: Sequence[Study], figures: Path, *, whole: bool = False) -> dict[str, str]:
    """{name: Markdown for a page beside the folder `figures`}; writes figures/study_NAME.svg where there is one.

    whole: the primary claims, the pilots and the cost too, which take all studies.
    """
    found = {study.name: load(plan, study) for study in studies}
    arguments = [] if plan.recipe == RECIPE else [f"--config={plan.recipe}"]
    arguments += [f"--config.{name}={value}" for name, value in plan.overrides.items()]
    values = {name: values_of(one) for name, one in found.items()}
    made = {}
    for study in studies:
        drawing = drawings.draw(study, found[study.name], values[study.name])
        if drawing:
            write_text(figures / f"study_{study.name}.svg", drawing)
        figure = f"{figures.name}/study_{study.name}.svg" if drawing else ""
        made[study.name] = section(study, found[study.name], figure, arguments)
    if whole:
        pilots = {study.name: values_of(load(plan, study, pilot=True)) for study in studies}
        cost = whole_cost(plan, found, studies)
        made |= {"primary": primary(values), "pilot": pilot(pilots), "cost": cost}
    return made


def rewrite(pages: Sequence[Path], contents: Mapping[str, str]) -> None:
    """Puts each section in its place, which one of the pages has; before all have one, nothing is written.

    Raises:
      UserError: a page cannot be read, or a section has no place or several.
    """
    texts = {}
    for page in pages:
        try:
            texts[page] = read_bytes(page).decode()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{page} cannot be read ({error}); name another --page") from error
    for name, content in contents.items():
        texts = replaced(texts, name, content)
    for page, text in texts.items():
        write_text(page, text)


def replaced(texts: Mapping[Path, str], name: str, content: str) -> dict[Path, str]:
    """{page: text} with `content` between the lines of `name`. Raises UserError where they are not there once."""
    first, last = f"<!-- ablate: {name} -->\n", f"<!-- end: {name} -->"
    place = re.compile(f"{re.escape(first)}.*?{re.escape(last)}", re.DOTALL)
    if sum(len(place.findall(text)) for text in texts.values()) != 1:
        where = f"{' or '.join(map(str, texts))} must have"
        raise UserError(f"{where} the lines {first.strip()} and {last} once; add them where the table belongs")
    return {page: place.sub(lambda _: f"{first}{content}{last}", text) for page, text in texts.items()}
