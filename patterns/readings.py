"""How single operators read in a formula, by name."""

from collections.abc import Iterable

from fxfuse.patterns.ops import EINSUM, LAYOUT, MATMUL, RESHAPES

# Change dtype or strides and nothing else.
CASTS = frozenset(
    {
        "aten._to_copy.default",
        "aten.clone.default",
        "aten.contiguous.default",
        "aten.to.dtype",
        "aten.to.dtype_layout",
        "aten.to.other",
        "aten.type_as.default",
    }
)

# Give a tensor leading dimensions.
BROADCASTS = RESHAPES | frozenset(
    {"aten.expand.default", "aten.expand_as.default", "aten.unsqueeze.default", "aten.slice.Tensor"}
)

# Sums of two operands, with the signs that they have.
SUMS = {
    "aten.add.Tensor": (1, 1),
    "aten.add.Scalar": (1, 1),
    "aten.sub.Tensor": (1, -1),
    "aten.sub.Scalar": (1, -1),
    "aten.rsub.Tensor": (-1, 1),
    "aten.rsub.Scalar": (-1, 1),
}

# Tensors of nothing but zeros.
ZEROS = frozenset({"aten.zeros.default", "aten.zeros_like.default", "aten.new_zeros.default"})

LARGEST_EPS = 1e-2


def epsilons(arguments: Iterable[object]) -> list[float]:
    """The numbers among arguments of calls that may be the epsilon of a norm, ascending."""
    return sorted({abs(x) for x in arguments if isinstance(x, float) and 0 < abs(x) <= LARGEST_EPS})


CONV1D = "aten.conv1d.default"
SDPA = "aten.scaled_dot_product_attention.default"
SOFTMAX = "aten.softmax.int"
CHUNKED_DELTA_RULE = "fxfuse.chunk_gated_delta_rule.default"
RECURRENT_DELTA_RULE = "fxfuse.recurrent_gated_delta_rule.default"
REPEATED_HEADS = "aten.repeat_interleave.self_int"

# What may precede a convolution as its padding.
PADDINGS = frozenset({"aten.pad.default", "aten.constant_pad_nd.default"})

# Cut or repeat keys and values on their way to attention.
REPEATS = BROADCASTS | frozenset(
    {
        "aten.clone.default",
        "aten.contiguous.default",
        "aten.flatten.using_ints",
        "aten.index.Tensor",
        "aten.index_select.default",
        "aten.narrow.default",
        "aten.repeat_interleave.self_int",
    }
)

# What may turn cos and sin into what the rotation of a half reads.
ON_ANGLES = (
    REPEATS
    | LAYOUT
    | PADDINGS
    | frozenset(
        {
            "aten._conj.default",
            "aten.complex.default",
            "aten.conj.default",
            "aten.neg.default",
            "aten.repeat.default",
            "aten.resolve_conj.default",
            "aten.to.dtype",
            "aten.view_as_complex.default",
        }
    )
)

# Take consecutive elements along one dimension.
CUTS = frozenset(
    {
        "aten.chunk.default",
        "aten.dsplit.array",
        "aten.hsplit.array",
        "aten.narrow.default",
        "aten.select.int",
        "aten.slice.Tensor",
        "aten.split.Tensor",
        "aten.split.sizes",
        "aten.split_with_sizes.default",
        "aten.tensor_split.indices",
        "aten.tensor_split.sections",
        "aten.unbind.int",
        "aten.unflatten.int",
    }
)

# What may follow a convolution and belong to it: a cut, and a SiLU in any spelling.
AFTER_CONVOLUTION = (
    CASTS
    | CUTS
    | frozenset(
        {
            "aten.add.Tensor",
            "aten.div.Tensor",
            "aten.exp.default",
            "aten.log_sigmoid.default",
            "aten.mul.Tensor",
            "aten.narrow.default",
            "aten.neg.default",
            "aten.pow.Tensor_Scalar",
            "aten.reciprocal.default",
            "aten.sigmoid.default",
            "aten.silu.default",
            "aten.slice.Tensor",
            "aten.tanh.default",
        }
    )
)

# What a convolution is made of that is spelled as products with its taps and their sum.
IN_SUMS_OVER_TAPS = (
    AFTER_CONVOLUTION
    | LAYOUT
    | PADDINGS
    | frozenset(
        {
            EINSUM,
            MATMUL,
            "aten.addcmul.default",
            "aten.linalg_vecdot.default",
            "aten.mean.dim",
            "aten.sum.dim_IntList",
            "aten.unfold.default",
        }
    )
)
