"""Fine-tuning under the SWAA mask: training data from the model's own responses, and LoRA training.

- distillation: `distill` writes training data with the model's own responses under full attention.
- finetuning: `finetune` trains a LoRA adapter under the SWAA mask.
- responses: asks a model for responses and keeps the correct ones.
- answerers: runs a GGUF in our engine to answer prompts.
- hf_answerer: runs a Hugging Face model in transformers to answer prompts.
- settings: the settings of `distill` and `finetune`.
- data: converts the records of a file to tokens of prompts and responses.
- train: the training run, which can resume.
- trainer: transformers' Trainer with our settings and checks.
- folder: the adapter's folder, and the training state in it.
- hf_model: loads Hugging Face models.
"""

from swaa_edge.finetune.distillation import distill
from swaa_edge.finetune.finetuning import finetune
from swaa_edge.finetune.settings import Settings

__all__ = ["Settings", "distill", "finetune"]
