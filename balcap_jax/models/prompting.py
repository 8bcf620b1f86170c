"""The common part of all families' processors: instructions and targets to token rows, and back to text."""

import dataclasses
import functools
import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from balcap_jax.cli.errors import UserError
from balcap_jax.models.policy import Prompt

# Mean and standard deviation of CLIP's pre-processing (openai/CLIP, per RGB channel on a 0..1 scale).
PIXEL_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
PIXEL_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)

# For tokenizers without chat words: the image and the instruction alone.
PLAIN_TEMPLATE = "{image} {prompt}"
# The image in a template, with the words that frame it: what the chat templates leave out of a prompt of text alone.
_IMAGE_PART = re.compile(r"(<\|vision_start\|>)?\{image\}(<\|vision_end\|>)?\s?")


class PromptTooLong(UserError):
    """A prompt that needs `needed` tokens, `image_tokens` of them the image's, where there is room for fewer."""

    def __init__(self, name: str, needed: int, image_tokens: int, room: int):
        super().__init__(
            f"the prompt of {name} needs {needed} tokens ({image_tokens} of them the image's) but "
            f"model.prompt_tokens is {room}; raise model.prompt_tokens or shorten the prompt"
        )
        self.needed = needed


@dataclasses.dataclass(frozen=True)
class PromptProcessor:
    """Base of a family's processor, which prepares its own images.

    `prompt_tokens` is P. Shorter prompts get padding on the right; longer ones are an error, since a cut would remove
    image tokens. `template` holds `{image}`, the place of the image tokens, and `{prompt}`, that of the instruction.
    `image_token` is the word of one image token. `end_tokens` are those of the policy.
    """

    tokenizer: PreTrainedTokenizerBase
    _: dataclasses.KW_ONLY
    prompt_tokens: int
    template: str
    image_token: str = "<image>"
    end_tokens: tuple[int, ...] = ()

    def __call__(
        self, images: Sequence[np.ndarray], prompts: Sequence[str], ids: Sequence[str] | None = None
    ) -> Prompt:
        """The Prompt of B images, arrays uint8 [height, width, 3] of any size; `ids` names the samples in errors.

        Raises:
          UserError: `encode_prompts` refuses a prompt, or `prepare_images` an image.
        """
        return self.with_prepared(self.prepare_images(images, ids), prompts, ids)

    def encode_responses(self, responses: Sequence[Sequence[str]], max_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """Target texts [B][G] to tokens [B, G, R] with the end token, cut at R, and their mask."""
        texts = [self.without_special_tokens(text) for group in responses for text in group]
        rows = [self.tokenizer.encode(text, add_special_tokens=False) for text in texts]
        tokens, mask = self._padded([[*row, self.tokenizer.eos_token_id][:max_tokens] for row in rows], max_tokens)
        shape = (len(responses), len(responses[0]), max_tokens)
        return tokens.reshape(shape), mask.reshape(shape)

    def decode(self, tokens: np.ndarray) -> list[str]:
        """Tokens [..., R] to a flat list of texts, each up to its first end token, without special tokens."""
        rows = np.asarray(tokens).reshape(-1, tokens.shape[-1])
        before_end = ~np.isin(rows, self.end_tokens).cumsum(-1, dtype=bool)
        texts = [row[mask].tolist() for row, mask in zip(rows, before_end, strict=True)]
        return self.tokenizer.batch_decode(texts, skip_special_tokens=True)

    def without_special_tokens(self, text: str) -> str:
        """Drops special words, so that texts of a data set cannot add image placeholders, ends or padding."""
        for token in self._special_words:
            text = text.replace(token, " ")
        return text

    def encode_prompts(
        self, prompts: Sequence[str], image_tokens: Sequence[int], ids: Sequence[str]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Instructions to tokens [B, P] and their mask, `image_tokens` placeholders in each.

        Raises:
          PromptTooLong: a prompt needs more than P tokens.
          UserError: it is no Unicode text, or does not hold as many image tokens as it should.
        """
        encoded = [self._encode(*prompt) for prompt in zip(prompts, image_tokens, ids, strict=True)]
        return self._padded(encoded, self.prompt_tokens)

    def without_image(self, prompts: Sequence[str], ids: Sequence[str] | None = None) -> Prompt:
        """Prompts of text alone, for a policy whose tower does not run; `images` [B, 0] holds nothing.

        Raises:
          PromptTooLong: a prompt needs more than P tokens.
          UserError: it is no Unicode text.
        """
        tokens, mask = self._imageless.encode_prompts(prompts, [0] * len(prompts), names_of(ids, len(prompts)))
        return Prompt(tokens, mask, self.text_positions(mask), np.zeros((len(prompts), 0), np.uint8))

    def text_positions(self, mask: np.ndarray) -> np.ndarray:
        """Rotary positions of text from the left, for `mask` [B, P]."""
        return np.ascontiguousarray(np.broadcast_to(np.arange(mask.shape[1], dtype=np.int32), mask.shape))

    @functools.cached_property
    def _imageless(self) -> "PromptProcessor":
        return dataclasses.replace(self, template=_IMAGE_PART.sub("", self.template))

    @functools.cached_property
    def _special_words(self) -> tuple[str, ...]:
        added = self.tokenizer.added_tokens_decoder.items()
        added = (token.content for i, token in added if token.special or i in self.end_tokens)
        return tuple(dict.fromkeys([self.image_token, *self.tokenizer.all_special_tokens, *added]))

    def _padded(self, rows: Sequence[Sequence[int]], length: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of rows to an int32 array [rows, length] and its mask."""
        tokens = np.full((len(rows), length), self.tokenizer.pad_token_id, np.int32)
        mask = np.arange(length) < np.array([len(row) for row in rows], int)[:, None]
        tokens[mask] = [token for row in rows for token in row]
        return tokens, mask

    def _encode(self, instruction: str, image_tokens: int, name: str) -> list[int]:
        try:
            instruction.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"the prompt of {name} is no Unicode text (bytes that are not UTF-8, or half of a surrogate pair); "
                f"write it anew"
            ) from error
        instruction = self.without_special_tokens(instruction)
        text = fill(self.template, image=self.image_token * image_tokens, prompt=instruction)
        encoded = self.tokenizer.encode(text, add_special_tokens=False)
        if prepends_bos(self.tokenizer, self.template):
            encoded = [self.tokenizer.bos_token_id, *encoded]
        if len(encoded) > self.prompt_tokens:
            raise PromptTooLong(name, len(encoded), image_tokens, self.prompt_tokens)
        placed = encoded.count(self.tokenizer.convert_tokens_to_ids(self.image_token))
        if placed != image_tokens:
            raise UserError(
                f"the prompt of {name} holds {placed} image tokens but the vision tower gives {image_tokens}; "
                f"model.template must contain {{image}} exactly once"
            )
        return encoded


def fill(template: str, **values: str) -> str:
    """Fills the `{name}`s of a template; unlike `str.format` it looks into no value, and formats none.

    Raises:
      UserError: the template holds braces for anything else.
    """
    try:
        parts = list(string.Formatter().parse(template))
        for _, name, form, conversion in parts:
            if name is not None and (name not in values or form or conversion):
                raise ValueError(f"{{{name}}} in it stands for nothing")
    except ValueError as error:
        known = " and ".join(f"{{{name}}}" for name in values)
        raise UserError(f"model.template is no template ({error}); it takes {known}, other braces doubled") from error
    return "".join(literal + (values[name] if name is not None else "") for literal, name, _, _ in parts)


def names_of(ids: Sequence[str] | None, count: int) -> Sequence[str]:
    """The names of a batch's samples in errors."""
    return ids or [f"sample {i}" for i in range(count)]


def prepends_bos(tokenizer: PreTrainedTokenizerBase, template: str) -> bool:
    """Whether a prompt gets the tokenizer's first token; chat templates may begin with it themselves (SmolLM2)."""
    return tokenizer.bos_token is not None and not template.startswith(tokenizer.bos_token)


def has_word(tokenizer: PreTrainedTokenizerBase, word: str) -> bool:
    return tokenizer.convert_tokens_to_ids(word) not in (None, tokenizer.unk_token_id)


def image_word(tokenizer: PreTrainedTokenizerBase, *words: str) -> str:
    """The first of `words` that the tokenizer has. Raises UserError where it has none."""
    for word in words:
        if has_word(tokenizer, word):
            return word
    raise UserError(f"the tokenizer has no word for an image token ({' or '.join(words)}); add one as a special token")


def special_tokens(
    tokenizer: PreTrainedTokenizerBase, model: Mapping[str, Any], image_word: str, vocab: int
) -> dict[str, Any]:
    """The fields `image_token`, `pad_token`, `end_tokens` and `forbidden` of a policy with `vocab` embeddings.

    A response ends in the tokenizer's end token, as target texts do, or in one of the checkpoint's (`model`'s
    "end_tokens"). It may hold neither other special tokens nor rows of the embedding without a word: checkpoints pad
    their embedding beyond the tokenizer's words (Qwen2.5-VL: 151,936 rows for 151,665 words).
    """
    image, pad = tokenizer.convert_tokens_to_ids(image_word), tokenizer.pad_token_id
    ends = tuple(dict.fromkeys((tokenizer.eos_token_id, *model.get("end_tokens", ()))))
    added = (i for i, token in tokenizer.added_tokens_decoder.items() if token.special)
    special = {image, pad, *tokenizer.all_special_ids, *added}
    forbidden = tuple(sorted((special | set(range(len(tokenizer), vocab))) - set(ends)))
    return {"image_token": image, "pad_token": pad, "end_tokens": ends, "forbidden": forbidden}
