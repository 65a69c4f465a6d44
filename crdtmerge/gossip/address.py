"""Where nodes listen and peers are found: URLs with a key, from what people write."""

from __future__ import annotations

import ipaddress
import re
from typing import NamedTuple
from urllib.parse import urlsplit

from crdtmerge.errors import UsageError
from crdtmerge.keys import is_small_order
from crdtmerge.pool.peers import SECRET_BYTES, Peers

PORT = 7070


class Where(NamedTuple):
    """A peer: its URL and, over TLS, the key that it must hold."""

    url: str
    key: bytes | None


class Listening(NamedTuple):
    """Where a node listens, and how."""

    scheme: str
    host: str
    port: int


class Invitation(NamedTuple):
    """A peer that waits for whoever holds the secret."""

    where: Where
    secret: bytes

    @property
    def text(self) -> str:
        """The URL that is handed over; what follows # is never sent to anybody but that peer, over TLS."""
        return f"{self.where.url}/#{(self.where.key or b'').hex()}.{self.secret.hex()}"


def listening(text: str, *, insecure: bool = False) -> Listening:
    """``HOST:PORT`` over TLS, or ``http://HOST:PORT``. Raises UsageError.

    >>> listening("127.0.0.1:0")
    Listening(scheme='https', host='127.0.0.1', port=0)
    """
    scheme, host, port = _parts(text if "://" in text else f"https://{text}", text)
    _refuse_plain(scheme, host, text, insecure)
    return Listening(scheme, host, port)


def showing(text: str) -> Listening:
    """Where a status page is shown, over plain HTTP. Raises UsageError."""
    return Listening("http", *_parts(f"http://{text.removeprefix('http://')}", text)[1:])


def peer(text: str, peers: Peers | None = None, *, insecure: bool = False) -> Where:
    """A peer's URL with its key after ``#``, or one whose key is trusted already. Raises UsageError."""
    plain, _, fragment = text.partition("#")
    scheme, host, port = _parts(plain, text)
    _refuse_plain(scheme, host, text, insecure)
    url = f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"
    if scheme == "http":
        return Where(url, None)
    key = _key(fragment, text) if fragment else peers.key_at(url) if peers else None
    if key is None:
        raise UsageError(
            f"{text}: whose key? Name it as {url}#KEY, or trust it first: crdtmerge keys trust KEY --url {url}"
        )
    return Where(url, key)


def invitation(text: str) -> Invitation | None:
    """An invitation's URL; None for what is none. Raises UsageError for a broken one."""
    plain, _, fragment = text.partition("#")
    key, dot, secret = fragment.partition(".")
    if not dot:
        return None
    if len(secret) != 2 * SECRET_BYTES or set(secret) - set("0123456789abcdef"):
        raise UsageError(f"{text}: is no invitation; copy all of what `crdtmerge keys invite` printed.")
    where = peer(f"{plain.rstrip('/')}#{key}")
    if where.key is None:
        raise UsageError(f"{text}: invitations need TLS: https://HOST:PORT.")
    return Invitation(where, bytes.fromhex(secret))


def is_url(text: str) -> bool:
    """Whether a text names a peer rather than a folder or a bucket."""
    return text.startswith(("https://", "http://"))


def _parts(url: str, text: str) -> tuple[str, str, int]:
    try:
        found = urlsplit(url)
        port = PORT if found.port is None else found.port
    except ValueError as fault:
        raise UsageError(f"{text}: {fault}.") from None
    if found.scheme not in ("https", "http") or not found.hostname or found.path not in ("", "/") or found.query:
        raise UsageError(f"{text}: is no address of a peer; write it as https://HOST:PORT.")
    return found.scheme, found.hostname, port


def _refuse_plain(scheme: str, host: str, text: str, insecure: bool) -> None:
    if scheme == "http" and not insecure and not _is_loopback(host):
        raise UsageError(
            f"{text}: plain HTTP lets everybody on the way read and write; use https://, or say --insecure."
        )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _key(text: str, where: str) -> bytes:
    if not re.fullmatch(r"[0-9a-fA-F]{64}", text) or is_small_order(bytes.fromhex(text)):
        raise UsageError(f"{where}: what follows # is no public key of 64 hexadecimal digits.")
    return bytes.fromhex(text)
