"""Texts to token ids, safely from several threads at once."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from tokenizers import Encoding as RawEncoding
from tokenizers import Tokenizer as FastTokenizer
from transformers import AutoTokenizer

from server.core import Alignment, Encoding, Span, TextInput
from server.errors import BackboneError, InvalidRequest, TooLarge

PREFIX_CHARACTERS = 40
"""Characters per token of the backbone's length that are tried first of a text which will be cut. A megabyte of text
takes seconds and hundreds of megabytes to tokenize, to keep a few hundred tokens of it."""

SHORT_CHARACTERS = 512
"""Some 0.2 milliseconds' work."""

TEXT_CHARACTERS = 64
"""What a text costs beside its characters, as if it had more of them."""

SHORTEST_WINDOW = 8
"""Tokens of a text that a window has room for, at least."""

OVERLAP = 128
"""Tokens that neighbouring windows of a long text share, as far as they are less than half of it."""

MAX_WINDOWS = 256
"""Windows of one input."""

TOO_LONG = "text_too_long"
TOO_MANY_TOKENS = "too_many_tokens"


class _Windowing(NamedTuple):
    """How an input is cut into windows."""

    part: int
    """Which of its texts is cut."""
    room: int
    """Tokens of that text in a window."""
    shared: int
    """Of those, as many as the next window has too."""
    windows: int
    tokens: int
    """In all windows."""


class Tokenizer:
    """The backbone's own tokenizer.

    transformers switches truncation on inside the shared Rust object at each call, which breaks under threads; here
    the object is never changed: texts are encoded whole, cut, and then given their special tokens.
    """

    def __init__(
        self, fast: FastTokenizer, max_tokens: int, unknown: int | None = None, cls_id: int | None = None
    ) -> None:
        """`max_tokens` counts the special tokens too; `unknown` is the id for what is not in the vocabulary, `cls_id`
        that of the CLS token, if there is one."""
        fast.no_padding()
        fast.no_truncation()
        self._fast = fast
        self.max_tokens = max_tokens
        self._unknown = unknown
        self._cls_id = cls_id
        self._marks_subwords = bool(getattr(fast.model, "continuing_subword_prefix", None))
        self._special = (fast.num_special_tokens_to_add(is_pair=False), fast.num_special_tokens_to_add(is_pair=True))

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
        return cls(fast, min(max_tokens, loaded.model_max_length), loaded.unk_token_id, loaded.cls_token_id)

    def encode(
        self,
        texts: Sequence[str | TextInput],
        *,
        truncate: bool,
        reserved: int = 0,
        aligned: bool = False,
        max_tokens: int | None = None,
    ) -> list[Encoding]:
        """Token ids with special tokens. Where an input is too long it is cut, or TooLarge names its index.

        Of a pair, the longer text is cut first, as transformers does; where both are so long that only their beginnings
        are tokenized, which of them keeps an odd token is decided on those. `reserved` positions are not the text's:
        its adapter takes them. With `aligned`, encodings say where their tokens come from. TooLarge is raised for more
        than `max_tokens` in all encodings, before any is made.

        An input that comes to no token at all, as an empty one does where the tokenizer adds no special tokens, is an
        InvalidRequest, and so is a marked span without a token.
        """
        raw = list(self._parts(texts, truncate))
        rooms = [self._room(parts) - reserved for _, parts in raw]
        for index, ((_, parts), room) in enumerate(zip(raw, rooms, strict=True)):
            if not truncate and _length(parts) > room:
                raise self._too_long(index, _length(parts), room, parts, reserved)
        _check_budget(
            (min(_length(parts), room) + self._added(parts) for (_, parts), room in zip(raw, rooms, strict=True)),
            max_tokens,
        )
        encodings = []
        for index, ((text, parts), room) in enumerate(zip(raw, rooms, strict=True)):
            truncated = _length(parts) > room
            if truncated:
                for part, kept in zip(parts, longest_first([len(part.ids) for part in parts], room), strict=True):
                    _cut(part, kept)
            encodings.append(self._finished(index, text, parts, truncated=truncated, aligned=aligned))
        return encodings

    def windows(
        self,
        texts: Sequence[str | TextInput],
        *,
        overlap: int = OVERLAP,
        max_windows: int = MAX_WINDOWS,
        reserved: int = 0,
        max_tokens: int | None = None,
    ) -> list[list[Encoding]]:
        """Whole inputs, aligned, in as many windows as each takes; neighbours share `overlap` tokens.

        Of a pair, each window holds the whole first text and a piece of the second; where the second has no tokens, it
        is the first that is cut. Raises TooLarge where more than `max_windows` come of an input, where its first text
        leaves no room for windows of the second, and for more than `max_tokens` in all windows, before any is made.
        """
        raw = list(self._parts(texts, truncate=False))
        cuts = [self._windowing(index, parts, overlap, max_windows, reserved) for index, (_, parts) in enumerate(raw)]
        _check_budget((cut.tokens for cut in cuts), max_tokens)
        return [
            self._windows_of(index, text, parts, cut)
            for index, ((text, parts), cut) in enumerate(zip(raw, cuts, strict=True))
        ]

    def lengths(self, texts: Sequence[str | TextInput], *, windowed: bool, reserved: int = 0) -> list[int]:
        """How many tokens each input comes to, cut to the backbone's length or in windows, without making them.

        Raises TooLarge as `windows` does.
        """
        if windowed:
            raw = self._parts(texts, truncate=False)
            return [
                self._windowing(index, parts, OVERLAP, MAX_WINDOWS, reserved).tokens
                for index, (_, parts) in enumerate(raw)
            ]
        return [
            min(_length(parts), self._room(parts) - reserved) + self._added(parts)
            for _, parts in self._parts(texts, truncate=True)
        ]

    def _windowing(
        self, index: int, parts: Sequence[RawEncoding], overlap: int, max_windows: int, reserved: int
    ) -> "_Windowing":
        """How an input is cut into windows."""
        # a second text without tokens, a blank one, leaves nothing to make windows of
        part = max(place for place, one in enumerate(parts) if one.ids or not place)
        length = len(parts[part].ids)
        fixed = _length(parts) - length
        room = self._room(parts) - reserved - fixed
        if length > room and room < SHORTEST_WINDOW:
            what = "the first text leaves" if fixed else "the adapter leaves"
            raise TooLarge(
                f"{what} room for {max(room, 0)} tokens in a window, at least {SHORTEST_WINDOW} are needed",
                param=f"inputs.{index}",
                code=TOO_LONG,
            )
        shared = min(overlap, room // 2)
        count = 1 + (-(-(length - room) // (room - shared)) if length > room else 0)
        if count > max_windows:
            raise TooLarge(
                f"the text has {length} tokens, which makes {count} windows; at most {max_windows} are run",
                param=f"inputs.{index}",
                code=TOO_LONG,
            )
        tokens = length + (count - 1) * shared + count * (fixed + self._added(parts))
        return _Windowing(part, room, shared, count, tokens)

    def _windows_of(
        self, index: int, text: TextInput, parts: Sequence[RawEncoding], cut: "_Windowing"
    ) -> list[Encoding]:
        whole = parts[cut.part]
        if cut.windows > 1:
            whole.truncate(cut.room, stride=cut.shared)
        return [
            self._finished(
                index,
                text,
                [*parts[: cut.part], piece, *parts[cut.part + 1 :]],
                aligned=True,
                skipped=number * (cut.room - cut.shared),
            )
            for number, piece in enumerate([whole, *whole.overflowing])
        ]

    def _added(self, parts: Sequence[RawEncoding]) -> int:
        """Special tokens."""
        return self._special[len(parts) - 1]

    def _room(self, parts: Sequence[RawEncoding]) -> int:
        return self.max_tokens - self._added(parts)

    def _too_long(self, index: int, length: int, room: int, parts: Sequence[RawEncoding], reserved: int) -> TooLarge:
        special = self._added(parts)
        taker = "the backbone with this adapter takes" if reserved else "the backbone takes"
        return TooLarge(
            f"the text has {length + special} tokens, {taker} {room + special}; shorten it or send truncate: true",
            param=f"inputs.{index}",
            code=TOO_LONG,
        )

    def _finished(
        self,
        index: int,
        text: TextInput,
        parts: Sequence[RawEncoding],
        *,
        truncated: bool = False,
        aligned: bool,
        skipped: int = 0,
    ) -> Encoding:
        """With special tokens."""
        first, pair = parts[0], parts[1] if len(parts) > 1 else None
        whole = self._fast.post_process(first, pair)
        if not whole.ids:
            raise InvalidRequest("the text has no tokens", param=f"inputs.{index}")
        alignment: Alignment | None = None
        spans: tuple[Span, ...] = ()
        if aligned or text.spans:
            found = self._aligned(text, parts, whole, skipped)
            left = found.offsets[found.places(0)[-1]][1] if truncated and found.places(0) else len(text.text)
            spans = tuple(_tokens(found, index, number, span, left) for number, span in enumerate(text.spans))
            alignment = found if aligned else None
        return Encoding(tuple(whole.ids), tuple(whole.type_ids), truncated, spans, alignment)

    def _aligned(self, text: TextInput, parts: Sequence[RawEncoding], whole: RawEncoding, skipped: int) -> Alignment:
        owners = _owners(whole, len(parts[0].ids))
        # The parts' own offsets: a post-processor that takes spaces off a token's ends does so again each time it runs.
        own = [iter(part.offsets) for part in parts]
        offsets = tuple((0, 0) if owner is None else next(own[owner]) for owner in owners)
        texts = (text.text, text.pair or "")
        continues = tuple(
            owner is not None and self._continues(texts[owner], span, token, id_)
            for owner, span, token, id_ in zip(owners, offsets, whole.tokens, whole.ids, strict=True)
        )
        ids = whole.ids
        cls_place = ids.index(self._cls_id) if self._cls_id in ids else None
        return Alignment(owners, offsets, tuple(whole.word_ids), continues, skipped, cls_place)

    def _continues(self, text: str, span: Span, token: str, id_: int) -> bool:
        """The rule of `TokenClassificationPipeline.gather_pre_entities`: where the vocabulary marks subwords, a token
        that is longer or shorter than what it stands for; else, one that no space parts from what comes before it."""
        if id_ == self._unknown:
            return False
        start, end = span
        if self._marks_subwords:
            return len(token) != end - start
        return start > 0 and " " not in text[start - 1 : start + 1]

    def _parts(self, texts: Sequence[str | TextInput], truncate: bool) -> Iterator[tuple[TextInput, list[RawEncoding]]]:
        """The tokens of each input's text and of its pair, if it has one."""
        inputs = [TextInput(text) if isinstance(text, str) else text for text in texts]
        firsts = self._raw([text.text for text in inputs], truncate)
        # transformers' tokenizers and pipelines take an empty second text for none
        seconds = iter(self._raw([text.pair for text in inputs if text.pair], truncate))
        for text, first in zip(inputs, firsts, strict=True):
            yield text, [first, next(seconds)] if text.pair else [first]

    def _raw(self, texts: Sequence[str], truncate: bool) -> list[RawEncoding]:
        """Tokens without special ones. Of a long text that will be cut, only the beginning is tokenized if it does."""
        beginning = PREFIX_CHARACTERS * self.max_tokens
        starts = [text[:beginning] if truncate else text for text in texts]
        raw: list[RawEncoding]
        if is_short(starts):
            raw = [self._fast.encode(start, add_special_tokens=False) for start in starts]
        else:
            raw = self._fast.encode_batch(starts, add_special_tokens=False)
        for index, (text, start) in enumerate(zip(texts, starts, strict=True)):
            # The last tokens of a beginning may be those of a word cut in two, so it has to have some to spare.
            if len(start) < len(text) and len(raw[index].ids) < 2 * self.max_tokens:
                [raw[index]] = self._fast.encode_batch([text], add_special_tokens=False)
        return raw


def is_short(texts: Iterable[str]) -> bool:
    """Whether texts are tokenized sooner than another thread could be asked to.

    Those the library is given one by one, for which it keeps Python's lock; for a batch it lets go of it, and has
    threads of its own.
    """
    return sum(TEXT_CHARACTERS + len(text) for text in texts) <= SHORT_CHARACTERS


def _length(parts: Sequence[RawEncoding]) -> int:
    return sum(len(part.ids) for part in parts)


def _check_budget(tokens: Iterable[int], max_tokens: int | None) -> None:
    """Alignments take many times the memory of what the tokenizers library makes, so this is asked before."""
    if max_tokens is not None and (total := sum(tokens)) > max_tokens:
        raise TooLarge(
            f"the inputs come to {total} tokens, at most {max_tokens} are taken", param="inputs", code=TOO_MANY_TOKENS
        )


def _cut(part: RawEncoding, kept: int) -> None:
    """Keeps so many tokens, and nothing of the rest.

    The library hangs what it cuts off on the encoding, in pieces as long as what is kept, and makes a pair of each
    piece of one text with each of the other: gigabytes of two texts of twenty kilobytes. A second cut leaves one piece.
    """
    part.truncate(kept + 1)
    part.truncate(kept)


def longest_first(lengths: Sequence[int], room: int) -> list[int]:
    """What is kept of each of one or two texts: the longer one is cut first, then both alike, down to `room` in all.

    transformers' strategy of that name, as the tokenizers library computes it.
    """
    if len(lengths) == 1:
        return [min(lengths[0], room)]
    shorter, longer = sorted(lengths)
    longer = shorter if shorter > room else max(shorter, room - shorter)
    if shorter + longer > room:
        shorter = room // 2
        longer = shorter + room % 2
    return [longer, shorter] if lengths[0] > lengths[1] else [shorter, longer]


def _owners(whole: RawEncoding, first: int) -> tuple[int | None, ...]:
    """Which text each token is of, given how many are the first one's; the library forgets it of pairs made later."""
    left = first
    owners: list[int | None] = []
    for special in whole.special_tokens_mask:
        owners.append(None if special else int(left <= 0))
        left -= not special
    return tuple(owners)


def _tokens(alignment: Alignment, index: int, number: int, span: Span, left: int) -> Span:
    """The tokens of the first text that characters of it lie in, of which so many are left."""
    found = [
        token
        for token, (part, (start, end)) in enumerate(zip(alignment.parts, alignment.offsets, strict=True))
        if part == 0 and start < span[1] and end > span[0]
    ]
    if not found or span[1] > left:
        raise InvalidRequest(
            f"characters {span[0]} to {span[1]} hold no token, or are cut off", param=f"inputs.{index}.spans.{number}"
        )
    return found[0], found[-1] + 1
