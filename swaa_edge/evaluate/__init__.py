"""Long-context accuracy and speed of a model under full attention and SWAA configurations, on the same questions.

The function `compare` does what the command `swaa-edge eval` does. The modules tasks (with facts, haystack and prompts)
and datafile create the questions, and the module run asks them. The modules scoring and judge score the responses, and
report counts the correct responses. The module perplexity measures text without questions. The modules plot and table
present the results.

    from swaa_edge import evaluate
    print(evaluate.compare("model.gguf", "full,naive,quality", tasks="needle,kv", prompt_tokens=4096))
"""

from swaa_edge.evaluate.comparison import Comparison, compare

__all__ = ["Comparison", "compare"]
