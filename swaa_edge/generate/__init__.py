"""Text from a model: one completion (`complete`), or the turns of a conversation (`Conversation`).

from swaa_edge.generate import complete
print(complete("model.gguf", "Once upon a time", max_tokens=64).text)
"""

from swaa_edge.generate.complete import Completion, complete
from swaa_edge.generate.context import conversation_context, fitting_context
from swaa_edge.generate.conversation import Conversation

__all__ = ["Completion", "Conversation", "complete", "conversation_context", "fitting_context"]
