"""A word-level tokenizer for the closed vocabulary of the scenes, as a transformers fast tokenizer."""

import functools
from collections.abc import Iterable

import tokenizers
import transformers

from balcap_jax.data.scenes import language
from balcap_jax.data.scenes.builder import PROMPT

PAD, BOS, EOS, UNK, IMAGE = SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>", "<image>")
# Stands for a space, as in SentencePiece. A word carries the space before it, so that pieces join to the exact text.
_SPACE = "\u2581"


def build_tokenizer(texts: Iterable[str]) -> transformers.PreTrainedTokenizerFast:
    """Builds the tokenizer whose tokens are the words and punctuation marks of `texts`, sorted, after the special ones.

    `decode(encode(text)) == text` for every text of known words that does not begin with a space. A space is part of
    the word that follows it, and the first word of a text is the same token as elsewhere. Unknown words become `<unk>`.
    Encoding adds no special token. The ids of `<pad> <bos> <eos> <unk> <image>` are 0 to 4.
    """
    backend = _backend({})
    split = backend.pre_tokenizer.pre_tokenize_str
    words = {token for text in texts for token, _ in split(backend.normalizer.normalize_str(text))}
    vocabulary = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *sorted(words.difference(SPECIAL_TOKENS))])}
    return fast_tokenizer(_backend(vocabulary), [IMAGE])


def fast_tokenizer(
    backend: tokenizers.Tokenizer, extra_special_tokens: list[str]
) -> transformers.PreTrainedTokenizerFast:
    """The tokenizer of transformers around one that holds SPECIAL_TOKENS and the extra ones."""
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        extra_special_tokens=extra_special_tokens,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def _backend(vocabulary: dict[str, int]) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=UNK))
    backend.normalizer = tokenizers.normalizers.NFC()
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme="always", split=False),
            # A run of letters and digits, or one other character, each with the space before it; or a lone space.
            tokenizers.pre_tokenizers.Split(
                tokenizers.Regex(
                    rf"{_SPACE}?[\p{{L}}\p{{M}}\p{{N}}]+|{_SPACE}?[^\p{{L}}\p{{M}}\p{{N}}{_SPACE}]|{_SPACE}"
                ),
                behavior="isolated",
            ),
        ]
    )
    backend.decoder = tokenizers.decoders.Metaspace(replacement=_SPACE, prepend_scheme="always", split=False)
    return backend


@functools.cache
def scenes_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """The tokenizer of the data set `scenes`: its prompt and the closed vocabulary of its captions, faults included."""
    tokens = language.vocabulary()
    # Marks come without a space before them, as they do in captions.
    words = " ".join(token for token in tokens if token.isalnum())
    return build_tokenizer([PROMPT, words + "".join(token for token in tokens if not token.isalnum())])
