"""What transformers, 4 or 5, makes of a checkpoint directory: `python read_in_transformers.py CASE.json OUT.npz`.

Alone in its file, and without anything of ours, so that an environment of transformers 4 can run it.
"""

import json
import sys

import numpy as np
import torch
import transformers
from PIL import Image


def read(
    directory: str, architecture: str, image: list, text: str, tokens: int, forbidden: list
) -> dict[str, np.ndarray]:
    """Ids and pixels of a picture with a text by the checkpoint's own files, logits behind them, greedy tokens."""
    words = transformers.AutoTokenizer.from_pretrained(directory)
    pictures = transformers.AutoImageProcessor.from_pretrained(directory)
    model, found = getattr(transformers, architecture).from_pretrained(
        directory, attn_implementation="eager", output_loading_info=True
    )
    assert [*found["missing_keys"], *found["unexpected_keys"]] == []
    model = (
        model.float()
    )  # transformers 5 computes in the checkpoint's type: of two logits alike in bf16 either may win.
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}
    picture = Image.fromarray(np.array(image, np.uint8))
    if architecture.startswith("Llava"):
        processor = transformers.AutoProcessor.from_pretrained(directory)
        prompt = processor.apply_chat_template([message], add_generation_prompt=True)
        inputs = processor(images=[picture], text=[prompt], add_special_tokens=False, return_tensors="pt")
    else:  # Its processor needs torchvision, for videos: by hand then.
        prompt = words.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
        inputs = pictures(images=[picture], return_tensors="pt")
        image_token = getattr(words, "image_token", "<|image_pad|>")  # as its processor finds it
        placeholders = image_token * (int(inputs["image_grid_thw"].prod()) // pictures.merge_size**2)
        prompt = prompt.replace(image_token, placeholders)
        inputs = {**inputs, **words([prompt], add_special_tokens=False, return_tensors="pt")}
        if transformers.__version__ >= "5":
            inputs["mm_token_type_ids"] = (inputs["input_ids"] == words.convert_tokens_to_ids(image_token)).int()
    with torch.no_grad():
        logits = model.eval()(**inputs).logits[0, -1]
        drawn = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, suppress_tokens=forbidden)
    return {
        "ids": inputs["input_ids"][0].numpy(),
        "pixels": inputs["pixel_values"].float().numpy(),
        "logits": logits.float().numpy(),
        "tokens": drawn[0, inputs["input_ids"].shape[1] :].numpy(),
    }


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        np.savez(sys.argv[2], **read(**json.load(file)))
