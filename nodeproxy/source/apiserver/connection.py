"""Owns requests to the API server: sockets that notice a dead peer, authentication, and typed errors.

Requests go through the connection pool of the official client (TLS, proxies); answers are left raw. Blocking: made to be
used from threads.
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from nodeproxy.source.apiserver.credentials import Credentials, CredentialsError, LoadedCredentials

if TYPE_CHECKING:
    from urllib3 import BaseHTTPResponse

CONNECT_SECONDS = 10.0
HEADER_SECONDS = 30.0  # the API server sends the header of a watch at once, so that silence is a fault
_CHUNK = 256 * 1024
_MAX_ERROR_BYTES = 64 * 1024
_MAX_ANSWER_BYTES = 1 << 20

# A peer that does not answer is given up after 10 + 3 * 5 = 25 s without traffic; so is one that does not acknowledge.
_KEEPALIVE = [
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 25_000),  # milliseconds
]


class RequestError(Exception):
    """A request failed or its answer broke off. The text is the same each time the same thing happens.

    `retry_after`: seconds that the server asked to wait.
    """

    retry_after: float | None = None


class StatusError(RequestError):
    """The API server answered with an error, as HTTP status or as an ERROR event in a watch."""

    def __init__(self, status: int, message: str, retry_after: float | None = None) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status
        self.retry_after = retry_after


class Cancel:
    """Lets one thread end what another one is reading."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._response: BaseHTTPResponse | None = None
        self._cancelled = False

    @property
    def cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._cancelled

    def cancel(self) -> None:
        """End the current answer, now or as soon as it begins."""
        with self._lock:
            self._cancelled = True
            if self._response is not None:
                _shut_down(self._response)

    def guard(self, response: BaseHTTPResponse | None) -> None:
        """Name the answer that `cancel` shall end; None when it was read to its end."""
        with self._lock:
            self._response = response
            if response is not None and self._cancelled:
                _shut_down(response)


class Connection:
    """The way to one API server. Safe to use from several threads."""

    def __init__(self, credentials: Credentials) -> None:
        self._credentials = credentials
        self._lock = threading.Lock()
        self._loaded: LoadedCredentials | None = None
        self._pool: Any = None

    def connect(self) -> None:
        """Read the credentials (again). Connections that are in use go on. Raises CredentialsError."""
        loaded = self._credentials.load()
        from kubernetes.client.rest import RESTClientObject  # noqa: PLC0415 - slow: only once it is needed

        loaded.configuration.socket_options = _KEEPALIVE
        pool = RESTClientObject(loaded.configuration).pool_manager
        with self._lock:
            self._loaded, self._pool = loaded, pool

    def read(self, path: str, query: Mapping[str, str], cancel: Cancel, read_seconds: float) -> Iterator[bytes]:
        """The body of a GET in pieces as they come; the first one is empty and says that the server agreed.

        Each piece must come within `read_seconds`. Raises RequestError or CredentialsError; ends silently when cancelled.
        """
        response = self._open("GET", path, query)
        cancel.guard(response)
        try:
            yield b""
            sock = getattr(response.connection, "sock", None)
            if sock is not None:
                sock.settimeout(read_seconds)
            while piece := response.read1(_CHUNK):
                yield piece
            response.release_conn()
        except Exception as error:  # whatever a socket may do when it is shut down under a reader
            if not cancel.cancelled:
                raise _transport_error(error) from error
        finally:
            cancel.guard(None)
            response.close()

    def send(
        self,
        method: str,
        path: str,
        cancel: Cancel,
        *,
        query: Mapping[str, str] | None = None,
        body: bytes | None = None,
        content_type: str = "application/json",
        accept: str = "application/json",
    ) -> bytes:
        """Make one small request and return the body of its answer. Raises RequestError, CredentialsError.

        Not for lists of unknown size: an answer of more than a megabyte is an error.
        """
        headers = {"accept": accept} | ({"content-type": content_type} if body is not None else {})
        response = self._open(method, path, query or {}, body=body, headers=headers)
        cancel.guard(response)
        try:
            answer: bytes = response.read(_MAX_ANSWER_BYTES + 1)
            response.release_conn()
        except Exception as error:  # whatever a socket may do when it is shut down under a reader
            raise _transport_error(error) from error
        finally:
            cancel.guard(None)
            response.close()
        if len(answer) > _MAX_ANSWER_BYTES:
            raise RequestError(f"the answer has more than {_MAX_ANSWER_BYTES} bytes")
        return answer

    def _open(
        self,
        method: str,
        path: str,
        query: Mapping[str, str],
        *,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> BaseHTTPResponse:
        from urllib3 import Timeout  # noqa: PLC0415

        with self._lock:
            if self._loaded is None:
                raise CredentialsError("not connected yet")
            loaded, pool = self._loaded, self._pool
        sent = {"accept": "application/json", "user-agent": "nodeproxy", **(headers or {}), **loaded.headers()}
        url = f"{loaded.host}{path}" + (f"?{urlencode(query)}" if query else "")
        timeout = Timeout(connect=CONNECT_SECONDS, read=HEADER_SECONDS)
        try:
            response: BaseHTTPResponse = pool.request(
                method,
                url,
                body=body,
                headers=sent,
                timeout=timeout,
                retries=False,
                redirect=False,
                preload_content=False,
            )
        except Exception as error:  # urllib3's errors, and those of ssl and socket that it lets through
            raise _transport_error(error) from error
        if response.status not in (200, 201):
            raise _status_error(response)
        return response


def _shut_down(response: BaseHTTPResponse) -> None:
    try:
        response.shutdown()
    except (ValueError, RuntimeError, OSError):
        return  # read to its end in this moment


def _status_error(response: BaseHTTPResponse) -> StatusError:
    try:
        body = response.read1(_MAX_ERROR_BYTES)
    except Exception:  # the status says enough
        body = b""
    retry_after = response.headers.get("retry-after", "")
    response.close()
    try:
        message = str(json.loads(body)["message"])
    except (ValueError, KeyError, TypeError, RecursionError):
        message = body[:200].decode(errors="replace").strip() or response.reason or "no reason given"
    return StatusError(response.status, message, float(retry_after) if retry_after.isdigit() else None)


def _transport_error(error: BaseException) -> RequestError:
    """What the system said, if it did: the texts of errors around it name addresses in memory, different each time."""
    cause: BaseException | None = error
    system: OSError | None = None
    while cause is not None:
        if isinstance(cause, OSError):
            system = cause
        cause = cause.__cause__ or cause.__context__
    if system is not None:
        return RequestError(f"{type(system).__name__}: {system}")
    return RequestError(f"the connection broke off ({type(error).__name__})")
