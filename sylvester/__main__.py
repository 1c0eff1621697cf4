"""The `sylvester` command: exit codes 0 done, 1 a `CompileError` (message, no traceback), 2 usage, 130 interrupted."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ImportError as error:
        print(f"error: the command line needs {error.name}\nhint: pip install 'sylvester[cli]'", file=sys.stderr)
        return 1
    from sylvester.cli import run
    from sylvester.compiler.errors import CompileError

    try:
        return run(sys.argv[1:] if arguments is None else arguments)
    except CompileError as error:
        print("\n".join([f"error: {error}", *getattr(error, "__notes__", [])]), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output went away; Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == "__main__":
    sys.exit(main())
