"""A small log whose candidates are ranked by a language model, and how `align --system trsr` is called on it."""

from __future__ import annotations

from tests.pipeline.small_logs import START, Event

RANKED_ITEMS, RANKED_USERS, RANKED_EVENTS = 60, 40, 8
LAST = "Unmistakable"
TERSE = "likes {summary} now {recent} next {candidate} ?"
RANKED_TRAINING = (
    *("--recommender.width", "8", "--recommender.hidden", "16", "--recommender.max_length", "8"),
    *("--recommender.dropout", "0", "--trainer.batch_size", "16", "--trainer.lr", "0.01"),
    *("--trainer.warmup_steps", "2", "--trainer.steps", "20", "--trainer.device", "cpu", "--hold_out", "1"),
    *("--trainer.validate_every", "null"),
)
ALIGN_TRSR = (
    *("--system", "trsr", "--trsr.prompt", TERSE, "--positions", "2", "--trainer.batch_size", "16"),
    *("--trainer.steps", "12", "--trainer.lr", "0.01", "--trainer.warmup_steps", "2", "--trainer.device", "cpu"),
    *("--trainer.validate_every", "null"),
)


def ranked_titles() -> dict[str, str]:
    return {f"i{n}": f"Title {n}" if n < RANKED_ITEMS else LAST for n in range(1, RANKED_ITEMS + 1)}


def ranked_events() -> list[Event]:
    """Each item is followed by the next one. Everybody's last is one that nobody chose before; and one user chose twice."""
    rows = [
        (f"u{user}", f"i{(7 * user + place) % (RANKED_ITEMS - 1) + 1}", START + place)
        for user in range(RANKED_USERS)
        for place in range(RANKED_EVENTS - 1)
    ]
    rows += [(f"u{user}", f"i{RANKED_ITEMS}", START + RANKED_EVENTS) for user in range(RANKED_USERS)]
    return [*rows, ("short", "i1", START), ("short", "i2", START + 1)]
