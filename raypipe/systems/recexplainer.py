"""RecExplainer (arXiv 2311.10947): a language model learns to predict what a recommender does, in order to explain it.

Behaviour (B) shows histories and items as titles, intention (I) as the recommender's vectors, hybrid (H) as both. The
labels are the recommender's own predictions. A position is a history cut before one event; every event of a user before
the cut has one, except the first and the last (section 4.1). Tasks, with their counts for N interactions of U users,
the last of each user held out:

    T1   next item    the recommender's best unseen item                      N − 2U
    T2   ranking      five unseen items in its order                          N − 2U
    T3   interest     yes from its best fifth, no from its worse half         2U, one pair a user (`pairs`)
    T4   item         title, attributes, description, nearest item            one for each item and field
    T5   replay       other examples, so that the model keeps its language    as given
    T6   history      the titles behind a state, for every prefix             N − U, for users of two events or more
    T6b  summary      a written summary of the events before the cut          one for each user that has one

Explanations are asked for but, as published, never learnt. A language model too small to write them without training
can learn the reference that a rule writes from attribute values (`explanation`, ours). Also ours: more pairs (`pairs`),
for a language model too small to learn comparing from 2U examples; T4 of several items at once (`catalogue_lists`), for
one too small to tell apart vectors that stand side by side; and T6 of one title at a time (`listed`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import model_validator

from raypipe.config import Config, shaping
from raypipe.engines.engine import Choices, Decoding, Engine
from raypipe.errors import UsageError
from raypipe.language.adapters import AdapterConfig, LoraOptions, check_updates
from raypipe.language.projectors import ProjectorConfig
from raypipe.language.prompt import Prompt, Vectors
from raypipe.language.soft_prompts import Injection, SoftExample
from raypipe.language.templates import fill
from raypipe.metrics.alignment import (
    decisions,
    order_ndcg,
    ranking_figures,
    reconstruction_figures,
    retrieval_figures,
    unseen_retrieval_figures,
)
from raypipe.metrics.ranking import Mean
from raypipe.metrics.recovery import titles_in
from raypipe.systems.explainer_examples import (
    ITEM,
    USER,
    ExplainerExamples,
    Form,
    HeldOutPrompts,
    PromptPieces,
    Task,
)
from raypipe.systems.explainer_prompts import ExplainerPrompts
from raypipe.systems.explanations import NO, YES
from raypipe.systems.probes import LabelledVectors
from raypipe.systems.projection import AdaptedLm, probed
from raypipe.systems.source import Source, drawn_places
from raypipe.systems.surrogates import Lessons, LinearConfig, StudentConfig, TreeConfig, surrogate_figures
from raypipe.systems.teacher import CANDIDATES, Taught, teach, teachable
from raypipe.systems.title_search import ONE_TITLE, TitleQuestion, likeliest, searching

Variant = Literal["B", "I", "H"]
CONTROL = "shuffled users"
TRAINING = {"epochs": 10, "batch_size": 64, "lr": 1e-4}
"""As published, but for the warm-up, which there is a tenth of all steps: set `--trainer.warmup_steps` to that."""
_ALL: tuple[Task, ...] = ("T1", "T2", "T3", "T4", "T5", "T6", "T6b")
_ASKED: dict[Variant, Form] = {"B": "text", "I": "vectors", "H": "both"}
_BEAMS = 5
_UNSEEN_SEARCHED = 10  # titles searched for, so that five are left once seen ones are taken out
_SURROGATES: dict[str, LinearConfig | TreeConfig | StudentConfig] = {
    "linear surrogate": LinearConfig(),
    "tree surrogate": TreeConfig(),
    "student": StudentConfig(),
}


class ExplainerConfig(Config):
    """Options: which variant, which tasks, and what is trained."""

    variant: Variant = shaping("H", "histories and items as titles (B), as vectors (I), or as both (H)")
    hybrid: Literal["paper", "code"] = shaping(
        "paper", "H is trained on all three forms, as the paper says, or on the joint one alone, as its code does"
    )
    tasks: tuple[Task, ...] = shaping(_ALL, "leave one out to see what it gives, or add explanation", min_length=1)
    titles: int = shaping(10, "last titles of a history that are shown and asked for", ge=1)
    listed: bool = shaping(
        True,
        "T6's titles are one answer, oldest first; else one of them, drawn for each history, and those that a search finds "
        "likeliest are named",
    )
    projector: ProjectorConfig = shaping(lambda: ProjectorConfig(kind="mlp"), "of users and of items, one for each")
    injection: Injection = shaping("add", "tokens of vectors are added to a word's of their own, or replace it")
    lora: LoraOptions | None = shaping(LoraOptions, "updates of the language model; null leaves it as it is")
    embeddings: bool = shaping(False, "the language model's embedding table and head are trained too, as its code does")
    full: bool = shaping(False, "every weight of the language model is trained; set lora to null")
    catalogue_repeats: int = shaping(1, "how often T4 goes over all items", ge=1)
    catalogue_lists: int = shaping(
        0,
        "in how many lists of five each item is, whose titles T4 learns in turn; T2 asks for such lists in order",
        ge=0,
    )
    text_characters: int = shaping(200, "T4: characters of an item's description that are asked for", ge=0)
    pairs: int = shaping(1, "T3: of how many places of each user, where there are as many, a pair is learnt", ge=1)
    constrained: bool = shaping(False, "titles are decoded among the catalogue's; the published tables do without")
    prompts: ExplainerPrompts = shaping(ExplainerPrompts)

    @model_validator(mode="after")
    def _something_is_trained(self) -> ExplainerConfig:
        if self.variant == "B" and self.lora is None and not self.embeddings and not self.full:
            raise ValueError("variant B has no vectors to project, so that without lora nothing would be trained")
        if self.variant == "B" and set(self.tasks) == {"T6"}:
            raise ValueError("variant B shows the titles that T6 asks for, so that nothing would be learnt: add a task")
        check_updates(self.lora, self.full)
        return self

    def build(self) -> RecExplainer:
        return RecExplainer(self)


class RecExplainer:
    """Implements `System`."""

    judges = None

    def __init__(self, config: ExplainerConfig) -> None:
        self.config = config

    @property
    def name(self) -> str:
        return f"recexplainer-{self.config.variant.lower()}"

    @property
    def adapter(self) -> AdapterConfig:
        sources = () if self.config.variant == "B" else (USER, ITEM)
        projectors = dict.fromkeys(sources, self.config.projector)
        return AdapterConfig(
            projectors=projectors,
            injection=self.config.injection,
            lora=self.config.lora,
            embeddings=self.config.embeddings,
            full=self.config.full,
        )

    @property
    def prompts(self) -> ExplainerPrompts:
        """The prompts, with T6's templates for the list of titles or, if not `listed`, for one of them."""
        prompts = self.config.prompts
        return prompts if self.config.listed else prompts.model_copy(update={"history": prompts.history_of_one})

    @property
    def forms(self) -> tuple[Form, ...]:
        """The forms in which training shows users and items."""
        if self.config.variant == "H" and self.config.hybrid == "paper":
            return ("text", "vectors", "both")
        return (_ASKED[self.config.variant],)

    def examples(self, source: Source, users: int, positions: int, rng: np.random.Generator) -> Iterator[SoftExample]:
        """The training examples of the chosen tasks.

        Raises UsageError, before anything is trained, if fewer than two held-out users can be asked: each is the
        other's control.
        """
        if (asked := len(self._asked(source, 2))) < 2:
            raise UsageError(
                f"All but {asked} of the held-out users have seen nearly all of the catalogue's {source.recommender.items:,} "
                "items, and nothing is left to ask about.",
                "Align on a larger catalogue.",
            )
        examples = ExplainerExamples(
            source,
            self.forms,
            self.config.titles,
            self.prompts,
            rng,
            listed=self.config.listed,
            pairs=self.config.pairs,
            text_characters=self.config.text_characters,
        )
        yield from examples.of_users(self.config.tasks, users, positions)
        if "T4" in self.config.tasks:
            yield from examples.of_items(self.config.catalogue_repeats)
            yield from examples.of_lists(self.config.catalogue_lists)
        if "T5" in self.config.tasks:
            yield from source.replay

    def _asked(self, source: Source, most: int) -> NDArray[np.int64]:
        """At most `most` held-out users who can be asked; always the same ones, whatever else is drawn."""
        rows = source.rows(held_out=True, least=1, most=len(source.held_out), rng=np.random.default_rng(0))
        return rows[teachable(source, source.histories.lengths[rows])][:most]

    def shown(self, titles: Sequence[str], vectors: NDArray[np.float32]) -> PromptPieces:
        """How questions show users and items; `titles` are indexed by item index − 1, `vectors` [items + 1, width]."""
        return PromptPieces(_ASKED[self.config.variant], titles, vectors, self.config.titles)

    @property
    def history_question(self) -> TitleQuestion:
        """What T6 asks for."""
        return TitleQuestion(self.config.titles, searched=not self.config.listed)

    def choices(self, source: Source) -> Sequence[Choices]:
        """The constraints of answers to T1, T2 and, if asked, T6; T3 is scored instead. Empty if unconstrained."""
        if not self.config.constrained:
            return ()
        ranked = TitleQuestion(CANDIDATES)
        asked = (ONE_TITLE, ranked) if self.config.variant == "B" else (ONE_TITLE, ranked, self.history_question)
        return [question.choices(source.titles) for question in asked]

    def measured(self, source: Source, engine: Engine, asked: int, most_tokens: int) -> dict[str, float]:
        """How well the model predicts what the recommender says of held-out users; as a control, each asked as another.

        `T1 HR@5 unseen` (ours) leaves out titles of the user's own history, as the recommender's list does. Measured:
        of five titles that a small model names, the user has seen two or three.

        `T2 NDCG@5` measures the order that the model writes. `by interest` (ours) measures the order by how likely yes
        is for each candidate, as T3 asks: a small model can tell the better item long before it can write five in
        order.

        `refused` counts the questions of a task that could not be asked, for example because they are longer than the
        context. They count as answers that say nothing.
        """
        rows = self._asked(source, asked)
        taught = teach(source, rows, source.histories.lengths[rows], np.random.default_rng(0))
        found: dict[str, float] = {"asked": len(rows)}
        for shift, prefix in enumerate(("", f"{CONTROL}: ")):
            questions = HeldOutPrompts.of(
                source, rows, taught, self.shown(source.titles, source.item_states), self.prompts, shift
            )
            figures = self._figures(source, rows, taught, questions, engine, most_tokens)
            found |= {prefix + name: round(value, 4) for name, value in figures.items()}
        return found

    def beside(
        self, source: Source, lm: AdaptedLm, bare: Engine, users: int, positions: int, asked: int, most_tokens: int
    ) -> dict[str, float]:
        """Baselines: probes, surrogates and a distilled student, and the untrained language model in context.

        A probe tells whether the recommender's best unseen item is among its first five. There is one for a user's
        state, one for the state's tokens, and one for the language model's hidden state at the end of the question.
        `bare` is the language model without the adapter.
        """
        rng = np.random.default_rng(0)
        rows = source.rows(held_out=False, least=2, most=users, rng=rng)
        learnt = drawn_places(rows, source.histories.lengths[rows], positions, rng)
        rows = self._asked(source, asked)
        told = rows, source.histories.lengths[rows]
        seen = [source.before_cut(row) for row in rows.tolist()]
        reading = {kind: replace(mine, seen=seen) for kind, mine in self._probed(source, lm, *told).items()}
        named = {"hit@5": "T1 HR@5", "unseen hit@5": "T1 HR@5 unseen"}
        found = probed(self._probed(source, lm, *learnt), reading, source.recommender.items, named)
        lessons = [
            Lessons.of(source, owners[enough], events[enough], np.random.default_rng(0))
            for owners, events in (learnt, told)
            for enough in [teachable(source, events)]
        ]
        for name, surrogate in _SURROGATES.items():
            for figure, mean in surrogate_figures(surrogate.fit(lessons[0]), *lessons).items():
                found[f"{name}: {figure}"] = round(mean.value, 4)
        in_context = ExplainerConfig(variant="B", titles=self.config.titles, prompts=self.config.prompts).build()
        for figure, value in in_context.measured(source, bare, asked, most_tokens).items():
            if figure.startswith(("T", "refused")):
                found[f"in-context LM: {figure}"] = value
        return found

    def _probed(
        self, source: Source, lm: AdaptedLm, rows: NDArray[np.int64], events: NDArray[np.int64]
    ) -> dict[str, LabelledVectors]:
        enough = teachable(source, events)
        rows, events = rows[enough], events[enough]
        taught = teach(source, rows, events, np.random.default_rng(0))
        shown, template = self.shown(source.titles, source.item_states), self.config.prompts.next_item.test[0]
        users = [
            shown.user(source.items(row, count), state)
            for row, count, state in zip(rows.tolist(), events.tolist(), taught.states, strict=True)
        ]
        vectors = {
            "states": taught.states,
            "hidden states": lm.hidden_states([fill(template, {"user": user}) for user in users]),
        }
        if self.config.variant != "B":
            vectors["tokens"] = lm.tokens([Vectors(state[None], USER) for state in taught.states])
        return {
            kind: LabelledVectors(mine, taught.favourites[:, None].tolist(), rows) for kind, mine in vectors.items()
        }

    def _figures(
        self,
        source: Source,
        rows: NDArray[np.int64],
        taught: Taught,
        questions: HeldOutPrompts,
        engine: Engine,
        most_tokens: int,
    ) -> dict[str, float]:
        one, five, *held = self.choices(source) or (None, None)
        refused: dict[str, int] = {}
        several = Decoding(max_new_tokens=most_tokens, beams=_BEAMS)
        answers, refused["T1"] = _texts(engine, questions.next_item, several, one)
        lists = [[text.strip() for text in texts] for texts in answers]
        seen = [set(source.titles_of(source.before_cut(row))) for row in rows.tolist()]
        wide = searching(_UNSEEN_SEARCHED, most_tokens)
        answers, refused["T1 unseen"] = _texts(engine, questions.next_item, wide, one)
        searched = [likeliest(texts, wide.beams) for texts in answers]
        answers, refused["T2"] = _texts(engine, questions.ranking, Decoding(max_new_tokens=most_tokens), five)
        ranked = [titles_in(texts[0], source.known) for texts in answers]
        favourites = source.titles_of(taught.favourites.tolist())
        orders = [
            source.titles_of(mine[order].tolist()) for mine, order in zip(taught.candidates, taught.orders, strict=True)
        ]
        likelihoods, lost = _likelihoods(engine, questions.candidates)
        interest = (likelihoods[:, 0] - likelihoods[:, 1]).reshape(taught.candidates.shape)
        # A candidate that could not be asked about would rank before or behind all the others.
        interest[lost.reshape(interest.shape).any(1)] = 0
        refused["T2 by interest"] = int(lost.sum())
        likelihoods, lost = _likelihoods(engine, [*questions.liked, *questions.disliked])
        refused["T3"] = int(lost.sum())
        yes, no = likelihoods.T
        figures = {
            **retrieval_figures(lists, favourites, source.known),
            **unseen_retrieval_figures(searched, favourites, seen),
            **ranking_figures(ranked, orders),
            "T2 NDCG@5 by interest": Mean.of(order_ndcg(np.take_along_axis(interest, taught.orders, 1))),
            "T3 accuracy": Mean.of(decisions(yes, no, np.arange(len(yes)) < len(questions.liked))),
        }
        if self.config.variant != "B":
            histories = [source.titles_of(source.before_cut(row)[-self.config.titles :]) for row in rows.tolist()]
            several = self.history_question.decoding(most_tokens)
            answers, refused["T6"] = _texts(engine, questions.history, several, *held)
            if self.config.listed:
                told = [titles_in(texts[0], source.known) for texts in answers]
            else:
                told = [likeliest(texts, self.config.titles) for texts in answers]
            figures |= reconstruction_figures(told, histories, source.known)
        counts = {f"refused {task}": float(count) for task, count in refused.items()}
        return {name: mean.value for name, mean in figures.items()} | counts


def _texts(
    engine: Engine, prompts: Sequence[Prompt], decoding: Decoding, choices: Choices | None = None
) -> tuple[list[list[str]], int]:
    """The engine's answers to each prompt, best first (one empty text if refused), and how many were refused."""
    texts, refused = [[""]] * len(prompts), 0
    for outcome in engine.generate(prompts, decoding, choices):
        texts[outcome.index] = [beam.text for beam in outcome.beams] or [outcome.text]
        refused += outcome.error is not None
    return texts, refused


def _likelihoods(engine: Engine, prompts: Sequence[Prompt]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Log-likelihoods of yes and no, [prompts, 2], and whether the engine had no answer, bool [prompts].

    Both log-likelihoods are 0 where it had none.
    """
    found, refused = np.zeros((len(prompts), 2)), np.zeros(len(prompts), bool)
    for scores in engine.score(prompts, [(YES, NO)] * len(prompts)):
        found[scores.index] = scores.logprobs or (0.0, 0.0)
        refused[scores.index] = scores.error is not None
    return found, refused
