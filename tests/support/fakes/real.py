"""Stand-ins for the real model: a vocabulary of words, and a document of results without an engine.

documents = tasks.build(2048, 2, WordPrompts(), {"python": text}); results(stages, documents, loss)
"""

import random
import re
from types import SimpleNamespace

#: Prose in which no two passages are alike.
TEXT = " ".join(
    " ".join(random.Random(at).choice(("sun", "moon", "star", "sea")) + str(at * 9 + word) for word in range(9)) + "."
    for at in range(9000)
)


class WordPrompts:
    """Prompts whose tokens are words, with a head of two tokens and an end of one."""

    def __init__(self):
        self._numbers = {}

    def tokenize(self, text):
        return [self._numbers.setdefault(word, len(self._numbers) + 10) for word in re.findall(r"\S+", text)]

    def ask(self, document, question):
        return [1, 2, *document, *self.tokenize(question), 3]

    def around(self, question):
        return 2, 1 + len(self.tokenize(question))


def results(stages, documents, loss):
    """The document of measure.py if loss(row, tail, task, document) were the loss per token; right below 1."""
    from real import run
    from real.cells import FULL

    records = []
    for stage in stages:
        for at, document in enumerate(documents[stage.length]):
            for row in (*([] if stage.rows[0] is FULL else [FULL]), *stage.rows):
                answers = {
                    str(tail): [
                        (question.scored * (own := loss(row, tail, question.task, at)), question.scored * (own < 1))
                        for question in document.questions
                    ]
                    for tail in row.tails
                }
                seconds = 2.0 if row is FULL else 1.0
                name = {"length": stage.length, "row": row.key, "identity": row.identity, "document": document.name}
                records.append({**name, "seconds": seconds, "answers": answers, "threads": 2})
    model = SimpleNamespace(name="tiny", n_layers=30)
    path = SimpleNamespace(name="tiny.gguf", read_bytes=lambda: b"")
    real = SimpleNamespace(path=path, model=model, texts={"python": TEXT}, threads=2)
    return run._document(real, documents, stages, records)
