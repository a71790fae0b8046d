"""English text that is there wherever Python is, for prompts of any length without a download.

text = real_text()
"""


def real_text() -> str:
    """Python's language reference, which ships with every Python for `help()`: half a megabyte of prose and code."""
    from pydoc_data.topics import topics

    return "\n".join(text for _, text in sorted(topics.items()))
