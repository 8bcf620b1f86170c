"""Trains a captioner by the stages of its config: vision, alignment, supervised, BalCapRL. Read top to bottom.

    python -m balcap_jax.train --config=configs/scenes.py --workdir=runs/scenes [--config.stages.rl.steps=50 ...]

The same command goes on with a run that was stopped or killed, and shows the result of one that is finished.
"""

import contextlib
import fcntl
import functools
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from balcap_jax import config as configuration
from balcap_jax import data, judges, models, report, rewards, sharding
from balcap_jax.checkpoint import Checkpointer, PreemptionFlag
from balcap_jax.data.input import as_columns, examples, make_dataset
from balcap_jax.errors import UserError, exit_on_user_error
from balcap_jax.evals import held_out
from balcap_jax.metrics import MetricsWriter, PhaseClock, Progress
from balcap_jax.stages import Evaluator, Job, RLStage, SFTStage, VisionStage, start_state, state_shardings
from balcap_jax.train_step import TrainState

STAGES = {
    "vision": VisionStage,
    "align": functools.partial(SFTStage, name="align"),
    "sft": SFTStage,
    "rl": RLStage,
}
PACKAGES = ("balcap-jax", "jax", "flax", "optax", "orbax-checkpoint", "transformers", "tensorflow-datasets", "grain")


def train(config: ConfigDict, workdir: str | os.PathLike, command: str = "") -> dict[str, Any]:
    """Runs (or resumes) all stages of `config` in `workdir` and returns the summary.

    Raises:
      UserError: bad input, a full disk, too many failed judge calls, or a gradient that stays non-finite.
    """
    # =================================================================================================== set-up
    workdir = Path(workdir).expanduser().absolute()
    clock = PhaseClock()
    order = configuration.stage_order(config)
    steps = {name: config.stages[name].steps for name in order}
    total = sum(steps.values())
    use_compilation_cache(config)
    mesh = sharding.make_mesh(config.mesh)
    for name in order:
        sharding.check_batch(mesh, config.stages[name].batch_size, f"stages.{name}.batch_size")

    with contextlib.ExitStack() as stack:
        stack.enter_context(claim(workdir, config))
        stop = stack.enter_context(PreemptionFlag())

        # ================================================================================================= data
        # A saved model brings its own sizes, whatever the recipe says of them.
        fields = models.read_fields(config.model.path) if config.model.path else config.model.to_dict()
        with clock.phase("data"):
            splits = data.load(config.data, fields.get("image_size", config.model.image_size))
            with readable(config.data):
                shown = examples(splits.test, config.log.eval_images)

        # =============================================================================================== policy
        if config.model.path:
            policy, initial, processor = models.load(config.model.path)
        else:
            policy, processor = models.build(config.model, splits.tokenizer)
            initial = jax.jit(policy.init)(jax.random.key(config.seed))
        reward = rewards.build(config.rewards, judges.build(config.judge, config.seed))
        job = Job(config, mesh, policy, processor, reward, clock)
        evaluators = {"evaluations": Evaluator(job, greedy=False), "greedy": Evaluator(job, greedy=True)}
        # Evaluations run in batches of the RL stage's size, at most of the number of images.
        shown_batches = held_out.batches(shown, min(len(shown), config.stages[order[-1]].batch_size), as_columns)
        for columns, _ in shown_batches:
            job.prompt(columns)  # A prompt that is too long is found here.
        # Only now: a config that cannot be run does not take the workdir.
        held_out.write_text(workdir / "config.json", configuration.to_text(config))

        # ============================================================================================== restore
        checkpointer = stack.enter_context(
            Checkpointer(
                workdir / "checkpoints", keep=config.checkpoint.keep, asynchronous=config.checkpoint.asynchronous
            )
        )
        writer = stack.enter_context(
            MetricsWriter(
                workdir,
                tensorboard=config.log.tensorboard,
                wandb=config.log.wandb or None,
                config=config.to_dict(),
            )
        )
        model = workdir / "model"
        done = checkpointer.latest_step() or 0
        summary = read_summary(workdir) if done else {}
        failures = deque(maxlen=config.judge.failure_window)
        saved: dict[str, Any] = {}
        if done:
            saved = checkpointer.extra(done)
            clock.restore(saved["clock"])
            failures.extend(map(tuple, saved["failures"]))
            print(f"going on after step {done} of {total} ({saved['stage']})", flush=True)
        writer.truncate(done)
        summary |= {"command": command, "versions": versions(), "device": device_text()}

        def evaluate(label: str, params: Any) -> None:
            """Writes the judged captions of the held-out images and their means, once per label."""
            with clock.phase("evaluate"):
                pictures = {example["id"]: example["image"] for example in shown}
                for kind, evaluator in evaluators.items():
                    means, records = evaluator(params, shown_batches, held_out.EVALUATION_STEP)
                    summary.setdefault(kind, {})[label] = means
                    if kind == "evaluations":
                        held_out.write(workdir, label, records, pictures)
            write_summary()

        def write_summary() -> None:
            summary["seconds"] = clock.totals()
            held_out.write_text(workdir / "summary.json", json.dumps(summary, indent=2) + "\n")

        def forget(label: str) -> None:
            """Drops a result that more steps make outdated."""
            shutil.rmtree(model, ignore_errors=True)
            for kind in evaluators:
                summary.get(kind, {}).pop(label, None)
            write_summary()

        def evaluated(label: str) -> bool:
            return label in summary.get("evaluations", {})

        # =============================================================================================== stages
        params, first, stopped = initial, 0, False
        for index, name in enumerate(order):
            last = first + steps[name]
            settings = config.stages[name]
            previous = order[index - 1] if index else ""
            if done >= last and name != order[-1]:
                first = last  # A later stage is under way; its checkpoint holds the parameters.
                continue

            # ---- where this stage starts: from the stage before it, or from its own newest checkpoint
            before = previous or "base"
            unseen = name == "rl" and not evaluated(before)
            if 0 < first <= done and (first == done or unseen):
                params = restore_params(checkpointer, first, job, params)
            anchored = name == "rl" and config.loss.kl_coef > 0
            like = jax.eval_shape(lambda: start_state(job, params, name))  # noqa: B023
            if first < done:
                like = placed_like(job, like, anchored)
                arrays, _ = checkpointer.restore(done, like)
            else:
                arrays = {"state": start_state(job, params, name)}
                if anchored:
                    arrays["reference"] = jax.tree.map(lambda x: x.copy(), arrays["state"].params)
            state, reference = arrays["state"], arrays.get("reference")
            del arrays
            if unseen:
                # Never from parameters that this stage has trained, even if summary.json was lost on the way.
                evaluate(before, (state if first >= done else start_state(job, params, name)).params)
            if first < done and is_due(done, settings.eval_every, last) and not evaluated(f"{name}-{done}"):
                evaluate(f"{name}-{done}", state.params)  # Killed between the checkpoint and this.

            if max(first, done) < last and evaluated(name):
                forget(name)  # The stage was shorter when it was evaluated, or a checkpoint has been deleted.

            # ---- data order of this stage
            iterator = make_dataset(
                splits.train,
                batch_size=settings.batch_size,
                seed=(config.seed * len(STAGES) + index) % 2**31,
                threads=config.data.read_threads,
            )
            if first < done:
                iterator.set_state(saved["iterator"])

            def save(step: int, tag: str = "") -> None:
                with clock.phase("save"):
                    arrays = {"state": state} | ({"reference": reference} if reference is not None else {})  # noqa: B023
                    extra = {
                        "stage": name,  # noqa: B023
                        "iterator": iterator.get_state(),  # noqa: B023
                        "clock": clock.state(),
                        "failures": list(failures),
                        "config": configuration.to_text(config),
                        "versions": versions(),
                    }
                    checkpointer.save(step, arrays, extra, tag=tag)

            # ------------------------------------------------------------------------------------- the loop
            stage = STAGES[name](job, reference)
            clock.step()
            with Progress(last, name, first_step=first) as progress:
                for step in range(max(first, done) + 1, last + 1):
                    with readable(config.data):
                        batch = next(iterator)
                    with jax.transfer_guard("disallow"):
                        state, values, judged = stage.advance(state, batch, step)
                    values |= clock.step()
                    tokens = values.pop("tokens")
                    values["tokens_per_second"] = tokens / sum(values[f"time/{phase}"] for phase in stage.phases)
                    nonfinite = values.pop("nonfinite")
                    if step % config.log.every == 0 or step == last:
                        writer.write(step, name, values)
                    progress.update(step, values)
                    if judged and config.log.samples_every and step % config.log.samples_every == 0:
                        dump_samples(workdir, step, judged.records(reward.names, gate_of(config)))

                    if nonfinite >= config.optim.max_nonfinite:
                        save(step)
                        checkpointer.wait()
                        raise UserError(
                            f"stopped at step {step}: {int(nonfinite)} updates in a row had a non-finite gradient "
                            f"(optim.max_nonfinite); lower stages.{name}.learning_rate and go on in a new workdir"
                        )
                    if judged:
                        failures.append((int((~judged.scores.valid).sum()), judged.scores.valid.size))
                        if failure_budget_spent(failures, config):
                            failed, asked = map(sum, zip(*failures, strict=True))
                            failures.clear()  # With its judge mended, the run goes on with a new window.
                            save(step)
                            checkpointer.wait()
                            raise UserError(
                                f"stopped at step {step}: {failed} of the last {asked} judge calls failed, more than "
                                f"judge.max_failure_rate = {config.judge.max_failure_rate:g} allows over "
                                f"{config.judge.failure_window} steps; the run is saved, mend the judge (reasons are "
                                f"in {workdir / 'samples'}) and run the same command again"
                            )
                    every = config.checkpoint.every
                    if step == last:
                        save(step, tag=f"{name}-end")
                    elif stop.requested or (every and step % every == 0):
                        save(step)
                    if is_due(step, settings.eval_every, last):
                        evaluate(f"{name}-{step}", state.params)
                    if stop.requested:
                        checkpointer.wait()
                        progress.note(
                            f"{stop.signal_name}: saved after step {step}; the same command goes on from here"
                        )
                        stopped = True
                        break
            if stopped:
                return summary
            if stage.writes_captions and not evaluated(name):
                evaluate(name, state.params)
            params, first = state.params, last

        # =============================================================================================== result
        checkpointer.wait()
        if not model.exists():
            models.save(model, fields, params, processor)
        page = report.write_report([workdir], workdir / "report.html")
        print(result_text(summary))
        print(f"model:  {model}\nreport: {page}", flush=True)
        return summary


# ------------------------------------------------------------------------------------------------- restoring


def placed_like(job: Job, state: Any, anchored: bool) -> dict[str, Any]:
    """The abstract arrays of a stage's checkpoint, with the shardings that they are to be restored to."""

    def place(leaf, where):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    state = jax.tree.map(place, state, state_shardings(job.mesh, state))
    return {"state": state} | ({"reference": state.params} if anchored else {})


def restore_params(checkpointer: Checkpointer, step: int, job: Job, params: Any) -> Any:
    """The parameters alone of a checkpoint, whichever stage it ends."""
    like = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        params,
        sharding.tree_shardings(job.mesh, params),
    )
    arrays, _ = checkpointer.restore(step, {"state": TrainState(None, like, None, None)}, partial=True)
    return arrays["state"].params


# ------------------------------------------------------------------------------------------------- the workdir


@contextlib.contextmanager
def claim(workdir: Path, config: ConfigDict) -> Iterator[None]:
    """Holds the workdir: refuses one of another config's run, or one that another process is training in."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / "samples").mkdir(exist_ok=True)
        lock = os.open(workdir / ".lock", os.O_RDWR | os.O_CREAT)
    except OSError as error:
        raise UserError(f"cannot write to workdir {workdir}: {error.strerror}; choose another --workdir") from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"another process is training in {workdir}; choose another --workdir") from error
        refuse_another_run(workdir / "config.json", config)
        yield
    finally:
        os.close(lock)


def refuse_another_run(path: Path, config: ConfigDict) -> None:
    try:
        changed = configuration.differences(configuration.from_text(path.read_text()), config)
    except FileNotFoundError:
        return
    except (OSError, ValueError, UserError) as error:
        raise UserError(f"{path} cannot be read ({error}); choose another --workdir") from error
    if changed:
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise UserError(
            f"{path.parent} holds a run of another config ({changed[0]}{more}); "
            "choose another --workdir, or give that run's config to go on with it"
        )


def read_summary(workdir: Path) -> dict[str, Any]:
    path = workdir / "summary.json"
    try:
        summary = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not JSON ({error}); delete it to have it made anew") from error
    if not isinstance(summary, dict):
        raise UserError(f"{path} is no JSON object; delete it to have it made anew")
    return summary


def dump_samples(workdir: Path, step: int, records: Sequence[dict[str, Any]]) -> None:
    """Every caption of a training step with its verdicts: samples/step-000120.jsonl."""
    held_out.write_text(
        workdir / "samples" / f"step-{step:06d}.jsonl", "".join(json.dumps(record) + "\n" for record in records)
    )


@contextlib.contextmanager
def readable(settings: ConfigDict) -> Iterator[None]:
    """Reading of the data set `settings.name`: what its C++ reader raises for a damaged file becomes a UserError."""
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        folder = Path(settings.data_dir).expanduser() / settings.name
        reason = " ".join(str(error).split())
        raise UserError(
            f"the data set {folder} cannot be read ({reason}); delete this directory to have it made anew"
        ) from error


# ------------------------------------------------------------------------------------------------- small parts


def failure_budget_spent(failures: Sequence[tuple[int, int]], config: ConfigDict) -> bool:
    """Whether more calls failed than a whole window of steps may lose; true early when everything fails."""
    failed = sum(count for count, _ in failures)
    calls_of_window = failures[-1][1] * config.judge.failure_window
    return failed > config.judge.max_failure_rate * calls_of_window


def is_due(step: int, every: int, last: int) -> bool:
    """Whether `step` is one of every `every` (0 = none), the last step left out: what ends a stage is always done."""
    return every > 0 and step % every == 0 and step < last


def gate_of(config: ConfigDict) -> tuple[float, float]:
    return config.rewards.gate_low, config.rewards.gate_high


def use_compilation_cache(config: ConfigDict) -> None:
    """Keeps compiled programs on disk, so that a resumed or repeated run starts at once."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = Path(config.data.data_dir).expanduser() / "compiled"
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def device_text() -> str:
    kinds = sorted({device.device_kind for device in jax.devices()})
    return f"{jax.device_count()} x {', '.join(kinds)}, {os.cpu_count()} host cores"


def result_text(summary: dict[str, Any]) -> str:
    """The before/after table of sampled and of greedy captions."""
    parts = []
    for kind, title in (("evaluations", "sampled captions"), ("greedy", "greedy captions")):
        if kind in summary:
            images = next(iter(summary[kind].values()))["images"]
            table = report.before_after_table(summary | {"evaluations": summary[kind]})
            parts.append(f"\n{images} held-out images, {title}\n{table}")
    return "\n".join(parts)


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    parser = configuration.CommandParser(
        prog="python -m balcap_jax.train",
        description="Trains a captioner by the stages of a recipe; the same command resumes a stopped run.",
    )
    configuration.add_arguments(parser)
    parser.add_argument("--workdir", metavar="DIR", required=True, help="where the run is written, and resumed from")
    arguments = sys.argv[1:] if argv is None else list(argv)
    config, args = configuration.parse_command_line(arguments, parser)
    train(config, args.workdir, command=shlex.join(["python", "-m", "balcap_jax.train", *arguments]))


if __name__ == "__main__":
    main()
