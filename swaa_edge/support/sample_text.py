"""English text for prompts, without a download: the text is part of every Python installation.

text = real_text()
"""


def real_text() -> str:
    """Return Python's language reference, from the texts of `help()`: half a megabyte of prose and code."""
    from pydoc_data.topics import topics

    return "\n".join(text for _, text in sorted(topics.items()))
