"""`finetune` from Python, as docs/finetune.md shows it."""

from support.docs import run_example
from swaa_edge.files.lora_training import read_training


def test_the_example_of_the_docs(base, data, tmp_path):
    (tmp_path / "Qwen3-4B").symlink_to(base)
    (tmp_path / "data.jsonl").symlink_to(data)
    output = run_example("docs/finetune.md", 0, tmp_path)
    assert "; validation loss on 1 examples: " in output and "\nwrote adapter; make a GGUF of it with: " in output
    kept = read_training(tmp_path / "adapter")
    assert kept.swaa.recipe == "quality" and kept.more["settings"]["learning_rate"] == 5e-5
