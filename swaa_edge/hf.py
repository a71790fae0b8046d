"""SWAA for models in transformers, to train a model or to try a recipe.

Importing this module registers the attention "swaa" with transformers. A forward pass then uses the engine's masks.

    model = AutoModelForCausalLM.from_pretrained("Qwen3-4B")
    hf.apply(model, SwaaConfig.from_recipe("quality"))
    model(input_ids, attention_mask=mask, labels=labels, decode_mask=hf.decode_mask([812, 640], mask))
    model.generate(input_ids, attention_mask=mask)

Prompt tokens see a sliding window. Under FA decode, generated tokens see every earlier token. `decode_mask`, bool
[batch, tokens], marks the generated tokens. The model's `forward` must pass keyword arguments on to the attention.
Without `decode_mask`, the engine's rule applies: a single token after cached tokens is decode, and all other tokens are
prefill. So `decode_mask` is needed to train under FA decode, and to verify several drafted tokens in one pass.

A tail of T tokens (`SwaaConfig.tail_count`) needs no further argument. With `decode_mask`, the tail is the T tokens
before each generated token. Without `decode_mask`, a pass of several tokens counts as one turn, and the tail is the
last T tokens of each sequence. If a prompt takes several passes, give all passes but the last a `decode_mask` that is
False everywhere.

On a GPU, torch's flex attention is used. The memory for flex attention's block mask does not grow with the square of
the length. Elsewhere, torch's scaled dot-product attention is used, with a bool mask [batch, 1, queries, keys] for each
kind of layer. There are at most three kinds. A mask takes 1 byte per pair of query and key. A running layer takes 4
more bytes per pair.

Padding may be on either side. Packed sequences are supported: `position_ids` that restart, without attention_mask.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import and_masks, causal_mask_function, flex_attention_mask, sdpa_mask

from swaa_edge.config import SwaaConfig
from swaa_edge.errors import ConfigError, UnsupportedModelError
from swaa_edge.files.lora_training import read_training

#: Names of the attention in transformers. True selects flex attention, and None chooses by the device.
ATTENTION: dict[str, bool | None] = {"swaa": None, "swaa_sdpa": False, "swaa_flex": True}


def apply(model: PreTrainedModel, config: SwaaConfig | None, *, attention: str = "swaa") -> None:
    """Switch the attention of `model` to `config`, or back to full attention if `config` is None.

    The settings are stored in `model.config.swaa`, which `save_pretrained` saves. Load a saved model with
    attn_implementation="swaa".

    attention: one of the names in `ATTENTION`.

    Raises `UnsupportedModelError` if the model has sliding windows of its own, or doesn't use transformers' attention
    interface. Raises `ConfigError` if `attention` is unknown, or if the settings name a layer that the model lacks.
    """
    text = model.config.get_text_config()
    if config is None:
        model.set_attn_implementation("sdpa")
        text.swaa = None
        return
    if attention not in ATTENTION:
        raise ConfigError(f"attention = {attention} must be one of {', '.join(ATTENTION)}")
    _check_model(model, text)
    config.fa_decode_layers(text.num_hidden_layers)
    text.swaa = config.to_dict()
    model.set_attn_implementation(attention)
    if text._attn_implementation != attention:
        raise UnsupportedModelError(f"{type(model).__name__} does not use transformers' attention interface")


def applied(model: PreTrainedModel) -> SwaaConfig | None:
    """Return the settings that `model` runs under, or None for full attention."""
    text = model.config.get_text_config()
    held = getattr(text, "swaa", None)
    return SwaaConfig.from_dict(held) if held and text._attn_implementation in ATTENTION else None


def load_adapter(model: PreTrainedModel, folder: str | os.PathLike[str]) -> Any:
    """Load the LoRA adapter in `folder` and apply the adapter's recipe. Return a PeftModel.

    An adapter without a recipe leaves the attention unchanged.

    Raises `ConfigError` if `model` runs under another recipe. Raises `UnsupportedModelError` if the adapter's base
    model has another number of layers. Raises `ModelFileError` if the folder is damaged.
    """
    import peft

    training, count = read_training(folder), model.config.get_text_config().num_hidden_layers
    if training is not None:
        if training.base.n_layers != count:
            raise UnsupportedModelError(
                f"{os.fspath(folder)} is for {training.base.name} with {training.base.n_layers} layers, but the model "
                f"has {count}"
            )
        current = applied(model)
        if current is None:
            apply(model, training.swaa)
        else:
            training.check_recipe(current, os.fspath(folder))
    return peft.PeftModel.from_pretrained(model, os.fspath(folder))


def decode_mask(prompt_lengths: Sequence[int], attention_mask: torch.Tensor) -> torch.Tensor:
    """Mark the generated tokens of a batch. Each sequence must be one prompt followed by one answer.

    prompt_lengths: number of tokens of each prompt, without padding.
    attention_mask: [batch, tokens], 0 at padding on either side.

    Returns bool [batch, tokens]. Raises `ConfigError` if the prompt lengths don't fit the sequences.
    """
    real = attention_mask.bool()
    lengths = torch.as_tensor(prompt_lengths, device=real.device)
    if lengths.shape != real.shape[:1]:
        raise ConfigError(
            f"there are {len(prompt_lengths)} prompt lengths for {len(real)} sequences; give one for each"
        )
    counts = real.sum(-1)
    if bool(((lengths < 0) | (lengths > counts)).any()):
        row = int(((lengths < 0) | (lengths > counts)).nonzero()[0])
        raise ConfigError(f"prompt length {int(lengths[row])} of sequence {row} must be from 0 to {int(counts[row])}")
    return real & (real.cumsum(-1) > lengths[:, None])


@dataclasses.dataclass(eq=False)
class _BatchMask:
    """Builds the masks of one forward pass. transformers passes this object to every layer as the mask.

    The first layer of each kind builds a mask, and the other layers of the kind share the mask.
    """

    swaa: SwaaConfig
    #: One per layer.
    sliding: list[bool]
    fa_decode: list[bool]
    flex: bool
    #: Arguments for transformers' own mask functions.
    arguments: dict[str, Any]
    #: Key index of each sequence's first token, [batch]. None without padding: position_ids then give the index.
    first: torch.Tensor | None
    #: Masks by kind of layer: (the layer slides, some tokens decode with full attention).
    masks: dict[tuple[bool, bool], Any] = dataclasses.field(default_factory=dict)
    # transformers leaves a mask of four dimensions unchanged.
    ndim = 4

    def to(self, *args: Any, **kwargs: Any) -> _BatchMask:
        """Return this object unchanged. `swaa_attention` moves each mask to the layer's device."""
        return self

    def of_layer(self, layer: int, decode: torch.Tensor | None, positions: torch.Tensor | None) -> Any:
        """Return the mask of a layer: a flex block mask, or bool [batch, 1, queries, keys].

        decode: bool [batch, queries], true for generated tokens.
        positions: position_ids [batch or 1, queries].
        """
        slides = self.sliding[layer]
        kind = (slides, self.fa_decode[layer] and (decode is not None or self.swaa.tail_count > 0))
        if kind not in self.masks:
            mask_function = self.arguments["mask_function"]
            if slides:
                seeing = self._with_tail(decode, positions) if kind[1] else None
                mask_function = and_masks(mask_function, self._window(seeing, positions))
            make = flex_attention_mask if self.flex else sdpa_mask
            options = {"mask_function": mask_function, "allow_is_causal_skip": False, "use_vmap": False}
            self.masks[kind] = make(**self.arguments | options)
        return self.masks[kind]

    def _window(self, decode: torch.Tensor | None, positions: torch.Tensor | None) -> Callable[..., torch.Tensor]:
        """Return the mask function of a sliding layer. The function's indices include cached tokens."""
        window, sinks, offset = self.swaa.window_size, self.swaa.sink_count, self.arguments["q_offset"]
        start = self._start(positions)

        def visible(batch: Any, head: Any, query: Any, key: Any) -> Any:
            # Computing `query - key` would take eight bytes per pair. This comparison takes one.
            near = key > query - window
            sink = key < start[batch, query - offset] + sinks
            return near | sink if decode is None else near | sink | decode[batch, query - offset]

        return visible

    def _start(self, positions: torch.Tensor | None) -> torch.Tensor:
        """Return the key index of the first token in each query's sequence, [batch, queries]."""
        shape = (self.arguments["batch_size"], self.arguments["q_length"])
        index = torch.arange(shape[1], device=self.arguments["device"]) + self.arguments["q_offset"]
        if self.first is not None:
            return self.first[:, None].expand(shape).contiguous()
        if positions is None or positions.ndim != 2:
            return torch.zeros(shape, dtype=index.dtype, device=index.device)
        return (index - positions).expand(shape).contiguous()

    def _with_tail(self, decode: torch.Tensor | None, positions: torch.Tensor | None) -> torch.Tensor | None:
        """Mark the generated tokens (`decode`) and the tail, the last T tokens of each prompt."""
        if self.swaa.tail_count == 0:
            return decode
        start, offset = self._start(positions), self.arguments["q_offset"]
        # True at the last token of each sequence, and where padding begins or ends.
        ends = start.diff(append=start[:, -1:] + 1).bool()
        if self.first is not None:
            real = self.arguments["attention_mask"][:, offset : offset + start.shape[1]].bool()
            ends[:, :-1] |= real.diff()
        # True at the last token before each generated token. Without `decode`, at the last token of each sequence.
        last = ends if decode is None else decode.roll(-1, 1) & ~ends
        index = torch.arange(start.shape[1], device=start.device).expand_as(start)
        # For each token, the nearest index from there on that is True in `last` or `ends`.
        near = index.masked_fill(~(last | ends), start.shape[1]).flip(1).cummin(1).values.flip(1)
        tail = last.gather(1, near) & (near - index < self.swaa.tail_count)
        return tail if decode is None else tail | decode


def swaa_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Any = None,
    device: torch.device | str = "cpu",
    config: Any = None,
    **_: Any,
) -> Any:
    """Mask function for transformers. Returns a `_BatchMask`, which builds the actual mask of each layer later.

    attention_mask: [batch, tokens], 0 at padding, or None.
    q_offset: number of tokens in the KV cache.
    """
    if isinstance(attention_mask, _BatchMask):
        return attention_mask
    arguments = {
        "batch_size": batch_size,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": q_offset,
        "kv_offset": kv_offset,
        "mask_function": mask_function,
        "attention_mask": attention_mask,
        "device": torch.device(device),
    }
    flex = ATTENTION[config._attn_implementation]
    if flex is None:
        flex = arguments["device"].type == "cuda" and not getattr(config, "attention_dropout", 0)
    padded = attention_mask is not None and not bool(attention_mask.all())
    held = getattr(config, "swaa", None)
    if not held:
        raise ConfigError("the model has no SWAA settings; set them with swaa_edge.hf.apply(model, config)")
    swaa, count = SwaaConfig.from_dict(held), config.num_hidden_layers
    first = attention_mask.int().argmax(-1) if padded else None
    return _BatchMask(swaa, swaa.sliding_layers(count), swaa.fa_decode_layers(count), flex, arguments, first)


def swaa_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    decode_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention function for transformers: torch's attention under the layer's mask.

    query: [batch, heads, queries, head_dim].
    key, value: [batch, kv_heads, keys, head_dim].
    decode_mask: bool [batch, queries].

    Returns the output [batch, queries, heads, head_dim], and None in place of the attention weights.

    Raises `ConfigError` if the caller gave a finished mask, or if `decode_mask` has the wrong shape. Training under FA
    decode without `decode_mask` also raises `ConfigError`.
    """
    if not isinstance(attention_mask, _BatchMask):
        raise ConfigError("SWAA builds its own masks; give attention_mask as [batch, tokens], 0 at padding, or None")
    batch, length = query.shape[0], query.shape[2]
    fa_decode = attention_mask.fa_decode[module.layer_idx]
    if decode_mask is not None:
        if decode_mask.shape != (batch, length):
            shape = tuple(decode_mask.shape)
            raise ConfigError(f"decode_mask is {shape}, but the tokens are {(batch, length)}; give one bool per token")
        decode = decode_mask.to(query.device, torch.bool)
    elif length == 1 and attention_mask.arguments["kv_length"] > 1:
        decode = torch.ones(batch, 1, dtype=torch.bool, device=query.device)
    elif module.training and fa_decode:
        raise ConfigError(
            "training under FA decode needs decode_mask, which marks the tokens of the answers: "
            "give it to the model as bool [batch, tokens]"
        )
    else:
        decode = None
    mask = attention_mask.of_layer(module.layer_idx, decode, position_ids)
    if query.device != attention_mask.arguments["device"]:
        mask = mask.to(query.device)
    attend = flex_attention_forward if attention_mask.flex else sdpa_attention_forward
    return attend(module, query, key, value, mask, **kwargs)


def _check_model(model: PreTrainedModel, text: Any) -> None:
    name = type(model).__name__
    own = [kind for kind in getattr(text, "layer_types", None) or () if kind != "full_attention"]
    if own or (getattr(text, "sliding_window", None) and getattr(text, "use_sliding_window", True)):
        what = f"layers of the type {own[0]}" if own else f"sliding_window = {text.sliding_window}"
        raise UnsupportedModelError(
            f"{name} has {what} of its own; SWAA is for models with full attention "
            "(to try this model without its windows, set that field to null in config.json)"
        )
    if not getattr(model, "_supports_attention_backend", False):
        raise UnsupportedModelError(
            f"{name} does not use transformers' attention interface; use a model whose code is part of transformers"
        )


for _name in ATTENTION:
    AttentionInterface.register(_name, swaa_attention)
    AttentionMaskInterface.register(_name, swaa_mask)
