"""Keys: PEM files there and back, refusals, file modes; and points of small order against arithmetic of our own."""

from __future__ import annotations

import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa, x25519

from crdtmerge.errors import KeyFileError
from crdtmerge.keys import Key, is_small_order, verify

SEED = bytes(range(32))

# Test 1 and 3 of RFC 8032, section 7.1: seed, public key, message, signature
VECTORS = [
    (
        "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
        "",
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24"
        "655141438e7a100b",
    ),
    (
        "c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7",
        "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
        "af82",
        "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac18ff9b538d16f290ae67f760984dc6594a7c15e9716ed28d"
        "c027beceea1ec40a",
    ),
]


@pytest.mark.parametrize(("seed", "public", "message", "signature"), VECTORS)
def test_keys_and_signatures_are_those_of_the_standard(seed: str, public: str, message: str, signature: str) -> None:
    key = Key.from_seed(bytes.fromhex(seed))
    assert key.public.hex() == public
    assert key.sign(bytes.fromhex(message)).hex() == signature
    assert verify(key.public, bytes.fromhex(signature), bytes.fromhex(message))


def test_a_saved_key_is_the_same_key_again_and_only_its_owner_may_read_it(tmp_path: Path) -> None:
    path, key = tmp_path / "key.pem", Key.generate()
    key.save(path)
    assert Key.load(path).public == key.public
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_bytes().startswith(b"-----BEGIN PRIVATE KEY-----\n")


def test_a_key_is_never_written_over_another_file(tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    path.write_text("precious")
    with pytest.raises(FileExistsError):
        Key.generate().save(path)
    assert path.read_text() == "precious"


def test_two_new_keys_differ() -> None:
    assert Key.generate().public != Key.generate().public


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl binary here")
def test_openssl_and_we_read_each_others_keys(tmp_path: Path) -> None:
    theirs, ours = tmp_path / "theirs.pem", tmp_path / "ours.pem"
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", theirs], check=True, capture_output=True)
    Key.load(theirs).save(ours)
    assert ours.read_bytes() == theirs.read_bytes()
    shown = subprocess.run(
        ["openssl", "pkey", "-in", ours, "-pubout", "-outform", "DER"], check=True, capture_output=True
    )
    assert shown.stdout[-32:] == Key.load(theirs).public


def pem(private: object, encryption: serialization.KeySerializationEncryption | None = None) -> bytes:
    """A private key in PEM."""
    written: bytes = private.private_bytes(  # type: ignore[attr-defined]
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption or serialization.NoEncryption()
    )
    return written


def refused() -> dict[str, bytes]:
    """Files that hold no key of ours."""
    own = ed25519.Ed25519PrivateKey.from_private_bytes(SEED)
    whole = pem(own)
    public = own.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return {
        "with a passphrase": pem(own, serialization.BestAvailableEncryption(b"secret")),
        "of RSA": pem(rsa.generate_private_key(65537, 2048)),
        "of X25519": pem(x25519.X25519PrivateKey.generate()),
        "public": public,
        "empty": b"",
        "text": b"not a key",
        "zeros": bytes(1000),
        "cut off": whole[:60],
        "of one byte less": whole.replace(b"MC4", b"MC3"),
        "raw": SEED,
        "after 16 KiB": b"\n" * (16 << 10) + whole,
    }


@pytest.mark.parametrize("what", sorted(refused()))
def test_a_file_that_holds_no_key_of_ours_is_refused(tmp_path: Path, what: str) -> None:
    path = tmp_path / "key.pem"
    path.write_bytes(refused()[what])
    with pytest.raises(KeyFileError, match=r"key\.pem"):
        Key.load(path)


def test_a_key_file_that_is_missing_or_a_folder_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.pem", tmp_path):
        with pytest.raises(KeyFileError, match="cannot be read"):
            Key.load(path)


def test_a_signature_fits_one_message_one_key_and_its_own_bytes() -> None:
    key, other, message = Key.from_seed(SEED), Key.generate(), b"message"
    signature = key.sign(message)
    assert verify(key.public, signature, message)
    assert not verify(key.public, signature, b"massage")
    assert not verify(other.public, signature, message)
    for bit in range(512):
        flipped = (int.from_bytes(signature, "big") ^ 1 << bit).to_bytes(64, "big")
        assert not verify(key.public, flipped, message)


@pytest.mark.parametrize("lengths", [(31, 64), (33, 64), (32, 63), (32, 65), (0, 0)])
def test_a_key_or_signature_of_another_length_fits_nothing(lengths: tuple[int, int]) -> None:
    assert not verify(Key.from_seed(SEED).public[:1] * lengths[0], bytes(lengths[1]), b"")


# The curve, from its definition: -x^2 + y^2 = 1 + d x^2 y^2 over the integers modulo p

P = 2**255 - 19
ORDER = 2**252 + 27742317777372353535851937790883648493
D = -121665 * pow(121666, -1, P) % P
Point = tuple[int, int]


def add(one: Point, other: Point) -> Point:
    """The sum of two points of the twisted Edwards curve."""
    (x1, y1), (x2, y2) = one, other
    both = D * x1 * x2 * y1 * y2 % P
    return (x1 * y2 + x2 * y1) * pow(1 + both, -1, P) % P, (y1 * y2 + x1 * x2) * pow(1 - both, -1, P) % P


def times(many: int, point: Point) -> Point:
    """A multiple of a point."""
    found = (0, 1)
    while many:
        if many & 1:
            found = add(found, point)
        point, many = add(point, point), many >> 1
    return found


def root_of(square: int) -> int | None:
    """A square root modulo p, if there is one."""
    found = pow(square, (P + 3) // 8, P)
    for candidate in (found, found * pow(2, (P - 1) // 4, P) % P):
        if candidate * candidate % P == square % P:
            return candidate
    return None


def point_of(y: int) -> Point | None:
    """A point with this y, if the curve has one."""
    x = root_of((y * y - 1) * pow(D * y * y + 1, -1, P))
    return None if x is None else (x, y % P)


def small() -> set[Point]:
    """All points P with 8 P = 0: what remains of any point after multiplying by the large prime order."""
    found: set[Point] = set()
    for y in range(2, 200):
        point = point_of(y)
        if point:
            found.add(times(ORDER, point))
    return found


def spellings(point: Point) -> set[bytes]:
    """Every 32 bytes that decode to a point of this y, with either sign, also where y is not reduced."""
    ys = [each for each in (point[1], point[1] + P) if each < 1 << 255]
    return {(each | sign << 255).to_bytes(32, "little") for each in ys for sign in (0, 1)}


def test_the_points_of_small_order_are_eight_and_all_their_spellings_are_refused() -> None:
    points = small()
    assert len(points) == 8
    assert all(times(8, point) == (0, 1) for point in points)
    every = set().union(*map(spellings, points))
    assert len(every) == 14
    for spelling in every:
        assert is_small_order(spelling)
        assert not verify(spelling, spelling + bytes(32), b"any message")


def test_no_other_key_is_refused_as_of_small_order() -> None:
    small_ys = {y for _, y in small()}
    for y in [*range(2, 40), *range(P - 40, P - 1), *range(P + 2, 2**255)]:
        if y % P not in small_ys:
            assert not is_small_order(y.to_bytes(32, "little"))
    assert not any(is_small_order(Key.from_seed(bytes([n]) * 32).public) for n in range(50))


def test_a_signature_with_the_group_order_added_is_refused() -> None:
    key = Key.from_seed(SEED)
    signature = key.sign(b"message")
    scalar = int.from_bytes(signature[32:], "little")
    for many in range(1, 8):
        if scalar + many * ORDER < 1 << 256:
            again = signature[:32] + (scalar + many * ORDER).to_bytes(32, "little")
            assert not verify(key.public, again, b"message")
