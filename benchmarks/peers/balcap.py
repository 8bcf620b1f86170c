"""balcap_jax as a side of uneven.py, at whatever commit PYTHONPATH names; see answers.py for the contract.

job {"decoder": sizes, "params": .npz or "" for random ones, "group", "response", "parts", "rate", "clip", "max_norm"}
-> {"versions"}, then requests:

  {"work": "update", "batch": .npz, "mode", "prepare"} -> {"seconds", "cpu_seconds", "loss", "grad_norm", "positions"}
  {"work": "rollout", "batch": .npz, "mode", "prepare"} -> {"seconds", "cpu_seconds", "positions", "tokens": [B][G]}
  {"work": "greedy", "batch": .npz, "length"} -> {"greedy": [B][length]}
  {"work": "bandwidth"} -> {"bytes_per_second"}: how fast a large array is read

`mode` is "best", what the version does, "padded": all rows to the end, at any version, or "refill". With `prepare` what
the batch needs is compiled and run once if it was not yet: {"compile_seconds", "compile_cpu_seconds", "temporaries_gb",
"program"}. `positions` are those of responses that were computed, of the rollout rows x steps. `tokens` are sums over
each response. One process at a time may hold an accelerator, so one process does all of this.
"""

import concurrent.futures
import dataclasses
import importlib.metadata
import inspect
import platform
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from answers import Answers, peak_gb, requests

from balcap_jax import rollout as sampling
from balcap_jax import train_step
from balcap_jax.models.decoder import DecoderConfig
from balcap_jax.models.policy import Prompt

try:
    from balcap_jax.models.policy import TextPolicy
except ImportError:  # where versions before had it
    from balcap_jax.models.text import TextPolicy
try:
    from balcap_jax import staging
except ImportError:  # Versions before it sample all rows to the end.
    staging = None
try:
    from balcap_jax.parallel import sharding
except ImportError:
    sharding = None
try:
    from balcap_jax.models import packing
except ImportError:  # Versions before it pad the update.
    packing = None

END = 0  # No response holds this token: it pads, and ends a response of a version without limits.
QUARTERS = 4  # padded lengths are R / 4, R / 2, ... R


class ForcedEnd:
    """A policy whose branches [B, G] end with their token number `limits` [B, G], for versions without such limits."""

    def __init__(self, policy: Any, limits: jax.Array) -> None:
        self.policy, self.limits = policy, limits

    def __getattr__(self, name: str) -> Any:
        return getattr(self.policy, name)

    def decode(self, params, prefix, branch, tokens, t):
        branch, logits = self.policy.decode(params, prefix, branch, tokens, t)  # of index t + 1
        only_end = jnp.where(jnp.arange(logits.shape[-1]) == END, 0.0, -jnp.inf)
        return branch, jnp.where((t + 2 >= self.limits)[..., None], only_end, logits)


def decoder_config(fields: dict[str, Any]) -> DecoderConfig:
    """The decoder of `fields`; those that an older version lacks must be off, since it computes without them."""
    known = {field.name for field in dataclasses.fields(DecoderConfig)}
    lacking = {name: value for name, value in fields.items() if name not in known and value}
    if lacking:
        raise ValueError(f"this version's decoder has no {lacking}")
    return DecoderConfig(**{name: value for name, value in fields.items() if name in known})


def make_policy(config: DecoderConfig, end: int, forbidden: tuple[int, ...] = (END,)) -> TextPolicy:
    names = {field.name for field in dataclasses.fields(TextPolicy)}
    ends = {"end_tokens": (end,)} if "end_tokens" in names else {"eos_token": end}
    return TextPolicy(config, pad_token=END, forbidden=forbidden, **ends)


def timed(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    start = time.perf_counter(), time.process_time()
    result = jax.block_until_ready(work())
    return result, {"seconds": time.perf_counter() - start[0], "cpu_seconds": time.process_time() - start[1]}


class Side:
    """The programs of one decoder, compiled when a batch first needs them."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.job = job
        self.config = decoder_config(job["decoder"])
        self.programs: dict[tuple, dict[str, Any]] = {}
        self.state = None
        # A version with limits needs no end token.
        self.has_limits = "limits" in inspect.signature(sampling.sample).parameters
        self.policy = make_policy(self.config, -1 if self.has_limits else END)
        if job["params"]:
            flat = {name: jnp.asarray(value) for name, value in np.load(job["params"]).items()}
            self.params = train_step.join(flat, {})
        else:
            self.params = jax.jit(self.policy.init)(jax.random.key(0))
        dtype = jnp.dtype(self.config.dtype)
        self.sampled = self.params if dtype == jnp.float32 else jax.tree.map(lambda x: x.astype(dtype), self.params)

    def read(self, path: str) -> tuple[dict[str, np.ndarray], Prompt]:
        """{name: [B, G, ...]} and the prompts, each once."""
        group = self.job["group"]
        batch = {name: array.reshape(-1, group, *array.shape[1:]) for name, array in np.load(path).items()}
        tokens = batch.pop("prompt_ids")[:, 0].astype(np.int32)
        positions = np.tile(np.arange(tokens.shape[1], dtype=np.int32), (len(tokens), 1))
        return batch, Prompt(tokens, np.ones(tokens.shape, bool), positions, self.policy.no_images(len(tokens)))

    def compiled(self, key: tuple, lower: Callable[[], Any]) -> dict[str, Any]:
        """The program `key` with what it cost; new ones have "fresh" set."""
        if key not in self.programs:
            start = time.perf_counter(), time.process_time()
            program = lower().compile()
            seconds, cpu_seconds = time.perf_counter() - start[0], time.process_time() - start[1]
            memory = program.memory_analysis()
            self.programs[key] = {
                "call": program,
                "fresh": True,
                "compile_seconds": seconds,
                "compile_cpu_seconds": cpu_seconds,
                "temporaries_gb": memory.temp_size_in_bytes / 1e9 if memory else None,
                "program": " ".join(map(str, key)),
            }
        return self.programs[key]

    # ---- update

    def update(self, batch: str, mode: str, prepare: bool) -> dict[str, Any]:
        job, (arrays, prompt) = self.job, self.read(batch)
        lengths = arrays["lengths"].astype(np.int32)
        length, token_bucket, positions = self.update_shape(lengths, mode)
        name = ("packed", token_bucket) if token_bucket else ("padded", length)
        options = {"token_bucket": token_bucket} if token_bucket else {}
        mask = np.arange(length) < lengths[..., None]

        def padded(name: str, dtype: Any) -> np.ndarray:
            wide = np.zeros(mask.shape, dtype)
            wide[..., : arrays[name].shape[2]] = arrays[name]
            return wide

        fields = {
            "prompt": prompt,
            "image_embeds": np.zeros((len(lengths), 1, self.config.width), self.config.dtype),
            "responses": padded("completion_ids", np.int32),
            "mask": mask,
            "old_log_probs": padded("old_per_token_logps", np.float32),
            "rewards": arrays["rewards"].astype(np.float32)[..., None],
            "valid": np.ones((*lengths.shape, 1), bool),
            "words": np.full(lengths.shape, 20),
            "reference_words": np.full(len(lengths), 20),
            "truncated": np.zeros(lengths.shape, bool),
        }
        inputs = jax.device_put(train_step.RLBatch(**fields))
        if self.state is None:
            self.optimizer = optax.chain(
                optax.clip_by_global_norm(job["max_norm"]), optax.adamw(job["rate"], weight_decay=0.0)
            )
            self.state = train_step.init_state(jax.tree.map(jnp.copy, self.params), self.optimizer, "")
        # No token is forbidden here: peers normalise over all of them.
        policy = make_policy(dataclasses.replace(self.config, remat="full"), -1, forbidden=())
        objective = train_step.RLObjective(
            ("one",),
            (1.0,),
            (False,),
            job["response"],
            clip_low=job["clip"],
            clip_high=job["clip"],
            normaliser="sequence",
        )

        def lower() -> Any:
            return train_step.make_rl_step(policy, self.optimizer, objective, **options).lower(self.state, inputs)

        program = self.compiled(("update", *name), lower)
        if prepare and not program["fresh"]:
            return self.described(program)
        (self.state, metrics), seconds = timed(lambda: program["call"](self.state, inputs))
        if prepare:
            return self.described(program)
        values = {name: float(metrics[name].total) for name in ("loss", "grad_norm")}
        return {**seconds, **values, "positions": int(positions)}

    def update_shape(self, lengths: np.ndarray, mode: str) -> tuple[int, int, int]:
        """(padded length, token bucket or 0, positions of responses) of the program that a stage takes for a batch."""
        longest = self.job["response"]
        length = int(-(-lengths.max() * QUARTERS // longest) * longest // QUARTERS)
        if mode == "best" and packing is not None:
            # One device and one micro-batch of any program; a sixteenth of R more in each.
            buckets = {longest * parts // 16: 1 for parts in range(1, 16)}
            if choice := packing.choose(lengths, buckets, 1, length):
                return longest, choice.bucket, packing.capacity(choice.bucket, lengths.size) * packing.UNIT
        return length, 0, lengths.size * length

    # ---- rollout

    def rollout(self, batch: str, mode: str, prepare: bool) -> dict[str, Any]:
        arrays, prompt = self.read(batch)
        lengths = arrays["lengths"].astype(np.int32)
        settings, parts = sampling.Sampling(self.job["group"], self.job["response"]), self.job["parts"]

        def sample(params, prompt, seed, limits):
            keys = jax.random.split(jax.random.key(seed), limits.shape)
            if mode == "refill":
                refilled = dataclasses.replace(settings, parts=parts, refill=True)
                return sampling.refilled(self.policy, params, prompt, keys, refilled, limits=limits)
            if mode == "best" and self.has_limits and parts > 1:

                def part(prompt, keys, limits):
                    return sampling.sample(self.policy, params, prompt, keys, settings, limits=limits)

                return sharding.in_parts(part, (prompt, keys, limits), parts)
            if self.has_limits:
                # The first stage is the whole batch.
                stages = staging.plan(*limits.shape, settings.max_tokens)[:1] if mode == "padded" else None
                return sampling.sample(self.policy, params, prompt, keys, settings, limits=limits, stages=stages)
            return sampling.sample(ForcedEnd(self.policy, limits), params, prompt, keys, settings)

        # The seed depends on the batch alone, so that versions can be compared token by token.
        inputs = jax.device_put((prompt, np.uint32(lengths.sum()), lengths))
        program = self.compiled(("rollout", mode), lambda: jax.jit(sample).lower(self.sampled, *inputs))
        if prepare and not program["fresh"]:
            return self.described(program)
        out, seconds = timed(lambda: program["call"](self.sampled, *inputs))
        if prepare:
            return self.described(program)
        if not (np.asarray(out.lengths) == lengths).all():
            raise SystemExit("the rollout did not keep to the lengths that were given")
        slots = np.sum(out.slots) if self.has_limits else lengths.size * lengths.max()
        # The last token is the forced end in a version without limits: it is left out of the comparison.
        body = np.arange(out.tokens.shape[2]) < lengths[..., None] - 1
        sums = np.where(body, np.asarray(out.tokens), 0).sum(-1)
        return {**seconds, "positions": int(slots), "tokens": sums.tolist()}

    def described(self, program: dict[str, Any]) -> dict[str, Any]:
        program["fresh"] = False
        return {name: program[name] for name in ("compile_seconds", "compile_cpu_seconds", "temporaries_gb", "program")}

    # ---- what is compared, and the floor

    def greedy(self, batch: str, length: int) -> dict[str, Any]:
        _, prompt = self.read(batch)
        keys = jax.random.split(jax.random.key(0), (len(prompt.tokens), 1))
        policy = make_policy(self.config, -1, forbidden=())
        settings = sampling.Sampling(1, length, greedy=True)
        tokens = jax.jit(lambda params: sampling.sample(policy, params, prompt, keys, settings).tokens)(self.sampled)
        return {"greedy": np.asarray(tokens)[:, 0].tolist()}

    @staticmethod
    def bandwidth() -> dict[str, float]:
        """The best of several ways to read an array that no cache holds."""
        size = 2**27  # floats: 512 MiB
        array = jnp.ones((2**13, size // 2**13), jnp.float32)
        vector = jnp.ones(array.shape[1], jnp.float32)
        ways = {name: jax.jit(work) for name, work in (("sum", lambda x, v: x.sum()), ("dot", lambda x, v: x @ v))}
        rates = []
        for work in ways.values():
            jax.block_until_ready(work(array, vector))
            rates += [array.nbytes / timed(lambda work=work: work(array, vector))[1]["seconds"] for _ in range(5)]
        if jax.default_backend() == "cpu":
            halves = np.split(np.asarray(array).reshape(-1), 2)
            with concurrent.futures.ThreadPoolExecutor(2) as pool:
                for _ in range(5):
                    start = time.perf_counter()
                    list(pool.map(lambda half: np.dot(half, half), halves))
                    rates.append(array.nbytes / (time.perf_counter() - start))
        return {"bytes_per_second": max(rates)}


def main() -> None:
    answer, lines = Answers(), requests()
    side = Side(next(lines))
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("jax", "jaxlib", "flax", "optax")]
    device = jax.devices()[0].device_kind
    answer(versions=", ".join([f"Python {platform.python_version()}", *versions, device]), device_kind=device)
    for request in lines:
        work = {"update": side.update, "rollout": side.rollout, "greedy": side.greedy, "bandwidth": side.bandwidth}
        result = work[request.pop("work")](**request)
        answer(**result, peak_gb=peak_gb())


if __name__ == "__main__":
    # Compile times are those of a first run.
    jax.config.update("jax_enable_compilation_cache", False)
    main()
