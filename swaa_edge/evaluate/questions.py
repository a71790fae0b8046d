"""The input of a comparison: questions, text for perplexity, and the scorer for responses.

questions = Questions(tasks="needle,own.jsonl", prompt_tokens=4096)
prepared = questions.prepare("model.gguf", context=32768); prepared.samples
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swaa_edge.engine.configurations import like
from swaa_edge.errors import ConfigError, DataFileError
from swaa_edge.evaluate.datafile import check_lengths, read_samples
from swaa_edge.evaluate.facts import STYLES
from swaa_edge.evaluate.run import MAX_TOKENS
from swaa_edge.evaluate.scoring import SCORERS, Scorer, in_order
from swaa_edge.evaluate.tasks import TASKS, TaskSettings, build
from swaa_edge.files.records import read_text
from swaa_edge.support.sample_text import real_text

if TYPE_CHECKING:
    from swaa_edge.evaluate.samples import Sample

BUILT_IN = tuple(TASKS)
PERPLEXITY = "ppl"
JUDGE = "judge"
#: Default length of prompts in tokens. A smaller context lowers the default.
PROMPT_TOKENS = 4096
_DATA = (".jsonl", ".json", ".parquet")


@dataclasses.dataclass(frozen=True)
class Questions:
    """Settings for the questions of a comparison and for the scorer. Sizes are in tokens.

    tasks: names of tasks (`BUILT_IN`, `PERPLEXITY`) and paths of data files, in a list or separated by commas.
    prompt_tokens: prompt lengths of built-in tasks. The largest length is also the length of a perplexity window. By
        default, `PROMPT_TOKENS`, or less if the context is smaller.
    samples: number of questions per built-in task and length. Also the maximum number of windows for perplexity.
    depths, beyond, needles, pairs, hops, seed: as in `TaskSettings`.
    style: style of the answers: direct, spoken or both.
    haystack: text file for the prose of built-in tasks (default: a text that comes with Python).
    max_tokens: maximum length of an answer.
    chat: use the model's chat template in prompts.
    scorer: scorer for questions from files: `JUDGE` or a key of `SCORERS`. Built-in tasks always use `in_order`.
    judge: address of the judge's server.
    judge_model: name of the judge's model.
    limit: maximum number of questions per file.
    skip_long: skip questions from files that exceed the context. If false, such questions are an error.
    text: text file for perplexity (default: the haystack).

    Raises `ConfigError` for an unknown task or an incomplete judge.
    """

    tasks: str | Sequence[str] = BUILT_IN
    prompt_tokens: int | Sequence[int] | None = None
    samples: int = 50
    depths: Sequence[float] | None = (0.0, 0.25, 0.5, 0.75, 1.0)
    style: str = "both"
    beyond: int = 0
    needles: int = 4
    pairs: int = 64
    hops: int = 2
    seed: int = 0
    haystack: str | os.PathLike[str] | None = None
    max_tokens: int = MAX_TOKENS
    chat: bool = True
    scorer: str | None = None
    judge: str | None = None
    judge_model: str | None = None
    limit: int | None = None
    skip_long: bool = False
    text: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        _ = self.names, self.files
        check_judge(self.scorer, self.judge, self.judge_model)

    @functools.cached_property
    def names(self) -> list[str]:
        """The names in `tasks` that are built-in tasks or perplexity."""
        return split_tasks(self.tasks)[0]

    @functools.cached_property
    def files(self) -> list[str]:
        """The data files in `tasks`."""
        return split_tasks(self.tasks)[1]

    def lengths(self, context: int) -> tuple[int, ...]:
        """Return the prompt lengths. Raises `ConfigError` if prompt and answer exceed `context` (0: unknown)."""
        if self.prompt_tokens is None:
            return (min(PROMPT_TOKENS, context - self.max_tokens if context else PROMPT_TOKENS),)
        lengths = (self.prompt_tokens,) if isinstance(self.prompt_tokens, int) else tuple(self.prompt_tokens)
        for length in lengths:
            if context and length + self.max_tokens > context:
                raise ConfigError(
                    f"a prompt of {length} tokens and {self.max_tokens} for the answer exceed the context of {context} "
                    f"tokens; lower --prompt-tokens to {context - self.max_tokens}, or raise --ctx if the model allows"
                )
        return lengths

    def score(self) -> Scorer:
        """Return a scorer for all tasks and files."""
        own = scorer(self.scorer, self.judge, self.judge_model)
        return lambda sample, response: (in_order if sample.task in BUILT_IN else own)(sample, response)

    def prepare(self, model: str | os.PathLike[str], context: int) -> Prepared:
        """Build the prompts for `model`. Only the vocabulary is loaded.

        context: context size in tokens, 0 if unknown.

        Raises `ConfigError`, or `DataFileError` with the file and line of an invalid record.
        """
        from swaa_edge.generate.prompts import Prompts  # opens the library

        lengths = self.lengths(context)
        haystack = real_text() if self.haystack is None else read_text(self.haystack)
        samples: list[Sample] = []
        tokens: list[int] = []
        skipped = 0
        with Prompts(model, chat=self.chat) as prompts:
            if built_in := tuple(name for name in self.names if name != PERPLEXITY):
                samples += build(self._task_settings(built_in, lengths, haystack), prompts)
            for file in self.files:
                found = read_samples(file, prompts, limit=self.limit)
                fit = check_lengths(found, context or 2**31, self.max_tokens, skip_long=self.skip_long)
                skipped += len(found) - len(fit)
                samples += fit
            if PERPLEXITY in self.names:
                tokens = prompts.tokenize(haystack if self.text is None else read_text(self.text))
        if self.scorer == "regex":
            check_patterns(sample for sample in samples if sample.task not in BUILT_IN)
        windows = min(len(tokens) // max(lengths), self.samples)
        if PERPLEXITY in self.names and not windows:
            raise ConfigError(
                f"the text has {len(tokens)} tokens, fewer than a window of {max(lengths)}; lower --prompt-tokens, or "
                "give a longer --text"
            )
        return Prepared(samples, tokens, windows, skipped, lengths, hashlib.sha256(haystack.encode()).hexdigest())

    def _task_settings(self, tasks: tuple[str, ...], lengths: tuple[int, ...], haystack: str) -> TaskSettings:
        depths = None if self.depths is None else tuple(self.depths)
        styles = STYLES if self.style == "both" else (self.style,)
        same = {name: getattr(self, name) for name in ("samples", "seed", "beyond", "needles", "pairs", "hops")}
        return TaskSettings(tasks, lengths, depths=depths, styles=styles, haystack=haystack, **same)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """The questions for one model.

    text: tokens for perplexity.
    windows: number of windows for perplexity, each of `max(lengths)` tokens.
    skipped: number of questions that exceed the context and are left out.
    """

    samples: list[Sample]
    text: list[int]
    windows: int
    skipped: int
    lengths: tuple[int, ...]
    haystack_sha256: str

    def digest(self) -> str:
        """Return a hash of all prompts, all answers and the text for perplexity."""
        found = hashlib.sha256()
        for sample in self.samples:
            found.update(json.dumps([sample.id, sample.answers, sample.question]).encode())
            found.update(sample.prompt.tobytes())
        found.update(json.dumps([self.text, self.lengths if self.text else None]).encode())
        return found.hexdigest()


def split_tasks(tasks: str | Sequence[str]) -> tuple[list[str], list[str]]:
    """Split `Questions.tasks` into task names and file paths. Raises `ConfigError` for an unknown task."""
    values = [tasks] if isinstance(tasks, str) else tasks
    given = [part.strip() for value in values for part in ([value] if os.path.exists(value) else value.split(","))]
    known = [*BUILT_IN, PERPLEXITY]
    chosen = list(dict.fromkeys(filter(None, given)))
    if given and not chosen:
        raise ConfigError(f"the list of tasks is empty; give some of {', '.join(known)}, or a FILE.jsonl")
    chosen = chosen or list(BUILT_IN)
    names = [name for name in chosen if name in known]
    files = [name for name in chosen if name not in known]
    for name in files:
        if not (name.endswith(_DATA) or os.path.exists(name) or os.sep in name):
            listed = ", ".join(known)
            raise ConfigError(f"there is no task {name}{like(name, known)}; there are {listed}, or give a FILE.jsonl")
    labels = [*names, *(Path(name).stem for name in files)]
    if twice := next((name for name in labels if labels.count(name) > 1), None):
        raise ConfigError(f"two tasks have the name {twice}; rename one of the files")
    return names, files


def check_judge(scorer: str | None, judge: str | None, judge_model: str | None) -> None:
    """Raise `ConfigError` if these settings of `Questions` are invalid."""
    if scorer is not None and scorer not in (*SCORERS, JUDGE):
        raise ConfigError(f"there is no scorer {scorer}; there are {', '.join(SCORERS)}, {JUDGE}")
    if (judge is None) != (judge_model is None):
        raise ConfigError("a judge needs both --judge URL and --judge-model NAME")
    if scorer == JUDGE and judge is None:
        raise ConfigError("--scorer judge requires --judge URL and --judge-model NAME")
    if judge and scorer not in (None, JUDGE):
        raise ConfigError(f"--judge works only with --scorer judge, not with --scorer {scorer}")


def scorer(scorer: str | None, judge: str | None, judge_model: str | None) -> Scorer:
    """Return the scorer for questions from files. Call `check_judge` first."""
    from swaa_edge.evaluate.judge import Judge

    return SCORERS[scorer or "contains"] if judge is None else Judge(judge, str(judge_model))


def check_patterns(samples: Iterable[Sample]) -> None:
    """Raise `DataFileError` if an answer is not a valid regular expression."""
    for sample in samples:
        for answer in sample.answers:
            try:
                re.compile(answer)
            except re.error as error:
                where = getattr(sample, "source", sample.id)
                raise DataFileError(f"{where}: answer {answer!r} is not a regular expression: {error}") from None


def settings_of(questions: Questions, prepared: Prepared) -> dict[str, Any]:
    """Return the settings as plain JSON values, for a document."""
    names = ("samples", "style", "beyond", "needles", "pairs", "hops", "max_tokens", "chat", "judge_model")
    return {
        "tasks": [*questions.names, *questions.files],
        "lengths": list(prepared.lengths),
        "depths": None if questions.depths is None else list(questions.depths),
        **{name: getattr(questions, name) for name in names},
        "scorer": questions.scorer or (JUDGE if questions.judge else "contains"),
        "skipped": prepared.skipped,
    }
