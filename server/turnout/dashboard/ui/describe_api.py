"""Prints the API's OpenAPI document, from which `npm run api` makes the page's types."""

from __future__ import annotations

import json
import tempfile

from turnout.dashboard.app import create_app
from turnout.dashboard.reader import StoreReader
from turnout.server import RunStore


def main() -> None:
    """Print the document of a dashboard over an empty store."""
    with tempfile.TemporaryDirectory() as folder:
        RunStore(folder).close()
        app = create_app(StoreReader(folder), catalogue=list)
        print(json.dumps(app.openapi(), indent=2))


if __name__ == "__main__":
    main()
