"""Writes GGUF files with SWAA keys, from a Hugging Face model directory or from an existing GGUF.

from swaa_edge.convert.annotate import annotate
"""
