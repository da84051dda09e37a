"""What is said to the demo's model: the trunk, which is read once, and four questions, one for each child.

The trunk ends where the user speaks next, so that a child's suffix is its question alone. A model without a chat
template gets the same words as plain text.
"""

from __future__ import annotations

from thaw.demo import document

__all__ = ["QUESTIONS", "Message", "plain_question", "plain_trunk", "question", "trunk"]

REQUEST = "Here is the handbook of thaw. Please read it."
REPLY = "I have read the handbook of thaw. What would you like to know?"
QUESTIONS = (
    "What is a session?",
    "Name three things that a snapshot holds.",
    "What is prefill?",
    "Why does exactness matter?",
)

Message = dict[str, str]


def trunk(text: str | None = None) -> list[Message]:
    """The messages that all children share, with `text` in place of the whole document.

    The reply is given, not generated: reading costs a prefill and no more."""
    return [
        {"role": "user", "content": f"{REQUEST}\n\n{text or document()}"},
        {"role": "assistant", "content": REPLY},
    ]


def question(text: str) -> Message:
    """One child's next message."""
    return {"role": "user", "content": text}


def plain_trunk(text: str | None = None) -> str:
    """The trunk for a model without a chat template."""
    return f"{text or document()}\n## 13. Questions and answers\n"


def plain_question(text: str) -> str:
    """One child's suffix for a model without a chat template."""
    return f"\nQuestion: {text}\nAnswer:"
