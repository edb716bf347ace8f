"""The questions of RecExplainer's tasks (arXiv 2311.10947, section 3.1), each in paraphrases; none shows an item's id.

{user} stands for a history, as titles, as the recommender's state, or as both; {item} and {items} stand for titles,
item vectors, or both. Every template ends with such a mark, right before the answer. Measured: if words follow vectors,
a small language model reads next to nothing from them. Tests use their templates in turn, because a single one can
mislead a small model; where only one question is asked, it is the first template.
"""

from __future__ import annotations

from pydantic import model_validator

from raypipe.config import Config, shaping
from raypipe.language.templates import Templates, require_marks

_MARKS = {
    "next_item": ("user",),
    "ranking": ("user", "items"),
    "interest": ("user", "item"),
    "title": ("item",),
    "titles": ("items",),
    "attribute": ("item", "attribute"),
    "similar": ("item",),
    "history": ("user",),
    "history_of_one": ("user",),
    "summary": ("user",),
    "explanation": ("user", "item"),
}
_NEXT_ITEM = Templates(
    training=(
        "What will be chosen next by who chose {user}",
        "The best item to recommend after these choices: {user}",
        "Recommend one item to a person with this history: {user}",
        "Name the item that fits best next to: {user}",
        "The next one should be, after {user}",
    ),
    test=(
        "Recommend the next item to somebody with these choices: {user}",
        "The item that fits best after these: {user}",
        "What should be chosen next, after {user}",
    ),
)
_RANKING = Templates(
    training=(
        "Sort {items} by how well they fit who chose {user}",
        "Put in order, the best first: {items}. Choices so far: {user}",
        "Rank {items} for a person with this history: {user}",
        "From best to worst, order {items} for who chose {user}",
        "Which of {items} fit most, and which least? The choices: {user}",
    ),
    test=(
        "Order {items} from best to worst for somebody with these choices: {user}",
        "Sort {items}, the best first, for a person who chose {user}",
        "Rank {items} by how well they fit these choices: {user}",
    ),
)
_INTEREST = Templates(
    training=(
        "Would {item} be liked by who chose {user}",
        "Does {item} fit these choices so far: {user}",
        "Is {item} something for a person with this history: {user}",
        "Is {item} to be recommended after {user}",
        "Will {item} be liked? The choices: {user}",
    ),
    test=(
        "Will {item} be liked by somebody with these choices: {user}",
        "Does {item} fit a person who chose {user}",
        "Is {item} something for who chose {user}",
    ),
)
_HISTORY = Templates(
    training=(
        "What does this stand for, oldest first? {user}",
        "Titles that were chosen, oldest first: {user}",
        "The choices behind this, oldest first: {user}",
        "The titles of a person's history, oldest first: {user}",
        "Choices so far, in order: {user}",
    ),
    test=(
        "The titles of this history, oldest first: {user}",
        "Name what was chosen, in order: {user}",
        "What was chosen, oldest first? {user}",
    ),
)
_HISTORY_OF_ONE = Templates(
    training=(
        "What does this stand for? One title: {user}",
        "A title that was chosen: {user}",
        "One of the choices behind this: {user}",
        "Any title of a person's history: {user}",
        "One of the choices so far: {user}",
    ),
    test=(
        "A title of this history: {user}",
        "Name one thing that was chosen: {user}",
        "What was one of the choices? {user}",
    ),
)
_EXPLANATION = Templates(
    training=(
        "Would {item} be liked? Answer, and say why. Somebody chose {user}",
        "Does {item} fit? Answer yes or no, and explain it. Choices so far: {user}",
        "Explain whether {item} is something for who chose {user}",
        "Is {item} to be recommended? Say yes or no, and how it fits the choices. A person's history: {user}",
        "Will {item} be liked? Explain the answer. Given the choices {user}",
    ),
    test=(
        "Will {item} be liked? Answer yes or no, sum up what the choices have in common, and explain how the item fits them or "
        "does not. These were somebody's choices: {user}",
    ),
)


class ExplainerPrompts(Config):
    """The templates of each task; the module describes their marks."""

    next_item: Templates = shaping(lambda: _NEXT_ITEM, "T1")
    ranking: Templates = shaping(lambda: _RANKING, "T2")
    interest: Templates = shaping(lambda: _INTEREST, "T3")
    title: Templates = shaping(
        lambda: Templates(
            training=("The title of the item: {item}", "What is it called? {item}", "This stands for the item: {item}"),
            test=("Name the item: {item}",),
        ),
        "T4, of an item's vector",
    )
    titles: Templates = shaping(
        lambda: Templates(
            training=(
                "The titles of these items, in turn: {items}",
                "Name each of: {items}",
                "One title after another: {items}",
            ),
            test=("Name these items in turn: {items}",),
        ),
        "T4, of several items",
    )
    attribute: Templates = shaping(
        lambda: Templates(
            training=(
                "The {attribute} of the item: {item}",
                "What is the {attribute}? {item}",
                "Of this item, the {attribute}: {item}",
            ),
            test=("Tell the {attribute} of: {item}",),
        ),
        "T4",
    )
    similar: Templates = shaping(
        lambda: Templates(
            training=("The item most like this: {item}", "Which item is nearest? {item}", "Most alike to {item}"),
            test=("Name the item most similar to {item}",),
        ),
        "T4",
    )
    history: Templates = shaping(lambda: _HISTORY, "T6, of a state alone, oldest first")
    history_of_one: Templates = shaping(lambda: _HISTORY_OF_ONE, "T6, of one of the titles")
    summary: Templates = shaping(
        lambda: Templates(
            training=(
                "Summarise what is liked by who chose {user}",
                "What is preferred by a person with these choices? {user}",
                "Sum up the taste behind a person's history: {user}",
            ),
            test=("Describe the taste behind these choices: {user}",),
        ),
        "T6b",
    )
    explanation: Templates = shaping(lambda: _EXPLANATION, "asked and, as published, never trained on")
    focus: str = shaping("Attend to the {focus} most. ", "put before it where explanations are to attend to something")

    @model_validator(mode="after")
    def _marks(self) -> ExplainerPrompts:
        for name, marks in _MARKS.items():
            getattr(self, name).require(marks)
        require_marks([self.focus], ["focus"])
        return self
