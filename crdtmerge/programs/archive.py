"""A .pt2 archive with everything taken out that could run code when it is loaded.

RULES
1. The archive is read here and written anew; torch's loader only ever sees what was written here.
2. Records are stored, not compressed; no name comes twice; exactly one program is in it.
3. Sample inputs are a pickle that no program needs: they are left out unread. A weight or constant that is a pickle,
   and objects of any kind, are refused.
4. Names of operators lead to operators alone (``torch.ops.aten...``, ``_operator``, ``math``), symbolic expressions are
   arithmetic of known functions (a parser evaluates them), names are identifiers (code is generated from them). What a
   program carries for debuggers, and guards in Python, are left out.

A program is still code: load one only if its digest is named by a recipe that the user or a trusted key wrote.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from typing import Any, NoReturn

from crdtmerge.errors import CrdtMergeError, InputError

PROGRAM_BYTES_MAX = 64 << 30
"""A program with its weights in it; it is read into memory."""

RECORDS_MAX = 1_000_000

MODEL, SAMPLE = "models/model.json", "data/sample_inputs/model.pt"
WEIGHTS, CONSTANTS = "data/weights/model_weights_config.json", "data/constants/model_constants_config.json"

_OPERATORS = re.compile(
    r"torch\.ops\.(aten|prims|prim|higher_order|_quantized|quantized|symint|profiler|inductor|torchvision)\.\w+(\.\w+)*"
    r"|torch\.(sym_\w+|_sym_sqrt)|torch\._higher_order_ops\.\w+(\.\w+)*|_operator\.\w+|math\.\w+"
)
_NAME = re.compile(r"[A-Za-z_][\w.]*")
_WORDS = re.compile(r"[A-Za-z_]\w*")
_EXPRESSION = re.compile(r"[\w\s+\-*/().,<>=&|~!%]*")
_FUNCTIONS = re.compile(
    r"Symbol|Integer|Rational|Float|Add|Mul|Pow|Abs|Max|Min|Mod|PythonMod|CleanDiv"
    r"|CeilDiv|FloorDiv|IntTrueDiv|FloatTrueDiv|Where|ModularIndexing|Identity|ToFloat|"
    r"TruncToInt|TruncToFloat|RoundToInt|CeilToInt|FloorToInt|FloatPow|PowByNatural|LShift|"
    r"RShift|IsNonOverlappingAndDenseIndicator|Eq|Ne|Lt|Le|Gt|Ge|Equality|Unequality|"
    r"StrictLessThan|LessThan|StrictGreaterThan|GreaterThan|And|Or|Not|True|False|floor"
    r"|ceiling|oo|int_oo|zoo|Piecewise|positive|integer|nonnegative|real|precision"
)
_SYMBOL = re.compile(r"'[a-z]+\d+'|\b[suz]\d+\b")


def program_name(archive: zipfile.ZipFile) -> str:
    """The folder that all records of an archive lie in. Raises InputError."""
    folders = {name.partition("/")[0] for name in archive.namelist()}
    if len(folders) != 1:
        _refuse("its records do not lie in one folder")
    return folders.pop()


def cleaned(data: bytes) -> io.BytesIO:
    """The archive anew, without what could run code. Raises InputError."""
    from torch._C import PyTorchFileWriter

    records = _records(data)
    written = io.BytesIO()
    writer = PyTorchFileWriter(written)
    writer.set_min_version(6)
    for name, record in sorted((records | {MODEL: _graph(records[MODEL]), SAMPLE: b""}).items()):
        writer.write_record(name, record, len(record))
    writer.write_end_of_file()
    written.seek(0)
    return written


def _records(data: bytes) -> dict[str, bytes]:
    """The records that are kept, by name."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            infos = archive.infolist()
            if any(info.compress_type != zipfile.ZIP_STORED for info in infos) or len(infos) > RECORDS_MAX:
                _refuse("its records are compressed, as torch.export.save never does")
            if len({info.filename for info in infos}) < len(infos):
                _refuse("a record comes twice")
            if any(info.filename.rpartition("/")[2] == "serialized_exported_program.json" for info in infos):
                _refuse("it was written by an old torch, whose format holds pickles")
            root = program_name(archive) + "/"
            names = [info.filename.removeprefix(root) for info in infos]
            kept = [name for name in names if _kept(name)]
            if MODEL not in kept or sum(name.startswith("models/") for name in names) != 1:
                _refuse("it does not hold exactly one program called 'model'")
            records = {name: archive.read(root + name) for name in kept}
    except CrdtMergeError:
        raise
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError, OSError, RuntimeError) as fault:
        _refuse(f"it is no archive ({fault})")
    for name in (WEIGHTS, CONSTANTS):
        _check_payloads(records.get(name), name)
    return records


def _kept(name: str) -> bool:
    """Sample inputs, notes and compiled code are not; neither is what the writer adds itself."""
    tensors = name.startswith(("data/weights/weight_", "data/constants/tensor_"))
    return tensors or name in (MODEL, WEIGHTS, CONSTANTS, "archive_format", "archive_version", "byteorder")


def _check_payloads(record: bytes | None, name: str) -> None:
    if record is None:
        _refuse(f"it lacks {name}")
    for entry in _parsed(record).get("config", {}).values():
        if entry.get("use_pickle") is not False or not re.fullmatch(
            r"(weight|tensor)_\d+", str(entry.get("path_name"))
        ):
            _refuse(f"{name} names a pickle or an object: {str(entry.get('path_name'))[:80]!a}")


def _graph(record: bytes) -> bytes:
    program = _parsed(record)
    program["guards_code"] = []
    _check(program, "")
    return json.dumps(program).encode()


def _parsed(record: bytes) -> dict[str, Any]:
    try:
        found = json.loads(record)
    except (ValueError, RecursionError) as fault:
        _refuse(f"its program is no JSON ({fault})")
    if not isinstance(found, dict):
        _refuse("its program is no map")
    return found


def _check(value: Any, key: str) -> None:
    """Walk a program; what is for debuggers is emptied on the way."""
    if isinstance(value, dict):
        for debug in ("metadata",):
            if isinstance(value.get(debug), dict):
                value[debug] = {}
        for name, item in value.items():
            if name == "target" and isinstance(item, str) and "inputs" in value and not _OPERATORS.fullmatch(item):
                _refuse(f"it calls {item[:100]!a}, which is no operator of torch")
            _check(item, name)
    elif isinstance(value, list):
        for item in value:
            _check(item, key)
    elif isinstance(value, str):
        if key == "expr_str":
            _check_expression(value)
        elif key == "name" and value and not _NAME.fullmatch(value):
            _refuse(f"a name in it is no identifier: {value[:100]!a}")
        elif key in ("class_fqn", "custom_obj_name"):
            _refuse(f"it holds an object of {value[:100]!a}")


def _check_expression(text: str) -> None:
    bare = _SYMBOL.sub("0", text)
    if not _EXPRESSION.fullmatch(bare) or not all(map(_FUNCTIONS.fullmatch, _WORDS.findall(bare))):
        _refuse(f"a size in it is no arithmetic: {text[:100]!a}")


def _refuse(fault: str) -> NoReturn:
    raise InputError(
        f"the program is not taken: {fault}. Export it again with torch.export.export and torch.export.save of torch "
        "2.9 or newer."
    )
