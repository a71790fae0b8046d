"""English text that is part of every Python installation, for prompts of any length without a download.

text = real_text()
"""


def real_text() -> str:
    """Return the text that `help()` uses for Python's language reference: half a megabyte of prose and code."""
    from pydoc_data.topics import topics

    return "\n".join(text for _, text in sorted(topics.items()))
