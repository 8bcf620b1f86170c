"""Trains a captioner by the stages of its config: vision, alignment, supervised, BalCapRL. Read top to bottom.

    python -m balcap_jax.train --config=configs/scenes.py --workdir=runs/scenes [--config.stages.rl.steps=50 ...]

The same command goes on with a run that was stopped or killed, and shows the result of one that is finished.
"""

import contextlib
import functools
import math
import os
import shlex
import shutil
import signal
import sys
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from balcap_jax import data, judges, models, rewards
from balcap_jax.aot import print_sharding
from balcap_jax.cli import json_text
from balcap_jax.cli.arguments import CommandParser, place
from balcap_jax.cli.errors import UserError
from balcap_jax.cli.files import resolved, write_text
from balcap_jax.cli.process import INTERRUPTED, PreemptionFlag, exit_on_user_error
from balcap_jax.config import recipes as configuration
from balcap_jax.config.schema import RUN_FIELDS
from balcap_jax.data.input import as_columns, examples, make_dataset
from balcap_jax.judges import budget, cost
from balcap_jax.models import lora
from balcap_jax.models.formats import loading
from balcap_jax.models.formats import orbax as model_arrays
from balcap_jax.parallel import distributed, sharding
from balcap_jax.report.page import before_after_table, write_report
from balcap_jax.rewards.miniature import with_miniature
from balcap_jax.train_step import TrainState, trained
from balcap_jax.training import evaluation
from balcap_jax.training.checkpoint import Checkpointer
from balcap_jax.training.evaluation import Best, Evaluator
from balcap_jax.training.evaluation import check_best_metric as check_best_metric
from balcap_jax.training.job import (
    EVALUATION_STEP,
    LORA_STAGES,
    Job,
    check_freezes,
    freeze_of,
    params_of,
    sampling_of,
    start_state,
    state_shardings,
)
from balcap_jax.training.logging import MetricsWriter, import_wandb
from balcap_jax.training.machine import device_text, use_compilation_cache, versions
from balcap_jax.training.pipeline import abstract_kept
from balcap_jax.training.progress import PhaseClock, Progress
from balcap_jax.training.stages import RLStage, SFTStage
from balcap_jax.training.vision_stage import VisionStage
from balcap_jax.training.workdir import KINDS, check_saved, claim, dump_samples, not_ours, read_summary, readable

STAGES = {
    "vision": VisionStage,
    "align": functools.partial(SFTStage, name="align"),
    "sft": SFTStage,
    "rl": RLStage,
}


def train(config: ConfigDict, workdir: str | os.PathLike, command: str = "") -> dict[str, Any]:
    """Runs (or resumes) all stages of `config` in `workdir` and returns the summary.

    Of several processes (`distributed.session`) each calls this with the same arguments; `workdir` is on a disk that
    they share, and only process 0 writes to it, but for checkpoints.

    Raises:
      UserError: bad input, a full disk, too many failed judge calls, or a gradient that stays non-finite.
    """
    # =================================================================================================== set-up
    workdir = resolved(workdir).absolute()
    clock = PhaseClock()
    rewards.check_settings(config)
    order = configuration.stage_order(config)
    steps = {name: config.stages[name].steps for name in order}
    total = sum(steps.values())
    # What is made here may lie beside the data, but not in somebody's folder of photographs.
    use_compilation_cache(*([config.data.data_dir] if config.data.name == "scenes" else []))
    leads = distributed.is_first()
    distributed.check_same("versions of packages", versions())
    distributed.check_same("config", configuration.to_text(config))
    mesh = sharding.make_mesh(config.mesh)
    for name in order:
        sharding.check_batch(mesh, name, config.stages[name].batch_size, config.stages[name].micro_batches)
    if config.log.wandb and leads:
        import_wandb()

    with contextlib.ExitStack() as stack:
        stack.enter_context(claim(workdir, config))
        stop = stack.enter_context(PreemptionFlag())
        judge = judges.build(config.judge, config.seed, rewards.resolve(config.rewards.name).asks)
        stack.callback(judge.close)
        spending = budget.Spending(judge, config.judge, workdir / budget.LEDGER, failure_window(config))

        # ================================================================================================= data
        fields, overrides = config.model.to_dict(), {}
        if config.model.path:
            own = models.read_fields(config.model.path)
            overrides = {name: fields[name] for name in RUN_FIELDS if name in own and fields[name] != ""}
            fields = own | overrides
        with clock.phase("data"), distributed.first_goes_first():
            size = fields.get("image_size", config.model.image_size)
            splits = data.load(config.data, size, tokenizer=not config.model.path)
            rewards.check(config.rewards, judge, splits.fields, config.data.name)
            with readable(config.data):
                shown = examples(splits.test, config.log.eval_images)

        # =============================================================================================== policy
        if config.model.path:
            # Adapters need a base of its own type only; what is trained whole is float32.
            stored = config.lora.base_dtype if config.lora.rank and order[0] in LORA_STAGES else "float32"
            policy, params, processor = models.load(config.model.path, mesh=mesh, param_dtype=stored, **overrides)
        else:
            policy, processor = models.build(config.model, splits.tokenizer)
            placed = sharding.tree_shardings(mesh, jax.eval_shape(policy.init, jax.random.key(0)))
            params = jax.jit(lambda: policy.init(jax.random.key(config.seed)), out_shardings=placed)()
        if config.lora.rank:
            policy = lora.Adapted(policy, config.lora.alpha / config.lora.rank)
        check_freezes(config, params)
        tried_on = evaluation.references_as_samples(shown, as_columns)
        reward = rewards.build(config.rewards, judge, config.seed, tried_on)
        measure = with_miniature(rewards.measure(reward, judge, splits.fields), judge, splits.fields)
        check_best_metric(config.checkpoint.best_metric, measure.names, len(splits.validation))
        job = Job(config, mesh, policy, processor, reward, clock, measure)
        evaluators = {kind: Evaluator(job, greedy=kind == "greedy") for kind in KINDS}
        # Evaluations run in batches of the RL stage's size, at most of as many as there are images.
        parts = math.prod(mesh.shape[axis] for axis in sharding.BATCH_AXES)
        size = min(-(-len(shown) // parts) * parts, config.stages[order[-1]].batch_size)
        shown_batches = evaluation.batches(shown, size, as_columns)
        validation = []
        if config.checkpoint.best_metric:
            with readable(config.data):
                validation = examples(splits.validation, config.log.eval_images)
        validation_batches = evaluation.batches(validation, size, as_columns)
        for columns, _ in (*shown_batches, *validation_batches):
            job.prompt(columns)  # A prompt that is too long is found here.
        # Only now: a config that cannot be run does not take the workdir.
        if leads:
            write_text(workdir / "config.json", configuration.to_text(config))
            if splits.left_out:
                lines = json_text.lines(one._asdict() for one in splits.left_out)
                write_text(workdir / "left_out.jsonl", lines)

        # ============================================================================================== restore
        checkpointer = stack.enter_context(
            Checkpointer(
                workdir / "checkpoints",
                keep=config.checkpoint.keep,
                beside=[workdir / "metrics.jsonl"],
                asynchronous=config.checkpoint.asynchronous,
            )
        )
        writer = stack.enter_context(
            MetricsWriter(
                workdir,
                tensorboard=config.log.tensorboard,
                wandb=config.log.wandb or None,
                config=config.to_dict(),
                enabled=leads,
            )
        )
        model, best_model = workdir / "model", workdir / "best"
        best = Best(
            config.checkpoint.best_metric,
            lambda params: evaluators["greedy"](params, validation_batches, EVALUATION_STEP)[0],
        )
        done = checkpointer.latest_step() or 0
        if total and not done and distributed.from_first(leads and model.exists()):
            raise UserError(
                f"{workdir} holds a trained model and no checkpoint to go on from; choose another --workdir, or move "
                f"{model} away to train from the start"
            )
        summary = distributed.from_first(read_summary(workdir) if done and leads else {})
        failures = deque(maxlen=failure_window(config))
        saved: dict[str, Any] = {}
        if done:
            saved = checkpointer.extra(done)
            check_saved(saved, checkpointer.directory / str(done))
            clock.restore(saved["clock"])
            failures.extend(map(tuple, saved["failures"]))
            checkpointer.keep_also("best", best.restore(saved.get("best", {}), checkpointer.steps()))
            if leads:
                print(f"going on after step {done} of {total} ({saved['stage']})", flush=True)
        writer.truncate(done)
        summary |= {"command": command, "versions": versions(), "device": device_text()}

        def evaluate(label: str, params: Any) -> None:
            """Writes the judged captions of the held-out images and their means, once per label."""
            with clock.phase("evaluate"):
                pictures = {example["id"]: example["image"] for example in shown}
                for kind, evaluator in evaluators.items():
                    means, records = evaluator(params, shown_batches, EVALUATION_STEP)
                    summary.setdefault(kind, {})[label] = means
                    if kind == "evaluations" and leads:
                        evaluation.write(workdir, label, records, pictures)
            spending.update()
            write_summary()

        def validate(step: int, params: Any) -> None:
            """Scores a saved step on the validation images; the best checkpoint so far outlives `checkpoint.keep`."""
            with clock.phase("evaluate"):
                best.measure(step, params)
            checkpointer.keep_also("best", best.step)
            write_summary()

        def write_summary() -> None:
            summary.update(best.summary(), seconds=clock.totals())
            if leads:
                write_text(workdir / "summary.json", json_text.dumps(summary, indent=2) + "\n")

        def forget(labels: Sequence[str]) -> None:
            """Drops what more steps make outdated, whatever else was deleted by hand: the model and these results."""
            for kind in evaluators:
                for label in labels:
                    summary.get(kind, {}).pop(label, None)
            if leads:
                for path in (model, best_model):
                    shutil.rmtree(path, ignore_errors=True)
                for label in labels:
                    (workdir / "samples" / f"eval-{label}.jsonl").unlink(missing_ok=True)
                if (workdir / "summary.json").exists():
                    write_summary()

        def evaluated(label: str) -> bool:
            return label in summary.get("evaluations", {})

        # =============================================================================================== stages
        first, stopped = 0, False
        for index, name in enumerate(order):
            last = first + steps[name]
            checkpointer.keep_also(name, last)
            settings = config.stages[name]
            previous = order[index - 1] if index else ""
            if done >= last and name != order[-1]:
                first = last
                if steps[name]:  # A later stage is under way; its checkpoint holds the parameters, of these shapes.
                    params = jax.eval_shape(lambda p: params_of(config, p, name), params)  # noqa: B023
                continue

            # ---- where this stage starts: from the stage before it, or from its own newest checkpoint
            before = previous or "base"
            unseen = name == "rl" and not evaluated(before)
            if 0 < first <= done and (first == done or unseen):
                params = restore_params(checkpointer, first, job, params)
            anchored = name == "rl" and config.loss.kl_coef > 0
            if first < done:
                like = jax.eval_shape(lambda p: start_state(job, p, name), params)  # noqa: B023
                arrays, _ = checkpointer.restore(done, placed_like(job, like, name, anchored))
            else:
                arrays = {"state": start_state(job, params, name)}
                if anchored:
                    at_start = trained(arrays["state"].params, freeze_of(config, name))
                    arrays["reference"] = jax.tree.map(lambda x: x.copy(), at_start)
            state, reference, in_flight = (arrays.get(part) for part in ("state", "reference", "in_flight"))
            del arrays
            if unseen:
                # Never from parameters that this stage has trained, even if summary.json was lost on the way.
                evaluate(before, (state if first >= done else start_state(job, params, name)).params)
            if first < done and is_due(done, settings.eval_every, last) and not evaluated(f"{name}-{done}"):
                evaluate(f"{name}-{done}", state.params)  # Killed between the checkpoint and this.
            if first < done and best.is_due(name, done, settings.eval_every, last):
                validate(done, state.params)
            params = None  # The state has its own: two copies of a large model do not fit.

            if max(first, done) < last:
                forget(order[index:])  # A stage was shorter when it was evaluated, or a checkpoint has been deleted.

            # ---- what judging took, taken down while nothing is asked; no batch is asked of a run that is to stop
            judging: dict[str, float] = {}

            def settle(step: int, failed: int, calls: int) -> bool:
                judging.update(spending.step())  # noqa: B023
                window = deque([*failures, (failed, calls)], failures.maxlen)
                spent = spending.spent or failure_budget_spent(window, config)
                return step < last and not (spent or stop.requested)  # noqa: B023

            # ---- data order of this stage; each process reads the rows that its devices hold
            stage = STAGES[name](job, reference, settle)
            iterator = make_dataset(
                splits.train,
                batch_size=settings.batch_size,
                seed=(config.seed * len(STAGES) + index) % 2**31,
                threads=config.data.read_threads,
                rows=stage.rows.held,
            )
            if first < done:
                try:
                    iterator.set_state(saved["iterator"])
                except (AttributeError, KeyError, TypeError, ValueError) as error:
                    raise not_ours(checkpointer.directory / str(done), "iterator") from error

            def save(step: int) -> None:
                with clock.phase("save"):
                    writer.flush()  # A resumed run does not log these steps again.
                    arrays = {"state": state} | ({"reference": reference} if reference is not None else {})  # noqa: B023
                    if stage.depth:  # noqa: B023
                        arrays["in_flight"] = stage.in_flight  # noqa: B023
                    extra = {
                        "stage": name,  # noqa: B023
                        # A batch in flight is read once more, and meets the captions that are saved with it.
                        "iterator": before if stage.depth else iterator.get_state(),  # noqa: B023
                        "clock": clock.state(),
                        "failures": list(failures),
                        "best": best.state(),
                        "config": configuration.to_text(config),
                        "versions": versions(),
                    }
                    checkpointer.save(step, arrays, extra)

            # ------------------------------------------------------------------------------------- the loop
            clock.step()
            with Progress(last, name, first_step=first, enabled=leads) as progress:
                begin = max(first, done) + 1
                if stage.depth and begin <= last:
                    with readable(config.data):
                        batch = next(iterator)
                    with jax.transfer_guard("disallow"):
                        stage.begin(state, batch, begin, in_flight)
                in_flight = None  # The stage has it, and lets go of it after its update.
                for step in range(begin, last + 1):
                    before = iterator.get_state()
                    with readable(config.data):
                        batch = next(iterator)  # With a depth of 1, the next step's.
                    with jax.transfer_guard("disallow"):
                        state, values, judged = stage.advance(state, batch, step)
                    values |= clock.step()
                    tokens = values.pop("tokens")
                    values["tokens_per_second"] = tokens / sum(values[f"time/{phase}"] for phase in stage.phases)
                    nonfinite = values.pop("nonfinite")
                    calls = values.pop("failed_calls", 0), values.pop("calls", 0)
                    if judged:
                        values |= judging
                    if step % config.log.every == 0 or step == last:
                        writer.write(step, name, values)
                    progress.update(step, values)
                    if judged and config.log.samples_every and step % config.log.samples_every == 0:
                        records = stage.rows.gather_list(judged.records(reward.names, gate_of(config)))
                        if leads:
                            dump_samples(workdir, step, records)

                    if nonfinite >= config.optim.max_nonfinite:
                        save(step)
                        checkpointer.wait()
                        spending.update()
                        raise UserError(
                            f"stopped at step {step}: {int(nonfinite)} updates in a row had a non-finite gradient "
                            f"(optim.max_nonfinite); lower stages.{name}.learning_rate and go on in a new workdir"
                        )
                    if judged:
                        failures.append(calls)
                        if failure_budget_spent(failures, config):
                            failed, asked = map(sum, zip(*failures, strict=True))
                            failures.clear()  # With its judge mended, the run goes on with a new window.
                            save(step)
                            checkpointer.wait()
                            why = spending.reasons()
                            raise UserError(
                                f"stopped at step {step}: {failed} of the last {asked} judge calls failed, more than "
                                f"judge.max_failure_rate = {config.judge.max_failure_rate:g} allows over "
                                f"{failure_window(config)} steps{why}; the run is saved, mend the judge or the "
                                f"reward (reasons are in {workdir / 'samples'}) and run the same command again"
                            )
                        if spending.spent and step < last:
                            save(step)
                            checkpointer.wait()
                            raise UserError(spending.stop_text(step))
                    # All processes stop after the same step, whichever of them was asked to.
                    asked_by = distributed.largest(stop.number)
                    validated = best.is_due(name, step, settings.eval_every, last)
                    if asked_by or validated or step == last or is_due(step, config.checkpoint.every, last):
                        save(step)
                    if is_due(step, settings.eval_every, last):
                        if stage.depth:
                            stage.finish_judging()
                        evaluate(f"{name}-{step}", state.params)
                    if validated:
                        validate(step, state.params)
                    if asked_by:
                        checkpointer.wait()
                        spending.update()  # What was asked ahead is paid for.
                        asked = signal.Signals(asked_by).name
                        progress.note(f"{asked}: saved after step {step}; the same command goes on from here")
                        stopped = True
                        break
            if stopped:
                return summary
            if stage.writes_captions and not evaluated(name):
                evaluate(name, state.params)
            params, first = state.params, last

        # =============================================================================================== result
        checkpointer.wait()
        merge = functools.partial(lora.merge, scale=policy.scale) if config.lora.rank else lambda params: params
        fields["prompt"] = config.data.prompt or shown[0]["prompt"]  # `caption` asks it of other pictures too.
        like = jax.eval_shape(lambda p: p, params)
        for path, step in ((model, first), (best_model, best.step)):
            if step is None or distributed.from_first(leads and is_whole(path, jax.eval_shape(merge, like))):
                continue
            if step != first:
                params = None  # Two copies of a large model do not fit.
                params = restore_params(checkpointer, step, job, like)
            distributed.write_whole(
                merge(params),
                lambda whole: models.save(path, fields, whole, processor, source=config.model.path),  # noqa: B023
            )
        if leads:
            page = write_report([workdir], workdir / "report.html")
            print(result_text(summary, order))
            print(f"model:  {model}\nreport: {page}", flush=True)
            if best.step is not None:
                score = best.scores[best.step]
                print(f"best:   {best_model} (step {best.step}, validation {best.metric} {score:.4g})", flush=True)
        return summary


# ------------------------------------------------------------------------------------------------- restoring


def placed_like(job: Job, state: Any, stage: str, anchored: bool) -> dict[str, Any]:
    """The abstract arrays of a stage's checkpoint, with the shardings that they are to be restored to."""

    def place(leaf, where):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    config = job.config
    state = jax.tree.map(place, state, state_shardings(job.mesh, state))
    arrays = {"state": state}
    if anchored:
        arrays["reference"] = trained(state.params, freeze_of(config, stage))
    if stage == "rl" and config.pipeline.depth:
        size = config.stages.rl.batch_size
        arrays["in_flight"] = abstract_kept(
            job.mesh, job.policy, job.processor, state.params, size, sampling_of(config)
        )
    return arrays


def restore_params(checkpointer: Checkpointer, step: int, job: Job, params: Any) -> Any:
    """The parameters alone of a checkpoint, whichever stage it ends."""
    like = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        params,
        sharding.tree_shardings(job.mesh, params),
    )
    arrays, _ = checkpointer.restore(step, {"state": TrainState(None, like, None, None)}, partial=True)
    return arrays["state"].params


# ------------------------------------------------------------------------------------------------- small parts


def failure_window(config: ConfigDict) -> int:
    """Steps over which failed judge calls are counted: no more than there are."""
    return min(config.judge.failure_window, max(config.stages.rl.steps, 1))


def failure_budget_spent(failures: Sequence[tuple[int, int]], config: ConfigDict) -> bool:
    """Whether more calls failed than a whole window of steps may lose; true early when everything fails."""
    failed = sum(count for count, _ in failures)
    calls_of_window = failures[-1][1] * failure_window(config)
    return failed > config.judge.max_failure_rate * calls_of_window


def is_whole(model: Path, params: Any) -> bool:
    """Whether `model` is a saved model with arrays like `params`; what they hold is not read."""
    try:
        models.read_fields(model)
        loading.read_tokenizer(model)
        stored = {path: array.shape for path, array in model_arrays.open_all(model / loading.PARAMS).items()}
    except UserError:
        return False
    return stored == loading.flat_shapes(params)


def is_due(step: int, every: int, last: int) -> bool:
    """Whether `step` is one of every `every` (0 = none), the last step left out: what ends a stage is always done."""
    return every > 0 and step % every == 0 and step < last


def gate_of(config: ConfigDict) -> tuple[float, float]:
    return config.rewards.gate_low, config.rewards.gate_high


def result_text(summary: dict[str, Any], order: Sequence[str]) -> str:
    """The before/after table of sampled and of greedy captions."""
    parts = []
    for kind, title in zip(KINDS, ("sampled captions", "greedy captions"), strict=True):
        evaluations = summary.get(kind)
        if evaluations:
            images = next(reversed(evaluations.values())).get("images", "?")
            table = before_after_table({"evaluations": evaluations}, order)
            parts.append(f"\n{images} held-out images, {title}\n{table}")
    return "\n".join(parts)


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(
        prog="python -m balcap_jax.train",
        description="Trains a captioner by the stages of a recipe; the same command resumes a stopped run.",
    )
    configuration.add_arguments(parser)
    parser.add_argument("--workdir", type=place, metavar="DIR", help="where the run is written, and resumed from")
    parser.add_argument(
        "--print_sharding", action="store_true", help="print where each parameter lies on the devices, and stop"
    )
    parser.add_argument(
        "--estimate_judge", action="store_true", help="print about how many judge calls, tokens and money, and stop"
    )
    arguments = sys.argv[1:] if argv is None else list(argv)
    config, args = configuration.parse_command_line(arguments, parser)
    rewards.check_settings(config)
    if args.estimate_judge:
        asked = rewards.resolve(config.rewards.name).asks
        print(cost.estimate(config, configuration.stage_order(config), asked), flush=True)
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
