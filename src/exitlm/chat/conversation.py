"""What was said so far, as chat messages: plain data, changed by turns."""

from dataclasses import dataclass, field

Message = dict[str, str]


@dataclass
class Conversation:
    """A system message, if there is one, and turns: what the user said and what was answered."""

    system: str | None = None
    turns: list[tuple[str, str]] = field(default_factory=list)

    def ask(self, text: str) -> list[Message]:
        """The messages that ask the model for an answer to ``text``; nothing is kept yet."""
        return [*self.messages(), {"role": "user", "content": text}]

    def keep(self, text: str, answer: str) -> None:
        """Keep what was said and what was answered."""
        self.turns.append((text, answer))

    def undo(self) -> str | None:
        """Forget the last turn; what the user had said, or None where there is no turn."""
        return self.turns.pop()[0] if self.turns else None

    def clear(self) -> None:
        """Forget all turns; the system message stays."""
        self.turns.clear()

    def messages(self) -> list[Message]:
        """All of it as chat messages."""
        found = [] if self.system is None else [{"role": "system", "content": self.system}]
        for said, answer in self.turns:
            found += [{"role": "user", "content": said}, {"role": "assistant", "content": answer}]
        return found
