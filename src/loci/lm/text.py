"""From tokens to text as they come: whole characters only, and nothing of a stop string.

Ours  a token may end inside a character, and some tokenizers drop a leading space unless they see what stood before.
      So the last few tokens are decoded together, with and without the newest, and the difference is what it added.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

_CONTEXT = 6  # tokens of the prompt that are decoded with the first new one
_CHARACTER = 4  # tokens that one character can take: its bytes in UTF-8
_BROKEN = "\ufffd"  # what a decoder shows for bytes that are no character yet


class TextFlow:
    """The text of one generation.

    Args:
        decode: token ids to text.
        before: the prompt's tokens.
        stops: strings that end the text; it is cut before the first.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], *, before: Sequence[int], stops: Sequence[str]) -> None:
        self.text = ""
        self._decode = decode
        self._stops = tuple(stops)
        self._ids = list(before[-_CONTEXT:])
        self._shown = len(self._ids)  # ids whose text is in `text` or in the prompt
        self._known = decode(self._ids)
        self._taken = 0
        self._ended = False

    def push(self, token: int) -> bool:
        """Add one token; True if a stop string is complete, and `text` is cut before it."""
        self._ids.append(token)
        return self._advance(whole=len(self._ids) - self._shown < _CHARACTER)

    def flush(self) -> bool:
        """No token follows: give out what was held back, broken characters as U+FFFD. True as in `push`."""
        stopped = self._advance(whole=False) if self._shown < len(self._ids) and not self._ended else False
        self._ended = True
        return stopped

    def take(self) -> str:
        """The text that is certain by now and was not taken yet."""
        end = len(self.text) if self._ended else len(self.text) - self._held()
        taken = self.text[self._taken : end]
        self._taken = max(self._taken, end)
        return taken

    def _advance(self, *, whole: bool) -> bool:
        text = self._decode(self._ids)
        if whole and text.endswith(_BROKEN):
            return False
        added = text[len(self._known) :]
        self._ids = self._ids[max(0, self._shown - 1) :] if self._shown else self._ids
        self._shown = len(self._ids)
        self._known = self._decode(self._ids)
        searched = len(self.text)
        self.text += added
        return self._cut(searched)

    def _cut(self, searched: int) -> bool:
        places = [
            place for stop in self._stops if (place := self.text.find(stop, max(0, searched - len(stop) + 1))) >= 0
        ]
        if places:
            self.text = self.text[: min(places)]
            self._ended = True
        return bool(places)

    def _held(self) -> int:
        """Letters at the end that may be the beginning of a stop string."""
        return max(
            (
                size
                for stop in self._stops
                for size in range(1, min(len(stop), len(self.text) + 1))
                if self.text.endswith(stop[:size])
            ),
            default=0,
        )
