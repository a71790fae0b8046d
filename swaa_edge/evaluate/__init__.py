"""Measure long-context accuracy and speed under full attention and SWAA configurations, on the same questions.

- `compare` does what the command `swaa-edge eval` does.
- `tasks` (with `facts` and `haystack`) and `datafile` create the questions.
- `run` asks the questions.
- `scoring` and `judge` score the responses, and `report` counts the correct responses.
- `perplexity` measures how well a text is predicted, without questions.
- `plot` and `table` present the results.

    from swaa_edge import evaluate
    print(evaluate.compare("model.gguf", "full,naive,quality", tasks="needle,kv", prompt_tokens=4096))
"""

from swaa_edge.evaluate.comparison import Comparison, compare

__all__ = ["Comparison", "compare"]
