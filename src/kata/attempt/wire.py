"""Plain data to bytes and back: bounded, exact, and never pickle.

Plain data are tensors, arrays, numbers, strings, bytes, None and torch dtypes, and lists, tuples
and dicts of them. A message is msgpack of [tree, safetensors]; the tree, msgpack itself so that its
size is seen before it is read, names the tensors by number. Strides survive, and so does what lies
between the elements of a view: equal bytes mean that nothing changed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import safetensors
import safetensors.torch
import torch

LIMIT = 1 << 30  # bytes of a message, and of all that it expands to
TREE = 1 << 25  # bytes of the tree: what is no tensor
DEPTH = 64
DIMENSIONS = 64  # NumPy's own limit
DTYPES = {str(t).removeprefix("torch."): t for t in vars(torch).values() if type(t) is torch.dtype}
NUMBERS = {
    "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
    "float16", "float32", "float64", "complex64", "complex128",
}  # fmt: skip
ONLY_TORCH = {"bfloat16", "float8_e4m3fn", "float8_e5m2", "complex32"}


class NotPlainData(TypeError):
    """A value that cannot travel."""


class BadMessage(ValueError):
    """Bytes that are no message of ours."""


def encode(data: Any, limit: int = LIMIT) -> bytes:
    """Turn plain data into bytes. Equal data (also in strides) give equal bytes."""
    tensors = _Sent()
    tree = _tree(data, tensors, DEPTH)
    # Named by number with leading zeros: safetensors orders its entries by dtype, then name.
    named = {f"{i:06d}": t for i, t in enumerate(tensors)}
    blob = safetensors.torch.save(named) if named else b""
    packed = msgspec.msgpack.encode(tree)
    if len(packed) > TREE:
        raise NotPlainData(
            f"{len(packed):,} bytes beside the tensors are too many to send, the limit is {TREE:,}"
        )
    message = msgspec.msgpack.encode([packed, blob])
    if len(message) > limit:
        raise NotPlainData(f"{len(message):,} bytes are too many to send, the limit is {limit:,}")
    return message


def decode(message: bytes, limit: int = LIMIT) -> Any:
    """Turn the bytes back into data that share no memory with anything."""
    if len(message) > limit:
        raise BadMessage(f"{len(message):,} bytes are too many to read, the limit is {limit:,}")
    try:
        packed, blob = msgspec.msgpack.decode(message, type=tuple[bytes, bytes])
        if len(packed) > TREE:
            raise BadMessage(f"a tree of {len(packed):,} bytes, the limit is {TREE:,}")
        tensors = _Received(safetensors.torch.load(blob) if blob else {})
        return _data(msgspec.msgpack.decode(packed), tensors)
    except Exception as error:  # whatever it is that strange bytes make fail
        raise BadMessage(f"not a message: {error}") from error


def _tree(data: Any, tensors: _Sent, depth: int) -> Any:
    """Scalars stand for themselves, everything else is a list whose head is its kind."""
    if depth == 0:
        raise NotPlainData(f"nested more than {DEPTH} deep")
    if data is None or type(data) in (bool, float, bytes):
        return data
    if type(data) is int:
        return data if -(2**63) <= data < 2**63 else ["int", f"{data:x}"]
    if type(data) is str:
        try:
            data.encode()
        except UnicodeEncodeError:  # halves of surrogate pairs, from a tokenizer that goes wrong
            return ["str", data.encode("utf-8", "surrogatepass")]
        return data
    if type(data) is complex:
        return ["complex", data.real, data.imag]
    if isinstance(data, list):
        return ["list", *(_tree(x, tensors, depth - 1) for x in data)]
    if isinstance(data, tuple):
        return ["tuple", *(_tree(x, tensors, depth - 1) for x in data)]
    if isinstance(data, dict):
        pairs = (
            [_tree(k, tensors, depth - 1), _tree(v, tensors, depth - 1)] for k, v in data.items()
        )
        return ["dict", *pairs]
    if isinstance(data, torch.dtype):
        return ["dtype", str(data).removeprefix("torch.")]
    if isinstance(data, torch.Tensor):
        return _tensor_tree(data, tensors)
    if isinstance(data, (np.ndarray, np.generic)) and not isinstance(data, np.ma.MaskedArray):
        return _array_tree(data, tensors)
    if type(data).__module__.startswith("jax") and hasattr(data, "__array__"):
        return _array_tree(np.asarray(data), tensors)
    raise NotPlainData(
        f"{type(data).__name__} is not plain data "
        "(tensors, arrays, numbers, strings, None, and lists, tuples and dicts of them)"
    )


def _span(shape: Sequence[int], stride: Sequence[int]) -> tuple[int, int]:
    """How far a view reaches before and behind its first element, in elements."""
    steps = [(n - 1) * s for n, s in zip(shape, stride, strict=True)]
    return sum(s for s in steps if s < 0), sum(s for s in steps if s > 0)


class _Room:
    """How much all tensors of a message may expand to.

    A stride of 0 makes much of little, so that a message's bytes are no bound by themselves.
    """

    def __init__(self) -> None:
        self.left = LIMIT

    def holds(self, shape: Sequence[int], itemsize: int) -> bool:
        self.left -= math.prod(shape) * itemsize
        return self.left >= 0 and len(shape) <= DIMENSIONS


class _Sent(list[torch.Tensor]):
    """The tensors of a message that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.room = _Room()


class _Received(dict[str, torch.Tensor]):
    """The tensors of a message that has come. Each is taken once."""

    def __init__(self, named: dict[str, torch.Tensor]) -> None:
        super().__init__(named)
        self.room = _Room()


def _tensor_tree(tensor: torch.Tensor, tensors: _Sent) -> list[Any]:
    name = str(tensor.dtype).removeprefix("torch.")
    plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and name in NUMBERS | ONLY_TORCH
    if not plain or tensor.layout != torch.strided or tensor.device.type not in ("cpu", "cuda"):
        what = f"{type(tensor).__name__} of {tensor.dtype} and {tensor.layout} on {tensor.device}"
        raise NotPlainData(f"a {what} is not plain data")
    if not tensors.room.holds(tensor.shape, tensor.itemsize):
        raise NotPlainData(f"a tensor of shape {list(tensor.shape)} is too large to send")
    tensor = tensor.detach().resolve_conj().resolve_neg()
    shape, stride = list(tensor.shape), list(tensor.stride())
    extent = 1 + _span(shape, stride)[1]
    if tensor.numel() == 0:
        base = tensor.new_empty(0)
    elif extent <= 4 * tensor.numel() + 1024:
        base = tensor.as_strided((extent,), (1,), tensor.storage_offset())
    else:  # a small view of something large: only the elements travel
        tensor = tensor.contiguous()
        base, stride = tensor.reshape(-1), list(tensor.stride())
    if base.is_complex():
        base = torch.view_as_real(base)
    tensors.append(base.cpu().clone())  # safetensors refuses two names for one memory
    return ["tensor", len(tensors) - 1, shape, stride, tensor.device.type, tensor.is_complex()]


def _array_tree(array: Any, tensors: _Sent) -> list[Any]:
    """An array travels as a tensor; a negative stride has its first element further back."""
    scalar = isinstance(array, np.generic)
    array = np.asarray(array)
    dtype = array.dtype.newbyteorder("=")
    if dtype.name not in NUMBERS and dtype.type.__module__ != "ml_dtypes":
        raise NotPlainData(f"an array of dtype {dtype} is not plain data")
    if not tensors.room.holds(array.shape, array.itemsize):
        raise NotPlainData(f"an array of shape {list(array.shape)} is too large to send")
    aligned = array.dtype.isnative and not any(s % array.itemsize for s in array.strides)
    low, high = _span(array.shape, [s // array.itemsize for s in array.strides])
    if not aligned or array.size == 0 or high - low >= 4 * array.size + 1024:
        array = array.astype(dtype, order="C")
        low, high = 0, array.size - 1
    shape, stride = array.shape, [s // array.itemsize for s in array.strides]
    corner = array[tuple(slice(-1, None) if s < 0 else slice(1) for s in stride)]
    base = np.array(np.lib.stride_tricks.as_strided(corner, (1 + high - low,), (array.itemsize,)))
    # JAX's bfloat16 and its like are not known to torch, and travel as bytes.
    tensor = torch.from_numpy(base if dtype.name in NUMBERS else base.view(np.uint8))
    tensors.append(torch.view_as_real(tensor) if tensor.is_complex() else tensor)
    return ["array", len(tensors) - 1, list(shape), stride, -low, dtype.name, scalar]


def _data(tree: Any, tensors: _Received) -> Any:
    if tree is None or type(tree) in (bool, int, float, str, bytes):
        return tree
    if type(tree) is not list:
        raise BadMessage(f"{type(tree).__name__} is not plain data")
    kind, *rest = tree
    if kind == "list":
        return [_data(x, tensors) for x in rest]
    if kind == "tuple":
        return tuple(_data(x, tensors) for x in rest)
    if kind == "dict":
        return {_data(k, tensors): _data(v, tensors) for k, v in rest}
    if kind == "int":
        return int(rest[0], 16)
    if kind == "str":
        return rest[0].decode("utf-8", "surrogatepass")
    if kind == "complex":
        return complex(*rest)
    if kind == "dtype":
        return DTYPES[rest[0]]
    if kind == "tensor":
        return _tensor(tensors, *rest)
    if kind == "array":
        return _array(tensors, *rest)
    raise BadMessage(f"unknown kind {kind!r}")


def _tensor(
    tensors: _Received,
    index: int,
    shape: list[int],
    stride: list[int],
    device: str,
    is_complex: bool,
) -> torch.Tensor:
    # A copy, since safetensors' own memory may be neither aligned nor writable. Each travels for
    # one place: were it copied to many, a small message could ask for much memory.
    base = tensors.pop(f"{index:06d}").clone()
    base = torch.view_as_complex(base) if is_complex else base.reshape(-1)
    _check(shape, stride, 0, base.numel())
    if not tensors.room.holds(shape, base.itemsize):
        raise BadMessage(f"a view of shape {shape} is too large")
    if device not in ("cpu", "cuda"):
        raise BadMessage(f"no tensor travels to {device}")
    return base.to(device).as_strided(shape, stride)


def _array(
    tensors: _Received,
    index: int,
    shape: list[int],
    stride: list[int],
    first: int,
    dtype: str,
    scalar: bool,
) -> Any:
    base = np.array(tensors.pop(f"{index:06d}").numpy()).reshape(-1).view(_dtype(dtype))
    _check(shape, stride, first, base.size)
    if not tensors.room.holds(shape, base.itemsize):
        raise BadMessage(f"a view of shape {shape} is too large")
    if math.prod(shape) == 0:
        return np.empty(shape, base.dtype)
    strides = [s * base.itemsize for s in stride]
    array = np.lib.stride_tricks.as_strided(base[first:], shape, strides)
    return array[()] if scalar else array


def _check(shape: list[int], stride: list[int], first: int, n_elements: int) -> None:
    """Raise BadMessage where a view would reach beyond its elements."""
    if not all(type(n) is int for n in (*shape, *stride, first)) or min(shape, default=0) < 0:
        raise BadMessage(f"no shape {shape} with strides {stride}")
    low, high = _span(shape, stride)
    if math.prod(shape) and not 0 <= first + low <= first + high < n_elements:
        raise BadMessage("a view reaches beyond its elements")


def _dtype(name: str) -> np.dtype[Any]:
    if name in NUMBERS:
        return np.dtype(name)
    import ml_dtypes

    dtype: np.dtype[Any] = np.dtype(getattr(ml_dtypes, name))
    if dtype.type.__module__ != "ml_dtypes":
        raise BadMessage(f"{name} is no dtype")
    return dtype
