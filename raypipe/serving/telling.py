"""From queries to what the language model is asked, and from what it says to answers: no HTTP and no Ray.

Prompts are made here, where the recommender is; they go to the language model as values, wherever that is.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from raypipe.engines.engine import Outcome
from raypipe.language.prompt import Prompt
from raypipe.metrics.recovery import titles_in
from raypipe.recommenders.windows import Histories
from raypipe.serving.config import ServiceConfig
from raypipe.serving.language import (
    UNREAD,
    Continue,
    Continued,
    Explain,
    Failed,
    Key,
    Likelihoods,
    Rank,
    Result,
    Summarise,
    Task,
    Write,
)
from raypipe.serving.queries import (
    Explained,
    ExplainQuery,
    Interpreted,
    InterpretQuery,
    Likely,
    Line,
    Named,
    Next,
    NextQuery,
    OracleQuery,
    Reranked,
    RerankQuery,
    ResidualQuery,
    Summaries,
    SummaryQuery,
)
from raypipe.serving.readers import EXPLAINER, INTERPRETER, RANKER, WRITER, Ranker, Reader, of_kind
from raypipe.serving.recommending import Wanted, known_histories, state_of
from raypipe.serving.served import Served
from raypipe.serving.service import Person, RefusedQueryError, Service, origin, shown_items
from raypipe.systems.explanations import Explanation
from raypipe.systems.recexplainer import RecExplainer
from raypipe.systems.recinterpreter import (
    SEPARATOR,
    Reading,
    RecInterpreter,
    oracle_prompt,
    oracles_of,
    recovery_prompt,
    residual_prompt,
    title_in,
)
from raypipe.systems.summaries import UserSummary, blocks_of
from raypipe.systems.trsr import PastSummaries, best_first

TellQuery = ExplainQuery | InterpretQuery | ResidualQuery | OracleQuery | SummaryQuery | RerankQuery | NextQuery
Telling = Explained | Interpreted | Named | Summaries | Reranked | Next
R = TypeVar("R", Explanation, Outcome, UserSummary, Likelihoods, Continued)


@dataclass(frozen=True)
class Question:
    """A task for the language model of `key`, and what its result is as an answer; RefusedQueryError where it is none."""

    key: Key
    task: Task
    answer: Callable[[Result], Telling]


class Teller:
    """Makes questions by whatever is served at the moment: a whole batch by one release and night."""

    def __init__(self, config: ServiceConfig, service: Service) -> None:
        self.config, self.service = config, service

    def ask(self, queries: Sequence[TellQuery]) -> list[Question | Telling | RefusedQueryError]:
        """In their order; what needs no language model is answered, and what cannot be asked costs the others nothing."""
        served = self.service.served()
        people = self.service.people(served, queries)
        found: list[Question | Telling | RefusedQueryError] = []
        for query, person in zip(queries, people, strict=True):
            try:
                if isinstance(person, RefusedQueryError):
                    raise person
                found.append(self._ask(served, query, person))
            except RefusedQueryError as problem:
                found.append(problem)
        return found

    def _ask(self, served: Served, query: TellQuery, person: Person) -> Question | Telling:
        if query.user_id is not None and not person.is_known:
            raise RefusedQueryError("no_such_user", "The night that is served knows no user of this id.")
        if isinstance(query, SummaryQuery):
            return self._summary(served, query, person)
        if isinstance(query, ExplainQuery):
            return self._explanation(served, query, person)
        if isinstance(query, RerankQuery):
            return self._ranking(served, query, person)
        if isinstance(query, NextQuery):
            return self._continuation(served, query, person)
        return self._reading(served, query, person)

    def _summary(self, served: Served, query: SummaryQuery, person: Person) -> Question | Telling:
        if query.user_id is not None:
            return self.service.summaries(query.user_id)
        options = self.config.language.summaries
        lines = served.catalogue.lines(person.known.items.tolist(), options.prompts)
        if not lines:
            raise RefusedQueryError("nothing_known", "The history has no item of the catalogue.")
        blocks = blocks_of(lines, options)
        if len(blocks) > self.config.limits.blocks:
            most = self.config.limits.blocks * options.block_items
            raise RefusedQueryError("too_much", f"A history that is summed up has at most {most:,} items.")

        def answer(result: Result) -> Summaries:
            summary = _given(result, UserSummary)
            if summary.reason:
                raise _no_answer(summary.reason)
            return Summaries(
                user_id=None,
                unknown_items=person.unknown_items,
                summaries={options.paradigm: summary.summary},
                served=origin(served),
            )

        return Question(self._key(served), Summarise(blocks), answer)

    def _explanation(self, served: Served, query: ExplainQuery, person: Person) -> Question:
        reader = _chosen(served, query.adapter, EXPLAINER)
        system = reader.system
        assert isinstance(system, RecExplainer)
        histories, state = state_of(served.recommender, person.known)
        if not len(state):
            raise _nothing_known()
        item = self._item(served, query, person)
        shown = system.shown(served.catalogue.for_prompts.titles, served.item_states)
        request = shown.request(histories.items.tolist(), state[0], item, system.config.prompts, query.focus)

        def answer(result: Result) -> Explained:
            told = _given(result, Explanation)
            if told.reason:
                raise _no_answer(told.reason)
            return Explained(
                item=shown_items(served, np.array([item]), None)[0],
                decision="yes" if told.decision == "yes" else "no",
                text=told.text,
                **_facts(served, person, reader),
            )

        return Question(self._key(served, reader), Explain(request), answer)

    def _item(self, served: Served, query: ExplainQuery, person: Person) -> int:
        if query.item_id is None:
            (ranked,) = served.recommend([(person.known, Wanted(1, filter_seen=self.config.filter_seen))])
            if not len(ranked.items):
                raise RefusedQueryError("no_such_item", "Nothing is recommended: name an item.")
            return int(ranked.items[0])
        item = served.catalogue.index_of.get(query.item_id, 0)
        if not 0 < item <= served.recommender.items:
            raise RefusedQueryError("no_such_item", "The recommender knows no item of this id.")
        return item

    def _ranking(self, served: Served, query: RerankQuery, person: Person) -> Question:
        reader = _chosen(served, query.adapter, RANKER)
        key, ranker = self._key(served, reader), reader.system
        assert isinstance(ranker, Ranker)
        items = person.known.items
        if not len(items):
            raise RefusedQueryError("nothing_known", "The history has no item of the catalogue.")
        if query.items is not None:
            candidates = served.catalogue.indices(query.items)
            unknown = [item for item in query.items if item not in served.catalogue.index_of]
        else:
            wanted = Wanted(query.count, filter_seen=self.config.filter_seen)
            (ranked,) = served.recommend([(person.known, wanted)])
            candidates, unknown = ranked.items.astype(np.int32), []
        if not len(candidates):
            raise RefusedQueryError("no_such_item", "There is no item of the catalogue to be put in order.")
        text = person.summaries.get(self.config.language.ranking or "")
        summaries = PastSummaries({0: [(0, text)]} if text else {})
        histories = Histories(items, np.array([len(items)]), np.array([person.known.user]))
        trsr, rows = ranker.trsr.of(histories, summaries), np.zeros(1, np.int64)
        (prompts,) = trsr.prompts(rows, 0, candidates[None], trsr.summaries(rows, 0))

        def answer(result: Result) -> Reranked:
            yes = _given(result, Likelihoods).yes
            if yes is None:
                raise _no_answer("prompt_too_long")
            ids, titles = served.catalogue.ids, served.catalogue.titles
            pairs = [(int(candidates[place]) - 1, float(yes[place])) for place in best_first(yes).tolist()]
            found = [Likely(item_id=ids[at], title=titles[at], score=score) for at, score in pairs]
            found += [Likely(item_id=item, title="", score=None) for item in unknown]
            return Reranked(items=found, **_facts(served, person, reader))

        return Question(key, Rank(prompts, tuple(trsr.answers)), answer)

    def _continuation(self, served: Served, query: NextQuery, person: Person) -> Question:
        reader = _chosen(served, query.adapter, WRITER)
        key = replace(self._key(served, reader), catalogue=served.catalogue_version)
        history = person.known.items.tolist()
        if not history:
            raise RefusedQueryError("nothing_known", "The history has no item of the catalogue.")
        wanted = self.service.wanted(served, query)
        ids, titles = served.catalogue.ids, served.catalogue.titles
        allowed = served.catalogue.allowed(wanted.only, len(ids)).copy()
        if wanted.deny is not None:
            allowed[wanted.deny] = False

        def answer(result: Result) -> Next:
            written = _given(result, Continued)
            pairs = [pair for pair in zip(written.items, written.logprobs, strict=True) if allowed[pair[0]]]
            found = [
                Line(item_id=ids[item - 1], title=titles[item - 1], score=score)
                for item, score in pairs[: wanted.count]
            ]
            return Next(items=found, **_facts(served, person, reader))

        return Question(key, Continue(history, wanted.filter_seen), answer)

    def _reading(self, served: Served, query: InterpretQuery | ResidualQuery | OracleQuery, person: Person) -> Question:
        reader = _chosen(served, query.adapter, INTERPRETER, isinstance(query, OracleQuery))
        system = reader.system
        assert isinstance(system, RecInterpreter)
        histories = known_histories(served.recommender, [person.known])
        length = int(histories.lengths[0])
        if length < (2 if isinstance(query, ResidualQuery) else 1):
            raise _nothing_known()
        source = replace(served.source, histories=histories, held_out=np.zeros(1, bool))
        (reading,) = system.readings(source, np.array([0]), np.array([length]))
        titles = system.config.titles
        if isinstance(query, InterpretQuery):
            prompt = recovery_prompt(system.prompts.recovery.test[0], reading)
            return self._question(served, person, reader, prompt, titles, _interpreted(served.source.known, reading))
        template = system.prompts.residual.test[0]
        if isinstance(query, ResidualQuery):
            prompt = residual_prompt(template, reading)
            return self._question(served, person, reader, prompt, 1, _named(served.source.known, reading.title))
        (oracle,) = oracles_of(source, [reading])
        prompt = oracle_prompt(template, reading, oracle)
        return self._question(served, person, reader, prompt, 1, _named(served.source.known, oracle.title))

    def _question(
        self,
        served: Served,
        person: Person,
        reader: Reader,
        prompt: Prompt,
        titles: int,
        build: Callable[[str, dict[str, Any]], Telling],
    ) -> Question:
        def answer(result: Result) -> Telling:
            outcome = _given(result, Outcome)
            if outcome.error is not None:
                raise _no_answer(outcome.error.kind)
            return build(outcome.text.strip(), _facts(served, person, reader))

        assert isinstance(reader.system, RecInterpreter)
        key = self._key(served, reader)
        if reader.system.config.constrained:
            key = replace(key, catalogue=served.catalogue_version)
        return Question(key, Write(prompt, titles), answer)

    def _key(self, served: Served, reader: Reader | None = None) -> Key:
        if not self.config.language.replicas:
            raise RefusedQueryError("no_language_model", "This service puts nothing into words.")
        if not served.lm:
            raise RefusedQueryError("no_language_model", "The release that is served has no language model.")
        return Key(served.lm, reader.adapter if reader is not None else "")


def _interpreted(known: Collection[str], reading: Reading) -> Callable[[str, dict[str, Any]], Telling]:
    def build(text: str, facts: dict[str, Any]) -> Interpreted:
        return Interpreted(titles=titles_in(text, known, SEPARATOR), history=reading.history, text=text, **facts)

    return build


def _named(known: Collection[str], expected: str) -> Callable[[str, dict[str, Any]], Telling]:
    def build(text: str, facts: dict[str, Any]) -> Named:
        title = title_in(text, known)
        return Named(title=title if title in known else None, expected=expected, text=text, **facts)

    return build


def _chosen(served: Served, named: str | None, kind: str, oracle: bool = False) -> Reader:
    """The adapter that is asked for, or the first that can do what is asked."""
    fit = [
        reader
        for reader in of_kind(served.readers, kind)
        if not oracle or (isinstance(reader.system, RecInterpreter) and reader.system.config.after == "item")
    ]
    for reader in fit:
        if named in {None, reader.name}:
            return reader
    what = f"no adapter {named} for this" if named is not None and fit else f"no adapter of {kind} for this"
    there = ", ".join(reader.name for reader in fit) or "none"
    raise RefusedQueryError("no_adapter", f"The release that is served has {what}; it has {there}.")


def _facts(served: Served, person: Person, reader: Reader) -> dict[str, Any]:
    return {
        "known": person.is_known,
        "unknown_items": person.unknown_items,
        "adapter": reader.name,
        "served": origin(served),
    }


def _given(result: Result, kind: type[R]) -> R:
    if isinstance(result, Failed):
        raise RefusedQueryError(result.code, result.message)
    assert isinstance(result, kind)
    return result


def _nothing_known() -> RefusedQueryError:
    return RefusedQueryError("nothing_known", "The recommender knows too little of this history to put it into words.")


def _no_answer(reason: str) -> RefusedQueryError:
    if reason == "prompt_too_long":
        return RefusedQueryError(UNREAD.code, UNREAD.message)
    return RefusedQueryError("no_answer", f"The language model found no words that pass the checks: {reason}.")
