"""`Answerer` by transformers, on the folder of a Hugging Face model as it is: no GGUF, no change to its code.

For machines with a GPU, and for models that were not converted yet. Importing this module imports torch.

    prompts = HfPrompts("Qwen3-4B"); tokens = prompts.ask(document, question)
    answerer = HfAnswerer("Qwen3-4B", max_tokens=1024, sampling={"temperature": 0.7, "top_p": 0.95, "top_k": 40})
    answerer.answer(tokens, seed=1)
"""

from __future__ import annotations

import contextlib
import os
from array import array
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from swaa_edge.errors import ConfigError, GenerationError, ModelFileError
from swaa_edge.evaluate.prompts import PLAIN_END, asked
from swaa_edge.finetune.answerers import Answer, reusable

try:
    import torch
    import transformers

    from swaa_edge.finetune.memory import out_of_memory
except ImportError as error:
    raise ConfigError(f"the folder of a model needs {error.name}; pip install 'swaa-edge[convert]'") from error

# Prompt tokens computed at once; what a layer needs for the mask and the logits grows with it.
_STEP = 1024
# As llama_cpp does where it isn't told.
_MIN_P = 0.05


class HfPrompts:
    """Writes prompts for the model in `folder` by its own tokenizer and chat template, as `Prompts` does for a GGUF.

    chat=False, or no template: plain text. What looks like a special token in a document is text, if transformers is
    new enough to know of that. Raises `ModelFileError` if the tokenizer can't be read.
    """

    def __init__(self, folder: str | os.PathLike[str], *, chat: bool = True) -> None:
        self._folder, self._tokenizer = os.fspath(folder), _tokenizer(folder)
        #: Whether a chat template is in use.
        self.chat = chat and self._tokenizer.chat_template is not None

    def __enter__(self) -> HfPrompts:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def ask(self, document: str, question: str) -> array[int]:
        """The prompt that asks `question` about `document`, as tokens. Raises `ModelFileError`."""
        content = asked(document, question)
        if not self.chat:
            return array("i", self._tokenizer(content + PLAIN_END, split_special_tokens=True)["input_ids"])
        try:
            tokens = self._tokenizer.apply_chat_template(
                [{"role": "user", "content": content}],
                add_generation_prompt=True,
                return_dict=False,
                sanitize_control_tokens=True,  # older versions hand this on to the template, which ignores it
            )
        except Exception as error:  # of whatever class the template, which is a program, raises
            raise ModelFileError(f"{self._folder}: its chat template fails ({_line(error)}); use --no-chat") from error
        return array("i", tokens)


class HfAnswerer:
    """`Answerer` by `generate` of the model in `folder`, on the accelerator that torch finds, or the CPU.

    sampling: temperature (0: greedy), top_p and top_k. All else that the model's own generation_config.json says of
    sampling, such as a repetition penalty, holds. threads: of the CPU; None leaves that to torch. Each answer seeds
    torch's generators.

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
        self._tokenizer = _tokenizer(folder)
        with _quiet(), _readable(folder):
            model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True)
            accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
            self._model = model.to(accelerator or "cpu").eval()
        # Settings that are handed to generate() would be mixed with these once more.
        settings = self._model.generation_config
        _set(settings, self._tokenizer.eos_token_id, max_tokens, sampling)
        ends = settings.eos_token_id
        self._ends = {ends} if isinstance(ends, int) else set(ends or ())
        self._read: Sequence[int] | None = None
        self._cache = transformers.DynamicCache()

    def answer(self, prompt: Sequence[int], seed: int) -> Answer:
        """As `Answerer`. Raises `GenerationError` if the memory doesn't suffice."""
        try:
            with torch.inference_mode():
                self._read_all_but_last(prompt)
                tokens = self._generate(prompt, seed)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            what = f"a prompt of {len(prompt)} tokens takes more memory than there is; shorten it, or take a GGUF"
            raise GenerationError(what) from error
        ended = bool(tokens) and tokens[-1] in self._ends
        return Answer(self._text(tokens[:-1] if ended else tokens), ended, len(tokens))

    def _read_all_but_last(self, prompt: Sequence[int]) -> None:
        """As `LlamaAnswerer` does, so that K and V of the prompt serve all its replies."""
        before, self._read = self._read, None  # until it is true again
        count = len(prompt) - 1 if before == prompt else reusable(before, prompt, _STEP)
        if count == 0:
            self._cache = transformers.DynamicCache()
        elif (more := self._cache.get_seq_length() - count) > 0:
            self._cache.crop(-more)  # how many go is what all versions of transformers take
        for start in range(count, len(prompt) - 1, _STEP):
            tokens = self._tensor(prompt[start : min(start + _STEP, len(prompt) - 1)])
            self._model(input_ids=tokens, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._read = prompt

    def _generate(self, prompt: Sequence[int], seed: int) -> list[int]:
        tokens = self._tensor(prompt)
        torch.manual_seed(seed)
        with _quiet():
            found = self._model.generate(
                input_ids=tokens, attention_mask=torch.ones_like(tokens), past_key_values=self._cache
            )
        return found[0, len(prompt) :].tolist()

    def _tensor(self, tokens: Sequence[int]) -> torch.Tensor:
        """[1, tokens], on the model's device."""
        return torch.tensor([list(tokens)], device=self._model.device)

    def _text(self, tokens: Sequence[int]) -> str:
        # Some tokenizers leave out the space before a text's first word. So this isn't the first.
        anchor = self._tokenizer("a", add_special_tokens=False)["input_ids"]
        return self._decoded([*anchor, *tokens])[len(self._decoded(anchor)) :]

    def _decoded(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def close(self) -> None:
        self._model = self._cache = None


def context_of(folder: str | os.PathLike[str]) -> int | None:
    """Tokens that the model in `folder` was trained for; None if it doesn't say. Raises `ModelFileError`."""
    with _quiet(), _readable(folder):
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def _tokenizer(folder: str | os.PathLike[str]) -> Any:
    with _quiet(), _readable(folder):
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _set(settings: Any, eos: int | None, max_tokens: int, sampling: Mapping[str, Any]) -> None:
    """Put ours into a model's own settings. eos: what ends a reply where they don't say."""
    if settings.eos_token_id is None:
        settings.eos_token_id = eos
    if settings.pad_token_id is None:
        settings.pad_token_id = 0  # unused with one sequence, but asked for
    settings.max_new_tokens, settings.use_cache = max_tokens, True
    settings.do_sample = sampling["temperature"] > 0
    drawn = {"min_p": _MIN_P, **sampling} if settings.do_sample else dict.fromkeys(("min_p", *sampling))
    for name, value in drawn.items():
        setattr(settings, name, value)


@contextlib.contextmanager
def _readable(folder: str | os.PathLike[str]) -> Iterator[None]:
    """What transformers raises for a folder that it can't load, in one line."""
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, RuntimeError, ImportError) as error:
        raise ModelFileError(f"transformers can't load {os.fspath(folder)}: {_line(error)}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars and advice, which would go between our own lines."""
    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()


def _line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."
