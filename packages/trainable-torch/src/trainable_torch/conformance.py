# ruff: noqa: D102 - what each method does is said in trainable_core.conformance.adapter.Adapter
"""The PyTorch backend as the conformance kit sees it."""

from __future__ import annotations

import copy
import functools
import gc
import io
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trainable_core.config import TrainableQuantizerWeightsConfig
from trainable_core.conformance.adapter import (
    FORWARD,
    INPUT,
    PLAIN,
    VECTORIZED,
    BaseAdapter,
    Call,
    Observed,
    Run,
    State,
    Way,
)
from trainable_core.conformance.case import uncalibrated
from trainable_core.constants import THRESHOLD
from trainable_core.enums import TieRule
from trainable_torch.holder import ActivationQuantizationHolder
from trainable_torch.kernels import cache, layer, native
from trainable_torch.quantizers.ste import SteWeightsQuantizer
from trainable_torch.wrapper import QuantizationWrapper

Array = NDArray[Any]

WRONG_DEVICE = "on the same device", "is not on the expected device"
"""What PyTorch says of tensors on two devices."""


@contextmanager
def other_defaults() -> Iterator[None]:
    """Give a context in which the process has other settings than it had: a dtype, and which algorithms are used."""
    dtype, deterministic = torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.set_default_dtype(torch.float64 if dtype == torch.float32 else torch.float32)
    torch.use_deterministic_algorithms(not deterministic)
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)
        torch.use_deterministic_algorithms(deterministic, warn_only=warns)


CONTEXTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "torch.no_grad": torch.no_grad,
    "torch.inference_mode": torch.inference_mode,
    "other defaults of the process": other_defaults,
    "torch.autocast": functools.partial(torch.autocast, "cpu", torch.bfloat16),
}

FORMATS = {"channels_last": torch.channels_last, "channels_last_3d": torch.channels_last_3d}


def to_numpy(tensor: Tensor) -> Array:
    """Return a copy of a tensor's values; bfloat16, which NumPy lacks, as float32."""
    wide = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
    return np.array(wide.detach().cpu().resolve_neg().numpy())


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """Return a tensor's values in another layout; as they are where its shape has no such layout."""
    if not tensor.numel() or not tensor.dim():
        return tensor
    axes = tuple(reversed(range(tensor.dim())))
    if layout == "transposed":
        return tensor.permute(axes).contiguous().permute(axes)
    if layout == "strided":  # every second element of a larger tensor, which begins in the middle of it
        larger = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1] + 1), torch.nan, dtype=tensor.dtype)
        strided = larger.to(tensor.device)[..., 1::2]
        return strided.copy_(tensor)
    if layout == "expanded":
        first = tensor[(slice(1),) * tensor.dim()].expand(tensor.shape)
        rows = tensor[:1].expand(tensor.shape)
        return next((each for each in (first, rows) if torch.equal(each, tensor)), tensor)
    if layout in FORMATS and tensor.dim() == len(layout.split("_")) + 2:
        return tensor.contiguous(memory_format=FORMATS[layout])
    return tensor


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Keep what PyTorch warns of when it traces from being an error, as `pytest -W error` makes it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _is_own(quantizer: Any) -> bool:
    """Return whether a quantizer's class is this package's."""
    return type(quantizer).__module__.partition(".")[0] == __name__.partition(".")[0]


class TorchAdapter(BaseAdapter):
    """See `trainable_core.conformance.adapter.Adapter`."""

    backend, tie_rule, counts_calls, subnormals = "torch", TieRule.HALF_EVEN, False, True
    dtypes = ("float32", "float16", "bfloat16", "float64")
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    modules = ("torch", "mct_quantizers")
    layouts = ("contiguous", "transposed", "strided", "expanded", *FORMATS)
    sizes = tuple(sorted({cache.SMALL, layer.KEPT, 2**16, native.SHARE}))
    modes: Mapping[str, bool] = {"compiled with eager": True}
    traced = (True,)  # to trace a call takes a second
    replaceable = ("forward", "quantize", "fake_quantize", "rule", "grid")
    thorough_modes: Mapping[str, bool] = {"compiled with aot_eager": True, "compiled with inductor": False}
    casts = ("float16", "bfloat16", "float64")
    blocks = modifiers = copies_modifiers = True
    contexts = CONTEXTS
    default_training = (False, True)

    def run(
        self,
        quantizer: Any,
        x: Array,
        *,
        training: bool,
        dtype: str,
        device: str,
        upstream: Array | None,
        way: Way = PLAIN,
    ) -> Run:
        # Only where it has to move: moving it in one thread, while another one runs it, can block PyTorch for good.
        if device != "cpu":
            quantizer.to(device)
        if quantizer.training is not (training != way.opposed):  # a model that is evaluated twice is told so once
            quantizer.train(training != way.opposed)
        quantizer.zero_grad()
        given = laid_out(torch.tensor(x).to(device, getattr(torch, dtype)), way.layout)
        given = given.requires_grad_(upstream is not None and way.input_gradient)
        output = quantizer(given, training) if way.explicit else quantizer(given)
        run = self._gradients(quantizer, given, output, upstream, way)
        if device != "cpu":
            quantizer.to("cpu")
        return run

    def unsaid(self, quantizer: Any, x: Array) -> Array:
        return to_numpy(quantizer(torch.tensor(x)))

    def _gradients(
        self,
        quantizer: Any,
        given: Tensor,
        output: Tensor,
        upstream: Array | None,
        way: Way = PLAIN,
        *,
        again: bool = False,
    ) -> Run:
        variables: dict[str, Array] = {}
        if upstream is not None:
            if output.requires_grad:
                output.backward(laid_out(torch.tensor(upstream).to(output), way.upstream), retain_graph=again)
            for name, variable in self.trained(quantizer).items():
                variables[name] = to_numpy(torch.zeros_like(variable) if variable.grad is None else variable.grad)
        gradient = None
        if given.requires_grad:  # nothing arrives where the output does not depend on it
            gradient = to_numpy(torch.zeros_like(given) if given.grad is None else given.grad)
        name = str(output.dtype).removeprefix("torch.")
        return Run(to_numpy(output), name, output.device.type, to_numpy(given), gradient, variables)

    def deployed(self, quantizer: Any) -> Callable[[Array, str, Way], Run]:
        inferable = quantizer.convert2inferable()

        def call(x: Array, dtype: str, way: Way) -> Run:
            given = laid_out(torch.tensor(x).to(getattr(torch, dtype)), way.layout)
            output = inferable(given)
            name = str(output.dtype).removeprefix("torch.")
            return Run(to_numpy(output), name, output.device.type, to_numpy(given))

        return call

    def interleave(self, quantizer: Any, calls: Sequence[Call], order: Sequence[int]) -> list[Run]:
        quantizer.train()
        given = [torch.tensor(x).requires_grad_() for x, _ in calls]
        outputs = [quantizer(each, True) for each in given]  # noqa: FBT003 - mctq's call
        runs: dict[int, Run] = {}
        for place, index in enumerate(order):
            quantizer.zero_grad()
            given[index].grad = None
            again = index in order[place + 1 :]
            runs[index] = self._gradients(quantizer, given[index], outputs[index], calls[index][1], again=again)
        return [runs[index] for index in range(len(calls))]

    def accumulate(self, quantizer: Any, calls: Sequence[Call]) -> dict[str, Array]:
        quantizer.train().zero_grad()
        for x, upstream in calls:
            output = quantizer(torch.tensor(x).requires_grad_(), True)  # noqa: FBT003 - mctq's call
            output.backward(torch.tensor(upstream))
        trained = self.trained(quantizer)
        return {
            name: to_numpy(torch.zeros_like(each) if each.grad is None else each.grad) for name, each in trained.items()
        }

    def execute(self, quantizer: Any, x: Array, mode: str, *, training: bool, upstream: Array | None) -> Run:
        quantizer.train(training).zero_grad()
        torch.compiler.reset()
        whole = mode in self.thorough_modes or _is_own(quantizer)  # what can't be traced may run eagerly otherwise
        compiled: Any = torch.compile(quantizer, backend=mode.rpartition(" ")[2], fullgraph=whole)
        given = torch.tensor(x).requires_grad_(upstream is not None)
        with _without_warnings():
            return self._gradients(quantizer, given, compiled(given, training), upstream, PLAIN)

    def observe(self, quantizer: Any, x: Array, upstream: Array, *, training: bool) -> Observed:
        quantizer.train(training).zero_grad()
        given, up = torch.tensor(x).requires_grad_(), torch.tensor(upstream)
        with torch.no_grad():
            unrecorded = quantizer(given, training)
            changed = torch.is_grad_enabled()
        plain, hooked = torch.tensor(x), []
        hook = quantizer.register_forward_hook(lambda *_: hooked.append(1))
        quantizer(plain, training)
        hook.remove()
        earlier, output = quantizer(given, training), quantizer(given, training)
        changed |= not torch.is_grad_enabled()
        places = [each.untyped_storage().data_ptr() for each in (given, earlier, output)]
        shared = [
            name for name, place in (("the input", places[0]), ("an earlier output", places[1])) if place == places[2]
        ]
        recorded = bool(output.requires_grad), bool(unrecorded.requires_grad)
        if output.requires_grad:
            output.backward(up)
        held = {"the input": weakref.ref(given), "the output": weakref.ref(output)}
        del given, output, earlier, unrecorded
        quantizer.zero_grad()
        if any(reference() is not None for reference in held.values()):
            gc.collect(1)  # what only a cycle holds is not kept; it is young
        kept = [name for name, reference in held.items() if reference() is not None]
        unequal = not np.array_equal(to_numpy(up), upstream)
        shares = tuple(shared) if x.size else ()
        return Observed(tuple(kept), shares, unequal, changed, recorded, plain.requires_grad, not hooked)

    def second_derivative(
        self, quantizer: Any, x: Array, upstream: Array, directions: Mapping[str, Array]
    ) -> tuple[Run, Array] | None:
        quantizer.train().zero_grad()
        given, up = torch.tensor(x).requires_grad_(), torch.tensor(upstream).requires_grad_()
        trained = {INPUT: given, **self.trained(quantizer)}
        try:
            output = quantizer(given, True)  # noqa: FBT003 - mctq's call
            taken = torch.autograd.grad(output, list(trained.values()), up, create_graph=True, allow_unused=True)
            found = {
                name: torch.zeros_like(trained[name]) if d is None else d
                for name, d in zip(trained, taken, strict=True)
            }
            total = torch.stack([(found[name] * torch.tensor(d)).sum() for name, d in directions.items()]).sum()
            (second,) = torch.autograd.grad(total, up)
        except RuntimeError:  # PyTorch's, for what can't be differentiated twice
            return None
        arrays = {name: to_numpy(each) for name, each in found.items()}
        return Run(to_numpy(output), "float32", "cpu", x, arrays.pop(INPUT), arrays), to_numpy(second)

    def _functional(self, quantizer: Any, x: Tensor, values: Mapping[str, Tensor], *, training: bool) -> Tensor:
        quantizer.train(training)
        result: Tensor = torch.func.functional_call(quantizer, dict(values), (x, training))
        return result

    def forward_derivative(self, quantizer: Any, x: Array, directions: Mapping[str, Array]) -> Array | None:
        numbers = {INPUT: torch.tensor(x), **{name: each.detach() for name, each in self.trained(quantizer).items()}}
        moving = {name: numbers[name] for name in directions}

        def call(moving: dict[str, Tensor]) -> Tensor:
            given = {**numbers, **moving}
            return self._functional(quantizer, given.pop(INPUT), given, training=True)

        try:
            tangents = {name: torch.tensor(each) for name, each in directions.items()}
            with _without_warnings():
                found: Any = torch.func.jvp(call, (moving,), (tangents,))
        except (RuntimeError, NotImplementedError):  # PyTorch's, for what has no derivative in forward mode
            return None
        return to_numpy(found[1])

    def vectorized(self, quantizer: Any, calls: Sequence[Call]) -> list[Run] | None:
        values = {name: each.detach() for name, each in self.trained(quantizer).items()}

        def one(x: Tensor, upstream: Tensor) -> Any:
            def call(x: Tensor, values: dict[str, Tensor]) -> Tensor:
                return self._functional(quantizer, x, values, training=True)

            found: Any = torch.func.vjp(call, x, values)
            output, pull = found
            return output, *pull(upstream)

        inputs, upstreams = (torch.tensor(np.stack(each)) for each in zip(*calls, strict=True))
        try:
            with _without_warnings():
                outputs, d_x, d_values = torch.vmap(one)(inputs, upstreams)
        except RuntimeError:  # PyTorch's, for what can't be mapped
            return None
        return [
            Run(
                to_numpy(outputs[place]),
                "float32",
                "cpu",
                x,
                to_numpy(d_x[place]),
                {name: to_numpy(each[place]) for name, each in d_values.items()},
            )
            for place, (x, _) in enumerate(calls)
        ]

    def vectorized_variables(
        self, quantizer: Any, x: Array, numbers: Sequence[Mapping[str, Array]]
    ) -> list[Array] | None:
        given = torch.tensor(x)

        def call(values: dict[str, Tensor]) -> Tensor:
            return self._functional(quantizer, given, values, training=False)

        stacked = {name: torch.tensor(np.stack([each[name] for each in numbers])) for name in numbers[0]}
        try:
            with _without_warnings():
                outputs = torch.vmap(call)(stacked)
        except RuntimeError:  # as above
            return None
        return [to_numpy(each) for each in outputs]

    def batched_gradients(
        self, quantizer: Any, x: Array, upstreams: Sequence[Array]
    ) -> tuple[list[Run], list[Array]] | None:
        quantizer.train().zero_grad()
        given = torch.tensor(x).requires_grad_()
        leaves = {INPUT: given, **self.trained(quantizer)}
        several, ones = torch.tensor(np.stack(upstreams)), torch.ones_like(given).requires_grad_()
        try:
            output = quantizer(given, True)  # noqa: FBT003 - mctq's call
            many: dict[str, Any] = {"is_grads_batched": True, "allow_unused": True}
            taken = torch.autograd.grad(output, list(leaves.values()), several, retain_graph=True, **many)
            (d_x,) = torch.autograd.grad(output, given, ones, create_graph=True)
            # What refuses to be differentiated twice, as by `once_differentiable`, gives zeros where it is mapped.
            torch.autograd.grad(d_x, ones, several[0], retain_graph=True, allow_unused=True)
            (second,) = torch.autograd.grad(d_x, ones, several, **many)
        except RuntimeError:  # PyTorch's, for what can't be mapped or differentiated twice
            return None
        shapes = [(len(upstreams), *each.shape) for each in leaves.values()]
        filled = [torch.zeros(shape) if d is None else d for d, shape in zip(taken, shapes, strict=True)]
        runs = []
        for place in range(len(upstreams)):
            arrays = {name: to_numpy(each[place]) for name, each in zip(leaves, filled, strict=True)}
            runs.append(Run(to_numpy(output), "float32", "cpu", x, arrays.pop(INPUT), arrays))
        zeros = np.zeros_like(x)
        return runs, [zeros if second is None else to_numpy(second[place]) for place in range(len(upstreams))]

    def promised(self, quantizer: Any) -> Sequence[str]:
        if not _is_own(quantizer):
            return ()
        by_rule = quantizer.dependencies() is not None and quantizer.rule(1, 1) is not None
        return (VECTORIZED, FORWARD) if by_rule else (VECTORIZED,)

    def deployed_scale(self, quantizer: Any) -> Array | None:
        return to_numpy(quantizer.deployed_scale())

    def in_a_layer(self, quantizer: Any, weights: Array) -> _Linear:
        return _Linear(self, quantizer, weights)

    def before_a_layer(
        self, quantizer: Any, x: Array, *, training: bool, upstream: Array | None, way: Way = PLAIN
    ) -> Run | None:
        kinds: Any = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
        if x.ndim - 2 not in range(len(kinds)):
            return None
        channels = x.shape[1]
        arguments = (channels, channels) if x.ndim == 2 else (channels, channels, 1)  # noqa: PLR2004 - rows and features
        layer = nn.utils.skip_init(kinds[x.ndim - 2], *arguments, bias=False)
        with torch.no_grad():
            layer.weight.copy_(torch.eye(channels).view(layer.weight.shape))
        one = {"weights_quantization_method": "SYMMETRIC", "weights_n_bits": 8}
        config = TrainableQuantizerWeightsConfig(
            **one, weights_quantization_params={THRESHOLD: 2.0}
        )  # has a code for 1
        weights = {"weight": SteWeightsQuantizer(config)}
        holders = {"input": ActivationQuantizationHolder(quantizer)}
        wrapper: Any = QuantizationWrapper(layer, weights, input_holders=holders).train(training)
        quantizer.zero_grad()
        given = laid_out(torch.tensor(x), way.layout).requires_grad_(upstream is not None and way.input_gradient)
        with torch.set_grad_enabled(upstream is not None):
            output = wrapper(given)
        return self._gradients(quantizer, given, output, upstream, way)

    def regularization(self, quantizer: Any) -> tuple[float, dict[str, Array]] | None:
        return self._term(quantizer, quantizer.regularization())

    def regularization_of(self, quantizer: Any, x: Array) -> tuple[float, dict[str, Array]] | None:
        given = torch.tensor(x).requires_grad_()
        return self._term(quantizer, quantizer.regularization_of(given), {INPUT: given})

    def _term(
        self, quantizer: Any, term: Tensor | None, beside: Mapping[str, Tensor] | None = None
    ) -> tuple[float, dict[str, Array]] | None:
        if term is None:
            return None
        trained = {**(beside or {}), **self.trained(quantizer)}
        found: list[Tensor | None] = [None] * len(trained)
        if term.requires_grad and trained:
            found = list(torch.autograd.grad(term, list(trained.values()), allow_unused=True))
        zeros = [torch.zeros_like(each) for each in trained.values()]
        gradients = [to_numpy(zero if each is None else each) for each, zero in zip(found, zeros, strict=True)]
        return float(term.detach()), dict(zip(trained, gradients, strict=True))

    def collected(self, quantizer: Any, x: Array, *, training: bool = True) -> list[float]:
        quantizer.train(training)(torch.tensor(x), training)
        return [] if quantizer.is_switched_off else super().collected(quantizer, x, training=training)

    def misplaced(self, quantizer: Any, x: Array, *, training: bool) -> str:
        moved = copy.deepcopy(quantizer).to("meta").train(training)
        try:
            output = moved(torch.tensor(x, device="meta"), training)
        except (RuntimeError, NotImplementedError) as error:  # a tensor without numbers can't be asked for one
            return str(error) if any(said in str(error) for said in WRONG_DEVICE) else ""
        if output.device.type != "meta":
            return f"the output is on {output.device}"
        with torch.device("meta"):  # where models are made that don't fit in memory twice
            made = type(quantizer)(uncalibrated(quantizer.quantization_config), **quantizer.get_arguments())
            made.initialize_quantization(x.shape, "tensor", None)
        try:
            made.load_state_dict(quantizer.state_dict(), assign=True)
            output = made.train(training)(torch.tensor(x), training)
            terms = made.regularization(), made.regularization_of(torch.tensor(x))
            devices = {each.device.type for each in (output, *terms) if each is not None}
            if devices != {"cpu"}:
                return f"made on the meta device, and filled, what it computes is on {', '.join(sorted(devices))}"
        except (RuntimeError, NotImplementedError) as error:
            return f"made on the meta device, and filled by load_state_dict(..., assign=True): {error}"
        return ""

    def shown(self, quantizer: Any, x: Array) -> None:
        quantizer.observe(torch.tensor(x))

    def settings(self) -> dict[str, Any]:
        return {
            "the default dtype": torch.get_default_dtype(),
            "the gradient mode": torch.is_grad_enabled(),
            "anomaly detection": torch.is_anomaly_enabled(),
            "autocast": tuple(torch.is_autocast_enabled(device) for device in ("cpu", "cuda")),
            "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
            "the precision of products": torch.get_float32_matmul_precision(),
            "the number of threads": torch.get_num_threads(),
            "flushing of subnormal numbers": bool((torch.tensor([2.0**-140]) * 1.0 == 0).all()),
        }

    def random_states(self) -> dict[str, bytes]:
        return {"torch": torch.get_rng_state().numpy().tobytes()}

    @contextmanager
    def other_random_state(self, seed: int | None = None) -> Iterator[None]:
        with torch.random.fork_rng(devices=[]):
            _ = torch.default_generator.seed() if seed is None else torch.default_generator.manual_seed(seed)
            yield

    def cast(self, quantizer: Any, dtype: str) -> Any:
        return nn.ModuleList([quantizer]).to(getattr(torch, dtype))[0]

    def trained(self, quantizer: Any) -> dict[str, Tensor]:
        return {name: parameter for name, parameter in quantizer.named_parameters() if parameter.requires_grad}

    def descend(self, quantizer: Any, gradients: Mapping[str, Array]) -> None:
        for name, variable in self.trained(quantizer).items():
            variable.grad = torch.tensor(gradients[name]) if name in gradients else None
        torch.optim.SGD([*self.trained(quantizer).values(), torch.zeros(1)], lr=1.0).step()

    def optimizer(self, quantizer: Any) -> Callable[[], None]:
        parameters = [*self.trained(quantizer).values(), torch.zeros(1)]
        optimizer = torch.optim.SGD(parameters, lr=2.0**-6, momentum=0.9, weight_decay=0.1)

        def step() -> None:
            optimizer.step()

        return step

    def copy(self, quantizer: Any) -> Any:
        return copy.deepcopy(quantizer)

    def save(self, quantizer: Any) -> bytes:
        torch.save(nn.ModuleList([quantizer]).state_dict(), buffer := io.BytesIO())  # models are what is saved
        return buffer.getvalue()

    def restore(self, quantizer: Any, state: bytes) -> None:
        nn.ModuleList([quantizer]).load_state_dict(torch.load(io.BytesIO(state), weights_only=True))

    def entries(self, quantizer: Any) -> dict[str, Array]:
        return {name: to_numpy(value) for name, value in quantizer.state_dict().items()}

    def restore_entries(self, quantizer: Any, state: State) -> None:
        quantizer.load_state_dict({name: torch.tensor(value) for name, value in state.items()})

    def model(self) -> tuple[nn.Module, Tensor, Callable[[nn.Module], Array]]:
        batch = torch.linspace(-1.0, 1.0, 12).reshape(4, 3)
        return nn.Sequential(nn.Linear(3, 2)), batch, lambda model: to_numpy(model.eval()(batch))


class _Linear:
    """A wrapped layer as the conformance kit calls it: on unit vectors, so that its output is its weights."""

    counts_steps = False  # the model does, in whose forward the layer is called

    def __init__(self, adapter: TorchAdapter, quantizer: Any, weights: Array) -> None:
        self.adapter, self.quantizer = adapter, quantizer
        rows, columns = weights.shape
        with torch.no_grad():
            layer = nn.utils.skip_init(nn.Linear, columns, rows, bias=False)
            layer.weight.copy_(torch.tensor(weights))
        self.layer: Any = QuantizationWrapper(layer, {"weight": quantizer})
        self.weight: Any = next(each for name, each in layer.named_parameters() if name == "weight")

    def assign(self, weights: Array) -> None:
        self.layer.train()  # what is written to `data`, as by some optimizers, is seen after training alone
        self.weight.data.copy_(torch.tensor(weights))

    def __call__(self, *, training: bool, upstream: Array | None) -> Run:
        self.layer.train(training).zero_grad()
        units = torch.eye(self.weight.shape[1])
        variables: dict[str, Array] = {}
        with torch.set_grad_enabled(upstream is not None):
            output = self.layer(units)
            if upstream is not None:
                output.backward(torch.tensor(upstream).t())
                trained = self.adapter.trained(self.quantizer)
                grads = {
                    name: torch.zeros_like(each) if each.grad is None else each.grad for name, each in trained.items()
                }
                variables = {name: to_numpy(each) for name, each in grads.items()}
        gradient = None if self.weight.grad is None else to_numpy(self.weight.grad)
        return Run(to_numpy(output.t()), "float32", "cpu", to_numpy(self.weight), gradient, variables)


ADAPTER = TorchAdapter()
