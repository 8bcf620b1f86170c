"""BalCapRL in JAX: image captioners trained for correctness, coverage and language together.

Shape letters used in every signature: B prompts (images) per step, G samples per prompt, P prompt tokens (image
tokens included), I image tokens, R response tokens, K objectives, V vocabulary, D width, N query heads, M key/value
heads, H head size, L layers.
"""

import sys

from balcap_jax.cli.process import prepare_import

if sys.argv and sys.argv[0] == "-m":  # argv while Python looks for the module of `python -m balcap_jax.train`.
    prepare_import()

__version__ = "0.2.0"
