"""How commands end."""

import sys
from typing import NoReturn

MISTAKE = 2


def fail(message: object) -> NoReturn:
    """Ends a command because of a user's mistake: one line to stderr, exit status `MISTAKE`.

    A command wraps its body in ``try: ... except ValueError as error: fail(error)``.
    """
    print("error:", " ".join(str(message).split()), file=sys.stderr)
    raise SystemExit(MISTAKE)
