"""An `Answerer` that runs a Hugging Face model in transformers. The model's code is not changed.

This answerer is for machines with a GPU, and for models without a GGUF. Importing this module imports torch.

    prompts = HfPrompts("Qwen3-4B"); tokens = prompts.ask(document, question)
    answerer = HfAnswerer("Qwen3-4B", max_tokens=1024, sampling={"temperature": 0.7, "top_p": 0.95, "top_k": 40})
    answerer.answer(tokens, seed=1)
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

from swaa_edge.errors import ConfigError, GenerationError, ModelFileError
from swaa_edge.finetune.answerers import Response, reusable
from swaa_edge.generate.prompts import PLAIN_END, asked

try:
    import torch
    import transformers

    from swaa_edge.finetune.hf_model import load, one_line, out_of_memory, quiet
except ImportError as error:
    raise ConfigError(f"a Hugging Face model needs {error.name}; pip install 'swaa-edge[convert]'") from error

# Prompt tokens per forward pass. More tokens need more memory for a layer's mask and attention scores.
_STEP = 1024
# llama_cpp's default, so that GGUF and Hugging Face models are sampled alike.
_MIN_P = 0.05


class HfPrompts:
    """Builds prompts with the tokenizer and chat template in `folder`. `Prompts` does the same for a GGUF.

    Prompts are plain text if `chat` is False or the model has no template. Names of special tokens in a document are
    tokenized as text, except by old versions of transformers.

    Raises `ModelFileError` if the tokenizer can't be loaded.
    """

    def __init__(self, folder: str | os.PathLike[str], *, chat: bool = True) -> None:
        self._folder, self._tokenizer = os.fspath(folder), load(transformers.AutoTokenizer, folder)
        #: Whether a chat template is in use.
        self.chat = chat and self._tokenizer.chat_template is not None

    def __enter__(self) -> HfPrompts:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def ask(self, document: str, question: str) -> array[int]:
        """Return the tokens of a prompt that asks `question` about `document`.

        Raises `ModelFileError` if the chat template fails.
        """
        content = asked(document, question)
        if not self.chat:
            return array("i", self._tokenizer(content + PLAIN_END, split_special_tokens=True)["input_ids"])
        try:
            tokens = self._tokenizer.apply_chat_template(
                [{"role": "user", "content": content}],
                add_generation_prompt=True,
                return_dict=False,
                sanitize_control_tokens=True,  # older versions ignore this option
            )
        except Exception as error:  # a template can raise any exception
            raise ModelFileError(
                f"{self._folder}: its chat template fails ({one_line(error)}); use --no-chat"
            ) from error
        return array("i", tokens)


class HfAnswerer:
    """An `Answerer` that calls `generate` of a Hugging Face model. Uses torch's accelerator, or else the CPU.

    folder: the model directory.
    sampling: temperature (0 means greedy), top_p and top_k. min_p has llama_cpp's default. The model's
        generation_config.json sets other options, such as a repetition penalty.
    threads: number of CPU threads, or None for torch's default.

    Each response seeds torch's random number generators.

    Raises `ModelFileError` if the model can't be loaded.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        max_tokens: int,
        sampling: Mapping[str, Any],
        threads: int | None = None,
    ) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self._tokenizer = load(transformers.AutoTokenizer, folder)
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        model = load(transformers.AutoModelForCausalLM, folder, dtype="auto")
        self._model = model.to(accelerator or "cpu").eval()
        # The model's own settings are changed. generate() would merge other settings with the model's.
        settings = self._model.generation_config
        _set(settings, self._tokenizer.eos_token_id, max_tokens, sampling)
        ends = settings.eos_token_id
        self._ends = {ends} if isinstance(ends, int) else set(ends or ())
        self._prefilled: Sequence[int] | None = None
        self._cache = transformers.DynamicCache()

    def answer(self, prompt: Sequence[int], seed: int) -> Response:
        """See `Answerer.answer`. Raises `GenerationError` if memory runs out."""
        try:
            with torch.inference_mode():
                self._prefill(prompt)
                tokens = self._generate(prompt, seed)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            raise GenerationError(
                f"memory ran out on a prompt of {len(prompt)} tokens; shorten it, or use a GGUF"
            ) from error
        ended = bool(tokens) and tokens[-1] in self._ends
        return Response(self._text(tokens[:-1] if ended else tokens), ended, len(tokens))

    def _prefill(self, prompt: Sequence[int]) -> None:
        """Prefill all tokens but the last, as in `LlamaAnswerer`. All responses share the K and V of a prompt."""
        before, self._prefilled = self._prefilled, None  # after an error, the cache is unknown
        count = len(prompt) - 1 if before == prompt else reusable(before, prompt, _STEP)
        if count == 0:
            self._cache = transformers.DynamicCache()
        elif (more := self._cache.get_seq_length() - count) > 0:
            self._cache.crop(-more)  # all versions of transformers accept a negative number
        for start in range(count, len(prompt) - 1, _STEP):
            tokens = self._tensor(prompt[start : min(start + _STEP, len(prompt) - 1)])
            self._model(input_ids=tokens, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._prefilled = prompt

    def _generate(self, prompt: Sequence[int], seed: int) -> list[int]:
        tokens = self._tensor(prompt)
        torch.manual_seed(seed)
        with quiet():
            found = self._model.generate(
                input_ids=tokens, attention_mask=torch.ones_like(tokens), past_key_values=self._cache
            )
        return found[0, len(prompt) :].tolist()

    def _tensor(self, tokens: Sequence[int]) -> torch.Tensor:
        """The tokens as a tensor [1, tokens] on the model's device."""
        return torch.tensor([list(tokens)], device=self._model.device)

    def _text(self, tokens: Sequence[int]) -> str:
        # Some tokenizers drop the space before the first word of a text. So an anchor is put first and then cut off.
        anchor = self._tokenizer("a", add_special_tokens=False)["input_ids"]
        return self._decoded([*anchor, *tokens])[len(self._decoded(anchor)) :]

    def _decoded(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def close(self) -> None:
        self._model = self._cache = None


def _set(settings: Any, eos: int | None, max_tokens: int, sampling: Mapping[str, Any]) -> None:
    """Change a model's generation config to our settings. eos: the end token if the config has none."""
    if settings.eos_token_id is None:
        settings.eos_token_id = eos
    if settings.pad_token_id is None:
        settings.pad_token_id = 0  # unused with one sequence, but required
    settings.max_new_tokens, settings.use_cache = max_tokens, True
    settings.do_sample = sampling["temperature"] > 0
    drawn = {"min_p": _MIN_P, **sampling} if settings.do_sample else dict.fromkeys(("min_p", *sampling))
    for name, value in drawn.items():
        setattr(settings, name, value)
