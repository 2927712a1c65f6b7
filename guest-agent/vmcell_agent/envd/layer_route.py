"""`GET /layer`, the builder's own: the next layer as a tar, at the reader's pace."""

from __future__ import annotations

from collections.abc import Iterator

from .exchange import BodyReader, Exchange, HttpError
from .layer import LayerError, UpperDirectory

# Headers of small files would each be a piece of their own.
_PIECE_BYTES = 128 * 1024


class LayerRoute:
    """An endpoint; one layer is taken at a time, because the next begins where this one ends."""

    def __init__(self, upper: UpperDirectory) -> None:
        self._upper = upper
        self._busy = False
        self._failure = ""

    def __call__(self, exchange: Exchange) -> BodyReader:
        if self._busy:
            raise HttpError(409, "a layer is being taken already")
        if self._failure:
            words, self._failure = self._failure, ""
            raise HttpError(500, words)
        return _LayerReader(self, exchange)

    def begin(self, exchange: Exchange) -> None:
        self._busy = True
        exchange.on_gone = self._end
        exchange.begin(200, [("Content-Type", "application/x-tar"), ("Cache-Control", "no-store")])
        pieces = self._gathered()
        exchange.stream_from(lambda: next(pieces, None))

    def _gathered(self) -> Iterator[bytes]:
        gathered = bytearray()
        try:
            for piece in self._upper.pieces():
                gathered += piece
                if len(gathered) >= _PIECE_BYTES:
                    yield bytes(gathered)
                    gathered.clear()
            yield bytes(gathered)
        except (LayerError, OSError) as error:
            # The head is out, so this answer breaks off; whoever asks again gets the words.
            self._failure = f"the layer cannot be read: {error}"
            raise HttpError(500, self._failure) from None
        finally:
            self._end()

    def _end(self) -> None:
        self._busy = False


class _LayerReader:
    """A BodyReader that ignores the request's body."""

    def __init__(self, route: LayerRoute, exchange: Exchange) -> None:
        self._route = route
        self._exchange = exchange

    def feed(self, chunk: bytes | memoryview) -> None:
        """A body of a GET has no meaning (RFC 9110 section 9.3.1)."""

    def finish(self) -> None:
        self._route.begin(self._exchange)
