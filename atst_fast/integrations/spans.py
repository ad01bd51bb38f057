"""How audio of any length is cut into what an encoder takes at once, and what each part counts for in the whole."""

from typing import NamedTuple

_TINY = 1e-6  # what the official code adds to a number of tokens before it divides by it


class Span(NamedTuple):
    """Frames that go through the encoder together.

    ``frames`` mel frames from ``start`` on make ``tokens`` tokens; where they are fewer than that takes, the last one
    is repeated. For the embedding of the whole: the tokens count 1 each and the last one ``last``, their sum is divided
    by ``divisor``, and that counts ``share``.
    """

    start: int
    frames: int
    tokens: int
    last: float
    divisor: float
    share: float


def covering(samples: int, hop: int, patch: int, chunk: int) -> list[Span]:
    """A token for every ``patch * hop`` samples that begin, ``chunk // patch`` of them at once.

    Token i starts at sample ``i * patch * hop`` however long the audio is. Each counts for the samples that it stands
    for, which are fewer in the last one; a part counts for all of its samples.
    """
    size = patch * hop
    tokens, frames, per = -(-samples // size), samples // hop + 1, chunk // patch
    last = samples / size - (tokens - 1)
    spans = []
    for first in range(0, tokens, per):
        n, start = min(per, tokens - first), first * patch
        end = last if first + n == tokens else 1.0
        weight = n - 1 + end
        spans.append(Span(start, min(n * patch, frames - start), n, end, weight, weight / (tokens - 1 + last)))
    return spans


def official_frame(frames: int, patch: int, chunk: int) -> list[Span]:
    """As audiossl's ``audiossl/methods/atstframe/embedding.py`` cuts: every ``chunk`` frames, whole patches only.

    Chunks of 1001 frames lose one each, and all count the same, also one too short for a token, which counts as zeros.
    """
    starts = range(0, frames, chunk)
    spans = []
    for start in starts:
        tokens = min(chunk, frames - start) // patch
        spans.append(Span(start, tokens * patch, tokens, 1.0, tokens + _TINY, 1 / len(starts)))
    return [span for span in spans if span.tokens]


def official_clip(frames: int, patch: int, chunk: int) -> list[Span]:
    """As ``AST.get_intermediate_layers_chunks`` of ``audiossl/models/atst/audio_transformer.py`` cuts.

    Chunks count the same, the first one always and others where more than half of one is left. The sum of the tokens is
    divided by the number of tokens that are left in the clip, not in the chunk.
    """
    starts = [start for start in range(0, frames, chunk) if start == 0 or frames - start > chunk // 2]
    spans = []
    for start in starts:
        tokens = min(chunk, frames - start) // patch
        left = (frames - start) // patch + _TINY
        spans.append(Span(start, tokens * patch, tokens, 1.0, left, 1 / len(starts)))
    return spans
