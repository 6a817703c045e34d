"""Which operators play which part, by name, in the normal form (pre-dispatch ATen)."""

LINEAR = "aten.linear.default"

# May hand back their input unchanged: a call that does so is folded away.
MAYBE_IDENTITY = frozenset(
    {
        "aten.alias.default",
        "aten.contiguous.default",
        "aten.to.device",
        "aten.to.dtype",
        "aten.to.dtype_layout",
        "aten.to.other",
        "aten.type_as.default",
        "aten.lift_fresh.default",
        "aten.dropout.default",
    }
)

# One spelling for a change of shape: `reshape` is right for every stride, the others only for some.
RESHAPES = frozenset({"aten.view.default", "aten._unsafe_view.default", "aten.reshape.default"})
RESHAPE = "aten.reshape.default"

# Move elements without changing any of them.
LAYOUT = RESHAPES | frozenset(
    {
        "aten.cat.default",
        "aten.chunk.default",
        "aten.clone.default",
        "aten.contiguous.default",
        "aten.flatten.using_ints",
        "aten.narrow.default",
        "aten.permute.default",
        "aten.select.int",
        "aten.slice.Tensor",
        "aten.split.Tensor",
        "aten.split.sizes",
        "aten.split_with_sizes.default",
        "aten.squeeze.dim",
        "aten.transpose.int",
        "aten.unflatten.int",
        "aten.unsqueeze.default",
    }
)
