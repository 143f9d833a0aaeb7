"""Texts to token ids, safely from several threads at once."""

from collections.abc import Sequence
from typing import Any

from tokenizers import Encoding as RawEncoding
from tokenizers import Tokenizer as FastTokenizer
from transformers import AutoTokenizer

from server.core import Encoding
from server.errors import BackboneError, InvalidRequest, TooLarge

PREFIX_CHARACTERS = 40
"""Characters per token of the backbone's length that are tried first of a text which will be cut. A megabyte of text
takes seconds and hundreds of megabytes to tokenize, to keep a few hundred tokens of it."""


class Tokenizer:
    """The backbone's own tokenizer.

    transformers switches truncation on inside the shared Rust object at each call, which breaks under threads; here
    the object is never changed: texts are encoded whole, cut, and then given their special tokens.
    """

    def __init__(self, fast: FastTokenizer, max_tokens: int) -> None:
        """`max_tokens` counts the special tokens too."""
        fast.no_padding()
        fast.no_truncation()
        self._fast = fast
        self.max_tokens = max_tokens
        self._room = max_tokens - fast.num_special_tokens_to_add(is_pair=False)

    @classmethod
    def load(cls, source: str, max_tokens: int) -> "Tokenizer":
        """The tokenizer in the backbone's folder; the shorter of its and the model's limit counts."""
        try:
            loaded: Any = AutoTokenizer.from_pretrained(source)
        except Exception as error:  # whatever a missing or broken file makes its many readers raise
            raise BackboneError(f"no tokenizer can be loaded from {source!r}: {error}") from error
        fast = getattr(loaded, "backend_tokenizer", None)
        if not isinstance(fast, FastTokenizer):
            raise BackboneError(f"the tokenizer of {source!r} has no tokenizer.json form, which adapterd needs")
        if len(loaded) <= len(loaded.all_special_ids):  # what transformers makes up where it finds no files
            raise BackboneError(f"no tokenizer can be loaded from {source!r}: it has no vocabulary")
        return cls(fast, min(max_tokens, loaded.model_max_length))

    def encode(self, texts: Sequence[str], *, truncate: bool, reserved: int = 0) -> list[Encoding]:
        """Token ids with special tokens. Where a text is too long it is cut, or TooLarge names its index.

        `reserved` positions are not the text's: its adapter takes them.

        A text that comes to no token at all, as an empty one does where the tokenizer adds no special tokens, is an
        InvalidRequest.
        """
        encodings = []
        room = self._room - reserved
        for index, raw in enumerate(self._raw(texts, truncate)):
            truncated = len(raw.ids) > room
            if truncated:
                if not truncate:
                    special = self.max_tokens - self._room
                    raise TooLarge(
                        f"the text has {len(raw.ids) + special} tokens, {self._taker(reserved)} {room + special}; "
                        "shorten it or send truncate: true",
                        param=f"inputs.{index}",
                        code="text_too_long",
                    )
                raw.truncate(room)
            whole = self._fast.post_process(raw)
            if not whole.ids:
                raise InvalidRequest("the text has no tokens", param=f"inputs.{index}")
            encodings.append(Encoding(tuple(whole.ids), tuple(whole.type_ids), truncated))
        return encodings

    def _taker(self, reserved: int) -> str:
        return "the backbone with this adapter takes" if reserved else "the backbone takes"

    def _raw(self, texts: Sequence[str], truncate: bool) -> list[RawEncoding]:
        """Tokens without special ones. Of a long text that will be cut, only the beginning is tokenized if it does."""
        beginning = PREFIX_CHARACTERS * self.max_tokens
        starts = [text[:beginning] if truncate else text for text in texts]
        raw: list[RawEncoding] = self._fast.encode_batch(starts, add_special_tokens=False)
        for index, (text, start) in enumerate(zip(texts, starts, strict=True)):
            # The last tokens of a beginning may be those of a word cut in two, so it has to have some to spare.
            if len(start) < len(text) and len(raw[index].ids) < 2 * self.max_tokens:
                raw[index] = self._fast.encode(text, add_special_tokens=False)
        return raw
