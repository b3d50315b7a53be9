"""The wire form of routing: bytes that describe themselves, for files, object stores and HTTP bodies.

Header, validity and ids, with checksums. Nothing is unpickled, and nothing is allocated before the declared sizes have
been found consistent. The layout is in docs/reference/wire-format.md.
"""

import math
import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from r3.errors import RoutingError, summary
from r3.routing.checks import check_rows, row_blocks
from r3.routing.spec import Parts, compact_dtype
from r3.routing.validity import by_row

VERSION = 2  # written only where flag _BY_LAYER needs it: all else is version 1, as before

_MAGIC = b"\x93R3ROUTE"
_RUNS, _COMPRESSED, _HAS_VERSION, _BY_LAYER = 1, 2, 4, 8  # flags
_PREFIX = struct.Struct("<8sHHII")  # magic, version, flags, bytes of the header, CRC-32 of its other bytes
_CRC_AT = _PREFIX.size - 4
_FIELDS = struct.Struct("<IIIIIIqQQI")
_ALIGN = 64
_MAX_LAYERS = 1 << 16
_MAX_INFLATION = 1040  # deflate cannot expand to more than 1032 times its bytes


class _Header(NamedTuple):
    """Fields in the order of `_FIELDS`; then the decoder layers, one unsigned 32-bit integer each."""

    samples: int
    length: int
    layers: int
    slots: int
    num_experts: int
    itemsize: int
    weight_version: int
    validity_bytes: int
    ids_bytes: int  # as stored
    body_crc: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.samples, self.length, self.layers, self.slots

    @property
    def rows(self) -> int:
        return self.samples * self.length

    def validities(self, flags: int) -> int:
        """Number of rows, or (token, layer) pairs, of which each is valid or not."""
        return self.rows * self.layers if flags & _BY_LAYER else self.rows

    @property
    def raw_bytes(self) -> int:
        """Size of the ids without compression."""
        return self.rows * self.layers * self.slots * self.itemsize


def encode(routing: Parts, *, compress: bool) -> bytes:
    """Encode the parts of a `RolloutRouting`, for `to_bytes`."""
    ids = np.ascontiguousarray(routing.expert_ids.cpu().numpy())
    validity = by_row(routing.validity.cpu())
    valid = validity.reshape(-1)
    stored = ids.astype(ids.dtype.newbyteorder("<"), copy=False).reshape(-1).view(np.uint8).data
    if compress:
        stored = memoryview(_compressed(stored))
    by_layer = validity.dim() == 3
    runs, packed = _pack_validity(valid.numpy())
    flags = _RUNS * runs | _COMPRESSED * compress | _HAS_VERSION * (routing.weight_version is not None)
    flags |= _BY_LAYER * by_layer
    head = _PREFIX.size + _FIELDS.size + 4 * len(routing.layer_ids)
    gap = bytes(-(head + len(packed)) % _ALIGN)
    body_crc = zlib.crc32(stored, zlib.crc32(gap, zlib.crc32(packed)))
    try:
        fields = _FIELDS.pack(
            *_Header(
                *ids.shape,
                num_experts=routing.num_experts,
                itemsize=ids.itemsize,
                weight_version=0 if routing.weight_version is None else routing.weight_version,
                validity_bytes=len(packed),
                ids_bytes=stored.nbytes,
                body_crc=body_crc,
            )
        ) + struct.pack(f"<{len(routing.layer_ids)}I", *routing.layer_ids)
    except struct.error as error:
        raise RoutingError(
            f"to_bytes: expected sizes and decoder layers in [0, 2**32) and a weight version in [-2**63, 2**63), got "
            f"{tuple(ids.shape)} of {routing.num_experts} experts, version {routing.weight_version}, decoder layers "
            f"{routing.layer_ids}"
        ) from error
    prefix = _PREFIX.pack(_MAGIC, VERSION if by_layer else 1, flags, head, 0)
    crc = zlib.crc32(fields, zlib.crc32(prefix[:_CRC_AT]))
    return b"".join((prefix[:_CRC_AT], struct.pack("<I", crc), fields, packed, gap, stored))


def decode(data: bytes | bytearray | memoryview, *, max_bytes: int) -> Parts:
    """Decode and check the parts of a `RolloutRouting`, for `from_bytes`, in read-only memory."""
    message = _message(data)
    flags, header, layer_ids, validity_at = _read_header(message, max_bytes)
    ids_at = -(-(validity_at + header.validity_bytes) // _ALIGN) * _ALIGN
    if len(message) != ids_at + header.ids_bytes:
        raise RoutingError(
            f"from_bytes: expected {ids_at + header.ids_bytes} bytes in all, got {len(message)}: truncated, or not one "
            "message"
        )
    body = message.data[validity_at:]
    if zlib.crc32(body) != header.body_crc:
        raise RoutingError("from_bytes: the checksum of validity and ids is wrong: the bytes were damaged on their way")
    if message[validity_at + header.validity_bytes : ids_at].any():
        raise RoutingError("from_bytes: expected zeros between validity and ids")
    valid = _unpack_validity(
        message[validity_at : validity_at + header.validity_bytes], header.validities(flags), bool(flags & _RUNS)
    )
    stored = message[ids_at:]
    if flags & _COMPRESSED:
        stored = np.frombuffer(_decompressed(stored, header.raw_bytes), np.uint8)
    ids = _ids(stored, header)
    expert_ids, kept = torch.from_numpy(ids), torch.from_numpy(valid)
    if _anywhere_set(ids, ~kept):
        raise RoutingError("from_bytes: expected ids of 0 in rows that are not valid")
    kept = by_row(kept.reshape(header.shape[: 3 if flags & _BY_LAYER else 2]))
    check_rows(expert_ids, kept, layer_ids, header.num_experts)
    version = header.weight_version if flags & _HAS_VERSION else None
    return Parts(expert_ids, kept, layer_ids, header.num_experts, version)


def _message(data: bytes | bytearray | memoryview) -> np.ndarray:
    """The message as uint8 `[n]`, in read-only memory."""
    try:
        view = memoryview(data)
        if not view.c_contiguous:
            raise ValueError("it has gaps, or another order")
        # A view that is read-only may be of memory that its owner can write to.
        fixed = view if isinstance(view.obj, bytes) else view.tobytes()
        return np.frombuffer(fixed, np.uint8) if view.nbytes else np.empty(0, np.uint8)
    except (TypeError, ValueError, BufferError) as error:
        raise RoutingError(f"from_bytes: expected contiguous bytes, got {type(data).__name__}: {error}") from error


def _read_header(message: np.ndarray, max_bytes: int) -> tuple[int, _Header, tuple[int, ...], int]:
    """Flags, fields, decoder layers and the end of the header, with every check that needs no body."""
    data = message.data
    if len(data) < _PREFIX.size + _FIELDS.size:
        raise RoutingError(
            f"from_bytes: expected at least {_PREFIX.size + _FIELDS.size} bytes, got {len(data)}: truncated"
        )
    magic, version, flags, end, crc = _PREFIX.unpack_from(data)
    if magic != _MAGIC:
        raise RoutingError(f"from_bytes: expected a message that starts with {_MAGIC!r}, got {magic!r}")
    if not 1 <= version <= VERSION:
        raise RoutingError(
            f"from_bytes: expected format version 1 to {VERSION}, got {version}"
            f"{': written by a newer r3; upgrade this one' if version > VERSION else ''}"
        )
    if not _PREFIX.size + _FIELDS.size <= end <= len(data):
        raise RoutingError(f"from_bytes: expected a header within {len(data)} bytes, got one of {end}: truncated")
    if zlib.crc32(data[_PREFIX.size : end], zlib.crc32(data[:_CRC_AT])) != crc:
        raise RoutingError("from_bytes: the checksum of the header is wrong: the bytes were damaged on their way")
    header = _Header(*_FIELDS.unpack_from(data, _PREFIX.size))
    problems = [
        text
        for wrong, text in (
            (flags >> 2 + version, f"flags: expected at most {(4 << version) - 1} in version {version}, got {flags}"),
            (version == 2 and not flags & _BY_LAYER, f"flags: expected {_BY_LAYER} in version 2, got {flags}"),
            (header.layers > _MAX_LAYERS, f"layers: expected at most {_MAX_LAYERS}, got {header.layers}"),
            (
                end != _PREFIX.size + _FIELDS.size + 4 * header.layers,
                f"header: expected one for {header.layers} layers, got {end} bytes",
            ),
            (
                header.itemsize != compact_dtype(header.num_experts).itemsize,
                f"ids: expected {compact_dtype(header.num_experts).itemsize} bytes each for {header.num_experts} "
                f"experts, got {header.itemsize}",
            ),
            (
                not flags & _HAS_VERSION and header.weight_version,
                f"weight version: expected none, got {header.weight_version}",
            ),
        )
        if wrong
    ]
    problems += _wrong_sizes(flags, header, max_bytes)
    if problems:
        raise RoutingError(f"from_bytes: the header contradicts itself or the limits:{summary(problems)}")
    layer_ids = struct.unpack_from(f"<{header.layers}I", data, _PREFIX.size + _FIELDS.size)
    if list(layer_ids) != sorted(set(layer_ids)):
        raise RoutingError(f"from_bytes: expected ascending decoder layers, got {summary(map(str, layer_ids))}")
    return flags, header, layer_ids, end


def _wrong_sizes(flags: int, header: _Header, max_bytes: int) -> Iterator[str]:
    # An empty tensor has strides too: they must not overflow either.
    extent = math.prod(max(size, 1) for size in (*header.shape, header.itemsize))
    validities = header.validities(flags)
    if max(extent, header.raw_bytes + validities) > max_bytes:
        yield (
            f"size: expected at most max_bytes = {max_bytes}, got {header.raw_bytes + validities} for {header.shape} "
            "(pass a larger max_bytes if you trust the sender)"
        )
    if flags & _COMPRESSED:
        if header.raw_bytes > _MAX_INFLATION * header.ids_bytes:
            yield f"ids: {header.ids_bytes} compressed bytes cannot hold the {header.raw_bytes} of {header.shape}"
    elif header.ids_bytes != header.raw_bytes:
        yield f"ids: expected {header.raw_bytes} bytes for {header.shape}, got {header.ids_bytes}"
    bitmap_bytes = -(-validities // 8)
    if header.validity_bytes > bitmap_bytes or (not flags & _RUNS and header.validity_bytes != bitmap_bytes):
        yield f"validity: expected {bitmap_bytes} bytes for {validities} rows, got {header.validity_bytes}"
    if flags & _RUNS and header.validity_bytes % 4:
        yield f"validity: expected runs of 4 bytes each, got {header.validity_bytes} bytes"


def _pack_validity(valid: np.ndarray) -> tuple[bool, bytes]:
    """Bool `[n]` as lengths of runs, valid first, or as one bit a row: the shorter; and whether it is runs."""
    bits = np.packbits(valid, bitorder="little").tobytes()
    ends = np.flatnonzero(valid[1:] != valid[:-1]) + 1
    first = [0] if len(valid) and not valid[0] else []
    lengths = np.diff(np.concatenate([first, [0], ends, [len(valid)]]).astype(np.int64))
    if 4 * len(lengths) < len(bits) and len(valid) < 1 << 32:
        return True, lengths.astype("<u4").tobytes()
    return False, bits


def _unpack_validity(stored: np.ndarray, rows: int, runs: bool) -> np.ndarray:
    if not runs:
        if rows % 8 and stored[-1] >> rows % 8:
            raise RoutingError("from_bytes: expected zeros after the last row's bit of validity")
        return np.unpackbits(stored, count=rows, bitorder="little").view(np.bool_)
    lengths = np.frombuffer(stored, "<u4").astype(np.int64)
    if int(lengths.sum()) != rows or not lengths[1:].all():
        raise RoutingError(f"from_bytes: expected runs of validity of {rows} rows in all, none empty but the first")
    return np.repeat(np.arange(len(lengths)) % 2 == 0, lengths)


def _compressed(ids: memoryview) -> bytes:
    # Ids rarely repeat in sequence, and searching for repeats takes most of zlib's time; only padding has runs.
    packer = zlib.compressobj(1, zlib.DEFLATED, 15, 9, zlib.Z_RLE)
    return packer.compress(ids) + packer.flush()


def _decompressed(stored: np.ndarray, size: int) -> bytes:
    """Decompress exactly `size` bytes; at most one more is produced."""
    unpacker = zlib.decompressobj()
    try:
        raw = unpacker.decompress(stored.data, size + 1)
    except zlib.error as error:
        raise RoutingError(f"from_bytes: expected compressed ids: {error}") from error
    if len(raw) != size or not unpacker.eof or unpacker.unused_data:
        raise RoutingError(f"from_bytes: expected {size} bytes of ids after decompression, got others")
    return raw


class _Shared:
    """Memory of a buffer for numpy to view, without the mark of being read-only, of which torch would warn.

    Routing is never written to, and torch has no read-only tensors.
    """

    def __init__(self, owner: np.ndarray) -> None:
        self.owner = owner  # numpy keeps this object, and this object the memory
        self.__array_interface__ = owner.__array_interface__ | {"data": (owner.__array_interface__["data"][0], False)}


def _ids(stored: np.ndarray, header: _Header) -> np.ndarray:
    """`[B, S, L, K]` in native byte order, without a copy where the bytes are aligned and native."""
    ids = np.asarray(_Shared(stored)).view(f"<{'u' if header.itemsize == 1 else 'i'}{header.itemsize}")
    native = ids.astype(ids.dtype.newbyteorder("="), copy=not ids.flags.aligned)
    return native.reshape(header.shape)


def _anywhere_set(ids: np.ndarray, where: Tensor) -> bool:
    """Whether any id `[B, S, L, K]` is not 0 in the rows of bool `[B * S]`, or the pairs of `[B * S * L]`."""
    if not ids.size:
        return False
    rows = ids.reshape(len(where), -1)
    blocks = row_blocks(where, rows.shape[1])
    return any(rows[index if isinstance(index, slice) else index.numpy()].view(np.uint8).max() for index in blocks)
