"""A reward model that says what it thinks of a reply. Knows the chat format; knows no policy."""

from __future__ import annotations

import torch

from rlhf.models.answering import load_judge
from rlhf.models.source import find_export
from rlhf.serving.conversation import ChatTemplate, Message


class Judge:
    """Scores the last message of a conversation, as PPO does: at its end of turn."""

    def __init__(self, checkpoint: str, *, device: torch.device, dtype: torch.dtype) -> None:
        """
        Args:
            checkpoint: a run directory or a folder in HF layout.

        Raises:
            UserError: there is no reward model.
        """
        otherwise = f"chat.reward={checkpoint} holds no model: give a run directory of rlhf reward, or its export"
        folder = find_export(checkpoint, "reward", key="chat.reward", otherwise=otherwise)
        self.model, tokenizer = load_judge(folder, device=device, dtype=dtype)
        self.template = ChatTemplate(tokenizer)
        self.device = device

    @torch.no_grad()
    def score(self, messages: list[Message]) -> float:
        """The reward of a conversation that ends with the assistant's message. Of one that is too long for the model, its last tokens count.

        Raises:
            UserError: the reward model's chat format refuses it.
        """
        ids = self.template.ids(messages, opened=False)
        most = getattr(self.model.config, "max_position_embeddings", None) or len(ids)
        return float(self.model(input_ids=torch.tensor([ids[-most:]], device=self.device)).logits[0, 0])
