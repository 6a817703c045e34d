"""Which operators play which part, by name, in the normal form (pre-dispatch ATen)."""

LINEAR = "aten.linear.default"
CAT = "aten.cat.default"

# Operators that are others by another name, with the same arguments.
SAME_AS = {
    "aten.concat.default": "aten.cat.default",
    "aten.concatenate.default": "aten.cat.default",
    "aten.multiply.Tensor": "aten.mul.Tensor",
    "aten.special_expit.default": "aten.sigmoid.default",
}
SUBTRACTED_FROM = frozenset({"aten.rsub.Scalar", "aten.rsub.Tensor"})
REDUCTIONS = frozenset({"aten.mean.dim", "aten.sum.dim_IntList"})
UNSQUEEZE = "aten.unsqueeze.default"

# Spellings of a linear: products with the transpose of a parameter, and the sum that adds a bias.
ADDMM = "aten.addmm.default"
EINSUM = "aten.einsum.default"
PRODUCTS = frozenset({"aten.matmul.default", "aten.mm.default", ADDMM, EINSUM})
ADDS = frozenset({"aten.add.Tensor"})

# Arithmetic that hands on its operand where the other one is this number; whether they may change places.
ARITHMETIC = {
    "aten.add.Tensor": (0, True),
    "aten.sub.Tensor": (0, False),
    "aten.mul.Tensor": (1, True),
    "aten.div.Tensor": (1, False),
}
CLONE = "aten.clone.default"

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
    }
)

# A call of one of these on the same base sees the same memory as an equal call before it.
VIEWS = frozenset(
    {
        "aten._unsafe_view.default",
        "aten.expand.default",
        "aten.flatten.using_ints",
        "aten.mT.default",
        "aten.movedim.int",
        "aten.narrow.default",
        "aten.numpy_T.default",
        "aten.permute.default",
        "aten.reshape.default",
        "aten.select.int",
        "aten.slice.Tensor",
        "aten.squeeze.default",
        "aten.squeeze.dim",
        "aten.swapaxes.default",
        "aten.swapdims.default",
        "aten.t.default",
        "aten.transpose.int",
        "aten.unflatten.int",
        "aten.unsqueeze.default",
        "aten.view.default",
        "aten.view_as.default",
    }
)

# Answer by the strides or the offset of their input, not by its elements alone.
STRIDE_READERS = frozenset(
    {
        "aten.as_strided.default",
        "aten.as_strided_.default",
        "aten.set_.source_Tensor",
        "aten.sym_storage_offset.default",
        "aten.sym_stride.int",
        "aten.view.dtype",
        "aten.view_as_complex.default",
    }
)

# Write to the arguments at these positions although their schemas do not say so.
UNDECLARED_WRITES = {
    "aten.batch_norm.default": (3, 4),
    "aten.instance_norm.default": (3, 4),
    "aten.native_batch_norm.default": (3, 4),
}

# Higher-order operators write to what they are given, except these.
READ_ONLY_HIGHER_ORDER = frozenset(
    {"auto_functionalized", "auto_functionalized_v2", "flex_attention", "triton_kernel_wrapper_functional"}
)

DROPOUT = "aten.dropout.default"

# One spelling for a change of shape: `reshape` is right for every stride, the others only for some.
RESHAPES = frozenset({"aten.view.default", "aten._unsafe_view.default", "aten.reshape.default"})
RESHAPE = "aten.reshape.default"
VIEW_AS = "aten.view_as.default"

# Move elements without changing any of them.
LAYOUT = RESHAPES | frozenset(
    {
        "aten.cat.default",
        "aten.chunk.default",
        "aten.clone.default",
        "aten.contiguous.default",
        "aten.flatten.using_ints",
        "aten.mT.default",
        "aten.moveaxis.int",
        "aten.movedim.int",
        "aten.narrow.default",
        "aten.permute.default",
        "aten.select.int",
        "aten.slice.Tensor",
        "aten.split.Tensor",
        "aten.split.sizes",
        "aten.split_with_sizes.default",
        "aten.squeeze.default",
        "aten.squeeze.dim",
        "aten.swapaxes.default",
        "aten.swapdims.default",
        "aten.tensor_split.indices",
        "aten.tensor_split.sections",
        "aten.transpose.int",
        "aten.unbind.int",
        "aten.unflatten.int",
        "aten.unsqueeze.default",
    }
)
