"""The table of a document and its conclusion, for what the eval command's tests don't show."""

from swaa_edge.evaluate.table import conclusion, table


def test_perplexity_as_a_table():
    def row(name, ppl, added, error, kl, same, past):
        return {
            "config": name,
            "ppl": ppl,
            "nll_increase": added,
            "nll_increase_error": error,
            "kl": kl,
            "same_top": same,
            "past_window": past and {"kl": past},
            "windows": 3,
        }

    document = {
        "model": {"name": "tiny", "architecture": "llama", "layers": 4, "type": "Q8_0", "bytes": 2_345_000_000},
        "settings": {"tasks": ["ppl"], "lengths": [512, 4096], "chat": True, "skipped": 0},
        "samples": {"seed": 7},
        "table": [],
        "front": [],
        "conclusion": None,
        "stopped": "interrupted",
        "progress": {"answers": 0, "of": 0, "windows": 5, "of_windows": 6, "kept": True},
        "perplexity": {
            "windows": 3,
            "length": 4096,
            "perplexity": [
                row("full", 12.0, 0.0, 0.0, 0.0, 1.0, None),
                row("naive", 1234.5678, 0.25, None, 0.125, 0.875, 0.5),
            ],
        },
    }
    assert (
        table(document)
        == """\
tiny (llama, 4 layers, Q8_0, 2.35 GB)
tasks: ppl; prompts of 512, 4,096 tokens, the model's chat template; seed 7

config  perplexity        loss added      KL  same token  KL past window
full        12.000  +0.0000 ± 0.0000  0.0000      100.0%               -
naive    1,234.568           +0.2500  0.1250       87.5%          0.5000

3 windows of 4,096 tokens of text; nats per token, ± one standard error.
same token: how often the most likely next token is the same as under full attention.

Stopped early (interrupted) after 5 of 6 windows; the same command resumes there, and writes its files when it is \
complete."""
    )


def test_conclusions():
    def row(name, accuracy, ratio):
        return {"config": name, "accuracy": accuracy, "correct": int(100 * accuracy), "prefill_ratio": ratio}

    full = row("full", 0.8, 1.0)
    assert conclusion([full]) is None
    assert conclusion([row("a", 0.5, 2.0)]) is None
    assert conclusion([full, row("a", 0.5, None)]) is None
    nothing = conclusion([row("full", 0.0, 1.0), row("a", 0.5, 2.0)])
    assert nothing.startswith("Full attention answers no question correctly")
    assert conclusion([full, row("a", 0.6, 1.5), row("b", 0.2, 4.0), row("c", 0.1, 4.0)]) == (
        "a keeps 75% of full attention's accuracy (60.0% of 80.0%) at a prefill speed-up of 1.50x; "
        "the fastest, b, keeps 25% of full attention's accuracy (20.0% of 80.0%) at a speed-up of 4.00x."
    )
    assert conclusion([full, row("a", 0.6, 0.5)]).endswith(" at a prefill slow-down of 2.00x.")
