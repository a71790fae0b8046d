"""Generate text with a model: one completion (`complete`) or a conversation (`Conversation`).

from swaa_edge.generate import complete
print(complete("model.gguf", "Once upon a time", max_tokens=64).text)
"""

from swaa_edge.generate.complete import Completion, complete, fitting_context
from swaa_edge.generate.conversation import Conversation, conversation_context

__all__ = ["Completion", "Conversation", "complete", "conversation_context", "fitting_context"]
