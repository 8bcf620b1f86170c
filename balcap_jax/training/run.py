"""A run: its directory, what it holds open, where it stands, and why it stops.

`train` asks it at each step what is due. What a checkpoint holds beside arrays is a `Position`.
"""

import contextlib
import dataclasses
import functools
import itertools
import os
import signal
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import pydantic
from ml_collections import ConfigDict

from balcap_jax import judges, models, rewards
from balcap_jax.cli import json_text, storage
from balcap_jax.cli.bucket import shown
from balcap_jax.cli.errors import UserError
from balcap_jax.cli.files import resolved, write_text
from balcap_jax.cli.process import PreemptionFlag
from balcap_jax.config import recipes as configuration
from balcap_jax.data import Data
from balcap_jax.data.input import make_dataset
from balcap_jax.judges import budget
from balcap_jax.models import lora
from balcap_jax.models.formats import loading, peft, saving
from balcap_jax.models.policy import Params
from balcap_jax.parallel import distributed, sharding
from balcap_jax.rewards import miniature
from balcap_jax.train_step import TrainState
from balcap_jax.training import evaluation
from balcap_jax.training.checkpoint import Checkpointer
from balcap_jax.training.evaluation import Best, HeldOut
from balcap_jax.training.job import Job, Judged, Stage
from balcap_jax.training.logging import MetricsWriter
from balcap_jax.training.machine import device_text, use_compilation_cache, versions
from balcap_jax.training.programs import LORA_STAGES, check_mesh
from balcap_jax.training.progress import PhaseClock, ProfileWindow, Progress
from balcap_jax.training.weights_and_biases import import_wandb
from balcap_jax.training.workdir import claim, dump_samples, model_alone, read_left_out, read_summary, readable

# Values of a step that are for the run itself and not for the log.
_UNLOGGED = ("tokens", "nonfinite", "failed_calls", "calls")
_SEEDS_OF_A_RUN = 4  # stages that there are; each shuffles the data by a seed of its own
# The stage on faultless references. What it ends with is evaluated where that costs nothing: what the miniature allows.
CEILING = "align"


class Position(pydantic.BaseModel):
    """Where a run stands after `step`: the JSON part of a checkpoint, of which the step is the name.

    stage: the stage of the step. iterator: the state of its data iterator. clock: seconds by phase so far.
    failures: (failed, calls) of the judge in the newest steps. best: scores of validation images by step.
    config and versions are for readers of a checkpoint; no code reads them.
    """

    model_config = pydantic.ConfigDict(strict=True)
    step: int = pydantic.Field(exclude=True)
    stage: str
    iterator: str | bytes | dict[str, Any]
    clock: dict[str, int | float]
    failures: list[Annotated[list[int], pydantic.Field(min_length=2, max_length=2)]]
    best: dict[Annotated[str, pydantic.StringConstraints(pattern=r"^\d+$")], int | float | None] = {}
    config: Any = None
    versions: Any = None


def read_position(saved: Mapping[str, Any], path: Path) -> Position:
    """The position that `saved`, the JSON part of the checkpoint `path`, holds.

    Raises:
      UserError: a field is missing, or is not as `train` writes it.
    """
    try:
        return Position(**{**saved, "step": int(path.name)})
    except pydantic.ValidationError as error:
        raise _not_ours(path, error.errors()[0]["loc"][0]) from error


def _not_ours(path: Path, name: int | str) -> UserError:
    """What to say of the checkpoint `path`, whose JSON part has no usable `name`."""
    return UserError(
        f"unreadable checkpoint {path}: {name} is missing or odd in its part extra; delete this directory to go on "
        "from the checkpoint before it, or choose another workdir"
    )


@dataclasses.dataclass(frozen=True)
class Stop:
    """Why a run stops after a step that is not its last. `reason` ends in a UserError, or is printed after a signal."""

    reason: str
    is_error: bool = True


class Batches:
    """The batches of a stage, and what a checkpoint must hold to go on with them.

    `ahead`: the newest batch is that of the next step. A resumed run reads it once more, and it meets the captions that
    are saved with it.
    """

    def __init__(self, iterator: Any, data: ConfigDict, ahead: bool):
        self._iterator, self._data, self._ahead = iterator, data, ahead
        self._before = iterator.get_state()

    def __next__(self) -> dict[str, Any]:
        self._before = self._iterator.get_state()
        with readable(self._data):
            return next(self._iterator)

    def state(self) -> Any:
        return self._before if self._ahead else self._iterator.get_state()


class Run:
    """One run in its directory, to be used in a `with` block. Entering it claims the directory; `open` takes it.

    clock, mesh, judge are what the job of its stages is made of; summary is what `train` returns.

    Of several processes each makes one with the same arguments. Only process 0 writes to the directory, but for
    checkpoints. Every method raises UserError when the disk refuses.

    Raises:
      UserError: the processes differ, or the config does not fit the devices; on entering it, another process or
        another config has the directory.
    """

    def __init__(self, config: ConfigDict, workdir: str | os.PathLike, command: str = ""):
        self.config, self.workdir, self._command = config, resolved(workdir).absolute(), command
        self.model, self.best_model = self.workdir / "model", self.workdir / "best"
        self.clock = PhaseClock()
        self.order = configuration.stage_order(config)
        steps = [config.stages[name].steps for name in self.order]
        # The stage `name` takes the steps first[name] + 1 ... last[name].
        self.last = dict(zip(self.order, itertools.accumulate(steps), strict=True))
        self.first = dict(zip(self.order, (0, *self.last.values()), strict=False))
        self.total = sum(steps)
        # What is made here may lie beside the data, but not in somebody's folder of photographs.
        is_ours = config.data.name == "scenes" and not storage.url_of(resolved(config.data.data_dir))
        use_compilation_cache(*([config.data.data_dir] if is_ours else []))
        self.leads = distributed.is_first()
        distributed.check_same("versions of packages", versions())
        distributed.check_same("config", configuration.to_text(config))
        self.mesh = sharding.make_mesh(config.mesh)
        for name in self.order:
            check_mesh(config, self.mesh, name)
        if config.log.wandb and self.leads:
            import_wandb()
        self.profile = ProfileWindow(config.log.profile, self.workdir / "profile", self.clock, enabled=self.leads)
        self.summary: dict[str, Any] = {}
        self.failures: deque[tuple[int, int]] = deque(maxlen=failure_window(config))
        self._position: Position | None = None
        self._judging: dict[str, float] = {}

    def __enter__(self) -> "Run":
        config = self.config
        with contextlib.ExitStack() as stack:
            stack.enter_context(claim(self.workdir, config))
            self._signal = stack.enter_context(PreemptionFlag())
            self.judge = judges.build(config.judge, config.seed, rewards.resolve(config.rewards.name).asks)
            stack.callback(self.judge.close)
            ledger = self.workdir / budget.LEDGER
            self._spending = budget.Spending(self.judge, config.judge, ledger, failure_window(config))
            self._open = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._open.__exit__(*error)

    def open(self, data: Data, held_out: HeldOut) -> None:
        """Takes the directory, once nothing can be wrong with the config, and goes back to where the run was.

        Raises:
          UserError: the run cannot go on from what is in the directory.
        """
        config, workdir = self.config, self.workdir
        if self.leads:
            write_text(workdir / "config.json", configuration.to_text(config))
        self._data = data
        self._held_out, self._is_exact = held_out, miniature.is_exact(self.judge.exact(), data.fields)
        log, checkpoint, enter = config.log, config.checkpoint, self._open.enter_context
        files = {"keep": checkpoint.keep, "beside": [workdir / "metrics.jsonl"]}
        self._checkpointer = enter(Checkpointer(workdir / "checkpoints", **files, asynchronous=checkpoint.asynchronous))
        outputs = {"tensorboard": log.tensorboard, "wandb": log.wandb or None, "config": config.to_dict()}
        self._writer = enter(MetricsWriter(workdir, **outputs, enabled=self.leads))
        for name, step in self.last.items():
            self._checkpointer.keep_also(name, step)
        self._open.callback(self.profile.close)
        self.best = Best(checkpoint.best_metric, held_out.score)
        done = self._checkpointer.latest_step() or 0
        self._left_out = read_left_out(workdir) if done else []
        self._write_left_out()
        if self.total and not done and distributed.from_first(self.leads and storage.exists(self.model)):
            raise model_alone(workdir, self.model)
        self.summary = distributed.from_first(read_summary(workdir) if done and self.leads else {})
        if done:
            position = read_position(self._checkpointer.extra(done), self._checkpointer.directory / str(done))
            self.clock.restore(position.clock)
            self.failures.extend(map(tuple, position.failures))
            self._checkpointer.keep_also("best", self.best.restore(position.best, self._checkpointer.steps()))
            self._position = position
            if self.leads:
                print(f"going on after step {done} of {self.total} ({position.stage})", flush=True)
        self._writer.truncate(done)
        self.summary |= {"command": self._command, "versions": versions(), "device": device_text()}

    # ---- where the run stands

    @property
    def done(self) -> int:
        """The step that the run goes on after; 0 at its start."""
        return self._position.step if self._position else 0

    def is_past(self, name: str) -> bool:
        """Whether nothing is left to do in a stage: a later one is under way."""
        return self.done >= self.last[name] and name != self.order[-1]

    def steps_left(self, stage: Stage) -> range:
        return range(max(self.first[stage.name], self.done) + 1, self.last[stage.name] + 1)

    def resume(self, stage: Stage, params: Params) -> TrainState:
        """The state that `stage` begins with: made from `params`, or that of its own newest checkpoint.

        Evaluations of earlier steps that are missing are made now. `params` are those that the stage before left, or
        their shapes where a checkpoint has the numbers.
        """
        name, first, last, done = stage.name, self.first[stage.name], self.last[stage.name], self.done
        index, every = self.order.index(name), self.config.stages[name].eval_every
        before = self.order[index - 1] if index else "base"
        lacks_before = name == "rl" and not self._is_evaluated(before)
        if 0 < first <= done and (first == done or lacks_before):
            params = self.restore_params(first, params)
        if first < done:
            state = stage.load(self._checkpointer.restore(done, stage.programs.abstract_checkpoint(params))[0])
        else:
            state = stage.load({"state": stage.programs.start(params)})
        if lacks_before:
            # Never from parameters that this stage has trained, even if summary.json was lost on the way.
            self._evaluate(before, (state if first >= done else stage.programs.start(params)).params)
        if first < done and is_due(done, every, last) and not self._is_evaluated(f"{name}-{done}"):
            self._evaluate(f"{name}-{done}", state.params)  # Killed between the checkpoint and this.
        if first < done and self.best.is_due(name, done, every, last):
            self._validate(done, state.params)
        if max(first, done) < last:
            self._forget(self.order[index:])  # A stage was shorter when it was evaluated, or a checkpoint is gone.
        return state

    def batches(self, stage: Stage, source: Sequence[Mapping[str, Any]]) -> Batches:
        """The data order of a stage from where the run stands; each process reads the rows that its devices hold."""
        config = self.config
        iterator = make_dataset(
            source,
            batch_size=config.stages[stage.name].batch_size,
            seed=(config.seed * _SEEDS_OF_A_RUN + self.order.index(stage.name)) % 2**31,
            threads=config.data.read_threads,
            rows=stage.rows.held,
        )
        if self.first[stage.name] < self.done:
            try:
                iterator.set_state(self._position.iterator)
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise _not_ours(self._checkpointer.directory / str(self.done), "iterator") from error
        return Batches(iterator, config.data, ahead=stage.depth > 0)

    def restore_params(self, step: int, like: Params) -> Params:
        """The parameters alone of a checkpoint, whichever stage it ends."""
        like = sharding.abstract(like, sharding.tree_shardings(self.mesh, like))
        arrays, _ = self._checkpointer.restore(step, {"state": TrainState(None, like, None, None)}, partial=True)
        return arrays["state"].params

    # ---- a step

    def progress_of(self, stage: Stage) -> Progress:
        """Shows the progress of a stage in a `with` block, and times its steps from here on."""
        name = stage.name
        self.clock.step()
        self._progress = Progress(self.last[name], name, first_step=self.first[name], enabled=self.leads)
        self.profile.say = self._progress.note
        return self._progress

    def settle(self, step: int, failed: int, calls: int) -> bool:
        """Notes what the judging of a step took, while nothing is asked. -> whether the run asks more."""
        self._judging = self._spending.step()
        window = deque([*self.failures, (failed, calls)], self.failures.maxlen)
        spent = self._spending.spent or failure_budget_spent(window, self.config)
        return step < self.last["rl"] and not (spent or self._signal.requested)

    def log(self, stage: Stage, step: int, values: Mapping[str, float], judged: Judged | None) -> None:
        """Writes what is due of a step to the log, to the progress line and to samples/."""
        config, phases = self.config.log, self.clock.step()
        logged = {name: value for name, value in values.items() if name not in _UNLOGGED} | phases
        logged["tokens_per_second"] = values["tokens"] / sum(phases[f"time/{phase}"] for phase in stage.phases)
        if judged:
            logged |= self._judging
        if step % config.every == 0 or step == self.last[stage.name]:
            self._writer.write(step, stage.name, logged)
        self._progress.update(step, logged)
        if judged and stage.job.is_kept(step):
            gate = self.config.rewards.gate_low, self.config.rewards.gate_high
            records = stage.rows.gather_list(judged.records(stage.job.reward.names, gate))
            if self.leads:
                dump_samples(self.workdir, step, records)
                # Pictures of this process's own prompts, which come first in the records.
                pictures = dict(zip(judged.examples["id"], judged.examples["image"], strict=True))
                self._writer.write_completions(step, stage.name, records, pictures)

    def reason_to_stop(
        self, stage: Stage, step: int, values: Mapping[str, float], judged: Judged | None
    ) -> Stop | None:
        """Why the run must stop after this step, the same in all processes; None where it goes on."""
        config = self.config
        if values["nonfinite"] >= config.optim.max_nonfinite:
            return Stop(
                f"stopped at step {step}: {int(values['nonfinite'])} updates in a row had a non-finite gradient "
                f"(optim.max_nonfinite); lower stages.{stage.name}.learning_rate and go on in a new workdir"
            )
        if judged:
            self.failures.append((values["failed_calls"], values["calls"]))
            if failure_budget_spent(self.failures, config):
                failed, calls = map(sum, zip(*self.failures, strict=True))
                self.failures.clear()  # With its judge fixed, the run goes on with a new window.
                return Stop(
                    f"stopped at step {step}: {failed} of the last {calls} judge calls failed, more than "
                    f"judge.max_failure_rate = {config.judge.max_failure_rate:g} allows over "
                    f"{failure_window(config)} steps{self._spending.reasons()}; the run is saved, mend the judge or "
                    f"the reward (reasons are in {self.workdir / 'samples'}) and run the same command again"
                )
            if self._spending.spent and step < self.last[stage.name]:
                return Stop(self._spending.stop_text(step))
        # All processes stop after the same step, whichever of them was asked to.
        if number := distributed.largest(self._signal.number):
            name = signal.Signals(number).name
            return Stop(f"{name}: saved after step {step}; the same command goes on from here", is_error=False)
        return None

    def stop(self, stop: Stop) -> None:
        """Ends a run whose step is saved. Raises UserError where the reason is an error."""
        self._checkpointer.wait()
        self._spending.update()  # What was asked ahead is paid for.
        if stop.is_error:
            raise UserError(stop.reason)
        self._progress.note(stop.reason)

    def is_save_due(self, stage: Stage, step: int) -> bool:
        name, last = stage.name, self.last[stage.name]
        if self.best.is_due(name, step, self.config.stages[name].eval_every, last):
            return True
        return step == last or is_due(step, self.config.checkpoint.every, last)

    def _write_left_out(self) -> None:
        """Names the pictures that are left out, with those that turned out to be damaged since the last time."""
        named = list(dict.fromkeys([*self._left_out, *self._data.left_out, *self._data.damaged]))
        if self.leads and len(named) > len(self._left_out):
            write_text(self.workdir / "left_out.jsonl", json_text.lines(entry._asdict() for entry in named))
        self._left_out = named

    def save(self, stage: Stage, state: TrainState, batches: Batches, step: int) -> None:
        with self.clock.phase("save"):
            self._write_left_out()
            self._writer.flush()  # A resumed run does not log these steps again.
            position = Position(
                step=step,
                stage=stage.name,
                iterator=batches.state(),
                clock=self.clock.state(),
                failures=list(map(list, self.failures)),
                best=self.best.state(),
                config=configuration.to_text(self.config),
                versions=versions(),
            )
            self._checkpointer.save(step, stage.arrays(state), position.model_dump())

    # ---- evaluations

    def evaluate_due(self, stage: Stage, state: TrainState, step: int) -> None:
        """Evaluations of a step before the last one of its stage, and the score of a saved step."""
        name, last, every = stage.name, self.last[stage.name], self.config.stages[stage.name].eval_every
        if is_due(step, every, last):
            stage.finish_judging()
            self._evaluate(f"{name}-{step}", state.params)
        if self.best.is_due(name, step, every, last):
            self._validate(step, state.params)

    def end(self, stage: Stage, state: TrainState) -> None:
        """Evaluates what a stage ends with."""
        if (stage.writes_captions or self._is_ceiling(stage.name)) and not self._is_evaluated(stage.name):
            self._evaluate(stage.name, state.params)

    def catch_up(self, name: str, params: Params) -> None:
        """Evaluates the ceiling of a past stage where it is missing, if the checkpoint that ends the stage is there.

        `params` are the shapes of what the stage left.
        """
        last = self.last[name]
        if self._is_ceiling(name) and not self._is_evaluated(name) and last in self._checkpointer.steps():
            self._evaluate(name, self.restore_params(last, params))

    def _is_ceiling(self, name: str) -> bool:
        return name == CEILING and self._is_exact and self.config.stages[name].steps > 0

    def _is_evaluated(self, label: str) -> bool:
        return label in self.summary.get("evaluations", {})

    def _evaluate(self, label: str, params: Params) -> None:
        """Writes the judged captions of the held-out images and their means, once per label."""
        with self.clock.phase("evaluate"):
            for kind, means, records in self._held_out.evaluate(params):
                self.summary.setdefault(kind, {})[label] = means
                if self.leads:
                    evaluation.write(self.workdir, kind, label, records, self._held_out.images)
        self._spending.update()
        self._write_summary()

    def _validate(self, step: int, params: Params) -> None:
        """Scores a saved step on the validation images; the best checkpoint so far outlives `checkpoint.keep`."""
        with self.clock.phase("evaluate"):
            self.best.measure(step, params)
        self._checkpointer.keep_also("best", self.best.step)
        self._write_summary()

    def _write_summary(self) -> None:
        self.summary.update(self.best.summary(), seconds=self.clock.totals())
        if self.leads:
            write_text(self.workdir / "summary.json", json_text.dumps(self.summary, indent=2) + "\n")

    def _forget(self, labels: Sequence[str]) -> None:
        """Drops what more steps make outdated, whatever else was deleted by hand: the models and these results."""
        for kind, label in itertools.product(evaluation.KINDS, labels):
            self.summary.get(kind, {}).pop(label, None)
        if self.leads:
            for path in (self.model, self.best_model):
                saving.remove(path)
            for kind, label in itertools.product(evaluation.KINDS, labels):
                evaluation.captions_file(self.workdir, kind, label).unlink(missing_ok=True)
            if (self.workdir / "summary.json").exists():
                self._write_summary()

    # ---- the result

    def write_models(self, job: Job, fields: Mapping[str, Any], params: Params) -> None:
        """Writes the parameters of the run's end, and of its best step, where they are not there as whole models."""
        self._checkpointer.wait()
        config = self.config
        scale, adapter = getattr(job.policy, "scale", 1.0), None
        if config.lora.rank and config.model.path and self.order[0] in LORA_STAGES:
            base = loading.find(config.model.path)
            if not base.adapter:  # Else what was trained from is nowhere on a disk.
                adapter = peft.Origin(shown(base.checkpoint), config.lora.alpha, config.lora.rank)
        save = functools.partial(models.save, processor=job.processor, source=config.model.path, adapter=adapter)
        like = jax.eval_shape(lambda params: params, params)
        shapes = loading.flat_shapes(jax.eval_shape(functools.partial(lora.merge, scale=scale), like))
        for path, step in ((self.model, self.total), (self.best_model, self.best.step)):
            if step is None or distributed.from_first(self.leads and loading.is_whole(path, shapes)):
                continue
            if step != self.total:
                params = None  # Two copies of a large model do not fit.
                params = self.restore_params(step, like)
            merged = lora.merge(params, scale, keep_adapters=adapter is not None)
            distributed.write_whole(merged, lambda params, path=path: save(path, fields, params))


def failure_window(config: ConfigDict) -> int:
    """Steps over which failed judge calls are counted: no more than there are."""
    return min(config.judge.failure_window, max(config.stages.rl.steps, 1))


def failure_budget_spent(failures: Sequence[tuple[int, int]], config: ConfigDict) -> bool:
    """Whether more calls failed than a whole window of steps may lose; true early when everything fails."""
    failed = sum(count for count, _ in failures)
    calls_of_window = failures[-1][1] * failure_window(config)
    return failed > config.judge.max_failure_rate * calls_of_window


def is_due(step: int, every: int, last: int) -> bool:
    """Whether `step` is one of every `every` (0 = none), the last step left out: what ends a stage is always done."""
    return every > 0 and step % every == 0 and step < last
