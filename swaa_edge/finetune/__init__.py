"""Light fine-tuning under the SWAA mask: the model's own answers, LoRA, and an adapter that knows its recipe.

settings  what can be chosen
data      records of a file as tokens, each known to be prompt or reply
train     LoRA with PEFT and transformers' Trainer, resumable
folder    the adapter's folder, and in it the state of a training that isn't over
plot      the losses, as a picture
distill   the full-attention model's own right answers, as data; answerers and hfanswerer are the models it asks
memory    what torch raises when there is no more of it
"""
