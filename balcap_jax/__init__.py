"""BalCapRL in JAX: image captioners trained for correctness, coverage and language together.

Shape letters used in every signature: B prompts (images) per step, G samples per prompt, P prompt tokens (image
tokens included), I image tokens, R response tokens, K objectives, V vocabulary, D width, N query heads, M key/value
heads, H head size, L layers.
"""

import os
import sys

from balcap_jax.cli.process import end, end_quietly_while_importing, memory_problem

# Without PyTorch, which is no dependency, transformers would tell every user of every command that models are missing.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

if sys.argv and sys.argv[0] == "-m":  # What it holds while Python looks for the module of `python -m balcap_jax.train`.
    end_quietly_while_importing()
    _names = [name.removeprefix("-m") for name in sys.orig_argv if name.startswith(("balcap_jax.", "-mbalcap_jax."))]
    if _names and (_problem := memory_problem(_names[0].removeprefix("balcap_jax."))):  # Imports may be too much.
        end(_problem)

__version__ = "0.1.0"
