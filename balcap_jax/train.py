"""Trains a captioner by the stages of its config: vision, alignment, supervised, BalCapRL.

One RL step has four parts. 1. The policy samples G captions of each picture. 2. A judge scores them. 3. One compiled
update goes from scores to advantages, loss, gradient and optimiser. 4. What is due is logged, saved and evaluated.

    python -m balcap_jax.train --config=configs/scenes.py --workdir=runs/scenes [--config.stages.rl.steps=50 ...]

The same command goes on with a run that was stopped or killed, and shows the result of one that is finished.
"""

import functools
import os
import shlex
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from balcap_jax import data, models, rewards
from balcap_jax.aot import print_sharding
from balcap_jax.cli.arguments import CommandParser, called, place, seconds
from balcap_jax.cli.bucket import shown
from balcap_jax.cli.errors import UserError
from balcap_jax.cli.process import INTERRUPTED, exit_on_user_error
from balcap_jax.config import recipes as configuration
from balcap_jax.data.input import prompts_of
from balcap_jax.judges import cost
from balcap_jax.models.formats import language
from balcap_jax.models.policy import Params
from balcap_jax.parallel import distributed, sharding
from balcap_jax.report.page import write_report
from balcap_jax.report.tables import result_text
from balcap_jax.training import announce, judge_trial, required
from balcap_jax.training.evaluation import HeldOut, check_best_metric, held_out, measured, references_as_samples
from balcap_jax.training.job import Job
from balcap_jax.training.programs import LORA_STAGES, adapted, check_freezes, model_fields, params_of
from balcap_jax.training.run import Run
from balcap_jax.training.stages import AlignStage, RLStage, SFTStage
from balcap_jax.training.vision_stage import VisionStage
from balcap_jax.training.workdir import readable

STAGES = {stage.name: stage for stage in (VisionStage, AlignStage, SFTStage, RLStage)}


def train(config: ConfigDict, workdir: str | os.PathLike, command: str = "") -> dict[str, Any]:
    """Runs (or resumes) all stages of `config` in `workdir` and returns the summary.

    Of several processes (`distributed.session`) each calls this with the same arguments. `workdir` is on a disk that
    they share, and only process 0 writes to it, but for checkpoints.

    Raises:
      UserError: bad input, a full disk, too many failed judge calls, or a gradient that stays non-finite.
    """
    rewards.check_settings(config)
    required.check(config)
    with Run(config, workdir, command) as run:
        fields, overrides = model_fields(config)
        with run.clock.phase("data"), distributed.first_goes_first():
            size = fields.get("image_size", config.model.image_size)
            needs = rewards.resolve(config.rewards.name).needs
            has_tokenizer = config.model.path or config.model.decoder_path
            splits = data.load(config.data, size, tokenizer=not has_tokenizer, needs=needs)
            rewards.check(config.rewards, run.judge, splits.fields, config.data.name)
            with readable(config.data):
                shown = held_out(splits.test, config.log.eval_images, "test")
        job, params = build(run, splits, shown, fields, overrides)
        validation = []
        if config.checkpoint.best_metric:
            with readable(config.data):
                validation = held_out(splits.validation, config.log.eval_images, "validation")
        run.open(splits, HeldOut(job, shown, validation))  # Only now: what cannot be run does not take the workdir.
        if run.leads:
            print(announce.block(config, fields["family"], params, splits, shown, run.judge), flush=True)

        for name in run.order:
            if run.is_past(name):
                if config.stages[name].steps:  # The checkpoint of a later stage holds the parameters, of these shapes.
                    params = jax.eval_shape(functools.partial(params_of, config, stage=name), params)
                    run.catch_up(name, params)
                continue
            stage = STAGES[name](job)
            state = run.resume(stage, params)
            params = None  # The state has its own: two copies of a large model do not fit.
            batches, steps = run.batches(stage, splits.train), run.steps_left(stage)
            with run.progress_of(stage):
                if stage.depth and steps:
                    batch = next(batches)
                    with jax.transfer_guard("disallow"):
                        stage.begin(state, batch, steps[0])
                for step in steps:
                    batch = next(batches)  # With a depth of 1, the next step's.
                    with run.profile.step(step), jax.transfer_guard("disallow"):
                        state, values, judged = stage.advance(state, batch, step)
                    run.log(stage, step, values, judged)
                    stop = run.reason_to_stop(stage, step, values, judged)
                    if stop or run.is_save_due(stage, step):
                        run.save(stage, state, batches, step)
                    if not (stop and stop.is_error):
                        run.evaluate_due(stage, state, step)
                    if stop:
                        run.stop(stop)
                        return run.summary
            run.end(stage, state)
            params = state.params

        # What `caption` asks of other pictures, and for how long an answer: as in training.
        asked = Counter({config.data.prompt: 1}) if config.data.prompt else prompts_of(splits.train)
        fields |= {"prompt": next(iter(asked)), "max_tokens": config.rollout.max_tokens}
        run.write_models(job, fields, params)
        if run.leads:
            show_result(run, asked)
        return run.summary


def build(
    run: Run,
    splits: data.Data,
    shown: Sequence[dict[str, Any]],
    fields: Mapping[str, Any],
    overrides: dict[str, Any],
) -> tuple[Job, Params]:
    """What the stages share, and the parameters that the first of them starts from.

    `fields` are the model's, and `overrides` the recipe's for a saved one, see `programs.model_fields`.

    Raises:
      UserError: the model cannot be read, or the config does not fit it or its data.
    """
    config, mesh = run.config, run.mesh
    if config.model.path:
        # Adapters need a base of its own type only; what is trained whole is float32.
        has_base = config.lora.rank and run.order[0] in LORA_STAGES
        stored = config.lora.base_dtype if has_base else "float32"
        policy, params, processor = models.load(config.model.path, mesh=mesh, param_dtype=stored, **overrides)
    else:
        decoder_path = config.model.decoder_path
        tokenizer = language.read_tokenizer(decoder_path) if decoder_path else splits.tokenizer
        policy, processor = models.build(fields, tokenizer)
        # What a language model brings is not drawn: at its size twice the memory.
        brought = {"decoder": language.read_decoder(decoder_path, policy.decoder, mesh)} if decoder_path else {}

        def drawn() -> Params:
            params = policy.init(jax.random.key(config.seed))
            return {name: part for name, part in params.items() if name not in brought}

        placed = sharding.tree_shardings(mesh, jax.eval_shape(drawn))
        params = jax.jit(drawn, out_shardings=placed)() | brought
    check_freezes(config, params)
    reward = rewards.build(config.rewards, run.judge, config.seed, references_as_samples(shown))
    measure = measured(config, run.judge, reward, splits.fields)
    check_best_metric(config.checkpoint.best_metric, measure.names, len(splits.validation))
    reward, truth = rewards.in_training(reward, config.judge, config.seed), rewards.truth(run.judge, splits.fields)
    job = Job(config, mesh, adapted(config, policy), processor, reward, run.clock, measure, run.settle, truth)
    return job, params


def show_result(run: Run, asked: Counter[str]) -> None:
    """Writes the report page, and prints the result and where everything is; `asked`: prompts, the model's first."""
    page = write_report([run.workdir], run.workdir / "report.html")
    print(result_text(run.summary, run.order))
    print(shown(f"model:  {run.model}\nreport: {page}"), flush=True)
    if len(asked) > 1:
        prompt, count = next(iter(asked.items()))
        share = f"{100 * count / asked.total():.0f}% of the pictures that were looked at"
        print(f"prompt: {prompt!r} goes with the model, the most frequent of {len(asked)} in training ({share})")
    if (step := run.best.step) is not None:
        score = f"validation {run.best.metric} {run.best.scores[step]:.4g}"
        print(shown(f"best:   {run.best_model} (step {step}, {score})"), flush=True)


def estimate_judge(config: ConfigDict, rollout: float) -> None:
    """Prints what judging will cost, and how long it takes where there is a judge to ask.

    Raises UserError, after the cost, where a judge that is named does not answer.
    """
    methods = rewards.resolve(config.rewards.name).asks
    print(cost.estimate(config, configuration.stage_order(config), methods), flush=True)
    if config.judge.name != "remote" or not config.judge.endpoints.strip():
        return
    print(f"asking {config.judge.endpoints} about {judge_trial.QUESTIONS} of these questions, to time them", flush=True)
    try:
        print(judge_trial.trial(config, rollout), flush=True)
    except UserError as error:
        raise UserError(f"seconds are not measured: {error}") from error


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(
        prog=called("train"),
        description="Trains a captioner by the stages of a recipe; the same command resumes a stopped run.",
    )
    configuration.add_arguments(parser)
    parser.add_argument("--workdir", type=place, metavar="DIR", help="where the run is written, and resumed from")
    parser.add_argument(
        "--print_sharding", action="store_true", help="print where each parameter lies on the devices, and stop"
    )
    parser.add_argument(
        "--estimate_judge",
        nargs="?",
        const=0.0,
        type=seconds,
        metavar="ROLLOUT_SECONDS",
        help="print about how many judge calls, tokens and money a run takes; ask judge.endpoints a few questions, "
        "print how long a step takes and what hides it behind a rollout of so many seconds; and stop",
    )
    arguments = sys.argv[1:] if argv is None else list(argv)
    config, args = configuration.parse_command_line(arguments, parser)
    rewards.check_settings(config)
    if args.estimate_judge is not None:
        estimate_judge(config, args.estimate_judge)
        return
    if not args.workdir and not args.print_sharding:
        parser.error("the following arguments are required: --workdir")
    try:
        with distributed.session():
            if args.print_sharding:
                table = print_sharding.describe(config, sharding.make_mesh(config.mesh))
                if distributed.is_first():
                    print(table, flush=True)
                return
            train(config, args.workdir, command=shlex.join(["python", "-m", "balcap_jax.train", *arguments]))
    except KeyboardInterrupt:
        # At once: in good order, Python would wait for the threads that write a checkpoint.
        print("interrupted; the same command goes on from the newest checkpoint", file=sys.stderr, flush=True)
        os._exit(INTERRUPTED)


if __name__ == "__main__":
    main()
