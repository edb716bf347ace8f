"""Turns queries into requests to the language model, and its results into answers. It knows neither HTTP nor Ray.

Prompts are made here, where the recommender is. They are sent as values to the language model, wherever that runs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from raypipe.engines.engine import Outcome
from raypipe.metrics.recovery import titles_in
from raypipe.recommenders.windows import Histories
from raypipe.serving.adapters import EXPLAINER, INTERPRETER, RANKER, WRITER, Ranker, ServedAdapter, adapters_of_kind
from raypipe.serving.config import ServiceConfig
from raypipe.serving.lm_engines import (
    TOO_LONG,
    Explain,
    Failed,
    Generate,
    ModelKey,
    Rank,
    RankScores,
    Result,
    Summarize,
    Task,
    WriteList,
    WrittenList,
)
from raypipe.serving.queries import (
    ExplainAnswer,
    ExplainQuery,
    InterpretAnswer,
    InterpretQuery,
    NextAnswer,
    NextItem,
    NextQuery,
    OracleQuery,
    RerankAnswer,
    RerankedItem,
    RerankQuery,
    ResidualQuery,
    SummaryAnswer,
    SummaryQuery,
    TitleAnswer,
)
from raypipe.serving.recommending import ListSpec, known_histories, queries_of, state_of
from raypipe.serving.served import Served
from raypipe.serving.service import RefusedQueryError, ResolvedUser, Service, origin, shown_items
from raypipe.systems.explanations import Explanation
from raypipe.systems.interpreter_figures import SEPARATOR, title_in
from raypipe.systems.oracles import oracles_of
from raypipe.systems.recexplainer import RecExplainer
from raypipe.systems.recinterpreter import Reading, RecInterpreter, oracle_prompt, recovery_prompt, residual_prompt
from raypipe.systems.summaries import UserSummary, blocks_of
from raypipe.systems.trsr import best_first
from raypipe.systems.trsr_past import PastSummaries

LmQuery = ExplainQuery | InterpretQuery | ResidualQuery | OracleQuery | SummaryQuery | RerankQuery | NextQuery
LmAnswer = ExplainAnswer | InterpretAnswer | TitleAnswer | SummaryAnswer | RerankAnswer | NextAnswer
R = TypeVar("R", Explanation, Outcome, UserSummary, RankScores, WrittenList)


@dataclass(frozen=True)
class LmRequest:
    """A task for the language model of `key`, and how its result becomes an answer.

    `answer` raises RefusedQueryError if the result holds none.
    """

    key: ModelKey
    task: Task
    answer: Callable[[Result], LmAnswer]


class LmRequestBuilder:
    """Makes requests with the release and night that are served when a batch begins, the same for the whole batch."""

    def __init__(self, config: ServiceConfig, service: Service) -> None:
        self.config, self.service = config, service

    def build(self, queries: Sequence[LmQuery]) -> list[LmRequest | LmAnswer | RefusedQueryError]:
        """The requests, in the order of the queries.

        A query that needs no language model gets its answer instead, and one that cannot be asked gets its error; the
        others are not affected.
        """
        served = self.service.served()
        users = self.service.resolve_users(served, queries)
        blocks_left = self.config.limits.batch_blocks
        found: list[LmRequest | LmAnswer | RefusedQueryError] = []
        for query, user in zip(queries, users, strict=True):
            try:
                if isinstance(user, RefusedQueryError):
                    raise user
                request = self._build(served, query, user)
                if isinstance(request, LmRequest) and isinstance(request.task, Summarize):
                    if len(request.task.blocks) > blocks_left:
                        most = self.config.limits.batch_blocks * self.config.language.summaries.block_items
                        told = f"Histories of a batch that are summed up have at most {most:,} items."
                        raise RefusedQueryError("too_much", told)
                    blocks_left -= len(request.task.blocks)
                found.append(request)
            except RefusedQueryError as problem:
                found.append(problem)
        return found

    def _build(self, served: Served, query: LmQuery, user: ResolvedUser) -> LmRequest | LmAnswer:
        if query.user_id is not None and not user.is_known:
            raise RefusedQueryError("no_such_user", "The night that is served knows no user of this id.")
        if isinstance(query, SummaryQuery):
            return self._summary(served, query, user)
        if isinstance(query, ExplainQuery):
            return self._explanation(served, query, user)
        if isinstance(query, RerankQuery):
            return self._ranking(served, query, user)
        if isinstance(query, NextQuery):
            return self._continuation(served, query, user)
        return self._reading(served, query, user)

    def _summary(self, served: Served, query: SummaryQuery, user: ResolvedUser) -> LmRequest | LmAnswer:
        if query.user_id is not None:
            return SummaryAnswer(user_id=query.user_id, summaries=dict(user.summaries), served=origin(served))
        options = self.config.language.summaries
        lines = served.catalogue.lines(user.inputs.items.tolist(), options.prompts)
        if not lines:
            raise RefusedQueryError("nothing_known", "The history has no item of the catalogue.")
        blocks = blocks_of(lines, options)
        if len(blocks) > self.config.limits.blocks:
            most = self.config.limits.blocks * options.block_items
            raise RefusedQueryError("too_much", f"A history that is summed up has at most {most:,} items.")

        def answer(result: Result) -> SummaryAnswer:
            summary = _result_as(result, UserSummary)
            if summary.reason:
                raise _no_answer(summary.reason)
            return SummaryAnswer(
                user_id=None,
                unknown_items=user.unknown_items,
                summaries={options.paradigm: summary.summary},
                served=origin(served),
            )

        return LmRequest(self._key(served), Summarize(blocks), answer)

    def _explanation(self, served: Served, query: ExplainQuery, user: ResolvedUser) -> LmRequest:
        adapter = _choose_adapter(served, query.adapter, EXPLAINER)
        system = adapter.system
        assert isinstance(system, RecExplainer)
        histories, state = state_of(served.recommender, user.inputs)
        if not len(state):
            raise _nothing_known()
        item = self._item(served, query, user)
        shown = system.shown(served.catalogue.for_prompts.titles, served.item_states)
        request = shown.request(histories.items.tolist(), state[0], item, system.config.prompts, query.focus)

        def answer(result: Result) -> ExplainAnswer:
            explanation = _result_as(result, Explanation)
            if explanation.reason:
                raise _no_answer(explanation.reason)
            return ExplainAnswer(
                item=shown_items(served, np.array([item]), None)[0],
                decision="yes" if explanation.decision == "yes" else "no",
                text=explanation.text,
                **_facts(served, user, adapter),
            )

        return LmRequest(self._key(served, adapter), Explain(request), answer)

    def _item(self, served: Served, query: ExplainQuery, user: ResolvedUser) -> int:
        if query.item_id is None:
            (ranked,) = served.recommend([(user.inputs, ListSpec(1, filter_seen=self.config.filter_seen))])
            if not len(ranked.items):
                raise RefusedQueryError("no_such_item", "Nothing is recommended: name an item.")
            return int(ranked.items[0])
        item = served.catalogue.index_of.get(query.item_id, 0)
        if not 0 < item <= served.recommender.items:
            raise RefusedQueryError("no_such_item", "The recommender knows no item of this id.")
        return item

    def _ranking(self, served: Served, query: RerankQuery, user: ResolvedUser) -> LmRequest:
        adapter = _choose_adapter(served, query.adapter, RANKER)
        key, ranker = self._key(served, adapter), adapter.system
        assert isinstance(ranker, Ranker)
        items = user.inputs.items
        if not len(items):
            raise RefusedQueryError("nothing_known", "The history has no item of the catalogue.")
        if query.items is not None:
            candidates = served.catalogue.indices(query.items)
            unknown = [item for item in query.items if item not in served.catalogue.index_of]
        else:
            spec = ListSpec(query.count, filter_seen=self.config.filter_seen)
            (ranked,) = served.recommend([(user.inputs, spec)])
            candidates, unknown = ranked.items.astype(np.int32), []
        if not len(candidates):
            raise RefusedQueryError("no_such_item", "There is no item of the catalogue to be put in order.")
        text = user.summaries.get(ranker.summaries or "")
        summaries = PastSummaries({0: [(0, text)]} if text else {})
        histories = Histories(items, np.array([len(items)]), np.array([user.inputs.user]))
        trsr, rows = ranker.trsr.of(histories, summaries), np.zeros(1, np.int64)
        (prompts,) = trsr.prompts(rows, 0, candidates[None], trsr.summaries(rows, 0))

        def answer(result: Result) -> RerankAnswer:
            ranked = _result_as(result, RankScores)
            if ranked.reason:
                raise _no_answer(ranked.reason)
            yes = ranked.yes
            ids, titles = served.catalogue.ids, served.catalogue.titles
            pairs = [(int(candidates[place]) - 1, float(yes[place])) for place in best_first(yes).tolist()]
            found = [RerankedItem(item_id=ids[at], title=titles[at], score=score) for at, score in pairs]
            found += [RerankedItem(item_id=item, title="", score=None) for item in unknown]
            return RerankAnswer(items=found, **_facts(served, user, adapter))

        return LmRequest(key, Rank(prompts, tuple(trsr.answers)), answer)

    def _continuation(self, served: Served, query: NextQuery, user: ResolvedUser) -> LmRequest:
        adapter = _choose_adapter(served, query.adapter, WRITER)
        key = replace(self._key(served, adapter), catalogue=served.catalogue_version)
        history = user.inputs.items.tolist()
        if not history:
            raise RefusedQueryError("nothing_known", "The history has no item of the catalogue.")
        spec = self.service.list_spec(served, query)
        ids, titles = served.catalogue.ids, served.catalogue.titles
        allowed = served.catalogue.allowed(spec.only, len(ids)).copy()
        if spec.deny is not None:
            allowed[spec.deny] = False

        def answer(result: Result) -> NextAnswer:
            written = _result_as(result, WrittenList)
            if written.reason:
                raise _no_answer(written.reason)
            pairs = [pair for pair in zip(written.items, written.logprobs, strict=True) if allowed[pair[0]]]
            found = [
                NextItem(item_id=ids[item - 1], title=titles[item - 1], score=score)
                for item, score in pairs[: spec.count]
            ]
            return NextAnswer(items=found, **_facts(served, user, adapter))

        return LmRequest(key, WriteList(history, spec.filter_seen), answer)

    def _reading(
        self, served: Served, query: InterpretQuery | ResidualQuery | OracleQuery, user: ResolvedUser
    ) -> LmRequest:
        adapter = _choose_adapter(served, query.adapter, INTERPRETER, isinstance(query, OracleQuery))
        system = adapter.system
        assert isinstance(system, RecInterpreter)
        histories = known_histories(served.recommender, [user.inputs])
        length = int(histories.lengths[0])
        if length < (2 if isinstance(query, ResidualQuery) else 1):
            raise _nothing_known()
        source = replace(served.source, histories=histories, held_out=np.zeros(1, bool))
        (reading,) = system.readings(source, np.array([0]), np.array([length]))
        if isinstance(query, InterpretQuery):
            prompt = recovery_prompt(system.recovery.test[0], reading)
            task, build = Generate(prompt, system.recovery_question), _interpreted(served.source.known, reading)
            return self._text_request(served, user, adapter, task, build)
        template = system.prompts.residual.test[0]
        if isinstance(query, ResidualQuery):
            task = Generate(residual_prompt(template, reading))
            return self._text_request(served, user, adapter, task, _named(served.source.known, reading.title))
        (oracle,) = oracles_of(source, queries_of(served.recommender, user.inputs))
        task = Generate(oracle_prompt(template, reading, oracle))
        return self._text_request(served, user, adapter, task, _named(served.source.known, oracle.title))

    def _text_request(
        self,
        served: Served,
        user: ResolvedUser,
        adapter: ServedAdapter,
        task: Generate,
        build: Callable[[str, dict[str, Any]], LmAnswer],
    ) -> LmRequest:
        def answer(result: Result) -> LmAnswer:
            outcome = _result_as(result, Outcome)
            if outcome.error is not None:
                raise _no_answer(outcome.error.kind)
            return build(task.question.answer(outcome).strip(), _facts(served, user, adapter))

        key = self._key(served, adapter)
        if self.config.language.reading.constrained:
            key = replace(key, catalogue=served.catalogue_version)
        return LmRequest(key, task, answer)

    def _key(self, served: Served, adapter: ServedAdapter | None = None) -> ModelKey:
        if not self.config.language.replicas:
            raise RefusedQueryError("no_language_model", "This service puts nothing into words.")
        if not served.lm:
            raise RefusedQueryError("no_language_model", "The release that is served has no language model.")
        return ModelKey(served.lm, adapter.model if adapter is not None else "")


def _interpreted(known: Collection[str], reading: Reading) -> Callable[[str, dict[str, Any]], LmAnswer]:
    def build(text: str, facts: dict[str, Any]) -> InterpretAnswer:
        return InterpretAnswer(titles=titles_in(text, known, SEPARATOR), history=reading.history, text=text, **facts)

    return build


def _named(known: Collection[str], expected: str) -> Callable[[str, dict[str, Any]], LmAnswer]:
    def build(text: str, facts: dict[str, Any]) -> TitleAnswer:
        title = title_in(text, known)
        return TitleAnswer(title=title if title in known else None, expected=expected, text=text, **facts)

    return build


def _choose_adapter(served: Served, named: str | None, kind: str, oracle: bool = False) -> ServedAdapter:
    """The adapter of this `kind` with the name `named`, the first one if that is None.

    An `oracle` needs an interpreter that was trained with `after: item`. Raises RefusedQueryError if the release has no
    such adapter.
    """
    fit = [
        adapter
        for adapter in adapters_of_kind(served.adapters, kind)
        if not oracle or (isinstance(adapter.system, RecInterpreter) and adapter.system.config.after == "item")
    ]
    for adapter in fit:
        if named in {None, adapter.name}:
            return adapter
    what = f"no adapter {named} for this" if named is not None and fit else f"no adapter of {kind} for this"
    there = ", ".join(adapter.name for adapter in fit) or "none"
    raise RefusedQueryError("no_adapter", f"The release that is served has {what}; it has {there}.")


def _facts(served: Served, user: ResolvedUser, adapter: ServedAdapter) -> dict[str, Any]:
    return {
        "known": user.is_known,
        "unknown_items": user.unknown_items,
        "adapter": adapter.name,
        "served": origin(served),
    }


def _result_as(result: Result, kind: type[R]) -> R:
    if isinstance(result, Failed):
        raise RefusedQueryError(result.code, result.message)
    assert isinstance(result, kind)
    return result


def _nothing_known() -> RefusedQueryError:
    return RefusedQueryError("nothing_known", "The recommender knows too little of this history to put it into words.")


def _no_answer(reason: str) -> RefusedQueryError:
    if reason == "prompt_too_long":
        return RefusedQueryError(TOO_LONG.code, TOO_LONG.message)
    if reason == "not_finite":
        return RefusedQueryError("no_answer", "The language model found no number for what comes next.")
    return RefusedQueryError("no_answer", f"The language model found no words that pass the checks: {reason}.")
