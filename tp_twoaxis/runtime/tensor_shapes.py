"""What the attributes of torch's layers say of the shapes of their tensors."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import is_lazy

Shapes = dict[str, tuple[int, ...]]

# rows of a recurrent layer's weights, in hidden sizes
_GATES = {"LSTM": 4, "GRU": 3}


def described_shapes(layer: nn.Module) -> Shapes:
    """Derive the shapes of a layer's own parameters and buffers from its attributes.

    Args:
        layer: a convolution, linear, recurrent, attention, embedding or PReLU layer of torch, or one of its norms.

    Returns:
        Name -> shape, also of those that the layer can do without; empty for any other module.

    Example:
        >>> described_shapes(nn.Conv2d(4, 6, 3, groups=2))
        {'weight': (6, 2, 3, 3), 'bias': (6,)}
    """
    if isinstance(layer, _ConvNd):
        channels = (layer.out_channels, layer.in_channels)
        first, second = channels[::-1] if isinstance(layer, _ConvTransposeNd) else channels
        return {"weight": (first, second // layer.groups, *layer.kernel_size), "bias": (layer.out_channels,)}
    if isinstance(layer, nn.Linear):
        return {"weight": (layer.out_features, layer.in_features), "bias": (layer.out_features,)}
    if isinstance(layer, _NormBase):
        return dict.fromkeys(("weight", "bias", "running_mean", "running_var"), (layer.num_features,))
    if isinstance(layer, nn.GroupNorm):
        return dict.fromkeys(("weight", "bias"), (layer.num_channels,))
    if isinstance(layer, (nn.LayerNorm, nn.RMSNorm)):
        return dict.fromkeys(("weight", "bias"), tuple(layer.normalized_shape))
    if isinstance(layer, (nn.Embedding, nn.EmbeddingBag)):
        return {"weight": (layer.num_embeddings, layer.embedding_dim)}
    if isinstance(layer, nn.PReLU):
        return {"weight": (layer.num_parameters,)}
    if isinstance(layer, nn.MultiheadAttention):
        return _of_attention(layer)
    return _of_recurrent(layer) if isinstance(layer, nn.RNNBase) else {}


def misshapen(layer: nn.Module) -> str | None:
    """Compare a layer's tensors with what its attributes say; None where they agree or say nothing.

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> layer.out_features = 5
        >>> misshapen(layer)
        'weight of shape [5, 3], got [2, 3]'
    """
    try:
        described = described_shapes(layer)
    except (ArithmeticError, TypeError) as error:  # no groups, or a number in the place of several
        return f"attributes that describe a {type(layer).__name__}, got some that do not ({error})"
    for name, shape in described.items():
        tensor = {**layer._parameters, **layer._buffers}.get(name)
        if isinstance(tensor, Tensor) and not is_lazy(tensor) and tuple(tensor.shape) != shape:
            return f"{name} of shape {list(shape)}, got {list(tensor.shape)}"
    return None


def _of_attention(layer: nn.MultiheadAttention) -> Shapes:
    width, keys, values = layer.embed_dim, layer.kdim, layer.vdim
    shapes: Shapes = {"in_proj_weight": (3 * width, width), "in_proj_bias": (3 * width,)}
    shapes |= {"q_proj_weight": (width, width), "k_proj_weight": (width, keys), "v_proj_weight": (width, values)}
    return shapes | dict.fromkeys(("bias_k", "bias_v"), (1, 1, width))


def _of_recurrent(layer: nn.RNNBase) -> Shapes:
    rows, state = _GATES.get(layer.mode, 1) * layer.hidden_size, layer.proj_size or layer.hidden_size
    directions = ("", "_reverse") if layer.bidirectional else ("",)
    shapes: Shapes = {}
    for number in range(layer.num_layers):
        read = len(directions) * state if number else layer.input_size
        for direction in directions:
            place = f"l{number}{direction}"
            shapes |= {f"weight_ih_{place}": (rows, read), f"weight_hh_{place}": (rows, state)}
            shapes |= dict.fromkeys((f"bias_ih_{place}", f"bias_hh_{place}"), (rows,))
            shapes[f"weight_hr_{place}"] = (state, layer.hidden_size)
    return shapes
