"""A small random Llama with a byte-level tokenizer: as a directory of transformers, and as llama.cpp writes it."""

import json
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import tokenizers
import torch
import transformers

CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEXTS = (
    "A large red striped ring occupies the top left. The black background is smooth.",
    "Describe the picture. user assistant system: 3 shapes, 14 circles, it's calm",
)
CHAT = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + "
    "'\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The sides of matrices are multiples of 32, the numbers of a block of the quantised types.
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 256,
}
THETA = 5000.0
ROPE = {"rope_type": "default", "rope_theta": THETA}


def backend() -> tokenizers.Tokenizer:
    """A byte-level BPE of SmolLM's kind, trained on TEXTS."""
    found = tokenizers.Tokenizer(tokenizers.models.BPE())
    digits = tokenizers.pre_tokenizers.Digits(individual_digits=True)
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([digits, byte_level])
    found.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=list(CONTROL),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    found.train_from_iterator(TEXTS, trainer)
    return found


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    end, start, stop = CONTROL
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend(), bos_token=start, eos_token=stop, pad_token=stop, unk_token=end
    )
    made.chat_template = CHAT
    return made


def make(**changes) -> transformers.LlamaForCausalLM:
    """The model, every parameter random, with an output tied to the embedding unless `changes` say otherwise."""
    words = tokenizer()
    config = transformers.LlamaConfig(
        vocab_size=len(words),
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
        **SIZES | {"tie_word_embeddings": True, "rope_parameters": ROPE} | changes,
    )
    model = transformers.LlamaForCausalLM._from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2, generator=generator)
    return model.eval()


def save(path: Path, **changes) -> transformers.LlamaForCausalLM:
    """Writes the directory of a model as transformers does, and returns the model."""
    model = make(**changes)
    model.save_pretrained(path)
    tokenizer().save_pretrained(path)
    return model


# ---- the file


def side_by_side(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of queries or keys in llama.cpp's order: rotary pairs (i, i + H / 2) of a head beside each other."""
    size = len(weight) // heads
    order = [head * size + i + half for head in range(heads) for i in range(size // 2) for half in (0, size // 2)]
    return weight[order]


def names_in_file(layers: int) -> dict[str, str]:
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    parts = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.o_proj": "attn_output"}
    parts |= {f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"}
    parts |= {f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")}
    for i in range(layers):
        names |= {f"model.layers.{i}.{theirs}": f"blk.{i}.{ours}" for theirs, ours in parts.items()}
    return names


def rounded(array: np.ndarray, kind: str) -> np.ndarray:
    """The numbers of the last axis as 32 of them share a scale: llama.cpp's q8_0 and q4_1, written down again."""
    blocks = array.reshape(-1, 32).astype(np.float32)
    if kind == "Q8_0":
        scale = np.abs(blocks).max(1, keepdims=True) / np.float32(127)
        found = np.round(blocks / scale) * scale.astype(np.float16).astype(np.float32)
    else:
        low = blocks.min(1, keepdims=True)
        scale = (blocks.max(1, keepdims=True) - low) / np.float32(15)
        steps = np.clip(np.floor((blocks - low) / scale + np.float32(0.5)), 0, 15)
        found = steps * scale.astype(np.float16).astype(np.float32) + low.astype(np.float16).astype(np.float32)
    return found.reshape(array.shape)


def write_gguf(
    path: Path,
    model: transformers.LlamaForCausalLM,
    kind: str = "F32",
    *,
    keys: Mapping[str, object] | None = None,
    without: str = "",
    pre: str = "smollm",
) -> Path:
    """The GGUF file of a model, its matrices of the type `kind`, `keys` added to or in the place of its own."""
    config, state = model.config, model.state_dict()
    writer = gguf.GGUFWriter(path, "llama")
    own = {
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.block_count": config.num_hidden_layers,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.rope.dimension_count": config.head_dim,
        "llama.rope.freq_base": THETA,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "tokenizer.ggml.bos_token_id": config.bos_token_id,
        "tokenizer.ggml.eos_token_id": config.eos_token_id,
        "tokenizer.ggml.padding_token_id": config.pad_token_id,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.chat_template": CHAT,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
    }
    add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for name, value in (own | dict(keys or {})).items():
        if value is not None:
            add[type(value)](name, value)
    vocabulary = backend().get_vocab()
    words = sorted(vocabulary, key=vocabulary.get)
    writer.add_token_list(words)
    writer.add_token_types([3 if word in CONTROL else 1 for word in words])
    content = backend().to_str()
    writer.add_token_merges([" ".join(pair) for pair in json.loads(content)["model"]["merges"]])

    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for theirs, ours in names_in_file(config.num_hidden_layers).items():
        name = f"{theirs}.weight"
        if ours == without or name not in state or (ours == "output" and config.tie_word_embeddings):
            continue
        array = state[name].numpy()
        if count := heads.get(theirs.rsplit(".", 1)[-1]):
            array = side_by_side(array, count)
        if array.ndim == 1 or kind == "F32":
            writer.add_tensor(f"{ours}.weight", array)
        else:
            raw = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(f"{ours}.weight", gguf.quantize(array, raw), raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
