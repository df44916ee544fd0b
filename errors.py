"""A user's mistake: one clear line on stderr and exit status 2, in every program of this repository."""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """A mistake that the user can mend: reported as one line, exit status 2, no traceback."""


@contextmanager
def user_errors() -> Iterator[None]:
    """Around a program's main(): turns UserError into one line on stderr and exit status 2; Ctrl-C ends quietly."""
    try:
        yield
    except UserError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(128 + 2)


class CommandLine(argparse.ArgumentParser):
    """argparse whose errors are one line, like all others."""

    def error(self, message: str) -> None:
        raise UserError(message)
