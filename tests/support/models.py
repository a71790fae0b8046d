"""Tiny Hugging Face models with random weights, for the tests to convert, load and compare.

Downloading a model in a test is slow and may fail; these are made in a second from a seed, for every
architecture family under test, with a real (trained) byte-level BPE tokenizer.

    model = tiny_model("qwen3", seed=1, layers=4); save_model(model, tokenizer_for("qwen3"), folder)

Weights. With Hugging Face's own initialisation (std 0.02) attention is nearly uniform: a mask that is wrong
by one key would change nothing visible to a test. Here every linear layer preserves its input's scale
(std = gain / sqrt(fan_in)), and queries and keys have a gain that gives attention scores a standard
deviation of about `peak`, so that each query attends mostly to a few dozen keys out of a thousand. Embeddings
are small, so that the attended tokens weigh as much as the token itself. Norm weights and biases are random
too, so that a converter that drops one is noticed. All values are rounded to float16, so a float16 GGUF file has
exactly the weights of a float32 one.
"""

import dataclasses
import functools
import io
import math
import pydoc_data.topics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

# GLM's converter asks for "[gMASK]" and the two chat roles by name; the others are ChatML's.
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "[gMASK]", "<|user|>", "<|observation|>")
VOCAB_SIZE = 768
# llama.cpp's name for the pre-tokenizer of `tiny_tokenizer`, which its converter cannot recognize.
PRE_TOKENIZER = "gpt-2"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@dataclasses.dataclass(frozen=True)
class Family:
    """How a tiny model of one architecture is built: transformers' class names start with `prefix`."""

    prefix: str
    config: Mapping[str, Any]
    sentencepiece: bool = False  # upstream's converter only accepts a `tokenizer.model` for it


def _dims(heads: int, kv_heads: int, hidden: int = 256, ff: int = 512, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": ff,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    } | more


_MOE = {"num_experts_per_tok": 2, "router_aux_loss_coef": 0.0}

# Together they cover head sizes 64, 80, 96, 128 and 256, GQA ratios 1 to 4, head_dim other than hidden / heads, head
# counts that are not powers of two, biases, fused QKV, QK norms, partial rotary embeddings, layers without any, scalar
# multipliers, post-norms, LayerNorm, parallel residuals, tied embeddings, mixtures of experts.
FAMILIES: dict[str, Family] = {
    "llama": Family("Llama", _dims(4, 2)),
    "mistral": Family("Mistral", _dims(4, 1, head_dim=128, sliding_window=None)),
    "qwen2": Family("Qwen2", _dims(6, 2, hidden=384, tie_word_embeddings=True)),
    "qwen3": Family("Qwen3", _dims(4, 2, head_dim=128, tie_word_embeddings=True)),
    "qwen3moe": Family(
        "Qwen3Moe", _dims(4, 1, head_dim=64, num_experts=8, moe_intermediate_size=128, norm_topk_prob=True, **_MOE)
    ),
    "phi3": Family("Phi3", _dims(4, 2, hidden=384, sliding_window=None, original_max_position_embeddings=8192), True),
    "granite": Family(
        "Granite",
        _dims(4, 2, embedding_multiplier=6.0, attention_multiplier=0.1, residual_multiplier=0.6, logits_scaling=2.0),
    ),
    "olmo2": Family("Olmo2", _dims(4, 4)),
    "gemma": Family("Gemma", _dims(2, 1, head_dim=256, tie_word_embeddings=True), True),
    "glm4": Family("Glm4", _dims(4, 2, head_dim=64, partial_rotary_factor=0.5)),
    "stablelm": Family("StableLm", _dims(5, 5, hidden=400, partial_rotary_factor=0.4)),
    "starcoder2": Family("Starcoder2", _dims(4, 2, sliding_window=None, use_bias=True)),
    "smollm3": Family("SmolLM3", _dims(4, 1, no_rope_layer_interval=4)),  # llama.cpp assumes 4
    "mixtral": Family("Mixtral", _dims(4, 2, num_local_experts=4, sliding_window=None, **_MOE)),
}


def tiny_model(
    arch: str, seed: int = 0, layers: int = 2, *, peak: float = 2.0, **overrides: Any
) -> transformers.PreTrainedModel:
    """A random model of family `arch` in float32 and evaluation mode; the same arguments give the same weights.

    overrides: fields of its transformers configuration (`num_attention_heads=8`). peak: approximate standard deviation
    of the attention scores. Raises `KeyError` for a family not in `FAMILIES`.
    """
    family = FAMILIES[arch]
    bos, eos = (1, 2) if family.sentencepiece else (0, 0)
    fields = {
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": 8192,
        "num_hidden_layers": layers,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "pad_token_id": eos,
        "tie_word_embeddings": False,
        "attention_dropout": 0.0,
    }
    config = getattr(transformers, f"{family.prefix}Config")(**fields | dict(family.config) | overrides)
    with torch.random.fork_rng():
        # transformers' own initialisation also draws random numbers; all its weights are replaced.
        model = getattr(transformers, f"{family.prefix}ForCausalLM")(config).float().eval()
    _randomize(model, seed, peak)
    return model


def _randomize(model: transformers.PreTrainedModel, seed: int, peak: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    kind = model.config.model_type
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            noise = torch.randn(weight.shape, generator=generator)
            role = name.split(".")[-2 if name.endswith((".weight", ".bias")) else -1]
            if name.endswith(".bias"):
                value = 0.1 * noise
            elif "norm" in role:
                # A QK norm undoes the scale of its projection, so it must carry the peak itself.
                scale = math.sqrt(peak) if role in ("q_norm", "k_norm") else 1.0
                value = 0.1 * noise if kind == "gemma" else scale * (1 + 0.2 * noise)
            elif "embed" in role:
                # Gemma scales embeddings by sqrt(hidden) itself.
                value = noise * (1 if kind == "gemma" else 2) / math.sqrt(weight.shape[-1])
            else:
                value = noise * _gain(role, weight, model.config, peak) / math.sqrt(weight.shape[-1])
            weight.copy_(value.half().float())


def _gain(role: str, weight: torch.Tensor, config: transformers.PretrainedConfig, peak: float) -> float | torch.Tensor:
    """The factor on std = 1 / sqrt(fan_in): a number, or a column with one per row for a fused matrix."""
    if role in ("q_proj", "k_proj"):
        return math.sqrt(peak)
    if role == "qkv_proj":
        head = config.hidden_size // config.num_attention_heads
        rows = torch.full((weight.shape[0], 1), math.sqrt(peak))
        rows[-config.num_key_value_heads * head :] = 1.0
        return rows
    return 2.0 if role == "lm_head" else 1.0


@functools.cache
def tiny_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `VOCAB_SIZE` tokens with GPT-2's pre-tokenizer, trained on `sample_text`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample_text(120_000).splitlines(keepends=True), trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


@functools.cache
def tiny_sentencepiece() -> bytes:
    """A SentencePiece model of `VOCAB_SIZE` pieces with byte fallback: the content of a `tokenizer.model`."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sample_text(120_000).splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        byte_fallback=True,
        control_symbols=["<|endoftext|>"],  # llama.cpp looks it up by name in every Phi-3
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def tokenizer_for(arch: str) -> transformers.PreTrainedTokenizerFast | bytes:
    """The tokenizer that upstream's converter expects with a model of family `arch`."""
    return tiny_sentencepiece() if FAMILIES[arch].sentencepiece else tiny_tokenizer()


@functools.cache
def sample_text(length: int) -> str:
    """The first `length` characters of Python's own language reference (shipped for `help()`): real English text."""
    text = "\n".join(text for _, text in sorted(pydoc_data.topics.topics.items()))
    if len(text) < length:
        raise ValueError(f"{length} characters requested, the text has {len(text)}")
    return text[:length]


def save_model(
    model: transformers.PreTrainedModel,
    tokenizer: transformers.PreTrainedTokenizerBase | bytes | None,
    folder: str | Path,
    *,
    max_shard_size: str | int = "5GB",
) -> Path:
    """Write a model directory as Hugging Face hosts it (config, safetensors, tokenizer) to `folder`; return the folder.

    tokenizer: of transformers, the bytes of a SentencePiece model, or None for a model without one.
    """
    folder = Path(folder)
    model.save_pretrained(folder, safe_serialization=True, max_shard_size=max_shard_size)
    if isinstance(tokenizer, bytes):
        (folder / "tokenizer.model").write_bytes(tokenizer)
    elif tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder
