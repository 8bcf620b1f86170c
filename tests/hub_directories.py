"""Random models of small size in directories with the files that the published ones have."""

import json
from pathlib import Path

import tiny_checkpoints as tiny
import torch
from qwen_tokenizer import CHAT_TEMPLATES, build_qwen_tokenizer

LLAVA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}USER: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}{% endfor %} ASSISTANT:"
    "{% endfor %}"
)
LLAVA_PROCESSOR = {
    "processor_class": "LlavaProcessor",
    "patch_size": 4,
    "vision_feature_select_strategy": "default",
    "num_additional_image_tokens": 1,
    "image_token": "<image>",
}


def hub_directory(family: str, path: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Writes one of `family`, a key of `tiny.FAMILIES`, to `path`."""
    words = build_qwen_tokenizer() if family in CHAT_TEMPLATES else tiny.tokenizer()
    changes = {}
    if family in CHAT_TEMPLATES:
        ids = {"image_token_id": "image_pad", "video_token_id": "video_pad", "vision_start_token_id": "vision_start"}
        changes = {name: words.convert_tokens_to_ids(f"<|{word}|>") for name, word in ids.items()}
    model = tiny.make(family, dtype, words=words, **changes)
    with torch.no_grad():
        model.lm_head.weight[words.eos_token_id] = 0.0  # or every caption of LLaVA's would end at once
    tiny.save(model, path, words=words)
    (path / "chat_template.jinja").write_text(CHAT_TEMPLATES.get(family, LLAVA_TEMPLATE))
    if family == "llava":
        (path / "processor_config.json").write_text(json.dumps(LLAVA_PROCESSOR))
    else:
        settings = json.loads((path / "preprocessor_config.json").read_text())
        least, most = 4 * 64, 60 * 64
        limits = (
            {"size": {"shortest_edge": least, "longest_edge": most}} if "size" in settings else {"max_pixels": most}
        )
        (path / "preprocessor_config.json").write_text(json.dumps(settings | limits))
    return path
