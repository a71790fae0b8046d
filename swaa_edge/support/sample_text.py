"""English text that ships with every Python, for prompts of any length without a download.

text = real_text()
"""


def real_text() -> str:
    """Return Python's language reference, which `help()` reads: half a megabyte of prose and code."""
    from pydoc_data.topics import topics

    return "\n".join(text for _, text in sorted(topics.items()))
