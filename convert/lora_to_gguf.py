"""Converts a PEFT LoRA adapter to a GGUF adapter, which llama.cpp applies to the base model at run time.

llama.cpp scales every adapter by alpha / rank. PEFT scales some adapters differently: rsLoRA by alpha / sqrt(rank).
llama.cpp's converter copies alpha unchanged, so this module first replaces alpha to get PEFT's scale. Adapters that
llama.cpp can't compute correctly are refused.

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
from swaa_edge.convert import hf
from swaa_edge.convert.annotate import annotate
from swaa_edge.convert.hf_folder import read_hf_folder
from swaa_edge.convert.lora_merge import Adapter, read_adapter
from swaa_edge.convert.upstream import upstream_scripts
from swaa_edge.errors import ConfigError, ModelFileError, UnsupportedModelError
from swaa_edge.files.weights import read_tensors
from swaa_edge.support.atomic import atomic_output

_MATRICES = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")
# With these options of PEFT, the adapted weights are not just W + scale * B A.
_BEYOND_LORA = {
    "use_dora": "it is a DoRA",
    "lora_bias": "it has biases",
    "modules_to_save": "it holds whole layers (modules_to_save)",
    "trainable_token_indices": "it holds embeddings of single tokens (trainable_token_indices)",
    "target_parameters": "it changes parameters outside linear layers (target_parameters)",
    "layer_replication": "it repeats layers of the model (layer_replication)",
    "fan_in_fan_out": "its weights are stored transposed (fan_in_fan_out)",
    "alora_invocation_tokens": "it is an aLoRA, which only applies after certain tokens",
    "use_qalora": "it is a QALoRA",
    "use_bdlora": "it is a BD-LoRA",
    "arrow_config": "it selects among other adapters (arrow_config)",
    "kasa_config": "it is a KaSA",
    "monteclora_config": "it is a MonteCLoRA",
}
# These initializations move a part of the base model's weights into the adapter.
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
    """Convert the PEFT adapter in the folder `lora` to the GGUF adapter `output`. Return the path of the output.

    base: Hugging Face model directory of the base model.
    outtype: one of `hf.OUTTYPES`; "auto" keeps the adapter's data type.
    swaa: SWAA settings of the training, to write into the output. By default, the settings in the adapter's folder.
    verbose, on_step: as in `hf.convert`.

    Raises `ConfigError` if `swaa` differs from the settings of the training. Raises `UnsupportedModelError` if `base`
    isn't the adapter's base model, or if llama.cpp can't compute the adapter. Other failures raise other `SwaaError`s.
    On an error, `output` is unchanged.
    """
    with atomic_output(output, force=force) as temporary:
        model = read_hf_folder(base)
        scripts = upstream_scripts()
        hf.check_options(model, scripts, outtype)
        adapter = read_adapter(lora)
        alpha = scaled_alpha(adapter)
        n_layers = model.n_layers
        if adapter.training is not None:
            adapter.training.check_base(base, adapter.name)
            n_layers = adapter.training.base.n_layers
        label, swaa = adapter.label(swaa), adapter.settings(swaa)
        if swaa is not None:
            if n_layers is None:
                raise ConfigError(f"{model.folder}/config.json doesn't state the number of layers; add it")
            swaa.fa_decode_layers(n_layers)
        hf.check_packages()
        with hf.workspace(Path(output)) as work:
            if on_step:
                on_step("converting the adapter")
            folder, result, metadata = _with_alpha(adapter, alpha, work), work / "adapter.gguf", work / "metadata.json"
            metadata.write_text(json.dumps(adapter.provenance(label, base)), encoding="utf-8")
            hf.run_upstream(
                f"the adapter {lora}",
                scripts,
                "convert_lora_to_gguf.py",
                [folder, "--base", os.path.abspath(base), "--outfile", result],
                outtype=_own_type(adapter) if outtype == "auto" else outtype,
                verbose=verbose,
                name=base,
                for_swaa=swaa is not None,
                n_layers=n_layers,
                metadata=metadata,
            )
            if swaa is not None:
                annotate(result, in_place=True, config=swaa)
            os.replace(result, temporary)
    return Path(output)


def scaled_alpha(adapter: Adapter) -> float:
    """Return the alpha for which llama.cpp's scale, alpha / rank, equals PEFT's scale.

    Raises `UnsupportedModelError` if no such alpha exists, or if the adapter isn't a plain LoRA. Raises
    `ModelFileError` if the adapter is damaged.
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
        # llama.cpp would treat 0 as a scale of 1.
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
    tensors = read_tensors(adapter.weights)
    if not tensors:
        raise ModelFileError(f"{adapter.weights} is empty; train the adapter again")
    for name in tensors:
        if not name.endswith(_MATRICES):
            raise _refused(adapter, f"it holds {name}, which is not a LoRA matrix")
    ranks = {held.shape[0] for name, held in tensors.items() if name.endswith(_MATRICES[::2]) and held.shape}
    if not ranks or min(ranks) < 1:
        raise ModelFileError(f"{adapter.weights} holds no LoRA matrices; train the adapter again")
    return ranks


def _refused(adapter: Adapter, what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"llama.cpp can't apply the adapter {adapter.folder}: {what}; merge it instead, without --adapter-only"
    )


def _own_type(adapter: Adapter) -> str:
    """Return the adapter's data type. Upstream's "auto" can't determine the type of an adapter."""
    kinds = {_TYPES.get(held.dtype, "f32") for held in read_tensors(adapter.weights).values()}
    return kinds.pop() if len(kinds) == 1 else "f32"


def _with_alpha(adapter: Adapter, alpha: float, work: Path) -> Path:
    """Copy the adapter's folder with `lora_alpha` set to `alpha`. Return the path of the copy.

    The copy keeps the folder's name, because upstream names the adapter after the folder.
    """
    folder = work / "adapter" / (adapter.name or "adapter")
    folder.mkdir(parents=True)
    config = {**adapter.config, "lora_alpha": alpha, "use_rslora": False}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    card = adapter.folder / "README.md"
    if card.is_file():
        shutil.copyfile(card, folder / card.name)
    with contextlib.suppress(OSError):
        # Some systems don't allow links.
        os.symlink(os.path.abspath(adapter.weights), folder / adapter.weights.name)
        return folder
    shutil.copyfile(adapter.weights, folder / adapter.weights.name)
    return folder
