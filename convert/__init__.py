"""Writes GGUF files with SWAA keys, from a Hugging Face model directory or an existing GGUF file.

from swaa_edge.convert.annotate import annotate
"""
