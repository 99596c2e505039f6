"""The command `intaglio`, also as `python -m intaglio`.

Exit codes: 130 after Ctrl-C; 141 if the reader of stdout has closed it, as in `intaglio chips | head -1`, which prints
no error; otherwise those of the command.
"""

from __future__ import annotations

import os
import signal
import sys

INTERRUPTED = 128 + signal.SIGINT
CUT_OFF = 128 + signal.SIGPIPE


def main() -> None:
    """Run the command line and end the process with its exit code."""
    try:
        from intaglio.cli import app

        try:
            app()
        finally:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C ends what remains, without a traceback
            sys.stdout.flush()
    except KeyboardInterrupt:  # while modules were imported; the command's own are handled by cli.group
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter flushes stdout once more
        sys.exit(CUT_OFF)


if __name__ == "__main__":
    main()
