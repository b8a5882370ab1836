"""Settings of the property tests: a busy machine is no reason to fail, and every run tries the same."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("turnout", deadline=None, derandomize=True)
settings.load_profile("turnout")
