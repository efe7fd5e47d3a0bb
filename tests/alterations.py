"""What can have happened to a checkpoint: one thing of a state_dict is changed."""

import math

import torch

#: In place of a number, a tensor, a list or a dict.
VALUES = [None, "0.1", "", True, -1, 0, 3, 2**24 + 1, 10**400, -0.5, 1e300, math.nan, math.inf, 1j, [], [1.0], {}, ()]
DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.complex64),
    *(torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool),
]
NUMBERS = [math.nan, math.inf, -math.inf, 0.0, -1.0, 1e-38, 1e30]


def another_value(value, source):
    return source.choice(VALUES)


def another_dtype(tensor, source):
    return tensor.to(source.choice(DTYPES))


def another_shape(tensor, source):
    flat = tensor.reshape(-1)
    return source.choice([flat[:-1], tensor.unsqueeze(0), torch.cat([flat, flat])])


def other_strides(tensor, source):
    if tensor.dim() == 2:
        return source.choice([tensor.contiguous(), tensor.t().contiguous().t()])
    return torch.stack([tensor, tensor], -1)[..., 0]


def without_data(tensor, source):
    return source.choice([tensor.to("meta"), tensor.to_sparse()])


def another_element(tensor, source):
    tensor = tensor.clone()
    index = tuple(map(source.randrange, tensor.shape))
    if tensor.is_floating_point():
        tensor[index] = source.choice([*NUMBERS, -tensor[index].item()])
    else:
        info = torch.iinfo(tensor.dtype)
        tensor[index] = source.choice([info.min, info.max, 0, 1, source.randint(info.min, info.max)])
    return tensor


def with_grad(tensor, source):
    return tensor.clone().requires_grad_(tensor.is_floating_point())


OF_TENSORS = [
    *(another_value, another_dtype, another_shape, other_strides, without_data),
    *(another_element, another_element, another_element, with_grad),
]


def alter_entry(entries, source):
    """One entry of a dict is gone, has another name or value, or is new."""
    key = source.choice(list(entries))
    how = source.choice(["drop", "rename", "add", "change", "change", "change", "change"])
    if how == "drop":
        del entries[key]
    elif how == "rename":
        entries[f"{key}_"] = entries.pop(key)
    elif how == "add":
        key = source.choice(["ema", "blocks", "packed", "low", "step", "pa2", "param_names"])
        entries[key] = source.choice([torch.ones(3), 1.0])
    else:
        change = source.choice(OF_TENSORS) if isinstance(entries[key], torch.Tensor) else another_value
        how = change.__name__
        entries[key] = change(entries[key], source)
    return key, how


def alter_owners(saved, source):
    """A state belongs to another parameter, to several, or to none."""
    params = saved["param_groups"][0]["params"]
    how = source.choice(["twice", "another number", "a name", "a list", "swapped", "a state's name", "no dict"])
    if how == "swapped":
        params.reverse()
    elif how == "a state's name":
        saved["state"]["0"] = saved["state"].pop(0)
    elif how == "no dict":
        saved["state"][source.choice(list(saved["state"]))] = source.choice(VALUES)
    else:
        params[1] = {"twice": params[0], "another number": 17, "a name": "1", "a list": [1]}[how]
    return how


def alter(saved, source):
    """Changes one thing, in place; returns what."""
    where = source.choice(["state"] * 6 + ["param_groups"] * 3 + ["owners", "top"])
    if where == "owners":
        return where, alter_owners(saved, source)
    if where == "top":
        return where, alter_entry(saved, source)
    number = source.choice(list(saved["state"]) if where == "state" else range(len(saved["param_groups"])))
    return where, number, alter_entry(saved[where][number], source)
