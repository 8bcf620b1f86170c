"""A judge's server that keeps what it computed of prompts, as vLLM does: in blocks, from a prompt's first token on."""

import hashlib
import json
import threading
import time

from misbehaving import JudgeServer, Reply, right_answer

BLOCK = 16
PICTURE = 256  # tokens of a picture


class CachingServer(JudgeServer):
    """`seconds` an answer takes; a prompt's blocks are in the cache once its answer has gone out.

    picture, picture_hits: tokens of pictures that were asked about, and those found in the cache; text, text_hits: of
    the texts of messages without a picture.
    """

    def __init__(self, seconds: float = 0.03, **more):
        self.seconds, self._known, self._guard = seconds, {}, threading.Lock()
        self.picture = self.picture_hits = self.text = self.text_hits = 0
        super().__init__(self._cached, **more)

    def _cached(self, body: dict) -> Reply:
        tokens, begin, end = tokens_of(body)
        with self._guard:
            hits, now = 0, time.monotonic()
            digest = hashlib.sha256()
            for start in range(0, len(tokens) - BLOCK + 1, BLOCK):
                digest.update("\x1f".join(tokens[start : start + BLOCK]).encode(errors="replace"))
                key = digest.digest()
                if hits == start and self._known.get(key, float("inf")) <= now:
                    hits = start + BLOCK
                self._known[key] = min(self._known.get(key, float("inf")), now + self.seconds)
            if end > begin:
                self.picture += end - begin
                self.picture_hits += max(min(hits, end) - begin, 0)
            else:
                self.text += len(tokens)
                self.text_hits += hits
        return Reply("text", json.dumps(right_answer(body)), delay=self.seconds)


def tokens_of(body: dict) -> tuple[list[str], int, int]:
    """The tokens of a request in their order, and between which of them its picture's stand."""
    tokens, begin, end = [], 0, 0
    for message in body["messages"]:
        content = message["content"]
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if part["type"] == "text":
                tokens += part["text"].split()
                continue
            name = hashlib.sha256(part["image_url"]["url"].encode()).hexdigest()
            begin, end = len(tokens), len(tokens) + PICTURE
            tokens += [f"{name}/{i}" for i in range(PICTURE)]
    return tokens, begin, end
