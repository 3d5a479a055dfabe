"""The command line: `swift-mega VERB …`. Each verb is a table entry and one function that calls `swift_mega.api`.

Heavy packages are imported only after the arguments of a verb are checked, so help and wrong arguments are answered at once. A UserError
prints one line on stderr and gives exit status 2; any other exception is a defect and prints its traceback.
"""

import contextlib
import errno
import os
import re
import sys
from collections.abc import Sequence

from swift_mega import __version__
from swift_mega.cli.arguments import read_arguments
from swift_mega.cli.help import overview, verb_help
from swift_mega.cli.table import VERBS
from swift_mega.config.load import kinds_of
from swift_mega.config.tree import suggest
from swift_mega.errors import AgreedError, UserError
from swift_mega.launch.ended import Ended, signals_raise
from swift_mega.launch.torchrun import rank_prefix, speaks
from swift_mega.launch.watch import RankError

FAILED, MISUSED, INTERRUPTED = 1, 2, 130
NO_WRITING = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb and returns the exit status.

    0: success. 1: a check failed, or a rank failed. 2: UserError. 130: Ctrl-C. 129 or 143: SIGHUP or SIGTERM (128 + the signal).
    """
    try:
        with signals_raise():
            status = _dispatch(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return status
    except AgreedError as error:
        return _complain(str(error), MISUSED) if speaks() else MISUSED
    except UserError as error:
        return _complain(str(error), MISUSED)
    except Ended as ended:
        # The terminal may be closed.
        with contextlib.suppress(OSError):
            if speaks():
                print(f"swift-mega: ended by signal {ended.signal} ({ended.signal.name})", file=sys.stderr)
        return 128 + ended.signal
    except RankError as error:
        # The message has the rank's traceback; the traceback of this process does not help.
        print(f"swift-mega: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        return _complain("interrupted", INTERRUPTED)
    # The reader of a pipe ended, as in `swift-mega … | head`.
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return FAILED
    except OSError as error:
        if error.errno not in NO_WRITING:
            raise
        return _complain(f"{error.filename or 'writing'}: {error.strerror}", MISUSED)


def _dispatch(argv: list[str]) -> int:
    if not argv:
        raise UserError(f"no verb given; choose one of {', '.join(VERBS)} (see swift-mega --help)")
    # SWIFT's command line: `megatron sft …`.
    name, *rest = argv[1:] if argv[0] == "megatron" and len(argv) > 1 else argv
    if name in ("--help", "-h", "help"):
        print(overview(VERBS.values()), end="")
        return 0
    if name == "--version":
        print(f"swift-mega {__version__}")
        return 0
    if name not in VERBS:
        raise UserError(f"unknown verb {name!r}{suggest(name, VERBS)}; choose one of {', '.join(VERBS)}")
    verb = VERBS[name]
    if "--help" in rest or "-h" in rest:
        print(verb_help(verb, kinds_of((), rest, {})), end="")
        return 0
    return verb.run(read_arguments(verb, rest))


def _complain(message: str, status: int) -> int:
    line = re.sub(r"\s*\n\s*", " ", message.strip())
    print(f"swift-mega: {rank_prefix()}error: {line}", file=sys.stderr)
    return status
