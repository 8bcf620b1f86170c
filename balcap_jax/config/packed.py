"""What decides which token buckets a batch can take; `models.packing` packs by these numbers."""

UNIT = 32
"""Tokens that move together. Half a unit per response is lost on average; shorter ones make more and smaller matmuls
in attention."""

WORTH = 0.8
"""A packed program of more than this share of the padded one's positions is not taken: where responses are nearly all
full, the indices and the shorter matmuls of attention cost more than the padding."""
