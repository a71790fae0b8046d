"""Measure long-context accuracy and speed under full attention and SWAA configurations.

All configurations get the same questions.

- `compare` runs a complete evaluation, like the command `swaa-edge eval`.
- `tasks` (with `facts` and `haystack`) and `datafile` create the questions.
- `run` asks the questions.
- `scoring` and `judge` score the responses.
- `report` counts the correct responses.
- `perplexity` measures how well the model predicts a text.
- `plot` and `table` present the results.

    from swaa_edge import evaluate
    print(evaluate.compare("model.gguf", "full,naive,quality", tasks="needle,kv", prompt_tokens=4096))
"""

from swaa_edge.evaluate.comparison import Comparison, compare

__all__ = ["Comparison", "compare"]
