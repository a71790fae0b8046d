"""Long-context accuracy of a model under full attention and SWAA configurations: the same questions, side by side.

tasks (with facts, haystack and prompts) and data files make `Sample`s, `run` asks them, scoring judges the answers, a
journal keeps them, report counts, plot draws. `swaa-edge eval` is all of it; perplexity is the task that has no
questions.

    from swaa_edge.evaluate.tasks import TaskSettings, build
    from swaa_edge.evaluate.run import evaluate
"""
