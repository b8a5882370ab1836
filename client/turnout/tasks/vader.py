"""The human-rated sentences behind VADER (Hutto and Gilbert, ICWSM 2014), read from the package's archive."""

from __future__ import annotations

import io
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from turnout.tasks.partition import IntArray
from turnout.tasks.source_archives import VADER, read_member
from turnout.tasks.task import Vector
from turnout.wire.errors import DataError

DOMAINS: Final = ("tweets", "amazon", "movies", "nyt")
_FILES: Final = ("tweets", "amazonReviewSnippets", "movieReviewSnippets", "nytEditorialSnippets")
# Sentences of these come from reviews and articles: ids are "document_sentence".
_WITH_DOCUMENTS: Final = frozenset({"amazon", "nyt"})
_FOLDER: Final = "hutto_ICWSM_2014"
_OUTER: Final = f"{VADER.package}-{VADER.version}/additional_resources/{_FOLDER}.tar.gz"


@dataclass(frozen=True)
class RatedSentences:
    """Sentences in the archive's order.

    ``ratings``: means over people, from -4 to 4; ``domains``: index into `DOMAINS`; ``documents``: a number
    for each review or article, one of its own for each sentence of the other domains.
    """

    texts: tuple[str, ...]
    ratings: Vector
    domains: IntArray
    documents: IntArray

    @property
    def has_document(self) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        """Which sentences belong to a review or an article."""
        return np.isin(self.domains, [DOMAINS.index(name) for name in _WITH_DOCUMENTS])


def load_vader(data_dir: str | Path | None = None) -> RatedSentences:
    """Return the 23,703 sentences of four domains; ``data_dir`` is a folder with the source archive.

    Raises `DataError` when the archive is not there or another one.
    """
    texts: list[str] = []
    ratings: list[float] = []
    domains: list[int] = []
    documents: list[int] = []
    numbers: dict[tuple[int, str], int] = {}
    with tarfile.open(VADER.find(data_dir)) as outer:
        packed = read_member(outer, _OUTER)
    with tarfile.open(fileobj=io.BytesIO(packed)) as inner:
        for domain, stem in enumerate(_FILES):
            content = read_member(inner, f"{_FOLDER}/{stem}_GroundTruth.txt").decode("utf-8-sig")
            # Not splitlines(): some sentences hold other Unicode line ends.
            for line in filter(str.strip, content.replace("\r\n", "\n").split("\n")):
                fields = line.split("\t", 2)
                if len(fields) != 3:
                    raise DataError(f"{stem}_GroundTruth.txt has a line without three fields: {line[:60]!r}.")
                name = fields[0].split("_")[0] if DOMAINS[domain] in _WITH_DOCUMENTS else fields[0]
                documents.append(numbers.setdefault((domain, name), len(numbers)))
                texts.append(fields[2])
                ratings.append(float(fields[1]))
                domains.append(domain)
    return RatedSentences(
        tuple(texts),
        np.array(ratings),
        np.array(domains, dtype=np.int64),
        np.array(documents, dtype=np.int64),
    )
