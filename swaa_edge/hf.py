"""SWAA in transformers, through its own attention interface: for training, and to try a recipe on a checkpoint.

Importing this module registers the attention "swaa". A forward pass sees what the engine's prefill and decode see.

    model = AutoModelForCausalLM.from_pretrained("Qwen3-4B")
    hf.apply(model, SwaaConfig.from_recipe("quality"))
    model(input_ids, attention_mask=mask, labels=labels, decode_mask=hf.decode_mask([812, 640], mask))
    model.generate(input_ids, attention_mask=mask)

What slides is known per token: a prompt's queries do, and under FA decode those of generated tokens see everything.
`decode_mask`, a bool per token [batch, tokens], says which tokens were generated; every model whose forward hands
keyword arguments on to its attention takes it. Without it, one token after a KV cache is a generated one and all else
is prompt, as in the engine; so it is needed to train under FA decode, and to verify several drafted tokens at once.

On a GPU the attention is torch's flex attention with a block mask, whose memory does not grow with the square of the
length. Elsewhere it is torch's scaled dot-product attention with a boolean mask of [batch, 1, queries, keys] for each
kind of layer there is, up to three: 1 byte per pair, and 4 more per pair in the layer that is at work.
Padding on either side and packed sequences (`position_ids` that start again, no attention_mask) are right in both.
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

#: By the name that transformers knows it by, whether flex attention is used; None leaves it to the device.
ATTENTION: dict[str, bool | None] = {"swaa": None, "swaa_sdpa": False, "swaa_flex": True}


def apply(model: PreTrainedModel, config: SwaaConfig | None, *, attention: str = "swaa") -> None:
    """Let `model` attend under `config` from now on; None takes it back to transformers' own full attention.

    The settings stand in `model.config.swaa`, so that `save_pretrained` keeps them and a checkpoint that has them can
    be loaded with attn_implementation="swaa". attention: one of `ATTENTION`.

    Raises `UnsupportedModelError` for a model with windows of its own or that doesn't use the attention interface,
    `ConfigError` if the settings name a layer that it doesn't have.
    """
    text = model.config.get_text_config()
    if config is None:
        model.set_attn_implementation("sdpa")
        text.swaa = None
        return
    if attention not in ATTENTION:
        raise ConfigError(f"there is no attention {attention}; there are {', '.join(ATTENTION)}")
    _check_model(model, text)
    config.fa_decode_layers(text.num_hidden_layers)
    text.swaa = config.to_dict()
    model.set_attn_implementation(attention)
    if text._attn_implementation != attention:
        raise UnsupportedModelError(f"{type(model).__name__} does not use transformers' attention interface")


def applied(model: PreTrainedModel) -> SwaaConfig | None:
    """The settings that `model` attends under; None for full attention."""
    text = model.config.get_text_config()
    held = getattr(text, "swaa", None)
    return SwaaConfig.from_dict(held) if held and text._attn_implementation in ATTENTION else None


def load_adapter(model: PreTrainedModel, folder: str | os.PathLike[str]) -> Any:
    """`model` with the LoRA adapter in `folder`, attending under the recipe that it was trained under; a PeftModel.

    An adapter that says nothing of a recipe changes nothing about the attention. Raises `ConfigError` if `model` was
    given another recipe, `UnsupportedModelError` if it has another number of layers, `ModelFileError` if the folder is
    damaged.
    """
    import peft

    training, count = read_training(folder), model.config.get_text_config().num_hidden_layers
    if training is not None:
        if training.base.n_layers != count:
            raise UnsupportedModelError(
                f"{os.fspath(folder)} is for {training.base.name}, of {training.base.n_layers} layers; the model has "
                f"{count}"
            )
        current = applied(model)
        if current is None:
            apply(model, training.swaa)
        else:
            training.check_recipe(current, os.fspath(folder))
    return peft.PeftModel.from_pretrained(model, os.fspath(folder))


def decode_mask(prompt_lengths: Sequence[int], attention_mask: torch.Tensor) -> torch.Tensor:
    """Which tokens of a batch were generated: those behind the prompt, if each sequence is one prompt and one answer.

    prompt_lengths: tokens of each prompt, without padding. attention_mask: [batch, tokens], 0 at padding on either
    side. Returns bool [batch, tokens]. Raises `ConfigError` for a length that the sequence doesn't have.
    """
    real = attention_mask.bool()
    lengths = torch.as_tensor(prompt_lengths, device=real.device)
    if lengths.shape != real.shape[:1]:
        raise ConfigError(f"{len(prompt_lengths)} prompt lengths for a batch of {len(real)}; give one per sequence")
    counts = real.sum(-1)
    if bool(((lengths < 0) | (lengths > counts)).any()):
        row = int(((lengths < 0) | (lengths > counts)).nonzero()[0])
        raise ConfigError(f"prompt length {int(lengths[row])} of sequence {row} must be from 0 to {int(counts[row])}")
    return real & (real.cumsum(-1) > lengths[:, None])


@dataclasses.dataclass(frozen=True)
class _Rule:
    """The settings, a flag per layer."""

    window: int
    sinks: int
    sliding: list[bool]
    fa_decode: list[bool]

    @classmethod
    def of(cls, config: Any) -> _Rule:
        held = getattr(config, "swaa", None)
        if not held:
            raise ConfigError("the model has no SWAA settings; give it some with swaa_edge.hf.apply(model, config)")
        swaa, count = SwaaConfig.from_dict(held), config.num_hidden_layers
        return cls(swaa.window_size, swaa.sink_count, swaa.sliding_layers(count), swaa.fa_decode_layers(count))


@dataclasses.dataclass(eq=False)
class _BatchMask:
    """What goes from transformers' mask function to each layer's attention: all that its mask is made from.

    Layers of one kind share a mask, made by the first of them; so it takes one object for the whole forward pass.
    """

    rule: _Rule
    flex: bool
    #: Arguments for transformers' own mask functions.
    asked: dict[str, Any]
    #: Key index of each sequence's first token, [batch]; None without padding, where position_ids tell.
    first: torch.Tensor | None
    made: dict[tuple[bool, bool], Any] = dataclasses.field(default_factory=dict)
    # transformers takes a mask of four dimensions for one that needs no more work.
    ndim = 4

    def to(self, *args: Any, **kwargs: Any) -> _BatchMask:
        """Itself: a model that is spread over devices moves the mask that a layer made, when it uses it."""
        return self

    def of_layer(self, layer: int, decode: torch.Tensor | None, positions: torch.Tensor | None) -> Any:
        slides = self.rule.sliding[layer]
        kind = (slides, slides and self.rule.fa_decode[layer] and decode is not None)
        if kind not in self.made:
            mask_function = self.asked["mask_function"]
            if slides:
                mask_function = and_masks(mask_function, self._window(decode if kind[1] else None, positions))
            make = flex_attention_mask if self.flex else sdpa_mask
            options = self.asked | {"mask_function": mask_function, "allow_is_causal_skip": False, "use_vmap": False}
            self.made[kind] = make(**options)
        return self.made[kind]

    def _window(self, decode: torch.Tensor | None, positions: torch.Tensor | None) -> Callable[..., torch.Tensor]:
        """The rule of a sliding layer, in the form of transformers' mask functions: indices count from the cache's."""
        window, sinks, offset = self.rule.window, self.rule.sinks, self.asked["q_offset"]
        start = self._start(positions)

        def seen(batch: Any, head: Any, query: Any, key: Any) -> Any:
            # Differences of all pairs would take eight bytes each; these compare what is there per query and per key.
            near = key > query - window
            sink = key < start[batch, query - offset] + sinks
            return near | sink if decode is None else near | sink | decode[batch, query - offset]

        return seen

    def _start(self, positions: torch.Tensor | None) -> torch.Tensor:
        """Key index of the first token of each query's sequence, [batch, queries]."""
        shape = (self.asked["batch_size"], self.asked["q_length"])
        index = torch.arange(shape[1], device=self.asked["device"]) + self.asked["q_offset"]
        if self.first is not None:
            return self.first[:, None].expand(shape).contiguous()
        if positions is None or positions.ndim != 2:
            return torch.zeros(shape, dtype=index.dtype, device=index.device)
        return (index - positions).expand(shape).contiguous()


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
    """transformers' mask function for `ATTENTION`; the masks themselves are made per layer, by `swaa_attention`."""
    if isinstance(attention_mask, _BatchMask):
        return attention_mask
    asked = {
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
        flex = asked["device"].type == "cuda" and not getattr(config, "attention_dropout", 0)
    padded = attention_mask is not None and not bool(attention_mask.all())
    return _BatchMask(_Rule.of(config), flex, asked, attention_mask.int().argmax(-1) if padded else None)


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
    """transformers' attention function for `ATTENTION`: torch's own, under the mask of the module's layer.

    query [B, H, Q, D]; key, value [B, H_kv, K, D]; decode_mask bool [B, Q]. Returns [B, Q, H, D] and no weights.
    Raises `ConfigError` where a mask of the caller's own or a missing `decode_mask` would make it silently wrong.
    """
    if not isinstance(attention_mask, _BatchMask):
        raise ConfigError("SWAA makes its masks itself; give attention_mask as [batch, tokens], 0 at padding, or None")
    batch, length = query.shape[0], query.shape[2]
    fa_decode = attention_mask.rule.fa_decode[module.layer_idx]
    if decode_mask is not None:
        if decode_mask.shape != (batch, length):
            shape = tuple(decode_mask.shape)
            raise ConfigError(f"decode_mask is {shape}, but the tokens are {(batch, length)}; give a bool per token")
        decode = decode_mask.to(query.device, torch.bool)
    elif length == 1 and attention_mask.asked["kv_length"] > 1:
        decode = torch.ones(batch, 1, dtype=torch.bool, device=query.device)
    elif module.training and fa_decode:
        raise ConfigError(
            "training under FA decode needs to know which tokens are the answer's: give the model decode_mask, "
            "a bool per token [batch, tokens]"
        )
    else:
        decode = None
    mask = attention_mask.of_layer(module.layer_idx, decode, position_ids)
    if query.device != attention_mask.asked["device"]:
        mask = mask.to(query.device)
    attend = flex_attention_forward if attention_mask.flex else sdpa_attention_forward
    return attend(module, query, key, value, mask, **kwargs)


def _check_model(model: PreTrainedModel, text: Any) -> None:
    name = type(model).__name__
    own = [kind for kind in getattr(text, "layer_types", None) or () if kind != "full_attention"]
    if own or (getattr(text, "sliding_window", None) and getattr(text, "use_sliding_window", True)):
        what = f"layers of the type {own[0]}" if own else f"sliding_window = {text.sliding_window}"
        raise UnsupportedModelError(
            f"{name} has {what} of its own; SWAA slides models of full attention (set it to null in config.json to "
            "try this one without)"
        )
    if not getattr(model, "_supports_attention_backend", False):
        raise UnsupportedModelError(
            f"{name} does not use transformers' attention interface; use a model whose code comes with transformers"
        )


for _name in ATTENTION:
    AttentionInterface.register(_name, swaa_attention)
    AttentionMaskInterface.register(_name, swaa_mask)
