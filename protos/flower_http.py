"""Flower's HTTP clients for our needs: straight to their server, no redirects, and answers of bounded size.

Stock Flower 1.41 follows the environment's proxies, also to loopback, and every redirect; it inflates an answer that
says `Content-Encoding: gzip`, however large it becomes.
"""

import ssl
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, cast

import httpx
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.protobuf.client import ProtobufClient
from flwr.supercore.runtime import RuntimeHttpClient

MAX_ANSWER_BYTES = 16 << 20  # Flower's largest honest answers are a bundle, 10 MiB, and a piece of an array, 5 MiB


class BoundedTransport(httpx.BaseTransport):
    """A transport that gives an answer up where it becomes too long, and takes no compressed answer.

    Args:
      inner: transport that moves the bytes.
      limit: most bytes of an answer.
    """

    def __init__(self, inner: httpx.BaseTransport, limit: int) -> None:
        self._inner, self._limit = inner, limit

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Returns the answer to a request.

        Raises:
          httpx.DecodingError: the answer is compressed, or is longer than the limit; raised while it is read where the
            answer does not announce its length.
        """
        response = self._inner.handle_request(request)
        encoding = response.headers.get("content-encoding", "identity")
        announced = response.headers.get("content-length", "0")
        if encoding.strip().lower() != "identity":
            response.close()
            raise httpx.DecodingError("the answer is compressed, and none was asked for", request=request)
        if announced.isdigit() and int(announced[:20]) > self._limit:
            response.close()
            raise _too_long(self._limit, request)
        stream = cast(httpx.SyncByteStream, response.stream)  # the inner transport is not asynchronous
        response.stream = _BoundedStream(stream, self._limit, request)
        return response

    def close(self) -> None:
        """Closes the inner transport."""
        self._inner.close()


class _BoundedStream(httpx.SyncByteStream):
    def __init__(self, inner: httpx.SyncByteStream, limit: int, request: httpx.Request) -> None:
        self._inner, self._limit, self._request = inner, limit, request

    def __iter__(self) -> Iterator[bytes]:
        left = self._limit
        for piece in self._inner:
            left -= len(piece)
            if left < 0:
                raise _too_long(self._limit, self._request)
            yield piece

    def close(self) -> None:
        self._inner.close()


def _too_long(limit: int, request: httpx.Request) -> httpx.DecodingError:
    return httpx.DecodingError(f"the answer has more than {limit} bytes", request=request)


def http_client(*, verify: ssl.SSLContext | bool | str, timeout: float, proxy: str = "") -> httpx.Client:
    """Returns an HTTP client that the environment does not change.

    Args:
      verify: trusted certificates, as httpx takes them.
      timeout: seconds of one step of a request.
      proxy: address of the proxy to go through; empty for the straight way.
    """
    inner = httpx.HTTPTransport(verify=verify, trust_env=False, proxy=proxy or None)
    return httpx.Client(
        transport=BoundedTransport(inner, MAX_ANSWER_BYTES),
        timeout=timeout,
        follow_redirects=False,
        trust_env=False,
        headers={"accept-encoding": "identity"},
    )


@cache
def straight(kind: Any, proxy: str = "") -> Any:
    """Returns a kind of Flower's HTTP clients over `http_client`.

    Args:
      kind: class of Flower's, derived from its `ProtobufClient`.
      proxy: address of the proxy to go through; empty for the straight way.
    """

    def __init__(  # noqa: N807 - takes the place of Flower's
        self: ProtobufClient,
        base_url: str,
        *,
        interceptors: Sequence[Any] = (),
        verify: ssl.SSLContext | bool | str = True,
        timeout: float = 30.0,
        retry_invoker: Any = None,
    ) -> None:
        self._base_url, self._interceptors = base_url.rstrip("/"), tuple(interceptors)
        self._retry_invoker = retry_invoker
        self._client = http_client(verify=verify, timeout=timeout, proxy=proxy)

    return type(kind.__name__, (kind,), {"__init__": __init__})


RuntimeClient: Any = straight(RuntimeHttpClient)
ControlClient: Any = straight(ControlHttpClient)
