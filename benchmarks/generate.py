"""Tokens per second of the rollout beside other samplers: same weights, same prompts, turn by turn.

    benchmarks/peers/install.sh PEERS trl tunix
    python benchmarks/generate.py --transformers=PEERS/trl/bin/python --tunix=PEERS/tunix/bin/python    10 minutes
    python benchmarks/generate.py --small --transformers=... --tunix=...      seconds, to see that it runs

The peers, transformers' `generate` on torch and Tunix's sampler (JAX), run in environments and processes of their own
(peer.py). A Llama decoder of SmolLM2-135M's shape with random weights, fp32; B prompts of P tokens, G samples of
exactly R tokens each. Greedy tokens of all sides are compared before a time is reported. Prefill is included,
compilation and loading are not.
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import platform
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from peer import Peer, table, take_turns
from safetensors.numpy import save_file
from step_time import machine

from balcap_jax.cli.arguments import CommandParser
from balcap_jax.cli.errors import UserError
from balcap_jax.cli.process import exit_on_user_error
from balcap_jax.models import decoder
from balcap_jax.models.decoder import DecoderConfig
from balcap_jax.models.policy import Prompt, TextPolicy
from balcap_jax.rollout import Sampling, example_keys, make_rollout


@dataclasses.dataclass(frozen=True)
class Shape:
    decoder: DecoderConfig
    batch: int = 2
    group: int = 8
    prompt: int = 576
    response: int = 128


# Rotary base 1e6: Tunix 0.1.7's Llama rotates with it whatever its configuration says.
FULL = Shape(DecoderConfig(49152, 576, 30, 9, 3, 64, 1536, rope_theta=1e6, tied_embeddings=True))
SMALL = Shape(DecoderConfig(512, 64, 2, 4, 2, 16, 128, rope_theta=1e6, tied_embeddings=True), prompt=32, response=16)
PEERS = {"transformers": "transformers_generate.py", "tunix": "tunix_generate.py"}
SIZES = ("vocab", "width", "layers", "heads", "kv_heads", "head_size", "mlp", "rope_theta", "norm_eps")


def write_for_peer(folder: Path, config: DecoderConfig, params: dict[str, Any]) -> None:
    """The decoder as a Hugging Face directory that transformers reads as a Llama model."""
    layers = jax.tree.map(np.asarray, params["layers"])
    tensors = {"model.embed_tokens.weight": params["embed"], "model.norm.weight": params["norm"]["scale"]}
    for index in range(config.layers):
        at = f"model.layers.{index}"
        for name in ("q", "k", "v"):
            kernel = layers[name]["kernel"][index].reshape(config.width, -1)
            tensors[f"{at}.self_attn.{name}_proj.weight"] = kernel.T
        tensors[f"{at}.self_attn.o_proj.weight"] = layers["o"]["kernel"][index].reshape(-1, config.width).T
        for name in ("gate", "up", "down"):
            tensors[f"{at}.mlp.{name}_proj.weight"] = layers[name]["kernel"][index].T
        tensors[f"{at}.input_layernorm.weight"] = layers["attention_norm"]["scale"][index]
        tensors[f"{at}.post_attention_layernorm.weight"] = layers["mlp_norm"]["scale"][index]
    arrays = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})
    description = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "intermediate_size": config.mlp,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_embeddings,
        "max_position_embeddings": 8192,
        "hidden_act": "silu",
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(description))


class OurRollout:
    """Our side: the greedy tokens [B][R], and `seconds = rollout()` of the compiled rollout."""

    def __init__(self, shape: Shape, params: dict[str, Any], prompts: np.ndarray) -> None:
        # No token ends a response, and none is forbidden: the peers' distribution.
        policy = TextPolicy(shape.decoder, pad_token=0, end_tokens=(-1,))
        prompt = Prompt(
            prompts,
            np.ones(prompts.shape, bool),
            np.tile(np.arange(shape.prompt, dtype=np.int32), (shape.batch, 1)),
            policy.no_images(shape.batch),
        )
        keys = example_keys([f"prompt {i}" for i in range(shape.batch)])
        self.inputs = jax.device_put(({"decoder": params}, prompt, keys, np.uint32(0)))
        greedy = make_rollout(policy, Sampling(1, shape.response, greedy=True))(*self.inputs, jnp.uint32(0)).tokens
        self.greedy = np.asarray(greedy)[:, 0]
        self.response, self.step = shape.response, 0
        start = time.perf_counter()
        rollout = make_rollout(policy, Sampling(shape.group, shape.response))
        self.program = rollout.lower(*self.inputs, jnp.uint32(0)).compile()
        self.compile_seconds = time.perf_counter() - start

    def __call__(self) -> float:
        self.step += 1
        start = time.perf_counter()
        lengths = np.asarray(self.program(*self.inputs, jnp.uint32(self.step)).lengths)
        seconds = time.perf_counter() - start
        if not (lengths == self.response).all():
            raise UserError("our rollout ended early")
        return seconds


def compare_greedy(name: str, ours: np.ndarray, theirs: list[list[int]]) -> None:
    """Ends the benchmark unless both sides chose the same tokens [B, R].

    Raises:
      UserError: they did not.
    """
    theirs = np.array(theirs)
    same = np.mean(theirs == ours) if theirs.shape == ours.shape else 0.0
    print(f"greedy tokens that agree with {name}'s: {100 * same:.1f} %", flush=True)
    if same < 1:
        raise UserError(f"greedy tokens differ from {name}'s, so this is not one computation; no times are reported")


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(
        prog="python benchmarks/generate.py", description="Rollout beside other samplers; see the head of the file."
    )
    for name in PEERS:
        parser.add_argument(f"--{name}", default="", metavar="PATH", help=f"Python of the peer {name}; empty = without")
    parser.add_argument("--small", action="store_true", help="toy sizes: to see that it runs, not to quote")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="timed runs of each side; the median counts")
    parser.add_argument("--wait", action="store_true", help="for Enter before each round: to quieten the machine first")
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(arguments)
    if args.rounds < 1:
        raise UserError("--rounds must be at least 1")
    shape = SMALL if args.small else FULL
    params = decoder.init(shape.decoder, jax.random.key(0))
    prompts = np.random.default_rng(0).integers(1, shape.decoder.vocab, (shape.batch, shape.prompt)).astype(np.int32)

    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in ("jax", "jaxlib", "flax"))
    print(f"command: {shlex.join(['python', 'benchmarks/generate.py', *arguments])}")
    print(f"machine: {machine()}")
    print(f"versions: Python {platform.python_version()}, {versions}")
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(
        f"decoder {count / 1e6:.1f}M parameters, fp32; B {shape.batch}, G {shape.group}, P {shape.prompt}, "
        f"R {shape.response}",
        flush=True,
    )
    ours = OurRollout(shape, params, prompts)
    print(f"rollout compiled in {ours.compile_seconds:.1f} s", flush=True)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        write_for_peer(folder, shape.decoder, params)
        np.save(folder / "prompts.npy", prompts)
        job = {
            "folder": str(folder),
            "prompts": str(folder / "prompts.npy"),
            "group": shape.group,
            "max_tokens": shape.response,
            **{size: getattr(shape.decoder, size) for size in SIZES},
        }
        sides = {"balcap_jax": ours}
        for name, script in PEERS.items():
            if python := getattr(args, name):
                peer = stack.enter_context(Peer(python, script))
                ready = peer.ask(**job)
                print(f"{name}: {ready['versions']}", flush=True)
                compare_greedy(name, ours.greedy, ready["greedy"])
                sides[name] = lambda peer=peer: peer.ask()["seconds"]
        for step in sides.values():  # warms up, and compiles where that is the peer's way
            step()
        seconds = take_turns(sides, args.rounds, args.wait)
        tokens = shape.batch * shape.group * shape.response
    ours_median = statistics.median(seconds["balcap_jax"])
    rows = [("rollout", "median s", "tokens/s", "ours is", "all runs, s")]
    for name, runs in seconds.items():
        median = statistics.median(runs)
        every = ", ".join(f"{run:.2f}" for run in runs)
        rows.append((name, f"{median:.2f}", f"{tokens / median:.1f}", f"{median / ours_median:.2f}x as fast", every))
    print("\n" + table(rows))


if __name__ == "__main__":
    main()
