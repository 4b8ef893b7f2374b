"""The command line: parses, calls the Python functions of the same names, prints what came.

Heavy imports happen inside the commands, so that `moiety --help` answers at once.
"""

import sys
import traceback
from typing import NoReturn

from moiety.commands import (
    demo,
    expert,
    models,
    pipeline,
    planning,
    reading,
    reports,
    results,
    routing,
)
from moiety.commands.common import app
from moiety.console import show_error
from moiety.errors import InputError, OutputError

__all__ = [
    "app",
    "demo",
    "expert",
    "main",
    "models",
    "pipeline",
    "planning",
    "reading",
    "reports",
    "results",
    "routing",
]

INTERRUPTED = 130


def main() -> NoReturn:
    """Run the command line.

    Exit codes: 0 all went well, 1 a fault of ours, 2 input to mend, 130 interrupted.
    """
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        app(arguments, prog_name="moiety")
    except SystemExit as stop:
        if stop.code == INTERRUPTED:
            show_error("interrupted; the same command started again goes on where it can")
        raise
    except Exception as error:
        known = isinstance(error, InputError | OutputError)
        if debug:
            traceback.print_exc()
        elif known:
            show_error(str(error))
        else:
            show_error(f"{type(error).__name__}: {error} (run again with --debug to see where)")
        sys.exit(2 if known else 1)
    sys.exit(0)
