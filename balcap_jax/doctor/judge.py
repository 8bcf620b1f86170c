"""Checks of the judge: the reward's own questions about one real picture, and what it says, for each endpoint."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from balcap_jax import judges, rewards
from balcap_jax.cli.errors import UserError, shown
from balcap_jax.config.schema import parse_endpoints
from balcap_jax.doctor import checkpoint
from balcap_jax.doctor.findings import FAULT, OK, UNCHECKED, Finding, fault
from balcap_jax.doctor.pictures import Seen
from balcap_jax.judges.chat import probe
from balcap_jax.judges.chat.client import ChatClient
from balcap_jax.judges.chat_judge import RemoteJudge, make_client
from balcap_jax.judges.schema import Failure, Judge, PrecisionQuestion, PrecisionVerdict, RecallQuestion, Usage
from balcap_jax.rewards.base import Scores
from balcap_jax.training import judge_trial
from balcap_jax.training.evaluation import batches
from balcap_jax.training.job import to_samples

CHECK = "judge"
PATIENCE = 15.0  # seconds that an answer may take here: the whole is to end within a minute
_LOOKED_AT = 3  # pictures whose references are checked against them, and against grey
_GREY = 128  # of a picture in which nothing can be seen
_LEAST_COVERED = 0.5  # share of units that are found in a caption which consists of them
_NO_DATA = "the data come first"
_MARKS = ("clarity", "fluency", "coherency")
# By what a failure says: what to do about it.
_REMEDIES = (
    (r"HTTP 429|asks to wait", "set judge.rpm and judge.tpm to what the server allows, or lower judge.concurrency"),
    (r"no answer within", "give the server more room or fewer requests at once, and raise judge.timeout above that"),
    (r"HTTP 4\d\d", "see what the server's log says of these requests; mend judge.model or judge.max_tokens"),
    (r"HTTP 5\d\d|connection|is down", "see the server's log; start it again with more memory, or take another server"),
    (r"cut off|max_tokens", "raise judge.max_tokens"),
)
_UNUSABLE = "take a model that keeps to a JSON schema, or a server that holds it to one (vLLM does)"


class Heard(NamedTuple):
    """What is known of the judge afterwards: {"model": name} of it, and what a trial of it took."""

    about: Mapping[str, str]
    trial: judge_trial.Trial | None = None
    problem: str = ""  # why there is no trial, where there could be one


class Named(Judge):
    """Stands for a judge of which the name is wanted alone."""

    def __init__(self, about: Mapping[str, str]):
        self.about = about


def look(config: ConfigDict, seen: Seen | None, patience: float = PATIENCE) -> tuple[list[Finding], Heard]:
    """A finding for each endpoint, or for the judge that has none, and what was heard of it.

    Without held-out pictures that can be shown, a remote judge is connected to alone. patience: seconds that an answer
    may take.
    """
    asks = rewards.resolve(config.rewards.name).asks
    if not asks:
        return [Finding(CHECK, OK, f"the reward {config.rewards.name!r} asks no judge")], Heard({})
    if config.judge.name == "policy":
        return _on_the_mesh(config), Heard({})
    if config.judge.name == "remote" and not config.judge.endpoints.strip():
        return [Finding(CHECK, UNCHECKED, "judge.endpoints is empty")], Heard({})
    patience, seen = min(patience, config.judge.timeout), seen if seen and seen.shown else None
    if config.judge.name == "remote":
        return _remote(config, seen, patience)
    if seen is None:
        return [Finding(CHECK, UNCHECKED, f"{_NO_DATA}: it is asked about one of their pictures")], Heard({})
    return _oracle(config, seen)


def _on_the_mesh(config: ConfigDict) -> list[Finding]:
    try:
        checkpoint.whole(config.judge.path)
    except UserError as error:
        return checkpoint.faults(CHECK, config.judge.path, error)
    return [Finding(CHECK, UNCHECKED, f"{config.judge.path} is whole; it answers on the devices that train alone")]


def _oracle(config: ConfigDict, seen: Seen) -> tuple[list[Finding], Heard]:
    try:
        judge = judges.build(config.judge, config.seed, rewards.resolve(config.rewards.name).asks)
        rewards.check(config.rewards, judge, seen.splits.fields, config.data.name)
        scores = _scores(config, seen, judge)
    except UserError as error:
        return [fault(CHECK, error)], Heard({})
    return [_answered(CHECK, config, seen, judge, scores)], Heard(judge.about)


def _remote(config: ConfigDict, seen: Seen | None, patience: float) -> tuple[list[Finding], Heard]:
    endpoints = parse_endpoints(config.judge.endpoints)
    with ThreadPoolExecutor(len(endpoints)) as pool:
        asked = list(pool.map(lambda endpoint: _endpoint(config, seen, endpoint[0], patience), endpoints))
    findings, models, few = map(list, zip(*asked, strict=True))
    served = next(filter(None, models), "")
    for at, model in enumerate(models):
        if model and model != served:
            found = f"it serves {model!r}, and {endpoints[models.index(served)][0]} serves {served!r}"
            remedy = "have all endpoints serve one model, or name it in judge.model"
            findings[at] = dataclasses.replace(findings[at], verdict=FAULT, found=found, remedy=remedy)
    if any(finding.verdict == FAULT for finding in findings):
        return findings, Heard({"model": served} if served else {}, problem="the judge comes first")
    if seen is None:
        return findings, Heard({"model": served}, problem=_NO_DATA)
    unanswered, trial = "", few[0]
    if config.judge.rpm or config.judge.tpm:  # A hundred questions would take minutes: those so far must do.
        usage, trial = sum((each.usage for each in few), Usage()), dataclasses.replace(trial, servers=len(endpoints))
    else:
        try:
            samples = judge_trial.samples_of([_with_units(example) for example in seen.shown])
            trial = judge_trial.ask(_patient(config, patience), samples, _fields(config, seen))
            usage = trial.usage
        except judge_trial.Unanswered as error:
            usage, unanswered = error.usage, error.method
        except UserError as error:
            at = next((at for at, (url, _) in enumerate(endpoints) if url.rstrip("/") in str(error)), 0)
            findings[at] = fault(findings[at].check, error)
            return findings, Heard({"model": served}, problem="the judge comes first")
    if _failing(config, findings, [url for url, _ in endpoints], usage, unanswered):
        return findings, Heard({"model": served}, problem="the judge comes first")
    return findings, Heard({"model": served}, trial)


def _failing(config: ConfigDict, findings: list[Finding], urls: Sequence[str], usage: Usage, unanswered: str) -> bool:
    """Whether more questions have failed than a run lets pass: the finding on the endpoint of most of them says so.

    unanswered: the method by which no question at all was answered, if any.
    """
    failed, asked, most = usage.failures.total(), usage.calls - usage.cached, config.judge.max_failure_rate
    too_many = failed > most * asked
    if not (too_many or unanswered):
        return False
    of = [sum(n for reason, n in usage.failures.items() if reason.startswith(f"{url.rstrip('/')}: ")) for url in urls]
    at, (reason, count) = int(np.argmax(of)), usage.failures.most_common(1)[0]
    so = f"a run stops above {most:g} (judge.max_failure_rate)" if too_many else f"none by {unanswered} was answered"
    found = f"{failed} of {asked} questions failed ({count} x {reason}); {so}"
    findings[at] = dataclasses.replace(findings[at], verdict=FAULT, found=found, remedy=_remedy(reason))
    return True


def _remedy(reason: str) -> str:
    """What to do about a failure."""
    return next((todo for pattern, todo in _REMEDIES if re.search(pattern, reason)), _UNUSABLE)


def _fields(config: ConfigDict, seen: Seen) -> frozenset[str]:
    """Those of the data, with those that the reward needs: that they are missing is another check's finding."""
    return seen.splits.fields | set(rewards.resolve(config.rewards.name).needs)


def _with_units(example: Mapping[str, Any]) -> Mapping[str, Any]:
    """The example, with sentences of its reference as units where it has none: references may not be written yet."""
    if len(example["reference_units"]):
        return example
    sentences = [text.strip(" .") for text in str(example["reference"]).split(". ")]
    return {**example, "reference_units": [text for text in sentences if text]}


def _patient(config: ConfigDict, seconds: float, url: str = "") -> ConfigDict:
    """The configuration with a judge that may take `seconds`, at `url` alone where one is given, and no cache.

    It asks again as often as a run does: what a run gets answered in the end is no failure here.
    """
    bounded = config.copy_and_resolve_references()
    with bounded.unlocked():
        judge = bounded.judge
        judge.timeout, judge.deadline, judge.cache_dir = seconds, min(judge.deadline, 2 * seconds), ""
        judge.endpoints = url or judge.endpoints
    return bounded


def _endpoint(
    config: ConfigDict, seen: Seen | None, url: str, patience: float
) -> tuple[Finding, str, judge_trial.Trial | None]:
    """The finding on one endpoint, the name of its model ("" = not known), and what the questions to it took.

    Without data it is connected to, which shows whether it is up, takes the key and knows the model.
    """
    check = f"{CHECK} {url}"
    asks, bounded = rewards.resolve(config.rewards.name).asks, _patient(config, patience, url)
    try:
        client = make_client(bounded.judge, config.seed)
    except UserError as error:
        return fault(check, error), "", None
    with client:
        judge = RemoteJudge(client, config.judge.max_tokens)
        try:
            client.connect(sees=judges.sees(asks))
            if seen is None:
                found = f"{client.model} answers; {_NO_DATA}: the reward's questions are about their pictures"
                finding = Finding(check, UNCHECKED, found)
            else:
                rewards.check(config.rewards, judge, _fields(config, seen), config.data.name)
                scores = _scores(config, seen, judge)
                finding = _answered(check, config, seen, judge, scores)
            if finding.verdict == OK and "precision" in asks:
                finding = _seeing(finding, seen, judge)
            if finding.verdict == OK and "recall" in asks:
                finding = _understanding(finding, seen, judge)
            if config.judge.model:
                finding = _listed(finding, client)
        except UserError as error:
            return fault(check, error), client.model, None
        return finding, client.model, judge_trial.taken(client, asks) if finding.verdict == OK else None


def _scores(config: ConfigDict, seen: Seen, judge: Judge) -> Scores:
    """What the reward makes of one held-out picture, whose reference is the caption; two captions to be compared."""
    ((batch, _),) = batches([_with_units(seen.shown[0])], 1)
    captions = [_captions(config, batch["reference"][0])]
    tokens = np.array([[len(text.split()) for text in captions[0]]])
    return rewards.build(config.rewards, judge, config.seed)(to_samples(batch, captions, tokens))


def _captions(config: ConfigDict, reference: str) -> list[str]:
    compares = "preference" in rewards.resolve(config.rewards.name).asks
    return [reference, reference.partition(". ")[0]] if compares else [reference]


def _answered(check: str, config: ConfigDict, seen: Seen, judge: Judge, scores: Scores) -> Finding:
    """The finding on answers: what is missing, or what was said."""
    detail = scores.detail[0][0]
    if failures := dict(detail.get("failures", {})):
        name, reason = next(iter(failures.items()))
        more = f", and {len(failures) - 1} more" if len(failures) > 1 else ""
        return Finding(check, FAULT, f"no answer about {name}{more}: {reason}", _remedy(reason))
    objectives = rewards.objectives(config.rewards)
    given = zip(objectives, scores.rewards[0, 0], strict=False)
    means = ", ".join(f"{name} {reward:.2f}" for name, reward in given)
    model = judge.about.get("model", "the oracle, by the rules of the scenes,")
    found = f"{model} answers: {means} for the reference of {seen.shown[0]['id']}"
    return Finding(check, OK, found, details=_shown(check, seen.shown[0], detail))


def _shown(check: str, example: Mapping[str, Any], detail: Mapping[str, Any]) -> tuple[str, ...]:
    """The answers, a line each."""
    lines = [f"{check} on {example['id']}, with its reference as caption: {shown(example['reference'], str)}"]
    for each in detail.get("assertions", ()):
        flags = ", ".join(name if each[name] else f"not {name}" for name in ("verified", "pointable"))
        lines.append(f"  precision   {each['text']}: {flags}" + (f" ({each['why']})" if each.get("why") else ""))
    for unit, covered in zip(_with_units(example)["reference_units"], detail.get("covered", ()), strict=False):
        lines.append(f"  recall      {unit}: {'covered' if covered else 'not covered'}")
    if marks := [f"{name} {detail[name]:g}" for name in _MARKS if name in detail]:
        lines.append(f"  linguistic  {', '.join(marks)} of 5")
    if len(lines) == 1:
        other = {name: value for name, value in detail.items() if name not in ("failures", "judge", "suspicious")}
        lines.append(f"  {shown(other)}")
    return tuple(lines)


def _listed(finding: Finding, client: ChatClient) -> Finding:
    """`finding`, with a line where the server lists other models: some servers answer to any name."""
    lines = [
        f"{finding.check} lists {probe.named(names)}, and not {client.model!r} (judge.model), to which it answers: see "
        "that it is the model that you mean"
        for names in client.listed().values()
        if client.model not in names
    ]
    return dataclasses.replace(finding, details=(*finding.details, *lines))


# ---- whether it sees and understands ---------------------------------------------------------------------------------


def _seeing(finding: Finding, seen: Seen, judge: Judge) -> Finding:
    """`finding`, or that the judge says of a plain grey picture what it says of the real one."""
    questions = []
    for example in seen.shown[:_LOOKED_AT]:
        picture = np.asarray(example["image"])
        for image in (picture, np.full_like(picture, _GREY)):
            questions.append(PrecisionQuestion(example["reference"], image, {}))
    verdicts = judge.mixed(questions)
    real, grey = (_verified(verdicts[start::2]) for start in (0, 1))
    if real is None or grey is None or real > grey:
        return finding
    count = len(questions) // 2
    found = (
        f"it verifies {real:.0%} of the assertions of {count} reference{'s' * (count > 1)} on their own pictures, and "
        f"{grey:.0%} on plain grey ones: it does not see, or does not look"
    )
    remedy = "name a model that sees pictures in judge.model, or ask nothing about pictures (rewards.name=text)"
    return dataclasses.replace(finding, verdict=FAULT, found=found, remedy=remedy)


def _understanding(finding: Finding, seen: Seen, judge: Judge) -> Finding:
    """`finding`, or that the judge does not find units in a caption that consists of them."""
    units = [_with_units(example)["reference_units"] for example in seen.shown[:_LOOKED_AT]]
    captions = [" ".join(f"{unit.strip(' .')}." for unit in each) for each in units]
    verdicts = judge.mixed([RecallQuestion(*question) for question in zip(captions, units, strict=True)])
    flags = [covered for verdict in verdicts if not isinstance(verdict, Failure) for covered in verdict.covered]
    if not flags or sum(flags) >= _LEAST_COVERED * len(flags):
        return finding
    found = f"it finds {sum(flags)} of {len(flags)} reference units in captions that consist of these very sentences"
    remedy = "name a model that understands the question in judge.model: recall would not be rewarded"
    return dataclasses.replace(finding, verdict=FAULT, found=found, remedy=remedy)


def _verified(verdicts: Sequence[PrecisionVerdict | Failure]) -> float | None:
    """The share of assertions that are verified; None where no verdict has any."""
    flags = [each.verified for verdict in verdicts if not isinstance(verdict, Failure) for each in verdict.assertions]
    return sum(flags) / len(flags) if flags else None
