"""Operators of torch that leave elements as they are: copies and views."""

import torch
from torch import Tensor

__all__ = ["COPIES", "VIEWS"]

# Operators that return a new tensor with the same elements in the same order, such as a cast to another dtype.
COPIES = {
    Tensor.to, Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16, Tensor.type, Tensor.type_as,
    Tensor.contiguous, Tensor.clone, torch.clone,
}  # fmt: skip

# Operators that show the same elements, or ask for something else than a result.
VIEWS = {
    "get", "set", "view", "permute", "transpose", "swapaxes", "movedim", "t", "unsqueeze", "squeeze",
    "expand", "expand_as", "broadcast_to", "unflatten", "getitem", "select", "narrow", "chunk", "split",
    "unbind", "detach", "size", "dim", "numel", "stride", "is_contiguous", "requires_grad", "is_floating_point",
    "is_complex", "len", "storage_offset", "data_ptr", "register_hook", "retain_grad", "get_device",
    "element_size", "view_as", "unfold", "as_strided", "diagonal", "tensor_split", "hsplit", "vsplit", "dsplit",
    "broadcast_tensors", "backward", "ndimension",
}  # fmt: skip
