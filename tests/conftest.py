"""Imported before gRPC is: Turnout tells it to leave forked children alone, which it reads only once."""

import turnout.wire  # noqa: F401
