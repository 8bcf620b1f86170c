"""Run directories as training leaves them, made from a seed; and what a page of them says."""

import html.parser
import json
import math

import numpy as np
import PIL.Image
import PIL.ImageDraw

from balcap_jax.report.page import write_report

OBJECTS = ("circle", "square", "triangle", "star")
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")
PLACES = ("top left", "top right", "bottom left", "bottom right")
OBJECTIVES = ("precision", "recall", "linguistic")
HOSTILE = (
    '<script>alert(1)</script><img src=x onerror=alert(2)>" onmouseover="alert(3)" x=\''
    '\'><svg/onload=alert(4)></style></title><a href="https://evil.example/">{{ 7 * 7 }}</a>-->'
)


def make_run(path, seed=0, *, sft=60, rl=120, images=24, samples=2, gain=1.0, hostile="", kept=(), flawed=False):
    """Writes a run directory as train leaves it; `hostile` is put into every text that is untrusted.

    kept: steps whose captions are kept. flawed: whether the judge is wrong on purpose, and the truth is logged too.
    """
    rng = np.random.default_rng(seed)
    (path / "samples" / "images").mkdir(parents=True)
    lines = []
    for step in range(1, sft + rl + 1):
        if step <= sft:
            values = {
                "loss": 4 * math.exp(-step / 20) + 0.6 + rng.normal(0, 0.05),
                "grad_norm": 1 + rng.gamma(2, 0.3),
                "time/update": 0.3 + rng.gamma(2, 0.01),
                "time/rollout": 0.0,
                "time/judge": 0.0,
                "time/other": 0.02,
                "tokens_per_second": 9000 + rng.normal(0, 300),
            }
        else:
            t = 1 - math.exp(-(step - sft) / 50)
            noise = rng.normal(0, 0.02, size=8)
            values = {
                "reward/precision": 0.62 + gain * 0.2 * t + noise[0],
                "reward/precision_std": 0.1,
                "reward/recall": 0.48 + gain * 0.22 * t + noise[1],
                "reward/linguistic": 0.55 + gain * 0.3 * t + noise[2],
                **{f"advantage/zero_std_frac/{name}": 0.1 * (1 + t) for name in ("precision", "recall", "linguistic")},
                "b_capscore": 100 * (0.55 + gain * 0.2 * t + noise[3]),
                "gate/in_band": min(1.0, 0.8 + 0.2 * t + noise[4] / 2),
                "judge/failure_rate": float(rng.random() < 0.1) * 0.05,
                "length/mean": 26 + 12 * t + 30 * noise[5],
                "length/ratio_mean": 0.7 + 0.3 * t + noise[5],
                "length/truncated_frac": max(0.0, 0.06 * (1 - t) + noise[6] / 5),
                "loss": noise[7] / 10,
                "kl": 0.02 * t,
                "entropy": 1.4 - 0.8 * t + noise[6],
                "grad_norm": 0.4 + rng.gamma(2, 0.1),
                "drift/max_abs_logp": abs(noise[7]) * 1e-4,
                "time/rollout": 0.6 + 0.2 * t + rng.gamma(2, 0.02),
                "time/judge": 0.08 + rng.gamma(2, 0.005),
                "time/update": 0.45 + rng.gamma(2, 0.02),
                "time/other": 0.03,
                "tokens_per_second": 3000 + rng.normal(0, 200),
            }
        if flawed and step > sft:
            for name in ("precision", "recall", "linguistic"):
                values[f"true/{name}"] = 0.6 - 0.2 * t
            values["true/b_capscore"] = 60 - 20 * t
        lines.append({"step": step, "stage": "sft" if step <= sft else "rl", **values})
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path / "config.json").write_text(
        json.dumps(
            {"data": {"name": "scenes" + hostile}, "rollout": {"group": 8, "temperature": gain}, "stages": {"sft": sft}}
        )
    )
    evaluated = {
        kind: {label: make_captions(path, kind, label, images, count, gain, hostile) for label in ("sft", "rl")}
        for kind, count in (("greedy", 1), ("evaluations", samples))
    }
    summary = evaluated | {
        "versions": {"jax": "0.10.2", "flax": "0.12.8", "python": "3.11"},
        "device": "1 x cpu, 2 host cores" + hostile,
        "command": "python -m balcap_jax.train --config=configs/scenes.py --workdir=runs/scenes" + hostile,
        "seconds": {"wall": 401.0, "rollout": 90.0, "update": 150.0, "judge": 12.0, "compile": 95.0, "other": 54.0},
    }
    (path / "summary.json").write_text(json.dumps(summary))
    for step in kept:
        keep_rollouts(path, step, hostile)
    return path


def keep_rollouts(path, step, hostile="", groups=3, members=4):
    """Writes the captions of one training step with their advantages, those of the first group furthest apart."""
    rng = np.random.default_rng(step)
    lines = []
    for group in range(groups):
        rewards = rng.uniform(0.2, 1, size=(members, 3)).round(3)
        scores = (rewards - rewards.mean(0)) / (rewards.std(0, ddof=1) + 1e-4) / (1 + 9 * group)
        captions = [
            {
                "caption": f"Caption {member} of group {group}.{hostile}",
                "words": 5,
                "in_band": member > 0,
                "rewards": dict(zip(OBJECTIVES, rewards[member].tolist(), strict=True)),
                "assertions": [{"text": f"caption {member}{hostile}", "verified": False, "pointable": True}],
                "judge": {"model": "the judge's model" + hostile},
                "advantage": scores[member].sum(),
                "advantages": dict(zip(OBJECTIVES, scores[member].tolist(), strict=True)),
            }
            for member in range(members)
        ]
        texts = {"prompt": "Describe it." + hostile, "reference": "A reference." + hostile, "reference_units": []}
        lines.append({"id": f"train-{step}-{group}{hostile}", "captions": captions} | texts)
    (path / "samples" / f"step-{step:06d}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def captions_of(run, kind, label):
    return run / "samples" / f"{ {'greedy': 'greedy', 'evaluations': 'eval'}[kind] }-{label}.jsonl"


def make_captions(path, kind, label, images, samples, gain, hostile):
    """Writes the file of captions with pictures; returns the evaluation for summary.json."""
    lines, everything = [], []
    skill = (0.6 if label == "sft" else 0.6 + 0.3 * gain) + 0.05 * (kind == "greedy")
    for number in range(images):
        scene = np.random.default_rng([7, number])
        rng = np.random.default_rng([number, len(label), len(kind)])
        picture, units = PIL.Image.new("RGB", (96, 96), "#d8d4cc"), []
        draw = PIL.ImageDraw.Draw(picture)
        for corner in range(4):
            thing, colour = scene.choice(OBJECTS), scene.choice(COLOURS)
            x, y = 12 + 48 * (corner % 2), 12 + 48 * (corner // 2)
            shape = draw.ellipse if thing in ("circle", "star") else draw.rectangle
            shape((x, y, x + 28, y + 28), fill=str(colour), outline="black")
            units.append(f"there is a {colour} {thing} in the {PLACES[corner]}")
        picture.save(path / "samples" / "images" / f"scene-{number}.png")
        captions = []
        for _ in range(samples):
            covered = [bool(rng.random() < skill) for _ in units]
            assertions = [
                {
                    "text": unit + hostile,
                    "why": ("" if hit else "the object there has another colour") + hostile,
                    "verified": hit,
                    "pointable": True,
                }
                for unit, hit in zip(units, [rng.random() < skill for _ in units], strict=True)
            ]
            if rng.random() > skill - 0.3:
                why = "praise, nothing to point at" + hostile
                assertions.append(
                    {"text": "the picture is lovely" + hostile, "why": why, "verified": True, "pointable": False}
                )
            text = ". ".join(f"T{one['text'][1:]}" for one in assertions) + "."
            marks = [int(rng.integers(3, 5 if label == "sft" else 6)) for _ in range(3)]
            rewards = {
                "precision": sum(one["verified"] and one["pointable"] for one in assertions) / len(assertions),
                "recall": sum(covered) / len(covered),
                "linguistic": sum(marks) / 15,
            }
            harmonic = 0.0 if min(rewards.values()) == 0 else 3 / sum(1 / value for value in rewards.values())
            captions.append(
                {
                    "caption": text,
                    "words": len(text.split()),
                    "tokens": len(text.split()) + 4,
                    "truncated": False,
                    "in_band": bool(rng.random() < 0.95),
                    "rewards": rewards,
                    "b_capscore": 100 * harmonic,
                    "assertions": assertions,
                    "covered": covered,
                    **dict(zip(("clarity", "fluency", "coherency"), marks, strict=True)),
                    "failures": {},
                    "habits": {"companion": bool(rng.random() > skill), "dots" + hostile: bool(rng.random() < skill)},
                }
            )
        everything += captions
        lines.append(
            {
                "id": f"scene-{number}{hostile}",
                "image": f"images/scene-{number}.png",
                "prompt": "Describe the picture.",
                "reference": ". ".join(f"T{unit[1:]}" for unit in units) + "." + hostile,
                "reference_units": [unit + hostile for unit in units],
                "captions": captions,
            }
        )
    captions_of(path, kind, label).write_text("".join(json.dumps(line) + "\n" for line in lines))

    def spread(values):
        return {"mean": float(np.mean(values)), "std": float(np.std(values))}

    means = [np.mean([one["rewards"][name] for one in everything]) for name in OBJECTIVES]
    return {name: spread([one["rewards"][name] for one in everything]) for name in OBJECTIVES} | {
        "b_capscore": spread([one["b_capscore"] for one in everything]),
        "corpus_b_capscore": float(300 / sum(1 / mean for mean in means)),
        "words": spread([one["words"] for one in everything]),
        "in_band": float(np.mean([one["in_band"] for one in everything])),
        "truncated": 0.0,
        "n": images * samples,
        "images": images,
        "habits": {
            name: {"share": float(np.mean([one["habits"][name] for one in everything])), "n": len(everything)}
            for name in ("companion", "dots" + hostile)
        },
    }


class Page(html.parser.HTMLParser):
    """Tags, attributes and visible text of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.attributes, self.texts, self._open = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attributes]
        self._open.append(tag)

    def handle_endtag(self, tag):
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data):
        if "style" not in self._open:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def page_of(*workdirs, out=None) -> Page:
    return Page(write_report(workdirs, out).read_text())
