"""The questions of RecExplainer's tasks (arXiv 2311.10947, section 3.1), each in paraphrases; none shows an item's id.

{user} stands for a history, as titles, as the recommender's state, or as both; {item} and {items} for titles, item vectors, or
both.
"""

from __future__ import annotations

from pydantic import model_validator

from raypipe.config import Config, shaping
from raypipe.language.templates import Templates

_MARKS = {
    "next_item": ("user",),
    "ranking": ("user", "items"),
    "interest": ("user", "item"),
    "title": ("item",),
    "attribute": ("item", "attribute"),
    "similar": ("item",),
    "history": ("user",),
    "summary": ("user",),
    "explanation": ("user", "item"),
}


class ExplainerPrompts(Config):
    """By task; see the module."""

    next_item: Templates = shaping(
        lambda: Templates(
            training=(
                "Somebody chose {user}. What will be chosen next?",
                "After {user}, the best item to recommend is:",
                "Given the choices {user}, recommend one item.",
                "A person's history: {user}. Name the item that fits best next.",
                "Choices so far: {user}. The next one should be:",
            ),
            test=("These were somebody's choices: {user}. Recommend the next item.",),
        ),
        "T1",
    )
    ranking: Templates = shaping(
        lambda: Templates(
            training=(
                "Somebody chose {user}. Sort by how well they fit: {items}.",
                "Choices so far: {user}. Put in order, the best first: {items}.",
                "For who chose {user}, rank these: {items}.",
                "A person's history: {user}. From best to worst, order {items}.",
                "Given the choices {user}, which of these fit most, and which least? {items}.",
            ),
            test=("These were somebody's choices: {user}. Order these from best to worst: {items}.",),
        ),
        "T2",
    )
    interest: Templates = shaping(
        lambda: Templates(
            training=(
                "Somebody chose {user}. Would they like {item}?",
                "Choices so far: {user}. Does {item} fit them?",
                "Is {item} something for who chose {user}?",
                "A person's history: {user}. Is {item} to be recommended?",
                "Given the choices {user}, will {item} be liked?",
            ),
            test=("These were somebody's choices: {user}. Will they like {item}?",),
        ),
        "T3",
    )
    title: Templates = shaping(
        lambda: Templates(
            training=("The title of {item} is:", "What is {item} called?", "{item} stands for the item:"),
            test=("Name {item}.",),
        ),
        "T4, of an item's vector",
    )
    attribute: Templates = shaping(
        lambda: Templates(
            training=(
                "The {attribute} of {item}:",
                "What is the {attribute} of {item}?",
                "{item} has the {attribute}:",
            ),
            test=("Tell the {attribute} of {item}.",),
        ),
        "T4",
    )
    similar: Templates = shaping(
        lambda: Templates(
            training=("The item most like {item} is:", "Which item is nearest to {item}?", "{item} is most like:"),
            test=("Name the item most similar to {item}.",),
        ),
        "T4",
    )
    history: Templates = shaping(
        lambda: Templates(
            training=(
                "List what {user} stands for, oldest first:",
                "{user} chose, oldest first:",
                "The choices behind {user}, oldest first:",
                "A person's history: {user}. Its titles, oldest first:",
                "Choices so far: {user}. In order, they are:",
            ),
            test=("These were somebody's choices: {user}. Name them, oldest first.",),
        ),
        "T6, of a state alone",
    )
    summary: Templates = shaping(
        lambda: Templates(
            training=(
                "Somebody chose {user}. Summarise what they like.",
                "What does who chose {user} prefer?",
                "A person's history: {user}. Sum up the taste behind it.",
            ),
            test=("These were somebody's choices: {user}. Describe the taste behind them.",),
        ),
        "T6b",
    )
    explanation: Templates = shaping(
        lambda: Templates(
            training=(
                "Somebody chose {user}. Would they like {item}? Answer, and say why.",
                "Choices so far: {user}. Does {item} fit them? Answer yes or no, and explain it.",
                "Explain whether {item} is something for who chose {user}.",
                "A person's history: {user}. Is {item} to be recommended? Say yes or no, and how it fits the choices.",
                "Given the choices {user}, will {item} be liked? Explain the answer.",
            ),
            test=(
                "These were somebody's choices: {user}. Will they like {item}? Answer yes or no, sum up what the choices have "
                "in common, and explain how the item fits them or does not.",
            ),
        ),
        "asked and, as published, never trained on",
    )
    focus: str = shaping(" Attend to the {focus} most.", "put behind it where explanations are to attend to something")

    @model_validator(mode="after")
    def _marks(self) -> ExplainerPrompts:
        for name, marks in _MARKS.items():
            getattr(self, name).require(marks)
        if "{focus}" not in self.focus:
            raise ValueError("focus needs the mark {focus}")
        return self
