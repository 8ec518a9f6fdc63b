"""Errors that are for people: one line that names what, where, and how to mend it."""

import os
import sys
from collections.abc import Callable


class UserError(ValueError):
    """Bad input.  The programs print its message alone and exit with status 2."""


class BadSample(UserError):
    """A sample that training can do without: it is skipped and counted under `reason`.  Elsewhere it ends the program."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason

    def __reduce__(self):
        return BadSample, (self.reason, str(self))


class Stopped(Exception):
    """A signal ended a run that has saved its state.  The programs exit with status 75: schedulers may start it again."""


def warn(message: str) -> None:
    """Tells people of what the program passes over."""
    print(f"warning: {message}", file=sys.stderr)


def run_program(main: Callable[[list[str]], None], arguments: list[str], interrupted: str = "interrupted") -> None:
    """Runs a program's `main`; bad input ends it with one line and status 2, and Ctrl-C with `interrupted` and 130."""
    try:
        main(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(os.EX_TEMPFAIL)
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        sys.exit(130)
