"""A small tokenizer of Qwen2's kind: byte-level, every byte a token, with the special tokens of the Qwen families."""

import transformers
from tokenizers.pre_tokenizers import ByteLevel

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

# That of the published Qwen3-VL checkpoints, without its branches for videos and tools.
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Qwen2.5-VL's begins with a system sentence, where a conversation has none.
CHAT_TEMPLATES = {
    "qwen2_5_vl": _CHAT_TEMPLATE.replace(
        "<|im_start|>",
        "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
        "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>",
        1,
    ),
    "qwen3_vl": _CHAT_TEMPLATE,
}


def build_qwen_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """The end of a turn is `<|im_end|>` and padding `<|endoftext|>`, as the published checkpoints have it."""
    words = sorted(ByteLevel.alphabet())
    return transformers.Qwen2Tokenizer(
        vocab={word: i for i, word in enumerate(words)},
        merges=[],
        unk_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=[token for token in SPECIAL_TOKENS if token not in ("<|im_end|>", "<|endoftext|>")],
    )
