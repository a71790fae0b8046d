"""Fine-tuning under the SWAA mask: training data from the model's own responses, LoRA, an adapter with its recipe.

distillation  `distill`: training data that the model writes itself under full attention
finetuning    `finetune`: an adapter trained with LoRA under the SWAA mask
responses     asks a model for responses and keeps the correct ones, resumable
answerers     the models that are asked: a GGUF by our engine; hf_answerer: a Hugging Face model by transformers
settings      what a training run can be set to
data          records of a file as tokens of prompts and responses
train         the training run, resumable; trainer: transformers' Trainer set up for it
folder        the adapter's folder, and the training state in it
hf_model      loads Hugging Face models
"""

from swaa_edge.finetune.distillation import distill
from swaa_edge.finetune.finetuning import finetune
from swaa_edge.finetune.settings import Settings

__all__ = ["Settings", "distill", "finetune"]
