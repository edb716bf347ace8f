"""The errors that a user can cause. Each carries its remedy.

Anything that a user did wrong is raised as one of these; it ends as one paragraph on stderr and an exit code. What only
this package could have done wrong is an `assert`, or an ordinary exception with its traceback.
"""

from __future__ import annotations


class RaypipeError(Exception):
    """A problem that the user can act on: what happened, and the remedy. It ends a job with `exit_code`."""

    exit_code = 1

    def __init__(self, problem: str, remedy: str = "") -> None:
        super().__init__(f"{problem} {remedy}".strip())
        self.problem = problem
        self.remedy = remedy

    def __reduce__(self) -> tuple[type[RaypipeError], tuple[str, str]]:
        # Errors cross process borders because Ray pickles them, and the default would pass the joined text as
        # `problem`.
        return type(self), (self.problem, self.remedy)


class UnavailableError(RaypipeError):
    """Something needed is in use or out of reach for now. The same command should be tried again. Exit code 1."""


class UsageError(RaypipeError):
    """Wrong input, configuration or workspace, found before work starts. Exit code 2."""

    exit_code = 2


class AccessError(UsageError):
    """A place or a file that may not be read or written. Its content may be intact and readable later."""


class RefusedError(RaypipeError):
    """A quality gate refused. The release that was in force before stays in force. Exit code 3."""

    exit_code = 3
