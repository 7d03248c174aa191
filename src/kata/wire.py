"""Plain data to bytes and back: bounded, exact, and never pickle.

Plain data are tensors, arrays, numbers, strings, bytes, None and torch dtypes, and lists, tuples
and dicts of them. A message is msgpack of [tree, safetensors]; the tree names the tensors by
number. Strides survive, and so does what lies between the elements of a view: equal bytes mean that
nothing changed.
"""

from __future__ import annotations

import math
from typing import Any

import msgspec
import numpy as np
import safetensors
import safetensors.torch
import torch

LIMIT = 1 << 30
DEPTH = 64


class NotPlainData(TypeError):
    """A value that cannot travel."""


class BadMessage(ValueError):
    """Bytes that are no message of ours."""


def encode(data: Any, limit: int = LIMIT) -> bytes:
    """Turn plain data into bytes. Equal data (also in strides) give equal bytes."""
    tensors: list[torch.Tensor] = []
    tree = _tree(data, tensors, DEPTH)
    # Named by number with leading zeros: safetensors orders its entries by dtype, then name.
    blob = (
        safetensors.torch.save({f"{i:06d}": t for i, t in enumerate(tensors)}) if tensors else b""
    )
    message = msgspec.msgpack.encode([tree, blob])
    if len(message) > limit:
        raise NotPlainData(f"{len(message):,} bytes are too many to send, the limit is {limit:,}")
    return message


def decode(message: bytes, limit: int = LIMIT) -> Any:
    """Turn the bytes back into data that share no memory with anything."""
    if len(message) > limit:
        raise BadMessage(f"{len(message):,} bytes are too many to read, the limit is {limit:,}")
    try:
        tree, blob = msgspec.msgpack.decode(message, type=tuple[Any, bytes])
        tensors = safetensors.torch.load(blob) if blob else {}
        return _data(tree, tensors)
    except (
        ValueError, TypeError, KeyError, IndexError, RuntimeError, RecursionError, AttributeError,
        safetensors.SafetensorError, msgspec.MsgspecError,
    ) as error:  # fmt: skip
        raise BadMessage(f"not a message: {error}") from error


def to_device(data: Any, device: str) -> Any:
    """The same data with every tensor on a device."""
    if isinstance(data, torch.Tensor):
        return data.to(device)
    if isinstance(data, (list, tuple)):
        return type(data)(to_device(x, device) for x in data)
    if isinstance(data, dict):
        return {k: to_device(v, device) for k, v in data.items()}
    return data


def _tree(data: Any, tensors: list[torch.Tensor], depth: int) -> Any:
    """Scalars stand for themselves, everything else is a list whose head is its kind."""
    if depth == 0:
        raise NotPlainData(f"nested more than {DEPTH} deep")
    if data is None or isinstance(data, (bool, str, bytes)) or type(data) is float:
        return data
    if type(data) is int:
        return data if -(2**63) <= data < 2**63 else ["int", str(data)]
    if type(data) is complex:
        return ["complex", data.real, data.imag]
    if isinstance(data, list):
        return ["list", *(_tree(x, tensors, depth - 1) for x in data)]
    if isinstance(data, tuple):
        return ["tuple", *(_tree(x, tensors, depth - 1) for x in data)]
    if isinstance(data, dict):
        pairs = ([_tree(k, tensors, 1), _tree(v, tensors, depth - 1)] for k, v in data.items())
        return ["dict", *pairs]
    if isinstance(data, torch.dtype):
        return ["dtype", str(data).removeprefix("torch.")]
    if isinstance(data, torch.Tensor):
        return _tensor_tree(data, tensors)
    if isinstance(data, (np.ndarray, np.generic)):
        return _array_tree(data, tensors)
    if type(data).__module__.startswith("jax") and hasattr(data, "__array__"):
        return _array_tree(np.asarray(data), tensors)
    raise NotPlainData(
        f"{type(data).__name__} is not plain data "
        "(tensors, arrays, numbers, strings, None, and lists, tuples and dicts of them)"
    )


def _tensor_tree(tensor: torch.Tensor, tensors: list[torch.Tensor]) -> list[Any]:
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.layout != torch.strided:
        raise NotPlainData(f"{type(tensor).__name__} of layout {tensor.layout} is not plain data")
    if tensor.device.type not in ("cpu", "cuda"):
        raise NotPlainData(f"a tensor on {tensor.device} cannot be read")
    tensor = tensor.detach().resolve_conj().resolve_neg()
    shape, stride = list(tensor.shape), list(tensor.stride())
    extent = 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
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


def _array_tree(array: Any, tensors: list[torch.Tensor]) -> list[Any]:
    """An array travels as a tensor; a negative stride has its first element further back."""
    scalar = isinstance(array, np.generic)
    array = np.asarray(array)
    shape, strides = array.shape, array.strides
    if any(s % array.itemsize for s in strides) or not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="), order="C")
        strides = array.strides
    stride = [s // array.itemsize for s in strides]
    if array.size == 0:
        base, first = array.reshape(-1), 0
    else:
        first = sum(-(n - 1) * s for n, s in zip(shape, stride, strict=True) if s < 0)
        extent = 1 + sum((n - 1) * abs(s) for n, s in zip(shape, stride, strict=True))
        if extent > 4 * array.size + 1024:
            array = np.ascontiguousarray(array)
            stride, first, extent = [s // array.itemsize for s in array.strides], 0, array.size
        corner = array[
            tuple(
                slice(n - 1, n) if s < 0 else slice(0, 1)
                for n, s in zip(shape, stride, strict=True)
            )
        ]
        base = np.lib.stride_tricks.as_strided(corner, (extent,), (array.itemsize,))
    try:
        tensor = torch.from_numpy(np.array(base))
    except TypeError:
        tensor = _unusual(base)
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    tensors.append(tensor)
    return ["array", len(tensors) - 1, list(shape), stride, first, str(array.dtype), scalar]


def _unusual(base: np.ndarray[Any, Any]) -> torch.Tensor:
    """JAX's bfloat16 and the like travel as raw bytes; objects and text do not."""
    if base.dtype.kind in "OUSMm" or base.dtype.itemsize > 8:
        raise NotPlainData(f"an array of dtype {base.dtype} is not plain data")
    return torch.from_numpy(np.array(base).view(np.uint8))


def _data(tree: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if not isinstance(tree, list):
        return tree
    kind, *rest = tree
    if kind == "list":
        return [_data(x, tensors) for x in rest]
    if kind == "tuple":
        return tuple(_data(x, tensors) for x in rest)
    if kind == "dict":
        return {_data(k, tensors): _data(v, tensors) for k, v in rest}
    if kind == "int":
        return int(rest[0])
    if kind == "complex":
        return complex(*rest)
    if kind == "dtype":
        dtype = getattr(torch, rest[0])
        if not isinstance(dtype, torch.dtype):
            raise BadMessage(f"{rest[0]} is no dtype")
        return dtype
    if kind == "tensor":
        return _tensor(tensors, *rest)
    if kind == "array":
        return _array(tensors, *rest)
    raise BadMessage(f"unknown kind {kind!r}")


def _tensor(
    tensors: dict[str, torch.Tensor],
    index: int,
    shape: list[int],
    stride: list[int],
    device: str,
    is_complex: bool,
) -> torch.Tensor:
    # A copy, since safetensors' own memory may be neither aligned nor writable.
    base = tensors[f"{index:06d}"].clone()
    if is_complex:
        base = torch.view_as_complex(base)
    return base.to(device).as_strided(shape, stride)


def _array(
    tensors: dict[str, torch.Tensor],
    index: int,
    shape: list[int],
    stride: list[int],
    first: int,
    dtype: str,
    scalar: bool,
) -> Any:
    base = np.array(tensors[f"{index:06d}"].numpy())
    if base.dtype != _dtype(dtype):
        base = base.reshape(-1).view(_dtype(dtype))
    if math.prod(shape) == 0:
        return np.empty(shape, base.dtype)
    lowest = first + sum((n - 1) * s for n, s in zip(shape, stride, strict=True) if s < 0)
    highest = first + sum((n - 1) * s for n, s in zip(shape, stride, strict=True) if s > 0)
    if lowest < 0 or highest >= base.size:
        raise BadMessage("an array reaches beyond its bytes")
    strides = [s * base.itemsize for s in stride]
    array = np.lib.stride_tricks.as_strided(base[first:], shape, strides)
    return array[()] if scalar else array


def _dtype(name: str) -> np.dtype[Any]:
    try:
        return np.dtype(name)
    except TypeError:
        import ml_dtypes

        return np.dtype(getattr(ml_dtypes, name))
