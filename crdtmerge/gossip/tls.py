"""TLS between peers who know each other by their Ed25519 keys alone. TLS 1.3, no authorities, no names.

A node shows a certificate for its key that the key itself issued. To trust a key, one makes an *anchor* from its 32
bytes: a certificate authority of that key, which nobody signed for and which vouches for that one node. So nobody has
to exchange certificates, and Python's ``ssl``, which can ask nobody about a certificate, checks them by itself.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from crdtmerge.errors import KeyFileError

if TYPE_CHECKING:
    from cryptography.x509 import Name

_FROM, _UNTIL = datetime(2020, 1, 1), datetime(2999, 1, 1)
"""Keys do not expire; who is trusted no longer is taken off the list."""


def certificate(key_file: Path, public: bytes) -> bytes:
    """The certificate of a node, in PEM. Raises KeyFileError."""
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key

    private = load_pem_private_key(key_file.read_bytes(), password=None)
    if not isinstance(private, Ed25519PrivateKey) or private.public_key().public_bytes_raw() != public:
        raise KeyFileError(f"{key_file}: is not the key {public.hex()}.")
    builder = (
        x509.CertificateBuilder()
        .subject_name(_name(f"node of {public.hex()[:32]}"))
        .issuer_name(_name(public.hex()))
        .public_key(private.public_key())
        .serial_number(1)
        .not_valid_before(_FROM)
        .not_valid_after(_UNTIL)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("crdtmerge")]), critical=False)
    )
    return builder.sign(private, None).public_bytes(Encoding.PEM)


def anchor(public: bytes) -> bytes:
    """What to trust in order to trust a key, in DER."""
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import Encoding

    builder = (
        x509.CertificateBuilder()
        .subject_name(_name(public.hex()))
        .issuer_name(_name("trusted by hand"))
        .public_key(Ed25519PublicKey.from_public_bytes(public))
        .serial_number(1)
        .not_valid_before(_FROM)
        .not_valid_after(_UNTIL)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    )
    return builder.sign(Ed25519PrivateKey.generate(), None).public_bytes(Encoding.DER)


def server_context(key_file: Path, public: bytes, trusted: Iterable[bytes]) -> ssl.SSLContext:
    """For a node that listens: trusted keys are recognised, others refused, clients without any get in as strangers.

    More keys can be trusted later with ``trust``.
    """
    context = _context(ssl.PROTOCOL_TLS_SERVER, key_file, public, trusted)
    context.verify_mode = ssl.CERT_OPTIONAL
    context.num_tickets = 0  # every connection proves its key
    return context


def client_context(key_file: Path | None, public: bytes | None, peer: bytes) -> ssl.SSLContext:
    """For a client: the server must hold the key ``peer``; without a key of one's own one is a stranger there."""
    context = _context(ssl.PROTOCOL_TLS_CLIENT, key_file, public, [peer])
    context.verify_mode = ssl.CERT_REQUIRED
    return context


def trust(context: ssl.SSLContext, key: bytes) -> None:
    """Recognise one more key."""
    context.load_verify_locations(cadata=anchor(key))


def peer_key(connection: ssl.SSLObject | ssl.SSLSocket | None) -> bytes | None:
    """The key that the other side of a connection has proved to hold; None for a stranger."""
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    der = connection.getpeercert(binary_form=True) if connection is not None else None
    if der is None:
        return None
    found = x509.load_der_x509_certificate(der)
    public = found.public_key()
    if not isinstance(public, Ed25519PublicKey) or found.issuer != _name(public.public_bytes_raw().hex()):
        return None
    return public.public_bytes_raw()


def _context(side: int, key_file: Path | None, public: bytes | None, trusted: Iterable[bytes]) -> ssl.SSLContext:
    context = ssl.SSLContext(side)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    if key_file is not None and public is not None:
        _load(context, certificate(key_file, public), key_file)
    for key in trusted:
        trust(context, key)
    return context


def _load(context: ssl.SSLContext, pem: bytes, key_file: Path) -> None:
    """Python's ``ssl`` reads certificates from files alone: one in memory."""
    descriptor = os.memfd_create("certificate") if hasattr(os, "memfd_create") else -1
    if descriptor < 0:
        beside = key_file.with_name("certificate.pem")
        beside.write_bytes(pem)
        context.load_cert_chain(beside, key_file)
        return
    try:
        os.write(descriptor, pem)
        context.load_cert_chain(f"/proc/self/fd/{descriptor}", key_file)
    finally:
        os.close(descriptor)


def _name(text: str) -> Name:
    from cryptography import x509

    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])
