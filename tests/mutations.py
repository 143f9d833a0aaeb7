"""Uploads that somebody damaged, by accident or on purpose: the same seed always damages the same way."""

import copy
import gzip
import io
import json
import random
import stat
import struct
import tarfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import safetensors.torch
import torch

Files = dict[str, bytes]
Parts = list[tuple[str, bytes]]

LENGTH = struct.Struct("<Q")
"""What a safetensors file begins with: the length of its header."""

DTYPES = (
    "F64",
    "F32",
    "F16",
    "BF16",
    "F8_E4M3",
    "F8_E5M2",
    "I64",
    "I32",
    "I8",
    "U8",
    "BOOL",
    "C64",
    "F4",
    "f32",
    "",
    7,
)

NUMBERS = (0, -1, 1, 2, 3, 7, 31, 33, 255, 4097, 2**31, 2**32 + 1, 2**53 + 1, 2**63 - 1, 2**63, 2**64, 10**30, 10**400)
FLOATS = (0.5, -0.5, 1.5, -0.0, 1e-300, 1e38, 1e308, float("nan"), float("inf"), -float("inf"))
TEXTS = (
    "", " ", "x", "none", "auto", "true", "null", "0", "-1", "9" * 5000, "a" * 20_000, "\0", "\n", "\ud800", "é" * 300,
    "../../x", "/etc/passwd", "query", "all-linear", "(", "(a+)+$", ".*", "[", "(?P<layer>x)", "a{9999999}", "\\", "💥",
)  # fmt: skip
CONTAINERS: tuple[Any, ...] = ([], {}, [None], [[]], [{}], ["query"], [0, 0], {"": 0}, {"0": "a"}, {"a": {"a": {}}})
ODD: tuple[Any, ...] = (None, True, False, *NUMBERS, *FLOATS, *TEXTS, *CONTAINERS)

RAW = {
    "@deep-list@": b"[" * 3000 + b"]" * 3000,
    "@deep-object@": b'{"a":' * 3000 + b"1" + b"}" * 3000,
    "@digits@": b"9" * 5000,
    "@exponent@": b"1e999999999",
    "@twice@": b'{"a": 1, "a": 2}',
    "@latin@": b'"\xe9"',
    "@half@": b'"\\ud800"',
    "@wide@": b"[" + b"0," * 20_000 + b"0]",
    "@comment@": b"/* */ 1",
}
"""What json.dumps would not write: put in for these texts."""


class Upload(NamedTuple):
    """What an uploader sends."""

    files: Files
    labels: Sequence[str] | None = None


def mutated(uploads: Sequence[Upload], seed: int) -> tuple[Parts, Sequence[str] | None]:
    """The parts of a form, and its labels: one of the uploads, damaged."""
    rng = random.Random(seed)
    upload = rng.choice(uploads)
    files, labels = dict(upload.files), upload.labels
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        files = rng.choice(CHANGES)(files, rng, uploads)
    if rng.random() < 0.1:
        labels = _labels(labels, rng)
    return _packed(files, rng), labels


def corrupt(data: bytes, rng: random.Random) -> bytes:
    """A few bytes changed, dropped, doubled or cut off."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        if not changed:
            break
        # headers come first, and they are what is parsed
        at = rng.randrange(min(len(changed), rng.choice((16, 300, len(changed)))))
        kind = rng.randrange(9)
        if kind < 4:
            changed[at] = rng.choice((0, 255, 0x7F, 0x7B, 0x22, 0x39, 0x2D, 0x5B, rng.randrange(256)))
        elif kind == 4:
            del changed[at : at + rng.randint(1, 9)]
        elif kind == 5:
            changed[at:at] = changed[at : at + rng.randint(1, 30)]
        elif kind == 6:
            changed[at : at + 8] = LENGTH.pack(rng.choice(NUMBERS) % 2**64)
        elif kind == 7:
            changed[at : at + 4] = rng.randbytes(4)
        else:
            del changed[at:]
    return bytes(changed)


# -------------------------------------------------------------------------------------------------------------- JSON


def _places(document: Any) -> list[tuple[Any, Any]]:
    """(container, key) of all that is in a document."""
    found: list[tuple[Any, Any]] = []
    stack = [document]
    while stack:
        container = stack.pop()
        keys = list(container) if isinstance(container, dict) else range(len(container))
        found += [(container, key) for key in keys]
        stack += [container[key] for key in keys if isinstance(container[key], dict | list)]
    return found


def odd_value(rng: random.Random) -> Any:
    """Something that hardly any field takes."""
    kind = rng.randrange(10)
    if kind < 7:
        return copy.deepcopy(rng.choice(ODD))  # it may be changed in its turn
    return rng.choice(tuple(RAW)) if kind < 9 else [copy.deepcopy(rng.choice(ODD)) for _ in range(rng.randrange(4))]


def changed_document(document: Any, rng: random.Random, others: Sequence[Any] = ()) -> Any:
    """A JSON document with one thing changed in place; `others` lend fields of theirs."""
    places = _places(document) if isinstance(document, dict | list) else []
    if not places or rng.random() < 0.02:
        return odd_value(rng)
    container, key = rng.choice(places)
    value, kind = container[key], rng.randrange(10)
    if kind < 4:
        container[key] = odd_value(rng)
    elif kind == 4:
        del container[key]
    elif kind == 5 and isinstance(value, int | float):
        container[key] = rng.choice((value + 1, value - 1, -value, value * 2, value * 10**9))
    elif kind == 5 and isinstance(value, str):
        container[key] = rng.choice((value.upper(), value + "s", value[:-1], value * 2, f" {value}", value + "\n"))
    elif kind == 6 and isinstance(container, dict):
        container[rng.choice((*TEXTS, "-1", "0", "1e3", key.upper(), key + "_", f"{key}.{key}"))] = container.pop(key)
    elif kind == 7:
        container[key] = rng.choice(([value], {"a": value}, str(value)[:300], [value, 0]))
    else:
        lenders = [place for other in others if isinstance(other, dict) for place in _places(other)]
        lender, name = rng.choice(lenders or places)
        if isinstance(container, dict) and isinstance(name, str) and kind == 8:
            container[name] = copy.deepcopy(lender[name])
        else:
            container[key] = copy.deepcopy(lender[name])
    return document


def dumped(document: Any) -> bytes:
    """JSON, NaN and half characters included, with what RAW stands for put in."""
    data = json.dumps(document).encode()
    for mark, raw in RAW.items():
        data = data.replace(json.dumps(mark).encode(), raw)
    return data


def _loaded(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):  # damaged before
        return {}


def _change_json(files: Files, rng: random.Random, uploads: Sequence[Upload]) -> Files:
    name = _one(files, ".json", rng)
    if name is None:
        return files
    other = rng.choice(uploads).files
    others = [_loaded(data) for path, data in other.items() if path.endswith(".json")]
    document = _loaded(files[name])
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        document = changed_document(document, rng, others)
    return files | {name: dumped(document)}


# ------------------------------------------------------------------------------------------------------- safetensors


def _opened(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and numbers of a safetensors file; an empty header where it is damaged."""
    end = LENGTH.size + int.from_bytes(data[: LENGTH.size], "little")
    header = _loaded(data[LENGTH.size : end]) if end <= len(data) else {}
    return (header if isinstance(header, dict) else {}), data[end:]


def _closed(header: bytes, numbers: bytes) -> bytes:
    return LENGTH.pack(len(header)) + header + numbers


def _change_header(files: Files, rng: random.Random, uploads: Sequence[Upload]) -> Files:
    """Offsets, types, shapes, names and lengths that do not belong together."""
    name = _one(files, ".safetensors", rng)
    if name is None:
        return files
    header, numbers = _opened(files[name])
    entries = [entry for key, entry in header.items() if key != "__metadata__" and isinstance(entry, dict)]
    if not entries:
        return files | {name: corrupt(files[name], rng)}
    entry, other = rng.choice(entries), rng.choice(entries)
    shape = entry["shape"] if isinstance(entry.get("shape"), list) else []
    kind = rng.randrange(14)
    if kind == 0:
        entry["dtype"] = rng.choice(DTYPES)
    elif kind == 1:
        entry["shape"] = rng.choice(([], [0], [-1], [rng.choice(NUMBERS)], [*shape, 1], shape[::-1]))
    elif kind == 2:
        entry["data_offsets"] = rng.choice(([], [0], [0, 0], [8, 0], [rng.choice(NUMBERS), rng.choice(NUMBERS)]))
    elif kind == 3:
        entry["data_offsets"] = other.get("data_offsets")
    elif kind == 4:
        entry["shape"], other["shape"] = other.get("shape"), shape
    elif kind == 5:
        header["__metadata__"] = rng.choice((odd_value(rng), {"format": odd_value(rng)}, {"a" * 5000: "b"}))
    elif kind == 6:
        header |= {f"t{index}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for index in range(300)}
    elif kind < 10:
        header = changed_document(header, rng)
    document = dumped(header)
    if kind == 10:  # a name twice
        first = json.dumps({next(iter(header)): entry}).encode()
        document = document[:-1] + b", " + first[1:]
    if kind == 11:
        document += b" " * rng.choice((1, 8, 1000))
    data = _closed(document, numbers)
    if kind == 12:
        data = LENGTH.pack(rng.choice((*NUMBERS, len(document) - 1, len(document) + 1)) % 2**64) + data[LENGTH.size :]
    if kind == 13:
        data = rng.choice((data + b"\0" * rng.choice((1, 4, 4096)), data[: -rng.randint(1, 64)]))
    return files | {name: data}


def _change_tensors(files: Files, rng: random.Random, uploads: Sequence[Upload]) -> Files:
    """A whole file of tensors that are not the right ones."""
    name = _one(files, ".safetensors", rng)
    if name is None:
        return files
    try:
        tensors = safetensors.torch.load(files[name])
    except Exception:  # damaged before
        return files
    if not tensors:
        return files
    key, other = rng.choice(sorted(tensors)), rng.choice(sorted(tensors))
    tensor, kind = tensors[key], rng.randrange(13)
    shapes = ((), (0,), (1,), (1, *tensor.shape), (*tensor.shape, 1), (-1,), tuple(tensor.shape[::-1]))
    if kind == 0:
        del tensors[key]
    elif kind == 1:
        tensors[
            rng.choice((key + ".x", key.upper(), key.replace(".weight", ".bias"), key.split(".", 1)[-1], "x", ""))
        ] = tensors.pop(key)
    elif kind == 2:
        tensors[key] = tensors[other]
    elif kind == 3 and tensor.numel():
        tensors[key] = tensor.clone()
        tensors[key].view(-1)[rng.randrange(tensor.numel())] = rng.choice((0, float("nan"), float("inf"), -1e38))
    elif kind == 4:
        tensors[key] = tensor * rng.choice((0.0, 1e4, 1e38, -1.0))
    elif kind == 5:
        tensors[key] = tensor.to(rng.choice((torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool)))
    elif kind == 6:
        shape = rng.choice(shapes)
        tensors[key] = tensor.reshape(shape) if -1 in shape or tensor.shape.numel() == _product(shape) else tensor[:0]
    elif kind == 7:
        tensors[key] = torch.zeros(rng.choice(((1, 1), (0, 0), (3, 32), (32, 3), (1,) * 9, (64, 64))))
    elif kind == 8:
        tensors[key] = tensor[:-1] if tensor.ndim else tensor
    elif kind == 9:
        tensors[f"{key}2"] = torch.zeros(3)
    elif kind == 10:
        lender = rng.choice(uploads).files
        data = next((data for path, data in lender.items() if path.endswith(".safetensors")), b"")
        tensors |= safetensors.torch.load(data) if data else {}
    elif kind == 11:
        tensors = {path.replace("layer.1", f"layer.{rng.choice((2, -1, 10**9))}"): one for path, one in tensors.items()}
    else:
        tensors = {} if rng.random() < 0.3 else {path: one[:1] if one.ndim else one for path, one in tensors.items()}
    whole = {path: one.contiguous().clone() for path, one in tensors.items()}
    return files | {name: safetensors.torch.save(whole)}


def _product(shape: Sequence[int]) -> int:
    return torch.Size(shape).numel()


# ------------------------------------------------------------------------------------------------------------- files


def _change_bytes(files: Files, rng: random.Random, uploads: Sequence[Upload]) -> Files:
    name = rng.choice(sorted(files)) if files else None
    return files if name is None else files | {name: corrupt(files[name], rng)}


def _change_files(files: Files, rng: random.Random, uploads: Sequence[Upload]) -> Files:
    """Files that are missing, too many, or somebody else's."""
    other = rng.choice(uploads).files
    names = sorted(files)
    if not names:
        return dict(other)
    name = rng.choice(names)
    kind = rng.randrange(7)
    if kind == 0:
        return {path: data for path, data in files.items() if path != name}
    if kind == 1:
        return files | {rng.choice((*ODD_NAMES, *sorted(other))): files[name]}
    if kind == 2:
        return files | {name: rng.choice(sorted(other.values()))}
    if kind == 3:
        return files | {path: data for path, data in other.items() if path not in files or rng.random() < 0.5}
    if kind == 4:
        return {f"folder/{path}" if rng.random() < 0.8 else path: data for path, data in files.items()}
    if kind == 5:
        return files | {name: rng.choice((b"", b"{}", b"[]", b"null", b"\0" * 8, b"\xff\xfe{\0}\0", b"\xef\xbb\xbf{}"))}
    side = {"labels.json": odd_value(rng), "config.json": {"id2label": odd_value(rng)}, "modules.json": odd_value(rng)}
    path = rng.choice(sorted(side))
    return files | {path: dumped(side[path])}


ODD_NAMES = (
    "../x",
    "/x",
    "a/../../x",
    "a\\b",
    "",
    ".",
    "a/",
    "x\0y",
    "\ud800",
    "a" * 5000,
    "CON",
    "a.zip",
    "b.tgz",
    "//x",
)

Change = Callable[[Files, random.Random, Sequence[Upload]], Files]
CHANGES: tuple[Change, ...] = (
    *(_change_json,) * 4,
    *(_change_header,) * 3,
    *(_change_tensors,) * 3,
    *(_change_bytes,) * 2,
    _change_files,
)


def _one(files: Mapping[str, bytes], suffix: str, rng: random.Random) -> str | None:
    names = sorted(name for name in files if name.endswith(suffix))
    return rng.choice(names) if names else None


def _labels(labels: Sequence[str] | None, rng: random.Random) -> Sequence[str] | None:
    some = list(labels or ("a", "b"))
    odd = ([], some[1:], [*some, "z"], some[:1] * len(some), ["", *some[1:]], ["\ud800", *some[1:]], ["x" * 300])
    return rng.choice((None, some, *odd, [str(index) for index in range(10_001)]))


# ---------------------------------------------------------------------------------------------------------- archives


def _packed(files: Files, rng: random.Random) -> Parts:
    """Loose files, or an archive of them, or several."""
    kind = rng.randrange(10)
    if kind < 7:
        parts = list(files.items())
        return parts + parts[-1:] if kind == 6 and rng.random() < 0.1 else parts
    if kind == 7:
        return [("a.zip", _zipped(files, rng))]
    if kind == 8:
        return [(rng.choice(("a.tgz", "a.tar.gz", "A.TGZ")), _tarred(files, rng))]
    parts = [("a.zip", _zipped(files, rng)), ("b.tgz", _tarred(files, rng)), *files.items()]
    return rng.sample(parts, rng.randint(1, len(parts)))


def _zipped(files: Files, rng: random.Random) -> bytes:
    kind = rng.randrange(12)
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED if kind % 2 else zipfile.ZIP_STORED) as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(_zip_name(name)), data, archive.compression)
        if kind == 0:
            archive.writestr(zipfile.ZipInfo(_zip_name(rng.choice(ODD_NAMES))), b"x")
        if kind == 1:
            archive.writestr("zeros", b"\0" * 8_000_000)
        if kind == 2:
            link = zipfile.ZipInfo("link")
            link.external_attr = (stat.S_IFLNK | 0o777) << 16
            archive.writestr(link, "/etc/passwd")
        if kind == 3:
            archive.writestr("x.bin", b"x" * 100, rng.choice((zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)))
        if kind == 4:
            archive.comment = b"PK\x05\x06" * 50
    data = target.getvalue()
    if kind == 5:  # as if it was encrypted
        data = data.replace(b"PK\x01\x02\x14\x03\x14\x00\x00", b"PK\x01\x02\x14\x03\x14\x00\x01")
    if kind == 6:  # other checksums and sizes in the directory
        at = data.find(b"PK\x01\x02")
        data = data[: at + 16] + rng.randbytes(rng.choice((1, 4, 12))) + data[at + 28 :]
    if kind == 7:  # two archives in one
        data += data
    return corrupt(data, rng) if kind > 8 else data


def _zip_name(name: str) -> str:
    return name.encode(errors="replace").decode()[:60_000] or "x"


def _tarred(files: Files, rng: random.Random) -> bytes:
    kind = rng.randrange(12)
    target = io.BytesIO()
    form = rng.choice((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT))
    with tarfile.open(fileobj=target, mode="w", format=form, encoding="utf-8", errors="surrogateescape") as archive:
        for name, data in files.items():
            _add(archive, tarfile.TarInfo(_tar_name(name)), data)
        if kind == 0:
            _add(archive, tarfile.TarInfo(_tar_name(rng.choice(ODD_NAMES))), b"x")
        if kind in (1, 2):
            link = tarfile.TarInfo("link")
            link.type = rng.choice((tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, b"S", b"9"))
            link.linkname = rng.choice(("/etc/passwd", "../x", *sorted(files)))
            archive.addfile(link)
        if kind == 3:
            _add(archive, tarfile.TarInfo("zeros"), b"\0" * 8_000_000)
        if kind == 4:
            header = tarfile.TarInfo("pax")
            header.pax_headers = {"size": rng.choice(("-1", "99999999999999999999", "x")), "path": "../x"}
            _add(archive, header, b"x")
    data = target.getvalue()
    if kind > 6:
        data = corrupt(data, rng)
    packed = gzip.compress(data, 1, mtime=0)
    if kind == 5:
        packed += packed
    return corrupt(packed, rng) if kind == 6 else packed


def _tar_name(name: str) -> str:
    """A byte that is no character, where there is half of one."""
    return name.replace("\ud800", "\udc80")


def _add(archive: tarfile.TarFile, info: tarfile.TarInfo, data: bytes) -> None:
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))
