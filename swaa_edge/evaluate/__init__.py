"""Long-context accuracy and speed of a model under full attention and SWAA configurations, on the same questions.

`compare` does all that `swaa-edge eval` does. Its parts: tasks (with facts, haystack and prompts) and datafile make
`Sample`s, run asks them, scoring or judge scores the responses, report counts the correct ones, perplexity measures
text without questions, plot and table present the document.

    from swaa_edge import evaluate
    print(evaluate.compare("model.gguf", "full,naive,quality", tasks="needle,kv", prompt_tokens=4096))
"""

from swaa_edge.evaluate.comparison import Comparison, compare

__all__ = ["Comparison", "compare"]
