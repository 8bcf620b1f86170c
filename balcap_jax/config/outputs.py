"""The keys of the files that commands write: what each means, its type, its unit, and when it is there.

    balcap config --outputs      prints them

No writer reads this. The tests look at what every run in them writes, and fail for a key that is not here.
"""

from typing import NamedTuple


class Key(NamedTuple):
    """One key. `name` has a dot for each object inside another, and [] for each entry of a list.

    What stands between < and > is any text without a dot or slash. Below a key of the type "object" anything may
    follow. kind: int, float, bool, str, list, object, or one of them "or null". when: "" = always.
    """

    name: str
    kind: str
    meaning: str
    when: str = ""


class Output(NamedTuple):
    """A file: `path` as commands name it, which command writes it, what a line or the whole of it is, and its keys."""

    path: str
    command: str
    about: str
    keys: tuple[Key, ...]


_OBJECTIVE = "<objective>"
_RL, _SUPERVISED = "stage rl", "stages align, sft and rl"
_REMOTE = "judges behind endpoints or on the mesh"

METRICS = (
    Key("step", "int", "updates done since the run began, over all of its stages"),
    Key("stage", "str", "vision, align, sft or rl"),
    Key("loss", "float or null", "loss of the update; null where it is not finite. Near 0 in rl: see the questions"),
    Key("grad_norm", "float or null", "global norm of the gradient before clipping"),
    Key("vision/accuracy", "float", "share of image tokens whose classes are told rightly", "stage vision"),
    Key(f"reward/{_OBJECTIVE}", "float or null", "mean score of the captions, before gate and scales", _RL),
    Key(f"reward/{_OBJECTIVE}_std", "float or null", "standard deviation within a group, mean over groups", _RL),
    Key("b_capscore", "float or null", "mean b-CapScore, 0 to 100, ungated; null without its three objectives", _RL),
    Key(f"true/{_OBJECTIVE}", "float", "the same captions by the exact judge", "judge.flaws"),
    Key("true/b_capscore", "float", "their b-CapScore by the exact judge, 0 to 100", "judge.flaws"),
    Key(f"best/{_OBJECTIVE}", "float or null", "mean score of the captions that are imitated", "estimator best_of"),
    Key(
        f"advantage/share/{_OBJECTIVE}",
        "float or null",
        "share of the objective in the sum of absolute weighted z-scores",
        _RL,
    ),
    Key(
        f"advantage/zero_std_frac/{_OBJECTIVE}",
        "float or null",
        "share of groups whose scores are all equal there",
        _RL,
    ),
    Key(f"advantage/invalid_frac/{_OBJECTIVE}", "float or null", "share of captions without a usable score", _RL),
    Key(
        f"advantage/nonfinite_frac/{_OBJECTIVE}", "float or null", "share of given scores that are NaN or infinite", _RL
    ),
    Key(
        "advantage/dropped_frac",
        "float or null",
        "share of captions that the aggregation conflict drops",
        "GDPO family",
    ),
    Key("advantage/pre_norm_std", "float or null", "standard deviation that the batch step divides by", _RL),
    Key("gate/in_band", "float or null", "share of captions whose length lies inside the band", _RL),
    Key(f"gate/gated_frac/{_OBJECTIVE}", "float or null", "share of its scores that the gate sets to 0", _RL),
    Key(
        "gate/fully_gated_frac", "float or null", "share of groups with an objective that is gated for all members", _RL
    ),
    Key("length/mean", "float or null", "words of a caption", _RL),
    Key("length/ratio_mean", "float or null", "words over those of the reference", _RL),
    Key("length/tokens_mean", "float or null", "tokens of a caption, its end included", _SUPERVISED),
    Key("length/truncated_frac", "float or null", "share of captions cut at rollout.max_tokens", _RL),
    Key("entropy", "float or null", "mean of -log p of the sampled tokens, nats", _RL),
    Key(
        "kl", "float or null", "k3 estimate to the policy at the stage's start, nats a token; null where it is off", _RL
    ),
    Key("ratio/mean", "float or null", "mean ratio of the policy to the one that sampled", _RL),
    Key("ratio/clipped_frac", "float or null", "share of tokens whose ratio is clipped", _RL),
    Key(
        "drift/max_abs_logp",
        "float or null",
        "largest absolute difference of a token's log-probability between update and sampler",
        _RL,
    ),
    Key("padding/rollout_useful", "float", "share of the tokens that the rollout computes which are real", _RL),
    Key(
        "padding/update_useful",
        "float or null",
        "share of the positions that the update computes which are real",
        _SUPERVISED,
    ),
    Key("judge/failure_rate", "float", "share of the scores that were asked for and failed", _RL),
    Key("judge/left_out", "float", "scores that were not asked for", "judge.ask"),
    Key("judge/calls", "int", "questions since the last step, evaluations included", _REMOTE),
    Key("judge/cache_hit_rate", "float", "share of them that the cache answered", _REMOTE),
    Key("judge/tokens_in", "int", "tokens of questions since the last step", _REMOTE),
    Key("judge/tokens_out", "int", "tokens of answers since the last step", _REMOTE),
    Key("judge/cost", "float", "money since the last step, in the unit of judge.price_in", _REMOTE),
    Key("judge/cost_total", "float", "money of the run, restarts included", _REMOTE),
    Key("time/rollout", "float", "seconds of sampling"),
    Key("time/judge", "float", "seconds that judging was waited for"),
    Key("time/judge_hidden", "float", "seconds of judging beside other work, in no sum", "pipeline.depth 1"),
    Key("time/update", "float", "seconds of the update"),
    Key("time/other", "float", "seconds of a step outside these phases"),
    Key("tokens_per_second", "float", "real tokens over the seconds of the stage's phases, all devices together"),
)

_CAPTION = (
    Key("caption", "str", "text without its end token"),
    Key("words", "int", "whitespace words; of scripts without blanks each character"),
    Key("tokens", "int", "tokens, the end token included"),
    Key("truncated", "bool", "whether it was cut at rollout.max_tokens"),
    Key("in_band", "bool", "whether its length lies inside the band of the gate"),
    Key(f"rewards.{_OBJECTIVE}", "float or null", "score; null where the judge gave none"),
    Key("b_capscore", "float or null", "b-CapScore, 0 to 100; null where one of its three scores is missing"),
    Key("advantage", "float", "combined advantage that the update used", "updates"),
    Key(f"advantages.{_OBJECTIVE}", "float", "that of each objective, before weights", "updates"),
    Key("contributes", "bool", "whether the caption has a part in the loss", "updates"),
    Key("failures", "object", "why a score is missing, by objective"),
    Key("left_out", "list", "objectives that were not asked about", "judge.ask"),
    Key("judge", "object", "model of the judge, and the prompt behind each question", _REMOTE),
    Key("suspicious", "list", "what in the caption speaks to its judge", "where something does"),
    Key("assertions[].text", "str", "what the caption asserts", "precision"),
    Key("assertions[].verified", "bool", "whether the picture shows it to be true", "precision"),
    Key("assertions[].pointable", "bool", "whether it points at something visible", "precision"),
    Key("assertions[].why", "str", "the judge's reason", "precision"),
    Key("covered", "list", "whether each reference unit is covered", "recall"),
    Key("clarity", "float", "mark, 1 to 5", "linguistic"),
    Key("fluency", "float", "mark, 1 to 5", "linguistic"),
    Key("coherency", "float", "mark, 1 to 5", "linguistic"),
    Key("answers[].question", "str", "a question drawn", "caprl"),
    Key("answers[].answer", "str", "letter that the judge gave", "caprl"),
    Key("answers[].right", "bool", "whether it is the right one", "caprl"),
    Key("failed_draws", "str", "why questions failed", "caprl, where some did"),
    Key("rubric[].criterion", "str", "a criterion", "rubicap"),
    Key("rubric[].weight", "float", "its weight", "rubicap"),
    Key("rubric[].passed", "bool", "whether the caption meets it", "rubicap"),
    Key("compared[].with", "int or str", "place in the group of the other caption, or reference", "arena"),
    Key("compared[].first", "bool", "whether this caption was shown first", "arena"),
    Key("compared[].score", "float", "1 won, 0.5 tie, 0 lost", "arena"),
    Key("failed_comparisons", "str", "why comparisons failed", "arena, where some did"),
    Key(f"exact.{_OBJECTIVE}", "float", "score before the errors that judge.flaws adds to scores", "judge.flaws"),
    Key("habits.<habit>", "bool", "whether it has this habit of the base captioner", "scenes, evaluations"),
)

SAMPLES = (
    Key("id", "str", "the picture, as its data set names it"),
    Key("image", "str", "PNG of the picture, below samples/; evaluations alone write it"),
    Key("prompt", "str", "the sample's own prompt"),
    Key("reference", "str", "reference caption"),
    Key("reference_units", "list", "units of the reference"),
    *(key._replace(name=f"captions[].{key.name}") for key in _CAPTION),
)

_MEANS = (
    Key(f"{_OBJECTIVE}.mean", "float or null", "mean score"),
    Key(f"{_OBJECTIVE}.std", "float or null", "its standard deviation over captions"),
    *(
        Key(f"{name}.{figure}", "float or null", f"{words} of {what}")
        for name, what in {
            "b_capscore": "the b-CapScore, 0 to 100",
            "words": "words",
            "tokens": "tokens",
            "in_band": "captions inside the band, 0 or 1 each",
            "truncated": "captions that were cut, 0 or 1 each",
        }.items()
        for figure, words in {"mean": "mean", "std": "standard deviation"}.items()
    ),
    Key(
        "corpus_b_capscore.mean", "float or null", "harmonic mean of the three mean scores, 0 to 100", "its objectives"
    ),
    Key("corpus_b_capscore.std", "null", "none: it is one number", "its objectives"),
    Key("n", "int", "captions"),
    Key("images", "int", "pictures"),
    Key("invalid", "int", "captions of which a score is missing"),
    Key("digest", "str", "of the captions' texts: equal captions have equal ones"),
    Key("habits.<habit>.share", "float", "share that has the habit, of captions that could", "scenes"),
    Key("habits.<habit>.n", "int", "captions that could have it", "scenes"),
)

SUMMARY = (
    Key("command", "str", "the command line of the newest start"),
    Key("device", "str", "devices and host cores"),
    Key("versions.<package>", "str", "version of Python or of a package"),
    Key("seconds.<phase>", "float", "seconds of the whole run by phase, restarts included; wall is their sum"),
    *(
        key._replace(name=f"{kind}.<label>.{key.name}", meaning=f"{key.meaning}; {which}")
        for kind, which in {"greedy": "greedy captions", "evaluations": "sampled captions"}.items()
        for key in _MEANS
    ),
    Key("best.metric", "str", "checkpoint.best_metric", "checkpoint.best_metric"),
    Key("best.step", "int", "the step that is kept in best/", "checkpoint.best_metric"),
    Key("best.score", "float", "its score on greedy captions of validation pictures", "checkpoint.best_metric"),
    Key("best.scores.<step>", "float or null", "scores of all steps that were tried", "checkpoint.best_metric"),
)

LEDGER = (
    Key("calls", "int", "questions"),
    Key("cached", "int", "of them answered without a request"),
    Key("tokens_in", "int", "tokens of all requests"),
    Key("tokens_out", "int", "tokens of all answers, unusable ones too"),
    Key("cost", "float", "money, in the unit of judge.price_in"),
)

_MADE = (
    Key("model", "str", "directory of the model"),
    Key("model_digest", "str", "of its configuration and of samples of its weights"),
    Key("prompt", "str", "what was asked of pictures without their own prompt"),
    Key("temperature", "float", "sampling temperature; 0 = greedy"),
    Key("max_tokens", "int", "token limit"),
    Key("dtype", "str", "compute type"),
    Key("max_image_tokens", "int", "image cap", "families that have one"),
    Key("top_p", "float", "nucleus", "temperature above 0"),
    Key("top_k", "int", "likeliest tokens", "temperature above 0"),
    Key("samples", "int", "captions drawn of a picture", "temperature above 0"),
    Key("keep", "str", "best or all of them", "temperature above 0"),
    Key("seed", "int", "of sampling", "temperature above 0"),
)

CAPTIONS = (
    Key("image", "str", "path of the picture as the list or folder gives it; PARQUET#ROW of a row"),
    Key("id", "str", "the picture's id", "where it has one"),
    Key("prompt", "str", "the picture's own prompt", "where it has one"),
    Key("caption", "str", "the caption"),
    Key("tokens", "int", "tokens, the end token included"),
    Key("truncated", "bool", "whether --max_tokens cut it"),
    Key("samples[].caption", "str", "each sample", "--keep=all"),
    Key("samples[].tokens", "int", "its tokens", "--keep=all"),
    Key("samples[].truncated", "bool", "whether it was cut", "--keep=all"),
    Key("samples[].log_prob", "float", "its mean log-probability a token", "--keep=all"),
)

_JUDGED = "metrics with a judge"

RESULTS = (
    Key("metric", "str", "name of the metric"),
    Key("score", "float or null", "the figure that the benchmark reports, 0 to 100 unless it says otherwise"),
    Key("confidence", "list or null", "95% interval of it, by 1,000 bootstrap samples"),
    Key("n", "int", "valid items"),
    Key("groups", "int", "pictures that these items hang on", "a valid item"),
    Key("invalid", "int", "items without a valid judgement, which are in no mean"),
    Key("errors", "object", "their number by reason"),
    Key("words", "float or null", "mean words of the captions; null where their text is not known"),
    Key("empty", "int", "captions of no words"),
    Key("truncated", "float or null", "percent of the captions that were cut; null where that is not known"),
    Key("categories.<category>.score", "float or null", "score of one category"),
    Key("categories.<category>.n", "int", "its valid items"),
    Key("unused", "int", "captions and judgements that belong to no item"),
    Key("unused_ids", "list", "the first of them"),
    Key("judge", "str", "model of the judge; empty = nobody was asked"),
    Key("prompts", "str", "names and versions of the judge's prompts"),
    Key("temperature", "float", "temperature of the judge", _JUDGED),
    Key("captions", "object", "how the captions were made: the keys of F.settings.json; empty where that is not known"),
    Key("inputs", "str", "digest of all files that were read"),
    Key("benchmark", "str", "digest of the benchmark's files alone"),
    Key("name", "str", "--name"),
    Key("split", "str", "--split"),
    Key("state", "object", "what the metric needs to add up again, for compare"),
    Key("version", "str", "version of balcap_jax"),
    Key("precision", "float or null", "mean precision, percent", "bcapscore, dcscore"),
    Key("recall", "float or null", "mean recall, percent", "bcapscore, dcscore"),
    Key("linguistic", "float or null", "mean language score, percent", "bcapscore"),
    Key("corpus_b_capscore", "float or null", "harmonic mean of the three means", "bcapscore"),
    Key("f1", "float or null", "mean F1 over all statements, percent", "dcscore"),
    Key("precision_relevant", "float or null", "precision of relevant statements, percent", "dcscore"),
    Key("recall_relevant", "float or null", "recall of relevant statements, percent", "dcscore"),
    Key("f1_relevant", "float or null", "F1 of relevant statements, percent", "dcscore"),
    Key("micro", "float or null", "mean over questions, percent", "captionqa"),
    Key("right", "float or null", "right answers, percent", "captionqa"),
    Key("cannot_answer", "float or null", 'answers "cannot answer"', "captionqa"),
    Key("unparsable", "float or null", "answers that name no option", "captionqa, general benchmarks"),
    Key("skipped", "float or null", "questions, or verdicts, that are passed over as published", "captionqa, caparena"),
    Key("domain/<domain>", "float or null", "score of a domain", "captionqa"),
    Key("against/<opponent>", "float or null", "score against one opponent", "caparena"),
    Key("board_words", "float or null", "mean words as the board counts them", "caparena"),
    Key("coverage", "float or null", "questions that the caption mentions, percent", "checklist"),
    Key("coverage/<kind>", "float or null", "the same of one kind", "checklist"),
    Key("precision/<kind>", "float or null", "of the mentioned, those answered yes, percent", "checklist"),
    Key("questions", "float or null", "questions", "checklist, general benchmarks"),
    Key("f1/<part>", "float or null", "F1 of objects, attributes or relations", "capture"),
    Key("kind/<kind>", "float or null", "score of a kind of questions", "general benchmarks"),
    Key("each_rotation", "float or null", "share of rotations answered rightly, percent", "mmbench"),
    Key("fewer_rotations_than_options", "float or null", "questions that lack rotations", "mmbench"),
    Key("mean_of_kinds", "float or null", "mean of the kinds' scores", "mmstar"),
)

ITEMS = (
    Key("id", "str", "the item"),
    Key("category", "str", "its category; empty where there are none"),
    Key("group", "str", "the picture that several items hang on", "where there is one"),
    Key("words", "int or null", "words of the caption"),
    Key("judgement", "object", "what the judge said, or what rules found", "valid items"),
    Key("parts", "list", "what adds up over items", "valid items"),
    Key("score", "float or null", "the item's own score", "valid items"),
    Key("error", "str", "why there is no score", "other items"),
)

LEFT_OUT = (
    Key("image", "str", "the picture"),
    Key("reason", "str", "why it is left out"),
)

OUTPUTS = (
    Output("WORKDIR/metrics.jsonl", "train", "one line for each log.every updates", METRICS),
    Output(
        "WORKDIR/samples/*.jsonl",
        "train",
        "one line a picture. `step-N` has captions of training, `greedy-LABEL` and `eval-LABEL` greedy and sampled "
        "ones of test pictures. A label is a stage, or `rl-N` within it. A reward of your own adds keys to captions",
        SAMPLES,
    ),
    Output("WORKDIR/summary.json", "train", "means of each evaluation, by label", SUMMARY),
    Output("WORKDIR/judge.json", "train, evaluate, recaption", "what judging took, restarts included", LEDGER),
    Output("WORKDIR/left_out.jsonl", "train", "one line for each picture that is not trained on", LEFT_OUT),
    Output("F.jsonl", "caption", "one line a picture", CAPTIONS),
    Output("F.settings.json", "caption", "how the captions of F.jsonl were made", _MADE),
    Output("DIR/results.json", "evaluate", "the figures of one metric; `side_by_side` has a table of its own", RESULTS),
    Output("DIR/items.jsonl", "evaluate", "one line an item", ITEMS),
)


def text() -> str:
    """All keys as aligned text."""
    lines = []
    for output in OUTPUTS:
        lines += ["", f"{output.path} ({output.command}): {output.about}"]
        widths = [max(len(key[column]) for key in output.keys) for column in range(2)]
        for key in output.keys:
            when = f" ({key.when})" if key.when else ""
            lines.append(f"  {key.name.ljust(widths[0])}  {key.kind.ljust(widths[1])}  {key.meaning}{when}")
    return "\n".join(lines[1:])
