"""The whole way in about a minute: a model is made, converted, quantized and run on a long real text.

It shows what SWAA does to the time before the first token on this very machine, side by side with full
attention, with nothing to download. The model has random weights, so its text is noise; its speed is that
of any model of its shape, because no weight changes how much is computed.

    report = demo(); print(report["table"])
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from swaa_edge.config import SwaaConfig
from swaa_edge.errors import ConfigError, GenerationError, OutputError
from swaa_edge.llama import SwaaLlama

#: Recipes that are compared with full attention; the middle one is written into the file.
RECIPES = ("quality", "balanced", "fast")
WRITTEN = "balanced"
QUANTIZED = "Q4_K_M"
PROMPT_TOKENS = 12288

# Qwen3's shape, small: so few numbers per token that attention takes most of the time of a long prompt, as it
# does in a large model. Every width is a multiple of 256, which Q4_K_M asks for.
_MODEL = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 128,
    "max_position_embeddings": 65536,
    "tie_word_embeddings": False,
}
_VOCABULARY = 4096
_PRE_TOKENIZER = "gpt-2"
_END = "<|endoftext|>"

OnPrefill = Callable[[str], Callable[[int, int], object] | None]


def demo(
    folder: str | os.PathLike[str] | None = None,
    *,
    prompt_tokens: int = PROMPT_TOKENS,
    new_tokens: int = 16,
    on_step: Callable[[str], None] | None = None,
    on_prefill: OnPrefill | None = None,
) -> dict[str, Any]:
    """Make the model, run it under full attention and each of `RECIPES`, and return what came out.

    folder: where the checkpoint and the GGUF stay; None keeps nothing. on_step: called with a few words as
    each step starts. on_prefill: called with a configuration's name, gives the `on_prefill` of its SwaaLlama.

    The result is plain JSON values: "table" has a row per configuration with config, prefill_seconds,
    prefill_tok_s, prefill_ratio (full attention's time over this one's), decode_tok_s, tokens and text;
    "prompt_tokens", "prompt" and "model" say what was run. Raises `ConfigError` without the packages that make
    a model, `OutputError` if the folder has a demo already, and what converting and running can raise.
    """
    from swaa_edge.convert import child, hf

    steps = on_step or (lambda _: None)
    _check_packages()
    with _workspace(folder) as work:
        checkpoint, model = work / "checkpoint", work / f"demo-{QUANTIZED}.gguf"
        steps("making a small model with random weights")
        try:
            child.run("swaa_edge.demo:make_checkpoint", {"folder": checkpoint})
        except child.ChildError as error:
            raise GenerationError(f"the model can't be made: {error}") from None
        recipe = SwaaConfig.from_recipe(WRITTEN)
        hf.convert(
            checkpoint, model, outtype="f16", quantize=QUANTIZED, pre=_PRE_TOKENIZER, swaa=recipe, on_step=on_step
        )
        tokens = _prompt(model, prompt_tokens)
        rows: list[dict[str, Any]] = []
        for name in ("full", *RECIPES):
            steps(f"reading {len(tokens):,} tokens: {name}")
            # None: the settings in the file, which is how a user runs it.
            swaa = {"full": False, WRITTEN: None}.get(name, name)
            settings = SwaaConfig.from_recipe(swaa) if isinstance(swaa, str) else swaa
            row = _run(model, settings, tokens, new_tokens, on_prefill(name) if on_prefill else None)
            ratio = (rows[0] if rows else row)["prefill_seconds"] / row["prefill_seconds"]
            rows.append({"config": name, "prefill_ratio": ratio, **row})
        return {
            "table": rows,
            "prompt_tokens": len(tokens),
            "prompt": "Python's language reference",
            "model": {"shape": _MODEL, "vocabulary": _VOCABULARY, "type": QUANTIZED, "weights": "random"},
            "kept": None if folder is None else str(model),
        }


def make_checkpoint(folder: str) -> None:
    """Write a Hugging Face checkpoint of a small Qwen3 with random weights, and its tokenizer, into `folder`."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=_VOCABULARY, bos_token_id=0, eos_token_id=0, **_MODEL))
    model.half().save_pretrained(folder)
    _tokenizer().save_pretrained(folder)


def _tokenizer() -> Any:
    """A byte-level BPE tokenizer, trained on the text that the demo reads."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=[_END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(real_text().splitlines(keepends=True), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=_END, eos_token=_END, pad_token=_END)


def real_text() -> str:
    """Python's language reference, which ships with every Python for `help()`: half a megabyte of prose and code."""
    from pydoc_data.topics import topics

    return "\n".join(text for _, text in sorted(topics.items()))


def _prompt(model: Path, count: int) -> list[int]:
    from swaa_edge.vocabulary import tokenize

    tokens = tokenize(model, real_text())
    if not 1 <= count <= len(tokens):
        raise ConfigError(f"prompt_tokens = {count} is out of range: the text has {len(tokens)} tokens")
    return tokens[:count]


def _run(
    model: Path, swaa: SwaaConfig | Literal[False] | None, tokens: list[int], new: int, on_prefill: Any
) -> dict[str, Any]:
    """Read `tokens` and generate `new` more, greedily; a row of the table without its name and ratio."""
    threads = os.cpu_count() or 1
    llm = SwaaLlama(
        str(model), swaa=swaa, n_ctx=len(tokens) + new, n_threads=threads, n_threads_batch=threads, verbose=False
    )
    try:
        # Pages and caches of a fresh context cost time that is none of the prompt's.
        llm.eval(tokens[:512])
        llm.reset()
        llm.on_prefill = on_prefill
        generated: list[int] = []
        with contextlib.closing(llm.generate(tokens, temp=0.0)) as stream:
            for token in stream:
                generated.append(token)
                if len(generated) >= new:
                    break
        timings = llm.last_timings
        return {
            "prefill_seconds": timings.prefill_seconds,
            "prefill_tok_s": timings.prefill_speed,
            "decode_tok_s": timings.decode_speed,
            "tokens": generated,
            "text": llm.detokenize(generated).decode("utf-8", "replace"),
            "swaa": llm.swaa.to_dict() if llm.swaa else None,
        }
    finally:
        llm.close()


def _check_packages() -> None:
    missing = [name for name in ("torch", "transformers", "tokenizers") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"the demo makes a model, which needs {', '.join(missing)}; pip install 'swaa-edge[convert]'")


@contextlib.contextmanager
def _workspace(folder: str | os.PathLike[str] | None) -> Iterator[Path]:
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="swaa-edge-demo-") as work:
            yield Path(work)
        return
    path = Path(folder)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise OutputError(f"{path} is there already and not an empty folder; choose another")
    path.mkdir(parents=True, exist_ok=True)
    yield path
