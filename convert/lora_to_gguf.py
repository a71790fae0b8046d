"""Makes a GGUF adapter of a LoRA that PEFT saved: a small file that llama.cpp adds to its base model while it runs.

The conversion is llama.cpp's own, which copies `lora_alpha` as it stands, and llama.cpp scales by alpha / rank whatever
the adapter says. So what scales otherwise is given the alpha that comes to the same, and what llama.cpp has no way to
compute is refused, instead of a file that is silently another fine-tune.

    convert_adapter("Qwen3-4B", "my-adapter", "my-adapter.gguf")     # SwaaLlama("qwen3-4b.gguf", lora_path=...)
"""

import contextlib
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from swaa_edge.config import SwaaConfig
from swaa_edge.convert import child, hf
from swaa_edge.convert.annotate import annotate
from swaa_edge.convert.hf_folder import read_checkpoint, weight_table
from swaa_edge.convert.lora_merge import Adapter, read_adapter
from swaa_edge.convert.upstream import upstream_scripts
from swaa_edge.errors import ConfigError, ModelFileError, UnsupportedModelError
from swaa_edge.support.atomic import atomic_output

_MATRICES = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")
# PEFT's options under which an adapter is more, or something else, than W + scale * B A for each weight matrix.
_BEYOND_LORA = {
    "use_dora": "it is a DoRA",
    "lora_bias": "it has biases",
    "modules_to_save": "it holds whole layers (modules_to_save)",
    "trainable_token_indices": "it holds tokens of its own (trainable_token_indices)",
    "target_parameters": "it changes parameters that are no layer (target_parameters)",
    "layer_replication": "it repeats layers of the model (layer_replication)",
    "fan_in_fan_out": "its weights lie the other way round (fan_in_fan_out)",
    "alora_invocation_tokens": "it is an aLoRA, which applies behind certain tokens only",
    "use_qalora": "it is a QALoRA",
    "use_bdlora": "it is a BD-LoRA",
    "arrow_config": "it chooses among others (arrow_config)",
    "kasa_config": "it is a KaSA",
    "monteclora_config": "it is a MonteCLoRA",
}
# These take something out of the base model's weights and put it into the adapter.
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_TYPES = {"F16": "f16", "BF16": "bf16"}


def convert_adapter(
    base: str | os.PathLike[str],
    lora: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    outtype: str = "auto",
    swaa: SwaaConfig | None = None,
    force: bool = False,
    verbose: bool = False,
    on_step: Callable[[str], None] | None = None,
) -> Path:
    """Write the adapter of PEFT in the folder `lora` as a GGUF adapter to `output`; return that path.

    base: the Hugging Face checkpoint that it belongs to. outtype: one of `hf.OUTTYPES`; "auto" keeps the adapter's own
    type. swaa: the settings that it was trained under, to write; where its folder says them, they need not be given.
    verbose, on_step: as for `hf.convert`.

    Raises `ConfigError` if settings are given and differ from those of the training, `UnsupportedModelError` if `base`
    isn't the model that it was trained on, or llama.cpp can't compute it, and other `SwaaError`s; `output` is then as
    it was before.
    """
    with atomic_output(output, force=force) as temporary:
        checkpoint = read_checkpoint(base)
        scripts = upstream_scripts()
        hf.check_options(checkpoint, scripts, outtype)
        adapter = read_adapter(lora)
        alpha = scaled_alpha(adapter)
        adapter.check_base(checkpoint.folder)
        label, swaa = adapter.label(swaa), adapter.recipe(swaa)
        n_layers = adapter.training.base.n_layers if adapter.training else checkpoint.n_layers
        if swaa is not None:
            if n_layers is None:
                raise ConfigError(f"{checkpoint.folder}/config.json doesn't say how many layers the model has; add it")
            swaa.fa_decode_layers(n_layers)
        hf.check_packages()
        with hf.workspace(Path(output)) as work:
            if on_step:
                on_step("converting the adapter")
            folder, model, metadata = _readable(adapter, alpha, work), work / "adapter.gguf", work / "metadata.json"
            metadata.write_text(json.dumps(adapter.provenance(label, checkpoint.folder)), encoding="utf-8")
            request = {
                "scripts": scripts,
                "program": "convert_lora_to_gguf.py",
                "arguments": [folder, "--base", os.path.abspath(checkpoint.folder), "--outfile", model, "--outtype"]
                + [_own_type(adapter) if outtype == "auto" else outtype]
                + ["--verbose"] * verbose,
                "name": checkpoint.folder,
                "for_swaa": swaa is not None,
                "n_layers": n_layers,
                "metadata": metadata,
            }
            try:
                child.run("swaa_edge.convert.upstream_run:run", request, verbose=verbose)
            except child.ChildError as error:
                raise ModelFileError(f"the adapter {lora} can't be converted: {error}; {hf.MORE}") from None
            if swaa is not None:
                annotate(model, in_place=True, config=swaa)
            os.replace(model, temporary)
    return Path(output)


def scaled_alpha(adapter: Adapter) -> float:
    """The alpha by which llama.cpp, whose scale is alpha / rank of each pair of matrices, computes what PEFT does.

    Raises `UnsupportedModelError` if there is none, or the adapter is no plain LoRA, `ModelFileError` if it is damaged.
    """
    config, alpha = adapter.config, adapter.config.get("lora_alpha")
    for option, what in _BEYOND_LORA.items():
        if config.get(option):
            raise _refused(adapter, what)
    if config.get("bias", "none") != "none":
        raise _refused(adapter, f"it has biases (bias = {config['bias']})")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGE_THE_BASE):
        raise _refused(adapter, f"its training changed the base model too (init_lora_weights = {start})")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha) or alpha == 0:
        # llama.cpp takes 0 for a scale of 1.
        raise ModelFileError(f"{adapter.folder}: lora_alpha is {alpha}; it must be a number other than 0")
    if any(value != alpha for value in (config.get("alpha_pattern") or {}).values()):
        raise _refused(adapter, "its layers are scaled differently (alpha_pattern)")
    ranks = _ranks(adapter)
    if not config.get("use_rslora"):
        return alpha
    if len(ranks) > 1:
        raise _refused(adapter, f"its ranks differ ({min(ranks)} to {max(ranks)}) under rsLoRA")
    # PEFT's scale is alpha / sqrt(rank) here.
    return alpha * math.sqrt(*ranks)


def _ranks(adapter: Adapter) -> set[int]:
    table = weight_table(adapter.weights)
    if not table:
        raise ModelFileError(f"{adapter.weights} is empty; train the adapter again")
    for name in table:
        if not name.endswith(_MATRICES):
            raise _refused(adapter, f"it holds {name}, which is no matrix of a LoRA")
    ranks = {shape[0] for name, (_, shape) in table.items() if name.endswith(_MATRICES[::2]) and shape}
    if not ranks or min(ranks) < 1:
        raise ModelFileError(f"{adapter.weights} holds no matrices of a LoRA; train the adapter again")
    return ranks


def _refused(adapter: Adapter, what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{adapter.folder} can't be an adapter of llama.cpp: {what}; merge it instead, without --adapter-only"
    )


def _own_type(adapter: Adapter) -> str:
    """The adapter's own number format, for "auto"; upstream's can't tell it of a LoRA."""
    kinds = {_TYPES.get(kind, "f32") for kind, _ in weight_table(adapter.weights).values()}
    return kinds.pop() if len(kinds) == 1 else "f32"


def _readable(adapter: Adapter, alpha: float, work: Path) -> Path:
    """A copy of the adapter's folder for upstream, with this alpha; its name becomes that of the adapter."""
    folder = work / "adapter" / (adapter.name or "adapter")
    folder.mkdir(parents=True)
    config = {**adapter.config, "lora_alpha": alpha, "use_rslora": False}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    card = adapter.folder / "README.md"
    if card.is_file():
        shutil.copyfile(card, folder / card.name)
    with contextlib.suppress(OSError):
        # Not everywhere may everybody make links.
        os.symlink(os.path.abspath(adapter.weights), folder / adapter.weights.name)
        return folder
    shutil.copyfile(adapter.weights, folder / adapter.weights.name)
    return folder
