"""Which operators play which part, by name, in the normal form (pre-dispatch ATen)."""

LINEAR = "aten.linear.default"
DETACH = "aten.detach.default"
CAT = "aten.cat.default"

# Operators that are others by another name, with the same arguments.
SAME_AS = {
    "aten.concat.default": "aten.cat.default",
    "aten.concatenate.default": "aten.cat.default",
    "aten.broadcast_to.default": "aten.expand.default",
    "aten.clip.default": "aten.clamp.default",
    "aten.divide.Tensor": "aten.div.Tensor",
    "aten.multiply.Tensor": "aten.mul.Tensor",
    "aten.negative.default": "aten.neg.default",
    "aten.special_expit.default": "aten.sigmoid.default",
    "aten.subtract.Tensor": "aten.sub.Tensor",
    "aten.true_divide.Tensor": "aten.div.Tensor",
}
# Casts that name a device, too, or to the dtype that another tensor has.
CASTS_TO_DEVICE = frozenset({"aten.to.device", "aten.to.dtype_layout"})
CASTS_LIKE = frozenset({"aten.to.other", "aten.type_as.default"})
NEG = "aten.neg.default"
MUL = "aten.mul.Tensor"
DIV = "aten.div.Tensor"
SUB = "aten.sub.Tensor"
SUBTRACTED_FROM = frozenset({"aten.rsub.Scalar", "aten.rsub.Tensor"})
# Reduce along the dimensions in this argument; whether they are kept is in the next.
REDUCTIONS = {
    "aten.linalg_norm.default": 2,
    "aten.linalg_vector_norm.default": 2,
    "aten.mean.dim": 1,
    "aten.sum.dim_IntList": 1,
}
SELECT = "aten.select.int"
SQUEEZE = "aten.squeeze.dim"
UNSQUEEZE = "aten.unsqueeze.default"

# Spellings of a linear: products with the transpose of a parameter, and the sum that adds a bias.
ADDMM = "aten.addmm.default"
EINSUM = "aten.einsum.default"
BMM = "aten.bmm.default"
BADDBMM = "aten.baddbmm.default"
MATMUL = "aten.matmul.default"
MM = "aten.mm.default"
MV = "aten.mv.default"
INNER = "aten.inner.default"
TENSORDOT = "aten.tensordot.default"
PRODUCTS = frozenset({MATMUL, MM, MV, INNER, TENSORDOT, BMM, ADDMM, BADDBMM, EINSUM})
ADDS = frozenset({"aten.add.Tensor"})

# Arithmetic that hands on its operand where the other one is this number; whether they may change places.
ARITHMETIC = {
    "aten.add.Tensor": (0, True),
    "aten.sub.Tensor": (0, False),
    "aten.mul.Tensor": (1, True),
    "aten.div.Tensor": (1, False),
}
ARITHMETIC_IN_PLACE = frozenset(
    {"aten.add_.Tensor", "aten.div_.Tensor", "aten.mul_.Tensor", "aten.sub_.Tensor"}
)
# Tensors filled with one number: the argument that it is, None for 1.
FILLED = {
    "aten.full.default": 1,
    "aten.full_like.default": 1,
    "aten.new_full.default": 2,
    "aten.new_ones.default": None,
    "aten.ones.default": None,
    "aten.ones_like.default": None,
}
CONSTANT_COPY = "aten.lift_fresh_copy.default"
DETACH_ = "aten.detach_.default"
CLONE = "aten.clone.default"
COPY_ = "aten.copy_.default"
CONTIGUOUS = "aten.contiguous.default"
POWER = "aten.pow.Tensor_Scalar"

# Copies of elements that a view, or a cat of them, spells as well.
ARANGE = frozenset({"aten.arange.default", "aten.arange.start", "aten.arange.start_step"})
INDEX = "aten.index.Tensor"
INDEX_PUT_ = "aten.index_put_.default"
SCATTER_ = "aten.scatter_.src"
INDEX_SELECT = "aten.index_select.default"
REPEAT = "aten.repeat.default"
TILE = "aten.tile.default"
REPEAT_INTERLEAVE = "aten.repeat_interleave.self_int"
STACK = "aten.stack.default"
UNFOLD = "aten.unfold.default"

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

# Write some elements of a memory and leave the others.
WRITES_OF_A_PART = frozenset(
    {
        "aten.index_add_.default",
        "aten.index_copy_.default",
        "aten.index_put_.default",
        "aten.scatter_.src",
        "aten.scatter_.value",
    }
)

# Show the memory of their first argument.
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

# Lay their result out row by row, or as its sizes say, whatever the strides of their inputs are; without
# overload. Any other call may keep the order of its input's memory, as pointwise ones do.
LAID_OUT_ANEW = frozenset(
    f"aten.{name}"
    for name in (
        *("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "mv", "dot", "_grouped_mm"),
        *("conv1d", "embedding", "layer_norm", "linalg_vecdot"),
        *("sum", "mean", "prod", "var", "std", "amax", "amin", "argmax", "argmin", "any", "all"),
        *("norm", "linalg_vector_norm", "logsumexp", "softmax", "_softmax", "log_softmax"),
        *("cumsum", "cumprod", "logcumsumexp", "tril", "triu", "topk", "gather", "index_select"),
        *("cat", "concat", "concatenate", "stack", "repeat", "tile", "repeat_interleave"),
        *("contiguous", "reshape", "flatten", "new_empty", "new_zeros", "new_ones", "new_full"),
        *("pad", "constant_pad_nd", "unfold", "one_hot"),
    )
)
# Of these, the ones that keep images, whose channels may lie last, in that order.
CHANNELS_MAY_LIE_LAST = frozenset(
    f"aten.{name}" for name in ("cat", "concat", "concatenate", "stack", "pad", "constant_pad_nd")
)

# Answer by the strides or the offset of their input, not by its elements alone, or take it only with some.
STRIDE_READERS = frozenset(
    {
        "aten._grouped_mm.default",
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

# Convolutions over time by another name, with strides and paddings in the same places.
CONV1D_BY_NAME = "aten.conv1d.padding"
CONVOLUTION = "aten.convolution.default"

DROPOUT = "aten.dropout.default"
ASSERT_METADATA = "aten._assert_tensor_metadata.default"
SYM_SIZE = "aten.sym_size.int"

# One spelling for a change of shape: `reshape` is right for every stride, the others only for some.
RESHAPES = frozenset({"aten.view.default", "aten._unsafe_view.default", "aten.reshape.default"})
RESHAPE = "aten.reshape.default"
EXPAND = "aten.expand.default"
REPEATED = frozenset({EXPAND, UNSQUEEZE})
# Sum over what is gone from their result.
REDUCED = {*REDUCTIONS, EINSUM, "aten.linalg_vecdot.default"}
FLATTEN = "aten.flatten.using_ints"
UNFLATTEN = "aten.unflatten.int"
VIEW_AS = "aten.view_as.default"

# Move elements without changing any of them.
LAYOUT = RESHAPES | frozenset(
    {
        "aten.cat.default",
        "aten.chunk.default",
        "aten.clone.default",
        "aten.contiguous.default",
        "aten.dsplit.array",
        "aten.dsplit.int",
        "aten.flatten.using_ints",
        "aten.hsplit.array",
        "aten.hsplit.int",
        "aten.mT.default",
        "aten.moveaxis.int",
        "aten.movedim.int",
        "aten.movedim.intlist",
        "aten.narrow.default",
        "aten.narrow_copy.default",
        "aten.permute.default",
        "aten.roll.default",
        "aten.select.int",
        "aten.slice.Tensor",
        "aten.split.Tensor",
        "aten.split.sizes",
        "aten.split_with_sizes.default",
        "aten.stack.default",
        "aten.squeeze.default",
        "aten.squeeze.dim",
        "aten.swapaxes.default",
        "aten.swapdims.default",
        "aten.tensor_split.indices",
        "aten.tensor_split.sections",
        "aten.transpose.int",
        "aten.unbind.int",
        "aten.unflatten.int",
        "aten.unsafe_chunk.default",
        "aten.unsafe_split.Tensor",
        "aten.unsafe_split_with_sizes.default",
        "aten.unsqueeze.default",
        "aten.vsplit.array",
        "aten.vsplit.int",
    }
)
