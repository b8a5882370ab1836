#!/usr/bin/env python3
"""Asks this container's own /healthz: exit code 0 when it answers. An argument is the URL to ask instead."""

from __future__ import annotations

import os
import sys
import urllib.request


def main() -> int:
    """Ask, and say why not."""
    address = os.environ.get("TURNOUT_METRICS_ADDRESS", "127.0.0.1:9100")
    port = address.rpartition(":")[2]
    url = sys.argv[1] if len(sys.argv) > 1 else f"http://127.0.0.1:{port}/healthz"
    try:
        with urllib.request.urlopen(url, timeout=4) as answer:
            return 0 if answer.status == 200 else 1
    except OSError as error:
        print(f"{url}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
