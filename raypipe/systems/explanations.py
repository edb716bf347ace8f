"""Explanations of recommendations: whether an item fits a user, and why, in words. Batch and online share this code."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from raypipe.engines.checks import AnswerChecks, CheckedEngine
from raypipe.engines.engine import Decoding, Engine, Piece
from raypipe.language.prompt import Prompt
from raypipe.metrics.text import Vocabulary, top_values

YES, NO = "Yes", "No"
"""The answers a decision is made between."""

# A yes or no is an answer if the text ends there or a statement follows: "No. It …", "No, …", "Yes it …". "No wonder"
# and "Yes Man" are not answers.
_ANSWER = re.compile(
    r"\W*(yes|no)\b(?=\s*$|\s*\n|[^\w\s'’-]|\s+[-–—:]|\s+(?:it|this|that|these|those|the|they|i|he|she|we|you|there|because)\b)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class ExplanationRequest:
    """Two prompts about one user and one item: `decision` asks yes or no, `explanation` asks why."""

    decision: Prompt
    explanation: Prompt


@dataclass
class Explanation:
    """The result of a request: a `decision` (yes or no) and its `text`, or the `reason` and `message` of a rejection.

    `calls`, `tokens_in` and `tokens_out` are its cost.
    """

    decision: str = ""
    text: str = ""
    reason: str = ""
    message: str = ""
    calls: int = 0
    tokens_in: int = 0
    tokens_out: int = 0


def explain(
    engine: Engine,
    requests: Sequence[ExplanationRequest],
    decoding: Decoding,
    checks: AnswerChecks,
    listen: Callable[[int, Explanation], None] | None = None,
) -> list[Explanation]:
    """Explain each of `requests`: decide for the likelier of yes and no, then let the engine write the text.

    `listen` is called with a request's number and its explanation so far, once it is decided and whenever its text has
    changed.
    """
    found = [Explanation() for _ in requests]
    for scores in engine.score([mine.decision for mine in requests], [(YES, NO)] * len(requests)):
        mine = found[scores.index]
        mine.calls, mine.tokens_in = 1, scores.tokens_in
        if scores.error is not None:
            mine.reason, mine.message = scores.error.kind, scores.error.message
        else:
            yes, no = scores.logprobs
            mine.decision = "yes" if yes >= no else "no"
    decided = [at for at, mine in enumerate(found) if not mine.reason]
    prompts = [requests[at].explanation for at in decided]
    checked = CheckedEngine(engine, checks)
    tell = listen or (lambda at, mine: None)
    for at in decided:
        tell(at, found[at])
    for outcome in (checked.stream if listen is not None else checked.generate)(prompts, decoding):
        mine = found[decided[outcome.index]]
        if isinstance(outcome, Piece):
            mine.text = outcome.text
            tell(decided[outcome.index], mine)
            continue
        mine.calls += outcome.calls
        mine.tokens_in += outcome.tokens_in
        mine.tokens_out += outcome.tokens_out
        if outcome.error is not None:
            mine.reason, mine.message, mine.text = outcome.error.kind, outcome.error.message, ""
        else:
            mine.text = outcome.text.strip()
            tell(decided[outcome.index], mine)
    return found


def reference_explanation(answer: str, title: str, history: Counter[str], values: Sequence[str]) -> str:
    """The explanation that a rule writes from the counted attribute values of a history and the values of the item."""
    common = [value for value, _ in sorted(history.items(), key=lambda pair: (-pair[1], pair[0]))]
    common = [value for value in common if value in top_values(history)]
    taste = f"The choices are mostly {_listed(common)}." if common else "The choices have nothing in common."
    if not values:
        return f"{answer}. {taste}"
    fits = "as they are" if set(values) & set(common) else "as they are not"
    return f"{answer}. {taste} {title} is {_listed(values)}, {fits}."


def contradicts(decision: str, text: str) -> bool:
    """Whether a text begins with the opposite of `decision` ("yes" or "no"); the two answer separate prompts.

    Not covered: a text that gives its answer later, in other words or in another language.
    """
    answer = _ANSWER.match(text)
    return answer is not None and answer[1].lower() != decision


def rule_explanation_rating(
    decision: str,
    label: str | None,
    text: str,
    vocabulary: Vocabulary,
    history: Counter[str],
    values: Sequence[str],
    beside: bool,
) -> int:
    """The rating 0 to 3 that a counting rule gives an explanation, after RecExplainer's rubric (section 4.3).

    0: the decision is not the recommender's (`label`, None if it has none), or the text contradicts the decision. 1:
    the text names neither a value among the history's `top_values` nor a value of the item, or it names titles without
    ground (`beside`). 3: it names both kinds of values. 2: it names one of them.
    """
    if contradicts(decision, text) or (label is not None and decision != label):
        return 0
    named = set(vocabulary.named(text))
    taste, item = bool(named & top_values(history)), bool(named & set(values))
    if beside or not (taste or item):
        return 1
    return 3 if taste and item else 2


def _listed(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
